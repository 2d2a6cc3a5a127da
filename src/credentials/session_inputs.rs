//! The inputs of AssumeRole that a container's labels may set, and STS's own limits of each.
//!
//! All limits are those of the STS API reference, AssumeRole, "Request Parameters". What STS would refuse is refused when
//! the label is read: the message then names the label.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

use super::{Secret, has_role_characters, is_account_id};

/// `DurationSeconds`: 900 to 43,200.
pub const DURATION: RangeInclusive<Duration> = Duration::from_secs(900)..=Duration::from_secs(43_200);
/// The longest session of a role that is assumed with another role's credentials (STS API reference, AssumeRole, "role
/// chaining").
pub const CHAINED: Duration = Duration::from_secs(3600);
/// `ExternalId`: 2 to 1,224 characters of `[\w+=,.@:\/-]`.
const EXTERNAL_ID: RangeInclusive<usize> = 2..=1224;
/// `SourceIdentity`: 2 to 64 characters of `[\w+=,.@-]`, not beginning with `aws:`.
const SOURCE_IDENTITY: RangeInclusive<usize> = 2..=64;
/// `Policy`: at most 2,048 characters of `[\x09\x0A\x0D\x20-\xFF]`; inline and managed session policies share them.
const POLICY: usize = 2048;
/// `PolicyArns`: at most 10.
const POLICY_ARNS: usize = 10;
/// `Tags`, `TransitiveTagKeys`: at most 50.
pub const TAGS: usize = 50;
/// `Tag.Key`: 1 to 128 characters of `[\p{L}\p{Z}\p{N}_.:/=+\-@]`; `aws:` is reserved (IAM user guide, "Tagging").
const TAG_KEY: RangeInclusive<usize> = 1..=128;
/// `Tag.Value`: up to 256 of the same characters.
const TAG_VALUE: usize = 256;

/// The optional inputs, as labels set them. Empty: STS is not given it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Inputs {
    /// `RoleSessionName`: a template.
    pub session_name: Option<String>,
    /// `ExternalId`
    pub external_id: Option<Secret>,
    /// `DurationSeconds`
    pub duration: Option<Duration>,
    /// `SourceIdentity`
    pub source_identity: Option<String>,
    /// `Policy`
    pub policy: Option<String>,
    /// `PolicyArns`
    pub policy_arns: BTreeSet<String>,
    /// `Tags`
    pub tags: BTreeMap<String, String>,
    /// `TransitiveTagKeys`
    pub transitive_tag_keys: BTreeSet<String>,
    /// Roles to go through, as typed.
    pub chain: Vec<String>,
}

fn word(text: &str, length: &RangeInclusive<usize>, more: &[u8]) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"_+=,.@-".contains(&byte) || more.contains(&byte);
    length.contains(&text.len()) && text.bytes().all(fits)
}

/// Whether STS takes `text` as external id.
pub fn is_external_id(text: &str) -> bool {
    word(text, &EXTERNAL_ID, b":/")
}

/// Whether STS takes `text` as source identity.
pub fn is_source_identity(text: &str) -> bool {
    word(text, &SOURCE_IDENTITY, b"")
}

/// Whether STS may take `text` as a session policy: a JSON object with statements, not longer than STS takes.
pub fn is_policy(text: &str) -> bool {
    let characters = |c: char| matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{ff}');
    let document = || serde_json::from_str::<serde_json::Map<String, serde_json::Value>>(text);
    text.chars().count() <= POLICY
        && text.chars().all(characters)
        && document().is_ok_and(|it| it.contains_key("Statement"))
}

/// Whether `text` is the ARN of a managed policy, of AWS or of an account.
pub fn is_policy_arn(text: &str) -> bool {
    let parts: Vec<_> = text.splitn(6, ':').collect();
    match parts.as_slice() {
        ["arn", partition, "iam", "", account, policy] => {
            (*partition == "aws" || partition.starts_with("aws-"))
                && (*account == "aws" || is_account_id(account))
                && policy.strip_prefix("policy/").is_some_and(is_policy_path)
        }
        _ => false,
    }
}

/// Policy names have up to 128 characters (IAM API reference, `CreatePolicy`), those of roles 64.
fn is_policy_path(text: &str) -> bool {
    text.split('/').all(|part| word(part, &(1..=128), b"")) && text.len() <= 512
}

/// Reads a list of managed policies.
pub fn policy_arns(items: &[&str]) -> Option<BTreeSet<String>> {
    let fits = !items.is_empty() && items.len() <= POLICY_ARNS && items.iter().all(|arn| is_policy_arn(arn));
    fits.then(|| items.iter().map(|arn| (*arn).to_owned()).collect())
}

fn tag_text(text: &str) -> bool {
    text.chars()
        .all(|c| c.is_alphanumeric() || (c.is_whitespace() && !c.is_control()) || "_.:/=+-@".contains(c))
}

/// Whether STS takes `text` as the key of a session tag.
pub fn is_tag_key(text: &str) -> bool {
    TAG_KEY.contains(&text.chars().count()) && tag_text(text) && !text.to_ascii_lowercase().starts_with("aws:")
}

/// Whether STS takes `text` as the value of a session tag.
pub fn is_tag_value(text: &str) -> bool {
    text.chars().count() <= TAG_VALUE && tag_text(text)
}

/// Whether `text` may be a role as it is typed in a list: its form is settled later, with the aliases.
pub fn is_role_word(text: &str) -> bool {
    text.starts_with("arn:") || has_role_characters(text)
}

impl Inputs {
    /// What the single labels are not wrong in, and all together are: the label, and what is wrong.
    pub fn contradiction(&self) -> Option<(&'static str, String)> {
        if self.tags.len() > TAGS {
            let what = format!("expected at most {TAGS} session tags, not {}", self.tags.len());
            return Some(("role.session-tag", what));
        }
        // STS takes Team and team for the same key.
        let mut keys = BTreeSet::new();
        if let Some(key) = self.tags.keys().find(|key| !keys.insert(key.to_lowercase())) {
            let what = format!("expected keys that differ in more than capitals; {key} is there twice");
            return Some(("role.session-tag", what));
        }
        if let Some(key) = self
            .transitive_tag_keys
            .iter()
            .find(|key| !self.tags.contains_key(*key))
        {
            let what = format!("expected keys of session tags; there is no label role.session-tag.{key}");
            return Some(("role.transitive-tag-keys", what));
        }
        if let Some(duration) = self.duration.filter(|it| !self.chain.is_empty() && *it > CHAINED) {
            let what = format!(
                "expected at most 1h where roles are gone through (role.chain), which is STS's own limit, not {}m",
                duration.as_secs() / 60
            );
            return Some(("role.duration", what));
        }
        None
    }

    /// The first of the labels that only a role can have, if any of them is set.
    pub fn of_a_role_only(&self) -> Option<&'static str> {
        [
            ("role.session-name", self.session_name.is_some()),
            ("role.external-id", self.external_id.is_some()),
            ("role.source-identity", self.source_identity.is_some()),
            ("role.policy", self.policy.is_some()),
            ("role.policy-arns", !self.policy_arns.is_empty()),
            ("role.session-tag", !self.tags.is_empty()),
            ("role.transitive-tag-keys", !self.transitive_tag_keys.is_empty()),
            ("role.chain", !self.chain.is_empty()),
        ]
        .into_iter()
        .find_map(|(label, set)| set.then_some(label))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_are_those_of_sts() {
        let long = |length| "x".repeat(length);
        assert!(is_external_id("a:/b") && is_external_id(&long(1224)));
        assert!(!is_external_id("x") && !is_external_id(&long(1225)) && !is_external_id("a b"));
        assert!(is_source_identity("me@example.com") && is_source_identity(&long(64)));
        assert!(!is_source_identity(&long(65)) && !is_source_identity("a:b"));
        let policy = |padding| format!("{{\"Statement\":[]{}}}", " ".repeat(padding));
        assert!(is_policy(&policy(0)) && is_policy(&policy(2048 - 16)));
        assert!(
            !is_policy(&policy(2048 - 15)) && !is_policy("[]") && !is_policy("{}") && !is_policy("{\"Statement\":")
        );
        assert!(is_policy_arn("arn:aws:iam::aws:policy/job-function/ViewOnlyAccess"));
        assert!(is_policy_arn("arn:aws-cn:iam::111122223333:policy/x"));
        for arn in [
            "arn:aws:iam::aws:role/x",
            "arn:aws:iam::aws:policy/",
            "arn:aws:iam::1:policy/x",
            "ReadOnlyAccess",
        ] {
            assert!(!is_policy_arn(arn), "{arn}");
        }
        let arns = |count| vec!["arn:aws:iam::aws:policy/x"; count];
        assert!(policy_arns(&arns(10)).is_some() && policy_arns(&arns(11)).is_none() && policy_arns(&[]).is_none());
        assert!(is_tag_key("team") && is_tag_key(&long(128)) && is_tag_key("größe"));
        assert!(!is_tag_key("") && !is_tag_key(&long(129)) && !is_tag_key("AWS:x") && !is_tag_key("a#b"));
        assert!(is_tag_value("") && is_tag_value(&long(256)) && !is_tag_value(&long(257)) && !is_tag_value("a,b"));
    }
}
