//! How 169.254.169.254 gets to the processes that call it: on the host by links, addresses, routes and rules, and in each
//! served network namespace over a [`container_link`] of its own to the [`private_netns`] one.
//!
//! On the host, a [`Plan`] is the target state, as data: links, addresses, routes and port rules. [`Observed`] is the present
//! state. [`diff`] and [`teardown`] compute the steps between them; only [`reconcile`] performs them.
//!
//! Three promises hold between any two steps, and after a crash at any of them: the rules exist before the address, so no
//! publisher of port 80 ever answers for it; the parts that a crash leaves behind refuse connections; and parts of other
//! programs are never replaced or removed.
//!
//! A host that has a metadata service of its own ([`cloud`]) keeps it: only what the host forwards to it is rejected.

pub mod cloud;
pub mod container_link;
mod netlink;
mod nft;
pub mod private_netns;
pub mod reconcile;
mod sysctl;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

/// The table that swaps the ports. On the host it is *owned*: it lives exactly as long as the daemon's socket.
pub const RULES_TABLE: &str = "imds_router";
/// The table that refuses what [`RULES_TABLE`] did not take. It survives the daemon.
pub const GUARD_TABLE: &str = "imds_router_guard";
/// On the host, the link that carries the address where the kernel can make a dummy; a dummy of this name is ours. In a
/// container's namespace, the link to the service.
pub const LINK: &str = "imds0";
/// Carries the address on the host where the kernel has no dummy.
pub const LOOPBACK: &str = "lo";
/// The port that every client of the metadata service asks for.
pub const IMDS_PORT: u16 = 80;
/// Marks routes (`rtm_protocol`) and addresses (`IFA_PROTO`) as ours: 169, the first octet of the address. Neither
/// `linux/rtnetlink.h` (RTPROT_*), `linux/if_addr.h` (IFAPROT_*) nor iproute2's `etc/iproute2/rt_protos` uses it.
pub const PROTOCOL: u8 = 169;

/// Before connection tracking and before any NAT: `NF_IP_PRI_RAW` (−300, `linux/netfilter_ipv4.h`) less ten.
const RULES_PRIORITY: i32 = -310;
/// Where names are asked for.
const DNS_PORT: u16 = 53;
/// After the rules, so that it meets only what they did not take; still before everybody else.
const GUARD_PRIORITY: i32 = -305;

/// What shall be there, in the order in which it is put up.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    parts: Vec<Part>,
    /// Whether what no daemon owns is there for good, until somebody asks for its end.
    stays: bool,
}

impl Plan {
    /// The host's own namespace: `listener` (bound by the caller, before this is put up) serves every container. One
    /// address family a plan; the link for both is in that of IPv4.
    ///
    /// A socket that the host's kernel has accepted from the address of the service would look like that of a client. The
    /// service never opens a connection, so the guard drops all packets from that address that could open one.
    pub fn host(listener: impl Into<SocketAddr>) -> Self {
        let (address, port) = split(listener);
        let guard = |name, hook| Chain {
            name,
            hook,
            priority: GUARD_PRIORITY,
            rules: vec![Rule::to(address, Some(IMDS_PORT), Action::Reset)],
        };
        let rules = vec![
            Chain::swapping("pre", Hook::Prerouting, vec![Rule::request(address, port)]),
            Chain::swapping(
                "out",
                Hook::Output,
                vec![Rule::request(address, port), Rule::answer(address, port)],
            ),
        ];
        let mut parts = vec![
            Part::Table(Table {
                family: Family::of(address),
                name: GUARD_TABLE,
                owned: false,
                chains: vec![
                    guard("pre", Hook::Prerouting),
                    guard("out", Hook::Output),
                    Chain::closing(address),
                ],
            }),
            Part::Route(address),
            Part::Table(Table {
                family: Family::of(address),
                name: RULES_TABLE,
                owned: true,
                chains: rules,
            }),
        ];
        parts.extend(address.is_ipv4().then_some(Part::Link(LINK)));
        parts.push(Part::Address {
            address,
            link: LINK.to_owned(),
        });
        Self { parts, stays: false }
    }

    /// The host's own namespace where [`Plan::host`] cannot be, or is not to be, for this address: nobody else is to answer at it
    /// either.
    pub fn refusing(address: IpAddr) -> Self {
        let mut plan = Self::host(SocketAddr::new(address, 0));
        plan.parts
            .retain(|part| matches!(part, Part::Table(table) if !table.owned));
        plan
    }

    /// The same, and whoever asks for `addresses` (of the plan's family) by way of this host is rejected, as by
    /// [`Plan::rejecting`]: where the address is ours on a machine whose own service is at others, too.
    pub fn and_rejecting(mut self, addresses: &[IpAddr], resolvers: &[IpAddr]) -> Self {
        for part in &mut self.parts {
            if let Part::Table(table) = part
                && !table.owned
            {
                table.chains.push(Chain::rejecting(addresses, resolvers));
            }
        }
        self
    }

    /// Whether it is a daemon's that serves, or rejects for good: only one of them can be there.
    pub fn is_a_lock(&self) -> bool {
        self.tables().any(|table| table.owned)
    }

    /// The host's own namespace where 169.254.169.254 is a real service that its processes go on using: whoever asks for
    /// `addresses` (of one family) by way of this host, as containers on bridges do, is rejected. Of those in `resolvers`
    /// names are asked, too, and that goes through.
    ///
    /// Nothing of the host's own is touched. A reject is the end wherever it stands, so it wins over everybody's accept. It
    /// stays when the daemon ends, however that ends: without it, containers would have the host's own role.
    pub fn rejecting(addresses: &[IpAddr], resolvers: &[IpAddr]) -> Self {
        let Some(family) = addresses.first().map(|address| Family::of(*address)) else {
            return Self::default();
        };
        let table = |name, owned, chains| {
            Part::Table(Table {
                family,
                name,
                owned,
                chains,
            })
        };
        Self {
            // The second one has nothing but its owner: it is the lock of the host.
            parts: vec![
                table(GUARD_TABLE, false, vec![Chain::rejecting(addresses, resolvers)]),
                table(RULES_TABLE, true, Vec::new()),
            ],
            stays: true,
        }
    }

    /// As [`Plan::rejecting`], with a `listener` (bound by the caller, and transparent, ip(7)) for what comes in over bridges: that
    /// is delivered here, though this host does not have the address. What the host itself sends goes where it went.
    pub fn between(listener: impl Into<SocketAddr>, addresses: &[IpAddr], resolvers: &[IpAddr]) -> Self {
        let (address, port) = split(listener);
        let mut plan = Self::rejecting(addresses, resolvers);
        for part in &mut plan.parts {
            if let Part::Table(table) = part
                && table.owned
            {
                table.chains = vec![
                    Chain::swapping("pre", Hook::Prerouting, vec![Rule::request(address, port)]),
                    Chain::swapping("out", Hook::Output, vec![Rule::answer(address, port)]),
                ];
            }
        }
        plan.parts.push(Part::Delivery { address, port });
        plan
    }

    /// What may stay without a daemon: everything but what a daemon owns. Who asks is refused.
    pub fn persistent(mut self) -> Self {
        self.parts.retain(|part| !part.is_the_daemons());
        self
    }

    /// What is over when a daemon ends cleanly.
    fn ending(mut self) -> Self {
        self.parts.retain(|part| !self.stays || part.is_the_daemons());
        self
    }

    /// What [`Plan::host`] has beside tables: to be taken away.
    pub fn ways_to(address: IpAddr) -> Self {
        let mut plan = Self::host(SocketAddr::new(address, 0));
        plan.parts.retain(|part| !matches!(part, Part::Table(_)));
        plan
    }

    /// What [`Plan::between`] has beside tables: to be taken away.
    pub fn delivery(address: IpAddr) -> Self {
        Self {
            parts: vec![Part::Delivery { address, port: 0 }],
            stays: false,
        }
    }

    /// In the order in which they are put up.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    /// The address, where somebody else put it, and the number of that link.
    fn foreign(&self, observed: &Observed) -> Vec<(Part, u32)> {
        let others = observed.addresses.iter().filter(|seen| !seen.ours);
        let part = |seen: &AddressSeen| Part::Address {
            address: seen.address,
            link: seen.link.clone(),
        };
        others.map(|seen| (part(seen), seen.index)).collect()
    }

    fn tables(&self) -> impl Iterator<Item = &Table> {
        self.parts.iter().filter_map(|part| match part {
            Part::Table(table) => Some(table),
            _ => None,
        })
    }

    /// Which addresses it is about.
    pub fn family(&self) -> Family {
        let address = self.address().map(Family::of);
        let family = address.or_else(|| self.tables().next().map(|table| table.family));
        family.unwrap_or(Family::Ip)
    }

    fn address(&self) -> Option<IpAddr> {
        self.parts.iter().find_map(|part| match part {
            Part::Address { address, .. } | Part::Delivery { address, .. } => Some(*address),
            _ => None,
        })
    }
}

fn split(listener: impl Into<SocketAddr>) -> (IpAddr, u16) {
    let listener = listener.into();
    (listener.ip(), listener.port())
}

/// An address family, as nftables names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
}

impl Family {
    /// Whether it is IPv4.
    pub fn is_ip(self) -> bool {
        self == Self::Ip
    }

    /// The family of an address.
    pub fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::Ip,
            IpAddr::V6(_) => Self::Ip6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
        })
    }
}

/// The length of the prefix that is one address.
pub(crate) fn whole(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

/// One thing that a [`Plan`] puts somewhere.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// A table of port rules.
    Table(Table),
    /// An `unreachable` route to this one address: without it, packets leave through the default route, to whatever
    /// answers there, whenever the address is gone.
    Route(IpAddr),
    /// A rule and a route by which TCP packets to this port of this address are delivered here, though no link has it.
    Delivery {
        /// Which.
        address: IpAddr,
        /// Where the listener is.
        port: u16,
    },
    /// A dummy link.
    Link(&'static str),
    /// The address itself, as a /32 or /128.
    Address {
        /// Which.
        address: IpAddr,
        /// The link that carries it.
        link: String,
    },
}

impl Part {
    /// Of no use without a daemon.
    fn is_the_daemons(&self) -> bool {
        matches!(self, Self::Table(Table { owned: true, .. }) | Self::Delivery { .. })
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Table(table) => write!(f, "table {} {}", table.family, table.name),
            Self::Route(to) => write!(f, "unreachable route {to}/{}", whole(*to)),
            Self::Delivery { address, .. } => write!(
                f,
                "delivery of {address}/{} (rule and table {PROTOCOL})",
                whole(*address)
            ),
            Self::Link(name) => write!(f, "link {name} (dummy)"),
            Self::Address { address, link } => write!(f, "address {address}/{} on {link}", whole(*address)),
        }
    }
}

/// A table of rules. Displays as nft's own text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// What it looks at.
    pub family: Family,
    /// Its name.
    pub name: &'static str,
    /// `NFT_TABLE_F_OWNER`: nobody else can change or flush it, and it is gone when its owner is.
    pub owned: bool,
    /// In order of creation, which is the order in which nft lists them.
    pub chains: Vec<Chain>,
}

/// A base chain of type `filter`, policy `accept`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Its name.
    pub name: &'static str,
    /// Where packets meet it.
    pub hook: Hook,
    /// When packets meet it: lower is earlier.
    pub priority: i32,
    /// In order.
    pub rules: Vec<Rule>,
}

impl Chain {
    /// On what is passed on to others: nobody gets to these addresses, but for names where some are resolvers.
    fn rejecting(addresses: &[IpAddr], resolvers: &[IpAddr]) -> Self {
        let names = |address: &IpAddr| {
            let name = |protocol| Rule {
                protocol,
                ..Rule::to(*address, Some(DNS_PORT), Action::Accept)
            };
            [Protocol::Tcp, Protocol::Udp].map(name)
        };
        let rejected = |address: &IpAddr| [Action::Reset, Action::Prohibit].map(|how| Rule::to(*address, None, how));
        let names = resolvers.iter().filter(|it| addresses.contains(it)).flat_map(names);
        Self {
            name: "forward",
            hook: Hook::Forward,
            priority: GUARD_PRIORITY,
            rules: names.chain(addresses.iter().flat_map(rejected)).collect(),
        }
    }

    /// On what comes in: packets from the address of the service that could open a connection are dropped. IPv4 fragments are put
    /// together before this hook, IPv6 ones are not, and an extension header can hide what follows it.
    fn closing(address: IpAddr) -> Self {
        let rule = |port, packets| Rule {
            end: End::Source,
            packets,
            ..Rule::to(address, port, Action::Drop)
        };
        let mut rules = vec![rule(Some(IMDS_PORT), Packets::Opening)];
        rules.extend(address.is_ipv6().then(|| rule(None, Packets::NotPlain)));
        Self {
            name: "in",
            hook: Hook::Input,
            priority: GUARD_PRIORITY,
            rules,
        }
    }

    fn swapping(name: &'static str, hook: Hook, rules: Vec<Rule>) -> Self {
        Self {
            name,
            hook,
            priority: RULES_PRIORITY,
            rules,
        }
    }
}

/// A netfilter hook; the value is the kernel's number (`enum nf_inet_hooks`, `linux/netfilter.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hook {
    /// What comes in, before the routing decision.
    Prerouting = 0,
    /// Packets for a local process, after defragmentation (IPv4).
    Input = 1,
    /// What is passed on to another host.
    Forward = 2,
    /// What a local process sends.
    Output = 3,
}

/// Which packets, and what becomes of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The end of the connection that `address` and `port` are about.
    pub end: End,
    /// The address of that end.
    pub address: IpAddr,
    /// The port of that end; `None`: all there is.
    pub port: Option<u16>,
    /// Whose port.
    pub protocol: Protocol,
    /// Which of these packets.
    pub packets: Packets,
    /// What happens.
    pub action: Action,
}

impl Rule {
    fn to(address: IpAddr, port: Option<u16>, action: Action) -> Self {
        Self {
            end: End::Destination,
            address,
            port,
            protocol: Protocol::Tcp,
            packets: Packets::All,
            action,
        }
    }

    fn request(address: IpAddr, listener: u16) -> Self {
        Self::to(address, Some(IMDS_PORT), Action::Port(listener))
    }

    fn answer(address: IpAddr, listener: u16) -> Self {
        Self {
            end: End::Source,
            ..Self::to(address, Some(listener), Action::Port(IMDS_PORT))
        }
    }
}

/// What has ports; the value is its number (linux/in.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// TCP.
    Tcp = 6,
    /// UDP.
    Udp = 17,
}

/// Which packets a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packets {
    /// Each of them.
    All,
    /// TCP segments that open a connection: SYN without ACK.
    Opening,
    /// IPv6 packets whose first header is followed by neither TCP nor ICMPv6.
    NotPlain,
}

/// An end of a packet's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// What a rule does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Hides the packet from connection tracking, and so from all NAT, and puts this port in place of the one that matched.
    Port(u16),
    /// Answers with a TCP reset: "connection refused". What is no TCP is not meant.
    Reset,
    /// Answers by ICMP that this is prohibited.
    Prohibit,
    /// Nothing more of this chain.
    Accept,
    /// Discards the packet.
    Drop,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "table {} {} {{", self.family, self.name)?;
        if self.owned {
            let blank = if self.chains.is_empty() { "" } else { "\n" };
            writeln!(f, "\tflags owner{blank}")?;
        }
        for (nth, chain) in self.chains.iter().enumerate() {
            let hook = match chain.hook {
                Hook::Prerouting => "prerouting",
                Hook::Input => "input",
                Hook::Forward => "forward",
                Hook::Output => "output",
            };
            let blank = if nth > 0 { "\n" } else { "" };
            writeln!(f, "{blank}\tchain {} {{", chain.name)?;
            writeln!(
                f,
                "\t\ttype filter hook {hook} priority {}; policy accept;",
                chain.priority
            )?;
            for rule in &chain.rules {
                writeln!(f, "\t\t{rule}")?;
            }
            writeln!(f, "\t}}")?;
        }
        write!(f, "}}")
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (address, port) = match self.end {
            End::Source => ("saddr", "sport"),
            End::Destination => ("daddr", "dport"),
        };
        let protocol = match self.protocol {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        };
        write!(f, "{} {address} {} ", Family::of(self.address), self.address)?;
        if let Some(number) = self.port {
            write!(f, "{protocol} {port} {number} ")?;
        }
        match self.packets {
            Packets::All => (),
            Packets::Opening => write!(f, "tcp flags syn / syn,ack ")?,
            Packets::NotPlain => write!(f, "ip6 nexthdr != tcp ip6 nexthdr != ipv6-icmp ")?,
        }
        match self.action {
            Action::Port(new) => write!(f, "notrack tcp {port} set {new}"),
            Action::Reset => write!(f, "reject with tcp reset"),
            Action::Prohibit if self.address.is_ipv4() => write!(f, "reject with icmp admin-prohibited"),
            Action::Prohibit => write!(f, "reject with icmpv6 admin-prohibited"),
            Action::Accept => write!(f, "accept"),
            Action::Drop => write!(f, "drop"),
        }
    }
}

/// What is there now, as far as a [`Plan`] is concerned.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Those tables of the plan that exist.
    pub tables: Vec<TableSeen>,
    /// Our unreachable route is there.
    pub own_route: bool,
    /// Our rule of [`Part::Delivery`] is there, for this port. Port 0: there is something of it, but not all.
    pub delivery: Option<u16>,
    /// Somebody else's blackhole, prohibit or unreachable route to exactly our address is there and comes first.
    pub foreign_closed_route: bool,
    /// The link [`LINK`].
    pub link: Option<LinkSeen>,
    /// Every link that carries the address.
    pub addresses: Vec<AddressSeen>,
}

/// A table that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableSeen {
    /// Its name.
    pub name: &'static str,
    /// The netlink port of the socket that owns it (`NFTA_TABLE_OWNER`); `None`: nobody does.
    pub owner: Option<u32>,
    /// It has exactly the planned chains and rules.
    pub intact: bool,
}

/// The link [`LINK`], which exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkSeen {
    /// A dummy. Any other kind is somebody else's: used, never removed.
    pub ours: bool,
    /// Without that, its address counts for nothing.
    pub up: bool,
}

/// A link that carries the address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressSeen {
    /// Which.
    pub address: IpAddr,
    /// The link's name.
    pub link: String,
    /// The link's number.
    pub index: u32,
    /// The address has our mark, or is on our link.
    pub ours: bool,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// It is not there.
    Add(Part),
    /// It is there, but not as planned.
    Repair(Part),
    /// It is ours and has to go.
    Remove(Part),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Add(part) => write!(f, "add {part}"),
            Self::Repair(part) => write!(f, "repair {part}"),
            Self::Remove(part) => write!(f, "remove {part}"),
        }
    }
}

/// What to do so that everything in `plan` is there, in the order of the plan.
pub fn diff(plan: &Plan, observed: &Observed) -> Vec<Step> {
    let step = |part: &Part| {
        let (there, fine) = match part {
            Part::Table(table) => match observed.tables.iter().find(|seen| seen.name == table.name) {
                // The rules of an owned table that lost its owner would outlive the daemon.
                Some(seen) => (true, seen.intact && seen.owner.is_some() == table.owned),
                None => (false, false),
            },
            Part::Route(_) => {
                let there = observed.own_route || observed.foreign_closed_route;
                (there, there)
            }
            Part::Delivery { port, .. } => (observed.delivery.is_some(), observed.delivery == Some(*port)),
            Part::Link(_) => match observed.link {
                Some(link) => (true, link.up),
                // Only there to carry the address: not needed where something else does.
                None => (!observed.addresses.is_empty(), true),
            },
            // Whoever carries it: local is local.
            Part::Address { .. } => (!observed.addresses.is_empty(), true),
        };
        match (there, fine) {
            (false, _) => Some(Step::Add(part.clone())),
            (true, false) => Some(Step::Repair(part.clone())),
            (true, true) => None,
        }
    };
    plan.parts.iter().filter_map(step).collect()
}

/// What to do so that nothing of ours is left, in the reverse order of the plan.
pub fn teardown(plan: &Plan, observed: &Observed) -> Vec<Step> {
    let ours = |part: &Part| -> Vec<Part> {
        let there = match part {
            Part::Table(table) => observed.tables.iter().any(|seen| seen.name == table.name),
            Part::Route(_) => observed.own_route,
            Part::Delivery { .. } => observed.delivery.is_some(),
            Part::Link(_) => observed.link.is_some_and(|link| link.ours),
            Part::Address { address, .. } => {
                let ours = observed.addresses.iter().filter(|seen| seen.ours);
                return ours
                    .map(|seen| Part::Address {
                        address: *address,
                        link: seen.link.clone(),
                    })
                    .collect();
            }
        };
        there.then(|| part.clone()).into_iter().collect()
    };
    plan.parts.iter().rev().flat_map(ours).map(Step::Remove).collect()
}

/// Why the plan could not be put up, looked at or taken down.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// Another live process serves here: the table's existence is the lock.
    #[error(
        "table ip {table} belongs to another process (netlink port {holder}, as a rule its process id)\n\
         hint: another imds-router serves this host; stop that one first"
    )]
    Busy {
        /// The table that it holds.
        table: &'static str,
        /// The netlink port of its socket.
        holder: u32,
    },
    /// EPERM.
    #[error(
        "not allowed to {attempt}\nhint: this needs CAP_NET_ADMIN in this network namespace: root, or `--cap-add NET_ADMIN`"
    )]
    Denied {
        /// What was tried.
        attempt: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel has no nf_tables, or not all of what the rules need.
    #[error(
        "this kernel cannot {attempt}\n\
         hint: nf_tables with nft_ct (notrack) and nft_reject_ipv4 is needed: modprobe -a nf_tables nft_ct nft_reject_ipv4"
    )]
    NoNftables {
        /// What was tried.
        attempt: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The kernel has nf_tables, but no owned tables.
    #[error(
        "this kernel cannot make table ip {table} belong to one process\nhint: Linux 5.12 or newer is needed for attach `host`"
    )]
    NoOwnedTables {
        /// The table.
        table: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Anything else that the kernel refused.
    #[error("cannot {attempt}")]
    Failed {
        /// What was tried.
        attempt: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// More than one.
    #[error("{} failures:{}", .0.len(), listed(.0))]
    Several(Vec<HostError>),
}

impl HostError {
    /// `None` for an empty list; one error stays itself.
    fn all(mut errors: Vec<HostError>) -> Option<Self> {
        match errors.len() {
            0 | 1 => errors.pop(),
            _ => Some(Self::Several(errors)),
        }
    }
}

/// A chain of sources has room for one failure only, so this is where the causes of several are told.
fn listed(errors: &[HostError]) -> String {
    let line = |error: &HostError| match std::error::Error::source(error) {
        Some(cause) => format!("\n- {error}: {cause}"),
        None => format!("\n- {error}"),
    };
    errors.iter().map(line).collect()
}

#[cfg(test)]
mod tests;
