//! What deployments lean on: waiting for the daemon, its health, and two of them on one host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::cases::is_itself;
use crate::rig::tools::DAEMON;
use crate::rig::{Daemon, Engine, Rig, poll};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = rig.in_each_view(
        "deploy::one_serves_and_the_other_stands_by",
        one_serves_and_the_other_stands_by,
    );
    trials.push(rig.once(
        "deploy::who_waits_goes_on_when_it_is_known",
        who_waits_goes_on_when_it_is_known,
    ));
    trials
}

const OFFLINE: &str = "[credentials]\nsource = \"offline\"\n";

/// What `health` says of a daemon that is well.
#[track_caller]
fn health(daemon: &Daemon) -> String {
    daemon.cli(&["health"]).ok()
}

fn one_serves_and_the_other_stands_by(engine: &Arc<Engine>) {
    let first = Daemon::start(engine, OFFLINE, &[]);
    let container = engine.run("app").label("imds.role", "app").start();
    is_itself(&container);
    let said = health(&first);
    assert!(said.starts_with("serves ") && said.contains(" containers"), "{said}");
    let refused = || first.status()["refused_connections"].clone();
    let before = refused();
    health(&first);
    assert_eq!(refused(), before, "a daemon's question to itself is nobody's refusal");

    let second = Daemon::start(engine, OFFLINE, &[]);
    let who = format!("stands by: imds-router, process {} serves this host", first.pid());
    // Whoever was killed a moment ago is waited for before that is said.
    let asked = || second.cli(&["health"]);
    poll(Duration::from_secs(5), "the second to stand by", || {
        (asked().stdout.trim() == who).then_some(())
    });
    let warned = second.status()["warnings"].to_string();
    assert!(warned.contains(&format!("process {}", first.pid())), "{warned}");
    let third = Daemon::start(engine, OFFLINE, &[]);
    is_itself(&container);
    // One that stands by goes without a trace.
    third.stop();
    is_itself(&container);

    first.kill();
    let began = Instant::now();
    is_itself(&container);
    let taken = began.elapsed();
    assert!(taken < Duration::from_secs(2), "taken over after {taken:?}");
    let said = poll(Duration::from_secs(2), "the health of the second", || {
        let said = asked().stdout;
        (!said.is_empty()).then_some(said)
    });
    assert!(said.starts_with("serves "), "{said}");
    second.stop();
}

fn who_waits_goes_on_when_it_is_known(engine: &Arc<Engine>) {
    let binary = format!("--volume={}:/opt/imds-router:ro", engine.outside(DAEMON));
    let waiting = |name: &str, label: &str| engine.run(name).label(label, name).arg(&binary).start();
    let (container, unlabelled) = (waiting("app", "imds.role"), waiting("other", "role"));
    let short = ["/opt/imds-router", "wait", "--timeout", "500ms"];
    let in_vain = container.try_exec(&short);
    assert_eq!(in_vain.status.code(), Some(1), "{in_vain}");
    assert!(
        in_vain.stderr.contains("does not answer this container within 500ms"),
        "{in_vain}"
    );

    let mut waits = container.exec_command(&[]);
    waits.args(["/opt/imds-router", "wait", "--timeout", "20s"]);
    let mut waits = engine.background(&mut waits, "waits");
    let daemon = Daemon::start(engine, OFFLINE, &[]);
    let ended = poll(Duration::from_secs(10), "the wait to end", || waits.ended());
    assert!(ended.success(), "{ended}: {}", waits.output());
    is_itself(&container);
    // Who is refused goes on waiting.
    let refused = unlabelled.try_exec(&short);
    assert_eq!(refused.status.code(), Some(1), "{refused}");
    assert!(
        refused.stderr.contains("the last that was heard: status 403"),
        "{refused}"
    );
    daemon.stop();
}
