//! Settings, and what was learnt since: what every container is resolved with.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::host_mode::Kept;
use super::{NOTHING_OF_HOST, base_identity};
use crate::clock::Clock;
use crate::config::{Attach, CredentialSource, RELOADED, Settings};
use crate::containers::reconciler::{Hold, Instances};
use crate::containers::{Definition, NetworkEndpoints, ProofLevel};
use crate::credentials::broker::{Broker, LINGER, LINGER_NEVER_STARTED, Lease};
use crate::credentials::sts::Sts;
use crate::credentials::{Session, offline};
use crate::instance::{At, FALLBACK_REGION, Instance, RuntimeFacts, resolve_sparingly};
use crate::metadata::tree::REGION;
use crate::orders::RuntimeOverrides;

/// Settings, and what was learnt since.
pub(super) struct Resolver {
    pub(super) settings: ArcSwap<Settings>,
    pub(super) level: ProofLevel,
    /// The host has its own metadata service, and keeps it.
    pub(super) kept: Option<Kept>,
    /// Why EC2 says nothing of this host, though containers are to see that.
    pub(super) of_host_problem: ArcSwapOption<String>,
    pub(super) facts: ArcSwap<RuntimeFacts>,
    pub(super) orders: Arc<RuntimeOverrides>,
    pub(super) clock: Clock,
    pub(super) broker: Arc<Broker>,
    pub(super) changed: watch::Sender<u64>,
    /// Profiles whose base credentials somebody's role depends on.
    pub(super) wanted: base_identity::Wanted,
    /// Where real credentials come from.
    pub(super) sts: Option<Sts>,
}

impl Resolver {
    pub(super) fn region(&self) -> String {
        let facts = self.facts.load();
        let of_host = || facts.instance.get(REGION).cloned();
        self.settings
            .load()
            .region
            .clone()
            .or_else(of_host)
            .or_else(|| facts.base.region.clone())
            .unwrap_or_else(|| FALLBACK_REGION.to_owned())
    }

    pub(super) fn account(&self) -> Option<String> {
        let offline =
            || (self.settings.load().source == CredentialSource::Offline).then(|| offline::ACCOUNT.to_owned());
        self.settings
            .load()
            .account_id
            .clone()
            .or_else(|| self.facts.load().base.account.clone())
            .or_else(offline)
    }

    pub(super) fn attach(&self) -> &'static str {
        match self.settings.load().attach {
            Attach::Network => "network",
            _ if self.attaches() => "namespace",
            _ => "host",
        }
    }

    pub(super) fn proof(&self) -> &'static str {
        match self.level {
            ProofLevel::Full => "full",
            ProofLevel::Address => "address",
        }
    }

    pub(super) fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if self.settings.load().source == CredentialSource::Offline {
            warnings.push("credentials are fakes (offline): AWS does not know them".to_owned());
        }
        if self.settings.load().allow.is_empty() {
            warnings.push(
                "any container gets any role that it names and that the base credentials may assume: \
                 there are no [[allow]] rules"
                    .to_owned(),
            );
        }
        let facts = self.facts.load();
        let known = facts.base.region.is_some() || facts.instance.contains_key(REGION);
        if self.settings.load().region.is_none() && !known {
            warnings.push(format!(
                "no region is configured; {FALLBACK_REGION} is a guess: --region, AWS_REGION or region = \"…\""
            ));
        }
        if let Some(kept) = self.kept {
            warnings.push(format!(
                "this host keeps its own metadata service ({kept}): containers in the host's network are its processes, and get \
                 that one, with the host's role; all others are rejected there until they are served"
            ));
        }
        warnings.extend(self.of_host_problem.load().as_deref().cloned());
        if self.settings.load().metadata_of_host && self.kept.is_none_or(|kept| kept.ec2().is_none()) {
            warnings.push(NOTHING_OF_HOST.to_owned());
        }
        if self.level == ProofLevel::Address {
            warnings.push(
                "callers are proven by their address only: a neighbour with NET_RAW on the same bridge can send with it and \
                 take another's credentials; --cap-drop NET_RAW, a network each, or full proof closes that"
                    .to_owned(),
            );
        }
        warnings
    }
}

impl Instances for Resolver {
    fn resolve(
        &self,
        container: &Arc<Definition>,
        attachments: &Arc<NetworkEndpoints>,
        started: SystemTime,
    ) -> Instance {
        let at = At {
            started,
            now: self.clock.wall(),
            ordered: self.orders.of(&container.id).unwrap_or_default(),
        };
        let (settings, facts) = (self.settings.load_full(), self.facts.load_full());
        let instance = resolve_sparingly(container, attachments, at, &settings, &facts);
        if let Some(profile) = &instance.profile {
            self.want(profile);
        }
        instance
    }

    fn hold(&self, session: &Arc<Session>) -> Box<dyn Hold> {
        let mut lease = self.broker.lease(session);
        lease.set_linger(LINGER_NEVER_STARTED);
        Box::new(lease)
    }

    fn attaches(&self) -> bool {
        let inside = matches!(self.settings.load().attach, Attach::Auto | Attach::Namespace);
        self.level == ProofLevel::Full && inside
    }

    fn image_labels_count(&self) -> bool {
        self.settings.load().image_labels
    }
}

impl Hold for Lease {
    fn session(&self) -> &Arc<Session> {
        Self::session(self)
    }

    fn started(&mut self) {
        self.set_linger(LINGER);
    }
}

/// Takes each new configuration, and has every container looked at again: a role that is no longer allowed is no longer
/// served from then on.
pub(super) async fn reload(mut reloads: mpsc::Receiver<Settings>, resolver: Arc<Resolver>) {
    while let Some(new) = reloads.recv().await {
        let (settings, whole) = resolver.settings.load().reloaded(&new);
        resolver.settings.store(Arc::new(settings));
        resolver.changed.send_modify(|version| *version += 1);
        resolver.broker.try_again(|_| true);
        info!("the configuration has been read again");
        if !whole {
            warn!(
                "some of what has changed in it takes effect when the daemon is started again: {RELOADED} take effect now"
            );
        }
        for warning in resolver.warnings() {
            warn!("{warning}");
        }
    }
}
