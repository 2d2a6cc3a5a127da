//! The rig, tried by itself: what the other trials stand on.

use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::moto::{AssumedRole, BASE_KEY, BASE_SECRET, REGION};
use crate::rig::{BOX, Client, Container, Daemon, Done, Engine, Identity, Moto, Rig, View, http, poll, run, tools};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.extend(rig.in_each_view("rig::a_container_runs", a_container_runs));
    trials.extend(rig.in_each_view("rig::nothing_leaves_the_host", nothing_leaves_the_host));
    trials.extend(rig.in_each_view("rig::clients_reach_sts", clients_reach_sts));
    trials.extend(rig.in_each_view("rig::containers_meet", containers_meet));
    trials.extend(rig.in_each_view("rig::containers_outlive_dockerd", containers_outlive_dockerd));
    trials.extend(rig.in_each_view("rig::a_daemon_serves_and_stops", a_daemon_serves_and_stops));
    trials.push(rig.once("rig::the_network_can_be_compared", the_network_can_be_compared));
    trials.push(rig.once("rig::images_carry_labels", images_carry_labels));
    trials.push(rig.once("rig::moto_knows_sessions", moto_knows_sessions));
    let view = rig.views()[0];
    trials.push(rig.alone("rig::clients_find_an_imds", move || clients_find_an_imds(view)));
    trials.extend(rig.on_newer("rig::newer_engines_are_newer", newer_engines_are_newer));
    let all = rig.clone();
    trials.push(rig.alone("rig::output_and_secrets_are_kept", move || {
        output_and_secrets_are_kept(&all)
    }));
    for view in rig.views().to_vec() {
        let name = format!("rig::nothing_is_left::{}", view.name());
        trials.push(rig.alone(&name, move || nothing_is_left(view)));
    }
    trials
}

/// Docker 20.10 is this machine's; 26.1 and 28.5 were those of Debian trixie and sid when this was written.
fn newer_engines_are_newer(engine: &Arc<Engine>) {
    let version = engine.docker(&["version", "--format", "{{.Server.Version}}"]);
    let major: u32 = version
        .split('.')
        .next()
        .and_then(|it| it.parse().ok())
        .expect("a version");
    println!("Docker {version}");
    assert!(major >= 26, "{version}");
}

fn a_container_runs(engine: &Arc<Engine>) {
    let version = engine.docker(&["info", "--format", "{{.CgroupVersion}} {{.LiveRestoreEnabled}}"]);
    let expected = match engine.kind.view {
        View::Hybrid => "1 true",
        View::V2 => "2 true",
    };
    assert_eq!(version, expected);

    let sdk = engine
        .run("sdk-one")
        .env("GREETING", "hello")
        .arg("--hostname=sdk-one")
        .start();
    assert_eq!(
        sdk.exec(&["sh", "-c", "echo $GREETING from $(hostname)"]),
        "hello from sdk-one"
    );
    assert_eq!(sdk.address("bridge").octets()[..2], [172, 17]);
    assert!(sdk.exec(&["curl", "--version"]).starts_with("curl "));

    let first_act = engine.run("short").bare_image(BOX).command(&["echo", "done"]);
    assert_eq!(first_act.to_its_end().ok(), "done");

    let host = engine.run("on-host").network("host").start();
    let namespace = ["/proc/self/ns/net"];
    assert_eq!(
        host.exec(&["readlink", namespace[0]]),
        engine.host("readlink", &namespace),
        "not the engine's host"
    );
}

/// The three addresses must never be asked outside, and there is nothing else to be reached either.
fn nothing_leaves_the_host(engine: &Arc<Engine>) {
    let links: Value = serde_json::from_str(&engine.host("ip", &["-j", "link"])).expect("ip prints JSON");
    for link in links.as_array().expect("a list of links") {
        let name = link["ifname"].as_str().expect("every link has a name");
        assert!(
            name == "lo" || name.starts_with("docker0") || name.starts_with("br-") || name.starts_with("veth"),
            "{name} may lead out"
        );
    }
    assert_eq!(engine.host("ip", &["route", "show", "default"]), "");
    let container = engine.run("prisoner").start();
    for address in ["169.254.169.254", "169.254.170.2", "169.254.170.23", "1.1.1.1"] {
        let url = format!("http://{address}/");
        container.request("GET", &url, &[]).expect_err("there is nobody");
        engine.request("GET", &url, &[]).expect_err("there is nobody");
    }
}

fn clients_reach_sts(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let network = engine.network("front", &[]);
    let on_bridge = engine.run("on-bridge").start();
    let on_front = engine.run("on-front").network(network.name()).start();
    let on_host = engine.run("on-host").network("host").start();
    for container in [&on_bridge, &on_front, &on_host] {
        for client in Client::ALL {
            let identity = client.whoami(
                container,
                moto,
                &[("AWS_ACCESS_KEY_ID", BASE_KEY), ("AWS_SECRET_ACCESS_KEY", BASE_SECRET)],
            );
            // moto's name for whoever it does not know.
            assert_eq!(identity.arn, "arn:aws:sts::123456789012:user/moto", "{client:?}");
        }
    }
}

fn moto_knows_sessions(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let container = engine.run("session").start();
    let role = assume_role(&container, moto, "orders@host");
    let credentials = [
        ("AWS_ACCESS_KEY_ID", role.access_key_id.as_str()),
        ("AWS_SECRET_ACCESS_KEY", role.secret_access_key.as_str()),
        ("AWS_SESSION_TOKEN", role.session_token.as_str()),
    ];
    for client in Client::ALL {
        assert_eq!(
            client.whoami(&container, moto, &credentials),
            Identity::of_role("111122223333", "orders", "orders@host"),
            "{client:?}"
        );
    }
    let known = moto.assumed_roles(engine);
    let known = known.iter().find(|known| known.access_key_id == role.access_key_id);
    assert_eq!(known, Some(&role));
}

/// By the AWS CLI, with the base credentials.
fn assume_role(container: &Container, moto: &Moto, session: &str) -> AssumedRole {
    let role_arn = "arn:aws:iam::111122223333:role/service/orders";
    let mut assume = container.exec_command(&[
        ("AWS_ACCESS_KEY_ID", BASE_KEY),
        ("AWS_SECRET_ACCESS_KEY", BASE_SECRET),
        ("AWS_DEFAULT_REGION", REGION),
        ("AWS_ENDPOINT_URL_STS", &moto.url_for(container)),
    ]);
    assume
        .arg(tools::directory().join("venv/bin/aws"))
        .args(["sts", "assume-role", "--output", "json"])
        .args(["--role-arn", role_arn, "--role-session-name", session]);
    let answer: Value = serde_json::from_str(&Done::of(assume).ok()).expect("the CLI prints JSON");
    let of = |key: &str| answer["Credentials"][key].as_str().expect("a text").to_owned();
    AssumedRole {
        role_arn: role_arn.to_owned(),
        session_name: session.to_owned(),
        access_key_id: of("AccessKeyId"),
        secret_access_key: of("SecretAccessKey"),
        session_token: of("SessionToken"),
    }
}

/// moto has a simple IMDS as well: enough to see that clients and helpers look where they should, and nowhere else.
fn clients_find_an_imds(view: View) {
    let engine = Engine::start(view);
    let moto = engine.moto();
    let container = engine.run("client").start();
    // One of them, since they all wait for an answer first.
    let failure = Client::JavaScript.try_whoami(&container, moto, &[]);
    let failure = failure.expect_err("there are no credentials yet");
    assert!(failure.stderr.contains("CredentialsProviderError"), "{failure}");

    engine.host("ip", &["addr", "add", "169.254.169.254/32", "dev", "lo"]);
    let mut imds = engine.command(tools::directory().join("venv/bin/moto_server"));
    imds.args(["--host", "169.254.169.254", "--port", "80"]);
    let imds = engine.background(&mut imds, "imds");
    let token = poll(Duration::from_secs(20), "moto's IMDS", || {
        let ttl = [("X-aws-ec2-metadata-token-ttl-seconds", "60")];
        container.request("PUT", "/latest/api/token", &ttl).ok()
    });
    assert_eq!((token.status, &*token.body), (200, "fake-imdsv2-token"));
    assert_eq!(container.token(), token.body);
    let header = [("X-aws-ec2-metadata-token", &*token.body)];
    let id = container.get("/latest/meta-data/instance-id", &header);
    assert_eq!((id.status, &*id.body), (200, "i-fake"));
    let raw = container.raw("GET /latest/meta-data/instance-id HTTP/1.0\r\n\r\n");
    assert!(raw.ends_with("\r\n\r\ni-fake"), "{raw}");

    for client in Client::ALL {
        match client {
            // It insists on the TTL in the answer, which moto does not give.
            Client::Rust => assert!(client.try_whoami(&container, moto, &[]).is_err()),
            _ => assert_eq!(
                client.whoami(&container, moto, &[]).arn,
                "arn:aws:sts::123456789012:user/moto"
            ),
        }
    }
    drop(imds);
    let refused = container.request("GET", "/", &[]);
    let refused = refused.expect_err("it is gone");
    assert!(refused.connection_refused(), "{refused}");

    engine.host("ip", &["addr", "del", "169.254.169.254/32", "dev", "lo"]);
    let silence = container.request("GET", "/", &[]);
    let silence = silence.expect_err("the route to it is a blackhole");
    assert!(silence.timed_out(), "{silence}");
}

fn containers_meet(engine: &Arc<Engine>) {
    let network = engine.network("meeting", &[]);
    let server = engine
        .run("server")
        .bare_image(BOX)
        .network(network.name())
        .command(&["sh", "-c", "echo met > /tmp/index.html; exec httpd -f -p 80 -h /tmp"])
        .start();
    let client = engine.run("client").network(network.name()).start();
    let url = format!("http://{}/", server.address(network.name()));
    let reply = poll(Duration::from_secs(5), "the other container", || {
        client.request("GET", &url, &[]).ok()
    });
    assert_eq!((reply.status, reply.body.trim()), (200, "met"));
    assert_eq!(reply.header("content-type"), Some("text/html"));

    let request = "GET / HTTP/1.0\r\n\r\n";
    let answer = client.raw_to(&server.address(network.name()).to_string(), 80, request);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");

    let sharer = engine.run("sharer").network("container:client").start();
    assert_eq!(sharer.gateway(), client.gateway());
    assert_eq!(sharer.request("GET", &url, &[]).expect("the same way").status, 200);
    let intruder = http::request(client.intruder("curl"), "GET", &url, &[]);
    assert_eq!(intruder.expect("the same way").status, 200);
}

fn containers_outlive_dockerd(engine: &Arc<Engine>) {
    let container = engine.run("survivor").start();
    let pid = container.pid();
    engine.kill();
    engine.try_docker(&["version"]).fails();
    engine.restart();
    assert_eq!(container.pid(), pid, "it should not have noticed");
    container.exec(&["true"]);
    engine.stop();
    engine.restart();
    assert_eq!(container.pid(), pid, "it should not have noticed");
    container.restart();
    assert_ne!(container.pid(), pid, "another life");
}

fn a_daemon_serves_and_stops(engine: &Arc<Engine>) {
    let environment = engine.moto().daemon_environment();
    let daemon = Daemon::start(engine, "region = \"eu-west-1\"\n", &environment);
    assert!(daemon.status().is_object());
    daemon.stop();

    let daemon = Daemon::start(engine, "[serve]\nattach = \"auto\"\n", &environment);
    let directory = daemon.directory().to_owned();
    daemon.kill();
    Daemon::start_in(engine, directory, "", &environment).stop();

    let (code, printed) = Daemon::start_in_vain(engine, "reigon = \"eu-west-1\"\n", &environment);
    assert_eq!(code, Some(2), "{printed}");
}

fn the_network_can_be_compared(engine: &Arc<Engine>) {
    // Every new network makes dockerd move its own jump rules to the front again; once is enough to settle their order.
    drop(engine.network("settling", &[]));
    let before = engine.snapshot_network();
    let network = engine.network("passing", &[]);
    let during = engine.snapshot_network();
    assert_ne!(before, during);
    assert!(!during.lines_with("nft ").is_empty(), "no rules at all?\n{during}");
    drop(network);
    before.assert_same(&engine.snapshot_network());
}

fn images_carry_labels(engine: &Arc<Engine>) {
    let image = engine.image_with("labeled", &[("imds.role", "from the image")], &[("COLOUR", "blue")]);
    let container = engine.run("of-image").image(&image).start();
    assert_eq!(
        container.inspect("{{index .Config.Labels \"imds.role\"}}"),
        "from the image"
    );
    assert_eq!(container.exec(&["sh", "-c", "echo $COLOUR"]), "blue");
}

fn nothing_is_left(view: View) {
    let before = run::leftovers();
    let engine = Engine::start(view);
    let container = engine.run("forgotten").start();
    let network = engine.network("forgotten", &[]);
    assert_ne!(run::leftovers(), before, "leftovers() does not see an engine");
    // A daemon that was killed leaves its private network namespace pinned.
    let daemon = Daemon::start(&engine, "[credentials]\nsource = \"offline\"\n", &[]);
    let directory = daemon.directory().to_owned();
    // Its admin socket answers a moment before.
    poll(Duration::from_secs(10), "the daemon to pin its namespace", || {
        Daemon::is_pinned(&engine, &directory).then_some(())
    });
    daemon.kill();
    assert!(Daemon::is_pinned(&engine, &directory));
    let cgroups = format!("docker/{}", container.id());
    let hierarchies = [
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/devices",
    ];
    let cgroups = hierarchies.map(|root| std::path::Path::new(root).join(&cgroups));
    assert!(cgroups.iter().any(|path| path.exists()), "none of {cgroups:?}");

    assert_eq!(engine.end(), Vec::<String>::new());
    assert_eq!(run::leftovers(), before);
    assert!(
        !cgroups.iter().any(|path| path.exists()),
        "one of {cgroups:?} is still there"
    );
    // There is no engine any more that could remove them.
    std::mem::forget((container, network));
}

fn output_and_secrets_are_kept(rig: &Rig) {
    let engine = Engine::start(rig.views()[0]);
    let container = engine.run("keeper").start();
    let credentials = assume_role(&container, engine.moto(), "kept");
    let log = engine.log("moto");
    drop(container);
    drop(engine);
    assert!(rig.secrets().contains(&credentials.secret_access_key));
    assert!(rig.secrets().contains(&credentials.session_token));
    let name = log.file_name().expect("it has a name").to_string_lossy();
    assert!(rig.all_output().contains(&*name), "the log of an engine that has ended");
}
