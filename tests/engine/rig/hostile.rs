//! What trials that attack, or wear out, are told from outside: how the daemon attaches, and how often they try.

use serde_json::Value;

use super::container::{Container, SCRIPTS};
use super::engine::{Background, Engine};
use super::run;
use super::shell::{Done, poll_quietly};
use super::tools;

/// How the daemon is attached: `IMDS_TRIALS_ATTACH`, `namespace` without it. Attach `host` is not among them: it identifies
/// callers by their source address only, which these trials spoof.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attach {
    Namespace,
    Auto,
}

impl Attach {
    pub fn of_this_run() -> Attach {
        match std::env::var("IMDS_TRIALS_ATTACH").as_deref() {
            Err(_) | Ok("" | "namespace") => Attach::Namespace,
            Ok("auto") => Attach::Auto,
            Ok(other) => panic!("IMDS_TRIALS_ATTACH={other}: expected namespace or auto"),
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Attach::Namespace => "namespace",
            Attach::Auto => "auto",
        }
    }

    /// The daemon's configuration.
    pub fn config(self) -> String {
        format!("account_id = \"111122223333\"\n[serve]\nattach = \"{}\"\n", self.name())
    }
}

/// How often a trial tries: `IMDS_TRIALS_ROUNDS`, or `few` in a run that somebody waits for.
pub fn rounds(few: u32) -> u32 {
    match std::env::var("IMDS_TRIALS_ROUNDS") {
        Err(_) => few,
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("IMDS_TRIALS_ROUNDS={text}: expected a number")),
    }
}

/// Python, and one of the clients in `tests/clients/attacks`, where containers have them.
fn script(name: &str) -> [String; 2] {
    ["/usr/bin/python3".to_owned(), format!("{SCRIPTS}/attacks/{name}.py")]
}

/// Runs one of the attackers' programs in a container, to its end: the last line that it prints.
#[track_caller]
pub fn attack(container: &Container, name: &str, arguments: &[&str]) -> Value {
    let mut command = container.exec_command(&[]);
    command.args(script(name)).args(arguments);
    let done = Done::of(command);
    assert!(done.succeeded(), "{done}");
    last_line(&done.stdout)
}

/// One that goes on by itself, until `stop` tells it that it is over.
pub struct Program {
    process: Background,
    stop: String,
}

impl Program {
    /// Starts it in a container and waits until it says "ready" (`ask` says nothing: it is asking).
    #[track_caller]
    pub fn start(container: &Container, name: &str, arguments: &[&str]) -> Program {
        let number = run::next_number();
        let stop = format!("/tmp/stop-{number}");
        let mut command = container.exec_command(&[]);
        command.args(script(name)).args(arguments);
        // Attackers end by themselves.
        if matches!(name, "victim" | "squat" | "bind_all" | "passive" | "takeover") {
            command.args(["--stop", &stop]);
        }
        let process = container.engine().background(&mut command, &format!("{name}-{number}"));
        let mut program = Program { process, stop };
        if arguments.first() != Some(&"ask") {
            program.wait_for("ready");
        }
        program
    }

    /// Waits until it has printed this line.
    #[track_caller]
    pub fn wait_for(&mut self, line: &str) {
        let said = poll_quietly(std::time::Duration::from_secs(10), || {
            let ended = self.process.ended();
            let said = self.process.output().lines().any(|it| it == line);
            (said || ended.is_some()).then_some(said)
        });
        assert_eq!(
            said,
            Some(true),
            "a client does not say {line:?}:\n{}",
            self.process.output()
        );
    }

    /// Gives the sign to a program that waits for it.
    #[track_caller]
    pub fn go(&self, container: &Container) {
        container.exec(&["touch", &format!("{}.go", self.stop)]);
    }

    /// Tells it that it is over, and returns its last line.
    #[track_caller]
    pub fn stop(self, container: &Container) -> String {
        container.exec(&["touch", &self.stop]);
        self.end()
    }

    /// Waits until it ends by itself; its last line.
    #[track_caller]
    pub fn end(mut self) -> String {
        let ended = poll_quietly(std::time::Duration::from_secs(20), || self.process.ended());
        assert!(ended.is_some(), "a client does not end:\n{}", self.process.output());
        let output = self.process.output();
        output.lines().last().unwrap_or_default().to_owned()
    }
}

/// A program of `tests/clients/attacks` on the engine's host.
pub fn on_host(engine: &Engine, name: &str, arguments: &[&str]) -> Background {
    let mut command = engine.command("/usr/bin/python3");
    let path = tools::scripts().join("attacks").join(format!("{name}.py"));
    command.arg(path).args(arguments);
    engine.background(&mut command, &format!("{name}-{}", run::next_number()))
}

/// The last line of what was printed, as JSON.
#[track_caller]
pub fn last_line(printed: &str) -> Value {
    let line = printed.lines().last().unwrap_or_default();
    serde_json::from_str(line).unwrap_or_else(|e| panic!("no JSON ({e}) at the end of: {printed}"))
}
