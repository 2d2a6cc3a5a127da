//! A role as people name it: ARN, name, `name@account`, alias.

use super::{RoleArn, is_account_id, is_role_path};
use crate::config::{Nearest, Settings};

/// A role as a person names it, not yet looked up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NamedRole {
    /// It is known whole.
    Arn(RoleArn),
    /// A role of the account of its base credentials, which may not be known yet.
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
        nearest: Nearest,
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
                nearest: Nearest::among(account, settings.accounts.keys().map(String::as_str)),
            })?;
        if !is_role_path(name) {
            return Err(RoleError::NotAName(text.to_owned()));
        }
        return Ok(NamedRole::Arn(RoleArn::of(partition, account, name)));
    }
    Ok(NamedRole::InBaseAccount(text.to_owned()))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        let mut settings = Settings::default();
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
            let role = read_role(typed, &settings(), "aws").unwrap();
            let role = role.arn("aws", Some("111122223333")).unwrap();
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
    }
}
