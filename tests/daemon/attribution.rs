//! Who is answered, and above all who is not.

use std::net::SocketAddr;
use std::time::Duration;

use imds_router::attribution::{AcceptedFrom, Connection, identify};
use imds_router::containers::reconciler::Event;
use imds_router::containers::{CgroupId, NamespaceId, NetworkId, NetworkMode, Open, SocketEvidence};

use crate::script::{Daemon, GATEWAY, HOST, INNER, connected, endpoint, id, settings};

const APP: &[(&str, &str)] = &[("imds.role", "app")];
const OTHER: &[(&str, &str)] = &[("imds.role", "other")];
const LIST: &str = "/latest/meta-data/iam/security-credentials/";

async fn refused(daemon: &Daemon, client: SocketAddr) {
    refused_via(daemon, client, AcceptedFrom::Bridge(5)).await;
}

/// The counters did not decide in time: the client's next connection is answered.
async fn closed_without_an_answer(daemon: &Daemon, client: SocketAddr) {
    let asked = daemon.clock.now();
    assert!(daemon.dial_via(client, daemon.way_of(1)).get("/").await.is_none());
    assert!(daemon.clock.now() - asked <= Duration::from_millis(401));
}

async fn refused_via(daemon: &Daemon, client: SocketAddr, via: AcceptedFrom) {
    let mut connection = daemon.dial_via(client, via);
    let asked = daemon.clock.now();
    let reply = connection.send("GET", "/", &[]).await.expect("a refusal");
    assert_eq!((reply.status, reply.body.len()), (403, 0));
    assert_eq!(reply.header("connection"), Some("close"));
    assert_eq!(
        reply.header("x-imds-router-hint"),
        None,
        "an unauthenticated caller learns nothing"
    );
    assert!(daemon.clock.now() - asked <= Duration::from_millis(401));
    assert!(connection.closed().await);
}

#[tokio::test(start_paused = true)]
async fn a_connection_over_the_link_needs_a_socket_of_the_container() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let via = daemon.way_of(1);
    assert_eq!(via, AcceptedFrom::Namespace(NamespaceId(cgroup.0)));
    // No socket at all, one in every state in which the container is not at the other end, one of another cgroup.
    refused_via(&daemon, daemon.client(address), via).await;
    for state in (2..=12).filter(|state| ![4, 5].contains(state)) {
        let client = daemon.client(address);
        daemon.kernel.socket(
            cgroup,
            client,
            SocketEvidence {
                state,
                ..connected(cgroup)
            },
        );
        refused_via(&daemon, client, via).await;
    }
    let client = daemon.client(address);
    let foreign = connected(CgroupId(1));
    daemon.kernel.socket(cgroup, client, foreign);
    refused_via(&daemon, client, via).await;
    let reasons: Vec<_> = daemon.service.refusals();
    assert_eq!(
        reasons,
        [("foreign-cgroup", 1), ("not-established", 9), ("translated", 1)]
    );
    // And the container itself is served all along.
    assert_eq!(daemon.connect(1, address).get("/").await.unwrap().status, 200);
}

/// Another sender has used the address and port of the service to make a server of the container accept a connection.
#[tokio::test(start_paused = true)]
async fn a_socket_that_the_container_accepted_is_no_evidence() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let accepted = SocketEvidence {
        open: Open::Passive,
        ..connected(cgroup)
    };
    let listening = SocketEvidence {
        listener: true,
        ..connected(cgroup)
    };
    let listener_and_accepted = SocketEvidence {
        listener: true,
        ..accepted
    };
    let undecided = SocketEvidence {
        open: Open::Undecided,
        ..connected(cgroup)
    };
    for evidence in [accepted, listening, listener_and_accepted] {
        let client = daemon.client(address);
        daemon.kernel.socket(cgroup, client, evidence);
        refused_via(&daemon, client, daemon.way_of(1)).await;
    }
    let client = daemon.client(address);
    daemon.kernel.socket(cgroup, client, undecided);
    closed_without_an_answer(&daemon, client).await;
    assert_eq!(
        daemon.service.refusals(),
        [("accepted", 1), ("listener-at-port", 2), ("unacknowledged", 1)]
    );
    assert_eq!(daemon.connect(1, address).get("/").await.unwrap().status, 200);
}

/// Another process may be its other end. The client's next connection is answered.
#[tokio::test(start_paused = true)]
async fn a_socket_that_is_older_than_the_rules_is_closed_without_an_answer() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let host = join(&daemon, 1, APP, NetworkMode::Host);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let client = daemon.client("169.254.169.254:0".parse().unwrap());
    let earlier = SocketEvidence {
        open: Open::Earlier,
        ..connected(host)
    };
    daemon.kernel.socket(CgroupId(HOST.0), client, earlier);
    assert!(
        daemon
            .dial_via(client, AcceptedFrom::Namespace(HOST))
            .get(LIST)
            .await
            .is_none()
    );
    assert_eq!(asks(&daemon, HOST, host).await, (200, "app".into()));
    assert_eq!(daemon.service.refusals(), [("earlier-socket", 1)]);
}

/// The request, or its acknowledgment, is on its way.
#[tokio::test(start_paused = true)]
async fn a_socket_is_evidence_once_its_bytes_are_acknowledged() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let client = daemon.client(address);
    let undecided = SocketEvidence {
        open: Open::Undecided,
        ..connected(cgroup)
    };
    daemon.kernel.socket(cgroup, client, undecided);
    let mut connection = daemon.dial_via(client, daemon.way_of(1));
    let (reply, ()) = tokio::join!(connection.get(LIST), async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        daemon.kernel.socket(cgroup, client, connected(cgroup));
    });
    assert_eq!(reply.unwrap().text(), "app");
    assert_eq!(daemon.service.refusals(), []);
}

/// The other containers of the namespace do not hide what is known of the one whose socket it is.
#[tokio::test(start_paused = true)]
async fn a_shared_namespace_tells_why_a_socket_is_no_evidence() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let owner = daemon.kernel.alive(&id(1)).unwrap();
    let sharer = join(&daemon, 2, OTHER, NetworkMode::Container(id(1)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    let via = AcceptedFrom::Namespace(NamespaceId(owner.0));
    for cgroup in [owner, sharer] {
        let client = daemon.client("169.254.192.2:0".parse().unwrap());
        let accepted = SocketEvidence {
            open: Open::Passive,
            ..connected(cgroup)
        };
        daemon.kernel.socket(owner, client, accepted);
        refused_via(&daemon, client, via).await;
        let undecided = SocketEvidence {
            open: Open::Undecided,
            ..connected(cgroup)
        };
        daemon.kernel.socket(owner, client, undecided);
        let mut connection = daemon.dial_via(client, via);
        let (reply, ()) = tokio::join!(connection.get(LIST), async {
            tokio::time::sleep(Duration::from_millis(20)).await;
            daemon.kernel.socket(owner, client, connected(cgroup));
        });
        assert_eq!(reply.unwrap().status, 200);
    }
    assert_eq!(daemon.service.refusals(), [("accepted", 2)]);
}

#[tokio::test(start_paused = true)]
async fn later_requests_need_the_socket_that_was_proven() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let another = SocketEvidence {
        cookie: 4712,
        ..connected(cgroup)
    };
    let closing = SocketEvidence {
        state: 8,
        ..connected(cgroup)
    };
    // One that appears later cannot have accepted this connection.
    let listening = SocketEvidence {
        listener: true,
        ..connected(cgroup)
    };
    for (evidence, is_answered) in [(another, false), (closing, false), (listening, true)] {
        let client = daemon.client(address);
        daemon.kernel.socket(cgroup, client, connected(cgroup));
        let mut kept = daemon.dial_via(client, daemon.way_of(1)).keep_alive();
        for _ in 0..3 {
            assert_eq!(kept.get(LIST).await.unwrap().text(), "app");
        }
        daemon.kernel.socket(cgroup, client, evidence);
        // A socket counts as verified for a moment.
        tokio::time::sleep(Duration::from_millis(10)).await;
        assert_eq!(kept.get(LIST).await.is_some(), is_answered, "{evidence:?}");
    }
    assert_eq!(daemon.service.refusals(), [("not-established", 1), ("socket-gone", 1)]);
}

/// The counters of a socket that was closed between the two reads may count the acknowledgment of its FIN, not that of a SYN.
#[tokio::test(start_paused = true)]
async fn a_socket_that_changes_while_it_is_queried_is_no_evidence() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let socket = connected(cgroup);
    // `TCP_FIN_WAIT2`, `TCP_CLOSE_WAIT`, and another socket.
    for changed in [
        (5, socket.cookie),
        (8, socket.cookie),
        (socket.state, socket.cookie + 1),
    ] {
        let client = daemon.client(address);
        daemon.kernel.socket(cgroup, client, socket);
        daemon.kernel.socket_changes(cgroup, client, changed);
        closed_without_an_answer(&daemon, client).await;
    }
    assert_eq!(daemon.service.refusals(), [("unacknowledged", 3)]);
    assert_eq!(daemon.connect(1, address).get("/").await.unwrap().status, 200);
}

/// `TCP_FIN_WAIT1` and `TCP_FIN_WAIT2`: the container has sent its request and closed its side.
#[tokio::test(start_paused = true)]
async fn a_half_closed_socket_of_the_container_is_evidence() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    for state in [4, 5] {
        let client = daemon.client(address);
        daemon.kernel.socket(
            cgroup,
            client,
            SocketEvidence {
                state,
                ..connected(cgroup)
            },
        );
        let reply = daemon.dial_via(client, daemon.way_of(1)).get(LIST).await.unwrap();
        assert_eq!(reply.text(), "app", "state {state}");
    }
}

/// Whatever socket the container has: over a bridge it can be one that it accepted, at the other end of an attacker's packets.
#[tokio::test(start_paused = true)]
async fn a_connection_over_a_bridge_is_never_answered() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let bare = daemon.run(2, &[]).await;
    for (number, address) in [(1, address), (2, bare)] {
        let cgroup = daemon.kernel.alive(&id(number)).unwrap();
        let client = daemon.client(address);
        daemon.kernel.socket(cgroup, client, connected(cgroup));
        refused(&daemon, client).await;
    }
    assert_eq!(daemon.service.refusals(), [("not-attached", 1), ("over-bridge", 1)]);
    let last = daemon.service.last_refusals().pop().unwrap().refusal.to_string();
    assert!(last.contains("no label of imds-router"), "{last}");
}

/// Those who are refused keep their places for a while.
#[tokio::test(start_paused = true)]
async fn callers_on_bridges_do_not_take_the_places_of_links() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    daemon.settle().await;
    let silent: Vec<_> = (0..400)
        .map(|number| daemon.dial_via(daemon.client(address), AcceptedFrom::Bridge(5 + number % 20)))
        .collect();
    tokio::time::sleep(Duration::from_millis(5)).await;
    let asked = daemon.clock.now();
    assert_eq!(daemon.connect(1, address).get(LIST).await.unwrap().text(), "app");
    assert_eq!(daemon.clock.now(), asked, "it does not wait");
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_comes_before_the_link_is_closed_once_there_is_one() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.kernel.fail_to_attach(Some("too many open files"));
    let address = daemon.run(1, APP).await;
    // The failure is the reason that the operator sees; it is tried again until it succeeds.
    let record = daemon.index.get(&id(1)).unwrap();
    assert_eq!(record.not_attached.as_deref(), Some("too many open files"));
    let next_attach = || daemon.index.get(&id(1)).unwrap().next_attach;
    let first = next_attach().unwrap();
    tokio::time::sleep_until(first + Duration::from_millis(20)).await;
    let second = next_attach().unwrap();
    assert!(
        second > daemon.clock.now() && second > first,
        "each failure tells when the next attempt is"
    );
    refused(&daemon, daemon.client(address)).await;
    daemon.kernel.fail_to_attach(None);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(daemon.connect(1, address).get(LIST).await.unwrap().text(), "app");
    assert_eq!(daemon.index.get(&id(1)).unwrap().not_attached, None);
    assert_eq!(next_attach(), None);
    // One that is about to have its link: the next connection comes over that.
    let address = daemon.create(2, OTHER);
    daemon.settle().await;
    daemon.boot(2, address);
    assert_eq!(daemon.way_of(2), AcceptedFrom::Bridge(5));
    let mut early = daemon.dial(daemon.client(address));
    assert!(early.get(LIST).await.is_none());
    assert_eq!(daemon.connect(2, address).get(LIST).await.unwrap().text(), "other");
    assert_eq!(daemon.service.refusals(), [("just-attached", 1), ("not-attached", 1)]);
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
async fn two_containers_with_one_address_are_told_apart_by_their_links() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let other = daemon.create(2, OTHER);
    daemon.boot(2, SocketAddr::new(address.ip(), 0));
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_ne!(address, other);
    // Even from the same port at the same time.
    let client = daemon.client(address);
    for (number, role) in [(1, "app"), (2, "other")] {
        let cgroup = daemon.kernel.alive(&id(number)).unwrap();
        daemon.kernel.socket(cgroup, client, connected(cgroup));
        let reply = daemon.dial_via(client, daemon.way_of(number)).get(LIST).await;
        assert_eq!(reply.unwrap().text(), role);
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
    daemon.settle().await;
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

/// Podman does not answer questions about a container while it starts, and its first instruction is over by then.
#[tokio::test(start_paused = true)]
async fn a_first_request_waits_at_the_link_until_the_engine_tells_whose_it_is() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.engine.world(|world| world.container_blocks = true);
    let addresses = [daemon.create(1, APP), daemon.create(2, &[])];
    for number in [1, 2] {
        daemon.kernel.start(&id(number));
    }
    // One that is of another engine.
    daemon.engine.send(Event::Defined(id(3)));
    daemon.kernel.start(&id(3));
    daemon.settle().await;
    assert!(daemon.index.get(&id(1)).is_none());
    let namespaces = [1, 2, 3].map(|number| daemon.kernel.namespace(&id(number)).unwrap());
    let attached = || namespaces.map(|namespace| daemon.kernel.is_attached(namespace));
    assert_eq!(attached(), [true; 3]);
    let mut clients = [1, 2].map(|number| daemon.connect(number, addresses[number as usize - 1]));
    let [app, bare] = &mut clients;
    let (app, bare, ()) = tokio::join!(app.get(LIST), bare.get(LIST), async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        daemon.engine.world(|world| world.container_blocks = false);
    });
    assert_eq!(app.unwrap().text(), "app");
    assert_eq!(bare.unwrap().status, 403);
    daemon.settle().await;
    assert_eq!(
        attached(),
        [true, false, false],
        "only the container that is served keeps its link"
    );
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
    daemon.kernel.socket(CgroupId(namespace.0), client, connected(cgroup));
    let reply = daemon
        .dial_via(client, AcceptedFrom::Namespace(namespace))
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
async fn a_container_in_a_container_counts_as_the_outer_one_only_where_that_is_configured() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let outer = daemon.kernel.alive(&id(1)).unwrap();
    let namespace = NamespaceId(outer.0);
    // The outer namespace masquerades it with an address of its own, and has no socket of the connection.
    let inner = SocketAddr::new(INNER.into(), 39_000);
    let reply = daemon.dial_nested(inner, namespace).get(LIST).await.unwrap();
    assert_eq!((reply.status, reply.text().as_str()), (200, "app"));
    refused_via(&daemon, inner, AcceptedFrom::Namespace(namespace)).await;
    // A neighbor whose packets the namespace has forwarded keeps its address.
    let neighbor = daemon.dial_nested("172.17.0.3:39000".parse().unwrap(), namespace);
    assert_eq!({ neighbor }.get(LIST).await.unwrap().status, 403);
    // A process of the host that has entered the namespace has a socket, and is not a container inside it.
    let host = daemon.client(SocketAddr::new(inner.ip(), 0));
    let evidence = connected(CgroupId(1));
    daemon.kernel.socket(outer, host, evidence);
    assert_eq!(daemon.dial_nested(host, namespace).get(LIST).await.unwrap().status, 403);
    // In a namespace without a run, or with several, it is unknown which one is meant.
    let status =
        async |daemon: &Daemon, namespace| daemon.dial_nested(inner, namespace).get(LIST).await.unwrap().status;
    assert_eq!(status(&daemon, NamespaceId(77)).await, 403);
    join(&daemon, 2, OTHER, NetworkMode::Container(id(1)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(status(&daemon, namespace).await, 403);
    daemon.kill(2);
    daemon.kill(1);
    assert_eq!(status(&daemon, namespace).await, 403);
    let reasons = daemon.service.refusals();
    assert_eq!(reasons[0], ("foreign-cgroup", 1));
    assert!(reasons.contains(&("shared", 1)), "{reasons:?}");
}

#[tokio::test(start_paused = true)]
async fn translated_connections_are_refused_with_their_reason() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    refused(&daemon, SocketAddr::new(GATEWAY.into(), 40_000)).await;
    // Translated on its way: nobody in the namespace has this connection.
    let namespace = NamespaceId(daemon.kernel.alive(&id(1)).unwrap().0);
    let client = SocketAddr::new(GATEWAY.into(), 40_001);
    let mut translated = daemon.dial_via(client, AcceptedFrom::Namespace(namespace));
    assert_eq!(translated.get(LIST).await.unwrap().status, 403);
    assert_eq!(daemon.service.refusals(), [("gateway", 1), ("translated", 1)]);
}

#[tokio::test(start_paused = true)]
async fn evidence_that_leads_to_two_containers_authenticates_neither() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let outer = daemon.kernel.alive(&id(1)).unwrap();
    let namespace = NamespaceId(outer.0);
    let inner = join(&daemon, 2, OTHER, NetworkMode::Container(id(1)));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(asks(&daemon, namespace, inner).await, (200, "other".into()));
    // The engine has put the cgroup of one below that of the other.
    daemon.kernel.nest(outer, inner);
    assert_eq!(asks(&daemon, namespace, inner).await, (403, String::new()));
    assert_eq!(daemon.service.refusals(), [("ambiguous", 1)]);
    assert_eq!(asks(&daemon, namespace, outer).await, (200, "app".into()));
}

#[tokio::test(start_paused = true)]
async fn a_run_that_ends_during_the_proof_is_not_authenticated() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let cgroup = daemon.kernel.alive(&id(1)).unwrap();
    let client = daemon.client(address);
    daemon.kernel.socket(cgroup, client, connected(cgroup));
    let connection = Connection {
        client,
        server: "169.254.169.254:80".parse().unwrap(),
        via: daemon.way_of(1),
        nested: false,
    };
    let deadline = daemon.clock.now() + Duration::from_millis(400);
    let caller = identify(&daemon.index, connection, deadline).await.expect("it runs");
    assert_eq!(caller.life().container, id(1));
    daemon.kernel.end_when_asked(id(1));
    let refused = identify(&daemon.index, connection, deadline).await;
    assert!(refused.is_err(), "{refused:?}");
}
