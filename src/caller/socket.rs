//! Who owns the other end of a connection: netlink `sock_diag`, asked in the caller's own network namespace.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use netlink_packet_core::{NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, Nla as _};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::constants::{AF_INET, AF_INET6, IPPROTO_TCP};
use netlink_packet_sock_diag::inet::nlas::Nla;
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, SocketId, StateFlags};
use rustix::net::netdevice::name_to_index;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::containers::{CgroupId, SocketEvidence};

/// `INET_DIAG_CGROUP_ID` (linux/inet_diag.h, since 5.8): the id of the socket's cgroup, 8 bytes, native order.
const INET_DIAG_CGROUP_ID: u16 = 21;

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
        // Interface 0 finds a socket that is bound to no device, as nearly all are. The others are bound to the link that
        // the connection came over, or to the loopback.
        if let Some(found) = self.ask(client, server, 0)? {
            return Ok(Some(found));
        }
        let index = {
            let guard = self.diag.lock().unwrap_or_else(PoisonError::into_inner);
            name_to_index(&guard.0, link)
        };
        for interface in index.ok().into_iter().chain([LOOPBACK]) {
            if let Some(found) = self.ask(client, server, interface)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
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
        extensions: ExtensionFlags::empty(),
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
            Ok(cgroup.filter(|_| exact).map(|cgroup| SocketEvidence {
                state: response.header.state,
                cgroup,
            }))
        }
        NetlinkPayload::Error(error) => match error.to_io().raw_os_error() {
            Some(code) if code == rustix::io::Errno::NOENT.raw_os_error() => Ok(None),
            _ => Err(error.to_io()),
        },
        _ => Ok(None),
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
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn the_kernel_knows_an_established_connection_and_no_other() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (from, to) = (client.local_addr().unwrap(), client.peer_addr().unwrap());
        let diag = DiagSocket::open().unwrap();
        let found = diag.find(from, to, "lo").unwrap().expect("the connection is there");
        assert_eq!(found.state, 1);
        assert_ne!(found.cgroup.0, 0);
        assert_eq!(diag.find(SocketAddr::new(from.ip(), 1), to, "lo").unwrap(), None);
        // A listener is not a connection to it.
        assert_eq!(diag.find(to, SocketAddr::new(to.ip(), 9), "lo").unwrap(), None);
    }
}
