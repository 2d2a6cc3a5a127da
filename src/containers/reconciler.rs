//! Engine events → [`Index`].
//!
//! One task, the one writer. Events are hints: they say *what to look at*, never what is so. The engine proposes names,
//! labels and addresses; the kernel alone begins and ends lives. After every loss of the engine everything is asked again
//! and what the answer does not hold is forgotten.
//!
//! Per subject (a container, a network …) at most one look-up is in flight, and one that was overtaken by an event is
//! made again: no answer can be older than the last event for long. One that fails is repeated until it is answered.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::net::IpAddr;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, FuturesUnordered, StreamExt as _};
use futures_util::{FutureExt as _, future};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::failures::Failures;
use super::image_labels::{Image, ImageStore, Images, InUse};
use super::index::{EngineState, Index, Miss};
use super::label_sources::Pairs;
use super::lookups::{self, Lookup, LookupKey, LookupResult, ReadRow, ReadRows};
use super::subscription::Subscription;
use super::{
    CgroupId, ContainerId, ContainerRun, Definition, Endpoint, Environment, LastRequest, NetworkEndpoints, NetworkId,
    NetworkMode, Record, RunHandle, compose,
};
use crate::clock::Clock;
use crate::credentials::Session;
use crate::instance::{Instance, Role};

/// What an engine can be asked. Implemented by [`super::docker`] and by a script in tests.
pub trait ContainerEngine: Send + Sync + 'static {
    /// Connects, and streams events from now on. A stream that ends, or has an error, means that events may have been lost.
    fn subscribe(&self) -> BoxFuture<'static, Result<Events, EngineError>>;
    /// Whether it announces a container only after its first instruction, as Podman does. Known once it has listed containers.
    fn announces_late(&self) -> bool {
        false
    }
    /// All containers, whatever their state.
    fn containers(&self) -> BoxFuture<'static, Result<Listed, EngineError>>;
    /// One container, by its row of the list: does not block while it starts.
    fn container(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<ContainerSummary>, EngineError>>;
    /// What only an inspect tells; blocks while the container starts, so nothing waits for it.
    fn inspect(&self, id: &ContainerId) -> BoxFuture<'static, Result<Option<Inspection>, EngineError>>;
    /// What an image brings. `None`: it cannot be read any more.
    fn image(&self, id: &str) -> BoxFuture<'static, Result<Option<Image>, EngineError>>;
    /// All networks.
    fn networks(&self) -> BoxFuture<'static, Result<Vec<NetworkId>, EngineError>>;
    /// One network and who is on it.
    fn network(&self, id: &NetworkId) -> BoxFuture<'static, Result<Option<Network>, EngineError>>;
    /// Stops a container, and waits until it has ended. One that has ended, or is no more, is stopped. The only thing that is
    /// ever changed through an engine.
    fn stop(&self, id: &ContainerId) -> BoxFuture<'static, Result<(), EngineError>>;
}

/// The events of an engine.
pub type Events = BoxStream<'static, Result<Event, EngineError>>;

/// Why the engine did not answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct EngineError(pub String);

/// Something happened: look there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// A container was created, renamed or changed.
    Defined(ContainerId),
    /// A container started.
    Started(ContainerId),
    /// A container ended, the engine says.
    Died(ContainerId),
    /// A container was removed.
    Removed(ContainerId),
    /// A container came to a network.
    Connected(NetworkId, Option<ContainerId>),
    /// A container left a network, or the network itself is gone.
    Disconnected(NetworkId),
    /// An event that could not be read. It may have been about anything.
    Unreadable,
}

/// The answer to a list of all containers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Listed {
    /// The containers that were described.
    pub rows: Vec<ContainerSummary>,
    /// Containers that the list names, and why they could not be described.
    pub undescribed: Vec<(ContainerId, EngineError)>,
    /// Why the list may lack containers.
    pub incomplete: Option<EngineError>,
}

impl From<Vec<ContainerSummary>> for Listed {
    fn from(rows: Vec<ContainerSummary>) -> Self {
        Self {
            rows,
            ..Self::default()
        }
    }
}

/// A container in the engine's list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ContainerSummary {
    /// Id.
    pub id: ContainerId,
    /// Name, without the slash.
    pub name: String,
    /// All labels, the image's among them.
    pub labels: BTreeMap<String, String>,
    /// Image as named.
    pub image: String,
    /// Image id.
    pub image_id: String,
    /// Whether the engine's answer about this image is about the one that the container was created from.
    pub image_is_certain: bool,
    /// Whose network namespace.
    pub network_mode: NetworkMode,
    /// Whether it runs.
    pub running: bool,
}

/// Which of a container's variables are its own (`image`: `None` if it cannot be read). `image_counts`: all of them are.
pub fn split_environment(all: &Environment, image: Option<&Image>, image_counts: bool) -> Pairs {
    match image_counts {
        true => all.0.clone().into_iter().collect(),
        false => Pairs::split(&all.0, image.map(|image| &image.environment.0)),
    }
}

impl ContainerSummary {
    /// The definition of the container (`image`: `None` if it cannot be read). `image_counts`: its labels count like those of the
    /// container.
    pub fn define(self, image: Option<&Image>, image_counts: bool) -> Definition {
        let labels = match image_counts {
            true => self.labels.into_iter().collect(),
            false => {
                let mut labels = Pairs::split(&self.labels, image.map(|image| &image.labels));
                compose::own_labels(&mut labels);
                labels
            }
        };
        Definition {
            name: self.name,
            labels,
            environment: None,
            image_is_known: image_counts || image.is_some(),
            image: self.image,
            image_id: self.image_id,
            network_mode: self.network_mode,
            hostname: self.id.short().to_owned(),
            id: self.id,
        }
    }
}

/// What an inspect tells.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Inspection {
    /// Hostname.
    pub hostname: Option<String>,
    /// All its variables, the image's among them.
    pub environment: Environment,
    /// Its present run, if it runs.
    pub run: Option<Run>,
}

/// One run of a container, as the engine tells it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Run {
    /// First process.
    pub pid: u32,
    /// When it started, in the engine's own words.
    pub started: String,
}

/// A network.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Network {
    /// Its subnets: address and length of the prefix.
    pub subnets: Vec<(IpAddr, u8)>,
    /// Its gateways, where they are this host's own addresses: those of a bridge.
    pub gateways: Vec<IpAddr>,
    /// Who is on it.
    pub endpoints: BTreeMap<ContainerId, Endpoint>,
}

/// The kernel's side of a container. Implemented by [`crate::attribution`]; called on threads that may block.
pub trait Kernel: Send + Sync + 'static {
    /// Finds the container's first process and opens what proves its connections. `run`: what the engine says of it;
    /// `mode`: whose network namespace the engine says that it is in, if that is known yet.
    ///
    /// # Errors
    /// Why it is not there, or not yet; the text is shown in `status`.
    fn run_start(&self, id: &ContainerId, run: Option<&Run>, mode: Option<&NetworkMode>) -> Result<RunStart, String>;

    /// Containers whose cgroups appear from now on. For engines that announce them late.
    fn appearing(&self) -> BoxStream<'static, ContainerId> {
        futures_util::stream::pending().boxed()
    }

    /// The engine says that the container does not run. The real kernel knows that itself, and better.
    fn engine_says_ended(&self, _id: &ContainerId) {}

    /// The engine cannot be asked any more. The real kernel goes on without it.
    fn engine_lost(&self) {}
}

/// A life, as the kernel found it.
pub struct RunStart {
    /// The container's cgroup.
    pub cgroup: CgroupId,
    /// Its first process.
    pub pid: u32,
    /// When that started.
    pub started: SystemTime,
    /// The kernel's side.
    pub handle: Arc<dyn RunHandle>,
}

/// What the rest of the daemon makes of a container.
pub trait Instances: Send + Sync + 'static {
    /// [`crate::instance::resolve`] with the settings in force.
    fn resolve(
        &self,
        container: &Arc<Definition>,
        attachments: &Arc<NetworkEndpoints>,
        started: SystemTime,
    ) -> Instance;
    /// Has credentials kept fresh until the hold is dropped.
    fn hold(&self, session: &Arc<Session>) -> Box<dyn Hold>;
    /// Whether the service is to listen inside the containers' own network namespaces.
    fn attaches(&self) -> bool;
    /// Whether labels and variables of images count like those of containers.
    fn image_labels_count(&self) -> bool;
}

/// A wish for credentials to be kept.
pub trait Hold: Send {
    /// What for: the same one for all who hold it.
    fn session(&self) -> &Arc<Session>;
    /// The container has run: its credentials are kept longer after it.
    fn started(&mut self);
}

/// Look-ups in flight at once; and, apart from them, inspects: those of containers that are starting block, and nothing may
/// wait for them.
const MAX_LOOKUPS: usize = 16;
/// First processes that are looked for at once.
const BIRTHS: usize = 32;
/// How often the kernel is asked for a container that must be starting now: its first process is there at least 135 ms
/// before its first request.
const BIRTH_TICK: Duration = Duration::from_millis(5);
/// The same for one that the engine says has run for a while and whose process is not found.
const BIRTH_SLOW_TICK: Duration = Duration::from_millis(500);
/// How long it is asked quickly.
const BIRTH_QUICK: Duration = Duration::from_secs(5);
/// How long it is asked at all when the engine does not say that it runs.
const BIRTH_GIVEN_UP: Duration = Duration::from_secs(60);
/// How long the engine may take to start its stream of events. Where systemd holds its socket, it is started meanwhile.
const SUBSCRIBE: Duration = Duration::from_secs(30);
/// After an event that could not be read, lists are asked for again, at most this often.
const RELIST: Duration = Duration::from_secs(1);
/// While streams of events break, containers are listed at most this often.
const POLL: Duration = Duration::from_secs(5);
/// Waiters that are kept before those whose caller has left are removed.
const WAITERS: usize = 512;

/// What the writer knows of a container.
struct Known {
    definition: Option<Arc<Definition>>,
    /// Its row of the list, if its image could not be read yet.
    waits_for_image: Option<ContainerSummary>,
    /// How many lists had been asked for when the engine last named it.
    named: u64,
    running: bool,
    attachments: Arc<NetworkEndpoints>,
    hostname: Option<String>,
    /// What its image brings, if that can be read.
    image: Option<Arc<Image>>,
    /// All its variables, once an inspect has told them.
    environment: Option<Environment>,
    run: Option<Run>,
    run_start: Option<RunStart>,
    life: Option<Arc<ContainerRun>>,
    no_life: Option<String>,
    attach: AttachState,
    not_attached: Option<String>,
    left_alone: Vec<String>,
    hold: Option<Box<dyn Hold>>,
    seen: SystemTime,
}

/// What the writer knows of a network.
#[derive(Default)]
struct KnownNetwork {
    subnets: Vec<(IpAddr, u8)>,
    members: HashSet<ContainerId>,
}

impl Known {
    /// The present run, as the kernel sees it: its cgroup and the rest.
    fn run(&self) -> Option<(CgroupId, Arc<dyn RunHandle>)> {
        let run_start = self
            .run_start
            .as_ref()
            .map(|run_start| (run_start.cgroup, &run_start.handle));
        let life = self.life.as_ref().map(|life| (life.cgroup, &life.handle));
        run_start.or(life).map(|(cgroup, handle)| (cgroup, handle.clone()))
    }
}

impl KnownNetwork {
    fn may_hold(&self, address: IpAddr) -> bool {
        self.subnets.iter().any(|subnet| within(address, *subnet))
    }
}

/// How it stands with the link of a run's namespace to the service.
#[derive(Default)]
struct AttachState {
    /// Whether it is to have one.
    wanted: bool,
    /// What the last call has done: attached, or detached.
    done: bool,
    /// A call for it is under way. There is one at a time, so that they cannot overtake each other.
    in_flight: bool,
    /// Failures in a row.
    failures: u32,
}

/// The result of an attempt to attach a run's namespace (`true`), or to detach it.
type Attached = (ContainerId, CgroupId, bool, Result<Vec<String>, String>);

/// The pauses after an attempt that failed: the first one, which doubles, and the longest.
const ATTACH_RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

struct Awaited {
    since: Instant,
    next: Instant,
    asked: bool,
}

struct Waiter {
    miss: Miss,
    /// Look-ups that may still tell something of its address.
    pending: HashSet<LookupKey>,
}

/// The one writer.
pub struct Reconciler {
    engine: Arc<dyn ContainerEngine>,
    kernel: Arc<dyn Kernel>,
    instances: Arc<dyn Instances>,
    index: Arc<Index>,
    clock: Clock,
    misses: mpsc::Receiver<Miss>,
    /// Wakes when settings or surroundings have changed: every instance is resolved again.
    changed: watch::Receiver<u64>,

    known: HashMap<ContainerId, Box<Known>>,
    networks: HashMap<NetworkId, KnownNetwork>,
    images: Images,
    /// The engine has listed its containers at least once.
    is_listed: bool,
    /// The log says that the engine is away.
    is_away_said: bool,

    /// In flight; `true`: overtaken by an event, to be made again.
    flights: HashMap<LookupKey, bool>,
    queue: VecDeque<LookupKey>,
    inspects: VecDeque<LookupKey>,
    queued: HashSet<LookupKey>,
    inspecting: usize,
    answers: FuturesUnordered<BoxFuture<'static, (LookupKey, Result<LookupResult, EngineError>)>>,
    failures: Failures,
    /// What is left until the snapshot is whole.
    synchronising: Option<HashSet<LookupKey>>,
    /// Lists of containers that were asked for so far, and when the last one was.
    lists: (u64, Option<Instant>),
    /// Containers that were removed after the last list was asked for, which may still name them. No ID is used again.
    removed: HashSet<ContainerId>,
    /// When lists are asked for again because an event could not be read.
    relist: Option<Instant>,

    awaited: HashMap<ContainerId, Awaited>,
    /// Those whose first process is to be looked for now.
    due: VecDeque<ContainerId>,
    births: FuturesUnordered<BoxFuture<'static, (ContainerId, Result<RunStart, String>)>>,
    ends: FuturesUnordered<BoxFuture<'static, (ContainerId, CgroupId)>>,
    attachings: FuturesUnordered<BoxFuture<'static, Attached>>,
    /// Links that are being removed, and images that are being stored.
    background: FuturesUnordered<BoxFuture<'static, ()>>,
    /// When an attempt to attach or to detach that failed is made again.
    attach_retries: HashMap<ContainerId, Instant>,
    waiters: Vec<Waiter>,

    /// Whose an instance id is: that of one life.
    ids: HashMap<String, (ContainerId, Weak<ContainerRun>)>,
    /// When time alone changes an instance.
    timed: HashMap<ContainerId, SystemTime>,
    /// Who would have it as well.
    duplicate_ids: HashMap<String, HashSet<ContainerId>>,
}

/// What a watcher needs.
pub struct Ports {
    /// The engine.
    pub engine: Arc<dyn ContainerEngine>,
    /// The kernel.
    pub kernel: Arc<dyn Kernel>,
    /// What is made of a container.
    pub instances: Arc<dyn Instances>,
    /// Where the images of containers are stored.
    pub images: Arc<dyn ImageStore>,
    /// Wakes when settings or surroundings have changed.
    pub changed: watch::Receiver<u64>,
}

impl Reconciler {
    /// A watcher that fills `index`.
    pub fn new(ports: Ports, index: Arc<Index>, misses: mpsc::Receiver<Miss>, clock: Clock) -> Self {
        Self {
            engine: ports.engine,
            kernel: ports.kernel,
            instances: ports.instances,
            changed: ports.changed,
            index,
            clock,
            misses,
            known: HashMap::new(),
            networks: HashMap::new(),
            images: Images::new(ports.images),
            is_listed: false,
            is_away_said: false,
            flights: HashMap::new(),
            queue: VecDeque::new(),
            inspects: VecDeque::new(),
            queued: HashSet::new(),
            inspecting: 0,
            answers: FuturesUnordered::new(),
            failures: Failures::default(),
            synchronising: None,
            lists: (0, None),
            removed: HashSet::new(),
            relist: None,
            awaited: HashMap::new(),
            due: VecDeque::new(),
            births: FuturesUnordered::new(),
            ends: FuturesUnordered::new(),
            attachings: FuturesUnordered::new(),
            background: FuturesUnordered::new(),
            attach_retries: HashMap::new(),
            waiters: Vec::new(),
            ids: HashMap::new(),
            timed: HashMap::new(),
            duplicate_ids: HashMap::new(),
        }
    }

    /// Watches until the task is dropped.
    pub async fn run(mut self) {
        let mut subscription = Subscription::default();
        let mut connecting = subscribe(self.engine.clone(), Duration::ZERO);
        let mut events: Option<Events> = None;
        let mut appearing: Option<BoxStream<'static, ContainerId>> = None;
        // When the stream of events has proven itself.
        let mut proven: Option<Instant> = None;
        let mut tick = tokio::time::interval(BIRTH_TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let clock = self.clock.clone();
        loop {
            let next = self.next();
            let connected = events.is_some();
            tokio::select! {
                subscribed = &mut connecting, if !connected => match subscribed {
                    Ok(stream) => {
                        let now = clock.now();
                        let at = subscription.started(now);
                        (events, proven) = (Some(stream), Some(at));
                        if at > now {
                            self.poll(now);
                        }
                    }
                    Err(error) => {
                        self.unreachable(&error.to_string());
                        connecting = subscribe(self.engine.clone(), subscription.unreachable());
                    }
                },
                () = until(proven), if proven.is_some() => {
                    proven = None;
                    self.resync();
                }
                event = next_of(&mut events), if connected => match event {
                    Some(Ok(event)) => self.event(event),
                    end => {
                        let why = end.and_then(Result::err).map_or_else(|| "it was closed".to_owned(), |error| error.0);
                        self.lost(&format!("the stream of events ended: {why}"));
                        (events, proven) = (None, None);
                        connecting = subscribe(self.engine.clone(), subscription.ended(clock.now()));
                    }
                },
                Some(id) = next_of(&mut appearing) => self.appeared(id),
                Some((subject, found)) = self.answers.next(), if !self.answers.is_empty() => {
                    self.answered(subject, found);
                    if appearing.is_none() && self.engine.announces_late() {
                        appearing = Some(self.kernel.appearing());
                    }
                }
                Some((id, run_start)) = self.births.next(), if !self.births.is_empty() => self.run_started(id, run_start),
                Some((id, cgroup)) = self.ends.next(), if !self.ends.is_empty() => self.ended(&id, cgroup),
                Some(attached) = self.attachings.next(), if !self.attachings.is_empty() => self.attached(attached),
                Some(()) = self.background.next(), if !self.background.is_empty() => {}
                Some(miss) = self.misses.recv() => self.missed(miss, connected),
                Ok(()) = self.changed.changed() => {
                    let all: Vec<_> = self.known.keys().cloned().collect();
                    all.iter().for_each(|id| self.publish(id));
                }
                () = clock.until(next), if next.is_some() => self.again(),
                _ = tick.tick(), if self.has_planned() => self.tick(),
            }
        }
    }

    /// When the first instance is to be resolved again because time has passed.
    fn next(&self) -> Option<SystemTime> {
        self.timed.values().min().copied()
    }

    fn again(&mut self) {
        let now = self.clock.wall();
        let due = self.timed.iter().filter(|(_, at)| **at <= now);
        let due: Vec<_> = due.map(|(id, _)| id.clone()).collect();
        for id in due {
            self.timed.remove(&id);
            self.publish(&id);
        }
    }

    // ---- the engine

    /// Events may have been lost. The engine may still answer.
    fn lost(&mut self, why: &str) {
        if self.is_away_said {
            debug!(why, "the container engine is away");
        } else {
            warn!(why, "the container engine is away; known containers are served on");
            self.is_away_said = true;
        }
        let state = EngineState::Away(why.to_owned());
        if *self.index.engine() != state {
            self.index.set_engine(state);
        }
        self.kernel.engine_lost();
        self.synchronising = None;
        // Callers that wait may be known before their deadlines: the engine may come back.
        for waiter in &mut self.waiters {
            waiter.pending.insert(LookupKey::Rows);
        }
    }

    /// The engine does not answer at all: everything is looked up once it does.
    fn unreachable(&mut self, why: &str) {
        self.lost(why);
        self.queue.clear();
        self.inspects.clear();
        self.inspecting = 0;
        self.queued.clear();
        self.flights.clear();
        self.failures.clear();
        self.relist = None;
        self.answers = FuturesUnordered::new();
        self.index.set_failing(None);
    }

    fn resync(&mut self) {
        self.index.set_engine(EngineState::Synchronising);
        self.synchronising = Some([LookupKey::Rows, LookupKey::Networks].into());
        self.touch(LookupKey::Rows);
        self.touch(LookupKey::Networks);
    }

    /// The stream of events is new, and may break at once like those before it. Its events do not tell of containers that started
    /// between two streams.
    fn poll(&mut self, now: Instant) {
        if self.lists.1.is_some_and(|last| now - last >= POLL) {
            self.touch(LookupKey::Rows);
        }
    }

    /// An event could not be read: the lists tell what it was about.
    fn relist(&mut self) {
        let now = self.clock.now();
        let at = self.lists.1.map_or(now, |last| last + RELIST);
        if at > now {
            self.relist = Some(at);
        } else {
            self.relist = None;
            self.touch(LookupKey::Rows);
            self.touch(LookupKey::Networks);
        }
    }

    /// A container's cgroup has appeared, before the engine announces it.
    fn appeared(&mut self, id: ContainerId) {
        debug!(container = %id, "its cgroup has appeared");
        self.touch(LookupKey::Container(id.clone()));
        self.touch(LookupKey::Inspect(id.clone()));
        self.expect(id);
    }

    fn event(&mut self, event: Event) {
        debug!(?event, "event");
        match event {
            Event::Defined(id) => {
                self.touch(LookupKey::Container(id.clone()));
                self.touch(LookupKey::Inspect(id.clone()));
                // Engines since 28 tell of its network only when its first instruction is about to run; its first process
                // is there long before.
                self.expect(id);
            }
            Event::Started(id) => {
                self.overtake(&id);
                let lists = self.lists.0;
                if let Some(known) = self.known.get_mut(&id) {
                    (known.running, known.named) = (true, lists);
                    known.run = None;
                    self.publish(&id);
                } else {
                    self.touch(LookupKey::Container(id.clone()));
                }
                self.touch(LookupKey::Inspect(id.clone()));
                self.expect(id);
            }
            Event::Died(id) => {
                self.kernel.engine_says_ended(&id);
                let life = self.known.get(&id).and_then(|known| known.life.clone());
                if let Some(life) = life.filter(|life| !life.alive()) {
                    self.ended(&id, life.cgroup);
                }
                self.overtake(&id);
                let lists = self.lists.0;
                if let Some(known) = self.known.get_mut(&id) {
                    (known.running, known.named) = (false, lists);
                    known.run = None;
                }
            }
            Event::Removed(id) => {
                self.overtake(&id);
                // A list that is under way may still name it.
                if self.flights.contains_key(&LookupKey::Rows) {
                    self.removed.insert(id.clone());
                }
                self.forget(&id);
                self.keep_images();
            }
            Event::Connected(network, container) => {
                self.touch(LookupKey::Network(network));
                if let Some(id) = container {
                    if !self.known.contains_key(&id) {
                        self.touch(LookupKey::Container(id.clone()));
                    }
                    self.expect(id);
                }
            }
            Event::Disconnected(network) => self.touch(LookupKey::Network(network)),
            Event::Unreadable => self.relist(),
        }
    }

    /// An event tells more of a container than answers that are under way: they are asked for again.
    fn overtake(&mut self, id: &ContainerId) {
        for subject in [LookupKey::Container(id.clone()), LookupKey::Inspect(id.clone())] {
            if let Some(again) = self.flights.get_mut(&subject) {
                *again = true;
            }
        }
    }

    /// Something about `subject` may have changed: look it up, again if that is being done.
    fn touch(&mut self, subject: LookupKey) {
        if let Some(again) = self.flights.get_mut(&subject) {
            *again = true;
        } else if self.queued.insert(subject.clone()) {
            match subject {
                LookupKey::Inspect(_) => self.inspects.push_back(subject),
                _ => self.queue.push_back(subject),
            }
        }
        self.fly();
    }

    fn fly(&mut self) {
        while self.answers.len() - self.inspecting < MAX_LOOKUPS
            && let Some(subject) = self.queue.pop_front()
        {
            self.depart(subject);
        }
        while self.inspecting < MAX_LOOKUPS
            && let Some(subject) = self.inspects.pop_front()
        {
            self.inspecting += 1;
            self.depart(subject);
        }
    }

    fn depart(&mut self, subject: LookupKey) {
        self.queued.remove(&subject);
        self.flights.insert(subject.clone(), false);
        if subject == LookupKey::Rows {
            self.lists = (self.lists.0 + 1, Some(self.clock.now()));
            self.removed.clear();
        }
        let look_up = Lookup {
            engine: self.engine.clone(),
            images: self.images.known(),
            image_labels_count: self.instances.image_labels_count(),
            limit: self.failures.limit(&subject),
        };
        self.answers
            .push(async move { (subject.clone(), look_up.make(&subject).await) }.boxed());
    }

    fn answered(&mut self, subject: LookupKey, found: Result<LookupResult, EngineError>) {
        let again = self.flights.remove(&subject).unwrap_or(false);
        if matches!(subject, LookupKey::Inspect(_)) {
            self.inspecting -= 1;
        }
        match found {
            Ok(found) => {
                let incomplete = found.incomplete();
                let ended = incomplete.is_none() && self.failures.end(&subject);
                // What an inspect tells of a run that an event has overtaken may be the run before.
                if !(again && matches!(found, LookupResult::Inspect(_))) {
                    self.learn(&subject, found);
                }
                if ended {
                    self.failures_changed(&subject);
                }
                match incomplete {
                    Some(why) => self.failed(&subject, why),
                    None if again => self.touch(subject),
                    None => self.finished(&subject),
                }
            }
            // Its next attempt is also the one that an event has asked for.
            Err(error) => self.failed(&subject, error),
        }
        self.fly();
    }

    /// A look-up failed: it is made again.
    fn failed(&mut self, subject: &LookupKey, error: EngineError) {
        let now = (self.clock.now(), self.clock.wall());
        if self.failures.note(subject, error.0, now) {
            self.failures_changed(subject);
        }
        if let LookupKey::Network(network) = subject {
            self.index.set_unread_network(network, true);
        }
        // Without its lists nothing is known of the engine. The rest is known, but for single containers and networks.
        if !subject.is_list() {
            self.done_with(subject);
        }
    }

    /// Makes visible that a look-up fails, or does not fail any more.
    fn failures_changed(&mut self, subject: &LookupKey) {
        self.index.set_failing(self.failures.worst());
        match subject {
            LookupKey::Container(id) | LookupKey::Inspect(id) => self.publish(id),
            LookupKey::Image(image) => self.waiting_for(image).iter().for_each(|id| self.publish(id)),
            LookupKey::Rows | LookupKey::Networks | LookupKey::Network(_) => {}
        }
    }

    /// Containers whose image is looked up.
    fn waiting_for(&self, image: &str) -> Vec<ContainerId> {
        let waits = |known: &Known| known.waits_for_image.as_ref().is_some_and(|row| row.image_id == image);
        let waiting = self.known.iter().filter(|(_, known)| waits(known));
        waiting.map(|(id, _)| id.clone()).collect()
    }

    /// A look-up has told what it can.
    fn finished(&mut self, subject: &LookupKey) {
        self.done_with(subject);
        for mut waiter in std::mem::take(&mut self.waiters) {
            waiter.pending.remove(subject);
            self.wait(waiter);
        }
    }

    /// The snapshot does not wait for that look-up any more.
    fn done_with(&mut self, subject: &LookupKey) {
        let Some(left) = &mut self.synchronising else { return };
        left.remove(subject);
        if left.is_empty() {
            self.synchronising = None;
            self.is_away_said = false;
            self.index.set_engine(EngineState::Synchronised);
            info!(
                containers = self.known.len(),
                networks = self.networks.len(),
                "synchronised with the container engine"
            );
        }
    }

    fn learn(&mut self, subject: &LookupKey, found: LookupResult) {
        match (subject, found) {
            (LookupKey::Rows, LookupResult::Rows(rows)) => self.learn_rows(rows),
            (LookupKey::Networks, LookupResult::Networks(networks)) => {
                let gone: Vec<_> = self
                    .networks
                    .keys()
                    .filter(|id| !networks.contains(id))
                    .cloned()
                    .collect();
                gone.iter().for_each(|id| self.attach(id, None));
                for id in networks {
                    if let Some(left) = &mut self.synchronising {
                        left.insert(LookupKey::Network(id.clone()));
                    }
                    self.touch(LookupKey::Network(id));
                }
            }
            (LookupKey::Container(_), LookupResult::Container(Some(read))) => {
                self.define(*read);
                self.keep_images();
            }
            (LookupKey::Container(id), LookupResult::Container(None)) => {
                self.forget(id);
                self.keep_images();
            }
            (LookupKey::Inspect(id), LookupResult::Inspect(Some(inspection))) => {
                if let Some(known) = self.known.get_mut(id) {
                    known.run = inspection.run;
                    let renamed = inspection.hostname.is_some() && known.hostname != inspection.hostname;
                    if renamed {
                        known.hostname = inspection.hostname;
                    }
                    if known.environment.replace(inspection.environment).is_none() || renamed {
                        self.publish(id);
                    }
                }
            }
            (LookupKey::Network(id), LookupResult::Network(network)) => self.attach(&id.clone(), network),
            (LookupKey::Image(id), LookupResult::Image(image)) => {
                for container in self.waiting_for(id) {
                    let known = self.known(&container);
                    let (row, running) = (known.waits_for_image.take(), known.running);
                    // Events since the row was read have told whether it runs.
                    let row = row.map(|row| ContainerSummary { running, ..row });
                    row.into_iter().for_each(|row| self.define((row, Ok(image.clone()))));
                }
                self.keep_images();
            }
            // A container that is gone has no inspection; its row says so.
            _ => {}
        }
    }

    /// Learns the list of all containers: one that it does not name is gone.
    fn learn_rows(&mut self, mut rows: ReadRows) {
        rows.read.retain(|(row, _)| !self.removed.contains(&row.id));
        rows.undescribed.retain(|(id, _)| !self.removed.contains(id));
        if rows.incomplete.is_none() {
            let ids: HashSet<_> = rows.read.iter().map(|(row, _)| &row.id).collect();
            let undescribed: HashSet<_> = rows.undescribed.iter().map(|(id, _)| id).collect();
            let asked = self.lists.0;
            let gone = self.known.iter().filter(|(id, known)| {
                // The engine has announced it after it was asked for the list.
                let is_newer = known.named >= asked;
                !is_newer && !ids.contains(id) && !undescribed.contains(id)
            });
            let gone: Vec<_> = gone.map(|(id, _)| id.clone()).collect();
            gone.iter().for_each(|id| self.forget(id));
        }
        for mut read in rows.read {
            if let Some(running) = self.running_since_list(&read.0.id) {
                read.0.running = running;
            }
            let described = LookupKey::Container(read.0.id.clone());
            let ended = self.failures.end(&described);
            self.define(read);
            if ended {
                self.failures_changed(&described);
            }
        }
        for (id, error) in rows.undescribed {
            self.index.set_undescribed(&id);
            self.known(&id);
            let subject = LookupKey::Container(id);
            if !self.failures.is_planned(&subject) {
                self.failed(&subject, error);
            }
        }
        if rows.incomplete.is_none() {
            self.is_listed = true;
            self.keep_images();
        }
    }

    /// Whether a container runs, if the engine has told that after it was asked for the last list.
    fn running_since_list(&self, id: &ContainerId) -> Option<bool> {
        let known = self.known.get(id)?;
        let is_told = known.definition.is_some() || known.running;
        (known.named >= self.lists.0 && is_told).then_some(known.running)
    }

    fn define(&mut self, (row, image): ReadRow) {
        let (id, running, image_id) = (row.id.clone(), row.running, row.image_id.clone());
        let (image, unread) = match image {
            Ok(image) => (image, None),
            Err(error) => (None, Some((row.clone(), error))),
        };
        let definition = row.define(image.as_deref(), self.instances.image_labels_count());
        if !running {
            self.kernel.engine_says_ended(&id);
        }
        let lists = self.lists.0;
        let known = self.known(&id);
        known.image = image;
        (known.running, known.named) = (running, lists);
        known.definition = Some(Arc::new(definition));
        let (row, error) = unread.unzip();
        known.waits_for_image = row;
        let image = LookupKey::Image(image_id);
        if let Some(error) = error.filter(|_| !self.failures.is_planned(&image)) {
            self.failed(&image, error);
        }
        let known = self.known(&id);
        // A run that was found earlier may have ended unannounced, before or after the container was described.
        let unborn = !known.run().is_some_and(|(_, handle)| handle.alive());
        let unnamed = known.environment.is_none();
        self.publish(&id);
        if unnamed || (running && unborn) {
            self.touch(LookupKey::Inspect(id.clone()));
        }
        if running && unborn && !self.awaited.contains_key(&id) {
            self.expect(id);
        }
    }

    /// Stores the images of the containers that exist, and forgets all others.
    fn keep_images(&mut self) {
        // Before the engine has listed and described its containers, an image without a container may be one of a container not
        // known yet.
        if !self.is_listed || self.known.values().any(|known| known.definition.is_none()) {
            return;
        }
        let mut in_use = InUse::new();
        for known in self.known.values() {
            if let Some(definition) = &known.definition {
                let image = in_use.entry(definition.image_id.clone()).or_default();
                *image = image.take().or_else(|| known.image.clone());
            }
        }
        if let Some(storing) = self.images.keep(in_use) {
            self.background.push(blocking(storing));
        }
    }

    fn known(&mut self, id: &ContainerId) -> &mut Known {
        let (seen, named) = (self.clock.wall(), self.lists.0);
        self.known.entry(id.clone()).or_insert_with(|| {
            Box::new(Known {
                definition: None,
                waits_for_image: None,
                named,
                running: false,
                attachments: Arc::default(),
                hostname: None,
                image: None,
                environment: None,
                run: None,
                run_start: None,
                life: None,
                no_life: None,
                attach: AttachState::default(),
                not_attached: None,
                left_alone: Vec::new(),
                hold: None,
                seen,
            })
        })
    }

    /// Replaces who is on a network.
    fn attach(&mut self, id: &NetworkId, network: Option<Network>) {
        let Network {
            subnets,
            gateways,
            endpoints,
        } = network.unwrap_or_default();
        self.index.set_gateways(id, gateways);
        let members = endpoints.keys().cloned().collect();
        let before = match endpoints.is_empty() && subnets.is_empty() {
            true => self.networks.remove(id),
            false => self.networks.insert(id.clone(), KnownNetwork { subnets, members }),
        };
        for container in before.map(|network| network.members).unwrap_or_default() {
            if !endpoints.contains_key(&container)
                && let Some(known) = self.known.get_mut(&container)
            {
                Arc::make_mut(&mut known.attachments).0.remove(id);
                self.publish(&container);
            }
        }
        for (container, endpoint) in endpoints {
            let known = self.known(&container);
            if known.attachments.0.get(id) == Some(&endpoint) {
                continue;
            }
            let mut attachments = NetworkEndpoints::clone(&known.attachments);
            attachments.0.insert(id.clone(), endpoint);
            // A copy is exactly as long as it has to be.
            known.attachments = Arc::new(attachments.clone());
            if known.definition.is_none() {
                self.touch(LookupKey::Container(container));
            } else {
                self.publish(&container);
            }
        }
        // Only once all records have their new addresses.
        self.index.set_unread_network(id, false);
    }

    fn forget(&mut self, id: &ContainerId) {
        self.kernel.engine_says_ended(id);
        self.awaited.remove(id);
        self.attach_retries.remove(id);
        self.timed.remove(id);
        let known = self.known.remove(id);
        self.index.remove(id);
        self.end_failures(id, known.as_deref());
        if let Some(run_start) = known.as_ref().and_then(|known| known.run_start.as_ref()) {
            // It is not a container of this engine.
            self.index.set_undefined(run_start.handle.namespace(), false);
            let handle = run_start.handle.clone();
            self.background.push(blocking(move || drop(handle.detach())));
        }
        if let Some(known) = known {
            debug!(container = %id, name = known.definition.as_ref().map(|it| &it.name), "forgotten");
            let instance = known.life.map(|life| life.instance.load_full());
            self.release(id, instance.as_deref());
        }
    }

    /// A container is gone: nothing about it is looked up any more.
    fn end_failures(&mut self, id: &ContainerId, known: Option<&Known>) {
        let mut ended = vec![LookupKey::Container(id.clone()), LookupKey::Inspect(id.clone())];
        let image = known
            .and_then(|known| known.waits_for_image.as_ref())
            .map(|row| &row.image_id);
        if let Some(image) = image.filter(|image| self.waiting_for(image).is_empty()) {
            ended.push(LookupKey::Image(image.clone()));
        }
        ended.retain(|subject| self.failures.end(subject));
        ended.iter().for_each(|subject| self.failures_changed(subject));
    }

    // ---- the kernel

    /// A container is about to run: look for its first process until it is there.
    fn expect(&mut self, id: ContainerId) {
        let life = self.known.get(&id).and_then(|known| known.life.as_ref());
        if life.is_some_and(|life| life.alive()) {
            return;
        }
        let now = self.clock.now();
        let awaited = self.awaited.entry(id.clone()).or_insert(Awaited {
            since: now,
            next: now,
            asked: false,
        });
        (awaited.since, awaited.next) = (now, now);
        if !awaited.asked {
            awaited.asked = true;
            self.due.push_back(id);
            self.look_for_births();
        }
    }

    /// Looks for the first processes that are due, so many at once.
    fn look_for_births(&mut self) {
        while self.births.len() < BIRTHS
            && let Some(id) = self.due.pop_front()
        {
            let known = self.known.get(&id);
            let run = known.and_then(|known| known.run.clone());
            let mode = known
                .and_then(|known| known.definition.as_ref())
                .map(|it| it.network_mode.clone());
            let kernel = self.kernel.clone();
            self.births.push(blocking(move || {
                let run_start = kernel.run_start(&id, run.as_ref(), mode.as_ref());
                (id, run_start)
            }));
        }
    }

    fn tick(&mut self) {
        let now = self.clock.now();
        let due = &mut self.due;
        self.awaited.retain(|id, awaited| {
            let running = self.known.get(id).is_some_and(|known| known.running);
            if !running && now - awaited.since > BIRTH_GIVEN_UP {
                return false;
            }
            if !awaited.asked && awaited.next <= now {
                awaited.asked = true;
                due.push_back(id.clone());
            }
            true
        });
        self.look_for_births();
        self.retry_attachments(now);
        self.failures
            .take_due(now)
            .into_iter()
            .for_each(|subject| self.touch(subject));
        if self.relist.is_some_and(|at| at <= now) {
            self.relist();
        }
    }

    /// Whether something is planned for later.
    fn has_planned(&self) -> bool {
        let attempts = self.failures.is_empty() && self.attach_retries.is_empty();
        !self.awaited.is_empty() || !attempts || self.relist.is_some()
    }

    fn run_started(&mut self, id: ContainerId, run_start: Result<RunStart, String>) {
        self.look_for_births();
        let now = self.clock.now();
        match run_start {
            Ok(run_start) => {
                self.awaited.remove(&id);
                let known = self.known(&id);
                known.no_life = None;
                let is_known = known.run().is_some_and(|(cgroup, _)| cgroup == run_start.cgroup);
                if !is_known {
                    let (namespace, undefined) = (run_start.handle.namespace(), known.definition.is_none());
                    known.run_start = Some(run_start);
                    (known.attach, known.not_attached) = (AttachState::default(), None);
                    known.left_alone.clear();
                    // The engine tells about it after its first instruction. It gets a link meanwhile, and its requests wait.
                    known.attach.wanted = undefined;
                    // The pause was that of an earlier run.
                    self.attach_retries.remove(&id);
                    if undefined && self.instances.attaches() {
                        self.index.set_undefined(namespace, true);
                        self.sync_attachment(&id);
                    }
                    self.publish(&id);
                }
            }
            Err(why) => {
                let Some(awaited) = self.awaited.get_mut(&id) else {
                    return;
                };
                awaited.asked = false;
                let waited = now - awaited.since;
                awaited.next = now
                    + if waited < BIRTH_QUICK {
                        BIRTH_TICK
                    } else {
                        BIRTH_SLOW_TICK
                    };
                // Before that it is only not there yet.
                if waited >= BIRTH_QUICK
                    && let Some(known) = self.known.get_mut(&id)
                    && known.running
                    && known.no_life.as_ref() != Some(&why)
                {
                    warn!(container = %id, why, "runs, but cannot be served");
                    known.no_life = Some(why);
                    self.publish(&id);
                }
            }
        }
    }

    /// Attaches or detaches the namespace of a container's run, if that is not what it is.
    fn sync_attachment(&mut self, id: &ContainerId) {
        let Some(known) = self.known.get_mut(id) else { return };
        let Some((cgroup, handle)) = known.run() else { return };
        let attach = &mut known.attach;
        let wanted = attach.wanted;
        if attach.in_flight || wanted == attach.done || self.attach_retries.contains_key(id) {
            return;
        }
        attach.in_flight = true;
        let id = id.clone();
        self.attachings.push(blocking(move || {
            let done = match wanted {
                true => handle.attach(),
                false => handle.detach().map(|()| Vec::new()),
            };
            (id, cgroup, wanted, done)
        }));
    }

    fn attached(&mut self, (id, cgroup, attached, done): Attached) {
        let now = self.clock.now();
        let Some(known) = self.known.get_mut(&id) else { return };
        // A run that ends meanwhile takes its namespace with it: that is no failure.
        let run = known.run().filter(|(run, handle)| *run == cgroup && handle.alive());
        if run.is_none() {
            return;
        }
        let attach = &mut known.attach;
        attach.in_flight = false;
        let before = (known.not_attached.take(), std::mem::take(&mut known.left_alone));
        match done {
            Ok(left_alone) => {
                known.left_alone = left_alone;
                (attach.done, attach.failures) = (attached, 0);
            }
            Err(why) => {
                let pause = ATTACH_RETRY.0 * 2u32.saturating_pow(attach.failures);
                self.attach_retries.insert(id.clone(), now + pause.min(ATTACH_RETRY.1));
                // The init process of a run that is ending has left its namespace a moment before it has ended.
                match attach.failures {
                    1 => warn!(container = %id, why, "the container has no link to the service; trying again"),
                    _ => debug!(container = %id, why, "the container has no link to the service"),
                }
                attach.failures = (attach.failures + 1).min(16);
                known.not_attached = Some(why);
            }
        }
        // Those who wait for the link look at the index. After a failure it has the time of the next attempt.
        let failed = known.not_attached.is_some();
        let changed = failed || before != (known.not_attached.clone(), known.left_alone.clone());
        if changed || attached {
            self.publish(&id);
        } else {
            self.sync_attachment(&id);
        }
    }

    /// Attempts to attach that are due again.
    fn retry_attachments(&mut self, now: Instant) {
        let due = self.attach_retries.iter().filter(|(_, at)| **at <= now);
        let due: Vec<_> = due.map(|(id, _)| id.clone()).collect();
        for id in due {
            self.attach_retries.remove(&id);
            self.sync_attachment(&id);
        }
    }

    fn ended(&mut self, id: &ContainerId, cgroup: CgroupId) {
        let Some(known) = self.known.get_mut(id) else { return };
        if known.life.as_ref().is_some_and(|life| life.cgroup == cgroup) {
            debug!(container = %id, "ended");
            let instance = known.life.take().map(|life| life.instance.load_full());
            self.publish(id);
            self.release(id, instance.as_deref());
        }
    }

    /// The instance id of a life that has ended is free.
    fn release(&mut self, id: &ContainerId, instance: Option<&Instance>) {
        let Some(instance) = instance else { return };
        if self.ids.get(&instance.id).is_some_and(|(holder, _)| holder == id) {
            self.ids.remove(&instance.id);
        }
        for twin in self.duplicate_ids.remove(&instance.id).unwrap_or_default() {
            self.publish(&twin);
        }
    }

    // ---- readers

    /// Makes what is known of a container visible, once its definition is.
    fn publish(&mut self, id: &ContainerId) {
        let Some(known) = self.known.get_mut(id) else { return };
        let Some(definition) = &mut known.definition else {
            return;
        };
        let environment = known.environment.as_ref();
        let all_count = self.instances.image_labels_count();
        let environment = environment.map(|all| split_environment(all, known.image.as_deref(), all_count));
        let hostname = known.hostname.as_ref().unwrap_or(&definition.hostname);
        if (hostname, &environment) != (&definition.hostname, &definition.environment) {
            let hostname = hostname.clone();
            let definition = Arc::make_mut(definition);
            (definition.hostname, definition.environment) = (hostname, environment);
        }
        let started = match (&known.run_start, &known.life) {
            (Some(run_start), _) => run_start.started,
            (None, Some(life)) => life.started,
            (None, None) => known.seen,
        };
        let mut instance = self.instances.resolve(definition, &known.attachments, started);
        let lives = known.run_start.is_some() || known.life.as_ref().is_some_and(|life| life.alive());
        let other = self.ids.get(&instance.id).and_then(|(other, life)| {
            let life = life
                .upgrade()
                .filter(|it| other != id && it.alive() && it.instance.load().id == instance.id)?;
            Some((other.clone(), life.started))
        });
        // Whoever was first stays; a daemon that has been started again may hear of them in another order.
        let (other, evicted) = match other {
            Some((other, since)) if lives && (started, id) < (since, &other) => (None, Some(other)),
            other => (other, None),
        };
        let is_twin = other.is_some();
        if let Some((other, _)) = other {
            self.duplicate_ids
                .entry(instance.id.clone())
                .or_default()
                .insert(id.clone());
            let problem = format!("instance id {} is that of container {other}, which runs", instance.id);
            instance = instance.refused(problem);
        }
        match instance.again {
            Some(at) => self.timed.insert(id.clone(), at),
            None => self.timed.remove(id),
        };
        match instance.role.session() {
            Some(session) if known.hold.as_ref().is_some_and(|hold| hold.session() == session) => {}
            Some(session) => known.hold = Some(self.instances.hold(session)),
            None => known.hold = None,
        }
        if let Some(hold) = &known.hold {
            instance.role = Role::Session(hold.session().clone());
        }
        let instance = Arc::new(instance);
        // While it is open whether there is a role, a request waits for that at the link.
        let served = instance.endpoint || instance.endpoint_open;
        let attaches = self.instances.attaches() && served && definition.network_mode != NetworkMode::Host;
        if let Some(run_start) = known.run_start.take() {
            let life = Arc::new(ContainerRun {
                container: id.clone(),
                cgroup: run_start.cgroup,
                pid: run_start.pid,
                started: run_start.started,
                handle: run_start.handle,
                instance: arc_swap::ArcSwap::new(instance.clone()),
                connections: Arc::default(),
                last: LastRequest::default(),
            });
            let watched = life.clone();
            self.ends.push(
                async move {
                    watched.handle.ended().await;
                    (watched.container.clone(), watched.cgroup)
                }
                .boxed(),
            );
            debug!(container = %id, name = definition.name, pid = life.pid, cgroup = life.cgroup.0, "lives");
            self.index.set_undefined(life.handle.namespace(), false);
            known.life = Some(life);
        }
        if let Some(life) = &known.life {
            life.instance.store(instance.clone());
            if !is_twin {
                self.ids.insert(instance.id.clone(), (id.clone(), Arc::downgrade(life)));
            }
            known.attach.wanted = attaches;
            if let Some(hold) = &mut known.hold {
                hold.started();
            }
        }
        let image = known
            .waits_for_image
            .as_ref()
            .map(|row| LookupKey::Image(row.image_id.clone()));
        let looked_up = [LookupKey::Container(id.clone()), LookupKey::Inspect(id.clone())];
        let failing = looked_up.iter().chain(&image).find_map(|subject| {
            let error = self.failures.error(subject)?;
            Some(format!("{}: {error}", subject.call()))
        });
        self.index.put(Record {
            definition: definition.clone(),
            attachments: known.attachments.clone(),
            life: known.life.clone(),
            no_life: known.no_life.clone(),
            unread: failing,
            attaches,
            not_attached: known.not_attached.clone(),
            next_attach: self.attach_retries.get(id).copied(),
            left_alone: known.left_alone.clone(),
            instance,
        });
        self.sync_attachment(id);
        if let Some(other) = evicted {
            self.publish(&other);
        }
    }

    /// A caller whose address leads to nobody: ask the engine about the networks that the address may be on.
    fn missed(&mut self, miss: Miss, connected: bool) {
        let mut pending = HashSet::new();
        if connected {
            let on = self
                .networks
                .iter()
                .filter(|(_, network)| network.may_hold(miss.address));
            pending.extend(on.map(|(id, _)| LookupKey::Network(id.clone())));
            if pending.is_empty() {
                pending.insert(LookupKey::Networks);
            }
            // One that is in flight was asked just now: its answer serves everybody who waits, so that a flood of unknown
            // callers costs one look-up at a time and network.
            for subject in pending.clone() {
                if !self.flights.contains_key(&subject) && !self.failures.is_planned(&subject) {
                    self.touch(subject);
                }
            }
            self.failures.hurry();
        } else {
            pending.insert(LookupKey::Rows);
        }
        // Nothing else removes those whose callers have left while nothing is answered.
        if self.waiters.len() >= WAITERS {
            self.waiters.retain(|waiter| !waiter.miss.looked.is_closed());
        }
        self.wait(Waiter { miss, pending });
    }

    /// Answers a waiter that nothing can be told any more, keeps the others.
    fn wait(&mut self, mut waiter: Waiter) {
        if waiter.miss.looked.is_closed() {
            return;
        }
        let address = waiter.miss.address;
        let at = |known: &Known| known.attachments.addresses().any(|it| it == address);
        // The list of networks has become look-ups of each; a network has become definitions of its containers.
        let open = self.flights.keys().chain(&self.queued).chain(self.failures.planned());
        let more = open.filter(|subject| match subject {
            LookupKey::Network(id) => self
                .networks
                .get(id)
                .is_none_or(|network| network.may_hold(waiter.miss.address)),
            LookupKey::Container(id) => self.known.get(id).is_some_and(|known| at(known)),
            _ => false,
        });
        waiter.pending.extend(more.cloned());
        let open = |subject: &LookupKey| {
            self.flights.contains_key(subject) || self.queued.contains(subject) || self.failures.is_planned(subject)
        };
        // The rows stand for an engine that is away: they come with it.
        waiter
            .pending
            .retain(|subject| open(subject) || *subject == LookupKey::Rows);
        let born_soon = self
            .awaited
            .keys()
            .any(|id| self.known.get(id).is_some_and(|known| at(known)));
        if waiter.pending.is_empty() && !born_soon {
            // A closed channel: whoever waited has left.
            let _ = waiter.miss.looked.send(());
        } else {
            self.waiters.push(waiter);
        }
    }
}

async fn next_of<T>(stream: &mut Option<BoxStream<'static, T>>) -> Option<T> {
    match stream {
        Some(stream) => stream.next().await,
        None => future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => future::pending().await,
    }
}

/// Subscribes after a pause.
fn subscribe(engine: Arc<dyn ContainerEngine>, pause: Duration) -> BoxFuture<'static, Result<Events, EngineError>> {
    async move {
        tokio::time::sleep(pause).await;
        lookups::answer_within(SUBSCRIBE, engine.subscribe()).await
    }
    .boxed()
}

/// Does what may block on a thread that may. One that panicked or was cancelled never comes back: the runtime is going down
/// then.
pub(super) fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> BoxFuture<'static, T> {
    let done = tokio::task::spawn_blocking(work);
    async move {
        match done.await {
            Ok(done) => done,
            Err(_) => future::pending().await,
        }
    }
    .boxed()
}

/// Whether an address is in a subnet.
fn within(address: IpAddr, (subnet, prefix): (IpAddr, u8)) -> bool {
    match (address, subnet) {
        (IpAddr::V4(a), IpAddr::V4(s)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
            a.to_bits() & mask == s.to_bits() & mask
        }
        (IpAddr::V6(a), IpAddr::V6(s)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
            a.to_bits() & mask == s.to_bits() & mask
        }
        _ => false,
    }
}
