//! Tables of port rules, as the kernel has them: the netfilter half of [`Kernel`].

use std::ffi::CStr;
use std::io;
use std::net::IpAddr;

use netlink_bindings::nftables::{
    self, Chained, CmpOps, MetaKeys, Nfgenmsg, PayloadBase, PushExprListAttrs, Registers, RejectTypes, Request,
    TableFlags, VerdictCode,
};
use netlink_bindings::utils::Pusher;
use rustix::io::Errno;

use super::netlink::{AF_INET, AF_INET6, Kernel, is};
use super::{Action, Chain, End, Family, HostError, Observed, Packets, Part, Plan, Rule, Step, Table, TableSeen};

/// The subsystem that a batch is for (linux/netfilter/nfnetlink.h).
const NFNL_SUBSYS_NFTABLES: u16 = 10;
/// Every expression of ours works on this one.
const REGISTER: u32 = Registers::Reg1 as u32;
/// Where an expression writes what becomes of the packet.
const VERDICT: u32 = Registers::RegVerdict as u32;
/// NFT_PAYLOAD_CSUM_INET (linux/netfilter/nf_tables.h): the kernel mends the checksum of what it writes.
const CHECKSUM_INET: u32 = 1;
/// Where struct tcphdr (linux/tcp.h) has its checksum, in bytes.
const TCP_CHECKSUM_OFFSET: u32 = 16;
/// Where struct tcphdr has its flags, in bytes, and what SYN and ACK are there.
const TCP_FLAGS_OFFSET: u32 = 13;
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;
/// Where struct ipv6hdr (linux/ipv6.h) has the number of the next header, in bytes; linux/in.h and linux/in6.h: TCP, ICMPv6.
const IPV6_NEXT_HEADER_OFFSET: u32 = 6;
const PLAIN: [u8; 2] = [6, 58];
/// linux/icmp.h, ICMP_PKT_FILTERED, and linux/icmpv6.h, ICMPV6_ADM_PROHIBITED.
const PROHIBITED: (u8, u8) = (13, 1);
/// More than any batch of ours has messages: tens for a table, two for a thousand elements of a set.
const BATCH: u32 = 1024;
/// Kind of the one entry in a rule's user data: not among those of libnftnl (`libnftnl/udata.h`), so that nft does not
/// show it.
const USER_DATA_TEXT: u8 = 200;

impl Kernel {
    /// Makes the owned table of `plan`, still empty, unless it is ours already; or finds that somebody else has it.
    /// This is the lock of the host.
    pub(super) fn hold(&mut self, plan: &Plan, observed: &Observed) -> Result<Option<Step>, HostError> {
        self.refuse_others(&observed.tables)?;
        let Some(table) = plan.tables().find(|table| table.owned) else {
            return Ok(None);
        };
        let seen = observed.tables.iter().find(|seen| seen.name == table.name);
        if seen.is_some_and(|seen| seen.owner.is_some()) {
            return Ok(None); // by us
        }
        let made = self.batch(|batch| {
            if seen.is_some() {
                delete(batch, table);
            }
            let request = batch.request().set_create().set_excl();
            let request = request.op_newtable_do(&of(table.family)).into_encoder();
            request
                .push_name_bytes(table.name.as_bytes())
                .push_flags(TableFlags::Owner as u32);
        });
        let now = self.table(table)?;
        let step = Step::Add(Part::Table(table.clone()));
        let Err(source) = made else {
            self.holder = now.and_then(|seen| seen.owner);
            return Ok(Some(step));
        };
        // EPERM and EEXIST also mean that somebody was faster.
        self.refuse_others(now.as_slice())?;
        // Before 5.12 the flag is invalid, not unsupported.
        if is(&source, &[Errno::OPNOTSUPP, Errno::INVAL]) {
            return Err(HostError::NoOwnedTables {
                table: table.name,
                source,
            });
        }
        Err(HostError::nft(&step, source))
    }

    /// `Busy` if one of the tables belongs to another live socket.
    pub(super) fn refuse_others(&self, tables: &[TableSeen]) -> Result<(), HostError> {
        for seen in tables {
            match seen.owner {
                Some(holder) if Some(holder) != self.holder => {
                    return Err(HostError::Busy {
                        table: seen.name,
                        holder,
                    });
                }
                _ => (),
            }
        }
        Ok(())
    }

    /// The whole table at once. One that is not owned is replaced: no packet meets half of it.
    pub(super) fn put_table(&mut self, table: &Table) -> io::Result<()> {
        let name = table.name.as_bytes();
        self.batch(|batch| {
            if !table.owned {
                // What does not exist cannot be deleted, so it is made first.
                create(batch, table);
                delete(batch, table);
                create(batch, table);
            }
            for chain in &table.chains {
                let request = batch
                    .request()
                    .set_create()
                    .op_newchain_do(&of(table.family))
                    .into_encoder();
                let hook = request
                    .push_table_bytes(name)
                    .push_name_bytes(chain.name.as_bytes())
                    .nested_hook()
                    .push_num(chain.hook as u32)
                    .push_priority(chain.priority);
                hook.end_nested()
                    .push_type(c"filter")
                    .push_policy(VerdictCode::Accept as u32);
                for rule in &chain.rules {
                    let request = batch.request().set_create().set_append();
                    let request = request.op_newrule_do(&of(table.family)).into_encoder();
                    let list = request
                        .push_table_bytes(name)
                        .push_chain_bytes(chain.name.as_bytes())
                        .push_userdata(&user_data(rule))
                        .nested_expressions();
                    push_rule(list, rule);
                }
            }
        })
    }

    pub(super) fn remove_table(&mut self, table: &Table) -> io::Result<()> {
        self.batch(|batch| delete(batch, table))
    }

    /// `None` if it does not exist.
    pub(super) fn table(&mut self, table: &Table) -> Result<Option<TableSeen>, HostError> {
        match self.read_table(table) {
            Ok(seen) => Ok(Some(seen)),
            Err(e) if is(&e, &[Errno::NOENT]) => Ok(None),
            Err(e) => Err(HostError::nft(
                &format_args!("read table {} {}", table.family, table.name),
                e,
            )),
        }
    }

    fn read_table(&mut self, table: &Table) -> io::Result<TableSeen> {
        let of_table = |name: &CStr| name.to_bytes() == table.name.as_bytes();
        let (mut owner, mut intact) = (None, true);
        let mut request = Request::new().op_gettable_do(&of(table.family));
        request.encode().push_name_bytes(table.name.as_bytes());
        self.ask(&request, |(_, seen)| {
            owner = seen.get_owner().ok();
            intact = seen
                .get_flags()
                .is_ok_and(|flags| flags & TableFlags::Dormant as u32 == 0);
        })?;

        let mut chains = 0;
        self.ask(&Request::new().op_getchain_dump(&of(table.family)), |(_, seen)| {
            if seen.get_table().is_ok_and(of_table) {
                chains += 1;
                intact &= table.chains.iter().any(|chain| same_chain(chain, &seen));
            }
        })?;

        // The kernel cannot change a rule, only replace it, and what replaces ours does not carry its text.
        let mut rules = Vec::new();
        let mut request = Request::new().op_getrule_dump(&of(table.family));
        request.encode().push_table_bytes(table.name.as_bytes());
        self.ask(&request, |(_, seen)| {
            if seen.get_table().is_ok_and(of_table) {
                let chain = seen.get_chain().unwrap_or_default().to_bytes().to_vec();
                rules.push((chain, seen.get_userdata().unwrap_or_default().to_vec()));
            }
        })?;
        let planned = table.chains.iter().flat_map(|chain| {
            chain
                .rules
                .iter()
                .map(|rule| (chain.name.as_bytes().to_vec(), user_data(rule)))
        });
        intact &= chains == table.chains.len() && rules.into_iter().eq(planned);
        Ok(TableSeen {
            name: table.name,
            owner,
            intact,
        })
    }

    /// Base chains of other tables that see what comes in for this host, and drop what they do not know.
    pub(super) fn dropping(&mut self, family: Family) -> Result<Vec<String>, HostError> {
        /// NF_INET_LOCAL_IN (linux/netfilter.h).
        const INPUT: u32 = 1;
        /// linux/netfilter.h, NFPROTO_INET: chains that see both families.
        const INET: u8 = 1;
        let both = Nfgenmsg {
            nfgen_family: INET,
            ..Nfgenmsg::new()
        };
        let mut found = Vec::new();
        for (name, header) in [(family.to_string(), of(family)), ("inet".to_owned(), both)] {
            let asked = self.ask(&Request::new().op_getchain_dump(&header), |(_, seen)| {
                let input = seen.get_hook().is_ok_and(|hook| hook.get_num().ok() == Some(INPUT));
                if input && seen.get_policy().ok() == Some(VerdictCode::Drop as u32) {
                    let text =
                        |it: Result<&CStr, _>| it.map(|it| it.to_string_lossy().into_owned()).unwrap_or_default();
                    found.push(format!(
                        "chain {name} {} {}",
                        text(seen.get_table()),
                        text(seen.get_name())
                    ));
                }
            });
            asked.map_err(|error| HostError::nft(&"list chains", error))?;
        }
        Ok(found)
    }

    /// One transaction: all of it or nothing.
    pub(super) fn batch(&mut self, fill: impl FnOnce(&mut Chained<'static>)) -> io::Result<()> {
        let mut batch = Chained::new(self.socket.reserve_seq(BATCH));
        let mut bracket = Nfgenmsg::new();
        bracket.set_res_id(NFNL_SUBSYS_NFTABLES);
        batch.request().op_batch_begin_do(&bracket);
        fill(&mut batch);
        batch.request().op_batch_end_do(&bracket);
        Ok(self.socket.request_chained(&batch.finalize())?.recv_all()?)
    }
}

pub(super) fn of(family: Family) -> Nfgenmsg {
    Nfgenmsg {
        nfgen_family: match family {
            Family::Ip => AF_INET,
            Family::Ip6 => AF_INET6,
        },
        ..Nfgenmsg::new()
    }
}

fn create(batch: &mut Chained<'static>, table: &Table) {
    let mut request = batch.request().set_create().op_newtable_do(&of(table.family));
    request.encode().push_name_bytes(table.name.as_bytes());
}

fn delete(batch: &mut Chained<'static>, table: &Table) {
    let mut request = batch.request().op_deltable_do(&of(table.family));
    request.encode().push_name_bytes(table.name.as_bytes());
}

fn same_chain(chain: &Chain, seen: &nftables::IterableChainAttrs<'_>) -> bool {
    let same_hook = |hook: nftables::IterableNftHookAttrs<'_>| {
        hook.get_num().ok() == Some(chain.hook as u32) && hook.get_priority().ok() == Some(chain.priority)
    };
    seen.get_name()
        .is_ok_and(|name| name.to_bytes() == chain.name.as_bytes())
        && seen.get_policy().ok() == Some(VerdictCode::Accept as u32)
        && seen.get_hook().is_ok_and(same_hook)
}

/// What tells our rule from another one in its place: its own text.
fn user_data(rule: &Rule) -> Vec<u8> {
    let text = rule.to_string();
    let length = u8::try_from(text.len()).expect("the longest rule has 130 characters");
    [&[USER_DATA_TEXT, length], text.as_bytes()].concat()
}

fn push_rule<P: Pusher>(mut list: PushExprListAttrs<P>, rule: &Rule) {
    // In bytes: struct iphdr (linux/ip.h), struct ipv6hdr (linux/ipv6.h), struct tcphdr (linux/tcp.h).
    let (address, port) = match (rule.end, rule.address) {
        (End::Source, IpAddr::V4(_)) => (12, 0),
        (End::Destination, IpAddr::V4(_)) => (16, 2),
        (End::Source, IpAddr::V6(_)) => (8, 0),
        (End::Destination, IpAddr::V6(_)) => (24, 2),
    };
    list = match rule.address {
        IpAddr::V4(octets) => equals(
            load(list, PayloadBase::NetworkHeader, (address, 4), REGISTER),
            &octets.octets(),
        ),
        IpAddr::V6(octets) => equals(
            load(list, PayloadBase::NetworkHeader, (address, 16), REGISTER),
            &octets.octets(),
        ),
    };
    if rule.port.is_some() || rule.action == Action::Reset {
        list = equals(meta(list, MetaKeys::L4Proto, REGISTER), &[rule.protocol as u8]);
    }
    if let Some(number) = rule.port {
        list = load(list, PayloadBase::TransportHeader, (port, 2), REGISTER);
        list = equals(list, &number.to_be_bytes());
    }
    match rule.packets {
        Packets::All => (),
        Packets::Opening => {
            list = load(list, PayloadBase::TransportHeader, (TCP_FLAGS_OFFSET, 1), REGISTER);
            list = equals(masked(list, SYN | ACK), &[SYN]);
        }
        Packets::NotPlain => {
            for plain in PLAIN {
                list = load(list, PayloadBase::NetworkHeader, (IPV6_NEXT_HEADER_OFFSET, 1), REGISTER);
                list = compare(list, CmpOps::Neq, &[plain]);
            }
        }
    }
    match rule.action {
        Action::Accept => verdict(list, VerdictCode::Accept),
        Action::Drop => verdict(list, VerdictCode::Drop),
        Action::Prohibit => {
            let code = if rule.address.is_ipv4() {
                PROHIBITED.0
            } else {
                PROHIBITED.1
            };
            list.nested_elem()
                .nested_data_reject()
                .push_type(RejectTypes::IcmpUnreach as u32)
                .push_icmp_code(code);
        }
        Action::Reset => {
            list.nested_elem()
                .nested_data_reject()
                .push_type(RejectTypes::TcpRst as u32)
                .push_icmp_code(0);
        }
        Action::Port(new) => {
            let list = list.nested_elem().push_name(c"notrack").end_nested();
            let value = list
                .nested_elem()
                .nested_data_immediate()
                .push_dreg(REGISTER)
                .nested_data();
            let list = value
                .push_value(&new.to_be_bytes())
                .end_nested()
                .end_nested()
                .end_nested();
            let store = list.nested_elem().nested_data_payload().push_sreg(REGISTER);
            store
                .push_base(PayloadBase::TransportHeader as u32)
                .push_offset(port)
                .push_len(2)
                .push_csum_type(CHECKSUM_INET)
                .push_csum_offset(TCP_CHECKSUM_OFFSET);
        }
    }
}

fn verdict<P: Pusher>(list: PushExprListAttrs<P>, code: VerdictCode) {
    let verdict = list.nested_elem().nested_data_immediate().push_dreg(VERDICT);
    verdict.nested_data().nested_verdict().push_code(code as u32);
}

/// Clears the bits of the one byte in [`REGISTER`] that are not in `mask`.
fn masked<P: Pusher>(list: PushExprListAttrs<P>, mask: u8) -> PushExprListAttrs<P> {
    let bitwise = list.nested_elem().nested_data_bitwise();
    let bitwise = bitwise.push_sreg(REGISTER).push_dreg(REGISTER).push_len(1);
    let bitwise = bitwise.nested_mask().push_value(&[mask]).end_nested();
    let bitwise = bitwise.nested_xor().push_value(&[0]).end_nested();
    bitwise.end_nested().end_nested()
}

/// What is known of a packet beside its bytes, into a register.
pub(super) fn meta<P: Pusher>(list: PushExprListAttrs<P>, key: MetaKeys, register: u32) -> PushExprListAttrs<P> {
    let meta = list.nested_elem().nested_data_meta().push_key(key as u32);
    meta.push_dreg(register).end_nested().end_nested()
}

/// Bytes of a packet: after `base`, from `offset` on, `len` of them, into a register.
pub(super) fn load<P: Pusher>(
    list: PushExprListAttrs<P>,
    base: PayloadBase,
    (offset, len): (u32, u32),
    register: u32,
) -> PushExprListAttrs<P> {
    let load = list.nested_elem().nested_data_payload().push_dreg(register);
    load.push_base(base as u32)
        .push_offset(offset)
        .push_len(len)
        .end_nested()
        .end_nested()
}

fn equals<P: Pusher>(list: PushExprListAttrs<P>, value: &[u8]) -> PushExprListAttrs<P> {
    compare(list, CmpOps::Eq, value)
}

/// Goes on where [`REGISTER`] compares so.
fn compare<P: Pusher>(list: PushExprListAttrs<P>, how: CmpOps, value: &[u8]) -> PushExprListAttrs<P> {
    let cmp = list
        .nested_elem()
        .nested_data_cmp()
        .push_sreg(REGISTER)
        .push_op(how as u32);
    cmp.nested_data()
        .push_value(value)
        .end_nested()
        .end_nested()
        .end_nested()
}
