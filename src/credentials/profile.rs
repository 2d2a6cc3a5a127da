//! A profile of AWS's files → the way to its credentials: pure, and the one place that says what a profile may ask of us.
//!
//! The SDK's own provider for profiles is not used: it panics when the clock goes back between two refreshes of an SSO token,
//! fails when the token cannot be written back, looks for tokens in `$HOME` only, and asks 169.254.169.254, which is us, where
//! a profile says so (aws-config 1.13). Its parser is.

use aws_config::profile::{Profile, ProfileSet};
use aws_runtime::env_config::file::{EnvConfigFileKind, EnvConfigFiles};
use aws_types::os_shim_internal::{Env, Fs};
use std::path::{Path, PathBuf};

use super::Secret;
use crate::config::Suggestion;

/// The way to a profile's credentials: what is first, and the roles to go through.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    /// What there is first.
    pub source: Source,
    /// Roles to assume, one with the credentials of the other.
    pub roles: Vec<Step>,
}

/// Where a profile's credentials come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// Keys that stand in the file.
    Keys(Keys),
    /// The daemon's environment.
    Environment,
    /// The instance profile of the host.
    InstanceProfile,
    /// `aws sso login`.
    Sso(Sso),
    /// A token of another identity provider, in a file.
    WebIdentity {
        /// The role that it is exchanged for.
        role_arn: String,
        /// `role_session_name`.
        session_name: Option<String>,
        /// Where it is.
        token_file: PathBuf,
    },
    /// A program that prints them. Its arguments may be secret.
    Process(Secret),
}

/// Access keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Keys {
    /// `AKIA…`, `ASIA…`.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: Secret,
    /// The session token, unless they are long-lived.
    pub session_token: Option<Secret>,
}

/// What IAM Identity Center is asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Sso {
    /// The section of its own, of which there is a token that can be refreshed.
    pub session: Option<String>,
    /// `sso_start_url`.
    pub start_url: String,
    /// `sso_region`.
    pub region: String,
    /// `sso_account_id`.
    pub account: String,
    /// `sso_role_name`.
    pub role: String,
}

/// A role on the way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// `role_arn`.
    pub role_arn: String,
    /// `external_id`.
    pub external_id: Option<Secret>,
    /// `role_session_name`.
    pub session_name: Option<String>,
    /// `duration_seconds`.
    pub seconds: Option<i32>,
}

/// Why a profile leads nowhere.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProfileError {
    /// The files cannot be understood.
    #[error("the AWS files cannot be read: {0}")]
    Unreadable(String),
    /// There is no such profile.
    #[error("there is no profile {profile:?}{by}{nearest}")]
    Missing {
        /// Its name.
        profile: String,
        /// Who names it.
        by: String,
        /// The nearest that there is.
        nearest: Suggestion,
    },
    /// It says nothing of credentials.
    #[error(
        "profile {0:?} has no credentials: expected keys, sso_session, role_arn, web_identity_token_file or credential_process"
    )]
    Empty(String),
    /// Something is missing, or contradicts itself.
    #[error("profile {profile:?}: {why}")]
    Wrong {
        /// Which profile.
        profile: String,
        /// What is wrong, and what was expected.
        why: String,
    },
    /// It is not allowed to.
    #[error("profile {profile:?}: {key} {what}; [credentials] allow_process = true allows it")]
    NotAllowed {
        /// Which profile.
        profile: String,
        /// Which key.
        key: &'static str,
        /// What that does.
        what: &'static str,
    },
    /// It leads to this daemon.
    #[error(
        "profile {profile:?}: credential_source = {source_name} leads to the address that this daemon answers: it cannot be its own base"
    )]
    Ourselves {
        /// Which profile.
        profile: String,
        /// As it stands there.
        source_name: String,
    },
    /// A person is wanted each time.
    #[error("profile {profile:?} wants {what}, which a daemon cannot give")]
    Person {
        /// Which profile.
        profile: String,
        /// What.
        what: &'static str,
    },
}

/// The contents of `config` and `credentials`, in the SDK's own form.
pub fn as_sdk_files(config: Option<&str>, credentials: Option<&str>) -> EnvConfigFiles {
    EnvConfigFiles::builder()
        .with_contents(EnvConfigFileKind::Config, config.unwrap_or_default())
        .with_contents(EnvConfigFileKind::Credentials, credentials.unwrap_or_default())
        .build()
}

/// Reads the files as the SDK does.
///
/// # Errors
/// When they cannot be understood.
pub async fn parse(files: &EnvConfigFiles) -> Result<ProfileSet, ProfileError> {
    // Nothing else is looked at: the contents are all there is.
    aws_config::profile::load(&Fs::from_slice(&[]), &Env::from_slice(&[]), files, None)
        .await
        .map_err(|error| ProfileError::Unreadable(crate::logging::with_causes(&error)))
}

/// What a profile may ask of us.
#[derive(Clone, Copy, Debug)]
pub struct Allowed<'a> {
    /// Whether it may run programs, name endpoints, and read token files anywhere.
    pub process: bool,
    /// Whether there is an instance profile of the host to be had, from somebody else than this daemon.
    pub instance_profile: bool,
    /// Where token files may be otherwise.
    pub directory: &'a Path,
}

/// Finds the way to the credentials of `name`.
///
/// # Errors
/// Why there is none.
pub fn plan(set: &ProfileSet, name: &str, allowed: Allowed<'_>) -> Result<Plan, ProfileError> {
    let mut roles = Vec::new();
    let mut visited: Vec<&str> = Vec::new();
    let mut name = name;
    loop {
        let profile = set.get_profile(name).ok_or_else(|| ProfileError::Missing {
            profile: name.to_owned(),
            by: visited
                .last()
                .map(|by| format!(", which profile {by:?} names"))
                .unwrap_or_default(),
            nearest: Suggestion::among(name, set.profiles()),
        })?;
        check(profile, PROGRAMS, allowed)?;
        check(profile, ENDPOINTS, allowed)?;
        let again = visited.contains(&name);
        visited.push(name);
        let keys = keys(profile)?;
        // As the AWS CLI has it: keys of a profile that others name as their source win over its own role.
        if let (Some(keys), true) = (&keys, visited.len() > 1) {
            return Ok(finish(Source::Keys(keys.clone()), roles));
        }
        if again {
            return Err(wrong(profile, "its source_profile leads back to it"));
        }
        let get = |key: &str| profile.get(key);
        match (get("role_arn"), get("web_identity_token_file")) {
            (Some(role_arn), None) => {
                if get("mfa_serial").is_some() {
                    return Err(ProfileError::Person {
                        profile: name.to_owned(),
                        what: "an MFA code (mfa_serial)",
                    });
                }
                roles.push(step(profile, role_arn)?);
                match (get("source_profile"), get("credential_source")) {
                    (Some(source), None) => name = source,
                    (None, Some(source)) => return Ok(finish(named_source(profile, source, allowed)?, roles)),
                    _ => {
                        return Err(wrong(
                            profile,
                            "expected one of source_profile and credential_source beside role_arn",
                        ));
                    }
                }
            }
            (role, token_file) => {
                let source = source(set, profile, role.zip(token_file), keys, allowed)?;
                return source
                    .map(|source| finish(source, roles))
                    .ok_or_else(|| ProfileError::Empty(name.to_owned()));
            }
        }
    }
}

fn finish(source: Source, mut roles: Vec<Step>) -> Plan {
    roles.reverse();
    Plan { source, roles }
}

fn wrong(profile: &Profile, why: impl Into<String>) -> ProfileError {
    ProfileError::Wrong {
        profile: profile.name().to_owned(),
        why: why.into(),
    }
}

/// Whether the endpoints that `name` sets, for whoever's credentials, are allowed.
///
/// # Errors
/// When they are not.
pub fn check_endpoints(set: &ProfileSet, name: &str, allowed: Allowed<'_>) -> Result<(), ProfileError> {
    set.get_profile(name)
        .map_or(Ok(()), |profile| check(profile, ENDPOINTS, allowed))
}

/// Keys that send our requests elsewhere, and what they do.
const ENDPOINTS: &[(&str, &str)] = &[
    ("endpoint_url", "names an endpoint, which is given signed requests"),
    ("services", "may name endpoints, which are given signed requests"),
];
/// Keys that run code.
const PROGRAMS: &[(&str, &str)] = &[("credential_process", "runs a program")];

fn check(profile: &Profile, keys: &[(&'static str, &'static str)], allowed: Allowed<'_>) -> Result<(), ProfileError> {
    let set = keys.iter().find(|(key, _)| profile.get(key).is_some());
    match set {
        Some((key, what)) if !allowed.process => Err(ProfileError::NotAllowed {
            profile: profile.name().to_owned(),
            key,
            what,
        }),
        _ => Ok(()),
    }
}

fn keys(profile: &Profile) -> Result<Option<Keys>, ProfileError> {
    let (id, secret) = (profile.get("aws_access_key_id"), profile.get("aws_secret_access_key"));
    match (id, secret) {
        (Some(id), Some(secret)) => Ok(Some(Keys {
            access_key_id: id.to_owned(),
            secret_access_key: Secret::new(secret),
            session_token: profile.get("aws_session_token").map(Secret::new),
        })),
        (None, None) => Ok(None),
        _ => Err(wrong(
            profile,
            "expected both of aws_access_key_id and aws_secret_access_key",
        )),
    }
}

fn step(profile: &Profile, role_arn: &str) -> Result<Step, ProfileError> {
    let seconds = match profile.get("duration_seconds") {
        None => None,
        Some(text) => Some(
            text.parse()
                .ok()
                .filter(|it| (900..=43_200).contains(it))
                .ok_or_else(|| {
                    wrong(
                        profile,
                        format!("duration_seconds = {text:?}: expected a number from 900 to 43200"),
                    )
                })?,
        ),
    };
    Ok(Step {
        role_arn: role_arn.to_owned(),
        external_id: profile.get("external_id").map(Secret::new),
        session_name: profile.get("role_session_name").map(str::to_owned),
        seconds,
    })
}

fn named_source(profile: &Profile, source: &str, allowed: Allowed<'_>) -> Result<Source, ProfileError> {
    if source.eq_ignore_ascii_case("Environment") {
        return Ok(Source::Environment);
    }
    if allowed.instance_profile && source.eq_ignore_ascii_case("Ec2InstanceMetadata") {
        return Ok(Source::InstanceProfile);
    }
    let leads_to_us = ["Ec2InstanceMetadata", "EcsContainer"];
    if leads_to_us.iter().any(|it| it.eq_ignore_ascii_case(source)) {
        return Err(ProfileError::Ourselves {
            profile: profile.name().to_owned(),
            source_name: source.to_owned(),
        });
    }
    Err(wrong(
        profile,
        format!("credential_source = {source:?}: expected Environment"),
    ))
}

fn source(
    set: &ProfileSet,
    profile: &Profile,
    web_identity: Option<(&str, &str)>,
    keys: Option<Keys>,
    allowed: Allowed<'_>,
) -> Result<Option<Source>, ProfileError> {
    if let Some(source) = profile.get("credential_source") {
        return named_source(profile, source, allowed).map(Some);
    }
    if let Some((role_arn, token_file)) = web_identity {
        let token_file = PathBuf::from(token_file);
        let plain = !token_file.components().any(|it| it == std::path::Component::ParentDir);
        let inside = plain && token_file.starts_with(allowed.directory);
        if !(allowed.process || inside) {
            return Err(ProfileError::NotAllowed {
                profile: profile.name().to_owned(),
                key: "web_identity_token_file",
                what: "is outside of the directory of the AWS files",
            });
        }
        return Ok(Some(Source::WebIdentity {
            role_arn: role_arn.to_owned(),
            session_name: profile.get("role_session_name").map(str::to_owned),
            token_file,
        }));
    }
    if let Some(sso) = sso(set, profile)? {
        return Ok(Some(Source::Sso(sso)));
    }
    if profile.get("login_session").is_some() {
        return Err(ProfileError::Person {
            profile: profile.name().to_owned(),
            what: "a session of `aws login`",
        });
    }
    if let Some(command) = profile.get("credential_process") {
        return Ok(Some(Source::Process(Secret::new(command))));
    }
    Ok(keys.map(Source::Keys))
}

fn sso(set: &ProfileSet, profile: &Profile) -> Result<Option<Sso>, ProfileError> {
    let session = profile.get("sso_session");
    let keys = ["sso_account_id", "sso_role_name", "sso_start_url", "sso_region"];
    if session.is_none() && keys.iter().all(|key| profile.get(key).is_none()) {
        return Ok(None);
    }
    let section = match session {
        None => None,
        Some(session) => Some(set.sso_session(session).ok_or_else(|| {
            let nearest = Suggestion::among(session, set.sso_sessions());
            wrong(profile, format!("there is no [sso-session {session}]{nearest}"))
        })?),
    };
    let of_session = |key: &str| match &section {
        Some(section) => section.get(key),
        None => profile.get(key),
    };
    let need = |key: &str, value: Option<&str>| {
        value
            .map(str::to_owned)
            .ok_or_else(|| wrong(profile, format!("{key} is missing")))
    };
    Ok(Some(Sso {
        session: session.map(str::to_owned),
        start_url: need("sso_start_url", of_session("sso_start_url"))?,
        region: need("sso_region", of_session("sso_region"))?,
        account: need("sso_account_id", profile.get("sso_account_id"))?,
        role: need("sso_role_name", profile.get("sso_role_name"))?,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r"
[default]
region = eu-west-1
aws_access_key_id = AKIADEFAULT
aws_secret_access_key = default-secret
[profile admin]
role_arn = arn:aws:iam::111122223333:role/admin
source_profile = default
external_id = between-us
role_session_name = me
duration_seconds = 1800
[profile through]
role_arn = arn:aws:iam::444455556666:role/there
source_profile = admin
[profile both]
role_arn = arn:aws:iam::111122223333:role/both
source_profile = both
aws_access_key_id = AKIABOTH
aws_secret_access_key = both-secret
aws_session_token = both-token
[sso-session corp]
sso_start_url = https://corp.awsapps.com/start
sso_region = eu-central-1
[profile sso]
sso_session = corp
sso_account_id = 111122223333
sso_role_name = Dev
[profile old-sso]
sso_start_url = https://old.awsapps.com/start
sso_region = us-east-1
sso_account_id = 111122223333
sso_role_name = Dev
[profile by-sso]
role_arn = arn:aws:iam::111122223333:role/by-sso
source_profile = sso
[profile web]
role_arn = arn:aws:iam::111122223333:role/web
web_identity_token_file = /aws/token
[profile env]
role_arn = arn:aws:iam::111122223333:role/env
credential_source = Environment
";

    async fn planned(config: &str, name: &str, process: bool) -> Result<Plan, String> {
        let set = parse(&as_sdk_files(Some(config), None))
            .await
            .map_err(|error| error.to_string())?;
        let allowed = Allowed {
            process,
            instance_profile: false,
            directory: Path::new("/aws"),
        };
        plan(&set, name, allowed).map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn ways_to_credentials() {
        let found = async |name: &str| planned(CONFIG, name, false).await.unwrap();
        let roles = |plan: &Plan| plan.roles.iter().map(|step| step.role_arn.clone()).collect::<Vec<_>>();
        let default = found("default").await;
        assert!(matches!(&default.source, Source::Keys(keys) if keys.access_key_id == "AKIADEFAULT"));
        assert_eq!(default.roles, []);
        let admin = found("admin").await;
        assert_eq!(admin.source, default.source);
        assert_eq!(
            admin.roles,
            [Step {
                role_arn: "arn:aws:iam::111122223333:role/admin".into(),
                external_id: Some(Secret::new("between-us")),
                session_name: Some("me".into()),
                seconds: Some(1800),
            }]
        );
        let through = found("through").await;
        assert_eq!(through.source, default.source);
        assert_eq!(
            roles(&through),
            [
                "arn:aws:iam::111122223333:role/admin",
                "arn:aws:iam::444455556666:role/there"
            ]
        );
        let both = found("both").await;
        assert!(matches!(&both.source, Source::Keys(keys) if keys.session_token.is_some()));
        assert_eq!(roles(&both), ["arn:aws:iam::111122223333:role/both"]);
        let sso = Source::Sso(Sso {
            session: Some("corp".into()),
            start_url: "https://corp.awsapps.com/start".into(),
            region: "eu-central-1".into(),
            account: "111122223333".into(),
            role: "Dev".into(),
        });
        assert_eq!(found("sso").await.source, sso);
        assert_eq!(found("by-sso").await.source, sso);
        assert_eq!(roles(&found("by-sso").await), ["arn:aws:iam::111122223333:role/by-sso"]);
        assert!(matches!(
            found("old-sso").await.source,
            Source::Sso(Sso { session: None, .. })
        ));
        assert!(matches!(found("web").await.source, Source::WebIdentity { .. }));
        assert_eq!(found("env").await.source, Source::Environment);
        let shown = format!("{:?} {:?}", both, admin);
        for secret in ["both-secret", "both-token", "default-secret", "between-us"] {
            assert!(!shown.contains(secret), "{shown}");
        }
    }

    #[tokio::test]
    async fn what_leads_nowhere_says_why() {
        for (config, message) in [
            ("[profile other]\nregion = x", "there is no profile \"p\""),
            (
                "[profile pp]\nregion = x",
                "there is no profile \"p\"; did you mean pp?",
            ),
            (
                "[profile p]\nregion = eu-west-1",
                "profile \"p\" has no credentials: expected keys, sso_session, role_arn, web_identity_token_file or credential_process",
            ),
            (
                "[profile p]\naws_access_key_id = A",
                "profile \"p\": expected both of aws_access_key_id and aws_secret_access_key",
            ),
            (
                "[profile p]\nrole_arn = r",
                "profile \"p\": expected one of source_profile and credential_source beside role_arn",
            ),
            (
                "[profile p]\nrole_arn = r\nsource_profile = q",
                "there is no profile \"q\", which profile \"p\" names",
            ),
            (
                "[profile p]\nrole_arn = r\nsource_profile = q\n[profile q]\nrole_arn = s\nsource_profile = p",
                "profile \"p\": its source_profile leads back to it",
            ),
            (
                "[profile p]\nrole_arn = r\ncredential_source = Ec2InstanceMetadata",
                "profile \"p\": credential_source = Ec2InstanceMetadata leads to the address that this daemon answers: it cannot be its own base",
            ),
            (
                "[profile p]\nrole_arn = r\ncredential_source = ecscontainer",
                "profile \"p\": credential_source = ecscontainer leads to the address that this daemon answers: it cannot be its own base",
            ),
            (
                "[profile p]\nrole_arn = r\ncredential_source = Vault",
                "profile \"p\": credential_source = \"Vault\": expected Environment",
            ),
            (
                "[profile p]\nrole_arn = r\nmfa_serial = m\nsource_profile = p",
                "profile \"p\" wants an MFA code (mfa_serial), which a daemon cannot give",
            ),
            (
                "[profile p]\nlogin_session = arn",
                "profile \"p\" wants a session of `aws login`, which a daemon cannot give",
            ),
            (
                "[profile p]\nrole_arn = r\nduration_seconds = 1h\nsource_profile = p",
                "profile \"p\": duration_seconds = \"1h\": expected a number from 900 to 43200",
            ),
            (
                "[profile p]\nsso_session = crop\n[sso-session corp]\nsso_region = x",
                "profile \"p\": there is no [sso-session crop]; did you mean corp?",
            ),
            (
                "[profile p]\nsso_session = c\nsso_account_id = 1\nsso_role_name = r\n[sso-session c]\nsso_region = x",
                "profile \"p\": sso_start_url is missing",
            ),
        ] {
            assert_eq!(planned(config, "p", true).await.unwrap_err(), message, "{config}");
        }
    }

    #[tokio::test]
    async fn what_runs_code_or_names_endpoints_must_be_allowed() {
        for (lines, what) in [
            ("credential_process = /bin/true", "credential_process runs a program"),
            (
                "aws_access_key_id = A\naws_secret_access_key = S\nendpoint_url = http://evil",
                "endpoint_url names an endpoint, which is given signed requests",
            ),
            (
                "aws_access_key_id = A\naws_secret_access_key = S\nservices = s",
                "services may name endpoints, which are given signed requests",
            ),
            (
                "role_arn = r\nweb_identity_token_file = /etc/shadow",
                "web_identity_token_file is outside of the directory of the AWS files",
            ),
            (
                "role_arn = r\nweb_identity_token_file = /aws/../etc/shadow",
                "web_identity_token_file is outside of the directory of the AWS files",
            ),
        ] {
            // In the profile itself, and in one that it leads to.
            let direct = format!("[profile p]\n{lines}");
            let behind = format!("[profile p]\nrole_arn = r\nsource_profile = q\n[profile q]\n{lines}");
            for (config, profile) in [(direct, "p"), (behind, "q")] {
                assert_eq!(
                    planned(&config, "p", false).await.unwrap_err(),
                    format!("profile {profile:?}: {what}; [credentials] allow_process = true allows it")
                );
                assert!(planned(&config, "p", true).await.is_ok(), "{config}");
            }
        }
    }
}
