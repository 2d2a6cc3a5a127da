//! Containers as tables: labels, variables and rules in, a role or the reason why not out.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::config::CredentialSource;
use crate::containers::label_sources::Pairs;
use crate::containers::{ContainerId, Endpoint, Environment, NetworkId, NetworkMode};
use crate::metadata::Node;
use std::time::Duration;

fn container(labels: &[(&str, &str)]) -> Definition {
    Definition {
        id: ContainerId::parse(&"0123456789abcdef".repeat(4)).unwrap(),
        name: "web".into(),
        labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
        environment: Some(Pairs::default()),
        image_is_known: true,
        image: "box".into(),
        image_id: format!("sha256:{}", "fedcba9876543210".repeat(4)),
        network_mode: NetworkMode::Own,
        hostname: "web-1".into(),
    }
}

/// Variables that whoever started the container set.
fn variables(lines: impl IntoIterator<Item = impl AsRef<str>>) -> Pairs {
    Environment::of(lines).0.into_iter().collect()
}

fn attachments() -> NetworkEndpoints {
    let endpoint = |network: &str, last: u8, internal| Endpoint {
        network: network.into(),
        mac: format!("02:42:00:00:00:0{last}"),
        ipv4: Some(([10, 0, 0, last].into(), 24)),
        ipv6: None,
        internal,
    };
    NetworkEndpoints(
        [("n1", "a", 1, true), ("n2", "b", 2, false), ("n3", "c", 3, false)]
            .map(|(id, name, last, internal)| (NetworkId::from(id), endpoint(name, last, internal)))
            .into_iter()
            .collect(),
    )
}

fn facts() -> RuntimeFacts {
    let base = Base {
        account: Some("111122223333".into()),
        arn: Some("arn:aws:iam::111122223333:user/base".into()),
        ..Base::default()
    };
    RuntimeFacts {
        base,
        host: "h1".into(),
        ..RuntimeFacts::default()
    }
}

/// What comes of labels under the configuration `toml`, as a line: the session with all that is not usual, or why not.
fn outcome(toml: &str, labels: &[(&str, &str)]) -> String {
    said(&instance(labels, &configured(toml)))
}

fn configured(toml: &str) -> Settings {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.toml");
    std::fs::write(&file, toml).unwrap();
    let sources = crate::config::Sources {
        file: Some(file),
        ..crate::config::Sources::default()
    };
    crate::config::load(&sources).unwrap_or_else(|error| panic!("{error}"))
}

fn said(instance: &Instance) -> String {
    let session = match &instance.role {
        Role::None => return "none".to_owned(),
        Role::Pending(why) => return format!("pending: {why}"),
        Role::Refused(why) => return format!("refused: {why}"),
        Role::Session(session) => session,
    };
    let mut text = session.to_string();
    let minutes = session.duration().as_secs() / 60;
    let mut add = |what: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!(" {what}={value}"));
        }
    };
    add(
        "minutes",
        if minutes == 60 {
            String::new()
        } else {
            minutes.to_string()
        },
    );
    if let Session::Role(session) = &**session {
        let list = |items: Vec<String>| items.join(",");
        add(
            "external",
            session
                .external_id
                .as_ref()
                .map_or(String::new(), |it| it.reveal().to_owned()),
        );
        add("source", session.source_identity.clone().unwrap_or_default());
        add("policy", session.policy.clone().unwrap_or_default());
        add("arns", list(session.policy_arns.iter().cloned().collect()));
        add(
            "tags",
            list(
                session
                    .tags
                    .iter()
                    .map(|(key, value)| format!("{key}:{value}"))
                    .collect(),
            ),
        );
        add(
            "transitive",
            list(session.transitive_tag_keys.iter().cloned().collect()),
        );
    }
    add("by", instance.rule.clone().unwrap_or_default());
    text
}

fn instance(labels: &[(&str, &str)], settings: &Settings) -> Instance {
    instance_among(labels, settings, &facts())
}

fn instance_among(labels: &[(&str, &str)], settings: &Settings, facts: &RuntimeFacts) -> Instance {
    resolve(
        &container(labels),
        &attachments(),
        SystemTime::UNIX_EPOCH,
        settings,
        facts,
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
    let with = |http_endpoint, labels_may_relax| Settings {
        http_endpoint,
        labels_may_relax,
        ..Settings::default()
    };
    let on: &[(&str, &str)] = &[("imds.http-endpoint", "enabled")];
    let off: &[(&str, &str)] = &[("imds.http-endpoint", "disabled")];
    let other: &[(&str, &str)] = &[("imds.region", "eu-west-1")];
    for (settings, labels, endpoint) in [
        (with(HttpEndpoint::Labeled, false), &[][..], false),
        (with(HttpEndpoint::Labeled, false), other, true),
        (with(HttpEndpoint::Labeled, false), off, false),
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
                labels_may_relax: true,
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
        assert_eq!(instance.view.get(crate::metadata::tree::ROLE_LIST), None);
        assert!(instance.endpoint && instance.tokens_required);
    }
}

#[test]
fn a_rule_that_denies_the_role_leaves_imdsv1_as_it_is() {
    let settings = configured("[[allow]]\nrole = \"arn:aws:iam::*:role/other\"\nmax_duration = \"1h\"");
    let denied = instance(&[("imds.role", "app")], &settings);
    assert!(matches!(denied.role, Role::Refused(_)));
    assert!(denied.endpoint && !denied.tokens_required);
    assert_eq!(denied.problems.len(), 1);
    for labels in [
        &[("imds.role", "app"), ("imds.http-tokens", "required")][..],
        &[("imds.role", "app"), ("imds.http-token", "optional")],
        &[("imds.role", "role/app")],
    ] {
        assert!(instance(labels, &settings).tokens_required, "{labels:?}");
    }
    // The rule allows the role, and not the duration.
    let denied = instance(&[("imds.role", "other"), ("imds.role.duration", "2h")], &settings);
    assert!(matches!(denied.role, Role::Refused(_)) && !denied.tokens_required);
}

#[test]
fn the_region_follows_from_the_zone() {
    let in_config = |toml: &str| configured(toml);
    for (settings, labels, region, zone) in [
        (
            Settings::default(),
            &[("imds.availability-zone", "ap-northeast-1d")][..],
            "ap-northeast-1",
            "ap-northeast-1d",
        ),
        (
            in_config("region = \"eu-west-1\""),
            &[("imds.availability-zone", "us-west-2-lax-1a")],
            "us-west-2",
            "us-west-2-lax-1a",
        ),
        (
            Settings::default(),
            &[("imds.metadata.placement/availability-zone", "us-east-1-wl1-bos-wlz-1")],
            "us-east-1",
            "us-east-1-wl1-bos-wlz-1",
        ),
        (
            in_config("[metadata]\n\"placement/availability-zone\" = \"eu-west-2b\""),
            &[],
            "eu-west-2",
            "eu-west-2b",
        ),
        // A label for the region overrides the zone of the configuration.
        (
            in_config("[metadata]\n\"placement/availability-zone\" = \"eu-west-2b\""),
            &[("imds.region", "eu-west-1")],
            "eu-west-1",
            "eu-west-1a",
        ),
    ] {
        let labels = [&[("imds.role", "app")], labels].concat();
        let instance = instance(&labels, &settings);
        assert_eq!(instance.problems, [""; 0], "{labels:?}");
        assert_eq!(value(&instance, "meta-data/placement/region"), region);
        assert_eq!(value(&instance, tree::ZONE), zone);
        assert_eq!(instance.role.session().unwrap().region(), region, "{labels:?}");
    }
    // Both in the configuration, and they contradict each other.
    let settings = in_config("region = \"eu-west-1\"\n[metadata]\n\"placement/availability-zone\" = \"eu-west-2b\"");
    let instance = instance(&[("imds.role", "app")], &settings);
    assert_eq!(
        instance.problems,
        ["availability zone eu-west-2b is not in region eu-west-1"]
    );
    // The name of a region may begin with that of another.
    let labels = [
        ("imds.role", "app"),
        ("imds.region", "us-east-1"),
        ("imds.availability-zone", "us-east-12a"),
    ];
    let problems = instance_among(&labels, &Settings::default(), &facts()).problems;
    assert_eq!(problems, ["availability zone us-east-12a is not in region us-east-1"]);
}

#[test]
fn a_role_by_name_waits_for_the_account() {
    let unknown = RuntimeFacts {
        base: Base::default(),
        ..facts()
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

const ARN: &str = "arn:aws:iam::111122223333:role";
/// Ends in the shape of a policy, and is one.
const POLICY: &str = r#"{"Statement":[]}"#;
const READ_ONLY: &str = "arn:aws:iam::aws:policy/ReadOnlyAccess";

#[test]
fn every_input_goes_to_sts() {
    let all: &[(&str, &str)] = &[
        ("imds.role", "app"),
        ("imds.role.session-name", "{project}/{label:team} of {id}"),
        ("imds.role.external-id", "ex:1"),
        ("imds.role.duration", "45m"),
        ("imds.role.source-identity", "me@example.com"),
        ("imds.role.policy", POLICY),
        (
            "imds.role.policy-arns",
            "arn:aws:iam::aws:policy/ReadOnlyAccess, arn:aws:iam::111122223333:policy/x",
        ),
        ("imds.role.session-tag.team", "a b"),
        ("imds.role.session-tag.stage", ""),
        ("imds.role.transitive-tag-keys", "team"),
        ("imds.role.chain", "hop, arn:aws:iam::444455556666:role/x/y"),
        ("com.docker.compose.project", "shop"),
        ("team", "web"),
    ];
    assert_eq!(
        outcome("", all),
        format!(
            "{ARN}/app as shop-web-of-0123456789ab, through {ARN}/hop and arn:aws:iam::444455556666:role/x/y minutes=45 \
             external=ex:1 source=me@example.com policy={POLICY} arns=arn:aws:iam::111122223333:policy/x,{READ_ONLY} \
             tags=stage:,team:a b transitive=team"
        )
    );
    assert_eq!(outcome("", &[("imds.role", "app")]), format!("{ARN}/app as web@h1"));
    assert!(!format!("{:?}", instance(all, &Settings::default())).contains("ex:1"));
}

#[test]
fn the_length_of_a_session() {
    let two: (&str, &str) = ("imds.role.duration", "2h");
    let app: (&str, &str) = ("imds.role", "app");
    let chain: (&str, &str) = ("imds.role.chain", "hop");
    let long = "[credentials]\nduration = \"3h\"";
    for (toml, labels, minutes) in [
        (long, &[app][..], 180),
        (long, &[app, two], 120),
        // What the operator wishes for all is cut to what STS gives; what a label asks for is an error of the label.
        (long, &[app, chain], 60),
    ] {
        let instance = instance(labels, &configured(toml));
        assert_eq!(
            instance.role.session().unwrap().duration(),
            Duration::from_secs(minutes * 60)
        );
    }
    assert_eq!(
        outcome("", &[app, two, chain]),
        "refused: label imds.role.duration: expected at most 1h where roles are gone through (role.chain), which is STS's \
         own limit, not 120m"
    );
    // A base that is itself a role's session is bound to the same hour.
    let mut of_a_role = facts();
    of_a_role.base.arn = Some("arn:aws:sts::111122223333:assumed-role/dev/me".into());
    let resolved = |labels: &[(&str, &str)], toml| {
        let container = container(labels);
        resolve(
            &container,
            &attachments(),
            SystemTime::UNIX_EPOCH,
            &configured(toml),
            &of_a_role,
        )
    };
    assert_eq!(
        resolved(&[app], long).role.session().unwrap().duration(),
        Duration::from_secs(3600)
    );
    let why = said(&resolved(&[app, two], ""));
    let mut nobody = facts();
    nobody.base.arn = None;
    let pending = resolve(
        &container(&[app, two]),
        &attachments(),
        SystemTime::UNIX_EPOCH,
        &Settings::default(),
        &nobody,
    );
    let until = "pending: a session of 120m depends on whose the base credentials are: STS has not said it yet";
    assert_eq!(said(&pending), until);
    assert!(
        why.contains("label imds.role.duration asks for 120m, and STS gives at most 60m"),
        "{why}"
    );
}

#[test]
fn what_the_host_is_is_seen_where_nothing_else_is_given() {
    const ZONE: &str = "meta-data/placement/availability-zone";
    let host = [
        ("meta-data/instance-id", "i-0bbbbbbbbbbbbbbbb"),
        ("meta-data/ami-id", "ami-0aaaaaaaaaaaaaaaa"),
        ("meta-data/mac", "0e:49:61:0f:c3:11"),
        ("meta-data/network/interfaces/macs/{mac}/vpc-id", "vpc-0"),
        (ZONE, "eu-central-1b"),
        (tree::REGION, "eu-central-1"),
        ("meta-data/tags/instance/Name", "big"),
    ];
    let facts = RuntimeFacts {
        instance: Arc::new(host.map(|(path, value)| (path.to_owned(), value.to_owned())).into()),
        ..facts()
    };
    let seen = |toml: &str, labels: &[(&str, &str)], path: &str| {
        let settings = configured(toml);
        let instance = instance_among(labels, &settings, &facts);
        match instance.view.get(path) {
            Some(Node::Text(text)) => String::from_utf8_lossy(text).into_owned(),
            None => "nothing".to_owned(),
            other => panic!("{path}: {other:?}"),
        }
    };
    let of_link = "meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id";
    for (toml, labels, path, value) in [
        ("", &[][..], "meta-data/instance-id", "i-0bbbbbbbbbbbbbbbb"),
        ("", &[], of_link, "vpc-0"),
        ("", &[], ZONE, "eu-central-1b"),
        ("", &[], "meta-data/placement/region", "eu-central-1"),
        // What it does not say is derived, from what it does.
        ("", &[], "meta-data/placement/availability-zone-id", "euc1-az2"),
        ("", &[], "meta-data/hostname", "web-1"),
        // Tags are an option.
        ("", &[], "meta-data/tags/instance/Name", "nothing"),
        (
            "[imds]\ninstance_metadata_tags = \"enabled\"",
            &[],
            "meta-data/tags/instance/Name",
            "big",
        ),
        // Labels and configuration win, and a zone is one of its region.
        (
            "",
            &[("imds.ami-id", "ami-0123456789abcdef0")],
            "meta-data/ami-id",
            "ami-0123456789abcdef0",
        ),
        ("[metadata]\n\"ami-id\" = \"ami-1\"", &[], "meta-data/ami-id", "ami-1"),
        ("region = \"eu-west-1\"", &[], "meta-data/placement/region", "eu-west-1"),
        ("region = \"eu-west-1\"", &[], ZONE, "eu-west-1a"),
        ("region = \"eu-central-1\"", &[], ZONE, "eu-central-1b"),
        (
            "region = \"eu-west-1\"",
            &[("imds.region", "eu-west-2")],
            ZONE,
            "eu-west-2a",
        ),
        ("", &[("imds.region", "eu-west-2")], ZONE, "eu-west-2a"),
    ] {
        assert_eq!(seen(toml, labels, path), value, "{toml} {labels:?} {path}");
    }
    // All have the host's id; what keeps containers apart is their own.
    let id = |labels: &[(&str, &str)]| instance_among(labels, &Settings::default(), &facts).id;
    assert_eq!(id(&[]), "i-0123456789abcdef0");
    assert_eq!(
        id(&[("imds.instance-id", "i-0fffffffffffffff0")]),
        "i-0fffffffffffffff0"
    );
}

#[test]
fn a_profile_is_a_base_or_served_as_it_is() {
    let mut facts = facts();
    let resolved = |labels: &[(&str, &str)], facts: &RuntimeFacts| {
        let settings = configured("account_id = \"999900001111\"\n[credentials]\ndefault_role = \"other\"");
        instance_among(labels, &settings, facts)
    };
    let (dev, app) = (("imds.profile", "dev"), ("imds.role", "app"));
    // Until STS has said whose it is, there is no role by name, and the profile is the one to be read.
    let pending = resolved(&[dev, app], &facts);
    assert!(
        said(&pending).contains("pending: role app is in the account of the base credentials"),
        "{pending:?}"
    );
    assert_eq!(pending.profile.as_deref(), Some("dev"));
    let by_arn = resolved(&[dev, ("imds.role", "arn:aws:iam::111122223333:role/x")], &facts);
    assert_eq!(said(&by_arn), format!("{ARN}/x as web@h1, by profile dev"));
    facts.profiles.insert(
        "dev".into(),
        Base {
            account: Some("444455556666".into()),
            arn: Some("arn:aws:sts::444455556666:assumed-role/Admin/me".into()),
            ..Base::default()
        },
    );
    let known = resolved(&[dev, app], &facts);
    assert_eq!(
        said(&known),
        "arn:aws:iam::444455556666:role/app as web@h1, by profile dev"
    );
    // As it is: named after the role that it is a session of, or after itself.
    let served = resolved(&[dev], &facts);
    assert_eq!(said(&served), "credentials of its own, by profile dev");
    assert_eq!(value(&served, "meta-data/services/partition"), "aws");
    assert!(served.view.get("meta-data/iam/security-credentials/Admin").is_some());
    facts.profiles.get_mut("dev").unwrap().arn = Some("arn:aws:iam::444455556666:user/me".into());
    assert!(
        resolved(&[dev], &facts)
            .view
            .get("meta-data/iam/security-credentials/dev")
            .is_some()
    );
    facts.profiles.get_mut("dev").unwrap().account = None;
    facts.profiles.get_mut("dev").unwrap().problem = Some("run aws sso login".into());
    assert_eq!(
        said(&resolved(&[dev], &facts)),
        "pending: profile dev: run aws sso login"
    );
}

#[test]
fn variables_fill_templates_once_they_are_known() {
    let settings =
        configured("[credentials]\nsession_name = \"{env:USER}-{container}\"\ndefault_role = \"{env:ROLE}\"");
    let mut container = container(&[]);
    container.environment = None;
    let resolved = |container: &Definition| {
        said(&resolve(
            container,
            &attachments(),
            SystemTime::UNIX_EPOCH,
            &settings,
            &facts(),
        ))
    };
    assert_eq!(resolved(&container), "pending: its variables are not known yet");
    container.environment = Some(variables(["ROLE=app", "USER=me"]));
    assert_eq!(resolved(&container), format!("{ARN}/app as me-web"));
    container.environment = Some(variables(["ROLE=app"]));
    assert_eq!(resolved(&container), format!("{ARN}/app as web"));
    container.environment = Some(variables(["USER=me"]));
    assert_eq!(resolved(&container), "none");
}

/// Two rules: one with a ceiling and everything that labels may set, one that gives roles alone.
const RULES: &str = r#"
[roles]
outside = "arn:aws:iam::777788889999:role/outside"
[accounts]
prod = "444455556666"
[[allow]]
role = ["arn:aws:iam::111122223333:role/dev-*", "arn:aws:iam::111122223333:role/hop"]
project = "shop"
profile = "dev"
session_name = "web-*"
external_id = "ex:*"
session_tags = ["team=web*", "stage"]
session_policy_arns = ["arn:aws:iam::aws:policy/ReadOnlyAccess"]
max_duration = "30m"
[[allow]]
role = "arn:aws:iam::111122223333:role/**"
project = "s*"
"#;

#[test]
fn only_what_a_rule_allows() {
    const SHOP: (&str, &str) = ("com.docker.compose.project", "shop");
    const SPORT: (&str, &str) = ("com.docker.compose.project", "sport");
    const DEV: (&str, &str) = ("imds.role", "dev-x");
    const OPS: (&str, &str) = ("imds.role", "ops/x");
    let first = "allow rule 1 (line 6)";
    let second = "allow rule 2 (line 15)";
    let no_rule = |role: &str| {
        format!(
            "refused: role {role} is not allowed to this container: {first}: it is for role {ARN}/dev-*, {ARN}/hop; \
             {second}: it is for role {ARN}/**"
        )
    };
    let ceiling = format!("arns={READ_ONLY} by={first}");
    for (labels, expected) in [
        (&[SHOP, DEV][..], format!("{ARN}/dev-x as web@h1 minutes=30 {ceiling}")),
        (&[SHOP, OPS], format!("{ARN}/ops/x as web@h1 by={second}")),
        (&[SPORT, DEV], format!("{ARN}/dev-x as web@h1 by={second}")),
        // A `*` stays between two slashes.
        (
            &[SHOP, ("imds.role", "dev-x/admin")],
            format!("{ARN}/dev-x/admin as web@h1 by={second}"),
        ),
        (
            &[DEV],
            format!(
                "refused: role {ARN}/dev-x is not allowed to this container: {first}: the container's project is none; \
                 {second}: the container's project is none"
            ),
        ),
        // Whatever way a role is named, it is that role.
        (
            &[SHOP, ("imds.role", "outside")],
            no_rule("arn:aws:iam::777788889999:role/outside"),
        ),
        (
            &[SHOP, ("imds.role", "dev-x@prod")],
            no_rule("arn:aws:iam::444455556666:role/dev-x"),
        ),
        (
            &[SHOP, DEV, ("imds.role.chain", "hop,outside")],
            no_rule("arn:aws:iam::777788889999:role/outside"),
        ),
        (
            &[SHOP, DEV, ("imds.role.chain", "hop")],
            format!("{ARN}/dev-x as web@h1, through {ARN}/hop minutes=30 {ceiling}"),
        ),
        // What the rule names, and no more.
        (
            &[SHOP, DEV, ("imds.role.session-name", "web-{container}")],
            format!("{ARN}/dev-x as web-web minutes=30 {ceiling}"),
        ),
        (
            &[SHOP, DEV, ("imds.role.session-name", "root")],
            format!("refused: {first} lets labels set session-name to web-*, not to root"),
        ),
        (
            &[SHOP, OPS, ("imds.role.session-name", "root")],
            format!("refused: {second} does not let labels set session-name; session_name = \"*\" in it would"),
        ),
        (
            &[SHOP, DEV, ("imds.role.external-id", "wrong")],
            format!("refused: {first} lets labels set external-id, but not to this one"),
        ),
        (
            &[SHOP, DEV, ("imds.role.source-identity", "me")],
            format!("refused: {first} does not let labels set source-identity; source_identity = \"*\" in it would"),
        ),
        (
            &[
                SHOP,
                DEV,
                ("imds.role.session-tag.team", "web-2"),
                ("imds.role.session-tag.stage", "x"),
            ],
            format!("{ARN}/dev-x as web@h1 minutes=30 arns={READ_ONLY} tags=stage:x,team:web-2 by={first}"),
        ),
        (
            &[SHOP, DEV, ("imds.role.session-tag.team", "pay")],
            format!("refused: {first} lets labels set session tags team=web*, stage, not team=pay"),
        ),
        (
            &[SHOP, OPS, ("imds.role.session-tag.team", "web")],
            format!("refused: {second} does not let labels set session tags; session_tags = [\"team\"] in it would"),
        ),
        // The ceiling.
        (
            &[SHOP, DEV, ("imds.role.duration", "45m")],
            format!("refused: {first} has max_duration = 30m, and the label asks for 45m"),
        ),
        (
            &[SHOP, DEV, ("imds.role.duration", "15m")],
            format!("{ARN}/dev-x as web@h1 minutes=15 {ceiling}"),
        ),
        (
            &[SHOP, DEV, ("imds.role.policy", POLICY)],
            format!(
                "refused: {first} has a ceiling (session_policy_arns), and STS joins the session policies of one call \
                 instead of intersecting them: a label policy would lift it"
            ),
        ),
        (
            &[
                SHOP,
                DEV,
                ("imds.role.policy-arns", "arn:aws:iam::aws:policy/AdministratorAccess"),
            ],
            format!(
                "refused: {first} has a ceiling (session_policy_arns), and STS joins the session policies of one call \
                 instead of intersecting them: a label policy-arns would lift it"
            ),
        ),
        // Without a ceiling, a session policy can only narrow.
        (
            &[SHOP, OPS, ("imds.role.policy", POLICY)],
            format!("{ARN}/ops/x as web@h1 policy={POLICY} by={second}"),
        ),
        // Profiles.
        (
            &[SHOP, DEV, ("imds.profile", "prod")],
            format!(
                "refused: profile prod is not allowed to this container: {first}: it is for profile dev; {second}: it names \
                 no profile"
            ),
        ),
        (
            &[SHOP, ("imds.profile", "dev")],
            format!(
                "refused: profile dev as it is is not allowed to this container: {first}: it is for roles, not for a \
                 profile as it is; {second}: it is for roles, not for a profile as it is"
            ),
        ),
    ] {
        assert_eq!(outcome(RULES, labels), expected, "{labels:?}");
    }
}

#[test]
fn a_default_role_is_subject_to_the_rules() {
    let toml = format!("{}{RULES}", "[credentials]\ndefault_role = \"outside\"\n");
    let why = outcome(&toml, &[("com.docker.compose.project", "shop")]);
    assert!(
        why.starts_with("refused: role arn:aws:iam::777788889999:role/outside is not allowed"),
        "{why}"
    );
}

#[test]
fn a_profile_that_no_rule_names_is_not_even_read() {
    let shop = [("com.docker.compose.project", "shop"), ("imds.role", "dev-x")];
    let with = |profile| {
        let labels: Vec<_> = shop.into_iter().chain([("imds.profile", profile)]).collect();
        instance(&labels, &configured(RULES)).profile
    };
    assert_eq!(with("dev").as_deref(), Some("dev"));
    assert_eq!(with("prod"), None);
}

#[test]
fn what_a_rule_looks_at_and_nobody_knows_yet_is_waited_for() {
    let toml = "[[allow]]\nrole = \"**\"\nnetwork = \"b\"\nsession_policy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]\n\
        [[allow]]\nrole = \"**\"\n";
    let settings = configured(toml);
    let mut container = container(&[("imds.role", "app")]);
    let resolved = |container: &Definition, attachments: &NetworkEndpoints| {
        said(&resolve(
            container,
            attachments,
            SystemTime::UNIX_EPOCH,
            &settings,
            &facts(),
        ))
    };
    let none = NetworkEndpoints::default();
    assert_eq!(
        resolved(&container, &none),
        "pending: allow rule 1 (line 1) looks at the container's networks, not known yet"
    );
    assert_eq!(
        resolved(&container, &attachments()),
        format!("{ARN}/app as web@h1 arns={READ_ONLY} by=allow rule 1 (line 1)")
    );
    // The host's network is known, and what another container is on is not this one's.
    for mode in [NetworkMode::Host, NetworkMode::Container(container.id.clone())] {
        container.network_mode = mode;
        assert_eq!(
            resolved(&container, &none),
            format!("{ARN}/app as web@h1 by=allow rule 2 (line 5)")
        );
    }
}

#[test]
fn containers_by_everything_that_a_rule_looks_at() {
    let rule = |key: &str| format!("[[allow]]\nrole = \"**\"\n{key}\n");
    let labels = [
        ("imds.role", "app"),
        ("team", "web"),
        ("com.docker.compose.service", "api"),
    ];
    let id = format!("sha256:{}", "fedcba9876543210".repeat(4));
    for (key, allowed) in [
        ("container = \"w?b\"".to_owned(), true),
        ("container = [\"x\", \"web\"]".to_owned(), true),
        ("container = \"WEB\"".to_owned(), false),
        ("image = \"box\"".to_owned(), true),
        ("image = \"*/box\"".to_owned(), false),
        (format!("image_id = \"{id}\""), true),
        (format!("image_id = \"{}\"", id.replace('f', "e")), false),
        ("service = \"a[a-z]i\"".to_owned(), true),
        ("project = \"*\"".to_owned(), false),
        ("label = \"team\"".to_owned(), true),
        ("label = \"team=w*\"".to_owned(), true),
        ("label = [\"team=w*\", \"stage\"]".to_owned(), false),
        ("network = \"c\"".to_owned(), true),
        ("network = \"d\"".to_owned(), false),
    ] {
        let session = instance(&labels, &configured(&rule(&key)));
        assert_eq!(session.role.session().is_some(), allowed, "{key}: {}", said(&session));
    }
}

#[test]
fn settings_of_other_programs() {
    let compat = |which: &str| format!("[accounts]\nprod = \"444455556666\"\n[compat]\n{which} = true\n");
    let resolved = |toml: &str, labels: &[(&str, &str)], environment: &[&str]| {
        let mut container = container(labels);
        container.environment = Some(variables(environment));
        said(&resolve(
            &container,
            &attachments(),
            SystemTime::UNIX_EPOCH,
            &configured(toml),
            &facts(),
        ))
    };
    let iam_docker = "com.swipely.iam-docker.iam-profile";
    let arn = "arn:aws:iam::777788889999:role/old/x";
    let served = format!("{arn} as web@h1");
    for (which, labels, environment, expected) in [
        ("iam_docker", &[(iam_docker, arn)][..], &[][..], served.clone()),
        ("env", &[(iam_docker, arn)], &[], "none".to_owned()),
        (
            "iam_docker",
            &[(iam_docker, "x")],
            &[],
            format!("refused: label {iam_docker}=\"x\": expected a role ARN"),
        ),
        ("env", &[], &["IAM_ROLE=x"], format!("{ARN}/x as web@h1")),
        ("env", &[], &["IAM_ROLE=path/x"], format!("{ARN}/path/x as web@h1")),
        (
            "env",
            &[],
            &["IAM_ROLE=x@444455556666"],
            "arn:aws:iam::444455556666:role/x as web@h1".to_owned(),
        ),
        (
            "env",
            &[],
            &["IAM_ROLE=x@prod"],
            "arn:aws:iam::444455556666:role/x as web@h1".to_owned(),
        ),
        ("env", &[], &[&format!("IAM_ROLE={arn}")], served.clone()),
        ("env", &[], &["IAM_ROLE="], "none".to_owned()),
        (
            "env",
            &[],
            &["IAM_ROLE=x", "IAM_EXTERNAL_ID=ex", &format!("IAM_POLICY={POLICY}")],
            format!("{ARN}/x as web@h1 external=ex policy={POLICY}"),
        ),
        ("env", &[], &["IAM_EXTERNAL_ID=ex"], "none".to_owned()),
        (
            "env",
            &[],
            &["IAM_ROLE=x", "IAM_EXTERNAL_ID=se cret"],
            "refused: label IAM_EXTERNAL_ID=\"…\": expected 2 to 1224 characters: letters, digits and _+=,.@:/-"
                .to_owned(),
        ),
        // Ours win, and theirs then give nothing at all.
        (
            "env",
            &[("imds.role", "app")],
            &["IAM_ROLE=x", "IAM_EXTERNAL_ID=ex"],
            format!("{ARN}/app as web@h1"),
        ),
        (
            "env",
            &[("imds.role.duration", "15m")],
            &["IAM_ROLE=x"],
            format!("{ARN}/x as web@h1 minutes=15"),
        ),
        ("iam_docker", &[], &["IAM_ROLE=x"], "none".to_owned()),
        (
            "imds_server",
            &[
                ("imds.aws.role", arn),
                ("imds.aws.external-id", "ex"),
                ("imds.aws.session-duration", "900"),
            ],
            &[],
            format!("{served} minutes=15 external=ex"),
        ),
        (
            "imds_server",
            &[("imds.aws.session-duration", "15m")],
            &[],
            "refused: label imds.aws.session-duration=\"15m\": expected seconds, from 900 to 43200".to_owned(),
        ),
        (
            "imds_server",
            &[("imds.aws.profile", "dev")],
            &[],
            "pending: profile dev: STS has not said yet whose it is".to_owned(),
        ),
        (
            "imds_server",
            &[("imds.aws.secret-access-key", "geheim")],
            &[],
            "refused: label imds.aws.secret-access-key=\"…\": expected no keys in labels: everybody who may look at \
             containers reads them; put them into a profile"
                .to_owned(),
        ),
        (
            "env",
            &[("imds.aws.role", arn)],
            &[],
            "refused: unknown label imds.aws.role".to_owned(),
        ),
    ] {
        assert_eq!(
            resolved(&compat(which), labels, environment),
            expected,
            "{which} {labels:?} {environment:?}"
        );
    }
    let mut unknown = container(&[]);
    unknown.environment = None;
    let settings = configured(&compat("env"));
    let pending = resolve(&unknown, &attachments(), SystemTime::UNIX_EPOCH, &settings, &facts());
    assert_eq!(
        said(&pending),
        "pending: its variables may name a role, and are not known yet"
    );
    // What the rules say holds for all of it.
    let ruled = format!(
        "{}[[allow]]\nrole = \"arn:aws:iam::111122223333:role/y\"\n",
        compat("env")
    );
    let why = resolved(&ruled, &[], &["IAM_ROLE=x"]);
    assert!(
        why.contains("role arn:aws:iam::111122223333:role/x is not allowed to this container: allow rule 1"),
        "{why}"
    );
}

/// Per label, values that a careless key would take for one another: parts that join to the same text, lists in which a
/// comma could be a separator or not, the same text under another label.
const NEAR: &[(&str, [&str; 3])] = &[
    ("imds.role", ["a", "ab", "a/b"]),
    ("imds.profile", ["", "a", "ab"]),
    ("imds.region", ["", "eu-west-1", "eu-west-2"]),
    ("imds.role.session-name", ["", "ab", "a-b"]),
    ("imds.role.external-id", ["", "ab", "a,b"]),
    ("imds.role.source-identity", ["", "ab", "a,b"]),
    ("imds.role.duration", ["", "15m", "16m"]),
    ("imds.role.policy", ["", POLICY, r#"{"Statement":[] }"#]),
    (
        "imds.role.policy-arns",
        [
            "",
            "arn:aws:iam::aws:policy/a",
            "arn:aws:iam::aws:policy/a,arn:aws:iam::aws:policy/b",
        ],
    ),
    ("imds.role.session-tag.a", ["", "b", "bc"]),
    ("imds.role.session-tag.ab", ["", "c", "b"]),
    ("imds.role.chain", ["", "a", "a,b"]),
];

fn near(choice: &[usize]) -> Session {
    let labels: Vec<_> = NEAR
        .iter()
        .zip(choice)
        .map(|((label, values), index)| (*label, values[*index]))
        .filter(|(_, value)| !value.is_empty())
        .collect();
    let mut facts = facts();
    for profile in ["a", "ab"] {
        facts.profiles.insert(profile.into(), facts.base.clone());
    }
    let instance = resolve(
        &container(&labels),
        &attachments(),
        SystemTime::UNIX_EPOCH,
        &Settings::default(),
        &facts,
    );
    let session = instance.role.session();
    Session::clone(session.unwrap_or_else(|| panic!("{labels:?}: {}", said(&instance))))
}

fn choice() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(0..3_usize, NEAR.len())
}

proptest! {
    #[test]
    fn different_inputs_never_share_a_slot_and_the_same_always_do(one in choice(), other in choice(), at in 0..NEAR.len()) {
        let slots = |choices: &[&[usize]]| {
            let slots = dashmap::DashMap::new();
            for choice in choices {
                slots.insert(near(choice), ());
            }
            slots.len()
        };
        prop_assert_eq!(slots(&[&one, &one]), 1);
        prop_assert_eq!(slots(&[&one, &other]), if one == other { 1 } else { 2 });
        // In one input alone.
        let mut neighbour = one.clone();
        neighbour[at] = (neighbour[at] + 1) % 3;
        prop_assert_eq!(slots(&[&one, &neighbour]), 2);
    }
}

/// Labels of which any combination may stand on a container that the first of [`RULES`] covers.
const ATTEMPTS: &[(&str, &[&str])] = &[
    (
        "imds.role",
        &[
            "dev-x",
            "dev-x/y",
            "hop",
            "ops",
            "outside",
            "dev-x@prod",
            "arn:aws:iam::111122223333:role/dev-x",
        ],
    ),
    ("imds.profile", &["dev", "prod"]),
    ("imds.role.chain", &["hop", "outside", "hop,dev-y", "dev-x@prod"]),
    ("imds.role.policy", &[POLICY]),
    (
        "imds.role.policy-arns",
        &["arn:aws:iam::aws:policy/AdministratorAccess", READ_ONLY],
    ),
    ("imds.role.duration", &["15m", "30m", "31m", "12h"]),
    ("imds.role.session-name", &["web-1", "root"]),
    ("imds.role.external-id", &["ex:1", "other"]),
    ("imds.role.source-identity", &["root"]),
    ("imds.role.session-tag.team", &["web", "ops"]),
    ("imds.role.session-tag.admin", &["yes"]),
    ("com.docker.compose.project", &["sport", "other"]),
];

#[test]
fn a_role_of_another_partition() {
    let of = |partition: &str| format!("arn:{partition}:iam::111122223333:role/app");
    // Where nobody names a region, it follows the role.
    let offline = Settings {
        source: CredentialSource::Offline,
        roles: [("alias".to_owned(), RoleArn::parse(&of("aws-us-gov")).unwrap())].into(),
        ..Settings::default()
    };
    for (role, region, domain) in [
        (of("aws-cn"), "cn-northwest-1", "amazonaws.com.cn"),
        ("alias".to_owned(), "us-gov-west-1", "amazonaws.com"),
        ("app".to_owned(), "us-east-1", "amazonaws.com"),
        (of("aws-eusc"), "eusc-de-east-1", "amazonaws.eu"),
        (of("aws-iso-b"), "us-isob-east-1", "sc2s.sgov.gov"),
    ] {
        let instance = resolve(
            &container(&[("imds.role", &role)]),
            &attachments(),
            SystemTime::UNIX_EPOCH,
            &offline,
            &RuntimeFacts::default(),
        );
        assert_eq!(value(&instance, "meta-data/placement/region"), region);
        assert_eq!(value(&instance, "meta-data/services/domain"), domain);
        assert_eq!(instance.role.session().unwrap().region(), region);
    }
    let mut facts = facts();
    facts.base.arn = Some("arn:aws:iam::111122223333:user/me".into());
    let resolved = resolve(
        &container(&[("imds.role", &of("aws-cn"))]),
        &attachments(),
        SystemTime::UNIX_EPOCH,
        &Settings::default(),
        &facts,
    );
    assert_eq!(
        resolved.problems,
        [
            "role arn:aws-cn:iam::111122223333:role/app is in partition aws-cn, and the base credentials, \
          arn:aws:iam::111122223333:user/me, are not: imds.profile names others"
        ]
    );
}

proptest! {
    #[test]
    fn no_labels_lift_a_ceiling(choice in proptest::collection::vec(0..16_usize, ATTEMPTS.len())) {
        let mut labels: BTreeMap<&str, &str> = [("com.docker.compose.project", "shop"), ("imds.role", "dev-x")].into();
        for ((label, values), index) in ATTEMPTS.iter().zip(choice) {
            labels.extend(values.get(index).map(|value| (*label, *value)));
        }
        let labels: Vec<_> = labels.into_iter().collect();
        let settings = configured(RULES);
        let instance = instance(&labels, &settings);
        // What has no session gets nothing.
        let Some(Session::Role(session)) = instance.role.session().map(|it| &**it) else { return Ok(()) };
        let role = session.role.to_string();
        let rule = instance.rule.as_deref().unwrap_or_default();
        prop_assert!(session.chain.iter().all(|hop| hop.account() == "111122223333"), "{labels:?}");
        prop_assert!(role.starts_with("arn:aws:iam::111122223333:role/"), "{labels:?}");
        let shop = labels.contains(&("com.docker.compose.project", "shop"));
        if shop && (session.role.name().starts_with("dev-") && !role.ends_with("/y") || session.role.name() == "hop") {
            prop_assert_eq!(rule, "allow rule 1 (line 6)");
            prop_assert_eq!(session.policy_arns.iter().map(String::as_str).collect::<Vec<_>>(), [READ_ONLY]);
            prop_assert_eq!(&session.policy, &None);
            prop_assert!(session.duration <= Duration::from_secs(1800));
            prop_assert!(session.profile.as_deref().is_none_or(|profile| profile == "dev"));
            prop_assert_eq!(session.tags.get("admin"), None);
            prop_assert_ne!(session.tags.get("team").map(String::as_str), Some("ops"));
        } else {
            prop_assert_eq!(rule, "allow rule 2 (line 15)");
            prop_assert!(session.tags.is_empty() && session.profile.is_none() && session.external_id.is_none());
            prop_assert_eq!(&session.session_name, "web@h1");
        }
        prop_assert_eq!(&session.source_identity, &None);
    }
}

/// The outcome of `labels` on a container whose image has the labels `image`, or was removed.
fn with_image(toml: &str, image: Option<&[(&str, &str)]>, labels: &[(&str, &str)]) -> (String, Instance) {
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        let pairs = pairs.iter();
        pairs
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    };
    let image = image.map(map);
    let mut all = image.clone().unwrap_or_default();
    all.extend(map(labels));
    let mut container = container(&[]);
    container.labels = Pairs::split(&all, image.as_ref());
    container.image_is_known = image.is_some();
    let settings = configured(toml);
    let instance = resolve(&container, &attachments(), SystemTime::UNIX_EPOCH, &settings, &facts());
    (said(&instance), instance)
}

const UNKNOWN_SETTER: &str = "the image has the same value, so it is unknown who set it; write the value in another form (the ARN of a role \
    instead of its name), remove it from the image, or set [docker] image_labels = true";

#[test]
fn restrictions_of_labels_count_if_the_image_has_the_same() {
    let policy = ("imds.role.policy", r#"{"Statement":[]}"#);
    let arns = ("imds.role.policy-arns", "arn:aws:iam::aws:policy/ReadOnlyAccess");
    let role = ("imds.role", "app");
    let app = format!("{ARN}/app as web@h1");
    for (label, expected) in [
        (policy, format!("{app} policy={}", policy.1)),
        (arns, format!("{app} arns={}", arns.1)),
        (("imds.role.duration", "15m"), format!("{app} minutes=15")),
        // It relaxes, and the image may have set it.
        (("imds.role.duration", "2h"), app.clone()),
    ] {
        assert_eq!(with_image("", Some(&[label]), &[role, label]).0, expected, "{label:?}");
    }
    let options = |label| {
        let instance = with_image("", Some(&[label]), &[role, label]).1;
        let Instance {
            endpoint,
            tokens_required,
            hop_limit,
            ipv6,
            ..
        } = instance;
        (endpoint, tokens_required, hop_limit, ipv6)
    };
    let usual = (true, false, 2, true);
    for (label, expected) in [
        (("imds.http-endpoint", "disabled"), (false, false, 2, true)),
        (("imds.http-endpoint", "enabled"), usual),
        (("imds.http-tokens", "required"), (true, true, 2, true)),
        (("imds.http-tokens", "optional"), usual),
        (("imds.http-put-response-hop-limit", "1"), (true, false, 1, true)),
        (("imds.http-protocol-ipv6", "disabled"), (true, false, 2, false)),
        (("imds.http-protocol-ipv6", "enabled"), usual),
    ] {
        assert_eq!(options(label), expected, "{label:?}");
    }
}

#[test]
fn a_label_that_chooses_costs_the_credentials_if_the_image_has_the_same() {
    let role = ("imds.role", "app");
    for label in [
        ("imds.role.session-tag.team", "a"),
        ("imds.role.session-name", "x"),
        ("imds.role.external-id", "abc"),
        ("imds.role.source-identity", "me"),
        ("imds.role.chain", "hop"),
        ("imds.profile", "dev"),
        ("imds.region", "eu-west-1"),
        ("imds.metadata.placement/region", "eu-west-1"),
    ] {
        let (said, instance) = with_image("", Some(&[label]), &[role, label]);
        assert_eq!(said, format!("refused: label {}: {UNKNOWN_SETTER}", label.0));
        assert_eq!(instance.problems, [format!("label {}: {UNKNOWN_SETTER}", label.0)]);
        assert!(instance.tokens_required);
    }
    // Only the image may have set it: the container counts as not labeled.
    let (said, instance) = with_image("", Some(&[role]), &[role]);
    assert_eq!((said.as_str(), instance.endpoint), ("none", false));
    assert!(instance.notes[0].starts_with("label imds.role: the image has the same value, so only restrictions count"));
    // The default role is not the one that the label names.
    let (said, _) = with_image("[credentials]\ndefault_role = \"other\"", Some(&[role]), &[]);
    assert_eq!(said, format!("refused: label imds.role: {UNKNOWN_SETTER}"));
}

#[test]
fn two_session_policies_cost_the_credentials_if_the_image_has_one_of_them() {
    let role = ("imds.role", "app");
    let policy = ("imds.role.policy", r#"{"Statement":[]}"#);
    let arns = ("imds.role.policy-arns", "arn:aws:iam::aws:policy/ReadOnlyAccess");
    for image in [&[policy][..], &[arns], &[policy, arns]] {
        let (said, _) = with_image("", Some(image), &[role, policy, arns]);
        assert!(said.contains("STS joins the session policies of one call"), "{said}");
    }
    assert!(!with_image("", Some(&[]), &[role, policy, arns]).0.contains("refused"));
}

#[test]
fn a_removed_image_leaves_the_restrictions_and_takes_the_credentials() {
    let labels = [
        ("imds.role", "app"),
        ("imds.http-tokens", "required"),
        ("imds.http-endpoint", "disabled"),
    ];
    let (said, instance) = with_image("[credentials]\ndefault_role = \"other\"", None, &labels);
    assert_eq!(
        said,
        "refused: label imds.role: the image cannot be read (it was removed, or is for another platform), so it is unknown who set it; \
         create the container again from an image for this host, or set [docker] image_labels = true"
    );
    assert!(!instance.endpoint && instance.tokens_required);
    // The default role does not depend on who set the options.
    let (said, instance) = with_image("[credentials]\ndefault_role = \"other\"", None, &labels[1..]);
    assert_eq!(said, format!("{ARN}/other as web@h1"));
    assert!(!instance.endpoint && instance.tokens_required);
}

#[test]
fn a_rule_that_looks_at_a_label_of_the_image_gives_nothing() {
    let ceiling = "session_policy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]";
    let rules = format!("[[allow]]\nlabel = \"tier=free\"\nrole = \"**\"\n{ceiling}\n[[allow]]\nrole = \"**\"\n");
    let (role, tier) = (("imds.role", "app"), ("tier", "free"));
    let limited = format!("{ARN}/app as web@h1 arns=arn:aws:iam::aws:policy/ReadOnlyAccess by=allow rule 1 (line 1)");
    assert_eq!(with_image(&rules, Some(&[]), &[role, tier]).0, limited);
    let (said, instance) = with_image(&rules, Some(&[tier]), &[role, tier]);
    assert!(
        instance.tokens_required,
        "the image must not turn IMDSv1 on by this refusal"
    );
    assert!(
        said.contains(
            "allow rule 1 (line 1) looks at label tier, and it is unknown whether the image set it; use an image that can be read and does not have the label, or set [docker] image_labels = true"
        ),
        "{said}"
    );
    // A rule that does not look at it decides as before, and so does one that another key keeps from matching.
    assert_eq!(
        with_image("[[allow]]\nrole = \"**\"", Some(&[tier]), &[role, tier]).0,
        format!("{ARN}/app as web@h1 by=allow rule 1 (line 1)")
    );
    let other = rules.replace("label = \"tier=free\"", "label = \"tier=free\"\ncontainer = \"db\"");
    assert_eq!(
        with_image(&other, Some(&[tier]), &[role, tier]).0,
        format!("{ARN}/app as web@h1 by=allow rule 2 (line 6)")
    );
}

#[test]
fn templates_do_not_take_values_of_the_image() {
    let (role, team) = (("imds.role", "app"), ("team", "a"));
    let named = "[credentials]\nsession_name = \"{label:team}\"";
    let (said, _) = with_image(named, Some(&[team]), &[role, team]);
    assert_eq!(said, format!("refused: label team: {UNKNOWN_SETTER}"));
    let (said, instance) = with_image("[credentials]\ndefault_role = \"{label:team}\"", Some(&[team]), &[team]);
    assert_eq!((said.as_str(), instance.endpoint), ("none", false));
    assert_eq!(instance.problems, [format!("label team: {UNKNOWN_SETTER}")]);
}

#[test]
fn a_rule_without_max_duration_lets_labels_make_sessions_shorter_only() {
    let rule = "[[allow]]\nrole = \"**\"\n";
    let with = |duration| outcome(rule, &[("imds.role", "app"), ("imds.role.duration", duration)]);
    assert_eq!(
        with("15m"),
        format!("{ARN}/app as web@h1 minutes=15 by=allow rule 1 (line 1)")
    );
    assert_eq!(
        with("12h"),
        "refused: allow rule 1 (line 1) does not let labels set sessions longer than 60m (credentials.duration), and the label asks for \
         720m; max_duration = \"720m\" in it would"
    );
    let named = format!("{rule}max_duration = \"12h\"\n");
    assert_eq!(
        outcome(&named, &[("imds.role", "app"), ("imds.role.duration", "12h")]),
        format!("{ARN}/app as web@h1 minutes=720 by=allow rule 1 (line 1)")
    );
}

#[test]
fn a_prefix_in_other_letters_is_a_typo() {
    assert_eq!(
        outcome("", &[("IMDS.role", "app")]),
        "refused: unknown label IMDS.role; did you mean imds.role?"
    );
}

/// The outcome of `started` on a container whose image has the variables `image`.
fn with_variables_of_image(toml: &str, image: &[&str], started: &[&str]) -> String {
    let image = Environment::of(image).0;
    let mut all = image.clone();
    all.extend(Environment::of(started).0);
    let mut container = container(&[]);
    container.environment = Some(Pairs::split(&all, Some(&image)));
    let settings = configured(toml);
    said(&resolve(
        &container,
        &attachments(),
        SystemTime::UNIX_EPOCH,
        &settings,
        &facts(),
    ))
}

#[test]
fn session_policy_in_a_variable_counts_if_the_image_has_the_same() {
    const COMPAT: &str = "[compat]\nenv = true";
    let policy = format!("IAM_POLICY={POLICY}");
    let outcome = with_variables_of_image(COMPAT, &[&policy], &["IAM_ROLE=app", &policy]);
    assert_eq!(outcome, format!("{ARN}/app as web@h1 policy={POLICY}"));
    // A policy that cannot be read may have been a restriction, too.
    let outcome = with_variables_of_image(COMPAT, &["IAM_POLICY=x"], &["IAM_ROLE=app", "IAM_POLICY=x"]);
    assert!(
        outcome.starts_with("refused: label IAM_POLICY=\"x\": expected an IAM policy"),
        "{outcome}"
    );
}

#[test]
fn variable_of_the_image_fills_no_template() {
    let refused = format!("refused: variable ROLE: {UNKNOWN_SETTER}");
    let by_role = "[credentials]\ndefault_role = \"{env:ROLE}\"";
    // The role's template decides whether the container asks for a role at all, so there is none, and no refusal.
    assert_eq!(with_variables_of_image(by_role, &["ROLE=admin"], &[]), "none");
    assert_eq!(
        with_variables_of_image(by_role, &["ROLE=admin"], &["ROLE=app"]),
        format!("{ARN}/app as web@h1")
    );
    let by_session = "[credentials]\ndefault_role = \"app\"\nsession_name = \"{env:ROLE}\"";
    assert_eq!(with_variables_of_image(by_session, &["ROLE=admin"], &[]), refused);
}
