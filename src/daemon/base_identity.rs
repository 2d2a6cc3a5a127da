//! Whose the base credentials are: learnt from STS for the daemon itself and for every profile that a container names, and
//! learnt anew whenever the files change or something is handed over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{info, warn};

use super::host_mode::Kept;
use super::resolver::Resolver;
use crate::admin::{BaseStatus, Handover, Trust};
use crate::clock::{Clock, rfc3339_seconds};
use crate::config::Settings;
use crate::containers::index::Index;
use crate::credentials::base::{BaseState, Bases, HandedOver, Setup};
use crate::credentials::broker::ProviderError;
use crate::credentials::files::AwsFiles;
use crate::credentials::profile::Keys;
use crate::credentials::sts::Sts;
use crate::credentials::{RoleSession, Secret};
use crate::instance::{Base, RuntimeFacts};

/// The first and the longest pause between two questions who the base is.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));

/// A base by its profile; `None`: the daemon's own.
type Name = Option<String>;

/// The base credentials of this process's environment.
pub(super) fn bases(settings: &Settings, clock: &Clock) -> Arc<Bases> {
    // Variables that are no text are none of ours.
    let variables: std::collections::HashMap<_, _> = std::env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect();
    let files = AwsFiles::find(settings.aws_dir.as_deref(), |name| variables.get(name).cloned());
    let setup = Setup {
        profile: settings.profile.clone(),
        region: settings.region.clone(),
        files,
        allow_process: settings.allow_process,
        instance_metadata: Kept::here(settings).and_then(|kept| kept.ec2()),
        variables,
    };
    Bases::new(setup, clock.clone())
}

/// What STS says of a base now.
pub(super) async fn ask(sts: &Sts, name: Option<&str>) -> (Base, Option<ProviderError>) {
    let region = sts.region(name).await;
    match sts.base_identity(name).await {
        Ok(identity) => (
            Base {
                account: Some(identity.account),
                arn: Some(identity.arn),
                region,
                problem: None,
            },
            None,
        ),
        Err(error) => (
            Base {
                region,
                problem: Some(error.to_string()),
                ..Base::default()
            },
            Some(error),
        ),
    }
}

/// Adds what is known of a base; whether that is new. Who it is, once known, is kept while it cannot be asked: what its
/// containers have is as good as it was.
pub(super) fn note(facts: &mut RuntimeFacts, name: Option<&str>, mut base: Base) -> bool {
    let known = match name {
        None => &mut facts.base,
        Some(name) => facts.profiles.entry(name.to_owned()).or_default(),
    };
    if base.arn.is_none() {
        (base.arn, base.account) = (known.arn.clone(), known.account.clone());
    }
    base.region = base.region.or_else(|| known.region.clone());
    if *known == base {
        return false;
    }
    *known = base;
    true
}

/// Learns of every base that is wanted, until the task is dropped.
pub(super) async fn learn(sts: Sts, bases: Arc<Bases>, resolver: Arc<Resolver>, index: Arc<Index>) {
    let mut changes = bases.changes();
    let mut wanted = resolver.wanted.subscribe();
    let mut tasks = JoinSet::new();
    let mut learning: BTreeMap<Name, AbortHandle> = BTreeMap::new();
    loop {
        let names: BTreeSet<Name> = wanted.borrow_and_update().clone();
        for name in names.iter().cloned().chain([None]) {
            learning.entry(name.clone()).or_insert_with(|| {
                let (sts, resolver, index) = (sts.clone(), resolver.clone(), index.clone());
                tasks.spawn(learn_one(sts, resolver, index, name))
            });
        }
        learning.retain(|name, _| name.is_none() || names.contains(name));
        tokio::select! {
            // Neither sender ends before this task does.
            _ = wanted.changed() => {}
            _ = changes.changed() => {
                for (_, task) in std::mem::take(&mut learning) {
                    task.abort();
                }
                // Whatever failed may work now.
                resolver.broker.try_again(|_| true);
            }
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn learn_one(sts: Sts, resolver: Arc<Resolver>, index: Arc<Index>, name: Name) {
    let mut pause = PAUSES.0;
    loop {
        let (base, error) = ask(&sts, name.as_deref()).await;
        let arn = base.arn.clone();
        let new = resolver.note(name.as_deref(), base);
        let profile = name.as_deref().unwrap_or("(the daemon's own)");
        match error {
            None => {
                if new {
                    info!(profile, arn, "base credentials");
                }
                return;
            }
            // That is said by the base itself, and again.
            Some(ProviderError::NeedsAttention { .. }) => {}
            Some(error) if new => warn!(profile, %error, "base credentials are not usable yet"),
            Some(_) => {}
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
        // Containers that named it are gone: nothing is learnt for nobody.
        let in_use = |name: &String| {
            index
                .all()
                .iter()
                .any(|record| record.instance.profile.as_ref() == Some(name))
        };
        if pause == PAUSES.1 && name.as_ref().is_some_and(|name| !in_use(name)) {
            resolver.forget(&name);
            sts.forget(name.as_deref().unwrap_or_default());
            return;
        }
    }
}

impl Resolver {
    /// Takes in what is known of a base, and has every container looked at again if that is new.
    fn note(&self, name: Option<&str>, base: Base) -> bool {
        let mut new = false;
        // Others learn at the same time.
        self.facts.rcu(|facts| {
            let mut facts = RuntimeFacts::clone(facts);
            new = note(&mut facts, name, base.clone());
            facts
        });
        if new {
            self.changed.send_modify(|version| *version += 1);
        }
        new
    }

    fn forget(&self, name: &Name) {
        if let Some(profile) = name {
            self.facts.rcu(|facts| {
                let mut facts = RuntimeFacts::clone(facts);
                facts.profiles.remove(profile);
                facts
            });
        }
        self.wanted.send_if_modified(|wanted| wanted.remove(name));
    }

    /// Somebody's role depends on the base of this profile.
    pub(super) fn want(&self, profile: &str) {
        let known = self.facts.load().profiles.contains_key(profile);
        if !known {
            self.wanted
                .send_if_modified(|wanted| wanted.insert(Some(profile.to_owned())));
        }
    }
}

/// The bases that are wanted.
pub(super) type Wanted = watch::Sender<BTreeSet<Name>>;

/// A base for `status`.
pub(super) fn status(profile: Name, state: BaseState, arn: Option<String>) -> BaseStatus {
    let (word, command) = match &state.error {
        Some(ProviderError::NeedsAttention { command, .. }) => ("needs attention", Some(command.clone())),
        Some(_) if state.origin.is_none() => ("failed", None),
        _ => ("good", None),
    };
    BaseStatus {
        profile,
        state: word.to_owned(),
        origin: state.origin,
        arn,
        until: state.until.map(rfc3339_seconds),
        error: state.error.map(|error| error.to_string()),
        command,
    }
}

/// Takes over what was handed to us on the admin socket.
pub(super) fn login(sts: &Sts, profile: Option<&str>, handover: &Handover) -> Result<String, String> {
    let until = match &handover.expiration {
        None => None,
        Some(text) => Some(
            text.parse::<jiff::Timestamp>()
                .map_err(|_| format!("Expiration {text:?} is not a time; expected 2026-01-05T10:11:12Z"))?
                .into(),
        ),
    };
    let keys = Keys {
        access_key_id: handover.access_key_id.clone(),
        secret_access_key: Secret::new(&*handover.secret_access_key),
        session_token: handover.session_token.as_deref().map(Secret::new),
    };
    sts.hand_over(profile, HandedOver { keys, until })?;
    Ok(format!(
        "handed over for {}, {}; kept in memory until then, or until imds-router is stopped",
        profile.map_or("the daemon itself".to_owned(), |profile| format!("profile {profile}")),
        handover
            .expiration
            .as_ref()
            .map_or("which does not say when they expire".to_owned(), |until| format!(
                "until {until}"
            ))
    ))
}

/// What the roles that a session goes through must trust: the base the first, each the one before.
pub(super) fn trust(session: &RoleSession, base: Option<&str>) -> Vec<Trust> {
    let mut principal = base.map_or_else(
        || "(the base credentials are not known yet)".to_owned(),
        trusted_principal,
    );
    let mut policies = Vec::new();
    for (number, role) in session.chain.iter().chain([&session.role]).enumerate() {
        let last = number == session.chain.len();
        let mut actions = vec!["sts:AssumeRole"];
        if last && !session.tags.is_empty() {
            actions.push("sts:TagSession");
        }
        // It is set with the first role and stays; a role that does not allow it refuses the whole.
        if session.source_identity.is_some() {
            actions.push("sts:SetSourceIdentity");
        }
        let mut statement = serde_json::json!({
            "Effect": "Allow",
            "Principal": { "AWS": principal },
            "Action": actions,
        });
        if let Some(id) = session.external_id.as_ref().filter(|_| last) {
            statement["Condition"] = serde_json::json!({ "StringEquals": { "sts:ExternalId": id.reveal() } });
        }
        policies.push(Trust {
            role: role.to_string(),
            statement,
        });
        principal = role.to_string();
    }
    policies
}

/// The principal that a trust policy names for a caller: for a session of a role, the role. Its path is not in the ARN of
/// the session.
fn trusted_principal(arn: &str) -> String {
    let role = arn.split_once(":assumed-role/").and_then(|(head, session)| {
        let head = head.replacen(":sts:", ":iam:", 1);
        Some(format!("{head}:role/{}", session.split('/').next()?))
    });
    role.unwrap_or_else(|| arn.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::RoleArn;

    fn arn(name: &str) -> RoleArn {
        RoleArn::parse(&format!("arn:aws:iam::111122223333:role/{name}")).unwrap()
    }

    #[test]
    fn who_a_base_is_is_known_while_it_cannot_be_asked() {
        let base = |account: Option<&str>, problem: Option<&str>| Base {
            account: account.map(str::to_owned),
            arn: account.map(|account| format!("arn:aws:iam::{account}:user/me")),
            region: account.map(|_| "eu-west-1".to_owned()),
            problem: problem.map(str::to_owned),
        };
        let mut facts = RuntimeFacts::default();
        for name in [None, Some("p")] {
            assert!(note(&mut facts, name, base(None, Some("down"))));
            assert!(note(&mut facts, name, base(Some("1"), None)));
            assert!(!note(&mut facts, name, base(Some("1"), None)));
            assert!(note(&mut facts, name, base(None, Some("down"))));
            let known = facts.base(name);
            assert_eq!(
                (known.account.as_deref(), known.problem.as_deref()),
                (Some("1"), Some("down"))
            );
            assert_eq!(known.region.as_deref(), Some("eu-west-1"));
            assert!(note(&mut facts, name, base(Some("2"), None)));
            assert_eq!(*facts.base(name), base(Some("2"), None));
        }
    }

    #[test]
    fn what_roles_must_trust() {
        let mut session = RoleSession::new(arn("x"), "s1", Duration::from_secs(3600), "us-east-1");
        let user = Some("arn:aws:iam::111122223333:user/me");
        let plain = trust(&session, user);
        assert_eq!(plain.len(), 1);
        assert_eq!(
            plain[0].statement,
            serde_json::json!({
                "Effect": "Allow",
                "Principal": { "AWS": "arn:aws:iam::111122223333:user/me" },
                "Action": ["sts:AssumeRole"],
            })
        );
        session.chain = vec![arn("between")];
        session.external_id = Some(Secret::new("word"));
        session.tags.insert("team".into(), "a".into());
        session.source_identity = Some("me".into());
        let all = trust(&session, Some("arn:aws-cn:sts::111122223333:assumed-role/dev/me"));
        let statements: Vec<_> = all.iter().map(|it| (it.role.as_str(), &it.statement)).collect();
        assert_eq!(
            statements,
            [
                (
                    "arn:aws:iam::111122223333:role/between",
                    &serde_json::json!({
                        "Effect": "Allow",
                        "Principal": { "AWS": "arn:aws-cn:iam::111122223333:role/dev" },
                        "Action": ["sts:AssumeRole", "sts:SetSourceIdentity"],
                    })
                ),
                (
                    "arn:aws:iam::111122223333:role/x",
                    &serde_json::json!({
                        "Effect": "Allow",
                        "Principal": { "AWS": "arn:aws:iam::111122223333:role/between" },
                        "Action": ["sts:AssumeRole", "sts:TagSession", "sts:SetSourceIdentity"],
                        "Condition": { "StringEquals": { "sts:ExternalId": "word" } },
                    })
                ),
            ]
        );
    }
}
