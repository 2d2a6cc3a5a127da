//! What AWS gives a container: roles, sessions and credentials, as nouns.
//!
//! [`broker`] keeps them fresh; [`sts`] and [`offline`] make them.

pub mod broker;
pub mod offline;
pub mod sts;

use std::fmt;
use std::time::{Duration, SystemTime};

use crate::config::{Settings, is_account_id};

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
    fn of(partition: &str, account: &str, path_and_name: &str) -> Self {
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

/// Whether `text` is `[PATH/]NAME` of a role: the characters that IAM takes, no empty part.
fn is_role_path(text: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty()
            && part
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b))
    };
    let name_length = text.rsplit('/').next().map_or(0, str::len);
    text.split('/').all(part) && name_length <= 64 && text.len() <= 512
}

/// A role as a person names it, not yet looked up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NamedRole {
    /// It is known whole.
    Arn(RoleArn),
    /// A role of the base account, which is not known (yet).
    InBaseAccount(String),
}

/// What is wrong with a role as typed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RoleError {
    /// Looks like an ARN and is none.
    #[error("{0:?} is not a role ARN: expected arn:aws:iam::ACCOUNT:role/NAME with 12 digits of account")]
    NotAnArn(String),
    /// Not a name either.
    #[error("{0:?} is not a role: expected an ARN, a name, name@account or an alias of [roles]")]
    NotAName(String),
    /// `name@what` where what is neither an account nor an alias.
    #[error("{role:?}: {account:?} is not an account: expected 12 digits or an alias of [accounts]{nearest}")]
    NotAnAccount {
        /// As typed.
        role: String,
        /// What stands behind the `@`.
        account: String,
        /// The nearest alias.
        nearest: crate::config::Nearest,
    },
}

/// Reads a role as an operator or a label names it: alias, ARN, `name@account`, `name@alias`, or name.
///
/// # Errors
/// When it is none of these.
pub fn read_role(text: &str, settings: &Settings, partition: &str) -> Result<NamedRole, RoleError> {
    if let Some(arn) = settings.roles.get(text) {
        return Ok(NamedRole::Arn(arn.clone()));
    }
    if text.starts_with("arn:") {
        return RoleArn::parse(text)
            .map(NamedRole::Arn)
            .ok_or_else(|| RoleError::NotAnArn(text.to_owned()));
    }
    if !is_role_path(text) {
        return Err(RoleError::NotAName(text.to_owned()));
    }
    if let Some((name, account)) = text.rsplit_once('@') {
        let known = settings.accounts.get(account).map(String::as_str);
        let account = known
            .or(is_account_id(account).then_some(account))
            .ok_or_else(|| RoleError::NotAnAccount {
                role: text.to_owned(),
                account: account.to_owned(),
                nearest: crate::config::Nearest::among(account, settings.accounts.keys().map(String::as_str)),
            })?;
        if !is_role_path(name) {
            return Err(RoleError::NotAName(text.to_owned()));
        }
        return Ok(NamedRole::Arn(RoleArn::of(partition, account, name)));
    }
    match &settings.account_id {
        Some(account) => Ok(NamedRole::Arn(RoleArn::of(partition, account, text))),
        None => Ok(NamedRole::InBaseAccount(text.to_owned())),
    }
}

impl NamedRole {
    /// The role's ARN, given the account of the base credentials if it is known.
    pub fn arn(self, partition: &str, base_account: Option<&str>) -> Option<RoleArn> {
        match self {
            Self::Arn(arn) => Some(arn),
            Self::InBaseAccount(name) => base_account.map(|account| RoleArn::of(partition, account, &name)),
        }
    }
}

/// Every input of AssumeRole that this version sets. It is the key under which credentials are kept: two containers
/// share credentials exactly when all of it is the same.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct RoleSession {
    /// The role.
    pub role: RoleArn,
    /// `RoleSessionName`.
    pub session_name: String,
    /// `DurationSeconds`.
    pub duration: Duration,
    /// Region whose STS is asked.
    pub region: String,
}

/// STS's bounds of `RoleSessionName`: 2 to 64 characters of `[\w+=,.@-]` (STS API reference, AssumeRole).
const SESSION_NAME: std::ops::RangeInclusive<usize> = 2..=64;

/// Makes a session name of any text: what STS does not take becomes `-`, and the length is brought into bounds.
pub fn clean_session_name(text: &str) -> String {
    let mut name: String = text
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() || "_+=,.@-".contains(c) {
                c
            } else {
                '-'
            }
        })
        .take(*SESSION_NAME.end())
        .collect();
    while name.len() < *SESSION_NAME.start() {
        name.push('-');
    }
    name
}

/// Text that must not be seen: its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
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

    fn settings() -> Settings {
        let mut settings = Settings {
            account_id: Some("111122223333".into()),
            ..Settings::default()
        };
        settings.accounts.insert("prod".into(), "444455556666".into());
        settings.roles.insert(
            "orders".into(),
            RoleArn::parse("arn:aws:iam::777788889999:role/service/orders").unwrap(),
        );
        settings
    }

    #[test]
    fn every_form_of_a_role() {
        for (typed, arn) in [
            ("arn:aws:iam::111122223333:role/x", "arn:aws:iam::111122223333:role/x"),
            (
                "arn:aws-cn:iam::111122223333:role/a/b/x",
                "arn:aws-cn:iam::111122223333:role/a/b/x",
            ),
            ("web", "arn:aws:iam::111122223333:role/web"),
            ("service/web", "arn:aws:iam::111122223333:role/service/web"),
            ("web@444455556666", "arn:aws:iam::444455556666:role/web"),
            ("web@prod", "arn:aws:iam::444455556666:role/web"),
            ("orders", "arn:aws:iam::777788889999:role/service/orders"),
        ] {
            let role = read_role(typed, &settings(), "aws").unwrap().arn("aws", None).unwrap();
            assert_eq!(role.to_string(), arn, "{typed}");
        }
        let base = read_role("web", &Settings::default(), "aws").unwrap();
        assert_eq!(base.clone().arn("aws", None), None);
        assert_eq!(base.arn("aws", Some("999900001111")).unwrap().account(), "999900001111");
    }

    #[test]
    fn what_is_not_a_role_says_what_was_expected() {
        for (typed, message) in [
            (
                "arn:aws:iam::12:role/x",
                "\"arn:aws:iam::12:role/x\" is not a role ARN: expected arn:aws:iam::ACCOUNT:role/NAME with 12 digits of account",
            ),
            (
                "we b",
                "\"we b\" is not a role: expected an ARN, a name, name@account or an alias of [roles]",
            ),
            (
                "a//b",
                "\"a//b\" is not a role: expected an ARN, a name, name@account or an alias of [roles]",
            ),
            (
                "web@prd",
                "\"web@prd\": \"prd\" is not an account: expected 12 digits or an alias of [accounts]; did you mean prod?",
            ),
        ] {
            assert_eq!(read_role(typed, &settings(), "aws").unwrap_err().to_string(), message);
        }
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
        fn an_arn_that_is_read_is_written_the_same(text in "arn:(aws|aws-cn|x):(iam|s3)::[0-9]{11,13}:role/[a-z/]{0,9}") {
            if let Some(arn) = RoleArn::parse(&text) {
                prop_assert_eq!(arn.to_string(), text);
            }
        }
    }
}
