//! Labels → [`ContainerSpec`], or what is wrong with them.
//!
//! A label with our prefix that is unknown is an error of its container: a typo must not drop a restriction. A label that the
//! image has as well may come from the image: its class (`Class`) defines what it may do.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;

use super::label_sources::Pairs;
use super::{Labels, legacy_labels};
use crate::config::{
    HttpEndpoint, HttpTokens, Settings, Suggestion, decode_base64, hop_limit, is_region, is_user_data, metadata_path,
    parse_duration, template_fits,
};
use crate::credentials::Secret;
use crate::credentials::session_inputs::{self, Inputs};
use crate::metadata::events::Kind;
use crate::metadata::tree;
use crate::metadata::zones;

/// What a container's labels ask for. `None`: the label is not there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ContainerSpec {
    /// Whether the container has an own label with our prefix, or a role by an own label or variable of `[compat]`.
    pub labeled: bool,
    /// Labels and variables that choose credentials, and that the image may have set.
    pub unclear: Vec<String>,
    /// The same, of those that say where the container is.
    pub unclear_place: Vec<String>,
    /// Session policies, if there is more than one and the image may have set one of them.
    pub joined_policies: Vec<String>,
    /// `inputs.duration` may be the image's: it only makes sessions shorter.
    pub duration_only_restricts: bool,
    /// `imds.role`, as typed.
    pub role: Option<String>,
    /// `imds.profile`
    pub profile: Option<String>,
    /// `imds.role.…`
    pub inputs: Inputs,
    /// A variable of the container may decide, and its environment is not known yet.
    pub waits_for_environment: bool,
    /// `imds.http-endpoint`
    pub http_endpoint: Option<bool>,
    /// `imds.http-tokens`
    pub http_tokens: Option<HttpTokens>,
    /// `imds.region`
    pub region: Option<String>,
    /// `imds.availability-zone`
    pub availability_zone: Option<String>,
    /// `imds.instance-type`
    pub instance_type: Option<String>,
    /// `imds.instance-id`
    pub instance_id: Option<String>,
    /// `imds.ami-id`
    pub ami_id: Option<String>,
    /// `imds.metadata.…`: by path, from the version on.
    pub metadata: BTreeMap<String, String>,
    /// The paths of those that do not count, since the image may have set them.
    pub ambiguous_metadata: Vec<String>,
    /// `imds.instance-tag.…`
    pub tags: BTreeMap<String, String>,
    /// `imds.instance-metadata-tags`
    pub instance_metadata_tags: Option<bool>,
    /// `imds.user-data`, `imds.user-data-base64`
    pub user_data: Option<Bytes>,
    /// `imds.http-put-response-hop-limit`
    pub hop_limit: Option<u8>,
    /// `imds.http-protocol-ipv6`
    pub ipv6: Option<bool>,
    /// `imds.spot.interrupt-after` and the like: how long after its start.
    pub events: BTreeMap<Kind, Duration>,
    /// `imds.spot.action` and the like.
    pub event_actions: BTreeMap<Kind, String>,
}

impl ContainerSpec {
    /// Whether the labels may have been wrong, or others, before the image had some of them.
    pub fn is_unclear(&self) -> bool {
        let names = [&self.unclear, &self.unclear_place, &self.joined_policies];
        names.iter().any(|names| !names.is_empty()) || (!self.labeled && self.inputs != Inputs::default())
    }
}

/// What is wrong with one label.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum LabelError {
    /// A label with our prefix that does not exist.
    #[error("unknown label {label}{nearest}")]
    Unknown {
        /// The label.
        label: String,
        /// The nearest name.
        nearest: Suggestion,
    },
    /// A label whose value it does not take.
    #[error("label {label}={value:?}: expected {expected}")]
    BadValue {
        /// The label.
        label: String,
        /// Its value.
        value: String,
        /// What it takes.
        expected: String,
    },
    /// A label that is nothing by itself, or not with the others.
    #[error("label {label}: {what}")]
    Contradiction {
        /// The label.
        label: String,
        /// What was expected, and what is there.
        what: String,
    },
    /// A label that would make an option laxer than the configuration.
    #[error("label {label}={value:?} is laxer than the configuration's; [imds] labels_may_relax = true allows it")]
    Lowers {
        /// The label.
        label: String,
        /// Its value.
        value: String,
    },
}

/// The effect of a label or variable that the image has with the same value, so that it is unknown who set it.
///
/// The rule behind all of them: a pair that is added to an image must never give its container more than it had before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    /// It restricts or relaxes an option, by its value. A restriction counts, and anything else does not.
    Restricts,
    /// It chooses credentials: the container gets none.
    Chooses,
    /// It is a session policy. It counts if it is the only one: STS joins the policies of one call, so that a second one adds
    /// permissions.
    SessionPolicy,
    /// It says where the container is, and so where its role's session comes from: a container that has a role gets no
    /// credentials. It does not count otherwise.
    Place,
    /// It describes the instance. It does not count.
    Fact,
}

/// One label: its name after the prefix and the dot.
struct Label {
    name: &'static str,
    class: Class,
    expected: &'static str,
    read: fn(&mut ContainerSpec, &str) -> Option<()>,
}

const EXTERNAL_ID: &str = "role.external-id";
/// What session tags stand below.
const SESSION_TAG: &str = "role.session-tag.";
const SESSION_TAG_EXPECTED: &str = "a key of 1 to 128 and a value of up to 256 letters, digits, blanks and _.:/=+-@, \
    the key not beginning with aws:";

/// Every label that this version knows.
const LABELS: &[Label] = &[
    Label {
        name: "role",
        class: Class::Chooses,
        expected: "a role ARN, name, name@account or alias",
        read: |spec, value| (!value.is_empty()).then(|| spec.role = Some(value.to_owned())),
    },
    Label {
        name: "role.session-name",
        class: Class::Chooses,
        expected: "text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}",
        read: |spec, value| {
            let fits = !value.is_empty() && template_fits(value);
            fits.then(|| spec.inputs.session_name = Some(value.to_owned()))
        },
    },
    Label {
        name: EXTERNAL_ID,
        class: Class::Chooses,
        expected: "2 to 1224 characters: letters, digits and _+=,.@:/-",
        read: |spec, value| {
            let fits = session_inputs::is_external_id(value);
            fits.then(|| spec.inputs.external_id = Some(Secret::new(value)))
        },
    },
    Label {
        name: "role.duration",
        class: Class::Restricts,
        expected: "a duration from 15m to 12h (STS's own bounds)",
        read: |spec, value| {
            let duration = parse_duration(value).filter(|it| session_inputs::DURATION.contains(it));
            duration.map(|it| spec.shorten_session(it))
        },
    },
    Label {
        name: "role.source-identity",
        class: Class::Chooses,
        expected: "2 to 64 characters: letters, digits and _+=,.@-",
        read: |spec, value| {
            let fits = session_inputs::is_source_identity(value);
            fits.then(|| spec.inputs.source_identity = Some(value.to_owned()))
        },
    },
    Label {
        name: "role.policy",
        class: Class::SessionPolicy,
        expected: "an IAM policy in JSON with a Statement, of at most 2048 characters",
        read: |spec, value| session_inputs::is_policy(value).then(|| spec.inputs.policy = Some(value.to_owned())),
    },
    Label {
        name: "role.policy-arns",
        class: Class::SessionPolicy,
        expected: "1 to 10 policy ARNs such as arn:aws:iam::aws:policy/ReadOnlyAccess, separated by commas",
        read: |spec, value| session_inputs::policy_arns(&items(value)).map(|arns| spec.inputs.policy_arns = arns),
    },
    Label {
        name: "role.transitive-tag-keys",
        class: Class::Chooses,
        expected: "keys of session tags, separated by commas",
        read: |spec, value| {
            let keys = items(value);
            keys.iter().all(|key| session_inputs::is_tag_key(key)).then(|| {
                spec.inputs.transitive_tag_keys = keys.into_iter().map(str::to_owned).collect();
            })
        },
    },
    Label {
        name: "role.chain",
        class: Class::Chooses,
        expected: "the roles to go through, as in the label role, separated by commas",
        read: |spec, value| {
            let roles = items(value);
            roles.iter().all(|role| session_inputs::is_role_word(role)).then(|| {
                spec.inputs.chain = roles.into_iter().map(str::to_owned).collect();
            })
        },
    },
    Label {
        name: "profile",
        class: Class::Chooses,
        expected: "the name of a profile",
        read: |spec, value| {
            let fits = !value.trim().is_empty() && !value.contains(char::is_control);
            fits.then(|| spec.profile = Some(value.to_owned()))
        },
    },
    Label {
        name: "http-endpoint",
        class: Class::Restricts,
        expected: "enabled or disabled",
        read: |spec, value| {
            choose(
                value,
                &[("enabled", true), ("disabled", false)],
                &mut spec.http_endpoint,
            )
        },
    },
    Label {
        name: "http-tokens",
        class: Class::Restricts,
        expected: "optional or required",
        read: |spec, value| {
            let choices = [("optional", HttpTokens::Optional), ("required", HttpTokens::Required)];
            choose(value, &choices, &mut spec.http_tokens)
        },
    },
    Label {
        name: "region",
        class: Class::Place,
        expected: "an AWS region such as eu-west-1",
        read: |spec, value| is_region(value).then(|| spec.region = Some(value.to_owned())),
    },
    Label {
        name: "availability-zone",
        class: Class::Place,
        expected: "a zone such as eu-west-1a, us-west-2-lax-1a or us-east-1-wl1-bos-wlz-1",
        read: |spec, value| is_zone(value).then(|| spec.availability_zone = Some(value.to_owned())),
    },
    Label {
        name: "instance-type",
        class: Class::Fact,
        expected: "an instance type such as t3.micro",
        read: |spec, value| {
            let fits = |part: &str| {
                !part.is_empty()
                    && part
                        .bytes()
                        .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            };
            let fits = value
                .split_once('.')
                .is_some_and(|(family, size)| fits(family) && fits(size));
            fits.then(|| spec.instance_type = Some(value.to_owned()))
        },
    },
    Label {
        name: "instance-id",
        class: Class::Fact,
        expected: "i- and 8 or 17 hexadecimal digits",
        read: |spec, value| is_id("i-", value).then(|| spec.instance_id = Some(value.to_owned())),
    },
    Label {
        name: "ami-id",
        class: Class::Fact,
        expected: "ami- and 8 or 17 hexadecimal digits",
        read: |spec, value| is_id("ami-", value).then(|| spec.ami_id = Some(value.to_owned())),
    },
    Label {
        name: HOP_LIMIT,
        class: Class::Restricts,
        expected: "a whole number from 1 to 64",
        read: |spec, value| hop_limit(value).map(|it| spec.hop_limit = Some(it)),
    },
    Label {
        name: "http-protocol-ipv6",
        class: Class::Restricts,
        expected: "enabled or disabled",
        read: |spec, value| choose(value, &[("enabled", true), ("disabled", false)], &mut spec.ipv6),
    },
    Label {
        name: "spot.interrupt-after",
        class: Class::Fact,
        expected: AFTER,
        read: |spec, value| after(spec, Kind::SpotInterruption, value),
    },
    Label {
        name: "spot.action",
        class: Class::Fact,
        expected: "terminate, stop or hibernate",
        read: |spec, value| event_action(spec, Kind::SpotInterruption, value),
    },
    Label {
        name: "rebalance.after",
        class: Class::Fact,
        expected: AFTER,
        read: |spec, value| after(spec, Kind::Rebalance, value),
    },
    Label {
        name: "maintenance.after",
        class: Class::Fact,
        expected: AFTER,
        read: |spec, value| after(spec, Kind::Maintenance, value),
    },
    Label {
        name: "maintenance.code",
        class: Class::Fact,
        expected: "system-reboot, instance-reboot, system-maintenance, instance-retirement or instance-stop",
        read: |spec, value| event_action(spec, Kind::Maintenance, value),
    },
    Label {
        name: "lifecycle.after",
        class: Class::Fact,
        expected: AFTER,
        read: |spec, value| after(spec, Kind::Lifecycle, value),
    },
    Label {
        name: "lifecycle.state",
        class: Class::Fact,
        expected: "Terminated, Detached, InService, Standby, or Warmed:Hibernated, :Running, :Stopped, :Terminated",
        read: |spec, value| event_action(spec, Kind::Lifecycle, value),
    },
    Label {
        name: "instance-metadata-tags",
        class: Class::Restricts,
        expected: "enabled or disabled",
        read: |spec, value| {
            let choices = [("enabled", true), ("disabled", false)];
            choose(value, &choices, &mut spec.instance_metadata_tags)
        },
    },
    Label {
        name: USER_DATA,
        class: Class::Fact,
        expected: "text of 1 to 16384 bytes, and not user-data-base64 as well",
        read: |spec, value| set_user_data(spec, value.as_bytes().to_vec()),
    },
    Label {
        name: USER_DATA_BASE64,
        class: Class::Fact,
        expected: "base64 of 1 to 16384 bytes, and not user-data as well",
        read: |spec, value| set_user_data(spec, decode_base64(value)?),
    },
];

/// Every label that there is, after the prefix and the dot, as the documentation writes it.
pub fn names() -> impl Iterator<Item = String> {
    let families = [(SESSION_TAG, "KEY"), (INSTANCE_TAG, "KEY"), (METADATA, "PATH")];
    let families = families.into_iter().map(|(below, what)| format!("{below}{what}"));
    LABELS.iter().map(|known| known.name.to_owned()).chain(families)
}

const HOP_LIMIT: &str = "http-put-response-hop-limit";
const AFTER: &str = "a duration after the container's start, such as 90s, 10m or 2h";

fn after(spec: &mut ContainerSpec, kind: Kind, value: &str) -> Option<()> {
    spec.events
        .insert(kind, parse_duration(value).filter(|it| *it <= YEAR)?);
    Some(())
}

/// Further away is nothing that a container lives to see.
const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

fn event_action(spec: &mut ContainerSpec, kind: Kind, value: &str) -> Option<()> {
    let action = kind.action(Some(value))?;
    spec.event_actions.insert(kind, action.to_owned());
    Some(())
}

/// Labels whose values may be secrets: they are not shown.
const UNSHOWN: [&str; 3] = [EXTERNAL_ID, USER_DATA, USER_DATA_BASE64];
const USER_DATA: &str = "user-data";
const USER_DATA_BASE64: &str = "user-data-base64";
/// Values from which the region and the zone of a container are read.
const PLACE_PATHS: [&str; 2] = [tree::REGION, tree::ZONE];
/// What values below `meta-data/` stand below.
const METADATA: &str = "metadata.";
/// What tags stand below.
const INSTANCE_TAG: &str = "instance-tag.";
/// EC2's own bounds (user guide, "View tags using instance metadata", and "Tag restrictions").
const INSTANCE_TAG_EXPECTED: &str = "a key of 1 to 128 letters, digits and +-=.,_:@ that is not ., .. or _index and does not begin with aws:, and a value \
     of up to 256 characters in one line";

fn set_user_data(spec: &mut ContainerSpec, data: Vec<u8>) -> Option<()> {
    let fits = spec.user_data.is_none() && is_user_data(&data);
    fits.then(|| spec.user_data = Some(data.into()))
}

fn instance_tag(spec: &mut ContainerSpec, key: &str, value: &str) -> Option<()> {
    let key_fits = (1..=128).contains(&key.len())
        && key
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+-=.,_:@".contains(&b))
        && ![".", "..", "_index"].contains(&key)
        && !key.starts_with("aws:");
    (key_fits && is_tag_value(value)).then(|| {
        spec.tags.insert(key.to_owned(), value.to_owned());
    })
}

/// Whether `value` can be that of an instance tag.
pub fn is_tag_value(value: &str) -> bool {
    value.chars().count() <= 256 && !value.contains(char::is_control)
}

/// The items of a list.
fn items(value: &str) -> Vec<&str> {
    value.split(',').map(str::trim).collect()
}

fn session_tag(spec: &mut ContainerSpec, key: &str, value: &str) -> Option<()> {
    let fits = session_inputs::is_tag_key(key) && session_inputs::is_tag_value(value);
    fits.then(|| {
        spec.inputs.tags.insert(key.to_owned(), value.to_owned());
    })
}

fn choose<T: Copy>(value: &str, choices: &[(&str, T)], into: &mut Option<T>) -> Option<()> {
    *into = Some(choices.iter().find(|(name, _)| *name == value)?.1);
    Some(())
}

/// Whether `text` is a region and one letter.
pub fn is_zone(text: &str) -> bool {
    zones::region_of(text).is_some_and(is_region)
}

fn is_id(prefix: &str, text: &str) -> bool {
    text.strip_prefix(prefix).is_some_and(|digits| {
        matches!(digits.len(), 8 | 17) && digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    })
}

/// Reads the labels of a container, and the variables that `[compat]` knows (`None`: not known yet).
///
/// # Errors
/// All that is wrong, not only the first error, so that a compose file is corrected once. The labels that could be read are
/// returned as well: a container with a bad label keeps running, without credentials.
pub fn read(labels: &Pairs, environment: Option<&Pairs>, settings: &Settings) -> (ContainerSpec, Vec<LabelError>) {
    let (own, mut errors) = parse(labels.own(), environment.map(Pairs::own), settings);
    let ambiguous = ambiguous(labels, environment, settings);
    if ambiguous.is_empty() {
        return (own, errors);
    }
    // Errors of ambiguous pairs count, too: the pair may have been meant as a restriction.
    let whole = |pairs: &Pairs| -> Labels {
        pairs
            .iter()
            .map(|(name, value, _)| (name.clone(), value.clone()))
            .collect()
    };
    let (all, mut more) = parse(&whole(labels), environment.map(whole).as_ref(), settings);
    let own_times = own.events.keys().copied().collect();
    more.extend(events_without_time(&all, &own_times, settings));
    for error in more {
        if !errors.contains(&error) {
            errors.push(error);
        }
    }
    (restricted(own, all, &ambiguous, settings), errors)
}

/// A label or variable that the image may have set, as messages name it.
struct Ambiguous {
    name: String,
    class: Class,
}

/// The labels and variables that mean something here and that the image may have set.
fn ambiguous(labels: &Pairs, environment: Option<&Pairs>, settings: &Settings) -> Vec<Ambiguous> {
    // Where a label of ours names a role or a profile, the settings of other programs do not count.
    let own = |name: &str| labels.get_own(&format!("{}.{name}", settings.label_prefix));
    let names_none = own("role").is_none() && own("profile").is_none();
    let of_label = |label: &str, value: &str| match label_name(label, settings) {
        Some(name) if settings.compat.imds_server && name.starts_with(legacy_labels::IMDS_SERVER) => {
            names_none.then(|| legacy_labels::imds_server_class(name))
        }
        Some(name) => Some(class(name, value)),
        None => {
            (label == legacy_labels::IAM_DOCKER && settings.compat.iam_docker && names_none).then_some(Class::Chooses)
        }
    };
    let known = labels.ambiguous().iter().filter_map(|(label, value)| {
        let name = format!("label {label}");
        of_label(label, value).map(|class| Ambiguous { name, class })
    });
    let variables = environment.filter(|_| settings.compat.env && names_none);
    let variables = legacy_labels::VARIABLES.iter().filter(|(name, _)| {
        variables.is_some_and(|pairs| pairs.ambiguous().get(*name).is_some_and(|value| !value.is_empty()))
    });
    let variables = variables.map(|(name, class)| Ambiguous {
        name: format!("variable {name}"),
        class: *class,
    });
    known.chain(variables).collect()
}

/// The name of a label of ours after the prefix and the dot, whatever the case of the prefix.
fn label_name<'a>(label: &'a str, settings: &Settings) -> Option<&'a str> {
    let (prefix, name) = label.split_at_checked(settings.label_prefix.len())?;
    let name = name.strip_prefix('.')?;
    prefix.eq_ignore_ascii_case(&settings.label_prefix).then_some(name)
}

/// The class of a label of ours. One that does not exist is an error in any case.
fn class(name: &str, value: &str) -> Class {
    if name.starts_with(SESSION_TAG) {
        return Class::Chooses;
    }
    if let Some(path) = name.strip_prefix(METADATA) {
        let is_place = metadata_path(path, value).is_ok_and(|path| PLACE_PATHS.contains(&path.as_str()));
        return if is_place { Class::Place } else { Class::Fact };
    }
    let known = LABELS.iter().find(|known| known.name == name);
    known.map_or(Class::Fact, |known| known.class)
}

impl ContainerSpec {
    /// Two labels set the duration: `imds.role.duration` and one of another program. The shorter one counts, whichever of the two is
    /// known to be the container's own.
    pub(super) fn shorten_session(&mut self, duration: Duration) {
        let shortest = self.inputs.duration.map_or(duration, |other| other.min(duration));
        self.inputs.duration = Some(shortest);
    }
}

/// `own`, with the restrictions of `all`, which has ambiguous pairs as well.
fn restricted(own: ContainerSpec, all: ContainerSpec, ambiguous: &[Ambiguous], settings: &Settings) -> ContainerSpec {
    let of_class = |class| {
        let names = ambiguous.iter().filter(move |pair| pair.class == class);
        names.map(|pair| pair.name.clone()).collect::<Vec<_>>()
    };
    let mut unclear = of_class(Class::Chooses);
    if unclear.is_empty() && (&own.role, &own.profile) != (&all.role, &all.profile) {
        // Another of the programs in `[compat]` would decide.
        unclear = ambiguous.iter().map(|pair| pair.name.clone()).collect();
    }
    let mut policies = of_class(Class::SessionPolicy);
    let own_policies = usize::from(own.inputs.policy.is_some()) + usize::from(!own.inputs.policy_arns.is_empty());
    if policies.len() + own_policies < 2 {
        policies.clear();
    }
    let off = |on: Option<bool>| on.filter(|on| !on);
    let duration = match (own.inputs.duration, all.inputs.duration) {
        (Some(own), Some(all)) => Some(own.min(all)),
        (own, all) => own.or(all),
    };
    ContainerSpec {
        http_endpoint: own.http_endpoint.or(off(all.http_endpoint)),
        http_tokens: own
            .http_tokens
            .or(all.http_tokens.filter(|it| *it == HttpTokens::Required)),
        instance_metadata_tags: own.instance_metadata_tags.or(off(all.instance_metadata_tags)),
        ipv6: own.ipv6.or(off(all.ipv6)),
        hop_limit: own
            .hop_limit
            .or(all.hop_limit.filter(|limit| *limit < settings.hop_limit)),
        duration_only_restricts: own.inputs.duration.is_none() && duration.is_some(),
        inputs: Inputs {
            duration,
            policy: own.inputs.policy.or(all.inputs.policy),
            policy_arns: match own.inputs.policy_arns.is_empty() {
                true => all.inputs.policy_arns,
                false => own.inputs.policy_arns,
            },
            ..own.inputs
        },
        unclear,
        unclear_place: of_class(Class::Place),
        joined_policies: policies,
        ambiguous_metadata: all
            .metadata
            .into_keys()
            .filter(|path| !own.metadata.contains_key(path))
            .collect(),
        ..own
    }
}

/// Events of which only the action is known.
fn events_without_time(spec: &ContainerSpec, times: &BTreeSet<Kind>, settings: &Settings) -> Vec<LabelError> {
    let without = spec.event_actions.keys().filter(|kind| !times.contains(kind));
    let error = |kind: &Kind| {
        let name = match kind {
            Kind::SpotInterruption => "spot.action",
            kind => kind.name(),
        };
        LabelError::Contradiction {
            label: format!("{}.{name}", settings.label_prefix),
            what: "says what happens; expected a label that says when, too".to_owned(),
        }
    };
    without.map(error).collect()
}

/// Reads labels and variables, wherever they come from.
fn parse(labels: &Labels, variables: Option<&Labels>, settings: &Settings) -> (ContainerSpec, Vec<LabelError>) {
    let mut spec = ContainerSpec::default();
    let mut errors = Vec::new();
    let prefix = format!("{}.", settings.label_prefix);
    for (label, value) in labels {
        let Some(name) = label_name(label, settings) else {
            continue;
        };
        spec.labeled = true;
        if !label.starts_with(&prefix) {
            if settings.unknown_labels_are_errors {
                errors.push(LabelError::Unknown {
                    label: label.clone(),
                    nearest: Suggestion(Some(format!("{prefix}{name}"))),
                });
            }
            continue;
        }
        if settings.compat.imds_server && name.starts_with(legacy_labels::IMDS_SERVER) {
            continue;
        }
        if let Some(key) = name.strip_prefix(SESSION_TAG) {
            if session_tag(&mut spec, key, value).is_none() {
                errors.push(LabelError::BadValue {
                    label: label.clone(),
                    value: value.clone(),
                    expected: SESSION_TAG_EXPECTED.to_owned(),
                });
            }
            continue;
        }
        if let Some(key) = name.strip_prefix(INSTANCE_TAG) {
            if instance_tag(&mut spec, key, value).is_none() {
                errors.push(LabelError::BadValue {
                    label: label.clone(),
                    value: value.clone(),
                    expected: INSTANCE_TAG_EXPECTED.to_owned(),
                });
            }
            continue;
        }
        if let Some(path) = name.strip_prefix(METADATA) {
            match metadata_path(path, value) {
                Ok(path) => {
                    spec.metadata.insert(path, value.clone());
                }
                Err(what) => errors.push(LabelError::Contradiction {
                    label: label.clone(),
                    what,
                }),
            }
            continue;
        }
        match LABELS.iter().find(|known| known.name == name) {
            Some(known) if (known.read)(&mut spec, value).is_some() => {}
            Some(known) => errors.push(LabelError::BadValue {
                label: label.clone(),
                // What an external id is to be is no secret; what it is, is.
                value: match UNSHOWN.contains(&name) {
                    true => "…".to_owned(),
                    false => value.clone(),
                },
                expected: known.expected.to_owned(),
            }),
            None if settings.unknown_labels_are_errors => {
                let mut nearest = Suggestion::among(name, LABELS.iter().map(|known| known.name));
                nearest.0 = nearest.0.map(|name| format!("{prefix}{name}"));
                errors.push(LabelError::Unknown {
                    label: label.clone(),
                    nearest,
                });
            }
            None => {}
        }
    }
    legacy_labels::read(labels, variables, settings, &mut spec, &mut errors);
    if let Some((label, what)) = spec.inputs.contradiction() {
        errors.push(LabelError::Contradiction {
            label: format!("{prefix}{label}"),
            what,
        });
    }
    let times = spec.events.keys().copied().collect();
    errors.extend(events_without_time(&spec, &times, settings));
    let as_it_is = spec.profile.is_some() && spec.role.is_none();
    if let Some(label) = spec.inputs.of_a_role_only().filter(|_| as_it_is) {
        errors.push(LabelError::Contradiction {
            label: format!("{prefix}{label}"),
            what: format!("expected {prefix}role, too: without it the profile is served as it is"),
        });
    }
    let lowers = [
        (
            "http-tokens",
            "optional",
            settings.http_tokens == HttpTokens::Required && spec.http_tokens == Some(HttpTokens::Optional),
        ),
        (
            "http-endpoint",
            "enabled",
            settings.http_endpoint == HttpEndpoint::Disabled && spec.http_endpoint == Some(true),
        ),
        (
            HOP_LIMIT,
            labels.get(&format!("{prefix}{HOP_LIMIT}")).map_or("", String::as_str),
            spec.hop_limit.is_some_and(|limit| limit > settings.hop_limit),
        ),
    ];
    for (name, value, _) in lowers
        .into_iter()
        .filter(|(.., lowers)| *lowers && !settings.labels_may_relax)
    {
        errors.push(LabelError::Lowers {
            label: format!("{prefix}{name}"),
            value: value.to_owned(),
        });
    }
    (spec, errors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(labels: &Pairs, settings: &Settings) -> (ContainerSpec, Vec<LabelError>) {
        super::read(labels, Some(&Pairs::default()), settings)
    }

    fn labels(pairs: &[(&str, &str)]) -> Pairs {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn what_is_there_is_read_and_the_rest_is_not_ours() {
        let (spec, errors) = read(
            &labels(&[
                ("imds.role", "web"),
                ("imds.http-tokens", "required"),
                ("imds.region", "eu-west-1"),
                ("imds.availability-zone", "eu-west-1b"),
                ("imds.instance-id", "i-0123456789abcdef0"),
                ("imdsx.role", "other"),
                ("com.docker.compose.project", "shop"),
            ]),
            &Settings::default(),
        );
        assert_eq!(errors, []);
        assert!(spec.labeled);
        assert_eq!(spec.role.as_deref(), Some("web"));
        assert_eq!(spec.http_tokens, Some(HttpTokens::Required));
        assert_eq!(spec.availability_zone.as_deref(), Some("eu-west-1b"));
        let (spec, errors) = read(&labels(&[("com.docker.compose.project", "shop")]), &Settings::default());
        assert_eq!((spec, errors), (ContainerSpec::default(), Vec::new()));
    }

    #[test]
    fn every_mistake_has_its_message() {
        let required = Settings {
            http_tokens: HttpTokens::Required,
            ..Settings::default()
        };
        for (settings, label, value, message) in [
            (
                Settings::default(),
                "imds.rol",
                "x",
                "unknown label imds.rol; did you mean imds.role?",
            ),
            (Settings::default(), "imds.zzz", "x", "unknown label imds.zzz"),
            (
                Settings::default(),
                "imds.http-token",
                "required",
                "unknown label imds.http-token; did you mean imds.http-tokens?",
            ),
            (
                Settings::default(),
                "imds.http-tokens",
                "yes",
                "label imds.http-tokens=\"yes\": expected optional or required",
            ),
            (
                Settings::default(),
                "imds.role",
                "",
                "label imds.role=\"\": expected a role ARN, name, name@account or alias",
            ),
            (
                Settings::default(),
                "imds.region",
                "Mars",
                "label imds.region=\"Mars\": expected an AWS region such as eu-west-1",
            ),
            (
                Settings::default(),
                "imds.ami-id",
                "ami-XYZ",
                "label imds.ami-id=\"ami-XYZ\": expected ami- and 8 or 17 hexadecimal digits",
            ),
            (
                required,
                "imds.http-tokens",
                "optional",
                "label imds.http-tokens=\"optional\" is laxer than the configuration's; [imds] labels_may_relax = true allows it",
            ),
        ] {
            let (spec, errors) = read(&labels(&[(label, value)]), &settings);
            assert!(spec.labeled);
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), [message]);
        }
    }

    #[test]
    fn every_input_of_sts_has_its_limits() {
        let long = |length| "x".repeat(length);
        let role = ("imds.role", "app");
        let tag = |key: &str, value: &str| {
            format!("label imds.role.session-tag.{key}={value:?}: expected {SESSION_TAG_EXPECTED}")
        };
        let policy = "an IAM policy in JSON with a Statement, of at most 2048 characters";
        let arns = "1 to 10 policy ARNs such as arn:aws:iam::aws:policy/ReadOnlyAccess, separated by commas";
        let template = "text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}";
        let roles = "the roles to go through, as in the label role, separated by commas";
        let (long_id, long_tag, eleven) = (long(65), long(129), ["arn:aws:iam::aws:policy/x"; 11].join(","));
        let bad =
            |label: &str, value: &str, expected: &str| format!("label imds.{label}={value:?}: expected {expected}");
        let mut rows: Vec<(String, String, String)> = [
            ("role.session-name", "{nam}", template),
            ("role.session-name", "", template),
            ("role.session-name", "{env:}", template),
            (
                "role.source-identity",
                "x",
                "2 to 64 characters: letters, digits and _+=,.@-",
            ),
            (
                "role.source-identity",
                &long_id,
                "2 to 64 characters: letters, digits and _+=,.@-",
            ),
            ("role.duration", "1", "a duration from 15m to 12h (STS's own bounds)"),
            ("role.duration", "14m", "a duration from 15m to 12h (STS's own bounds)"),
            ("role.duration", "13h", "a duration from 15m to 12h (STS's own bounds)"),
            ("role.policy", "ReadOnlyAccess", policy),
            ("role.policy", "{}", policy),
            ("role.policy-arns", "ReadOnlyAccess", arns),
            ("role.policy-arns", &eleven, arns),
            ("role.policy-arns", "arn:aws:iam::aws:policy/x,", arns),
            (
                "role.transitive-tag-keys",
                "a,,b",
                "keys of session tags, separated by commas",
            ),
            ("role.chain", "a,", roles),
            ("role.chain", "a b", roles),
            ("profile", " ", "the name of a profile"),
            ("profile", "a\nb", "the name of a profile"),
        ]
        .map(|(label, value, expected)| (label.to_owned(), value.to_owned(), bad(label, value, expected)))
        .into();
        let external_id =
            "label imds.role.external-id=\"…\": expected 2 to 1224 characters: letters, digits and _+=,.@:/-";
        rows.extend(["x", "no blank", ""].map(|value| ("role.external-id".into(), value.into(), external_id.into())));
        for (key, value) in [
            ("", "x"),
            (long_tag.as_str(), "x"),
            ("aws:x", "x"),
            ("a", "b;c"),
            ("a", &long(257)),
        ] {
            rows.push((format!("role.session-tag.{key}"), value.to_owned(), tag(key, value)));
        }
        let nearest = "unknown label imds.role.session-nam; did you mean imds.role.session-name?";
        rows.push(("role.session-nam".into(), "x".into(), nearest.into()));
        for (label, value, message) in &rows {
            let (_, errors) = read(
                &labels(&[role, (&format!("imds.{label}"), value)]),
                &Settings::default(),
            );
            let [error] = errors.as_slice() else {
                panic!("{label}: {errors:?}")
            };
            assert_eq!(error.to_string(), *message);
        }
        assert!(rows.len() >= 25);
    }

    #[test]
    fn what_no_label_is_wrong_in_alone() {
        let many: Vec<_> = (0..51).map(|n| (format!("imds.role.session-tag.k{n}"), "v")).collect();
        let mut many: Vec<_> = many.iter().map(|(label, value)| (label.as_str(), *value)).collect();
        many.push(("imds.role", "app"));
        for (given, message) in [
            (
                &[
                    ("imds.role", "app"),
                    ("imds.role.session-tag.team", "x"),
                    ("imds.role.session-tag.Team", "y"),
                ][..],
                "label imds.role.session-tag: expected keys that differ in more than capitals; team is there twice",
            ),
            (
                &[("imds.role", "app"), ("imds.role.transitive-tag-keys", "team")],
                "label imds.role.transitive-tag-keys: expected keys of session tags; there is no label role.session-tag.team",
            ),
            (
                &[
                    ("imds.role", "app"),
                    ("imds.role.chain", "hop"),
                    ("imds.role.duration", "90m"),
                ],
                "label imds.role.duration: expected at most 1h where roles are gone through (role.chain), which is STS's own limit, not 90m",
            ),
            (
                &[("imds.profile", "dev"), ("imds.role.external-id", "ex")],
                "label imds.role.external-id: expected imds.role, too: without it the profile is served as it is",
            ),
            (
                &many,
                "label imds.role.session-tag: expected at most 50 session tags, not 51",
            ),
        ] {
            let (_, errors) = read(&labels(given), &Settings::default());
            assert_eq!(errors.iter().map(ToString::to_string).collect::<Vec<_>>(), [message]);
        }
    }

    #[test]
    fn unknown_labels_can_be_let_pass() {
        let settings = Settings {
            unknown_labels_are_errors: false,
            ..Settings::default()
        };
        assert_eq!(read(&labels(&[("imds.future", "x")]), &settings).1, []);
    }

    proptest! {
        #[test]
        fn any_text_is_an_input_that_sts_takes_or_an_error(
            name in proptest::sample::select(LABELS.iter().map(|label| label.name).collect::<Vec<_>>()),
            value in ".*",
            key in ".{0,3}",
        ) {
            let given = [(format!("imds.{name}"), value.clone()), (format!("imds.{SESSION_TAG}{key}"), value)];
            let (spec, errors) = read(&given.clone().into_iter().collect(), &Settings::default());
            let inputs = &spec.inputs;
            let nothing = ContainerSpec {
                labeled: true,
                ..ContainerSpec::default()
            };
            prop_assert!(spec != nothing || !errors.is_empty(), "a label is neither read nor refused");
            prop_assert!(inputs.tags.iter().all(|(key, value)| session_inputs::is_tag_key(key) && session_inputs::is_tag_value(value)));
            prop_assert!(inputs.external_id.as_ref().is_none_or(|it| session_inputs::is_external_id(it.reveal())));
            prop_assert!(inputs.source_identity.as_deref().is_none_or(session_inputs::is_source_identity));
            prop_assert!(inputs.policy.as_deref().is_none_or(session_inputs::is_policy));
            prop_assert!(inputs.duration.is_none_or(|it| session_inputs::DURATION.contains(&it)));
            // Every error names its label.
            for error in &errors {
                let text = error.to_string();
                let names = given.iter().any(|(label, _)| text.contains(label.as_str()));
                prop_assert!(names || text.contains("imds.role"), "{}", text);
            }
        }
    }
}
