//! Labels and variables that the image has as well, and images that are removed: restrictions stay, and nothing is given.

use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;

use crate::rig::container::Start;
use crate::rig::hostile::on_host;
use crate::rig::{Container, Daemon, Engine, Rig, poll};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const READ_ONLY: &str = "arn:aws:iam::aws:policy/ReadOnlyAccess";
const POLICY: &str = r#"{"Version":"2012-10-17","Statement":[]}"#;
const APP: (&str, &str) = ("imds.role", "app");

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("image_labels::restrictions_of_labels_that_the_image_repeats", repeated),
        rig.once("image_labels::a_removed_image", removed),
    ]
}

/// The first two rules have a ceiling, and the last one does not.
const RULES: &str = r#"
account_id = "111122223333"
[compat]
env = true
[[allow]]
project = "shop"
role = "**"
session_policy_arns = ["arn:aws:iam::aws:policy/ReadOnlyAccess"]
[[allow]]
label = "tier=free"
role = "**"
session_policy_arns = ["arn:aws:iam::aws:policy/ReadOnlyAccess"]
[[allow]]
role = "**"
profile = "*"
session_tags = "*"
"#;

/// What becomes of a container.
enum Expected {
    /// It has the role, by an AssumeRole with this parameter.
    Asked(&'static str, &'static str),
    /// It has no credentials, and `status` names this.
    Refused(&'static str),
    /// It has the role by IMDSv2 alone.
    TokensRequired,
    /// It finds no metadata service.
    Disabled,
}

/// The same pairs, in the image and on the command line.
type Pairs = &'static [(&'static str, &'static str)];

/// A container with the labels and variables `both`, which its image has as well, and with the labels and variables `own`.
struct Row {
    name: &'static str,
    both: (Pairs, Pairs),
    own: (Pairs, Pairs),
    expected: Expected,
}

const ROWS: [Row; 12] = [
    Row {
        name: "policy-arns",
        both: (&[("imds.role.policy-arns", READ_ONLY)], &[]),
        own: (&[APP], &[]),
        expected: Expected::Asked("PolicyArns.member.1.arn", READ_ONLY),
    },
    Row {
        name: "policy-variable",
        both: (&[], &[("IAM_POLICY", POLICY)]),
        own: (&[], &[("IAM_ROLE", "app")]),
        expected: Expected::Asked("Policy", POLICY),
    },
    Row {
        name: "duration",
        both: (&[("imds.role.duration", "15m")], &[]),
        own: (&[APP], &[]),
        expected: Expected::Asked("DurationSeconds", "900"),
    },
    Row {
        name: "tokens",
        both: (&[("imds.http-tokens", "required")], &[]),
        own: (&[APP], &[]),
        expected: Expected::TokensRequired,
    },
    Row {
        name: "endpoint",
        both: (&[("imds.http-endpoint", "disabled")], &[]),
        own: (&[APP], &[]),
        expected: Expected::Disabled,
    },
    Row {
        name: "tag",
        both: (&[("imds.role.session-tag.team", "a")], &[]),
        own: (&[APP], &[]),
        expected: Expected::Refused("label imds.role.session-tag.team: the image has the same value"),
    },
    Row {
        name: "profile",
        both: (&[("imds.profile", "limited")], &[]),
        own: (&[APP], &[]),
        expected: Expected::Refused("label imds.profile: the image has the same value"),
    },
    Row {
        name: "joined-policies",
        both: (&[("imds.role.policy", POLICY)], &[]),
        own: (&[APP, ("imds.role.policy-arns", READ_ONLY)], &[]),
        expected: Expected::Refused("STS joins the session policies of one call"),
    },
    Row {
        name: "project",
        both: (&[("com.docker.compose.project", "shop")], &[]),
        own: (&[APP], &[]),
        expected: Expected::Refused("looks at label com.docker.compose.project"),
    },
    // As `docker compose build` and `up` do it.
    Row {
        name: "project-of-compose",
        both: (&[("com.docker.compose.project", "shop")], &[]),
        own: (&[APP, ("com.docker.compose.container-number", "1")], &[]),
        expected: Expected::Asked("PolicyArns.member.1.arn", READ_ONLY),
    },
    Row {
        name: "rule-by-label",
        both: (&[("tier", "free")], &[]),
        own: (&[APP], &[]),
        expected: Expected::Refused("looks at label tier"),
    },
    Row {
        name: "role",
        both: (&[APP], &[]),
        own: (&[("imds.http-tokens", "optional")], &[]),
        expected: Expected::Refused("label imds.role: the image has the same value"),
    },
];

fn with(mut start: Start, (labels, variables): (Pairs, Pairs)) -> Start {
    for (label, value) in labels {
        start = start.label(label, value);
    }
    for (variable, value) in variables {
        start = start.env(variable, value);
    }
    start
}

fn problems(daemon: &Daemon, name: &str) -> String {
    let status = daemon.status();
    let containers = status["containers"].as_array().expect("a list");
    let container = containers.iter().find(|it| it["name"] == name);
    container.unwrap_or_else(|| panic!("{name} is not in {status}"))["problems"].to_string()
}

fn repeated(engine: &Arc<Engine>) {
    const PORT: &str = "5102";
    let moto = engine.moto();
    let port = moto.url().rsplit(':').next().unwrap_or_default();
    let recording = ["--port", PORT, "--to-port", port, "--seconds", "0", "--record"];
    let recorder = on_host(engine, "slow", &recording);
    let mut environment = moto.daemon_environment();
    environment.retain(|(name, _)| name != "AWS_ENDPOINT_URL_STS");
    environment.push(("AWS_ENDPOINT_URL_STS".into(), format!("http://127.0.0.1:{PORT}")));
    let daemon = Daemon::start(engine, RULES, &environment);
    let config = daemon.directory().join("config.toml");
    let config = config.to_str().expect("a text").to_owned();
    for Row {
        name,
        both,
        own,
        expected,
    } in &ROWS
    {
        let image = engine.image_with(&format!("image-{name}"), both.0, both.1);
        let container = with(with(engine.run(name).image(&image), *both), *own).start();
        let role = |container: &Container| container.get(&format!("{LIST}app"), &[]);
        match expected {
            Expected::Asked(parameter, value) => {
                assert!(
                    role(&container).body.contains("AccessKeyId"),
                    "{name}: {}",
                    problems(&daemon, name)
                );
                let calls = recorder.output();
                let call = calls
                    .lines()
                    .find(|line| line.contains(&format!("\"{name}@")))
                    .unwrap_or_default();
                let call: serde_json::Value = serde_json::from_str(call).expect("a call of this container");
                assert_eq!(call[*parameter], *value, "{name}: {call}");
            }
            Expected::Refused(why) => {
                assert!(!role(&container).body.contains("AccessKeyId"), "{name}");
                let token = container.token();
                let reply = container.get(&format!("{LIST}app"), &[("X-aws-ec2-metadata-token", &token)]);
                assert!(!reply.body.contains("AccessKeyId"), "{name}");
                let problems = problems(&daemon, name);
                assert!(problems.contains(why), "{name}: {problems}");
                let checked = daemon.cli(&["check", "--offline", "--config", &config]).to_string();
                assert!(checked.contains(&format!("{name}: no credentials: ")), "{checked}");
            }
            Expected::TokensRequired => {
                assert_eq!(role(&container).status, 401, "{name}");
                let token = container.token();
                let reply = container.get(&format!("{LIST}app"), &[("X-aws-ec2-metadata-token", &token)]);
                assert!(reply.body.contains("AccessKeyId"), "{name}");
            }
            Expected::Disabled => assert_eq!(role(&container).status, 403, "{name}"),
        }
        assert!(container.is_running());
    }
    daemon.stop();
}

/// `docker rmi -f` removes the image of a container that does not run, and leaves the container.
fn removed(engine: &Arc<Engine>) {
    let config = "account_id = \"111122223333\"\n[credentials]\ndefault_role = \"fallback\"\n";
    let environment = engine.moto().daemon_environment();
    let daemon = Daemon::start(engine, config, &environment);
    let rows: [(&str, Pairs); 3] = [
        ("with-role", &[APP]),
        ("without-endpoint", &[("imds.http-endpoint", "disabled")]),
        ("with-tokens", &[("imds.http-tokens", "required")]),
    ];
    let containers = rows.map(|(name, labels)| {
        let image = engine.image_with(&format!("removed-{name}"), &[("imds.instance-type", "t3.nano")], &[]);
        let container = with(engine.run(name).image(&image), (labels, &[])).start();
        engine.docker(&["stop", "--time", "0", name]);
        engine.docker(&["rmi", "--force", &image]);
        engine.docker(&["start", name]);
        container
    });
    let [with_role, without_endpoint, with_tokens] = &containers;
    // A connection that was made before a new daemon has made the container's link is closed without an answer.
    let is_attached = || {
        let url = format!("http://169.254.169.254{LIST}");
        poll(Duration::from_secs(5), "the links of the new daemon", || {
            [with_role, with_tokens]
                .iter()
                .all(|it| it.request("GET", &url, &[]).is_ok())
                .then_some(())
        });
    };
    let restrictions_hold = |what: &str| {
        assert_eq!(without_endpoint.get(LIST, &[]).status, 403, "{what}");
        assert_eq!(with_tokens.get(LIST, &[]).status, 401, "{what}");
        let token = with_tokens.token();
        let reply = with_tokens.get(LIST, &[("X-aws-ec2-metadata-token", &token)]);
        assert_eq!(reply.body, "fallback", "{what}");
    };
    assert_eq!(with_role.get(LIST, &[]).body, "app");
    restrictions_hold("while the daemon that has seen the image runs");

    // The next daemon finds the image in the state directory.
    let directory = daemon.directory().to_owned();
    daemon.stop();
    let daemon = Daemon::start_in(engine, directory, config, &environment);
    is_attached();
    assert_eq!(with_role.get(LIST, &[]).body, "app");
    restrictions_hold("after a restart of the daemon");
    daemon.stop();

    // A daemon that has never seen it does not know who set which label.
    let daemon = Daemon::start(engine, config, &environment);
    is_attached();
    restrictions_hold("with a daemon that has not seen the image");
    let reply = with_role.get(&format!("{LIST}fallback"), &[]);
    assert!(!reply.body.contains("AccessKeyId"), "{reply:?}");
    let problems = problems(&daemon, "with-role");
    assert!(
        problems.contains("label imds.role: the image cannot be read"),
        "{problems}"
    );
    daemon.stop();
}
