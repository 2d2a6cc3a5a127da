//! Who is answered, and above all who is not.

use std::net::SocketAddr;
use std::time::Duration;

use imds_router::caller::Via;
use imds_router::containers::watcher::Event;
use imds_router::containers::{CgroupId, Counters, NamespaceId, NetworkId, NetworkMode, SocketEvidence};

use crate::script::{Daemon, GATEWAY, HOST, endpoint, id, settings};

const APP: &[(&str, &str)] = &[("imds.role", "app")];
const OTHER: &[(&str, &str)] = &[("imds.role", "other")];
const LIST: &str = "/latest/meta-data/iam/security-credentials/";

async fn refused(daemon: &Daemon, client: SocketAddr) {
    let mut connection = daemon.dial(client);
    let asked = daemon.clock.now();
    let reply = connection.send("GET", "/", &[]).await.expect("a refusal");
    assert_eq!((reply.status, reply.body.len()), (403, 0));
    assert_eq!(reply.header("connection"), Some("close"));
    assert_eq!(
        reply.header("x-imds-router-hint"),
        None,
        "an unproven caller learns nothing"
    );
    assert!(daemon.clock.now() - asked <= Duration::from_millis(401));
    assert!(connection.closed().await);
}

#[tokio::test(start_paused = true)]
async fn an_address_alone_proves_nothing() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    // No socket at all, one in every other state, one that somebody else made in the container's namespace.
    refused(&daemon, daemon.client(address)).await;
    for state in 2..=12 {
        let client = daemon.client(address);
        daemon.kernel.socket(
            cgroup,
            client,
            SocketEvidence {
                state,
                cgroup,
                counters: Default::default(),
            },
        );
        refused(&daemon, client).await;
    }
    let client = daemon.client(address);
    daemon.kernel.socket(
        cgroup,
        client,
        SocketEvidence {
            state: 1,
            cgroup: CgroupId(1),
            counters: Default::default(),
        },
    );
    refused(&daemon, client).await;
    let reasons: Vec<_> = daemon.service.refusals();
    assert_eq!(
        reasons,
        [("foreign-cgroup", 1), ("no-socket", 1), ("not-established", 11)]
    );
    // And the container itself is served all along.
    assert_eq!(daemon.connect(1, address).get("/").await.unwrap().status, 200);
}

#[tokio::test(start_paused = true)]
async fn a_socket_that_is_not_the_other_end_gets_no_answer() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let counters = |sent, received, acked| Counters { sent, received, acked };
    for (theirs, ours, answered) in [
        // A first request of 100 bytes, acknowledged or not yet; a second one after an answer of 300.
        (counters(100, 0, 1), counters(0, 100, 0), true),
        (counters(100, 0, 101), counters(0, 100, 0), true),
        (counters(200, 300, 101), counters(300, 200, 300), true),
        (counters(200, 300, 101), counters(300, 200, 0), true),
        // A request that the container has not sent was put into its idle connection.
        (counters(100, 300, 101), counters(300, 200, 300), false),
        (counters(0, 0, 1), counters(0, 100, 0), false),
        // Our end was reset and connected anew, or was closed and the container never heard of it.
        (counters(100, 300, 101), counters(0, 90, 0), false),
        // Somebody else has acknowledged what the container never received.
        (counters(200, 0, 101), counters(300, 200, 300), false),
        // Somebody else has acknowledged to the container what we never received.
        (counters(200, 0, 201), counters(0, 100, 0), false),
    ] {
        let client = daemon.client(address);
        daemon.kernel.socket(
            cgroup,
            client,
            SocketEvidence {
                state: 1,
                cgroup,
                counters: theirs,
            },
        );
        daemon.kernel.own_end(client, ours);
        let reply = daemon.dial(client).get(LIST).await;
        assert_eq!(
            reply.is_some_and(|reply| reply.status == 200),
            answered,
            "{theirs:?} {ours:?}"
        );
    }
    assert_eq!(daemon.service.refusals(), [("not-the-other-end", 5)]);
}

#[tokio::test(start_paused = true)]
async fn who_is_heard_inside_is_not_heard_over_a_bridge() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let mut kept = daemon.connect(1, address);
    assert_eq!(kept.get("/").await.unwrap().status, 200);
    // A socket to the listener inside stands for no connection over the bridge.
    daemon.kernel.listen_inside(NamespaceId(cgroup.0));
    assert!(kept.get("/").await.is_none());
    let client = daemon.client(address);
    daemon.kernel.socket(
        cgroup,
        client,
        SocketEvidence {
            state: 1,
            cgroup,
            counters: Counters::default(),
        },
    );
    refused(&daemon, client).await;
    assert_eq!(asks(&daemon, NamespaceId(cgroup.0), cgroup).await, (200, "app".into()));
}

#[tokio::test(start_paused = true)]
async fn unknown_addresses_and_the_host_are_refused() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    for client in ["10.9.9.9:1", "127.0.0.1:1", "169.254.169.254:1", "[::1]:1"] {
        refused(&daemon, client.parse().unwrap()).await;
    }
}

#[tokio::test(start_paused = true)]
async fn two_candidates_at_one_address_are_told_apart_by_the_kernel() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let other = daemon.create(2, OTHER);
    daemon.boot(2, SocketAddr::new(address.ip(), 0));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_ne!(address, other);
    assert_eq!(daemon.connect(1, address).get(LIST).await.unwrap().text(), "app");
    assert_eq!(daemon.connect(2, address).get(LIST).await.unwrap().text(), "other");
    refused(&daemon, daemon.client(address)).await;
    // Both prove the same connection: impossible, so nobody is answered.
    let client = daemon.client(address);
    for number in [1, 2] {
        let cgroup = daemon.kernel.alive(&id(number)).unwrap();
        daemon.kernel.socket(
            cgroup,
            client,
            SocketEvidence {
                state: 1,
                cgroup,
                counters: Default::default(),
            },
        );
    }
    refused(&daemon, client).await;
}

#[tokio::test(start_paused = true)]
async fn an_address_that_moved_answers_for_its_new_holder_only() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut kept = daemon.connect(1, address);
    assert_eq!(kept.get(LIST).await.unwrap().text(), "app");
    // The container ends; the engine has told nothing yet, and the next one has its address.
    daemon.kill(1);
    assert!(kept.get(LIST).await.is_none(), "a kept connection ends with its life");
    daemon.create(2, OTHER);
    daemon.boot(2, address);
    assert_eq!(daemon.connect(2, address).get(LIST).await.unwrap().text(), "other");
    // Late events of the old one change nothing.
    daemon.engine.send(Event::Disconnected(NetworkId::from("n")));
    daemon.engine.send(Event::Died(id(1)));
    daemon.settle().await;
    assert_eq!(daemon.connect(2, address).get(LIST).await.unwrap().text(), "other");
}

#[tokio::test(start_paused = true)]
async fn a_request_that_waits_while_its_container_ends_gets_no_answer() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.sts.say(&[(300, Ok(()))]);
    let address = daemon.run(1, APP).await;
    let mut client = daemon.connect(1, address);
    let asking = tokio::spawn(async move { client.get(LIST).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    daemon.kill(1);
    assert!(asking.await.unwrap().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_token_is_its_lifes_own() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let token = daemon.connect(1, address).token(600).await;
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    let status = async |daemon: &Daemon| {
        daemon
            .connect(1, address)
            .send("GET", "/", &headers)
            .await
            .unwrap()
            .status
    };
    assert_eq!(status(&daemon).await, 200);
    // Another daemon, the same life.
    let again = Daemon::start_with(settings(), daemon.engine.clone(), daemon.kernel.clone());
    again.synchronised().await;
    again.settle().await;
    assert_eq!(status(&again).await, 200);
    // The same container, another life.
    daemon.kill(1);
    daemon.boot(1, address);
    daemon.settle().await;
    assert_eq!(status(&daemon).await, 401);
}

#[tokio::test(start_paused = true)]
async fn a_first_act_is_served_before_the_engine_says_start() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, APP);
    daemon.settle().await;
    let network = NetworkId::from("n");
    daemon.engine.world(|world| {
        world
            .networks
            .entry(network.clone())
            .or_default()
            .insert(id(1), endpoint(address))
    });
    daemon.engine.send(Event::Connected(network, Some(id(1))));
    daemon.settle().await;
    daemon.kernel.start(&id(1));
    let asked = daemon.clock.now();
    assert_eq!(daemon.connect(1, address).get(LIST).await.unwrap().status, 200);
    assert!(daemon.clock.now() - asked < Duration::from_millis(100));
}

#[tokio::test(start_paused = true)]
async fn an_address_that_no_event_has_told_is_looked_up() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, APP);
    // Every event after `create` is lost.
    daemon.engine.world(|world| {
        world
            .networks
            .entry(NetworkId::from("n"))
            .or_default()
            .insert(id(1), endpoint(address));
        world.containers.get_mut(&id(1)).unwrap().running = true;
    });
    daemon.kernel.start(&id(1));
    daemon.settle().await;
    assert_eq!(daemon.connect(1, address).get("/").await.unwrap().status, 200);
}

/// Starts a container that has no network namespace of its own. Answers its cgroup.
fn join(daemon: &Daemon, number: u32, labels: &[(&str, &str)], mode: NetworkMode) -> CgroupId {
    daemon.create_in(number, labels, mode.clone());
    daemon
        .engine
        .world(|world| world.containers.get_mut(&id(number)).unwrap().running = true);
    daemon.kernel.start_in(&id(number), &mode)
}

/// What comes of a connection that `cgroup` makes in `namespace`.
async fn asks(daemon: &Daemon, namespace: NamespaceId, cgroup: CgroupId) -> (u16, String) {
    let client = daemon.client("169.254.169.254:0".parse().unwrap());
    daemon.kernel.socket(
        CgroupId(namespace.0),
        client,
        SocketEvidence {
            state: 1,
            cgroup,
            counters: Default::default(),
        },
    );
    let reply = daemon
        .dial_via(client, Via::Namespace(namespace))
        .get(LIST)
        .await
        .expect("an answer");
    (reply.status, reply.text())
}

#[tokio::test(start_paused = true)]
async fn who_shares_a_namespace_is_told_apart_by_who_made_the_socket() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let owner = daemon.kernel.alive(&id(1)).unwrap();
    let namespace = NamespaceId(owner.0);
    let sharer = join(&daemon, 2, OTHER, NetworkMode::Container(id(1)));
    let bare = join(&daemon, 3, &[], NetworkMode::Container(id(1)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(asks(&daemon, namespace, owner).await, (200, "app".into()));
    assert_eq!(asks(&daemon, namespace, sharer).await, (200, "other".into()));
    assert_eq!(asks(&daemon, namespace, bare).await, (403, String::new()));
    // A process of the host that has entered the namespace, or one of a container elsewhere.
    for stranger in [CgroupId(1), CgroupId(owner.0 + 1_000)] {
        assert_eq!(asks(&daemon, namespace, stranger).await, (403, String::new()));
    }
    // Over the host's bridge, the owner's address leads to all of them.
    let address = daemon
        .index
        .get(&id(1))
        .unwrap()
        .attachments
        .addresses()
        .next()
        .unwrap();
    let client = daemon.client(SocketAddr::new(address, 0));
    daemon.kernel.socket(
        owner,
        client,
        SocketEvidence {
            state: 1,
            cgroup: sharer,
            counters: Default::default(),
        },
    );
    assert_eq!(daemon.dial(client).get(LIST).await.unwrap().text(), "other");
    // The owner ends; who shares lives on in the namespace.
    daemon.kill(1);
    daemon.settle().await;
    assert_eq!(asks(&daemon, namespace, sharer).await, (200, "other".into()));
    assert_eq!(asks(&daemon, namespace, owner).await, (403, String::new()));
}

#[tokio::test(start_paused = true)]
async fn containers_in_the_hosts_network_are_themselves_and_host_processes_nobody() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    assert_eq!(asks(&daemon, HOST, CgroupId(1)).await, (403, String::new()));
    let first = join(&daemon, 1, APP, NetworkMode::Host);
    let second = join(&daemon, 2, OTHER, NetworkMode::Host);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(asks(&daemon, HOST, first).await, (200, "app".into()));
    assert_eq!(asks(&daemon, HOST, second).await, (200, "other".into()));
    assert_eq!(asks(&daemon, HOST, CgroupId(1)).await, (403, String::new()));
}

#[tokio::test(start_paused = true)]
async fn the_first_act_of_who_joins_a_namespace_waits_for_its_life() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let namespace = NamespaceId(daemon.kernel.alive(&id(1)).unwrap().0);
    daemon.create_in(2, OTHER, NetworkMode::Container(id(1)));
    tokio::time::sleep(Duration::from_millis(200)).await;
    // Its process is there, and asks at once; the engine will say `start` later.
    let sharer = daemon.kernel.start_in(&id(2), &NetworkMode::Container(id(1)));
    assert_eq!(asks(&daemon, namespace, sharer).await, (200, "other".into()));
}

#[tokio::test(start_paused = true)]
async fn a_container_in_a_container_is_the_outer_one_or_nobody() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let outer = daemon.kernel.alive(&id(1)).unwrap();
    let namespace = NamespaceId(outer.0);
    // Its own address is of a network that nobody out here knows.
    let inner: SocketAddr = "172.17.0.2:40000".parse().unwrap();
    let reply = daemon
        .dial_via(inner, Via::Nested(namespace, 9))
        .get(LIST)
        .await
        .unwrap();
    assert_eq!((reply.status, reply.text().as_str()), (200, "app"));
    // One router further away than the container itself: at a limit of one, a token is not heard there.
    let token = async || {
        let mut client = daemon.dial_via(inner, Via::Nested(namespace, 9));
        let ttl = [("x-aws-ec2-metadata-token-ttl-seconds", "60")];
        let asked = client.send("PUT", "/latest/api/token", &ttl);
        let heard = tokio::time::timeout(Duration::from_secs(30), asked).await;
        heard.ok().flatten().map(|reply| reply.status)
    };
    for (hops, heard) in [(1, None), (2, Some(200))] {
        daemon.order(1, |ordered| ordered.options.hop_limit = Some(hops));
        daemon.settle().await;
        assert_eq!(token().await, heard, "limit {hops}");
    }
    // In a namespace that is nobody's, or several containers', nobody can be meant.
    let mut nobodys = daemon.dial_via(inner, Via::Nested(NamespaceId(77), 9));
    assert_eq!(nobodys.get(LIST).await.unwrap().status, 403);
    join(&daemon, 2, OTHER, NetworkMode::Container(id(1)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let mut shared = daemon.dial_via(inner, Via::Nested(namespace, 9));
    assert_eq!(shared.get(LIST).await.unwrap().status, 403);
    daemon.kill(2);
    daemon.kill(1);
    let mut late = daemon.dial_via(inner, Via::Nested(namespace, 9));
    assert_eq!(late.get(LIST).await.unwrap().status, 403);
    let reasons = daemon.service.refusals();
    assert_eq!(reasons, [("sent-inside", 2), ("shared", 1)]);
}

#[tokio::test(start_paused = true)]
async fn who_hides_behind_an_address_of_the_host_is_nobody_and_the_reason_says_so() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    refused(&daemon, SocketAddr::new(GATEWAY.into(), 40_000)).await;
    // Translated on its way: nobody in the namespace has this connection.
    let namespace = NamespaceId(daemon.kernel.alive(&id(1)).unwrap().0);
    let client = SocketAddr::new(GATEWAY.into(), 40_001);
    let mut translated = daemon.dial_via(client, Via::Namespace(namespace));
    assert_eq!(translated.get(LIST).await.unwrap().status, 403);
    assert_eq!(daemon.service.refusals(), [("gateway", 1), ("translated", 1)]);
}
