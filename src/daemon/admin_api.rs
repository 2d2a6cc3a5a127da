//! What the operator sees of the running daemon, and orders: `status`, `explain`, `trigger`, `modify`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use futures_util::future::BoxFuture;

use super::resolver::Resolver;
use super::{IMDS_ADDRESS, base_identity, client_settings, metrics, self_probe};
use crate::admin::{
    self, AdminApi, BaseStatus, ClockStatus, ConnectionStatus, ContainerStatus, CredentialStatus, EngineStatus,
    ExplainStep, Explanation, RefusalStatus, RequestStatus, Status,
};
use crate::clock::{Clock, rfc3339_seconds};
use crate::config::{Attach, CredentialSource};
use crate::containers::connection_slots::{self, ConnectionSlots};
use crate::containers::docker::Lag;
use crate::containers::index::EngineState;
use crate::containers::reconciler::Instances as _;
use crate::containers::{ContainerId, NetworkMode, ProofLevel, Record};
use crate::credentials::Session;
use crate::credentials::sts::Sts;
use crate::descriptors;
use crate::instance::{Ordered, Role};
use crate::logging::{printable, with_causes};
use crate::metadata::events::{Event, Kind};
use crate::orders::to_stop;
use crate::server::{RefusedConnection, Service};

/// A clock that is off by more than so many seconds is warned of; AWS takes requests that are off by five minutes.
const CLOCK_IS_WRONG: u64 = 60;
/// What is said of a container in the host's network where the host keeps its own metadata service.
const GETS_THE_HOSTS: &str = "it is in the host's network, where it gets the host's own metadata service, with the host's role, and \
    not this one: give it a network of its own";

/// Makes `status`.
pub(super) struct Observer {
    pub(super) resolver: Arc<Resolver>,
    pub(super) service: Arc<Service>,
    pub(super) clock: Clock,
    /// Where, on the host; `None`: nowhere, since that has its own.
    pub(super) listening: Option<SocketAddr>,
    /// Who serves this host instead.
    pub(super) standing_by: ArcSwapOption<String>,
    pub(super) lag: Arc<Lag>,
}

impl AdminApi for Observer {
    fn status(&self) -> Status {
        let (state, reason) = match &*self.service.index.engine() {
            EngineState::Away(why) => ("away", Some(why.clone())),
            EngineState::Synchronising => ("synchronising", self.failing()),
            EngineState::Synchronised => ("synchronised", self.failing()),
        };
        let source = match self.resolver.settings.load().source {
            CredentialSource::Sts => "sts",
            CredentialSource::Offline => "offline",
        };
        let standing_by = self.standing_by.load_full();
        let standing_by = standing_by
            .map(|who| format!("standing by: {who} serves this host; this one takes over when that one ends"));
        let refused = self
            .service
            .refusals()
            .into_iter()
            .map(|(reason, count)| (reason.to_owned(), count));
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            attach: self.resolver.attach().to_owned(),
            proof: self.resolver.proof().to_owned(),
            source: source.to_owned(),
            listening: self.listening(),
            engine: EngineStatus {
                state: state.to_owned(),
                reason,
            },
            region: self.resolver.region(),
            account: self.resolver.account(),
            warnings: self
                .resolver
                .warnings()
                .into_iter()
                .chain(self.clock_warnings())
                .chain(shortages())
                .chain(standing_by)
                .collect(),
            bases: self.bases(),
            clock: self.clock_status(),
            containers: self
                .service
                .index
                .all()
                .iter()
                .map(|record| self.container(record))
                .collect(),
            refused_connections: refused.collect::<BTreeMap<_, _>>(),
        }
    }

    fn explain(&self, container: &str) -> Option<Explanation> {
        let record = self.meant(container)?;
        let about = |refused: &RefusedConnection| match refused.refusal.container() {
            Some(container) => *container == record.definition.id,
            None => record
                .attachments
                .addresses()
                .any(|address| address == refused.client.ip()),
        };
        let refused = self
            .service
            .last_refusals()
            .into_iter()
            .filter(about)
            .map(|refused| RefusalStatus {
                at: rfc3339_seconds(refused.at),
                client: refused.client.to_string(),
                reason: refused.refusal.reason().to_owned(),
                evidence: refused.refusal.to_string(),
            });
        Some(Explanation {
            id: record.definition.id.as_str().to_owned(),
            name: record.definition.name.clone(),
            steps: self.judge(&record),
            refused: refused.collect(),
        })
    }

    fn trust(&self, container: &str) -> Option<Vec<admin::Trust>> {
        let record = self.meant(container)?;
        let facts = self.resolver.facts.load();
        Some(match record.instance.role.session().map(|session| &**session) {
            Some(Session::Role(session)) => {
                base_identity::trust(session, facts.base(session.profile.as_deref()).arn.as_deref())
            }
            _ => Vec::new(),
        })
    }

    fn modify(&self, container: &str, modify: &admin::Modify) -> Result<admin::Options, admin::ApiError> {
        let record = self.meant(container).ok_or(admin::ApiError::NoContainer)?;
        let hops = modify.http_put_response_hop_limit;
        if hops.is_some_and(|hops| !(1..=64).contains(&hops)) {
            return Err(admin::ApiError::Wrong(
                "http-put-response-hop-limit: expected a whole number from 1 to 64".to_owned(),
            ));
        }
        self.order(&record, |ordered| {
            let options = &mut ordered.options;
            options.endpoint = modify.http_endpoint.or(options.endpoint);
            options.tokens_required = modify.http_tokens_required.or(options.tokens_required);
            options.hop_limit = hops.or(options.hop_limit);
            options.tags = modify.instance_metadata_tags.or(options.tags);
            options.ipv6 = modify.http_protocol_ipv6.or(options.ipv6);
        })?;
        let container = &record.definition;
        let attachments = &record.attachments;
        let started = record
            .life
            .as_ref()
            .map_or_else(|| self.clock.wall(), |life| life.started);
        let instance = self.resolver.resolve(container, attachments, started);
        let word = |on| if on { "enabled" } else { "disabled" }.to_owned();
        Ok(admin::Options {
            http_endpoint: word(instance.endpoint),
            http_tokens: if instance.tokens_required {
                "required"
            } else {
                "optional"
            }
            .to_owned(),
            http_put_response_hop_limit: instance.hop_limit,
            instance_metadata_tags: word(instance.tags),
            http_protocol_ipv6: word(instance.ipv6),
        })
    }

    fn trigger(&self, container: &str, trigger: &admin::Trigger) -> Result<Vec<admin::EventStatus>, admin::ApiError> {
        let wrong = |text: String| admin::ApiError::Wrong(text);
        let record = self.meant(container).ok_or(admin::ApiError::NoContainer)?;
        let kind = Kind::parse(&trigger.event).ok_or_else(|| {
            let names: Vec<_> = Kind::ALL.into_iter().map(Kind::name).collect();
            wrong(format!("event {:?}: expected {}", trigger.event, names.join(", ")))
        })?;
        let action = kind.action(trigger.action.as_deref()).ok_or_else(|| {
            let typed = trigger.action.as_deref().unwrap_or_default();
            match kind.actions() {
                [] => wrong(format!("action {typed:?}: {} has none to choose", kind.name())),
                actions => wrong(format!("action {typed:?}: expected {}", actions.join(", "))),
            }
        })?;
        let decided = self.clock.wall_seconds();
        let wait = trigger.in_seconds.unwrap_or(kind.lead().as_secs());
        if wait > MOST_AHEAD {
            return Err(wrong(format!("in {wait} s: expected at most a year")));
        }
        let stops = match trigger.stop {
            true if trigger.cancel => return Err(wrong("stop and cancel: expected one of them".to_owned())),
            true => {
                let permitted = self.resolver.settings.load().triggers_may_stop;
                Some(to_stop(&record, kind, permitted).map_err(|why| wrong(why.to_string()))?)
            }
            false => None,
        };
        let known = record.instance.events.iter().find(|event| event.kind == kind).cloned();
        if trigger.cancel && known.as_ref().is_none_or(|event| event.cancelled) {
            return Err(wrong(format!("there is no {} to cancel", kind.name())));
        }
        let event = match known {
            // One that a label has brought is called off by an order, too.
            Some(event) if trigger.cancel => Event {
                cancelled: true,
                ..event
            },
            _ => Event {
                kind,
                action: action.to_owned(),
                decided,
                at: decided + wait,
                cancelled: false,
                stops,
            },
        };
        let ordered = self.order(&record, |ordered| {
            ordered.events.retain(|it| it.kind != kind);
            ordered.events.push(event);
        })?;
        let mut all: Vec<_> = record.instance.events.clone();
        all.retain(|event| !ordered.events.iter().any(|it| it.kind == event.kind));
        all.extend(ordered.events);
        Ok(self.event_statuses(&all))
    }

    fn events(&self, container: &str) -> Option<Vec<admin::EventStatus>> {
        Some(self.event_statuses(&self.meant(container)?.instance.events))
    }

    fn identity_certificate(&self) -> String {
        self.service.signer.certificate().to_owned()
    }

    fn login(&self, profile: Option<&str>, handover: &admin::Handover) -> Result<String, String> {
        match &self.resolver.sts {
            Some(sts) => base_identity::login(sts, profile, handover),
            None => Err("this daemon is offline: it has no base credentials".to_owned()),
        }
    }

    fn metrics(&self) -> (&'static str, String) {
        (metrics::CONTENT_TYPE, metrics::text(self))
    }

    fn readiness(&self) -> BoxFuture<'_, Result<String, String>> {
        Box::pin(async {
            if let Some(who) = &*self.standing_by.load() {
                return Ok(format!("stands by: {who} serves this host"));
            }
            // Where the host keeps its own service, that is who would answer.
            let at = self.listening.filter(|_| self.resolver.kept.is_none());
            self_probe::probe(&self.service, at.map(|it| it.ip())).await?;
            Ok(self.reach())
        })
    }
}

/// Does what blocks for a moment, without holding up other tasks of the runtime.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    let runtime = tokio::runtime::Handle::try_current();
    match runtime.is_ok_and(|it| it.runtime_flavor() == tokio::runtime::RuntimeFlavor::MultiThread) {
        true => tokio::task::block_in_place(work),
        false => work(),
    }
}

/// The furthest that an event may be ahead: a year, in seconds.
const MOST_AHEAD: u64 = 365 * 24 * 3600;

impl Observer {
    pub(super) fn listening(&self) -> String {
        match self.listening {
            Some(at) => at.to_string(),
            None => format!("{IMDS_ADDRESS}, inside containers only"),
        }
    }

    /// The call to the engine that fails, if one does.
    fn failing(&self) -> Option<String> {
        self.service.index.failing().as_deref().map(self_probe::failing)
    }

    /// How many containers reach the service, as of the last change of each one's link. A container that breaks its own link
    /// does not make the daemon unready.
    fn reach(&self) -> String {
        let all = self.service.index.all();
        let broken = all.iter().filter(|record| {
            let life = record.life.as_ref().filter(|life| life.alive());
            record.not_attached.is_some() || life.is_some_and(|life| life.handle.path_problem().is_some())
        });
        let broken: Vec<_> = broken.map(|record| record.definition.name.as_str()).collect();
        let serves = format!("serves {} containers", all.len() - broken.len());
        match broken.as_slice() {
            [] => serves,
            [first, ..] => format!("{serves}; {} have no link that works, such as {first}", broken.len()),
        }
    }

    /// Orders something for a container, and has it looked at again.
    fn order(&self, record: &Record, change: impl FnOnce(&mut Ordered)) -> Result<Ordered, admin::ApiError> {
        let index = &self.service.index;
        let exists = |id: &ContainerId| !index.is_gone(id);
        // It syncs the file.
        let ordered = blocking(|| self.resolver.orders.order(&record.definition.id, exists, change));
        let ordered = ordered.map_err(|error| admin::ApiError::Failed(with_causes(&error)))?;
        self.resolver.changed.send_modify(|version| *version += 1);
        Ok(ordered)
    }

    fn event_statuses(&self, events: &[Event]) -> Vec<admin::EventStatus> {
        let now = self.clock.wall_seconds();
        let time = |seconds| rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        let statuses = events.iter().map(|event| admin::EventStatus {
            event: event.kind.name().to_owned(),
            action: Some(event.action.clone()).filter(|action| !action.is_empty()),
            at: time(event.at),
            noticed: time(event.noticed()),
            state: match (event.cancelled, event.noticed() <= now, event.at <= now) {
                (true, ..) => "cancelled",
                (_, false, _) => "not told yet",
                (_, true, false) => "told",
                (_, _, true) => "over",
            }
            .to_owned(),
            stops: event.stops.is_some() && !event.cancelled,
        });
        statuses.collect()
    }

    fn bases(&self) -> Vec<BaseStatus> {
        let states = self.resolver.sts.as_ref().map(Sts::states).unwrap_or_default();
        let facts = self.resolver.facts.load();
        let states = states.into_iter();
        states
            .map(|(profile, state)| {
                // The daemon's own base has its profile's name, if it was given one.
                let own = profile == self.resolver.settings.load().profile;
                let base = facts.base(profile.as_deref().filter(|_| !own));
                base_identity::status(profile, state, base.arn.clone())
            })
            .collect()
    }

    fn clock_status(&self) -> ClockStatus {
        let skew = self.clock.skew();
        ClockStatus {
            ahead_of_aws: skew.aws,
            ahead_of_rtc: skew.rtc,
            last_shift: skew.last.map(|(at, _)| rfc3339_seconds(at)),
            last_shift_seconds: skew.last.map(|(_, shift)| shift.wall / 1000),
            last_sleep_seconds: skew.last.map(|(_, shift)| shift.slept.as_secs()),
        }
    }

    /// What a wrong clock does, and how it is put right.
    fn clock_warnings(&self) -> Option<String> {
        let skew = self.clock.skew();
        let (seconds, than) = match (skew.aws, skew.rtc) {
            (Some(aws), _) => (aws, "AWS's"),
            (None, Some(rtc)) => (rtc, "the machine's battery-backed one"),
            (None, None) => return None,
        };
        let (off, way) = (seconds.unsigned_abs(), if seconds < 0 { "behind" } else { "ahead of" });
        (off > CLOCK_IS_WRONG).then(|| {
            format!(
                "this clock is {off} s {way} {than}: applications' requests are refused by AWS when it is more than 5 min; \
                 put it right: chronyc makestep, or timedatectl set-ntp true, or in a VM hwclock --hctosys"
            )
        })
    }

    /// The one container that is meant: by name, else by the beginning of its id, else by compose service.
    fn meant(&self, container: &str) -> Option<Arc<Record>> {
        let all = self.service.index.all();
        let ways: [&dyn Fn(&Record) -> bool; 3] = [
            &|record| record.definition.name == container,
            &|record| container.len() >= 4 && record.definition.id.as_str().starts_with(container),
            &|record| {
                record
                    .definition
                    .service()
                    .is_some_and(|(service, _)| service == container)
            },
        ];
        let found = ways
            .iter()
            .map(|way| all.iter().filter(|record| way(record)).collect::<Vec<_>>());
        let mut found = found.into_iter().find(|found| !found.is_empty())?;
        if found.len() == 1 { found.pop().cloned() } else { None }
    }

    /// Every step that a request of the container meets, in its order.
    fn judge(&self, record: &Record) -> Vec<ExplainStep> {
        let mut steps = Vec::new();
        let mut step = |step: &str, ok: bool, seen: String| {
            steps.push(ExplainStep {
                step: step.to_owned(),
                ok,
                seen,
            });
        };
        let instance = &record.instance;
        let status = self.container(record);
        let engine = self.service.index.engine();
        step(
            "engine",
            true,
            match &*engine {
                EngineState::Away(why) => format!("away ({why}); what is known of the container holds"),
                EngineState::Synchronising => and_failing("synchronising", self.failing()),
                EngineState::Synchronised => and_failing("synchronised", self.failing()),
            },
        );
        match record.life.as_ref().filter(|life| life.alive()) {
            Some(life) => step(
                "life",
                true,
                format!(
                    "first process {}, cgroup {}, network namespace {}, since {}",
                    life.pid,
                    life.cgroup.0,
                    life.handle.namespace().0,
                    rfc3339_seconds(life.started)
                ),
            ),
            None => step(
                "life",
                false,
                record.no_life.clone().unwrap_or_else(|| "it does not run".to_owned()),
            ),
        }
        let addresses = status.addresses.join(" ");
        let in_the_hosts_network = record.definition.network_mode == NetworkMode::Host;
        let (is_reached, way) = match (&record.not_attached, record.life.as_ref()) {
            _ if self.resolver.kept.is_some() && in_the_hosts_network => (false, GETS_THE_HOSTS.to_owned()),
            (Some(why), _) => (
                false,
                format!("no link to the service ({why}); {}", self.next_attach(record)),
            ),
            (None, _) if self.resolver.attaches() && in_the_hosts_network => (
                true,
                "over the host, whose network it has; imds-router health checks that path".to_owned(),
            ),
            (None, Some(life)) if record.attaches => match blocking(|| life.handle.check_path()) {
                Ok(()) => (true, "over a link of its own, imds0, which is in place now".to_owned()),
                Err(why) => (false, format!("over a link of its own, imds0: {why}")),
            },
            (None, _) if self.resolver.attaches() => (
                false,
                "no link to the service: it does not run, or has no label of imds-router, or its endpoint is disabled"
                    .to_owned(),
            ),
            (None, _) => match self.not_on_the_network(record) {
                Some(why) => (false, why),
                None => (true, format!("over the {}, from {addresses}", self.resolver.attach())),
            },
        };
        step("attach", is_reached, way);
        let proof = "a socket of exactly the connection, in that namespace, made by that cgroup or one below";
        match self.resolver.level {
            ProofLevel::Full => step("proof", true, format!("required on each connection: {proof}")),
            ProofLevel::Address => step(
                "proof",
                true,
                "its address, by the engine's word only, as the configuration allows".to_owned(),
            ),
        }
        if let Some(life) = &record.life {
            step("connections", true, connections(&life.connections));
        }
        step(
            "endpoint",
            instance.endpoint,
            match instance.endpoint {
                true => "enabled".to_owned(),
                false => "disabled, or no label of ours: every request gets 403".to_owned(),
            },
        );
        step(
            "tokens",
            true,
            match instance.tokens_required {
                true => "required: a request without an IMDSv2 token of this run of the container gets 401".to_owned(),
                false => "optional: IMDSv1 is answered, too".to_owned(),
            },
        );
        match &instance.role {
            Role::None => step("role", false, "it asks for none: the role list is 404".to_owned()),
            Role::Pending(why) | Role::Refused(why) => step("role", false, format!("none: {why}")),
            Role::Session(session) => {
                let rule = instance
                    .rule
                    .as_ref()
                    .map(|rule| format!(", by {rule}"))
                    .unwrap_or_default();
                step("role", true, format!("{session}{rule}"));
            }
        }
        if let Some(credentials) = &status.credentials {
            let until = credentials
                .until
                .as_ref()
                .map(|until| format!(" until {until}"))
                .unwrap_or_default();
            let fake = if credentials.fake { " (fake)" } else { "" };
            let error = credentials
                .error
                .as_ref()
                .map(|error| format!(", last try: {error}"))
                .unwrap_or_default();
            let hint = match credentials.error.as_ref() {
                Some(error) if error.starts_with("denied by sts") => format!(
                    "; what the role must trust: imds-router explain {} --trust-policy",
                    record.definition.name
                ),
                _ => String::new(),
            };
            step(
                "credentials",
                credentials.state == "live",
                format!("{}{until}{fake}{error}{hint}", credentials.state),
            );
        }
        let environment = record.definition.environment.as_ref();
        if let Some(sources) = environment.and_then(client_settings::other_sources) {
            step("client", false, sources);
        }
        steps
    }

    /// When the daemon tries again to create the link of a container.
    fn next_attach(&self, record: &Record) -> String {
        let now = self.clock.now();
        let left = record.next_attach.and_then(|at| at.checked_duration_since(now));
        match left.filter(|left| !left.is_zero()) {
            Some(left) => format!("next attempt in {:.1} s", left.as_secs_f64()),
            None => "next attempt now".to_owned(),
        }
    }

    fn container(&self, record: &Record) -> ContainerStatus {
        let instance = &record.instance;
        let session = instance.role.session();
        let mut problems = instance.problems.clone();
        if let Role::Pending(why) = &instance.role {
            problems.push(why.clone());
        }
        problems.extend(record.unread.as_ref().map(|why| {
            format!(
                "the container engine does not describe it ({why}); the daemon repeats the call until it is answered"
            )
        }));
        problems.extend(record.no_life.clone());
        problems.extend(record.not_attached.as_ref().map(|why| {
            format!(
                "it has no link to the service ({why}); {}, requests are refused until then",
                self.next_attach(record)
            )
        }));
        let runs = record.life.as_ref().filter(|life| life.alive());
        problems.extend(runs.and_then(|life| life.handle.path_problem()));
        if self.resolver.kept.is_some() && instance.endpoint && record.definition.network_mode == NetworkMode::Host {
            problems.push(GETS_THE_HOSTS.to_owned());
        }
        problems.extend(record.left_alone.iter().cloned());
        problems.extend(self.shares(record));
        problems.extend(self.not_on_the_network(record).filter(|_| instance.endpoint));
        problems.extend(instance.notes.iter().cloned());
        ContainerStatus {
            id: record.definition.id.as_str().to_owned(),
            name: record.definition.name.clone(),
            addresses: record
                .attachments
                .addresses()
                .map(|address| address.to_string())
                .collect(),
            alive: record.life.as_ref().is_some_and(|life| life.alive()),
            endpoint: if instance.endpoint { "enabled" } else { "disabled" }.to_owned(),
            tokens: if instance.tokens_required {
                "required"
            } else {
                "optional"
            }
            .to_owned(),
            role: session.and_then(|session| session.role()).map(ToString::to_string),
            session_name: session.and_then(|session| session.session_name()).map(str::to_owned),
            profile: session.and_then(|session| session.profile()).map(str::to_owned),
            rule: session.and(instance.rule.clone()),
            credentials: session.map(|session| self.credentials(session)),
            connections: ConnectionStatus {
                open: record.life.as_ref().map_or(0, |life| life.connections.open()),
                limit: connection_slots::LIMIT,
            },
            last_request: record
                .life
                .as_ref()
                .and_then(|life| life.last.get())
                .map(|(at, status)| RequestStatus {
                    at: rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(at)),
                    status,
                }),
            problems,
        }
    }

    /// With attach `network`: who has no link to the network that the address is on does not reach it.
    fn not_on_the_network(&self, record: &Record) -> Option<String> {
        if self.resolver.settings.load().attach != Attach::Network {
            return None;
        }
        let ours = self.service.index.at(IMDS_ADDRESS.into());
        let networks = ours.iter().flat_map(|it| it.attachments.0.iter());
        let mut networks = networks.filter(|(_, endpoint)| endpoint.addresses().any(|it| it == IMDS_ADDRESS));
        let (network, endpoint) = networks.next()?;
        (!record.attachments.0.contains_key(network)).then(|| {
            let name = printable(&endpoint.network, 60);
            format!("it is not on the network {name}, where {IMDS_ADDRESS} is: docker network connect {name}")
        })
    }

    /// Containers that share a network namespace share a boundary: whoever is root in one can act as the other.
    fn shares(&self, record: &Record) -> Option<String> {
        let life = record.life.as_ref()?;
        // The host's namespace is everybody's who is in it; that is said by the container's network mode itself.
        if record.definition.network_mode == NetworkMode::Host {
            return None;
        }
        let role = |record: &Record| {
            record
                .instance
                .role
                .session()
                .and_then(|session| session.role().cloned())
        };
        let others = self.service.index.within(life.handle.namespace());
        let other = others
            .iter()
            .find(|other| other.definition.id != record.definition.id && role(other) != role(record));
        other.map(|other| {
            format!(
                "shares its network namespace with {}, whose role is another: they share a boundary",
                other.definition.name
            )
        })
    }

    fn credentials(&self, session: &Session) -> CredentialStatus {
        let state = self.service.broker.state(session).unwrap_or_default();
        let published = state.published.as_ref().map(|it| &it.credentials);
        let word = match published {
            Some(_) if state.published.as_ref().is_some_and(|it| it.is_live(&self.clock)) => "live",
            Some(_) => "expired",
            None if state.error.is_some() => "failed",
            None => "pending",
        };
        CredentialStatus {
            state: word.to_owned(),
            key: published.map(|it| it.access_key_id.clone()),
            fake: published.is_some_and(|it| it.fake),
            until: published.map(|it| rfc3339_seconds(it.expiration)),
            error: state.error.map(|error| error.to_string()),
        }
    }
}

/// That descriptors have run out, and what to do.
fn shortages() -> Option<String> {
    let shortages = descriptors::shortages();
    if shortages.is_empty() {
        return None;
    }
    let shortages = shortages
        .into_iter()
        .map(|(work, count)| format!("{work} {count} times"));
    Some(format!(
        "too many open files: {}; the limit is {}, and each container takes {}; raise it: LimitNOFILE= in the unit, or \
         docker run --ulimit nofile=16384",
        shortages.collect::<Vec<_>>().join(", "),
        descriptors::limit(),
        descriptors::PER_CONTAINER
    ))
}

fn and_failing(state: &str, failing: Option<String>) -> String {
    match failing {
        Some(failing) => format!("{state}; {failing}"),
        None => state.to_owned(),
    }
}

/// The connections of a container, and what has happened at their limit.
fn connections(slots: &ConnectionSlots) -> String {
    let (open, made_room, refused) = (slots.open(), slots.made_room(), slots.refused());
    let so_far = match (made_room, refused) {
        (0, 0) => String::new(),
        _ => format!("; so far {made_room} closed for new ones, {refused} new ones answered with 503"),
    };
    format!(
        "{open} of {} open; at the limit the idlest one is closed{so_far}",
        connection_slots::LIMIT
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn explain_shows_connections_and_what_happened_at_the_limit() {
        let slots = Arc::new(ConnectionSlots::default());
        let now = Clock::system().now();
        let mut open = Vec::new();
        for _ in 0..connection_slots::LIMIT {
            open.push(slots.take(now, usize::MAX).await.unwrap());
        }
        assert_eq!(
            connections(&slots),
            "64 of 64 open; at the limit the idlest one is closed"
        );
        assert!(slots.take(now, usize::MAX).await.is_err());
        open.truncate(3);
        assert_eq!(
            connections(&slots),
            "3 of 64 open; at the limit the idlest one is closed; so far 0 closed for new ones, 1 new ones answered with 503"
        );
    }
}
