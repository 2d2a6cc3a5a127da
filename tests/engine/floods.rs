//! Containers and a user of the host that open as many connections as they can, at once.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{LIST, is_itself};
use crate::rig::hostile::last_line;
use crate::rig::{Container, Daemon, Done, Engine, Rig, poll, rounds};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("floods::all_at_once", |engine| all_at_once(engine, "ulimit -Sn 1024")),
        rig.once("floods::all_at_once_with_few_descriptors", |engine| {
            all_at_once(engine, "ulimit -n 1024")
        }),
        rig.once(
            "floods::many_links_of_one_container_cost_others_nothing",
            many_links_of_one_container_cost_others_nothing,
        ),
        rig.once("floods::connections_that_are_reset", connections_that_are_reset),
        rig.once(
            "floods::log_lines_of_a_container_are_few",
            log_lines_of_a_container_are_few,
        ),
    ]
}

/// As text, because a user of the host cannot read the directory of the trials.
const FLOOD: &str = include_str!("../clients/attacks/flood.py");
/// How long the floods last, in seconds.
const SECONDS: &str = "8";
/// Networks of the container without a label.
const NETWORKS: u8 = 40;

/// A container that asks every 2 ms, on a new connection each time.
pub const ASK: &str = "
import json, socket, sys, time
end, took, failed = time.monotonic() + float(sys.argv[1]), [], {}
while time.monotonic() < end:
    began = time.monotonic()
    try:
        s = socket.create_connection(('169.254.169.254', 80), 5)
        s.sendall(b'GET /latest/meta-data/instance-id HTTP/1.1\\r\\nHost: 169.254.169.254\\r\\nConnection: close\\r\\n\\r\\n')
        data = b''
        while chunk := s.recv(4096): data += chunk
        if b' 200 ' not in data[:15]: raise OSError(data[:15])
    except OSError as error:
        failed[str(error)] = failed.get(str(error), 0) + 1
    took.append(time.monotonic() - began)
    time.sleep(0.002)
took.sort()
at = lambda share: took[int((len(took) - 1) * share)] * 1000
print(json.dumps({'asked': len(took), 'failed': failed, 'p50': at(0.5), 'p99': at(0.99), 'max': at(1)}))
";

fn daemon(engine: &Arc<Engine>, limit: &str) -> Daemon {
    let script = format!("{limit}; exec \"$@\"");
    let mut environment = engine.moto().daemon_environment();
    environment.push(("IMDS_ROUTER_LOG".to_owned(), "info".to_owned()));
    let config = "account_id = \"111122223333\"\n";
    Daemon::start_by(engine, &["sh", "-c", &script, "sh"], config, &environment)
}

fn flood(container: &Container, words: &[&str]) -> JoinHandle<Value> {
    let mut docker = container.exec_command(&[]);
    docker.args(["/usr/bin/python3", "-c", FLOOD]).args(words);
    std::thread::spawn(move || last_line(&Done::of(docker).ok()))
}

/// An unprivileged user of the host.
fn flood_of_a_user(engine: &Engine, words: &[&str]) -> JoinHandle<Value> {
    let mut user = engine.command("setpriv");
    user.args([
        "--reuid=12345",
        "--regid=12345",
        "--clear-groups",
        "--",
        "/usr/bin/python3",
    ]);
    user.args(["-c", FLOOD]).args(words);
    std::thread::spawn(move || last_line(&Done::of(user).ok()))
}

/// `limit`: how the daemon's limit on descriptors is set before its start.
fn all_at_once(engine: &Arc<Engine>, limit: &str) {
    let daemon = daemon(engine, limit);
    let greedy: Vec<Container> = (0..18)
        .map(|number| {
            engine
                .run(&format!("greedy-{number}"))
                .label("imds.role", "greedy")
                .start()
        })
        .collect();
    let sender = engine.run("sender").label("imds.role", "sender").start();
    // 40 networks, and no label.
    let networks: Vec<_> = (0..NETWORKS)
        .map(|number| engine.network(&format!("many-{number}"), &[&format!("--subnet=10.200.{number}.0/24")]))
        .collect();
    let stranger = engine.run("stranger").start();
    for network in &networks {
        engine.docker(&["network", "connect", network.name(), stranger.name()]);
    }
    let victim = engine.run("victim").label("imds.role", "victim").start();
    let in_the_host = engine
        .run("in-the-host")
        .label("imds.role", "in-the-host")
        .network("host")
        .start();
    for container in [&victim, &in_the_host, &sender] {
        is_itself(container);
    }

    let mut floods: Vec<_> = greedy.iter().map(|it| flood(it, &["hold", "64", SECONDS])).collect();
    floods.push(flood(&sender, &["syn", SECONDS]));
    floods.push(flood_over_all_networks(&stranger));
    floods.push(flood_of_a_user(engine, &["hold", "5000", SECONDS]));
    // All of them are at work.
    std::thread::sleep(Duration::from_secs(2));
    let asking = |container: &Container| {
        let mut docker = container.exec_command(&[]);
        docker.args(["/usr/bin/python3", "-c", ASK, "4"]);
        std::thread::spawn(move || last_line(&Done::of(docker).ok()))
    };
    let asking = [&victim, &in_the_host].map(asking);
    let started: Vec<Container> = (0..3)
        .map(|number| {
            engine
                .run(&format!("late-{number}"))
                .label("imds.role", &format!("late-{number}"))
                .start()
        })
        .collect();
    let answers = asking.map(|it| it.join().expect("it asks"));
    let floods: Vec<Value> = floods.into_iter().map(|it| it.join().expect("a flood")).collect();
    let ended = Instant::now();
    for container in &started {
        poll(
            Duration::from_secs(1).saturating_sub(ended.elapsed()),
            "a container that started meanwhile",
            || {
                let reply = container.request("GET", LIST, &[]).ok()?;
                (reply.status == 200).then(|| assert_eq!(reply.body, container.name()))
            },
        );
    }
    for flood in floods {
        println!("{flood}");
    }
    println!("{limit} | {answers:?}");
    // Two cores, shared with the floods, and a build without optimization: what counts is that every request is answered, and that
    // those over a link of their own do not wait for a flood to end. The host has one listener for all of its users.
    for (answers, longest) in answers.iter().zip([1_000.0, 5_000.0]) {
        assert_eq!(answers["failed"], serde_json::json!({}), "{answers}\n{}", daemon.log());
        assert!(answers["max"].as_f64().is_some_and(|it| it < longest), "{answers}");
    }
    // Nothing needs a restart.
    for container in greedy.iter().chain([&victim, &in_the_host, &sender]) {
        let role = if container.name().starts_with("greedy") {
            "greedy"
        } else {
            container.name()
        };
        poll(Duration::from_secs(5), "an answer after the flood", || {
            let reply = container.request("GET", LIST, &[]).ok()?;
            (reply.status == 200).then(|| assert_eq!(reply.body, role))
        });
    }
    let log = daemon.stop();
    let lines = log.lines().count();
    println!("{lines} lines of log");
    assert!(lines < 400, "{lines} lines of log");
}

/// 40 connections over each network of a container.
fn flood_over_all_networks(stranger: &Container) -> JoinHandle<Value> {
    let script = "
import json, socket, sys, time
held = []
for line in sys.argv[2:]:
    for _ in range(40):
        s = socket.socket()
        s.bind((line, 0))
        s.setblocking(False)
        s.connect_ex(('169.254.169.254', 80))
        held.append(s)
time.sleep(float(sys.argv[1]))
print(json.dumps({'held': len(held)}))
";
    let addresses = stranger.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}} {{end}}");
    let mut docker = stranger.exec_command(&[]);
    docker
        .args(["/usr/bin/python3", "-c", script, SECONDS])
        .args(addresses.split_whitespace());
    std::thread::spawn(move || last_line(&Done::of(docker).ok()))
}

/// A container and a user of the host connect and reset at once: no socket tells who made the connection. Others are answered, and
/// containers that start in the host's network meanwhile get their role.
fn connections_that_are_reset(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "true");
    let run = |name: &str| engine.run(name).label("imds.role", name);
    let greedy = run("greedy").start();
    let asking = [run("victim").start(), run("in-the-host").network("host").start()];
    asking.iter().chain([&greedy]).for_each(is_itself);
    let floods = [
        flood(&greedy, &["reset", "6"]),
        flood_of_a_user(engine, &["reset", "6"]),
    ];
    let answers = asking.each_ref().map(|container| {
        let mut docker = container.exec_command(&[]);
        docker.args(["/usr/bin/python3", "-c", ASK, "4"]);
        std::thread::spawn(move || last_line(&Done::of(docker).ok()))
    });
    is_itself(&run("late").network("host").start());
    let answers = answers.map(|it| it.join().expect("it asks"));
    let floods = floods.map(|it| it.join().expect("a flood"));
    println!("beside {floods:?}: {answers:?}");
    for answers in &answers {
        assert_eq!(answers["failed"], serde_json::json!({}), "{answers}");
    }
    assert!(
        floods.iter().all(|it| it["opened"].as_u64().is_some_and(|it| it > 100)),
        "{floods:?}"
    );
    is_itself(&greedy);
    daemon.stop();
}

/// `IMDS_TRIALS_ROUNDS=100000` makes as many connections.
fn log_lines_of_a_container_are_few(engine: &Arc<Engine>) {
    const AT_ONCE: u32 = 5_000;
    let count = rounds(AT_ONCE);
    let daemon = daemon(engine, "true");
    let labeled = engine.run("labeled").label("imds.role", "labeled").start();
    is_itself(&labeled);
    let stranger = engine.run("stranger").start();
    let before = daemon.log().lines().count();
    for container in [&stranger, &labeled] {
        let (began, mut left) = (Instant::now(), count);
        while left > 0 {
            let some = left.min(AT_ONCE);
            let answers = flood(container, &["ask", &some.to_string()]);
            println!("{}: {}", container.name(), answers.join().expect("a flood"));
            left -= some;
        }
        println!("{} | {count} connections in {:?}", container.name(), began.elapsed());
    }
    let log = daemon.stop();
    let lines = log.lines().count() - before;
    println!("{lines} lines of log");
    assert!(lines <= 100, "{lines} lines of log:\n{log}");
}

/// A container with `NET_ADMIN` that has 2,000 links and addresses, and changes them all the time: each change has the daemon look at
/// them.
fn many_links_of_one_container_cost_others_nothing(engine: &Arc<Engine>) {
    const LINKS: &str = "
for number in $(seq 1000); do
    echo link add l$number type bridge
    echo address add fd00:77::$number/128 dev lo
done | ip -batch -";
    const CHANGE: &str = "
end=$(($(date +%s) + 6))
while [ $(date +%s) -lt $end ]; do
    echo link set l1 up; echo address del fd00:77::1/128 dev lo; echo link set l1 down; echo address add fd00:77::1/128 dev lo
done | ip -batch - | wc -l";
    let config = "account_id = \"111122223333\"\n[serve]\ndocker_in_docker = \"inherit\"\n";
    let daemon = Daemon::start(engine, config, &engine.moto().daemon_environment());
    let network = engine.network_with_ipv6("links", "fd00:4ed::/64");
    let start = |name: &str, capability: &str| {
        let run = engine.run(name).label("imds.role", name).network(network.name());
        run.arg(capability).start()
    };
    let victim = start("victim", "--cap-drop=NET_RAW");
    let greedy = start("greedy", "--cap-add=NET_ADMIN");
    is_itself(&victim);
    is_itself(&greedy);
    let ask = || last_line(&victim.exec(&["/usr/bin/python3", "-c", ASK, "4"]));
    let alone = ask();
    greedy.exec(&["sh", "-c", LINKS]);
    let links = greedy.exec(&["sh", "-c", "ip -oneline link | wc -l"]);
    assert!(links.parse::<u32>().is_ok_and(|it| it > 1000), "{links}");
    let mut change = greedy.exec_command(&[]);
    change.args(["sh", "-c", CHANGE]);
    let changing = std::thread::spawn(move || Done::of(change));
    let beside = ask();
    changing.join().expect("it changes");
    println!("alone {alone}, beside {beside}");
    assert_eq!(beside["failed"], serde_json::json!({}), "{beside}");
    assert!(beside["max"].as_f64().is_some_and(|it| it < 400.0), "{beside}");
    is_itself(&greedy);
    daemon.stop();
}
