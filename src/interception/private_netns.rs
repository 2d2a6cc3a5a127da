//! The private network namespace of the daemon: the listeners are in it, and one end of the link of each served namespace.
//!
//! It has the addresses of the service on its loopback, no route that leads anywhere, and no process. It is pinned by a bind
//! mount, so that it outlives a daemon that crashes: its kernel then refuses connections, and the next daemon adopts it.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;

use netlink_bindings::rt_addr;
use netlink_socket2::NetlinkSocket;
use rt_addr::Ifaddrmsg;
use rustix::fs::fstatfs;
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, mount_bind, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use super::HostError;
use super::netlink::{IFA_F_NODAD, LOOPBACK_INDEX, RT_SCOPE_LINK, ask, family, is, set_link_up};
use super::{IMDS_PORT, sysctl, whole};

/// The namespace that the calling thread is in (namespaces(7)).
const THREAD_NAMESPACE: &str = "/proc/thread-self/ns/net";
/// linux/magic.h, NSFS_MAGIC: a file that stands for a namespace.
const NSFS_MAGIC: u64 = 0x6e73_6673;
/// Connections that wait to be accepted, for each link.
const BACKLOG: i32 = 1024;

/// The private namespace. Dropping it is the same as a crash: the namespace stays, if it is pinned.
pub struct PrivateNetwork {
    namespace: OwnedFd,
    /// A route socket in it.
    netlink: Mutex<NetlinkSocket>,
    pin: Option<PathBuf>,
    /// Whether this kernel has IPv6.
    ipv6: bool,
    ipv4_address: Ipv4Addr,
    ipv6_address: Ipv6Addr,
}

impl PrivateNetwork {
    /// Adopts the namespace that an earlier daemon has pinned at `pin`, or creates one and pins it there. Where mounts are
    /// not allowed it is not pinned ([`PrivateNetwork::is_pinned`]): it then ends with the daemon.
    ///
    /// # Errors
    /// When the kernel does not create or configure it.
    pub fn open(pin: &Path, ipv4_address: Ipv4Addr, ipv6_address: Ipv6Addr) -> Result<Self, HostError> {
        Self::adopt(None, pin, ipv4_address, ipv6_address)
    }

    /// As [`PrivateNetwork::open`]. A namespace that the service manager has kept comes first.
    ///
    /// # Errors
    /// As [`PrivateNetwork::open`].
    pub fn adopt(
        kept: Option<OwnedFd>,
        pin: &Path,
        ipv4_address: Ipv4Addr,
        ipv6_address: Ipv6Addr,
    ) -> Result<Self, HostError> {
        let failed = |what: &'static str| move |error| HostError::failed(&what, error);
        let (namespace, pinned) = match (kept.filter(is_namespace), pinned(pin)) {
            (Some(namespace), pinned) => (namespace, pinned.is_some()),
            (None, Some(namespace)) => (namespace, true),
            (None, None) => create(pin).map_err(failed("create a network namespace"))?,
        };
        let mut network = Self {
            namespace,
            netlink: Mutex::new(NetlinkSocket::new()),
            pin: pinned.then(|| pin.to_owned()),
            ipv6: fs::exists("/proc/sys/net/ipv6").unwrap_or(false),
            ipv4_address,
            ipv6_address,
        };
        let netlink = network
            .inside(|| network.configure())
            .map_err(failed("configure the private network namespace"))?;
        network.netlink = Mutex::new(netlink);
        Ok(network)
    }

    /// Whether it outlives this process.
    pub fn is_pinned(&self) -> bool {
        self.pin.is_some()
    }

    /// Runs `work` on a thread that is inside the namespace. Sockets that it opens stay in it.
    ///
    /// # Errors
    /// When the namespace cannot be entered, or as `work` says.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        on_a_thread(|| {
            move_into_link_name_space(self.namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        })
    }

    /// Opens a listener for what comes in over the link of that name in here, at all addresses of the service.
    ///
    /// The sockets that it accepts are bound to the link, too. The kernel therefore keeps connections over different links
    /// apart even if all their addresses and ports are equal, and each answer leaves by the link that the request came over.
    ///
    /// # Errors
    /// When the link has disappeared, or no descriptor is left.
    pub fn listen(&self, link: &str) -> io::Result<std::net::TcpListener> {
        self.inside(|| {
            let (domain, any) = match self.ipv6 {
                true => (socket2::Domain::IPV6, IpAddr::from(Ipv6Addr::UNSPECIFIED)),
                false => (socket2::Domain::IPV4, IpAddr::from(Ipv4Addr::UNSPECIFIED)),
            };
            let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
            if self.ipv6 {
                socket.set_only_v6(false)?;
            }
            socket.set_reuse_address(true)?;
            socket.bind_device(Some(link.as_bytes()))?;
            socket.set_nonblocking(true)?;
            socket.bind(&SocketAddr::new(any, IMDS_PORT).into())?;
            socket.listen(BACKLOG)?;
            Ok(socket.into())
        })
    }

    /// The addresses of the service that are in here.
    pub fn addresses(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let ipv6 = self.ipv6.then_some(self.ipv6_address.into());
        std::iter::once(self.ipv4_address.into()).chain(ipv6)
    }

    /// Its namespace, to which the kernel moves the near end of a new link.
    pub fn descriptor(&self) -> &OwnedFd {
        &self.namespace
    }

    pub(super) fn ipv4_address(&self) -> Ipv4Addr {
        self.ipv4_address
    }

    pub(super) fn ipv6_address(&self) -> Ipv6Addr {
        self.ipv6_address
    }

    /// Whether this kernel has IPv6.
    pub(super) fn has_ipv6(&self) -> bool {
        self.ipv6
    }

    /// Uses the route socket in here.
    pub(super) fn with_netlink<T>(&self, work: impl FnOnce(&mut NetlinkSocket) -> io::Result<T>) -> io::Result<T> {
        work(&mut self.netlink.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Removes the pin. The namespace ends with the last descriptor of it, and all links with it.
    ///
    /// # Errors
    /// When the pin cannot be removed.
    pub fn unpin(&self) -> Result<(), HostError> {
        self.pin.as_deref().map_or(Ok(()), unpin)
    }

    /// Settings and addresses, on a thread that is inside. Setting what is set already changes nothing.
    fn configure(&self) -> io::Result<NetlinkSocket> {
        // A new namespace has the host's values. Here nothing may be forwarded from one link to another, and there is no
        // route to the source addresses of callers by which they could be checked: the link says which namespace calls.
        sysctl::set("ipv4/ip_forward", "0")?;
        sysctl::set("ipv4/conf/all/rp_filter", "0")?;
        sysctl::set("ipv4/conf/default/rp_filter", "0")?;
        // Port 80 without CAP_NET_BIND_SERVICE: nothing but the daemon opens sockets here.
        sysctl::set("ipv4/ip_unprivileged_port_start", "0")?;
        if self.ipv6 {
            sysctl::set("ipv6/conf/all/forwarding", "0")?;
            sysctl::set("ipv6/conf/lo/disable_ipv6", "0")?;
            sysctl::set("ipv6/conf/default/disable_ipv6", "0")?;
            sysctl::set("ipv6/conf/default/accept_ra", "0")?;
            // IN6_ADDR_GEN_MODE_NONE (linux/if_link.h): links have no addresses of their own.
            sysctl::set("ipv6/conf/default/addr_gen_mode", "1")?;
        }
        let mut netlink = NetlinkSocket::new();
        set_link_up(&mut netlink, LOOPBACK_INDEX, 0)?;
        for address in self.addresses() {
            let header = Ifaddrmsg {
                ifa_family: family(address),
                ifa_prefixlen: whole(address),
                ifa_flags: if address.is_ipv6() { IFA_F_NODAD } else { 0 },
                ifa_scope: RT_SCOPE_LINK,
                ifa_index: LOOPBACK_INDEX,
            };
            let mut request = rt_addr::Request::new().set_create().set_excl().op_newaddr_do(&header);
            request.encode().push_local(address).push_address(address);
            match ask(&mut netlink, &request, |_| ()) {
                Err(error) if is(&error, &[Errno::EXIST]) => {}
                done => done?,
            }
        }
        Ok(netlink)
    }
}

/// Whether a namespace is pinned at that path.
pub(super) fn is_pinned(pin: &Path) -> bool {
    pinned(pin).is_some()
}

fn unpin(pin: &Path) -> Result<(), HostError> {
    let gone = |error: Errno| matches!(error, Errno::INVAL | Errno::NOENT);
    match unmount(pin, UnmountFlags::DETACH) {
        Err(error) if !gone(error) => Err(HostError::failed(
            &format_args!("unmount {}", pin.display()),
            error.into(),
        )),
        _ => {
            // An empty file that stays does no harm.
            let _ = fs::remove_file(pin);
            Ok(())
        }
    }
}

/// The namespace that is pinned at that path, if there is one.
fn pinned(pin: &Path) -> Option<OwnedFd> {
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(pin)
        .ok()?;
    Some(OwnedFd::from(file)).filter(is_namespace)
}

fn is_namespace(file: &OwnedFd) -> bool {
    let kind = fstatfs(file).ok().and_then(|it| u64::try_from(it.f_type).ok());
    kind == Some(NSFS_MAGIC)
}

/// A new namespace; and whether it could be pinned.
fn create(pin: &Path) -> io::Result<(OwnedFd, bool)> {
    on_a_thread(|| {
        #[expect(
            deprecated,
            reason = "only the network namespace is unshared, not the table of descriptors that makes this unsafe"
        )]
        rustix::thread::unshare(UnshareFlags::NEWNET)?;
        let namespace = fs::File::open(THREAD_NAMESPACE)?;
        let file = fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(pin);
        let pinned = file.and_then(|_| Ok(mount_bind(THREAD_NAMESPACE, pin)?));
        if pinned.is_err() {
            // The file alone pins nothing.
            let _ = fs::remove_file(pin);
        }
        Ok((namespace.into(), pinned.is_ok()))
    })
}

/// Namespaces are entered on a thread that does only this and ends: no other code can run in the wrong one.
pub(super) fn on_a_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let name = "private-netns".to_owned();
        let inside = thread::Builder::new().name(name).spawn_scoped(scope, work)?;
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace has panicked")))
    })
}
