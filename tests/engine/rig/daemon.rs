//! The daemon under test, as a process of the engine's host.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::engine::{Background, Engine};
use super::run;
use super::shell::{Done, poll_quietly, tail};
use super::tools;

/// Everything that the daemon can say, for a trial greps it for secrets.
pub const LOG_LEVEL: (&str, &str) = ("IMDS_ROUTER_LOG", "trace");
/// How the verbs that talk to a daemon are told which.
const ADMIN_SOCKET: &str = "IMDS_ROUTER_SERVE_ADMIN_SOCKET";

/// The keys of `[serve]` for an attach. `host` needs the lower level of proof.
pub fn attach_keys(attach: &str) -> String {
    match attach {
        "host" => "attach = \"host\"\nproof = \"address\"\n".to_owned(),
        other => format!("attach = \"{other}\"\n"),
    }
}

/// A running daemon. Dropping it kills it, and removes the private network namespace that it has pinned.
pub struct Daemon {
    engine: Arc<Engine>,
    process: Background,
    directory: PathBuf,
    /// Whether the private network namespace is left to the next daemon in this directory, as after a crash.
    leaves_pin: bool,
}

impl Daemon {
    /// Starts it with this configuration (`[serve]` gets an admin socket and a state directory of its own; `DOCKER_HOST` is
    /// the engine) and waits until its admin socket answers.
    #[track_caller]
    pub fn start(engine: &Arc<Engine>, config: &str, environment: &[(String, String)]) -> Daemon {
        let directory = new_directory(engine);
        Daemon::start_in(engine, directory, config, environment)
    }

    /// As [`start`](Self::start), in the directory of one that has ended: what it left there is found again.
    #[track_caller]
    pub fn start_in(
        engine: &Arc<Engine>,
        directory: PathBuf,
        config: &str,
        environment: &[(String, String)],
    ) -> Daemon {
        Daemon::launch(engine, &[], directory, config, environment).once_it_answers()
    }

    /// As [`start`](Self::start), by a program that makes something worse and becomes the daemon.
    #[track_caller]
    pub fn start_by(engine: &Arc<Engine>, by: &[&str], config: &str, environment: &[(String, String)]) -> Daemon {
        Daemon::launch(engine, by, new_directory(engine), config, environment).once_it_answers()
    }

    #[track_caller]
    fn once_it_answers(self) -> Daemon {
        let mut daemon = self;
        let answered = poll_quietly(Duration::from_secs(15), || {
            let ended = daemon.process.ended();
            match ended {
                Some(status) => Some(Err(status)),
                None => daemon.admin_answers().then_some(Ok(())),
            }
        });
        match answered {
            Some(Ok(())) => daemon,
            Some(Err(status)) => panic!("the daemon ended ({status}) instead of serving:\n{}", daemon.tail()),
            None => panic!("the daemon's admin socket does not answer:\n{}", daemon.tail()),
        }
    }

    /// Starts it and expects it to end by itself, as with a wrong configuration: its exit code and what it printed.
    #[track_caller]
    pub fn start_in_vain(
        engine: &Arc<Engine>,
        config: &str,
        environment: &[(String, String)],
    ) -> (Option<i32>, String) {
        Daemon::start_in_vain_by(engine, &[], config, environment)
    }

    /// As [`start_in_vain`](Self::start_in_vain), by a program that makes something worse and becomes the daemon.
    #[track_caller]
    pub fn start_in_vain_by(
        engine: &Arc<Engine>,
        by: &[&str],
        config: &str,
        environment: &[(String, String)],
    ) -> (Option<i32>, String) {
        let mut daemon = Daemon::launch(engine, by, new_directory(engine), config, environment);
        let ended = poll_quietly(Duration::from_secs(15), || daemon.process.ended());
        match ended {
            Some(status) => (status.code(), daemon.log()),
            None => panic!("the daemon serves, but should not:\n{}", daemon.tail()),
        }
    }

    /// Starts it, and does not wait.
    pub fn launch(
        engine: &Arc<Engine>,
        by: &[&str],
        directory: PathBuf,
        config: &str,
        environment: &[(String, String)],
    ) -> Daemon {
        fs::create_dir_all(&directory).unwrap_or_else(|e| panic!("cannot make {}: {e}", directory.display()));
        let file = directory.join("config.toml");
        fs::write(&file, with_own_paths(config, &directory))
            .unwrap_or_else(|e| panic!("cannot write {}: {e}", file.display()));
        let number = run::next_number();
        let mut words = by.iter().copied().chain([tools::DAEMON]);
        let mut command = engine.command(words.next().unwrap_or_default());
        command
            .args(words)
            .arg("serve")
            .arg("--config")
            .arg(file)
            .env(LOG_LEVEL.0, LOG_LEVEL.1)
            .env("DOCKER_HOST", engine.docker_host())
            .envs(environment.iter().cloned());
        Daemon {
            process: engine.background(&mut command, &format!("daemon-{number}")),
            engine: Arc::clone(engine),
            directory,
            leaves_pin: false,
        }
    }

    /// Its directory: configuration, admin socket, state.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Where it pins the private network namespace.
    pub fn pin(&self) -> PathBuf {
        self.directory.join("state/netns")
    }

    /// Whether a private network namespace is pinned in that directory of a daemon.
    pub fn is_pinned(engine: &Engine, directory: &Path) -> bool {
        let pin = directory.join("state/netns");
        let mounts = engine.host("cat", &["/proc/self/mounts"]);
        mounts.lines().any(|line| line.split(' ').nth(1) == pin.to_str())
    }

    /// Takes the pin away, as the end of a mount namespace does.
    #[track_caller]
    pub fn unpin(&self) {
        let mut umount = self.engine.command("umount");
        umount.arg("--lazy").arg(self.pin());
        Done::of(umount).ok();
    }

    pub fn admin_socket(&self) -> PathBuf {
        self.directory.join("admin.sock")
    }

    pub fn pid(&self) -> u32 {
        self.process.child.id()
    }

    /// All that it has printed.
    pub fn log(&self) -> String {
        self.process.output()
    }

    /// Has it read its configuration again.
    #[track_caller]
    pub fn reload(&self) {
        kill_process(Pid::from_child(&self.process.child), Signal::HUP).expect("it runs");
    }

    /// Stops it as an administrator would; it must end well, and soon. What it has printed in all.
    #[track_caller]
    pub fn stop(mut self) -> String {
        let status = self.end(Signal::TERM);
        assert!(
            status.success(),
            "the daemon was stopped and ended with {status}:\n{}",
            self.tail()
        );
        self.log()
    }

    /// Ends it as a crash would. Its private network namespace stays pinned until the next daemon in its directory stops, or
    /// the engine ends.
    #[track_caller]
    pub fn kill(mut self) {
        self.leaves_pin = true;
        let status = self.end(Signal::KILL);
        assert_eq!(
            status.signal(),
            Some(Signal::KILL.as_raw()),
            "the daemon had ended before it was killed ({status}):\n{}",
            self.tail()
        );
    }

    /// Ends it by that signal, whatever comes of it.
    #[track_caller]
    pub fn end_by(mut self, signal: Signal) -> ExitStatus {
        self.end(signal)
    }

    /// `imds-router status --json`.
    #[track_caller]
    pub fn status(&self) -> Value {
        let text = self.cli(&["status", "--json"]).ok();
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("status is no JSON ({e}): {text}"))
    }

    /// Any verb of `imds-router` that talks to this daemon. What it prints is kept with the logs.
    #[track_caller]
    pub fn cli(&self, words: &[&str]) -> Done {
        self.cli_with_input(words, "")
    }

    /// The same, with something to read.
    #[track_caller]
    pub fn cli_with_input(&self, words: &[&str], input: &str) -> Done {
        let mut command = self.engine.command("timeout");
        command
            .arg("30")
            .arg(tools::DAEMON)
            .args(words)
            .env(ADMIN_SOCKET, self.admin_socket())
            .env("DOCKER_HOST", self.engine.docker_host());
        let done = Done::of_input(command, input.as_bytes());
        append(&self.process.log.with_extension("cli.log"), &done.to_string());
        done
    }

    fn tail(&self) -> String {
        tail(&self.process.log, 40)
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        let _ = kill_process(Pid::from_child(&self.process.child), signal); // it may have ended by itself
        let ended = poll_quietly(Duration::from_secs(10), || self.process.ended());
        ended.unwrap_or_else(|| panic!("the daemon does not end on {signal:?}:\n{}", self.tail()))
    }

    /// Any HTTP answer will do: that something answers is all that counts here.
    fn admin_answers(&self) -> bool {
        let ask = || -> std::io::Result<Vec<u8>> {
            let mut socket = UnixStream::connect(self.admin_socket())?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.write_all(b"GET /status HTTP/1.1\r\nHost: imds-router\r\n\r\n")?;
            let mut start = vec![0; 7];
            socket.read_exact(&mut start)?;
            Ok(start)
        };
        ask().is_ok_and(|start| start == b"HTTP/1.")
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.leaves_pin {
            return;
        }
        self.process.end();
        // After a clean stop nothing is mounted there.
        let mut umount = self.engine.command("umount");
        umount.args(["--lazy", "--quiet"]).arg(self.pin());
        let _ = Done::of(umount);
    }
}

fn new_directory(engine: &Engine) -> PathBuf {
    engine.directory().join(format!("daemon-{}", run::next_number()))
}

/// Adds the two paths to the configuration's `[serve]`, or adds a `[serve]` with them.
fn with_own_paths(config: &str, directory: &Path) -> String {
    let paths = format!(
        "[serve]\nadmin_socket = '{0}/admin.sock'\nstate_dir = '{0}/state'\n",
        directory.display()
    );
    let (mut text, mut done) = (String::new(), false);
    for line in config.lines() {
        if line.trim() == "[serve]" && !done {
            done = true;
            text.push_str(&paths);
        } else {
            text.push_str(line);
            text.push('\n');
        }
    }
    if !done {
        text.push_str(&paths);
    }
    text
}

fn append(file: &Path, text: &str) {
    let open = fs::File::options().create(true).append(true).open(file);
    let written = open.and_then(|mut file| writeln!(file, "{text}"));
    written.unwrap_or_else(|e| panic!("cannot write {}: {e}", file.display()));
}
