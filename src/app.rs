//! The composition root: settings and ports become a running daemon.
//!
//! The only file that sees every other; nobody sees it.

mod base;
pub mod doctor;
mod freeze;
mod interception;
mod kept;
mod metrics;
mod network;
mod of_host;
mod probe;
mod standby;
mod systemd;

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, ArcSwapOption};
use futures_util::future::BoxFuture;
use sd_notify::NotifyState;
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use self::interception::{
    HostDoors, PORTS, give_up, guard, has_ipv6, intercept_ipv6, leave_namespaces, make_transparent,
};
pub use self::interception::{everything, plans};
use self::kept::Kept;
pub use self::systemd::Inherited;
use crate::admin::{
    self, BaseStatus, ClockStatus, ContainerStatus, CredentialStatus, EngineStatus, Explanation, Judgement,
    Observatory, RefusalStatus, RequestStatus, Status,
};
use crate::caller::address::EngineWord;
use crate::caller::cgroup::Cgroups;
use crate::caller::connection::Interfaces;
use crate::caller::kernel::{HostKernel, KernelError};
use crate::caller::level::{Lack, emulated, lacking};
use crate::caller::socket::DiagSocket;
use crate::clock::{Clock, rfc3339_seconds};
use crate::config::{Attach, Compat, CredentialSource, Nested, Proof, RELOADED, Settings};
use crate::containers::compat;
use crate::containers::compose::{self, ComposeError};
use crate::containers::docker::{DEFAULT_HOST, Engine, Lag, architecture};
use crate::containers::index::{EngineState, Index};
use crate::containers::watcher::{
    ContainerEngine, EngineError, Hold, Instances, Kernel, Ports, Watcher, own_environment,
};
use crate::containers::{Attachments, ContainerId, Definition, Level, NetworkMode, Record};
use crate::credentials::broker::{Broker, CredentialProvider, LINGER, LINGER_NEVER_STARTED, Lease, Limits};
use crate::credentials::offline::Offline;
use crate::credentials::sts::Sts;
use crate::credentials::{Session, offline};
use crate::host::apply::Interception;
use crate::host::{HostError, LINK, Plan};
use crate::instance::{At, FALLBACK_REGION, Instance, Ordered, Role, Surroundings, resolve, resolve_sparingly};
use crate::metadata::catalogue::REGION;
use crate::metadata::events::{Event, Kind};
use crate::metadata::identity::Signer;
use crate::orders::{Orders, Stops, to_stop};
use crate::server::{self, IMDS_PORT, RefusedConnection, Service};
use crate::telemetry::{printable, with_causes};
use crate::wire::imds::credentials_document;
use crate::wire::token::{TokenAuthority, TokenKey};

/// The address of the metadata service.
pub const IMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Its IPv6 address (EC2 user guide, "Access instance metadata").
pub const IMDS_ADDRESS_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The port that is listened on; the next free one if it is taken.
pub const DEFAULT_PORT: u16 = 51_254;
/// A clock that is off by more than so many seconds is warned of; AWS takes requests that are off by five minutes.
const CLOCK_IS_WRONG: u64 = 60;
/// What attach `host` is not.
pub const ATTACH_HOST: &str = "attach host protects identity, not confidentiality: it proves who asks, but a neighbour with \
    NET_RAW (Docker's default) on the same bridge can divert answers; --cap-drop NET_RAW, a network each, attach namespace, \
    or [serve] freeze_links = true closes that";

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The kernel cannot be asked.
    #[error("callers cannot be proven on this host")]
    Proof(#[from] KernelError),
    /// The kernel cannot be asked, and what is lacking for it is known.
    #[error(
        "callers cannot be proven here: {}\n\
         hint: as a container: {DOCKER_RUN}\n\
         hint: [serve] proof = \"address\" takes the engine's word for who is at an address; a neighbour with NET_RAW \
         (Docker's default) can then take another's credentials", listed(.0)
    )]
    Lacking(Vec<Lack>),
    /// What was asked for needs more than there is.
    #[error(
        "attach namespace is not possible here: {}\nhint: [serve] attach = \"auto\" or \"host\" goes with proof = \"address\"",
        listed(.0)
    )]
    NoNamespaces(Vec<Lack>),
    /// Host attach would take the host's own metadata service away.
    #[error(
        "{what} would take {IMDS_ADDRESS} away from this host, which has a metadata service of its own: {kept}\n\
         hint: attach = \"auto\" with full proof serves containers inside their namespaces, and leaves the host's own alone\n\
         hint: attach = \"host\" with [serve] host_service = \"keep\" intercepts what containers on bridges ask, and nobody else\n\
         hint: [serve] host_service = \"replace\" takes the address all the same: this host's own processes then lose their \
         metadata service, and with it their role"
    )]
    KeepsItsOwn {
        /// What was asked for, or is all that is possible.
        what: &'static str,
        /// Whose machine this is.
        kept: Kept,
    },
    /// There is nobody to ask about this host.
    #[error(
        "{NOTHING_OF_HOST}\nhint: it takes a machine of EC2 (its firmware says so), whose own service is left to it: [serve] host_service"
    )]
    NothingOfHost,
    /// By the address alone, and nobody has said that this is enough.
    #[error(
        "attach network proves callers by their address only\n\
         hint: [serve] proof = \"address\" says that this is meant; a neighbour with NET_RAW (Docker's default) can then take \
         another's credentials"
    )]
    NetworkProof,
    /// The address is not this container's.
    #[error("attach network: cannot listen on {IMDS_ADDRESS}:{IMDS_PORT}\nhint: {hint}")]
    Network {
        /// Why.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
    /// No sock_diag.
    #[error("the kernel cannot be asked about connections (sock_diag)\nhint: modprobe -a inet_diag tcp_diag")]
    Diag(#[source] io::Error),
    /// No port is free.
    #[error("cannot listen on {IMDS_ADDRESS}, ports {DEFAULT_PORT} to {}", DEFAULT_PORT + PORTS - 1)]
    Listen(#[source] io::Error),
    /// What is handed over is of another kind.
    #[error(
        "the service manager hands over (LISTEN_FDS) what is no TCP listener\n\
         hint: ListenStream={IMDS_ADDRESS}:{DEFAULT_PORT}, as in deploy/imds-router.socket"
    )]
    Inherited(#[source] io::Error),
    /// Interception cannot be put up.
    #[error("cannot make {IMDS_ADDRESS} ours on this host")]
    Host(#[from] HostError),
    /// The admin socket.
    #[error("cannot listen on the admin socket {}\nhint: [serve] admin_socket or --admin names another", path.display())]
    Admin {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Where metrics are asked for.
    #[error("cannot listen on {at} for metrics\nhint: [serve] metrics names another address")]
    Metrics {
        /// Where.
        at: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The state directory.
    #[error("cannot keep state in {}: {what}\nhint: [serve] state_dir names another directory", path.display())]
    State {
        /// Which file or directory.
        path: PathBuf,
        /// What was tried, or what is wrong with it.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// How the daemon runs as a container with all that it needs.
pub const DOCKER_RUN: &str = "docker run -d --name imds-router --restart unless-stopped --network host --pid host --cgroupns host \
    --cap-drop ALL --cap-add NET_ADMIN --cap-add SYS_ADMIN --cap-add SYS_PTRACE --cap-add DAC_OVERRIDE \
    --security-opt apparmor=unconfined --security-opt label=disable \
    -v /var/run/docker.sock:/var/run/docker.sock -v /sys/fs/cgroup:/sys/fs/cgroup:ro -v imds-router:/var/lib/imds-router \
    -v ~/.aws:/aws:ro -e IMDS_ROUTER_CREDENTIALS_AWS_DIR=/aws imds-router";

/// What is said where containers are to see what nobody says.
const NOTHING_OF_HOST: &str = "[metadata] base = \"host\": this host has no metadata service of EC2's that is its own, so that containers \
    see what is derived";

/// What is said of a container in the host's network where the host keeps its own metadata service.
const GETS_THE_HOSTS: &str = "it is in the host's network, where it gets the host's own metadata service, with the host's role, and \
    not this one: give it a network of its own";

fn listed(lacks: &[Lack]) -> String {
    let all: Vec<_> = lacks.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// What is lacking here for the kernel's word.
async fn lacks(settings: &Settings) -> Vec<Lack> {
    let engine = engine_host(settings);
    let mut lacks = lacking(&engine).await;
    lacks.extend(architecture(&engine).await.and_then(|engines| emulated(&engines)));
    lacks
}

/// What callers are proven by here, with these settings.
async fn level(settings: &Settings, kept: Option<Kept>) -> Result<Level, AppError> {
    if settings.attach == Attach::Network {
        return match (kept, settings.proof) {
            // Docker's network with that address takes it away from the host's processes, too.
            (Some(kept), _) => Err(AppError::KeepsItsOwn {
                what: "attach = \"network\"",
                kept,
            }),
            (None, Proof::Address) => Ok(Level::Address),
            (None, Proof::Full) => Err(AppError::NetworkProof),
        };
    }
    let lacks = lacks(settings).await;
    // Whoever says both has been told: containers on bridges are intercepted, and the host is not.
    let meant = settings.attach == Attach::Host && kept.is_some_and(|kept| kept.meant);
    let over_the_host = match (lacks.is_empty(), settings.proof, settings.attach) {
        (_, _, Attach::Host) => Some("attach = \"host\""),
        (false, Proof::Address, Attach::Auto) => Some("attach host, which is all that is possible without full proof,"),
        _ => None,
    };
    if let (Some(kept), Some(what), false) = (kept, over_the_host, meant) {
        return Err(AppError::KeepsItsOwn { what, kept });
    }
    match (lacks.is_empty(), settings.proof, settings.attach) {
        (true, ..) => Ok(Level::Full),
        (false, Proof::Full, _) => Err(AppError::Lacking(lacks)),
        (false, Proof::Address, Attach::Namespace) => Err(AppError::NoNamespaces(lacks)),
        (false, Proof::Address, Attach::Auto | Attach::Host | Attach::Network) => {
            for lack in lacks {
                warn!(%lack, "callers are proven by their address only, as the configuration allows");
            }
            Ok(Level::Address)
        }
    }
}

/// Runs until `shutdown` completes, then takes everything down again. What comes from `reloads` takes the place of
/// `settings`, as far as a running daemon can change them. It listens by what it has `inherited`, if that is of use.
///
/// # Errors
/// Why it could not start, or not take everything down.
pub async fn run(
    settings: Settings,
    mut inherited: Inherited,
    reloads: mpsc::Receiver<Settings>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), AppError> {
    let clock = Clock::system();
    let mut shutdown = std::pin::pin!(shutdown);
    let tokens = token_authority(&settings.state_dir, &clock)?;
    let signer = Arc::new(signer(&settings.state_dir)?);
    let orders = Arc::new(orders(&settings.state_dir)?);
    let kept = Kept::here(&settings);
    let level = level(&settings, kept).await?;
    let ec2 = kept.and_then(|kept| kept.ec2());
    if settings.metadata_of_host && ec2.is_none() {
        return Err(AppError::NothingOfHost);
    }
    let on_network = settings.attach == Attach::Network;
    // What is asked over bridges is intercepted, though the host keeps its own.
    let between = kept.is_some() && settings.attach == Attach::Host;
    // Where it listens outside of containers, and what it puts up there.
    let (listener, plan) = match kept {
        Some(kept) if !between => (None, Some(kept.plan(true))),
        None if on_network => (Some(network::listen()?), None),
        kept => {
            let (listener, listening) = inherited.listen(IMDS_ADDRESS.into()).map_err(AppError::Listen)?;
            let plan = match kept {
                Some(kept) => {
                    make_transparent(&listener).map_err(AppError::Listen)?;
                    kept.between(listening)
                }
                None => Plan::host(listening),
            };
            (Some((listener, listening)), Some(plan))
        }
    };
    let listener = listener.map(|(listener, listening)| Ok((TcpListener::from_std(listener)?, listening)));
    let listener = listener.transpose().map_err(AppError::Listen)?;

    let sts = match settings.source {
        CredentialSource::Sts => {
            let bases = base::bases(&settings, &clock);
            Some((Sts::new(bases.clone(), clock.clone()), bases))
        }
        CredentialSource::Offline => None,
    };
    let mut around = Surroundings {
        host: host_name(),
        ..Surroundings::default()
    };
    if let Some((sts, _)) = &sts {
        // Before anybody is looked at: a session in another region is another session.
        around.base.region = sts.region(None).await;
    }
    let provider: Box<dyn CredentialProvider> = match &sts {
        Some((sts, _)) => Box::new(sts.clone()),
        None => Box::new(Offline::new(clock.clone())),
    };
    let limits = Limits {
        calls: settings.sts_calls,
        min_remaining: settings.min_remaining,
    };
    let broker = Broker::new(provider, credentials_document, clock.clone(), limits);
    let (changed, changes) = watch::channel(0);
    let resolver = Arc::new(Resolver {
        settings: ArcSwap::from_pointee(settings),
        level,
        kept,
        of_host_problem: ArcSwapOption::empty(),
        around: ArcSwap::from_pointee(around),
        orders,
        clock: clock.clone(),
        broker: broker.clone(),
        changed,
        wanted: base::Wanted::default(),
        sts: sts.as_ref().map(|(sts, _)| sts.clone()),
    });
    let settings = resolver.settings.load_full();

    let (index, misses) = Index::new();
    let own_ends = Box::new(DiagSocket::open().map_err(AppError::Diag)?);
    let service = Service::new(
        index.clone(),
        broker.clone(),
        (tokens, signer),
        clock.clone(),
        server::Options {
            hold: settings.hold,
            hosts: settings.hosts.clone(),
            ec2_error_documents: settings.ec2_error_documents,
        },
        own_ends,
    );
    let kernel: Arc<dyn Kernel> = match level {
        Level::Full => Arc::new(HostKernel::new(Arc::new(HostDoors {
            service: service.clone(),
            runtime: Handle::current(),
            ipv6: settings.ipv6,
            nested: settings.nested == Nested::Outer,
        }))?),
        Level::Address => Arc::new(EngineWord::new(clock.clone())),
    };
    let host = Cgroups::this_threads_namespace().map_err(|error| KernelError::Namespace(error.to_string()))?;
    let engine = engine_host(&settings);
    let docker = Engine::new(&engine, clock.clone());
    let lag = docker.lag();
    let port: Arc<dyn ContainerEngine> = Arc::new(docker);
    let permits = resolver.clone();
    let stops = Stops {
        orders: resolver.orders.clone(),
        index: index.clone(),
        engine: port.clone(),
        clock: clock.clone(),
        changed: resolver.changed.subscribe(),
        permitted: Box::new(move || permits.settings.load().triggers_may_stop),
    };
    let ports = Ports {
        engine: port,
        kernel,
        instances: resolver.clone(),
        changed: changes,
    };
    let observer = Arc::new(Observer {
        resolver: resolver.clone(),
        service: service.clone(),
        clock: clock.clone(),
        listening: listener.as_ref().map(|(_, listening)| *listening),
        standing_by: ArcSwapOption::empty(),
        lag,
    });
    let metrics = match settings.metrics {
        Some(at) => {
            let failed = |source| AppError::Metrics { at, source };
            Some(TcpListener::bind(at).await.map_err(failed)?)
        }
        None => None,
    };
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(systemd::alive());
    let path = settings.admin_socket.clone();
    // While another daemon answers on that socket it is that one's.
    let admin_is_anothers = another_answers(&path);
    if !admin_is_anothers {
        tasks.spawn(serve_admin(admin_listener(&path)?, path.clone(), observer.clone()));
    }

    if let Some(metrics) = metrics {
        tasks.spawn(admin::serve_metrics(metrics, observer.clone()));
    }

    // From here on the host is changed; what fails takes its own part down again. The address is there first, since its
    // rules are the lock of this host; nobody is answered before the rest is.
    let mut interception = Vec::new();
    if let Some(plan) = plan {
        let ours = standby::our_turn(&plan, &clock, shutdown.as_mut(), |who| {
            if let Some(who) = &who {
                // It is as it should be, and whoever waits for it goes on.
                systemd::tell(&[
                    NotifyState::Ready,
                    NotifyState::Status(&format!("stands by: {who} serves this host")),
                ]);
            }
            observer.standing_by.store(who.map(Arc::new));
        });
        let Some(ours) = ours.await? else {
            return Ok(());
        };
        interception = match &kept {
            Some(kept) => kept.complete(ours, between, &clock).await?,
            None => vec![ours],
        };
    }
    if admin_is_anothers {
        tasks.spawn(take_over_admin(path, observer.clone()));
    }
    // What goes with its owner.
    let frozen = match settings.freeze_links {
        true => match freeze::freeze(&clock).await {
            Ok(frozen) => Some(frozen),
            Err(error) => {
                give_up(interception);
                return Err(error.into());
            }
        },
        false => None,
    };
    let interfaces = Arc::new(Interfaces::new(LINK));
    if kept.is_none() && !on_network && settings.ipv6 && has_ipv6() {
        match intercept_ipv6(&mut inherited, &clock).await {
            Ok((also, listener)) => {
                interception.push(also);
                tasks.spawn(server::accept_on_host(
                    listener,
                    interfaces.clone(),
                    host,
                    level,
                    service.clone(),
                ));
            }
            Err(why) => warn!(why, "not served at {IMDS_ADDRESS_IPV6}"),
        }
    }
    for useless in inherited.left() {
        match kept {
            Some(_) => {
                info!(listening = %useless, "the listener that the service manager holds is not needed: this host keeps its own service")
            }
            None => {
                warn!(listening = %useless, "the listener that the service manager holds is not at an address of the service; not used")
            }
        }
    }
    let taken_over = interception.iter().flat_map(Interception::taken_over);
    // What rejects is meant to have stayed.
    for part in taken_over.filter(|_| kept.is_none()) {
        warn!(%part, "was there already: an earlier daemon did not end cleanly; taken over");
    }
    if let Some(service) = ec2 {
        // Before anybody is looked at: nobody is to see one instance first and then another.
        let pause = of_host::learn(&service, &resolver).await;
        tasks.spawn(of_host::keep(service, resolver.clone(), pause));
    }
    tasks.spawn(Watcher::new(ports, index.clone(), misses, clock.clone()).run());
    match listener {
        Some((listener, _)) if on_network => {
            tasks.spawn(server::accept_on_network(listener, interfaces, host, service));
        }
        Some((listener, _)) => {
            // Who comes in neither over a bridge nor from this host is nobody's container where the kernel tells bridges apart.
            let level = if between { Level::Full } else { level };
            tasks.spawn(server::accept_on_host(listener, interfaces, host, level, service));
        }
        None => {}
    }
    if let Some(frozen) = frozen {
        tasks.spawn(freeze::keep_frozen(frozen, index.clone()));
    }
    tasks.spawn(stops.run());
    tasks.spawn(broker.watch_clocks());
    tasks.spawn(reload(reloads, resolver.clone()));
    if let Some((sts, bases)) = sts {
        tasks.spawn(bases.clone().watch_files());
        tasks.spawn(base::learn(sts, bases, resolver.clone(), index.clone()));
    }
    info!(
        version = env!("CARGO_PKG_VERSION"), attach = resolver.attach(), proof = resolver.proof(), listening = observer.listening(), engine,
        admin = %settings.admin_socket.display(), "serving"
    );
    for warning in resolver.warnings() {
        warn!("{warning}");
    }
    systemd::tell(&[NotifyState::Ready, NotifyState::Status("serves this host")]);
    let interception = guard(interception, shutdown).await;
    info!("stopping");
    systemd::tell(&[NotifyState::Stopping]);
    // The address goes first: nobody is answered by half a daemon. What came last goes first.
    let down: Vec<_> = interception.into_iter().rev().map(Interception::down).collect();
    tasks.shutdown().await;
    leave_namespaces(&index).await;
    down.into_iter().collect::<Result<(), _>>().map_err(AppError::from)
}

/// Takes each new configuration, and has every container looked at again: a role that is no longer allowed is no longer
/// served from then on.
async fn reload(mut reloads: mpsc::Receiver<Settings>, resolver: Arc<Resolver>) {
    while let Some(new) = reloads.recv().await {
        let (settings, whole) = resolver.settings.load().reloaded(&new);
        resolver.settings.store(Arc::new(settings));
        resolver.changed.send_modify(|version| *version += 1);
        resolver.broker.try_again(|_| true);
        info!("the configuration has been read again");
        if !whole {
            warn!(
                "some of what has changed in it takes effect when the daemon is started again: {RELOADED} take effect now"
            );
        }
        for warning in resolver.warnings() {
            warn!("{warning}");
        }
    }
}

/// What `check` found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// A line a container, for people.
    pub text: String,
    /// How many do not get what they ask for.
    pub problems: usize,
}

/// What each container of this host would get, without serving anybody; with `compat`, also what it got from the settings
/// of the programs that `[compat]` knows.
///
/// # Errors
/// When the engine does not answer.
pub async fn check(settings: Settings, compat: bool) -> Result<Checked, EngineError> {
    let host = engine_host(&settings);
    let engine = Engine::new(&host, Clock::system());
    // The subscription connects; the events themselves are not wanted.
    drop(engine.subscribe().await?);
    let mut checker = Checker::new(settings).await;
    let mut attachments = attachments(&engine).await?;
    for row in engine.containers().await? {
        let image = engine.image(&row.image_id).await?;
        let all = engine
            .inspect(&row.id)
            .await?
            .map(|it| it.environment)
            .unwrap_or_default();
        let attached = attachments.remove(&row.id).unwrap_or_default();
        let settings = &checker.settings;
        let prefix = format!("{}.", settings.label_prefix);
        let mut whole = row.clone().define(None, true, &prefix);
        let mut definition = row.define(image.as_ref(), settings.image_labels, &prefix);
        definition.environment = Some(own_environment(&all, image.as_ref(), settings.image_labels));
        checker.look_at(&definition, &attached).await;
        let name = printable(&definition.name, 40);
        for label in &definition.image_labels {
            checker.text.push_str(&format!(
                "{name}: label {label} comes from the image and does not count\n"
            ));
        }
        let settings = &checker.settings;
        let found = compat::found(&whole.labels, &all, &settings.label_prefix);
        if !compat || found.is_empty() {
            continue;
        }
        // What the other program saw: all labels and variables, the image's among them, and none of ours.
        whole
            .labels
            .retain(|label, _| !label.starts_with(&prefix) || found.contains(label));
        whole.environment = Some(all);
        let old = Settings {
            compat: Compat::ALL,
            allow: Vec::new(),
            default_role: None,
            ..settings.clone()
        };
        let new = Settings {
            compat: Compat::ALL,
            ..settings.clone()
        };
        let (by_old, by_new) = (
            checker.gets(&whole, &attached, &old).0,
            checker.gets(&definition, &attached, &new).0,
        );
        let found = found.join(", ");
        checker.text.push_str(&format!(
            "{name}:   by {found} alone: {by_old}\n{name}:   with all of [compat]: {by_new}\n"
        ));
    }
    Ok(checker.end(&format!("containers on {host}")))
}

/// What each service of a compose file would get; the text is what `docker compose config` prints.
///
/// # Errors
/// When it is not.
pub async fn check_compose(settings: Settings, text: &str) -> Result<Checked, ComposeError> {
    let services = compose::services(text)?;
    let mut checker = Checker::new(settings).await;
    for (definition, attached) in &services {
        checker.look_at(definition, attached).await;
    }
    Ok(checker.end("services"))
}

/// Finds out what containers would get.
struct Checker {
    settings: Settings,
    around: Surroundings,
    sts: Option<Sts>,
    text: String,
    containers: usize,
    problems: usize,
}

impl Checker {
    async fn new(settings: Settings) -> Self {
        let mut around = Surroundings {
            host: host_name(),
            ..Surroundings::default()
        };
        let mut text = String::new();
        let sts = (settings.source == CredentialSource::Sts).then(|| {
            let clock = Clock::system();
            Sts::new(base::bases(&settings, &clock), clock)
        });
        if let Some(sts) = &sts {
            let (base, _) = base::ask(sts, None).await;
            let said = base.arn.as_ref().or(base.problem.as_ref());
            text.push_str(&format!(
                "base credentials: {}\n",
                said.map_or("unknown", String::as_str)
            ));
            base::note(&mut around, None, base);
        }
        text.push_str(&rules(&settings));
        if settings.metadata_of_host {
            let service = Kept::here(&settings).and_then(|kept| kept.ec2());
            let found = match service {
                Some(service) => of_host::gather(&service).await,
                None => Err(NOTHING_OF_HOST.to_owned()),
            };
            match found {
                Ok(found) => around.instance = Arc::new(found),
                Err(why) => text.push_str(&format!("warning: what EC2 says of this host: {why}\n")),
            }
        }
        Self {
            settings,
            around,
            sts,
            text,
            containers: 0,
            problems: 0,
        }
    }

    /// One container: a line.
    async fn look_at(&mut self, definition: &Definition, attached: &Attachments) {
        let first = self.resolved(definition, attached, &self.settings);
        if let (Some(sts), Some(profile)) = (&self.sts, &first.profile)
            && !self.around.profiles.contains_key(profile)
        {
            let (base, _) = base::ask(sts, Some(profile)).await;
            base::note(&mut self.around, Some(profile), base);
        }
        let (said, fine) = self.gets(definition, attached, &self.settings);
        self.containers += 1;
        self.problems += usize::from(!fine);
        self.text
            .push_str(&format!("{}: {said}\n", printable(&definition.name, 40)));
    }

    fn resolved(&self, definition: &Definition, attached: &Attachments, settings: &Settings) -> Instance {
        resolve(definition, attached, SystemTime::UNIX_EPOCH, settings, &self.around)
    }

    fn gets(&self, definition: &Definition, attached: &Attachments, settings: &Settings) -> (String, bool) {
        described(&self.resolved(definition, attached, settings))
    }

    fn end(mut self, of_what: &str) -> Checked {
        self.text.push_str(&format!("{} {of_what}\n", self.containers));
        Checked {
            text: self.text,
            problems: self.problems,
        }
    }
}

/// What a container gets, and whether that is what it asks for.
fn described(instance: &Instance) -> (String, bool) {
    let rule = instance
        .rule
        .as_ref()
        .map(|rule| format!(", by {rule}"))
        .unwrap_or_default();
    match &instance.role {
        _ if !instance.endpoint => (
            "not served: no label of ours, or its endpoint is disabled".to_owned(),
            true,
        ),
        Role::None => ("metadata, no role".to_owned(), true),
        Role::Session(session) => (format!("{}{rule}", printable(&session.to_string(), 400)), true),
        Role::Pending(why) | Role::Refused(why) => (format!("no credentials: {}", printable(why, 800)), false),
    }
}

/// What there is to say about the rules themselves.
fn rules(settings: &Settings) -> String {
    let mut text = String::new();
    if settings.allow.is_empty() {
        text.push_str("no [[allow]] rules: any container gets any role that it names and that the base may assume\n");
    }
    for rule in &settings.allow {
        if let Some(keys) = rule.rests_on_its_applicants() {
            text.push_str(&format!(
                "warning: {rule} rests on {keys}: whoever writes a container's role label writes that, too, so the rule \
                 keeps mistakes out, but nobody who means it; image_id would\n"
            ));
        }
    }
    text
}

/// Which container is on which network.
async fn attachments(engine: &Engine) -> Result<HashMap<ContainerId, Attachments>, EngineError> {
    let mut all: HashMap<ContainerId, Attachments> = HashMap::new();
    for id in engine.networks().await? {
        // One that has gone meanwhile has nobody on it.
        let Some(network) = engine.network(&id).await? else {
            continue;
        };
        for (container, endpoint) in network.endpoints {
            all.entry(container).or_default().0.insert(id.clone(), endpoint);
        }
    }
    Ok(all)
}

/// The engine that is meant.
pub fn engine_host(settings: &Settings) -> String {
    let variable = || std::env::var("DOCKER_HOST").ok().filter(|host| !host.is_empty());
    settings
        .docker_host
        .clone()
        .or_else(variable)
        .unwrap_or_else(|| DEFAULT_HOST.to_owned())
}

/// What this host calls itself.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// The mode of the admin socket: root and its group.
const ADMIN_MODE: u32 = 0o660;

/// Whether somebody answers there.
fn another_answers(admin_socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(admin_socket).is_ok()
}

/// The file of the admin socket. Dropping it removes it, unless it is another daemon's by now.
struct AdminFile {
    path: PathBuf,
    inode: Option<u64>,
}

impl AdminFile {
    fn inode(path: &Path) -> Option<u64> {
        std::fs::symlink_metadata(path).map(|it| it.ino()).ok()
    }
}

impl Drop for AdminFile {
    fn drop(&mut self) {
        if Self::inode(&self.path) == self.inode {
            // What is gone already is fine.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Answers on the admin socket until the task is dropped.
async fn serve_admin(listener: UnixListener, path: PathBuf, observer: Arc<Observer>) {
    let inode = AdminFile::inode(&path);
    let _file = AdminFile { path, inode };
    admin::serve(listener, observer).await;
}

/// As [`serve_admin`], as soon as the daemon that has served before has left the socket.
async fn take_over_admin(path: PathBuf, observer: Arc<Observer>) {
    let mut said = false;
    loop {
        match admin_listener(&path) {
            Ok(listener) => return serve_admin(listener, path, observer).await,
            Err(error) if !said => warn!(error = with_causes(&error), "no admin socket yet"),
            Err(_) => {}
        }
        said = true;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

fn admin_listener(path: &Path) -> Result<UnixListener, AppError> {
    let failed = |source| AppError::Admin {
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed)?;
    }
    // What a crash left; one that still answers is another daemon's, and the table of rules will say so.
    if std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket()) && !another_answers(path) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(ADMIN_MODE)).map_err(failed)?;
    Ok(listener)
}

fn token_authority(state_dir: &Path, clock: &Clock) -> Result<TokenAuthority, AppError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(path).map_err(|source| AppError::State {
        path: path.into(),
        what: "cannot be read",
        source,
    })?;
    Ok(TokenAuthority::new(
        &token_key(state_dir)?,
        boot_id.trim(),
        clock.clone(),
    ))
}

/// The key of tokens: kept on disk, so that a restart of the daemon logs nobody out.
fn token_key(state_dir: &Path) -> Result<TokenKey, AppError> {
    let path = state_dir.join("token.key");
    let make = || {
        let mut bytes = vec![0; 32];
        getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(bytes)
    };
    let what = "is not a key that only we know; remove it, and clients ask for new tokens";
    let bytes = kept_secret(&path, make, what)?;
    let bytes = bytes.try_into().map_err(|_| AppError::State {
        path,
        what,
        source: io::Error::other("expected 32 bytes"),
    })?;
    Ok(TokenKey(bytes))
}

/// The key of identity documents: kept on disk, so that its certificate stays what it is.
fn signer(state_dir: &Path) -> Result<Signer, AppError> {
    let path = state_dir.join("identity.pem");
    let make = || Signer::generate().map(String::into_bytes).map_err(io::Error::other);
    let what = "is not a key that only we know; remove it, and identities are signed with a new one";
    let bytes = kept_secret(&path, make, what)?;
    Signer::new(&String::from_utf8_lossy(&bytes)).map_err(|error| AppError::State {
        path,
        what,
        source: io::Error::other(error),
    })
}

/// What was ordered for containers: kept on disk, so that a restart of the daemon forgets nothing.
fn orders(state_dir: &Path) -> Result<Orders, AppError> {
    let path = state_dir.join("orders.json");
    let what = "is not what this daemon has written; remove it, and what was ordered is forgotten";
    let kept = kept_secret(&path, || Ok(Vec::new()), what)?;
    let written = path.clone();
    let keep = Box::new(move |bytes: &[u8]| write_whole(&written, bytes));
    Orders::new(&kept, keep).map_err(|error| AppError::State {
        path,
        what,
        source: io::Error::other(error),
    })
}

/// Writes a file that only we can read, whole or not at all: a crash in between leaves what was there before.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(no_follow())
        .open(&new)?;
    file.write_all(bytes)?;
    std::fs::rename(&new, path)
}

/// Linux O_NOFOLLOW (open(2)).
fn no_follow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

/// The most that a file of ours may hold.
const MOST_KEPT: u64 = 16 * 1024 * 1024;

/// A secret that is kept on disk. Made on first use, 0600 in a 0700 directory; no symbolic link is followed, and a file that
/// others could have read is not used. `bad`: what is said of such a file.
fn kept_secret(
    path: &Path,
    make: impl FnOnce() -> io::Result<Vec<u8>>,
    bad: &'static str,
) -> Result<Vec<u8>, AppError> {
    let state = |what| {
        let path = path.to_owned();
        move |source| AppError::State { path, what, source }
    };
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(state("its directory cannot be made"))?;
    }
    match std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(no_follow())
        .open(path)
    {
        Ok(file) => {
            let meta = file.metadata().map_err(state("cannot be looked at"))?;
            let own = meta.uid() == rustix::process::geteuid().as_raw();
            if !meta.is_file() || meta.mode() & 0o077 != 0 || !own {
                let source = io::Error::other("expected a file of mode 0600, owned by this user");
                return Err(state(bad)(source));
            }
            let mut bytes = Vec::new();
            file.take(MOST_KEPT)
                .read_to_end(&mut bytes)
                .map_err(state("cannot be read"))?;
            Ok(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let bytes = make().map_err(state("cannot be made up"))?;
            write_whole(path, &bytes).map_err(state("cannot be written"))?;
            Ok(bytes)
        }
        Err(error) => Err(state("cannot be opened")(error)),
    }
}

/// Settings, and what was learnt since.
struct Resolver {
    settings: ArcSwap<Settings>,
    level: Level,
    /// The host has its own metadata service, and keeps it.
    kept: Option<Kept>,
    /// Why EC2 says nothing of this host, though containers are to see that.
    of_host_problem: ArcSwapOption<String>,
    around: ArcSwap<Surroundings>,
    orders: Arc<Orders>,
    clock: Clock,
    broker: Arc<Broker>,
    changed: watch::Sender<u64>,
    /// Profiles whose base credentials somebody's role depends on.
    wanted: base::Wanted,
    /// Where real credentials come from.
    sts: Option<Sts>,
}

impl Resolver {
    fn region(&self) -> String {
        let around = self.around.load();
        let of_host = || around.instance.get(REGION).cloned();
        self.settings
            .load()
            .region
            .clone()
            .or_else(of_host)
            .or_else(|| around.base.region.clone())
            .unwrap_or_else(|| FALLBACK_REGION.to_owned())
    }

    fn account(&self) -> Option<String> {
        let offline =
            || (self.settings.load().source == CredentialSource::Offline).then(|| offline::ACCOUNT.to_owned());
        self.settings
            .load()
            .account_id
            .clone()
            .or_else(|| self.around.load().base.account.clone())
            .or_else(offline)
    }

    fn attach(&self) -> &'static str {
        match self.settings.load().attach {
            Attach::Network => "network",
            _ if self.attaches() => "namespace",
            _ => "host",
        }
    }

    fn proof(&self) -> &'static str {
        match self.level {
            Level::Full => "full",
            Level::Address => "address",
        }
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.settings.load().source == CredentialSource::Offline {
            warnings.push("credentials are fakes (offline): AWS does not know them".to_owned());
        }
        if self.settings.load().allow.is_empty() {
            warnings.push(
                "any container gets any role that it names and that the base credentials may assume: \
                 there are no [[allow]] rules"
                    .to_owned(),
            );
        }
        let around = self.around.load();
        let known = around.base.region.is_some() || around.instance.contains_key(REGION);
        if self.settings.load().region.is_none() && !known {
            warnings.push(format!(
                "no region is configured; {FALLBACK_REGION} is a guess: --region, AWS_REGION or region = \"…\""
            ));
        }
        if let Some(kept) = self.kept {
            warnings.push(format!(
                "this host keeps its own metadata service ({kept}): containers in the host's network are its processes, and get \
                 that one, with the host's role; all others are rejected there until they are served"
            ));
            if kept.resolves() && self.attaches() {
                warnings.push(kept::NAMES.to_owned());
            }
        }
        warnings.extend(self.of_host_problem.load().as_deref().cloned());
        if self.settings.load().metadata_of_host && self.kept.is_none_or(|kept| kept.ec2().is_none()) {
            warnings.push(NOTHING_OF_HOST.to_owned());
        }
        if self.level == Level::Address {
            warnings.push(
                "callers are proven by their address only: a neighbour with NET_RAW on the same bridge can send with it and \
                 take another's credentials; --cap-drop NET_RAW, a network each, or full proof closes that"
                    .to_owned(),
            );
        } else if !self.attaches() && !self.settings.load().freeze_links {
            warnings.push(ATTACH_HOST.to_owned());
        }
        warnings
    }
}

impl Instances for Resolver {
    fn resolve(&self, container: &Arc<Definition>, attachments: &Arc<Attachments>, started: SystemTime) -> Instance {
        let at = At {
            started,
            now: self.clock.wall(),
            ordered: self.orders.of(&container.id).unwrap_or_default(),
        };
        let (settings, around) = (self.settings.load_full(), self.around.load_full());
        let instance = resolve_sparingly(container, attachments, at, &settings, &around);
        if let Some(profile) = &instance.profile {
            self.want(profile);
        }
        instance
    }

    fn hold(&self, session: &Arc<Session>) -> Box<dyn Hold> {
        let mut lease = self.broker.lease(session);
        lease.set_linger(LINGER_NEVER_STARTED);
        Box::new(lease)
    }

    fn attaches(&self) -> bool {
        let inside = matches!(self.settings.load().attach, Attach::Auto | Attach::Namespace);
        self.level == Level::Full && inside
    }

    fn image_labels_count(&self) -> bool {
        self.settings.load().image_labels
    }

    fn label_prefix(&self) -> String {
        format!("{}.", self.settings.load().label_prefix)
    }
}

impl Hold for Lease {
    fn session(&self) -> &Arc<Session> {
        Self::session(self)
    }

    fn started(&mut self) {
        self.set_linger(LINGER);
    }
}

/// Makes `status`.
struct Observer {
    resolver: Arc<Resolver>,
    service: Arc<Service>,
    clock: Clock,
    /// Where, on the host; `None`: nowhere, since that has its own.
    listening: Option<SocketAddr>,
    /// Who serves this host instead.
    standing_by: ArcSwapOption<String>,
    lag: Arc<Lag>,
}

impl Observatory for Observer {
    fn status(&self) -> Status {
        let (state, reason) = match &*self.service.index.engine() {
            EngineState::Away(why) => ("away", Some(why.clone())),
            EngineState::Synchronising => ("synchronising", None),
            EngineState::Synchronised => ("synchronised", None),
        };
        let source = match self.resolver.settings.load().source {
            CredentialSource::Sts => "sts",
            CredentialSource::Offline => "offline",
        };
        let standing_by = self.standing_by.load_full();
        let standing_by = standing_by
            .map(|who| format!("standing by: {who} serves this host; this one takes over when that one ends"));
        let refused = self
            .service
            .refusals()
            .into_iter()
            .map(|(reason, count)| (reason.to_owned(), count));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            attach: self.resolver.attach().to_owned(),
            proof: self.resolver.proof().to_owned(),
            source: source.to_owned(),
            listening: self.listening(),
            engine: EngineStatus {
                state: state.to_owned(),
                reason,
            },
            region: self.resolver.region(),
            account: self.resolver.account(),
            warnings: self
                .resolver
                .warnings()
                .into_iter()
                .chain(self.clock_warnings())
                .chain(standing_by)
                .collect(),
            bases: self.bases(),
            clock: self.clock_status(),
            containers: self
                .service
                .index
                .all()
                .iter()
                .map(|record| self.container(record))
                .collect(),
            refused_connections: refused.collect::<BTreeMap<_, _>>(),
        }
    }

    fn explain(&self, container: &str) -> Option<Explanation> {
        let record = self.meant(container)?;
        let about = |refused: &RefusedConnection| match refused.refusal.container() {
            Some(container) => *container == record.definition.id,
            None => record
                .attachments
                .addresses()
                .any(|address| address == refused.client.ip()),
        };
        let refused = self
            .service
            .last_refusals()
            .into_iter()
            .filter(about)
            .map(|refused| RefusalStatus {
                at: rfc3339_seconds(refused.at),
                client: refused.client.to_string(),
                reason: refused.refusal.reason().to_owned(),
                evidence: refused.refusal.to_string(),
            });
        Some(Explanation {
            id: record.definition.id.as_str().to_owned(),
            name: record.definition.name.clone(),
            steps: self.judge(&record),
            refused: refused.collect(),
        })
    }

    fn trust(&self, container: &str) -> Option<Vec<admin::Trust>> {
        let record = self.meant(container)?;
        let around = self.resolver.around.load();
        Some(match record.instance.role.session().map(|session| &**session) {
            Some(Session::Role(session)) => {
                base::trust(session, around.base(session.profile.as_deref()).arn.as_deref())
            }
            _ => Vec::new(),
        })
    }

    fn modify(&self, container: &str, modify: &admin::Modify) -> Result<admin::Options, admin::NotDone> {
        let record = self.meant(container).ok_or(admin::NotDone::NoContainer)?;
        let hops = modify.http_put_response_hop_limit;
        if hops.is_some_and(|hops| !(1..=64).contains(&hops)) {
            return Err(admin::NotDone::Wrong(
                "http-put-response-hop-limit: expected a whole number from 1 to 64".to_owned(),
            ));
        }
        self.order(&record, |ordered| {
            let options = &mut ordered.options;
            options.endpoint = modify.http_endpoint.or(options.endpoint);
            options.tokens_required = modify.http_tokens_required.or(options.tokens_required);
            options.hop_limit = hops.or(options.hop_limit);
            options.tags = modify.instance_metadata_tags.or(options.tags);
            options.ipv6 = modify.http_protocol_ipv6.or(options.ipv6);
        })?;
        let container = &record.definition;
        let attachments = &record.attachments;
        let started = record
            .life
            .as_ref()
            .map_or_else(|| self.clock.wall(), |life| life.started);
        let instance = self.resolver.resolve(container, attachments, started);
        let word = |on| if on { "enabled" } else { "disabled" }.to_owned();
        Ok(admin::Options {
            http_endpoint: word(instance.endpoint),
            http_tokens: if instance.tokens_required {
                "required"
            } else {
                "optional"
            }
            .to_owned(),
            http_put_response_hop_limit: instance.hop_limit,
            instance_metadata_tags: word(instance.tags),
            http_protocol_ipv6: word(instance.ipv6),
        })
    }

    fn trigger(&self, container: &str, trigger: &admin::Trigger) -> Result<Vec<admin::EventStatus>, admin::NotDone> {
        let wrong = |text: String| admin::NotDone::Wrong(text);
        let record = self.meant(container).ok_or(admin::NotDone::NoContainer)?;
        let kind = Kind::parse(&trigger.event).ok_or_else(|| {
            let names: Vec<_> = Kind::ALL.into_iter().map(Kind::name).collect();
            wrong(format!("event {:?}: expected {}", trigger.event, names.join(", ")))
        })?;
        let action = kind.action(trigger.action.as_deref()).ok_or_else(|| {
            let typed = trigger.action.as_deref().unwrap_or_default();
            match kind.actions() {
                [] => wrong(format!("action {typed:?}: {} has none to choose", kind.name())),
                actions => wrong(format!("action {typed:?}: expected {}", actions.join(", "))),
            }
        })?;
        let decided = self.clock.wall_seconds();
        let wait = trigger.in_seconds.unwrap_or(kind.lead().as_secs());
        if wait > MOST_AHEAD {
            return Err(wrong(format!("in {wait} s: expected at most a year")));
        }
        let stops = match trigger.stop {
            true if trigger.cancel => return Err(wrong("stop and cancel: expected one of them".to_owned())),
            true => {
                let permitted = self.resolver.settings.load().triggers_may_stop;
                Some(to_stop(&record, kind, permitted).map_err(|why| wrong(why.to_string()))?)
            }
            false => None,
        };
        let known = record.instance.events.iter().find(|event| event.kind == kind).cloned();
        if trigger.cancel && known.as_ref().is_none_or(|event| event.cancelled) {
            return Err(wrong(format!("there is no {} to cancel", kind.name())));
        }
        let event = match known {
            // One that a label has brought is called off by an order, too.
            Some(event) if trigger.cancel => Event {
                cancelled: true,
                ..event
            },
            _ => Event {
                kind,
                action: action.to_owned(),
                decided,
                at: decided + wait,
                cancelled: false,
                stops,
            },
        };
        let ordered = self.order(&record, |ordered| {
            ordered.events.retain(|it| it.kind != kind);
            ordered.events.push(event);
        })?;
        let mut all: Vec<_> = record.instance.events.clone();
        all.retain(|event| !ordered.events.iter().any(|it| it.kind == event.kind));
        all.extend(ordered.events);
        Ok(self.event_statuses(&all))
    }

    fn events(&self, container: &str) -> Option<Vec<admin::EventStatus>> {
        Some(self.event_statuses(&self.meant(container)?.instance.events))
    }

    fn identity_certificate(&self) -> String {
        self.service.signer.certificate().to_owned()
    }

    fn login(&self, profile: Option<&str>, handover: &admin::Handover) -> Result<String, String> {
        match &self.resolver.sts {
            Some(sts) => base::login(sts, profile, handover),
            None => Err("this daemon is offline: it has no base credentials".to_owned()),
        }
    }

    fn metrics(&self) -> (&'static str, String) {
        (metrics::CONTENT_TYPE, metrics::text(self))
    }

    fn readiness(&self) -> BoxFuture<'_, Result<String, String>> {
        Box::pin(async {
            if let Some(who) = &*self.standing_by.load() {
                return Ok(format!("stands by: {who} serves this host"));
            }
            // Where the host keeps its own service, that is who would answer.
            let at = self.listening.filter(|_| self.resolver.kept.is_none());
            probe::probe(&self.service, at.map(|it| it.ip())).await?;
            Ok(format!("serves {} containers", self.service.index.all().len()))
        })
    }
}

/// The furthest that an event may be ahead: a year, in seconds.
const MOST_AHEAD: u64 = 365 * 24 * 3600;

impl Observer {
    fn listening(&self) -> String {
        match self.listening {
            Some(at) => at.to_string(),
            None => format!("{IMDS_ADDRESS}, inside containers only"),
        }
    }

    /// Orders something for a container, and has it looked at again.
    fn order(&self, record: &Record, change: impl FnOnce(&mut Ordered)) -> Result<Ordered, admin::NotDone> {
        let index = &self.service.index;
        // Whether others still exist is only known when the engine has told everything.
        let whole = *index.engine() == EngineState::Synchronised;
        let exists = |id: &ContainerId| !whole || index.get(id).is_some();
        let ordered = self.resolver.orders.order(&record.definition.id, exists, change);
        let ordered = ordered.map_err(|error| admin::NotDone::Failed(with_causes(&error)))?;
        self.resolver.changed.send_modify(|version| *version += 1);
        Ok(ordered)
    }

    fn event_statuses(&self, events: &[Event]) -> Vec<admin::EventStatus> {
        let now = self.clock.wall_seconds();
        let time = |seconds| rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let statuses = events.iter().map(|event| admin::EventStatus {
            event: event.kind.name().to_owned(),
            action: Some(event.action.clone()).filter(|action| !action.is_empty()),
            at: time(event.at),
            noticed: time(event.noticed()),
            state: match (event.cancelled, event.noticed() <= now, event.at <= now) {
                (true, ..) => "cancelled",
                (_, false, _) => "not told yet",
                (_, true, false) => "told",
                (_, _, true) => "over",
            }
            .to_owned(),
            stops: event.stops.is_some() && !event.cancelled,
        });
        statuses.collect()
    }

    fn bases(&self) -> Vec<BaseStatus> {
        let states = self.resolver.sts.as_ref().map(Sts::states).unwrap_or_default();
        let around = self.resolver.around.load();
        let states = states.into_iter();
        states
            .map(|(profile, state)| {
                // The daemon's own base has its profile's name, if it was given one.
                let own = profile == self.resolver.settings.load().profile;
                let base = around.base(profile.as_deref().filter(|_| !own));
                base::status(profile, state, base.arn.clone())
            })
            .collect()
    }

    fn clock_status(&self) -> ClockStatus {
        let skew = self.clock.skew();
        ClockStatus {
            ahead_of_aws: skew.aws,
            ahead_of_rtc: skew.rtc,
            last_shift: skew.last.map(|(at, _)| rfc3339_seconds(at)),
            last_shift_seconds: skew.last.map(|(_, shift)| shift.wall / 1000),
            last_sleep_seconds: skew.last.map(|(_, shift)| shift.slept.as_secs()),
        }
    }

    /// What a wrong clock does, and how it is put right.
    fn clock_warnings(&self) -> Option<String> {
        let skew = self.clock.skew();
        let (seconds, than) = match (skew.aws, skew.rtc) {
            (Some(aws), _) => (aws, "AWS's"),
            (None, Some(rtc)) => (rtc, "the machine's battery-backed one"),
            (None, None) => return None,
        };
        let (off, way) = (seconds.unsigned_abs(), if seconds < 0 { "behind" } else { "ahead of" });
        (off > CLOCK_IS_WRONG).then(|| {
            format!(
                "this clock is {off} s {way} {than}: applications' requests are refused by AWS when it is more than 5 min; \
                 put it right: chronyc makestep, or timedatectl set-ntp true, or in a VM hwclock --hctosys"
            )
        })
    }

    /// The one container that is meant: by name, else by the beginning of its id, else by compose service.
    fn meant(&self, container: &str) -> Option<Arc<Record>> {
        let all = self.service.index.all();
        let ways: [&dyn Fn(&Record) -> bool; 3] = [
            &|record| record.definition.name == container,
            &|record| container.len() >= 4 && record.definition.id.as_str().starts_with(container),
            &|record| record.definition.service() == Some(container),
        ];
        let found = ways
            .iter()
            .map(|way| all.iter().filter(|record| way(record)).collect::<Vec<_>>());
        let mut found = found.into_iter().find(|found| !found.is_empty())?;
        if found.len() == 1 { found.pop().cloned() } else { None }
    }

    /// Every step that a request of the container meets, in its order.
    fn judge(&self, record: &Record) -> Vec<Judgement> {
        let mut steps = Vec::new();
        let mut step = |step: &str, ok: bool, seen: String| {
            steps.push(Judgement {
                step: step.to_owned(),
                ok,
                seen,
            });
        };
        let instance = &record.instance;
        let status = self.container(record);
        let engine = self.service.index.engine();
        step(
            "engine",
            true,
            match &*engine {
                EngineState::Away(why) => format!("away ({why}); what is known of the container holds"),
                EngineState::Synchronising => "synchronising".to_owned(),
                EngineState::Synchronised => "synchronised".to_owned(),
            },
        );
        match record.life.as_ref().filter(|life| life.alive()) {
            Some(life) => step(
                "life",
                true,
                format!(
                    "first process {}, cgroup {}, network namespace {}, since {}",
                    life.pid,
                    life.cgroup.0,
                    life.witness.namespace().0,
                    rfc3339_seconds(life.started)
                ),
            ),
            None => step(
                "life",
                false,
                record.no_life.clone().unwrap_or_else(|| "it does not run".to_owned()),
            ),
        }
        let addresses = status.addresses.join(" ");
        let in_the_hosts_network = record.definition.network_mode == NetworkMode::Host;
        match (&record.not_attached, self.resolver.attaches() && instance.endpoint) {
            _ if self.resolver.kept.is_some() && in_the_hosts_network => {
                step("attach", false, GETS_THE_HOSTS.to_owned())
            }
            (Some(why), _) if self.resolver.kept.is_some() => step("attach", false, format!("nowhere: {why}")),
            (Some(why), _) => step("attach", true, format!("over the host, because inside: {why}")),
            (None, true) if in_the_hosts_network => {
                step("attach", true, "over the host, whose network it has".to_owned());
            }
            (None, true) => step("attach", true, "inside its network namespace".to_owned()),
            (None, false) => match self.not_on_the_network(record) {
                Some(why) => step("attach", false, why),
                None => step(
                    "attach",
                    true,
                    format!("over the {}, from {addresses}", self.resolver.attach()),
                ),
            },
        }
        let proof =
            "an ESTABLISHED socket of exactly the connection, in that namespace, made by that cgroup or one below";
        match self.resolver.level {
            Level::Full => step("proof", true, format!("required on each connection: {proof}")),
            Level::Address => step(
                "proof",
                true,
                "its address, by the engine's word only, as the configuration allows".to_owned(),
            ),
        }
        step(
            "endpoint",
            instance.endpoint,
            match instance.endpoint {
                true => "enabled".to_owned(),
                false => "disabled, or no label of ours: every request gets 403".to_owned(),
            },
        );
        step(
            "tokens",
            true,
            match instance.tokens_required {
                true => "required: a request without an IMDSv2 token of this run of the container gets 401".to_owned(),
                false => "optional: IMDSv1 is answered, too".to_owned(),
            },
        );
        match &instance.role {
            Role::None => step("role", false, "it asks for none: the role list is 404".to_owned()),
            Role::Pending(why) | Role::Refused(why) => step("role", false, format!("none: {why}")),
            Role::Session(session) => {
                let rule = instance
                    .rule
                    .as_ref()
                    .map(|rule| format!(", by {rule}"))
                    .unwrap_or_default();
                step("role", true, format!("{session}{rule}"));
            }
        }
        if let Some(credentials) = &status.credentials {
            let until = credentials
                .until
                .as_ref()
                .map(|until| format!(" until {until}"))
                .unwrap_or_default();
            let fake = if credentials.fake { " (fake)" } else { "" };
            let error = credentials
                .error
                .as_ref()
                .map(|error| format!(", last try: {error}"))
                .unwrap_or_default();
            let hint = match credentials.error.as_ref() {
                Some(error) if error.starts_with("denied by sts") => format!(
                    "; what the role must trust: imds-router explain {} --trust-policy",
                    record.definition.name
                ),
                _ => String::new(),
            };
            step(
                "credentials",
                credentials.state == "live",
                format!("{}{until}{fake}{error}{hint}", credentials.state),
            );
        }
        steps
    }

    fn container(&self, record: &Record) -> ContainerStatus {
        let instance = &record.instance;
        let session = instance.role.session();
        let mut problems = instance.problems.clone();
        if let Role::Pending(why) = &instance.role {
            problems.push(why.clone());
        }
        problems.extend(record.no_life.clone());
        let kept = self.resolver.kept.is_some();
        problems.extend(record.not_attached.as_ref().map(|why| {
            let instead = match kept {
                true => "it is rejected: this host has a metadata service of its own, and keeps it",
                false => "it is served over the host, if its network leads there",
            };
            format!("the service does not listen inside it: {why}; {instead}")
        }));
        if kept && instance.endpoint && record.definition.network_mode == NetworkMode::Host {
            problems.push(GETS_THE_HOSTS.to_owned());
        }
        problems.extend(record.left_alone.iter().cloned());
        problems.extend(self.shares(record));
        problems.extend(self.not_on_the_network(record).filter(|_| instance.endpoint));
        if !record.definition.image_labels.is_empty() {
            problems.push(format!(
                "label {} comes from the image and does not count; [docker] image_labels = true lets it",
                record.definition.image_labels.join(", ")
            ));
        }
        ContainerStatus {
            id: record.definition.id.as_str().to_owned(),
            name: record.definition.name.clone(),
            addresses: record
                .attachments
                .addresses()
                .map(|address| address.to_string())
                .collect(),
            alive: record.life.as_ref().is_some_and(|life| life.alive()),
            endpoint: if instance.endpoint { "enabled" } else { "disabled" }.to_owned(),
            tokens: if instance.tokens_required {
                "required"
            } else {
                "optional"
            }
            .to_owned(),
            role: session.and_then(|session| session.role()).map(ToString::to_string),
            session_name: session.and_then(|session| session.session_name()).map(str::to_owned),
            profile: session.and_then(|session| session.profile()).map(str::to_owned),
            rule: session.and(instance.rule.clone()),
            credentials: session.map(|session| self.credentials(session)),
            last_request: record
                .life
                .as_ref()
                .and_then(|life| life.last.get())
                .map(|(at, status)| RequestStatus {
                    at: rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(at)),
                    status,
                }),
            problems,
        }
    }

    /// With attach `network`: who has no link to the network that the address is on does not reach it.
    fn not_on_the_network(&self, record: &Record) -> Option<String> {
        if self.resolver.settings.load().attach != Attach::Network {
            return None;
        }
        let ours = self.service.index.at(IMDS_ADDRESS.into());
        let networks = ours.iter().flat_map(|it| it.attachments.0.iter());
        let mut networks = networks.filter(|(_, endpoint)| endpoint.addresses().any(|it| it == IMDS_ADDRESS));
        let (network, endpoint) = networks.next()?;
        (!record.attachments.0.contains_key(network)).then(|| {
            let name = printable(&endpoint.network, 60);
            format!("it is not on the network {name}, where {IMDS_ADDRESS} is: docker network connect {name}")
        })
    }

    /// Containers that share a network namespace share a boundary: whoever is root in one can act as the other.
    fn shares(&self, record: &Record) -> Option<String> {
        let life = record.life.as_ref()?;
        // The host's namespace is everybody's who is in it; that is said by the container's network mode itself.
        if record.definition.network_mode == NetworkMode::Host {
            return None;
        }
        let role = |record: &Record| {
            record
                .instance
                .role
                .session()
                .and_then(|session| session.role().cloned())
        };
        let others = self.service.index.within(life.witness.namespace());
        let other = others
            .iter()
            .find(|other| other.definition.id != record.definition.id && role(other) != role(record));
        other.map(|other| {
            format!(
                "shares its network namespace with {}, whose role is another: they share a boundary",
                other.definition.name
            )
        })
    }

    fn credentials(&self, session: &Session) -> CredentialStatus {
        let state = self.service.broker.state(session).unwrap_or_default();
        let published = state.published.as_ref().map(|it| &it.credentials);
        let word = match published {
            Some(_) if state.published.as_ref().is_some_and(|it| it.is_live(&self.clock)) => "live",
            Some(_) => "expired",
            None if state.error.is_some() => "failed",
            None => "pending",
        };
        CredentialStatus {
            state: word.to_owned(),
            key: published.map(|it| it.access_key_id.clone()),
            fake: published.is_some_and(|it| it.fake),
            until: published.map(|it| rfc3339_seconds(it.expiration)),
            error: state.error.map(|error| error.to_string()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_key_is_made_once_and_only_ours() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let key = token_key(&state).unwrap();
        assert!(token_key(&state).unwrap() == key);
        let file = state.join("token.key");
        assert_eq!(std::fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);

        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(
            token_key(&state)
                .unwrap_err()
                .to_string()
                .contains("not a key that only we know")
        );

        let elsewhere = dir.path().join("elsewhere");
        std::fs::write(&elsewhere, [7; 32]).unwrap();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        assert!(token_key(&state).is_err());
    }

    #[test]
    fn the_line_that_runs_the_image_is_the_documented_one() {
        let documented = include_str!("../deploy/README.md").replace('\\', " ");
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words(&documented).contains(&words(DOCKER_RUN)));
        // A swarm's stack starts the same, but for where configuration and credentials come from, and when it starts again.
        let stack = words(&include_str!("../deploy/stack.yaml").replace('\\', " "));
        let options = DOCKER_RUN
            .trim_end_matches(" imds-router")
            .split(" -")
            .skip(1)
            .map(str::trim);
        let another = [
            "d",
            "-restart unless-stopped",
            "-cap-add DAC_OVERRIDE",
            "v ~/.aws:/aws:ro",
        ];
        for option in options.filter(|it| !another.contains(it)) {
            let long = option.strip_prefix("e ").map(|it| format!("-env {it}"));
            let option = long.as_deref().unwrap_or(option);
            assert!(stack.contains(&format!(" -{option}")), "{option} is not in {stack}");
        }
    }

    #[tokio::test]
    async fn a_socket_that_a_crash_left_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        drop(admin_listener(&path).unwrap());
        let _second = admin_listener(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, ADMIN_MODE);
        assert!(admin_listener(&path).is_err());
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(admin_listener(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }
}
