//! The categories of metadata, as one table: the path, how its value is derived, and when there is none. Listings, what an
//! override may name, and what a crawl must find follow from it.
//!
//! Categories and formats are those of EC2's user guide ("Instance metadata categories"). What EC2 makes up when it launches
//! an instance (ids of links, subnets, reservations) is made of what the engine made up: the same container, network or
//! project has the same id everywhere.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use bytes::Bytes;
use sha2::{Digest as _, Sha256};

use super::identity_document::{self, SignatureFormat};
use super::{InstanceView, Node, document, zones};
use crate::clock::rfc3339_seconds;
use crate::credentials::{RoleArn, domain_of};

/// All that the tree is derived from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// The container's id.
    pub container: String,
    /// `i-…`
    pub instance_id: String,
    /// `ami-…`
    pub ami_id: String,
    /// `t3.micro`
    pub instance_type: String,
    /// The container's hostname.
    pub hostname: String,
    /// Its links, that of the default route first.
    pub links: Vec<Link>,
    /// Region.
    pub region: String,
    /// Availability zone.
    pub zone: String,
    /// `aws`, `aws-cn`, `aws-us-gov`.
    pub partition: String,
    /// The account of its role, else of the base credentials.
    pub account: String,
    /// Its role, if it has one.
    pub role: Option<RoleArn>,
    /// When it started.
    pub started: SystemTime,
    /// What was launched together with it: a compose project.
    pub project: Option<String>,
    /// Which of the containers launched together it is, from 0.
    pub launch_index: u32,
    /// Its tags, if it may see them.
    pub tags: Option<BTreeMap<String, String>>,
    /// Public keys: name and key.
    pub public_keys: Vec<(String, String)>,
    /// What was given to it at launch.
    pub user_data: Option<Bytes>,
    /// What is told of events, by path.
    pub events: BTreeMap<String, String>,
    /// Values that take the place of what is derived, or are there where nothing is: by path, checked by [`known`].
    pub overrides: BTreeMap<String, String>,
}

/// A link of a container: what EC2 calls a network interface.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Id of the network.
    pub network: String,
    /// Its name.
    pub name: String,
    /// MAC address, in lower case.
    pub mac: String,
    /// IPv4 address and the length of its subnet's prefix.
    pub ipv4: Option<(Ipv4Addr, u8)>,
    /// IPv6 address and the length of its subnet's prefix.
    pub ipv6: Option<(Ipv6Addr, u8)>,
}

impl Link {
    fn subnet_ipv4(&self) -> Option<String> {
        let (address, prefix) = self.ipv4?;
        let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
        Some(format!("{}/{prefix}", Ipv4Addr::from_bits(address.to_bits() & mask)))
    }

    fn subnet_ipv6(&self) -> Option<String> {
        let (address, prefix) = self.ipv6?;
        let mask = u128::MAX.checked_shl(128 - u32::from(prefix.min(128))).unwrap_or(0);
        Some(format!("{}/{prefix}", Ipv6Addr::from_bits(address.to_bits() & mask)))
    }
}

impl Facts {
    fn first(&self) -> Option<&Link> {
        self.links.first()
    }
}

/// How a value is derived. `None`, or nothing: it does not exist for this container, and is not listed.
enum How {
    /// One value.
    One(fn(&Facts) -> Option<String>),
    /// One for each link; the path has [`MAC`].
    Link(fn(&Facts, usize, &Link) -> Option<String>),
    /// One for each of several names; the path ends with [`ANY`], or has it inside.
    Each(fn(&Facts) -> Vec<(String, String)>),
    /// Only where it is given: a container has nothing of this kind.
    Given,
    /// By the server, from what the container's role is.
    Role,
    /// From the other values, once they are settled.
    Identity,
}

/// What a path says in place of a MAC address: that of each link. In an override, that of the first.
pub const MAC: &str = "{mac}";
/// What a path says in place of a name or a number.
const ANY: &str = "{}";

/// One category.
struct Category {
    path: &'static str,
    how: How,
    /// Several values, one a line.
    lines: bool,
}

const fn one(path: &'static str, value: fn(&Facts) -> Option<String>) -> Category {
    Category {
        path,
        how: How::One(value),
        lines: false,
    }
}

const fn link(path: &'static str, value: fn(&Facts, usize, &Link) -> Option<String>) -> Category {
    Category {
        path,
        how: How::Link(value),
        lines: false,
    }
}

const fn each(path: &'static str, values: fn(&Facts) -> Vec<(String, String)>) -> Category {
    Category {
        path,
        how: How::Each(values),
        lines: false,
    }
}

const fn given(path: &'static str) -> Category {
    Category {
        path,
        how: How::Given,
        lines: false,
    }
}

const fn role(path: &'static str) -> Category {
    Category {
        path,
        how: How::Role,
        lines: false,
    }
}

const fn signed(path: &'static str) -> Category {
    Category {
        path,
        how: How::Identity,
        lines: false,
    }
}

impl Category {
    const fn lines(mut self) -> Self {
        self.lines = true;
        self
    }
}

/// Everything that EC2 documents.
const CATEGORIES: &[Category] = &[
    one("meta-data/ami-id", |f| Some(f.ami_id.clone())),
    one("meta-data/ami-launch-index", |f| Some(f.launch_index.to_string())),
    // What EC2 says of images that are no files in S3.
    one("meta-data/ami-manifest-path", |_| Some("(unknown)".to_owned())),
    given("meta-data/ancestor-ami-ids").lines(),
    given("meta-data/autoscaling/target-lifecycle-state"),
    one("meta-data/block-device-mapping/ami", |_| Some(ROOT_DEVICE.to_owned())),
    given("meta-data/block-device-mapping/ebs{}"),
    given("meta-data/block-device-mapping/ephemeral{}"),
    one("meta-data/block-device-mapping/root", |_| Some(ROOT_DEVICE.to_owned())),
    given("meta-data/block-device-mapping/swap"),
    given("meta-data/elastic-gpus/associations/{}"),
    given("meta-data/elastic-inference/associations/{}"),
    one("meta-data/events/maintenance/history", |_| Some("[]".to_owned())).lines(),
    one("meta-data/events/maintenance/scheduled", |_| Some("[]".to_owned())).lines(),
    given("meta-data/events/recommendations/rebalance"),
    one("meta-data/hibernation/configured", |_| Some("false".to_owned())),
    one("meta-data/hostname", |f| Some(f.hostname.clone())),
    role("meta-data/iam/info"),
    role("meta-data/iam/security-credentials/{}"),
    one("meta-data/instance-action", |_| Some("none".to_owned())),
    one("meta-data/instance-id", |f| Some(f.instance_id.clone())),
    one("meta-data/instance-life-cycle", |_| Some("on-demand".to_owned())),
    one("meta-data/instance-type", |f| Some(f.instance_type.clone())),
    one("meta-data/ipv6", |f| {
        f.first()?.ipv6.map(|(address, _)| address.to_string())
    }),
    given("meta-data/kernel-id"),
    one("meta-data/local-hostname", |f| Some(f.hostname.clone())),
    one("meta-data/local-ipv4", |f| {
        f.first()?.ipv4.map(|(address, _)| address.to_string())
    }),
    one("meta-data/mac", |f| Some(f.first()?.mac.clone())),
    link(
        "meta-data/network/interfaces/macs/{mac}/device-number",
        |_, number, _| Some(number.to_string()),
    ),
    link("meta-data/network/interfaces/macs/{mac}/interface-id", |f, _, link| {
        Some(made_id("eni-", &format!("{} {}", f.container, link.network)))
    }),
    given("meta-data/network/interfaces/macs/{mac}/ipv4-associations/{}").lines(),
    given("meta-data/network/interfaces/macs/{mac}/ipv4-prefix").lines(),
    given("meta-data/network/interfaces/macs/{mac}/ipv6-prefix").lines(),
    link("meta-data/network/interfaces/macs/{mac}/ipv6s", |_, _, link| {
        link.ipv6.map(|(address, _)| address.to_string())
    })
    .lines(),
    link("meta-data/network/interfaces/macs/{mac}/local-hostname", |f, _, _| {
        Some(f.hostname.clone())
    }),
    link("meta-data/network/interfaces/macs/{mac}/local-ipv4s", |_, _, link| {
        link.ipv4.map(|(address, _)| address.to_string())
    })
    .lines(),
    link("meta-data/network/interfaces/macs/{mac}/mac", |_, _, link| {
        Some(link.mac.clone())
    }),
    // The guide calls it so; hosts were seen to list the other name as well.
    given("meta-data/network/interfaces/macs/{mac}/network-card"),
    given("meta-data/network/interfaces/macs/{mac}/network-card-index"),
    link("meta-data/network/interfaces/macs/{mac}/owner-id", |f, _, _| {
        Some(f.account.clone())
    }),
    given("meta-data/network/interfaces/macs/{mac}/public-hostname"),
    given("meta-data/network/interfaces/macs/{mac}/public-ipv4s").lines(),
    link(
        "meta-data/network/interfaces/macs/{mac}/security-group-ids",
        |_, _, link| Some(made_id("sg-", &link.network)),
    )
    .lines(),
    link(
        "meta-data/network/interfaces/macs/{mac}/security-groups",
        |_, _, link| Some(link.name.clone()),
    )
    .lines(),
    link("meta-data/network/interfaces/macs/{mac}/subnet-id", |_, _, link| {
        Some(made_id("subnet-", &link.network))
    }),
    link(
        "meta-data/network/interfaces/macs/{mac}/subnet-ipv4-cidr-block",
        |_, _, link| link.subnet_ipv4(),
    ),
    link(
        "meta-data/network/interfaces/macs/{mac}/subnet-ipv6-cidr-blocks",
        |_, _, link| link.subnet_ipv6(),
    )
    .lines(),
    // The engine's networks are apart from each other as VPCs are: each is one, with one subnet.
    link("meta-data/network/interfaces/macs/{mac}/vpc-id", |_, _, link| {
        Some(made_id("vpc-", &link.network))
    }),
    link(
        "meta-data/network/interfaces/macs/{mac}/vpc-ipv4-cidr-block",
        |_, _, link| link.subnet_ipv4(),
    ),
    link(
        "meta-data/network/interfaces/macs/{mac}/vpc-ipv4-cidr-blocks",
        |_, _, link| link.subnet_ipv4(),
    )
    .lines(),
    link(
        "meta-data/network/interfaces/macs/{mac}/vpc-ipv6-cidr-blocks",
        |_, _, link| link.subnet_ipv6(),
    )
    .lines(),
    one(ZONE, |f| Some(f.zone.clone())),
    one("meta-data/placement/availability-zone-id", |f| zones::id(&f.zone)),
    given("meta-data/placement/group-name"),
    given("meta-data/placement/host-id"),
    given("meta-data/placement/partition-number"),
    one(REGION, |f| Some(f.region.clone())),
    given("meta-data/product-codes").lines(),
    one("meta-data/profile", |_| Some("default-hvm".to_owned())),
    given("meta-data/public-hostname"),
    given("meta-data/public-ipv4"),
    each("meta-data/public-keys/{}/openssh-key", |f| {
        let keys = f.public_keys.iter().enumerate();
        keys.map(|(number, (_, key))| (number.to_string(), key.clone()))
            .collect()
    }),
    given("meta-data/ramdisk-id"),
    one("meta-data/reservation-id", |f| {
        Some(made_id("r-", f.project.as_ref().unwrap_or(&f.container)))
    }),
    one("meta-data/security-groups", |f| {
        let names: Vec<_> = f.links.iter().map(|link| link.name.as_str()).collect();
        Some(if names.is_empty() {
            "default".to_owned()
        } else {
            names.join("\n")
        })
    })
    .lines(),
    one("meta-data/services/domain", |f| {
        Some(domain_of(&f.partition).to_owned())
    }),
    one("meta-data/services/partition", |f| Some(f.partition.clone())),
    given("meta-data/spot/instance-action"),
    given("meta-data/spot/termination-time"),
    one("meta-data/system", |_| Some("nitro".to_owned())),
    each("meta-data/tags/instance/{}", |f| {
        f.tags
            .iter()
            .flatten()
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    }),
    one("dynamic/fws/instance-monitoring", |_| Some("disabled".to_owned())),
    signed("dynamic/instance-identity/document"),
    signed("dynamic/instance-identity/pkcs7"),
    signed("dynamic/instance-identity/rsa2048"),
    signed("dynamic/instance-identity/signature"),
];

/// Where the region stands.
pub const REGION: &str = "meta-data/placement/region";
/// Where the availability zone stands.
pub const ZONE: &str = "meta-data/placement/availability-zone";
/// Where public keys stand, listed with their names.
pub const PUBLIC_KEYS: &str = "meta-data/public-keys";
/// Where links stand.
pub const MACS: &str = "meta-data/network/interfaces/macs/";
/// Where tags stand.
pub const TAGS: &str = "meta-data/tags/instance/";
/// Where user data stands.
pub const USER_DATA: &str = "user-data";
/// What the root of an instance of Amazon Linux is.
const ROOT_DEVICE: &str = "/dev/xvda";

/// Where the role is listed; its credentials stand below.
pub const ROLE_LIST: &str = "meta-data/iam/security-credentials";
/// Where everything that a role decides stands.
pub const IAM: &str = "meta-data/iam";

fn iam_info(role: &RoleArn, started: SystemTime) -> String {
    document(&[
        ("Code", "Success"),
        ("LastUpdated", &rfc3339_seconds(started)),
        ("InstanceProfileArn", &role.instance_profile()),
        ("InstanceProfileId", &instance_profile_id(role)),
    ])
}

/// An id in EC2's form: the prefix and 17 hexadecimal digits, of a seed: the same seed has the same id.
pub fn made_id(prefix: &str, seed: &str) -> String {
    let digest = Sha256::new().chain_update(prefix).chain_update(seed).finalize();
    let digits: String = digest.iter().take(9).map(|byte| format!("{byte:02x}")).collect();
    format!("{prefix}{}", &digits[..17])
}

/// Ids of instance profiles are `AIPA` and 17 characters of base32; ours follows from the role, so that it is stable.
fn instance_profile_id(role: &RoleArn) -> String {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let digest = Sha256::digest(role.to_string());
    let tail = digest
        .iter()
        .take(17)
        .map(|byte| char::from(letters[usize::from(byte % 32)]));
    "AIPA".chars().chain(tail).collect()
}

/// Why a path cannot be given a value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PathError {
    /// There is no such category.
    #[error("there is no such category")]
    Unknown,
    /// It is a directory.
    #[error("that is a directory: expected the path of one value below it")]
    Directory,
    /// It follows from the role, or from the other values.
    #[error("that follows from the role and the other values, and cannot be given")]
    Derived,
    /// The value is none.
    #[error("expected text without control characters, and not empty")]
    Value,
}

/// Checks that `value` can be given at `path` (`meta-data/instance-type`).
///
/// # Errors
/// Why not.
pub fn known(path: &str, value: &str) -> Result<(), PathError> {
    const CLOSED: [&str; 2] = ["meta-data/iam", "meta-data/identity-credentials"];
    let below = |it: &str| {
        path.strip_prefix(it)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    if CLOSED.into_iter().any(below) {
        return Err(PathError::Derived);
    }
    let parts: Vec<_> = path.split('/').collect();
    let fits = |category: &&Category, length: usize| {
        let pattern: Vec<_> = category.path.split('/').collect();
        pattern.len().cmp(&parts.len()) == length.cmp(&parts.len())
            && pattern
                .iter()
                .zip(&parts)
                .all(|(pattern, part)| part_fits(pattern, part))
    };
    match CATEGORIES.iter().find(|it| fits(it, parts.len())) {
        Some(Category {
            how: How::Role | How::Identity,
            ..
        }) => Err(PathError::Derived),
        Some(category) => {
            let control = |c: char| c.is_control() && !(c == '\n' && category.lines);
            let bad = value.is_empty() || value.contains(control) || value.ends_with('\n');
            if bad { Err(PathError::Value) } else { Ok(()) }
        }
        None if CATEGORIES.iter().any(|it| fits(&it, parts.len() + 1)) => Err(PathError::Directory),
        None => Err(PathError::Unknown),
    }
}

fn part_fits(pattern: &str, part: &str) -> bool {
    if pattern == MAC {
        return part == MAC || is_mac(part);
    }
    match pattern.strip_suffix(ANY) {
        Some("") => !part.is_empty() && !part.contains(char::is_control),
        Some(prefix) => part
            .strip_prefix(prefix)
            .is_some_and(|number| !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit())),
        None => pattern == part,
    }
}

/// Whether `text` is a MAC address as EC2 writes it.
fn is_mac(text: &str) -> bool {
    let mut parts = 0;
    text.split(':').all(|part| {
        parts += 1;
        part.len() == 2 && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }) && parts == 6
}

/// The paths of all categories, for "did you mean".
pub fn paths() -> impl Iterator<Item = &'static str> {
    CATEGORIES.iter().map(|category| category.path)
}

/// Public keys are listed with their names: `0=me`.
fn listed_keys(values: &BTreeMap<String, String>, facts: &Facts) -> Vec<String> {
    let below = format!("{PUBLIC_KEYS}/");
    let keys = values
        .iter()
        .filter_map(|(path, key)| Some((path.strip_prefix(&below)?.split('/').next()?, key)));
    keys.map(|(number, key)| {
        let named = number
            .parse()
            .ok()
            .and_then(|number: usize| facts.public_keys.get(number));
        let name = named.map(|(name, _)| name.as_str());
        let name = name.or_else(|| key.split_whitespace().nth(2)).unwrap_or("key");
        format!("{number}={name}")
    })
    .collect()
}

/// A path of an override, with the first link's MAC address where it has [`MAC`].
fn of_first(path: &str, links: &[Link]) -> String {
    match links.first() {
        Some(first) => path.replace(MAC, &first.mac),
        None => path.to_owned(),
    }
}

/// Whether an override is of a link that is none of these.
pub fn of_no_link(path: &str, links: &[Link]) -> bool {
    let path = of_first(path, links);
    let mac = path.strip_prefix(MACS).and_then(|rest| rest.split('/').next());
    mac.is_some_and(|mac| !links.iter().any(|link| link.mac == mac))
}

/// The tree of a container, made when it is first asked for, and kept: most changes of most containers are never looked at,
/// and a tree is large beside what it follows from.
#[derive(Clone)]
pub struct View {
    source: Source,
    tree: OnceLock<InstanceView>,
}

/// What a tree is made of.
#[derive(Clone)]
enum Source {
    Facts(Arc<Facts>),
    /// Facts that are gathered when the tree is made: of ten thousand containers that never ask, nobody keeps them.
    Later(Arc<dyn Fn() -> View + Send + Sync>),
}

impl View {
    /// The tree that follows from `facts`.
    pub fn of(facts: Facts) -> Self {
        Self {
            source: Source::Facts(Arc::new(facts)),
            tree: OnceLock::new(),
        }
    }

    /// The tree that `make` makes, when it is needed.
    pub fn later(make: impl Fn() -> View + Send + Sync + 'static) -> Self {
        Self {
            source: Source::Later(Arc::new(make)),
            tree: OnceLock::new(),
        }
    }

    /// What stands at `path`.
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.tree.get_or_init(|| view(&self.facts())).get(path)
    }

    fn facts(&self) -> Arc<Facts> {
        match &self.source {
            Source::Facts(facts) => facts.clone(),
            Source::Later(make) => make().facts(),
        }
    }
}

impl PartialEq for View {
    fn eq(&self, other: &Self) -> bool {
        self.facts() == other.facts()
    }
}

impl fmt::Debug for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.facts(), f)
    }
}

fn view(facts: &Facts) -> InstanceView {
    let mut values: BTreeMap<String, String> = BTreeMap::new();
    for Category { path, how, .. } in CATEGORIES {
        match how {
            How::One(value) => values.extend(value(facts).map(|value| ((*path).to_owned(), value))),
            How::Each(of) => values.extend(
                of(facts)
                    .into_iter()
                    .map(|(name, value)| (path.replace(ANY, &name), value)),
            ),
            How::Link(of) => {
                for (number, link) in facts.links.iter().enumerate() {
                    values.extend(of(facts, number, link).map(|value| (path.replace(MAC, &link.mac), value)));
                }
            }
            How::Given | How::Role | How::Identity => {}
        }
    }
    for (path, value) in &facts.overrides {
        let path = of_first(path, &facts.links);
        // Tags are what the option shows, whoever gives them; and what is of a link is nowhere without one.
        let hidden = (path.starts_with(TAGS) && facts.tags.is_none()) || path.contains(MAC);
        if !hidden {
            values.insert(path, value.clone());
        }
    }
    values.extend(facts.events.clone());
    let identity = Bytes::from(identity_document::document(&|path| values.get(path).cloned(), facts));
    let keys = listed_keys(&values, facts);
    let mut leaves: BTreeMap<String, Node> = values
        .into_iter()
        .map(|(path, value)| (path, Node::Text(value.into())))
        .collect();
    let form = |name: &str| format!("dynamic/instance-identity/{name}");
    for (name, signed) in [
        ("pkcs7", SignatureFormat::Pkcs7),
        ("rsa2048", SignatureFormat::Pkcs7),
        ("signature", SignatureFormat::Signature),
    ] {
        leaves.insert(form(name), Node::Signed(signed, identity.clone()));
    }
    leaves.insert(form("document"), Node::Text(identity));
    if !keys.is_empty() {
        leaves.insert(PUBLIC_KEYS.to_owned(), Node::Dir(keys.join("\n").into()));
    }
    if let Some(data) = &facts.user_data {
        leaves.insert(USER_DATA.to_owned(), Node::UserData(data.clone()));
    }
    if let Some(role) = &facts.role {
        leaves.insert(format!("{IAM}/info"), Node::Text(iam_info(role, facts.started).into()));
        leaves.insert(ROLE_LIST.to_owned(), Node::RoleList(role.name().to_owned().into()));
        leaves.insert(format!("{ROLE_LIST}/{}", role.name()), Node::Credentials);
    }
    InstanceView::of(leaves)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::time::{Duration, UNIX_EPOCH};

    pub(crate) fn facts() -> Facts {
        let link = |last: u8, ipv6| Link {
            network: format!("{last:064x}"),
            name: format!("net{last}"),
            mac: format!("02:42:ac:11:00:{last:02x}"),
            ipv4: Some((Ipv4Addr::new(172, 17, last, 5), 24)),
            ipv6,
        };
        let ipv6 = "fd00:1:2:3::5".parse().unwrap();
        Facts {
            container: "ab".repeat(32),
            instance_id: "i-0123456789abcdef0".into(),
            ami_id: "ami-0123456789abcdef0".into(),
            instance_type: "t3.micro".into(),
            hostname: "web".into(),
            links: vec![link(5, Some((ipv6, 64))), link(6, None)],
            region: "us-east-1".into(),
            zone: "us-east-1a".into(),
            partition: "aws".into(),
            account: "123456789012".into(),
            role: RoleArn::parse("arn:aws:iam::123456789012:role/app/web"),
            started: UNIX_EPOCH + Duration::from_secs(1_767_607_445),
            project: Some("shop".into()),
            launch_index: 2,
            tags: Some([("Name".to_owned(), "web".to_owned())].into()),
            public_keys: vec![("me".into(), "ssh-ed25519 AAAA me".into())],
            user_data: Some(Bytes::from_static(&[0x1f, 0x8b, 0, 255])),
            events: BTreeMap::new(),
            overrides: BTreeMap::new(),
        }
    }

    /// A container of which next to nothing is known.
    fn bare() -> Facts {
        Facts {
            links: Vec::new(),
            role: None,
            project: None,
            tags: None,
            public_keys: Vec::new(),
            user_data: None,
            ..facts()
        }
    }

    fn text(view: &InstanceView, path: &str) -> Option<String> {
        match view.get(path) {
            Some(Node::Dir(text) | Node::Text(text) | Node::RoleList(text)) => {
                Some(String::from_utf8(text.to_vec()).unwrap())
            }
            _ => None,
        }
    }

    #[test]
    fn everything_that_is_listed_resolves_and_nothing_ends_with_a_line_end() {
        for facts in [facts(), bare()] {
            let view = view(&facts);
            let mut seen = 0;
            let mut dirs = vec![String::new()];
            while let Some(dir) = dirs.pop() {
                let listing = text(&view, &dir).unwrap();
                assert!(!listing.ends_with('\n'));
                for name in listing.lines() {
                    let name = match dir.as_str() {
                        PUBLIC_KEYS => name.split('=').next().unwrap(),
                        _ => name.trim_end_matches('/'),
                    };
                    let path = format!("{dir}/{name}");
                    let path = path.trim_start_matches('/').to_owned();
                    let node = view.get(&path).unwrap_or_else(|| panic!("{path}"));
                    assert!(!text(&view, &path).is_some_and(|it| it.ends_with('\n')), "{path}");
                    seen += 1;
                    if matches!(node, Node::Dir(_) | Node::RoleList(_)) {
                        dirs.push(path);
                    }
                }
            }
            assert_eq!(seen + 1, view.paths().len());
        }
    }

    #[test]
    fn a_category_that_is_derived_is_there_and_one_that_is_only_given_is_not() {
        let view = view(&facts());
        for category in CATEGORIES {
            let path = category.path.replace(MAC, "02:42:ac:11:00:05");
            let path = match path.as_str() {
                "meta-data/public-keys/{}/openssh-key" => path.replace(ANY, "0"),
                "meta-data/tags/instance/{}" => path.replace(ANY, "Name"),
                _ => path.replace(ANY, "web"),
            };
            let there = !matches!(category.how, How::Given);
            assert_eq!(view.get(&path).is_some(), there, "{path}");
        }
    }

    /// What can be given is there when it is given, and is what was given.
    #[test]
    fn whatever_can_be_given_resolves() {
        for category in CATEGORIES {
            let path = category
                .path
                .replace("associations/{}", "associations/eia-1")
                .replace(ANY, "0");
            let value = "x";
            match known(&path, value) {
                Ok(()) => {
                    let view = view(&Facts {
                        overrides: [(path.clone(), value.to_owned())].into(),
                        ..facts()
                    });
                    assert_eq!(
                        text(&view, &path.replace(MAC, "02:42:ac:11:00:05")).as_deref(),
                        Some(value),
                        "{path}"
                    );
                }
                Err(error) => {
                    assert_eq!(error, PathError::Derived, "{path}");
                    assert!(matches!(category.how, How::Role | How::Identity), "{path}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_given_says_why() {
        for (path, value, why) in [
            ("meta-data/instance-typ", "x", PathError::Unknown),
            ("meta-data/instance-type/x", "x", PathError::Unknown),
            ("meta-data", "x", PathError::Directory),
            ("meta-data/placement", "x", PathError::Directory),
            ("meta-data/tags/instance", "x", PathError::Directory),
            ("meta-data/network/interfaces/macs/{mac}", "x", PathError::Directory),
            (
                "meta-data/network/interfaces/macs/02:42:AC:11:00:05/mac",
                "x",
                PathError::Unknown,
            ),
            ("meta-data/block-device-mapping/ebsx", "sdb", PathError::Unknown),
            ("meta-data/iam", "x", PathError::Derived),
            ("meta-data/iam/info", "x", PathError::Derived),
            ("meta-data/iam/security-credentials/other", "x", PathError::Derived),
            ("meta-data/identity-credentials/ec2/info", "x", PathError::Derived),
            ("meta-data/instance-type", "", PathError::Value),
            ("meta-data/instance-type", "a\nb", PathError::Value),
            ("meta-data/instance-type", "a\u{1b}[2J", PathError::Value),
            ("meta-data/security-groups", "a\n", PathError::Value),
            ("", "x", PathError::Unknown),
        ] {
            assert_eq!(known(path, value), Err(why), "{path}");
        }
        assert_eq!(known("meta-data/security-groups", "a\nb"), Ok(()));
        assert_eq!(known("meta-data/block-device-mapping/ebs12", "sdb"), Ok(()));
        let of = |mac: &str| of_no_link(&format!("{MACS}{mac}/vpc-id"), &facts().links);
        assert!(of("02:00:00:00:00:01") && !of("02:42:ac:11:00:06") && !of(MAC));
        assert!(!of_no_link("meta-data/mac", &[]) && of_no_link(&format!("{MACS}{MAC}/vpc-id"), &[]));
    }

    #[test]
    fn the_document_agrees_with_the_tree() {
        let view = view(&Facts {
            overrides: [
                ("meta-data/instance-type", "m7i.large"),
                ("meta-data/product-codes", "a\nb"),
                ("meta-data/kernel-id", "aki-5c21674b"),
            ]
            .map(|(path, value)| (path.to_owned(), value.to_owned()))
            .into(),
            ..facts()
        });
        let document: serde_json::Value =
            serde_json::from_str(&text(&view, "dynamic/instance-identity/document").unwrap()).unwrap();
        assert_eq!(document["instanceType"], "m7i.large");
        assert_eq!(document["marketplaceProductCodes"], serde_json::json!(["a", "b"]));
        assert_eq!(document["kernelId"], "aki-5c21674b");
        assert_eq!(document["privateIp"], "172.17.5.5");
        let bare = super::view(&bare());
        let document: serde_json::Value =
            serde_json::from_str(&text(&bare, "dynamic/instance-identity/document").unwrap()).unwrap();
        assert_eq!(document["privateIp"], "0.0.0.0");
    }

    #[test]
    fn without_a_role_there_is_no_iam() {
        let view = view(&Facts { role: None, ..facts() });
        assert!(!text(&view, "meta-data").unwrap().contains("iam"));
        assert_eq!(view.get("meta-data/iam"), None);
        assert_eq!(view.get(ROLE_LIST), None);
    }

    #[test]
    fn values() {
        let view = view(&facts());
        let macs = "meta-data/network/interfaces/macs";
        let first = format!("{macs}/02:42:ac:11:00:05");
        for (path, value) in [
            ("meta-data/mac", "02:42:ac:11:00:05"),
            ("meta-data/ipv6", "fd00:1:2:3::5"),
            ("meta-data/security-groups", "net5\nnet6"),
            ("meta-data/public-keys", "0=me"),
            ("meta-data/public-keys/0", "openssh-key"),
            ("meta-data/tags/instance", "Name"),
            ("meta-data/ami-launch-index", "2"),
            (macs, "02:42:ac:11:00:05/\n02:42:ac:11:00:06/"),
            (&format!("{first}/subnet-ipv4-cidr-block"), "172.17.5.0/24"),
            (&format!("{first}/subnet-ipv6-cidr-blocks"), "fd00:1:2:3::/64"),
            (&format!("{first}/owner-id"), "123456789012"),
            (&format!("{macs}/02:42:ac:11:00:06/device-number"), "1"),
            (ROLE_LIST, "web"),
        ] {
            assert_eq!(text(&view, path).as_deref(), Some(value), "{path}");
        }
        let id = text(&view, &format!("{first}/interface-id")).unwrap();
        assert!(id.starts_with("eni-") && id.len() == 21, "{id}");
        assert_eq!(
            view.get("user-data"),
            Some(&Node::UserData(Bytes::from_static(&[0x1f, 0x8b, 0, 255])))
        );
        assert_eq!(
            view.get("meta-data/iam/security-credentials/web"),
            Some(&Node::Credentials)
        );
        assert_eq!(view.get("meta-data/iam/security-credentials/we"), None);
        let info = text(&view, "meta-data/iam/info").unwrap();
        assert!(
            info.contains("\"arn:aws:iam::123456789012:instance-profile/app/web\""),
            "{info}"
        );
    }
}
