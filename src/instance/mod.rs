//! What one container is to see: the one place where labels, configuration and links become an [`Instance`].
//!
//! [`resolve`] is pure: the same container and the same settings give the same instance. It is called on any change;
//! server, status and check read its result and decide nothing themselves.

mod image_labels;
mod role;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hyper::header::HeaderValue;
use serde::{Deserialize, Serialize};

use self::role::{Case, Verdict};
use crate::config::{HttpEndpoint, HttpTokens, Settings};
use crate::containers::compose;
use crate::containers::labels::{self, ContainerSpec};
use crate::containers::{Definition, NetworkEndpoints};
use crate::credentials::{RoleArn, Session, offline, partition_of, region_in};
use crate::metadata::events::{self, Event, Kind};
use crate::metadata::tree::{self, Facts, Link, View};
use crate::metadata::zones;

/// Region of last resort; `status` warns that it is a guess.
pub const FALLBACK_REGION: &str = "us-east-1";
const INSTANCE_TYPE: &str = "t3.micro";
const ZONE_LETTER: char = 'a';
/// Where the instance id stands.
const INSTANCE_ID: &str = "meta-data/instance-id";
/// What compose writes on its containers that is true of them.
const COMPOSE_TAGS: [&str; 3] = [compose::PROJECT, compose::SERVICE, compose::CONTAINER_NUMBER];

/// The instance that a container sees.
#[derive(Clone, PartialEq, Debug)]
pub struct Instance {
    /// Its tree of metadata.
    pub view: View,
    /// Whether it finds a metadata service at all.
    pub endpoint: bool,
    /// Whether that is not decided yet: without a label only a role makes it find one, and it may turn out to have none.
    pub endpoint_open: bool,
    /// Its id, which no other container that runs may have; where that is the host's, which all have, the one that is its own.
    pub id: String,
    /// Whether it must use IMDSv2.
    pub tokens_required: bool,
    /// How many routers the answer with a token may pass.
    pub hop_limit: u8,
    /// Whether it is also answered over IPv6.
    pub ipv6: bool,
    /// Whether it sees its tags.
    pub tags: bool,
    /// What is to happen to it.
    pub events: Vec<Event>,
    /// When time alone makes it another one: it is to be resolved again then.
    pub again: Option<SystemTime>,
    /// Its role, or why it has none.
    pub role: Role,
    /// The profile whose base credentials decide on its role, once the policy lets the container have it: it has to be
    /// known, [`RuntimeFacts::base`], before the role is. `None`: the daemon's own base, or none is needed.
    pub profile: Option<String>,
    /// The rule of `[[allow]]` that decided on its role, if there are rules.
    pub rule: Option<String>,
    /// What is wrong with its labels, for `status`.
    pub problems: Vec<String>,
    /// Labels of which only the restrictions count, for `status`.
    pub notes: Vec<String>,
    /// `Last-Modified` of its values: when it started.
    pub last_modified: HeaderValue,
}

/// A container's role.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Role {
    /// It asks for none.
    None,
    /// Something that decides is not known yet. Never served as if it were allowed.
    Pending(String),
    /// It asks for one and does not get it.
    Refused(String),
    /// This one.
    Session(Arc<Session>),
}

impl Role {
    /// The session, if there is one.
    pub fn session(&self) -> Option<&Arc<Session>> {
        match self {
            Self::Session(session) => Some(session),
            _ => None,
        }
    }
}

/// What the daemon knows beside the settings: learnt at run time, the same for all containers.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct RuntimeFacts {
    /// The base credentials of the daemon itself.
    pub base: Base,
    /// Those of the profiles that containers name, as far as they are known.
    pub profiles: BTreeMap<String, Base>,
    /// This host's name.
    pub host: String,
    /// What EC2 says of this host, where containers are to see that: by path.
    pub instance: Arc<BTreeMap<String, String>>,
}

/// What is known of base credentials.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Base {
    /// Their account, once STS has said it.
    pub account: Option<String>,
    /// Who they are, as STS says it: `arn:aws:sts::111122223333:assumed-role/dev/me`, `arn:aws:iam::…:user/me`.
    pub arn: Option<String>,
    /// The region that their configuration names.
    pub region: Option<String>,
    /// Why STS has not said it, and what to do.
    pub problem: Option<String>,
}

impl Base {
    /// The name of the role that they are a session of.
    pub fn role_name(&self) -> Option<&str> {
        let (_, role) = self.arn.as_deref()?.split_once(":assumed-role/")?;
        role.split('/').next()
    }

    /// Their partition; roles of another cannot be assumed.
    pub fn partition(&self) -> Option<&str> {
        self.arn.as_deref()?.split(':').nth(1)
    }
}

/// Base credentials of which nothing is known.
static UNKNOWN: Base = Base {
    account: None,
    arn: None,
    region: None,
    problem: None,
};

impl RuntimeFacts {
    /// What is known of a profile's base; `None`: of the daemon's own.
    pub fn base(&self, profile: Option<&str>) -> &Base {
        match profile {
            None => &self.base,
            Some(profile) => self.profiles.get(profile).unwrap_or(&UNKNOWN),
        }
    }
}

impl Instance {
    /// The same, of a container that gets no credentials because of `problem`.
    #[must_use]
    pub fn refused(self, problem: String) -> Self {
        let mut problems = self.problems;
        problems.push(problem.clone());
        Self {
            role: Role::Refused(problem),
            profile: None,
            rule: None,
            tokens_required: true,
            problems,
            ..self
        }
    }
}

/// Instance metadata options, as EC2's ModifyInstanceMetadataOptions has them. `None`: as labels and configuration say.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// `HttpEndpoint`
    pub endpoint: Option<bool>,
    /// `HttpTokens`: whether they are required.
    pub tokens_required: Option<bool>,
    /// `HttpPutResponseHopLimit`
    pub hop_limit: Option<u8>,
    /// `InstanceMetadataTags`
    pub tags: Option<bool>,
    /// `HttpProtocolIpv6`
    pub ipv6: Option<bool>,
}

/// What the operator has ordered for one container while it runs: it wins over labels and configuration.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Ordered {
    /// Its options.
    pub options: Options,
    /// What is to happen to it.
    pub events: Vec<Event>,
}

/// When an instance is made, and what was ordered for it until then.
#[derive(Clone, Debug)]
pub struct At {
    /// When the container's present run began; before that, when it was seen.
    pub started: SystemTime,
    /// Now.
    pub now: SystemTime,
    /// What was ordered.
    pub ordered: Ordered,
}

/// The moment of the start, with nothing ordered.
impl From<SystemTime> for At {
    fn from(started: SystemTime) -> Self {
        Self {
            started,
            now: started,
            ordered: Ordered::default(),
        }
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default()
        .as_secs()
}

/// What is to happen to a container: by its labels, and as ordered. One of a kind, and what was ordered wins.
fn events(spec: &ContainerSpec, started: SystemTime, ordered: &Ordered) -> Vec<Event> {
    let decided = seconds(started);
    let run_started = Kind::ALL.into_iter().filter_map(|kind| {
        let after = *spec.events.get(&kind)?;
        let action = kind
            .action(spec.event_actions.get(&kind).map(String::as_str))?
            .to_owned();
        Some(Event {
            kind,
            action,
            decided,
            at: decided + after.as_secs(),
            cancelled: false,
            stops: None,
        })
    });
    let mut events: Vec<_> = run_started
        .filter(|run_started| !ordered.events.iter().any(|it| it.kind == run_started.kind))
        .collect();
    events.extend(ordered.events.clone());
    events
}

/// As [`resolve`], without keeping what only the tree of metadata is made of: that is gathered again when a request asks for
/// the tree.
pub fn resolve_sparingly(
    container: &Arc<Definition>,
    attachments: &Arc<NetworkEndpoints>,
    at: impl Into<At>,
    settings: &Arc<Settings>,
    facts: &Arc<RuntimeFacts>,
) -> Instance {
    let at: At = at.into();
    let mut instance = resolve(container, attachments, at.clone(), settings, facts);
    let (container, attachments) = (container.clone(), attachments.clone());
    let (settings, facts) = (settings.clone(), facts.clone());
    instance.view = View::later(move || resolve(&container, &attachments, at.clone(), &settings, &facts).view);
    instance
}

/// Makes the instance of one container.
pub fn resolve(
    container: &Definition,
    attachments: &NetworkEndpoints,
    at: impl Into<At>,
    settings: &Settings,
    facts: &RuntimeFacts,
) -> Instance {
    let At { started, now, ordered } = at.into();
    let options = &ordered.options;
    let (spec, errors) = labels::read(&container.labels, container.environment.as_ref(), settings);
    let unclear = image_labels::problem(container, &spec, settings);
    let mut problems: Vec<String> = unclear
        .into_iter()
        .chain(errors.iter().map(ToString::to_string))
        .collect();
    let overrides = overrides(&spec, settings, facts);
    let given = |path: &str| overrides.get(path).cloned();
    let region = given(tree::REGION)
        .or_else(|| settings.region.clone())
        .or_else(|| facts.base.region.clone());
    // Where nothing names one, it follows the role, as far as that is written out.
    let region = region.unwrap_or_else(|| {
        let typed = spec.role.as_deref().or(settings.default_role.as_deref());
        let role = typed.and_then(|typed| settings.roles.get(typed).cloned().or_else(|| RoleArn::parse(typed)));
        role.map_or(FALLBACK_REGION.to_owned(), |role| {
            region_in(role.partition(), FALLBACK_REGION)
        })
    });
    let partition = partition_of(&region);
    let zone = given(tree::ZONE).unwrap_or_else(|| format!("{region}{ZONE_LETTER}"));
    if zones::region_of(&zone).is_some_and(|its| its != region) {
        problems.push(format!("availability zone {zone} is not in region {region}"));
    }
    let links = links(attachments, &given);
    // Those of the configuration are for every container, whichever links it has.
    let paths = spec.metadata.keys().chain(&spec.ambiguous_metadata);
    let strange = paths.filter(|path| tree::of_no_link(path, &links));
    problems.extend(strange.map(|path| format!("{path}: no link of the container has this MAC address")));
    let case = Case {
        container,
        attachments,
        spec: &spec,
        settings,
        facts,
        region: &region,
        partition,
    };
    let Verdict {
        role,
        listed,
        profile,
        rule,
        open,
        note,
        labels_in_order,
    } = match problems.first() {
        // A label that was not understood may have been a restriction.
        Some(problem) => role::refuse(&case, problem),
        None => role::decide(&case),
    };
    problems.extend(note);
    // Labels that were understood, and that a rule does not allow for example, hide no restriction of the options.
    let understood = problems.is_empty() && (labels_in_order || !matches!(role, Role::Refused(_)));
    if let (Role::Refused(why), true) = (&role, problems.is_empty()) {
        problems.push(why.clone());
    }
    let account = account(listed.as_ref(), settings, facts);
    let events = events(&spec, started, &ordered);
    let (told, again) = events::told(&events, container.id.as_str(), seconds(now));
    let own_id = derived_id("i-", container.id.as_str());
    let id = given(INSTANCE_ID).unwrap_or_else(|| own_id.clone());
    let shared = facts.instance.get(INSTANCE_ID) == Some(&id);
    let facts = Facts {
        container: container.id.as_str().to_owned(),
        instance_id: id.clone(),
        ami_id: derived_id("ami-", container.image_id.rsplit(':').next().unwrap_or_default()),
        instance_type: INSTANCE_TYPE.to_owned(),
        hostname: container.hostname.clone(),
        links,
        partition: listed.as_ref().map_or(partition, RoleArn::partition).to_owned(),
        account,
        role: listed,
        region,
        zone,
        started,
        project: container.labels.get_own(compose::PROJECT).map(str::to_owned),
        launch_index: container.replica().map_or(0, |number| number.saturating_sub(1)),
        tags: tags(container, &spec, settings, options),
        public_keys: settings.public_keys.clone().into_iter().collect(),
        user_data: [&spec.user_data, &settings.user_data, &settings.from_file.user_data]
            .into_iter()
            .find_map(Option::clone),
        events: told,
        overrides,
    };
    let by_labels = |role: &Role| options.endpoint.unwrap_or_else(|| endpoint(&spec, role, settings));
    Instance {
        tags: facts.tags.is_some(),
        view: View::of(facts),
        id: if shared { own_id } else { id },
        endpoint: by_labels(&role),
        endpoint_open: open && by_labels(&role) && !by_labels(&Role::None),
        tokens_required: options
            .tokens_required
            .unwrap_or_else(|| tokens_required(&spec, settings, understood)),
        hop_limit: options.hop_limit.or(spec.hop_limit).unwrap_or(settings.hop_limit),
        ipv6: options.ipv6.or(spec.ipv6).unwrap_or(true),
        events,
        again: again.map(|at| SystemTime::UNIX_EPOCH + Duration::from_secs(at)),
        role,
        profile,
        rule,
        notes: image_labels::note(container, settings)
            .filter(|_| problems.is_empty())
            .into_iter()
            .collect(),
        problems,
        last_modified: HeaderValue::from_str(&httpdate::fmt_http_date(started))
            .expect("a date has letters, digits, blanks, commas and colons only"),
    }
}

/// Values that take the place of what is derived, the most particular first: the label of the path, the label of its own, the
/// configuration, the host.
fn overrides(spec: &ContainerSpec, settings: &Settings, facts: &RuntimeFacts) -> BTreeMap<String, String> {
    let own = [
        (tree::REGION, &spec.region),
        (tree::ZONE, &spec.availability_zone),
        ("meta-data/instance-type", &spec.instance_type),
        (INSTANCE_ID, &spec.instance_id),
        ("meta-data/ami-id", &spec.ami_id),
    ];
    let own = own
        .into_iter()
        .filter_map(|(path, value)| Some((path.to_owned(), value.clone()?)));
    let labels: BTreeMap<String, String> = own.chain(spec.metadata.clone()).collect();
    let mut configured = settings.from_file.values.clone();
    configured.extend(settings.metadata.clone());
    let mut all = BTreeMap::clone(&facts.instance);
    // The region of the configuration overrides the host's, and that of a zone of the configuration.
    let zoned = configured.contains_key(tree::ZONE);
    if let (Some(region), true) = (&settings.region, zoned || !all.is_empty()) {
        configured
            .entry(tree::REGION.to_owned())
            .or_insert_with(|| region.clone());
    }
    for mut layer in [configured, labels] {
        // A zone without a region is in the region that its name begins with.
        let region = layer.get(tree::ZONE).and_then(|zone| zones::region_of(zone));
        if let Some(region) = region.map(str::to_owned) {
            layer.entry(tree::REGION.to_owned()).or_insert(region);
        }
        // Whose region is another's, its zone is not.
        if layer
            .get(tree::REGION)
            .is_some_and(|region| all.get(tree::REGION) != Some(region))
        {
            all.retain(|path, _| !path.starts_with("meta-data/placement/availability-zone"));
        }
        all.extend(layer);
    }
    all
}

/// The container's links, as EC2 would number them. What is given for the first one's MAC and IPv4 address is its.
fn links(attachments: &NetworkEndpoints, given: &dyn Fn(&str) -> Option<String>) -> Vec<Link> {
    let mut links: Vec<Link> = Vec::new();
    for (id, endpoint) in attachments.in_order() {
        let mac = endpoint.mac.to_ascii_lowercase();
        if mac.is_empty() || links.iter().any(|link| link.mac == mac) {
            continue;
        }
        links.push(Link {
            network: id.0.to_string(),
            name: endpoint.network.clone(),
            mac,
            ipv4: endpoint.ipv4,
            ipv6: endpoint.ipv6,
        });
    }
    if let Some(first) = links.first_mut() {
        first.mac = given("meta-data/mac").unwrap_or_else(|| first.mac.clone());
        let address = given("meta-data/local-ipv4").and_then(|it| it.parse().ok());
        first.ipv4 = address
            .map(|it| (it, first.ipv4.map_or(32, |(_, prefix)| prefix)))
            .or(first.ipv4);
    }
    links
}

/// What a container sees of its tags; `None`: nothing.
fn tags(
    container: &Definition,
    spec: &ContainerSpec,
    settings: &Settings,
    options: &Options,
) -> Option<BTreeMap<String, String>> {
    let asked = options.tags.or(spec.instance_metadata_tags);
    if !asked.unwrap_or(settings.instance_metadata_tags) {
        return None;
    }
    let mut tags = BTreeMap::new();
    if settings.compose_tags {
        let labels = container.labels.own().iter();
        let known =
            labels.filter(|(label, value)| COMPOSE_TAGS.contains(&label.as_str()) && labels::is_tag_value(value));
        tags.extend(known.map(|(label, value)| (label.clone(), value.clone())));
    }
    tags.extend(spec.tags.clone());
    Some(tags)
}

fn endpoint(spec: &ContainerSpec, role: &Role, settings: &Settings) -> bool {
    match (spec.http_endpoint, settings.http_endpoint) {
        (Some(false), _) => false,
        (Some(true), HttpEndpoint::Disabled) => settings.labels_may_relax,
        (_, HttpEndpoint::Disabled) => false,
        (Some(true), _) | (None, HttpEndpoint::Enabled) => true,
        (None, HttpEndpoint::Labeled) => spec.labeled || *role != Role::None,
    }
}

fn tokens_required(spec: &ContainerSpec, settings: &Settings, understood: bool) -> bool {
    let asked = match spec.http_tokens {
        Some(label) if settings.labels_may_relax => label,
        Some(label) => label.max(settings.http_tokens),
        None => settings.http_tokens,
    };
    // A label that was not understood may have been this one; and a container that an image may have left without a role is no
    // freer than one whose labels are wrong.
    asked == HttpTokens::Required || !understood || spec.is_unclear()
}

fn account(role: Option<&RoleArn>, settings: &Settings, facts: &RuntimeFacts) -> String {
    role.map(|role| role.account().to_owned())
        .or_else(|| settings.account_id.clone())
        .or_else(|| facts.base.account.clone())
        .unwrap_or_else(|| offline::ACCOUNT.to_owned())
}

/// An id in EC2's form: the prefix and 17 hexadecimal digits.
fn derived_id(prefix: &str, hex: &str) -> String {
    const DIGITS: usize = 17;
    let digits: String = hex.chars().filter(char::is_ascii_hexdigit).take(DIGITS).collect();
    format!("{prefix}{digits:0<DIGITS$}")
}

#[cfg(test)]
mod tests;
