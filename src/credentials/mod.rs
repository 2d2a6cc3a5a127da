//! What AWS gives a container: roles, sessions and credentials, as nouns.
//!
//! [`role_reference`] reads a role as people name it; [`session_inputs`] is what labels may tell STS besides, and [`allow_rules`] which
//! container may have what; [`broker`] keeps credentials fresh; [`sts`] and [`offline`] make them. [`base`] is whose
//! credentials ask STS: [`profile`]s of AWS's [`files`], [`sso`] logins, and the rest of the usual chain.

pub mod allow_rules;
#[cfg(target_os = "linux")]
pub mod base;
pub mod broker;
#[cfg(target_os = "linux")]
pub mod files;
#[cfg(target_os = "linux")]
pub mod http;
pub mod instance_profile;
pub mod offline;
#[cfg(target_os = "linux")]
pub mod profile;
pub mod role_reference;
pub mod session_inputs;
#[cfg(target_os = "linux")]
pub mod sso;
#[cfg(target_os = "linux")]
pub mod sts;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

/// Whether `text` is an AWS account id.
pub fn is_account_id(text: &str) -> bool {
    text.len() == 12 && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The ARN of an IAM role, taken apart. Role names have at most 64 characters (IAM API reference, `CreateRole`).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RoleArn {
    partition: String,
    account: String,
    /// `service/orders`: the path without its outer slashes, and the name.
    path_and_name: String,
}

impl RoleArn {
    /// Reads `arn:PARTITION:iam::ACCOUNT:role/[PATH/]NAME`.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.splitn(6, ':');
        let mut next = || parts.next();
        let (arn, partition, service, region, account) = (next()?, next()?, next()?, next()?, next()?);
        let path_and_name = next()?.strip_prefix("role/")?;
        let partition_fits = partition == "aws" || partition.starts_with("aws-");
        let fits = arn == "arn" && partition_fits && service == "iam" && region.is_empty() && is_account_id(account);
        (fits && is_role_path(path_and_name)).then(|| Self {
            partition: partition.to_owned(),
            account: account.to_owned(),
            path_and_name: path_and_name.to_owned(),
        })
    }

    /// The role `name` (with its path, if it has one) of `account`.
    pub fn of(partition: &str, account: &str, path_and_name: &str) -> Self {
        Self {
            partition: partition.to_owned(),
            account: account.to_owned(),
            path_and_name: path_and_name.to_owned(),
        }
    }

    /// `aws`, `aws-cn`, `aws-us-gov` …
    pub fn partition(&self) -> &str {
        &self.partition
    }

    /// The account id.
    pub fn account(&self) -> &str {
        &self.account
    }

    /// The name alone, as IMDS lists it.
    pub fn name(&self) -> &str {
        self.path_and_name.rsplit('/').next().unwrap_or(&self.path_and_name)
    }

    /// The ARN of the instance profile of the same name.
    pub fn instance_profile(&self) -> String {
        format!(
            "arn:{}:iam::{}:instance-profile/{}",
            self.partition, self.account, self.path_and_name
        )
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "arn:{}:iam::{}:role/{}",
            self.partition, self.account, self.path_and_name
        )
    }
}

impl fmt::Debug for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The partition that a region belongs to.
pub fn partition_of(region: &str) -> &'static str {
    PARTITIONS
        .iter()
        .find(|(_, prefix, ..)| region.starts_with(prefix))
        .map_or(AWS, |(name, ..)| name)
}

/// The region whose STS is asked for something in `partition`, when `region` is the wished one: an STS knows its own
/// partition only.
pub fn region_in(partition: &str, region: &str) -> String {
    if partition_of(region) == partition {
        return region.to_owned();
    }
    let known = PARTITIONS.iter().find(|(name, ..)| *name == partition);
    known.map_or("us-east-1", |(_, _, first, _)| first).to_owned()
}

/// The DNS domain of a partition's services.
pub fn domain_of(partition: &str) -> &'static str {
    let known = PARTITIONS.iter().find(|(name, ..)| *name == partition);
    known.map_or("amazonaws.com", |(.., domain)| domain)
}

const AWS: &str = "aws";

/// The partitions other than `aws`: name, prefix of their regions, first region, and DNS domain of their services (the SDKs'
/// `partitions.json`).
const PARTITIONS: &[(&str, &str, &str, &str)] = &[
    ("aws-cn", "cn-", "cn-northwest-1", "amazonaws.com.cn"),
    ("aws-us-gov", "us-gov-", "us-gov-west-1", "amazonaws.com"),
    ("aws-eusc", "eusc-", "eusc-de-east-1", "amazonaws.eu"),
    ("aws-iso", "us-iso-", "us-iso-east-1", "c2s.ic.gov"),
    ("aws-iso-b", "us-isob-", "us-isob-east-1", "sc2s.sgov.gov"),
    ("aws-iso-e", "eu-isoe-", "eu-isoe-west-1", "cloud.adc-e.uk"),
    ("aws-iso-f", "us-isof-", "us-isof-south-1", "csp.hci.ic.gov"),
];

/// Whether `text` is `[PATH/]NAME` of a role.
pub fn is_role_path(text: &str) -> bool {
    has_role_characters(text) && long_role_name(text).is_none() && text.len() <= 512
}

/// Whether `text` has only characters that IAM takes for `[PATH/]NAME` of a role, and no empty part.
pub fn has_role_characters(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b))
    };
    text.split('/').all(part)
}

/// The most characters of a role's name (IAM API reference, `CreateRole`).
pub const MAX_ROLE_NAME: usize = 64;

/// The name in `[…/]NAME`, if it is too long for a role.
pub fn long_role_name(text: &str) -> Option<&str> {
    text.rsplit('/').next().filter(|name| name.len() > MAX_ROLE_NAME)
}

/// What a container is given credentials of. It is the key under which they are kept: two containers share credentials
/// exactly when all of it is the same.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "nearly all are roles, and what is shared is shared behind an Arc"
)]
pub enum Session {
    /// A session of a role.
    Role(RoleSession),
    /// A profile's own temporary credentials.
    Profile(ProfileSession),
}

/// Every input of AssumeRole, and whose credentials ask.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RoleSession {
    /// Profile of the base credentials; `None`: the daemon's own base.
    pub profile: Option<String>,
    /// Roles to go through, in this order, before `role`. They get the same session name and nothing else, except the
    /// source identity: it is set with the first role, and STS keeps it from then on.
    pub chain: Vec<RoleArn>,
    /// The role.
    pub role: RoleArn,
    /// `RoleSessionName`.
    pub session_name: String,
    /// `DurationSeconds`.
    pub duration: Duration,
    /// Region whose STS is asked.
    pub region: String,
    /// `ExternalId`: a word that the role's owner and we share.
    pub external_id: Option<Secret>,
    /// `Policy`: an inline session policy.
    pub policy: Option<String>,
    /// `PolicyArns`: managed session policies.
    pub policy_arns: BTreeSet<String>,
    /// `Tags`.
    pub tags: BTreeMap<String, String>,
    /// `TransitiveTagKeys`: those of the tags that go on to roles that the container itself assumes.
    pub transitive_tag_keys: BTreeSet<String>,
    /// `SourceIdentity`.
    pub source_identity: Option<String>,
}

impl RoleSession {
    /// A session of `role` from the daemon's own base, with what STS requires and nothing else.
    pub fn new(role: RoleArn, session_name: impl Into<String>, duration: Duration, region: impl Into<String>) -> Self {
        Self {
            profile: None,
            chain: Vec::new(),
            role,
            session_name: session_name.into(),
            duration,
            region: region.into(),
            external_id: None,
            policy: None,
            policy_arns: BTreeSet::new(),
            tags: BTreeMap::new(),
            transitive_tag_keys: BTreeSet::new(),
            source_identity: None,
        }
    }
}

/// A profile served as it is, without assuming a role.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct ProfileSession {
    /// The profile; `None`: the daemon's own base.
    pub profile: Option<String>,
    /// How long credentials live where they are made for this, in exchange for long-lived keys.
    pub duration: Duration,
    /// Region whose STS is asked.
    pub region: String,
}

impl Session {
    /// The role, unless a profile is served as it is.
    pub fn role(&self) -> Option<&RoleArn> {
        match self {
            Self::Role(session) => Some(&session.role),
            Self::Profile(_) => None,
        }
    }

    /// `RoleSessionName`, unless a profile is served as it is.
    pub fn session_name(&self) -> Option<&str> {
        match self {
            Self::Role(session) => Some(&session.session_name),
            Self::Profile(_) => None,
        }
    }

    /// The profile of the base credentials; `None`: the daemon's own base.
    pub fn profile(&self) -> Option<&str> {
        match self {
            Self::Role(session) => session.profile.as_deref(),
            Self::Profile(session) => session.profile.as_deref(),
        }
    }

    /// How long credentials are asked for.
    pub fn duration(&self) -> Duration {
        match self {
            Self::Role(session) => session.duration,
            Self::Profile(session) => session.duration,
        }
    }

    /// The region whose STS is asked.
    pub fn region(&self) -> &str {
        match self {
            Self::Role(session) => &session.region,
            Self::Profile(session) => &session.region,
        }
    }
}

impl fmt::Display for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Role(session) => write!(f, "{} as {}", session.role, session.session_name)?,
            Self::Profile(_) => f.write_str("credentials of its own")?,
        }
        if let Self::Role(session) = self
            && !session.chain.is_empty()
        {
            let chain: Vec<_> = session.chain.iter().map(ToString::to_string).collect();
            write!(f, ", through {}", chain.join(" and "))?;
        }
        match self.profile() {
            Some(profile) => write!(f, ", by profile {profile}"),
            None => Ok(()),
        }
    }
}

/// STS's bounds of `RoleSessionName`: 2 to 64 characters of `[\w+=,.@-]` (STS API reference, AssumeRole).
const SESSION_NAME: std::ops::RangeInclusive<usize> = 2..=64;

/// Makes a session name of any text: what STS does not take becomes `-`, and the length is brought into bounds. Of what
/// is too long, the end becomes a digest of all of it: two long names stay two.
pub fn clean_session_name(text: &str) -> String {
    // A dash and hexadecimal digits.
    const TAIL: usize = 9;
    let fits = |c: char| c.is_ascii_alphanumeric() || "_+=,.@-".contains(c);
    let mut name: String = text.chars().map(|c| if fits(c) { c } else { '-' }).collect();
    if name.len() > *SESSION_NAME.end() {
        let digest = Sha256::digest(text);
        name.truncate(SESSION_NAME.end() - TAIL);
        name.push('-');
        for byte in digest.iter().take(TAIL / 2) {
            name.push_str(&format!("{byte:02x}"));
        }
    }
    while name.len() < *SESSION_NAME.start() {
        name.push('-');
    }
    name
}

/// Text that must not be seen: its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Secret(String);

impl Secret {
    /// Wraps it.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself, for the one place that puts it on the wire.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// One set of temporary credentials.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Credentials {
    /// `ASIA…`; not a secret.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: Secret,
    /// The session token.
    pub token: Secret,
    /// When AWS says that they became good.
    pub updated: SystemTime,
    /// When AWS stops taking them.
    pub expiration: SystemTime,
    /// They are well-formed and AWS does not know them.
    pub fake: bool,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_not_the_arn_of_a_role() {
        for arn in [
            "arn:aws:iam::111122223333:user/x",
            "arn:aws:sts::111122223333:role/x",
            "arn:aws:iam:eu-west-1:111122223333:role/x",
            "arn:aws:iam::111122223333:role/",
            "arn:aws:iam::111122223333:role/x/",
            "arn:aws:iam::111122223333:role/x\n",
            "arn:evil:iam::111122223333:role/x",
        ] {
            assert_eq!(RoleArn::parse(arn), None, "{arn}");
        }
    }

    #[test]
    fn an_sts_is_asked_in_the_partition_of_the_role() {
        for (partition, region, asked) in [
            ("aws", "eu-west-1", "eu-west-1"),
            ("aws-cn", "cn-north-1", "cn-north-1"),
            ("aws-cn", "us-east-1", "cn-northwest-1"),
            ("aws-us-gov", "eu-west-1", "us-gov-west-1"),
            ("aws-us-gov", "us-gov-east-1", "us-gov-east-1"),
            ("aws", "us-gov-east-1", "us-east-1"),
            ("aws-iso-b", "us-iso-east-1", "us-isob-east-1"),
        ] {
            assert_eq!(region_in(partition, region), asked, "{partition} {region}");
        }
        for (partition, _, region, _) in PARTITIONS {
            assert_eq!(partition_of(region), *partition);
        }
        assert_eq!(partition_of("us-east-1"), "aws");
    }

    #[test]
    fn partitions_and_their_domains_are_those_of_botocore() {
        let mut partitions = 0;
        for line in include_str!("partitions.txt")
            .lines()
            .filter(|line| !line.starts_with('#'))
        {
            let mut words = line.split(' ');
            let (partition, domain) = (words.next().unwrap(), words.next().unwrap());
            assert_eq!(domain_of(partition), domain, "{partition}");
            let regions: Vec<_> = words.collect();
            let abroad = if partition == AWS { "cn-north-1" } else { "us-east-1" };
            assert!(regions.contains(&region_in(partition, abroad).as_str()), "{partition}");
            for region in regions {
                assert_eq!(partition_of(region), partition, "{region}");
            }
            partitions += 1;
        }
        assert_eq!(partitions, PARTITIONS.len() + 1, "and aws");
    }

    #[test]
    fn a_secret_is_not_in_debug() {
        let credentials = Credentials {
            access_key_id: "ASIAEXAMPLE".into(),
            secret_access_key: Secret::new("the-secret"),
            token: Secret::new("the-token"),
            updated: SystemTime::UNIX_EPOCH,
            expiration: SystemTime::UNIX_EPOCH,
            fake: false,
        };
        let shown = format!("{credentials:?} {credentials:#?}");
        assert!(!shown.contains("the-secret") && !shown.contains("the-token"), "{shown}");
    }

    proptest! {
        #[test]
        fn any_text_becomes_a_session_name(text in ".*") {
            let name = clean_session_name(&text);
            prop_assert!(SESSION_NAME.contains(&name.len()));
            prop_assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_+=,.@-".contains(&b)));
        }

        #[test]
        fn long_names_that_differ_stay_different(text in "[a-z]{80}", end in "[a-z]{1,9}") {
            let longer = format!("{text}{end}");
            prop_assert_ne!(clean_session_name(&text), clean_session_name(&longer));
            prop_assert_eq!(clean_session_name(&text).len(), 64);
        }

        #[test]
        fn an_arn_that_is_read_is_written_the_same(text in "arn:(aws|aws-cn|x):(iam|s3)::[0-9]{11,13}:role/[a-z/]{0,9}") {
            if let Some(arn) = RoleArn::parse(&text) {
                prop_assert_eq!(arn.to_string(), text);
            }
        }
    }
}
