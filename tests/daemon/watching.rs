//! The engine comes, goes, and tells things late, twice, or never.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proptest::prelude::*;

use imds_router::containers::index::EngineState;
use imds_router::containers::reconciler::Event;
use imds_router::containers::{CgroupId, NetworkId};

use crate::script::{Container, Daemon, ScriptedEngine, ScriptedKernel, connected, endpoint, id, settings};

const APP: &[(&str, &str)] = &[("imds.role", "app")];
const LIST: &str = "/latest/meta-data/iam/security-credentials/";

#[tokio::test(start_paused = true)]
async fn the_engine_may_come_later_than_the_daemon() {
    let engine = ScriptedEngine::default();
    engine.go();
    let daemon = Daemon::start_with(settings(), engine, ScriptedKernel::default());
    daemon.settle().await;
    assert!(matches!(&*daemon.index.engine(), EngineState::Away(_)));
    let asked = daemon.clock.now();
    let reply = daemon.dial("10.0.0.1:1".parse().unwrap()).get("/").await.unwrap();
    assert_eq!(reply.status, 503);
    assert_eq!(daemon.clock.now() - asked, Duration::from_millis(400));
    tokio::time::sleep(Duration::from_secs(3600)).await;
    daemon.engine.come_back();
    let back = daemon.clock.now();
    daemon.synchronised().await;
    assert!(daemon.clock.now() - back < Duration::from_secs(1));
    let address = daemon.run(1, APP).await;
    assert_eq!(daemon.connect(1, address).get("/").await.unwrap().status, 200);
}

#[tokio::test(start_paused = true)]
async fn known_containers_are_served_while_the_engine_is_away_and_new_ones_soon_after() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let (first, second) = (daemon.run(1, APP).await, daemon.run(2, APP).await);
    daemon.engine.go();
    daemon.settle().await;
    assert!(matches!(&*daemon.index.engine(), EngineState::Away(_)));
    assert_eq!(daemon.connect(1, first).get("/").await.unwrap().status, 200);
    // One ends meanwhile, one starts; nobody tells.
    daemon.kill(2);
    daemon.settle().await;
    assert_eq!(daemon.dial(daemon.client(second)).get("/").await.unwrap().status, 403);
    let third = daemon.create(3, APP);
    daemon.boot(3, third);
    assert_eq!(daemon.connect(3, third).get("/").await.unwrap().status, 503);
    daemon.engine.come_back();
    tokio::time::sleep(Duration::from_millis(700)).await;
    assert_eq!(daemon.connect(3, third).get("/").await.unwrap().status, 200);
    assert_eq!(daemon.connect(1, first).get("/").await.unwrap().status, 200);
    assert!(daemon.index.get(&id(2)).unwrap().life.is_none());
}

#[tokio::test(start_paused = true)]
async fn changed_settings_reach_every_container_at_once() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let before = daemon.index.get(&id(1)).unwrap().instance.clone();
    daemon.changed.send_modify(|version| *version += 1);
    daemon.settle().await;
    let after = daemon.index.get(&id(1)).unwrap();
    assert!(!std::sync::Arc::ptr_eq(&before, &after.instance), "resolved anew");
    assert!(std::sync::Arc::ptr_eq(
        &after.life.as_ref().unwrap().instance.load_full(),
        &after.instance
    ));
}

#[tokio::test(start_paused = true)]
async fn a_look_up_that_an_event_has_overtaken_is_made_again() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let network = NetworkId::from("n");
    // The first event's look-up is under way, with the old state, when the second comes.
    daemon.engine.send(Event::Connected(network.clone(), None));
    tokio::time::sleep(Duration::from_micros(500)).await;
    let moved = SocketAddr::from(([10, 0, 3, 3], 0));
    daemon
        .engine
        .world(|world| world.networks.get_mut(&network).unwrap().insert(id(1), endpoint(moved)));
    daemon.engine.send(Event::Connected(network, None));
    daemon.settle().await;
    assert_eq!(daemon.index.at(address.ip()).len(), 0);
    assert_eq!(daemon.index.at(moved.ip()).len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_flood_of_unknown_callers_costs_few_look_ups() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.run(1, APP).await;
    let before = daemon.engine.world(|world| world.lookups);
    let tasks: Vec<_> = (0..200_u16)
        .map(|port| {
            let mut client = daemon.dial(SocketAddr::from(([10, 9, 9, 9], port + 1)));
            tokio::spawn(async move { client.get("/").await.map(|reply| reply.status) })
        })
        .collect();
    let mut answers = Vec::new();
    for task in tasks {
        answers.push(task.await.unwrap());
    }
    let answered = answers.iter().filter(|it| **it == Some(403)).count();
    // As many as its share of the places, which depends on the limit on open files; the others are closed.
    assert!((22..=86).contains(&answered), "{answers:?}");
    assert_eq!(answers.iter().filter(|it| it.is_none()).count(), 200 - answered);
    assert_eq!(daemon.service.turned_away(), 200 - answered as u64);
    let lookups = daemon.engine.world(|world| world.lookups) - before;
    assert!(lookups <= 10, "{lookups}");
}

#[tokio::test(start_paused = true)]
async fn ten_thousand_containers_are_synchronised_and_the_right_ones_found() {
    let (engine, kernel) = (ScriptedEngine::default(), ScriptedKernel::default());
    let address = |number: u32| SocketAddr::from(([10, 1, (number >> 8) as u8, (number & 255) as u8], 0));
    engine.world(|world| {
        let network = world.networks.entry(NetworkId::from("n")).or_default();
        for number in 1..=10_000 {
            network.insert(id(number), endpoint(address(number)));
        }
        for number in 1..=10_000 {
            let labels = BTreeMap::from([("imds.role".to_owned(), format!("r{}", number % 7))]);
            let running = true;
            world.containers.insert(
                id(number),
                Container {
                    labels,
                    running,
                    ..Container::default()
                },
            );
        }
    });
    for number in 1..=10_000 {
        kernel.start(&id(number));
    }
    let daemon = Daemon::start_with(settings(), engine, kernel);
    daemon.synchronised().await;
    tokio::time::sleep(Duration::from_secs(30)).await;
    for number in [1, 77, 9_999, 10_000] {
        let list = "/latest/meta-data/iam/security-credentials/";
        let reply = daemon.connect(number, address(number)).get(list).await.unwrap();
        assert_eq!(reply.text(), format!("r{}", number % 7));
    }
}

// ---- habit 3: any sequence of events, dropped, doubled and reordered, with lives ending at any point, then a resync

#[derive(Clone, Debug)]
enum Happens {
    Create(u32),
    Boot(u32, u8),
    Kill(u32),
    Remove(u32),
    Connect(u32, u8),
    Disconnect(u32),
    Lose,
    Pause,
}

fn happens() -> impl Strategy<Value = Happens> {
    let number = 1..6_u32;
    prop_oneof![
        number.clone().prop_map(Happens::Create),
        (number.clone(), 1..5_u8).prop_map(|(n, a)| Happens::Boot(n, a)),
        number.clone().prop_map(Happens::Kill),
        number.clone().prop_map(Happens::Remove),
        (number.clone(), 1..5_u8).prop_map(|(n, a)| Happens::Connect(n, a)),
        number.prop_map(Happens::Disconnect),
        Just(Happens::Lose),
        Just(Happens::Pause),
    ]
}

/// How an event is told.
#[derive(Clone, Copy, Debug)]
enum Told {
    Once,
    Twice,
    Never,
    Late,
}

fn told() -> impl Strategy<Value = Told> {
    prop_oneof![3 => Just(Told::Once), 1 => Just(Told::Twice), 1 => Just(Told::Never), 1 => Just(Told::Late)]
}

const ROLE: &str = "imds.role";

async fn play(steps: Vec<(Happens, Told)>) {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let network = |n: u8| NetworkId::from(["na", "nb"][usize::from(n % 2)]);
    let at = |a: u8| SocketAddr::from(([10, 0, 0, a], 0));
    let mut late = Vec::new();
    for (step, told) in steps {
        let world = |change: &mut dyn FnMut(&mut crate::script::World)| daemon.engine.world(change);
        let events = match step {
            Happens::Create(n) => {
                let labels = BTreeMap::from([(ROLE.to_owned(), format!("role{n}"))]);
                world(&mut |w| {
                    w.containers.entry(id(n)).or_insert(Container {
                        labels: labels.clone(),
                        ..Container::default()
                    });
                });
                vec![Event::Defined(id(n))]
            }
            Happens::Boot(n, a) if daemon.engine.world(|w| w.containers.contains_key(&id(n))) => {
                world(&mut |w| {
                    w.networks.entry(network(a)).or_default().insert(id(n), endpoint(at(a)));
                    w.containers.get_mut(&id(n)).unwrap().running = true;
                });
                daemon.kernel.start(&id(n));
                vec![Event::Connected(network(a), Some(id(n))), Event::Started(id(n))]
            }
            Happens::Connect(n, a) if daemon.kernel.alive(&id(n)).is_some() => {
                world(&mut |w| drop(w.networks.entry(network(a)).or_default().insert(id(n), endpoint(at(a)))));
                vec![Event::Connected(network(a), Some(id(n)))]
            }
            Happens::Disconnect(n) => {
                world(&mut |w| w.networks.values_mut().for_each(|it| drop(it.remove(&id(n)))));
                vec![Event::Disconnected(network(0)), Event::Disconnected(network(1))]
            }
            Happens::Kill(n) => {
                daemon.kill(n);
                vec![
                    Event::Died(id(n)),
                    Event::Disconnected(network(0)),
                    Event::Disconnected(network(1)),
                ]
            }
            Happens::Remove(n) if daemon.kernel.alive(&id(n)).is_none() => {
                world(&mut |w| {
                    w.containers.remove(&id(n));
                    w.networks.values_mut().for_each(|it| drop(it.remove(&id(n))));
                });
                vec![Event::Removed(id(n))]
            }
            Happens::Lose => {
                daemon.engine.go();
                daemon.settle().await;
                daemon.engine.come_back();
                vec![]
            }
            Happens::Pause => {
                daemon.settle().await;
                vec![]
            }
            _ => vec![],
        };
        match told {
            Told::Once => events.into_iter().for_each(|event| daemon.engine.send(event)),
            Told::Twice => events
                .iter()
                .chain(&events)
                .for_each(|event| daemon.engine.send(event.clone())),
            Told::Never => {}
            Told::Late => late.extend(events),
        }
        // At no moment does an address answer for a container that does not hold it, or for an ended life.
        for a in 1..5 {
            for n in 1..6 {
                let Some(cgroup) = daemon.kernel.alive(&id(n)) else {
                    continue;
                };
                let owns_cgroup = |w: &mut crate::script::World| {
                    w.networks
                        .values()
                        .any(|it| it.get(&id(n)).is_some_and(|e| e.addresses().any(|x| x == at(a).ip())))
                };
                if !daemon.engine.world(owns_cgroup) {
                    continue;
                }
                let client = daemon.client(at(a));
                let evidence = connected(cgroup);
                daemon.kernel.socket(cgroup, client, evidence);
                let path = "/latest/meta-data/iam/security-credentials/";
                let over_bridge = daemon.dial(client).get(path).await;
                assert!(over_bridge.is_none_or(|reply| reply.status != 200));
                if let Some(reply) = daemon.dial_via(client, daemon.way_of(n)).get(path).await
                    && reply.status == 200
                {
                    assert_eq!(reply.text(), format!("role{n}"));
                }
            }
        }
    }
    late.reverse();
    late.into_iter().for_each(|event| daemon.engine.send(event));
    // A resync.
    daemon.engine.go();
    daemon.settle().await;
    daemon.engine.come_back();
    tokio::time::sleep(Duration::from_secs(2)).await;
    daemon.synchronised().await;
    assert_eq!(seen(&daemon), expected(&daemon));
}

type State = (
    BTreeMap<String, (Option<CgroupId>, Vec<IpAddr>)>,
    BTreeMap<IpAddr, Vec<String>>,
);

/// What the index says.
fn seen(daemon: &Daemon) -> State {
    let all = daemon.index.all();
    let containers = all.iter().map(|record| {
        let mut addresses: Vec<_> = record.attachments.addresses().collect();
        addresses.sort_unstable();
        let life = record.life.as_ref().map(|life| life.cgroup);
        (record.definition.id.as_str().to_owned(), (life, addresses))
    });
    let address = |a| IpAddr::from([10, 0, 0, a]);
    let addresses = (1..5).map(|a| {
        let mut ids: Vec<_> = daemon
            .index
            .at(address(a))
            .iter()
            .map(|record| record.definition.id.as_str().to_owned())
            .collect();
        ids.sort_unstable();
        (address(a), ids)
    });
    (containers.collect(), addresses.collect())
}

/// What engine and kernel say.
fn expected(daemon: &Daemon) -> State {
    daemon.engine.world(|world| {
        let mut addresses: BTreeMap<IpAddr, Vec<String>> =
            (1..5).map(|a| (IpAddr::from([10, 0, 0, a]), vec![])).collect();
        let containers = world.containers.keys().map(|id| {
            let mut held: Vec<IpAddr> = world
                .networks
                .values()
                .filter_map(|it| it.get(id))
                .flat_map(|it| it.addresses())
                .collect();
            held.sort_unstable();
            for address in &held {
                let ids = addresses.get_mut(address).unwrap();
                if ids.last().is_none_or(|last| last != id.as_str()) {
                    ids.push(id.as_str().to_owned());
                }
            }
            (id.as_str().to_owned(), (daemon.kernel.alive(id), held))
        });
        (containers.collect(), addresses)
    })
}

/// An inspect blocks while its container starts. However many do, nothing else waits for them.
#[tokio::test(start_paused = true)]
async fn inspects_that_block_hold_up_nobody() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    for number in 100..150 {
        let container = Container {
            inspect_blocks: true,
            ..Container::default()
        };
        daemon
            .engine
            .world(|world| world.containers.insert(id(number), container));
        daemon.engine.send(Event::Defined(id(number)));
    }
    daemon.settle().await;
    let address = daemon.create(1, APP);
    tokio::time::sleep(Duration::from_millis(140)).await;
    daemon.boot(1, address);
    let reply = daemon.connect(1, address).get(LIST).await.unwrap();
    assert_eq!((reply.status, reply.text().as_str()), (200, "app"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_told_a_resync_gives_what_is(steps in proptest::collection::vec((happens(), told()), 1..40)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(play(steps));
    }
}
