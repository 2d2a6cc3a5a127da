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
use crate::credentials::{RoleArn, Session, offline, partition_of};
use crate::metadata::InstanceView;
use crate::metadata::catalogue::{self, Facts};

/// Region of last resort; `status` warns that it is a guess.
pub const FALLBACK_REGION: &str = "us-east-1";
const INSTANCE_TYPE: &str = "t3.micro";
const ZONE_LETTER: char = 'a';

/// The instance that a container sees.
#[derive(Clone, PartialEq, Debug)]
pub struct Instance {
    /// Its tree of metadata.
    pub view: InstanceView,
    /// Whether it finds a metadata service at all.
    pub endpoint: bool,
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
    let region = region.unwrap_or_else(|| FALLBACK_REGION.to_owned());
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
    } = match problems.first() {
        // A label that was not understood may have been a restriction.
        Some(problem) => Verdict {
            role: Role::Refused(problem.clone()),
            listed: None,
            profile: None,
            rule: None,
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
        view: catalogue::view(&facts),
        endpoint: endpoint(&spec, &role, settings),
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
mod tests {
    use super::*;
    use crate::config::CredentialSource;
    use crate::containers::{ContainerId, Endpoint, Environment, NetworkId, NetworkMode};
    use crate::metadata::Node;

    fn container(labels: &[(&str, &str)]) -> Definition {
        Definition {
            id: ContainerId::parse(&"0123456789abcdef".repeat(4)).unwrap(),
            name: "web".into(),
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            image_labels: Vec::new(),
            environment: Some(Environment::default()),
            image: "box".into(),
            image_id: format!("sha256:{}", "fedcba9876543210".repeat(4)),
            network_mode: NetworkMode::Own,
            hostname: "web-1".into(),
        }
    }

    fn attachments() -> Attachments {
        let endpoint = |network: &str, last: u8, internal| Endpoint {
            network: network.into(),
            mac: format!("02:42:00:00:00:0{last}"),
            ipv4: Some(([10, 0, 0, last].into(), 24)),
            ipv6: None,
            internal,
        };
        Attachments(
            [("n1", "a", 1, true), ("n2", "b", 2, false), ("n3", "c", 3, false)]
                .map(|(id, name, last, internal)| (NetworkId::from(id), endpoint(name, last, internal)))
                .into(),
        )
    }

    fn around() -> Surroundings {
        let base = Base {
            account: Some("111122223333".into()),
            ..Base::default()
        };
        Surroundings {
            base,
            host: "h1".into(),
            ..Surroundings::default()
        }
    }

    fn instance(labels: &[(&str, &str)], settings: &Settings) -> Instance {
        resolve(
            &container(labels),
            &attachments(),
            SystemTime::UNIX_EPOCH,
            settings,
            &around(),
        )
    }

    fn value(instance: &Instance, path: &str) -> String {
        match instance.view.get(path) {
            Some(Node::Text(text)) => String::from_utf8(text.to_vec()).unwrap(),
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn values_follow_from_the_container() {
        let instance = instance(&[("imds.role", "app")], &Settings::default());
        for (path, expected) in [
            ("instance-id", "i-0123456789abcdef0"),
            ("ami-id", "ami-fedcba9876543210f"),
            ("instance-type", "t3.micro"),
            ("hostname", "web-1"),
            ("local-ipv4", "10.0.0.2"),
            ("mac", "02:42:00:00:00:02"),
            ("placement/region", "us-east-1"),
            ("placement/availability-zone", "us-east-1a"),
            ("services/domain", "amazonaws.com"),
        ] {
            assert_eq!(value(&instance, &format!("meta-data/{path}")), expected);
        }
        let session = instance.role.session().unwrap();
        assert_eq!(session.to_string(), "arn:aws:iam::111122223333:role/app as web@h1");
    }

    #[test]
    fn who_finds_a_service() {
        let with = |http_endpoint, labels_may_lower| Settings {
            http_endpoint,
            labels_may_lower,
            ..Settings::default()
        };
        let on: &[(&str, &str)] = &[("imds.http-endpoint", "enabled")];
        let off: &[(&str, &str)] = &[("imds.http-endpoint", "disabled")];
        let other: &[(&str, &str)] = &[("imds.region", "eu-west-1")];
        for (settings, labels, endpoint) in [
            (with(HttpEndpoint::Labelled, false), &[][..], false),
            (with(HttpEndpoint::Labelled, false), other, true),
            (with(HttpEndpoint::Labelled, false), off, false),
            (with(HttpEndpoint::Enabled, false), &[], true),
            (with(HttpEndpoint::Enabled, false), off, false),
            (with(HttpEndpoint::Disabled, false), other, false),
            (with(HttpEndpoint::Disabled, false), on, false),
            (with(HttpEndpoint::Disabled, true), on, true),
        ] {
            assert_eq!(
                instance(labels, &settings).endpoint,
                endpoint,
                "{:?} {labels:?}",
                settings.http_endpoint
            );
        }
        let settings = Settings {
            default_role: Some("app".into()),
            ..Settings::default()
        };
        assert!(instance(&[], &settings).endpoint);
    }

    #[test]
    fn labels_make_options_stricter_only() {
        let required = Settings {
            http_tokens: HttpTokens::Required,
            ..Settings::default()
        };
        let lax: &[(&str, &str)] = &[("imds.http-tokens", "optional"), ("imds.role", "app")];
        let strict: &[(&str, &str)] = &[("imds.http-tokens", "required"), ("imds.role", "app")];
        assert!(instance(strict, &Settings::default()).tokens_required);
        assert!(!instance(lax, &Settings::default()).tokens_required);
        let refused = instance(lax, &required);
        assert!(refused.tokens_required && matches!(refused.role, Role::Refused(_)));
        assert!(
            !instance(
                lax,
                &Settings {
                    labels_may_lower: true,
                    ..required
                }
            )
            .tokens_required
        );
    }

    #[test]
    fn a_bad_label_costs_the_role_and_says_why() {
        for (labels, why) in [
            (&[("imds.role", "arn:aws:iam::12:role/x")][..], "is not a role ARN"),
            (&[("imds.role", "app"), ("imds.rol", "x")], "did you mean imds.role?"),
            (&[("imds.role", "app@nowhere")], "is not an account"),
            (
                &[
                    ("imds.role", "app"),
                    ("imds.region", "eu-west-1"),
                    ("imds.availability-zone", "eu-west-2a"),
                ],
                "availability zone eu-west-2a is not in region eu-west-1",
            ),
        ] {
            let instance = instance(labels, &Settings::default());
            assert!(matches!(instance.role, Role::Refused(_)), "{labels:?}");
            assert_eq!(instance.problems.len(), 1);
            assert!(instance.problems[0].contains(why), "{:?}", instance.problems);
            assert_eq!(instance.view.get(catalogue::ROLE_LIST), None);
            assert!(instance.endpoint && instance.tokens_required);
        }
    }

    #[test]
    fn a_role_by_name_waits_for_the_account() {
        let unknown = Surroundings {
            base: Base::default(),
            ..around()
        };
        let container = container(&[("imds.role", "app")]);
        let pending = resolve(
            &container,
            &attachments(),
            SystemTime::UNIX_EPOCH,
            &Settings::default(),
            &unknown,
        );
        assert!(matches!(pending.role, Role::Pending(_)));
        let offline = Settings {
            source: CredentialSource::Offline,
            ..Settings::default()
        };
        let fake = resolve(&container, &attachments(), SystemTime::UNIX_EPOCH, &offline, &unknown);
        assert_eq!(fake.role.session().unwrap().role().unwrap().account(), "000000000000");
    }

    #[test]
    fn a_default_role_is_filled_in_or_there_is_none() {
        let settings = Settings {
            default_role: Some("{project}-{service}".into()),
            ..Settings::default()
        };
        let compose: &[(&str, &str)] = &[
            ("com.docker.compose.project", "shop"),
            ("com.docker.compose.service", "web"),
        ];
        assert_eq!(
            instance(compose, &settings)
                .role
                .session()
                .unwrap()
                .role()
                .unwrap()
                .name(),
            "shop-web"
        );
        assert_eq!(instance(&compose[..1], &settings).role, Role::None);
    }
}
