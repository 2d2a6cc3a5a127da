//! `[serve] proof = "address"`: the engine's word is the only evidence, so it must be fresh.

use std::net::SocketAddr;
use std::time::Duration;

use imds_router::containers::NetworkId;
use imds_router::containers::index::EngineState;
use imds_router::containers::reconciler::Event;

use crate::script::{Call, Daemon, Fails, endpoint, id, settings};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const LABELS: &[(&str, &str)] = &[("imds.role", "first")];

/// The status of a request that comes from this address, and the role that it is told of.
async fn ask(daemon: &Daemon, address: SocketAddr) -> Option<(u16, String)> {
    let reply = daemon.dial(daemon.client(address)).get(LIST).await?;
    Some((reply.status, reply.text()))
}

/// The engine gives the address of container 1, which has ended, to container 2. No event tells of it.
fn reuse_address(daemon: &Daemon, address: SocketAddr) {
    daemon.engine.world(|world| {
        world.containers.get_mut(&id(1)).unwrap().running = false;
        let network = world.networks.entry(NetworkId::from("n")).or_default();
        network.remove(&id(1));
        network.insert(id(2), endpoint(address));
    });
}

#[tokio::test(start_paused = true)]
async fn a_container_is_served_until_the_stream_of_events_ends() {
    let daemon = Daemon::start_by_address(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, LABELS).await;
    assert_eq!(ask(&daemon, address).await, Some((200, "first".to_owned())));
    daemon.engine.go();
    daemon.settle().await;
    assert_ne!(ask(&daemon, address).await.map(|(status, _)| status), Some(200));
}

/// An answer that was under way when the stream ended, or a look-up that is repeated, tells that the container runs. It may end at
/// any time from then on.
#[tokio::test(start_paused = true)]
async fn an_address_proves_nothing_while_no_events_arrive() {
    let daemon = Daemon::start_by_address(settings());
    daemon.synchronised().await;
    daemon.engine.fail(&[Call::Inspect], Fails::Error);
    let address = daemon.run(1, LABELS).await;
    // The next streams end at once, so that the pauses between them are seconds.
    daemon.engine.world(|world| world.streams_last = Some(Duration::ZERO));
    daemon.engine.break_stream();
    tokio::time::sleep(Duration::from_secs(20)).await;
    daemon.engine.world(|world| world.failing.clear());
    for _ in 0..200 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(matches!(*daemon.index.engine(), EngineState::Away(_)));
        let has_life = daemon
            .index
            .get(&id(1))
            .is_some_and(|it| it.life.as_ref().is_some_and(|life| life.alive()));
        if has_life {
            break;
        }
    }
    reuse_address(&daemon, address);
    let served = ask(&daemon, address).await;
    assert_eq!(
        served.as_ref().map(|(status, _)| *status),
        Some(503),
        "container 2 got {served:?}"
    );
}

/// The container has lost its address to another one while the daemon was not connected. The network cannot be read.
#[tokio::test(start_paused = true)]
async fn an_address_on_a_network_that_cannot_be_read_proves_nothing() {
    let daemon = Daemon::start_by_address(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, LABELS).await;
    daemon.engine.go();
    daemon.settle().await;
    daemon.engine.world(|world| {
        let network = world.networks.get_mut(&NetworkId::from("n")).unwrap();
        network.remove(&id(1));
        network.insert(id(2), endpoint(address));
    });
    daemon.engine.fail(&[Call::Network], Fails::Error);
    daemon.engine.come_back();
    daemon.synchronised().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(ask(&daemon, address).await.map(|(status, _)| status), Some(503));
    // It is the container's own after all.
    daemon.engine.world(|world| {
        let network = world.networks.get_mut(&NetworkId::from("n")).unwrap();
        network.remove(&id(2));
        network.insert(id(1), endpoint(address));
    });
    daemon.engine.heal();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(ask(&daemon, address).await, Some((200, "first".to_owned())));
}

/// The image of a container is read only after its start.
#[tokio::test(start_paused = true)]
async fn an_image_that_is_read_late_does_not_end_the_run_of_its_container() {
    let daemon = Daemon::start_by_address(settings());
    daemon.synchronised().await;
    daemon.engine.fail(&[Call::Image], Fails::Error);
    let address = daemon.create(1, LABELS);
    daemon.settle().await;
    daemon.boot(1, address);
    daemon.settle().await;
    daemon.engine.heal();
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(ask(&daemon, address).await, Some((200, "first".to_owned())));
}

/// The list was asked for before the container started.
#[tokio::test(start_paused = true)]
async fn a_list_that_a_start_has_overtaken_does_not_end_the_run() {
    let daemon = Daemon::start_by_address(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, LABELS);
    tokio::time::sleep(Duration::from_secs(2)).await;
    // The list waits for an image of another container, which takes up to two seconds.
    daemon.create(2, LABELS);
    daemon
        .engine
        .world(|world| world.images_failing.insert(id(2), Fails::Silent));
    daemon.engine.send(Event::Unreadable);
    daemon.settle().await;
    daemon.boot(1, address);
    daemon.settle().await;
    assert_eq!(ask(&daemon, address).await, Some((200, "first".to_owned())));
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(ask(&daemon, address).await, Some((200, "first".to_owned())));
}

/// The inspection was answered before the container ended.
#[tokio::test(start_paused = true)]
async fn an_inspection_that_an_end_has_overtaken_brings_no_container_to_life() {
    let daemon = Daemon::start_by_address(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, LABELS);
    daemon.settle().await;
    daemon.boot(1, address);
    // The answers take a millisecond each.
    tokio::time::sleep(Duration::from_micros(500)).await;
    daemon.kill(1);
    daemon.engine.send(Event::Died(id(1)));
    daemon.settle().await;
    let life = daemon.index.get(&id(1)).unwrap().life.clone();
    assert!(!life.is_some_and(|life| life.alive()));
}
