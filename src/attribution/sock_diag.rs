//! Which socket is the other end of a connection: netlink `sock_diag` in the caller's own network namespace.
//!
//! Every query of a connection is an exact look-up by hash, a few microseconds. A dump walks the tables of the whole machine:
//! there is one at the start.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla as _};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::containers::{CgroupId, Open, SocketEvidence};

/// `INET_DIAG_CGROUP_ID` (linux/inet_diag.h, since 5.8): the id of the socket's cgroup, 8 bytes, native order.
const INET_DIAG_CGROUP_ID: u16 = 21;

/// include/net/tcp_states.h: TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_LISTEN.
const ESTABLISHED: u8 = 1;
const FIN_WAIT1: u8 = 4;
const FIN_WAIT2: u8 = 5;
const LISTEN: u8 = 10;

/// The kernel answers within the system call that asks; anything slower means that it will not.
const ANSWER: Duration = Duration::from_millis(100);

/// The loopback's index: the first interface of every network namespace (`LOOPBACK_IFINDEX`, net/flow.h).
const LOOPBACK: u32 = 1;

/// A `NETLINK_SOCK_DIAG` socket in one network namespace. It stays in the namespace that it was opened in, whichever thread
/// uses it.
pub struct DiagSocket {
    /// One question at a time: an answer carries no more than a sequence number.
    diag: Mutex<(OwnedFd, u32)>,
}

impl DiagSocket {
    /// Opens one in the network namespace of the calling thread.
    ///
    /// # Errors
    /// When the kernel has no `inet_diag`, or no descriptor is left.
    pub fn open() -> io::Result<Self> {
        let diag = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            Some(netlink::SOCK_DIAG),
        )?;
        rustix::net::sockopt::set_socket_timeout(&diag, rustix::net::sockopt::Timeout::Recv, Some(ANSWER))?;
        Ok(Self {
            diag: Mutex::new((diag, 0)),
        })
    }

    /// The socket whose connection is exactly `client` → `server`, addresses as the client sees them. `link` is the name of
    /// the link that leads to the service.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn find(&self, client: SocketAddr, server: SocketAddr, link: &str) -> io::Result<Option<SocketEvidence>> {
        let Some(found) = self.exact((client, server), link, Asked::Counters)? else {
            return Ok(None);
        };
        Ok(Some(SocketEvidence {
            state: found.state,
            cgroup: found.cgroup,
            cookie: found.cookie,
            open: found.open,
            listener: self.listens(client, found.interface)?,
        }))
    }

    /// State and cookie of that socket.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn find_now(&self, client: SocketAddr, server: SocketAddr, link: &str) -> io::Result<Option<(u8, u64)>> {
        let found = self.exact((client, server), link, Asked::State)?;
        Ok(found.map(|found| (found.state, found.cookie)))
    }

    fn exact(
        &self,
        (client, server): (SocketAddr, SocketAddr),
        link: &str,
        asked: Asked,
    ) -> io::Result<Option<FoundSocket>> {
        // An exact look-up falls back to a listener of the port: that is not this connection.
        let at = |interface| {
            let found = self.ask(client, server, interface, asked)?;
            Ok::<_, io::Error>(found.filter(|found| found.local == client && found.remote == server))
        };
        // Interface 0 finds a socket that is bound to no device, as nearly all are. The others are bound to the link that
        // the connection came over, or to the loopback.
        if let Some(found) = at(0)? {
            return Ok(Some(found));
        }
        let index = {
            let guard = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
            name_to_index(&guard.0, link)
        };
        for interface in index.ok().into_iter().chain([LOOPBACK]) {
            if let Some(found) = at(interface)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The user whose process made that socket. `None`: there is no such socket.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn user(&self, client: SocketAddr, server: SocketAddr) -> io::Result<Option<u32>> {
        let found = self.exact((client, server), "lo", Asked::State)?;
        Ok(found.map(|found| found.user))
    }

    /// The cookies of all sockets that are connected, or are about to be, to one of `servers`. Blocks.
    ///
    /// # Errors
    /// When the kernel does not answer.
    pub fn connected_to(&self, servers: &[SocketAddr]) -> io::Result<Vec<u64>> {
        let mut cookies = Vec::new();
        for server in servers {
            // Of an IPv4 server the client's socket may be of either family.
            for any in [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()] {
                let (local, remote) = (SocketAddr::new(any, 0), SocketAddr::new(any, server.port()));
                self.dump(local, remote, |found| {
                    if found.remote == *server {
                        cookies.push(found.cookie);
                    }
                })?;
            }
        }
        Ok(cookies)
    }

    /// All sockets of these ports, 0 for any, whatever their addresses.
    fn dump(&self, local: SocketAddr, remote: SocketAddr, mut each: impl FnMut(FoundSocket)) -> io::Result<()> {
        let mut guard = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, sequence) = &mut *guard;
        *sequence = sequence.wrapping_add(1);
        let request = request((local, remote), 0, Asked::State, *sequence, NLM_F_DUMP);
        rustix::net::send(&*socket, &request, SendFlags::empty())?;
        let mut buffer = [0; 32 * 1024];
        loop {
            let (length, _) = rustix::net::recv(&*socket, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..length];
            while !rest.is_empty() {
                let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                // Messages start at multiples of four bytes (NLMSG_ALIGN, linux/netlink.h).
                let size = usize::try_from(message.header.length).map_err(io::Error::other)?;
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
                if message.header.sequence_number != *sequence {
                    continue;
                }
                if matches!(message.payload, NetlinkPayload::Done(_)) {
                    return Ok(());
                }
                if let Some(found) = answer(message.payload)? {
                    each(found);
                }
            }
        }
    }

    /// Whether a socket listens at `local`, at its own or any address.
    ///
    /// No connection has the remote port 0, so the look-up can only find a listener. It also finds IPv6 sockets that accept
    /// IPv4. An accepted socket is bound to the interface of its listener: a look-up at that interface finds the listeners
    /// that are bound to it, and those that are bound to none.
    fn listens(&self, local: SocketAddr, interface: u32) -> io::Result<bool> {
        let any: IpAddr = match local {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let found = self.ask(local, SocketAddr::new(any, 0), interface, Asked::State)?;
        Ok(found.is_some_and(|found| found.state == LISTEN))
    }

    fn ask(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
        interface: u32,
        asked: Asked,
    ) -> io::Result<Option<FoundSocket>> {
        let mut guard = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, sequence) = &mut *guard;
        *sequence = sequence.wrapping_add(1);
        rustix::net::send(
            &*socket,
            &request((local, remote), interface, asked, *sequence, 0),
            SendFlags::empty(),
        )?;
        let mut buffer = [0; 4096];
        loop {
            let (length, _) = rustix::net::recv(&*socket, &mut buffer[..], RecvFlags::empty())?;
            // The other answers are those to queries that have timed out.
            if let Some(found) = read_answer(&buffer[..length], *sequence)? {
                return Ok(found);
            }
        }
    }
}

/// Reads the answer of the kernel to the query with this sequence number. `None`: it answers another query. `Some(None)`: no
/// socket was found.
///
/// # Errors
/// The error that the kernel has returned, or `InvalidData` for bytes that are not an answer of `inet_diag`.
pub fn read_answer(bytes: &[u8], sequence: u32) -> io::Result<Option<Option<FoundSocket>>> {
    let message = NetlinkMessage::<SockDiagMessage>::deserialize(bytes)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
    match message.header.sequence_number == sequence {
        true => answer(message.payload).map(Some),
        false => Ok(None),
    }
}

/// How much the kernel has to tell about a socket.
#[derive(Clone, Copy)]
enum Asked {
    State,
    /// Its `struct tcp_info`, too.
    Counters,
}

/// A socket that the kernel has found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FoundSocket {
    /// Its own end.
    pub local: SocketAddr,
    /// The other end; port 0: a listener.
    pub remote: SocketAddr,
    /// TCP state as in `include/net/tcp_states.h`.
    pub state: u8,
    /// The interface that it is bound to (`SO_BINDTODEVICE`), or 0.
    pub interface: u32,
    /// `SO_COOKIE`
    pub cookie: u64,
    /// The user whose process made it.
    pub user: u32,
    /// 0, which no cgroup has, where the kernel keeps no socket: in `TCP_TIME_WAIT`.
    pub cgroup: CgroupId,
    /// Which end opened its connection.
    pub open: Open,
}

fn request(
    (local, remote): (SocketAddr, SocketAddr),
    interface: u32,
    asked: Asked,
    sequence: u32,
    flags: u16,
) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    // Without NLM_F_DUMP: the one exact socket, found by its hash.
    header.flags = NLM_F_REQUEST | flags;
    header.sequence_number = sequence;
    let request = InetRequest {
        family: if local.is_ipv4() { AF_INET } else { AF_INET6 },
        protocol: IPPROTO_TCP,
        extensions: match asked {
            Asked::State => ExtensionFlags::empty(),
            Asked::Counters => ExtensionFlags::INFO,
        },
        // The kernel ignores it in an exact look-up: the answer's state is what counts.
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: local.port(),
            destination_port: remote.port(),
            source_address: local.ip(),
            destination_address: remote.ip(),
            interface_id: interface,
            // INET_DIAG_NOCOOKIE: whichever socket it is.
            cookie: [0xff; 8],
        },
    };
    let mut message = NetlinkMessage::new(header, SockDiagMessage::InetRequest(request).into());
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    bytes
}

fn answer(payload: NetlinkPayload<SockDiagMessage>) -> io::Result<Option<FoundSocket>> {
    match payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
            let id = &response.header.socket_id;
            let state = response.header.state;
            let cgroup = response.nlas.iter().find_map(|nla| match nla {
                Nla::Other(other) if other.kind() == INET_DIAG_CGROUP_ID => cgroup_id(other),
                _ => None,
            });
            let open = response.nlas.iter().find_map(|nla| match nla {
                Nla::TcpInfo(info) => open(state, info),
                _ => None,
            });
            Ok(Some(FoundSocket {
                local: SocketAddr::new(canonical(id.source_address), id.source_port),
                remote: SocketAddr::new(canonical(id.destination_address), id.destination_port),
                state,
                interface: id.interface_id,
                cookie: u64::from_ne_bytes(id.cookie),
                user: response.header.uid,
                cgroup: cgroup.unwrap_or(CgroupId(0)),
                open: open.unwrap_or(Open::Undecided),
            }))
        }
        NetlinkPayload::Error(error) => match error.to_io().raw_os_error() {
            Some(code) if code == rustix::io::Errno::NOENT.raw_os_error() => Ok(None),
            _ => Err(error.to_io()),
        },
        _ => Ok(None),
    }
}

/// Which end opened the connection of a socket, by its counters in `struct tcp_info` (linux/tcp.h; fields are only ever added at
/// its end).
///
/// `tcpi_bytes_acked` counts the sequence numbers that the other end has acknowledged since the socket was created. A socket that
/// connects is created before its SYN, which takes a sequence number. A socket that is accepted is created when its SYN-ACK
/// has been acknowledged, so that number is not counted. When all that was sent is acknowledged, the first one has counted
/// one more than the bytes that it has sent, whatever those are. A FIN takes a sequence number, too.
fn open(state: u8, info: &[u8]) -> Option<Open> {
    const UNACKED: usize = 24;
    const BYTES_ACKED: usize = 120;
    const BYTES_SENT: usize = 200;
    const BYTES_RETRANS: usize = 208;
    let field = |at: usize| Some(u64::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    let unacked = u32::from_ne_bytes(*info.get(UNACKED..)?.first_chunk()?);
    let sent = field(BYTES_SENT)?.checked_sub(field(BYTES_RETRANS)?)?;
    let beyond_bytes = field(BYTES_ACKED)?.checked_sub(sent)?;
    match (state, unacked, beyond_bytes) {
        (ESTABLISHED, 0, 0) | (FIN_WAIT2, 0, 1) => Some(Open::Passive),
        // In FIN_WAIT1 the FIN must still be in flight: it may have been acknowledged after the state was read.
        (ESTABLISHED, 0, 1) | (FIN_WAIT1, 1.., 1) | (FIN_WAIT2, 0, 2) => Some(Open::Active),
        _ => None,
    }
}

fn cgroup_id(nla: &netlink_packet_core::DefaultNla) -> Option<CgroupId> {
    let mut value = [0; 8];
    (nla.value_len() == value.len()).then(|| {
        nla.emit_value(&mut value);
        CgroupId(u64::from_ne_bytes(value))
    })
}

/// An IPv4 address may come back as an IPv4-mapped one: the client has an IPv6 socket.
fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::{Shutdown, TcpListener, TcpStream};

    /// A connection over the loopback: the listener, the end that connects, and the accepted one.
    fn connection(listen: &str, connect: &str) -> (TcpListener, TcpStream, TcpStream) {
        let listener = TcpListener::bind(listen).unwrap();
        let port = listener.local_addr().unwrap().port();
        let client = TcpStream::connect((connect, port)).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        (listener, client, accepted)
    }

    fn canonical_address(address: SocketAddr) -> SocketAddr {
        SocketAddr::new(canonical(address.ip()), address.port())
    }

    /// What the kernel says of one end of a connection. Its last bytes may not be acknowledged yet.
    fn evidence_of(end: &TcpStream) -> Option<SocketEvidence> {
        let (local, remote) = (end.local_addr().unwrap(), end.peer_addr().unwrap());
        let (local, remote) = (canonical_address(local), canonical_address(remote));
        let diag = DiagSocket::open().unwrap();
        for _ in 0..200 {
            let found = diag.find(local, remote, "lo").unwrap();
            if found.is_none_or(|found| found.open != Open::Undecided) {
                return found;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("undecided")
    }

    #[test]
    fn finds_only_the_exact_connection() {
        let (_listener, client, _accepted) = connection("127.0.0.1:0", "127.0.0.1");
        let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let diag = DiagSocket::open().unwrap();
        let found = diag.find(from, to, "lo").unwrap().expect("the connection exists");
        assert_eq!(found.state, ESTABLISHED);
        assert_ne!(found.cgroup.0, 0);
        assert_eq!(diag.find(from, to, "lo").unwrap().unwrap().cookie, found.cookie);
        assert_eq!(diag.find(SocketAddr::new(from.ip(), 1), to, "lo").unwrap(), None);
        // A listener is not a connection to it.
        assert_eq!(diag.find(to, SocketAddr::new(to.ip(), 9), "lo").unwrap(), None);
    }

    #[test]
    fn finds_a_listener_at_the_local_port() {
        for (listen, connect) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("0.0.0.0:0", "127.0.0.1"),
            // An IPv6 socket that accepts IPv4.
            ("[::]:0", "127.0.0.1"),
            ("[::]:0", "::1"),
            ("[::1]:0", "::1"),
        ] {
            let (listener, client, accepted) = connection(listen, connect);
            let listens = |end| evidence_of(end).expect("it exists").listener;
            assert!(listens(&accepted), "{listen}");
            assert!(!listens(&client), "{listen}");
            let diag = DiagSocket::open().unwrap();
            let local = canonical_address(accepted.local_addr().unwrap());
            assert!(
                diag.listens(local, LOOPBACK).unwrap(),
                "bound to no interface: {listen}"
            );
            drop(listener);
            assert!(!listens(&accepted), "{listen}");
        }
    }

    #[test]
    fn tells_an_active_open_from_a_passive_one() {
        let check = |client: &TcpStream, accepted: &TcpStream, when: &str| {
            let open = |end| evidence_of(end).expect("it exists").open;
            assert_eq!((open(client), open(accepted)), (Open::Active, Open::Passive), "{when}");
        };
        for (listen, connect) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("[::]:0", "127.0.0.1"),
            ("[::1]:0", "::1"),
        ] {
            let (listener, mut client, mut accepted) = connection(listen, connect);
            check(&client, &accepted, "connected");
            drop(listener);
            check(&client, &accepted, "after the listener has gone");
            for bytes in [1, 78, 4096] {
                accepted.write_all(&vec![0; bytes]).unwrap();
                client.read_exact(&mut vec![0; bytes]).unwrap();
                check(&client, &accepted, "after a greeting");
            }
            client.write_all(&[0; 100]).unwrap();
            accepted.read_exact(&mut [0; 100]).unwrap();
            check(&client, &accepted, "after a request");
        }
    }

    #[test]
    fn tells_an_active_open_from_a_passive_one_after_a_half_close() {
        let (_listener, client, accepted) = connection("127.0.0.1:0", "127.0.0.1");
        client.shutdown(Shutdown::Write).unwrap();
        let found = evidence_of(&client).unwrap();
        assert!([FIN_WAIT1, FIN_WAIT2].contains(&found.state), "{found:?}");
        assert_eq!(found.open, Open::Active);
        drop((client, accepted));
        let (_listener, client, accepted) = connection("127.0.0.1:0", "127.0.0.1");
        accepted.shutdown(Shutdown::Write).unwrap();
        let found = evidence_of(&accepted).unwrap();
        assert_eq!((found.state, found.open), (FIN_WAIT2, Open::Passive));
        drop(client);
    }

    #[test]
    fn finds_a_listener_that_is_bound_to_an_interface() {
        let listener = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        listener.bind_device(Some(b"lo")).unwrap();
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        listener.bind(&any.into()).unwrap();
        listener.listen(8).unwrap();
        let listener = TcpListener::from(listener);
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        let found = evidence_of(&accepted).expect("it is bound to the loopback, too");
        assert_eq!((found.open, found.listener), (Open::Passive, true));
    }

    #[test]
    fn lists_the_sockets_that_are_connected_to_an_address() {
        let diag = DiagSocket::open().unwrap();
        for (listen, connect) in [
            ("127.0.0.1:0", "127.0.0.1"),
            ("[::]:0", "127.0.0.1"),
            ("[::1]:0", "::1"),
        ] {
            let (_listener, client, _accepted) = connection(listen, connect);
            let server = client.peer_addr().unwrap();
            let cookie = evidence_of(&client).unwrap().cookie;
            let elsewhere = SocketAddr::new("192.0.2.1".parse().unwrap(), server.port());
            assert_eq!(diag.connected_to(&[server, elsewhere]).unwrap(), [cookie], "{listen}");
            assert_eq!(diag.connected_to(&[elsewhere]).unwrap(), [0; 0]);
        }
    }

    #[test]
    fn a_connection_in_time_wait_has_that_state_and_no_cgroup() {
        const TIME_WAIT: u8 = 6;
        let (_listener, client, accepted) = connection("127.0.0.1:0", "127.0.0.1");
        let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        drop(client);
        drop(accepted);
        let found = DiagSocket::open().unwrap().find(from, to, "lo").unwrap().unwrap();
        assert_eq!(
            (found.state, found.cgroup, found.open),
            (TIME_WAIT, CgroupId(0), Open::Undecided)
        );
    }
}
