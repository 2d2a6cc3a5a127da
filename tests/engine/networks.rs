//! Networks that are not a bridge with an IPv4 address, containers inside containers, and hosts that cannot prove.

use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;

use crate::cases::{LIST, daemon, is_itself};
use crate::rig::{Client, Daemon, Done, Engine, Identity, Kind, Rig, http, poll};

const ACCOUNT: &str = "111122223333";
/// Lives whose first act is a request over IPv6.
const FIRST_ACTS: usize = 8;
const IPV6: &str = "http://[fd00:ec2::254]";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = Vec::new();
    for attach in ["namespace", "host"] {
        trials.push(rig.once(&format!("networks::ipv6::{attach}"), move |engine| ipv6(engine, attach)));
        // Attach host needs the address that a task has on docker_gwbridge.
        let in_a_swarm = Kind {
            live_restore: false,
            ..rig.views()[0].into()
        };
        trials.push(rig.alone(&format!("networks::swarm::{attach}"), move || {
            swarm(&Engine::start(in_a_swarm), attach);
        }));
    }
    trials.push(rig.once("networks::containers_in_a_container", containers_in_a_container));
    trials.push(rig.once("networks::gateways", gateways));
    trials.push(rig.once(
        "networks::what_another_program_put_there",
        what_another_program_put_there,
    ));
    trials.push(rig.once("networks::without_rights", without_rights));
    trials.push(rig.once("networks::doctor", doctor));
    trials
}

fn refusals(daemon: &Daemon) -> String {
    daemon.status()["refused_connections"].to_string()
}

fn ipv6(engine: &Arc<Engine>, attach: &str) {
    let before = engine.network_at_rest();
    let daemon = daemon(engine, attach);
    let moto = engine.moto();
    let network = engine.network_with_ipv6("six", "fd12:3456::/64");
    let run = |name: &str| {
        let run = engine.run(name).label("imds.role", name).network(network.name());
        run.start()
    };
    let containers = [run("six-a"), run("six-b")];
    network.await_ipv6();
    for container in &containers {
        is_itself(container);
        let reply = container
            .request("GET", &format!("{IPV6}{LIST}"), &[])
            .expect("an answer");
        assert_eq!((reply.status, reply.body.as_str()), (200, container.name()));
        let host = engine.host("hostname", &[]);
        let expected = Identity::of_role(
            ACCOUNT,
            container.name(),
            &format!("{}@{}", container.name(), host.trim()),
        );
        let mode = ("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6");
        for client in Client::ALL {
            assert_eq!(client.whoami(container, moto, &[mode]), expected, "{client:?}");
        }
    }
    // As the first act of a life. The lower proof waits for the container engine's report of the start, however late.
    if attach == "namespace" {
        let first: Vec<String> = (0..FIRST_ACTS)
            .map(|number| {
                let name = format!("six-first-{number}");
                let run = engine.run(&name).label("imds.role", &name).network(network.name());
                let url = format!("{IPV6}{LIST}");
                let act = run.command(&["/usr/bin/curl", "-sS", "-w", " %{http_code}", "--max-time", "3", &url]);
                act.to_its_end().stdout
            })
            .collect();
        let expected: Vec<_> = (0..FIRST_ACTS)
            .map(|number| format!("six-first-{number} 200"))
            .collect();
        assert_eq!(first, expected);
    }
    // A process of the host, and one that has moved into a namespace.
    let url = format!("{IPV6}{LIST}");
    let process = engine.request("GET", &url, &[]).expect("a refusal");
    assert_eq!((process.status, process.body.as_str()), (403, ""));
    let intruder = http::request(containers[0].intruder("curl"), "GET", &url, &[]).expect("an answer");
    let expected = match attach {
        "namespace" => (403, ""),
        // With the container's source address it is the container.
        _ => (200, containers[0].name()),
    };
    assert_eq!((intruder.status, intruder.body.as_str()), expected);
    daemon.stop();
    drop(containers);
    drop(network);
    before.assert_same(&engine.network_at_rest());
}

/// Tasks and containers of a swarm's overlay reach the host by docker_gwbridge, with an address that only that network knows.
fn swarm(engine: &Arc<Engine>, attach: &str) {
    engine.docker(&["swarm", "init", "--advertise-addr=127.0.0.1"]);
    let daemon = daemon(engine, attach);
    let overlay = engine.network("over", &["--driver=overlay", "--attachable"]);
    let containers = ["swarm-a", "swarm-b"].map(|name| {
        let run = engine.run(name).label("imds.role", name).network(overlay.name());
        run.start()
    });
    for container in &containers {
        is_itself(container);
    }
    let process = engine
        .request("GET", &format!("{}{LIST}", http::IMDS), &[])
        .expect("a refusal");
    assert_eq!((process.status, process.body.as_str()), (403, ""));
    daemon.stop();
    drop(containers);
    drop(overlay);
    engine.docker(&["swarm", "leave", "--force"]);
}

/// Docker in a container: what runs in there gets nothing, or what the outer one gets, as the operator says.
fn containers_in_a_container(engine: &Arc<Engine>) {
    let outer = engine
        .run("outer")
        .label("imds.role", "outer")
        // As good as --privileged, on machines that have not all rights themselves.
        .arg("--cap-add=SYS_ADMIN")
        .arg("--cap-add=NET_ADMIN")
        .arg("--cap-add=SYS_PTRACE")
        .arg("--security-opt=systempaths=unconfined")
        .arg("--security-opt=seccomp=unconfined")
        .arg("--security-opt=apparmor=unconfined")
        .arg("--volume=/sys/fs/cgroup:/sys/fs/cgroup")
        .arg("--volume=/var/lib/inner")
        .start();
    // The machine's Docker, which looks for iptables where Debian's alternatives are not to be had in the container.
    outer.exec(&[
        "sh",
        "-ec",
        "mkdir -p /tmp/bin /tmp/image && ln -s /usr/sbin/iptables-nft /tmp/bin/iptables
         ln -s /usr/sbin/ip6tables-nft /tmp/bin/ip6tables
         export PATH=/tmp/bin:/usr/local/sbin:/usr/sbin:/usr/local/bin:/usr/bin
         nohup dockerd --data-root=/var/lib/inner -H unix:///tmp/inner.sock >/tmp/inner.log 2>&1 &
         cp /busybox /tmp/image/busybox
         for i in $(seq 100); do docker -H unix:///tmp/inner.sock version >/dev/null 2>&1 && break; sleep 0.1; done
         tar -C /tmp/image -c . | docker -H unix:///tmp/inner.sock import - inner >/dev/null",
    ]);
    let inside = |network: &str, command: &str| {
        let run = format!("docker -H unix:///tmp/inner.sock run --rm --network={network} inner {command} 2>&1");
        outer.try_exec(&["sh", "-c", &run])
    };
    let inner = |network: &str| {
        let url = format!("{}{LIST}", http::IMDS);
        inside(network, &format!("/busybox timeout 3 /busybox wget -q -O - {url}"))
    };
    let start = |nested: &str| {
        let config = format!("account_id = \"{ACCOUNT}\"\n[serve]\ndocker_in_docker = \"{nested}\"");
        Daemon::start(engine, &config, &engine.moto().daemon_environment())
    };
    let daemon = start("refuse");
    is_itself(&outer);
    let refused = inner("bridge");
    assert!(!refused.succeeded() && !refused.stdout.ends_with("outer"), "{refused}");
    // In the outer one's own network, but in a cgroup beside its cgroup: with the host's cgroups at hand, the inner engine
    // makes them there.
    let refused = inner("host");
    assert!(refused.stdout.contains("403"), "{refused}");
    assert!(refusals(&daemon).contains("foreign-cgroup"), "{}", refusals(&daemon));
    daemon.stop();
    let daemon = start("inherit");
    is_itself(&outer);
    assert_eq!(inner("bridge").ok(), "outer");
    // The answer with a token has the inner engine's router on its way.
    let limited = |hops: &str| {
        daemon
            .cli(&["modify", "outer", "--http-put-response-hop-limit", hops])
            .ok()
    };
    let put = "PUT /latest/api/token HTTP/1.0\\r\\nX-aws-ec2-metadata-token-ttl-seconds: 60\\r\\n\\r\\n";
    // nc ends when its input does.
    let send = format!("(/busybox printf '{put}'; /busybox sleep 3)");
    let ask = format!("/busybox sh -c \"{send} | /busybox timeout 3 /busybox nc 169.254.169.254 80\"");
    limited("1");
    let unheard = inside("bridge", &ask);
    assert!(!unheard.stdout.contains("200 OK"), "{unheard}");
    assert!(!outer.token().is_empty());
    assert_eq!(inner("bridge").ok(), "outer", "only the token stays within the limit");
    limited("2");
    let heard = inside("bridge", &ask);
    assert!(heard.stdout.starts_with("HTTP/1.0 200 OK"), "{heard}");
    daemon.stop();
    // Over a bridge, what an inner container sends cannot be told from what the outer one sends: they share an address.
    let attach = "attach = \"host\"\nproof = \"address\"\ndocker_in_docker = \"inherit\"";
    let config = format!("account_id = \"{ACCOUNT}\"\n[serve]\n{attach}");
    let daemon = Daemon::start(engine, &config, &engine.moto().daemon_environment());
    is_itself(&outer);
    assert_eq!(inner("bridge").ok(), "outer");
    daemon.stop();
}

/// What leaves with an address of the host's own, as that of a published port's proxy does, is nobody's.
fn gateways(engine: &Arc<Engine>) {
    let on_host = engine
        .run("on-host")
        .label("imds.role", "on-host")
        .network("host")
        .start();
    let victim = engine.run("victim").label("imds.role", "victim").start();
    let by_gateway = || {
        let mut curl = engine.command("curl");
        curl.args(["--interface", "172.17.0.1"]);
        let reply = http::request(curl, "GET", &format!("{}{LIST}", http::IMDS), &[]).expect("a refusal");
        assert_eq!((reply.status, reply.body.as_str()), (403, ""));
    };
    let serving = daemon(engine, "namespace");
    is_itself(&on_host);
    is_itself(&victim);
    by_gateway();
    assert!(refusals(&serving).contains("foreign-cgroup"), "{}", refusals(&serving));
    serving.stop();

    let serving = daemon(engine, "host");
    is_itself(&victim);
    by_gateway();
    // The source address does not tell a container of the host's network from a process of the host.
    assert_eq!(on_host.get(LIST, &[]).status, 403);
    // Somebody translates what a container sends: it comes over its bridge, with the bridge's own address.
    let rules = "add table ip nat9; add chain ip nat9 in { type nat hook input priority 100; };
                 add rule ip nat9 in ip saddr 172.17.0.0/16 ip daddr 169.254.169.254 snat to 172.17.0.1";
    let untracked = victim.get(LIST, &[]);
    engine.host("nft", &[rules]);
    let reply = victim.get(LIST, &[]);
    engine.host("nft", &["delete table ip nat9"]);
    // Our packets are not tracked, so that nobody's translation meets them.
    assert_eq!((reply.status, reply.body), (untracked.status, untracked.body));
    serving.stop();
}

/// An address that somebody else has put into the namespace does what ours would, and stays.
fn what_another_program_put_there(engine: &Arc<Engine>) {
    let container = engine.run("shared-house").label("imds.role", "shared-house").start();
    let ip = |words: &[&str]| {
        let mut command = container.intruder("ip");
        command.args(words);
        Done::of(command).ok()
    };
    ip(&["addr", "add", "169.254.169.254/32", "dev", "eth0"]);
    let daemon = daemon(engine, "namespace");
    // The container has the address itself, and its packets stay inside.
    poll(Duration::from_secs(3), "status to tell of it", || {
        let told = daemon.status()["containers"].to_string();
        told.contains("another program has put 169.254.169.254 on eth0; it was left alone")
            .then_some(())
    });
    let refused = container
        .request("GET", LIST, &[])
        .expect_err("nothing listens in the container");
    assert!(refused.connection_refused(), "{refused}");
    let explained = daemon.cli(&["explain", container.name()]).stdout;
    assert!(explained.contains("does not lead over imds0"), "{explained}");
    ip(&["addr", "del", "169.254.169.254/32", "dev", "eth0"]);
    is_itself(&container);
    ip(&["addr", "add", "169.254.169.254/32", "dev", "eth0"]);
    daemon.stop();
    assert!(ip(&["-o", "addr", "show", "dev", "eth0"]).contains("169.254.169.254"));
    assert!(!ip(&["-o", "addr", "show", "dev", "lo"]).contains("169.254.169.254"));
}

/// Without the rights to ask the kernel: nothing, with the command that helps; or the lower level, for who asks for it.
fn without_rights(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let environment = moto.daemon_environment();
    let no_entering = [
        "setpriv",
        "--bounding-set=-sys_admin,-sys_ptrace",
        "--inh-caps=-sys_admin,-sys_ptrace",
    ];
    let no_cgroup2 = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        "for mount in /sys/fs/cgroup/unified /sys/fs/cgroup; do umount -l $mount 2>/dev/null; done; exec \"$0\" \"$@\"",
    ];
    for (by, lack) in [
        (&no_entering[..], "CAP_SYS_ADMIN, CAP_SYS_PTRACE missing"),
        (&no_cgroup2, "no cgroup v2"),
    ] {
        let (code, said) = Daemon::start_in_vain_by(engine, by, "", &environment);
        assert_eq!(code, Some(1), "{said}");
        for part in [lack, "docker run -d --name imds-router", "proof = \"address\""] {
            assert!(said.contains(part), "{part} is not in: {said}");
        }
    }
    let config = format!("account_id = \"{ACCOUNT}\"\n[serve]\nproof = \"address\"");
    let namespace = format!("{config}\nattach = \"namespace\"");
    let (code, said) = Daemon::start_in_vain_by(engine, &no_entering, &namespace, &environment);
    assert!(
        code == Some(1) && said.contains("attach namespace is not possible here"),
        "{said}"
    );
    // Whatever the rights: attach host has the lower level only.
    let host = format!("account_id = \"{ACCOUNT}\"\n[serve]\nattach = \"host\"");
    let (code, said) = Daemon::start_in_vain(engine, &host, &environment);
    assert!(
        code == Some(1) && said.contains("attach host identifies callers by their source address only"),
        "{said}"
    );

    let before = engine.run("lower-before").label("imds.role", "lower-before").start();
    let daemon = Daemon::start_by(engine, &no_entering, &config, &environment);
    let status = daemon.status();
    assert_eq!(
        (&status["attach"], &status["proof"]),
        (&"host".into(), &"address".into())
    );
    let after = engine.run("lower-after").label("imds.role", "lower-after").start();
    is_itself(&before);
    is_itself(&after);
    after.restart();
    is_itself(&after);
    // Who cannot be told from others gets nothing.
    let on_host = engine
        .run("lower-host")
        .label("imds.role", "lower-host")
        .network("host")
        .start();
    assert_eq!(on_host.get(LIST, &[]).status, 403);
    let sharer = engine.run("lower-sharer").network("container:lower-before").start();
    for container in [&sharer, &before] {
        assert_eq!(container.get(LIST, &[]).status, 403, "{}", container.name());
    }
    assert!(refusals(&daemon).contains("shared"), "{}", refusals(&daemon));
    drop(sharer);
    poll(Duration::from_secs(3), "it to be alone again", || {
        (before.get(LIST, &[]).body == "lower-before").then_some(())
    });
    daemon.stop();
}

/// What `doctor` says of a host that is well, of one with a firewall, and of attach host.
fn doctor(engine: &Arc<Engine>) {
    let examine = |words: &[&str]| {
        let mut command = engine.command("timeout");
        command
            .args(words)
            .args(["30", crate::rig::tools::DAEMON, "doctor"])
            .env("DOCKER_HOST", engine.docker_host());
        Done::of(command)
    };
    let said = examine(&[]).ok();
    for part in [
        "ok    engine: unix://",
        "ok    proof: full",
        "ok    attach: namespace",
        "note  daemon: none holds table ip",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let serving = daemon(engine, "host");
    engine.host(
        "nft",
        &[
            "add table ip fire9; add chain ip fire9 in { type filter hook input priority 0; policy drop; }; \
                          add rule ip fire9 in ct state established accept; add rule ip fire9 in iifname lo accept",
        ],
    );
    let mut told = engine.command("timeout");
    told.args(["30", crate::rig::tools::DAEMON, "doctor"])
        .env("DOCKER_HOST", engine.docker_host())
        .env("IMDS_ROUTER_SERVE_ATTACH", "host")
        .env("IMDS_ROUTER_SERVE_PROOF", "address")
        .env("IMDS_ROUTER_SERVE_ADMIN_SOCKET", serving.admin_socket());
    let told = Done::of(told);
    let victim = engine.run("walled").label("imds.role", "walled").start();
    let walled = victim.request("GET", LIST, &[]);
    engine.host("nft", &["delete table ip fire9"]);
    assert_eq!(told.status.code(), Some(1), "{told}");
    for part in [
        "WRONG firewall: chain ip fire9 in drops",
        "--dport 51254 -j ACCEPT",
        "attach host identifies callers by their source address only",
        "belongs to a live process",
    ] {
        assert!(told.stdout.contains(part), "{part} is not in {told}");
    }
    assert!(
        walled.is_err_and(|why| why.timed_out()),
        "the firewall is what doctor says it is"
    );
    is_itself(&victim);
    let status = serving.cli(&["status"]).ok();
    assert!(status.contains("by their address only"), "{status}");
    serving.stop();
    // Without the rights to look.
    let mut command = engine.command("setpriv");
    command
        .args(["--reuid=65534", "--clear-groups", crate::rig::tools::DAEMON, "doctor"])
        .env("DOCKER_HOST", engine.docker_host());
    let told = Done::of(command);
    assert_eq!(told.status.code(), Some(1), "{told}");
    assert!(told.stdout.contains("WRONG proof: CAP_SYS_ADMIN"), "{told}");
    assert!(told.stdout.contains("fix: docker run -d --name imds-router"), "{told}");
}
