//! The link between a container's network namespace and the private one.
//!
//! It is a pair of virtual Ethernet links. The far end is `imds0` in the container's namespace, the near end `nINODE` in the
//! private one, where INODE is the number of the container's namespace: whatever comes in over the near end was sent by that
//! namespace, whichever addresses it uses.
//!
//! `imds0` has no address, so an application sees the same addresses as without it. A route of its own says with which source
//! address a request leaves: one that is local to the namespace without being on any link. A rule leads to that route, for TCP
//! (some clouds answer DNS at the same address), and only for what processes of the namespace send: a container forwards
//! packets by default (it inherits the host's `ip_forward`), and a neighbor must not reach the link through it.
//!
//! Both ends have the same MAC address and do not use ARP or neighbor discovery: a frame for oneself is a frame for the other
//! end. No neighbor table can then be poisoned, flushed, or be empty when the first request comes.

use std::fmt::Display;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use netlink_bindings::utils::{Pusher as _, finalize_nested_header, push_header, push_nested_header};
use netlink_bindings::{rt_addr, rt_link, rt_route, rt_rule};
use netlink_socket2::NetlinkSocket;
use rt_addr::Ifaddrmsg;
use rt_link::{IfinfoFlags, Ifinfomsg};
use rt_route::{RtmType, Rtmsg};
use rt_rule::{FibRuleHdr, FrAct};
use rustix::io::Errno;
use rustix::net::{bind, netlink};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::HostError;
use super::netlink::{
    IPPROTO_TCP, LOOPBACK_INDEX, RT_SCOPE_HOST, RT_SCOPE_LINK, RT_SCOPE_UNIVERSE, RT_TABLE_MAIN, ask, ask_for_list,
    family, is, link_name, netlink_socket, set_link_up,
};
use super::private_netns::{self, PrivateNetwork, on_a_thread};
use super::{LINK, LOOPBACK, PROTOCOL, sysctl, whole};
use crate::descriptors;

/// The IPv4 addresses with which requests leave served namespaces: 169.254.192.0 to 169.254.254.255, link-local ones (RFC 3927)
/// that neither AWS nor Docker uses. Each namespace has one of them, local to it without being on any link. The private
/// namespace has a route to it, by which its kernel refuses connections when nothing listens.
pub const SOURCES: (Ipv4Addr, u32) = (Ipv4Addr::new(169, 254, 192, 0), 63 * 256);

/// linux/rtnetlink.h, enum rt_class_t.
const RT_TABLE_LOCAL: u8 = 255;
/// The index of `imds0`: the highest in its namespace, so that lists of links have it last, after an engine's `eth0`.
const INDEX: i32 = 169_254_169;
/// The group of all near ends (`ip link group`).
const GROUP: u32 = PROTOCOL as u32;
/// The table of the routes over the link.
const TABLE: u8 = PROTOCOL;
/// The priority of the rules that lead there: after the kernel's own (0, table local), before any that a VPN adds.
const RULE_PRIORITY: u32 = 1;
/// The metric of the route that refuses while there is no link: the last of all.
const LAST_METRIC: u32 = u32::MAX;
/// IPv6 addresses of a namespace that get a route back: a container may give itself any number.
const MAX_ADDRESSES: usize = 32;
/// Bridges of a container whose containers are served.
const MAX_BRIDGES: usize = 32;
/// Below the kernel's own default (IP6_RT_PRIO_USER, 1024, linux/ipv6_route.h).
const IPV6_METRIC: u32 = 1;

/// linux/rtnetlink.h: RTMGRP_LINK, RTMGRP_IPV4_ROUTE, RTMGRP_IPV4_RULE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE, and group
/// RTNLGRP_IPV6_RULE (19).
const GROUPS: u32 = 0x1 | 0x40 | 0x80 | 0x100 | 0x400 | 1 << 18;

/// What a container's namespace has, as seen from inside it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Connected {
    /// The index of the link in the container's namespace.
    pub link: u32,
    /// The name of its near end.
    pub near: String,
    /// Whether the link is a new one: what listened on an earlier one hears nothing any more.
    pub is_new: bool,
    /// What was missing and has been added.
    pub added: Vec<String>,
    /// What another program has put there beside ours.
    pub left_alone: Vec<String>,
}

/// The name of the near end.
fn near_name(namespace: u64) -> String {
    format!("n{namespace}")
}

/// Locally administered (IEEE 802), and different for each namespace.
fn mac_address(namespace: u64) -> [u8; 6] {
    let [.., a, b, c, d, e] = namespace.to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// How a namespace is connected.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Whether the service is at its IPv6 address, too, where the namespace has IPv6.
    pub ipv6: bool,
    /// Whether containers inside the container reach the service: what comes in over a bridge of the namespace is forwarded.
    pub nested: bool,
}

/// Connects the network namespace of the calling thread, whose number is `namespace`, to the private one; or restores what
/// is missing of that.
///
/// The route that refuses comes first, the rule that leads to both routes last. When the link disappears, a request ends at the
/// first one: it never leaves by the default route, to whatever answers there.
///
/// # Errors
/// When the kernel refuses, or another program has a link of that name.
pub fn connect(network: &PrivateNetwork, namespace: u64, options: Options) -> io::Result<Connected> {
    let mut netlink = NetlinkSocket::new();
    let mut added = Vec::new();
    let near = near_name(namespace);
    let (link, is_new) = match find(network, &mut netlink, namespace)? {
        Some(link) => (link, false),
        None => {
            // The near end of a link whose far end was renamed, moved away, or changed.
            network.with_netlink(|netlink| remove_link(netlink, &near))?;
            let created = create(network, &mut netlink, namespace);
            added.push(format!("link {LINK}"));
            (during(&format_args!("create link {LINK}"), created)?, true)
        }
    };
    // An engine disables IPv6 on new links of a namespace, or on all of them, and enables it on its own.
    let enable = || sysctl::set(&format!("ipv6/conf/{LINK}/disable_ipv6"), "0");
    let ipv6 = options.ipv6 && network.has_ipv6() && has_ipv6()? && unless_scarce(enable())?;
    let up = state(&mut netlink, LINK, namespace)?.is_some_and(|it| it.up);
    if !up {
        let up = set_link_up(&mut netlink, link, IfinfoFlags::NoArp as u32);
        during(&format_args!("set {LINK} up"), up)?;
        added.extend((!is_new).then(|| format!("link {LINK} is up")));
    }
    let mut senders = vec![LOOPBACK.to_owned()];
    if options.nested {
        senders.extend(bridges()?);
    }
    let addresses = addresses(network, ipv6);
    let (own, left_alone) = seen_addresses(&mut netlink, &addresses)?;
    let source = network.with_netlink(|netlink| near_end(netlink, namespace, &own));
    let source = during(&format_args!("configure link {near} of the private namespace"), source)?;
    let local = add_route(&mut netlink, &local(source), Some(link), 0);
    during(&format_args!("add local route {source}"), local)?;
    for address in addresses {
        match lead_over(&mut netlink, link, address, source, &senders) {
            Ok(missing) => added.extend(missing),
            // IPv6 comes and goes while an engine sets a namespace up. Each change leads to another look.
            Err(error) if address.is_ipv6() && !descriptors::is_shortage(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Connected {
        link,
        near,
        is_new,
        added,
        left_alone,
    })
}

/// Has TCP to one address of the service go over the link, and nowhere else. Returns what was missing.
fn lead_over(
    netlink: &mut NetlinkSocket,
    link: u32,
    address: IpAddr,
    source: Ipv4Addr,
    senders: &[String],
) -> io::Result<Vec<String>> {
    let mut added = Vec::new();
    let refusing = add_route(netlink, &refusing(address), None, LAST_METRIC);
    if during(&format_args!("add unreachable route {address}"), refusing)? {
        added.push(format!("unreachable route {address}"));
    }
    let metric = if address.is_ipv6() { IPV6_METRIC } else { 0 };
    let route = Route {
        source: address.is_ipv4().then_some(source),
        ..over_the_link(address)
    };
    let route = add_route(netlink, &route, Some(link), metric);
    if during(&format_args!("add route {address} dev {LINK}"), route)? {
        added.push(format!("route {address} dev {LINK}"));
    }
    for from in senders {
        if during(&format_args!("add rule to {address}"), add_rule(netlink, address, from))? {
            added.push(format!("rule to {address} iif {from}"));
        }
    }
    Ok(added)
}

/// Names the step that has failed.
fn during<T>(step: &dyn Display, done: io::Result<T>) -> io::Result<T> {
    done.map_err(|error| match descriptors::is_shortage(&error) {
        // Its number is looked at.
        true => error,
        false => io::Error::new(error.kind(), format!("cannot {step}: {error}")),
    })
}

/// The near end, in the private namespace: up, and with a route to each address from which the namespace calls. Returns its
/// source address.
fn near_end(netlink: &mut NetlinkSocket, namespace: u64, own: &[Ipv6Addr]) -> io::Result<Ipv4Addr> {
    let near = state(netlink, &near_name(namespace), namespace)?.ok_or(Errno::NODEV)?;
    if !near.up {
        set_link_up(netlink, near.index, IfinfoFlags::NoArp as u32)?;
    }
    for address in own {
        add_route(netlink, &back_to((*address).into()), Some(near.index), 0)?;
    }
    source(netlink, near.index)
}

/// The source address of the link of that index in the private namespace. Indexes count up, so that two links rarely want the
/// same address; then the next one that is free is taken.
fn source(netlink: &mut NetlinkSocket, near: u32) -> io::Result<Ipv4Addr> {
    let (first, count) = SOURCES;
    for nth in 0..count {
        let source = Ipv4Addr::from_bits(first.to_bits() + (near + nth) % count);
        match leads_over(netlink, source.into())? {
            Some(link) if link == near => return Ok(source),
            Some(_) => {}
            None => {
                add_route(netlink, &back_to(source.into()), Some(near), 0)?;
                return Ok(source);
            }
        }
    }
    Err(io::Error::other("all source addresses are in use"))
}

/// The link by which the kernel would send to an address now, if there is one.
fn leads_over(netlink: &mut NetlinkSocket, to: IpAddr) -> io::Result<Option<u32>> {
    let header = Rtmsg {
        rtm_family: family(to),
        rtm_dst_len: whole(to),
        ..Rtmsg::new()
    };
    let mut request = rt_route::Request::new().op_getroute_do(&header);
    request.encode().push_dst(to).push_ip_proto(IPPROTO_TCP);
    let mut over = None;
    match ask(netlink, &request, |(_, route)| over = route.get_oif().ok()) {
        Err(error) if is(&error, &[Errno::NETUNREACH, Errno::HOSTUNREACH]) => Ok(None),
        asked => asked.map(|()| over),
    }
}

/// Whether an address is one of the network namespace of the calling thread. The kernel then drops each packet that comes from
/// another link with that source address (`fib_validate_source`, net/ipv4/fib_frontend.c), unless `accept_local` is set.
///
/// # Errors
/// When the kernel does not answer.
pub fn is_local(address: IpAddr) -> io::Result<bool> {
    let header = Rtmsg {
        rtm_family: family(address),
        rtm_dst_len: whole(address),
        ..Rtmsg::new()
    };
    let mut request = rt_route::Request::new().op_getroute_do(&header);
    request.encode().push_dst(address);
    let mut is_local = false;
    let asked = ask(&mut NetlinkSocket::new(), &request, |(route, _)| {
        is_local = route.rtm_type == RtmType::Local as u8;
    });
    match asked {
        Err(error) if is(&error, &[Errno::NETUNREACH, Errno::HOSTUNREACH]) => Ok(false),
        asked => asked.map(|()| is_local),
    }
}

/// A socket that hears of each change of links and routes in the network namespace of the calling thread, and of IPv6 that
/// comes or goes.
///
/// # Errors
/// When no descriptor is left.
pub fn watch() -> io::Result<OwnedFd> {
    let socket = netlink_socket(None)?;
    bind(&socket, &netlink::SocketAddrNetlink::new(0, GROUPS))?;
    Ok(socket)
}

/// Looks from inside the namespace of the calling thread whether a request to each address of the service would go over the
/// link now. Changes nothing.
///
/// # Errors
/// What is missing.
pub fn check(network: &PrivateNetwork, namespace: u64) -> io::Result<()> {
    let mut netlink = NetlinkSocket::new();
    let link = find(network, &mut netlink, namespace)?.ok_or_else(|| missing(&format!("link {LINK} is missing")))?;
    if !state(&mut netlink, LINK, namespace)?.is_some_and(|it| it.up) {
        return Err(missing(&format!("link {LINK} is down")));
    }
    let address = network.ipv4_address();
    let over = leads_over(&mut netlink, address.into())?;
    match over {
        Some(index) if index == link => Ok(()),
        _ => Err(missing(&format!("its route to {address} does not lead over {LINK}"))),
    }
}

/// Removes the link and all rules and routes of ours from the network namespace of the calling thread. What is gone already is
/// fine.
///
/// # Errors
/// What the kernel does not remove.
pub fn disconnect(network: &PrivateNetwork, namespace: u64) -> io::Result<()> {
    let near = near_name(namespace);
    network.with_netlink(|netlink| remove_link(netlink, &near))?;
    leave(network)
}

/// As [`disconnect`], but the link stays: [`remove_links`] removes all of them.
///
/// # Errors
/// What the kernel does not remove.
pub fn leave(network: &PrivateNetwork) -> io::Result<()> {
    let mut netlink = NetlinkSocket::new();
    for address in addresses(network, network.has_ipv6()) {
        remove_rules(&mut netlink, address)?;
        let mut request = rt_route::Request::new().op_delroute_do(&refusing(address).header);
        request.encode().push_dst(address).push_priority(LAST_METRIC);
        let gone = [
            Errno::SRCH,
            Errno::NOENT,
            Errno::NODEV,
            Errno::AFNOSUPPORT,
            Errno::OPNOTSUPP,
        ];
        match ask(&mut netlink, &request, |_| ()) {
            Err(error) if is(&error, &gone) => {}
            done => done?,
        }
    }
    Ok(())
}

/// Removes all links at once. One by one each takes the kernel about 20 ms (`synchronize_net`).
///
/// # Errors
/// What the kernel refused.
pub fn remove_links(network: &PrivateNetwork) -> io::Result<()> {
    let mut request = rt_link::Request::new().op_dellink_do(&Ifinfomsg::new());
    request.encode().push_group(GROUP);
    let removed = network.with_netlink(|netlink| ask(netlink, &request, |_| ()));
    match removed {
        // There are none.
        Err(error) if is(&error, &[Errno::NODEV]) => Ok(()),
        done => done,
    }
}

/// Disconnects every namespace that still has a link to the private namespace, and removes that: for after a crash, when no
/// daemon serves. Returns what was removed.
///
/// # Errors
/// What could not be removed.
pub fn clear(pin: &Path, ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Result<Vec<String>, HostError> {
    if !private_netns::is_pinned(pin) {
        return Ok(Vec::new());
    }
    let network = PrivateNetwork::open(pin, ipv4, ipv6)?;
    let failed = |what: &'static str| move |error| HostError::failed(&what, error);
    let mut removed = Vec::new();
    let connected = network
        .with_netlink(namespaces)
        .map_err(failed("list the links of the private network namespace"))?;
    for namespace in connected {
        // One without a process is about to end, and its link with it.
        let Some(file) = find_namespace(namespace) else {
            continue;
        };
        let disconnected = on_a_thread(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            disconnect(&network, namespace)
        });
        disconnected.map_err(failed("remove the link of a container"))?;
        removed.push(format!("remove link {LINK} of network namespace {namespace}"));
    }
    network.unpin()?;
    removed.push(format!("remove the private network namespace {}", pin.display()));
    Ok(removed)
}

/// The namespaces that have a near end in the private one.
fn namespaces(netlink: &mut NetlinkSocket) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    let request = rt_link::Request::new().op_getlink_dump(&Ifinfomsg::new());
    ask(netlink, &request, |(_, link)| {
        let name = link.get_ifname().ok().and_then(|name| name.to_str().ok());
        found.extend(name.and_then(|name| name.strip_prefix('n')?.parse::<u64>().ok()));
    })?;
    Ok(found)
}

/// A namespace by its number, through any process in it.
fn find_namespace(number: u64) -> Option<fs::File> {
    let processes = fs::read_dir("/proc").ok()?.flatten();
    let mut files = processes.filter_map(|process| fs::File::open(process.path().join("ns/net")).ok());
    files.find(|file| file.metadata().is_ok_and(|it| it.ino() == number))
}

fn addresses(network: &PrivateNetwork, ipv6: bool) -> Vec<IpAddr> {
    let ipv6 = ipv6.then(|| network.ipv6_address().into());
    std::iter::once(network.ipv4_address().into()).chain(ipv6).collect()
}

/// Whether the network namespace of the calling thread has IPv6 on its loopback (ip-sysctl, `disable_ipv6`).
fn has_ipv6() -> io::Result<bool> {
    let mut disabled = String::new();
    let read = sysctl::read("ipv6/conf/lo/disable_ipv6").map(|value| disabled = value);
    Ok(unless_scarce(read)? && disabled == "0")
}

/// Whether it was done; an error only if no descriptor was left, which says nothing about the namespace.
fn unless_scarce(done: io::Result<()>) -> io::Result<bool> {
    match done {
        Err(error) if descriptors::is_shortage(&error) => Err(error),
        done => Ok(done.is_ok()),
    }
}

fn missing(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, what.to_owned())
}

/// A link, as far as it matters here.
#[derive(Clone, Copy)]
struct State {
    index: u32,
    up: bool,
    /// The index of its other end, in the namespace of that.
    peer: Option<u32>,
    /// Whether it is one end of a pair with the MAC address of ours.
    is_ours: bool,
}

fn state(netlink: &mut NetlinkSocket, name: &str, namespace: u64) -> io::Result<Option<State>> {
    let mac = mac_address(namespace);
    let mut request = rt_link::Request::new().op_getlink_do(&Ifinfomsg::new());
    request.encode().push_ifname_bytes(name.as_bytes());
    let mut found = None;
    let asked = ask(netlink, &request, |(head, link)| {
        let kind = link.get_linkinfo().and_then(|info| info.get_kind());
        let wanted = IfinfoFlags::Up as u32 | IfinfoFlags::NoArp as u32;
        found = Some(State {
            index: head.ifi_index.unsigned_abs(),
            up: head.ifi_flags & wanted == wanted,
            peer: link.get_link().ok(),
            is_ours: kind.is_ok_and(|kind| kind == c"veth") && link.get_address().is_ok_and(|it| it == mac),
        });
    });
    match asked {
        Err(error) if is(&error, &[Errno::NODEV]) => Ok(None),
        other => other.map(|()| found),
    }
}

/// The index of `imds0`, if it is the far end of the namespace's link.
fn find(network: &PrivateNetwork, netlink: &mut NetlinkSocket, namespace: u64) -> io::Result<Option<u32>> {
    let far = state(netlink, LINK, namespace)?;
    let near = network.with_netlink(|netlink| state(netlink, &near_name(namespace), namespace))?;
    Ok(match (far, near) {
        // With another MAC address an end would drop what the other one sends.
        (Some(far), Some(near)) if far.is_ours && near.is_ours => {
            let are_pair = far.peer == Some(near.index) && near.peer == Some(far.index);
            are_pair.then_some(far.index)
        }
        _ => None,
    })
}

fn remove_link(netlink: &mut NetlinkSocket, name: &str) -> io::Result<()> {
    let mut request = rt_link::Request::new().op_dellink_do(&Ifinfomsg::new());
    request.encode().push_ifname_bytes(name.as_bytes());
    match ask(netlink, &request, |_| ()) {
        Err(error) if is(&error, &[Errno::NODEV]) => Ok(()),
        done => done,
    }
}

/// Makes the pair. Both ends are down: a pair cannot be up before it is whole (`veth_open`, drivers/net/veth.c).
fn create(network: &PrivateNetwork, netlink: &mut NetlinkSocket, namespace: u64) -> io::Result<u32> {
    // Left by a daemon whose private namespace is gone: the kernel removes it when it comes to it.
    if let Some(old) = state(netlink, LINK, namespace)? {
        if !old.is_ours {
            let text = format!("a link {LINK} exists that imds-router did not make");
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        remove_link(netlink, LINK)?;
    }
    /// linux/if_link.h: IFLA_ADDRESS, IFLA_IFNAME, IFLA_GROUP, IFLA_NET_NS_FD, IFLA_INFO_DATA; linux/veth.h: VETH_INFO_PEER.
    const ADDRESS: u16 = 1;
    const LINK_GROUP: u16 = 27;
    const IFNAME: u16 = 3;
    const NET_NS_FD: u16 = 28;
    const INFO_DATA: u16 = 2;
    const INFO_PEER: u16 = 1;
    let no_arp = IfinfoFlags::NoArp as u32;
    let peer = Ifinfomsg {
        ifi_flags: no_arp,
        ifi_change: no_arp,
        ..Ifinfomsg::new()
    };
    let header = Ifinfomsg {
        ifi_index: INDEX,
        ..peer
    };
    let mac = mac_address(namespace);
    let mut request = rt_link::Request::new().set_create().set_excl().op_newlink_do(&header);
    let link = request
        .encode()
        .push_ifname_bytes(LINK.as_bytes())
        .push_address(&mac)
        .nested_linkinfo();
    let mut info = link.push_kind(c"veth");
    let message = info.as_vec_mut();
    let data = push_nested_header(message, INFO_DATA);
    let nested = push_nested_header(message, INFO_PEER);
    message.extend(peer.as_slice());
    let mut attribute = |kind: u16, value: &[u8]| {
        push_header(message, kind, u16::try_from(value.len()).unwrap_or(u16::MAX));
        message.extend(value);
    };
    let near = [near_name(namespace).as_bytes(), &[0]].concat();
    attribute(IFNAME, &near);
    attribute(ADDRESS, &mac);
    attribute(LINK_GROUP, &GROUP.to_ne_bytes());
    attribute(NET_NS_FD, &network.descriptor().as_raw_fd().to_ne_bytes());
    finalize_nested_header(message, nested);
    finalize_nested_header(message, data);
    drop(info);
    ask(netlink, &request, |_| ())?;
    let link = state(netlink, LINK, namespace)?.ok_or(Errno::NODEV)?.index;
    without_link_local(netlink, link)?;
    Ok(link)
}

/// The link makes itself no link-local address.
fn without_link_local(netlink: &mut NetlinkSocket, link: u32) -> io::Result<()> {
    /// linux/if_link.h: IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE.
    const ADDR_GEN_MODE: u16 = 8;
    const NONE: u8 = 1;
    let header = Ifinfomsg {
        ifi_index: i32::try_from(link).map_err(io::Error::other)?,
        ..Ifinfomsg::new()
    };
    let mut request = rt_link::Request::new().op_newlink_do(&header);
    let mut settings = request.encode().nested_af_spec().nested_inet6();
    let message = settings.as_vec_mut();
    push_header(message, ADDR_GEN_MODE, 1);
    message.push(NONE);
    drop(settings);
    match ask(netlink, &request, |_| ()) {
        // A kernel without IPv6 has none anyway.
        Err(error) if is(&error, &[Errno::AFNOSUPPORT, Errno::OPNOTSUPP, Errno::INVAL]) => Ok(()),
        done => done,
    }
}

/// A route of ours.
struct Route {
    header: Rtmsg,
    to: IpAddr,
    /// The source address of what leaves by it.
    source: Option<Ipv4Addr>,
}

impl Route {
    fn new(to: IpAddr, rtm_table: u8, rtm_scope: u8, rtm_type: RtmType) -> Self {
        let header = Rtmsg {
            rtm_family: family(to),
            rtm_dst_len: whole(to),
            rtm_table,
            rtm_protocol: PROTOCOL,
            rtm_scope,
            rtm_type: rtm_type as u8,
            ..Rtmsg::new()
        };
        Self {
            header,
            to,
            source: None,
        }
    }
}

/// In a container's namespace: a request that finds no link ends here.
fn refusing(to: IpAddr) -> Route {
    Route::new(to, TABLE, RT_SCOPE_UNIVERSE, RtmType::Unreachable)
}

/// In a container's namespace: the way to the service.
fn over_the_link(to: IpAddr) -> Route {
    let scope = if to.is_ipv4() { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
    Route::new(to, TABLE, scope, RtmType::Unicast)
}

/// In a container's namespace: an address of its own that no link has.
fn local(address: Ipv4Addr) -> Route {
    Route::new(address.into(), RT_TABLE_LOCAL, RT_SCOPE_HOST, RtmType::Local)
}

/// In the private namespace: the way to an address of a container. Sockets that were accepted over a link answer over that
/// link in any case; the kernel's own refusals have only this.
fn back_to(to: IpAddr) -> Route {
    let scope = if to.is_ipv4() { RT_SCOPE_LINK } else { RT_SCOPE_UNIVERSE };
    Route::new(to, RT_TABLE_MAIN, scope, RtmType::Unicast)
}

/// Adds a route. Returns whether it was missing.
fn add_route(netlink: &mut NetlinkSocket, route: &Route, link: Option<u32>, metric: u32) -> io::Result<bool> {
    // Without NLM_F_EXCL and NLM_F_REPLACE: a route of another program to the same address stays, and ours comes before it.
    let mut request = rt_route::Request::new().set_create().op_newroute_do(&route.header);
    let mut attributes = request.encode().push_dst(route.to);
    let link = link.or(route.to.is_ipv6().then_some(LOOPBACK_INDEX));
    if let Some(link) = link {
        attributes = attributes.push_oif(link);
    }
    if metric > 0 {
        attributes = attributes.push_priority(metric);
    }
    if let Some(source) = route.source {
        attributes = attributes.push_prefsrc(source.into());
    }
    drop(attributes);
    match ask(netlink, &request, |_| ()) {
        Ok(()) => Ok(true),
        Err(error) if is(&error, &[Errno::EXIST]) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Has TCP to that address that comes in over the link of that name go by the routes of ours. `lo` stands for what
/// processes of the namespace send. Returns whether the rule was missing.
fn add_rule(netlink: &mut NetlinkSocket, to: IpAddr, from: &str) -> io::Result<bool> {
    let mut request = rt_rule::Request::new().set_create().set_excl().op_newrule_do(&rule(to));
    let attributes = request.encode().push_dst(to).push_iifname_bytes(from.as_bytes());
    attributes
        .push_priority(RULE_PRIORITY)
        .push_ip_proto(IPPROTO_TCP)
        .push_protocol(PROTOCOL);
    match ask(netlink, &request, |_| ()) {
        Ok(()) => Ok(true),
        Err(error) if is(&error, &[Errno::EXIST]) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes all rules of ours to that address.
fn remove_rules(netlink: &mut NetlinkSocket, to: IpAddr) -> io::Result<()> {
    loop {
        let mut request = rt_rule::Request::new().op_delrule_do(&rule(to));
        let attributes = request.encode().push_dst(to);
        attributes.push_priority(RULE_PRIORITY).push_protocol(PROTOCOL);
        match ask(netlink, &request, |_| ()) {
            Err(error) if is(&error, &[Errno::NOENT, Errno::SRCH, Errno::AFNOSUPPORT]) => return Ok(()),
            done => done?,
        }
    }
}

fn rule(to: IpAddr) -> FibRuleHdr {
    FibRuleHdr {
        family: family(to),
        dst_len: whole(to),
        table: TABLE,
        action: FrAct::ToTbl as u8,
        ..FibRuleHdr::new()
    }
}

/// The bridges of the namespace: of the containers inside this container.
fn bridges() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    let request = rt_link::Request::new().op_getlink_dump(&Ifinfomsg::new());
    ask_for_list(&request, |(_, link)| {
        let kind = link.get_linkinfo().and_then(|info| info.get_kind());
        if let (Ok(kind), Ok(name)) = (kind, link.get_ifname())
            && kind == c"bridge"
            && names.len() < MAX_BRIDGES
        {
            names.push(name.to_string_lossy().into_owned());
        }
    })?;
    Ok(names)
}

/// The IPv6 addresses of a namespace from which it can call, and those of `addresses`, of the service, that another program has
/// put on a link.
fn seen_addresses(netlink: &mut NetlinkSocket, addresses: &[IpAddr]) -> io::Result<(Vec<Ipv6Addr>, Vec<String>)> {
    let (mut own, mut foreign) = (Vec::new(), Vec::new());
    let request = rt_addr::Request::new().op_getaddr_dump(&Ifaddrmsg::new());
    ask_for_list(&request, |(head, found)| {
        let Ok(address) = found.get_local().or(found.get_address()) else {
            return;
        };
        if addresses.contains(&address) {
            foreign.push((address, head.ifa_index));
        } else if let IpAddr::V6(address) = address
            && head.ifa_scope == RT_SCOPE_UNIVERSE
            && own.len() < MAX_ADDRESSES
        {
            own.push(address);
        }
    })?;
    let foreign = foreign.into_iter().map(|(address, index)| {
        let link = link_name(netlink, index).unwrap_or_else(|_| "a link".to_owned());
        format!("another program has put {address} on {link}; it was left alone")
    });
    Ok((own, foreign.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_namespace_has_its_own_name_and_mac_address() {
        // The largest number that the kernel gives to a namespace (proc_ns, 32 bits) fits into IFNAMSIZ.
        assert_eq!(near_name(u32::MAX.into()), "n4294967295");
        assert_ne!(mac_address(4_026_531_840), mac_address(4_026_531_841));
        assert_eq!(
            mac_address(4_026_531_840)[0] & 0b11,
            0b10,
            "unicast, locally administered"
        );
    }
}
