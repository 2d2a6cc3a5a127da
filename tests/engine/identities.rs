//! Real SDKs in real containers: each container is its own role.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libtest_mimic::Trial;

use crate::conformance::{self, Mode, Tokens, check, rows};
use crate::rig::{Client, Container, Daemon, Engine, Identity, NoReply, Rig, attach_keys, http, poll};

const ACCOUNT: &str = "111122223333";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (attach, tokens) in [
        ("namespace", "optional"),
        ("namespace", "required"),
        ("host", "required"),
    ] {
        let name = format!("identities::four_roles_by_four_sdks::{attach}::tokens_{tokens}");
        trials.extend(rig.each_view(&name, move |engine| four_roles(engine, attach, tokens)));
    }
    // With full proof only: the lower one waits for the container engine's report of a start, however late.
    trials.extend(rig.in_each_view("identities::sixty_first_acts", sixty_first_acts));
    trials.extend(rig.in_each_view(
        "identities::host_network_and_shared_namespaces",
        host_network_and_shared_namespaces,
    ));
    trials.push(rig.once("identities::conforms::namespace", |engine| {
        conforms(engine, "namespace", Mode::Optional);
    }));
    trials.push(rig.once("identities::conforms::host", |engine| {
        conforms(engine, "host", Mode::Required)
    }));
    trials.extend(rig.in_each_view("identities::networks_that_lead_nowhere", networks_that_lead_nowhere));
    trials.extend(rig.on_newer("identities::four_roles::namespace", |engine| {
        four_roles(engine, "namespace", "optional");
    }));
    trials.extend(rig.on_newer("identities::four_roles::host", |engine| {
        four_roles(engine, "host", "required");
    }));
    trials.extend(rig.on_newer("identities::sixty_first_acts", sixty_first_acts));
    trials.extend(rig.on_newer("identities::shared_namespaces", host_network_and_shared_namespaces));
    trials.extend(rig.on_newer("identities::networks_that_lead_nowhere", networks_that_lead_nowhere));
    trials.push(rig.once(
        "identities::port_80_of_the_container_is_its_own",
        port_80_of_the_container_is_its_own,
    ));
    trials.push(rig.once("identities::a_token_outlives_the_daemon", a_token_outlives_the_daemon));
    trials.push(rig.once("identities::sts_that_is_away_is_no_role", sts_that_is_away_is_no_role));
    trials
}

fn host_name(engine: &Engine) -> String {
    engine.host("uname", &["-n"])
}

fn four_roles(engine: &Arc<Engine>, attach: &str, tokens: &str) {
    let moto = engine.moto();
    let config = format!(
        "account_id = \"{ACCOUNT}\"\n[serve]\n{}[imds]\nhttp_tokens = \"{tokens}\"\n\
         [roles]\norders = \"arn:aws:iam::777788889999:role/service/orders\"\n[accounts]\nprod = \"444455556666\"\n",
        attach_keys(attach)
    );
    let daemon = Daemon::start(engine, &config, &moto.daemon_environment());
    let front = engine.network("front", &[]);
    // A role by every way to name one, two containers on each network.
    let containers = [
        (
            "by-arn",
            "arn:aws:iam::111122223333:role/arn-role",
            "bridge",
            ACCOUNT,
            "arn-role",
        ),
        ("by-name", "name-role", "bridge", ACCOUNT, "name-role"),
        (
            "by-account",
            "account-role@prod",
            front.name(),
            "444455556666",
            "account-role",
        ),
        ("by-alias", "orders", front.name(), "777788889999", "orders"),
    ]
    .map(|(name, role, network, account, role_name)| {
        let container = engine.run(name).label("imds.role", role).network(network).start();
        (container, account, role_name)
    });
    let host = host_name(engine);
    for client in Client::ALL {
        for (container, account, role) in &containers {
            let session = format!("{}@{host}", container.name());
            assert_eq!(
                client.whoami(container, moto, &[]),
                Identity::of_role(account, role, &session),
                "{client:?} in {}",
                container.name()
            );
        }
    }
    // All of it from one AssumeRole a container.
    let asked = moto.assumed_roles(engine);
    for (container, ..) in &containers {
        let session = format!("{}@{host}", container.name());
        let status = daemon.status();
        let shown = status["containers"].as_array().expect("a list");
        let shown = shown
            .iter()
            .find(|it| it["name"] == container.name())
            .expect("it is shown");
        let key = shown["credentials"]["key"].as_str().expect("a key").to_owned();
        assert!(
            asked
                .iter()
                .any(|it| it.session_name == session && it.access_key_id == key),
            "{shown}"
        );
        assert_eq!(shown["credentials"]["state"], "live");
        assert_eq!(shown["credentials"]["fake"], false);
    }
    daemon.stop();
}

/// The conformance table, by curl in a container.
fn conforms(engine: &Arc<Engine>, attach: &str, mode: Mode) {
    let tokens = if mode == Mode::Required { "required" } else { "optional" };
    let moto = engine.moto();
    let config = format!(
        "account_id = \"{ACCOUNT}\"\n[serve]\n{}[imds]\nhttp_tokens = \"{tokens}\"\n",
        attach_keys(attach)
    );
    let daemon = Daemon::start(engine, &config, &moto.daemon_environment());
    let asks = |name| engine.run(name).label("imds.role", "app");
    let container = asks("conforms")
        .label("imds.instance-id", "i-0123456789abcdef0")
        .start();
    let other = asks("other").start();
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds";
    let expired = container.put("/latest/api/token", &[(ttl, "1")]).body;
    let foreign = other.token();
    std::thread::sleep(Duration::from_millis(1_100));
    let tokens = Tokens {
        good: container.token(),
        foreign,
        expired,
    };
    let good = tokens.good.as_str();
    let mut failures = Vec::new();
    for row in rows(mode) {
        let headers = tokens.headers(&row);
        let reply = match container.request(row.method, row.path, &headers) {
            Ok(reply) => as_table(reply),
            Err(NoReply { why, .. }) => {
                failures.push(format!("row {} {} {}: {why}", row.number, row.method, row.path));
                continue;
            }
        };
        failures.extend(check(&row, &reply, now()).err());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    // Two requests on one socket, the first a 404.
    let raw = container.raw(&format!(
        "GET /latest/x HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: {good}\r\n\
         Connection: keep-alive\r\n\r\n\
         GET /latest/meta-data/instance-id HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token: {good}\r\n\
         Connection: close\r\n\r\n"
    ));
    assert!(
        raw.starts_with("HTTP/1.1 404 ") && raw.ends_with("i-0123456789abcdef0"),
        "{raw}"
    );
    assert!(
        container
            .raw("GET /latest/api/token HTTP/1.1\r\n\r\n")
            .starts_with("HTTP/1.1 405 Not Allowed\r\n")
    );
    let two_hosts = "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\nHost: 169.254.169.254\r\n\r\n";
    assert!(container.raw(two_hosts).starts_with("HTTP/1.1 403 "));
    crawl(&container, good, "/latest/");
    crawl(&container, good, "/2021-03-23/");
    daemon.stop();
}

/// Everything that is listed resolves.
fn crawl(container: &Container, token: &str, directory: &str) {
    let headers = [("X-aws-ec2-metadata-token", token)];
    let listing = container.get(directory, &headers);
    assert_eq!(listing.status, 200, "{directory}");
    for name in listing.body.lines() {
        let path = format!("{directory}{name}");
        // Below a version the three have no slash; the list of roles has none either.
        if name.ends_with('/') {
            crawl(container, token, &path);
        } else if ["dynamic", "meta-data"].contains(&name) {
            crawl(container, token, &format!("{path}/"));
        } else {
            assert_eq!(container.get(&path, &headers).status, 200, "{path}");
        }
    }
}

fn as_table(reply: http::Reply) -> conformance::Reply {
    let headers = reply
        .headers
        .into_iter()
        .map(|(name, value)| (name.to_ascii_lowercase(), value));
    conformance::Reply {
        status: reply.status,
        headers: headers.collect(),
        body: reply.body.into_bytes(),
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("after 1970")
        .as_secs()
}

/// Containers whose first act is to ask for their credentials, started side by side.
fn sixty_first_acts(engine: &Arc<Engine>) {
    const CONTAINERS: usize = 60;
    const AT_ONCE: usize = 4;
    let moto = engine.moto();
    let config = format!("account_id = \"{ACCOUNT}\"\n[serve]\nattach = \"namespace\"");
    let daemon = Daemon::start(engine, &config, &moto.daemon_environment());
    let network = engine.network("crowd", &[]);
    let names: Vec<_> = (0..CONTAINERS).map(|number| format!("first-act-{number}")).collect();
    let failures: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = names
            .chunks(CONTAINERS / AT_ONCE)
            .enumerate()
            .map(|(lane, names)| {
                let network = network.name();
                scope.spawn(move || {
                    let network = if lane % 2 == 0 { network } else { "bridge" };
                    names
                        .iter()
                        .filter_map(|name| first_act(engine, name, network).err())
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a lane"))
            .collect()
    });
    assert!(
        failures.is_empty(),
        "{} of {CONTAINERS} failed:\n{}",
        failures.len(),
        failures.join("\n")
    );
    daemon.stop();
}

fn first_act(engine: &Arc<Engine>, name: &str, network: &str) -> Result<(), String> {
    // busybox's wget has no limit that works: `timeout` is its limit.
    let url = format!("http://169.254.169.254/latest/meta-data/iam/security-credentials/{name}");
    let ask = ["timeout", "2", "wget", "-q", "-O", "-", &url];
    let run = engine
        .run(name)
        .bare_image(crate::rig::BOX)
        .label("imds.role", name)
        .network(network)
        .command(&ask);
    let done = run.to_its_end();
    match done.stdout.contains("\"Code\" : \"Success\"") {
        true => Ok(()),
        false => Err(format!("{name}: {done}")),
    }
}

fn a_token_outlives_the_daemon(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let config = format!("account_id = \"{ACCOUNT}\"\n[imds]\nhttp_tokens = \"required\"");
    let daemon = Daemon::start(engine, &config, &moto.daemon_environment());
    let container = engine.run("keeper").label("imds.role", "app").start();
    let token = container.token();
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(container.get("/latest/meta-data/instance-id", &headers).status, 200);
    let directory = daemon.directory().to_owned();
    daemon.stop();
    let daemon = Daemon::start_in(engine, directory, &config, &moto.daemon_environment());
    assert_eq!(container.get("/latest/meta-data/instance-id", &headers).status, 200);
    // Another life of the same container is another matter.
    container.restart();
    assert_eq!(container.get("/latest/meta-data/instance-id", &headers).status, 401);
    daemon.stop();
}

/// STS that is not there at all: metadata, no role, and the reason in `status`.
fn sts_that_is_away_is_no_role(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let mut environment = moto.daemon_environment();
    // Nobody listens there.
    environment
        .iter_mut()
        .filter(|(name, _)| name == "AWS_ENDPOINT_URL_STS")
        .for_each(|(_, url)| {
            *url = "http://127.0.0.1:9".to_owned();
        });
    let daemon = Daemon::start(engine, &format!("account_id = \"{ACCOUNT}\""), &environment);
    let container = engine.run("hopeless").label("imds.role", "app").start();
    // The SDK tries a few times before it gives up; all the while, and after it, there is no role.
    poll(Duration::from_secs(10), "the reason", || {
        let list = container.get("/latest/meta-data/iam/security-credentials/", &[]);
        assert_eq!(list.status, 404);
        list.header("x-imds-router-hint")
            .is_some_and(|it| it.contains("sts not reachable"))
            .then_some(())
    });
    assert_eq!(container.get("/latest/meta-data/instance-id", &[]).status, 200);
    let status = daemon.status();
    assert_eq!(status["containers"][0]["credentials"]["state"], "failed", "{status}");
    daemon.stop();
}

/// Containers that share a network namespace, or have the host's, are told apart by who made the socket.
fn host_network_and_shared_namespaces(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let config = format!("account_id = \"{ACCOUNT}\"\n[serve]\nattach = \"namespace\"");
    let daemon = Daemon::start(engine, &config, &moto.daemon_environment());
    let owner = engine.run("owner").label("imds.role", "owner").start();
    let sharer = engine
        .run("sharer")
        .label("imds.role", "sharer")
        .network("container:owner")
        .start();
    let bare = engine.run("bare-sharer").network("container:owner").start();
    let first = engine
        .run("first-on-host")
        .label("imds.role", "first-on-host")
        .network("host")
        .start();
    let second = engine
        .run("second-on-host")
        .label("imds.role", "second-on-host")
        .network("host")
        .start();
    let host = host_name(engine);
    for container in [&owner, &sharer, &first, &second] {
        let expected = Identity::of_role(ACCOUNT, container.name(), &format!("{}@{host}", container.name()));
        assert_eq!(Client::Boto3.whoami(container, moto, &[]), expected);
        assert_eq!(container.get(LIST, &[]).body, container.name());
    }
    assert_eq!(bare.get(LIST, &[]).status, 403, "no label, no service");
    // A process of the host is nobody, whatever else is on the host's network, and an intruder is nobody in a namespace.
    let url = format!("{}{LIST}", http::IMDS);
    let process = engine.request("GET", &url, &[]).expect("a refusal");
    assert_eq!((process.status, process.body.as_str()), (403, ""));
    let intruder = http::request(owner.intruder("curl"), "GET", &url, &[]).expect("a refusal");
    assert_eq!((intruder.status, intruder.body.as_str()), (403, ""));
    // First acts of both kinds.
    for network in ["container:owner", "host"] {
        for round in 0..5 {
            let name = format!("joins-{round}");
            first_act(engine, &name, network).unwrap_or_else(|why| panic!("{network}: {why}"));
        }
    }
    let status = daemon.status();
    let shown = status["containers"].as_array().expect("a list");
    let sharer = shown.iter().find(|it| it["name"] == "sharer").expect("it is shown");
    assert!(
        sharer["problems"][0]
            .as_str()
            .is_some_and(|it| it.contains("share a boundary")),
        "{sharer}"
    );
    daemon.stop();
}

/// Networks from which the host cannot be reached: attach `namespace` needs none.
fn networks_that_lead_nowhere(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(
        engine,
        &format!("account_id = \"{ACCOUNT}\""),
        &moto.daemon_environment(),
    );
    let internal = engine.network("inner", &["--internal"]);
    let lonely = engine
        .run("on-none")
        .label("imds.role", "on-none")
        .network("none")
        .start();
    let inner = engine
        .run("on-internal")
        .label("imds.role", "on-internal")
        .network(internal.name())
        .start();
    // Newer engines give internal networks no default route.
    let mut ip = inner.intruder("ip");
    ip.args(["route", "del", "default"]);
    let _ = crate::rig::Done::of(ip);
    // A program that listens on no bridge at all.
    engine.host("ip", &["link", "add", "lan7", "type", "veth", "peer", "name", "lan7p"]);
    engine.host("ip", &["link", "set", "lan7", "up"]);
    {
        let lan = engine.network(
            "lan",
            &["--driver=macvlan", "--subnet=10.77.0.0/24", "--opt=parent=lan7"],
        );
        let macvlan = engine
            .run("on-macvlan")
            .label("imds.role", "on-macvlan")
            .network(lan.name())
            .start();
        for container in [&lonely, &inner, &macvlan] {
            let ask = "import boto3; print(boto3.Session().get_credentials().get_frozen_credentials().access_key)";
            let key = container.exec(&[
                &format!("{}/venv/bin/python", crate::rig::tools::directory().display()),
                "-c",
                ask,
            ]);
            let status = daemon.status();
            let shown = status["containers"].as_array().expect("a list");
            let shown = shown
                .iter()
                .find(|it| it["name"] == container.name())
                .expect("it is shown");
            assert_eq!(shown["credentials"]["key"], key.as_str(), "{}", container.name());
            assert_eq!(container.get(LIST, &[]).body, container.name());
        }
    }
    engine.host("ip", &["link", "del", "lan7"]);
    daemon.stop();
}

/// An application listens on 0.0.0.0:80 in its container, before us and after us, and is published.
fn port_80_of_the_container_is_its_own(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let serve = [
        "/usr/bin/python3",
        "-m",
        "http.server",
        "80",
        "--bind",
        "0.0.0.0",
        "--directory",
        "/usr/share/doc/bash",
    ];
    let early = engine
        .run("early")
        .label("imds.role", "early")
        .arg("--publish=8081:80")
        .command(&serve)
        .start();
    let answers = |port: u16| {
        engine
            .request("GET", &format!("http://172.17.0.1:{port}/"), &[])
            .is_ok()
    };
    let daemon = Daemon::start(
        engine,
        &format!("account_id = \"{ACCOUNT}\""),
        &moto.daemon_environment(),
    );
    let late = engine
        .run("late")
        .label("imds.role", "late")
        .arg("--publish=8082:80")
        .command(&serve)
        .start();
    for (container, port) in [(&early, 8081), (&late, 8082)] {
        poll(Duration::from_secs(5), "the application", || {
            answers(port).then_some(())
        });
        poll(Duration::from_secs(5), "its role", || {
            (container.get(LIST, &[]).body == container.name()).then_some(())
        });
        // And within the container, by every address but ours.
        let own = container
            .request("GET", "http://127.0.0.1/", &[])
            .expect("the application");
        assert_eq!(own.status, 200);
        assert!(own.header("server").is_some_and(|it| it.contains("Python")), "{own:?}");
        assert!(answers(port));
    }
    daemon.stop();
}
