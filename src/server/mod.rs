//! HTTP over any connection: who asks is proven once a connection, then every request is a straight line from head to
//! reply.
//!
//! A client that leaves ends its own request and nothing else: what it waited for belongs to the broker and the watcher.

mod admission;
mod http;
mod linger;

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::{Buf as _, Bytes, BytesMut};
use hyper::http::request::Parts;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::OwnedSemaphorePermit;
#[cfg(target_os = "linux")]
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{debug, info, trace, warn};

use self::admission::{Sender, Unproven};
use self::http::Ended;
#[cfg(target_os = "linux")]
use crate::attribution::ingress::{Interface, Interfaces, ingress};
#[cfg(target_os = "linux")]
use crate::attribution::sock_diag::DiagSocket;
use crate::attribution::{
    AcceptedFrom, Caller, Connection, First, Refusal, identify_at_once, identify_later, verify_peer,
};
use crate::clock::Clock;
use crate::containers::connection_slots::{Full, Slot};
use crate::containers::index::Index;
use crate::containers::{ContainerId, ContainerRun, NamespaceId, ProofLevel};
use crate::credentials::broker::{Broker, NoCredentials, ProviderError, Published};
use crate::descriptors::{self, Budget};
use crate::instance::{Instance, Role};
use crate::logging::printable;
use crate::metadata::Node;
use crate::metadata::identity_document::Signer;
use crate::metadata::tree::{IAM, ROLE_LIST};
use crate::protocol::request::{self, Call, parse, version_list};
use crate::protocol::token::TokenAuthority;
use crate::protocol::{Refused, Reply, TOKEN_HEADER};

/// A connection ends after so many requests, or so long: whatever changes, nobody keeps an old one for ever.
const REQUESTS_PER_CONNECTION: u32 = 1_000;
const CONNECTION_LIFE: Duration = Duration::from_secs(300);
/// How long the client's socket counts as verified. A look-up for each answer costs a busy connection a fifth of its requests a
/// second. While the socket exists, a process of its namespace that forges packets can use the connection anyway.
const PEER_VERIFIED: Duration = Duration::from_millis(10);
/// How many bytes of a connection are read while it waits for its proof.
const BYTES_BEFORE_PROOF: usize = 4096;
/// How long a connection beyond all limits of its container is open for its 503: long enough if the request came with the
/// handshake, short enough that the sockets do not add up.
const AT_ONCE: Duration = Duration::from_millis(20);
/// The name of connections where shortages of descriptors are counted.
#[cfg(target_os = "linux")]
const CONNECTIONS: &str = "connections";
/// Accepted connections of one listener of which it is not decided yet whether they may stay. The kernel keeps the others, without
/// a descriptor of the daemon. There are as many listeners as containers, so few each.
#[cfg(target_os = "linux")]
const UNDECIDED: usize = 4;
/// The port that clients ask.
pub const IMDS_PORT: u16 = 80;

/// What every connection needs.
pub struct Service {
    /// Who runs here.
    pub index: Arc<Index>,
    /// Their credentials.
    pub broker: Arc<Broker>,
    /// Their tokens.
    pub tokens: TokenAuthority,
    /// Who signs their identities.
    pub signer: Arc<Signer>,
    /// Time.
    pub clock: Clock,
    /// The longest that a request waits in all.
    pub hold: Duration,
    /// More names that are accepted in `Host`.
    pub hosts: Vec<String>,
    /// Whether a role that is denied is answered as EC2 does it.
    pub ec2_error_documents: bool,
    descriptors: Budget,
    unproven: Unproven,
    /// Connections that are open now, of all containers together.
    open: Arc<AtomicUsize>,
    /// Asks for the users of the host's own sockets.
    host: OnceLock<HostUsers>,
    versions: Bytes,
    refusals: Refusals,
    requests: Requests,
    at_limit: AtLimit,
    /// Where the daemon asks itself from, until that has arrived.
    probes: dashmap::DashSet<SocketAddr>,
}

/// How requests are answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Options {
    /// The longest that a request waits in all.
    pub hold: Duration,
    /// More names that are accepted in `Host`.
    pub hosts: Vec<String>,
    /// Whether a role that is denied is answered as EC2 does it.
    pub ec2_error_documents: bool,
}

impl Service {
    /// Puts the parts together.
    pub fn new(
        index: Arc<Index>,
        broker: Arc<Broker>,
        (tokens, signer): (TokenAuthority, Arc<Signer>),
        clock: Clock,
        options: Options,
    ) -> Arc<Self> {
        let Options {
            hold,
            hosts,
            ec2_error_documents,
        } = options;
        let descriptors = descriptors::limit();
        Arc::new(Self {
            index,
            broker,
            tokens,
            signer,
            refusals: Refusals::new(&clock),
            clock,
            hold,
            hosts,
            ec2_error_documents,
            descriptors: Budget::of(descriptors),
            unproven: Unproven::new(descriptors),
            open: Arc::default(),
            host: OnceLock::new(),
            versions: version_list().into(),
            requests: Requests::default(),
            at_limit: AtLimit::default(),
            probes: dashmap::DashSet::new(),
        })
    }

    /// The daemon is about to ask itself from `client`: its refusal is nothing to note.
    pub fn expect_probe(self: &Arc<Self>, client: SocketAddr) -> Probe {
        self.probes.insert(client);
        Probe {
            service: self.clone(),
            client,
        }
    }
}

/// A question of the daemon to itself.
pub struct Probe {
    service: Arc<Service>,
    client: SocketAddr,
}

impl Probe {
    /// Whether it has come to [`serve`].
    pub fn arrived(&self) -> bool {
        !self.service.probes.contains(&self.client)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.service.probes.remove(&self.client);
    }
}

/// The user of the host who made a connection, if the kernel tells.
type HostUsers = Box<dyn Fn(Connection) -> Option<u32> + Send + Sync>;

/// Counts one open connection.
struct OpenConnection(Arc<AtomicUsize>);

impl OpenConnection {
    fn new(service: &Service) -> Self {
        service.open.fetch_add(1, Ordering::Relaxed);
        Self(service.open.clone())
    }
}

impl Drop for OpenConnection {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Service {
    /// How many connections one container may have now: half of what is left. Others that use all they get therefore leave some
    /// to a container that has none.
    fn share(&self) -> usize {
        let all = self.descriptors.for_connections(self.index.namespaces());
        all.saturating_sub(self.open.load(Ordering::Relaxed)) / 2
    }

    /// The sender of a connection, from whose share of the places before proof it takes one.
    fn sender(&self, connection: Connection) -> Sender {
        let (address, user) = match connection.via {
            AcceptedFrom::Namespace(_) => (None, self.host.get().and_then(|user| user(connection))),
            AcceptedFrom::Bridge(_) => (Some(connection.client.ip()), None),
        };
        Sender {
            ingress: connection.via,
            address,
            user,
        }
    }

    /// Connections whose caller was not proven and that were closed without an answer, because their sender had too many of
    /// them, so far.
    pub fn turned_away(&self) -> u64 {
        self.unproven.turned_away()
    }
}

/// Accepts on the host until the task is dropped. `host`: the host's own network namespace; `level`: what callers are proven
/// by.
#[cfg(target_os = "linux")]
pub async fn accept_on_host(
    listener: tokio::net::TcpListener,
    interfaces: Arc<Interfaces>,
    host: NamespaceId,
    level: ProofLevel,
    service: Arc<Service>,
) {
    match DiagSocket::open() {
        // The host has one listener for each family.
        Ok(sockets) => drop(service.host.set(host_users(sockets, host))),
        Err(error) => warn!(%error, "users of this host are not told apart when they have too many connections"),
    }
    let via = |stream: &TcpStream, client| {
        let interface = ingress(stream).ok()?;
        match interfaces.kind(interface).ok()? {
            Interface::Own => Some(AcceptedFrom::Namespace(host)),
            Interface::Bridge => Some(AcceptedFrom::Bridge(interface)),
            // In a container of its own the daemon has no bridges, only a link to the others' network.
            Interface::Foreign if level == ProofLevel::Address => Some(AcceptedFrom::Bridge(interface)),
            Interface::Foreign => {
                // Closed without a byte.
                service.refusals.note(&Refusal::ForeignInterface(interface), client);
                None
            }
        }
    };
    accept(&listener, &service, false, via).await;
}

/// The user of sockets that are gone. No process has it: it means "unchanged" (setreuid(2)).
#[cfg(target_os = "linux")]
const UNKNOWN_USER: u32 = u32::MAX;

#[cfg(target_os = "linux")]
fn host_users(sockets: DiagSocket, host: NamespaceId) -> HostUsers {
    Box::new(move |connection| match connection.via {
        AcceptedFrom::Namespace(namespace) if namespace == host => {
            let user = sockets.user(connection.client, connection.server);
            Some(user.ok().flatten().unwrap_or(UNKNOWN_USER))
        }
        _ => None,
    })
}

/// Accepts at an address that is the daemon's own on a network of the engine's, until the task is dropped: whoever comes over
/// that network, with an address of it. `own`: the daemon's own network namespace.
#[cfg(target_os = "linux")]
pub async fn accept_on_network(
    listener: tokio::net::TcpListener,
    interfaces: Arc<Interfaces>,
    own: NamespaceId,
    service: Arc<Service>,
) {
    let via = |stream: &TcpStream, client: SocketAddr| {
        let interface = ingress(stream).ok()?;
        let shared = match (stream.local_addr().ok()?.ip(), client.ip()) {
            // From here itself; the kernel takes that from no wire (martian source), and calls the interface the address's.
            (address, client) if address == client => return Some(AcceptedFrom::Namespace(own)),
            (IpAddr::V4(address), IpAddr::V4(client)) => interfaces.share_a_network(interface, address, client),
            _ => return None,
        };
        match shared {
            Ok(true) => Some(AcceptedFrom::Bridge(interface)),
            Ok(false) => {
                // Closed without a byte.
                let client_ip = client.ip();
                let refusal = Refusal::OtherNetwork {
                    client: client_ip,
                    interface,
                };
                service.refusals.note(&refusal, client);
                None
            }
            Err(error) => {
                warn!(%error, "the kernel does not say which network a connection came over; closed");
                None
            }
        }
    };
    accept(&listener, &service, false, via).await;
}

/// Accepts what comes over the link of one network namespace until the task is dropped. `nested`: whether containers inside
/// the container of that namespace count as it.
///
/// The listener is bound to the near end of the link, so that nothing else can reach it.
#[cfg(target_os = "linux")]
pub async fn accept_on_link(
    listener: tokio::net::TcpListener,
    namespace: NamespaceId,
    nested: bool,
    addresses: Vec<IpAddr>,
    service: Arc<Service>,
) {
    let via = |stream: &TcpStream, _| {
        // It listens at every address that the private namespace has.
        let local = stream.local_addr().ok()?.ip().to_canonical();
        addresses.contains(&local).then_some(AcceptedFrom::Namespace(namespace))
    };
    accept(&listener, &service, nested, via).await;
}

#[cfg(target_os = "linux")]
async fn accept(
    listener: &tokio::net::TcpListener,
    service: &Arc<Service>,
    nested: bool,
    via: impl Fn(&TcpStream, SocketAddr) -> Option<AcceptedFrom>,
) {
    let undecided = Arc::new(Semaphore::new(UNDECIDED));
    loop {
        // Nothing closes it.
        let Ok(decision) = undecided.clone().acquire_owned().await else {
            return;
        };
        match listener.accept().await {
            Ok((stream, client)) => {
                if takes_from_the_reserve(&stream, service) {
                    continue;
                }
                let Ok(local) = stream.local_addr() else { continue };
                let Some(via) = via(&stream, client) else { continue };
                // Small answers, each of them awaited: nothing is gained by waiting for more to send.
                let _ = stream.set_nodelay(true);
                let connection = Connection {
                    client: SocketAddr::new(client.ip().to_canonical(), client.port()),
                    // The rules swap the port: the client knows nothing of ours.
                    server: SocketAddr::new(local.ip().to_canonical(), IMDS_PORT),
                    via,
                    nested,
                };
                tokio::spawn(serve_accepted(stream, connection, service.clone(), Some(decision)));
            }
            Err(error) => {
                // Out of descriptors, mostly: they come back when connections end.
                descriptors::note(CONNECTIONS, &error);
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Whether a connection has to be closed, because it has taken a descriptor of the reserve.
#[cfg(target_os = "linux")]
fn takes_from_the_reserve(stream: &TcpStream, service: &Service) -> bool {
    use std::os::fd::AsRawFd as _;

    let reserved = usize::try_from(stream.as_raw_fd()).is_ok_and(|number| service.descriptors.is_reserved(number));
    if reserved {
        descriptors::note_shortage(CONNECTIONS);
        warn!(
            limit = descriptors::limit(),
            "too many open files: a connection of a container was closed; raise the limit (ulimit -Hn, LimitNOFILE=)"
        );
    }
    reserved
}

/// Serves one connection: proof, then requests until one of the two leaves, or the container's life ends.
pub async fn serve<S: HopLimit>(stream: S, connection: Connection, service: Arc<Service>) {
    serve_accepted(stream, connection, service, None).await;
}

/// As [`serve`]. `decision` is dropped when the connection has its place, or its caller is proven.
async fn serve_accepted<S: HopLimit>(
    stream: S,
    connection: Connection,
    service: Arc<Service>,
    decision: Option<OwnedSemaphorePermit>,
) {
    let hops = Arc::new(AtomicU8::new(UNLIMITED));
    let mut stream = HopLimitedStream {
        stream,
        early: BytesMut::new(),
        wanted: hops.clone(),
        set: UNLIMITED,
    };
    let deadline = service.clock.now() + service.hold;
    trace!(client = %connection.client, via = ?connection.via, "accepted");
    let _open = OpenConnection::new(&service);
    let probe = service.probes.remove(&connection.client).is_some();
    // Those who are proven do not wait for those who are not.
    let first = identify_at_once(&service.index, connection);
    let place = match first {
        First::Proven(_) => None,
        First::Refused(_) | First::Undecided => match service.unproven.take(service.sender(connection)) {
            Some(place) => Some(place),
            None => {
                return debug!(client = %connection.client, via = ?connection.via, "closed: its sender has too many unproven connections");
            }
        },
    };
    drop(decision);
    let proof = match first {
        First::Proven(caller) => Ok(caller),
        First::Refused(refusal) => Err(refusal),
        First::Undecided => {
            let proof = identify_later(&service.index, connection, deadline);
            stream.read_during(proof).await
        }
    };
    match proof {
        Ok(caller) => {
            drop(place);
            let life = caller.life().clone();
            let requests = serve_caller(stream, caller, connection, (hops, deadline), &service);
            tokio::select! {
                () = requests => {}
                // An answer in transit is cut, and so is the close: another container may have the address already.
                () = life.handle.ended() => trace!(container = %life.container, "ended with its container"),
            }
        }
        Err(refusal) => {
            if !probe {
                service.refusals.note(&refusal, connection.client);
            }
            let why = match refusal {
                // Closed without an answer: the client tries again, and its next connection is answered.
                Refusal::JustAttached { .. } | Refusal::EarlierSocket { .. } | Refusal::Unacknowledged { .. } => return,
                Refusal::NotSynchronised => Refused::NotReady,
                _ => Refused::Unproven,
            };
            // It keeps its place until then.
            let refuse = http::serve(stream, pending(), |_| async { Ok(Reply::refused(why)) });
            let _ = tokio::time::timeout(service.hold, refuse).await;
            drop(place);
        }
    }
}

/// Answers the requests of an authenticated caller once it has a slot, or 503 if there is none until the deadline.
async fn serve_caller<S: HopLimit>(
    stream: HopLimitedStream<S>,
    caller: Caller,
    connection: Connection,
    (hops, deadline): (Arc<AtomicU8>, Instant),
    service: &Arc<Service>,
) {
    let slot = match caller.life().connections.take(deadline, service.share()).await {
        Ok(slot) => slot,
        Err(full) => {
            service.at_limit.refused.fetch_add(1, Ordering::Relaxed);
            let time = match &full {
                Full::TimedOut(_) => service.hold,
                Full::TooManyWaiting(_) => AT_ONCE,
                Full::TooManyTurnedAway => return,
            };
            let life = caller.life();
            let refuse = http::serve(
                stream,
                pending(),
                |request| async move { service.no_slot(life, &request) },
            );
            let _ = tokio::time::timeout(time, refuse).await;
            // Its place is held until here.
            drop(full);
            return;
        }
    };
    let session = Session {
        service: service.clone(),
        caller,
        connection,
        slot,
        hops,
        first: Mutex::new(Some(deadline)),
        end: service.clock.now() + CONNECTION_LIFE,
        requests: AtomicU32::new(0),
        verified: Mutex::default(),
        peer_verified: Mutex::default(),
    };
    http::serve(stream, session.slot.close_asked(), |request| session.answer(request)).await;
    if session.slot.asked_to_close() {
        service.at_limit.made_room.fetch_add(1, Ordering::Relaxed);
    }
}

/// A connection whose answers can be kept from going far.
pub trait HopLimit: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// What is sent from now on passes at most so many routers.
    ///
    /// # Errors
    /// When the kernel does not do that.
    fn limit_hops(&self, hops: u8) -> io::Result<()>;
}

/// In memory there is no router.
impl HopLimit for tokio::io::DuplexStream {
    fn limit_hops(&self, _hops: u8) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(target_os = "linux")]
impl HopLimit for TcpStream {
    fn limit_hops(&self, hops: u8) -> io::Result<()> {
        let socket = socket2::SockRef::from(self);
        // The listener of a link has an IPv6 socket for both families.
        match self.local_addr()?.ip().to_canonical().is_ipv6() {
            true => socket.set_unicast_hops_v6(hops.into()),
            false => socket.set_ttl_v4(hops.into()),
        }
    }
}

/// As far as IP lets it go.
const UNLIMITED: u8 = u8::MAX;

/// A connection that passes at most so many routers from the moment on when something is written that must not.
///
/// It is never lifted again: what is sent once more because it was lost goes by the limit of that moment, so a token that was
/// held back would go out with the next answer.
struct HopLimitedStream<S> {
    stream: S,
    /// What came before the proof, and is not read yet.
    early: BytesMut,
    wanted: Arc<AtomicU8>,
    set: u8,
}

impl<S: HopLimit> HopLimitedStream<S> {
    fn keep(&mut self) -> io::Result<()> {
        let wanted = self.wanted.load(Ordering::Relaxed);
        if wanted < self.set {
            self.stream.limit_hops(wanted)?;
            self.set = wanted;
        }
        Ok(())
    }

    /// Waits for the proof and reads meanwhile. It may depend on the client's having its bytes acknowledged, and the kernel
    /// acknowledges small segments up to 40 ms late if nobody reads them.
    async fn read_during<T>(&mut self, proof: impl Future<Output = T>) -> T {
        let mut proof = std::pin::pin!(proof);
        let mut more = true;
        loop {
            let read = async {
                self.early.reserve(BYTES_BEFORE_PROOF.saturating_sub(self.early.len()));
                self.stream.read_buf(&mut self.early).await
            };
            tokio::select! {
                biased;
                done = &mut proof => return done,
                // An end or an error is met again by who reads next.
                read = read, if more => more = matches!(read, Ok(1..)) && self.early.len() < BYTES_BEFORE_PROOF,
            }
        }
    }
}

impl<S: HopLimit> AsyncRead for HopLimitedStream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if !self.early.is_empty() {
            let length = self.early.len().min(into.remaining());
            into.put_slice(&self.early[..length]);
            self.early.advance(length);
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl<S: HopLimit> AsyncWrite for HopLimitedStream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.keep()?;
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.keep()?;
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A proven connection.
struct Session {
    service: Arc<Service>,
    caller: Caller,
    connection: Connection,
    slot: Slot,
    /// How many routers what is sent from now on may pass.
    hops: Arc<AtomicU8>,
    /// The deadline of the first request, which counts from the connection.
    first: Mutex<Option<Instant>>,
    /// When the connection ends at the latest.
    end: Instant,
    requests: AtomicU32,
    /// The token that was good last, and the boot time in seconds until which it is: most clients send it again.
    verified: Mutex<Option<(Vec<u8>, u64)>>,
    /// When the client's socket was verified last.
    peer_verified: Mutex<Option<Instant>>,
}

impl Session {
    /// One request, as a straight line.
    async fn answer(&self, request: Parts) -> Result<Reply, Ended> {
        self.slot.busy();
        let (life, clock) = (self.caller.life(), &self.service.clock);
        let asked = clock.now();
        let first = self
            .first
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .take();
        let deadline = first.unwrap_or(asked + self.service.hold);
        if !life.alive() {
            return Err(Ended);
        }
        let reply = self.reply(&request, deadline).await;
        let must_close = self.slot.idle();
        let mut reply = reply?;
        let requests = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if must_close || requests >= REQUESTS_PER_CONNECTION || asked >= self.end {
            reply = reply.last();
        }
        // The container, or its socket, may have gone since the connection was authenticated.
        if !life.alive() {
            return Err(Ended);
        }
        self.verify_peer()?;
        let status = reply.status().as_u16();
        life.last.note(clock.wall_seconds(), status);
        self.service.requests.count(version(&request), status);
        debug!(
            container = %life.container, method = %request.method, path = printable(request.uri.path(), 200), status,
            micros = u64::try_from((clock.now() - asked).as_micros()).unwrap_or(u64::MAX), "answered"
        );
        Ok(reply)
    }

    /// Verifies the client's socket, unless that was done a moment ago.
    fn verify_peer(&self) -> Result<(), Ended> {
        let now = self.service.clock.now();
        let mut verified = self
            .peer_verified
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        if verified.is_some_and(|at| now.duration_since(at) < PEER_VERIFIED) {
            return Ok(());
        }
        if let Err(refusal) = verify_peer(&self.caller, self.connection) {
            self.service.refusals.note(&refusal, self.connection.client);
            return Err(Ended);
        }
        *verified = Some(now);
        Ok(())
    }

    async fn reply(&self, request: &Parts, deadline: Instant) -> Result<Reply, Ended> {
        let life = self.caller.life();
        let mut instance = life.instance.load_full();
        if instance.endpoint_open {
            instance = self.decided(instance, deadline).await;
        }
        if !instance.endpoint || (self.connection.server.is_ipv6() && !instance.ipv6) {
            let hint = "this container has no imds label, or its endpoint is disabled";
            return Ok(Reply::refused(Refused::Disabled)
                .with_hint(&format!("{hint}; ask: imds-router explain {}", life.container)));
        }
        Ok(match parse(request, &self.service.hosts) {
            Err(why) => Reply::refused(why),
            Ok(Call::TokenOptions) => Reply::token_options(),
            Ok(Call::IssueToken(ttl)) => {
                let hops = instance.hop_limit;
                self.hops.fetch_min(hops, Ordering::Relaxed);
                Reply::token(self.service.tokens.issue(&life.container, life.cgroup, ttl), ttl)
            }
            Ok(Call::Get { place, token }) => {
                let ttl = match token {
                    Some(token) => match self.verify(&token) {
                        Some(left) => Some(left),
                        None => return Ok(Reply::refused(Refused::Token)),
                    },
                    None if instance.tokens_required => return Ok(Reply::refused(Refused::Token)),
                    None => None,
                };
                self.value(&place, instance, deadline).await.with_ttl(ttl)
            }
        })
    }

    /// Seconds that a token is good for. The same token as last time is not verified again.
    fn verify(&self, token: &[u8]) -> Option<u32> {
        let now = self.service.clock.boot().as_secs();
        let mut verified = self.verified.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some((last, until)) = &*verified
            && last == token
            && *until > now
        {
            return u32::try_from(until - now).ok();
        }
        let life = self.caller.life();
        let left = self.service.tokens.verify(&life.container, life.cgroup, token)?;
        // Rounded down: the full check has the last word in the last second.
        *verified = Some((token.to_vec(), now + u64::from(left) - 1));
        Some(left)
    }

    async fn value(&self, place: &request::Place, mut instance: Arc<Instance>, deadline: Instant) -> Reply {
        let path = match place {
            request::Place::Versions => {
                return Reply::value(self.service.versions.clone(), instance.last_modified.clone());
            }
            request::Place::Below(path) => path,
            request::Place::Nowhere => return Reply::refused(Refused::NotFound),
        };
        if path.starts_with(IAM) {
            instance = self.decided(instance, deadline).await;
        }
        let modified = instance.last_modified.clone();
        let container = &self.caller.life().container;
        match instance.view.get(path) {
            Some(Node::Dir(text) | Node::Text(text)) => Reply::value(text.clone(), modified),
            Some(Node::UserData(data)) => Reply::bytes(data.clone(), modified),
            Some(Node::Signed(form, document)) => match self.service.signer.sign(*form, document) {
                Some(signature) => Reply::value(signature, modified),
                None => Reply::refused(Refused::NotFound),
            },
            Some(Node::RoleList(role)) => match self.credentials(&instance, deadline).await {
                Ok(_) => Reply::value(role.clone(), modified),
                // Denied: EC2 lists it all the same.
                Err(why) if self.as_ec2(&why) => hinted(Reply::value(role.clone(), modified), &why, container),
                Err(why) => no_role(&said(&why), container),
            },
            Some(Node::Credentials) => match self.credentials(&instance, deadline).await {
                Ok(published) => Reply::value(published.body.0.clone(), modified),
                Err(why) if self.as_ec2(&why) => {
                    let role = path.rsplit('/').next().unwrap_or_default();
                    let document = request::denied_document(role, self.service.clock.wall());
                    hinted(Reply::value(document, modified), &why, container)
                }
                Err(why) => no_role(&said(&why), container),
            },
            None => match &instance.role {
                Role::Refused(why) | Role::Pending(why) if path.starts_with(IAM) => no_role(why, container),
                Role::None if path.starts_with(ROLE_LIST) => no_role("no role", container),
                _ => Reply::refused(Refused::NotFound),
            },
        }
    }

    /// The instance once its role is decided, at most until the deadline.
    async fn decided(&self, mut instance: Arc<Instance>, deadline: Instant) -> Arc<Instance> {
        let mut changes = self.service.index.changes();
        while matches!(instance.role, Role::Pending(_)) {
            if !matches!(tokio::time::timeout_at(deadline, changes.changed()).await, Ok(Ok(()))) {
                break;
            }
            instance = self.caller.life().instance.load_full();
        }
        instance
    }

    async fn credentials(&self, instance: &Instance, deadline: Instant) -> Result<Arc<Published>, NoCredentials> {
        let session = instance.role.session().ok_or(NoCredentials::NotLeased)?;
        self.service.broker.get(session, deadline).await
    }

    /// Whether EC2 has an answer of its own to that, and is to be followed.
    fn as_ec2(&self, why: &NoCredentials) -> bool {
        let denied = matches!(why, NoCredentials::Failed(ProviderError::Denied { .. }));
        denied && self.service.ec2_error_documents
    }
}

/// Requests of proven callers, by version and status: a place for each, so that counting is one addition.
#[derive(Default)]
struct Requests([[AtomicU64; STATUSES.len() + 1]; VERSIONS.len()]);

/// The protocol's versions.
const VERSIONS: [&str; 2] = ["1", "2"];
/// Every status that there is an answer with; what is none of them comes last.
const STATUSES: [u16; 7] = [200, 400, 401, 403, 404, 405, 503];

/// Its place in [`VERSIONS`]: what issues or shows a token is version 2.
fn version(request: &Parts) -> usize {
    usize::from(request.method == hyper::Method::PUT || request.headers.contains_key(TOKEN_HEADER))
}

impl Requests {
    fn count(&self, version: usize, status: u16) {
        let place = STATUSES.iter().position(|it| *it == status).unwrap_or(STATUSES.len());
        self.0[version][place].fetch_add(1, Ordering::Relaxed);
    }
}

/// What happened to connections at the limit of their container, so far.
#[derive(Default)]
struct AtLimit {
    /// Idle ones that closed for a new one.
    made_room: AtomicU64,
    /// New ones that got no slot.
    refused: AtomicU64,
}

/// In a few words, for a header.
fn said(why: &NoCredentials) -> String {
    match why {
        NoCredentials::Failed(error) => error.summary().to_owned(),
        error => error.to_string(),
    }
}

fn hinted(reply: Reply, why: &NoCredentials, container: &ContainerId) -> Reply {
    reply.with_hint(&hint(&said(why), container))
}

fn hint(why: &str, container: &ContainerId) -> String {
    printable(&format!("{why}; ask: imds-router explain {container}"), 160)
}

/// No role, or no credentials of it. 404 is what every SDK takes as "none here"; anything else stops some of them.
fn no_role(why: &str, container: &ContainerId) -> Reply {
    Reply::refused(Refused::NotFound).with_hint(&hint(why, container))
}

/// A connection that was refused, with the evidence that was seen. For the operator.
#[derive(Clone, Debug)]
pub struct RefusedConnection {
    /// When.
    pub at: SystemTime,
    /// Where it came from.
    pub client: SocketAddr,
    /// Why.
    pub refusal: Refusal,
}

/// Counts refusals, keeps the last of them, and says some in the log: the evidence, at most once a second and reason.
struct Refusals {
    clock: Clock,
    seen: dashmap::DashMap<&'static str, (u64, u64)>,
    last: Mutex<VecDeque<RefusedConnection>>,
}

/// Refusals that are kept for `explain`.
const REFUSALS_KEPT: usize = 128;

impl Refusals {
    fn new(clock: &Clock) -> Self {
        Self {
            clock: clock.clone(),
            seen: dashmap::DashMap::new(),
            last: Mutex::default(),
        }
    }

    fn note(&self, refusal: &Refusal, client: SocketAddr) {
        let now = self.clock.boot().as_secs();
        let mut seen = self.seen.entry(refusal.reason()).or_default();
        seen.0 += 1;
        if seen.1 != now {
            seen.1 = now;
            let so_far = seen.0;
            drop(seen);
            info!(reason = refusal.reason(), %client, so_far, "refused: {refusal}");
        }
        let mut last = self.last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if last.len() == REFUSALS_KEPT {
            last.pop_front();
        }
        last.push_back(RefusedConnection {
            at: self.clock.wall(),
            client,
            refusal: refusal.clone(),
        });
    }
}

impl Service {
    /// The answer to a request on a connection that got no slot.
    fn no_slot(&self, life: &ContainerRun, request: &Parts) -> Result<Reply, Ended> {
        if !life.alive() {
            return Err(Ended);
        }
        let reply = Reply::refused(Refused::TooManyConnections);
        let status = reply.status().as_u16();
        life.last.note(self.clock.wall_seconds(), status);
        self.requests.count(version(request), status);
        // Fewer than the limit where descriptors are scarce.
        let why = format!("{} open connections, none of them idle", life.connections.open());
        Ok(reply.with_hint(&hint(&why, &life.container)))
    }

    /// Connections at the limit of their container so far, by outcome: idle ones that `made_room` for a new one, new ones that
    /// were `refused` with 503.
    pub fn at_limit(&self) -> [(&'static str, u64); 2] {
        let AtLimit { made_room, refused } = &self.at_limit;
        [("made_room", made_room), ("refused", refused)]
            .map(|(outcome, count)| (outcome, count.load(Ordering::Relaxed)))
    }

    /// Requests of proven callers so far: version of the protocol, status (0: any other), how many.
    pub fn requests(&self) -> impl Iterator<Item = (&'static str, u16, u64)> + '_ {
        VERSIONS.iter().zip(&self.requests.0).flat_map(|(version, counts)| {
            let statuses = STATUSES.into_iter().chain([0]);
            let counts = statuses.zip(counts);
            counts.map(|(status, count)| (*version, status, count.load(Ordering::Relaxed)))
        })
    }

    /// Refused connections so far, by reason.
    pub fn refusals(&self) -> Vec<(&'static str, u64)> {
        let mut counts: Vec<_> = self
            .refusals
            .seen
            .iter()
            .map(|entry| (*entry.key(), entry.value().0))
            .collect();
        counts.sort_unstable();
        counts
    }

    /// The last refused connections, the newest last.
    pub fn last_refusals(&self) -> Vec<RefusedConnection> {
        let last = self
            .refusals
            .last
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        last.iter().cloned().collect()
    }
}

#[cfg(target_os = "linux")]
#[cfg(test)]
mod tests {
    use super::*;

    /// Callers that close at once would otherwise be told from no one, and have all places of the host.
    #[test]
    fn closed_sockets_of_the_host_belong_to_one_unknown_user() {
        let host = NamespaceId(1);
        let user = host_users(DiagSocket::open().unwrap(), host);
        let connection = |via| Connection {
            client: "127.0.0.1:1".parse().unwrap(),
            server: "127.0.0.1:2".parse().unwrap(),
            via,
            nested: false,
        };
        assert_eq!(user(connection(AcceptedFrom::Namespace(host))), Some(UNKNOWN_USER));
        assert_eq!(user(connection(AcceptedFrom::Namespace(NamespaceId(2)))), None);
    }
}
