//! Every way to run a container and to reach the address from it: each is itself.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::rig::{BOX, Container, Daemon, Engine, Rig, attach_keys, poll, rounds};

pub const LIST: &str = "/latest/meta-data/iam/security-credentials/";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = rig.in_each_view("cases::cgroups_and_process_namespaces", cgroups_and_process_namespaces);
    trials.push(rig.once("cases::bound_sockets", bound_sockets));
    // Attach host follows the addresses that the container engine reports.
    for attach in ["namespace", "host"] {
        let name = format!("cases::several_networks::{attach}");
        trials.push(rig.once(&name, move |engine| several_networks(engine, attach)));
        let name = format!("cases::restarts::{attach}");
        trials.push(rig.once(&name, move |engine| restarts(engine, attach)));
    }
    trials.extend(rig.in_each_view(
        "cases::nothing_is_left_in_any_namespace",
        nothing_is_left_in_any_namespace,
    ));
    trials.push(rig.once(
        "cases::who_is_excluded_is_left_as_before",
        who_is_excluded_is_left_as_before,
    ));
    trials.push(rig.once("cases::many_containers_after_a_kill", many_containers_after_a_kill));
    trials
}

fn config(attach: &str) -> String {
    format!("account_id = \"111122223333\"\n[serve]\n{}", attach_keys(attach))
}

pub fn daemon(engine: &Arc<Engine>, attach: &str) -> Daemon {
    Daemon::start(engine, &config(attach), &engine.moto().daemon_environment())
}

/// The container gets its own role, soon.
pub fn is_itself(container: &Container) {
    poll(
        Duration::from_secs(5),
        &format!("the role of {}", container.name()),
        || {
            let reply = container.request("GET", LIST, &[]).ok()?;
            assert!(
                reply.status != 200 || reply.body == container.name(),
                "{reply:?} in {}",
                container.name()
            );
            (reply.status == 200).then_some(())
        },
    );
}

fn cgroups_and_process_namespaces(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "namespace");
    let run = |name: &str, option: &str| engine.run(name).label("imds.role", name).arg(option).start();
    let parent = run("own-parent", "--cgroup-parent=/tenants/a");
    let pid_host = run("pid-host", "--pid=host");
    let private = run("private-cgroups", "--cgroupns=private");
    let nested = run("nested", "--hostname=nested");
    let pid_of_other = run("pid-of-other", "--pid=container:nested");
    for container in [&parent, &pid_host, &private, &nested, &pid_of_other] {
        is_itself(container);
    }
    // A process of the container in a cgroup below the container's, as systemd in a container makes them.
    let below = engine.host("sh", &["-c", &format!(
        "cgroup=$(awk '$9 == \"cgroup2\" || $8 == \"cgroup2\" {{ print $5; exit }}' /proc/self/mountinfo); \
         cgroup=$(sed -n 's/^0:://p' /proc/{pid}/cgroup | sed \"s|^|$cgroup|\"); mkdir -p $cgroup/below; echo $cgroup/below",
        pid = nested.pid()
    )]);
    let sleeper = nested.exec(&[
        "sh",
        "-c",
        "(sleep 1; exec curl -s -o /tmp/got --max-time 3 \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/) >/dev/null 2>&1 & echo $!",
    ]);
    let host_pid = engine.host(
        "sh",
        &[
            "-c",
            &format!(
                "for p in /proc/[0-9]*; do grep -qs \"^NSpid:.*[[:space:]]{sleeper}$\" $p/status && \
         grep -qs {id} $p/cgroup && echo ${{p#/proc/}}; done; true",
                id = nested.id()
            ),
        ],
    );
    engine.host("sh", &["-c", &format!("echo {host_pid} > {below}/cgroup.procs")]);
    poll(Duration::from_secs(5), "the answer to the process below", || {
        (nested.try_exec(&["cat", "/tmp/got"]).stdout == "nested").then_some(())
    });
    daemon.stop();
    drop((pid_of_other, nested));
    let _ = engine.host("sh", &["-c", &format!("rmdir {below} 2>/dev/null; true")]);
}

fn several_networks(engine: &Arc<Engine>, attach: &str) {
    let daemon = daemon(engine, attach);
    let (first, second) = (
        engine.network("net-a", &[]),
        engine.network("net-b", &["--subnet=10.99.7.0/24"]),
    );
    let closed = engine.network("net-closed", &["--opt=com.docker.network.bridge.enable_icc=false"]);
    let container = engine
        .run("roamer")
        .label("imds.role", "roamer")
        .network(first.name())
        .start();
    let apart = engine
        .run("apart")
        .label("imds.role", "apart")
        .network(closed.name())
        .start();
    is_itself(&apart);
    is_itself(&container);
    engine.docker(&["network", "connect", second.name(), "roamer"]);
    is_itself(&container);
    engine.docker(&["network", "disconnect", first.name(), "roamer"]);
    is_itself(&container);
    // Its first address goes to somebody else at once.
    let heir = engine
        .run("heir")
        .label("imds.role", "heir")
        .network(first.name())
        .start();
    is_itself(&heir);
    is_itself(&container);
    engine.docker(&["network", "disconnect", second.name(), "roamer"]);
    engine.docker(&["network", "connect", first.name(), "roamer"]);
    is_itself(&container);
    is_itself(&heir);
    daemon.stop();
}

/// A client that binds its socket to an address of another link, or an IPv6 socket that carries IPv4, is served like any
/// other. One that binds it to the link `eth0` sends over the bridge, where it is refused.
fn bound_sockets(engine: &Arc<Engine>) {
    let daemon = daemon(engine, "namespace");
    let container = engine.run("bound").label("imds.role", "bound").start();
    is_itself(&container);
    let ask = |open: &str| {
        let script = format!(
            "import socket\n{open}\ns.sendall(b'GET {LIST} HTTP/1.1\\r\\nConnection: close\\r\\n\\r\\n')\n\
             data = b''\nwhile chunk := s.recv(4096): data += chunk\n\
             head, _, body = data.decode().partition('\\r\\n\\r\\n')\nprint(head.split()[1], body, end='')"
        );
        container.exec(&["/usr/bin/python3", "-c", &script])
    };
    let mapped = "s = socket.socket(socket.AF_INET6); s.settimeout(3); s.connect(('::ffff:169.254.169.254', 80))";
    assert_eq!(ask(mapped), "200 bound");
    let to_address = format!(
        "s = socket.socket(); s.settimeout(3); s.bind(('{}', 0)); s.connect(('169.254.169.254', 80))",
        container.inspect("{{.NetworkSettings.IPAddress}}")
    );
    assert_eq!(ask(&to_address), "200 bound");
    let to_device = |device: &str| {
        ask(&format!(
            "s = socket.socket(); s.settimeout(3); s.setsockopt(socket.SOL_SOCKET, 25, b'{device}\\0'); \
             s.connect(('169.254.169.254', 80))"
        ))
    };
    assert_eq!(to_device("imds0"), "200 bound");
    assert_eq!(to_device("eth0"), "403");
    let refused = &daemon.status()["refused_connections"];
    assert_eq!(refused["over-bridge"], 1, "{refused}");
    daemon.stop();
}

fn restarts(engine: &Arc<Engine>, attach: &str) {
    let before = engine.run("before").label("imds.role", "before").start();
    let daemon = daemon(engine, attach);
    is_itself(&before);
    for _ in 0..3 {
        before.restart();
        is_itself(&before);
    }
    engine.docker(&["pause", "before"]);
    engine.docker(&["unpause", "before"]);
    is_itself(&before);
    let directory = daemon.directory().to_owned();
    daemon.kill();
    let daemon = Daemon::start_in(engine, directory, &config(attach), &engine.moto().daemon_environment());
    is_itself(&before);
    before.restart();
    is_itself(&before);
    daemon.stop();
    before.request("GET", LIST, &[]).expect_err("nobody serves any more");
}

/// Links, addresses, routes and rules of a container's network namespace.
fn inside(container: &Container) -> String {
    let list = |words: &str| {
        let mut words = words.split(' ');
        let mut command = container.intruder(words.next().unwrap_or_default());
        command.args(words);
        crate::rig::Done::of(command).ok()
    };
    let all = [
        "ip -o addr",
        "ip -o link",
        "ip -4 route show table all",
        "ip -6 route show table all",
        "ip rule",
        "nft list ruleset",
    ];
    all.map(list).join("\n")
}

fn nothing_is_left_in_any_namespace(engine: &Arc<Engine>) {
    let labeled = engine.run("labeled").label("imds.role", "labeled").start();
    let lonely = engine
        .run("lonely")
        .label("imds.role", "lonely")
        .network("none")
        .start();
    let bare = engine.run("bare").start();
    let containers = [&labeled, &lonely, &bare];
    let before = containers.map(inside);
    let addresses = |container: &Container| {
        let mut ip = container.intruder("ip");
        ip.args(["-o", "-4", "addr"]);
        crate::rig::Done::of(ip).ok()
    };
    let own = containers.map(addresses);
    let daemon = daemon(engine, "namespace");
    is_itself(&labeled);
    is_itself(&lonely);
    for (container, own) in [(&labeled, &own[0]), (&lonely, &own[1])] {
        let served = inside(container);
        for part in [
            "169.254.169.254 dev imds0 table 169",
            "unreachable 169.254.169.254 table 169",
            "from all to 169.254.169.254 iif lo ipproto tcp lookup 169",
        ] {
            assert!(served.contains(part), "{part} is not in {served}");
        }
        assert_eq!(&addresses(container), own, "a link without addresses");
    }
    assert_eq!(inside(&bare), before[2], "who is not served is not touched");
    let directory = daemon.directory().to_owned();
    assert!(Daemon::is_pinned(engine, &directory));
    daemon.stop();
    for (container, before) in containers.iter().zip(&before) {
        assert_eq!(&inside(container), before, "{}", container.name());
    }
    assert!(!Daemon::is_pinned(engine, &directory));
    // A daemon that was killed leaves all of it, and the next one removes it.
    let start = || {
        Daemon::start_in(
            engine,
            directory.clone(),
            &config("namespace"),
            &engine.moto().daemon_environment(),
        )
    };
    let killed = start();
    is_itself(&labeled);
    killed.kill();
    assert!(Daemon::is_pinned(engine, &directory));
    let refused = labeled.request("GET", LIST, &[]);
    assert!(
        refused.as_ref().is_err_and(|why| why.connection_refused()),
        "{refused:?}"
    );
    let next = start();
    is_itself(&labeled);
    next.stop();
    for (container, before) in containers.iter().zip(&before) {
        assert_eq!(&inside(container), before, "{}", container.name());
    }
    assert!(!Daemon::is_pinned(engine, &directory));
}

/// Who is served no more, by a configuration that has changed, has its namespace back as it was; and is served again.
fn who_is_excluded_is_left_as_before(engine: &Arc<Engine>) {
    let container = engine.run("excluded").label("imds.role", "excluded").start();
    let before = inside(&container);
    let daemon = daemon(engine, "namespace");
    is_itself(&container);
    let file = daemon.directory().join("config.toml");
    let config = std::fs::read_to_string(&file).expect("its configuration");
    let reread = |text: &str| {
        std::fs::write(&file, text).expect("its directory is writable");
        daemon.reload();
    };
    reread(&format!("{config}\n[imds]\nhttp_endpoint = \"disabled\"\n"));
    poll(Duration::from_secs(5), "the namespace to be as before", || {
        (inside(&container) == before).then_some(())
    });
    // What it asks now goes to the host, which refuses.
    assert_eq!(container.get(LIST, &[]).status, 403);
    reread(&config);
    is_itself(&container);
    daemon.stop();
    assert_eq!(inside(&container), before);
}

/// kill -9, start again: everybody is served again within a second of the daemon's start.
fn many_containers_after_a_kill(engine: &Arc<Engine>) {
    let all = rounds(30) as usize;
    let first = daemon(engine, "namespace");
    let network = engine.network("many", &[]);
    // Each asks again and again, and notes when it was served and when not: together no more than leaves the engine room.
    let ask = format!(
        "while true; do timeout 1 wget -q -O - http://169.254.169.254/latest/meta-data/iam/security-credentials/ \
         > /tmp/now 2>/dev/null && mv /tmp/now /tmp/got || rm -f /tmp/got; sleep {}; done",
        0.005 * all as f64
    );
    let containers: Vec<_> = (0..all)
        .map(|number| {
            let name = format!("many-{number}");
            let run = engine
                .run(&name)
                .bare_image(BOX)
                .label("imds.role", &name)
                .network(network.name());
            run.command(&["sh", "-c", &ask]).start()
        })
        .collect();
    let got = |container: &Container| container.try_exec(&["cat", "/tmp/got"]).stdout;
    for container in &containers {
        poll(Duration::from_secs(10), "the first answer", || {
            (got(container) == container.name()).then_some(())
        });
    }
    let directory = first.directory().to_owned();
    first.kill();
    for container in &containers {
        poll(Duration::from_secs(10), "the refusal", || {
            got(container).is_empty().then_some(())
        });
    }
    let second = Daemon::start_in(
        engine,
        directory,
        &config("namespace"),
        &engine.moto().daemon_environment(),
    );
    let started = Instant::now();
    poll(Duration::from_secs(10), "all of them to be served again", || {
        let status = second.status();
        let shown = status["containers"].as_array().expect("a list");
        let served = shown.iter().filter(|it| it["last_request"]["status"] == 200).count();
        (served == all).then_some(())
    });
    let asked = started.elapsed();
    // The daemon's own word, without the pauses of those who ask: since its own start.
    let log = second.log();
    let times = |what: &str| -> Vec<jiff::Timestamp> {
        let lines = log.lines().filter(|line| line.contains(what));
        lines
            .filter_map(|line| line.split_whitespace().next()?.parse().ok())
            .collect()
    };
    let began = times(" serving ")[0];
    let since = |what: &str| times(what).last().map(|last| last.duration_since(began));
    println!(
        "{all} containers served again {asked:?} after the daemon's start; the last was known {:?}, had credentials {:?} after it",
        since("watcher: lives"),
        since("credentials fetched"),
    );
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    for container in &containers {
        poll(Duration::from_secs(5), "its own answer", || {
            let got = got(container);
            assert!(
                got.is_empty() || got == container.name(),
                "{got} in {}",
                container.name()
            );
            (!got.is_empty()).then_some(())
        });
    }
    second.stop();
}
