//! Firewall rules inside a container decide about requests to the metadata service as on EC2.

use std::sync::Arc;

use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::cases::{daemon, is_itself};
use crate::rig::container::SCRIPTS;
use crate::rig::{Container, Engine, Rig, poll, run_script};

const IPV4: &str = "169.254.169.254";
const IPV6: &str = "fd00:ec2::254";

/// What is expected for root and for an unprivileged user.
#[derive(Clone, Copy)]
enum Expected {
    BothServed,
    BothBlocked,
    RootServed,
    /// A listener in the container gets the requests.
    Local,
}

/// A set of rules: its name, the address that is asked, the commands that install it, and what is expected.
type Case = (&'static str, &'static str, &'static str, Expected);

const CASES: [Case; 15] = [
    (
        "REJECT of a user at port 80",
        IPV4,
        "iptables -A OUTPUT -p tcp -d 169.254.169.254 --dport 80 -m owner --uid-owner 1000 -j REJECT",
        Expected::RootServed,
    ),
    (
        "REJECT without a port",
        IPV4,
        "iptables -A OUTPUT -d 169.254.169.254 -j REJECT",
        Expected::BothBlocked,
    ),
    (
        "DROP at port 80",
        IPV4,
        "iptables -A OUTPUT -p tcp -d 169.254.169.254 --dport 80 -j DROP",
        Expected::BothBlocked,
    ),
    (
        "DROP without a port",
        IPV4,
        "iptables -A OUTPUT -d 169.254.169.254 -j DROP",
        Expected::BothBlocked,
    ),
    (
        "nft reject",
        IPV4,
        "nft add table ip t; nft 'add chain ip t o { type filter hook output priority 0; }'; \
         nft add rule ip t o ip daddr 169.254.169.254 tcp dport 80 reject with tcp reset",
        Expected::BothBlocked,
    ),
    (
        "nft drop of a user",
        IPV4,
        "nft add table inet t; nft 'add chain inet t o { type filter hook output priority 0; }'; \
         nft add rule inet t o meta skuid 1000 ip daddr 169.254.169.254 drop",
        Expected::RootServed,
    ),
    ("policy DROP", IPV4, "iptables -P OUTPUT DROP", Expected::BothBlocked),
    (
        "DROP of the answers",
        IPV4,
        "iptables -A INPUT -p tcp -s 169.254.169.254 --sport 80 -j DROP",
        Expected::BothBlocked,
    ),
    (
        "allow-list",
        IPV4,
        "iptables -P OUTPUT DROP; iptables -P INPUT DROP; \
         iptables -A OUTPUT -p tcp -d 169.254.169.254 --dport 80 -j ACCEPT; \
         iptables -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
        Expected::BothServed,
    ),
    (
        "nft allow-list",
        IPV4,
        "nft add table inet t; nft 'add chain inet t o { type filter hook output priority 0; policy drop; }'; \
         nft 'add chain inet t i { type filter hook input priority 0; policy drop; }'; \
         nft add rule inet t o ip daddr 169.254.169.254 tcp dport 80 ct state new,established accept; \
         nft add rule inet t i ct state established accept",
        Expected::BothServed,
    ),
    (
        "DNAT to a listener of the container",
        IPV4,
        "iptables -t nat -A OUTPUT -p tcp -d 169.254.169.254 --dport 80 -j DNAT --to-destination 127.0.0.1:8080",
        Expected::Local,
    ),
    // Documented: packets leave by imds0.
    (
        "REJECT on another link",
        IPV4,
        "iptables -A OUTPUT -o eth0 -d 169.254.169.254 -j REJECT",
        Expected::BothServed,
    ),
    (
        "REJECT on the link",
        IPV4,
        "iptables -A OUTPUT -o imds0 -j REJECT",
        Expected::BothBlocked,
    ),
    (
        "REJECT of a user over IPv6",
        IPV6,
        "ip6tables -A OUTPUT -p tcp -d fd00:ec2::254 --dport 80 -m owner --uid-owner 1000 -j REJECT",
        Expected::RootServed,
    ),
    (
        "allow-list over IPv6",
        IPV6,
        "ip6tables -P OUTPUT DROP; ip6tables -P INPUT DROP; \
         ip6tables -A OUTPUT -p tcp -d fd00:ec2::254 --dport 80 -j ACCEPT; \
         ip6tables -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
        Expected::BothServed,
    ),
];

/// Containers see the machine's programs without `/etc/alternatives`.
const PROGRAMS: &str =
    "set -e; PATH=/usr/sbin:/usr/bin; iptables() { iptables-nft \"$@\"; }; ip6tables() { ip6tables-nft \"$@\"; }";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![rig.once("filters::rules_decide_as_on_ec2", rules_decide_as_on_ec2)]
}

fn run(container: &Container, commands: &str) {
    container.exec(&["/bin/sh", "-c", &format!("{PROGRAMS}; {commands}")]);
}

/// What root and an unprivileged user get.
fn reach(container: &Container, address: &str) -> Value {
    run_script(container, "reach.py", &[address, "0", "1000"])
}

fn rules_decide_as_on_ec2(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "namespace");
    let network = engine.network_with_ipv6("filters6", "fd00:4ea::/64");
    let container = engine
        .run("filtered")
        .label("imds.role", "filtered")
        .network(network.name());
    let container = container.arg("--cap-add=NET_ADMIN").start();
    network.await_ipv6();
    is_itself(&container);
    let id = container.get("/latest/meta-data/instance-id", &[]).body;
    let mut server = container.exec_command(&[]);
    server.args(["/usr/bin/python3", &format!("{SCRIPTS}/local_server.py"), "8080"]);
    let server = engine.background(&mut server, "local-server");
    poll(std::time::Duration::from_secs(5), "the container's own server", || {
        server.output().contains("ready").then_some(())
    });
    let mut wrong = Vec::new();
    for (name, address, commands, expected) in CASES {
        let served = json!([id, id]);
        let before = reach(&container, address);
        run(&container, commands);
        let with = reach(&container, address);
        run(&container, "nft flush ruleset");
        let after = reach(&container, address);
        println!("{name}: {with}");
        let is_expected = match expected {
            Expected::BothServed => with == served,
            Expected::BothBlocked => is_blocked(&with[0]) && is_blocked(&with[1]),
            Expected::RootServed => with[0] == id.as_str() && is_blocked(&with[1]),
            Expected::Local => with == json!(["local", "local"]),
        };
        if before != served || !is_expected || after != served {
            wrong.push(format!(
                "{name}: before {before}, with the rules {with}, afterwards {after}"
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    drop(server);
    daemon.stop();
}

/// No answer of any service has come.
fn is_blocked(outcome: &Value) -> bool {
    let blocked = [
        "timeout",
        "Connection refused",
        "Operation not permitted",
        "Connection reset by peer",
    ];
    outcome.as_str().is_some_and(|it| blocked.contains(&it))
}
