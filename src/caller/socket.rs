//! Who owns the other end of a connection: netlink `sock_diag`, asked in the caller's own network namespace.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use netlink_bindings::rt_link;
use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla as _};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use netlink_socket2::NetlinkSocket;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use super::OwnEnds;
use crate::containers::{CgroupId, Counters, LinkSeen, SocketEvidence};

/// `INET_DIAG_CGROUP_ID` (linux/inet_diag.h, since 5.8): the id of the socket's cgroup, 8 bytes, native order.
const INET_DIAG_CGROUP_ID: u16 = 21;

/// The kernel answers within the system call that asks; anything slower means that it will not.
const ANSWER: Duration = Duration::from_millis(100);

/// A `NETLINK_SOCK_DIAG` socket in one network namespace, and beside it one that knows the interfaces there. Both stay in
/// the namespace that they were opened in, whoever uses them.
pub struct DiagSocket {
    /// One question at a time: an answer carries no more than a sequence number.
    diag: Mutex<(OwnedFd, u32)>,
    links: Mutex<NetlinkSocket>,
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
        let mut links = NetlinkSocket::new();
        // The first question opens the socket, which has to be here and now.
        each_interface(&mut links, |_, _| ())?;
        Ok(Self {
            diag: Mutex::new((diag, 0)),
            links: Mutex::new(links),
        })
    }

    /// The socket whose connection is exactly `client` → `server`, addresses as the client sees them.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn find(&self, client: SocketAddr, server: SocketAddr) -> io::Result<Option<SocketEvidence>> {
        // 0 finds every socket that is bound to no device; nearly all are.
        if let Some(found) = self.ask(client, server, 0)? {
            return Ok(Some(found));
        }
        let mut numbers = Vec::new();
        self.each_interface(|number, _| numbers.push(number))?;
        for link in numbers {
            if let Some(found) = self.ask(client, server, link)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// The links that have another end elsewhere.
    ///
    /// # Errors
    /// When the kernel cannot be asked.
    pub fn links(&self) -> io::Result<Vec<LinkSeen>> {
        let mut links = Vec::new();
        self.each_interface(|_, link| {
            let mac = link.get_address().ok().and_then(|it| it.try_into().ok());
            if let (Some(mac), Ok(peer)) = (mac, link.get_link()) {
                links.push(LinkSeen { mac, peer });
            }
        })?;
        Ok(links)
    }

    fn each_interface(&self, each: impl FnMut(u32, &rt_link::IterableLinkAttrs<'_>)) -> io::Result<()> {
        each_interface(&mut self.links.lock().unwrap_or_else(PoisonError::into_inner), each)
    }

    fn ask(&self, client: SocketAddr, server: SocketAddr, interface: u32) -> io::Result<Option<SocketEvidence>> {
        let mut guard = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
        let (socket, sequence) = &mut *guard;
        *sequence = sequence.wrapping_add(1);
        rustix::net::send(
            &*socket,
            &request(client, server, interface, *sequence),
            SendFlags::empty(),
        )?;
        let mut buffer = [0; 4096];
        loop {
            let (length, _) = rustix::net::recv(&*socket, &mut buffer[..], RecvFlags::empty())?;
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(&buffer[..length])
                .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
            // The answer to a question that was given up.
            if message.header.sequence_number != *sequence {
                continue;
            }
            return answer(message.payload, client, server);
        }
    }
}

fn request(client: SocketAddr, server: SocketAddr, interface: u32, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    // Without NLM_F_DUMP: the one exact socket, found by its hash.
    header.flags = NLM_F_REQUEST;
    header.sequence_number = sequence;
    let request = InetRequest {
        family: if client.is_ipv4() { AF_INET } else { AF_INET6 },
        protocol: IPPROTO_TCP,
        extensions: ExtensionFlags::INFO,
        // The kernel ignores it in an exact look-up: the answer's state is what counts.
        states: StateFlags::all(),
        socket_id: SocketId {
            source_port: client.port(),
            destination_port: server.port(),
            source_address: client.ip(),
            destination_address: server.ip(),
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

fn answer(
    payload: NetlinkPayload<SockDiagMessage>,
    client: SocketAddr,
    server: SocketAddr,
) -> io::Result<Option<SocketEvidence>> {
    match payload {
        NetlinkPayload::InnerMessage(SockDiagMessage::InetResponse(response)) => {
            let id = &response.header.socket_id;
            // An exact look-up falls back to a listener of the port: that is not this connection.
            let exact = id.source_port == client.port()
                && id.destination_port == server.port()
                && canonical(id.source_address) == client.ip()
                && canonical(id.destination_address) == server.ip();
            let cgroup = response.nlas.iter().find_map(|nla| match nla {
                Nla::Other(other) if other.kind() == INET_DIAG_CGROUP_ID => cgroup_id(other),
                _ => None,
            });
            let info = response.nlas.iter().find_map(|nla| match nla {
                Nla::TcpInfo(info) => counters(info),
                _ => None,
            });
            match (cgroup, info) {
                (Some(cgroup), Some(counters)) if exact => Ok(Some(SocketEvidence {
                    state: response.header.state,
                    cgroup,
                    counters,
                })),
                (_, None) if exact => Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    "the kernel does not count a connection's bytes: Linux 4.19 or newer is needed",
                )),
                _ => Ok(None),
            }
        }
        NetlinkPayload::Error(error) => match error.to_io().raw_os_error() {
            Some(code) if code == rustix::io::Errno::NOENT.raw_os_error() => Ok(None),
            _ => Err(error.to_io()),
        },
        _ => Ok(None),
    }
}

/// Reads `struct tcp_info` (linux/tcp.h): fields were only ever added at its end.
fn counters(info: &[u8]) -> Option<Counters> {
    const BYTES_ACKED: usize = 120;
    const BYTES_RECEIVED: usize = 128;
    const BYTES_SENT: usize = 200;
    const BYTES_RETRANS: usize = 208;
    let field = |at: usize| Some(u64::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    Some(Counters {
        sent: field(BYTES_SENT)?.saturating_sub(field(BYTES_RETRANS)?),
        received: field(BYTES_RECEIVED)?,
        acked: field(BYTES_ACKED)?,
    })
}

impl OwnEnds for DiagSocket {
    fn counters(&self, own: SocketAddr, client: SocketAddr) -> io::Result<Option<Counters>> {
        Ok(self.ask(own, client, 0)?.map(|socket| socket.counters))
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

/// The interfaces in the namespace that `links` was opened in. A container makes as many as it likes: enough are enough.
fn each_interface(
    links: &mut NetlinkSocket,
    mut each: impl FnMut(u32, &rt_link::IterableLinkAttrs<'_>),
) -> io::Result<()> {
    const MOST: usize = 32;
    let request = rt_link::Request::new().op_getlink_dump(&rt_link::Ifinfomsg::new());
    let mut reply = links.request(&request)?;
    let mut seen = 0;
    while let Some(answer) = reply.recv() {
        let (head, link) = answer.map_err(|error| io::Error::other(error.to_string()))?;
        seen += 1;
        if let (true, Ok(number)) = (seen <= MOST, u32::try_from(head.ifi_index)) {
            each(number, &link);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_kernel_knows_an_established_connection_and_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let diag = DiagSocket::open().unwrap();
        let found = diag.find(from, to).unwrap().expect("the connection is there");
        assert_eq!(found.state, 1);
        assert_ne!(found.cgroup.0, 0);
        // Both ends count the same, but for the SYN of who connected.
        let (mut accepted, mut client) = (listener.accept().unwrap().0, client);
        std::io::Write::write_all(&mut client, b"12345").unwrap();
        std::io::Read::read_exact(&mut accepted, &mut [0; 5]).unwrap();
        std::io::Write::write_all(&mut accepted, b"123").unwrap();
        std::io::Read::read_exact(&mut client, &mut [0; 3]).unwrap();
        let theirs = diag.find(from, to).unwrap().unwrap().counters;
        let ours = diag.counters(to, from).unwrap().unwrap();
        assert_eq!((theirs.sent, theirs.received), (5, 3));
        assert_eq!((ours.sent, ours.received), (3, 5));
        assert!(theirs.acked <= 6 && ours.acked <= 3);
        assert_eq!(diag.find(SocketAddr::new(from.ip(), 1), to).unwrap(), None);
        // A listener is not a connection to it.
        assert_eq!(diag.find(to, SocketAddr::new(to.ip(), 9)).unwrap(), None);
    }
}
