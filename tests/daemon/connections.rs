//! When connections close, and the limit of open connections per container.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use imds_router::containers::ContainerRun;
use imds_router::containers::connection_slots::{KEPT_LIMIT, LIMIT, WAITING_LIMIT};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::script::{Client, Daemon, id, settings};

const APP: &[(&str, &str)] = &[("imds.role", "app")];
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/app";
const HOLD: Duration = Duration::from_millis(400);

/// A daemon with one container, number 1.
async fn daemon() -> (Daemon, SocketAddr) {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.run(1, APP).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    (daemon, address)
}

fn life(daemon: &Daemon) -> Arc<ContainerRun> {
    daemon.index.get(&id(1)).unwrap().life.clone().unwrap()
}

fn at_limit(daemon: &Daemon) -> [u64; 2] {
    daemon.service.at_limit().map(|(_, count)| count)
}

/// Connections of container 1 that fill its limit. They send no request, so none of them is idle.
async fn fill(daemon: &Daemon, address: SocketAddr) -> Vec<Client> {
    let clients = (0..LIMIT).map(|_| daemon.connect(1, address)).collect();
    daemon.settle().await;
    assert_eq!(life(daemon).connections.open(), LIMIT);
    clients
}

#[tokio::test(start_paused = true)]
async fn a_proven_caller_does_not_wait_for_those_who_are_not() {
    let (daemon, address) = daemon().await;
    // They send nothing, so each keeps its place until its refusal is given up.
    let silent: Vec<_> = (1..=500_u16)
        .map(|port| daemon.dial(SocketAddr::from(([10, 9, 9, 9], port))))
        .collect();
    daemon.settle().await;
    let asked = daemon.clock.now();
    let mut client = daemon.connect(1, address);
    assert_eq!(client.get(DOCUMENT).await.unwrap().status, 200);
    assert_eq!(daemon.clock.now(), asked);
    // Another address that is unknown has its own share.
    let mut other = daemon.dial(SocketAddr::from(([10, 9, 9, 8], 1)));
    assert_eq!(other.get("/").await.unwrap().status, 403);
    drop(silent);
}

#[tokio::test(start_paused = true)]
async fn closes_after_the_answer_unless_the_request_asks_for_keep_alive() {
    let (daemon, address) = daemon().await;
    for (version, connection, open) in [
        ("1.1", "", false),
        ("1.1", "Connection: close\r\n", false),
        ("1.1", "Connection: keep-alive\r\n", true),
        ("1.1", "Connection: TE, Keep-Alive\r\n", true),
        ("1.1", "Connection: keep-alive, close\r\n", false),
        ("1.1", "Connection: upgrade, keep-alive\r\nUpgrade: x\r\n", false),
        ("1.1", "Connection: keep-alive\r\nContent-Length: 0\r\n", true),
        ("1.1", "Connection: keep-alive\r\nContent-Length: 1\r\n", false),
        ("1.0", "", false),
        ("1.0", "Connection: keep-alive\r\n", true),
        ("1.0", "Connection: Keep-Alive\r\n", true),
    ] {
        let mut client = daemon.connect(1, address);
        let request = format!("GET /latest HTTP/{version}\r\nHost: 169.254.169.254\r\n{connection}\r\n");
        client.write(&request).await;
        let reply = client.answer("GET").await.unwrap();
        let of = |name: &str| {
            let values = reply.headers.iter().filter(|(known, _)| known == name);
            values.map(|(_, value)| value.as_str()).collect::<Vec<_>>()
        };
        let seen = (reply.status, of("connection"), of("keep-alive"), !client.closed().await);
        let expected = match open {
            true => (200, vec!["keep-alive"], vec!["timeout=15"], true),
            false => (200, vec!["close"], vec![], false),
        };
        assert_eq!(seen, expected, "{version} {connection:?}");
    }
    let mut unproven = daemon.dial(SocketAddr::from(([10, 9, 9, 9], 1))).keep_alive();
    let reply = unproven.get("/latest").await.unwrap();
    assert_eq!((reply.status, reply.header("connection")), (403, Some("close")));
    assert!(unproven.closed().await);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_shut_down_its_side_gets_its_answer() {
    let daemon = Daemon::start(settings());
    daemon.synchronised().await;
    let address = daemon.create(1, APP);
    daemon.boot(1, address);
    // The first credentials are not there yet: the answer comes after the end of the client's stream.
    for (version, connection) in [("1.0", ""), ("1.1", ""), ("1.1", "Connection: keep-alive\r\n")] {
        let mut client = daemon.connect(1, address);
        let request = format!("GET {DOCUMENT} HTTP/{version}\r\nHost: 169.254.169.254\r\n{connection}\r\n");
        client.write(&request).await;
        client.stream.shutdown().await.unwrap();
        assert_eq!(
            client.answer("GET").await.unwrap().status,
            200,
            "{version} {connection:?}"
        );
        assert!(client.closed().await);
        drop(client);
        daemon.settle().await;
        assert_eq!(life(&daemon).connections.open(), 0);
    }
}

#[tokio::test]
async fn a_client_that_shut_down_its_side_gets_its_answer_over_tcp() {
    tokio::time::pause();
    let (daemon, address) = daemon().await;
    tokio::time::resume();
    for _ in 0..100 {
        let mut client = daemon.connect_tcp(1, address).await;
        client.write_all(b"GET /latest/ HTTP/1.0\r\n\r\n").await.unwrap();
        client.shutdown().await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200 OK\r\n"), "{answer:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_gone_holds_its_connection_for_no_longer_than_an_answer_takes() {
    let (daemon, _) = daemon().await;
    // Credentials that do not come: a request for them waits for as long as any may.
    daemon.sts.say(&[(60_000, Ok(()))]);
    let waiting = daemon.run(2, &[("imds.role", "slow")]).await;
    let slow = daemon.index.get(&id(2)).unwrap().life.clone().unwrap();
    let mut client = daemon.connect(2, waiting);
    let request = "GET /latest/meta-data/iam/security-credentials/slow HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";
    client.write(request).await;
    daemon.settle().await;
    drop(client);
    tokio::time::sleep(HOLD - Duration::from_millis(60)).await;
    assert_eq!(slow.connections.open(), 1);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(slow.connections.open(), 0);
}

/// Sends a PUT with a body and two more requests, a part of it only when the answer is there. Returns the answer.
async fn pipeline(mut client: TcpStream, late: bool) -> std::io::Result<String> {
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\nX-aws-ec2-metadata-token-ttl-seconds: 60\r\n";
    let get = "GET /latest HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n";
    let requests = format!("{put}Content-Length: 30000\r\n\r\n{}{get}{get}", "x".repeat(30_000));
    let (early, rest) = requests.split_at(if late { 10_000 } else { requests.len() });
    client.write_all(early.as_bytes()).await?;
    let mut answer = vec![0; 12];
    client.read_exact(&mut answer).await?;
    // The connection is closed already, as far as the server is concerned.
    client.write_all(rest.as_bytes()).await?;
    client.read_to_end(&mut answer).await?;
    client.take_error()?.map_or(Ok(()), Err)?;
    Ok(String::from_utf8(answer).unwrap())
}

#[tokio::test]
async fn unread_input_does_not_reset_the_connection() {
    tokio::time::pause();
    let (daemon, address) = daemon().await;
    tokio::time::resume();
    for attempt in 0..1_000 {
        let client = daemon.connect_tcp(1, address).await;
        let answer = pipeline(client, attempt % 2 == 0).await;
        let answer = answer.unwrap_or_else(|error| panic!("attempt {attempt}: {error}"));
        assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer:?}");
        assert_eq!(answer.matches("HTTP/1.1").count(), 1, "{answer:?}");
    }
}

#[tokio::test]
async fn unread_input_does_not_reset_a_refused_connection() {
    tokio::time::pause();
    let (daemon, _) = daemon().await;
    tokio::time::resume();
    for attempt in 0..100 {
        let client = daemon.tcp_from(SocketAddr::from(([10, 9, 9, 9], 1))).await;
        let answer = pipeline(client, attempt % 2 == 0).await;
        let answer = answer.unwrap_or_else(|error| panic!("attempt {attempt}: {error}"));
        assert!(answer.starts_with("HTTP/1.1 403 "), "{answer:?}");
    }
}

#[tokio::test]
async fn a_head_that_is_too_large_is_answered_without_a_reset() {
    tokio::time::pause();
    let (daemon, address) = daemon().await;
    tokio::time::resume();
    let request = format!("GET /latest HTTP/1.1\r\nX-Large: {}\r\n\r\n", "x".repeat(40_000));
    for _ in 0..20 {
        let mut client = daemon.connect_tcp(1, address).await;
        client.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 431 "), "{answer:?}");
        assert!(client.take_error().unwrap().is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn discarding_input_ends_after_a_second_or_with_the_run() {
    let (daemon, address) = daemon().await;
    let life = life(&daemon);
    let mut client = daemon.connect(1, address);
    assert_eq!(client.get("/latest").await.unwrap().status, 200);
    assert!(client.closed().await);
    tokio::time::sleep(Duration::from_millis(900)).await;
    assert_eq!(life.connections.open(), 1);
    tokio::time::sleep(Duration::from_millis(110)).await;
    assert_eq!(life.connections.open(), 0);

    let mut client = daemon.connect(1, address);
    assert_eq!(client.get("/latest").await.unwrap().status, 200);
    assert_eq!(life.connections.open(), 1);
    daemon.kill(1);
    tokio::time::sleep(Duration::from_millis(1)).await;
    assert_eq!(life.connections.open(), 0);
}

#[tokio::test(start_paused = true)]
async fn at_the_limit_the_idlest_connection_makes_room() {
    let (daemon, address) = daemon().await;
    let other = daemon.run(2, APP).await;
    let mut clients = Vec::new();
    for _ in 0..KEPT_LIMIT {
        let mut client = daemon.connect(1, address).keep_alive();
        assert_eq!(client.get("/latest").await.unwrap().status, 200);
        clients.push(client);
    }
    // The others have not sent a request yet.
    let busy: Vec<_> = (KEPT_LIMIT..LIMIT).map(|_| daemon.connect(1, address)).collect();
    daemon.settle().await;
    assert_eq!(life(&daemon).connections.open(), LIMIT);
    let asked = daemon.clock.now();
    let mut new = daemon.connect(1, address).keep_alive();
    assert_eq!(new.get("/latest").await.unwrap().status, 200);
    assert_eq!(daemon.clock.now(), asked, "it does not wait");
    let mut closed = Vec::new();
    for (number, client) in clients.iter_mut().enumerate() {
        if client.closed().await {
            closed.push(number);
        }
    }
    assert_eq!(closed, [0], "the one that has been idle longest");
    assert_eq!(at_limit(&daemon), [1, 0]);
    drop(busy);
    assert_eq!(daemon.connect(2, other).get("/latest").await.unwrap().status, 200);
}

/// A client that is told so does not send its next request into a connection that is being closed.
#[tokio::test(start_paused = true)]
async fn with_many_open_connections_each_closes_with_its_answer() {
    let (daemon, address) = daemon().await;
    let mut clients = Vec::new();
    for number in 0..LIMIT {
        let mut client = daemon.connect(1, address).keep_alive();
        let reply = client.get("/latest").await.unwrap();
        let kept = number < KEPT_LIMIT;
        assert_eq!(
            reply.header("connection"),
            Some(if kept { "keep-alive" } else { "close" }),
            "{number}"
        );
        clients.push(client);
    }
    daemon.settle().await;
    for client in &mut clients[KEPT_LIMIT..] {
        assert!(client.closed().await);
    }
    assert_eq!(clients[0].get("/latest").await.unwrap().status, 200);
    assert_eq!(at_limit(&daemon), [0, 0]);
}

#[tokio::test(start_paused = true)]
async fn answered_clients_that_do_not_close_never_exhaust_the_limit() {
    let (daemon, address) = daemon().await;
    let mut clients = Vec::new();
    for number in 0..300 {
        let mut client = daemon.connect(1, address);
        assert_eq!(
            client.get("/latest").await.map(|reply| reply.status),
            Some(200),
            "{number}"
        );
        clients.push(client);
    }
    assert_eq!(life(&daemon).connections.refused(), 0);
}

#[tokio::test(start_paused = true)]
async fn without_an_idle_connection_a_new_one_waits_for_a_slot() {
    let (daemon, address) = daemon().await;
    let mut clients = fill(&daemon, address).await;
    for gone in [true, false] {
        let mut new = daemon.connect(1, address);
        let answer = tokio::spawn(async move { new.get("/latest").await });
        tokio::time::sleep(HOLD / 2).await;
        assert!(!answer.is_finished());
        if gone {
            drop(clients.pop());
        } else {
            // An answer that asks to stay open: the slot is needed, so it closes.
            let mut client = clients.remove(0).keep_alive();
            let reply = client.get("/latest").await.unwrap();
            assert_eq!(reply.header("connection"), Some("close"));
        }
        assert_eq!(answer.await.unwrap().unwrap().status, 200);
        daemon.settle().await;
        clients.push(daemon.connect(1, address));
        daemon.settle().await;
    }
    assert_eq!(life(&daemon).connections.refused(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_gets_no_slot_is_answered_503() {
    let (daemon, address) = daemon().await;
    let _clients = fill(&daemon, address).await;
    let asked = daemon.clock.now();
    let mut new = daemon.connect(1, address).keep_alive();
    let reply = new.get("/latest").await.unwrap();
    assert_eq!((reply.status, reply.header("connection")), (503, Some("close")));
    assert_eq!(
        reply.header("x-imds-router-hint"),
        Some("64 open connections, none of them idle; ask: imds-router explain 000000010000")
    );
    assert!(new.closed().await);
    let waited = daemon.clock.now() - asked;
    assert!(
        waited >= HOLD && waited < HOLD + Duration::from_millis(20),
        "{waited:?}"
    );
    assert_eq!(at_limit(&daemon), [0, 1]);
    assert!(daemon.service.requests().any(|it| it == ("1", 503, 1)));
}

#[tokio::test(start_paused = true)]
async fn beyond_the_limit_of_waiting_connections_503_is_immediate() {
    let (daemon, address) = daemon().await;
    let _clients = fill(&daemon, address).await;
    let mut waiting: Vec<_> = (0..WAITING_LIMIT).map(|_| daemon.connect(1, address)).collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    let asked = daemon.clock.now();
    let reply = daemon.connect(1, address).get("/latest").await.unwrap();
    assert_eq!((reply.status, daemon.clock.now() - asked), (503, Duration::ZERO));
    // One that sends nothing holds its socket for a moment only.
    let mut silent = daemon.connect(1, address);
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert!(silent.closed().await);
    for client in &mut waiting {
        assert_eq!(client.get("/latest").await.unwrap().status, 503);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_waits_for_a_slot_ends_with_the_run() {
    let (daemon, address) = daemon().await;
    let _clients = fill(&daemon, address).await;
    let mut new = daemon.connect(1, address);
    let answer = tokio::spawn(async move { new.get("/latest").await });
    tokio::time::sleep(HOLD / 2).await;
    daemon.kill(1);
    assert!(answer.await.unwrap().is_none());
}
