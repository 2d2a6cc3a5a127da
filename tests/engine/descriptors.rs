//! How many file descriptors of the daemon a container takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;

use crate::cases::daemon;
use crate::rig::{BOX, Container, Daemon, Engine, Rig, poll, rounds};

/// More are a leak, or a new descriptor per container that the documented limits do not count.
const LIMIT: f64 = 4.0;

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![rig.once(
        "descriptors::a_container_at_rest_takes_four",
        a_container_at_rest_takes_four,
    )]
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

/// Starts the containers, four at a time.
fn start(engine: &Arc<Engine>, network: &str, count: usize) -> Vec<Container> {
    let next = AtomicUsize::new(0);
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
