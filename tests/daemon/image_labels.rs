//! Labels and variables that an image has as well: they can restrict a container, and give it nothing.

use std::collections::BTreeMap;
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, SystemTime};

use imds_router::config::{self, Settings, Sources};
use imds_router::containers::image_labels::Image;
use imds_router::containers::reconciler::{ContainerSummary, Event, split_environment};
use imds_router::containers::{ContainerId, Definition, Environment, NetworkEndpoints, NetworkMode};
use imds_router::credentials::Session;
use imds_router::instance::{Base, Instance, Role, RuntimeFacts, resolve};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::script::{Container, Daemon, id, settings};

type Map = BTreeMap<String, String>;

/// Configurations that treat labels in different ways.
const CONFIGURATIONS: &[&str] = &[
    "",
    "[credentials]\ndefault_role = \"fallback\"",
    "[imds]\nhttp_endpoint = \"enabled\"",
    "[imds]\nhttp_endpoint = \"disabled\"\nlabels_may_relax = true\n[credentials]\ndefault_role = \"fallback\"",
    "[imds]\nhttp_tokens = \"required\"",
    "[imds]\nhttp_put_response_hop_limit = 5\ninstance_metadata_tags = \"enabled\"\n[credentials]\nduration = \"30m\"\ndefault_role = \"fallback\"",
    "[credentials]\ndefault_role = \"{label:team}\"\nsession_name = \"{project}-{env:USER}\"",
    "[credentials]\nsession_name = \"{service}\"\ndefault_role = \"fallback\"",
    "[compat]\nenv = true\niam_docker = true\nimds_server = true",
    "[compat]\nenv = true\niam_docker = true\nimds_server = true\n[credentials]\ndefault_role = \"fallback\"",
    // The first rule has a ceiling, the second does not.
    "[[allow]]\nlabel = \"team=a\"\nrole = \"**\"\nprofile = \"*\"\nsession_policy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]\nmax_duration = \"1h\"\n\
     [[allow]]\nrole = \"**\"\nprofile = \"*\"\nsession_tags = \"*\"\nsession_name = \"*\"\nexternal_id = \"*\"\nsource_identity = \"*\"\nmax_duration = \"12h\"",
    "[[allow]]\nproject = \"shop\"\nrole = \"**\"\nprofile = \"*\"\nsession_tags = \"*\"\n\
     [[allow]]\nservice = \"api\"\nrole = \"**\"\nsession_policy_arns = [\"arn:aws:iam::aws:policy/ReadOnlyAccess\"]",
    "[credentials]\ndefault_role = \"fallback\"\n[[allow]]\nlabel = [\"team\", \"imds.region\"]\nrole = \"**\"\n\
     [[allow]]\nrole = \"**\"\nmax_duration = \"15m\"",
];

const POLICY: &str = r#"{"Statement":[]}"#;
const OTHER_POLICY: &str = r#"{"Statement":[{}]}"#;

/// Names, and values of each.
type Table = &'static [(&'static str, &'static [&'static str])];

/// Labels of each class.
const LABELS: Table = &[
    ("imds.role", &["app", "admin"]),
    ("imds.role.session-name", &["{label:team}", "fixed"]),
    ("imds.role.external-id", &["secret-1", "secret-2"]),
    ("imds.role.duration", &["15m", "1h", "2h", "12h"]),
    ("imds.role.source-identity", &["me", "you"]),
    ("imds.role.policy", &[POLICY, OTHER_POLICY]),
    (
        "imds.role.policy-arns",
        &[
            "arn:aws:iam::aws:policy/ReadOnlyAccess",
            "arn:aws:iam::aws:policy/AdministratorAccess",
        ],
    ),
    ("imds.role.session-tag.team", &["a", "b"]),
    ("imds.role.session-tag.cost", &["1"]),
    ("imds.role.transitive-tag-keys", &["team", "cost"]),
    ("imds.role.chain", &["hop", "hop,hop2"]),
    ("imds.profile", &["dev", "prod"]),
    ("imds.http-endpoint", &["enabled", "disabled"]),
    ("imds.http-tokens", &["optional", "required"]),
    ("imds.http-put-response-hop-limit", &["1", "3", "64"]),
    ("imds.http-protocol-ipv6", &["enabled", "disabled"]),
    ("imds.instance-metadata-tags", &["enabled", "disabled"]),
    ("imds.region", &["eu-west-1", "us-gov-west-1"]),
    ("imds.availability-zone", &["eu-west-1a", "us-east-1b"]),
    ("imds.metadata.placement/region", &["eu-west-1", "eu-west-3"]),
    ("imds.instance-id", &["i-12345678"]),
    ("imds.instance-type", &["t3.micro"]),
    ("imds.user-data", &["x"]),
    ("imds.instance-tag.Name", &["web"]),
    ("imds.spot.interrupt-after", &["5m"]),
    ("imds.spot.action", &["stop"]),
    ("team", &["a", "b"]),
    (
        "com.swipely.iam-docker.iam-profile",
        &["arn:aws:iam::111122223333:role/x"],
    ),
    ("imds.aws.role", &["arn:aws:iam::111122223333:role/y"]),
    ("imds.aws.external-id", &["secret-3"]),
    ("imds.aws.session-duration", &["900", "43200"]),
];

/// Labels that are errors.
const BAD_LABELS: Table = &[
    ("imds.role", &[""]),
    ("imds.role.external-id", &["x"]),
    ("imds.role.duration", &["99h"]),
    ("imds.role.policy", &["no policy"]),
    ("imds.role.session-tag.team", &["#"]),
    ("imds.http-endpoint", &["off"]),
    ("imds.http-put-response-hop-limit", &["0"]),
    ("imds.region", &["Mars"]),
    (
        "imds.metadata.network/interfaces/macs/02:00:00:00:00:99/device-number",
        &["0"],
    ),
    ("imds.instance-id", &["i-x"]),
    ("imds.user-data-base64", &["eA=="]),
    ("imds.unknown", &["x"]),
    ("IMDS.role", &["app"]),
    ("com.swipely.iam-docker.iam-profile", &["x"]),
    ("imds.aws.ambient", &["true"]),
];

const VARIABLES: Table = &[
    ("IAM_ROLE", &["app", "arn:aws:iam::111122223333:role/z"]),
    ("IAM_EXTERNAL_ID", &["secret-4"]),
    ("IAM_POLICY", &[POLICY, OTHER_POLICY]),
    ("USER", &["me", "you"]),
];

static SETTINGS: LazyLock<Vec<Settings>> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let read = |text: &&str| {
        let file = dir.path().join("config.toml");
        std::fs::write(&file, text).unwrap();
        let sources = Sources {
            file: Some(file),
            ..Sources::default()
        };
        config::load(&sources).unwrap_or_else(|error| panic!("{text}: {error}"))
    };
    CONFIGURATIONS.iter().map(read).collect()
});

/// A container, and the image that it was started from.
#[derive(Clone, Debug)]
struct Case {
    settings: usize,
    labels: Map,
    variables: Map,
    image: Image,
}

/// Pairs are merged as Docker does it: those of the container win (`merge` in moby's daemon/commit.go).
fn merged(image: &Map, started: &Map) -> Map {
    let mut all = image.clone();
    all.extend(started.clone());
    all
}

impl Case {
    fn definition(&self, image: Option<&Image>) -> Definition {
        let row = ContainerSummary {
            id: ContainerId::parse(&"ab".repeat(32)).unwrap(),
            name: "web".to_owned(),
            labels: merged(&self.image.labels, &self.labels),
            image: "box".to_owned(),
            image_id: format!("sha256:{}", "cd".repeat(32)),
            image_is_certain: true,
            network_mode: NetworkMode::Host,
            running: true,
        };
        let variables = Environment(merged(&self.image.environment.0, &self.variables));
        let mut definition = row.define(image, false);
        definition.environment = Some(split_environment(&variables, image, false));
        definition
    }

    fn outcome(&self, image: Option<&Image>) -> Instance {
        let base = Base {
            account: Some("111122223333".to_owned()),
            arn: Some("arn:aws:iam::111122223333:user/base".to_owned()),
            ..Base::default()
        };
        let facts = RuntimeFacts {
            profiles: ["dev", "prod"].map(|name| (name.to_owned(), base.clone())).into(),
            base,
            host: "host".to_owned(),
            ..RuntimeFacts::default()
        };
        let definition = self.definition(image);
        resolve(
            &definition,
            &NetworkEndpoints::default(),
            SystemTime::UNIX_EPOCH,
            &SETTINGS[self.settings],
            &facts,
        )
    }

    fn has_ambiguous_pair(&self) -> bool {
        let definition = self.definition(Some(&self.image));
        let variables = definition.environment.unwrap();
        !definition.labels.ambiguous().is_empty() || !variables.ambiguous().is_empty()
    }
}

/// Why `after` gives a container more than `before` did; `None`: it does not.
fn more(before: &Instance, after: &Instance) -> Option<&'static str> {
    let session = match (after.role.session(), before.role.session()) {
        (None, _) => None,
        (Some(_), None) => Some("credentials"),
        (Some(after), Some(before)) => more_of_a_session(before, after),
    };
    let options = [
        ("the metadata service", after.endpoint && !before.endpoint),
        (
            "IMDSv1",
            after.endpoint && before.tokens_required && !after.tokens_required,
        ),
        ("a higher hop limit", after.hop_limit > before.hop_limit),
        ("IPv6", after.ipv6 && !before.ipv6),
        ("tags", after.tags && !before.tags),
    ];
    let option = options.into_iter().find_map(|(what, more)| more.then_some(what));
    session.or(option)
}

fn more_of_a_session(before: &Session, after: &Session) -> Option<&'static str> {
    if after.duration() > before.duration() {
        return Some("a longer session");
    }
    match (before.clone(), after.clone()) {
        (Session::Role(mut before), Session::Role(after)) => {
            before.duration = after.duration;
            if before.policy.is_none() && before.policy_arns.is_empty() {
                (before.policy, before.policy_arns) = (after.policy.clone(), after.policy_arns.clone());
            }
            (before != after).then_some("another session")
        }
        (Session::Profile(mut before), Session::Profile(after)) => {
            before.duration = after.duration;
            (before != after).then_some("another profile")
        }
        _ => Some("another kind of session"),
    }
}

fn pair(table: Table) -> impl Strategy<Value = (String, String)> {
    proptest::sample::select(table).prop_flat_map(|(name, values)| {
        proptest::sample::select(values).prop_map(move |value| (name.to_owned(), value.to_owned()))
    })
}

/// Up to `most` pairs of a table.
fn pairs(table: Table, most: usize) -> impl Strategy<Value = Map> {
    proptest::collection::vec(pair(table), 0..=most).prop_map(|pairs| pairs.into_iter().collect())
}

/// Up to `most` labels, and rarely a bad one.
fn labels(most: usize) -> impl Strategy<Value = Map> {
    (pairs(LABELS, most), proptest::option::weighted(0.03, pair(BAD_LABELS))).prop_map(|(mut labels, bad)| {
        labels.extend(bad);
        labels
    })
}

/// Labels of compose: all of them, or none.
fn compose_labels() -> impl Strategy<Value = Map> {
    let project = proptest::sample::select(&["shop", "bank"][..]);
    let service = proptest::sample::select(&["api", "web"][..]);
    proptest::option::of((project, service)).prop_map(|names| {
        let labels = names.map(|(project, service)| {
            [
                ("com.docker.compose.project", project),
                ("com.docker.compose.service", service),
                ("com.docker.compose.container-number", "1"),
                ("com.docker.compose.config-hash", "0123"),
            ]
        });
        let labels = labels.into_iter().flatten();
        labels
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    })
}

/// Few of the pairs of a map.
fn some_of(pairs: Map) -> impl Strategy<Value = Map> {
    let pairs: Vec<_> = pairs.into_iter().collect();
    let most = pairs.len().min(2);
    proptest::sample::subsequence(pairs, 0..=most).prop_map(|pairs| pairs.into_iter().collect())
}

/// A container, and its image after pairs were added: those that the container has already, and others.
fn cases() -> impl Strategy<Value = (Case, Image)> {
    let role = proptest::option::weighted(0.6, Just(("imds.role".to_owned(), "app".to_owned())));
    let started = (role, labels(3), compose_labels(), pairs(VARIABLES, 1));
    let image = (labels(1), pairs(VARIABLES, 1));
    let more = (labels(1), compose_labels(), pairs(VARIABLES, 1));
    let base = (0..CONFIGURATIONS.len(), started, image, more);
    let base = base.prop_map(|(settings, started, (image_labels, image_variables), more)| {
        let (role, labels, compose, variables) = started;
        let mut labels = merged(&labels, &compose);
        labels.extend(role);
        let case = Case {
            settings,
            labels,
            variables,
            image: Image {
                labels: image_labels,
                environment: Environment(image_variables),
            },
        };
        (case, more)
    });
    base.prop_flat_map(|(case, (labels, compose, variables))| {
        let added = (some_of(case.labels.clone()), some_of(case.variables.clone()));
        let others = (some_of(merged(&labels, &compose)), some_of(variables));
        (added, others).prop_map(move |((labels, variables), (other_labels, other_variables))| {
            let with = |base: &Map, others: &Map, added: &Map| merged(&merged(added, others), base);
            let image = Image {
                labels: with(&case.image.labels, &other_labels, &labels),
                environment: Environment(with(&case.image.environment.0, &other_variables, &variables)),
            };
            (case.clone(), image)
        })
    })
}

/// The property below has found this: without its image, the label of the other program alone set the duration.
#[test]
fn the_shorter_of_two_durations_counts_without_the_image_too() {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let case = Case {
        settings: 9,
        labels: [
            pair("imds.role.duration", "15m"),
            pair("imds.aws.session-duration", "43200"),
        ]
        .into(),
        variables: Map::new(),
        image: Image {
            labels: [pair("imds.aws.session-duration", "43200")].into(),
            environment: Environment(Map::new()),
        },
    };
    for image in [Some(&case.image), None] {
        let outcome = case.outcome(image);
        let session = outcome.role.session().expect("the default role");
        assert_eq!(session.duration(), Duration::from_secs(15 * 60), "{image:?}");
    }
}

#[test]
fn pairs_that_are_added_to_an_image_never_give_its_container_more() {
    const CASES: u32 = 10_000;
    let (ambiguous, served, restricted) = (Mutex::new(0), Mutex::new(0), Mutex::new(0));
    let count = |counter: &Mutex<u32>, counts: bool| *counter.lock().unwrap() += u32::from(counts);
    let config = Config {
        cases: CASES,
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..Config::default()
    };
    let tried = TestRunner::new(config).run(&cases(), |(case, image)| {
        let before = case.outcome(Some(&case.image));
        let changed = Case { image, ..case.clone() };
        let after = changed.outcome(Some(&changed.image));
        count(&ambiguous, changed.has_ambiguous_pair());
        count(&served, after.role.session().is_some());
        count(
            &restricted,
            after.role.session().is_none() && before.role.session().is_some(),
        );
        prop_assert_eq!(
            more(&before, &after),
            None,
            "before: {:?}, after: {:?}",
            before.role,
            after.role
        );
        // The image is removed.
        let without = changed.outcome(None);
        prop_assert_eq!(more(&after, &without), None, "without its image: {:?}", without.role);
        Ok(())
    });
    tried.unwrap();
    let [ambiguous, served, restricted] = [ambiguous, served, restricted].map(|counter| counter.into_inner().unwrap());
    println!("of {CASES}: {ambiguous} with an ambiguous pair, {served} with credentials, {restricted} that lost them");
    assert!(
        ambiguous >= CASES / 3,
        "{ambiguous} of {CASES} cases have an ambiguous pair"
    );
    assert!(
        served >= CASES / 20 && restricted >= CASES / 20,
        "{served} served, {restricted} restricted"
    );
}

/// Changes what the engine has of a container.
fn change(daemon: &Daemon, number: u32, change: impl FnOnce(&mut Container)) {
    daemon
        .engine
        .world(|world| change(world.containers.get_mut(&id(number)).unwrap()));
}

#[tokio::test(start_paused = true)]
async fn a_removed_image_stays_readable_until_its_last_container_is_removed() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, &[("imds.role", "app"), ("imds.http-tokens", "required")]);
    change(&daemon, 1, |container| {
        container.image_labels = [("imds.role".to_owned(), "other".to_owned())].into();
    });
    daemon.boot(1, address);
    daemon.settle().await;
    let stored = |daemon: &Daemon| daemon.engine.world(|world| world.stored_images.len());
    assert_eq!(stored(&daemon), 1);

    // The image is removed, and another daemon starts.
    change(&daemon, 1, |container| container.image_is_removed = true);
    let next = Daemon::start_with(settings(), daemon.engine.clone(), daemon.kernel.clone());
    next.synchronised().await;
    next.settle().await;
    let instance = next.index.get(&id(1)).unwrap().instance.clone();
    assert!(matches!(instance.role, Role::Session(_)) && instance.tokens_required);
    assert_eq!(stored(&next), 1);

    next.kill(1);
    next.engine.world(|world| world.containers.remove(&id(1)));
    next.engine.send(Event::Removed(id(1)));
    next.settle().await;
    assert_eq!(stored(&next), 0);
}

#[tokio::test(start_paused = true)]
async fn without_its_image_a_container_keeps_its_restrictions_and_gets_no_role() {
    let with_default = Settings {
        default_role: Some("fallback".to_owned()),
        ..settings()
    };
    let daemon = Daemon::start(with_default);
    daemon.synchronised().await;
    for (number, labels) in [
        (1, &[("imds.role", "app")][..]),
        (2, &[("imds.http-endpoint", "disabled")]),
        (3, &[("imds.http-tokens", "required")]),
    ] {
        let address = daemon.create(number, labels);
        change(&daemon, number, |container| container.image_is_removed = true);
        daemon.boot(number, address);
    }
    daemon.settle().await;
    let instance = |number| daemon.index.get(&id(number)).unwrap().instance.clone();
    assert!(matches!(&instance(1).role, Role::Refused(why) if why.contains("the image cannot be read")));
    assert!(!instance(2).endpoint);
    assert!(matches!(instance(3).role, Role::Session(_)) && instance(3).tokens_required);
}

#[tokio::test(start_paused = true)]
async fn images_are_forgotten_with_their_containers() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    for number in 1..=20 {
        daemon.run(number, &[]).await;
        assert_eq!(daemon.engine.world(|world| world.stored_images.len()), 1);
        daemon.kill(number);
        daemon.engine.world(|world| world.containers.remove(&id(number)));
        daemon.engine.send(Event::Removed(id(number)));
        daemon.settle().await;
    }
    assert_eq!(daemon.engine.world(|world| world.stored_images.len()), 0);
}
