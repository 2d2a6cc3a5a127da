//! Who is asking: a connection becomes a [`Caller`], or a [`Refusal`] with the evidence that was seen.
//!
//! # Threat note
//! What is believed, who controls it, and what it proves:
//!
//! * **The listener that accepted.** One inside a network namespace ([`Via::Namespace`]) hears only who is in it, or sends
//!   into it: it says whose word to ask for. No packet crosses a bridge there, so none is diverted.
//! * **Source address** (on the host, [`Via::Bridge`]). Whoever can send a packet writes it: with Docker's default rights
//!   (`NET_RAW`) a container sends with its neighbour's address and MAC. It proves nothing; it says whom to ask about
//!   ([candidates](crate::containers::index::Index::at)).
//! * **The socket in the candidate's network namespace.** The kernel's own table, asked with the exact addresses and ports
//!   of the connection: a neighbour's packets make no socket there. It must be ESTABLISHED: a port that the candidate left
//!   half-open or half-closed can be driven by a neighbour.
//! * **The cgroup id of that socket.** Written by the kernel when the socket was made; names whose process made it. Equal
//!   to, or below, the cgroup of a verified first process of the namespace: not that of a host process that entered it,
//!   and of several containers in one namespace exactly the one. Whoever passes a descriptor on delegates; that is its
//!   maker's business.
//! * **The byte counters of both ends** (over a bridge, on every request; [`other_end`]). An ESTABLISHED socket of the same
//!   addresses and ports need not be the other end of *this* connection: a neighbour that can send packets puts a request
//!   into an idle one, or resets our end and takes the addresses over. Then one end has received what the other never sent.
//! * **The life.** The first process's pidfd, looked at again on every request.
//! * **A bridge inside a container's namespace** ([`Via::Nested`], off by default). Whoever comes in over one is behind the
//!   container: it made the bridge, and decides who is on it. Says "this container, or what runs inside it", no more.
//! * **The engine's word alone** ([`Level::Address`], off by default). Where the kernel cannot be asked (no rights, a remote
//!   engine, cgroup v1 alone), the operator may say that an address is enough. It is what the spoofers of the tests defeat.
//!
//! Who controls what: the engine, and whoever may talk to it, names, labels and addresses; a container with `NET_RAW` every
//! byte that it sends, and so addresses, MACs and sequence numbers; one with `NET_ADMIN` also the links and rules of its own
//! namespace; a process with a delegated cgroup the *names* below it. Nobody but the kernel writes the id of a cgroup, the
//! state and the counters of a socket, or a pidfd.
//!
//! What is left:
//!
//! * A cgroup id names who *made* a socket. A process that hands its connected socket to another one (SCM_RIGHTS) delegates,
//!   as it could by handing on the credentials themselves.
//! * Attach `host`: answers cross the bridge that the container is on. A neighbour on the same bridge with `NET_RAW` can
//!   divert an answer in transit while all of this is true, and one that sits in the middle of a connection can change what
//!   is asked and answered within its lengths. It identifies who connected; it does not keep secret. Attach `namespace`,
//!   `--cap-drop NET_RAW`, or networks of their own close that; `freeze_links` keeps neighbours from diverting (IPv4).
//! * Attach `namespace` before it is there: what a container sends in the moment until the service listens inside (over IPv6:
//!   until the engine is done with its network, a fraction of a second) is proven over the bridge, as with attach `host`.
//! * Containers that share a network namespace share a boundary: whoever has `NET_RAW` in it reads along.

pub mod address;
#[cfg(target_os = "linux")]
pub mod cgroup;
#[cfg(target_os = "linux")]
pub mod connection;
#[cfg(target_os = "linux")]
pub mod kernel;
#[cfg(target_os = "linux")]
pub mod level;
#[cfg(target_os = "linux")]
pub mod namespace;
#[cfg(target_os = "linux")]
pub mod socket;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::time::Instant;

use crate::containers::index::{EngineState, Index};
use crate::containers::{
    CgroupId, ContainerId, Counters, Level, Life, NamespaceId, NetworkMode, Record, SocketEvidence,
};

/// `TCP_ESTABLISHED` (include/net/tcp_states.h).
const ESTABLISHED: u8 = 1;

/// The two ends of a connection, as the client sees them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Where it comes from.
    pub client: SocketAddr,
    /// Where the client sent it: port 80 of the metadata address, whatever port we listen on.
    pub server: SocketAddr,
    /// Where it was accepted.
    pub via: Via,
    /// Our end's own address: with the port that we listen on.
    pub own: SocketAddr,
}

/// Where a connection was accepted: it decides who may have made it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Via {
    /// Inside a network namespace: that of containers, or the host's own. Only who lives in it can be at the other end.
    Namespace(NamespaceId),
    /// On the host, over a bridge, by its interface number: the source address leads to candidates.
    Bridge(u32),
    /// Inside the network namespace of a container, over a bridge in there (its interface number): a container that runs
    /// inside that container. Only where the operator lets those be the outer one.
    Nested(NamespaceId, u32),
}

/// A life that was proven to be at the other end. Only [`identify`] makes one:
///
/// ```compile_fail
/// # fn guess(life: std::sync::Arc<imds_router::containers::Life>) -> imds_router::caller::Caller {
/// imds_router::caller::Caller { life } // no proof in hand, and none can be made here
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Caller {
    life: Arc<Life>,
    proof: Proof,
}

impl Caller {
    /// Whose life.
    pub fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// What was shown of the caller.
#[derive(Clone, Copy, Debug)]
enum Proof {
    /// By the kernel: a socket of exactly this connection in the life's own namespace, made by the life.
    Socket {
        #[expect(dead_code, reason = "the evidence, for whoever looks at a caller in a debugger")]
        cgroup: CgroupId,
    },
    /// By the kernel: it came into the namespace of exactly one life over a bridge that is in there. Says that it is the
    /// life, or in its care; the operator has allowed that to be the same.
    Nested,
    /// By nobody but the engine: the one container at this address runs. Only where the operator has asked for it.
    Address,
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
    /// It was sent into a container's network namespace from outside, or by a container inside that container.
    #[error(
        "came into network namespace {} over interface {interface}, not by a process in it; containers inside a container \
         are answered where [serve] nested = \"outer\" says so", namespace.0
    )]
    SentInside {
        /// The namespace.
        namespace: NamespaceId,
        /// The interface, as the namespace numbers it.
        interface: u32,
    },
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
    /// The container at the address has no such socket: somebody else sent the packets.
    #[error("{container} may be at {address}, but has no such connection: another sender uses its address")]
    NoSocket {
        /// The container.
        container: ContainerId,
        /// The address.
        address: IpAddr,
    },
    /// There is one, but it is not in use.
    #[error("the connection of {container} is in TCP state {state}, not ESTABLISHED")]
    NotEstablished {
        /// The container.
        container: ContainerId,
        /// The state (include/net/tcp_states.h).
        state: u8,
    },
    /// There is one, but somebody else made it.
    #[error("the socket in the network namespace of {container} was made by cgroup {}, which is no container's there", cgroup.0)]
    ForeignCgroup {
        /// The container.
        container: ContainerId,
        /// The maker's.
        cgroup: CgroupId,
    },
    /// It came over a bridge, but its container is heard inside its own network namespace.
    #[error(
        "{container} is heard inside its network namespace only; this came over a bridge: another sender uses its address"
    )]
    HeardInside {
        /// The container.
        container: ContainerId,
    },
    /// The container's socket has not sent what we have received, or the like: it is not the other end.
    #[error(
        "the socket of {container} is not the other end of this connection: it counts {theirs:?}, our end {ours:?}"
    )]
    NotTheOtherEnd {
        /// The container.
        container: ContainerId,
        /// What its socket has counted.
        theirs: Counters,
        /// What our end has counted.
        ours: Counters,
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
            | Self::NoSocket { container, .. }
            | Self::NotEstablished { container, .. }
            | Self::ForeignCgroup { container, .. }
            | Self::HeardInside { container }
            | Self::Shared { container }
            | Self::NotTheOtherEnd { container, .. }
            | Self::Unasked { container, .. } => Some(container),
            Self::ForeignInterface(_)
            | Self::OtherNetwork { .. }
            | Self::Host(_)
            | Self::UnknownAddress(_)
            | Self::Gateway(_)
            | Self::Translated(_)
            | Self::SentInside { .. }
            | Self::NotSynchronised
            | Self::Ambiguous => None,
        }
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
            Self::SentInside { .. } => "sent-inside",
            Self::Shared { .. } => "shared",
            Self::NoLife { .. } => "no-life",
            Self::NotSynchronised => "not-synchronised",
            Self::NoSocket { .. } => "no-socket",
            Self::NotEstablished { .. } => "not-established",
            Self::ForeignCgroup { .. } => "foreign-cgroup",
            Self::HeardInside { .. } => "heard-inside",
            Self::NotTheOtherEnd { .. } => "not-the-other-end",
            Self::Unasked { .. } => "kernel",
            Self::Ambiguous => "ambiguous",
        }
    }
}

/// Proves who is at the other end of `connection`, by `deadline` at the latest. Unknown, ambiguous or conflicting: refused.
///
/// # Errors
/// Why nobody was proven.
pub async fn identify(index: &Index, connection: Connection, deadline: Instant) -> Result<Caller, Refusal> {
    let address = connection.client.ip();
    // Subscribed before the first look: what comes in between wakes us.
    let mut changes = index.changes();
    let mut looked = std::pin::pin!(index.look_again(address));
    // In a namespace addresses tell nothing: there is nothing to ask the engine.
    let mut has_looked = matches!(connection.via, Via::Namespace(_) | Via::Nested(..));
    loop {
        changes.mark_unchanged();
        let refusal = match prove(index, connection) {
            Ok(caller) => return Ok(caller),
            Err(refusal) => refusal,
        };
        let synchronised = *index.engine() == EngineState::Synchronised;
        // More knowledge changes the kernel's word only if somebody is just being born, or an address has just moved.
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
                return Err(if unknown && !synchronised { Refusal::NotSynchronised } else { refusal });
            }
        }
    }
}

/// The daemon's own ends of its connections, as the kernel counts them. Implemented on the real kernel and by a script.
pub trait OwnEnds: Send + Sync + 'static {
    /// What our end of the connection between `own` and `client` has counted. `Ok(None)`: there is no such connection.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn counters(&self, own: SocketAddr, client: SocketAddr) -> std::io::Result<Option<Counters>>;
}

/// Shows, for one request, that the proven socket is the other end of *this* connection. Asked before each answer.
///
/// Inside a namespace only its own sockets are heard (or, where that is allowed, its own bridges), so there is nothing to
/// show; and with the address alone there is nothing to show it by. Over a bridge, who can send packets can
/// learn the numbers of an open connection, put a request into it, or reset our end and connect anew with the same
/// addresses and ports, while the container's socket stays ESTABLISHED. But then the two ends do not agree on how many
/// bytes went which way.
///
/// # Errors
/// When they do not agree, or cannot be compared.
pub fn other_end(caller: &Caller, connection: Connection, own: &dyn OwnEnds) -> Result<(), Refusal> {
    if matches!(connection.via, Via::Namespace(_) | Via::Nested(..)) || matches!(caller.proof, Proof::Address) {
        return Ok(());
    }
    let container = || caller.life.container.clone();
    let unasked = |error: String| Refusal::Unasked {
        container: container(),
        error,
    };
    let ours = || {
        let counters = own
            .counters(connection.own, connection.client)
            .map_err(|error| unasked(error.to_string()))?;
        counters.ok_or_else(|| unasked("our end is gone".to_owned()))
    };
    if caller.life.witness.listens_inside(connection.server.ip()) {
        return Err(Refusal::HeardInside { container: container() });
    }
    // Bytes may be on their way meanwhile. Counters only grow: what must be less is read before, what must be more after.
    let before = ours()?;
    let theirs = caller.life.witness.socket(connection.client, connection.server);
    let after = ours()?;
    let theirs = match theirs.map_err(|error| unasked(error.to_string()))? {
        None => {
            return Err(Refusal::NoSocket {
                container: container(),
                address: connection.client.ip(),
            });
        }
        Some(socket) if socket.state != ESTABLISHED => {
            return Err(Refusal::NotEstablished {
                container: container(),
                state: socket.state,
            });
        }
        Some(socket) => socket.counters,
    };
    let agree = before.received <= theirs.sent
        && before.acked <= theirs.received
        && theirs.received <= after.sent
        // The client counts its SYN.
        && theirs.acked.saturating_sub(1) <= after.received;
    if agree {
        Ok(())
    } else {
        Err(Refusal::NotTheOtherEnd {
            container: container(),
            theirs,
            ours: after,
        })
    }
}

/// Whether somebody who may have made the connection is known and has no life yet.
fn awaits(index: &Index, connection: Connection, refusal: &Refusal) -> bool {
    match connection.via {
        Via::Bridge(_) => matches!(refusal, Refusal::NoLife { .. }),
        // What runs inside a container comes long after it.
        Via::Nested(..) => false,
        Via::Namespace(namespace) => {
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

/// Asks the kernel about every candidate.
fn prove(index: &Index, connection: Connection) -> Result<Caller, Refusal> {
    let address = connection.client.ip();
    let (candidates, mut refusal) = match connection.via {
        Via::Namespace(namespace) => (index.within(namespace), Refusal::Host(address)),
        Via::Nested(namespace, interface) => return nested(index, namespace, interface),
        Via::Bridge(_) => {
            let mut candidates = index.at(address);
            // Others may live in the namespace of who holds the address.
            let sharers = candidates
                .iter()
                .filter_map(|record| record.life.as_ref())
                .flat_map(|life| {
                    let namespace = life.witness.namespace();
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
        // A socket inside such a namespace leads to the listener there: it proves nothing of what crosses a bridge.
        if matches!(connection.via, Via::Bridge(_)) && life.witness.listens_inside(connection.server.ip()) {
            refusal = Refusal::HeardInside { container };
            continue;
        }
        if life.witness.level() == Level::Address {
            match by_address(index, connection, &container) {
                Ok(proof) if proven.is_none() => proven = Some(Caller { life, proof }),
                Ok(_) => return Err(Refusal::Ambiguous),
                Err(why) => refusal = why,
            }
            continue;
        }
        let namespace = life.witness.namespace();
        let at = asked
            .iter()
            .position(|(known, _)| *known == namespace)
            .unwrap_or_else(|| {
                asked.push((namespace, life.witness.socket(connection.client, connection.server)));
                asked.len() - 1
            });
        match &asked[at].1 {
            Ok(None) if matches!(connection.via, Via::Namespace(_)) => refusal = Refusal::Translated(address),
            Ok(None) => refusal = Refusal::NoSocket { container, address },
            Ok(Some(socket)) if socket.state != ESTABLISHED => {
                refusal = Refusal::NotEstablished {
                    container,
                    state: socket.state,
                };
            }
            Ok(Some(socket)) if !life.witness.holds(socket.cgroup) => {
                refusal = Refusal::ForeignCgroup {
                    container,
                    cgroup: socket.cgroup,
                };
            }
            Ok(Some(socket)) => {
                if proven.is_some() {
                    return Err(Refusal::Ambiguous);
                }
                let proof = Proof::Socket { cgroup: socket.cgroup };
                proven = Some(Caller { life, proof });
            }
            Err(error) => {
                refusal = Refusal::Unasked {
                    container,
                    error: error.to_string(),
                }
            }
        }
    }
    // A life that ended while the kernel was asked proves nothing.
    proven.filter(|caller| caller.life.alive()).ok_or(refusal)
}

/// A container inside a container: the outer one, if nobody shares its namespace.
fn nested(index: &Index, namespace: NamespaceId, interface: u32) -> Result<Caller, Refusal> {
    let lives = index
        .within(namespace)
        .into_iter()
        .filter_map(|record| record.life.clone());
    let lives: Vec<_> = lives.filter(|life| life.alive()).collect();
    match lives.as_slice() {
        [life] => Ok(Caller {
            life: life.clone(),
            proof: Proof::Nested,
        }),
        [] => Err(Refusal::SentInside { namespace, interface }),
        [life, ..] => Err(Refusal::Shared {
            container: life.container.clone(),
        }),
    }
}

/// Where the kernel cannot be asked and the operator has said that the address is enough: it is, for a container that
/// shares it with nobody, known or yet to come.
fn by_address(index: &Index, connection: Connection, container: &ContainerId) -> Result<Proof, Refusal> {
    let shares = |record: &Arc<Record>| match &record.definition.network_mode {
        NetworkMode::Container(owner) => owner == container,
        NetworkMode::Host | NetworkMode::Own => false,
    };
    match connection.via {
        Via::Bridge(_) if index.joining().iter().any(shares) => Err(Refusal::Shared {
            container: container.clone(),
        }),
        Via::Bridge(_) => Ok(Proof::Address),
        // Who is in the host's network is told apart by the kernel alone.
        Via::Namespace(_) | Via::Nested(..) => Err(Refusal::Host(connection.client.ip())),
    }
}
