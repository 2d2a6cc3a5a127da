//! A host that is a machine of a cloud: it goes on with its own metadata service, and containers never have that one.
//!
//! The stand-in for EC2 is another network namespace, joined by a pair of links. Neither has a way out.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::cases::{LIST, is_itself};
use crate::conformance::tricks::{CLOSED, tricks};
use crate::rig::engine::Background;
use crate::rig::tools::{self, DAEMON};
use crate::rig::{Container, Daemon, Done, Engine, Rig, poll, run};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    run::remember_secrets(vec![HOSTS_SECRET.to_owned(), HOSTS_TOKEN.to_owned()]);
    vec![
        rig.once(
            "cloud::the_host_keeps_its_own_and_containers_never_have_it",
            the_host_keeps_its_own,
        ),
        rig.once(
            "cloud::what_the_host_is_is_seen_and_no_path_leads_to_what_is_its_own",
            what_the_host_is_is_seen,
        ),
        rig.once(
            "cloud::attach_host_is_for_whoever_means_it",
            attach_host_is_for_whoever_means_it,
        ),
        rig.once(
            "cloud::where_the_address_is_ours_nothing_leads_to_the_hosts_own",
            where_the_address_is_ours_nothing_leads_to_the_hosts_own,
        ),
        rig.once(
            "cloud::azure_rejects_wire_server_and_lets_names_and_probes_through",
            azure_rejects_wire_server_and_lets_names_and_probes_through,
        ),
    ]
}

const SOON: Duration = Duration::from_secs(10);
const OFFLINE: &str = "[credentials]\nsource = \"offline\"\n";
/// What is the host's own, and nobody else's.
const HOSTS_ROLE: &str = "the-role-of-the-host";
const HOSTS_SECRET: &str = "secret-of-the-host-0123456789abcdefghijk";
const HOSTS_TOKEN: &str = "token-of-the-session-of-the-host-0123456789";

/// EC2, outside of the engine's host, which takes itself for one of its instances.
struct Ec2 {
    engine: Arc<Engine>,
    namespace: String,
    dmi: PathBuf,
    server: Option<Background>,
}

impl Ec2 {
    #[track_caller]
    fn start(engine: &Arc<Engine>) -> Ec2 {
        let namespace = run::new_namespace();
        let directory = engine.directory().join(format!("ec2-{}", run::next_number()));
        fs::create_dir_all(&directory).expect("a directory");
        fs::write(directory.join("sys_vendor"), "Amazon EC2\n").expect("a file");
        let values = directory.join("values.json");
        fs::write(&values, json!(values_of_the_host()).to_string()).expect("a file");
        let mut ec2 = Ec2 {
            engine: Arc::clone(engine),
            namespace,
            dmi: directory,
            server: None,
        };
        let file = run::namespace_file(engine.namespace());
        let mut link = ec2.command("ip");
        link.args([
            "link", "add", "host", "type", "veth", "peer", "name", "ec2", "netns", &file,
        ]);
        Done::of(link).ok();
        // The way there is as narrow as can be, within the one that goes nowhere (rig/engine.rs).
        for words in [
            "addr add 10.254.0.2/24 dev ec2",
            "-6 addr add fd00:254::2/64 dev ec2 nodad",
            "link set ec2 up",
            "route add 169.254.169.254/32 via 10.254.0.1 dev ec2",
            "route add 169.254.170.2/32 via 10.254.0.1 dev ec2",
            "-6 route add fd00:ec2::254/128 via fd00:254::1 dev ec2",
        ] {
            engine.host("ip", &words.split(' ').collect::<Vec<_>>());
        }
        for words in [
            "ip link set lo up",
            "ip addr add 10.254.0.1/24 dev host",
            "ip -6 addr add fd00:254::1/64 dev host nodad",
            "ip link set host up",
            "ip addr add 169.254.169.254/32 dev lo",
            "ip addr add 169.254.170.2/32 dev lo",
            "ip -6 addr add fd00:ec2::254/128 dev lo nodad",
            "ip -6 route add default via fd00:254::2 dev host",
            "ip route add 172.16.0.0/12 via 10.254.0.2 dev host",
        ] {
            let mut words = words.split(' ');
            let mut command = ec2.command(words.next().unwrap_or_default());
            command.args(words);
            Done::of(command).ok();
        }
        let script = tools::scripts().join("ec2.py");
        let mut command = ec2.command("/usr/bin/python3");
        command.arg(script).arg(values);
        ec2.server = Some(engine.background(&mut command, "ec2"));
        poll(SOON, "the stand-in for EC2", || {
            (ec2.of_the_host().ok()? == HOSTS_ROLE).then_some(())
        });
        ec2
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", run::namespace_file(&self.namespace)));
        command.arg(program);
        command
    }

    /// For a daemon whose host is an instance.
    fn environment(&self) -> Vec<(String, String)> {
        vec![("IMDS_ROUTER_SERVE_DMI_DIR".to_owned(), self.dmi.display().to_string())]
    }

    /// Any verb, on that host.
    fn cli(&self, words: &[&str]) -> Done {
        let mut command = self.engine.command(DAEMON);
        command
            .args(words)
            .envs(self.environment())
            .env("DOCKER_HOST", self.engine.docker_host());
        Done::of(command)
    }

    /// What a process of the host is told its role is.
    fn of_the_host(&self) -> Result<String, String> {
        let reply = self
            .engine
            .request("GET", &format!("http://169.254.169.254{LIST}"), &[]);
        reply.map(|reply| reply.body).map_err(|why| why.to_string())
    }

    #[track_caller]
    fn the_host_has_its_own(&self) {
        assert_eq!(self.of_the_host().as_deref(), Ok(HOSTS_ROLE));
    }

    /// The paths that were asked for so far.
    fn asked_for(&self) -> Vec<String> {
        let output = self.server.as_ref().map(Background::output).unwrap_or_default();
        let paths = output.lines().filter_map(|line| line.strip_prefix("asked for "));
        paths.map(str::to_owned).collect()
    }
}

impl Drop for Ec2 {
    fn drop(&mut self) {
        let mut gone = self.engine.command(DAEMON);
        gone.args(["intercept", "down"]);
        let _ = Done::of(gone); // that it was down already is fine
        let mut gone = self.engine.command("ip");
        gone.args(["link", "del", "ec2"]);
        let _ = Done::of(gone);
        drop(self.server.take());
        for left in run::end_namespace(&self.namespace) {
            eprintln!("left behind: {left}");
        }
    }
}

/// What EC2 says of the host.
fn values_of_the_host() -> BTreeMap<String, String> {
    let credentials = json!({
        "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-05T10:00:00Z",
        "AccessKeyId": "ASIAOFTHEHOSTITSELF0", "SecretAccessKey": HOSTS_SECRET, "Token": HOSTS_TOKEN,
        "Expiration": "2099-01-05T16:00:00Z",
    })
    .to_string();
    let role = format!("meta-data/iam/security-credentials/{HOSTS_ROLE}");
    let values = [
        ("meta-data/ami-id", "ami-0aaaaaaaaaaaaaaaa"),
        ("meta-data/instance-id", "i-0bbbbbbbbbbbbbbbb"),
        ("meta-data/instance-type", "m7i.large"),
        ("meta-data/placement/availability-zone", "eu-central-1b"),
        ("meta-data/placement/region", "eu-central-1"),
        ("meta-data/mac", "0e:49:61:0f:c3:11"),
        (
            "meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id",
            "vpc-0cccccccccccccccc",
        ),
        ("meta-data/tags/instance/iam", "a-tag"),
        (role.as_str(), credentials.as_str()),
    ];
    let closed = CLOSED.iter().filter(|path| !path.ends_with(HOSTS_ROLE));
    let closed = closed.map(|path| (*path, HOSTS_SECRET));
    let values = closed.chain(values);
    values
        .map(|(path, value)| (path.to_owned(), value.to_owned()))
        .collect()
}

/// A container that asks for its role from its first instruction on, and never stops.
fn polling(engine: &Arc<Engine>, name: &str) -> Container {
    let start = engine.run(name).label("imds.role", name);
    start
        .command(&["/usr/bin/python3", "/opt/clients/poll.py", HOSTS_ROLE])
        .start()
}

/// How often what came of it, so far.
#[track_caller]
fn counts(container: &Container) -> BTreeMap<String, u64> {
    poll(SOON, &format!("the counts of {}", container.name()), || {
        let mut docker = container.engine().docker_command();
        docker.args(["logs", "--tail", "1", container.id()]);
        let counts: Value = serde_json::from_str(Done::of(docker).stdout.trim()).ok()?;
        serde_json::from_value(counts).ok()
    })
}

fn leaked(container: &Container) -> u64 {
    counts(container).get("leaked").copied().unwrap_or_default()
}

/// Waits until something has come of it more often than it had.
#[track_caller]
fn comes(container: &Container, what: &str) {
    let count = || counts(container).get(what).copied().unwrap_or_default();
    let before = count();
    let what = format!("{what:?} in {}", container.name());
    poll(SOON, &what, || (count() > before + 5).then_some(()));
}

const REFUSED: &str = "ConnectionRefusedError";

fn the_host_keeps_its_own(engine: &Arc<Engine>) {
    let ec2 = Ec2::start(engine);
    let first = polling(engine, "first");
    let ours = || {
        let network = engine.snapshot_network();
        let lines = ["169.254.", "fd00:ec2::", "imds"].map(|what| network.lines_with(what).join("\n"));
        lines.join("\n")
    };
    let before = ours();
    // The control: whatever leaks is seen.
    comes(&first, "leaked");
    ec2.the_host_has_its_own();
    engine.set("ipv6/conf/all/forwarding", "1");
    let six = engine.network("six", &["--ipv6", "--subnet", "fd00:6::/64"]);
    let unlabeled = engine.run("unlabeled").network(six.name()).start();
    let asks = |address: &str| unlabeled.request("GET", &format!("http://{address}{LIST}"), &[]);
    let everywhere = ["169.254.169.254", "169.254.170.2", "[fd00:ec2::254]"];
    for address in everywhere {
        // An address of IPv6 settles first.
        let reply = poll(SOON, &format!("a leak over {address}"), || asks(address).ok());
        assert_eq!(reply.body, HOSTS_ROLE, "{address}");
    }
    let is_refused = || {
        everywhere
            .iter()
            .all(|address| asks(address).is_err_and(|why| why.connection_refused()))
    };

    let done = ec2.cli(&["doctor"]);
    assert!(
        done.stdout
            .contains("WRONG rules: there is no table ip imds_router_guard"),
        "{done}"
    );
    // What is off on the loopback alone, or now, is not off: containers are rejected over IPv6 all the same.
    engine.set("ipv6/conf/lo/disable_ipv6", "1");
    let up = ec2.cli(&["intercept", "up"]).ok();
    assert!(
        up.contains("add table ip imds_router_guard") && !up.contains("address"),
        "{up}"
    );
    comes(&first, REFUSED);
    assert!(is_refused());
    let until_then = leaked(&first);
    ec2.the_host_has_its_own();
    let early = polling(engine, "early");
    comes(&early, REFUSED);

    let daemon = Daemon::start(engine, OFFLINE, &ec2.environment());
    for container in [&first, &early] {
        comes(container, &format!("got {}", container.name()));
    }
    assert!(is_refused());
    let while_it_runs = polling(engine, "while-it-runs");
    comes(&while_it_runs, "got while-it-runs");
    ec2.the_host_has_its_own();
    // One that is the host to the kernel, and what is said of it.
    let is_host = engine
        .run("is-host")
        .network("host")
        .label("imds.role", "is-host")
        .start();
    assert_eq!(is_host.get(LIST, &[]).body, HOSTS_ROLE);
    let problem = poll(SOON, "the container in the host's network", || {
        let status = daemon.status();
        let all = status["containers"].as_array().expect("a list").clone();
        let problems = &all.iter().find(|it| it["name"] == "is-host")?["problems"];
        (problems != &json!([])).then(|| problems.to_string())
    });
    assert!(
        problem.contains("it gets the host's own metadata service, with the host's role"),
        "{problem}"
    );
    let status = daemon.status();
    assert!(
        status["warnings"]
            .to_string()
            .contains("EC2 (firmware, sys_vendor: Amazon EC2)"),
        "{status}"
    );
    assert!(daemon.cli(&["health"]).ok().starts_with("serves "));
    let down = ec2.cli(&["intercept", "down"]).fails();
    assert!(down.contains("another imds-router serves this host"), "{down}");
    drop(is_host);

    // A crash.
    let directory = daemon.directory().to_owned();
    daemon.kill();
    let while_down = polling(engine, "while-down");
    for container in [&first, &early, &while_it_runs, &while_down] {
        comes(container, REFUSED);
    }
    assert!(is_refused());
    ec2.the_host_has_its_own();
    // An upgrade.
    let daemon = Daemon::start_in(engine, directory.clone(), OFFLINE, &ec2.environment());
    for container in [&first, &early, &while_it_runs, &while_down] {
        comes(container, &format!("got {}", container.name()));
    }
    let log = daemon.stop();
    assert!(!log.contains("did not end cleanly"), "{log}");
    for container in [&first, &while_it_runs] {
        comes(container, REFUSED);
    }
    ec2.the_host_has_its_own();
    let daemon = Daemon::start_in(engine, directory, OFFLINE, &ec2.environment());
    comes(&first, "got first");
    daemon.stop();
    assert!(is_refused());
    assert_eq!(leaked(&first), until_then);
    for container in [&early, &while_it_runs, &while_down] {
        assert_eq!(leaked(container), 0, "{}: {:?}", container.name(), counts(container));
    }
    println!("{:?}", counts(&first));

    // And the control again.
    drop((early, while_it_runs, while_down));
    engine.set("ipv6/conf/all/forwarding", "0");
    ec2.cli(&["intercept", "down"]).ok();
    comes(&first, "leaked");
    assert_eq!(ours(), before);
}

/// What the host is, for containers; and what it has, for the daemon.
fn what_the_host_is_is_seen(engine: &Arc<Engine>) {
    let ec2 = Ec2::start(engine);
    let config = format!("{OFFLINE}[imds]\ninstance_metadata_tags = \"enabled\"\n[metadata]\nbase = \"host\"\n");
    let (code, output) = Daemon::start_in_vain(engine, &config, &[]);
    assert_eq!(code, Some(1), "{output}");
    assert!(
        output.contains("this host has no metadata service of EC2's that is its own"),
        "{output}"
    );
    let by_others = ec2.asked_for().len();

    let daemon = Daemon::start(engine, &config, &ec2.environment());
    let app = engine.run("app").label("imds.role", "app").start();
    let other = engine
        .run("other")
        .label("imds.role", "other")
        .label("imds.ami-id", "ami-0123456789abcdef0")
        .start();
    for container in [&app, &other] {
        is_itself(container);
        let seen = |path: &str| container.get(&format!("/latest/meta-data/{path}"), &[]).body;
        assert_eq!(seen("instance-id"), "i-0bbbbbbbbbbbbbbbb");
        assert_eq!(seen("placement/availability-zone"), "eu-central-1b");
        assert_eq!(
            seen("network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id"),
            "vpc-0cccccccccccccccc"
        );
        assert_eq!(seen("tags/instance/iam"), "a-tag");
    }
    assert_eq!(app.get("/latest/meta-data/ami-id", &[]).body, "ami-0aaaaaaaaaaaaaaaa");
    assert_eq!(other.get("/latest/meta-data/ami-id", &[]).body, "ami-0123456789abcdef0");
    // The daemon has not even asked for what is the host's alone.
    let asked = ec2.asked_for().split_off(by_others);
    assert!(asked.len() > 5, "{asked:?}");
    let closed = |path: &&String| {
        CLOSED
            .iter()
            .any(|it| path.contains(it.rsplit_once('/').map_or(*it, |(above, _)| above)))
    };
    assert_eq!(asked.iter().filter(closed).collect::<Vec<_>>(), Vec::<&String>::new());
    // And no path leads there.
    let tricks = tricks();
    let mut ask = app.engine().docker_command();
    ask.args([
        "exec",
        "--interactive",
        app.id(),
        "/usr/bin/python3",
        "/opt/clients/ask.py",
    ]);
    let answers = Done::of_input(ask, tricks.join("\n").as_bytes()).ok();
    assert_eq!(answers.matches(" -> ").count(), tricks.len());
    assert!(answers.contains("HTTP/1.1 404"), "{answers}");
    for own in [HOSTS_ROLE, HOSTS_SECRET, HOSTS_TOKEN] {
        // What was asked for stands before the arrow.
        let leak = answers
            .lines()
            .find(|line| line.rsplit(" -> ").next().is_some_and(|answer| answer.contains(own)));
        assert_eq!(leak, None);
    }
    // It cannot be had for a while: what was known holds.
    daemon.stop();

    // Credentials for the daemon are another matter: with nothing else configured, they are the host's own.
    let moto = engine.moto().daemon_environment().into_iter();
    let environment = moto
        .filter(|(name, _)| !name.contains("ACCESS_KEY"))
        .chain(ec2.environment());
    let directory = engine.directory().join(format!("no-aws-{}", run::next_number()));
    fs::create_dir_all(&directory).expect("a directory");
    let config = format!(
        "account_id = \"111122223333\"\n[credentials]\naws_dir = '{}'\n",
        directory.display()
    );
    let daemon = Daemon::start(engine, &config, &environment.collect::<Vec<_>>());
    is_itself(&app);
    let status = daemon.status();
    let origin = &status["bases"][0]["origin"];
    assert_eq!(
        origin,
        &json!(format!("instance profile of this host, role {HOSTS_ROLE}")),
        "{status}"
    );
    ec2.the_host_has_its_own();
    daemon.stop();
}

/// The stand-in has Azure's address, too, and answers HTTP at each of its ports, also at that of the resolver.
fn azure_rejects_wire_server_and_lets_names_and_probes_through(engine: &Arc<Engine>) {
    const SERVERS: &str = "import http.server as h, threading as t\n\
        for p in (32526, 53):\n s = h.ThreadingHTTPServer(('168.63.129.16', p), h.SimpleHTTPRequestHandler)\n \
        t.Thread(target=s.serve_forever).start()";
    let azure = Ec2::start(engine);
    fs::remove_file(azure.dmi.join("sys_vendor")).expect("it is there");
    let tag = "7783-7084-3265-9085-8269-3286-77\n";
    fs::write(azure.dmi.join("chassis_asset_tag"), tag).expect("a file");
    engine.host(
        "ip",
        &["route", "add", "168.63.129.16/32", "via", "10.254.0.1", "dev", "ec2"],
    );
    let mut address = azure.command("ip");
    address.args(["addr", "add", "168.63.129.16/32", "dev", "lo"]);
    Done::of(address).ok();
    let mut servers = azure.command("/usr/bin/python3");
    let _servers = engine.background(servers.args(["-c", SERVERS]), "azure");
    let server = engine.run("published").arg("--publish=8080:8080");
    let server = server
        .command(&["/usr/bin/python3", "-m", "http.server", "8080"])
        .start();
    let at = |port: u16| format!("http://168.63.129.16:{port}/");
    let answers = |port: u16| server.request("GET", &at(port), &[]).map(|reply| reply.status);
    let probe = || {
        let mut curl = azure.command("curl");
        curl.args([
            "--silent",
            "--max-time",
            "5",
            "--output",
            "/dev/null",
            "--write-out",
            "%{http_code}",
        ]);
        curl.args(["--interface", "168.63.129.16", "http://10.254.0.2:8080/"]);
        Done::of(curl).stdout
    };
    for port in [80, 32_526, 53] {
        poll(SOON, "the stand-in for Azure", || answers(port).ok());
    }
    poll(SOON, "a probe of the published port", || {
        (probe() == "200").then_some(())
    });

    azure.cli(&["intercept", "up"]).ok();
    for port in [80, 32_526] {
        let why = answers(port).expect_err("WireServer is the host's alone");
        assert!(why.connection_refused(), "port {port}: {why}");
        assert!(
            engine.request("GET", &at(port), &[]).is_ok(),
            "the host itself, port {port}"
        );
    }
    assert!(
        answers(53).is_ok_and(|status| status == 200),
        "names are resolved there"
    );
    assert_eq!(probe(), "200", "a load balancer's probe is answered");
    azure.cli(&["intercept", "down"]).ok();
    assert!(answers(80).is_ok());
}

fn attach_host_is_for_whoever_means_it(engine: &Arc<Engine>) {
    let ec2 = Ec2::start(engine);
    // Addresses of IPv6 settle by themselves, a while later.
    let at_rest = || engine.network_at_rest().without_ipv6_of("ec2");
    let before = at_rest();
    let config = format!("{OFFLINE}[serve]\nattach = \"host\"\nproof = \"address\"\n");
    let on_network = format!("{OFFLINE}[serve]\nattach = \"network\"\nproof = \"address\"\n");
    for (attach, config) in [("host", &config), ("network", &on_network)] {
        let (code, output) = Daemon::start_in_vain(engine, config, &ec2.environment());
        assert_eq!(code, Some(1), "{output}");
        for said in [
            &format!(
                "attach = \"{attach}\" would take 169.254.169.254 away from this host, which has a metadata service of its own"
            ),
            "a machine of EC2 (firmware, sys_vendor: Amazon EC2)",
            "[serve] host_imds = \"replace\"",
        ] {
            assert!(output.contains(said), "{said} is not in {output}");
        }
    }
    before.assert_same(&at_rest());
    ec2.the_host_has_its_own();
    // Whoever means it has it, as on any other machine.
    let daemon = Daemon::start(
        engine,
        &format!("{config}host_imds = \"replace\"\n"),
        &ec2.environment(),
    );
    let app = engine.run("app").label("imds.role", "app").start();
    is_itself(&app);
    assert_ne!(ec2.of_the_host().as_deref(), Ok(HOSTS_ROLE));
    daemon.kill();
    // What that left is taken away where the host's own is kept.
    let daemon = Daemon::start(engine, OFFLINE, &ec2.environment());
    is_itself(&app);
    ec2.the_host_has_its_own();
    daemon.stop();

    // Whoever keeps it by intent has what comes over bridges intercepted, and nothing else.
    daemon_between(engine, &ec2, &app, &format!("{config}host_imds = \"keep\"\n"));
    drop(app);
    ec2.cli(&["intercept", "down"]).ok();
    before.assert_same(&at_rest());
    assert_eq!(engine.host("ip", &["rule"]).matches("169").count(), 0);
}

/// Where the address is ours, no other way leads to the host's own service either: its other addresses, and IPv6, which may be
/// switched off by the configuration, or on this host's loopback while containers' links have it.
fn where_the_address_is_ours_nothing_leads_to_the_hosts_own(engine: &Arc<Engine>) {
    let ec2 = Ec2::start(engine);
    engine.set("ipv6/conf/all/forwarding", "1");
    let network = engine.network_with_ipv6("six", "fd00:8::/64");
    let app = engine
        .run("app")
        .label("imds.role", "app")
        .network(network.name())
        .start();
    network.await_ipv6();
    let asks = |address: &str| app.request("GET", &format!("http://{address}{LIST}"), &[]);
    let other_ways = ["[fd00:ec2::254]", "169.254.170.2"];
    let leaks = || {
        for address in other_ways {
            let reply = poll(SOON, &format!("a leak over {address}"), || asks(address).ok());
            assert_eq!(reply.body, HOSTS_ROLE);
        }
    };
    leaks();
    let replace = format!("{OFFLINE}[serve]\nattach = \"host\"\nproof = \"address\"\nhost_imds = \"replace\"\n");
    let disabled = format!("{replace}[imds]\nhttp_protocol_ipv6 = \"disabled\"\n");
    for (config, off_on_loopback, served) in [(&replace, "0", true), (&disabled, "0", false), (&replace, "1", false)] {
        engine.set("ipv6/conf/lo/disable_ipv6", off_on_loopback);
        let are_refused = || {
            let mut ways = other_ways.iter().skip(usize::from(served));
            ways.all(|address| asks(address).is_err_and(|why| why.connection_refused()))
        };
        let daemon = Daemon::start(engine, config, &ec2.environment());
        is_itself(&app);
        assert!(are_refused(), "{config}");
        if served {
            assert_eq!(asks(other_ways[0]).expect("an answer").body, app.name());
        }
        // What is removed is put back, and survives a crash.
        for family in ["ip", "ip6"] {
            engine.host("nft", &[&format!("delete table {family} imds_router_guard")]);
        }
        poll(SOON, "the rejection", || are_refused().then_some(()));
        let directory = daemon.directory().to_owned();
        daemon.kill();
        assert!(are_refused(), "{config}");
        let daemon = Daemon::start_in(engine, directory, config, &ec2.environment());
        is_itself(&app);
        assert!(are_refused(), "{config}");
        // The clean end is one of everything.
        daemon.stop();
        leaks();
    }
    engine.set("ipv6/conf/lo/disable_ipv6", "0");
    engine.set("ipv6/conf/all/forwarding", "0");
}

/// A daemon between containers and a service that the host keeps.
fn daemon_between(engine: &Arc<Engine>, ec2: &Ec2, app: &Container, config: &str) {
    let polls = polling(engine, "polls");
    let unlabeled = engine.run("unlabeled").start();
    let told = |status: u16| {
        let told = || {
            unlabeled
                .request("GET", LIST, &[])
                .is_ok_and(|reply| reply.status == status && reply.body.is_empty())
        };
        poll(SOON, "an answer without a label", || told().then_some(()));
    };
    let daemon = Daemon::start(engine, config, &ec2.environment());
    is_itself(app);
    comes(&polls, "got polls");
    told(403);
    ec2.the_host_has_its_own();
    let status = daemon.status();
    assert_eq!(
        (&status["attach"], &status["proof"]),
        (&json!("host"), &json!("address")),
        "{status}"
    );
    assert!(daemon.cli(&["health"]).ok().starts_with("serves "));
    // What is removed is put back.
    engine.host("ip", &["rule", "del", "priority", "169"]);
    poll(SOON, "the rule", || {
        engine.host("ip", &["rule"]).contains("169.254.169.254").then_some(())
    });
    is_itself(app);
    let directory = daemon.directory().to_owned();
    daemon.kill();
    comes(&polls, REFUSED);
    ec2.the_host_has_its_own();
    // The next one takes over, and ends cleanly: then they are refused as before it.
    let daemon = Daemon::start_in(engine, directory, config, &ec2.environment());
    is_itself(app);
    comes(&polls, "got polls");
    daemon.stop();
    comes(&polls, REFUSED);
    ec2.the_host_has_its_own();
    assert_eq!(leaked(&polls), 0, "{:?}", counts(&polls));
}
