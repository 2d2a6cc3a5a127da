//! The categories of metadata: path, and how its value is derived. Listings follow from it.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::OnceLock;
use std::time::SystemTime;

use super::identity;
use super::{InstanceView, Node, document};
use crate::clock::rfc3339_seconds;
use crate::credentials::RoleArn;

/// All that the tree is derived from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    /// `i-…`
    pub instance_id: String,
    /// `ami-…`
    pub ami_id: String,
    /// `t3.micro`
    pub instance_type: String,
    /// The container's hostname.
    pub hostname: String,
    /// Its address on the network of the default route.
    pub local_ipv4: Option<Ipv4Addr>,
    /// The MAC address of the same link.
    pub mac: Option<String>,
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
}

/// One value of the tree.
struct Category {
    path: &'static str,
    /// `None`: it does not exist for this container, and is not listed.
    value: fn(&Facts) -> Option<String>,
}

/// What EC2 documents and this version serves.
const CATEGORIES: &[Category] = &[
    Category {
        path: "meta-data/ami-id",
        value: |f| Some(f.ami_id.clone()),
    },
    Category {
        path: "meta-data/hostname",
        value: |f| Some(f.hostname.clone()),
    },
    Category {
        path: "meta-data/iam/info",
        value: |f| f.role.as_ref().map(|role| iam_info(role, f.started)),
    },
    Category {
        path: "meta-data/instance-id",
        value: |f| Some(f.instance_id.clone()),
    },
    Category {
        path: "meta-data/instance-type",
        value: |f| Some(f.instance_type.clone()),
    },
    Category {
        path: "meta-data/local-hostname",
        value: |f| Some(f.hostname.clone()),
    },
    Category {
        path: "meta-data/local-ipv4",
        value: |f| f.local_ipv4.map(|address| address.to_string()),
    },
    Category {
        path: "meta-data/mac",
        value: |f| f.mac.as_deref().map(str::to_ascii_lowercase),
    },
    Category {
        path: "meta-data/placement/availability-zone",
        value: |f| Some(f.zone.clone()),
    },
    Category {
        path: "meta-data/placement/region",
        value: |f| Some(f.region.clone()),
    },
    Category {
        path: "meta-data/services/domain",
        value: |f| Some(domain(&f.partition).to_owned()),
    },
    Category {
        path: "meta-data/services/partition",
        value: |f| Some(f.partition.clone()),
    },
    Category {
        path: "dynamic/instance-identity/document",
        value: |f| Some(identity::document(f)),
    },
];

/// Where the role is listed; its credentials stand below.
pub const ROLE_LIST: &str = "meta-data/iam/security-credentials";

/// The DNS domain of a partition's services.
fn domain(partition: &str) -> &'static str {
    match partition {
        "aws-cn" => "amazonaws.com.cn",
        _ => "amazonaws.com",
    }
}

fn iam_info(role: &RoleArn, started: SystemTime) -> String {
    document(&[
        ("Code", "Success"),
        ("LastUpdated", &rfc3339_seconds(started)),
        ("InstanceProfileArn", &role.instance_profile()),
        ("InstanceProfileId", &instance_profile_id(role)),
    ])
}

/// Ids of instance profiles are `AIPA` and 17 characters of base32; ours follows from the role, so that it is stable.
fn instance_profile_id(role: &RoleArn) -> String {
    use sha2::Digest as _;
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let digest = sha2::Sha256::digest(role.to_string());
    let tail = digest
        .iter()
        .take(17)
        .map(|byte| char::from(letters[usize::from(byte % 32)]));
    "AIPA".chars().chain(tail).collect()
}

/// The tree of a container, made when it is first asked for, and kept: most changes of most containers are never looked at,
/// and a tree is large beside what it follows from.
#[derive(Clone, Debug)]
pub struct View {
    facts: Facts,
    tree: OnceLock<InstanceView>,
}

impl View {
    /// The tree that follows from `facts`.
    pub fn of(facts: Facts) -> Self {
        Self {
            facts,
            tree: OnceLock::new(),
        }
    }

    /// What stands at `path`.
    pub fn get(&self, path: &str) -> Option<&Node> {
        self.tree.get_or_init(|| view(&self.facts)).get(path)
    }
}

impl PartialEq for View {
    fn eq(&self, other: &Self) -> bool {
        self.facts == other.facts
    }
}

fn view(facts: &Facts) -> InstanceView {
    let mut leaves: BTreeMap<String, Node> = CATEGORIES
        .iter()
        .filter_map(|category| Some((category.path.to_owned(), Node::Text((category.value)(facts)?.into()))))
        .collect();
    if let Some(role) = &facts.role {
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
        Facts {
            instance_id: "i-0123456789abcdef0".into(),
            ami_id: "ami-0123456789abcdef0".into(),
            instance_type: "t3.micro".into(),
            hostname: "web".into(),
            local_ipv4: Some(Ipv4Addr::new(172, 17, 0, 5)),
            mac: Some("02:42:AC:11:00:05".into()),
            region: "us-east-1".into(),
            zone: "us-east-1a".into(),
            partition: "aws".into(),
            account: "123456789012".into(),
            role: RoleArn::parse("arn:aws:iam::123456789012:role/app/web"),
            started: UNIX_EPOCH + Duration::from_secs(1_767_607_445),
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
        for facts in [
            facts(),
            Facts {
                role: None,
                local_ipv4: None,
                mac: None,
                ..facts()
            },
        ] {
            let view = view(&facts);
            let mut seen = 0;
            let mut dirs = vec![String::new()];
            while let Some(dir) = dirs.pop() {
                let listing = text(&view, &dir).unwrap();
                assert!(!listing.ends_with('\n'));
                for name in listing.lines() {
                    let path = format!("{dir}/{}", name.trim_end_matches('/'));
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
    fn without_a_role_there_is_no_iam() {
        let view = view(&Facts { role: None, ..facts() });
        assert!(!text(&view, "meta-data").unwrap().contains("iam"));
        assert_eq!(view.get("meta-data/iam"), None);
        assert_eq!(view.get(ROLE_LIST), None);
    }

    #[test]
    fn values() {
        let view = view(&facts());
        assert_eq!(text(&view, "meta-data/mac").unwrap(), "02:42:ac:11:00:05");
        assert_eq!(text(&view, ROLE_LIST).unwrap(), "web");
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
