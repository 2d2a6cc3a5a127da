//! What deployments lean on: waiting for the daemon, its health, and two of them on one host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::cases::is_itself;
use crate::rig::tools::{self, DAEMON};
use crate::rig::{Daemon, Done, Engine, Rig, poll};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = rig.in_each_view(
        "deploy::one_serves_and_the_other_stands_by",
        one_serves_and_the_other_stands_by,
    );
    trials.push(rig.once(
        "deploy::the_listener_outlives_a_daemon_that_is_killed",
        the_listener_outlives_a_daemon_that_is_killed,
    ));
    trials.push(rig.once("deploy::what_happens_is_counted", what_happens_is_counted));
    trials.push(rig.once("deploy::status_is_watched", status_is_watched));
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

/// By a stand-in for systemd, which cannot be the first process here.
fn the_listener_outlives_a_daemon_that_is_killed(engine: &Arc<Engine>) {
    let script = tools::scripts().join("supervisor.py");
    let by = ["/usr/bin/python3", &engine.outside(&script.to_string_lossy())];
    let daemon = Daemon::start_by(engine, &by, OFFLINE, &[]);
    let container = engine.run("app").label("imds.role", "app").start();
    is_itself(&container);
    let said = |what: &str| daemon.log().lines().filter(|line| *line == what).count();
    poll(Duration::from_secs(5), "readiness, and signs of life", || {
        (said("supervisor: heard READY=1") == 1 && said("supervisor: heard WATCHDOG=1") > 2).then_some(())
    });
    let started = || -> Vec<Pid> {
        let log = daemon.log();
        let pids = log.lines().filter_map(|line| line.strip_prefix("supervisor: started "));
        let pids = pids.map(|pid| Pid::from_raw(pid.parse().expect("a number")).expect("a process"));
        pids.collect()
    };
    // The listener, as the host shows it: its inode stays what it is.
    let listener = || {
        let listed = engine.host("ss", &["-ltneH", "src", "169.254.169.254"]);
        let inode = listed.split_whitespace().find(|word| word.starts_with("ino:"));
        inode.unwrap_or_else(|| panic!("nothing listens: {listed}")).to_owned()
    };
    let before = listener();
    // The link of the container leads to the private namespace. A unit has mounts of its own, so that its pin is lost with it.
    let link = || {
        let mut ip = container.intruder("ip");
        ip.args(["-brief", "link", "show", "imds0"]);
        Done::of(ip).ok()
    };
    let far_end = link();
    daemon.unpin();

    let [first] = started()[..] else {
        panic!("one daemon is started at first:\n{}", daemon.log());
    };
    kill_process(first, Signal::KILL).expect("it runs");
    // While nobody accepts, nobody else can listen there.
    poll(Duration::from_secs(5), "the second to be ready", || {
        assert_eq!(listener(), before);
        (started().len() == 2 && said("supervisor: heard READY=1") == 2).then_some(())
    });
    is_itself(&container);
    assert_eq!(listener(), before);
    assert_eq!(link(), far_end, "the service manager has kept the private namespace");
    let nobody = engine.request("GET", "http://169.254.169.254/", &[]);
    assert!(nobody.as_ref().is_ok_and(|reply| reply.status == 403), "{nobody:?}");
    let log = daemon.stop();
    assert!(log.contains("supervisor: heard STOPPING=1"), "{log}");
    assert!(log.contains("supervisor: heard FDSTOREREMOVE=1"), "{log}");

    let no_listener = ["sh", "-c", "LISTEN_FDS=1 exec \"$@\" 3</dev/null", "sh"];
    let (code, said) = Daemon::start_in_vain_by(engine, &no_listener, OFFLINE, &[]);
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("what is no TCP listener"), "{said}");
    assert!(said.contains("hint: ListenStream=169.254.169.254:51254"), "{said}");
}

fn status_is_watched(engine: &Arc<Engine>) {
    let daemon = Daemon::start(engine, OFFLINE, &[]);
    let mut command = engine.command(DAEMON);
    command.args(["status", "--watch", "--json", "--admin"]);
    command.arg(daemon.admin_socket());
    let mut watch = engine.background(&mut command, "watch");
    // What it has printed in whole lines: a status is how many containers run, a word of the program's is no JSON.
    let seen = || {
        let said = watch.output();
        let lines = said
            .lines()
            .filter(|line| line.starts_with("imds-router: ") || line.ends_with('}'));
        let mut seen: Vec<Option<usize>> = lines
            .map(|line| {
                let status: Value = serde_json::from_str(line).ok()?;
                Some(status["containers"].as_array().expect("a list").len())
            })
            .collect();
        seen.dedup();
        seen
    };
    let until = |expected: &[Option<usize>]| {
        poll(Duration::from_secs(10), &format!("{expected:?} to be seen"), || {
            (seen() == expected).then_some(())
        });
    };
    until(&[Some(0)]);
    let container = engine.run("app").label("imds.role", "app").start();
    until(&[Some(0), Some(1)]);
    // Over a restart of the daemon, whose absence it tells.
    let directory = daemon.directory().to_owned();
    daemon.kill();
    until(&[Some(0), Some(1), None]);
    let daemon = Daemon::start_in(engine, directory, OFFLINE, &[]);
    is_itself(&container);
    poll(Duration::from_secs(10), "the next daemon to be seen", || {
        (seen().last() == Some(&Some(1))).then_some(())
    });
    daemon.stop();
    assert!(watch.ended().is_none(), "{}", watch.output());
}

fn who_waits_goes_on_when_it_is_known(engine: &Arc<Engine>) {
    let binary = format!("--volume={}:/opt/imds-router:ro", engine.outside(DAEMON));
    let waiting = |name: &str, label: &str| engine.run(name).label(label, name).arg(&binary).start();
    let (container, unlabeled) = (waiting("app", "imds.role"), waiting("other", "role"));
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
    let refused = unlabeled.try_exec(&short);
    assert_eq!(refused.status.code(), Some(1), "{refused}");
    assert!(
        refused.stderr.contains("the last that was heard: status 403"),
        "{refused}"
    );
    daemon.stop();
}

fn what_happens_is_counted(engine: &Arc<Engine>) {
    let config = format!("{OFFLINE}[serve]\nmetrics = \"127.0.0.1:9254\"\n");
    let daemon = Daemon::start(engine, &config, &[]);
    let app = engine.run("app").label("imds.role", "app").start();
    is_itself(&app);
    let token = app.token();
    app.get("/latest/meta-data/instance-id", &[("X-aws-ec2-metadata-token", &token)]);
    // The host itself: nobody.
    let nobody = engine.request("GET", "http://169.254.169.254/", &[]);
    assert!(nobody.as_ref().is_ok_and(|reply| reply.status == 403), "{nobody:?}");
    let ask = |path: &str| {
        let reply = engine.request("GET", &format!("http://127.0.0.1:9254{path}"), &[]);
        reply.unwrap_or_else(|why| panic!("{path}: {why:?}"))
    };
    let metrics = ask("/metrics").body;
    let count = |what: &str| {
        let line = metrics.lines().find_map(|line| line.strip_prefix(what));
        let line = line.unwrap_or_else(|| panic!("{what} is not in:\n{metrics}"));
        line.trim()
            .parse::<f64>()
            .unwrap_or_else(|e| panic!("{what}: {e}: {line}"))
    };
    assert_eq!(count("imds_router_requests_total{version=\"2\",status=\"200\"}"), 2.0);
    assert!(count("imds_router_requests_total{version=\"1\",status=\"200\"}") >= 1.0);
    assert_eq!(count("imds_router_sts_calls_total{outcome=\"ok\"}"), 1.0);
    assert_eq!(count("imds_router_sessions{state=\"live\"}"), 1.0);
    assert_eq!(count("imds_router_containers_running"), 1.0);
    assert_eq!(count("imds_router_engine_synchronised"), 1.0);
    assert_eq!(count("imds_router_standing_by"), 0.0);
    assert!(count("imds_router_connections_open") < 3.0);
    assert_eq!(
        count("imds_router_connections_at_limit_total{outcome=\"made_room\"}"),
        0.0
    );
    assert_eq!(
        count("imds_router_connections_at_limit_total{outcome=\"refused\"}"),
        0.0
    );
    let (events, behind) = (
        count("imds_router_engine_events_total"),
        count("imds_router_engine_event_lag_seconds_total"),
    );
    assert!(
        events >= 3.0 && behind > 0.0 && behind / events < 1.0,
        "{behind} s in {events} events"
    );
    let refused: Vec<_> = metrics
        .lines()
        .filter(|line| line.starts_with("imds_router_refused_connections_total{"))
        .collect();
    assert!(
        matches!(refused.as_slice(), [one] if one.ends_with(" 1")),
        "{refused:?}"
    );
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    assert!(!metrics.contains("ASIA") && !metrics.contains(app.id()), "{metrics}");

    assert_eq!(ask("/livez").body, "alive");
    let ready = ask("/readyz");
    assert!(ready.status == 200 && ready.body.starts_with("serves 1 "), "{ready:?}");
    for path in ["/status", "/explain/app", "/login"] {
        assert_eq!(ask(path).status, 404, "{path}");
    }
    // Without the engine nobody new is known: not ready, but alive.
    engine.kill();
    poll(Duration::from_secs(5), "the engine to be missed", || {
        let reply = ask("/readyz");
        (reply.status == 503 && reply.body.starts_with("the engine is away")).then_some(())
    });
    assert_eq!(ask("/livez").status, 200);
    engine.restart();
    poll(Duration::from_secs(10), "readiness", || {
        (ask("/readyz").status == 200).then_some(())
    });
    daemon.stop();
}
