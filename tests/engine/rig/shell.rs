//! Running programs, and waiting for things.

use std::ffi::OsStr;
use std::fmt;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::run;

/// No program of a trial takes this long; one that does hangs, and must not take the whole run with it.
const PROGRAM_LIMIT: &str = "90";

/// `program`, which is ended when it hangs.
pub fn limited(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", PROGRAM_LIMIT]).arg(program);
    command
}

/// Out of the terminal's process group: Ctrl-C is for the rig, which then takes everything down in order.
pub fn away_from_the_terminal(command: &mut Command) -> &mut Command {
    run::go_on();
    command.process_group(0).stdin(Stdio::null())
}

/// What a program did.
#[derive(Debug, Clone)]
pub struct Done {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub command: String,
}

impl Done {
    /// Runs `command` to its end.
    #[track_caller]
    pub fn of(command: Command) -> Done {
        Done::of_input(command, b"")
    }

    /// Runs `command` to its end; `input` is all that it can read.
    #[track_caller]
    pub fn of_input(mut command: Command, input: &[u8]) -> Done {
        run::go_on();
        let shown = show(&command);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut run = || {
            let mut child = command.spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                let _ = stdin.write_all(input); // who does not read has a reason, and will say it
            }
            child.wait_with_output()
        };
        let output = run().unwrap_or_else(|e| panic!("cannot run {shown}: {e}"));
        run::go_on(); // it may have been ended because the run is
        Done {
            status: output.status,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
            command: shown,
        }
    }

    pub fn succeeded(&self) -> bool {
        self.status.success()
    }

    /// What it printed; a failure is a failure of the trial.
    #[track_caller]
    pub fn ok(self) -> String {
        assert!(self.succeeded(), "{self}");
        self.stdout.trim_end().to_owned()
    }

    /// What it complained about; a success is a failure of the trial.
    #[track_caller]
    pub fn fails(self) -> String {
        assert!(!self.succeeded(), "should have failed: {self}");
        self.stderr.trim_end().to_owned()
    }
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}\n{}{}", self.command, self.status, self.stdout, self.stderr)
    }
}

fn show(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs a program of the machine and returns what it printed.
#[track_caller]
pub fn sh(program: &str, args: &[&str]) -> String {
    let mut command = limited(program);
    command.args(args);
    Done::of(command).ok()
}

/// Asks again and again until there is an answer; says `what` was waited for when there is none in time.
#[track_caller]
pub fn poll<T>(deadline: Duration, what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    match poll_quietly(deadline, &mut ask) {
        Some(answer) => answer,
        None => panic!("waited {deadline:?} for {what}, in vain"),
    }
}

/// As [`poll`], for a caller who has more to say about the failure.
pub fn poll_quietly<T>(deadline: Duration, mut ask: impl FnMut() -> Option<T>) -> Option<T> {
    let start = Instant::now();
    loop {
        run::go_on();
        if let Some(answer) = ask() {
            return Some(answer);
        }
        if start.elapsed() > deadline {
            return None;
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// The last `lines` lines of a log.
pub fn tail(log: &std::path::Path, lines: usize) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
