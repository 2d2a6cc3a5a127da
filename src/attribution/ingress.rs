//! What an accepted socket itself tells: the interface that its first packet came in on.
//!
//! The address is on this host, so whoever can send it a packet reaches it: a neighbour in the LAN, too (weak host model).
//! Containers come in over a bridge, this host over its own interfaces; nobody else is let in.
//!
//! The only file with `unsafe` beside one line of `main.rs`: no crate reads `IP_PKTOPTIONS`.

use std::ffi::c_int;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::{Mutex, PoisonError};

use dashmap::DashMap;
use netlink_bindings::{rt_addr, rt_link};
use netlink_socket2::NetlinkSocket;
use rt_addr::Ifaddrmsg;
use rustix::net::AddressFamily;

/// How an address family is told to remember a connection's first packet, and asked for it (ip(7), ipv6(7)).
struct PacketOptions {
    level: c_int,
    remember: c_int,
    ask: c_int,
    /// Type of the control message that answers.
    answer: c_int,
}

/// linux/in.h: IP_PKTINFO, IP_PKTOPTIONS.
const IPV4: PacketOptions = PacketOptions {
    level: libc::IPPROTO_IP,
    remember: 8,
    ask: 9,
    answer: 8,
};
/// linux/in6.h: IPV6_RECVPKTINFO, IPV6_2292PKTOPTIONS, IPV6_PKTINFO.
const IPV6: PacketOptions = PacketOptions {
    level: libc::IPPROTO_IPV6,
    remember: 49,
    ask: 6,
    answer: 50,
};

fn is_ipv6(socket: impl AsFd) -> io::Result<bool> {
    Ok(rustix::net::sockopt::socket_domain(socket)? == AddressFamily::INET6)
}

/// Has the sockets that `listener` accepts remember where they came in.
///
/// # Errors
/// As setsockopt(2) says.
#[allow(unsafe_code, reason = "no crate sets IP_PKTINFO on a TCP socket")]
pub fn remember_ingress(listener: impl AsFd) -> io::Result<()> {
    let options = if is_ipv6(&listener)? { &IPV6 } else { &IPV4 };
    let on: c_int = 1;
    // SAFETY: the descriptor is open for the whole call; the option is an int, and so is what the pointer leads to.
    let set = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            options.level,
            options.remember,
            (&raw const on).cast(),
            size_of::<c_int>() as libc::socklen_t,
        )
    };
    if set == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// A control message with a packet's information, as the kernel writes it (cmsg(3)): `in_pktinfo` or `in6_pktinfo`.
#[repr(C)]
#[derive(Clone, Copy)]
struct PacketInfo<T> {
    header: libc::cmsghdr,
    info: T,
}

/// The interface that the connection came in on.
///
/// # Errors
/// When the kernel does not say: then nobody is let in.
pub fn ingress(accepted: impl AsFd) -> io::Result<u32> {
    if is_ipv6(&accepted)? {
        return packet_info::<libc::in6_pktinfo>(&accepted, &IPV6).map(|info| info.ipi6_ifindex);
    }
    let info = packet_info::<libc::in_pktinfo>(&accepted, &IPV4)?;
    u32::try_from(info.ipi_ifindex).map_err(io::Error::other)
}

/// `T` must be the plain structure that the kernel writes for `options`.
#[allow(unsafe_code, reason = "no crate reads IP_PKTOPTIONS")]
fn packet_info<T: Copy>(accepted: impl AsFd, options: &PacketOptions) -> io::Result<T> {
    let mut message = MaybeUninit::<PacketInfo<T>>::zeroed();
    let mut length = size_of::<PacketInfo<T>>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the whole call; the kernel writes at most `length` bytes, which is the size of
    // what the pointer leads to.
    let got = unsafe {
        libc::getsockopt(
            accepted.as_fd().as_raw_fd(),
            options.level,
            options.ask,
            message.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    if got != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the memory was zeroed, and both structures are plain numbers: any bytes are a value.
    let message = unsafe { message.assume_init() };
    let needed = std::mem::offset_of!(PacketInfo<T>, info) + size_of::<T>();
    let whole = usize::try_from(length).is_ok_and(|length| length >= needed);
    if !whole || message.header.cmsg_level != options.level || message.header.cmsg_type != options.answer {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the kernel does not say where the connection came in",
        ));
    }
    Ok(message.info)
}

/// What an interface is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Interface {
    /// The loopback, or our own link: this host.
    Own,
    /// A bridge: containers.
    Bridge,
    /// Anything else: the LAN, a VPN …
    Foreign,
}

/// What the interfaces of this host are, by number. The kernel counts numbers up, so that one that was seen once stays
/// what it was.
pub struct Interfaces {
    rtnetlink: Mutex<NetlinkSocket>,
    known: DashMap<u32, Interface>,
    /// The name of our own link.
    own: &'static str,
}

impl Interfaces {
    /// Of the calling thread's network namespace; `own` is the link that carries our address.
    pub fn new(own: &'static str) -> Self {
        Self {
            rtnetlink: Mutex::new(NetlinkSocket::new()),
            known: DashMap::new(),
            own,
        }
    }

    /// The kind of the interface with this number. One that the kernel does not know is foreign.
    ///
    /// # Errors
    /// When the kernel cannot be asked, for example because no descriptor is left. The next connection asks again.
    pub fn kind(&self, number: u32) -> io::Result<Interface> {
        if let Some(known) = self.known.get(&number) {
            return Ok(*known);
        }
        let kind = match self.ask(number) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Interface::Foreign,
            asked => asked?,
        };
        self.known.insert(number, kind);
        Ok(kind)
    }

    /// Whether `client` is in the network in which the interface of this number has the address `own`. Asked anew each time:
    /// networks come and go.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn share_a_network(&self, number: u32, own: Ipv4Addr, client: Ipv4Addr) -> io::Result<bool> {
        let all = Ifaddrmsg {
            ifa_family: u8::try_from(libc::AF_INET).map_err(io::Error::other)?,
            ..Ifaddrmsg::new()
        };
        let request = rt_addr::Request::new().op_getaddr_dump(&all);
        let mut socket = self.rtnetlink.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reply = socket.request(&request)?;
        let mut share = false;
        while let Some(answer) = reply.recv() {
            let (head, address) = answer.map_err(|error| io::Error::other(error.to_string()))?;
            let is_own = head.ifa_index == number && address.get_local().is_ok_and(|it| it == IpAddr::V4(own));
            share |= is_own && in_one_network(own, client, head.ifa_prefixlen);
        }
        Ok(share)
    }

    fn ask(&self, number: u32) -> io::Result<Interface> {
        /// linux/if_arp.h: the loopback.
        const ARPHRD_LOOPBACK: u16 = 772;
        let mut header = rt_link::Ifinfomsg::new();
        header.ifi_index = i32::try_from(number).map_err(io::Error::other)?;
        let request = rt_link::Request::new().op_getlink_do(&header);
        let mut socket = self.rtnetlink.lock().unwrap_or_else(PoisonError::into_inner);
        let mut reply = socket.request(&request)?;
        let mut kind = Interface::Foreign;
        while let Some(answer) = reply.recv() {
            let (head, link) = answer?;
            let is_bridge = link
                .get_linkinfo()
                .and_then(|info| info.get_kind())
                .is_ok_and(|kind| kind == c"bridge");
            let is_own = link
                .get_ifname()
                .is_ok_and(|name| name.to_bytes() == self.own.as_bytes());
            // Ours may be a bridge of that name, made by somebody for a kernel without dummies.
            if head.ifi_type == ARPHRD_LOOPBACK || is_own {
                kind = Interface::Own;
            } else if is_bridge {
                kind = Interface::Bridge;
            }
        }
        Ok(kind)
    }
}

/// Whether both have the same first `prefix` bits, and are two.
fn in_one_network(own: Ipv4Addr, client: Ipv4Addr, prefix: u8) -> bool {
    let rest = u32::BITS.saturating_sub(prefix.into());
    let network = |address: Ipv4Addr| address.to_bits().checked_shr(rest).unwrap_or(0);
    network(own) == network(client) && own != client
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    #[test]
    fn a_connection_over_the_loopback_came_in_there() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            remember_ingress(&listener).unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (accepted, _) = listener.accept().unwrap();
            let number = ingress(&accepted).unwrap();
            let interfaces = Interfaces::new("imds0");
            assert_eq!(interfaces.kind(number).unwrap(), Interface::Own, "{address}");
            assert_eq!(interfaces.kind(4_000_000).unwrap(), Interface::Foreign);
        }
    }

    #[test]
    fn who_is_in_the_network_of_an_address() {
        let own = Ipv4Addr::new(169, 254, 169, 254);
        for (client, prefix, expected) in [
            ([169, 254, 169, 2], 24, true),
            ([169, 254, 168, 2], 24, false),
            ([169, 254, 168, 2], 16, true),
            ([10, 0, 0, 1], 0, true),
            ([169, 254, 169, 253], 32, false),
            ([169, 254, 169, 254], 24, false),
        ] {
            assert_eq!(
                in_one_network(own, client.into(), prefix),
                expected,
                "{client:?}/{prefix}"
            );
        }
        // The kernel's own word: 127.0.0.1/8 on the loopback, which is interface 1 everywhere.
        let interfaces = Interfaces::new("imds0");
        let share = |number, own, client: [u8; 4]| interfaces.share_a_network(number, own, client.into()).unwrap();
        assert!(share(1, Ipv4Addr::LOCALHOST, [127, 1, 2, 3]));
        assert!(!share(1, Ipv4Addr::LOCALHOST, [128, 0, 0, 1]));
        assert!(!share(2, Ipv4Addr::LOCALHOST, [127, 1, 2, 3]));
        assert!(!share(1, Ipv4Addr::new(127, 0, 0, 9), [127, 1, 2, 3]));
    }

    #[test]
    fn without_being_told_to_remember_nothing_is_known() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        assert!(ingress(listener.accept().unwrap().0).is_err());
    }
}
