//! The composition root: settings and ports become a running daemon.
//!
//! The only file that sees every other; nobody sees it.

mod admin_api;
mod admin_socket;
mod base_identity;
pub mod check;
mod client_settings;
pub mod doctor;
mod durable_files;
mod host_metadata;
mod host_mode;
mod image_files;
mod interception;
mod metrics;
mod namespace_listeners;
mod network_mode;
mod resolver;
mod self_probe;
mod standby;
mod state_dir;
mod systemd;

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::{ArcSwap, ArcSwapOption};
use sd_notify::NotifyState;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use self::admin_api::Observer;
use self::host_mode::Kept;
use self::image_files::ImageFiles;
use self::interception::{PORTS, give_up, guard, host_plan, intercept_ipv6, make_transparent};
pub use self::interception::{everything, plans};
use self::namespace_listeners::HostNamespaceListeners;
pub use self::namespace_listeners::clear as clear_links;
use self::resolver::Resolver;
pub use self::systemd::Inherited;
use crate::admin;
use crate::attribution::cgroup::Cgroups;
use crate::attribution::engine_attestor::EngineAttestor;
use crate::attribution::ingress::Interfaces;
use crate::attribution::kernel_attestor::{HostKernel, KernelError};
use crate::attribution::prerequisites::{MissingPrerequisite, emulated, missing_prerequisites};
use crate::clock::Clock;
use crate::config::{Attach, CredentialSource, DOCKER_RUN, DockerInDocker, Proof, Settings};
use crate::containers::ProofLevel;
use crate::containers::docker::{DEFAULT_HOST, Engine, architecture};
use crate::containers::index::Index;
use crate::containers::reconciler::{ContainerEngine, Kernel, Ports, Reconciler};
use crate::credentials::broker::{Broker, CredentialProvider, Limits};
use crate::credentials::offline::Offline;
use crate::credentials::sts::Sts;
use crate::descriptors;
use crate::instance::RuntimeFacts;
use crate::interception::reconcile::Interception;
use crate::interception::{HostError, LINK};
use crate::logging::report_lines_left_out;
use crate::orders::StopScheduler;
use crate::protocol::request::credentials_document;
use crate::server::{self, IMDS_PORT, Service};

/// The address of the metadata service.
pub const IMDS_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// Its IPv6 address (EC2 user guide, "Access instance metadata").
pub const IMDS_ADDRESS_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The port that is listened on; the next free one if it is taken.
pub const DEFAULT_PORT: u16 = 51_254;
/// The limits of attach `host`.
pub const ATTACH_HOST: &str = "attach host identifies callers by their source address only: a neighbor with NET_RAW (Docker's \
    default) on the same bridge can use it, and get another container's credentials";

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
    Lacking(Vec<MissingPrerequisite>),
    /// What was asked for needs more than there is.
    #[error(
        "attach namespace is not possible here: {}\nhint: [serve] attach = \"auto\" or \"host\" goes with proof = \"address\"",
        listed(.0)
    )]
    NoNamespaces(Vec<MissingPrerequisite>),
    /// Host attach would take the host's own metadata service away.
    #[error(
        "{what} would take {IMDS_ADDRESS} away from this host, which has a metadata service of its own: {kept}\n\
         hint: attach = \"auto\" with full proof serves containers inside their namespaces, and leaves the host's own alone\n\
         hint: attach = \"host\" with [serve] host_imds = \"keep\" and proof = \"address\" intercepts only requests from bridges\n\
         hint: [serve] host_imds = \"replace\" takes the address all the same: this host's own processes then lose their \
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
        "{NOTHING_OF_HOST}\nhint: it takes a machine of EC2 (its firmware says so), whose own service is left to it: [serve] host_imds"
    )]
    NothingOfHost,
    /// By the address alone, which the configuration does not accept.
    #[error(
        "attach {0} identifies callers by their source address only, and [serve] proof is \"full\"\n\
         hint: attach = \"auto\" serves each container over a link of its own, with full proof\n\
         hint: [serve] proof = \"address\" accepts the source address; a neighbor with NET_RAW (Docker's default) can then take \
         another container's credentials"
    )]
    AddressProof(&'static str),
    /// The address is not this container's.
    #[error("attach network: cannot listen on {IMDS_ADDRESS}:{IMDS_PORT}\nhint: {hint}")]
    Network {
        /// Why.
        source: io::Error,
        /// What to do.
        hint: &'static str,
    },
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
    /// The file of changes by `modify` and `trigger`.
    #[error(
        "{} is damaged: {why}\nhint: it has the changes by imds-router modify and trigger, some of which may restrict a container; \
         repair it, or delete it and make the changes again", path.display()
    )]
    RuntimeOverrides {
        /// The file.
        path: PathBuf,
        /// The damage.
        why: String,
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

/// What is said where containers are to see what nobody says.
const NOTHING_OF_HOST: &str = "[metadata] base = \"host\": this host has no metadata service of EC2's that is its own, so that containers \
    see what is derived";

fn listed(lacks: &[MissingPrerequisite]) -> String {
    let all: Vec<_> = lacks.iter().map(ToString::to_string).collect();
    all.join("; ")
}

/// What is lacking here for the kernel's word.
async fn lacks(settings: &Settings) -> Vec<MissingPrerequisite> {
    let engine = engine_host(settings);
    let mut lacks = missing_prerequisites(&engine).await;
    lacks.extend(architecture(&engine).await.and_then(|engines| emulated(&engines)));
    lacks
}

/// What callers are proven by here, with these settings.
async fn level(settings: &Settings, kept: Option<Kept>) -> Result<ProofLevel, AppError> {
    if settings.attach == Attach::Network {
        return match (kept, settings.proof) {
            // Docker's network with that address takes it away from the host's processes, too.
            (Some(kept), _) => Err(AppError::KeepsItsOwn {
                what: "attach = \"network\"",
                kept,
            }),
            (None, Proof::Address) => Ok(ProofLevel::Address),
            (None, Proof::Full) => Err(AppError::AddressProof("network")),
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
        (_, Proof::Full, Attach::Host) => Err(AppError::AddressProof("host")),
        (true, _, Attach::Auto | Attach::Namespace | Attach::Network) => Ok(ProofLevel::Full),
        (false, Proof::Full, _) => Err(AppError::Lacking(lacks)),
        (false, Proof::Address, Attach::Namespace) => Err(AppError::NoNamespaces(lacks)),
        (_, Proof::Address, Attach::Auto | Attach::Host | Attach::Network) => {
            for lack in lacks {
                warn!(%lack, "callers are proven by their address only, as the configuration allows");
            }
            Ok(ProofLevel::Address)
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
    if let Err(error) = descriptors::raise_limit() {
        warn!(%error, limit = descriptors::limit(), "the limit on open files cannot be raised");
    }
    let clock = Clock::system();
    let mut shutdown = std::pin::pin!(shutdown);
    let tokens = state_dir::token_authority(&settings.state_dir, &clock)?;
    let signer = Arc::new(state_dir::signer(&settings.state_dir)?);
    let orders = Arc::new(state_dir::orders(&settings.state_dir)?);
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
        None if on_network => (Some(network_mode::listen()?), None),
        kept => {
            let (listener, listening) = inherited.listen(IMDS_ADDRESS.into()).map_err(AppError::Listen)?;
            let plan = match kept {
                Some(kept) => {
                    make_transparent(&listener).map_err(AppError::Listen)?;
                    kept.between(listening)
                }
                None => host_plan(&settings, listening),
            };
            (Some((listener, listening)), Some(plan))
        }
    };
    let listener = listener.map(|(listener, listening)| Ok((TcpListener::from_std(listener)?, listening)));
    let listener = listener.transpose().map_err(AppError::Listen)?;

    let sts = match settings.source {
        CredentialSource::Sts => {
            let bases = base_identity::bases(&settings, &clock);
            Some((Sts::new(bases.clone(), clock.clone()), bases))
        }
        CredentialSource::Offline => None,
    };
    let mut facts = RuntimeFacts {
        host: host_name(),
        ..RuntimeFacts::default()
    };
    if let Some((sts, _)) = &sts {
        // Before anybody is looked at: a session in another region is another session.
        facts.base.region = sts.region(None).await;
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
        facts: ArcSwap::from_pointee(facts),
        orders,
        clock: clock.clone(),
        broker: broker.clone(),
        changed,
        wanted: base_identity::Wanted::default(),
        sts: sts.as_ref().map(|(sts, _)| sts.clone()),
    });
    let settings = resolver.settings.load_full();

    let (index, misses) = Index::new();
    let service = Service::new(
        index.clone(),
        broker.clone(),
        (tokens, signer),
        clock.clone(),
        server::Options {
            hold: settings.max_wait,
            hosts: settings.hosts.clone(),
            ec2_error_documents: settings.ec2_error_documents,
        },
    );
    let nested = settings.docker_in_docker == DockerInDocker::Inherit;
    let listeners = Arc::new(HostNamespaceListeners::new(service.clone(), settings.ipv6, nested));
    let host_kernel = match level {
        ProofLevel::Full => Some(Arc::new(HostKernel::new(listeners.clone(), clock.clone())?)),
        ProofLevel::Address => None,
    };
    let kernel: Arc<dyn Kernel> = match &host_kernel {
        Some(kernel) => kernel.clone(),
        None => Arc::new(EngineAttestor::new(clock.clone())),
    };
    let host = Cgroups::this_threads_namespace().map_err(|error| KernelError::Namespace(error.to_string()))?;
    let engine = engine_host(&settings);
    let docker = Engine::new(&engine, clock.clone());
    let lag = docker.lag();
    let port: Arc<dyn ContainerEngine> = Arc::new(docker);
    let permits = resolver.clone();
    let stops = StopScheduler {
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
        images: Arc::new(ImageFiles::new(&settings.state_dir)),
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
    tasks.spawn(report_lines_left_out());
    let path = settings.admin_socket.clone();
    // While another daemon answers on that socket it is that one's.
    let admin_is_anothers = admin_socket::another_answers(&path);
    if !admin_is_anothers {
        let listener = admin_socket::listen(&path)?;
        tasks.spawn(admin_socket::serve(listener, path.clone(), observer.clone()));
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
        tasks.spawn(admin_socket::take_over(path, observer.clone()));
    }
    if level == ProofLevel::Full
        && let Err(error) = listeners.open(&settings.state_dir, inherited.take_netns())
    {
        give_up(interception);
        return Err(error.into());
    }
    let interfaces = Arc::new(Interfaces::new(LINK));
    let serves_the_host = kept.is_none() && !on_network;
    let ipv6 = match serves_the_host {
        true => intercept_ipv6(&settings, &mut inherited, &clock).await,
        false => None,
    };
    // The rules are in place, and no connection of the host has been accepted.
    if let Some(kernel) = host_kernel.filter(|_| serves_the_host)
        && let Err(error) = kernel
            .remember_earlier_sockets(vec![
                (IMDS_ADDRESS, IMDS_PORT).into(),
                (IMDS_ADDRESS_IPV6, IMDS_PORT).into(),
            ])
            .await
    {
        interception.extend(ipv6.map(|(also, _)| also));
        give_up(interception);
        return Err(error.into());
    }
    if let Some((also, listener)) = ipv6 {
        interception.push(also);
        if let Some(listener) = listener {
            tasks.spawn(server::accept_on_host(
                listener,
                interfaces.clone(),
                host,
                level,
                service.clone(),
            ));
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
        let pause = host_metadata::learn(&service, &resolver).await;
        tasks.spawn(host_metadata::keep(service, resolver.clone(), pause));
    }
    tasks.spawn(Reconciler::new(ports, index.clone(), misses, clock.clone()).run());
    match listener {
        Some((listener, _)) if on_network => {
            tasks.spawn(server::accept_on_network(listener, interfaces, host, service));
        }
        Some((listener, _)) => {
            // Who comes in neither over a bridge nor from this host is nobody's container where the kernel tells bridges apart.
            let level = if between { ProofLevel::Full } else { level };
            tasks.spawn(server::accept_on_host(listener, interfaces, host, level, service));
        }
        None => {}
    }
    tasks.spawn(stops.run());
    tasks.spawn(broker.watch_clocks());
    tasks.spawn(resolver::reload(reloads, resolver.clone()));
    if let Some((sts, bases)) = sts {
        tasks.spawn(bases.clone().watch_files());
        tasks.spawn(base_identity::learn(sts, bases, resolver.clone(), index.clone()));
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
    let down = down.into_iter().chain([listeners.close(&index).await]);
    down.collect::<Result<(), _>>().map_err(AppError::from)
}

/// The engine that is meant.
pub fn engine_host(settings: &Settings) -> String {
    settings.docker_host.clone().unwrap_or_else(|| DEFAULT_HOST.to_owned())
}

/// What this host calls itself.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_that_runs_the_image_is_the_documented_one() {
        let documented = include_str!("../../deploy/README.md").replace('\\', " ");
        let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(words(&documented).contains(&words(DOCKER_RUN)));
        // A swarm's stack starts the same, but for where configuration and credentials come from, and when it starts again.
        let stack = words(&include_str!("../../deploy/stack.yaml").replace('\\', " "));
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
}
