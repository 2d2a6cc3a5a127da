//! Attacks, with real packets, on a real engine: what a neighbour, an intruder or a squatter gets of the victim's answers.
//!
//! Each attack runs three times over: against the daemon, where it must get nothing; against a stand-in for servers that
//! trust a source address ([`naive`](Field::naive)), where it must get something, or it proves nothing; and while the
//! victim asks on, which must get its own role and no other.
//!
//! `IMDS_TRIALS_ROUNDS` is how often each tries, `IMDS_TRIALS_ATTACH` how the daemon is attached.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::hostile::{Program, attack, last_line, on_host};
use crate::rig::{Attach, Background, Container, Daemon, Done, Engine, Network, Rig, poll, rounds};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const VICTIM: &str = "victim";
/// Where the stand-in listens, on the bridge's gateway.
const NAIVE_PORT: &str = "8181";
/// Where the one listens that demands a socket of the victim, too.
const PROVING_PORT: &str = "8182";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once(
            "attacks::a_neighbour_sends_as_the_victim",
            a_neighbour_sends_as_the_victim,
        ),
        rig.once("attacks::answers_diverted", answers_diverted),
        rig.once(
            "attacks::ports_that_the_victim_has_left",
            ports_that_the_victim_has_left,
        ),
        rig.once(
            "attacks::connections_that_the_victim_has_open",
            connections_that_the_victim_has_open,
        ),
        rig.once(
            "attacks::packets_sent_into_the_victims_namespace",
            packets_sent_into_the_victims_namespace,
        ),
        rig.once(
            "attacks::connections_that_the_victim_has_accepted",
            connections_that_the_victim_has_accepted,
        ),
        rig.once("attacks::net_admin", net_admin),
        rig.once(
            "attacks::kept_alive_beyond_its_owners_death",
            kept_alive_beyond_its_owners_death,
        ),
        rig.once("attacks::a_token_over_a_restart", a_token_over_a_restart),
        rig.once(
            "attacks::processes_of_the_host_in_the_namespace",
            processes_of_the_host_in_the_namespace,
        ),
        rig.once("attacks::squatting_beside_a_killed_daemon", squatting),
        rig.once("attacks::squatting_in_the_victims_namespace", squatting_inside),
        rig.once("attacks::requests_that_no_client_makes", requests_that_no_client_makes),
    ]
}

/// A bridge with a victim, a neighbour with Docker's default rights, the daemon, and the stand-in.
struct Field {
    attach: Attach,
    daemon: Option<Daemon>,
    _naive: Background,
    victim: Container,
    neighbour: Container,
    address: String,
    mac: String,
    gateway: String,
    ports: AtomicU32,
    // After its containers.
    _network: Network,
}

/// Whom an attack is made on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Target {
    Daemon,
    Naive,
}

impl Field {
    #[track_caller]
    fn new(engine: &Arc<Engine>, neighbours_options: &[&str]) -> Field {
        Field::with(engine, neighbours_options, "")
    }

    /// `keys`: more lines of `[serve]`.
    #[track_caller]
    fn with(engine: &Arc<Engine>, neighbours_options: &[&str], keys: &str) -> Field {
        let field = Field::new_unchecked(engine, neighbours_options, keys, true);
        assert_eq!(field.victim.get(LIST, &[]).body, VICTIM);
        field
    }

    /// The victim has no link to the service: a link of another program has its name.
    #[track_caller]
    fn without_a_link(engine: &Arc<Engine>) -> Field {
        let field = Field::new_unchecked(engine, &[], "", false);
        let what = "the reason and the time of the next attempt in status";
        poll(Duration::from_secs(10), what, || {
            let daemon = field.daemon.as_ref()?;
            let status = daemon.status()["containers"].to_string();
            (status.contains("no link to the service (") && status.contains("next attempt ")).then_some(())
        });
        field
    }

    #[track_caller]
    fn new_unchecked(engine: &Arc<Engine>, neighbours_options: &[&str], keys: &str, has_link: bool) -> Field {
        let attach = Attach::of_this_run();
        // Of its own: whatever is poisoned goes with it.
        let network = engine.network("battlefield", &[]);
        let config = format!("{}{keys}\n", attach.config());
        let victim = engine
            .run("victim")
            .label("imds.role", VICTIM)
            .network(network.name())
            // As on every host of a container engine: a new namespace has the settings of the machine's first one.
            .arg("--sysctl=net.ipv4.ip_forward=1");
        let start_daemon = || Daemon::start(engine, &config, &engine.moto().daemon_environment());
        let (daemon, victim) = match has_link {
            true => (start_daemon(), victim.start()),
            false => {
                let victim = victim.start();
                let mut ip = victim.intruder("ip");
                ip.args(["link", "add", "imds0", "type", "veth", "peer", "name", "other0"]);
                Done::of(ip).ok();
                (start_daemon(), victim)
            }
        };
        let mut neighbour = engine
            .run("neighbour")
            .label("imds.role", "attacker")
            .network(network.name());
        for option in neighbours_options {
            neighbour = neighbour.arg(option);
        }
        let neighbour = neighbour.start();
        let address = victim.address(network.name()).to_string();
        let mac = victim.inspect("{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}");
        let naive = on_host(engine, "naive", &["--port", NAIVE_PORT, &format!("{address}={VICTIM}")]);
        let field = Field {
            attach,
            daemon: Some(daemon),
            _naive: naive,
            gateway: victim.gateway().to_string(),
            victim,
            neighbour,
            address,
            mac,
            // Below those that the kernel gives away by itself.
            ports: AtomicU32::new(20_000),
            _network: network,
        };
        assert_eq!(field.neighbour.get(LIST, &[]).body, "attacker");
        let url = format!("http://{}:{NAIVE_PORT}{LIST}", field.gateway);
        poll(
            Duration::from_secs(5),
            "the stand-in to take the victim for itself",
            || (field.victim.request("GET", &url, &[]).ok()?.body == VICTIM).then_some(()),
        );
        field
    }

    /// A port of the victim that no trial has used: what became of a connection that was taken is in nobody's way.
    fn new_port(&self) -> String {
        self.ports.fetch_add(1, Ordering::Relaxed).to_string()
    }

    fn server(&self, target: Target) -> [&str; 4] {
        match target {
            Target::Daemon => ["--server", "169.254.169.254", "--server-port", "80"],
            Target::Naive => ["--server", &self.gateway, "--server-port", NAIVE_PORT],
        }
    }

    fn victim_is(&self) -> [&str; 4] {
        ["--victim", &self.address, "--victim-mac", &self.mac]
    }

    /// Lets the neighbour run an attack.
    #[track_caller]
    fn attack(&self, name: &str, target: Target, more: &[&str]) -> Value {
        let arguments = [&self.victim_is()[..], &self.server(target), more].concat();
        attack(&self.neighbour, name, &arguments)
    }

    /// The victim asks the daemon until it is told to stop.
    #[track_caller]
    fn victim_asks(&self) -> Program {
        Program::start(&self.victim, "victim", &["ask"])
    }

    /// The neighbour's own address and credentials go on working, and so do the victim's. Poison goes by and by: what a kernel
    /// has heard it believes for up to 45 s, and asks for 8 s more before it forgets (arp(7): base_reachable_time,
    /// delay_first_probe_time, ucast_solicit).
    #[track_caller]
    fn everybody_is_served(&self) {
        for (container, role) in [(&self.victim, VICTIM), (&self.neighbour, "attacker")] {
            poll(Duration::from_secs(90), &format!("{role} to be served again"), || {
                let body = container.request("GET", LIST, &[]).ok()?.body;
                assert!(body.is_empty() || body == role, "{role} got {body}");
                (body == role).then_some(())
            });
        }
    }

    #[track_caller]
    fn stop(mut self) {
        self.everybody_is_served();
        if let Some(daemon) = self.daemon.take() {
            daemon.stop();
        }
    }
}

/// Parts that one program can do: none of a trial may take longer than 90 s.
fn parts(all: u32) -> impl Iterator<Item = u32> {
    parts_of(all, 25)
}

fn parts_of(all: u32, most: u32) -> impl Iterator<Item = u32> {
    (0..all.div_ceil(most)).map(move |part| most.min(all - part * most))
}

/// Connections that are taken at once: each takes seconds of waiting.
const AT_ONCE: u32 = 8;

fn number(row: &Value, name: &str) -> u64 {
    row[name]
        .as_u64()
        .unwrap_or_else(|| panic!("no number {name} in {row}"))
}

/// Says what an attack got, in a form that the figures can be taken from.
fn report(attack: &str, attach: Attach, target: Target, loot: &Value) {
    let number = |name: &str| number(loot, name);
    println!(
        "attack {attack} | {} | {} tries, {} connections, {} answers {}, {} bytes beyond a 403, {} telling",
        match target {
            Target::Daemon => format!("attach {}", attach.name()),
            Target::Naive => "stand-in".to_owned(),
        },
        number("tries"),
        number("connections"),
        number("answers"),
        loot["statuses"],
        number("bytes"),
        number("tells"),
    );
}

#[track_caller]
fn assert_nothing(attack: &str, loot: &Value) {
    assert_eq!(
        (number(loot, "bytes"), number(loot, "tells")),
        (0, 0),
        "{attack}: the attacker has an answer that is the victim's: {loot}"
    );
}

#[track_caller]
fn assert_works(attack: &str, loot: &Value) {
    assert!(
        number(loot, "tells") > 0,
        "{attack}: gets nothing of a server that trusts addresses, so it proves nothing: {loot}"
    );
}

/// What a victim that asked all along got: its own role, `at_least` times, and no other. How often it could ask depends on
/// how long the attack took, so that is not counted on: that it is served in the end is asked for apart.
#[track_caller]
fn assert_own(asked: &str, at_least: u64) -> Value {
    let asked = last_line(asked);
    assert_eq!(number(&asked, "foreign"), 0, "the victim got another's role: {asked}");
    assert!(
        number(&asked, "own") >= at_least,
        "the victim was not served while it was attacked: {asked}"
    );
    asked
}

fn a_neighbour_sends_as_the_victim(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    for how in [&[][..], &["--talk"], &["--arp"], &["--arp", "--mac", "own"]] {
        let name = format!("impersonate {}", how.join(" "));
        let control = field.attack("impersonate", Target::Naive, &[&["--tries", "4"], how].concat());
        report(&name, field.attach, Target::Naive, &control);
        assert_works(&name, &control);

        let (mut loot, mut asked) = (Value::Null, Value::Null);
        for part in parts(rounds(4)) {
            let victim = field.victim_asks();
            let tries = part.to_string();
            let one = field.attack("impersonate", Target::Daemon, &[&["--tries", &tries], how].concat());
            add(&mut loot, one);
            // Whatever was poisoned, it is served in the end; meanwhile it may have waited in vain.
            field.everybody_is_served();
            add(&mut asked, assert_own(&victim.stop(&field.victim), 0));
        }
        report(&name, field.attach, Target::Daemon, &loot);
        println!("the victim meanwhile: {asked}");
        assert_nothing(&name, &loot);
        assert!(
            number(&loot, "connections") > 0,
            "{name}: not one handshake with the daemon's host, so nothing was tried: {loot}"
        );
    }
    field.stop();
}

/// Answers to the victim do not cross the bridge, so that a neighbor that diverts the bridge's traffic reads none of them.
fn answers_diverted(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    // The victim asks about 40 times a second.
    let seconds = (1.0 + f64::from(rounds(6)) * 0.1).to_string();
    for how in ["arp", "fdb"] {
        let name = format!("divert {how}");
        for target in [Target::Naive, Target::Daemon] {
            let asking = [&["ask"][..], &field.server(target)].concat();
            let victim = Program::start(&field.victim, "victim", &asking);
            let loot = field.attack("divert", target, &["--how", how, "--seconds", &seconds]);
            report(&name, field.attach, target, &loot);
            let asked = last_line(&victim.stop(&field.victim));
            println!("the victim meanwhile: {asked}");
            assert_eq!(number(&asked, "foreign"), 0, "{asked}");
            match target {
                Target::Naive => assert_works(&name, &loot),
                Target::Daemon => {
                    assert_nothing(&name, &loot);
                    assert!(number(&asked, "own") > 5, "{asked}");
                }
            }
        }
    }
    // The same, further: the victim's connection ends at the neighbour, one of the neighbour's goes on in its name.
    let loot = field.taken_over("middle", "connecting");
    assert_nothing("in the middle", &loot);
    field.stop();
}

/// Ports that the victim's sockets still hold, half-open or half-closed, used by the neighbour.
fn ports_that_the_victim_has_left(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    for state in ["close-wait", "time-wait"] {
        for target in [Target::Naive, Target::Daemon] {
            let name = format!("re-use {state}");
            let mut loot = Value::Null;
            for part in parts(rounds(4)) {
                let text = field.new_port();
                let holder = field.victim_holds(state, &text, target);
                let how = ["--port", &text, "--tries", &part.to_string(), "--patience", "0.3"];
                add(&mut loot, field.attack("impersonate", target, &how));
                holder.stop(&field.victim);
            }
            report(&name, field.attach, target, &loot);
            match target {
                Target::Daemon => assert_nothing(&name, &loot),
                Target::Naive => assert_works(&name, &loot),
            }
        }
    }
    // SYN_SENT, and FIN_WAIT.
    for (how, state) in [("half-open", "connecting"), ("deaf", "closing")] {
        let loot = field.taken_over(how, state);
        assert_nothing(how, &loot);
    }
    field.stop();
}

/// Connections that the victim keeps open, as pools do. Its socket is ESTABLISHED and its own; whether the server's end of it
/// is the one that a neighbour talks to is another question.
fn connections_that_the_victim_has_open(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    let all = [
        ("inject", "established"),
        ("inject", "silent"),
        ("reset", "established"),
        ("reset", "silent"),
        ("deaf", "asking-last"),
    ]
    .map(|(how, state)| (format!("{how}, the victim {state}"), field.taken_over(how, state)));
    // All figures first.
    for (name, loot) in &all {
        assert_nothing(name, loot);
    }
    field.stop();
}

/// What the victim's server does when a connection comes: it waits, it speaks first, it does not listen any more.
const SERVERS: [&[&str]; 4] = [
    &[],
    &["--greeting", "78"],
    &["--greeting", "4096"],
    &["--greeting", "78", "--once"],
];

/// Connections that the neighbor opens to the victim, with the server's address and port as its own. The victim's socket is
/// ESTABLISHED and has the victim's cgroup, but the victim did not connect.
fn connections_that_the_victim_has_accepted(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    // The stand-in for a server that takes a socket of the victim as proof.
    let pid = field.victim.pid().to_string();
    let role = format!("{}={VICTIM}", field.address);
    let words = ["--port", PROVING_PORT, "--socket-of", &pid, &role];
    let _proving = on_host(engine, "naive", &words);
    let url = format!("http://{}:{PROVING_PORT}{LIST}", field.gateway);
    poll(
        Duration::from_secs(5),
        "the stand-in to see the victim's socket",
        || (field.victim.request("GET", &url, &[]).ok()?.body == VICTIM).then_some(()),
    );
    // It is not as easily deceived as the other one.
    let gateway = field.gateway.clone();
    let proving = ["--server", &gateway, "--server-port", PROVING_PORT];
    let more = ["--tries", "4", "--arp"];
    let spoofing = attack(
        &field.neighbour,
        "impersonate",
        &[&field.victim_is()[..], &proving, &more].concat(),
    );
    assert_nothing("impersonate", &spoofing);

    for server in SERVERS {
        let name = format!("connections that the victim has accepted, server {server:?}");
        let control = field.accepted(server, proving, Target::Naive, 1);
        report(&name, field.attach, Target::Naive, &control);
        assert_works(&name, &control);
        // Its SYN-ACK leaves over its link, so that the neighbor cannot answer it.
        field.robs_nothing_by_accepted(&name, server, rounds(1), 0);
    }
    field.stop();

    // A container whose attach failed: all it sends crosses the bridge.
    let mut field = Field::without_a_link(engine);
    for server in SERVERS {
        let name = format!("connections that a victim without a link has accepted, server {server:?}");
        field.robs_nothing_by_accepted(&name, server, rounds(1), rounds(1));
    }
    // The victim has accepted before the daemon started, which then gives it a link.
    let mut ip = field.victim.intruder("ip");
    ip.args(["link", "del", "imds0"]);
    Done::of(ip).ok();
    let mut all = Value::Null;
    for _ in 0..rounds(1) {
        add(&mut all, field.accepted_before_the_daemon(engine));
    }
    let name = "connections that the victim has accepted before the daemon started";
    report(name, field.attach, Target::Daemon, &all);
    assert_accepted(name, &all, rounds(1));
    field.stop();
}

const OF_THE_DAEMON: [&str; 4] = ["--server", "169.254.169.254", "--server-port", "80"];

/// The victim had a socket of the server's address and port in so many tries, and the neighbor has got nothing.
#[track_caller]
fn assert_accepted(name: &str, all: &Value, deceived: u32) {
    assert!(number(all, "connections") > 0, "{name}: nothing was tried: {all}");
    assert_eq!(
        number(all, "deceived"),
        u64::from(deceived),
        "{name}: whether the victim had such a socket: {all}"
    );
    assert_nothing(name, all);
}

impl Field {
    #[track_caller]
    fn robs_nothing_by_accepted(&self, name: &str, server: &[&str], times: u32, deceived: u32) {
        let all = self.accepted(server, OF_THE_DAEMON, Target::Daemon, times);
        report(name, self.attach, Target::Daemon, &all);
        println!("the victim had a socket of the pair in {} of {times}", all["deceived"]);
        assert_accepted(name, &all, deceived);
    }

    /// A server of the victim, at `port`, of which another end is to be the one that `at` names.
    #[track_caller]
    fn victim_listens(&self, port: &str, server: &[&str], at: [&str; 4]) -> Program {
        let listen = ["hold", "--state", "listening", "--bind", &self.address, "--port", port];
        Program::start(&self.victim, "victim", &[&listen[..], server, &at].concat())
    }

    /// Tries in which the victim accepts and the neighbor then asks: their sum.
    #[track_caller]
    fn accepted(&self, server: &[&str], at: [&str; 4], target: Target, times: u32) -> Value {
        let mut all = Value::Null;
        for _ in 0..times {
            let port = self.new_port();
            let holder = self.victim_listens(&port, server, at);
            let accept = ["--how", "accept", "--port", &port, "--seconds", "3"];
            let taking = [&self.victim_is()[..], &at, &accept].concat();
            let mut one = attack(&self.neighbour, "takeover", &taking);
            one["deceived"] = last_line(&holder.stop(&self.victim))["deceived"].clone();
            add(&mut all, one);
        }
        println!("{target:?}: the victim has accepted {} of {times}", all["accepted"]);
        all
    }

    #[track_caller]
    fn accepted_before_the_daemon(&mut self, engine: &Arc<Engine>) -> Value {
        let daemon = self.daemon.take().expect("it runs");
        let directory = daemon.directory().to_owned();
        daemon.stop();
        let port = self.new_port();
        let holder = self.victim_listens(&port, &["--greeting", "78"], OF_THE_DAEMON);
        let accept = ["--how", "accept", "--wait", "--port", &port, "--seconds", "3"];
        let taking = [&self.victim_is()[..], &OF_THE_DAEMON, &accept].concat();
        let mut taker = Program::start(&self.neighbour, "takeover", &taking);
        taker.wait_for("accepted");
        let environment = engine.moto().daemon_environment();
        self.daemon = Some(Daemon::start_in(engine, directory, &self.attach.config(), &environment));
        self.everybody_is_served();
        taker.go(&self.neighbour);
        let mut one = last_line(&taker.end());
        one["deceived"] = last_line(&holder.stop(&self.victim))["deceived"].clone();
        one
    }
}

impl Field {
    /// The victim has a connection in a certain state. It comes from its address on the bridge, even where the service is
    /// inside its namespace: what a neighbour can say, too.
    #[track_caller]
    fn victim_holds(&self, state: &str, port: &str, target: Target) -> Program {
        let how = ["hold", "--state", state, "--bind", &self.address, "--port", port];
        Program::start(&self.victim, "victim", &[&how[..], &self.server(target)].concat())
    }

    /// A connection of the victim, and the neighbour's attempt to take it.
    #[track_caller]
    fn start_taking(&self, how: &str, state: &str, target: Target) -> (Program, Program) {
        let text = self.new_port();
        let taking = [
            &self.victim_is()[..],
            &self.server(target),
            &["--how", how, "--port", &text, "--seconds", "4"],
        ]
        .concat();
        let take = || Program::start(&self.neighbour, "takeover", &taking);
        match state {
            // The attacker is there before the victim's connection is.
            "connecting" => {
                let taker = take();
                (self.victim_holds(state, &text, target), taker)
            }
            "established" | "silent" => (self.victim_holds(state, &text, target), take()),
            // The attacker listens before the victim goes on.
            _ => {
                let holder = self.victim_holds(state, &text, target);
                let taker = take();
                holder.go(&self.victim);
                (holder, taker)
            }
        }
    }

    /// Connections of the victim, which the neighbour takes from it, few at once: first from the stand-in, where it must work,
    /// then from the daemon: what came of it.
    #[track_caller]
    fn taken_over(&self, how: &str, state: &str) -> Value {
        let name = format!("take over {how}, the victim {state}");
        let mut all = Value::Null;
        for (target, times) in [(Target::Naive, 1), (Target::Daemon, rounds(2))] {
            all = Value::Null;
            for some in parts_of(times, AT_ONCE) {
                let tries: Vec<_> = (0..some).map(|_| self.start_taking(how, state, target)).collect();
                for (holder, taker) in tries {
                    add(&mut all, last_line(&taker.end()));
                    holder.stop(&self.victim);
                }
            }
            report(&name, self.attach, target, &all);
            if target == Target::Naive {
                assert_works(&name, &all);
            }
        }
        self.everybody_is_served();
        all
    }
}

/// Sums up what single tries got.
fn add(all: &mut Value, one: Value) {
    let Some(sum) = all.as_object_mut() else {
        *all = one;
        return;
    };
    for (name, value) in one.as_object().into_iter().flatten() {
        match (sum.get(name).cloned(), value) {
            (Some(Value::Number(before)), Value::Number(more)) => {
                let total = before.as_u64().unwrap_or_default() + more.as_u64().unwrap_or_default();
                sum.insert(name.clone(), total.into());
            }
            (Some(mut before @ Value::Object(_)), Value::Object(_)) => {
                add(&mut before, value.clone());
                sum.insert(name.clone(), before);
            }
            (Some(Value::String(before)), _) if !before.is_empty() => {}
            _ => {
                sum.insert(name.clone(), value.clone());
            }
        }
    }
}

/// The victim's namespace has a link to the service, and may forward what comes over another link to it. Packets of inner
/// containers arrive in this way, and with `docker_in_docker = "inherit"` they are served.
fn packets_sent_into_the_victims_namespace(engine: &Arc<Engine>) {
    for nested in ["refuse", "inherit"] {
        packets_sent_into(engine, nested);
    }
}

fn packets_sent_into(engine: &Arc<Engine>, nested: &str) {
    // With br_netfilter, which not every host has, frames that cross a bridge pass the host's rules, which change the port.
    let over_rules = |value: &str| {
        let set =
            format!("f=/proc/sys/net/bridge/bridge-nf-call-iptables; [ ! -e $f ] || {{ cat $f; echo {value} > $f; }}");
        engine.host("sh", &["-c", &set])
    };
    let before = over_rules("0");
    let field = Field::with(engine, &[], &format!("docker_in_docker = \"{nested}\""));
    let forwards = field.victim.exec(&["cat", "/proc/sys/net/ipv4/ip_forward"]);
    println!("nested = {nested}; the victim's ip_forward is {}", forwards.trim());
    // A stand-in in the victim's own namespace.
    let mut naive = field.victim.exec_command(&[]);
    naive.args([
        "/usr/bin/python3",
        "/opt/clients/attacks/naive.py",
        "--port",
        NAIVE_PORT,
    ]);
    let nobody = {
        let address: std::net::Ipv4Addr = field.address.parse().expect("an address");
        let [a, b, c, _] = address.octets();
        std::net::Ipv4Addr::new(a, b, c, 250)
    };
    naive.arg(format!("{nobody}={VICTIM}"));
    let _inside = engine.background(&mut naive, "naive-inside");
    let url = format!("http://{}:{NAIVE_PORT}{LIST}", field.address);
    poll(Duration::from_secs(5), "the stand-in inside", || {
        field.neighbour.request("GET", &url, &[]).ok()
    });
    let victim = field.victim_is();
    let into = ["--server", &field.address, "--ports", NAIVE_PORT, "--tries", "1"];
    let control = attack(&field.neighbour, "intrude", &[&victim[..], &into].concat());
    report("intrude", field.attach, Target::Naive, &control);
    assert_works("intrude", &control);

    let mut loot = Value::Null;
    for part in parts(rounds(1).min(50)) {
        let asking = field.victim_asks();
        // Every port that listens there, and the one that clients use.
        let listening = field.victim.exec(&["sh", "-c", "cat /proc/net/tcp"]);
        let mut ports: Vec<String> = listening
            .lines()
            .filter(|line| line.contains(" 0A "))
            .filter_map(|line| line.split_whitespace().nth(1)?.split_once(':'))
            .filter_map(|(_, port)| Some(u16::from_str_radix(port, 16).ok()?.to_string()))
            .filter(|port| port != NAIVE_PORT)
            .collect();
        ports.push("80".to_owned());
        println!("ports tried in the victim's namespace: {}", ports.join(", "));
        let (tries, ports) = (part.to_string(), ports.join(","));
        let into = ["--ports", &ports, "--tries", &tries];
        add(
            &mut loot,
            attack(&field.neighbour, "intrude", &[&victim[..], &into].concat()),
        );
        assert_own(&asking.stop(&field.victim), 1);
    }
    report("intrude", field.attach, Target::Daemon, &loot);
    assert_nothing("intrude", &loot);
    // The victim forwards packets, but not over its link. That the packets arrive, the stand-in inside has shown.
    assert_eq!(forwards.trim(), "1");
    assert_eq!(number(&loot, "connections"), 0, "{loot}");
    over_rules(&before);
    field.stop();
}

fn net_admin(engine: &Arc<Engine>) {
    for mac in [&[][..], &["--mac"]] {
        let field = Field::new(engine, &["--cap-add=NET_ADMIN"]);
        let name = format!("NET_ADMIN {}", mac.join(" "));
        let (mut loot, mut asked) = (Value::Null, Value::Null);
        for part in parts(rounds(4)) {
            let victim = field.victim_asks();
            let tries = part.to_string();
            let one = field.attack("net_admin", Target::Daemon, &[&["--tries", &tries], mac].concat());
            add(&mut loot, one);
            field.everybody_is_served();
            add(&mut asked, assert_own(&victim.stop(&field.victim), 0));
        }
        let control = field.attack("net_admin", Target::Naive, &[&["--tries", "4"], mac].concat());
        report(&name, field.attach, Target::Daemon, &loot);
        report(&name, field.attach, Target::Naive, &control);
        println!("the victim meanwhile: {asked}");
        assert_works(&name, &control);
        // Whatever address it takes, it asks over its own link, as itself: it has no role of the victim's name.
        assert_eq!(number(&loot, "tells"), 0, "{name}: {loot}");
        let own = loot["statuses"].as_object().into_iter().flatten();
        let harmless = own.clone().all(|(status, _)| status == "403" || status == "404");
        assert!(harmless, "{name}: neither refused nor itself: {loot}");
        field.stop();
    }
}

/// The owner vanished without a word, so that the server still has its connection, and its address is another's by now. A
/// neighbour puts a request into that connection.
fn kept_alive_beyond_its_owners_death(engine: &Arc<Engine>) {
    const ADDRESS: &str = "172.31.77.10";
    let attach = Attach::of_this_run();
    let network = engine.network("inheritance", &["--subnet", "172.31.77.0/24"]);
    let daemon = Daemon::start(engine, &attach.config(), &engine.moto().daemon_environment());
    let _naive = on_host(engine, "naive", &["--port", NAIVE_PORT, &format!("{ADDRESS}={VICTIM}")]);
    let neighbour = engine.run("neighbour").network(network.name()).start();
    for (target, times) in [(Target::Naive, 1), (Target::Daemon, rounds(2))] {
        let mut all = Value::Null;
        for round in 0..times {
            let there = |name: &str, role: &str| {
                let start = engine.run(name).label("imds.role", role).network(network.name());
                start.arg("--ip").arg(ADDRESS).start()
            };
            let owner = there(&format!("owner-{round}"), VICTIM);
            let gateway = owner.gateway().to_string();
            let server = match target {
                Target::Daemon => ["--server", "169.254.169.254", "--server-port", "80"],
                Target::Naive => ["--server", &gateway, "--server-port", NAIVE_PORT],
            };
            let mac = owner.inspect("{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}");
            let port = (43_000 + round).to_string();
            let holding = [
                &["hold", "--state", "established", "--bind", ADDRESS, "--port", &port][..],
                &server,
            ];
            let holder = Program::start(&owner, "victim", &holding.concat());
            // Its link first: the FIN of its death gets nowhere.
            engine.docker(&["network", "disconnect", "--force", network.name(), owner.id()]);
            owner.kill();
            let heir = there(&format!("heir-{round}"), "heir");
            let taking = [
                &[
                    "--victim",
                    ADDRESS,
                    "--victim-mac",
                    &mac,
                    "--how",
                    "inject",
                    "--port",
                    &port,
                ][..],
                &server,
            ];
            add(&mut all, attack(&neighbour, "takeover", &taking.concat()));
            if target == Target::Daemon {
                poll(Duration::from_secs(5), "the heir to be served", || {
                    (heir.request("GET", LIST, &[]).ok()?.body == "heir").then_some(())
                });
            }
            drop(holder);
        }
        let name = "a dead owner's connection";
        report(name, attach, target, &all);
        match target {
            Target::Naive => assert_works(name, &all),
            Target::Daemon => assert_nothing(name, &all),
        }
    }
    daemon.stop();
}

fn a_token_over_a_restart(engine: &Arc<Engine>) {
    let attach = Attach::of_this_run();
    let daemon = Daemon::start(engine, &attach.config(), &engine.moto().daemon_environment());
    let owner = engine.run("owner").label("imds.role", "owner").start();
    let times = rounds(2);
    for _ in 0..times {
        let token = owner.token();
        let headers = [("X-aws-ec2-metadata-token", token.as_str())];
        assert_eq!(owner.get(LIST, &headers).body, "owner", "it is a good token");
        owner.restart();
        let reply = owner.get(LIST, &headers);
        assert_eq!(
            (reply.status, reply.body.as_str()),
            (401, ""),
            "a token outlives the life that it was given to"
        );
        assert_eq!(owner.get(LIST, &[]).body, "owner");
    }
    println!(
        "attack token over a restart | attach {} | {times} tries, 0 taken",
        attach.name()
    );
    daemon.stop();
}

/// A process of the host in the victim's network, by itself and in a cgroup that is called like the victim's.
fn processes_of_the_host_in_the_namespace(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    let tries = rounds(4);
    let script = |directory: &str, url: &str| {
        format!(
            "root=/sys/fs/cgroup
             [ ! -e $root/unified/cgroup.procs ] || root=$root/unified
             directory='{directory}'
             if [ -n \"$directory\" ]; then
                 # Whoever has a delegated cgroup names what is in it as it likes.
                 mkdir -p \"$root/$directory\"
                 echo 0 > \"$root/$directory/cgroup.procs\"
             fi
             for try in $(seq {tries}); do
                 nsenter --net=/proc/{pid}/ns/net curl -s -o /dev/null -w '%{{http_code}} %{{size_download}}\\n' \
                     --max-time 2 --noproxy '*' '{url}'
             done
             if [ -n \"$directory\" ]; then
                 echo 0 > \"$root/cgroup.procs\"
                 rmdir -p --ignore-fail-on-non-empty \"$root/$directory\" 2>/dev/null || true
             fi",
            pid = field.victim.pid(),
        )
    };
    let id = field.victim.id();
    let naive = format!("http://{}:{NAIVE_PORT}{LIST}", field.gateway);
    let daemon = format!("http://169.254.169.254{LIST}");
    for (name, directory) in [
        ("a process of the host that has entered", String::new()),
        (
            "a cgroup named like the victim's",
            format!("imds-trial-delegated/docker-{id}.scope"),
        ),
        (
            "a cgroup named like the victim's, nested",
            format!("imds-trial-delegated/docker/{id}/docker-{id}.scope"),
        ),
    ] {
        let victim = field.victim_asks();
        let control = engine.host("sh", &["-ec", &script(&directory, &naive)]);
        assert!(control.lines().all(|it| it.starts_with("200 ")), "{name}: {control}");
        let got = engine.host("sh", &["-ec", &script(&directory, &daemon)]);
        let refused = got.lines().filter(|it| *it == "403 0").count();
        println!(
            "attack {name} | attach {} | {tries} tries, {refused} bare 403",
            field.attach.name()
        );
        assert_eq!(
            refused,
            usize::try_from(tries).expect("few"),
            "{name}: every line is to be a bare 403: {got}"
        );
        assert_own(&victim.stop(&field.victim), 1);
    }
    field.stop();
}

/// A host-network container that wants our address and port while the daemon dies and comes back.
fn squatting(engine: &Arc<Engine>) {
    let attach = Attach::of_this_run();
    let victim = engine.run("victim").label("imds.role", VICTIM).start();
    let gateway = victim.gateway().to_string();
    // The control: a server that shares its port, as the squatter does.
    {
        let _naive = on_host(
            engine,
            "naive",
            &["--reuse", "--listen", &gateway, "--port", NAIVE_PORT, "x=y"],
        );
        let url = format!("http://{gateway}:{NAIVE_PORT}/");
        poll(Duration::from_secs(5), "the stand-in", || {
            victim.request("GET", &url, &[]).ok()
        });
        let squatter = engine.run("squatter").network("host").start();
        let mut squat = Program::start(
            &squatter,
            "squat",
            &["--share", "--address", &gateway, "--port", NAIVE_PORT],
        );
        squat.wait_for("bound");
        for _ in 0..30 {
            let _ = victim.request("GET", &url, &[]);
        }
        let counts = last_line(&squat.stop(&squatter));
        println!("attack squat | stand-in | {} of 30 requests", counts["taken"]);
        assert!(
            number(&counts, "taken") > 0,
            "a squatter gets nothing of a shared port: {counts}"
        );
    }
    for share in [&[][..], &["--share"]] {
        for part in parts(rounds(1)) {
            squat_over_kills(engine, attach, &victim, share, part);
        }
    }
}

fn squat_over_kills(engine: &Arc<Engine>, attach: Attach, victim: &Container, share: &[&str], times: u32) {
    let moto = engine.moto();
    let squatter = engine.run("squatter").network("host").start();
    let mut daemon = Daemon::start(engine, &attach.config(), &moto.daemon_environment());
    let listening = daemon.status()["listening"].as_str().unwrap_or_default().to_owned();
    let port = listening.rsplit(':').next().unwrap_or_default().to_owned();
    assert!(!port.is_empty(), "status does not say where it listens");
    let mut squat = Program::start(&squatter, "squat", &[share, &["--port", &port]].concat());
    let asking = Program::start(victim, "victim", &["ask", "--pause", "0.005"]);
    let served = |what: &str| {
        poll(Duration::from_secs(5), what, || {
            let body = victim.request("GET", LIST, &[]).ok()?.body;
            assert_ne!(body, "stolen", "the squatter answers the victim");
            (body == VICTIM).then_some(())
        });
    };
    served("the daemon");
    for _ in 0..times {
        let directory = daemon.directory().to_owned();
        daemon.kill();
        squat.wait_for("bound");
        let reply = victim.request("GET", LIST, &[]);
        assert!(reply.is_err(), "nobody is there to answer: {reply:?}");
        daemon = Daemon::start_in(engine, directory, &attach.config(), &moto.daemon_environment());
        served("the next daemon, beside a squatter");
    }
    let asked = assert_own(&asking.stop(victim), 1);
    let counts = last_line(&squat.stop(&squatter));
    println!(
        "attack squat {} | attach {} | {times} kills, bound after {} refusals ({}), {} requests taken; the victim: {asked}",
        share.join(" "),
        attach.name(),
        counts["refused"],
        counts["why"].as_str().unwrap_or_default(),
        counts["taken"]
    );
    assert_eq!(
        number(&counts, "taken"),
        0,
        "the squatter was asked by the victim: {counts}"
    );
    assert!(
        number(&counts, "refused") > 0,
        "the squatter came in beside a living daemon: {counts}"
    );
    daemon.stop();
}

/// A process of the victim's namespace that listens where the service does, and where it did in earlier versions, while the
/// daemon dies and comes back.
fn squatting_inside(engine: &Arc<Engine>) {
    let attach = Attach::of_this_run();
    let moto = engine.moto();
    let victim = engine.run("victim").label("imds.role", VICTIM).start();
    let squat = |port: &'static str| {
        let mut squat = Program::start(&victim, "squat", &["--address", "0.0.0.0", "--port", port]);
        squat.wait_for("bound");
        squat
    };
    let squatters = ["80", "51254"].map(|port| (port, squat(port)));
    let mut daemon = Daemon::start(engine, &attach.config(), &moto.daemon_environment());
    let is_served = || {
        poll(Duration::from_secs(5), "the victim to be served", || {
            let body = victim.request("GET", LIST, &[]).ok()?.body;
            assert_ne!(body, "stolen", "the squatter answers the victim");
            (body == VICTIM).then_some(())
        });
    };
    is_served();
    for _ in 0..rounds(2) {
        let directory = daemon.directory().to_owned();
        daemon.kill();
        for port in ["80", "51254"] {
            let url = format!("http://169.254.169.254:{port}{LIST}");
            let reply = victim.request("GET", &url, &[]);
            assert!(reply.as_ref().is_err_and(|why| why.connection_refused()), "{reply:?}");
        }
        daemon = Daemon::start_in(engine, directory, &attach.config(), &moto.daemon_environment());
        is_served();
    }
    daemon.stop();
    // The control: they answer at every address of the namespace.
    for (port, squatter) in squatters {
        let control = victim.request("GET", &format!("http://127.0.0.1:{port}/"), &[]);
        assert_eq!(control.expect("the squatter").body, "stolen");
        let counts = last_line(&squatter.stop(&victim));
        println!("attack squat inside, port {port} | attach {} | {counts}", attach.name());
        assert_eq!(number(&counts, "taken"), 1, "only the control: {counts}");
    }
}

fn requests_that_no_client_makes(engine: &Arc<Engine>) {
    let field = Field::new(engine, &[]);
    let arguments = ["--own", "attacker", "--role", VICTIM, "--victim", &field.address];
    let control = attack(
        &field.neighbour,
        "tricks",
        &[&arguments[..], &field.server(Target::Naive)].concat(),
    );
    println!(
        "attack tricks | stand-in | {} tries, {} tell of the victim",
        control["tries"], control["tells"]
    );
    assert!(
        number(&control, "tells") > 10,
        "a server that believes everything tells nothing: {control}"
    );
    let loot = attack(
        &field.neighbour,
        "tricks",
        &[&arguments[..], &field.server(Target::Daemon)].concat(),
    );
    println!(
        "attack tricks | attach {} | {} tries, {} tell of the victim",
        field.attach.name(),
        loot["tries"],
        loot["tells"]
    );
    let complaints: Vec<&str> = loot["complaints"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
    field.stop();
}
