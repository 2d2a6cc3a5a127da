//! Who gets nothing, and what it costs the others: nothing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::{Client, Daemon, Engine, Rig, http, poll};

const ACCOUNT: &str = "account_id = \"111122223333\"\n";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = Vec::new();
    trials.push(rig.once("refusals::without_a_label_403_and_without_a_role_metadata", by_label));
    trials.extend(rig.in_each_view("refusals::host_processes_and_intruders", host_processes_and_intruders));
    trials.push(rig.once(
        "refusals::an_address_that_no_container_has",
        an_address_that_no_container_has,
    ));
    trials.push(rig.once("refusals::a_neighbour_in_the_lan", a_neighbour_in_the_lan));
    trials.push(rig.once("refusals::a_token_of_another_container", a_token_of_another_container));
    trials.push(rig.once("refusals::a_role_of_the_image", a_role_of_the_image));
    trials.push(rig.once("refusals::bad_labels", bad_labels));
    trials
}

fn of<'a>(status: &'a Value, name: &str) -> &'a Value {
    let containers = status["containers"].as_array().expect("a list");
    containers
        .iter()
        .find(|it| it["name"] == name)
        .unwrap_or_else(|| panic!("{name} is not in {status}"))
}

fn by_label(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let bare = engine.run("bare").label("some.other", "label").start();
    let roleless = engine.run("roleless").label("imds.region", "eu-west-2").start();
    for (method, path) in [
        ("GET", "/"),
        ("GET", LIST),
        ("PUT", "/latest/api/token"),
        ("POST", "/x"),
    ] {
        let ttl = [("X-aws-ec2-metadata-token-ttl-seconds", "60")];
        let reply = bare.request(method, path, &ttl).expect("an answer");
        assert_eq!((reply.status, reply.body.as_str()), (403, ""), "{method} {path}");
    }
    assert_eq!(
        roleless.get("/latest/meta-data/placement/region", &[]).body,
        "eu-west-2"
    );
    assert_eq!(roleless.get(LIST, &[]).status, 404);
    assert!(!roleless.get("/latest/meta-data/", &[]).body.contains("iam"));
    // A real SDK takes both for "no credentials", at once.
    for container in [&bare, &roleless] {
        let asked = Instant::now();
        let done = Client::Boto3
            .try_whoami(container, moto, &[])
            .expect_err("there are none");
        assert!(
            done.to_string().contains("NoCredentials") || done.to_string().contains("locate credentials"),
            "{done}"
        );
        assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
    }
    let status = daemon.status();
    assert_eq!(of(&status, "bare")["endpoint"], "disabled");
    assert_eq!(of(&status, "roleless")["endpoint"], "enabled");
    daemon.stop();
}

fn host_processes_and_intruders(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let victim = engine.run("victim").label("imds.role", "victim").start();
    assert_eq!(victim.get(LIST, &[]).body, "victim");

    let host = engine
        .request("GET", &format!("http://169.254.169.254{LIST}"), &[])
        .expect("a refusal");
    assert_eq!((host.status, host.body.as_str()), (403, ""));
    assert!(
        host.header("x-imds-router-hint").is_none(),
        "an unproven caller learns nothing"
    );

    // A process of the host that has moved into the container's namespace has the host's cgroup.
    let url = format!("http://169.254.169.254{LIST}");
    let intruder = http::request(victim.intruder("curl"), "GET", &url, &[]).expect("a refusal");
    assert_eq!((intruder.status, intruder.body.as_str()), (403, ""));
    let refused = daemon.status()["refused_connections"].clone();
    assert_eq!(refused["host"], 1, "{refused}");
    assert_eq!(refused["foreign-cgroup"], 1, "{refused}");
    let explained = daemon.cli(&["explain", "victim"]).ok();
    assert!(
        explained.contains("ok  role         arn:aws:iam::111122223333:role/victim as victim@"),
        "{explained}"
    );
    assert!(
        explained.contains("was made by cgroup"),
        "the intruder's evidence: {explained}"
    );
    let explained: Value =
        serde_json::from_str(&daemon.cli(&["explain", "--json", &victim.id()[..8]]).ok()).expect("JSON");
    assert_eq!(explained["refused"][0]["reason"], "foreign-cgroup", "{explained}");
    assert!(
        daemon
            .cli(&["explain", "nobody"])
            .fails()
            .contains("is called \"nobody\"")
    );
    assert_eq!(victim.get(LIST, &[]).body, "victim");
    daemon.stop();
}

/// A namespace on the bridge that Docker knows nothing of.
fn an_address_that_no_container_has(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let neighbour = engine.run("neighbour").label("imds.role", "neighbour").start();
    let script = "
        unshare -n sleep 60 & stranger=$!
        while [ \"$(readlink /proc/$stranger/ns/net)\" = \"$(readlink /proc/self/ns/net)\" ]; do :; done
        trap 'kill $stranger; ip link del stranger0 2>/dev/null' EXIT
        ip link add stranger0 type veth peer name eth0 netns $stranger
        ip link set stranger0 master docker0 up
        nsenter -t $stranger -n ip addr add 172.17.200.200/16 dev eth0
        nsenter -t $stranger -n ip link set eth0 up
        nsenter -t $stranger -n ip route add default via 172.17.0.1
        sleep 0.2
        nsenter -t $stranger -n curl -s -o /dev/null -w '%{http_code}' --max-time 3 --noproxy '*' \
            http://169.254.169.254/latest/meta-data/iam/security-credentials/
    ";
    assert_eq!(engine.host("sh", &["-c", script]), "403");
    assert_eq!(daemon.status()["refused_connections"]["unknown-address"], 1);
    assert_eq!(neighbour.get(LIST, &[]).body, "neighbour");
    daemon.stop();
}

/// A machine beside the host, which routes the address to it.
fn a_neighbour_in_the_lan(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let script = "
        unshare -n sleep 60 & stranger=$!
        while [ \"$(readlink /proc/$stranger/ns/net)\" = \"$(readlink /proc/self/ns/net)\" ]; do :; done
        trap 'kill $stranger; ip link del lan0 2>/dev/null' EXIT
        ip link add lan0 type veth peer name eth0 netns $stranger
        ip addr add 10.55.0.1/24 dev lan0
        ip link set lan0 up
        nsenter -t $stranger -n ip addr add 10.55.0.2/24 dev eth0
        nsenter -t $stranger -n ip link set eth0 up
        nsenter -t $stranger -n ip route add default via 10.55.0.1
        nsenter -t $stranger -n curl -s -i --max-time 3 --noproxy '*' http://169.254.169.254/
        echo \"exit $?\"
    ";
    let said = engine.host("sh", &["-c", script]);
    // 52: closed without a byte; 56: reset.
    assert!(["exit 52", "exit 56"].contains(&said.trim()), "{said}");
    assert_eq!(daemon.status()["refused_connections"]["foreign-interface"], 1);
    daemon.stop();
}

fn a_token_of_another_container(engine: &Arc<Engine>) {
    let daemon = Daemon::start(engine, ACCOUNT, &engine.moto().daemon_environment());
    let first = engine.run("first").label("imds.role", "first").start();
    let second = engine.run("second").label("imds.role", "second").start();
    let token = first.token();
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(first.get(LIST, &headers).body, "first");
    let reply = second.get(LIST, &headers);
    assert_eq!((reply.status, reply.body.as_str()), (401, ""));
    daemon.stop();
}

fn a_role_of_the_image(engine: &Arc<Engine>) {
    let daemon = Daemon::start(engine, ACCOUNT, &engine.moto().daemon_environment());
    let image = engine.image_with("bakes-a-role", &[("imds.role", "baked")], &[]);
    let baked = engine.run("baked").image(&image).start();
    let chosen = engine.run("chosen").image(&image).label("imds.role", "chosen").start();
    let committed = {
        // `docker commit` writes a container's labels into the image.
        engine.docker(&["commit", "chosen", "committed"]);
        engine.run("from-commit").image("committed").start()
    };
    assert_eq!(baked.get(LIST, &[]).status, 403);
    assert_eq!(committed.get(LIST, &[]).status, 403);
    assert_eq!(chosen.get(LIST, &[]).body, "chosen");
    let status = daemon.status();
    let why = of(&status, "baked")["problems"][0]
        .as_str()
        .expect("a reason")
        .to_owned();
    assert!(why.contains("label imds.role: the image has the same value"), "{why}");
    let done = daemon.cli(&["check", "--offline"]).ok();
    assert!(
        done.contains("baked: label imds.role: the image has the same value"),
        "{done}"
    );
    daemon.stop();
    let daemon = Daemon::start(
        engine,
        "[docker]\nimage_labels = true",
        &engine.moto().daemon_environment(),
    );
    // No account is configured here: STS says it.
    let url = format!("http://169.254.169.254{LIST}");
    poll(Duration::from_secs(5), "the image's role", || {
        // Before the new daemon has made the link, a connection is closed without an answer.
        (baked.request("GET", &url, &[]).ok()?.body == "baked").then_some(())
    });
    daemon.stop();
}

fn bad_labels(engine: &Arc<Engine>) {
    let daemon = Daemon::start(engine, ACCOUNT, &engine.moto().daemon_environment());
    let good = engine.run("good").label("imds.role", "good").start();
    let no_arn = engine
        .run("no-arn")
        .label("imds.role", "arn:aws:iam::12:role/x")
        .start();
    let typo = engine
        .run("typo")
        .label("imds.role", "good")
        .label("imds.rol", "x")
        .start();
    for (container, why) in [
        (&no_arn, "\"arn:aws:iam::12:role/x\" is not a role ARN"),
        (&typo, "unknown label imds.rol; did you mean imds.role?"),
    ] {
        let token = container.token();
        let headers = [("X-aws-ec2-metadata-token", token.as_str())];
        let reply = container.get(LIST, &headers);
        assert_eq!(reply.status, 404);
        assert!(
            reply.header("x-imds-router-hint").is_some_and(|it| it.contains(why)),
            "{reply:?}"
        );
        assert_eq!(
            container.get("/latest/meta-data/instance-id", &headers).status,
            200,
            "it lives"
        );
        let status = daemon.status();
        let problem = of(&status, container.name())["problems"][0]
            .as_str()
            .expect("a reason")
            .to_owned();
        assert!(problem.contains(why), "{problem}");
    }
    let shown = daemon.cli(&["status"]).ok();
    assert!(
        shown.contains("typo: unknown label imds.rol; did you mean imds.role?"),
        "{shown}"
    );
    let checked = daemon.cli(&["check", "--offline"]);
    assert_eq!(checked.status.code(), Some(1), "{checked}");
    assert!(
        checked
            .stdout
            .contains("typo: no credentials: unknown label imds.rol; did you mean imds.role?"),
        "{checked}"
    );
    assert_eq!(good.get(LIST, &[]).body, "good");
    daemon.stop();
}
