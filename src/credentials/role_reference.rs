//! A role as people name it: ARN, name, `name@account`, alias.

use super::{MAX_ROLE_NAME, RoleArn, has_role_characters, is_account_id, is_role_path, long_role_name};
use crate::config::{Settings, Suggestion};

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
    /// The last part of an ARN. It could also be a name with the path `/role/`.
    #[error("{0:?} is a part of an ARN: expected {name}, or for a role with the path /role/ its whole ARN", name = &.0[ROLE.len()..])]
    PartOfArn(String),
    /// A name that IAM does not take.
    #[error("{name:?} is not the name of a role: it has {length} characters; expected at most {MAX_ROLE_NAME}")]
    TooLong {
        /// The name.
        name: String,
        /// Its length.
        length: usize,
    },
    /// `name@what` where what is neither an account nor an alias.
    #[error("{role:?}: {account:?} is not an account: expected 12 digits or an alias of [accounts]{nearest}")]
    NotAnAccount {
        /// As typed.
        role: String,
        /// What stands behind the `@`.
        account: String,
        /// The nearest alias.
        nearest: Suggestion,
    },
}

/// The start of the last part of the ARN of a role.
const ROLE: &str = "role/";

/// Reads a role as an operator or a label names it: alias, ARN, `name@account`, `name@alias`, or name.
///
/// # Errors
/// When it is none of these.
pub fn read_role(text: &str, settings: &Settings, partition: &str) -> Result<NamedRole, RoleError> {
    if let Some(arn) = settings.roles.get(text) {
        return Ok(NamedRole::Arn(arn.clone()));
    }
    if text.starts_with("arn:") {
        let arn = RoleArn::parse(text).map(NamedRole::Arn);
        return arn.ok_or_else(|| too_long(text).unwrap_or_else(|| RoleError::NotAnArn(text.to_owned())));
    }
    if text.starts_with(ROLE) && text.len() > ROLE.len() {
        return Err(RoleError::PartOfArn(text.to_owned()));
    }
    // An account behind the name is no part of it.
    let path = text.rsplit_once('@').map_or(text, |(path, _)| path);
    if !is_role_path(path) {
        return Err(too_long(path).unwrap_or_else(|| RoleError::NotAName(text.to_owned())));
    }
    if let Some((name, account)) = text.rsplit_once('@') {
        let known = settings.accounts.get(account).map(String::as_str);
        let account = known
            .or(is_account_id(account).then_some(account))
            .ok_or_else(|| RoleError::NotAnAccount {
                role: text.to_owned(),
                account: account.to_owned(),
                nearest: Suggestion::among(account, settings.accounts.keys().map(String::as_str)),
            })?;
        return Ok(NamedRole::Arn(RoleArn::of(partition, account, name)));
    }
    Ok(NamedRole::InBaseAccount(text.to_owned()))
}

/// The error of a name that is right but for its length.
fn too_long(text: &str) -> Option<RoleError> {
    let name = long_role_name(text).filter(|name| has_role_characters(name))?;
    Some(RoleError::TooLong {
        name: name.to_owned(),
        length: name.len(),
    })
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
            (
                "arn:aws:iam::111122223333:role/role/web",
                "arn:aws:iam::111122223333:role/role/web",
            ),
            ("role", "arn:aws:iam::111122223333:role/role"),
            (
                "a-name-of-60-characters-0123456789012345678901234567890123456@444455556666",
                "arn:aws:iam::444455556666:role/a-name-of-60-characters-0123456789012345678901234567890123456",
            ),
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
                "role/web",
                "\"role/web\" is a part of an ARN: expected web, or for a role with the path /role/ its whole ARN",
            ),
            (
                "role/web@prod",
                "\"role/web@prod\" is a part of an ARN: expected web@prod, or for a role with the path /role/ its whole ARN",
            ),
            (
                "web@prd",
                "\"web@prd\": \"prd\" is not an account: expected 12 digits or an alias of [accounts]; did you mean prod?",
            ),
        ] {
            assert_eq!(read_role(typed, &settings(), "aws").unwrap_err().to_string(), message);
        }
        let long = "n".repeat(70);
        let message = format!("{long:?} is not the name of a role: it has 70 characters; expected at most 64");
        for typed in [
            long.clone(),
            format!("service/{long}"),
            format!("{long}@prod"),
            format!("arn:aws:iam::111122223333:role/{long}"),
        ] {
            assert_eq!(read_role(&typed, &settings(), "aws").unwrap_err().to_string(), message);
        }
    }
}
