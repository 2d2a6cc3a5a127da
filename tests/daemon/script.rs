//! A daemon in process: engine, kernel and STS as told, connections in memory, time that is paused.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU16, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::stream::StreamExt as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use imds_router::attribution::engine_attestor::EngineAttestor;
use imds_router::attribution::{AcceptedFrom, Connection};
use imds_router::clock::Clock;
use imds_router::config::{CredentialSource, Settings};
use imds_router::containers::image_labels::{Image, ImageStore, InUse};
use imds_router::containers::index::{EngineState, Index};
use imds_router::containers::reconciler::{
    ContainerEngine, ContainerSummary, EngineError, Event, Events, Hold, Inspection, Instances, Kernel, Listed,
    Network, Ports, Reconciler, Run, RunStart,
};
use imds_router::containers::{
    CgroupId, ContainerId, Definition, Endpoint, Environment, NamespaceId, NetworkEndpoints, NetworkId, NetworkMode,
    Open, RunHandle, SocketEvidence,
};
use imds_router::credentials::broker::{Broker, CredentialProvider, Lease, Limits, Provided, ProviderError};
use imds_router::credentials::{Credentials, RoleArn, Secret, Session};
use imds_router::instance::{At, Instance, Ordered, RuntimeFacts, resolve_sparingly};
use imds_router::metadata::identity_document::Signer;
use imds_router::orders::{RuntimeOverrides, StopScheduler};
use imds_router::protocol::request::credentials_document;
use imds_router::protocol::token::{TokenAuthority, TokenKey};
use imds_router::server::{self, Service};

use crate::conformance::Reply;

/// The host's own network namespace.
pub const HOST: NamespaceId = NamespaceId(1);
/// The gateway of every network.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 255, 255, 254);
/// The address of every namespace by which it masquerades what containers inside its container send.
pub const INNER: Ipv4Addr = Ipv4Addr::new(172, 17, 0, 2);
/// How long a container's init process exists before its first instruction, at least (Docker 20.10 to 28.5, measured).
pub const FIRST_INSTRUCTION: Duration = Duration::from_millis(135);
pub const WALL: Duration = Duration::from_secs(1_767_607_872);

/// An id made of a number. It is in front: what is derived from an id looks there.
pub fn id(number: u32) -> ContainerId {
    ContainerId::parse(&format!("{number:08x}{}", "0".repeat(56))).unwrap()
}

// ---- the engine

#[derive(Clone, Debug, Default)]
pub struct Container {
    pub labels: BTreeMap<String, String>,
    pub image_labels: BTreeMap<String, String>,
    /// `c` and its number, unless it is told.
    pub name: Option<String>,
    /// `NAME=value`
    pub environment: Vec<String>,
    pub image_environment: Vec<String>,
    /// The engine does not have the image any more.
    pub image_is_removed: bool,
    /// An inspect waits, as while a container starts.
    pub inspect_blocks: bool,
    pub running: bool,
    pub network_mode: NetworkMode,
}

#[derive(Default)]
pub struct World {
    /// Calls that fail, whatever they are about.
    pub failing: BTreeMap<Call, Fails>,
    /// Containers that cannot be described: all calls about one of them or its image fail, and lists do not describe them.
    pub undescribed: HashSet<ContainerId>,
    /// Containers whose images cannot be read.
    pub images_failing: BTreeMap<ContainerId, Fails>,
    /// How long a stream of events lasts.
    pub streams_last: Option<Duration>,
    /// Calls so far.
    pub calls: BTreeMap<Call, usize>,
    pub containers: BTreeMap<ContainerId, Container>,
    pub networks: BTreeMap<NetworkId, BTreeMap<ContainerId, Endpoint>>,
    pub away: bool,
    /// Questions about one container wait, as Podman has them wait while it starts.
    pub container_blocks: bool,
    /// Who was stopped, in this order.
    pub stopped: Vec<ContainerId>,
    /// Images that daemons have stored.
    pub stored_images: BTreeMap<String, Arc<Image>>,
    events: Vec<mpsc::UnboundedSender<Result<Event, EngineError>>>,
    /// Events that must be lost, doubled or delayed are sent by the test itself.
    pub lookups: usize,
}

/// A call to the engine.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Call {
    Subscribe,
    Containers,
    Container,
    Inspect,
    Image,
    Networks,
    Network,
    Stop,
}

/// How a call fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fails {
    /// The engine answers with an error, or with something that is not JSON.
    Error,
    /// It never answers.
    Silent,
    /// It answers, but the list may lack containers: some of its rows have no ID. The rows of all others are missing.
    Incomplete,
}

/// An engine as told. Every answer takes a millisecond, and is what was so when it was asked for: an event may overtake it.
#[derive(Clone, Default)]
pub struct ScriptedEngine(pub Arc<Mutex<World>>);

impl ScriptedEngine {
    pub fn world<T>(&self, change: impl FnOnce(&mut World) -> T) -> T {
        change(&mut self.0.lock().unwrap())
    }

    pub fn send(&self, event: Event) {
        self.world(|world| {
            // Without a subscriber the event is lost, as on a real engine.
            world.events.retain(|events| events.send(Ok(event.clone())).is_ok());
        });
    }

    /// The stream of events breaks.
    pub fn break_stream(&self) {
        self.world(|world| {
            for events in world.events.drain(..) {
                // A subscriber that has left needs no error.
                let _ = events.send(Err(EngineError("garbled".to_owned())));
            }
        });
    }

    /// These calls fail from now on.
    pub fn fail(&self, calls: &[Call], how: Fails) {
        self.world(|world| world.failing.extend(calls.iter().map(|call| (*call, how))));
    }

    /// No call fails any more.
    pub fn heal(&self) {
        self.world(|world| {
            world.failing.clear();
            world.undescribed.clear();
            world.images_failing.clear();
            world.streams_last = None;
        });
    }

    /// The engine goes away; whoever listens sees the stream end.
    pub fn go(&self) {
        self.world(|world| (world.away, world.events) = (true, Vec::new()));
    }

    pub fn come_back(&self) {
        self.world(|world| world.away = false);
    }

    fn ask<T: Send + 'static>(
        &self,
        call: Call,
        about: Option<ContainerId>,
        answer: impl FnOnce(&mut World) -> T + Send + 'static,
    ) -> BoxFuture<'static, Result<T, EngineError>> {
        let this = self.clone();
        async move {
            let answer = this.world(|world| {
                world.lookups += 1;
                *world.calls.entry(call).or_default() += 1;
                let is_undescribed = about.as_ref().is_some_and(|id| world.undescribed.contains(id));
                let of_image = about.filter(|_| call == Call::Image);
                let of_image = of_image.and_then(|id| world.images_failing.get(&id));
                match world.failing.get(&call).or(of_image) {
                    _ if world.away => Err(EngineError("away".into())),
                    Some(Fails::Silent) => Ok(None),
                    Some(Fails::Error) => Err(EngineError("status 500: scripted".into())),
                    _ if is_undescribed => Err(EngineError("status 500: undescribed".into())),
                    _ => Ok(Some(answer(world))),
                }
            });
            let answer = match answer {
                Ok(Some(answer)) => Ok(answer),
                Ok(None) => std::future::pending().await,
                Err(error) => Err(error),
            };
            tokio::time::sleep(Duration::from_millis(1)).await;
            answer
        }
        .boxed()
    }
}

/// The store of images outlives the daemon, as the engine does.
impl ImageStore for ScriptedEngine {
    fn load(&self, id: &str) -> Option<Image> {
        self.world(|world| world.stored_images.get(id).map(|image| Image::clone(image)))
    }

    fn store(&self, _version: u64, images: &InUse) {
        let stored = |world: &mut World| {
            world.stored_images.retain(|id, _| images.contains_key(id));
            let read = images
                .iter()
                .filter_map(|(id, image)| Some((id.clone(), image.clone()?)));
            world.stored_images.extend(read);
        };
        self.world(stored);
    }
}

fn row(id: &ContainerId, container: &Container) -> ContainerSummary {
    let mut labels = container.image_labels.clone();
    labels.extend(container.labels.clone());
    ContainerSummary {
        id: id.clone(),
        name: match &container.name {
            Some(name) => name.clone(),
            None => format!("c{}", id.as_str()[..8].trim_start_matches('0')),
        },
        labels,
        image: "box".into(),
        image_id: format!("sha256:{}", id.as_str()),
        image_is_certain: true,
        network_mode: container.network_mode.clone(),
        running: container.running,
    }
}

impl ContainerEngine for ScriptedEngine {
    fn subscribe(&self) -> BoxFuture<'static, Result<Events, EngineError>> {
        self.ask(Call::Subscribe, None, |world| {
            let (sender, receiver) = mpsc::unbounded_channel();
            world.events.push(sender);
            let events = futures_util::stream::unfold(receiver, |mut receiver| async move {
                receiver.recv().await.map(|event| (event, receiver))
            });
            match world.streams_last {
                Some(time) => events.take_until(tokio::time::sleep(time)).boxed(),
                None => events.boxed(),
            }
        })
    }

    fn containers(&self) -> BoxFuture<'static, Result<Listed, EngineError>> {
        self.ask(Call::Containers, None, |world| {
            if world.failing.contains_key(&Call::Containers) {
                return Listed {
                    incomplete: Some(EngineError("a row has no ID".to_owned())),
                    ..Listed::default()
                };
            }
            let is_described = |id: &ContainerId| !world.undescribed.contains(id);
            let described = world.containers.iter().filter(|(id, _)| is_described(id));
            let others = world.containers.keys().filter(|id| !is_described(id));
            Listed {
                rows: described.map(|(id, container)| row(id, container)).collect(),
                undescribed: others
                    .map(|id| (id.clone(), EngineError("undescribed".to_owned())))
                    .collect(),
                incomplete: None,
            }
        })
    }

    fn container(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<ContainerSummary>, EngineError>> {
        let (this, id) = (self.clone(), id.clone());
        async move {
            while this.world(|world| world.container_blocks) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let row = this.ask(Call::Container, Some(id.clone()), move |world| {
                world.containers.get(&id).map(|container| row(&id, container))
            });
            row.await
        }
        .boxed()
    }

    fn inspect(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<Inspection>, EngineError>> {
        let (this, id) = (self.clone(), id.clone());
        async move {
            while this.world(|world| world.containers.get(&id).is_some_and(|it| it.inspect_blocks)) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            let inspect = this.ask(Call::Inspect, Some(id.clone()), move |world| {
                world.containers.get(&id).map(|container| Inspection {
                    hostname: Some(id.short().to_owned()),
                    run: container.running.then(|| Run {
                        pid: 1,
                        started: String::new(),
                    }),
                    environment: Environment::of(container.image_environment.iter().chain(&container.environment)),
                })
            });
            inspect.await
        }
        .boxed()
    }

    fn image(&self, id: &str) -> BoxFuture<'static, Result<Option<Image>, EngineError>> {
        let id = ContainerId::parse(id.trim_start_matches("sha256:")).unwrap();
        self.ask(Call::Image, Some(id.clone()), move |world| {
            let image = world
                .containers
                .get(&id)
                .filter(|container| !container.image_is_removed);
            image.map(|container| Image {
                labels: container.image_labels.clone(),
                environment: Environment::of(&container.image_environment),
            })
        })
    }

    fn networks(&self) -> BoxFuture<'static, Result<Vec<NetworkId>, EngineError>> {
        self.ask(Call::Networks, None, |world| world.networks.keys().cloned().collect())
    }

    fn network(&self, id: &NetworkId) -> BoxFuture<'static, Result<Option<Network>, EngineError>> {
        let id = id.clone();
        self.ask(Call::Network, None, move |world| {
            let endpoints = world.networks.get(&id)?.clone();
            Some(Network {
                subnets: vec![("10.0.0.0".parse().unwrap(), 8)],
                gateways: vec![GATEWAY.into()],
                endpoints,
            })
        })
    }

    fn stop(&self, id: &ContainerId) -> BoxFuture<'static, Result<(), EngineError>> {
        let id = id.clone();
        self.ask(Call::Stop, None, move |world| world.stopped.push(id))
    }
}

// ---- the kernel

/// A socket of `cgroup` that has opened its connection.
pub fn connected(cgroup: CgroupId) -> SocketEvidence {
    SocketEvidence {
        state: 1,
        cgroup,
        cookie: 4711,
        open: Open::Active,
        listener: false,
    }
}

#[derive(Default)]
struct Lives {
    lives: HashMap<ContainerId, (CgroupId, NamespaceId, watch::Sender<bool>)>,
    /// Sockets, by the life in whose namespace they are.
    sockets: HashMap<(CgroupId, SocketAddr), SocketEvidence>,
    /// Namespaces with a link to the service.
    attached: HashSet<NamespaceId>,
    /// Why no link can be made.
    attach_error: Option<String>,
    /// Cgroups that lie below that of a life.
    below: HashSet<(CgroupId, CgroupId)>,
    /// State and cookie of sockets that change between two queries, after the change.
    changed: HashMap<(CgroupId, SocketAddr), (u8, u64)>,
    /// A container that ends while the kernel is asked about a socket.
    ends_when_asked: Option<ContainerId>,
    next: u64,
}

#[derive(Clone, Default)]
pub struct ScriptedKernel(Arc<Mutex<Lives>>);

impl ScriptedKernel {
    /// A container's first process starts, in a network namespace of its own; a former one has ended.
    pub fn start(&self, id: &ContainerId) -> CgroupId {
        self.start_in(id, &NetworkMode::Own)
    }

    /// The same, in whose network namespace.
    pub fn start_in(&self, id: &ContainerId, mode: &NetworkMode) -> CgroupId {
        self.end(id);
        let mut lives = self.0.lock().unwrap();
        lives.next += 1;
        let cgroup = CgroupId(1_000 + lives.next);
        let namespace = match mode {
            NetworkMode::Own => NamespaceId(cgroup.0),
            NetworkMode::Host => HOST,
            NetworkMode::Container(owner) => lives.lives[owner].1,
        };
        lives
            .lives
            .insert(id.clone(), (cgroup, namespace, watch::Sender::new(true)));
        cgroup
    }

    pub fn end(&self, id: &ContainerId) {
        if let Some((_, _, alive)) = self.0.lock().unwrap().lives.remove(id) {
            alive.send_replace(false);
        }
    }

    pub fn alive(&self, id: &ContainerId) -> Option<CgroupId> {
        self.0.lock().unwrap().lives.get(id).map(|(cgroup, ..)| *cgroup)
    }

    /// Puts a socket into the namespace of a life.
    pub fn socket(&self, namespace: CgroupId, client: SocketAddr, evidence: SocketEvidence) {
        self.0.lock().unwrap().sockets.insert((namespace, client), evidence);
    }
}

impl ScriptedKernel {
    /// A socket has another state and cookie when the kernel is queried again.
    pub fn socket_changes(&self, namespace: CgroupId, client: SocketAddr, (state, cookie): (u8, u64)) {
        let mut lives = self.0.lock().unwrap();
        lives.changed.insert((namespace, client), (state, cookie));
    }

    /// From now on `inner` lies below the cgroup of a life.
    pub fn nest(&self, outer: CgroupId, inner: CgroupId) {
        self.0.lock().unwrap().below.insert((outer, inner));
    }

    /// The container ends while the kernel is asked about a socket the next time.
    pub fn end_when_asked(&self, id: ContainerId) {
        self.0.lock().unwrap().ends_when_asked = Some(id);
    }

    /// Whether links can be made from now on, or why not.
    pub fn fail_to_attach(&self, why: Option<&str>) {
        self.0.lock().unwrap().attach_error = why.map(str::to_owned);
    }

    pub fn is_attached(&self, namespace: NamespaceId) -> bool {
        self.0.lock().unwrap().attached.contains(&namespace)
    }

    /// The namespace of a container that runs.
    pub fn namespace(&self, id: &ContainerId) -> Option<NamespaceId> {
        self.0.lock().unwrap().lives.get(id).map(|(_, namespace, _)| *namespace)
    }
}

struct ScriptedWitness {
    lives: Arc<Mutex<Lives>>,
    cgroup: CgroupId,
    namespace: NamespaceId,
    alive: watch::Receiver<bool>,
}

impl Kernel for ScriptedKernel {
    fn run_start(&self, id: &ContainerId, _run: Option<&Run>, mode: Option<&NetworkMode>) -> Result<RunStart, String> {
        let lives = self.0.lock().unwrap();
        let (cgroup, namespace, alive) = lives.lives.get(id).ok_or("not there yet")?;
        if *namespace == HOST && mode != Some(&NetworkMode::Host) {
            return Err("its first process is in the host's network namespace".to_owned());
        }
        let handle = ScriptedWitness {
            lives: self.0.clone(),
            cgroup: *cgroup,
            namespace: *namespace,
            alive: alive.subscribe(),
        };
        Ok(RunStart {
            cgroup: *cgroup,
            pid: 1,
            started: UNIX_EPOCH + WALL,
            handle: Arc::new(handle),
        })
    }
}

impl RunHandle for ScriptedWitness {
    fn alive(&self) -> bool {
        *self.alive.borrow()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut alive = self.alive.clone();
        Box::pin(async move {
            let _ = alive.wait_for(|alive| !alive).await;
        })
    }

    fn socket(&self, client: SocketAddr, _server: SocketAddr) -> std::io::Result<Option<SocketEvidence>> {
        let mut lives = self.lives.lock().unwrap();
        if let Some(ending) = lives.ends_when_asked.take()
            && let Some((_, _, alive)) = lives.lives.remove(&ending)
        {
            alive.send_replace(false);
        }
        Ok(lives.sockets.get(&(CgroupId(self.namespace.0), client)).copied())
    }

    fn socket_now(&self, client: SocketAddr, server: SocketAddr) -> std::io::Result<Option<(u8, u64)>> {
        let key = (CgroupId(self.namespace.0), client);
        if let Some(changed) = self.lives.lock().unwrap().changed.get(&key) {
            return Ok(Some(*changed));
        }
        let socket = self.socket(client, server)?;
        Ok(socket.map(|socket| (socket.state, socket.cookie)))
    }

    fn owns_cgroup(&self, cgroup: CgroupId) -> std::io::Result<bool> {
        Ok(self.cgroup == cgroup || self.lives.lock().unwrap().below.contains(&(self.cgroup, cgroup)))
    }

    fn namespace(&self) -> NamespaceId {
        self.namespace
    }

    fn is_local(&self, address: std::net::IpAddr) -> std::io::Result<bool> {
        Ok(address == INNER)
    }

    fn is_attached(&self) -> bool {
        self.lives.lock().unwrap().attached.contains(&self.namespace)
    }

    fn attach(&self) -> Result<Vec<String>, String> {
        let mut lives = self.lives.lock().unwrap();
        if let Some(why) = &lives.attach_error {
            return Err(why.clone());
        }
        lives.attached.insert(self.namespace);
        Ok(Vec::new())
    }

    fn detach(&self) -> Result<(), String> {
        self.lives.lock().unwrap().attached.remove(&self.namespace);
        Ok(())
    }

    fn check_path(&self) -> Result<(), String> {
        Ok(())
    }
}

// ---- STS

type Answers = VecDeque<(Duration, Result<(), ProviderError>)>;

/// STS as told: how long each call takes and what it says; the last answer repeats.
#[derive(Clone)]
pub struct ScriptedSts {
    clock: Clock,
    pub calls: Arc<AtomicUsize>,
    answers: Arc<Mutex<Answers>>,
}

impl ScriptedSts {
    pub fn say(&self, answers: &[(u64, Result<(), ProviderError>)]) {
        let answers = answers
            .iter()
            .map(|(ms, answer)| (Duration::from_millis(*ms), answer.clone()));
        *self.answers.lock().unwrap() = answers.collect();
    }
}

/// What is secret in a scripted answer: the tests look for it where it must not be.
pub const SECRET: &str = "wJalrXUtnFEMI/scripted-secret";
pub const SESSION_TOKEN: &str = "IQoJb3JpZ2luX2VjE/scripted-token";

impl CredentialProvider for ScriptedSts {
    fn credentials(&self, session: &Session) -> Provided {
        let call = self.calls.fetch_add(1, Ordering::Relaxed);
        let mut answers = self.answers.lock().unwrap();
        let (pause, answer) = if answers.len() > 1 {
            answers.pop_front().unwrap()
        } else {
            answers[0].clone()
        };
        let (clock, session) = (self.clock.clone(), session.clone());
        Box::pin(async move {
            tokio::time::sleep(pause).await;
            answer.map(|()| Credentials {
                access_key_id: format!("ASIA{:016}", call),
                // Names the role, so that a test sees whose credentials an answer holds.
                secret_access_key: Secret::new(format!("{SECRET}/{}", session.role().map_or("none", RoleArn::name))),
                token: Secret::new(SESSION_TOKEN),
                updated: clock.wall(),
                expiration: clock.wall() + session.duration(),
                fake: false,
            })
        })
    }
}

// ---- the daemon

struct Resolver {
    settings: Arc<Mutex<Settings>>,
    of_host: Arc<Mutex<Arc<BTreeMap<String, String>>>>,
    broker: Arc<Broker>,
    orders: Arc<RuntimeOverrides>,
    clock: Clock,
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
        let facts = RuntimeFacts {
            host: "h".into(),
            instance: self.of_host.lock().unwrap().clone(),
            ..RuntimeFacts::default()
        };
        let at = At {
            started,
            now: self.clock.wall(),
            ordered: self.orders.of(&container.id).unwrap_or_default(),
        };
        let settings = Arc::new(self.settings.lock().unwrap().clone());
        resolve_sparingly(container, attachments, at, &settings, &Arc::new(facts))
    }

    fn hold(&self, session: &Arc<Session>) -> Box<dyn Hold> {
        Box::new(Held(self.broker.lease(session)))
    }

    fn attaches(&self) -> bool {
        true
    }

    fn image_labels_count(&self) -> bool {
        self.settings.lock().unwrap().image_labels
    }
}

pub struct Daemon {
    pub engine: ScriptedEngine,
    pub kernel: ScriptedKernel,
    pub sts: ScriptedSts,
    pub index: Arc<Index>,
    pub service: Arc<Service>,
    pub clock: Clock,
    /// Wakes the watcher as changed settings do.
    pub changed: watch::Sender<u64>,
    pub orders: Arc<RuntimeOverrides>,
    settings: Arc<Mutex<Settings>>,
    of_host: Arc<Mutex<Arc<BTreeMap<String, String>>>>,
    next_port: AtomicU16,
    next_address: AtomicU64,
    _tasks: [tokio::task::JoinHandle<()>; 3],
}

/// One key for all daemons: making one takes a while.
fn signer() -> Arc<Signer> {
    static SIGNER: OnceLock<Arc<Signer>> = OnceLock::new();
    let make = || Arc::new(Signer::new(&Signer::generate().unwrap()).unwrap());
    SIGNER.get_or_init(make).clone()
}

pub fn settings() -> Settings {
    Settings {
        account_id: Some("111122223333".into()),
        region: Some("eu-west-1".into()),
        source: CredentialSource::Sts,
        ..Settings::default()
    }
}

impl Daemon {
    /// A daemon whose engine is there. Must be called with time paused.
    pub fn start(settings: Settings) -> Self {
        Self::start_with(settings, ScriptedEngine::default(), ScriptedKernel::default())
    }

    /// Another daemon over the same engine and kernel: as after a restart.
    pub fn start_with(settings: Settings, engine: ScriptedEngine, kernel: ScriptedKernel) -> Self {
        let watched = Arc::new(kernel.clone());
        Self::start_watching(settings, engine, kernel, watched, Clock::scripted(UNIX_EPOCH + WALL))
    }

    /// A daemon that cannot ask the kernel: `[serve] proof = "address"`.
    pub fn start_by_address(settings: Settings) -> Self {
        let clock = Clock::scripted(UNIX_EPOCH + WALL);
        let (engine, kernel) = (ScriptedEngine::default(), ScriptedKernel::default());
        let watched = Arc::new(EngineAttestor::new(clock.clone()));
        Self::start_watching(settings, engine, kernel, watched, clock)
    }

    fn start_watching(
        settings: Settings,
        engine: ScriptedEngine,
        kernel: ScriptedKernel,
        watched: Arc<dyn Kernel>,
        clock: Clock,
    ) -> Self {
        let sts = ScriptedSts {
            clock: clock.clone(),
            calls: Arc::default(),
            answers: Arc::new(Mutex::new([(Duration::from_millis(100), Ok(()))].into())),
        };
        let broker = Broker::new(
            Box::new(sts.clone()),
            credentials_document,
            clock.clone(),
            Limits::default(),
        );
        let (index, misses) = Index::new();
        let tokens = TokenAuthority::new(&TokenKey([7; 32]), "boot", clock.clone());
        let options = server::Options {
            hold: settings.max_wait,
            hosts: settings.hosts.clone(),
            ec2_error_documents: settings.ec2_error_documents,
        };
        let orders = Arc::new(RuntimeOverrides::new(&[], Box::new(|_| Ok(()))).unwrap());
        let (changed, changes) = watch::channel(0);
        let settings = Arc::new(Mutex::new(settings));
        let of_host = Arc::new(Mutex::new(Arc::default()));
        let ports = Ports {
            engine: Arc::new(engine.clone()),
            kernel: watched,
            instances: Arc::new(Resolver {
                settings: settings.clone(),
                of_host: of_host.clone(),
                broker: broker.clone(),
                orders: orders.clone(),
                clock: clock.clone(),
            }),
            images: Arc::new(engine.clone()),
            changed: changes.clone(),
        };
        let permits = settings.clone();
        let stops = StopScheduler {
            orders: orders.clone(),
            index: index.clone(),
            engine: Arc::new(engine.clone()),
            clock: clock.clone(),
            changed: changes,
            permitted: Box::new(move || permits.lock().unwrap().triggers_may_stop),
        };
        let watcher = Reconciler::new(ports, index.clone(), misses, clock.clone());
        let clocks = tokio::spawn(broker.clone().watch_clocks());
        Self {
            engine,
            kernel,
            sts,
            service: Service::new(index.clone(), broker, (tokens, signer()), clock.clone(), options),
            index,
            clock,
            changed,
            orders,
            settings,
            of_host,
            next_port: AtomicU16::new(40_000),
            next_address: AtomicU64::new(0),
            _tasks: [tokio::spawn(watcher.run()), clocks, tokio::spawn(stops.run())],
        }
    }

    /// Other settings from now on, as after a reload.
    pub fn configure(&self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings.lock().unwrap());
        self.changed.send_modify(|version| *version += 1);
    }

    /// What EC2 says of the host, from now on.
    pub fn host_is(&self, instance: BTreeMap<String, String>) {
        *self.of_host.lock().unwrap() = Arc::new(instance);
        self.changed.send_modify(|version| *version += 1);
    }

    /// Orders something for a container, as the operator does. Orders for containers that are gone are forgotten.
    pub fn order(&self, number: u32, change: impl FnOnce(&mut Ordered)) {
        let exists = |id: &ContainerId| !self.index.is_gone(id);
        self.orders.order(&id(number), exists, change).unwrap();
        self.changed.send_modify(|version| *version += 1);
    }

    /// Waits until everything that the engine knows is known.
    pub async fn synchronised(&self) {
        let mut changes = self.index.changes();
        while *self.index.engine() != EngineState::Synchronised {
            changes.changed().await.unwrap();
        }
    }

    /// Waits until what is going on has come to rest.
    pub async fn settle(&self) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    /// Runs a container on network `n`, with the events in Docker's order; answers its address.
    pub async fn run(&self, number: u32, labels: &[(&str, &str)]) -> SocketAddr {
        let address = self.create(number, labels);
        self.boot(number, address);
        self.settle().await;
        address
    }

    /// `create`: the container is known, with its labels. Answers the address that it will have.
    pub fn create(&self, number: u32, labels: &[(&str, &str)]) -> SocketAddr {
        self.create_in(number, labels, NetworkMode::Own)
    }

    /// The same, in whose network namespace.
    pub fn create_in(&self, number: u32, labels: &[(&str, &str)], network_mode: NetworkMode) -> SocketAddr {
        let labels = labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let container = Container {
            labels,
            network_mode,
            ..Container::default()
        };
        self.engine
            .world(|world| world.containers.insert(id(number), container));
        self.engine.send(Event::Defined(id(number)));
        let last = u8::try_from(self.next_address.fetch_add(1, Ordering::Relaxed) % 250 + 1).unwrap();
        SocketAddr::from(([10, 0, 0, last], 0))
    }

    /// `network connect`, first process, `start`.
    pub fn boot(&self, number: u32, address: SocketAddr) {
        let network = NetworkId::from("n");
        self.engine.world(|world| {
            world
                .networks
                .entry(network.clone())
                .or_default()
                .insert(id(number), endpoint(address));
            world.containers.get_mut(&id(number)).unwrap().running = true;
        });
        self.engine.send(Event::Connected(network, Some(id(number))));
        self.kernel.start(&id(number));
        self.engine.send(Event::Started(id(number)));
    }

    /// The container ends, as the kernel says; the engine tells later, or never.
    pub fn kill(&self, number: u32) {
        self.kernel.end(&id(number));
        self.engine.world(|world| {
            if let Some(container) = world.containers.get_mut(&id(number)) {
                container.running = false;
            }
            world
                .networks
                .values_mut()
                .for_each(|network| drop(network.remove(&id(number))));
        });
    }

    /// A connection that container `number` really makes from `address`. Its first instruction comes [`FIRST_INSTRUCTION`]
    /// after its init process; by then it has its link, if it gets one.
    pub fn connect(&self, number: u32, address: SocketAddr) -> Client {
        let client = self.open_socket(number, address);
        let namespace = self.kernel.namespace(&id(number)).expect("it runs");
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let (kernel, service) = (self.kernel.clone(), self.service.clone());
        tokio::spawn(async move {
            let linked = async {
                while !kernel.is_attached(namespace) {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            let linked = tokio::time::timeout(FIRST_INSTRUCTION, linked).await;
            let via = linked.map_or(AcceptedFrom::Bridge(5), |()| AcceptedFrom::Namespace(namespace));
            server::serve(theirs, connection(client, via), service).await;
        });
        Client::over(ours)
    }

    /// Where the connections of a container come in.
    pub fn way_of(&self, number: u32) -> AcceptedFrom {
        let namespace = self.kernel.namespace(&id(number)).expect("it runs");
        match self.kernel.is_attached(namespace) {
            true => AcceptedFrom::Namespace(namespace),
            false => AcceptedFrom::Bridge(5),
        }
    }

    /// The same over TCP on the loopback interface. Time must not be paused: it would run ahead of the kernel.
    pub async fn connect_tcp(&self, number: u32, address: SocketAddr) -> TcpStream {
        let client = self.open_socket(number, address);
        self.tcp_via(client, self.way_of(number)).await
    }

    /// A TCP connection that arrives from `client` over a bridge, whoever made it.
    pub async fn tcp_from(&self, client: SocketAddr) -> TcpStream {
        self.tcp_via(client, AcceptedFrom::Bridge(5)).await
    }

    async fn tcp_via(&self, client: SocketAddr, via: AcceptedFrom) -> TcpStream {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        tokio::spawn(server::serve(accepted, connection(client, via), self.service.clone()));
        stream
    }

    /// A socket of container `number` in the scripted kernel. Returns its address.
    fn open_socket(&self, number: u32, address: SocketAddr) -> SocketAddr {
        let cgroup = self.kernel.alive(&id(number)).expect("it runs");
        let client = self.client(address);
        let namespace = self.kernel.namespace(&id(number)).expect("it runs");
        self.kernel.socket(CgroupId(namespace.0), client, connected(cgroup));
        client
    }

    /// A source of its own for one connection.
    pub fn client(&self, address: SocketAddr) -> SocketAddr {
        SocketAddr::new(address.ip(), self.next_port.fetch_add(1, Ordering::Relaxed))
    }

    /// A connection that arrives from `client`, whoever made it.
    pub fn dial(&self, client: SocketAddr) -> Client {
        self.dial_via(client, AcceptedFrom::Bridge(5))
    }

    /// The same, accepted elsewhere.
    pub fn dial_via(&self, client: SocketAddr, via: AcceptedFrom) -> Client {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        tokio::spawn(server::serve(theirs, connection(client, via), self.service.clone()));
        Client::over(ours)
    }

    /// The same over the link of a namespace whose containers inside containers count as it.
    pub fn dial_nested(&self, client: SocketAddr, namespace: NamespaceId) -> Client {
        let (ours, theirs) = tokio::io::duplex(64 * 1024);
        let connection = Connection {
            nested: true,
            ..connection(client, AcceptedFrom::Namespace(namespace))
        };
        tokio::spawn(server::serve(theirs, connection, self.service.clone()));
        Client::over(ours)
    }
}

fn connection(client: SocketAddr, via: AcceptedFrom) -> Connection {
    Connection {
        client,
        server: "169.254.169.254:80".parse().unwrap(),
        via,
        nested: false,
    }
}

pub fn endpoint(address: SocketAddr) -> Endpoint {
    let std::net::IpAddr::V4(v4) = address.ip() else {
        panic!("IPv4")
    };
    Endpoint {
        network: "n".into(),
        mac: "02:42:0a:00:00:01".into(),
        ipv4: Some((v4, 8)),
        ipv6: None,
        internal: false,
    }
}

/// One connection, spoken by hand. As most clients of EC2 it does not ask for keep-alive, unless it is told to.
pub struct Client<S = DuplexStream> {
    pub stream: S,
    keep_alive: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub fn over(stream: S) -> Self {
        Self {
            stream,
            keep_alive: false,
        }
    }

    /// Asks for keep-alive with each request.
    pub fn keep_alive(self) -> Self {
        Self {
            keep_alive: true,
            ..self
        }
    }

    /// Sends bytes as they are.
    pub async fn write(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).await.unwrap();
    }

    /// Sends a request and reads its answer. `None`: the connection ended without one.
    pub async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)]) -> Option<Reply> {
        let mut request = format!("{method} {path} HTTP/1.1\r\n");
        if !headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("host")) {
            request.push_str("Host: 169.254.169.254\r\n");
        }
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        if self.keep_alive {
            request.push_str("Connection: keep-alive\r\n");
        }
        request.push_str("\r\n");
        self.stream.write_all(request.as_bytes()).await.ok()?;
        self.answer(method).await
    }

    /// Reads the answer to a request.
    pub async fn answer(&mut self, method: &str) -> Option<Reply> {
        let mut bytes = Vec::new();
        let head = loop {
            if let Some(end) = bytes.windows(4).position(|it| it == b"\r\n\r\n") {
                break end;
            }
            if self.stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let text = String::from_utf8(bytes[..head].to_vec()).unwrap();
        let mut lines = text.lines();
        let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
        let headers: Vec<(String, String)> = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        let length = headers.iter().find(|(name, _)| name == "content-length");
        let length = if method == "HEAD" {
            0
        } else {
            length.map_or(0, |(_, value)| value.parse().unwrap())
        };
        let mut body = bytes.split_off(head + 4);
        while body.len() < length {
            if self.stream.read_buf(&mut body).await.ok()? == 0 {
                return None;
            }
        }
        Some(Reply { status, headers, body })
    }

    pub async fn get(&mut self, path: &str) -> Option<Reply> {
        self.send("GET", path, &[]).await
    }

    pub async fn token(&mut self, ttl: u32) -> String {
        let ttl = ttl.to_string();
        let headers = [("x-aws-ec2-metadata-token-ttl-seconds", ttl.as_str())];
        let reply = self.send("PUT", "/latest/api/token", &headers).await.expect("a token");
        assert_eq!(reply.status, 200, "{reply:?}");
        reply.text()
    }

    /// Whether the other side has closed.
    pub async fn closed(&mut self) -> bool {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(10), self.stream.read(&mut byte)).await;
        matches!(read, Ok(Ok(0) | Err(_)))
    }
}
