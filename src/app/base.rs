//! Whose the base credentials are: learnt from STS for the daemon itself and for every profile that a container names, and
//! learnt anew whenever the files change or something is handed over.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tracing::{info, warn};

use super::Resolver;
use crate::clock::Clock;
use crate::config::Settings;
use crate::containers::index::Index;
use crate::credentials::base::{Bases, Setup};
use crate::credentials::broker::ProviderError;
use crate::credentials::files::AwsFiles;
use crate::credentials::sts::Sts;
use crate::instance::{Base, Surroundings};

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

/// Adds what is known of a base; whether that is new.
pub(super) fn note(around: &mut Surroundings, name: Option<&str>, base: Base) -> bool {
    let known = match name {
        None => &mut around.base,
        Some(name) => around.profiles.entry(name.to_owned()).or_default(),
    };
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
            return;
        }
    }
}

impl Resolver {
    /// Takes in what is known of a base, and has every container looked at again if that is new.
    fn note(&self, name: Option<&str>, base: Base) -> bool {
        let mut around = Surroundings::clone(&self.around.load());
        let new = note(&mut around, name, base);
        if new {
            self.around.store(Arc::new(around));
            self.changed.send_modify(|version| *version += 1);
        }
        new
    }

    fn forget(&self, name: &Name) {
        if let Some(profile) = name {
            let mut around = Surroundings::clone(&self.around.load());
            around.profiles.remove(profile);
            self.around.store(Arc::new(around));
        }
        self.wanted.send_if_modified(|wanted| wanted.remove(name));
    }

    /// Somebody's role depends on the base of this profile.
    pub(super) fn want(&self, profile: &str) {
        let known = self.around.load().profiles.contains_key(profile);
        if !known {
            self.wanted
                .send_if_modified(|wanted| wanted.insert(Some(profile.to_owned())));
        }
    }
}

/// The bases that are wanted.
pub(super) type Wanted = watch::Sender<BTreeSet<Name>>;
