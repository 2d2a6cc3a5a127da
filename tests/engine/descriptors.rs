//! How many file descriptors of the daemon a container takes.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::cases::{daemon, is_itself};
use crate::floods::ASK;
use crate::rig::hostile::last_line;
use crate::rig::{BOX, Container, Daemon, Engine, Rig, poll, rounds};

/// More are a leak, or a new descriptor per container that the documented limits do not count.
const LIMIT: f64 = 4.0;

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once(
            "descriptors::a_container_at_rest_takes_four",
            a_container_at_rest_takes_four,
        ),
        rig.once(
            "descriptors::a_shortage_is_told_and_ends_by_itself",
            a_shortage_is_told_and_ends_by_itself,
        ),
        rig.once(
            "descriptors::status_is_answered_when_no_number_is_free",
            status_is_answered_when_no_number_is_free,
        ),
        rig.once(
            "descriptors::many_containers_within_the_limit",
            many_containers_within_the_limit,
        ),
    ]
}

fn open(daemon: &Daemon) -> usize {
    let path = format!("/proc/{}/fd", daemon.pid());
    std::fs::read_dir(&path).map_or(0, Iterator::count)
}

/// Waits until the number no longer changes: connections of look-ups and probes close.
fn at_rest(daemon: &Daemon) -> usize {
    let mut last = (open(daemon), 0);
    poll(Duration::from_secs(20), "the descriptors to settle", || {
        std::thread::sleep(Duration::from_millis(90));
        let now = open(daemon);
        last = if now == last.0 { (now, last.1 + 1) } else { (now, 0) };
        (last.1 >= 10).then_some(now)
    })
}

fn a_container_at_rest_takes_four(engine: &Arc<Engine>) {
    let count = rounds(100) as usize;
    let daemon = daemon(engine, "namespace");
    let network = engine.network_with_ipv6("descriptors", "fd00:4ec::/64");
    let before = at_rest(&daemon);
    let containers = start(engine, network.name(), count);
    poll(Duration::from_secs(60), "all containers to be served", || {
        let status = daemon.status();
        let shown = status["containers"].as_array().expect("a list");
        (shown.len() == count).then_some(())
    });
    let after = at_rest(&daemon);
    let each = (after - before) as f64 / count as f64;
    println!("{before} descriptors without containers, {after} with {count}: {each:.2} each");
    assert!(each <= LIMIT, "{each:.2} descriptors per container");
    // One call ends them all.
    let ids: Vec<&str> = containers.iter().map(Container::id).collect();
    engine.docker(&[&["kill"], ids.as_slice()].concat());
    poll(Duration::from_secs(30), "the descriptors to be closed", || {
        (open(&daemon) <= before + 4).then_some(())
    });
    engine.docker(&[&["rm", "--force", "--volumes"], ids.as_slice()].concat());
    containers.into_iter().for_each(Container::forget);
    daemon.stop();
}

/// More containers than the limit has descriptors for: every report names the shortage, and when containers end, those that were not
/// served are.
fn a_shortage_is_told_and_ends_by_itself(engine: &Arc<Engine>) {
    let config = "account_id = \"111122223333\"\n";
    let limit = ["sh", "-c", "ulimit -n 90; exec \"$@\"", "sh"];
    let daemon = Daemon::start_by(engine, &limit, config, &engine.moto().daemon_environment());
    let network = engine.network("descriptors", &["--subnet=10.201.0.0/16"]);
    let mut containers = start(engine, network.name(), 24);
    let problems = || -> Vec<String> {
        let status = daemon.status();
        let all = status["containers"].as_array().expect("a list").iter();
        all.flat_map(|it| it["problems"].as_array().cloned().unwrap_or_default())
            .map(|problem| problem.to_string())
            .collect()
    };
    poll(Duration::from_secs(20), "a container without a descriptor", || {
        problems()
            .iter()
            .any(|it| it.contains("Too many open files"))
            .then_some(())
    });
    assert!(
        problems().iter().all(|it| it.contains("Too many open files")),
        "{:?}",
        problems()
    );
    let warnings = daemon.status()["warnings"].to_string();
    assert!(warnings.contains("too many open files: "), "{warnings}");
    let doctor = daemon.cli(&["doctor"]).stdout;
    assert!(doctor.contains("too many open files: "), "{doctor}");
    let socket = daemon.admin_socket();
    let socket = socket.to_str().expect("its name is text");
    let metrics = engine.host("curl", &["-s", "--unix-socket", socket, "http://imds-router/metrics"]);
    assert!(
        metrics.contains("imds_router_descriptor_shortages_total{work="),
        "{metrics}"
    );
    assert!(daemon.log().contains("Too many open files"));
    // Each time, though the links leave no other descriptor.
    for _ in 0..20 {
        let asked = Instant::now();
        daemon.status();
        assert!(
            asked.elapsed() < Duration::from_secs(5),
            "status took {:?}",
            asked.elapsed()
        );
    }
    // Half of them end.
    let ended = containers.split_off(12);
    let ids: Vec<&str> = ended.iter().map(Container::id).collect();
    engine.docker(&[&["rm", "--force", "--volumes"], ids.as_slice()].concat());
    ended.into_iter().for_each(Container::forget);
    for container in &containers {
        poll(Duration::from_secs(8), "a container to be served", || role(container));
    }
    // Each link is looked at every 5 s until nothing is missing.
    poll(Duration::from_secs(8), "all to be well", || {
        problems().is_empty().then_some(())
    });
    daemon.stop();
}

/// The limit falls to the lowest number that is free, as if other work had taken all. Each connection to the admin socket gets the
/// number of the spare descriptor, and the daemon opens the spare again afterwards, without using a processor while it waits.
fn status_is_answered_when_no_number_is_free(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "namespace");
    at_rest(&daemon);
    let pid = Pid::from_raw(daemon.pid().cast_signed()).expect("a process");
    let descriptors = PathBuf::from(format!("/proc/{}/fd", daemon.pid()));
    let lowest_free = (0..).find(|number| !descriptors.join(number.to_string()).exists());
    let limit = Rlimit {
        current: lowest_free,
        ..getrlimit(Resource::Nofile)
    };
    let before = prlimit(Some(pid), Resource::Nofile, limit).expect("root may lower it");
    for _ in 0..10 {
        let asked = Instant::now();
        daemon.status();
        assert!(
            asked.elapsed() < Duration::from_secs(5),
            "status took {:?}",
            asked.elapsed()
        );
    }
    // A client that holds the only number: others wait, and the daemon does not try again and again.
    let held = UnixStream::connect(daemon.admin_socket()).expect("it listens");
    let waiting = UnixStream::connect(daemon.admin_socket()).expect("its backlog has a place");
    let used = processor_time(&daemon);
    std::thread::sleep(Duration::from_secs(2));
    let used = processor_time(&daemon) - used;
    assert!(
        used < Duration::from_millis(400),
        "{used:?} of processor time within 2 s"
    );
    drop((held, waiting));
    poll(Duration::from_secs(5), "status", || {
        daemon.cli(&["status", "--json"]).succeeded().then_some(())
    });
    prlimit(Some(pid), Resource::Nofile, before).expect("root may raise it");
    daemon.stop();
}

/// Fields 14 and 15 of `stat`, in clock ticks (proc_pid_stat(5)).
fn processor_time(daemon: &Daemon) -> Duration {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", daemon.pid())).expect("it runs");
    let (_, after_name) = stat.rsplit_once(") ").expect("a name in brackets");
    let fields: Vec<&str> = after_name.split(' ').collect();
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|it| it.parse::<u64>().expect("a number"))
        .sum();
    Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
}

/// Whether a container of the image [`BOX`] gets its role.
fn role(container: &Container) -> Option<()> {
    let url = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let got = container.try_exec(&["timeout", "5", "wget", "-q", "-O", "-", url]);
    (got.stdout.trim() == "descriptors").then_some(())
}

/// A hard limit of 4,096 and four for each container is enough, and requests take as long as among ten containers.
/// `IMDS_TRIALS_ROUNDS=1000` starts as many.
fn many_containers_within_the_limit(engine: &Arc<Engine>) {
    let count = rounds(20) as usize;
    let limit = format!("ulimit -n {}; exec \"$@\"", 4096 + 4 * count);
    let config = "account_id = \"111122223333\"\n";
    let daemon = Daemon::start_by(
        engine,
        &["sh", "-c", &limit, "sh"],
        config,
        &engine.moto().daemon_environment(),
    );
    let network = engine.network("descriptors", &["--subnet=10.201.0.0/16"]);
    let asking = engine.run("asking").label("imds.role", "asking").start();
    is_itself(&asking);
    let ask = || last_line(&asking.exec(&["/usr/bin/python3", "-c", ASK, "4"]));
    let mut containers = start(engine, network.name(), 10);
    let among_ten = ask();
    containers.extend(start_from(10, engine, network.name(), count));
    let next = AtomicUsize::new(0);
    let served = || {
        while let Some(container) = containers.get(next.fetch_add(1, Ordering::Relaxed)) {
            poll(Duration::from_secs(10), "a container to be served", || role(container));
        }
    };
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(served))));
    let among_all = ask();
    println!(
        "among 10: {among_ten}; among {count}: {among_all}; {} descriptors",
        open(&daemon)
    );
    assert_eq!(among_all["failed"], serde_json::json!({}), "{among_all}");
    let ids: Vec<&str> = containers.iter().map(Container::id).collect();
    for some in ids.chunks(100) {
        engine.docker(&[&["rm", "--force", "--volumes"], some].concat());
    }
    containers.into_iter().for_each(Container::forget);
    daemon.stop();
}

/// Starts the containers, four at a time.
fn start(engine: &Arc<Engine>, network: &str, count: usize) -> Vec<Container> {
    start_from(0, engine, network, count)
}

/// As [`start`], but for those that were started before.
fn start_from(first: usize, engine: &Arc<Engine>, network: &str, count: usize) -> Vec<Container> {
    let next = AtomicUsize::new(first);
    let start_some = || {
        let mut started = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= count {
                return started;
            }
            let name = format!("descriptors-{number}");
            let run = engine.run(&name).bare_image(BOX).label("imds.role", "descriptors");
            started.push(run.network(network).start());
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(start_some)).collect();
        let started = threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("containers start"));
        started.collect()
    })
}
