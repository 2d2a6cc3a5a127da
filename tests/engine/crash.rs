//! After a crash of the daemon no process of a container can take over its address.

use std::sync::Arc;

use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::cases::{daemon, is_itself};
use crate::rig::hostile::Program;
use crate::rig::{Daemon, Engine, Rig};

const ADDRESSES: [&str; 2] = ["169.254.169.254", "[fd00:ec2::254]"];
const PATH: &str = "/latest/meta-data/instance-id";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![rig.once(
        "crash::refuses_until_the_daemon_serves_again",
        refuses_until_the_daemon_serves_again,
    )]
}

fn refuses_until_the_daemon_serves_again(engine: &Arc<Engine>) {
    let first = daemon(engine, "namespace");
    let network = engine.network_with_ipv6("crash6", "fd00:4eb::/64");
    let container = engine.run("crash").label("imds.role", "crash").network(network.name());
    // An unprivileged process may bind port 80, which is Docker's default since 20.10.
    let container = container.arg("--sysctl=net.ipv4.ip_unprivileged_port_start=0").start();
    network.await_ipv6();
    is_itself(&container);
    let id = container.get(PATH, &[]).body;
    let answer = |address: &str| container.request("GET", &format!("http://{address}{PATH}"), &[]);
    let directory = first.directory().to_owned();
    first.kill();
    let squatter = Program::start(&container, "bind_all", &[]);
    for address in ADDRESSES {
        for attempt in 0..20 {
            let why = answer(address).expect_err("nothing serves");
            assert!(why.connection_refused(), "attempt {attempt} at {address}: {why}");
        }
    }
    let config = "account_id = \"111122223333\"\n[serve]\nattach = \"namespace\"";
    let second = Daemon::start_in(engine, directory, config, &engine.moto().daemon_environment());
    is_itself(&container);
    for address in ADDRESSES {
        for _ in 0..20 {
            let reply = answer(address).unwrap_or_else(|why| panic!("{address}: {why}"));
            assert_eq!((reply.status, reply.body.as_str()), (200, id.as_str()), "{address}");
        }
    }
    let report: Value = serde_json::from_str(&squatter.stop(&container)).expect("JSON");
    println!("{report}");
    assert_eq!(report["taken"], 0, "{report}");
    for address in ["0.0.0.0", "::", "169.254.169.254", "fd00:ec2::254"] {
        let bound = report["bound"].as_array().expect("a list");
        assert!(
            bound.contains(&json!(address)),
            "it did not even bind {address}: {report}"
        );
    }
    second.stop();
}
