//! Functions that read what containers, images and files may contain, with arbitrary input. Each target states what must hold for
//! every input; a panic is a failure, too.
//!
//! `IMDS_FUZZ_CASES` is the number of inputs of each target (2,000): `IMDS_FUZZ_CASES=1000000 cargo test --release --test fuzz`.

#![allow(clippy::unwrap_used, reason = "a test may panic: that is how it fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, UNIX_EPOCH};

use hyper::Request;
use hyper::http::request::Parts;
use imds_router::attribution::sock_diag::{FoundSocket, read_answer};
use imds_router::clock::Clock;
use imds_router::config::{HttpTokens, Settings};
use imds_router::containers::label_sources::{Origin, Pairs};
use imds_router::containers::labels::{self, ContainerSpec, LabelError};
use imds_router::containers::{CgroupId, ContainerId, Open};
use imds_router::credentials::allow_rules::{Attribute, Glob, NotAllowed, Pair, Requester, RoleRequest, Rule, decide};
use imds_router::credentials::session_inputs::Inputs;
use imds_router::credentials::{RoleArn, Secret};
use imds_router::metadata::aemm;
use imds_router::orders::RuntimeOverrides;
use imds_router::protocol::request::{Call, Place, parse};
use imds_router::protocol::token::{LENGTH, TTL_SECONDS, TokenAuthority, TokenKey};
use proptest::collection::{btree_map, btree_set, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree as _;

fn config() -> ProptestConfig {
    let cases = std::env::var("IMDS_FUZZ_CASES").ok();
    let cases = cases.map(|text| text.parse().expect("IMDS_FUZZ_CASES: expected a number of cases"));
    ProptestConfig {
        // A failure prints its input, which then becomes a test beside the code.
        failure_persistence: None,
        ..ProptestConfig::with_cases(cases.unwrap_or(2_000))
    }
}

/// Any text, and more often one of these or a part of one.
fn text(likely: &'static [&'static str]) -> BoxedStrategy<String> {
    let other = vec(any::<char>(), 0..40).prop_map(|text| text.into_iter().collect());
    let cut = (select(likely), any::<prop::sample::Index>()).prop_map(|(text, at)| {
        let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        text[..ends[at.index(ends.len())]].to_owned()
    });
    let two = (select(likely), select(likely)).prop_map(|(first, second)| format!("{first}{second}"));
    prop_oneof![5 => select(likely).prop_map(str::to_owned), 2 => other, 1 => cut, 1 => two].boxed()
}

// Tokens.

fn authority(key: [u8; 32]) -> TokenAuthority {
    TokenAuthority::new(&TokenKey(key), "boot", Clock::scripted(UNIX_EPOCH))
}

fn container() -> impl Strategy<Value = ContainerId> {
    any::<[u8; 32]>().prop_map(|bytes| {
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        ContainerId::parse(&text).unwrap()
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_token_is_accepted_unchanged_and_for_its_run_only(
        key in any::<[u8; 32]>(), owner in container(), other in container(), run in any::<u64>(), other_run in any::<u64>(),
        ttl in TTL_SECONDS, bit in 0..LENGTH * 8,
    ) {
        let authority = authority(key);
        let token = authority.issue(&owner, CgroupId(run), ttl).into_bytes();
        prop_assert_eq!(authority.verify(&owner, CgroupId(run), &token), Some(ttl));
        prop_assert!(other == owner || authority.verify(&other, CgroupId(run), &token).is_none());
        prop_assert!(other_run == run || authority.verify(&owner, CgroupId(other_run), &token).is_none());
        let mut changed = token.clone();
        changed[bit / 8] ^= 1 << (bit % 8);
        prop_assert_eq!(authority.verify(&owner, CgroupId(run), &changed), None);
        prop_assert_eq!(authority.verify(&owner, CgroupId(run), &token[..bit / 8]), None);
        let longer = [token.as_slice(), b"=".as_slice()].concat();
        prop_assert_eq!(authority.verify(&owner, CgroupId(run), &longer), None);
    }

    #[test]
    fn no_other_bytes_are_a_token(
        key in any::<[u8; 32]>(), owner in container(),
        token in prop_oneof![
            vec(any::<u8>(), 0..120),
            vec(select(&b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_="[..]), LENGTH),
        ],
    ) {
        prop_assert_eq!(authority(key).verify(&owner, CgroupId(1), &token), None);
    }
}

// Requests.

const METHODS: &[&str] = &["GET", "HEAD", "PUT", "OPTIONS", "POST", "DELETE", "CONNECT", "BREW"];
const PATHS: &[&str] = &[
    "/",
    "/latest/api/token",
    "/latest/api/token/",
    "/latest/meta-data/iam/security-credentials/",
    "/latest/meta-data/%69am",
    "/1.0/user-data",
    "//latest//meta-data//",
    "/latest/..%2fmeta-data/%2e%2e/x",
    "/latest/%ff",
    "http://169.254.169.254/latest/api/token",
    "http://evil.example/latest/api/token",
    "*",
];
const HEADERS: &[&str] = &[
    "host",
    "origin",
    "x-aws-ec2-metadata-token",
    "x-aws-ec2-metadata-token-ttl-seconds",
    "x-forwarded-for",
    "forwarded",
    "accept",
];
/// Values that a header of that number in [`HEADERS`] often has.
const VALUES: &[&[&str]] = &[
    &[
        "169.254.169.254",
        "169.254.169.254:80",
        "[fd00:ec2::254]",
        "instance-data",
        "own.example",
        "evil.example",
        "",
    ],
    &["null", "http://169.254.169.254"],
    &["", "x"],
    &["60", "1", "21600", "0", "21601", "+60", ""],
    &["1.2.3.4", ""],
    &["for=1.2.3.4", ""],
    &["*/*"],
];

fn header() -> impl Strategy<Value = (&'static str, String)> {
    // Most requests have a TTL or no header at all that leads to a refusal.
    let number = prop_oneof![2 => Just(3), 1 => Just(0), 1 => Just(2), 1 => 0..HEADERS.len()];
    number.prop_flat_map(|number| (Just(HEADERS[number]), text(VALUES[number])))
}

fn request() -> impl Strategy<Value = Parts> {
    let parts = (select(METHODS), text(PATHS), vec(header(), 0..4));
    // As clients that want a token send it, with one more header.
    let token = header().prop_map(|more| {
        let ttl = ("x-aws-ec2-metadata-token-ttl-seconds", "60".to_owned());
        ("PUT", "/latest/api/token".to_owned(), vec![ttl, more])
    });
    let parts = prop_oneof![4 => parts, 1 => token];
    parts.prop_filter_map("hyper does not read this", |(method, path, headers)| {
        let mut request = Request::builder().method(method).uri(path);
        for (name, value) in headers {
            request = request.header(name, value);
        }
        request.body(()).ok().map(|request| request.into_parts().0)
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_request_is_refused_or_meant_for_this_service(request in request()) {
        let Ok(call) = parse(&request, &["own.example".to_owned()]) else { return Ok(()) };
        let count = |name: &str| request.headers.get_all(name).iter().count();
        prop_assert_eq!(count("origin"), 0);
        prop_assert!(count("host") < 2);
        let named = request.headers.get("host").map_or("", |host| host.to_str().unwrap());
        for host in [named, request.uri.authority().map_or("", |it| it.as_str())] {
            prop_assert!(!host.contains("evil"), "{}", host);
        }
        match call {
            Call::IssueToken(ttl) => {
                prop_assert_eq!((request.method.as_str(), request.uri.path()), ("PUT", "/latest/api/token"));
                prop_assert!(TTL_SECONDS.contains(&ttl));
                prop_assert_eq!(request.headers["x-aws-ec2-metadata-token-ttl-seconds"].to_str().unwrap().parse::<u32>(), Ok(ttl));
                prop_assert_eq!((count("x-aws-ec2-metadata-token-ttl-seconds"), count("x-forwarded-for"), count("forwarded")), (1, 0, 0));
            }
            Call::TokenOptions => prop_assert_eq!(request.method.as_str(), "OPTIONS"),
            Call::Get { place, token } => {
                prop_assert!(["GET", "HEAD"].contains(&request.method.as_str()));
                prop_assert_eq!(token.is_some(), count("x-aws-ec2-metadata-token") > 0, "an ignored token is IMDSv1");
                if let Place::Below(path) = place {
                    prop_assert!(path.is_empty() || path.split('/').all(|part| !part.is_empty()), "{}", path);
                }
            }
        }
    }
}

// Labels.

const NAMES: &[&str] = &[
    "imds.role",
    "imds.role.duration",
    "imds.role.external-id",
    "imds.role.session-name",
    "imds.role.policy",
    "imds.role.policy-arns",
    "imds.role.chain",
    "imds.role.session-tag.team",
    "imds.role.transitive-tag-keys",
    "imds.profile",
    "imds.http-tokens",
    "imds.http-endpoint",
    "imds.http-put-response-hop-limit",
    "imds.region",
    "imds.metadata.placement/group-name",
    "imds.metadata.iam/info",
    "imds.instance-tag.Name",
    "imds.spot.interrupt-after",
    "imds.spot.action",
    "imds.user-data",
    "imds.user-data-base64",
    "imds.rol",
    "imds.",
    "com.docker.compose.project",
];
const LABEL_VALUES: &[&str] = &[
    "app",
    "arn:aws:iam::111122223333:role/app",
    "app@111122223333",
    "15m",
    "2h",
    "required",
    "optional",
    "enabled",
    "disabled",
    "1",
    "64",
    "65",
    "eu-west-1",
    "{container}",
    "{label:",
    r#"{"Statement":[]}"#,
    "arn:aws:iam::aws:policy/ReadOnlyAccess",
    "team",
    "terminate",
    "c2VjcmV0",
    "",
];
/// Not in any name or message.
const SECRET: &str = "\u{7}secret-7f3a9";

fn label_maps() -> impl Strategy<Value = BTreeMap<String, String>> {
    btree_map(text(NAMES), text(LABEL_VALUES), 0..8)
}

fn read(labels: &BTreeMap<String, String>) -> (ContainerSpec, Vec<LabelError>) {
    let labels: Pairs = labels.clone().into_iter().collect();
    labels::read(&labels, None, &Settings::default())
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_label_is_read_or_named_in_an_error(labels in label_maps()) {
        let (spec, errors) = read(&labels);
        let ours = labels.iter().filter(|(label, _)| label.to_ascii_lowercase().starts_with("imds."));
        prop_assert_eq!(spec.labeled, ours.clone().count() > 0);
        for (label, value) in ours {
            let alone = BTreeMap::from([(label.clone(), value.clone())]);
            let (mut read_alone, wrong_alone) = read(&alone);
            read_alone.labeled = false;
            prop_assert!(
                read_alone != ContainerSpec::default() || !wrong_alone.is_empty(),
                "{} is ignored", label
            );
            // Whatever is wrong with it alone is wrong with it among others, but for what only others complete.
            for error in wrong_alone.iter().filter(|error| !matches!(error, LabelError::Contradiction { .. })) {
                prop_assert!(errors.contains(error), "{} is not told among others", error);
            }
        }
    }

    #[test]
    fn labels_without_the_prefix_change_nothing(labels in label_maps()) {
        let mut ours = labels.clone();
        ours.retain(|label, _| label.to_ascii_lowercase().starts_with("imds."));
        prop_assert_eq!(read(&labels), read(&ours));
    }

    #[test]
    fn no_error_shows_what_may_be_a_secret(
        labels in label_maps(), secret in select(&["imds.role.external-id", "imds.user-data-base64"][..]),
    ) {
        let mut labels = labels;
        labels.insert(secret.to_owned(), SECRET.to_owned());
        let (spec, errors) = read(&labels);
        prop_assert!(!errors.is_empty());
        for error in errors {
            prop_assert!(!error.to_string().contains("secret-7f3a9"), "{}", error);
        }
        let shown = format!("{:?}", spec.inputs.external_id);
        prop_assert!(!shown.contains("secret-7f3a9"), "{}", shown);
    }
}

// Labels of an image.

/// Labels of a container and those of its image, of which many are the same.
fn merged_labels() -> impl Strategy<Value = (BTreeMap<String, String>, BTreeMap<String, String>)> {
    (label_maps(), label_maps(), vec(any::<bool>(), 16)).prop_map(|(started, mut image, same)| {
        let same = started.iter().zip(same).filter(|(_, same)| *same);
        image.extend(same.map(|((label, value), _)| (label.clone(), value.clone())));
        let mut all = image.clone();
        all.extend(started);
        (all, image)
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_pair_is_own_if_and_only_if_the_image_does_not_have_it((all, image) in merged_labels()) {
        let pairs = Pairs::split(&all, Some(&image));
        let seen: BTreeMap<_, _> = pairs.iter().map(|(label, value, _)| (label.clone(), value.clone())).collect();
        prop_assert_eq!(&seen, &all);
        prop_assert_eq!(pairs.iter().count(), all.len());
        for (label, value, origin) in pairs.iter() {
            prop_assert_eq!(origin == Origin::Own, image.get(label) != Some(value));
            prop_assert_eq!(pairs.get(label), Some((value.as_str(), origin)));
        }
        prop_assert!(Pairs::split(&all, None).own().is_empty());
    }

    #[test]
    fn labels_of_the_image_choose_nothing_and_hide_no_error((all, image) in merged_labels()) {
        let settings = Settings::default();
        let pairs = Pairs::split(&all, Some(&image));
        let own: Pairs = pairs.own().iter().map(|(label, value)| (label.clone(), value.clone())).collect();
        let (spec, errors) = labels::read(&pairs, None, &settings);
        let (alone, wrong_alone) = labels::read(&own, None, &settings);
        prop_assert!(wrong_alone.iter().all(|error| errors.contains(error)));
        prop_assert_eq!(spec.labeled, alone.labeled);
        prop_assert_eq!((&spec.role, &spec.profile, &spec.region), (&alone.role, &alone.profile, &alone.region));
        prop_assert_eq!((&spec.metadata, &spec.tags), (&alone.metadata, &alone.tags));
        let (chosen, own) = (&spec.inputs, &alone.inputs);
        prop_assert_eq!((&chosen.session_name, &chosen.external_id), (&own.session_name, &own.external_id));
        prop_assert_eq!((&chosen.tags, &chosen.chain), (&own.tags, &own.chain));
        prop_assert_eq!(&chosen.transitive_tag_keys, &own.transitive_tag_keys);
        // Options are relaxed by own labels only.
        prop_assert!(spec.http_tokens != Some(HttpTokens::Optional) || alone.http_tokens == spec.http_tokens);
        prop_assert!(spec.http_endpoint != Some(true) || alone.http_endpoint == spec.http_endpoint);
        prop_assert!(spec.ipv6 != Some(true) || alone.ipv6 == spec.ipv6);
    }
}

// Rules.

const WORDS: &[&str] = &["app", "web", "prod", "prod-1", "a/b"];
const GLOBS: &[&str] = &["*", "app", "prod*", "web", "?pp", "a/*", "**"];
const ROLE_GLOBS: &[&str] = &[
    "**",
    "*",
    "arn:aws:iam::111122223333:role/app",
    "arn:aws:iam::111122223333:role/*",
    "arn:aws:iam::*:role/team/**",
];
const ROLES: &[&str] = &[
    "arn:aws:iam::111122223333:role/app",
    "arn:aws:iam::111122223333:role/team/app",
    "arn:aws:iam::444455556666:role/app",
];

/// Sessions without a label and without a rule's limit.
const DEFAULT_DURATION: Duration = Duration::from_secs(3600);

/// A key of a rule, which most rules do not have.
fn globs(likely: &'static [&'static str]) -> impl Strategy<Value = Vec<Glob>> {
    let globs = vec(select(likely).prop_map(|text| Glob::parse(text).unwrap()), 1..3);
    prop_oneof![3 => Just(Vec::new()), 1 => globs]
}

fn pairs() -> impl Strategy<Value = Vec<Pair>> {
    let pair = select(&["team", "team=app", "team=*", "*=web", "stage=prod*"][..]);
    let pairs = vec(pair.prop_map(|text| Pair::parse(text).unwrap()), 1..3);
    prop_oneof![3 => Just(Vec::new()), 1 => pairs]
}

fn rules() -> impl Strategy<Value = Vec<Rule>> {
    let who = (globs(GLOBS), globs(GLOBS), globs(GLOBS), globs(GLOBS), pairs());
    let roles = vec(select(ROLE_GLOBS).prop_map(|text| Glob::parse(text).unwrap()), 1..3);
    let roles = prop_oneof![1 => Just(Vec::new()), 4 => roles];
    let what = (roles, globs(GLOBS), globs(GLOBS), pairs());
    let ceiling = (any::<bool>(), any::<bool>(), option::of(900..43_200u64));
    let rule = (who, what, ceiling).prop_map(|(who, what, ceiling)| Rule {
        container: who.0,
        image: who.1,
        service: who.2,
        network: who.3,
        label: who.4,
        role: what.0,
        profile: what.1,
        session_name: what.2,
        session_tags: what.3,
        session_policy: ceiling.0.then(|| r#"{"Statement":[]}"#.to_owned()),
        session_policy_arns: ceiling
            .1
            .then(|| "arn:aws:iam::aws:policy/X".to_owned())
            .into_iter()
            .collect(),
        max_duration: ceiling.2.map(Duration::from_secs),
        ..Rule::default()
    });
    vec(rule, 0..5).prop_map(|mut rules| {
        for (rule, number) in rules.iter_mut().zip(1..) {
            rule.number = number;
        }
        rules
    })
}

#[derive(Clone, Debug)]
struct Asked {
    container: String,
    image: String,
    service: Option<String>,
    networks: Option<Vec<String>>,
    labels: BTreeMap<String, String>,
    role: Option<RoleArn>,
    profile: Option<String>,
    chain: Vec<RoleArn>,
    inputs: Inputs,
}

fn asked() -> impl Strategy<Value = Asked> {
    let word = || text(WORDS);
    let tags = || btree_map(select(&["team", "stage"][..]).prop_map(str::to_owned), word(), 0..3);
    let role = || select(ROLES).prop_map(|arn| RoleArn::parse(arn).unwrap());
    let who = (
        word(),
        word(),
        option::of(word()),
        option::of(vec(word(), 0..3)),
        tags(),
    );
    let hops = prop_oneof![3 => Just(Vec::new()), 1 => vec(role(), 1..3)];
    let what = (option::weighted(0.8, role()), option::weighted(0.2, word()), hops);
    let managed = btree_set(Just("arn:aws:iam::aws:policy/Y".to_owned()), 1..2);
    let inputs = (
        option::weighted(0.2, word()),
        option::of(900..43_200u64),
        prop::bool::weighted(0.2),
        prop_oneof![4 => Just(BTreeSet::new()), 1 => managed],
        prop_oneof![4 => Just(BTreeMap::new()), 1 => tags()],
        option::weighted(0.1, word()),
    );
    (who, what, inputs).prop_map(|(who, what, inputs)| Asked {
        container: who.0,
        image: who.1,
        service: who.2,
        networks: who.3,
        labels: who.4,
        role: what.0,
        profile: what.1,
        chain: what.2,
        inputs: Inputs {
            session_name: inputs.0,
            duration: inputs.1.map(Duration::from_secs),
            policy: inputs.2.then(|| r#"{"Statement":[]}"#.to_owned()),
            policy_arns: inputs.3,
            tags: inputs.4,
            external_id: inputs.5.map(Secret::new),
            ..Inputs::default()
        },
    })
}

fn decided<'r>(rules: &'r [Rule], asked: &Asked) -> Result<Option<&'r Rule>, NotAllowed> {
    let attribute = |value| Attribute { value, is_own: true };
    let labels = asked
        .labels
        .iter()
        .map(|(key, value)| (key.as_str(), attribute(value.as_str())));
    let who = Requester {
        container: &asked.container,
        image: &asked.image,
        image_id: "sha256:0",
        project: None,
        service: asked.service.as_deref().map(attribute),
        networks: asked
            .networks
            .as_ref()
            .map(|names| names.iter().map(String::as_str).collect()),
        labels: labels.collect(),
    };
    let wish = RoleRequest {
        role: asked.role.as_ref(),
        profile: asked.profile.as_deref(),
        chain: &asked.chain,
        inputs: &asked.inputs,
        default_duration: DEFAULT_DURATION,
    };
    decide(rules, &who, &wish)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn a_rule_grants_only_what_it_allows(rules in rules(), asked in asked()) {
        let granted = decided(&rules, &asked);
        if rules.is_empty() {
            prop_assert_eq!(granted, Ok(None));
            return Ok(());
        }
        let Ok(rule) = granted else { return Ok(()) };
        let rule = rule.expect("there are rules");
        let has_session_policy = asked.inputs.policy.is_some() || !asked.inputs.policy_arns.is_empty();
        prop_assert!(!(rule.has_ceiling() && has_session_policy), "a label lifts the ceiling");
        prop_assert_eq!(asked.role.is_some(), !rule.role.is_empty());
        prop_assert!(asked.profile.is_none() || !rule.profile.is_empty());
        prop_assert!(asked.inputs.session_name.is_none() || !rule.session_name.is_empty());
        prop_assert!(asked.inputs.external_id.is_none() || !rule.external_id.is_empty());
        prop_assert!(asked.inputs.tags.is_empty() || !rule.session_tags.is_empty());
        prop_assert!(rule.network.is_empty() || asked.networks.as_ref().is_some_and(|names| !names.is_empty()));
        let most = rule.max_duration.unwrap_or(DEFAULT_DURATION);
        prop_assert!(asked.inputs.duration.is_none_or(|duration| duration <= most));
        // It grants the same alone; each role of the chain has a rule of its own.
        let direct = Asked { chain: Vec::new(), ..asked.clone() };
        prop_assert_eq!(decided(std::slice::from_ref(rule), &direct), Ok(Some(rule)));
        for hop in &asked.chain {
            let hop = Asked { role: Some(hop.clone()), chain: Vec::new(), inputs: Inputs::default(), ..asked.clone() };
            prop_assert!(decided(&rules, &hop).is_ok());
        }
    }

    #[test]
    fn the_first_rule_that_covers_decides(rules in rules(), more in rules(), asked in asked()) {
        let all: Vec<Rule> = rules.iter().chain(&more).cloned().collect();
        match decided(&rules, &asked) {
            Ok(Some(rule)) => prop_assert_eq!(decided(&all, &asked), Ok(Some(rule))),
            // A rule that waits for the networks is not passed over.
            Err(NotAllowed::Pending(why)) => prop_assert_eq!(decided(&all, &asked), Err(NotAllowed::Pending(why))),
            _ => {}
        }
    }

    #[test]
    fn what_is_granted_before_the_networks_are_known_holds_on_any_network(
        rules in rules(), asked in asked(), networks in vec(text(WORDS), 0..3),
    ) {
        let before = Asked { networks: None, ..asked.clone() };
        if let Ok(granted) = decided(&rules, &before) {
            let after = Asked { networks: Some(networks), ..asked };
            prop_assert_eq!(decided(&rules, &after), Ok(granted));
        }
    }
}

// The kernel's answers about sockets.

/// An answer of `inet_diag`, as the kernel writes it (`struct nlmsghdr`, `struct inet_diag_msg` and attributes; linux/netlink.h,
/// linux/inet_diag.h).
#[derive(Clone, Debug)]
struct Answer {
    sequence: u32,
    state: u8,
    client: (u8, u16),
    cookie: [u8; 8],
    /// `bytes_acked`, `bytes_sent`, `bytes_retrans` and `unacked` of `struct tcp_info`, and how much of it there is.
    counters: ([u64; 3], u32, usize),
    cgroup: Vec<u8>,
}

impl Answer {
    fn bytes(&self) -> Vec<u8> {
        const SOCK_DIAG_BY_FAMILY: u16 = 20;
        let attribute = |kind: u16, value: &[u8]| {
            let length = u16::try_from(value.len() + 4).unwrap();
            let mut bytes = [&length.to_ne_bytes(), &kind.to_ne_bytes(), value].concat();
            bytes.resize(bytes.len().next_multiple_of(4), 0);
            bytes
        };
        // Family, state, timer, retransmissions; the ends, with their ports in network order; interface and cookie; four counters.
        let mut message = vec![2, self.state, 0, 0];
        message.extend([self.client.1.to_be_bytes(), 80u16.to_be_bytes()].concat());
        let address = |last: u8| [&[10, 0, 0, last][..], &[0; 12]].concat();
        message.extend([address(self.client.0), address(254)].concat());
        message.extend(0u32.to_ne_bytes());
        message.extend(self.cookie);
        message.extend([0; 20]);
        let ([acked, sent, retransmitted], unacked, length) = self.counters;
        let mut info = vec![0; 232];
        for (at, counter) in [(120, acked), (200, sent), (208, retransmitted)] {
            info[at..at + 8].copy_from_slice(&counter.to_ne_bytes());
        }
        info[24..28].copy_from_slice(&unacked.to_ne_bytes());
        // INET_DIAG_INFO, INET_DIAG_CGROUP_ID.
        message.extend(attribute(2, &info[..length]));
        message.extend(attribute(21, &self.cgroup));
        let length = u32::try_from(message.len() + 16).unwrap();
        let head = [&length.to_ne_bytes()[..], &SOCK_DIAG_BY_FAMILY.to_ne_bytes(), &[0, 0]].concat();
        [head, self.sequence.to_ne_bytes().to_vec(), vec![0; 4], message].concat()
    }
}

fn answers() -> impl Strategy<Value = Answer> {
    let counter = || prop_oneof![3 => 0..4u64, 1 => 70..80u64, 1 => any::<u64>()];
    // Mostly as many bytes acknowledged as sent, and up to two more: SYN and FIN.
    let acked = prop_oneof![3 => (0..3u64).prop_map(Some), 1 => Just(None)];
    let counters = (acked, counter(), counter(), counter()).prop_map(|(beyond, sent, again, other)| {
        let sent = sent.max(again);
        let acked = beyond.map_or(other, |beyond| (sent - again).saturating_add(beyond));
        [acked, sent, again]
    });
    let state = prop_oneof![3 => select(&[1u8, 4, 5][..]), 1 => 0..13u8];
    let unacked = prop_oneof![4 => Just(0), 1 => any::<u32>()];
    let length = prop_oneof![8 => Just(232usize), 1 => (0..58usize).prop_map(|words| words * 4)];
    let cgroup = prop_oneof![8 => vec(any::<u8>(), 8), 1 => vec(any::<u8>(), 0..12)];
    let ends = (1..4u8, 0..4u16, any::<[u8; 8]>(), 0..3u32);
    (ends, state, counters, unacked, length, cgroup).prop_map(
        |((last, port, cookie, sequence), state, counters, unacked, length, cgroup)| Answer {
            sequence,
            state,
            client: (last, port),
            cookie,
            counters: (counters, unacked, length),
            cgroup,
        },
    )
}

/// An answer of which some bytes are changed or cut off.
fn damaged_answers() -> impl Strategy<Value = Vec<u8>> {
    let change = (any::<prop::sample::Index>(), any::<u8>());
    let damage = (vec(change, 0..4), option::weighted(0.3, any::<prop::sample::Index>()));
    let damaged = (answers(), damage).prop_map(|(answer, (changes, end))| {
        let mut bytes = answer.bytes();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        bytes.truncate(end.map_or(bytes.len(), |end| end.index(bytes.len())));
        bytes
    });
    prop_oneof![4 => damaged, 1 => vec(any::<u8>(), 0..400)]
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn evidence_is_what_the_kernel_wrote(answer in answers(), sequence in 0..3u32) {
        let read = read_answer(&answer.bytes(), sequence).unwrap();
        prop_assert_eq!(read.is_some(), sequence == answer.sequence);
        let Some(found) = read else { return Ok(()) };
        let found = found.expect("a socket");
        let (last, port) = answer.client;
        let ends = ([10, 0, 0, last].into(), port, [10, 0, 0, 254].into());
        prop_assert_eq!((found.local.ip(), found.local.port(), found.remote.ip()), ends);
        prop_assert_eq!((found.state, found.cookie), (answer.state, u64::from_ne_bytes(answer.cookie)));
        let cgroup = answer.cgroup.clone().try_into().map_or(0, u64::from_ne_bytes);
        prop_assert_eq!(found.cgroup, CgroupId(cgroup));
        // An established socket has opened its connection only if one more than its bytes was acknowledged: its SYN.
        if found.open == Open::Active && found.state == 1 {
            let ([acked, sent, again], unacked, length) = answer.counters;
            prop_assert!(length >= 216 && unacked == 0 && sent >= again && acked == sent - again + 1);
        }
        prop_assert!(found.open != Open::Active || [1, 4, 5].contains(&found.state));
        prop_assert!(found.open != Open::Earlier);
    }

    #[test]
    fn no_bytes_are_more_than_one_socket_or_an_error(bytes in damaged_answers()) {
        if let Ok(Some(Some(FoundSocket { open, state, .. }))) = read_answer(&bytes, 1) {
            prop_assert!(bytes.len() >= 16 + 72, "a socket in {} bytes", bytes.len());
            prop_assert!(open != Open::Active || [1, 4, 5].contains(&state));
        }
    }
}

// Files.

const JSON: &[&str] = &[
    r#"{"containers":{}}"#,
    r#"{"containers":{"0000000000000000000000000000000000000000000000000000000000000000":{"options":{"http_tokens":"required"}}}}"#,
    r#"{"containers":{"x":{"events":[]}}}"#,
    r#"{"metadata":{"values":{"ami-id":"ami-0123","iam-info":{"a":1},"tags-instance":{"Name":"x"}}}}"#,
    r#"{"metadata":{"values":{"x":"y"},"paths":{"x":"/latest/meta-data/iam/info"}}}"#,
    r#"{"metadata":{"values":{"x":"y"},"paths":{"x":"/latest/meta-data//iam//info/"}}}"#,
    r#"{"userdata":{"values":{"userdata":"c2VjcmV0"}}}"#,
    "[]",
];

/// A file, some bytes of which are others.
fn damaged() -> impl Strategy<Value = Vec<u8>> {
    let changes = vec((any::<prop::sample::Index>(), any::<u8>()), 0..3);
    (text(JSON), changes).prop_map(|(file, changes)| {
        let mut file = file.into_bytes();
        for (at, byte) in changes.into_iter().filter(|_| !file.is_empty()).collect::<Vec<_>>() {
            let at = at.index(file.len());
            file[at] = byte;
        }
        file
    })
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn overrides_that_are_written_are_read_again(file in damaged(), owner in container(), hop_limit in 1..=64u8) {
        let written = Arc::new(Mutex::new(Vec::new()));
        let keep = written.clone();
        let keep = Box::new(move |bytes: &[u8]| {
            *keep.lock().unwrap() = bytes.to_vec();
            Ok(())
        });
        let Ok(orders) = RuntimeOverrides::new(&file, keep) else { return Ok(()) };
        let ordered = orders.order(&owner, |_| true, |it| it.options.hop_limit = Some(hop_limit)).unwrap();
        prop_assert_eq!(ordered.options.hop_limit, Some(hop_limit));
        let again = RuntimeOverrides::new(&written.lock().unwrap(), Box::new(|_| Ok(()))).unwrap();
        prop_assert_eq!(again.of(&owner), Some(ordered));
    }

    #[test]
    fn no_metadata_file_gives_credentials(file in damaged()) {
        let Ok(given) = aemm::read(&String::from_utf8_lossy(&file)) else { return Ok(()) };
        let paths: BTreeSet<&str> = given.values.keys().map(String::as_str).collect();
        for path in paths {
            prop_assert!(!path.starts_with("meta-data/iam"), "{}", path);
            prop_assert!(!path.starts_with('/') && !path.ends_with('/') && !path.contains("//"), "{}", path);
        }
        prop_assert!(given.user_data.is_none_or(|data| (1..=aemm::MOST_USER_DATA).contains(&data.len())));
    }
}

/// How many of 1,000 inputs lead to what a target is about.
fn share<T: std::fmt::Debug>(inputs: impl Strategy<Value = T>, reaches: impl Fn(T) -> bool) -> usize {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut input = || inputs.new_tree(&mut runner).unwrap().current();
    (0..1_000).filter(|_| reaches(input())).count()
}

#[test]
fn inputs_are_neither_all_accepted_nor_all_rejected() {
    let accepted = [
        (
            "requests",
            share(request(), |it| parse(&it, &["own.example".to_owned()]).is_ok()),
        ),
        (
            "tokens asked for",
            share(request(), |it| matches!(parse(&it, &[]), Ok(Call::IssueToken(_)))),
        ),
        (
            "labels",
            share(label_maps(), |it| read(&it).0.labeled && read(&it).1.is_empty()),
        ),
        (
            "labels that an image repeats",
            share(merged_labels(), |(all, image)| {
                let pairs = Pairs::split(&all, Some(&image));
                pairs.ambiguous().keys().any(|label| label.starts_with("imds.")) && !pairs.own().is_empty()
            }),
        ),
        (
            "rules",
            share((rules(), asked()), |(rules, asked)| {
                matches!(decided(&rules, &asked), Ok(Some(_)))
            }),
        ),
        (
            "rules, later ones",
            share(
                (rules(), asked()),
                |(rules, asked)| matches!(decided(&rules, &asked), Ok(Some(rule)) if rule.number > 1),
            ),
        ),
        (
            "sockets that connected",
            share(
                answers(),
                |it| matches!(read_answer(&it.bytes(), it.sequence), Ok(Some(Some(found))) if found.open == Open::Active),
            ),
        ),
        (
            "overrides",
            share(damaged(), |it| RuntimeOverrides::new(&it, Box::new(|_| Ok(()))).is_ok()),
        ),
        (
            "metadata files",
            share(damaged(), |it| {
                aemm::read(&String::from_utf8_lossy(&it)).is_ok_and(|it| !it.values.is_empty())
            }),
        ),
    ];
    println!("{accepted:?}");
    for (what, count) in accepted {
        assert!((10..950).contains(&count), "{count} of 1000 {what} are accepted");
    }
}
