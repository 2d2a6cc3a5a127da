//! The last trials: no core dump of a daemon, and no secret in anything that a trial has produced.

use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;
use rustix::process::Signal;

use crate::rig::{Daemon, Done, Engine, Rig, poll};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let all = rig.clone();
    vec![
        rig.once("secrecy::writes_no_core_dump", writes_no_core_dump),
        rig.once("secrecy::no_secret_in_any_log_or_status", move |engine| {
            no_secret(&all, engine)
        }),
    ]
}

/// Whether the kernel dumped core is in the exit status, whatever `core_pattern` does with the dump. That the process is not
/// dumpable either (a `core_pattern` that is a pipe ignores the limit): tests/cli.rs.
fn writes_no_core_dump(engine: &Arc<Engine>) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let mut control = engine.command("sh");
    control.args(["-c", "cd \"$1\" && ulimit -c unlimited && kill -ABRT $$", "sh"]);
    control.arg(engine.outside(&directory.path().to_string_lossy()));
    let control = Done::of(control);
    assert_eq!(control.status.signal(), Some(Signal::ABORT.as_raw()), "{control}");
    assert!(control.status.core_dumped(), "this machine dumps core: {control}");

    let daemon = Daemon::start(engine, "[credentials]\nsource = \"offline\"", &[]);
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).expect("it runs");
    let limit = limits.lines().find(|line| line.starts_with("Max core file size"));
    let limit: Vec<&str> = limit.expect("Linux has this limit").split_whitespace().collect();
    assert_eq!(limit[4..], ["0", "0", "bytes"], "{limits}");
    let status = daemon.end_by(Signal::ABORT);
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
    assert!(!status.core_dumped(), "the daemon's memory was written to a core dump");
}

fn no_secret(rig: &Rig, engine: &Arc<Engine>) {
    // A whole job at the finest level, so that this trial says something when it is run alone.
    let moto = engine.moto();
    let account = "account_id = \"111122223333\"";
    let daemon = Daemon::start(engine, account, &moto.daemon_environment());
    let app = engine.run("app").label("imds.role", "app").start();
    let token = app.token();
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    let document = app.get(&format!("{LIST}app"), &headers);
    assert!(document.body.contains("SecretAccessKey"), "{document:?}");
    daemon.status();
    daemon.cli(&["status"]).ok();
    daemon.cli(&["check"]);
    assert!(daemon.log().contains("TRACE"), "the daemon logs at its finest level");
    daemon.stop();
    let offline = Daemon::start(engine, "[credentials]\nsource = \"offline\"", &[]);
    let fake = poll(Duration::from_secs(5), "fake credentials", || {
        let document: serde_json::Value = serde_json::from_str(&app.get(&format!("{LIST}app"), &[]).body).ok()?;
        Some(["SecretAccessKey", "Token"].map(|key| document[key].as_str().expect("a text").to_owned()))
    });
    offline.status();
    offline.stop();

    let output = rig.all_output();
    let mut secrets: Vec<String> = rig.secrets().into_iter().collect();
    assert!(secrets.len() >= 3, "there were secrets: base, key and token at least");
    secrets.push(token);
    secrets.extend(fake);
    for secret in &secrets {
        assert!(
            !output.contains(secret.as_str()),
            "a secret that begins with {secret:.4} is in a log"
        );
    }
}
