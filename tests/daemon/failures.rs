//! A container engine that fails: whatever it does, it costs at most the time until it answers again.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use proptest::prelude::*;
use tracing::subscriber::DefaultGuard;

use imds_router::containers::NetworkId;
use imds_router::containers::index::EngineState;
use imds_router::containers::reconciler::Event;
use imds_router::instance::Instance;

use crate::script::{Call, Container, Daemon, Fails, ScriptedEngine, ScriptedKernel, endpoint, id, settings};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const SECOND: Duration = Duration::from_secs(1);

fn role(number: u32) -> String {
    format!("role{number}")
}

fn address(number: u32) -> SocketAddr {
    SocketAddr::from(([10, 0, 1, u8::try_from(number).unwrap()], 0))
}

/// Starts a container with a role of its own. No event announces it.
fn start_unannounced(engine: &ScriptedEngine, kernel: &ScriptedKernel, number: u32) {
    let container = Container {
        labels: BTreeMap::from([("imds.role".to_owned(), role(number))]),
        running: true,
        ..Container::default()
    };
    engine.world(|world| {
        world.containers.insert(id(number), container);
        let network = world.networks.entry(NetworkId::from("n")).or_default();
        network.insert(id(number), endpoint(address(number)));
    });
    kernel.start(&id(number));
}

/// The same, with the events in Docker's order.
fn start(daemon: &Daemon, number: u32) {
    start_unannounced(&daemon.engine, &daemon.kernel, number);
    let network = NetworkId::from("n");
    let events = [
        Event::Defined(id(number)),
        Event::Connected(network, Some(id(number))),
        Event::Started(id(number)),
    ];
    events.into_iter().for_each(|event| daemon.engine.send(event));
}

/// The role that a request of the container gets, if any.
async fn role_of(daemon: &Daemon, number: u32) -> Option<String> {
    let reply = daemon.connect(number, address(number)).get(LIST).await?;
    (reply.status == 200).then(|| reply.text())
}

/// How long it takes until all these containers are served, each with its own role.
async fn served_after(daemon: &Daemon, numbers: &[u32]) -> Duration {
    let start = daemon.clock.now();
    for number in numbers {
        loop {
            match role_of(daemon, *number).await {
                Some(served) => {
                    assert_eq!(served, role(*number));
                    break;
                }
                None => tokio::time::sleep(Duration::from_millis(10)).await,
            }
            assert!(
                daemon.clock.now() - start < 120 * SECOND,
                "container {number} is not served"
            );
        }
    }
    daemon.clock.now() - start
}

fn calls(daemon: &Daemon) -> usize {
    daemon.engine.world(|world| world.calls.values().sum())
}

fn instance(daemon: &Daemon, number: u32) -> Arc<Instance> {
    daemon.index.get(&id(number)).unwrap().instance.clone()
}

/// The lines of the log about containers and their engine from INFO on, while this exists.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn start() -> (Self, DefaultGuard) {
        let log = Self::default();
        let writer = log.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(tracing::Level::INFO)
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .finish();
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        let lines = text.lines().filter(|line| line.contains(" imds_router::containers::"));
        lines.map(str::to_owned).collect()
    }

    fn count(&self, text: &str) -> usize {
        self.lines().iter().filter(|line| line.contains(text)).count()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test(start_paused = true)]
async fn containers_are_served_soon_after_a_list_that_failed_answers_again() {
    for (outage, served_within) in [(1, 1), (4, 1), (30, 6)] {
        for how in [Fails::Error, Fails::Incomplete] {
            let (log, _guard) = Log::start();
            let (engine, kernel) = (ScriptedEngine::default(), ScriptedKernel::default());
            start_unannounced(&engine, &kernel, 1);
            engine.fail(&[Call::Containers], how);
            let daemon = Daemon::start_with(settings(), engine, kernel);
            daemon.settle().await;
            start_unannounced(&daemon.engine, &daemon.kernel, 2);
            tokio::time::sleep(outage * SECOND).await;
            assert_eq!(
                *daemon.index.engine(),
                EngineState::Synchronising,
                "{outage} s, {how:?}"
            );
            let failing = daemon.index.failing().expect("the list fails");
            assert_eq!((failing.call.as_str(), failing.others), ("list of containers", 0));
            assert_eq!(log.count("list of containers"), 1, "{:?}", log.lines());
            daemon.engine.heal();
            let healed = daemon.clock.now();
            served_after(&daemon, &[1, 2]).await;
            daemon.synchronised().await;
            let took = daemon.clock.now() - healed;
            assert!(took <= served_within * SECOND, "{outage} s, {how:?}: {took:?}");
            assert_eq!(daemon.index.failing(), None);
            assert_eq!(log.count("answers again: list of containers"), 1, "{:?}", log.lines());
            assert!(log.lines().len() <= 3, "{:?}", log.lines());
        }
    }
}

/// All calls but the subscription.
const LOOK_UPS: [Call; 6] = [
    Call::Containers,
    Call::Container,
    Call::Inspect,
    Call::Image,
    Call::Networks,
    Call::Network,
];

#[tokio::test(start_paused = true)]
async fn containers_that_start_while_all_look_ups_fail_are_served_soon_after() {
    for (outage, served_within) in [(1, 1), (4, 1), (30, 6)] {
        let (log, _guard) = Log::start();
        let daemon = Daemon::start(settings());
        daemon.synchronised().await;
        daemon.engine.fail(&LOOK_UPS, Fails::Error);
        (1..=5).for_each(|number| start(&daemon, number));
        let before = calls(&daemon);
        tokio::time::sleep(outage * SECOND).await;
        assert!(calls(&daemon) - before <= 12 * 35, "{}", calls(&daemon) - before);
        daemon.engine.heal();
        let took = served_after(&daemon, &[1, 2, 3, 4, 5]).await;
        assert!(took <= served_within * SECOND, "{outage} s: {took:?}");
        tokio::time::sleep(10 * SECOND).await;
        assert_eq!(daemon.index.failing(), None);
        assert!(log.lines().len() <= 7, "{:?}", log.lines());
    }
}

/// Without an answer nothing is known of the container: its client must try again (503), not give up (403).
#[tokio::test(start_paused = true)]
async fn container_that_the_engine_does_not_describe_gets_503() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.engine.fail(&[Call::Container], Fails::Error);
    start(&daemon, 1);
    tokio::time::sleep(20 * SECOND).await;
    let reply = daemon.connect(1, address(1)).get(LIST).await.unwrap();
    assert_eq!(reply.status, 503);
    daemon.engine.heal();
    // That request has brought the next attempt forward.
    assert!(served_after(&daemon, &[1]).await <= SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_call_that_is_never_answered_ends_and_is_repeated() {
    for call in [Call::Containers, Call::Networks, Call::Image, Call::Subscribe] {
        let (engine, kernel) = (ScriptedEngine::default(), ScriptedKernel::default());
        start_unannounced(&engine, &kernel, 1);
        engine.fail(&[call], Fails::Silent);
        let daemon = Daemon::start_with(settings(), engine, kernel);
        tokio::time::sleep(SECOND).await;
        daemon.engine.heal();
        let took = served_after(&daemon, &[1]).await;
        assert!(took <= 31 * SECOND, "{call:?}: {took:?}");
        daemon.synchronised().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_that_cannot_be_read_costs_its_own_container_only() {
    for how in [Fails::Error, Fails::Silent] {
        let (engine, kernel) = (ScriptedEngine::default(), ScriptedKernel::default());
        (1..=3).for_each(|number| start_unannounced(&engine, &kernel, number));
        // Its image has the same label, so that it is unknown who chose the role while the image cannot be read.
        engine.world(|world| world.images_failing.insert(id(2), how));
        let daemon = Daemon::start_with(settings(), engine, kernel);
        assert!(served_after(&daemon, &[1, 3]).await <= 3 * SECOND);
        daemon.synchronised().await;
        tokio::time::sleep(3 * SECOND).await;
        assert_eq!(role_of(&daemon, 2).await, None);
        let unread = daemon.index.get(&id(2)).unwrap().unread.clone().expect("the reason");
        assert!(unread.starts_with("inspection of an image: "), "{unread}");
        assert_eq!(daemon.index.get(&id(1)).unwrap().unread, None);
        daemon.engine.heal();
        assert!(served_after(&daemon, &[2]).await <= 21 * SECOND);
        assert_eq!(daemon.index.get(&id(2)).unwrap().unread, None);
        assert_eq!(daemon.index.failing(), None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_container_that_cannot_be_described_costs_itself_only_and_keeps_its_orders() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    (1..=3).for_each(|number| start(&daemon, number));
    daemon.settle().await;
    daemon.order(2, |ordered| ordered.options.hop_limit = Some(7));
    // A daemon that is started while the engine cannot describe it.
    daemon.engine.world(|world| world.undescribed.insert(id(2)));
    let again = Daemon::start_with(settings(), daemon.engine.clone(), daemon.kernel.clone());
    again
        .orders
        .order(&id(2), |_| true, |ordered| ordered.options.hop_limit = Some(7))
        .unwrap();
    again.synchronised().await;
    assert!(served_after(&again, &[1, 3]).await <= SECOND);
    assert_eq!(role_of(&again, 2).await, None);
    let failing = again.index.failing().expect("it is said");
    assert_eq!(failing.call, format!("look-up of a container ({})", id(2).short()));
    again.order(1, |ordered| ordered.options.hop_limit = Some(3));
    assert!(again.orders.of(&id(2)).is_some(), "the engine names the container");
    again.engine.heal();
    assert!(served_after(&again, &[2]).await <= SECOND);
    assert_eq!(instance(&again, 2).hop_limit, 7);
}

#[tokio::test(start_paused = true)]
async fn orders_survive_a_list_that_fails_and_not_the_removal_of_their_container() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    (1..=3).for_each(|number| start(&daemon, number));
    daemon.settle().await;
    for number in 1..=3 {
        daemon.order(number, |ordered| ordered.options.hop_limit = Some(7));
    }
    // The engine is restarted, and its list fails. One container is removed meanwhile.
    daemon.engine.go();
    daemon.settle().await;
    daemon.kill(3);
    daemon.engine.world(|world| world.containers.remove(&id(3)));
    for how in [Fails::Error, Fails::Silent, Fails::Incomplete] {
        daemon.engine.fail(&[Call::Containers], how);
        daemon.engine.come_back();
        tokio::time::sleep(30 * SECOND).await;
        daemon.order(1, |ordered| ordered.options.hop_limit = Some(8));
        assert!((1..=3).all(|number| daemon.orders.of(&id(number)).is_some()), "{how:?}");
    }
    daemon.engine.heal();
    tokio::time::sleep(90 * SECOND).await;
    daemon.synchronised().await;
    daemon.order(1, |ordered| ordered.options.hop_limit = Some(9));
    assert!(daemon.orders.of(&id(2)).is_some());
    assert_eq!(daemon.orders.of(&id(3)), None, "the engine's list does not name it");
}

/// A list that was asked for before a container started does not name it.
#[tokio::test(start_paused = true)]
async fn a_list_that_an_event_has_overtaken_forgets_no_container() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    start(&daemon, 1);
    served_after(&daemon, &[1]).await;
    for number in 2..40 {
        tokio::time::sleep(2 * SECOND).await;
        daemon.engine.send(Event::Unreadable);
        // The answers take a millisecond each.
        tokio::time::sleep(Duration::from_micros(u64::from(number) * 100)).await;
        start(&daemon, number);
        tokio::time::sleep(Duration::from_millis(20)).await;
        let record = daemon.index.get(&id(number)).unwrap();
        let life = record.life.clone().expect("it runs");
        daemon.settle().await;
        let later = daemon.index.get(&id(number)).unwrap().life.clone().expect("it runs");
        assert!(
            Arc::ptr_eq(&life, &later),
            "container {number} was forgotten in between"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_closes_at_once_costs_few_calls_and_log_lines() {
    let (log, _guard) = Log::start();
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    start(&daemon, 1);
    daemon.settle().await;
    daemon.engine.world(|world| world.streams_last = Some(Duration::ZERO));
    let before = calls(&daemon);
    daemon.engine.break_stream();
    tokio::time::sleep(60 * SECOND).await;
    let calls = calls(&daemon) - before;
    assert!(
        calls <= 30,
        "{calls} calls: {:?}",
        daemon.engine.world(|world| world.calls.clone())
    );
    assert!(log.lines().len() <= 10, "{:?}", log.lines());
    assert_eq!(role_of(&daemon, 1).await, Some(role(1)));
    // No event tells of it.
    start_unannounced(&daemon.engine, &daemon.kernel, 2);
    let took = served_after(&daemon, &[2]).await;
    assert!(took <= 9 * SECOND, "{took:?}");
    daemon.engine.heal();
    tokio::time::sleep(10 * SECOND).await;
    assert_eq!(*daemon.index.engine(), EngineState::Synchronised);
    assert!(log.lines().len() <= 12, "{:?}", log.lines());
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_once_is_subscribed_to_again_at_once() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    tokio::time::sleep(60 * SECOND).await;
    daemon.engine.break_stream();
    start_unannounced(&daemon.engine, &daemon.kernel, 1);
    let broken = daemon.clock.now();
    daemon.settle().await;
    served_after(&daemon, &[1]).await;
    daemon.synchronised().await;
    let took = daemon.clock.now() - broken;
    assert!(took <= SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_cannot_be_read_is_made_up_for_by_the_list() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    for number in 1..=20 {
        start_unannounced(&daemon.engine, &daemon.kernel, number);
        daemon.engine.send(Event::Unreadable);
    }
    let before = daemon.engine.world(|world| world.calls[&Call::Containers]);
    let all: Vec<_> = (1..=20).collect();
    let took = served_after(&daemon, &all).await;
    assert!(took <= 2 * SECOND, "{took:?}");
    let lists = daemon.engine.world(|world| world.calls[&Call::Containers]) - before;
    assert!(lists <= 2, "{lists}");
}

#[tokio::test(start_paused = true)]
async fn a_link_that_cannot_be_created_is_tried_again_until_it_is() {
    let (log, _guard) = Log::start();
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon
        .kernel
        .fail_to_attach(Some("open /proc/7/ns/net: Too many open files (os error 24)"));
    start(&daemon, 1);
    tokio::time::sleep(60 * SECOND).await;
    let record = daemon.index.get(&id(1)).unwrap();
    assert!(
        record.not_attached.as_ref().unwrap().contains("Too many open files"),
        "{record:?}"
    );
    assert!(record.next_attach.is_some());
    assert_eq!(log.count("Too many open files"), 1, "{:?}", log.lines());
    // Another run does not inherit the pause.
    daemon.kill(1);
    daemon.engine.send(Event::Died(id(1)));
    daemon.settle().await;
    daemon.kernel.fail_to_attach(None);
    start(&daemon, 1);
    assert!(served_after(&daemon, &[1]).await <= SECOND);
    // Nor does one that fails for a while stay without a link.
    daemon.kernel.fail_to_attach(Some("Too many open files"));
    start(&daemon, 2);
    tokio::time::sleep(60 * SECOND).await;
    daemon.kernel.fail_to_attach(None);
    assert!(served_after(&daemon, &[2]).await <= 6 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn a_container_that_ends_while_it_is_attached_is_no_problem() {
    let (log, _guard) = Log::start();
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let before = log.lines().len();
    daemon.kernel.fail_to_attach(Some("No such process (os error 3)"));
    for number in 1..=20 {
        start(&daemon, number);
        tokio::time::sleep(Duration::from_millis(u64::from(number))).await;
        daemon.kill(number);
        daemon.engine.send(Event::Died(id(number)));
        daemon.settle().await;
    }
    assert_eq!(log.lines().len(), before, "{:?}", log.lines());
}

// ---- any sequence of starts, stops, failures and orders

#[derive(Clone, Debug)]
enum Step {
    Start { number: u32, announced: bool },
    Stop { number: u32, announced: bool },
    Remove(u32),
    Order(u32),
    Fail(Call, Fails),
    Undescribe(u32),
    Heal,
    BreakStream,
    StreamsBreak,
    Unreadable,
    Restart,
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let number = 1..6_u32;
    let calls: Vec<Call> = LOOK_UPS.into_iter().chain([Call::Subscribe]).collect();
    let how = prop_oneof![Just(Fails::Error), Just(Fails::Silent), Just(Fails::Incomplete)];
    let step = prop_oneof![
        4 => (number.clone(), any::<bool>()).prop_map(|(number, announced)| Step::Start { number, announced }),
        2 => (number.clone(), any::<bool>()).prop_map(|(number, announced)| Step::Stop { number, announced }),
        1 => number.clone().prop_map(Step::Remove),
        2 => number.clone().prop_map(Step::Order),
        3 => (proptest::sample::select(calls), how).prop_map(|(call, how)| Step::Fail(call, how)),
        1 => number.prop_map(Step::Undescribe),
        2 => Just(Step::Heal),
        1 => Just(Step::BreakStream),
        1 => Just(Step::StreamsBreak),
        1 => Just(Step::Unreadable),
        1 => Just(Step::Restart),
        3 => prop_oneof![0..20_u64, 100..3_000_u64, 5_000..40_000_u64].prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 1..40)
}

/// The containers that exist, and which of them run; and the orders that were given and not pruned rightly.
#[derive(Default)]
struct Expected {
    exist: BTreeMap<u32, bool>,
    ordered: BTreeMap<u32, u8>,
    /// No other container ever gets their IDs.
    removed: BTreeSet<u32>,
}

async fn play(steps: Vec<Step>) {
    let daemon = Daemon::start(settings());
    let mut expected = Expected::default();
    let mut orders = 0;
    for step in steps {
        take(&daemon, &mut expected, &mut orders, step).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
        for (number, runs) in &expected.exist {
            if *runs && let Some(served) = role_of(&daemon, *number).await {
                assert_eq!(served, role(*number));
            }
        }
    }
    daemon.engine.heal();
    daemon.engine.come_back();
    // The longest limit of an answer that never comes, and the longest pause.
    tokio::time::sleep(100 * SECOND).await;
    assert_eq!(*daemon.index.engine(), EngineState::Synchronised);
    assert_eq!(daemon.index.failing(), None);
    for number in 1..6 {
        let record = daemon.index.get(&id(number));
        assert_eq!(
            record.is_some(),
            expected.exist.contains_key(&number),
            "container {number}"
        );
        let life = record.and_then(|record| record.life.clone());
        let runs = expected.exist.get(&number) == Some(&true);
        assert_eq!(life.is_some_and(|life| life.alive()), runs, "container {number}");
        if runs {
            assert_eq!(role_of(&daemon, number).await, Some(role(number)));
            assert_eq!(daemon.index.get(&id(number)).unwrap().unread, None);
        }
        if expected.exist.contains_key(&number) {
            let kept = daemon.orders.of(&id(number)).and_then(|it| it.options.hop_limit);
            assert_eq!(
                kept,
                expected.ordered.get(&number).copied(),
                "orders of container {number}"
            );
        }
    }
}

async fn take(daemon: &Daemon, expected: &mut Expected, orders: &mut u8, step: Step) {
    match step {
        Step::Start { number, announced } if !expected.removed.contains(&number) => {
            match announced {
                true => start(daemon, number),
                false => {
                    start_unannounced(&daemon.engine, &daemon.kernel, number);
                    // Its event is lost together with its stream.
                    daemon.engine.break_stream();
                }
            }
            expected.exist.insert(number, true);
        }
        Step::Stop { number, announced } if expected.exist.contains_key(&number) => {
            daemon.kill(number);
            match announced {
                true => daemon.engine.send(Event::Died(id(number))),
                false => daemon.engine.break_stream(),
            }
            expected.exist.insert(number, false);
        }
        Step::Remove(number) if expected.exist.get(&number) == Some(&false) => {
            daemon.engine.world(|world| world.containers.remove(&id(number)));
            daemon.engine.send(Event::Removed(id(number)));
            expected.exist.remove(&number);
            expected.removed.insert(number);
        }
        // As `modify`, it needs a container that is known.
        Step::Order(number) if expected.exist.contains_key(&number) && daemon.index.get(&id(number)).is_some() => {
            *orders += 1;
            let hop_limit = *orders % 60 + 2;
            daemon.order(number, |ordered| ordered.options.hop_limit = Some(hop_limit));
            expected.ordered.insert(number, hop_limit);
        }
        Step::Fail(call, how) => daemon.engine.fail(&[call], how),
        Step::Undescribe(number) => drop(daemon.engine.world(|world| world.undescribed.insert(id(number)))),
        Step::Heal => daemon.engine.heal(),
        Step::BreakStream => daemon.engine.break_stream(),
        Step::StreamsBreak => daemon.engine.world(|world| world.streams_last = Some(Duration::ZERO)),
        Step::Unreadable => daemon.engine.send(Event::Unreadable),
        Step::Restart => {
            daemon.engine.go();
            daemon.settle().await;
            daemon.engine.come_back();
        }
        Step::Wait(ms) => tokio::time::sleep(Duration::from_millis(ms)).await,
        Step::Start { .. } | Step::Stop { .. } | Step::Remove(_) | Step::Order(_) => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn every_container_is_served_and_no_order_lost_once_the_engine_works(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(play(steps));
    }
}

/// The image of a container is read after the container has ended.
#[tokio::test(start_paused = true)]
async fn an_image_that_is_read_late_does_not_tell_whether_its_container_runs() {
    let (log, _guard) = Log::start();
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    daemon.engine.fail(&[Call::Image], Fails::Error);
    start(&daemon, 1);
    daemon.settle().await;
    daemon.kill(1);
    daemon.engine.send(Event::Died(id(1)));
    tokio::time::sleep(2 * SECOND).await;
    daemon.engine.heal();
    tokio::time::sleep(30 * SECOND).await;
    assert_eq!(daemon.index.failing(), None);
    assert_eq!(daemon.index.get(&id(1)).unwrap().no_life, None);
    assert_eq!(log.count("cannot be served"), 0, "{:?}", log.lines());
}

/// The answer to a list is older than the event that a container was removed.
#[tokio::test(start_paused = true)]
async fn an_answer_that_a_removal_has_overtaken_brings_no_container_back() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    for asks in [Event::Unreadable, Event::Defined(id(1))] {
        tokio::time::sleep(2 * SECOND).await;
        start(&daemon, 1);
        served_after(&daemon, &[1]).await;
        tokio::time::sleep(2 * SECOND).await;
        daemon.engine.send(asks.clone());
        // The answers take a millisecond each.
        tokio::time::sleep(Duration::from_micros(500)).await;
        daemon.kill(1);
        daemon.engine.world(|world| world.containers.remove(&id(1)));
        daemon.engine.send(Event::Removed(id(1)));
        tokio::time::sleep(10 * SECOND).await;
        assert!(daemon.index.get(&id(1)).is_none(), "{asks:?}");
    }
}
