//! Who is asking: a connection becomes a [`Caller`], or a [`Refusal`] with the evidence that was seen.
//!
//! # Threat note
//! What is believed, who controls it, and what it proves:
//!
//! * **Source address.** Whoever can send a packet writes it: with Docker's default rights (`NET_RAW`) a container sends
//!   with its neighbour's address and MAC. It proves nothing; it says whom to ask about ([candidates](crate::containers::index::Index::at)).
//! * **The socket in the candidate's network namespace.** The kernel's own table, asked with the exact addresses and ports
//!   of the connection: a neighbour's packets make no socket there. It must be ESTABLISHED: a port that the candidate left
//!   half-open or half-closed can be driven by a neighbour.
//! * **The cgroup id of that socket.** Written by the kernel when the socket was made; names whose process made it. Equal
//!   to, or below, the cgroup of the candidate's verified first process: not that of a host process that entered the
//!   namespace. Whoever passes a descriptor on delegates; that is its maker's business.
//! * **The life.** The first process's pidfd, looked at again on every request.
//!
//! What is left: answers cross the bridge that the container is on. A neighbour on the same bridge with `NET_RAW` can
//! divert an answer in transit while all of this is true. It identifies; it does not keep secret.
//! `--cap-drop NET_RAW` or networks of their own close that.

#[cfg(target_os = "linux")]
pub mod cgroup;
#[cfg(target_os = "linux")]
pub mod connection;
#[cfg(target_os = "linux")]
pub mod kernel;
#[cfg(target_os = "linux")]
pub mod namespace;
#[cfg(target_os = "linux")]
pub mod socket;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::time::Instant;

use crate::containers::index::{EngineState, Index};
use crate::containers::{CgroupId, ContainerId, Life};

/// `TCP_ESTABLISHED` (include/net/tcp_states.h).
const ESTABLISHED: u8 = 1;

/// The two ends of a connection, as the client sees them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Connection {
    /// Where it comes from.
    pub client: SocketAddr,
    /// Where the client sent it: port 80 of the metadata address, whatever port we listen on.
    pub server: SocketAddr,
    /// The interface of this host that it came in on.
    pub interface: u32,
}

/// A life that was proven to be at the other end. Only [`identify`] makes one.
#[derive(Clone, Debug)]
pub struct Caller {
    life: Arc<Life>,
    #[expect(dead_code, reason = "a caller without a proof in hand cannot be made")]
    proof: Proof,
}

impl Caller {
    /// Whose life.
    pub fn life(&self) -> &Arc<Life> {
        &self.life
    }
}

/// That the kernel has shown a socket of exactly this connection in the life's own namespace, made by the life.
#[derive(Clone, Copy, Debug)]
struct Proof {
    #[expect(dead_code, reason = "the evidence, for whoever looks at a caller in a debugger")]
    socket: CgroupId,
}

/// Why nobody was proven, with what was seen. For the operator; the caller learns nothing.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refusal {
    /// It comes from the LAN, or another interface that no container is behind.
    #[error("came in on interface {0}, which is neither this host's own nor a bridge")]
    ForeignInterface(u32),
    /// It comes from this host itself, or from a container in the host's network.
    #[error("comes from {0}, this host's own address: host processes and host-network containers are not served")]
    Host(IpAddr),
    /// No container is known at the address.
    #[error("no container of the engine is at {0}")]
    UnknownAddress(IpAddr),
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
    #[error("{container} is at {address}, but has no such connection: another sender uses its address")]
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
    #[error("the socket in the network namespace of {container} was made by cgroup {}, not by the container", cgroup.0)]
    ForeignCgroup {
        /// The container.
        container: ContainerId,
        /// The maker's.
        cgroup: CgroupId,
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
    /// A short name, for counters and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::ForeignInterface(_) => "foreign-interface",
            Self::Host(_) => "host",
            Self::UnknownAddress(_) => "unknown-address",
            Self::NoLife { .. } => "no-life",
            Self::NotSynchronised => "not-synchronised",
            Self::NoSocket { .. } => "no-socket",
            Self::NotEstablished { .. } => "not-established",
            Self::ForeignCgroup { .. } => "foreign-cgroup",
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
    if address.is_loopback() || address == connection.server.ip() {
        return Err(Refusal::Host(address));
    }
    // Subscribed before the first look: what comes in between wakes us.
    let mut changes = index.changes();
    let mut looked = std::pin::pin!(index.look_again(address));
    let mut looking = false;
    let mut has_looked = false;
    loop {
        changes.mark_unchanged();
        let refusal = match prove(index, connection) {
            Ok(caller) => return Ok(caller),
            // The kernel's word: more knowledge of addresses will not change it, unless the address has just moved.
            Err(refusal) => refusal,
        };
        let synchronised = *index.engine() == EngineState::Synchronised;
        if has_looked && synchronised && !matches!(refusal, Refusal::NoLife { .. }) {
            return Err(refusal);
        }
        looking |= !has_looked;
        tokio::select! {
            () = &mut looked, if looking && !has_looked => (looking, has_looked) = (false, true),
            changed = changes.changed() => if changed.is_err() { return Err(refusal) },
            () = tokio::time::sleep_until(deadline) => {
                let unknown = matches!(refusal, Refusal::UnknownAddress(_));
                return Err(if unknown && !synchronised { Refusal::NotSynchronised } else { refusal });
            }
        }
    }
}

/// Asks the kernel about every candidate.
fn prove(index: &Index, connection: Connection) -> Result<Caller, Refusal> {
    let address = connection.client.ip();
    let mut proven = None;
    let mut refusal = Refusal::UnknownAddress(address);
    for record in index.at(address) {
        let container = record.definition.id.clone();
        let Some(life) = record.life.clone().filter(|life| life.alive()) else {
            let why = record
                .no_life
                .clone()
                .unwrap_or_else(|| "no process of it is known".to_owned());
            // Of several reasons the one that says most of the caller is kept: that of a container which lives.
            if matches!(refusal, Refusal::UnknownAddress(_)) {
                refusal = Refusal::NoLife {
                    container,
                    address,
                    why,
                };
            }
            continue;
        };
        match life.witness.socket(connection.client, connection.server) {
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
                proven = Some(Caller {
                    life,
                    proof: Proof { socket: socket.cgroup },
                });
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
