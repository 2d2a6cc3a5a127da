//! The whole instance, per container: its tree, what is given in it, its identity, its options.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::pin::Pin;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf};

use imds_router::attribution::Connection;
use imds_router::config::Settings;
use imds_router::metadata::crawl;
use imds_router::metadata::events::{Event, Kind, Run};
use imds_router::orders::{StopError, to_stop};
use imds_router::protocol::request::VERSIONS;
use imds_router::server::{self, HopLimit};

use crate::conformance::Reply;
use crate::conformance::tricks::{CLOSED, tricks};
use crate::script::{Client, Daemon, connected, id, settings};

const ROLE_LIST: &str = "/latest/meta-data/iam/security-credentials/";

/// What containers are to see of a host that has all that an instance can have.
async fn host() -> BTreeMap<String, String> {
    let open = [
        ("meta-data/instance-id", "i-0bbbbbbbbbbbbbbbb"),
        ("meta-data/tags/instance/iam", "a tag"),
    ];
    let closed = CLOSED.map(|path| (path, "of the host alone"));
    let values: BTreeMap<_, _> = open.into_iter().chain(closed).collect();
    let get = |path: String| {
        let value = values.get(path.as_str()).map(|value| (*value).to_owned());
        let below = values
            .keys()
            .filter_map(|it| it.strip_prefix(&path)?.split_inclusive('/').next());
        let listed: BTreeSet<_> = below.filter(|_| path.ends_with('/')).collect();
        let listing = listed.into_iter().collect::<Vec<_>>().join("\n");
        let answer = value.or(Some(listing).filter(|listing| !listing.is_empty()));
        async move { Ok::<_, Infallible>(answer) }
    };
    let Ok(found) = crawl::gather(get).await;
    crawl::for_another(&found)
}

#[tokio::test(start_paused = true)]
async fn no_path_leads_to_what_is_the_hosts_alone() {
    let daemon = Daemon::start(Settings {
        instance_metadata_tags: true,
        ..settings()
    });
    daemon.host_is(host().await);
    daemon.synchronised().await;
    let address = daemon.run(1, &[("imds.role", "app")]).await;
    let other = daemon.run(2, &[("imds.role", "app")]).await;
    daemon.settle().await;
    // All have the id of the host, and their own role.
    for (number, address) in [(1, address), (2, other)] {
        let mut client = daemon.connect(number, address).keep_alive();
        let id = client.get("/latest/meta-data/instance-id").await.unwrap();
        assert_eq!(id.text(), "i-0bbbbbbbbbbbbbbbb");
        assert_eq!(client.get(ROLE_LIST).await.unwrap().text(), "app");
        assert_eq!(
            client.get("/latest/meta-data/tags/instance/iam").await.unwrap().text(),
            "a tag"
        );
    }
    let tricks = tricks();
    assert!(tricks.len() > 200, "{}", tricks.len());
    for path in tricks {
        // A connection of its own: some of them end it.
        let reply = daemon.connect(1, address).get(&path).await;
        let text = reply
            .map(|reply| String::from_utf8_lossy(&reply.body).into_owned())
            .unwrap_or_default();
        assert!(
            !text.contains("of the host") && !text.contains("of-the-host"),
            "{path}: {text}"
        );
    }
    let all = crawl(&mut daemon.connect(1, address).keep_alive(), "/latest/").await;
    assert!(all.len() > 20);
    for (path, reply) in all {
        assert!(!String::from_utf8_lossy(&reply.body).contains("of the host"), "{path}");
    }
}

/// Everything that is listed below `root`, with its answers.
async fn crawl(client: &mut Client, root: &str) -> Vec<(String, Reply)> {
    let mut found = Vec::new();
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let listing = client.get(&dir).await.unwrap();
        assert_eq!(listing.status, 200, "{dir}");
        for name in listing.text().lines() {
            let path = format!("{dir}{}", name.split('=').next().unwrap());
            let top = dir == root;
            let is_dir = name.ends_with('/') || name.contains('=') || (top && ["dynamic", "meta-data"].contains(&name));
            if is_dir {
                dirs.push(format!("{}/", path.trim_end_matches('/')));
            } else {
                let reply = client.get(&path).await.unwrap_or_else(|| panic!("{path}"));
                assert_eq!(reply.status, 200, "{path}");
                found.push((path, reply));
            }
        }
    }
    found
}

#[tokio::test(start_paused = true)]
async fn everything_that_is_listed_in_any_version_resolves() {
    let daemon = Daemon::start(Settings {
        instance_metadata_tags: true,
        public_keys: [("me".to_owned(), "ssh-ed25519 AAAA me".to_owned())].into(),
        user_data: Some("#cloud-config".into()),
        ..settings()
    });
    daemon.synchronised().await;
    let address = daemon
        .run(1, &[("imds.role", "app"), ("imds.instance-tag.Name", "a b")])
        .await;
    for version in VERSIONS.iter().chain(&["latest"]) {
        let found = crawl(&mut daemon.connect(1, address).keep_alive(), &format!("/{version}/")).await;
        assert!(found.len() > 45, "{version}: {}", found.len());
        for (path, reply) in &found {
            assert!(!reply.body.ends_with(b"\n"), "{path}");
        }
        let has = |path: &str| found.iter().any(|(known, _)| *known == format!("/{version}/{path}"));
        assert!(has("user-data") && has("meta-data/tags/instance/Name") && has("meta-data/public-keys/0/openssh-key"));
    }
}

#[tokio::test(start_paused = true)]
async fn user_data_passes_unchanged() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let bytes: Vec<u8> = (0..16 * 1024).map(|at: u32| u8::try_from(at % 256).unwrap()).collect();
    let text = {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(&bytes)
    };
    let address = daemon.run(1, &[("imds.user-data-base64", &text)]).await;
    for path in ["/latest/user-data", "/latest/user-data/", "/2009-04-04/user-data"] {
        let reply = daemon.connect(1, address).get(path).await.unwrap();
        assert_eq!(
            (reply.status, reply.header("content-type")),
            (200, Some("application/octet-stream"))
        );
        assert_eq!(reply.body, bytes);
    }
    let listing = daemon.connect(1, address).get("/latest").await.unwrap().text();
    assert_eq!(listing, "dynamic\nmeta-data\nuser-data");
}

#[tokio::test(start_paused = true)]
async fn what_is_given_takes_the_place_of_what_is_derived_and_nonsense_is_an_error_of_its_container() {
    let mut settings = settings();
    settings.metadata = [
        ("meta-data/instance-type", "m7i.large"),
        ("meta-data/placement/group-name", "g"),
    ]
    .map(|(path, value)| (path.to_owned(), value.to_owned()))
    .into();
    let daemon = Daemon::start(settings);
    daemon.synchronised().await;
    let mac = "imds.metadata.network/interfaces/macs/{mac}/vpc-id";
    let one = daemon
        .run(
            1,
            &[("imds.role", "app"), ("imds.instance-type", "t4g.nano"), (mac, "vpc-1")],
        )
        .await;
    let two = daemon
        .run(2, &[("imds.role", "app"), ("imds.metadata.placement", "x")])
        .await;
    let get = async |number, address, path: &str| {
        daemon
            .connect(number, address)
            .get(&format!("/latest/meta-data/{path}"))
            .await
            .unwrap()
    };
    assert_eq!(get(1, one, "instance-type").await.text(), "t4g.nano");
    assert_eq!(get(1, one, "placement/group-name").await.text(), "g");
    assert_eq!(
        get(1, one, "network/interfaces/macs/02:42:0a:00:00:01/vpc-id")
            .await
            .text(),
        "vpc-1"
    );
    assert_eq!(daemon.connect(1, one).get(ROLE_LIST).await.unwrap().text(), "app");
    let token = daemon.connect(2, two).token(60).await;
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(
        daemon
            .connect(2, two)
            .send("GET", ROLE_LIST, &headers)
            .await
            .unwrap()
            .status,
        404
    );
    let problems = &daemon.index.get(&id(2)).unwrap().instance.problems;
    assert!(
        problems[0].starts_with("label imds.metadata.placement: that is a directory"),
        "{problems:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn an_instance_id_is_one_containers_while_it_runs() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let labels = &[("imds.role", "app"), ("imds.instance-id", "i-0123456789abcdef0")];
    let first = daemon.run(1, labels).await;
    let second = daemon.run(2, labels).await;
    let role = |number| daemon.index.get(&id(number)).unwrap().instance.role.session().is_some();
    assert!(role(1) && !role(2));
    assert_eq!(daemon.connect(1, first).get(ROLE_LIST).await.unwrap().text(), "app");
    let problems = daemon.index.get(&id(2)).unwrap().instance.problems.join(" ");
    assert!(
        problems.contains("instance id i-0123456789abcdef0 is that of container 000000010000, which runs"),
        "{problems}"
    );
    assert_eq!(daemon.connect(2, second).get(ROLE_LIST).await.unwrap().status, 401);
    // The same after everything was looked at again, in whatever order.
    daemon.configure(|_| {});
    daemon.settle().await;
    assert!(role(1) && !role(2));
    daemon.kill(1);
    daemon.settle().await;
    assert!(role(2));
    assert_eq!(daemon.connect(2, second).get(ROLE_LIST).await.unwrap().text(), "app");
}

/// Verifies with openssl, as EC2's user guide shows it.
fn openssl(arguments: &[&str]) -> String {
    let run = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .expect("openssl runs");
    let said = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(run.status.success(), "openssl {arguments:?}: {said}");
    String::from_utf8_lossy(&run.stdout).into_owned()
}

#[tokio::test(start_paused = true)]
async fn openssl_verifies_the_identity_in_all_three_forms() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, &[("imds.role", "app")]).await;
    let mut client = daemon.connect(1, address).keep_alive();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    for name in ["document", "signature", "pkcs7", "rsa2048"] {
        let reply = client
            .get(&format!("/latest/dynamic/instance-identity/{name}"))
            .await
            .unwrap();
        assert_eq!(reply.status, 200, "{name}");
        let body = match name {
            "pkcs7" | "rsa2048" => {
                format!("-----BEGIN PKCS7-----\n{}\n-----END PKCS7-----\n", reply.text()).into_bytes()
            }
            "signature" => [reply.body, b"\n".to_vec()].concat(),
            _ => reply.body,
        };
        std::fs::write(file(name), body).unwrap();
    }
    std::fs::write(file("certificate"), daemon.service.signer.certificate()).unwrap();
    let (certificate, document) = (file("certificate"), file("document"));
    let said = std::fs::read_to_string(&document).unwrap();
    for name in ["pkcs7", "rsa2048"] {
        let form = file(name);
        let verify = [
            "smime",
            "-verify",
            "-in",
            &form,
            "-inform",
            "PEM",
            "-certfile",
            &certificate,
            "-noverify",
        ];
        assert_eq!(openssl(&verify), said, "{name}");
        let trusted = [
            "cms",
            "-verify",
            "-binary",
            "-in",
            &form,
            "-inform",
            "PEM",
            "-CAfile",
            &certificate,
            "-purpose",
            "any",
        ];
        assert_eq!(openssl(&trusted), said, "{name}");
    }
    std::fs::write(file("raw"), openssl_bytes(&["base64", "-d", "-in", &file("signature")])).unwrap();
    std::fs::write(
        file("key"),
        openssl(&["x509", "-pubkey", "-noout", "-in", &certificate]),
    )
    .unwrap();
    let (raw, key) = (file("raw"), file("key"));
    let verify = ["dgst", "-sha256", "-verify", &key, "-signature", &raw, &document];
    assert_eq!(openssl(&verify), "Verified OK\n");
    std::fs::write(&document, said.replace("t3.micro", "t3.macro")).unwrap();
    let refused = Command::new("openssl").args(verify).output().unwrap();
    assert!(!refused.status.success());
}

fn openssl_bytes(arguments: &[&str]) -> Vec<u8> {
    let run = Command::new("openssl").args(arguments).output().expect("openssl runs");
    assert!(run.status.success());
    run.stdout
}

#[tokio::test(start_paused = true)]
async fn two_spot_notices_are_each_told_at_their_second_to_their_container_only() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let one = daemon
        .run(1, &[("imds.role", "app"), ("imds.spot.interrupt-after", "10m")])
        .await;
    let two = daemon.run(2, &[("imds.role", "app")]).await;
    let action = async |number, address| {
        let path = "/latest/meta-data/spot/instance-action";
        let reply = daemon.connect(number, address).get(path).await.unwrap();
        (reply.status == 200).then(|| reply.text())
    };
    // The operator's, which is told at once: 90 s are less than two minutes.
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert_eq!((action(1, one).await, action(2, two).await), (None, None));
    let decided = daemon.clock.wall_seconds();
    daemon.order(2, |it| {
        it.events.push(Event {
            kind: Kind::SpotInterruption,
            action: "stop".into(),
            decided,
            at: decided + 90,
            cancelled: false,
            stops: None,
        });
    });
    daemon.settle().await;
    assert_eq!(action(1, one).await, None);
    assert!(
        action(2, two)
            .await
            .unwrap()
            .starts_with("{\"action\": \"stop\", \"time\": \"2026-")
    );
    // The one that it was born with, to the second.
    let told = started(&daemon, 1) + 480;
    let to = |second: u64| Duration::from_secs(second - daemon.clock.wall_seconds());
    tokio::time::sleep(to(told) - Duration::from_secs(1)).await;
    assert_eq!(action(1, one).await, None);
    tokio::time::sleep(to(told) + Duration::from_millis(10)).await;
    let document = action(1, one).await.unwrap();
    let read: serde_json::Value = serde_json::from_str(&document).unwrap();
    let time: jiff::Timestamp = read["time"].as_str().unwrap().parse().unwrap();
    assert_eq!(u64::try_from(time.as_second()).unwrap(), told + 120);
    let life_cycle = daemon
        .connect(1, one)
        .get("/latest/meta-data/instance-life-cycle")
        .await
        .unwrap();
    assert_eq!(life_cycle.text(), "spot");
    // Called off.
    daemon.order(2, |it| it.events[0].cancelled = true);
    daemon.settle().await;
    assert_eq!(action(2, two).await, None);
    assert!(action(1, one).await.is_some());
}

fn interruption(at: u64, stops: Run) -> Event {
    Event {
        kind: Kind::SpotInterruption,
        action: "terminate".into(),
        decided: at - 120,
        at,
        cancelled: false,
        stops: Some(stops),
    }
}

fn may_stop() -> Settings {
    Settings {
        triggers_may_stop: true,
        ..settings()
    }
}

fn present_run(daemon: &Daemon, number: u32) -> Run {
    to_stop(&daemon.index.get(&id(number)).unwrap(), Kind::SpotInterruption, true).unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_notice_that_stops_stops_at_its_second_that_run_only_and_not_when_it_was_called_off() {
    let daemon = Daemon::start(may_stop());
    daemon.synchronised().await;
    let at = daemon.clock.wall_seconds() + 130;
    for number in 1..=4 {
        daemon.run(number, &[("imds.role", "app")]).await;
        let stops = present_run(&daemon, number);
        daemon.order(number, |it| it.events.push(interruption(at, stops)));
    }
    let stopped = || daemon.engine.world(|world| world.stopped.clone());
    let address = daemon.create(3, &[("imds.role", "app")]);
    daemon.boot(3, address);
    daemon.order(2, |it| it.events[0].cancelled = true);
    let to = |second: u64| std::time::UNIX_EPOCH + Duration::from_secs(second);
    let wait = to(at).duration_since(daemon.clock.wall()).unwrap();
    tokio::time::sleep(wait - Duration::from_millis(20)).await;
    assert_eq!(stopped(), []);
    tokio::time::sleep(Duration::from_millis(40)).await;
    let mut told = stopped();
    told.sort();
    assert_eq!(told, [id(1), id(4)]);
    daemon.kill(1);
    // Once, and what was called off or is another run, never.
    tokio::time::sleep(Duration::from_secs(3600)).await;
    assert_eq!(stopped().len(), 2);
    for number in [1, 3, 4] {
        assert_eq!(daemon.orders.of(&id(number)).unwrap().events[0].stops, None, "{number}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_fails_is_tried_again() {
    let daemon = Daemon::start(may_stop());
    daemon.synchronised().await;
    daemon.run(1, &[("imds.role", "app")]).await;
    let (at, stops) = (daemon.clock.wall_seconds() + 60, present_run(&daemon, 1));
    daemon.order(1, |it| it.events.push(interruption(at, stops)));
    daemon.engine.go();
    tokio::time::sleep(Duration::from_secs(90)).await;
    assert_eq!(daemon.engine.world(|world| world.stopped.len()), 0);
    daemon.engine.come_back();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(daemon.engine.world(|world| world.stopped.len()), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stop_that_came_due_while_the_daemon_was_away_is_for_the_same_run_only() {
    let before = Daemon::start(may_stop());
    before.synchronised().await;
    before.run(1, &[("imds.role", "app")]).await;
    before.run(2, &[("imds.role", "app")]).await;
    let runs = [1, 2].map(|number| present_run(&before, number));
    // While nobody looks, 2 is restarted.
    before.kernel.start(&id(2));
    let daemon = Daemon::start_with(may_stop(), before.engine.clone(), before.kernel.clone());
    daemon.clock.jump(3_600_000);
    let at = daemon.clock.wall_seconds() - 60;
    // Before it knows of anybody.
    for (number, run) in [(1, runs[0]), (2, runs[1])] {
        daemon.order(number, |it| it.events.push(interruption(at, run)));
    }
    daemon.synchronised().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let stopped = daemon.engine.world(|world| world.stopped.clone());
    assert_eq!(stopped, [id(1)]);
}

#[tokio::test(start_paused = true)]
async fn nobody_is_stopped_whom_the_configuration_does_not_let_be_stopped() {
    let daemon = Daemon::start(may_stop());
    daemon.synchronised().await;
    daemon.run(1, &[("imds.role", "app"), ("imds.spot.stop", "true")]).await;
    let record = daemon.index.get(&id(1)).unwrap();
    let problems = &record.instance.problems;
    assert!(problems[0].starts_with("unknown label imds.spot.stop"), "{problems:?}");
    let refused = to_stop(&record, Kind::SpotInterruption, false).unwrap_err();
    assert!(
        refused.to_string().contains("[imds] triggers_may_stop = true"),
        "{refused}"
    );
    assert_eq!(to_stop(&record, Kind::Rebalance, true), Err(StopError::NotThisKind));
    // Taken back after it was ordered; given again, it is not made up for.
    let (at, stops) = (daemon.clock.wall_seconds() + 60, present_run(&daemon, 1));
    daemon.order(1, |it| it.events.push(interruption(at, stops)));
    daemon.configure(|settings| settings.triggers_may_stop = false);
    tokio::time::sleep(Duration::from_secs(70)).await;
    daemon.configure(|settings| settings.triggers_may_stop = true);
    tokio::time::sleep(Duration::from_secs(70)).await;
    assert_eq!(daemon.engine.world(|world| world.stopped.len()), 0);
    daemon.kill(1);
    daemon.settle().await;
    let record = daemon.index.get(&id(1)).unwrap();
    assert_eq!(
        to_stop(&record, Kind::SpotInterruption, true),
        Err(StopError::NotRunning)
    );
}

/// When the life of a container began.
fn started(daemon: &Daemon, number: u32) -> u64 {
    let life = daemon.index.get(&id(number)).unwrap().life.clone().unwrap();
    life.started.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

#[tokio::test(start_paused = true)]
async fn options_are_changed_while_a_container_runs() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon
        .run(1, &[("imds.role", "app"), ("imds.instance-tag.Name", "web")])
        .await;
    let status = async |path: &str| daemon.connect(1, address).get(path).await.unwrap().status;
    let tags = "/latest/meta-data/tags/instance/Name";
    assert_eq!(status(tags).await, 404);
    daemon.order(1, |it| it.options.tags = Some(true));
    daemon.settle().await;
    assert_eq!(status(tags).await, 200);
    daemon.order(1, |it| it.options.tokens_required = Some(true));
    daemon.settle().await;
    assert_eq!(status(tags).await, 401);
    let token = daemon.connect(1, address).token(60).await;
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(
        daemon
            .connect(1, address)
            .send("GET", tags, &headers)
            .await
            .unwrap()
            .status,
        200
    );
    daemon.order(1, |it| it.options.endpoint = Some(false));
    daemon.settle().await;
    assert_eq!(
        daemon
            .connect(1, address)
            .send("GET", tags, &headers)
            .await
            .unwrap()
            .status,
        403
    );
    daemon.order(1, |it| it.options = Default::default());
    daemon.settle().await;
    assert_eq!(status("/latest/meta-data/instance-id").await, 200);
}

#[tokio::test(start_paused = true)]
async fn a_label_may_make_the_hop_limit_smaller_not_larger() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, &[("imds.http-put-response-hop-limit", "1")]).await;
    daemon.run(2, &[("imds.http-put-response-hop-limit", "3")]).await;
    daemon.run(3, &[("imds.http-put-response-hop-limit", "65")]).await;
    let instance = |number| daemon.index.get(&id(number)).unwrap().instance.clone();
    assert_eq!((instance(1).hop_limit, instance(1).problems.len()), (1, 0));
    assert!(
        instance(2).problems[0].contains("laxer than the configuration's"),
        "{:?}",
        instance(2).problems
    );
    assert!(
        instance(3).problems[0].ends_with("expected a whole number from 1 to 64"),
        "{:?}",
        instance(3).problems
    );
}

/// A connection that notes its limits and what is written.
struct Noted {
    stream: DuplexStream,
    seen: Arc<Mutex<Vec<String>>>,
}

impl HopLimit for Noted {
    fn limit_hops(&self, hops: u8) -> std::io::Result<()> {
        self.seen.lock().unwrap().push(format!("limit {hops}"));
        Ok(())
    }
}

impl AsyncRead for Noted {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Noted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        let first = String::from_utf8_lossy(bytes)
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned();
        self.seen.lock().unwrap().push(first);
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[tokio::test(start_paused = true)]
async fn an_answer_with_a_token_is_limited_before_it_is_sent_and_no_other() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, &[("imds.http-put-response-hop-limit", "1")]).await;
    let client = daemon.client(address);
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let evidence = connected(cgroup);
    daemon.kernel.socket(cgroup, client, evidence);
    let connection = Connection {
        client,
        server: "169.254.169.254:80".parse().unwrap(),
        via: daemon.way_of(1),
        nested: false,
    };
    let (mut ours, theirs) = tokio::io::duplex(64 * 1024);
    let seen: Arc<Mutex<Vec<String>>> = Arc::default();
    let noted = Noted {
        stream: theirs,
        seen: seen.clone(),
    };
    tokio::spawn(server::serve(noted, connection, daemon.service.clone()));
    let host = "HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: keep-alive\r\n";
    let get = format!("GET /latest/meta-data/instance-id {host}\r\n");
    let put = format!("PUT /latest/api/token {host}X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n");
    let mut answer = [0; 4096];
    for request in [&get, &put, &get, &put] {
        ours.write_all(request.as_bytes()).await.unwrap();
        assert!(ours.read(&mut answer).await.unwrap() > 0);
    }
    let ok = "HTTP/1.1 200 OK";
    // Nor is it lifted again: what is lost would be sent once more, without a limit.
    assert_eq!(*seen.lock().unwrap(), [ok, "limit 1", ok, ok, ok]);
}
