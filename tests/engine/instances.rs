//! The whole instance, on a real engine: what the programs read that read EC2's metadata, what happens to a container, and its
//! options.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::container::{IMDS_ROUTER, SCRIPTS};
use crate::rig::{Container, Daemon, Engine, Rig, attach_keys, poll, tools};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("instances::what_is_recorded_is_served", recorded),
        rig.once("instances::readers_of_metadata_read_their_own_containers", readers),
        rig.once(
            "instances::spot_notices_come_at_their_second_and_outlive_the_daemon",
            notices,
        ),
        rig.once("instances::a_spot_instance_is_stopped_where_that_is_allowed", stopped),
        rig.once(
            "instances::an_answer_with_a_token_goes_no_further_than_its_limit::namespace",
            |engine| hops(engine, "namespace"),
        ),
        rig.once(
            "instances::an_answer_with_a_token_goes_no_further_than_its_limit::host",
            |engine| hops(engine, "host"),
        ),
    ]
}

const CONFIG: &str = "region = \"eu-west-1\"\naccount_id = \"111122223333\"\n[imds]\ninstance_metadata_tags = \"enabled\"\n\
    [public_keys]\nme = \"ssh-ed25519 AAAA me\"\n";
const ACTION: &str = "/latest/meta-data/spot/instance-action";

/// What must be read in a container: from the engine's own mouth.
fn truth(container: &Container) -> BTreeMap<&'static str, String> {
    let mac = container.inspect("{{range .NetworkSettings.Networks}}{{.MacAddress}}{{end}}");
    let image = container.inspect("{{.Image}}");
    [
        ("ami-id", format!("ami-{}", &image.trim_start_matches("sha256:")[..17])),
        ("ami-launch-index", "0".to_owned()),
        ("ami-manifest-path", "(unknown)".to_owned()),
        ("availability-zone", "eu-west-1a".to_owned()),
        ("availability-zone-id", "euw1-az1".to_owned()),
        ("placement", "eu-west-1a".to_owned()),
        ("region", "eu-west-1".to_owned()),
        ("instance-action", "none".to_owned()),
        ("instance-id", format!("i-{}", &container.id()[..17])),
        ("instance-type", format!("t3.{}", container.name())),
        ("local-hostname", container.inspect("{{.Config.Hostname}}")),
        ("local-ipv4", container.address("bridge").to_string()),
        ("mac", mac),
        ("profile", "default-hvm".to_owned()),
        ("security-groups", "bridge".to_owned()),
        ("user-data", format!("for {}", container.name())),
    ]
    .into()
}

/// A value of `name: value`; what heads a list has none.
fn value(line: &str) -> Option<(&str, &str)> {
    line.split_once(": ").filter(|(_, value)| !value.is_empty())
}

fn readers(engine: &Arc<Engine>) {
    let daemon = Daemon::start(engine, CONFIG, &engine.moto().daemon_environment());
    let start = |name: &str| {
        let run = engine
            .run(name)
            .label("imds.role", name)
            .label("imds.instance-type", &format!("t3.{name}"));
        let run = run
            .label("imds.user-data", &format!("for {name}"))
            .label("imds.instance-tag.Name", name);
        run.start()
    };
    let containers = [start("large"), start("small")];
    let debian = tools::directory().join("debian");
    let program = |name: &str| debian.join("usr/bin").join(name).display().to_string();
    let python = tools::directory().join("venv/bin/python").display().to_string();
    for container in &containers {
        let truth = truth(container);
        let reservation = container.get("/latest/meta-data/reservation-id", &[]).body;
        // `name: value`, a line each; lists are below.
        let said = container.exec(&["bash", &program("ec2-metadata"), "--all"]);
        let mut known = 0;
        for (name, value) in said.lines().filter_map(value) {
            let expected = match name.trim() {
                "ami" | "root" => "/dev/xvda".to_owned(),
                "Name" => container.name().to_owned(),
                "reservation-id" => reservation.clone(),
                name => truth.get(name).cloned().unwrap_or_else(|| "not available".to_owned()),
            };
            assert_eq!(
                value,
                expected,
                "{name} by ec2-metadata in {}:\n{said}",
                container.name()
            );
            known += usize::from(value != "not available");
        }
        assert!(known >= 14, "{known}:\n{said}");
        assert!(said.contains("keyname:me\nindex:0\nformat:openssh-key\n"), "{said}");
        assert!(said.contains("\nssh-ed25519 AAAA me\n"), "{said}");

        let said = container.exec(&[&python, &program("ec2metadata")]);
        let mut known = 0;
        for (name, value) in said.lines().filter_map(value) {
            let expected = match name {
                "block-device-mapping" => continue, // the list, on lines of its own
                "public-keys" => "['ssh-ed25519 AAAA me']".to_owned(),
                "user-data" => format!("b'{}'", truth["user-data"]),
                "reservation-id" => reservation.clone(),
                name => truth.get(name).cloned().unwrap_or_else(|| "unavailable".to_owned()),
            };
            assert_eq!(
                value,
                expected,
                "{name} by ec2metadata in {}:\n{said}",
                container.name()
            );
            known += usize::from(value != "unavailable");
        }
        assert!(known >= 17, "{known}:\n{said}");

        let packages = debian.join("usr/lib/python3/dist-packages").display().to_string();
        let said = container.exec(&[&python, &format!("{SCRIPTS}/crawl.py"), &packages]);
        let crawled: Value = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        let meta = &crawled["meta-data"];
        for name in [
            "ami-id",
            "instance-id",
            "instance-type",
            "local-hostname",
            "local-ipv4",
            "mac",
            "security-groups",
        ] {
            assert_eq!(meta[name], truth[name], "{name} by cloud-init in {}", container.name());
        }
        assert_eq!(meta["placement"]["availability-zone"], truth["placement"]);
        assert_eq!(meta["public-keys"]["me"], "ssh-ed25519 AAAA me");
        assert_eq!(meta["tags"]["instance"]["Name"], container.name());
        let link = &meta["network"]["interfaces"]["macs"][&truth["mac"]];
        assert_eq!(link["local-ipv4s"], truth["local-ipv4"], "{link}");
        assert_eq!(link["device-number"], "0");
        assert_eq!(link["subnet-ipv4-cidr-block"], subnet(engine), "{link}");
        assert_eq!(crawled["user-data"], truth["user-data"]);
        let identity = &crawled["dynamic"]["document"];
        let identity: Value = identity
            .as_str()
            .map_or_else(|| identity.clone(), |it| serde_json::from_str(it).expect("JSON"));
        assert_eq!(identity["instanceId"], truth["instance-id"]);
        assert_eq!(identity["privateIp"], truth["local-ipv4"]);
    }
    // The certificate is the same that signed, and the daemon prints it.
    let certificate = daemon.cli(&["identity", "certificate"]).ok();
    assert!(certificate.starts_with("-----BEGIN CERTIFICATE-----"), "{certificate}");
    let key = daemon.directory().join("state/identity.pem");
    let mode = engine.host("stat", &["-c", "%a", &key.display().to_string()]);
    assert_eq!(mode.trim(), "600");
    daemon.stop();
}

fn subnet(engine: &Engine) -> String {
    let format = "{{range .IPAM.Config}}{{.Subnet}}{{end}}";
    engine
        .docker(&["network", "inspect", "bridge", "--format", format])
        .trim()
        .to_owned()
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// When the notice came, in seconds since 1970, and what it says.
fn noticed(container: &Container) -> (u64, String) {
    poll(
        Duration::from_secs(20),
        &format!("the notice of {}", container.name()),
        || {
            let reply = container.request("GET", ACTION, &[]).ok()?;
            (reply.status == 200).then(|| (now().as_secs(), reply.body))
        },
    )
}

fn notices(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, CONFIG, &moto.daemon_environment());
    let run_started = engine
        .run("born")
        .label("imds.role", "born")
        .label("imds.spot.interrupt-after", "126s")
        .start();
    let told = engine.run("told").label("imds.role", "told").start();
    crate::cases::is_itself(&run_started);
    crate::cases::is_itself(&told);
    let ordered = now().as_secs();
    let said = daemon
        .cli(&[
            "trigger",
            "told",
            "spot-interruption",
            "--action",
            "stop",
            "--in",
            "123s",
        ])
        .ok();
    assert!(
        said.starts_with("spot-interruption stop at ") && said.contains("not told yet"),
        "{said}"
    );
    assert_eq!(told.get(ACTION, &[]).status, 404);
    let at = |text: &str| -> u64 {
        let read: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
        let time: jiff::Timestamp = read["time"].as_str().and_then(|it| it.parse().ok()).expect("a time");
        u64::try_from(time.as_second()).unwrap_or(0)
    };
    let (when, document) = noticed(&told);
    assert!(document.starts_with("{\"action\": \"stop\", "), "{document}");
    assert!((ordered + 3..=ordered + 5).contains(&when), "{ordered} {when}");
    assert!((ordered + 123..=ordered + 124).contains(&at(&document)), "{document}");
    let (when, document) = noticed(&run_started);
    assert!(document.starts_with("{\"action\": \"terminate\", "), "{document}");
    assert!(when.abs_diff(at(&document) - 120) <= 1, "{when}: {document}");
    // Over a restart of the daemon, and called off.
    daemon.cli(&["modify", "born", "--http-tokens", "required"]).ok();
    let directory = daemon.directory().to_owned();
    daemon.kill();
    let daemon = Daemon::start_in(engine, directory, CONFIG, &moto.daemon_environment());
    crate::cases::is_itself(&told);
    assert!(told.get(ACTION, &[]).body.starts_with("{\"action\": \"stop\", "));
    assert_eq!(run_started.get(ACTION, &[]).status, 401);
    assert!(daemon.cli(&["trigger", "told"]).ok().contains(": told"));
    daemon.cli(&["trigger", "told", "spot-interruption", "--cancel"]).ok();
    poll(Duration::from_secs(5), "the notice to go", || {
        (told.get(ACTION, &[]).status == 404).then_some(())
    });
    let again = daemon.cli(&["trigger", "told", "spot-interruption", "--cancel"]);
    assert!(
        !again.succeeded() && again.stderr.contains("there is no spot-interruption to cancel"),
        "{again}"
    );
    let wrong = daemon.cli(&["trigger", "told", "spot-interruption", "--action", "explode"]);
    assert!(wrong.stderr.contains("expected terminate, stop, hibernate"), "{wrong}");
    daemon.stop();
}

/// A restart of the daemon lies between the order and the stop.
fn stopped(engine: &Arc<Engine>) {
    let environment = engine.moto().daemon_environment();
    let daemon = Daemon::start(engine, CONFIG, &environment);
    let taken = engine.run("taken").label("imds.role", "taken").start();
    let other = engine.run("other").label("imds.role", "other").start();
    crate::cases::is_itself(&taken);
    crate::cases::is_itself(&other);
    let order = ["trigger", "taken", "spot-interruption", "--stop", "--in", "6s"];
    let refused = daemon.cli(&order);
    assert!(
        !refused.succeeded() && refused.stderr.contains("[imds] triggers_may_stop = true"),
        "{refused}"
    );
    let directory = daemon.directory().to_owned();
    daemon.stop();
    let config = CONFIG.replace("[imds]\n", "[imds]\ntriggers_may_stop = true\n");
    let daemon = Daemon::start_in(engine, directory.clone(), &config, &environment);
    crate::cases::is_itself(&taken);
    let ordered = now();
    let said = daemon.cli(&order).ok();
    assert!(said.contains("and really stops it"), "{said}");
    daemon
        .cli(&["trigger", "other", "spot-interruption", "--stop", "--in", "6s"])
        .ok();
    daemon.cli(&["trigger", "other", "spot-interruption", "--cancel"]).ok();
    daemon.kill();
    let daemon = Daemon::start_in(engine, directory, &config, &environment);
    assert_eq!(taken.inspect("{{.State.Running}}").trim(), "true");
    poll(Duration::from_secs(25), "the stop", || {
        (taken.inspect("{{.State.Running}}").trim() == "false").then_some(())
    });
    assert!(now() - ordered >= Duration::from_secs(5), "{:?}", now() - ordered);
    crate::cases::is_itself(&other);
    daemon.stop();
}

fn hops(engine: &Arc<Engine>, attach: &str) {
    let config = format!("{CONFIG}[serve]\n{}", attach_keys(attach));
    let daemon = Daemon::start(engine, &config, &engine.moto().daemon_environment());
    let network = engine.network_with_ipv6("hops", "fd12:3457::/64");
    let run = engine.run("near").label("imds.role", "near").network(network.name());
    let container = run.start();
    crate::cases::is_itself(&container);
    network.await_ipv6();
    let seen = |address: &str| {
        let said = container.exec(&["/usr/bin/python3", &format!("{SCRIPTS}/hops.py"), address]);
        let seen: Vec<(u8, bool)> = serde_json::from_str(&said).unwrap_or_else(|e| panic!("{e}: {said}"));
        seen
    };
    let addresses = ["169.254.169.254", "fd00:ec2::254"];
    // The system's own limit for a value; the configuration's for a token.
    for address in addresses {
        assert_eq!(seen(address), [(64, false), (2, true)], "{address}");
    }
    let said = daemon
        .cli(&["modify", "near", "--http-put-response-hop-limit", "1"])
        .ok();
    assert!(said.contains("http-put-response-hop-limit 1"), "{said}");
    for address in addresses {
        poll(Duration::from_secs(5), "the new limit", || {
            (seen(address) == [(64, false), (1, true)]).then_some(())
        });
    }
    daemon.stop();
}

fn recorded(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, CONFIG, &moto.daemon_environment());
    let real = engine
        .run("real")
        .label("imds.role", "real")
        .label("imds.instance-type", "m7i.large");
    let real = real
        .label("imds.metadata.placement/group-name", "together")
        .label("imds.user-data", "of its own")
        .start();
    crate::cases::is_itself(&real);
    let record = |file: &str, more: &[&str]| real.try_exec(&[&[IMDS_ROUTER, "record", file][..], more].concat());
    record("/tmp/without.json", &[]).ok();
    record("/tmp/with.json", &["--user-data"]).ok();
    let again = record("/tmp/with.json", &[]);
    assert!(
        again.stderr.contains("expected a file that is not there yet"),
        "{again}"
    );
    assert_eq!(real.exec(&["stat", "-c", "%a", "/tmp/with.json"]).trim(), "600");
    assert!(!real.exec(&["cat", "/tmp/without.json"]).contains("user-data"));
    let text = real.exec(&["cat", "/tmp/with.json"]);
    assert!(!text.contains("iam") && !text.contains("signature"), "{text}");
    let paths = [
        "instance-id",
        "instance-type",
        "placement/group-name",
        "mac",
        "local-ipv4",
        "reservation-id",
    ];
    let values =
        |container: &Container| paths.map(|path| container.get(&format!("/latest/meta-data/{path}"), &[]).body);
    let expected = values(&real);
    let file = daemon.directory().join("recorded.json");
    std::fs::write(&file, text).expect("written");
    real.kill();
    daemon.stop();
    let config = format!(
        "account_id = \"111122223333\"\n[metadata]\nfile = \"{}\"\n",
        file.display()
    );
    let daemon = Daemon::start(engine, &config, &moto.daemon_environment());
    let alike = engine.run("alike").label("imds.role", "alike").start();
    crate::cases::is_itself(&alike);
    assert_eq!(values(&alike), expected);
    assert_eq!(alike.get("/latest/user-data", &[]).body, "of its own");
    daemon.stop();
}
