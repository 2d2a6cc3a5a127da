//! What the kernel is asked and told, by netlink; tables are in [`super::nft`].
//!
//! The sockets belong to the namespace that their thread sat in when [`Kernel::open`] made them; from then on any
//! thread may use them.

use std::fmt::Display;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use netlink_bindings::traits::NetlinkRequest;
use netlink_bindings::{nftables, rt_addr, rt_link, rt_route, rt_rule};
use netlink_socket2::NetlinkSocket;
use rt_addr::Ifaddrmsg;
use rt_link::{IfinfoFlags, Ifinfomsg};
use rt_route::{RtmType, Rtmsg};
use rt_rule::{FibRuleHdr, FibRulePortRange, FrAct};
use rustix::io::Errno;
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, bind, netlink, socket_with};

use super::nft::of;
use super::{AddressSeen, Family, HostError, LINK, LOOPBACK, LinkSeen, Observed, PROTOCOL, Part, Plan, Step, whole};

/// linux/socket.h
pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;
/// linux/rtnetlink.h, enum rt_class_t
pub(super) const RT_TABLE_MAIN: u8 = 254;
/// linux/rtnetlink.h, enum rt_scope_t: the scope of every route here; in a deletion `NOWHERE` means "any".
pub(super) const RT_SCOPE_UNIVERSE: u8 = 0;
pub(super) const RT_SCOPE_LINK: u8 = 253;
pub(super) const RT_SCOPE_HOST: u8 = 254;
const RT_SCOPE_NOWHERE: u8 = 255;
/// linux/rtnetlink.h: RTMGRP_LINK, and RTMGRP_*_IFADDR, RTMGRP_*_ROUTE of IPv4 and IPv6, and RTMGRP_IPV4_RULE
const ROUTE_GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400 | 0x80;
/// The table of [`Part::Delivery`], and the priority of the rule that leads there: after the kernel's own local table (0), before
/// everybody's (32766).
const DELIVERY: u8 = PROTOCOL;
/// linux/in.h
pub(super) const IPPROTO_TCP: u8 = 6;
/// Where `lo` is: the first interface of every network namespace (`LOOPBACK_IFINDEX`, net/flow.h).
pub(super) const LOOPBACK_INDEX: u32 = 1;
/// linux/if_addr.h, IFA_F_NODAD: nobody else on a link of ours can have the address, and it is needed at once.
pub(super) const IFA_F_NODAD: u8 = 0x2;
/// linux/netfilter/nfnetlink.h: group n is bit n − 1 (netlink(7)), and NFNLGRP_NFTABLES is 7.
const NETFILTER_GROUPS: u32 = 1 << 6;

/// Hears of every change to links, addresses, routes and tables, ours and others'.
pub(super) struct ChangeListener {
    pub(super) route: OwnedFd,
    pub(super) netfilter: OwnedFd,
}

pub(super) struct Kernel {
    pub(super) socket: NetlinkSocket,
    /// The netlink port that our owned table belongs to.
    pub(super) holder: Option<u32>,
    /// Where this process put the address: before Linux 5.18 the kernel does not keep our mark on it.
    placed: Option<String>,
}

impl Kernel {
    pub(super) fn open() -> Result<(Self, ChangeListener), HostError> {
        let no_route = |e: Errno| HostError::failed(&"open a route netlink socket", e.into());
        let no_netfilter = |e: Errno| HostError::nft(&"open a netfilter netlink socket", e.into());
        // Asked first, since NetlinkSocket garbles the reason when socket(2) itself fails.
        netlink_socket(Some(netlink::NETFILTER)).map_err(no_netfilter)?;
        let mut kernel = Self {
            socket: NetlinkSocket::new(),
            holder: None,
            placed: None,
        };
        // The first netfilter socket of a process has the process id as its port, and others see the port of the one
        // that owns the table: so that one speaks before the bell's is bound.
        kernel
            .ask(&nftables::Request::new().op_getgen_do(&of(Family::Ip)), |_| ())
            .map_err(|e| HostError::nft(&"use nf_tables", e))?;
        let listen = |family, groups| {
            let socket = netlink_socket(family)?;
            bind(&socket, &netlink::SocketAddrNetlink::new(0, groups))?;
            Ok(socket)
        };
        let bell = ChangeListener {
            route: listen(None, ROUTE_GROUPS).map_err(no_route)?,
            netfilter: listen(Some(netlink::NETFILTER), NETFILTER_GROUPS).map_err(no_netfilter)?,
        };
        Ok((kernel, bell))
    }

    /// What is there of `plan`. A listing that the kernel had to interrupt may miss something; then a step finds it
    /// there, which is fine.
    pub(super) fn observe(&mut self, plan: &Plan) -> Result<Observed, HostError> {
        let mut observed = Observed::default();
        for table in plan.tables() {
            observed.tables.extend(self.table(table)?);
        }
        let Some(address) = plan.address() else {
            return Ok(observed);
        };
        if plan.parts().iter().any(|part| matches!(part, Part::Delivery { .. })) {
            let seen = self.observe_delivery(address);
            observed.delivery = seen.map_err(|e| HostError::failed(&"read the routing rules", e))?;
        }
        observed.link = self.link(LINK)?.map(|(_, seen)| seen);
        self.observe_routes(address, &mut observed)
            .map_err(|e| HostError::failed(&"read the routes", e))?;
        self.observe_addresses(address, &mut observed)
            .map_err(|e| HostError::failed(&"read the addresses", e))?;
        Ok(observed)
    }

    fn observe_routes(&mut self, to: IpAddr, observed: &mut Observed) -> io::Result<()> {
        let all = Rtmsg {
            rtm_family: family(to),
            ..Rtmsg::new()
        };
        let mut first = None;
        self.ask(&rt_route::Request::new().op_getroute_dump(&all), |(head, route)| {
            let exact = (head.rtm_table, head.rtm_dst_len, head.rtm_tos) == (RT_TABLE_MAIN, whole(to), 0);
            if exact && route.get_dst().is_ok_and(|dst| dst == to) {
                observed.own_route |= head.rtm_protocol == PROTOCOL;
                // The kernel lists routes to one destination in the order in which it tries them.
                first.get_or_insert((head.rtm_protocol, RtmType::from_value(head.rtm_type.into())));
            }
        })?;
        observed.foreign_closed_route = first.is_some_and(|(protocol, kind)| {
            use RtmType::{Blackhole, Prohibit, Unreachable};
            protocol != PROTOCOL && matches!(kind, Some(Blackhole | Prohibit | Unreachable))
        });
        Ok(())
    }

    /// The port of our rule, if it is the one rule of ours, and its route is there; 0 if there is anything else of ours.
    fn observe_delivery(&mut self, to: IpAddr) -> io::Result<Option<u16>> {
        let all = FibRuleHdr {
            family: family(to),
            ..FibRuleHdr::new()
        };
        let mut ports = Vec::new();
        self.ask(&rt_rule::Request::new().op_getrule_dump(&all), |(_, rule)| {
            if rule.get_protocol().ok() == Some(PROTOCOL) && rule.get_dst().is_ok_and(|dst| dst == to) {
                ports.push(rule.get_dport_range().map_or(0, |range| range.start));
            }
        })?;
        let mut routed = false;
        let routes = Rtmsg {
            rtm_family: family(to),
            ..Rtmsg::new()
        };
        self.ask(&rt_route::Request::new().op_getroute_dump(&routes), |(head, route)| {
            routed |= head.rtm_table == DELIVERY && route.get_dst().is_ok_and(|dst| dst == to);
        })?;
        Ok(match (ports.as_slice(), routed) {
            ([], false) => None,
            ([port], true) => Some(*port),
            _ => Some(0),
        })
    }

    fn deliver(&mut self, to: IpAddr, port: u16) -> io::Result<()> {
        let mut request = rt_route::Request::new().set_create().op_newroute_do(&delivered(to));
        request.encode().push_dst(to).push_oif(LOOPBACK_INDEX);
        self.ask(&request, |_| ())?;
        let mut request = rt_rule::Request::new()
            .set_create()
            .set_excl()
            .op_newrule_do(&delivery(to));
        let range = FibRulePortRange { start: port, end: port };
        let rule = request.encode().push_dst(to).push_priority(DELIVERY.into());
        rule.push_ip_proto(IPPROTO_TCP)
            .push_dport_range(range)
            .push_protocol(PROTOCOL);
        self.ask(&request, |_| ())
    }

    /// All of ours, whichever port it is for.
    fn deliver_no_more(&mut self, to: IpAddr) -> io::Result<()> {
        let gone = [Errno::NOENT, Errno::SRCH];
        loop {
            let mut request = rt_rule::Request::new().op_delrule_do(&delivery(to));
            let rule = request.encode().push_dst(to).push_priority(DELIVERY.into());
            rule.push_protocol(PROTOCOL);
            match self.ask(&request, |_| ()) {
                Err(error) if is(&error, &gone) => break,
                done => done?,
            }
        }
        let mut request = rt_route::Request::new().op_delroute_do(&delivered(to));
        request.encode().push_dst(to);
        match self.ask(&request, |_| ()) {
            Err(error) if is(&error, &gone) => Ok(()),
            done => done,
        }
    }

    fn observe_addresses(&mut self, local: IpAddr, observed: &mut Observed) -> io::Result<()> {
        let all = Ifaddrmsg {
            ifa_family: family(local),
            ..Ifaddrmsg::new()
        };
        let own_link = observed.link.is_some_and(|link| link.ours);
        let mut seen = Vec::new();
        self.ask(&rt_addr::Request::new().op_getaddr_dump(&all), |(head, found)| {
            // IPv6 has no local address beside the address, unless the link is point to point.
            if found.get_local().or(found.get_address()).is_ok_and(|it| it == local) {
                seen.push((head.ifa_index, found.get_proto().ok() == Some(PROTOCOL)));
            }
        })?;
        for (index, marked) in seen {
            let link = match link_name(&mut self.socket, index) {
                // It went meanwhile, and its address with it.
                Err(error) if is(&error, &[Errno::NODEV]) => continue,
                named => named?,
            };
            let ours = marked || (own_link && link == LINK) || self.placed.as_ref() == Some(&link);
            observed.addresses.push(AddressSeen {
                address: local,
                link,
                index,
                ours,
            });
        }
        Ok(())
    }

    /// Does one step. Returns what was really done: nothing where somebody was faster, and where the kernel has no
    /// dummy, `lo` carries the address.
    pub(super) fn execute(&mut self, mut step: Step) -> Result<Option<Step>, HostError> {
        if let Step::Add(Part::Address { link, .. }) = &mut step
            && link == LINK
            && self.link(LINK)?.is_none()
        {
            LOOPBACK.clone_into(link);
        }
        let removed: &[Errno] = &[Errno::NOENT, Errno::SRCH, Errno::ADDRNOTAVAIL, Errno::NODEV];
        let (result, no_need) = match &step {
            Step::Add(part) => (self.add(part), [Errno::EXIST].as_slice()),
            Step::Repair(part) => (self.repair(part), [].as_slice()),
            Step::Remove(part) => (self.remove(part), removed),
        };
        match (result, &step) {
            (Ok(()), _) => Ok(Some(step)),
            (Err(e), _) if is(&e, no_need) => Ok(None),
            // A kernel that cannot make a dummy.
            (Err(e), Step::Add(Part::Link(_))) if is(&e, &[Errno::OPNOTSUPP]) => Ok(None),
            (Err(e), Step::Add(Part::Table(_)) | Step::Repair(Part::Table(_))) => Err(HostError::nft(&step, e)),
            (Err(e), _) => Err(HostError::failed(&step, e)),
        }
    }

    fn add(&mut self, part: &Part) -> io::Result<()> {
        match part {
            Part::Table(table) => self.put_table(table),
            Part::Route(to) => {
                // Without NLM_F_EXCL: somebody's route of the same metric stays, and ours comes before it.
                let request = rt_route::Request::new().set_create();
                let mut request = request.op_newroute_do(&unreachable(*to, RT_SCOPE_UNIVERSE));
                request.encode().push_dst(*to);
                self.ask(&request, |_| ())
            }
            Part::Delivery { address, port } => self.deliver(*address, *port),
            Part::Link(name) => {
                let request = rt_link::Request::new().set_create().set_excl();
                let mut request = request.op_newlink_do(&link_up(0));
                let link = request.encode().push_ifname_bytes(name.as_bytes());
                link.nested_linkinfo().push_kind(c"dummy");
                self.ask(&request, |_| ())
            }
            Part::Address { address, link } => {
                let header = self.carried_by(*address, link)?;
                let request = rt_addr::Request::new().set_create().set_excl();
                let mut request = request.op_newaddr_do(&header);
                request
                    .encode()
                    .push_local(*address)
                    .push_address(*address)
                    .push_proto(PROTOCOL);
                self.ask(&request, |_| ())?;
                self.placed = Some(link.clone());
                Ok(())
            }
        }
    }

    fn repair(&mut self, part: &Part) -> io::Result<()> {
        match part {
            Part::Link(name) => {
                let (index, _) = self.link_as_io(name)?.ok_or(Errno::NODEV)?;
                self.ask(&rt_link::Request::new().op_newlink_do(&link_up(index)), |_| ())
            }
            Part::Delivery { address, port } => {
                self.deliver_no_more(*address)?;
                self.deliver(*address, *port)
            }
            Part::Table(_) | Part::Route(_) | Part::Address { .. } => self.add(part),
        }
    }

    fn remove(&mut self, part: &Part) -> io::Result<()> {
        match part {
            Part::Table(table) => self.remove_table(table),
            Part::Route(to) => {
                let request = rt_route::Request::new();
                let mut request = request.op_delroute_do(&unreachable(*to, RT_SCOPE_NOWHERE));
                request.encode().push_dst(*to);
                self.ask(&request, |_| ())
            }
            Part::Delivery { address, .. } => self.deliver_no_more(*address),
            Part::Link(name) => {
                let mut request = rt_link::Request::new().op_dellink_do(&Ifinfomsg::new());
                request.encode().push_ifname_bytes(name.as_bytes());
                self.ask(&request, |_| ())
            }
            Part::Address { address, link } => {
                let header = self.carried_by(*address, link)?;
                let mut request = rt_addr::Request::new().op_deladdr_do(&header);
                request.encode().push_local(*address);
                self.ask(&request, |_| ())
            }
        }
    }

    /// Its index and its state; `None` if there is none of that name.
    fn link(&mut self, name: &str) -> Result<Option<(i32, LinkSeen)>, HostError> {
        self.link_as_io(name)
            .map_err(|e| HostError::failed(&format_args!("look at link {name}"), e))
    }

    fn link_as_io(&mut self, name: &str) -> io::Result<Option<(i32, LinkSeen)>> {
        let mut request = rt_link::Request::new().op_getlink_do(&Ifinfomsg::new());
        request.encode().push_ifname_bytes(name.as_bytes());
        let mut found = None;
        let asked = self.ask(&request, |(head, link)| {
            let kind = link.get_linkinfo().and_then(|info| info.get_kind());
            let ours = kind.is_ok_and(|kind| kind == c"dummy");
            let up = head.ifi_flags & IfinfoFlags::Up as u32 != 0;
            found = Some((head.ifi_index, LinkSeen { ours, up }));
        });
        match asked {
            Err(e) if is(&e, &[Errno::NODEV]) => Ok(None),
            other => other.map(|()| found),
        }
    }

    fn carried_by(&mut self, address: IpAddr, link: &str) -> io::Result<Ifaddrmsg> {
        let (index, _) = self.link_as_io(link)?.ok_or(Errno::NODEV)?;
        Ok(Ifaddrmsg {
            ifa_family: family(address),
            ifa_prefixlen: whole(address),
            ifa_flags: if address.is_ipv6() { IFA_F_NODAD } else { 0 },
            // With a wider one the kernel might choose the address as the source of unrelated packets.
            ifa_scope: RT_SCOPE_LINK,
            ifa_index: index.unsigned_abs(),
        })
    }

    /// As [`ask`], by the socket of this one.
    pub(super) fn ask<R: NetlinkRequest>(&mut self, request: &R, each: impl FnMut(R::ReplyType<'_>)) -> io::Result<()> {
        ask(&mut self.socket, request, each)
    }
}

/// Sends one request and hands every answer on.
pub(super) fn ask<R: NetlinkRequest>(
    socket: &mut NetlinkSocket,
    request: &R,
    mut each: impl FnMut(R::ReplyType<'_>),
) -> io::Result<()> {
    let mut reply = socket.request(request).map_err(unless_scarce)?;
    while let Some(answer) = reply.recv() {
        each(answer?);
    }
    Ok(())
}

/// netlink-socket2 0.3 reports that it cannot open a socket as EPERM, whatever the reason is.
fn unless_scarce(error: io::Error) -> io::Error {
    match netlink_socket(None) {
        Err(reason) if is(&error, &[Errno::PERM]) => reason.into(),
        _ => error,
    }
}

/// Entries that are read of a list of a container's namespace, at most. A container with `NET_ADMIN` makes as many links and
/// addresses as it likes, and each takes the kernel microseconds.
const ENTRIES: usize = 4096;

/// Asks for a list in the calling thread's network namespace, and hands its first [`ENTRIES`] entries on.
pub(super) fn ask_for_list<R: NetlinkRequest>(request: &R, mut each: impl FnMut(R::ReplyType<'_>)) -> io::Result<()> {
    // Of its own: the kernel drops what is left unread with it.
    let mut socket = NetlinkSocket::new();
    let mut reply = socket.request(request).map_err(unless_scarce)?;
    for _ in 0..ENTRIES {
        let Some(answer) = reply.recv() else { break };
        each(answer?);
    }
    Ok(())
}

/// The name of a link of the namespace that the socket is in.
pub(super) fn link_name(socket: &mut NetlinkSocket, index: u32) -> io::Result<String> {
    let mut header = Ifinfomsg::new();
    header.ifi_index = i32::try_from(index).map_err(io::Error::other)?;
    let mut name = String::new();
    ask(socket, &rt_link::Request::new().op_getlink_do(&header), |(_, link)| {
        name = link.get_ifname().unwrap_or_default().to_string_lossy().into_owned();
    })?;
    Ok(name)
}

/// Sets a link up, and these flags of it beside.
pub(super) fn set_link_up(socket: &mut NetlinkSocket, index: u32, flags: u32) -> io::Result<()> {
    let mut header = link_up(i32::try_from(index).map_err(io::Error::other)?);
    header.ifi_flags |= flags;
    header.ifi_change |= flags;
    ask(socket, &rt_link::Request::new().op_newlink_do(&header), |_| ())
}

impl HostError {
    /// Failing at an attempt, which the text names.
    pub fn failed(attempt: &dyn Display, source: io::Error) -> Self {
        let attempt = attempt.to_string();
        if is(&source, &[Errno::PERM, Errno::ACCESS]) {
            return Self::Denied { attempt, source };
        }
        Self::Failed { attempt, source }
    }

    /// The ways in which a kernel says that nf_tables, or an expression of it, is not there, are these.
    pub(super) fn nft(attempt: &dyn Display, source: io::Error) -> Self {
        let absent = [Errno::PROTONOSUPPORT, Errno::OPNOTSUPP, Errno::INVAL, Errno::NOENT];
        if is(&source, &absent) {
            return Self::NoNftables {
                attempt: attempt.to_string(),
                source,
            };
        }
        Self::failed(attempt, source)
    }
}

pub(super) fn is(error: &io::Error, any: &[Errno]) -> bool {
    any.iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

pub(super) fn netlink_socket(family: Option<Protocol>) -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, family)
}

pub(super) fn family(address: IpAddr) -> u8 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

fn unreachable(to: IpAddr, rtm_scope: u8) -> Rtmsg {
    Rtmsg {
        rtm_family: family(to),
        rtm_dst_len: whole(to),
        rtm_table: RT_TABLE_MAIN,
        rtm_protocol: PROTOCOL,
        rtm_scope,
        rtm_type: RtmType::Unreachable as u8,
        ..Rtmsg::new()
    }
}

/// The route of [`Part::Delivery`].
fn delivered(to: IpAddr) -> Rtmsg {
    Rtmsg {
        rtm_table: DELIVERY,
        rtm_scope: RT_SCOPE_HOST,
        rtm_type: RtmType::Local as u8,
        ..unreachable(to, RT_SCOPE_HOST)
    }
}

/// Its rule.
fn delivery(to: IpAddr) -> FibRuleHdr {
    FibRuleHdr {
        family: family(to),
        dst_len: whole(to),
        table: DELIVERY,
        action: FrAct::ToTbl as u8,
        ..FibRuleHdr::new()
    }
}

fn link_up(ifi_index: i32) -> Ifinfomsg {
    let up = IfinfoFlags::Up as u32;
    Ifinfomsg {
        ifi_index,
        ifi_flags: up,
        ifi_change: up,
        ..Ifinfomsg::new()
    }
}
