//! A container with NET_ADMIN removes the link, its routes or other settings: they are restored at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::cases::{daemon, is_itself};
use crate::rig::{Engine, Rig, poll, rounds, run_script};

/// After this, a request is answered again.
const LIMIT_MS: f64 = 100.0;
/// The pause between two removals: below the rate at which repairs are suspended (more than 10 within one second), also for
/// a command that is seen as two removals.
const PAUSE_MS: &str = "220";

const IPV4: &str = "169.254.169.254";
const IPV6: &str = "fd00:ec2::254";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once(
            "repair::restores_what_a_container_removes",
            restores_what_a_container_removes,
        ),
        rig.once(
            "repair::suspends_repairs_of_one_container_only",
            suspends_repairs_of_one_container_only,
        ),
    ]
}

fn restores_what_a_container_removes(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "namespace");
    let network = engine.network_with_ipv6("repair6", "fd00:4e9::/64");
    let container = engine
        .run("repaired")
        .label("imds.role", "repaired")
        .network(network.name());
    let container = container.arg("--cap-add=NET_ADMIN").start();
    network.await_ipv6();
    is_itself(&container);
    let rounds = rounds(5).to_string();
    let mut slow = Vec::new();
    for (address, command) in [
        (IPV4, "nft flush ruleset"),
        (IPV4, "iptables-nft -F"),
        (IPV4, "ip addr flush dev lo"),
        (IPV4, "ip link set lo down; ip link set lo up"),
        (IPV6, "ip link set lo down; ip link set lo up"),
        (IPV4, "ip link del imds0"),
        (IPV6, "ip link del imds0"),
        (IPV4, "ip link set imds0 down"),
        (IPV6, "ip link set imds0 down"),
        (IPV4, "ip route flush table 169"),
        (IPV4, "ip route del 169.254.169.254 dev imds0 table 169"),
        (IPV6, "ip -6 route del fd00:ec2::254 dev imds0 table 169"),
    ] {
        let path = format!("export PATH=/usr/sbin:/usr/bin; {command}");
        let times = run_script(&container, "repaired.py", &[&rounds, PAUSE_MS, address, &path]);
        println!("{command} ({address}): {times}");
        let times = times.as_array().expect("a list");
        if times.iter().any(|time| time.as_f64().is_none_or(|ms| ms > LIMIT_MS)) {
            slow.push(format!("{command} ({address}): {times:?}"));
        }
    }
    assert!(slow.is_empty(), "not served again within {LIMIT_MS} ms: {slow:#?}");
    is_itself(&container);
    daemon.stop();
}

fn suspends_repairs_of_one_container_only(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "namespace");
    let storm = engine
        .run("storm")
        .label("imds.role", "storm")
        .arg("--cap-add=NET_ADMIN")
        .start();
    let calm = engine.run("calm").label("imds.role", "calm").start();
    is_itself(&storm);
    is_itself(&calm);
    let removed = run_script(&storm, "remove.py", &["30"]).as_u64().expect("a number");
    let start = Instant::now();
    assert!(
        (11..30).contains(&removed),
        "repairs are not suspended after {removed} removals"
    );
    let times = run_script(&calm, "repaired.py", &["20", "5", IPV4, "true"]);
    println!("{removed} removals; the neighbor was served after {times} ms");
    let times = times.as_array().expect("a list");
    assert!(
        times.iter().all(|time| time.as_f64().is_some_and(|ms| ms <= LIMIT_MS)),
        "{times:?}"
    );
    let problems = |name: &str| {
        let status = daemon.status();
        let containers = status["containers"].as_array().cloned().unwrap_or_default();
        let container = containers.into_iter().find(|it| it["name"] == name);
        container.map(|it| it["problems"].to_string()).unwrap_or_default()
    };
    // The first suspension, of one second, may be over. The next ones last two and more.
    poll(
        Duration::from_secs(20),
        "status and health to show the suspension",
        || {
            run_script(&storm, "remove.py", &["30"]);
            let health = daemon.cli(&["health"]).ok();
            let is_shown = problems("storm").contains("suspended");
            (is_shown && health.contains("1 have no link that works, such as storm")).then_some(())
        },
    );
    assert!(!problems("calm").contains("suspended"), "{}", problems("calm"));
    poll(Duration::from_secs(10), "repairs to be resumed", || {
        let reply = storm.request("GET", crate::cases::LIST, &[]).ok()?;
        (reply.status == 200 && reply.body == "storm").then_some(())
    });
    println!("served again {:?} after the first suspension", start.elapsed());
    poll(Duration::from_secs(5), "the problem to be gone", || {
        (!problems("storm").contains("suspended")).then_some(())
    });
    daemon.stop();
}
