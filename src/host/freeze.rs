//! Keeps neighbours on a bridge from taking a container's MAC or IPv4 address: rules of the bridge family that take either
//! from its own port only.
//!
//! A bridge believes what a frame says of its sender (it learns where a MAC is), and so does everybody who hears an ARP. So a
//! neighbour with `NET_RAW` has answers sent to itself. With these rules such frames do not get in. The table is *owned*: it
//! goes with the daemon, and nothing stale stays behind on anybody's bridge.
//!
//! ```text
//! table bridge imds_router {
//!     flags owner
//!     chain pre {
//!         type filter hook prerouting priority -300; policy accept;
//!         ether saddr @macs iif . ether saddr != @ports drop
//!         ether type arp arp saddr ip @addresses iif . arp saddr ip != @holders drop
//!     }
//! }
//! ```

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use netlink_bindings::nftables::{
    Chained, CmpOps, MetaKeys, Nfgenmsg, PayloadBase, PushExprListAttrs, PushSetelemListAttrs, Registers, TableFlags,
    VerdictCode,
};
use netlink_bindings::utils::Pusher;
use rustix::io::Errno;

use super::kernel::{Kernel, is};
use super::tables::{self, meta};
use super::{HostError, RULES_TABLE};

/// linux/netfilter.h, NFPROTO_BRIDGE.
const BRIDGE: u8 = 7;
/// NF_BR_PRE_ROUTING and NF_BR_PRI_NAT_DST_BRIDGED (linux/netfilter_bridge.h): before the bridge learns anything.
const PREROUTING: u32 = 0;
const PRIORITY: i32 = -300;
/// Registers of 32 bits (linux/netfilter/nf_tables.h): a key of two parts begins in the first and goes on in the second.
const FIRST: u32 = Registers::Reg3200 as u32;
const SECOND: u32 = Registers::Reg3201 as u32;
/// NFT_LOOKUP_F_INV: goes on where the key is *not* in the set.
const INVERTED: u32 = 1;
/// linux/if_ether.h, ETH_P_ARP.
const ETH_P_ARP: u16 = 0x0806;
/// Where struct ethhdr (linux/if_ether.h) has the sender's MAC, and an ARP of Ethernet and IPv4 (RFC 826) its address, in bytes.
const ETHER_SADDR: u32 = 6;
const ARP_SADDR_IP: u32 = 14;
/// Elements a message: well below the 64 KiB that an attribute can have.
const ELEMENTS: usize = 500;

/// A set: its name, the length of its key in bytes, and the type by which `nft` shows it (libnftables `datatype.h`:
/// ether_addr 9, ipv4_addr 7, iface_index 20; parts by six bits).
struct Set {
    name: &'static str,
    key: u32,
    shown: u32,
}

const MACS: Set = Set {
    name: "macs",
    key: 6,
    shown: 9,
};
const PORTS: Set = Set {
    name: "ports",
    key: 12,
    shown: 20 << 6 | 9,
};
const ADDRESSES: Set = Set {
    name: "addresses",
    key: 4,
    shown: 7,
};
const HOLDERS: Set = Set {
    name: "holders",
    key: 8,
    shown: 20 << 6 | 7,
};
const SETS: [Set; 4] = [MACS, PORTS, ADDRESSES, HOLDERS];

/// Who may say what on the bridges of this host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// MACs, each with a bridge port (interface number) that may send with it.
    pub macs: BTreeSet<([u8; 6], u32)>,
    /// Addresses, each with a bridge port that may claim it.
    pub addresses: BTreeSet<(Ipv4Addr, u32)>,
    /// Addresses that no port may claim: those of the bridges themselves.
    pub nobodys: BTreeSet<Ipv4Addr>,
}

impl Held {
    /// The elements of each of [`SETS`].
    fn elements(&self) -> [BTreeSet<Vec<u8>>; 4] {
        let with_port = |port: u32, value: &[u8]| {
            let mut key = port.to_ne_bytes().to_vec();
            key.extend(value);
            // A part fills whole registers.
            key.resize(key.len().next_multiple_of(4), 0);
            key
        };
        let addresses = self.addresses.iter().map(|(address, _)| address);
        [
            self.macs.iter().map(|(mac, _)| mac.to_vec()).collect(),
            self.macs.iter().map(|(mac, port)| with_port(*port, mac)).collect(),
            addresses
                .chain(&self.nobodys)
                .map(|address| address.octets().to_vec())
                .collect(),
            self.addresses
                .iter()
                .map(|(address, port)| with_port(*port, &address.octets()))
                .collect(),
        ]
    }
}

/// The rules, up. They go when this is dropped.
pub struct Frozen {
    kernel: Kernel,
    held: Held,
}

impl Frozen {
    /// Puts the rules up, with nothing held yet.
    ///
    /// # Errors
    /// When the kernel has no rules for bridges, or somebody else has this table.
    pub fn up() -> Result<Self, HostError> {
        let (mut kernel, _) = Kernel::open()?;
        let attempt = format!("add table bridge {RULES_TABLE}");
        kernel.batch(put).map_err(|error| match error {
            error if is(&error, &[Errno::EXIST, Errno::PERM]) => HostError::failed(&attempt, error),
            error => HostError::nft(&attempt, error),
        })?;
        Ok(Self {
            kernel,
            held: Held::default(),
        })
    }

    /// Replaces who may say what.
    ///
    /// # Errors
    /// When the kernel refuses; then what held before holds.
    pub fn hold(&mut self, held: Held) -> Result<(), HostError> {
        if held == self.held {
            return Ok(());
        }
        let (before, after) = (self.held.elements(), held.elements());
        let changed = self.kernel.batch(|batch| {
            for (set, (before, after)) in SETS.iter().zip(before.iter().zip(&after)) {
                let gone: Vec<_> = before.difference(after).collect();
                let new: Vec<_> = after.difference(before).collect();
                // Who is known by now may speak before others may not.
                new.chunks(ELEMENTS).for_each(|some| add(batch, set, some));
                gone.chunks(ELEMENTS).for_each(|some| remove(batch, set, some));
            }
        });
        changed.map_err(|error| HostError::failed(&format_args!("change table bridge {RULES_TABLE}"), error))?;
        self.held = held;
        Ok(())
    }

    /// Takes the rules away.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn down(mut self) -> Result<(), HostError> {
        let gone = self.kernel.batch(|batch| {
            let mut request = batch.request().op_deltable_do(&bridge());
            request.encode().push_name_bytes(RULES_TABLE.as_bytes());
        });
        gone.map_err(|error| HostError::failed(&format_args!("remove table bridge {RULES_TABLE}"), error))
    }
}

fn bridge() -> Nfgenmsg {
    Nfgenmsg {
        nfgen_family: BRIDGE,
        ..Nfgenmsg::new()
    }
}

fn put(batch: &mut Chained<'static>) {
    let table = RULES_TABLE.as_bytes();
    let mut request = batch.request().set_create().set_excl().op_newtable_do(&bridge());
    request
        .encode()
        .push_name_bytes(table)
        .push_flags(TableFlags::Owner as u32);
    for (id, set) in (1..).zip(&SETS) {
        let mut request = batch.request().set_create().op_newset_do(&bridge());
        request
            .encode()
            .push_table_bytes(table)
            .push_name_bytes(set.name.as_bytes())
            .push_flags(0)
            .push_key_type(set.shown)
            .push_key_len(set.key)
            .push_id(id);
    }
    let mut request = batch.request().set_create().op_newchain_do(&bridge());
    let chain = request.encode().push_table_bytes(table).push_name_bytes(b"pre");
    let hook = chain.nested_hook().push_num(PREROUTING).push_priority(PRIORITY);
    hook.end_nested()
        .push_type(c"filter")
        .push_policy(VerdictCode::Accept as u32);
    for said in [Said::Mac, Said::ArpAddress] {
        let request = batch.request().set_create().set_append().op_newrule_do(&bridge());
        let rule = request.into_encoder().push_table_bytes(table).push_chain_bytes(b"pre");
        push_rule(rule.nested_expressions(), said);
    }
}

/// What a frame says of its sender.
#[derive(Clone, Copy)]
enum Said {
    Mac,
    ArpAddress,
}

/// Drops what somebody holds and this port does not.
fn push_rule<P: Pusher>(mut list: PushExprListAttrs<P>, said: Said) {
    let (known, allowed) = match said {
        Said::Mac => (MACS, PORTS),
        Said::ArpAddress => (ADDRESSES, HOLDERS),
    };
    if matches!(said, Said::ArpAddress) {
        list = meta(list, MetaKeys::Protocol, FIRST);
        let is_arp = list.nested_elem().nested_data_cmp().push_sreg(FIRST);
        let is_arp = is_arp.push_op(CmpOps::Eq as u32).nested_data();
        list = is_arp
            .push_value(&ETH_P_ARP.to_be_bytes())
            .end_nested()
            .end_nested()
            .end_nested();
    }
    list = lookup(load(list, said, FIRST), &known, 0);
    list = load(meta(list, MetaKeys::Iif, FIRST), said, SECOND);
    list = lookup(list, &allowed, INVERTED);
    let verdict = list.nested_elem().nested_data_immediate();
    verdict
        .push_dreg(Registers::RegVerdict as u32)
        .nested_data()
        .nested_verdict()
        .push_code(VerdictCode::Drop as u32);
}

fn load<P: Pusher>(list: PushExprListAttrs<P>, said: Said, register: u32) -> PushExprListAttrs<P> {
    match said {
        Said::Mac => tables::load(list, PayloadBase::LinkLayerHeader, (ETHER_SADDR, 6), register),
        Said::ArpAddress => tables::load(list, PayloadBase::NetworkHeader, (ARP_SADDR_IP, 4), register),
    }
}

fn lookup<P: Pusher>(list: PushExprListAttrs<P>, set: &Set, flags: u32) -> PushExprListAttrs<P> {
    let lookup = list.nested_elem().nested_data_lookup();
    lookup
        .push_set_bytes(set.name.as_bytes())
        // The crate's numbers for this expression are shifted: to the kernel 2 is NFTA_LOOKUP_SREG
        // (linux/netfilter/nf_tables.h), and 4 the set's id.
        .push_set_id(FIRST)
        .push_flags(flags)
        .end_nested()
        .end_nested()
}

fn add(batch: &mut Chained<'static>, set: &Set, keys: &[&Vec<u8>]) {
    let request = batch.request().set_create().op_newsetelem_do(&bridge());
    push_elements(request.into_encoder(), set, keys);
}

fn remove(batch: &mut Chained<'static>, set: &Set, keys: &[&Vec<u8>]) {
    let request = batch.request().op_delsetelem_do(&bridge());
    push_elements(request.into_encoder(), set, keys);
}

fn push_elements<P: Pusher>(list: PushSetelemListAttrs<P>, set: &Set, keys: &[&Vec<u8>]) {
    let list = list
        .push_table_bytes(RULES_TABLE.as_bytes())
        .push_set_bytes(set.name.as_bytes());
    let mut elements = list.nested_elements();
    for key in keys {
        let element = elements.nested_elem().nested_key().push_value(key);
        elements = element.end_nested().end_nested();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_fill_whole_registers() {
        let held = Held {
            macs: [([1, 2, 3, 4, 5, 6], 7)].into(),
            addresses: [([10, 0, 0, 2].into(), 7)].into(),
            nobodys: [[10, 0, 0, 1].into()].into(),
        };
        let [macs, ports, addresses, holders] = held.elements();
        let port = 7_u32.to_ne_bytes();
        assert_eq!(macs, [vec![1, 2, 3, 4, 5, 6]].into());
        assert_eq!(ports, [[&port[..], &[1, 2, 3, 4, 5, 6, 0, 0]].concat()].into());
        assert_eq!(addresses, [vec![10, 0, 0, 1], vec![10, 0, 0, 2]].into());
        assert_eq!(holders, [[&port[..], &[10, 0, 0, 2]].concat()].into());
        for (set, keys) in SETS.iter().zip(held.elements()) {
            assert!(keys.iter().all(|key| key.len() == set.key as usize), "{}", set.name);
        }
    }
}
