//! What labels make of AssumeRole, and what the operator's rules leave of it: asked from real containers.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use libtest_mimic::Trial;

use crate::rig::hostile::on_host;
use crate::rig::{Client, Container, Daemon, Engine, Identity, Rig, poll};

const ACCOUNT: &str = "111122223333";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const IAM_DOCKER: &str = "com.swipely.iam-docker.iam-profile";
const READ_ONLY: &str = "arn:aws:iam::aws:policy/ReadOnlyAccess";
const POLICY: &str = r#"{"Version":"2012-10-17","Statement":[{"Effect":"Allow","Action":"s3:*","Resource":"*"}]}"#;
/// Not to be in any log.
const EXTERNAL_ID: &str = "external:id/of-the-trials";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("credentials::thirty_combinations_of_labels", thirty_combinations),
        rig.once("credentials::nobody_escapes_the_rules", nobody_escapes_the_rules),
    ]
}

/// A container, and the AssumeRole that is to come of it.
struct Row {
    /// The container has labels, variables, and options of `docker run`.
    labels: &'static [(&'static str, &'static str)],
    variables: &'static [(&'static str, &'static str)],
    /// Account, role with its path, session name; `{name}` and `{host}` are the container's and the host's.
    identity: (&'static str, &'static str, &'static str),
    /// What STS is asked for beside role, session name and an hour.
    asked: &'static [(&'static str, &'static str)],
    /// Roles that are assumed before it.
    through: &'static [&'static str],
}

const fn row(
    labels: &'static [(&'static str, &'static str)],
    identity: (&'static str, &'static str, &'static str),
    asked: &'static [(&'static str, &'static str)],
) -> Row {
    Row {
        labels,
        variables: &[],
        identity,
        asked,
        through: &[],
    }
}

const APP: (&str, &str) = ("imds.role", "app");
const OWN: (&str, &str, &str) = (ACCOUNT, "app", "{name}@{host}");

const fn named(session: &'static str) -> (&'static str, &'static str, &'static str) {
    (ACCOUNT, "app", session)
}

const ROWS: [Row; 30] = [
    row(&[APP], OWN, &[]),
    row(
        &[("imds.role", "arn:aws:iam::444455556666:role/p/q/x")],
        ("444455556666", "p/q/x", "{name}@{host}"),
        &[],
    ),
    row(
        &[("imds.role", "service/x")],
        (ACCOUNT, "service/x", "{name}@{host}"),
        &[],
    ),
    row(
        &[("imds.role", "x@777788889999")],
        ("777788889999", "x", "{name}@{host}"),
        &[],
    ),
    row(&[("imds.role", "x@prod")], ("444455556666", "x", "{name}@{host}"), &[]),
    row(
        &[("imds.role", "orders")],
        ("777788889999", "service/orders", "{name}@{host}"),
        &[],
    ),
    row(
        &[APP, ("imds.role.session-name", "fixed-name")],
        named("fixed-name"),
        &[],
    ),
    row(
        &[
            APP,
            ("imds.role.session-name", "{project}.{service}/{container}"),
            ("com.docker.compose.project", "shop"),
            ("com.docker.compose.service", "web"),
        ],
        named("shop.web-{name}"),
        &[],
    ),
    row(
        &[
            APP,
            ("imds.role.session-name", "{label:team}-{container}"),
            ("team", "größe"),
        ],
        named("gr--e-{name}"),
        &[],
    ),
    Row {
        labels: &[APP, ("imds.role.session-name", "{env:WHO}-of-{container}")],
        variables: &[("WHO", "me")],
        identity: named("me-of-{name}"),
        asked: &[],
        through: &[],
    },
    row(
        &[APP, ("imds.role.external-id", EXTERNAL_ID)],
        OWN,
        &[("ExternalId", EXTERNAL_ID)],
    ),
    row(
        &[APP, ("imds.role.duration", "15m")],
        OWN,
        &[("DurationSeconds", "900")],
    ),
    row(
        &[APP, ("imds.role.duration", "12h")],
        OWN,
        &[("DurationSeconds", "43200")],
    ),
    row(
        &[APP, ("imds.role.source-identity", "me@example.com")],
        OWN,
        &[("SourceIdentity", "me@example.com")],
    ),
    row(&[APP, ("imds.role.policy", POLICY)], OWN, &[("Policy", POLICY)]),
    row(
        &[APP, ("imds.role.policy-arns", READ_ONLY)],
        OWN,
        &[("PolicyArns.member.1.arn", READ_ONLY)],
    ),
    row(
        &[
            APP,
            (
                "imds.role.policy-arns",
                "arn:aws:iam::aws:policy/ReadOnlyAccess, arn:aws:iam::111122223333:policy/p/x",
            ),
            ("imds.role.policy", POLICY),
        ],
        OWN,
        &[
            ("Policy", POLICY),
            ("PolicyArns.member.1.arn", "arn:aws:iam::111122223333:policy/p/x"),
            ("PolicyArns.member.2.arn", READ_ONLY),
        ],
    ),
    row(
        &[APP, ("imds.role.session-tag.team", "web=1")],
        OWN,
        &[("Tags.member.1.Key", "team"), ("Tags.member.1.Value", "web=1")],
    ),
    row(
        &[
            APP,
            ("imds.role.session-tag.empty", ""),
            ("imds.role.session-tag.cost-center", "4 2"),
        ],
        OWN,
        &[
            ("Tags.member.1.Key", "cost-center"),
            ("Tags.member.1.Value", "4 2"),
            ("Tags.member.2.Key", "empty"),
            ("Tags.member.2.Value", ""),
        ],
    ),
    row(
        &[
            APP,
            ("imds.role.session-tag.team", "web"),
            ("imds.role.transitive-tag-keys", "team"),
        ],
        OWN,
        &[
            ("Tags.member.1.Key", "team"),
            ("Tags.member.1.Value", "web"),
            ("TransitiveTagKeys.member.1", "team"),
        ],
    ),
    Row {
        labels: &[APP, ("imds.role.chain", "hop")],
        variables: &[],
        identity: OWN,
        asked: &[],
        through: &["arn:aws:iam::111122223333:role/hop"],
    },
    Row {
        labels: &[
            APP,
            ("imds.role.chain", "hop@prod, orders"),
            ("imds.role.external-id", EXTERNAL_ID),
            ("imds.role.session-tag.team", "web"),
        ],
        variables: &[],
        identity: OWN,
        asked: &[
            ("ExternalId", EXTERNAL_ID),
            ("Tags.member.1.Key", "team"),
            ("Tags.member.1.Value", "web"),
        ],
        through: &[
            "arn:aws:iam::444455556666:role/hop",
            "arn:aws:iam::777788889999:role/service/orders",
        ],
    },
    row(
        &[
            ("com.docker.compose.service", "web"),
            ("com.docker.compose.project", "shop"),
        ],
        (ACCOUNT, "shop-web", "{name}@{host}"),
        &[],
    ),
    row(
        &[
            ("com.docker.compose.service", "api"),
            ("com.docker.compose.project", "shop"),
            ("imds.role.duration", "30m"),
            ("imds.role.source-identity", "shop"),
        ],
        (ACCOUNT, "shop-api", "{name}@{host}"),
        &[("DurationSeconds", "1800"), ("SourceIdentity", "shop")],
    ),
    row(
        &[(IAM_DOCKER, "arn:aws:iam::444455556666:role/old")],
        ("444455556666", "old", "{name}@{host}"),
        &[],
    ),
    Row {
        labels: &[],
        variables: &[("IAM_ROLE", "lyft@prod"), ("IAM_EXTERNAL_ID", EXTERNAL_ID)],
        identity: ("444455556666", "lyft", "{name}@{host}"),
        asked: &[("ExternalId", EXTERNAL_ID)],
        through: &[],
    },
    Row {
        labels: &[],
        variables: &[
            ("IAM_ROLE", "arn:aws:iam::444455556666:role/meta"),
            ("IAM_POLICY", POLICY),
        ],
        identity: ("444455556666", "meta", "{name}@{host}"),
        asked: &[("Policy", POLICY)],
        through: &[],
    },
    row(
        &[
            ("imds.aws.role", "arn:aws:iam::444455556666:role/theirs"),
            ("imds.aws.external-id", EXTERNAL_ID),
            ("imds.aws.session-duration", "1800"),
        ],
        ("444455556666", "theirs", "{name}@{host}"),
        &[("DurationSeconds", "1800"), ("ExternalId", EXTERNAL_ID)],
    ),
    Row {
        labels: &[APP, (IAM_DOCKER, "arn:aws:iam::444455556666:role/old")],
        variables: &[("IAM_ROLE", "lyft"), ("IAM_POLICY", POLICY)],
        identity: OWN,
        asked: &[],
        through: &[],
    },
    row(
        &[
            APP,
            ("imds.role.session-name", "all-of-{container}"),
            ("imds.role.external-id", EXTERNAL_ID),
            ("imds.role.duration", "45m"),
            ("imds.role.source-identity", "all"),
            ("imds.role.policy", POLICY),
            ("imds.role.policy-arns", READ_ONLY),
            ("imds.role.session-tag.a", "1"),
            ("imds.role.transitive-tag-keys", "a"),
        ],
        named("all-of-{name}"),
        &[
            ("DurationSeconds", "2700"),
            ("ExternalId", EXTERNAL_ID),
            ("Policy", POLICY),
            ("PolicyArns.member.1.arn", READ_ONLY),
            ("SourceIdentity", "all"),
            ("Tags.member.1.Key", "a"),
            ("Tags.member.1.Value", "1"),
            ("TransitiveTagKeys.member.1", "a"),
        ],
    ),
];

/// The role that a container's client is, as its STS says, and all that STS was asked for: that and nothing else.
fn thirty_combinations(engine: &Arc<Engine>) {
    const PORT: &str = "5101";
    let moto = engine.moto();
    let port = moto.url().rsplit(':').next().unwrap_or_default();
    let recorder = on_host(
        engine,
        "slow",
        &["--port", PORT, "--to-port", port, "--seconds", "0", "--record"],
    );
    let mut environment = moto.daemon_environment();
    environment.retain(|(name, _)| name != "AWS_ENDPOINT_URL_STS");
    environment.push(("AWS_ENDPOINT_URL_STS".into(), format!("http://127.0.0.1:{PORT}")));
    let config = format!(
        "account_id = \"{ACCOUNT}\"\n[credentials]\ndefault_role = \"{{project}}-{{service}}\"\n\
         [roles]\norders = \"arn:aws:iam::777788889999:role/service/orders\"\n[accounts]\nprod = \"444455556666\"\n\
         [compat]\niam_docker = true\nenv = true\nimds_server = true\n"
    );
    let daemon = Daemon::start(engine, &config, &environment);
    let host = engine.host("uname", &["-n"]);
    let next = AtomicUsize::new(0);
    let failures: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut failures = Vec::new();
                    while let Some((number, row)) = {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        ROWS.get(number).map(|row| (number, row))
                    } {
                        let name = format!("combination-{number}");
                        let mut start = engine.run(&name);
                        for (label, value) in row.labels {
                            start = start.label(label, value);
                        }
                        for (variable, value) in row.variables {
                            start = start.env(variable, value);
                        }
                        let container = start.start();
                        let (account, role, session) = row.identity;
                        let session = session.replace("{name}", &name).replace("{host}", &host);
                        // STS leaves the path out.
                        let short = role.rsplit('/').next().unwrap_or(role);
                        let expected = Identity::of_role(account, short, &session);
                        match Client::Rust.try_whoami(&container, moto, &[]) {
                            Ok(identity) if identity == expected => {}
                            Ok(identity) => failures.push(format!("{name}: {identity:?}, not {expected:?}")),
                            Err(done) => failures.push(format!("{name}: {done}")),
                        }
                    }
                    failures
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("no panic"))
            .collect()
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));

    let recorded: Vec<BTreeMap<String, String>> = recorder
        .output()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}")))
        .collect();
    let mut expected_calls = 0;
    for (number, row) in ROWS.iter().enumerate() {
        let (account, role, session) = row.identity;
        let session = session
            .replace("{name}", &format!("combination-{number}"))
            .replace("{host}", &host);
        let base = |role: &str, seconds: &str| -> BTreeMap<String, String> {
            [
                ("Action", "AssumeRole"),
                ("Version", "2011-06-15"),
                ("RoleArn", role),
                ("RoleSessionName", &session),
                ("DurationSeconds", seconds),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into()
        };
        let mut last = base(&format!("arn:aws:iam::{account}:role/{role}"), "3600");
        last.extend(
            row.asked
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned())),
        );
        let mut expected: Vec<_> = row.through.iter().map(|role| base(role, "900")).collect();
        expected.push(last);
        expected_calls += expected.len();
        let asked: Vec<_> = recorded.iter().filter(|it| it["RoleSessionName"] == session).collect();
        assert_eq!(asked, expected.iter().collect::<Vec<_>>(), "row {number}");
    }
    assert_eq!(recorded.len(), expected_calls, "and nothing else was asked");
    assert!(!daemon.log().contains(EXTERNAL_ID), "an external id is in the log");
    assert!(!daemon.status().to_string().contains(EXTERNAL_ID));
    daemon.stop();
}

const RULES: &str = r#"
account_id = "111122223333"
[roles]
outside = "arn:aws:iam::777788889999:role/outside"
[compat]
env = true
[[allow]]
role = "arn:aws:iam::111122223333:role/dev-*"
label = "team=web"
session_policy_arns = ["arn:aws:iam::aws:policy/ReadOnlyAccess"]
max_duration = "30m"
[[allow]]
role = "arn:aws:iam::111122223333:role/net"
network = "trusted-*"
"#;

/// Labels that would get more than the rules give, and the rule that says no; in the container, in `status`, in `check`.
fn nobody_escapes_the_rules(engine: &Arc<Engine>) {
    const WEB: (&str, &str) = ("team", "web");
    let moto = engine.moto();
    let daemon = Daemon::start(engine, RULES, &moto.daemon_environment());
    let trusted = engine.network("trusted-net", &[]);
    let start = |name: &str, labels: &[(&str, &str)]| {
        labels
            .iter()
            .fold(engine.run(name), |start, (label, value)| start.label(label, value))
            .start()
    };
    let dev = ("imds.role", "dev-x");
    let (first, second) = ("allow rule 1 (line ", "allow rule 2 (line ");
    let refused: Vec<(Container, &str)> = [
        ("other-role", &[("imds.role", "ops"), WEB][..], first),
        ("other-container", &[dev], "there is no label team=web"),
        ("alias", &[("imds.role", "outside"), WEB], first),
        ("chain", &[dev, WEB, ("imds.role.chain", "outside")], first),
        (
            "policy",
            &[dev, WEB, ("imds.role.policy", POLICY)],
            "has a ceiling (session_policy_arns)",
        ),
        (
            "longer",
            &[dev, WEB, ("imds.role.duration", "1h")],
            "has max_duration = 30m",
        ),
        (
            "session",
            &[dev, WEB, ("imds.role.session-name", "root")],
            "does not let labels set session-name",
        ),
        (
            "tag",
            &[dev, WEB, ("imds.role.session-tag.team", "ops")],
            "does not let labels set session tags",
        ),
        ("profile", &[dev, WEB, ("imds.profile", "root")], "it names no profile"),
        ("network", &[("imds.role", "net")], second),
    ]
    .map(|(name, labels, why)| (start(name, labels), why))
    .into();
    let good = start("good", &[dev, WEB]);
    let networked = engine
        .run("networked")
        .label("imds.role", "net")
        .network(trusted.name())
        .start();
    let variable = engine
        .run("variable")
        .label("team", "web")
        .env("IAM_ROLE", "dev-y")
        .start();
    for container in [&good, &networked, &variable] {
        let identity = Client::Rust.whoami(container, moto, &[]);
        assert!(
            identity.arn.starts_with("arn:aws:sts::111122223333:assumed-role/"),
            "{identity:?}"
        );
    }
    let status = daemon.status();
    let config = daemon.directory().join("config.toml");
    let config = config.to_str().expect("a text");
    let checked = daemon.cli(&["check", "--config", config]);
    assert_eq!(checked.status.code(), Some(1), "{checked}");
    for (container, why) in &refused {
        let reply = container.get(LIST, &[]);
        // The labels are in order: only a rule denies the role, so that IMDSv1 stays as it is configured.
        assert_eq!(reply.status, 404, "{}: {reply:?}", container.name());
        let token = container.token();
        let reply = container.get(LIST, &[("X-aws-ec2-metadata-token", &token)]);
        assert_eq!(reply.status, 404, "{}: {reply:?}", container.name());
        let shown = status["containers"].as_array().expect("a list");
        let shown = shown
            .iter()
            .find(|it| it["name"] == container.name())
            .expect("it is shown");
        assert!(shown["problems"].to_string().contains(why), "{shown}");
        assert!(shown["credentials"].is_null(), "{shown}");
        let line = format!("{}: no credentials: ", container.name());
        let line = checked.stdout.lines().find(|it| it.starts_with(&line));
        assert!(
            line.is_some_and(|line| line.contains(why)),
            "{}: {checked}",
            container.name()
        );
    }
    // Of those that were refused, STS has heard nothing.
    let sessions: Vec<_> = moto
        .assumed_roles(engine)
        .into_iter()
        .map(|role| role.session_name)
        .collect();
    for (container, _) in &refused {
        assert!(
            !sessions
                .iter()
                .any(|it| it.starts_with(&format!("{}@", container.name()))),
            "{}",
            container.name()
        );
    }
    for line in [
        "good: arn:aws:iam::111122223333:role/dev-x as good@",
        "variable: arn:aws:iam::111122223333:role/dev-y as variable@",
        "warning: allow rule 1 (line ",
    ] {
        assert!(checked.stdout.contains(line), "{line}: {checked}");
    }
    let explained = daemon.cli(&["explain", "good"]).ok();
    assert!(explained.contains(", by allow rule 1 (line "), "{explained}");
    let compared = daemon.cli(&["check", "--compat", "--config", config]);
    for line in [
        "variable:   by IAM_ROLE alone: arn:aws:iam::111122223333:role/dev-y as variable@",
        "variable:   with all of [compat]: arn:aws:iam::111122223333:role/dev-y as variable@",
    ] {
        assert!(compared.stdout.contains(line), "{line}: {compared}");
    }
    // A name and a network are what they are now.
    engine.docker(&["network", "disconnect", trusted.name(), "networked"]);
    poll(
        std::time::Duration::from_secs(5),
        "the role to be gone with the network",
        || {
            let status = daemon.status();
            let shown = status["containers"]
                .as_array()?
                .iter()
                .find(|it| it["name"] == "networked")?
                .clone();
            shown["credentials"].is_null().then_some(())
        },
    );
    // So is the configuration, once the daemon is told: at first one that is wrong, and changes nothing.
    let text = std::fs::read_to_string(config).expect("the configuration");
    let seconds = std::time::Duration::from_secs(5);
    std::fs::write(config, format!("{text}\n[[alow]]\n")).expect("a file");
    daemon.reload();
    poll(seconds, "the daemon to refuse a wrong configuration", || {
        daemon
            .log()
            .contains("unknown key alow; did you mean allow?; what held before holds on")
            .then_some(())
    });
    let token = good.token();
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(good.get(&format!("{LIST}dev-x"), &headers).status, 200);
    std::fs::write(config, text.replace("role/dev-*", "role/other-*")).expect("a file");
    daemon.reload();
    poll(seconds, "the role to be gone with its rule", || {
        (good.get(&format!("{LIST}dev-x"), &headers).status == 404).then_some(())
    });
    assert!(
        good.get(LIST, &headers)
            .header("x-imds-router-hint")
            .is_some_and(|it| it.contains("is not allowed"))
    );
    daemon.stop();
}
