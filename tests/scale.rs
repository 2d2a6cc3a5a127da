//! What ten thousand containers cost: `cargo test --release --test scale`. Figures of one run, beside each other; in bounds
//! that hold on a small machine. The engine answers at once, so that what is measured is ours.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use futures_util::FutureExt as _;
use futures_util::future::{self, BoxFuture};
use futures_util::stream::{BoxStream, StreamExt as _};
use imds_router::clock::Clock;
use imds_router::config::Settings;
use imds_router::containers::image_labels::{Image, ImageStore, InUse};
use imds_router::containers::index::{EngineState, Index};
use imds_router::containers::reconciler::{
    ContainerEngine, ContainerSummary, EngineError, Event, Events, Hold, Inspection, Instances, Kernel, Listed,
    Network, Ports, Reconciler, Run, RunStart,
};
use imds_router::containers::{
    CgroupId, ContainerId, Definition, Endpoint, Environment, NamespaceId, NetworkEndpoints, NetworkId, NetworkMode,
    RunHandle, SocketEvidence,
};
use imds_router::credentials::Session;
use imds_router::credentials::broker::{Broker, Lease, Limits};
use imds_router::credentials::offline::Offline;
use imds_router::instance::{Instance, RuntimeFacts, resolve_sparingly};
use imds_router::protocol::request::credentials_document;
use tokio::sync::{mpsc, watch};

const MANY: u32 = 10_000;
const FEW: u32 = 10;
/// Containers a network.
const TOGETHER: u32 = 10;
const ROLES: u32 = 100;

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        // What the program takes by itself, and what the first use of everything takes.
        let few = Host::start(FEW).await;
        let cost_with_few = few.cost_of_an_event(4_000).await;
        let before = resident();
        let many = Host::start(MANY).await;
        let memory = resident() - before;
        let cost_with_many = many.cost_of_an_event(4_000).await;
        println!(
            "{MANY} containers: synchronised in {:?}, {:.1} MB, {:.2} kB each",
            many.took,
            memory as f64 / 1e6,
            memory as f64 / f64::from(MANY) / 1e3
        );
        println!(
            "a container's whole life (6 events): {cost_with_many:?} of processor time among {MANY}, {cost_with_few:?} \
             among {FEW}: {:.2} times",
            cost_with_many.as_secs_f64() / cost_with_few.as_secs_f64()
        );
        assert!(many.took < Duration::from_secs(1), "synchronised in {:?}", many.took);
        assert!(memory < 40_000_000, "{memory} bytes");
        assert!(cost_with_many < cost_with_few * 3 / 2, "an event costs more among many");
    });
    println!("2 passed, 0 failed");
}

/// Resident memory, in bytes (proc_pid_status(5)).
fn resident() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

/// Processor time of this process.
fn processor() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap())
}

fn id(number: u32) -> ContainerId {
    // The number is in front: what is derived from an id looks there.
    ContainerId::parse(&format!("{number:08x}{}", "0".repeat(56))).unwrap()
}

fn network_of(number: u32) -> NetworkId {
    NetworkId::from(format!("net-{}", number / TOGETHER).as_str())
}

fn endpoint(number: u32) -> Endpoint {
    Endpoint {
        network: format!("net-{}", number / TOGETHER),
        mac: "02:42:0a:00:00:01".into(),
        ipv4: Some((Ipv4Addr::from(0x0a00_0000 + number + 1), 24)),
        ipv6: None,
        internal: false,
    }
}

/// Who runs: the containers up to a number, and one that comes and goes.
struct World {
    containers: u32,
    guest: bool,
    events: Option<mpsc::UnboundedSender<Event>>,
}

impl World {
    fn has(&self, number: u32) -> bool {
        number < self.containers || (self.guest && number == self.containers)
    }
}

#[derive(Clone)]
struct Scripted(Arc<Mutex<World>>);

impl Scripted {
    fn say<T: Send + 'static>(
        &self,
        answer: impl FnOnce(&mut World) -> T,
    ) -> BoxFuture<'static, Result<T, EngineError>> {
        future::ready(Ok(answer(&mut self.0.lock().unwrap()))).boxed()
    }

    fn row(&self, number: u32) -> ContainerSummary {
        ContainerSummary {
            id: id(number),
            name: format!("container-{number}"),
            labels: BTreeMap::from([("imds.role".to_owned(), format!("role-{}", number % ROLES))]),
            image: "app".into(),
            image_id: "sha256:1234".into(),
            image_is_certain: true,
            network_mode: NetworkMode::Own,
            running: true,
        }
    }
}

fn number_of(id: &ContainerId) -> u32 {
    u32::from_str_radix(&id.as_str()[..8], 16).unwrap()
}

impl ContainerEngine for Scripted {
    fn subscribe(&self) -> BoxFuture<'static, Result<Events, EngineError>> {
        self.say(|world| {
            let (sender, receiver) = mpsc::unbounded_channel();
            world.events = Some(sender);
            futures_util::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|event| (Ok(event), receiver))
            })
            .boxed()
        })
    }

    fn containers(&self) -> BoxFuture<'static, Result<Listed, EngineError>> {
        let this = self.clone();
        self.say(move |world| {
            let rows: Vec<_> = (0..world.containers).map(|number| this.row(number)).collect();
            rows.into()
        })
    }

    fn container(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<ContainerSummary>, EngineError>> {
        let (this, number) = (self.clone(), number_of(id));
        self.say(move |world| world.has(number).then(|| this.row(number)))
    }

    fn inspect(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<Inspection>, EngineError>> {
        let hostname = id.short().to_owned();
        self.say(|_| {
            Some(Inspection {
                hostname: Some(hostname),
                run: None,
                environment: Environment::default(),
            })
        })
    }

    fn image(&self, _: &str) -> BoxFuture<'static, Result<Option<Image>, EngineError>> {
        self.say(|_| Some(Image::default()))
    }

    fn networks(&self) -> BoxFuture<'static, Result<Vec<NetworkId>, EngineError>> {
        self.say(|world| {
            (0..world.containers)
                .step_by(TOGETHER as usize)
                .map(network_of)
                .collect()
        })
    }

    fn network(&self, network: &NetworkId) -> BoxFuture<'static, Result<Option<Network>, EngineError>> {
        let first: u32 = network.0.strip_prefix("net-").unwrap().parse::<u32>().unwrap() * TOGETHER;
        self.say(move |world| {
            let members = (first..first + TOGETHER).filter(|number| world.has(*number));
            Some(Network {
                subnets: vec![("10.0.0.0".parse().unwrap(), 8)],
                gateways: Vec::new(),
                endpoints: members.map(|number| (id(number), endpoint(number))).collect(),
            })
        })
    }

    fn stop(&self, id: &ContainerId) -> BoxFuture<'static, Result<(), EngineError>> {
        unreachable!("nobody is to stop {id}")
    }
}

struct Witnessed(NamespaceId);

impl ImageStore for Scripted {
    fn load(&self, _: &str) -> Option<Image> {
        None
    }

    fn store(&self, _: u64, _: &InUse) {}
}

impl Kernel for Scripted {
    fn run_start(&self, id: &ContainerId, _: Option<&Run>, _: Option<&NetworkMode>) -> Result<RunStart, String> {
        let number = number_of(id);
        let world = self.0.lock().unwrap();
        if !world.has(number) {
            return Err("not there yet".to_owned());
        }
        let cgroup = CgroupId(u64::from(number) + 10);
        Ok(RunStart {
            cgroup,
            pid: number,
            started: SystemTime::UNIX_EPOCH,
            handle: Arc::new(Witnessed(NamespaceId(cgroup.0))),
        })
    }
}

impl RunHandle for Witnessed {
    fn alive(&self) -> bool {
        true
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        // Lives that do not end by themselves: their end is no part of what is measured.
        Box::pin(future::pending())
    }

    fn socket(&self, _: SocketAddr, _: SocketAddr) -> std::io::Result<Option<SocketEvidence>> {
        Ok(None)
    }

    fn owns_cgroup(&self, _: CgroupId) -> std::io::Result<bool> {
        Ok(false)
    }

    fn namespace(&self) -> NamespaceId {
        self.0
    }

    fn is_attached(&self) -> bool {
        true
    }

    fn attach(&self) -> Result<Vec<String>, String> {
        Ok(Vec::new())
    }

    fn check_path(&self) -> Result<(), String> {
        Ok(())
    }

    fn detach(&self) -> Result<(), String> {
        Ok(())
    }
}

struct Resolver {
    settings: Arc<Settings>,
    facts: Arc<RuntimeFacts>,
    broker: Arc<Broker>,
}

struct Held(Lease);

impl Hold for Held {
    fn session(&self) -> &Arc<Session> {
        self.0.session()
    }

    fn started(&mut self) {}
}

impl Instances for Resolver {
    fn resolve(
        &self,
        container: &Arc<Definition>,
        attachments: &Arc<NetworkEndpoints>,
        started: SystemTime,
    ) -> Instance {
        resolve_sparingly(container, attachments, started, &self.settings, &self.facts)
    }

    fn hold(&self, session: &Arc<Session>) -> Box<dyn Hold> {
        Box::new(Held(self.broker.lease(session)))
    }

    fn attaches(&self) -> bool {
        false
    }

    fn image_labels_count(&self) -> bool {
        false
    }
}

/// A host with so many containers, synchronised.
struct Host {
    engine: Scripted,
    index: Arc<Index>,
    containers: u32,
    took: Duration,
    _changed: watch::Sender<u64>,
}

impl Host {
    async fn start(containers: u32) -> Self {
        let clock = Clock::system();
        let engine = Scripted(Arc::new(Mutex::new(World {
            containers,
            guest: false,
            events: None,
        })));
        let settings = Settings {
            account_id: Some("111122223333".into()),
            // Containers of one role share a session: what its credentials take is no part of what is measured.
            session_name: "app".into(),
            ..Settings::default()
        };
        let broker = Broker::new(
            Box::new(Offline::new(clock.clone())),
            credentials_document,
            clock.clone(),
            Limits::default(),
        );
        let (index, misses) = Index::new();
        let (changed, changes) = watch::channel(0);
        let ports = Ports {
            engine: Arc::new(engine.clone()),
            kernel: Arc::new(engine.clone()),
            instances: Arc::new(Resolver {
                settings: Arc::new(settings),
                facts: Arc::default(),
                broker,
            }),
            images: Arc::new(engine.clone()),
            changed: changes,
        };
        let started = Instant::now();
        tokio::spawn(Reconciler::new(ports, index.clone(), misses, clock).run());
        let mut changes = index.changes();
        while *index.engine() != EngineState::Synchronised {
            changes.changed().await.unwrap();
        }
        let took = started.elapsed();
        let host = Self {
            engine,
            index,
            containers,
            took,
            _changed: changed,
        };
        // Until every life is known and nothing is looked up any more, so that the memory is all of it.
        let mut before = Duration::ZERO;
        while host.index.all().iter().any(|record| record.life.is_none())
            || processor() - before > Duration::from_millis(20)
        {
            before = processor();
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        host
    }

    /// What one more container costs that comes, runs, and goes, in processor time: the least of several batches, since what
    /// a machine does beside only adds.
    async fn cost_of_an_event(&self, times: u32) -> Duration {
        const BATCHES: u32 = 8;
        let mut least = Duration::MAX;
        for _ in 0..BATCHES {
            least = least.min(self.batch(times / BATCHES).await);
        }
        least
    }

    async fn batch(&self, times: u32) -> Duration {
        let guest = id(self.containers);
        let network = network_of(self.containers);
        let tell = |event: Event| {
            let world = self.engine.0.lock().unwrap();
            world.events.as_ref().unwrap().send(event).unwrap();
        };
        let before = processor();
        for _ in 0..times {
            self.engine.0.lock().unwrap().guest = true;
            tell(Event::Defined(guest.clone()));
            tell(Event::Connected(network.clone(), Some(guest.clone())));
            tell(Event::Started(guest.clone()));
            self.until(|index| index.get(&guest).is_some_and(|record| record.life.is_some()))
                .await;
            self.engine.0.lock().unwrap().guest = false;
            tell(Event::Died(guest.clone()));
            tell(Event::Disconnected(network.clone()));
            tell(Event::Removed(guest.clone()));
            self.until(|index| index.get(&guest).is_none()).await;
        }
        (processor() - before) / times
    }

    async fn until(&self, so: impl Fn(&Index) -> bool) {
        let mut changes = self.index.changes();
        while !so(&self.index) {
            changes.changed().await.unwrap();
        }
    }
}
