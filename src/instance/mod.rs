//! What one container is to see: the one place where labels, configuration and links become an [`Instance`].
//!
//! [`resolve`] is pure: the same container and the same settings give the same instance. It is called on any change;
//! server, status and check read its result and decide nothing themselves.

mod session;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use hyper::header::HeaderValue;

use self::session::{Case, Verdict};
use crate::config::{HttpEndpoint, HttpTokens, Settings};
use crate::containers::labels::{self, ContainerSpec};
use crate::containers::{Attachments, Definition};
use crate::credentials::{RoleArn, Session, offline, partition_of, region_in};
use crate::metadata::catalogue::{Facts, View};

/// Region of last resort; `status` warns that it is a guess.
pub const FALLBACK_REGION: &str = "us-east-1";
const INSTANCE_TYPE: &str = "t3.micro";
const ZONE_LETTER: char = 'a';

/// The instance that a container sees.
#[derive(Clone, PartialEq, Debug)]
pub struct Instance {
    /// Its tree of metadata.
    pub view: View,
    /// Whether it finds a metadata service at all.
    pub endpoint: bool,
    /// Whether that is not decided yet: without a label only a role makes it find one, and it may turn out to have none.
    pub endpoint_open: bool,
    /// Whether it must use IMDSv2.
    pub tokens_required: bool,
    /// Its role, or why it has none.
    pub role: Role,
    /// The profile whose base credentials decide on its role, once the policy lets the container have it: it has to be
    /// known, [`Surroundings::base`], before the role is. `None`: the daemon's own base, or none is needed.
    pub profile: Option<String>,
    /// The rule of `[[allow]]` that decided on its role, if there are rules.
    pub rule: Option<String>,
    /// What is wrong with its labels, for `status`.
    pub problems: Vec<String>,
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
pub struct Surroundings {
    /// The base credentials of the daemon itself.
    pub base: Base,
    /// Those of the profiles that containers name, as far as they are known.
    pub profiles: BTreeMap<String, Base>,
    /// This host's name.
    pub host: String,
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

impl Surroundings {
    /// What is known of a profile's base; `None`: of the daemon's own.
    pub fn base(&self, profile: Option<&str>) -> &Base {
        match profile {
            None => &self.base,
            Some(profile) => self.profiles.get(profile).unwrap_or(&UNKNOWN),
        }
    }
}

/// Makes the instance of one container. `started`: when its present run began; before that, when it was seen.
pub fn resolve(
    container: &Definition,
    attachments: &Attachments,
    started: SystemTime,
    settings: &Settings,
    around: &Surroundings,
) -> Instance {
    let (spec, errors) = labels::read(&container.labels, container.environment.as_ref(), settings);
    let mut problems: Vec<String> = errors.iter().map(ToString::to_string).collect();
    let region = spec
        .region
        .clone()
        .or_else(|| settings.region.clone())
        .or_else(|| around.base.region.clone());
    // Where nothing names one, it follows the role, as far as that is written out.
    let region = region.unwrap_or_else(|| {
        let typed = spec.role.as_deref().or(settings.default_role.as_deref());
        let role = typed.and_then(|typed| settings.roles.get(typed).cloned().or_else(|| RoleArn::parse(typed)));
        role.map_or(FALLBACK_REGION.to_owned(), |role| {
            region_in(role.partition(), FALLBACK_REGION)
        })
    });
    let partition = partition_of(&region);
    let zone = spec
        .availability_zone
        .clone()
        .unwrap_or_else(|| format!("{region}{ZONE_LETTER}"));
    if !zone.starts_with(&region) {
        problems.push(format!("availability zone {zone} is not in region {region}"));
    }
    let Verdict {
        role,
        listed,
        profile,
        rule,
        open,
    } = match problems.first() {
        // A label that was not understood may have been a restriction.
        Some(problem) => Verdict {
            role: Role::Refused(problem.clone()),
            listed: None,
            profile: None,
            rule: None,
            open: false,
        },
        None => session::decide(&Case {
            container,
            attachments,
            spec: &spec,
            settings,
            around,
            region: &region,
            partition,
        }),
    };
    if let (Role::Refused(why), true) = (&role, problems.is_empty()) {
        problems.push(why.clone());
    }
    let account = account(listed.as_ref(), settings, around);
    let primary = attachments.primary();
    let facts = Facts {
        instance_id: spec
            .instance_id
            .clone()
            .unwrap_or_else(|| derived_id("i-", container.id.as_str())),
        ami_id: spec.ami_id.clone().unwrap_or_else(|| {
            let digest = container.image_id.rsplit(':').next().unwrap_or_default();
            derived_id("ami-", digest)
        }),
        instance_type: spec.instance_type.clone().unwrap_or_else(|| INSTANCE_TYPE.to_owned()),
        hostname: container.hostname.clone(),
        local_ipv4: primary.and_then(|endpoint| endpoint.ipv4).map(|(address, _)| address),
        mac: primary
            .map(|endpoint| endpoint.mac.clone())
            .filter(|mac| !mac.is_empty()),
        partition: listed.as_ref().map_or(partition, RoleArn::partition).to_owned(),
        account,
        role: listed,
        region,
        zone,
        started,
    };
    Instance {
        view: View::of(facts),
        endpoint: endpoint(&spec, &role, settings),
        endpoint_open: open && endpoint(&spec, &role, settings) && !endpoint(&spec, &Role::None, settings),
        tokens_required: tokens_required(&spec, settings, &problems),
        role,
        profile,
        rule,
        problems,
        last_modified: HeaderValue::from_str(&httpdate::fmt_http_date(started))
            .expect("a date has letters, digits, blanks, commas and colons only"),
    }
}

fn endpoint(spec: &ContainerSpec, role: &Role, settings: &Settings) -> bool {
    match (spec.http_endpoint, settings.http_endpoint) {
        (Some(false), _) => false,
        (Some(true), HttpEndpoint::Disabled) => settings.labels_may_lower,
        (_, HttpEndpoint::Disabled) => false,
        (Some(true), _) | (None, HttpEndpoint::Enabled) => true,
        (None, HttpEndpoint::Labelled) => spec.labelled || *role != Role::None,
    }
}

fn tokens_required(spec: &ContainerSpec, settings: &Settings, problems: &[String]) -> bool {
    let asked = match spec.http_tokens {
        Some(label) if settings.labels_may_lower => label,
        Some(label) => label.max(settings.http_tokens),
        None => settings.http_tokens,
    };
    // A label that was not understood may have been this one.
    asked == HttpTokens::Required || !problems.is_empty()
}

fn account(role: Option<&RoleArn>, settings: &Settings, around: &Surroundings) -> String {
    role.map(|role| role.account().to_owned())
        .or_else(|| settings.account_id.clone())
        .or_else(|| around.base.account.clone())
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
