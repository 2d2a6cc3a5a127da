//! Requests and answers.

use std::sync::atomic::Ordering;
use std::time::Duration;

use imds_router::config::{HttpTokens, Settings};
use imds_router::credentials::broker::ProviderError;

use crate::conformance::{Mode, Tokens, check, rows};
use crate::script::{Daemon, SECRET, SESSION_TOKEN, WALL, id, settings};

const ROLE_LIST: &str = "/latest/meta-data/iam/security-credentials/";
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/app";
const APP: &[(&str, &str)] = &[("imds.role", "app"), ("imds.instance-id", "i-0123456789abcdef0")];
/// For several containers at once: an instance id is one container's.
const ROLE_ONLY: &[(&str, &str)] = &[("imds.role", "app")];
const HOLD: Duration = Duration::from_millis(400);

fn down() -> Result<(), ProviderError> {
    Err(ProviderError::Unavailable("down".into()))
}

async fn conforms(mode: Mode) {
    let http_tokens = if mode == Mode::Required {
        HttpTokens::Required
    } else {
        HttpTokens::Optional
    };
    let daemon = Daemon::start(Settings {
        http_tokens,
        ..settings()
    });
    daemon.synchronised().await;
    let (address, other) = (daemon.run(1, APP).await, daemon.run(2, APP).await);
    let expired = daemon.connect(1, address).token(1).await;
    let foreign = daemon.connect(2, other).token(60).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let good = daemon.connect(1, address).token(600).await;
    let tokens = Tokens { good, foreign, expired };
    let mut failures = Vec::new();
    for row in rows(mode) {
        let headers = tokens.headers(&row);
        let reply = daemon
            .connect(1, address)
            .send(row.method, row.path, &headers)
            .await
            .expect("an answer");
        failures.extend(check(&row, &reply, daemon.clock.wall_seconds()).err());
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[tokio::test(start_paused = true)]
async fn conforms_with_tokens_optional() {
    conforms(Mode::Optional).await;
}

#[tokio::test(start_paused = true)]
async fn conforms_with_tokens_required() {
    conforms(Mode::Required).await;
}

#[tokio::test(start_paused = true)]
async fn remaining_life_of_a_token_counts_down() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let mut client = daemon.connect(1, address).keep_alive();
    let token = client.token(100).await;
    let path = "/latest/meta-data/instance-id";
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_secs(10)).await;
        let reply = daemon
            .connect(1, address)
            .send("GET", path, &[("X-aws-ec2-metadata-token", &token)])
            .await
            .unwrap();
        let left: u32 = reply
            .header("x-aws-ec2-metadata-token-ttl-seconds")
            .unwrap()
            .parse()
            .unwrap();
        assert!((1..=91).contains(&left), "{left}");
    }
    // On a connection that has verified it before, as well.
    for (after, status) in [(60, 200), (19, 200), (2, 401)] {
        tokio::time::sleep(Duration::from_secs(after)).await;
        let mut client = daemon.connect(1, address).keep_alive();
        for _ in 0..2 {
            let reply = client
                .send("GET", path, &[("X-aws-ec2-metadata-token", &token)])
                .await
                .unwrap();
            assert_eq!(reply.status, status, "after {after}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_answers_several_requests_the_first_a_404() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let mut client = daemon.connect(1, address).keep_alive();
    assert_eq!(client.get("/latest/nonsense").await.unwrap().status, 404);
    assert_eq!(
        client.get("/latest/meta-data/instance-id").await.unwrap().text(),
        "i-0123456789abcdef0"
    );
    // A little longer than announced: who polls every 15 s does not meet a closed connection.
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert_eq!(client.get("/latest").await.unwrap().status, 200);
    }
    tokio::time::sleep(Duration::from_secs(19)).await;
    assert!(!client.closed().await);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(client.closed().await, "idle for more than 20 s");
}

#[tokio::test(start_paused = true)]
async fn a_connection_ends_after_a_thousand_requests_or_five_minutes() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let mut client = daemon.connect(1, address).keep_alive();
    for request in 1..=1_000 {
        let reply = client.get("/latest").await.unwrap();
        assert_eq!(
            reply.header("connection") == Some("close"),
            request == 1_000,
            "{request}"
        );
    }
    assert!(client.closed().await);
    let mut client = daemon.connect(1, address).keep_alive();
    for _ in 0..30 {
        let reply = client.get("/latest").await.unwrap();
        assert_eq!(reply.header("connection"), Some("keep-alive"));
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
    assert_eq!(client.get("/latest").await.unwrap().header("connection"), Some("close"));
    assert!(client.closed().await);
}

#[tokio::test(start_paused = true)]
async fn without_label_403_and_without_role_metadata_only() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let bare = daemon.run(1, &[("other", "x")]).await;
    let reply = daemon.connect(1, bare).get("/latest/meta-data/").await.unwrap();
    assert_eq!((reply.status, reply.body.len()), (403, 0));
    // It has no link to the service, so that it cannot be authenticated.
    assert_eq!(reply.header("x-imds-router-hint"), None);

    let roleless = daemon.run(2, &[("imds.region", "eu-west-2")]).await;
    let mut client = daemon.connect(2, roleless).keep_alive();
    assert!(!client.get("/latest/meta-data/").await.unwrap().text().contains("iam"));
    assert_eq!(
        client.get("/latest/meta-data/placement/region").await.unwrap().text(),
        "eu-west-2"
    );
    for path in [
        ROLE_LIST,
        "/latest/meta-data/iam/",
        "/latest/meta-data/iam/info",
        DOCUMENT,
    ] {
        assert_eq!(client.get(path).await.unwrap().status, 404, "{path}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_disabled_endpoint_refuses_everything() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon
        .run(1, &[("imds.role", "app"), ("imds.http-endpoint", "disabled")])
        .await;
    for (method, path) in [
        ("GET", "/"),
        ("PUT", "/latest/api/token"),
        ("GET", DOCUMENT),
        ("POST", "/x"),
    ] {
        let reply = daemon.connect(1, address).send(method, path, &[]).await.unwrap();
        assert_eq!((reply.status, reply.body.len()), (403, 0), "{method} {path}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_bad_label_costs_its_container_the_role_and_nobody_else() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let good = daemon.run(1, APP).await;
    for (number, labels, hint) in [
        (2, &[("imds.role", "arn:aws:iam::12:role/x")][..], "is not a role ARN"),
        (3, &[("imds.role", "app"), ("imds.rol", "x")], "did you mean imds.role?"),
    ] {
        let address = daemon.run(number, labels).await;
        let mut client = daemon.connect(number, address).keep_alive();
        let token = client.token(60).await;
        let reply = client
            .send("GET", ROLE_LIST, &[("X-aws-ec2-metadata-token", &token)])
            .await
            .unwrap();
        assert_eq!(reply.status, 404);
        assert!(reply.header("x-imds-router-hint").unwrap().contains(hint), "{reply:?}");
        assert!(daemon.index.get(&id(number)).unwrap().instance.problems[0].contains(hint));
    }
    assert_eq!(daemon.connect(1, good).get(DOCUMENT).await.unwrap().status, 200);
}

#[tokio::test(start_paused = true)]
async fn what_the_image_brings_chooses_nothing() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    for (number, image, own, served) in [
        (1, &[("imds.role", "app")][..], &[][..], None),
        // The same value as the image's cannot be told apart.
        (2, &[("imds.role", "app")], &[("imds.role", "app")], None),
        (3, &[("imds.role", "other")], &[("imds.role", "app")], Some("app")),
        (
            4,
            &[("imds.http-tokens", "optional")],
            &[("imds.role", "app")],
            Some("app"),
        ),
    ] {
        let address = daemon.create(number, own);
        daemon.engine.world(|world| {
            let labels = image.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
            world.containers.get_mut(&id(number)).unwrap().image_labels = labels;
        });
        daemon.boot(number, address);
        daemon.settle().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        let reply = daemon.connect(number, address).get(ROLE_LIST).await.unwrap();
        assert_eq!(
            (reply.status == 200).then(|| reply.text()).as_deref(),
            served,
            "{number}"
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_thousand_requests_for_one_cold_role_are_one_call() {
    // The same session for all: several containers, one name.
    let settings = Settings {
        session_name: "shared".into(),
        ..settings()
    };
    let daemon = Daemon::start(settings);
    daemon.synchronised().await;
    daemon.sts.say(&[(300, Ok(()))]);
    let mut clients = Vec::new();
    for number in 1..=20 {
        let address = daemon.create(number, ROLE_ONLY);
        daemon.boot(number, address);
        for _ in 0..50 {
            clients.push((number, address));
        }
    }
    let asked = daemon.clock.now();
    let tasks: Vec<_> = clients
        .into_iter()
        .map(|(number, address)| {
            let mut client = daemon.connect(number, address);
            tokio::spawn(async move { client.get(DOCUMENT).await.unwrap().status })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), 200);
    }
    assert!(daemon.clock.now() - asked <= HOLD);
    assert_eq!(daemon.sts.calls.load(Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn slow_then_failing_sts_is_not_noticed_and_nobody_waits_longer_than_hold() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let mut answers = vec![(2000, Ok(()))];
    // Ten minutes of failure from the first refresh on: back-off ends at 15 s, so 60 failures are more than that.
    answers.extend((0..60).map(|_| (10, down())));
    answers.push((10, Ok(())));
    daemon.sts.say(&answers);
    let address = daemon.create(1, APP);
    daemon.boot(1, address);

    let timed = async |path: &str| {
        let asked = daemon.clock.now();
        let reply = daemon.connect(1, address).get(path).await.unwrap();
        let took = daemon.clock.now() - asked;
        assert!(took <= HOLD + Duration::from_millis(5), "{path} took {took:?}");
        reply
    };
    // The first answer of STS is not there yet: "no role" at the list, as every SDK survives it.
    let reply = timed(ROLE_LIST).await;
    assert_eq!(reply.status, 404);
    assert!(reply.header("x-imds-router-hint").unwrap().contains("first AssumeRole"));
    assert_eq!(timed(DOCUMENT).await.status, 404);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut keys = std::collections::BTreeSet::new();
    for _ in 0..60 * 60 / 5 {
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(timed(ROLE_LIST).await.status, 200);
        let document: serde_json::Value = serde_json::from_slice(&timed(DOCUMENT).await.body).unwrap();
        keys.insert(document["AccessKeyId"].as_str().unwrap().to_owned());
    }
    assert!(daemon.sts.calls.load(Ordering::Relaxed) > 61, "STS failed for a while");
    assert!(keys.len() >= 2, "and recovered");
}

#[tokio::test(start_paused = true)]
async fn warm_up_begins_at_create() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, APP);
    tokio::time::sleep(Duration::from_millis(140)).await;
    daemon.boot(1, address);
    let asked = daemon.clock.now();
    assert_eq!(daemon.connect(1, address).get(DOCUMENT).await.unwrap().status, 200);
    assert!(daemon.clock.now() - asked < Duration::from_millis(50));
}

#[tokio::test(start_paused = true)]
async fn a_denied_role_is_no_role_and_says_so_to_its_container_only() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let denied = ProviderError::Denied {
        code: "AccessDenied".into(),
        message: "User: x is not authorized".into(),
    };
    daemon.sts.say(&[(20, Err(denied))]);
    let address = daemon.run(1, APP).await;
    let reply = daemon.connect(1, address).get(ROLE_LIST).await.unwrap();
    assert_eq!(reply.status, 404);
    let hint = reply.header("x-imds-router-hint").unwrap();
    assert_eq!(hint, "role denied by sts; ask: imds-router explain 000000010000");
}

#[tokio::test(start_paused = true)]
async fn a_denied_role_is_answered_as_ec2_does_it_where_that_is_wanted() {
    let daemon = Daemon::start(Settings {
        ec2_error_documents: true,
        ..settings()
    });
    daemon.synchronised().await;
    let denied = ProviderError::Denied {
        code: "AccessDenied".into(),
        message: "User: x is not authorized".into(),
    };
    daemon.sts.say(&[(20, Err(denied)), (20, down())]);
    let address = daemon.run(1, APP).await;
    let list = daemon.connect(1, address).get(ROLE_LIST).await.unwrap();
    assert_eq!((list.status, list.text().as_str()), (200, "app"));
    let reply = daemon.connect(1, address).get(DOCUMENT).await.unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(
        reply.text(),
        "{\n  \"Code\" : \"AssumeRoleUnauthorizedAccess\",\n  \"Message\" : \"EC2 cannot assume the role app.  Please see \
         documentation at https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_iam-ec2.html\
         #troubleshoot_iam-ec2_errors-info-doc.\",\n  \"LastUpdated\" : \"2026-01-05T10:11:12Z\"\n}"
    );
    let hint = reply.header("x-imds-router-hint").unwrap();
    assert!(hint.starts_with("role denied by sts"), "{hint}");
    // What passes is no denial: no role, as ever.
    tokio::time::sleep(Duration::from_secs(10)).await;
    assert_eq!(daemon.connect(1, address).get(ROLE_LIST).await.unwrap().status, 404);
}

#[tokio::test(start_paused = true)]
async fn heads_that_are_too_large_are_refused() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    let large = "a".repeat(17 * 1024);
    let reply = daemon
        .connect(1, address)
        .send("GET", "/latest", &[("X-Large", &large)])
        .await;
    assert!(reply.is_none_or(|reply| reply.status == 431));
    let fits = "a".repeat(8 * 1024);
    assert_eq!(
        daemon
            .connect(1, address)
            .send("GET", "/latest", &[("X-Large", &fits)])
            .await
            .unwrap()
            .status,
        200
    );
}

#[tokio::test(start_paused = true)]
async fn nothing_that_is_shown_holds_a_secret() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    let token = daemon.connect(1, address).token(60).await;
    let body = daemon.connect(1, address).get(DOCUMENT).await.unwrap().text();
    assert!(body.contains(SECRET) && body.contains(SESSION_TOKEN));
    let record = daemon.index.get(&id(1)).unwrap();
    let session = record.instance.role.session().unwrap();
    let shown = format!("{record:?} {record:#?} {:?}", daemon.service.broker.state(session));
    for secret in [SECRET, SESSION_TOKEN, token.as_str()] {
        assert!(!shown.contains(secret), "{shown}");
    }
    assert!(daemon.clock.wall_seconds() >= WALL.as_secs());
}

#[tokio::test(start_paused = true)]
async fn clocks_jump_and_laptops_sleep() {
    const TEN_HOURS: i64 = 36_000_000;
    for (jump, sleep, kept) in [
        (TEN_HOURS, 0, false),
        (-TEN_HOURS, 0, true),
        (0, TEN_HOURS, false),
        (-TEN_HOURS, TEN_HOURS, false),
    ] {
        let daemon = Daemon::start(settings());
        daemon.synchronised().await;
        daemon.sts.say(&[(100, Ok(()))]);
        let address = daemon.run(1, APP).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
        let document = async || {
            let reply = daemon.connect(1, address).get(DOCUMENT).await.unwrap();
            (reply.status, reply.text())
        };
        let before = document().await;
        assert_eq!(before.0, 200);
        daemon.clock.jump(jump);
        daemon.clock.suspend(sleep);
        // The very next request: what may have expired is not served, and new ones come while it waits.
        let asked = daemon.clock.now();
        let after = document().await;
        assert_eq!((after.0, after == before), (200, kept), "{jump} {sleep}");
        assert!(daemon.clock.now() - asked <= HOLD);
        // STS is away from now on: everything lives as long as AWS lets it, and no longer.
        tokio::time::sleep(Duration::from_secs(3)).await;
        daemon.sts.say(&[(10, down())]);
        tokio::time::sleep(Duration::from_secs(58 * 60)).await;
        assert_eq!(document().await.0, 200, "{jump} {sleep}");
        tokio::time::sleep(Duration::from_secs(3 * 60)).await;
        let reply = daemon.connect(1, address).get(ROLE_LIST).await.unwrap();
        assert_eq!(reply.status, 404, "{jump} {sleep}");
        assert_eq!(
            reply.header("x-imds-router-hint"),
            Some("sts not reachable; ask: imds-router explain 000000010000")
        );
    }
}
