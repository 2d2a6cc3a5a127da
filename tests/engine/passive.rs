//! Sockets that a container has accepted, where several containers share one network namespace: another one of them makes a server
//! of the victim accept a connection from the address and port of the service. The socket of the server then has the addresses
//! and ports that only a client of the service should have. Then the attacker opens a connection with the same pair.
//!
//! `IMDS_TRIALS_ROUNDS` is how often each attack is tried. The same over bridges is in `attacks.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::hostile::{Program, last_line};
use crate::rig::{Attach, Container, Daemon, Done, Engine, Rig, poll, rounds};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const VICTIM: &str = "victim";
const ADDRESS: &str = "169.254.169.254/32";
/// What the victim's server does: it waits, it speaks first, it does not listen any more.
const SERVERS: [&[&str]; 4] = [
    &[],
    &["--greeting", "78"],
    &["--greeting", "4096"],
    &["--greeting", "78", "--once"],
];
/// The guard's chain alone, without a daemon.
const CLOSED: &str = "add table ip closed; add chain ip closed in { type filter hook input priority -305; }; \
     add rule ip closed in ip saddr 169.254.169.254 tcp sport 80 tcp flags & (syn|ack) == syn drop";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("passive::in_a_shared_namespace", in_a_shared_namespace),
        rig.once("passive::in_the_hosts_network", in_the_hosts_network),
        rig.once("passive::syns_from_the_service", syns_from_the_service),
    ]
}

/// Two containers in one network namespace.
struct Shared {
    victim: Container,
    attacker: Container,
    /// The victim's address.
    address: String,
    /// The link over which the attacker reaches the service.
    link: &'static str,
    ports: AtomicU32,
}

/// What came of one attack: what the attacker has got, and whether the victim had a socket of the pair.
struct Outcome {
    loot: Value,
    deceived: bool,
}

impl Shared {
    fn in_the_hosts_network(engine: &Arc<Engine>, options: &[&str]) -> Shared {
        let start = |role: &str| engine.run(role).label("imds.role", role).network("host");
        let attacker = options
            .iter()
            .fold(start("attacker"), |start, option| start.arg(option));
        Shared {
            victim: start(VICTIM).start(),
            attacker: attacker.start(),
            address: "127.0.0.1".to_owned(),
            link: "lo",
            // Below those that the kernel assigns.
            ports: AtomicU32::new(20_000),
        }
    }

    fn in_one_container(engine: &Arc<Engine>, options: &[&str]) -> Shared {
        let start = |role: &str| engine.run(role).label("imds.role", role);
        let victim = start(VICTIM).start();
        let attacker = start("attacker").network(&format!("container:{}", victim.id()));
        let attacker = options.iter().fold(attacker, |start, option| start.arg(option));
        let attacker = attacker.start();
        Shared {
            address: source_of(&victim),
            victim,
            attacker,
            link: "imds0",
            ports: AtomicU32::new(20_000),
        }
    }

    #[track_caller]
    fn are_served(&self) {
        for (container, role) in [(&self.victim, VICTIM), (&self.attacker, "attacker")] {
            let what = format!("{role} to be served");
            poll(std::time::Duration::from_secs(10), &what, || {
                let reply = container.request("GET", LIST, &[]).ok()?;
                assert!(reply.status != 200 || reply.body == role, "{role} got {reply:?}");
                (reply.status == 200).then_some(())
            });
        }
    }

    #[track_caller]
    fn attack(&self, how: &str, server: &[&str]) -> Outcome {
        self.attack_with(how, server, None)
    }

    /// `between`: what happens between the victim's accept and the attacker's connection to the service.
    #[track_caller]
    fn attack_with(&self, how: &str, server: &[&str], between: Option<&mut dyn FnMut()>) -> Outcome {
        let port = self.ports.fetch_add(1, Ordering::Relaxed).to_string();
        let listen = ["hold", "--state", "listening", "--bind", "0.0.0.0", "--port", &port];
        let victim = Program::start(&self.victim, "victim", &[&listen[..], server].concat());
        let mut attack = vec![
            "--how",
            how,
            "--victim",
            &self.address,
            "--port",
            &port,
            "--link",
            self.link,
        ];
        attack.extend(between.is_some().then_some("--wait"));
        let attacker = Program::start(&self.attacker, "passive", &attack);
        if let Some(between) = between {
            between();
            attacker.go(&self.attacker);
        }
        let loot = last_line(&attacker.end());
        let deceived = last_line(&victim.stop(&self.victim))["deceived"] == 1;
        Outcome { loot, deceived }
    }
}

/// The source address of a container's requests.
#[track_caller]
fn source_of(container: &Container) -> String {
    let what = "the route to the service";
    poll(std::time::Duration::from_secs(10), what, || {
        let mut ip = container.intruder("ip");
        ip.args(["route", "get", "169.254.169.254", "ipproto", "tcp"]);
        let route = Done::of(ip).stdout;
        let source = route.split_whitespace().skip_while(|it| *it != "src").nth(1)?;
        route.contains("dev imds0").then(|| source.to_owned())
    })
}

fn start(engine: &Arc<Engine>) -> Daemon {
    Daemon::start(engine, &Attach::Auto.config(), &engine.moto().daemon_environment())
}

/// What several tries came to.
#[derive(Default)]
struct Tally {
    tries: u32,
    /// The attacker's socket has connected to the victim's server.
    connected: u64,
    deceived: u32,
    connections: u64,
    bytes: u64,
    tells: u64,
    last: Value,
}

impl Tally {
    fn add(&mut self, outcome: Outcome) {
        let number = |name: &str| outcome.loot[name].as_u64().unwrap_or_default();
        self.tries += 1;
        self.connected += number("connected");
        self.deceived += u32::from(outcome.deceived);
        self.connections += number("connections");
        self.bytes += number("bytes");
        self.tells += number("tells");
        self.last = outcome.loot;
    }

    /// Whenever the attacker has connected, which a slow machine prevents, the victim had a socket of the pair.
    #[track_caller]
    fn deceives(&self) {
        assert!(self.connected > 0, "nothing was tried: {}", self.last);
        assert!(
            u64::from(self.deceived) >= self.connected,
            "the victim had {} such sockets of {}: {}",
            self.deceived,
            self.connected,
            self.last
        );
    }

    /// Prints the figures, and asserts that the attacker has got nothing.
    #[track_caller]
    fn robs_nothing(&self, attack: &str) {
        println!(
            "attack {attack} | {} tries, the victim had a socket of the pair in {}, {} connections, {} bytes beyond a 403, {} \
             telling; last {}",
            self.tries, self.deceived, self.connections, self.bytes, self.tells, self.last
        );
        assert_eq!((self.bytes, self.tells), (0, 0), "{attack}: {}", self.last);
    }
}

/// How often the daemon has refused for this reason so far.
fn refused(daemon: &Daemon, reason: &str) -> usize {
    daemon.log().matches(&format!("reason=\"{reason}\"")).count()
}

fn in_a_shared_namespace(engine: &Arc<Engine>) {
    let mut daemon = start(engine);
    let shared = Shared::in_one_container(engine, &["--cap-add=NET_ADMIN"]);
    shared.are_served();
    for server in SERVERS {
        let mut tally = Tally::default();
        for _ in 0..rounds(1) {
            tally.add(shared.attack("address", server));
        }
        tally.robs_nothing(&format!("NET_ADMIN in a shared namespace, server {server:?}"));
        // Everything but the daemon's last two conditions is met.
        tally.deceives();
        assert!(tally.connections > 0, "nothing was tried: {}", tally.last);
        let reason = match server.contains(&"--once") {
            true => "accepted",
            false => "listener-at-port",
        };
        assert!(refused(&daemon, reason) > 0, "{reason}: {}", daemon.log());
    }
    // The victim has accepted before the daemon started.
    let mut tally = Tally::default();
    for _ in 0..rounds(1) {
        let mut running = Some(daemon);
        let mut restart = || {
            let before = running.take().expect("it runs");
            let directory = before.directory().to_owned();
            before.kill();
            let environment = engine.moto().daemon_environment();
            running = Some(Daemon::start_in(
                engine,
                directory,
                &Attach::Auto.config(),
                &environment,
            ));
            shared.are_served();
        };
        tally.add(shared.attack_with("address", SERVERS[3], Some(&mut restart)));
        daemon = running.expect("it was started");
    }
    tally.robs_nothing("NET_ADMIN in a shared namespace, accepted before the daemon started");
    tally.deceives();
    // With the rights that Docker grants by default.
    for how in ["transparent", "raw"] {
        let mut tally = Tally::default();
        for server in [SERVERS[0], SERVERS[3]] {
            for _ in 0..rounds(1) {
                tally.add(shared.attack(how, server));
            }
        }
        tally.robs_nothing(&format!("NET_RAW in a shared namespace, {how}"));
    }
    shared.are_served();
    daemon.stop();
}

fn in_the_hosts_network(engine: &Arc<Engine>) {
    for (options, ways) in [(&[][..], &["raw", "bind"][..]), (&["--cap-drop=NET_RAW"], &["bind"])] {
        let daemon = start(engine);
        let shared = Shared::in_the_hosts_network(engine, options);
        shared.are_served();
        for how in ways {
            let mut tally = Tally::default();
            for server in [SERVERS[0], SERVERS[3]] {
                for _ in 0..rounds(1) {
                    tally.add(shared.attack(how, server));
                }
            }
            tally.robs_nothing(&format!("in the host's network {options:?}, {how}"));
            assert_eq!(tally.deceived, 0, "the guard lets a SYN through: {}", tally.last);
        }
        daemon.stop();
        // The victim has accepted before the daemon started, on a host that has the address already.
        let mut tally = Tally::default();
        for _ in 0..rounds(1) {
            engine.host("ip", &["addr", "add", ADDRESS, "dev", "lo"]);
            let mut running = None;
            let mut launch = || {
                running = Some(start(engine));
                shared.are_served();
            };
            tally.add(shared.attack_with("bind", SERVERS[3], Some(&mut launch)));
            let log = running.expect("it was started").stop();
            assert!(log.contains("were connected to the address of the service"), "{log}");
            engine.host("ip", &["addr", "del", ADDRESS, "dev", "lo"]);
        }
        tally.robs_nothing(&format!(
            "in the host's network {options:?}, accepted before the daemon started"
        ));
        tally.deceives();
    }
}

/// The guard's chain is what prevents the victim's accept, not something else.
fn syns_from_the_service(engine: &Arc<Engine>) {
    engine.host("ip", &["addr", "add", ADDRESS, "dev", "lo"]);
    let shared = Shared::in_the_hosts_network(engine, &["--cap-drop=NET_RAW"]);
    let accepts = |server| shared.attack("bind", server).deceived;
    assert!(SERVERS.iter().all(|server| accepts(server)), "without the rule");
    engine.host("/usr/sbin/nft", &[CLOSED]);
    assert!(!SERVERS.iter().any(|server| accepts(server)), "with the rule");
    engine.host("/usr/sbin/nft", &["delete", "table", "ip", "closed"]);
    assert!(accepts(SERVERS[0]), "without the rule");
    engine.host("ip", &["addr", "del", ADDRESS, "dev", "lo"]);
}
