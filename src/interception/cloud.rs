//! Whether this host is a machine of a cloud, and so has a metadata service of its own: by what its firmware says of it (DMI).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use super::{Action, Family, Hook, Part, Plan, Rule};
use crate::files;

/// The addresses of EC2's metadata service, and of what ECS and EKS have beside it (EC2 user guide, "Access instance metadata";
/// ECS developer guide, "Task IAM role"; EKS user guide, "EKS Pod Identity").
const EVERYWHERE: [IpAddr; 5] = [
    IMDS,
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 2)),
    IpAddr::V4(Ipv4Addr::new(169, 254, 170, 23)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23)),
];
const IMDS: IpAddr = IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254));

/// Somebody whose machines have a metadata service.
#[derive(Debug)]
struct Vendor {
    name: &'static str,
    /// How its machines are known: a file of `/sys/class/dmi/id`, and what is in it. As cloud-init knows them (`tools/ds-identify`).
    signs: &'static [(&'static str, &'static str)],
    /// Where its service is, beside [`EVERYWHERE`].
    also: &'static [IpAddr],
    /// At which of these addresses machines ask for names.
    resolvers: &'static [IpAddr],
    /// Services that share an address with something that containers need: only connections to these TCP ports are rejected.
    ports: &'static [(IpAddr, u16)],
}

const fn vendor(name: &'static str, signs: &'static [(&'static str, &'static str)]) -> Vendor {
    Vendor {
        name,
        signs,
        also: &[],
        resolvers: &[],
        ports: &[],
    }
}

const EC2: &str = "EC2";

/// GCE's metadata service over IPv6 (Compute Engine documentation, "About VM metadata").
const GCE_IPV6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254));
/// Oracle's.
const ORACLE_IPV6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe));
/// Azure's WireServer gives a machine its configuration and certificates, at TCP ports 80 and 32526. The same address resolves names
/// (port 53) and is the source of a load balancer's health probes, whose answers pass through this host (Microsoft, "What is
/// IP address 168.63.129.16?").
const WIRE_SERVER: IpAddr = IpAddr::V4(Ipv4Addr::new(168, 63, 129, 16));

const VENDORS: &[Vendor] = &[
    // On Xen the version of its firmware is all that says so.
    vendor(
        EC2,
        &[
            ("sys_vendor", "Amazon EC2"),
            ("bios_vendor", "Amazon EC2"),
            ("bios_version", "amazon"),
        ],
    ),
    Vendor {
        also: &[GCE_IPV6],
        resolvers: &[IMDS, GCE_IPV6],
        ..vendor(
            "Google Compute Engine",
            &[
                ("product_name", "Google Compute Engine"),
                ("product_serial", "GoogleCloud-"),
            ],
        )
    },
    Vendor {
        ports: &[(WIRE_SERVER, 80), (WIRE_SERVER, 32_526)],
        ..vendor("Azure", &[("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77")])
    },
    Vendor {
        also: &[ORACLE_IPV6],
        resolvers: &[IMDS, ORACLE_IPV6],
        ..vendor("Oracle Cloud", &[("chassis_asset_tag", "OracleCloud.com")])
    },
    Vendor {
        also: &[IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200))],
        ..vendor(
            "Alibaba Cloud",
            &[("sys_vendor", "Alibaba Cloud"), ("product_name", "Alibaba Cloud ECS")],
        )
    },
    vendor(
        "OpenStack",
        &[
            ("product_name", "OpenStack"),
            ("sys_vendor", "OpenStack"),
            ("chassis_asset_tag", "OpenTelekomCloud"),
            ("chassis_asset_tag", "HUAWEICLOUD"),
            ("chassis_asset_tag", "SAP CCloud VM"),
        ],
    ),
    vendor("DigitalOcean", &[("sys_vendor", "DigitalOcean")]),
    vendor("Hetzner Cloud", &[("sys_vendor", "Hetzner")]),
    vendor("Huawei Cloud", &[("sys_vendor", "Huawei Cloud")]),
    vendor("Akamai", &[("sys_vendor", "Linode"), ("sys_vendor", "Akamai")]),
    vendor("Vultr", &[("sys_vendor", "Vultr")]),
    vendor("UpCloud", &[("sys_vendor", "UpCloud")]),
    vendor("Exoscale", &[("product_name", "Exoscale")]),
    vendor("CloudStack", &[("product_name", "CloudStack")]),
    Vendor {
        also: &[IpAddr::V4(Ipv4Addr::new(169, 254, 0, 23))],
        ..vendor("Tencent Cloud", &[("sys_vendor", "Tencent Cloud")])
    },
    Vendor {
        also: &[
            IpAddr::V4(Ipv4Addr::new(169, 254, 42, 42)),
            IpAddr::V6(Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42)),
        ],
        ..vendor("Scaleway", &[("sys_vendor", "Scaleway")])
    },
];

/// More than the firmware says in one file.
const MAX_BYTES: u64 = 64 * 1024;

/// A cloud that this host is a machine of.
#[derive(Clone, Copy, Debug)]
pub struct Cloud {
    vendor: &'static Vendor,
    sign: (&'static str, &'static str),
}

impl Cloud {
    /// What the files in `dmi` (`/sys/class/dmi/id`) say. What cannot be read says nothing.
    pub fn find(dmi: &Path) -> Option<Self> {
        let is =
            |(file, text): (&str, &str)| files::read(&dmi.join(file), MAX_BYTES).is_ok_and(|it| contains(&it, text));
        VENDORS.iter().find_map(|vendor| {
            let sign = vendor.signs.iter().find(|sign| is(**sign))?;
            Some(Self { vendor, sign: *sign })
        })
    }

    /// Whether it is EC2, whose service this daemon can ask.
    pub fn is_ec2(&self) -> bool {
        self.vendor.name == EC2
    }
}

impl fmt::Display for Cloud {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, text) = self.sign;
        write!(f, "{} (firmware, {file}: {text})", self.vendor.name)
    }
}

/// Where a host may have metadata services, of one family, and which of these names are asked of.
pub fn services(of: Option<Cloud>, ipv4: bool) -> (Vec<IpAddr>, Vec<IpAddr>) {
    let vendor = of.map(|cloud| cloud.vendor);
    let also = vendor.map_or(&[][..], |vendor| vendor.also);
    let resolvers = vendor.map_or(&[][..], |vendor| vendor.resolvers);
    let of_family = |addresses: &[IpAddr]| -> Vec<IpAddr> {
        let addresses = addresses.iter().copied();
        addresses.filter(|address| address.is_ipv4() == ipv4).collect()
    };
    let mut all = of_family(&EVERYWHERE);
    all.extend(of_family(also));
    (all, of_family(resolvers))
}

/// The same plan, which also rejects connections that pass through this host to the vendor's other services: those that share
/// an address with something that containers need, so that the whole address cannot be rejected.
pub fn and_rejecting_ports(mut plan: Plan, of: Option<Cloud>) -> Plan {
    let ports = of.map_or(&[][..], |cloud| cloud.vendor.ports);
    let family = plan.family();
    let ports = ports.iter().filter(|(address, _)| Family::of(*address) == family);
    let rules = ports.map(|(address, port)| Rule::to(*address, Some(*port), Action::Reset));
    let chains = plan.parts.iter_mut().filter_map(|part| match part {
        Part::Table(table) if !table.owned => Some(&mut table.chains),
        _ => None,
    });
    if let Some(chain) = chains.flatten().find(|chain| chain.hook == Hook::Forward) {
        chain.rules.extend(rules);
    }
    plan
}

fn contains(text: &[u8], part: &str) -> bool {
    text.windows(part.len()).any(|window| window == part.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Option<Cloud> {
        let dmi = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dmi.path().join(name), format!("{text}\n")).unwrap();
        }
        Cloud::find(dmi.path())
    }

    #[test]
    fn clouds_are_known_by_their_firmware() {
        for (files, said) in [
            (
                &[("sys_vendor", "Amazon EC2"), ("product_name", "m7i.large")][..],
                "EC2 (firmware, sys_vendor: Amazon EC2)",
            ),
            (
                &[("sys_vendor", "Xen"), ("bios_version", "4.11.amazon")],
                "EC2 (firmware, bios_version: amazon)",
            ),
            (
                &[("sys_vendor", "Google"), ("product_name", "Google Compute Engine")],
                "Google Compute Engine (firmware, product_name: Google Compute Engine)",
            ),
            (
                &[
                    ("sys_vendor", "Microsoft Corporation"),
                    ("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77"),
                ],
                "Azure (firmware, chassis_asset_tag: 7783-7084-3265-9085-8269-3286-77)",
            ),
            (
                &[("product_name", "OpenStack Nova")],
                "OpenStack (firmware, product_name: OpenStack)",
            ),
            (
                &[("sys_vendor", "QEMU"), ("chassis_asset_tag", "OracleCloud.com")],
                "Oracle Cloud (firmware, chassis_asset_tag: OracleCloud.com)",
            ),
            (
                &[("sys_vendor", "Alibaba Cloud")],
                "Alibaba Cloud (firmware, sys_vendor: Alibaba Cloud)",
            ),
        ] {
            assert_eq!(found(files).map(|cloud| cloud.to_string()).as_deref(), Some(said));
        }
    }

    #[test]
    fn other_machines_are_none() {
        for files in [
            &[][..],
            &[("sys_vendor", "LENOVO"), ("product_name", "20XW")],
            // A laptop, and a virtual machine of one's own.
            &[("sys_vendor", "Google"), ("product_name", "Eve")],
            &[
                ("sys_vendor", "Microsoft Corporation"),
                ("product_name", "Virtual Machine"),
            ],
            &[
                ("sys_vendor", "QEMU"),
                ("product_name", "Standard PC (Q35 + ICH9, 2009)"),
            ],
        ] {
            assert!(found(files).is_none(), "{files:?}");
        }
        assert!(Cloud::find(Path::new("/nonexistent")).is_none());
    }

    #[test]
    fn what_is_asked_for_names_goes_on_answering_them() {
        let google = found(&[("product_name", "Google Compute Engine")]);
        let (addresses, resolvers) = services(google, true);
        assert_eq!(addresses.len(), 3);
        assert_eq!(resolvers, [IMDS]);
        let (addresses, resolvers) = services(google, false);
        assert_eq!((addresses.len(), resolvers), (3, addresses[2..].to_vec()));
        assert_eq!(services(None, true), (EVERYWHERE[..3].to_vec(), Vec::new()));
        assert_eq!(services(found(&[("sys_vendor", "Alibaba Cloud")]), true).0.len(), 4);
        let oracle = found(&[("chassis_asset_tag", "OracleCloud.com")]);
        assert_eq!(services(oracle, true).1, [IMDS]);
        assert_eq!(services(oracle, false).1, [ORACLE_IPV6]);
    }

    #[test]
    fn azure_rejects_wire_server_and_not_its_resolver() {
        let azure = found(&[("chassis_asset_tag", "7783-7084-3265-9085-8269-3286-77")]);
        let (addresses, resolvers) = services(azure, true);
        assert_eq!((addresses.as_slice(), resolvers), (&EVERYWHERE[..3], Vec::new()));
        let plain = Plan::rejecting(&addresses, &[]);
        let guard = |plan: &Plan| match &plan.parts()[0] {
            Part::Table(table) => table.to_string(),
            part => panic!("{part} is not the guard"),
        };
        let plan = and_rejecting_ports(plain.clone(), azure);
        let text = guard(&plan);
        let added = "\t\tip daddr 168.63.129.16 tcp dport 80 reject with tcp reset\n\
            \t\tip daddr 168.63.129.16 tcp dport 32526 reject with tcp reset\n";
        assert!(text.contains(added), "{text}");
        assert_eq!(text.replace(added, ""), guard(&plain));
        // Other vendors, and the other family, have no such ports.
        let google = found(&[("product_name", "Google Compute Engine")]);
        assert_eq!(guard(&and_rejecting_ports(plain.clone(), google)), guard(&plain));
        let ipv6 = Plan::rejecting(&services(azure, false).0, &[]);
        assert_eq!(guard(&and_rejecting_ports(ipv6.clone(), azure)), guard(&ipv6));
    }
}
