//! A role is served exactly as long as the operator's rules give it.

use std::net::SocketAddr;
use std::time::Duration;

use imds_router::config::{Compat, Settings};
use imds_router::containers::reconciler::Event;
use imds_router::credentials::allow_rules::{Glob, Rule};

use crate::script::{Container, Daemon, SECRET, id, settings};

const APP: &[(&str, &str)] = &[("imds.role", "app")];
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/app";

fn rule(line: usize) -> Rule {
    Rule {
        number: 1,
        line,
        role: vec![Glob::parse("arn:aws:iam::111122223333:role/app").unwrap()],
        ..Rule::default()
    }
}

/// Whether the container gets credentials; what is refused needs a token, and gets one.
async fn served(daemon: &Daemon, number: u32, address: SocketAddr) -> bool {
    let mut client = daemon.connect(number, address).keep_alive();
    let token = client.token(60).await;
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    let reply = client.send("GET", DOCUMENT, &headers).await.unwrap();
    assert_eq!(reply.status == 200, reply.text().contains(SECRET));
    reply.status == 200
}

#[tokio::test(start_paused = true)]
async fn a_role_that_is_no_longer_allowed_is_no_longer_served() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(served(&daemon, 1, address).await);
    // Another rule, and none that covers it; the credentials that are there are not given out.
    for (role, allowed) in [("other", false), ("app", true), ("ap", false), ("*", true)] {
        daemon.configure(|settings| {
            let role = Glob::parse(&format!("arn:aws:iam::111122223333:role/{role}")).unwrap();
            settings.allow = vec![Rule {
                role: vec![role],
                ..rule(1)
            }];
        });
        daemon.settle().await;
        assert_eq!(served(&daemon, 1, address).await, allowed, "{role}");
    }
    // One connection that stays open, too.
    let mut open = daemon.connect(1, address).keep_alive();
    let token = open.token(60).await;
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    assert_eq!(open.send("GET", DOCUMENT, &headers).await.unwrap().status, 200);
    daemon.configure(|settings| {
        settings.allow = vec![Rule {
            container: vec![Glob::parse("x").unwrap()],
            ..rule(1)
        }]
    });
    daemon.settle().await;
    assert_eq!(open.send("GET", DOCUMENT, &headers).await.unwrap().status, 404);
    assert_eq!(daemon.sts.calls.load(std::sync::atomic::Ordering::Relaxed), 1);
}

#[tokio::test(start_paused = true)]
async fn a_name_is_what_it_is_now() {
    let by_name = Settings {
        allow: vec![Rule {
            container: vec![Glob::parse("c1").unwrap()],
            ..rule(1)
        }],
        ..settings()
    };
    let daemon = Daemon::start(by_name);
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(served(&daemon, 1, address).await);
    for (name, allowed) in [("renamed", false), ("c1", true)] {
        daemon
            .engine
            .world(|world| world.containers.get_mut(&id(1)).unwrap().name = Some(name.into()));
        daemon.engine.send(Event::Defined(id(1)));
        daemon.settle().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(served(&daemon, 1, address).await, allowed, "{name}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_rule_that_looks_at_networks_waits_for_them() {
    let by_network = Settings {
        allow: vec![Rule {
            network: vec![Glob::parse("n").unwrap()],
            ..rule(1)
        }],
        ..settings()
    };
    let daemon = Daemon::start(by_network);
    daemon.synchronised().await;
    let address = daemon.create(1, APP);
    daemon.settle().await;
    let role = || daemon.index.get(&id(1)).unwrap().instance.role.clone();
    assert!(
        matches!(role(), imds_router::instance::Role::Pending(_)),
        "{:?}",
        role()
    );
    assert_eq!(daemon.sts.calls.load(std::sync::atomic::Ordering::Relaxed), 0);
    daemon.boot(1, address);
    daemon.settle().await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(served(&daemon, 1, address).await);
}

#[tokio::test(start_paused = true)]
async fn who_may_be_nobody_is_not_told_that_this_is_ec2() {
    let daemon = Daemon::start(Settings {
        compat: Compat::ALL,
        ..settings()
    });
    daemon.synchronised().await;
    for (number, variable, status) in [(1, "IAM_ROLE=app", 200), (2, "HOME=/", 403)] {
        let address = daemon.create(number, &[]);
        daemon.engine.world(|world| {
            let container = world.containers.get_mut(&id(number)).unwrap();
            (container.environment, container.inspect_blocks) = (vec![variable.into()], true);
        });
        daemon.boot(number, address);
        daemon.settle().await;
        // Asked before its variables are known: whatever it is, it waits until they are.
        let mut client = daemon.connect(number, address);
        let answer = tokio::spawn(async move { client.get("/latest/meta-data/").await.unwrap().status });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!answer.is_finished());
        daemon
            .engine
            .world(|world| world.containers.get_mut(&id(number)).unwrap().inspect_blocks = false);
        assert_eq!(answer.await.unwrap(), status, "{variable}");
    }
}

#[tokio::test(start_paused = true)]
async fn variables_count_once_they_are_known_and_only_where_the_image_did_not_bring_them() {
    let compat = Settings {
        compat: Compat::ALL,
        ..settings()
    };
    let daemon = Daemon::start(compat);
    daemon.synchronised().await;
    for (number, own, image, allowed) in [
        (1, Some("IAM_ROLE=app"), None, true),
        (2, None, Some("IAM_ROLE=app"), false),
        (3, Some("IAM_ROLE=app"), Some("IAM_ROLE=app"), false),
        (4, Some("IAM_ROLE=app"), Some("IAM_ROLE=other"), true),
    ] {
        let address = daemon.create(number, &[]);
        daemon.engine.world(|world| {
            let container: &mut Container = world.containers.get_mut(&id(number)).unwrap();
            container.environment = own.map(str::to_owned).into_iter().collect();
            container.image_environment = image.map(str::to_owned).into_iter().collect();
        });
        daemon.boot(number, address);
        daemon.settle().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
        match allowed {
            true => assert!(served(&daemon, number, address).await, "{number}"),
            // Nothing of it is ours: as without a label.
            false => assert_eq!(
                daemon.connect(number, address).get(DOCUMENT).await.unwrap().status,
                403,
                "{number}"
            ),
        }
    }
}
