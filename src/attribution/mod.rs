//! Attribution: a connection becomes a [`Caller`], or a [`Refusal`] with the evidence that was seen.
//!
//! # Threat note
//! The evidence, who controls it, and what it proves:
//!
//! * **The link that the connection came over** ([`AcceptedFrom::Namespace`]). Each served network namespace has a link of its own to
//!   the private namespace, with a listener that is bound to it. Only the kernel moves packets onto that link, and only those
//!   that processes of the namespace send. It says which namespace calls, whatever the addresses say. No packet crosses a
//!   bridge, so a neighbor can neither send nor divert one.
//! * **The socket in that namespace.** The kernel's own table, queried with the exact addresses and ports of the connection. It
//!   must be in a state in which the container is at the other end (`CONNECTED`). Its cookie, which no other socket ever has, is
//!   compared again before answers, at most every 10 ms ([`verify_peer`]).
//! * **The active open** ([`Open`]). A process of the same namespace can make a server of the container accept a connection from
//!   the address and port of the service. The socket of that server has the right addresses, ports, state and cgroup. Its
//!   counters differ: only a socket that connects has an acknowledged SYN. The kernel counts it, whatever the server sends. A
//!   listener at the client's port is refused as well: it could have accepted the connection. On the host, the guard table drops
//!   each SYN from the address of the service, and sockets that are older than the rules prove nothing.
//! * **The cgroup ID of that socket.** The kernel writes it when a process creates the socket. It must be the cgroup of a
//!   verified init process of the namespace, or one below. It tells containers that share a namespace apart, and excludes host
//!   processes that entered the namespace.
//! * **The run.** The init process's pidfd, checked on every request.
//! * **The source address** ([`AcceptedFrom::Bridge`]). Any container with `NET_RAW`, Docker's default, can send with the address and MAC
//!   of a neighbor, and can make a neighbor accept a connection with addresses of its choice. Over a bridge nothing is therefore
//!   proven: with full proof such a connection is refused.
//! * **The engine** ([`ProofLevel::Address`], off by default). Where the kernel cannot be queried (missing rights, a remote engine,
//!   cgroup v1 alone), the operator may accept the source address. The spoofing trials show that this is not safe.
//!
//! Who controls what: the engine and its users choose names, labels and addresses. A container with `NET_RAW` chooses every
//! byte that it sends. A container with `NET_ADMIN` also chooses the links, routes and rules of its own namespace. A process
//! with a delegated cgroup chooses the *names* below it. The kernel alone decides the ID of a cgroup, the state of a socket, the
//! index of a link, and a pidfd.
//!
//! Remaining risks:
//!
//! * A cgroup ID names the process that *created* a socket. A process that passes its connected socket to another one
//!   (SCM_RIGHTS) delegates its identity, as it could by passing on the credentials.
//! * Containers that share a network namespace share a boundary: one with `NET_RAW` in it reads along. The same holds for
//!   containers in the host's network. One with `NET_ADMIN` can also divert a connection that another one opens: it answers itself,
//!   and uses the addresses and ports of that connection at the daemon.
//! * `[serve] docker_in_docker = "inherit"`: what a namespace forwards from a bridge inside it, and masquerades with an address of its own,
//!   counts as its container. A container that does that for its neighbors gives them its identity.

#[cfg(target_os = "linux")]
pub mod attachment;
#[cfg(target_os = "linux")]
pub mod cgroup;
#[cfg(target_os = "linux")]
mod cgroup_watch;
pub mod engine_attestor;
#[cfg(target_os = "linux")]
pub mod ingress;
#[cfg(target_os = "linux")]
pub mod kernel_attestor;
#[cfg(target_os = "linux")]
pub mod netns;
#[cfg(target_os = "linux")]
pub mod prerequisites;
#[cfg(target_os = "linux")]
pub mod sock_diag;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::containers::index::{EngineState, Index};
use crate::containers::{
    CgroupId, ContainerId, ContainerRun, NamespaceId, NetworkMode, Open, ProofLevel, Record, SocketEvidence,
};
use crate::descriptors;

/// States in which the container's socket is the other end of the connection: `TCP_ESTABLISHED`, `TCP_FIN_WAIT1` and `TCP_FIN_WAIT2`
/// (include/net/tcp_states.h). In the latter two the container has sent its request and closed its side, as `nc` does. In
/// `TCP_TIME_WAIT` there is no socket any more, and in `TCP_CLOSE_WAIT` our side has ended.
const CONNECTED: [u8; 3] = [1, 4, 5];

/// How often a proof that waits for acknowledgments is repeated at once, and the pause before each later attempt.
const QUICK_ATTEMPTS: u32 = 8;
const PAUSE: Duration = Duration::from_millis(1);

/// The two ends of a connection, as the client sees them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Where it comes from.
    pub client: SocketAddr,
    /// Where the client sent it: port 80 of the metadata address, whatever port we listen on.
    pub server: SocketAddr,
    /// Where it was accepted.
    pub via: AcceptedFrom,
    /// Whether a container inside the container of that namespace counts as it (`[serve] docker_in_docker`).
    pub nested: bool,
}

/// Where a connection was accepted: it decides who may have made it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum AcceptedFrom {
    /// From inside a network namespace: over the link of a namespace that containers are in, or in the host's own. Nothing
    /// else comes that way.
    Namespace(NamespaceId),
    /// On the host, over a bridge, by its interface number: the source address leads to candidates.
    Bridge(u32),
}

/// An authenticated caller: the container run at the other end of a connection. Only [`identify`] makes one:
///
/// ```compile_fail
/// # use std::sync::Arc; use imds_router::{attribution::Caller, containers::ContainerRun};
/// # fn guess(life: Arc<ContainerRun>) -> Caller {
/// Caller { life, socket: None } // no proof in hand, and none can be made here
/// # }
/// ```
///
/// The same names, in code that must compile: after a rename, the example above would fail for another reason.
///
/// ```
/// # use std::sync::Arc; use imds_router::{attribution::Caller, containers::ContainerRun};
/// # fn read(caller: &Caller) -> &Arc<ContainerRun> {
/// caller.life()
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Caller {
    life: Arc<ContainerRun>,
    /// The socket that proved it, by its cookie. `None`: something else did.
    socket: Option<u64>,
}

impl Caller {
    /// Whose life.
    pub fn life(&self) -> &Arc<ContainerRun> {
        &self.life
    }
}

/// Why nobody was proven, with what was seen. For the operator; the caller learns nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// It comes from the LAN, or another interface that no container is behind.
    #[error("came in on interface {0}, which is neither this host's own nor a bridge")]
    ForeignInterface(u32),
    /// With attach `network`: it comes from another network than that of the address.
    #[error("comes from {client} over interface {interface}, and not over the network that this address is on")]
    OtherNetwork {
        /// Where it comes from.
        client: IpAddr,
        /// Over which interface of the daemon's container.
        interface: u32,
    },
    /// It comes from the host's own network, or a namespace, in which no container is known.
    #[error("comes from {0}, by a process of this host and of no container")]
    Host(IpAddr),
    /// No container is known at the address.
    #[error("no container of the engine is at {0}")]
    UnknownAddress(IpAddr),
    /// The address is the gateway of a network of the engine's.
    #[error(
        "{0} is a network's gateway, an address of this host: a published port's proxy, or translated traffic; \
         who is behind it cannot be told"
    )]
    Gateway(IpAddr),
    /// Nobody in the namespace that it came from has this connection.
    #[error(
        "no process at {0} has this connection: its addresses were translated on the way (NAT), so nobody can be proven"
    )]
    Translated(IpAddr),
    /// Several containers share the namespace, and the evidence does not tell them apart.
    #[error("{container} shares its network namespace: which of those who share it has asked cannot be told")]
    Shared {
        /// The container that the evidence leads to.
        container: ContainerId,
    },
    /// A container is at the address, but it has no life.
    #[error("{container} is at {address}, but does not run: {why}")]
    NoLife {
        /// The container.
        container: ContainerId,
        /// The address.
        address: IpAddr,
        /// Why.
        why: String,
    },
    /// The engine has not told everything yet.
    #[error("not synchronised with the container engine yet")]
    NotSynchronised,
    /// There is one, but it is not in use.
    #[error("the connection of {container} is in TCP state {state}: expected ESTABLISHED, FIN_WAIT1 or FIN_WAIT2")]
    NotEstablished {
        /// The container.
        container: ContainerId,
        /// The state (include/net/tcp_states.h).
        state: u8,
    },
    /// There is one, but the container accepted the connection.
    #[error(
        "the socket of {container} accepted this connection, so another sender opened it with the address of the service as \
         its own"
    )]
    Accepted {
        /// The container.
        container: ContainerId,
    },
    /// There is one, but the container may have accepted the connection.
    #[error(
        "a process in the network namespace of {container} listens at port {port}, from which this connection comes: it may have \
         accepted the connection instead of opening it; hint: let the client use a port at which no server listens"
    )]
    ListenerAtPort {
        /// The container.
        container: ContainerId,
        /// The client's port.
        port: u16,
    },
    /// There is one, but the kernel does not tell in time which end opened the connection.
    #[error("bytes of {container} were not acknowledged in time to tell which end opened this connection")]
    Unacknowledged {
        /// The container.
        container: ContainerId,
    },
    /// There is one, but it is older than the rules that lead to the daemon.
    #[error(
        "the socket of {container} is older than the daemon's rules on this host, so another process may be its other end; the \
         container's next connection is answered"
    )]
    EarlierSocket {
        /// The container.
        container: ContainerId,
    },
    /// The socket that proved the caller does not exist any more.
    #[error(
        "the socket with which {container} opened this connection is gone: another sender uses its addresses and ports"
    )]
    SocketGone {
        /// The container.
        container: ContainerId,
    },
    /// There is one, but somebody else made it.
    #[error("the socket in the network namespace of {container} was made by cgroup {}, which is no container's there", cgroup.0)]
    ForeignCgroup {
        /// The container.
        container: ContainerId,
        /// The maker's.
        cgroup: CgroupId,
    },
    /// It came over a bridge, but its container has a link of its own to the service.
    #[error(
        "{container} has a link of its own to the service, and this connection came over a bridge: another sender uses its \
         address, or it bound its socket to another link"
    )]
    OverBridge {
        /// The container.
        container: ContainerId,
    },
    /// The link of its container was made while this connection, which came over a bridge, was waiting.
    #[error(
        "the link of {container} to the service was made while this connection waited; the next one comes over the link"
    )]
    JustAttached {
        /// The container.
        container: ContainerId,
    },
    /// It came over a bridge, and its container has no link of its own.
    #[error("{container} may be at {address}, but has no link of its own to the service: {why}")]
    NotAttached {
        /// The container.
        container: ContainerId,
        /// The address.
        address: IpAddr,
        /// Why.
        why: String,
    },
    /// The kernel could not be asked.
    #[error("the kernel could not be asked about {container}: {error}")]
    Unasked {
        /// The container.
        container: ContainerId,
        /// Why.
        error: String,
    },
    /// More than one container proves the same connection.
    #[error("more than one container has this connection")]
    Ambiguous,
}

impl Refusal {
    /// The container that it is about, if it is about one.
    pub fn container(&self) -> Option<&ContainerId> {
        match self {
            Self::NoLife { container, .. }
            | Self::NotEstablished { container, .. }
            | Self::ForeignCgroup { container, .. }
            | Self::Accepted { container }
            | Self::ListenerAtPort { container, .. }
            | Self::Unacknowledged { container }
            | Self::EarlierSocket { container }
            | Self::SocketGone { container }
            | Self::OverBridge { container }
            | Self::JustAttached { container }
            | Self::NotAttached { container, .. }
            | Self::Shared { container }
            | Self::Unasked { container, .. } => Some(container),
            Self::ForeignInterface(_)
            | Self::OtherNetwork { .. }
            | Self::Host(_)
            | Self::UnknownAddress(_)
            | Self::Gateway(_)
            | Self::Translated(_)
            | Self::NotSynchronised
            | Self::Ambiguous => None,
        }
    }

    /// Whether the socket is a container's, but does not prove that the container opened the connection.
    fn is_about_the_open(&self) -> bool {
        matches!(
            self,
            Self::Accepted { .. }
                | Self::ListenerAtPort { .. }
                | Self::Unacknowledged { .. }
                | Self::EarlierSocket { .. }
                | Self::SocketGone { .. }
        )
    }

    /// A short name, for counters and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::ForeignInterface(_) => "foreign-interface",
            Self::OtherNetwork { .. } => "other-network",
            Self::Host(_) => "host",
            Self::UnknownAddress(_) => "unknown-address",
            Self::Gateway(_) => "gateway",
            Self::Translated(_) => "translated",
            Self::Shared { .. } => "shared",
            Self::NoLife { .. } => "no-life",
            Self::NotSynchronised => "not-synchronised",
            Self::NotEstablished { .. } => "not-established",
            Self::ForeignCgroup { .. } => "foreign-cgroup",
            Self::Accepted { .. } => "accepted",
            Self::ListenerAtPort { .. } => "listener-at-port",
            Self::Unacknowledged { .. } => "unacknowledged",
            Self::EarlierSocket { .. } => "earlier-socket",
            Self::SocketGone { .. } => "socket-gone",
            Self::OverBridge { .. } => "over-bridge",
            Self::JustAttached { .. } => "just-attached",
            Self::NotAttached { .. } => "not-attached",
            Self::Unasked { .. } => "kernel",
            Self::Ambiguous => "ambiguous",
        }
    }
}

/// The first proof of a connection, which takes microseconds.
#[derive(Debug)]
pub enum First {
    /// The caller is proven.
    Proven(Caller),
    /// The caller is refused, and nothing that the engine or the kernel tells later changes that.
    Refused(Refusal),
    /// The answer may change until the deadline: [`identify`] waits for it.
    Undecided,
}

/// Proves who is at the other end of `connection` as far as that is known now.
pub fn identify_at_once(index: &Index, connection: Connection) -> First {
    let refusal = match prove(index, connection) {
        Ok(caller) => return First::Proven(caller),
        Err(refusal) => refusal,
    };
    let synchronised = *index.engine() == EngineState::Synchronised;
    let is_final = match &refusal {
        Refusal::Unacknowledged { .. } => false,
        Refusal::OverBridge { .. } => true,
        // Over a bridge the address may have moved: the engine is asked about it.
        refusal => {
            matches!(connection.via, AcceptedFrom::Namespace(_)) && synchronised && !awaits(index, connection, refusal)
        }
    };
    match is_final {
        true => First::Refused(refusal),
        false => First::Undecided,
    }
}

/// Proves who is at the other end of `connection`, by `deadline` at the latest. Unknown, ambiguous or conflicting: refused.
///
/// # Errors
/// Why nobody was proven.
pub async fn identify(index: &Index, connection: Connection, deadline: Instant) -> Result<Caller, Refusal> {
    match identify_at_once(index, connection) {
        First::Proven(caller) => Ok(caller),
        First::Refused(refusal) => Err(refusal),
        First::Undecided => identify_later(index, connection, deadline).await,
    }
}

/// As [`identify`], after a first proof that was undecided.
///
/// # Errors
/// Why nobody was proven.
pub async fn identify_later(index: &Index, connection: Connection, deadline: Instant) -> Result<Caller, Refusal> {
    let address = connection.client.ip();
    // Subscribed before the first look: what comes in between wakes us.
    let mut changes = index.changes();
    let mut looked = std::pin::pin!(index.look_again(address));
    // In a namespace addresses tell nothing: there is nothing to ask the engine, unless it has not described the container yet.
    let is_undefined = || matches!(connection.via, AcceptedFrom::Namespace(namespace) if index.is_undefined(namespace));
    let mut has_looked = matches!(connection.via, AcceptedFrom::Namespace(_)) && !is_undefined();
    let mut attempts = 0;
    loop {
        changes.mark_unchanged();
        let refusal = match prove(index, connection) {
            Ok(caller) => return Ok(caller),
            Err(refusal) => refusal,
        };
        // Bytes are on their way. The acknowledgment nearly always comes within microseconds.
        if matches!(refusal, Refusal::Unacknowledged { .. }) {
            attempts += 1;
            let pause = async {
                match attempts <= QUICK_ATTEMPTS {
                    true => tokio::task::yield_now().await,
                    false => tokio::time::sleep(PAUSE).await,
                }
            };
            match tokio::time::timeout_at(deadline, pause).await {
                Ok(()) => continue,
                Err(_) => return Err(refusal),
            }
        }
        let synchronised = *index.engine() == EngineState::Synchronised;
        // It has its link, and had none when this connection was proven first.
        if let Refusal::OverBridge { container } = refusal {
            return Err(Refusal::JustAttached { container });
        }
        // More knowledge changes the answer only if a run or a link is just being made, or an address has just moved.
        if has_looked && synchronised && !awaits(index, connection, &refusal) {
            return Err(refusal);
        }
        tokio::select! {
            () = &mut looked, if !has_looked => has_looked = true,
            changed = changes.changed() => if changed.is_err() { return Err(refusal) },
            () = tokio::time::sleep_until(deadline) => {
                let unknown = matches!(
                    refusal,
                    Refusal::UnknownAddress(_) | Refusal::Gateway(_) | Refusal::Host(_)
                );
                let is_known = synchronised && has_looked && !is_undefined();
                return Err(if unknown && !is_known { Refusal::NotSynchronised } else { refusal });
            }
        }
    }
}

/// Whether somebody who may have made the connection is known and has no life yet.
fn awaits(index: &Index, connection: Connection, refusal: &Refusal) -> bool {
    match connection.via {
        // A container that is about to have a link of its own: its next attempt then comes over that.
        AcceptedFrom::Bridge(_) => match refusal {
            Refusal::NoLife { .. } => true,
            Refusal::NotAttached { container, .. } => index.get(container).is_some_and(|record| attaches_soon(&record)),
            _ => false,
        },
        // Its engine has not told yet whose it is.
        AcceptedFrom::Namespace(namespace) if index.is_undefined(namespace) => true,
        AcceptedFrom::Namespace(namespace) => {
            // Who joins this namespace is born into it: the host's, or that of a container which lives in it.
            let members = index.within(namespace);
            let unborn = |record: &Record| record.life.is_none() && record.no_life.is_none();
            index.joining().iter().any(|record| {
                unborn(record)
                    && match &record.definition.network_mode {
                        NetworkMode::Own => false,
                        NetworkMode::Host => !members.iter().any(|it| it.definition.network_mode == NetworkMode::Own),
                        NetworkMode::Container(owner) => members.iter().any(|it| it.definition.id == *owner),
                    }
            })
        }
    }
}

/// Whether a container's link to the service is being made.
fn attaches_soon(record: &Record) -> bool {
    let has_link = |life: &Arc<ContainerRun>| life.handle.is_attached();
    record.attaches && record.not_attached.is_none() && !record.life.as_ref().is_some_and(has_link)
}

/// Why a container has no link to the service.
fn why_not_attached(record: &Record) -> String {
    match (&record.not_attached, record.attaches) {
        (Some(why), _) => why.clone(),
        (None, true) => "it is being made".to_owned(),
        (None, false) => "it has no label of imds-router, or its endpoint is disabled".to_owned(),
    }
}

/// Asks the kernel about every candidate.
fn prove(index: &Index, connection: Connection) -> Result<Caller, Refusal> {
    let address = connection.client.ip();
    let (candidates, mut refusal) = match connection.via {
        AcceptedFrom::Namespace(namespace) => (index.within(namespace), Refusal::Host(address)),
        AcceptedFrom::Bridge(_) => {
            let mut candidates = index.at(address);
            // Others may live in the namespace of who holds the address.
            let sharers = candidates
                .iter()
                .filter_map(|record| record.life.as_ref())
                .flat_map(|life| {
                    let namespace = life.handle.namespace();
                    index.within(namespace)
                });
            let sharers: Vec<_> = sharers.collect();
            for sharer in sharers {
                if !candidates
                    .iter()
                    .any(|known| known.definition.id == sharer.definition.id)
                {
                    candidates.push(sharer);
                }
            }
            let unknown = match index.is_gateway(address) {
                true => Refusal::Gateway(address),
                false => Refusal::UnknownAddress(address),
            };
            (candidates, unknown)
        }
    };
    let mut proven: Option<Caller> = None;
    // One question a namespace: all who live in it get the same answer.
    let mut asked: Vec<(NamespaceId, std::io::Result<Option<SocketEvidence>>)> = Vec::new();
    for record in candidates {
        let container = record.definition.id.clone();
        let Some(life) = record.life.clone().filter(|life| life.alive()) else {
            let why = record
                .no_life
                .clone()
                .unwrap_or_else(|| "no process of it is known".to_owned());
            // Of several reasons the one that says most of the caller is kept: that of a container which lives.
            if matches!(
                refusal,
                Refusal::UnknownAddress(_) | Refusal::Gateway(_) | Refusal::Host(_)
            ) {
                refusal = Refusal::NoLife {
                    container,
                    address,
                    why,
                };
            }
            continue;
        };
        // Packets on a bridge prove nothing, and neither does a socket that seems to belong to them: a neighbor can have the
        // container accept a connection with the same addresses and ports. A container is answered over its own link only.
        if matches!(connection.via, AcceptedFrom::Bridge(_)) && life.handle.level() == ProofLevel::Full {
            refusal = match life.handle.is_attached() {
                true => Refusal::OverBridge { container },
                false => Refusal::NotAttached {
                    container,
                    address,
                    why: why_not_attached(&record),
                },
            };
            continue;
        }
        if life.handle.level() == ProofLevel::Address {
            match by_address(index, connection, &container) {
                Ok(()) if proven.is_none() => proven = Some(Caller { life, socket: None }),
                Ok(()) => return Err(Refusal::Ambiguous),
                Err(why) => refusal = why,
            }
            continue;
        }
        let namespace = life.handle.namespace();
        let at = asked
            .iter()
            .position(|(known, _)| *known == namespace)
            .unwrap_or_else(|| {
                asked.push((namespace, life.handle.socket(connection.client, connection.server)));
                asked.len() - 1
            });
        match &asked[at].1 {
            Ok(None) => match connection.nested && is_translated(&life, address) {
                true => return nested(index, namespace, address),
                false => refusal = Refusal::Translated(address),
            },
            Ok(Some(socket)) if !CONNECTED.contains(&socket.state) => {
                refusal = Refusal::NotEstablished {
                    container,
                    state: socket.state,
                };
            }
            Ok(Some(socket)) => match life.handle.owns_cgroup(socket.cgroup) {
                Ok(true) => match opened(&life, connection, *socket) {
                    Ok(()) if proven.is_some() => return Err(Refusal::Ambiguous),
                    Ok(()) => {
                        proven = Some(Caller {
                            life,
                            socket: Some(socket.cookie),
                        });
                    }
                    Err(why) => refusal = why,
                },
                // The refusal of the container whose socket it is says more.
                Ok(false) if refusal.is_about_the_open() => {}
                Ok(false) => {
                    refusal = Refusal::ForeignCgroup {
                        container,
                        cgroup: socket.cgroup,
                    };
                }
                Err(error) => refusal = unasked(container, &error),
            },
            Err(error) => refusal = unasked(container, error),
        }
    }
    // A life that ended while the kernel was asked proves nothing.
    proven.filter(|caller| caller.life.alive()).ok_or(refusal)
}

/// Whether the container opened the connection of its socket. A sender that uses the address and port of the service as its
/// own can make any server of the container accept one.
fn opened(life: &ContainerRun, connection: Connection, socket: SocketEvidence) -> Result<(), Refusal> {
    let container = life.container.clone();
    if socket.listener {
        return Err(Refusal::ListenerAtPort {
            container,
            port: connection.client.port(),
        });
    }
    match socket.open {
        Open::Passive => Err(Refusal::Accepted { container }),
        Open::Undecided => Err(Refusal::Unacknowledged { container }),
        Open::Earlier => Err(Refusal::EarlierSocket { container }),
        // The kernel reads the state before it locks the socket. If the socket was closed in between, the acknowledgment of its
        // FIN looks like that of a SYN. A state that is still the same excludes that.
        Open::Active => match life.handle.socket_now(connection.client, connection.server) {
            Ok(Some(again)) if again == (socket.state, socket.cookie) => Ok(()),
            Ok(Some(_)) => Err(Refusal::Unacknowledged { container }),
            Ok(None) => Err(Refusal::SocketGone { container }),
            Err(error) => Err(unasked(container, &error)),
        },
    }
}

fn unasked(container: ContainerId, error: &std::io::Error) -> Refusal {
    descriptors::note("proofs", error);
    Refusal::Unasked {
        container,
        error: error.to_string(),
    }
}

/// Verifies, before a request is answered, that the socket that proved the caller is still the other end of the connection: the
/// container has not closed it, so that another sender cannot use the rest of the connection.
///
/// The cookie names the socket that was proven to have opened the connection. Whether a process listens at its port by now
/// does not matter any more.
///
/// # Errors
/// When the socket is another one or gone, or is closed.
pub fn verify_peer(caller: &Caller, connection: Connection) -> Result<(), Refusal> {
    let Some(proven) = caller.socket else { return Ok(()) };
    let container = || caller.life.container.clone();
    match caller.life.handle.socket_now(connection.client, connection.server) {
        Ok(Some((_, cookie))) if cookie != proven => Err(Refusal::SocketGone { container: container() }),
        Ok(Some((state, _))) if !CONNECTED.contains(&state) => Err(Refusal::NotEstablished {
            container: container(),
            state,
        }),
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(Refusal::SocketGone { container: container() }),
        Err(error) => Err(unasked(container(), &error)),
    }
}

/// Whether a connection that no socket of the namespace has comes from inside it: the namespace has put an address of its own
/// in the place of an inner container's. A neighbor on a bridge can send a packet to the service through the namespace, too.
/// That keeps its source address, which is not local to the namespace; the kernel drops packets from outside that have a local
/// one, and would deliver the answers to them locally.
fn is_translated(life: &ContainerRun, address: IpAddr) -> bool {
    life.handle.is_local(address).unwrap_or(false)
}

/// A container inside a container: the outer one, if it is alone in its namespace.
fn nested(index: &Index, namespace: NamespaceId, address: IpAddr) -> Result<Caller, Refusal> {
    let lives = index
        .within(namespace)
        .into_iter()
        .filter_map(|record| record.life.clone());
    let lives: Vec<_> = lives.filter(|life| life.alive()).collect();
    match lives.as_slice() {
        [life] => Ok(Caller {
            life: life.clone(),
            socket: None,
        }),
        [] => Err(Refusal::Translated(address)),
        [life, ..] => Err(Refusal::Shared {
            container: life.container.clone(),
        }),
    }
}

/// Where the kernel cannot be asked and the operator has said that the address is enough: it is, for a container that
/// shares it with nobody, known or yet to come. Only while the engine's events arrive: without them, its last answer may be
/// older than the move of an address to another container.
fn by_address(index: &Index, connection: Connection, container: &ContainerId) -> Result<(), Refusal> {
    if *index.engine() != EngineState::Synchronised || index.is_on_unread_network(container) {
        return Err(Refusal::NotSynchronised);
    }
    let shares = |record: &Arc<Record>| match &record.definition.network_mode {
        NetworkMode::Container(owner) => owner == container,
        NetworkMode::Host | NetworkMode::Own => false,
    };
    match connection.via {
        AcceptedFrom::Bridge(_) if index.joining().iter().any(shares) => Err(Refusal::Shared {
            container: container.clone(),
        }),
        AcceptedFrom::Bridge(_) => Ok(()),
        // Who is in the host's network is told apart by the kernel alone.
        AcceptedFrom::Namespace(_) => Err(Refusal::Host(connection.client.ip())),
    }
}
