//! Who runs here: the containers of this host, as nouns.
//!
//! Nothing in this file does I/O, reads a clock or holds a lock. [`reconciler`] is the one writer, [`index`] is what
//! everybody reads.

pub mod compose;
pub mod connection_slots;
pub mod docker;
mod docker_http;
mod failures;
pub mod image_labels;
pub mod index;
pub mod label_sources;
pub mod labels;
pub mod legacy_labels;
pub mod lookups;
pub mod reconciler;
mod subscription;

use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::SystemTime;

use arc_swap::ArcSwap;
use litemap::LiteMap;
use serde::{Deserialize, Serialize};

use self::connection_slots::ConnectionSlots;
use self::label_sources::{Origin, Pairs};
use crate::instance::Instance;

/// A container's id: 64 lower-case hexadecimal digits, given by the engine.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ContainerId(Arc<str>);

impl ContainerId {
    /// Number of hexadecimal digits of an id (moby `stringid`: 32 random bytes).
    pub const DIGITS: usize = 64;

    /// Reads an id; `None` where the text is not one.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        (text.len() == Self::DIGITS && text.bytes().all(hex)).then(|| Self(text.into()))
    }

    /// All 64 digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first 12 digits, as `docker ps` shows them.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

impl fmt::Debug for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.short())
    }
}

/// A network's id or, on Podman, its name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NetworkId(pub Arc<str>);

impl From<&str> for NetworkId {
    fn from(text: &str) -> Self {
        Self(text.into())
    }
}

/// Whose network namespace a container is in.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NetworkMode {
    /// One of its own.
    #[default]
    Own,
    /// The host's.
    Host,
    /// Another container's.
    Container(ContainerId),
}

impl NetworkMode {
    /// Reads `HostConfig.NetworkMode`.
    pub fn parse(text: &str) -> Self {
        match text.split_once(':') {
            Some(("container", id)) => ContainerId::parse(id).map_or(Self::Own, Self::Container),
            _ if text == "host" => Self::Host,
            _ => Self::Own,
        }
    }
}

/// The engine's description of a container, apart from its runs. All of it was set when the container was created, except for
/// ambiguous labels and variables.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Definition {
    /// Its id.
    pub id: ContainerId,
    /// Its name, without the leading slash.
    pub name: String,
    /// Its labels.
    pub labels: Pairs,
    /// Its variables; `None`: not known yet.
    pub environment: Option<Pairs>,
    /// Whether the image's labels and variables are known: without them, every pair is ambiguous.
    pub image_is_known: bool,
    /// The image as the engine names it.
    pub image: String,
    /// The image's id (`sha256:…`).
    pub image_id: String,
    /// Whose network namespace.
    pub network_mode: NetworkMode,
    /// Its hostname; the first 12 digits of the id until the engine has said otherwise.
    pub hostname: String,
}

/// Variables of a container or an image. Applications keep secrets there: `Debug` shows names only.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Environment(pub BTreeMap<String, String>);

impl Environment {
    /// Reads `NAME=value` lines, as the engine has them.
    pub fn of(lines: impl IntoIterator<Item = impl AsRef<str>>) -> Self {
        let pairs = lines.into_iter().filter_map(|line| {
            let (name, value) = line.as_ref().split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        Self(pairs.collect())
    }

    /// One variable.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }
}

impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

impl Definition {
    /// The compose project that the container belongs to, by compose's label.
    pub fn project(&self) -> Option<(&str, Origin)> {
        self.labels.get(compose::PROJECT)
    }

    /// Which of a compose service's containers it is, from 1.
    pub fn replica(&self) -> Option<u32> {
        self.labels.get_own(compose::CONTAINER_NUMBER)?.parse().ok()
    }

    /// The compose service that the container belongs to, by compose's label.
    pub fn service(&self) -> Option<(&str, Origin)> {
        self.labels.get(compose::SERVICE)
    }
}

/// One end of a container on one network.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// The network's name.
    pub network: String,
    /// MAC address as the engine writes it.
    pub mac: String,
    /// IPv4 address and the length of its subnet's prefix.
    pub ipv4: Option<(Ipv4Addr, u8)>,
    /// IPv6 address and the length of its subnet's prefix.
    pub ipv6: Option<(Ipv6Addr, u8)>,
    /// The network has no way out (`--internal`).
    pub internal: bool,
}

impl Endpoint {
    /// The addresses of this endpoint.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let v4 = self.ipv4.map(|(address, _)| IpAddr::V4(address));
        let v6 = self.ipv6.map(|(address, _)| IpAddr::V6(address));
        v4.into_iter().chain(v6)
    }
}

/// Labels, by name. A sorted list, exactly as long as it is: there are as many of these as containers.
pub type Labels = LiteMap<String, String>;

/// All networks of a container, by id: one, as a rule, and there are as many of these as containers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NetworkEndpoints(pub LiteMap<NetworkId, Endpoint>);

impl NetworkEndpoints {
    /// All addresses on all networks.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.0.values().flat_map(Endpoint::addresses)
    }

    /// The endpoint that EC2 would call device 0: that of the default route. Engines before 28 give it to the network
    /// whose name sorts first; internal networks have none.
    pub fn primary(&self) -> Option<&Endpoint> {
        self.in_order().first().map(|(_, endpoint)| *endpoint)
    }

    /// All of them, as EC2 would number them: the primary first.
    pub fn in_order(&self) -> Vec<(&NetworkId, &Endpoint)> {
        let mut all: Vec<_> = self.0.iter().collect();
        all.sort_by_key(|(_, endpoint)| (endpoint.ipv4.is_none(), endpoint.internal, &endpoint.network));
        all
    }
}

/// The kernel's id of a cgroup directory: its inode number on the cgroup v2 hierarchy. The kernel gives a new one to
/// every directory that it makes, so it also tells one run of a container from the next.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct CgroupId(pub u64);

/// The kernel's id of a network namespace: the inode number of its file (namespaces(7)). Not used again while anything
/// of ours is open in it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct NamespaceId(pub u64);

/// Kernel facts about one TCP socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SocketEvidence {
    /// TCP state as in `include/net/tcp_states.h`; 1 is ESTABLISHED.
    pub state: u8,
    /// The cgroup of the process that created the socket.
    pub cgroup: CgroupId,
    /// The kernel's number of the socket (`SO_COOKIE`, socket(7)). No other socket ever has it.
    pub cookie: u64,
    /// Which end opened the connection.
    pub open: Open,
    /// Whether a socket listens at the local address and port.
    pub listener: bool,
}

/// How a socket came to its connection (RFC 9293, section 3.3.2).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Open {
    /// It connected: the other end has acknowledged its SYN.
    Active,
    /// It was accepted from a listener.
    Passive,
    /// The counters do not tell while sent bytes are not acknowledged.
    Undecided,
    /// The socket is older than the rules of the host, so another process may be its other end.
    Earlier,
}

/// Whose word there is on a life.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum ProofLevel {
    /// The engine's: who is at which address.
    Address,
    /// The kernel's: who made which connection.
    Full,
}

/// What the kernel holds of one life: asked, never believed from anybody else. Implemented by [`crate::attribution`] on the
/// real kernel and by tests on a script.
pub trait RunHandle: Send + Sync + 'static {
    /// Whose word it is.
    fn level(&self) -> ProofLevel {
        ProofLevel::Full
    }

    /// Whether the container's first process still runs. Cheap: it is asked on every request.
    fn alive(&self) -> bool;

    /// Completes when the first process has ended.
    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>>;

    /// The socket in the container's network namespace whose connection is exactly `client` → `server`, addresses as
    /// the client sees them. `Ok(None)`: there is none.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn socket(&self, client: SocketAddr, server: SocketAddr) -> std::io::Result<Option<SocketEvidence>>;

    /// State and cookie of that socket, without the rest of its evidence. Takes microseconds: called for many requests.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn socket_now(&self, client: SocketAddr, server: SocketAddr) -> std::io::Result<Option<(u8, u64)>> {
        let socket = self.socket(client, server)?;
        Ok(socket.map(|socket| (socket.state, socket.cookie)))
    }

    /// Whether `address` is one of the container's network namespace's own.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    fn is_local(&self, _address: IpAddr) -> std::io::Result<bool> {
        Ok(false)
    }

    /// Whether `cgroup` is the container's or lies below it.
    ///
    /// # Errors
    /// When its directory cannot be read.
    fn owns_cgroup(&self, cgroup: CgroupId) -> std::io::Result<bool>;

    /// The container's network namespace; several containers may share one, or have the host's.
    fn namespace(&self) -> NamespaceId;

    /// Whether the namespace has a link of its own to the service. Connections of its processes then come over that link and
    /// over nothing else.
    fn is_attached(&self) -> bool;

    /// Gives the container's network namespace a link of its own to the service, for this run, and keeps it in place. Blocks
    /// for a moment. The host's namespace needs none. Returns what another program has put beside it, for `status`.
    ///
    /// # Errors
    /// Why it is not possible now; `status` shows the text.
    fn attach(&self) -> Result<Vec<String>, String>;

    /// Removes the link, unless another run in the namespace needs it.
    ///
    /// # Errors
    /// What is left, and why.
    fn detach(&self) -> Result<(), String>;

    /// Why the link was not in place at its last change: it could not be restored, or repairs are suspended. `None`: it was, or
    /// there is none to be in place.
    fn path_problem(&self) -> Option<String> {
        None
    }

    /// Looks, now and in the kernel, whether a request of the container gets to the service. Blocks for a moment.
    ///
    /// # Errors
    /// What is missing; and whether repairs are suspended because something removes the link again and again.
    fn check_path(&self) -> Result<(), String>;
}

/// One run of one container, from the start of its first process to its end. Connections, tokens and the instance
/// belong to a life, never to an address or a name.
pub struct ContainerRun {
    /// Whose life it is.
    pub container: ContainerId,
    /// The kernel's id of it.
    pub cgroup: CgroupId,
    /// The container's first process, as this host numbers it.
    pub pid: u32,
    /// When the first process started.
    pub started: SystemTime,
    /// The kernel's side of it.
    pub handle: Arc<dyn RunHandle>,
    /// What this container is to see; replaced whole on any change.
    pub instance: ArcSwap<Instance>,
    /// Its open connections, and their limit.
    pub connections: Arc<ConnectionSlots>,
    /// What was last asked, for `status`.
    pub last: LastRequest,
}

impl ContainerRun {
    /// Whether it still is: asked of the kernel.
    pub fn alive(&self) -> bool {
        self.handle.alive()
    }
}

impl fmt::Debug for ContainerRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Life")
            .field("container", &self.container)
            .field("cgroup", &self.cgroup)
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

/// The last request of a life: time and status, without a lock.
#[derive(Debug, Default)]
pub struct LastRequest {
    /// Seconds since 1970; 0 = none yet.
    at: AtomicU64,
    status: AtomicU32,
}

impl LastRequest {
    /// Notes a request answered at `at` (seconds since 1970) with `status`.
    pub fn note(&self, at: u64, status: u16) {
        self.at.store(at, Ordering::Relaxed);
        self.status.store(u32::from(status), Ordering::Relaxed);
    }

    /// Seconds since 1970 and status of the last request, if there was one.
    pub fn get(&self) -> Option<(u64, u16)> {
        let at = self.at.load(Ordering::Relaxed);
        let status = u16::try_from(self.status.load(Ordering::Relaxed)).unwrap_or(0);
        (at != 0).then_some((at, status))
    }
}

/// All that is known of one container at one moment. Readers get it whole; the watcher replaces it whole.
#[derive(Clone, Debug)]
pub struct Record {
    /// What the engine says of it.
    pub definition: Arc<Definition>,
    /// Its networks.
    pub attachments: Arc<NetworkEndpoints>,
    /// Its present run, if the kernel knows of one.
    pub life: Option<Arc<ContainerRun>>,
    /// Why there is no life although the engine says that it runs.
    pub no_life: Option<String>,
    /// The error of a call to the engine about this container, which the daemon repeats until it is answered.
    pub unread: Option<String>,
    /// Whether its network namespace is to have a link to the service.
    pub attaches: bool,
    /// Why it has no link although it should.
    pub not_attached: Option<String>,
    /// When the daemon tries again to create the link.
    pub next_attach: Option<tokio::time::Instant>,
    /// What another program has put into its namespace beside ours.
    pub left_alone: Vec<String>,
    /// What it is to see.
    pub instance: Arc<Instance>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_64_lower_case_hex_digits() {
        assert!(ContainerId::parse(&"0123456789abcdef".repeat(4)).is_some());
        for bad in [
            "",
            "abc",
            &"A".repeat(64),
            &"g".repeat(64),
            &"a".repeat(63),
            &"a".repeat(65),
        ] {
            assert!(ContainerId::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn network_modes() {
        let id = "ab".repeat(32);
        assert_eq!(NetworkMode::parse("default"), NetworkMode::Own);
        assert_eq!(NetworkMode::parse("host"), NetworkMode::Host);
        assert_eq!(
            NetworkMode::parse(&format!("container:{id}")),
            NetworkMode::Container(ContainerId::parse(&id).unwrap())
        );
    }
}
