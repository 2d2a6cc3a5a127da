//! Port 80 is somebody else's, daemons and engines are killed, rules are removed: who is served, who is refused, what is
//! left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;

use crate::rig::{Daemon, Done, Engine, Rig, poll};

const ACCOUNT: &str = "account_id = \"111122223333\"\n";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const IMDS: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let view = rig.views()[0];
    vec![
        rig.once(
            "upheaval::port_80_published_before_and_after",
            port_80_published_before_and_after,
        ),
        rig.once(
            "upheaval::kill_with_publisher_and_squatter_then_taken_over",
            kill_with_publisher_and_squatter,
        ),
        rig.once("upheaval::a_clean_stop_leaves_nothing", a_clean_stop_leaves_nothing),
        rig.once("upheaval::what_is_removed_comes_back", what_is_removed_comes_back),
        rig.once("upheaval::intercept_by_itself", intercept_by_itself),
        rig.once("upheaval::never_its_own_customer", never_its_own_customer),
        rig.once("upheaval::offline_is_marked_as_fake", offline_is_marked_as_fake),
        rig.alone("upheaval::the_engine_comes_later", move || {
            the_engine_comes_later(&Engine::start(view))
        }),
        rig.alone("upheaval::the_engine_is_killed_under_load", move || {
            the_engine_is_killed_under_load(&Engine::start(view));
        }),
    ]
}

/// An application that publishes port 80 of the host.
fn publisher(engine: &Arc<Engine>) -> crate::rig::Container {
    let serve =
        "while true; do printf 'HTTP/1.0 200 OK\\r\\nContent-Length: 9\\r\\n\\r\\npublished' | nc -l -p 80; done";
    engine
        .run("publisher")
        .bare_image(crate::rig::BOX)
        .arg("--publish=80:80")
        .command(&["sh", "-c", serve])
        .start()
}

fn published(engine: &Engine) {
    // By the bridge's address, as from outside; each answer ends the server of the moment.
    poll(Duration::from_secs(5), "the published port 80", || {
        let reply = engine.request("GET", "http://172.17.0.1/", &[]).ok()?;
        (reply.body == "published").then_some(())
    });
}

fn port_80_published_before_and_after(engine: &Arc<Engine>) {
    let moto = engine.moto();
    {
        let _publisher = publisher(engine);
        let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
        let app = engine.run("app").label("imds.role", "app").start();
        published(engine);
        assert_eq!(app.get(LIST, &[]).body, "app");
        published(engine);
        daemon.stop();
        published(engine);
    }
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let app = engine.run("app").label("imds.role", "app").start();
    let _publisher = publisher(engine);
    published(engine);
    assert_eq!(app.get(LIST, &[]).body, "app");
    daemon.stop();
}

fn kill_with_publisher_and_squatter(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let before = engine.network_at_rest();
    {
        let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
        let app = engine.run("app").label("imds.role", "app").start();
        let _publisher = publisher(engine);
        published(engine);
        assert_eq!(app.get(LIST, &[]).body, "app");
        let directory = daemon.directory().to_owned();
        daemon.kill();

        // A default-capability container in the host's network takes the address and our port; the publisher is up.
        let squat = [
            "/usr/bin/python3",
            "-m",
            "http.server",
            "51254",
            "--bind",
            "169.254.169.254",
        ];
        let _squatter = engine.run("squatter").network("host").command(&squat).start();
        poll(Duration::from_secs(5), "the squatter", || {
            engine.request("GET", "http://169.254.169.254:51254/", &[]).ok()
        });
        let refused = |who: &str, reply: Result<crate::rig::Reply, crate::rig::NoReply>| match reply {
            Err(why) if why.connection_refused() => {}
            other => panic!("{who}: {other:?}"),
        };
        for _ in 0..5 {
            refused("a container", app.request("GET", IMDS, &[]));
            refused("a host process", engine.request("GET", IMDS, &[]));
        }
        published(engine);

        let daemon = Daemon::start_in(engine, directory, ACCOUNT, &moto.daemon_environment());
        poll(Duration::from_secs(5), "the next daemon", || {
            (app.request("GET", LIST, &[]).ok()?.body == "app").then_some(())
        });
        assert_eq!(
            daemon.status()["listening"],
            "169.254.169.254:51255",
            "beside the squatter"
        );
        assert!(daemon.log().contains("taken over"), "{}", daemon.log());
        daemon.stop();
    }
    before.assert_same(&engine.network_at_rest());
}

fn a_clean_stop_leaves_nothing(engine: &Arc<Engine>) {
    // Rules of others in the way: they stay as they are.
    engine.host("ip", &["route", "add", "blackhole", "169.254.169.254/32"]);
    let before = engine.network_at_rest();
    let daemon = Daemon::start(engine, ACCOUNT, &engine.moto().daemon_environment());
    let during = engine.snapshot_network();
    assert!(!during.lines_with("imds_router").is_empty());
    assert!(!during.lines_with("169.254.169.254").is_empty());
    {
        let app = engine.run("app").label("imds.role", "app").start();
        assert_eq!(app.get(LIST, &[]).body, "app", "a local address wins over a blackhole");
    }
    let directory = daemon.directory().to_owned();
    assert!(Daemon::is_pinned(engine, &directory));
    daemon.stop();
    before.assert_same(&engine.network_at_rest());
    assert!(!Daemon::is_pinned(engine, &directory));
    // A start that fails leaves nothing either.
    let nowhere = [(
        "IMDS_ROUTER_SERVE_ADMIN_SOCKET".to_owned(),
        "/proc/nowhere/admin.sock".to_owned(),
    )];
    let (code, output) = Daemon::start_in_vain(engine, ACCOUNT, &nowhere);
    assert_eq!(code, Some(1), "{output}");
    before.assert_same(&engine.network_at_rest());
    engine.host("ip", &["route", "del", "blackhole", "169.254.169.254/32"]);
}

fn what_is_removed_comes_back(engine: &Arc<Engine>) {
    let daemon = Daemon::start(engine, ACCOUNT, &engine.moto().daemon_environment());
    let app = engine.run("app").label("imds.role", "app").start();
    assert_eq!(app.get(LIST, &[]).body, "app");
    let whole = engine.snapshot_network();
    for removal in [
        &["ip", "addr", "del", "169.254.169.254/32", "dev", "lo"][..],
        &["ip", "route", "flush", "proto", "169"],
        &["nft", "delete", "table", "ip", "imds_router_guard"],
    ] {
        engine.host(removal[0], &removal[1..]);
        let removed = Instant::now();
        poll(Duration::from_secs(5), "interception put back", || {
            (engine.snapshot_network().lines_with("169.254.169.254").len() == whole.lines_with("169.254.169.254").len())
                .then_some(())
        });
        println!("{} put back after {:?} at most", removal.join(" "), removed.elapsed());
        assert_eq!(app.get(LIST, &[]).body, "app");
    }
    // And in the container's namespace. All in one shell, which does not wait for docker.
    let routes = || {
        let mut ip = app.intruder("ip");
        ip.args(["route", "show", "table", "all", "root", "169.254.169.254"]);
        // A new link may have another source address.
        let words = Done::of(ip).stdout;
        let is_source = |word: &str| word.starts_with("169.254.") && word != "169.254.169.254";
        let words: Vec<&str> = words.split_whitespace().filter(|it| !is_source(it)).collect();
        words.join(" ")
    };
    let whole = routes();
    assert!(whole.contains("dev imds0") && whole.contains("unreachable"), "{whole}");
    for removal in [
        "ip link del imds0",
        "ip link set imds0 down",
        "ip link set imds0 name other0",
        "ip route flush table 169",
        "ip rule del pref 1",
        "ip route del unreachable 169.254.169.254 table 169",
        "ip addr flush dev lo",
        "nft flush ruleset",
    ] {
        let mut sh = app.intruder("sh");
        sh.args(["-ec", removal]);
        Done::of(sh).ok();
        let removed = Instant::now();
        poll(Duration::from_secs(5), "the link to be restored", || {
            (routes() == whole && app.request("GET", LIST, &[]).ok()?.body == "app").then_some(())
        });
        println!("{removal}: restored after {:?} at most", removed.elapsed());
    }
    assert!(daemon.log().contains("put back"), "{}", daemon.log());
    daemon.stop();
}

fn intercept_by_itself(engine: &Arc<Engine>) {
    let program = env!("CARGO_BIN_EXE_imds-router");
    let before = engine.network_at_rest();
    let plan = engine.host(program, &["intercept", "plan"]);
    assert!(plan.contains("169.254.169.254/32"), "{plan}");
    before.assert_same(&engine.network_at_rest());
    let up = engine.host(program, &["intercept", "up"]);
    assert!(up.contains("169.254.169.254/32"), "{up}");
    let app = engine.run("app").label("imds.role", "app").start();
    assert!(
        app.request("GET", IMDS, &[])
            .expect_err("nobody serves")
            .connection_refused()
    );
    assert!(engine.host(program, &["intercept", "up"]).contains("there already"));
    // A daemon takes over what is there.
    let daemon = Daemon::start(engine, ACCOUNT, &engine.moto().daemon_environment());
    poll(Duration::from_secs(5), "the daemon", || {
        (app.request("GET", LIST, &[]).ok()?.body == "app").then_some(())
    });
    let mut down = engine.command(program);
    let done = crate::rig::Done::of({
        down.args(["intercept", "down"]);
        down
    });
    assert_eq!(done.status.code(), Some(1));
    assert!(done.fails().contains("another imds-router serves this host"));
    assert_eq!(app.get(LIST, &[]).body, "app");
    daemon.stop();
    drop(app);
    engine.host(program, &["intercept", "up"]);
    engine.host(program, &["intercept", "down"]);
    before.assert_same(&engine.network_at_rest());
}

/// Without base credentials the AWS chain would end at the instance metadata service: at the daemon itself.
fn never_its_own_customer(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let mut environment = moto.daemon_environment();
    environment.retain(|(name, _)| !name.contains("KEY"));
    let daemon = Daemon::start(engine, ACCOUNT, &environment);
    let app = engine.run("app").label("imds.role", "app").start();
    poll(Duration::from_secs(10), "the reason", || {
        let list = app.get(LIST, &[]);
        assert_eq!(list.status, 404);
        list.header("x-imds-router-hint")?
            .contains("no base credentials")
            .then_some(())
    });
    let status = daemon.status();
    assert!(
        status["refused_connections"].get("host").is_none(),
        "it has asked itself: {status}"
    );
    daemon.stop();
}

fn offline_is_marked_as_fake(engine: &Arc<Engine>) {
    let daemon = Daemon::start(
        engine,
        "region = \"eu-west-1\"\n[credentials]\nsource = \"offline\"",
        &[],
    );
    let app = engine.run("app").label("imds.role", "app").start();
    assert_eq!(app.get(LIST, &[]).body, "app");
    let document = app.get(&format!("{LIST}app"), &[]).body;
    assert!(document.contains("\"AccessKeyId\" : \"ASIAFAKE"), "{document}");
    let status = daemon.status();
    assert_eq!(status["source"], "offline");
    assert_eq!(status["containers"][0]["credentials"]["fake"], true);
    assert!(daemon.cli(&["status"]).ok().contains("(fake)"));
    assert!(daemon.log().contains("fake=true") && daemon.log().contains("credentials are fakes"));
    // The client of our own, from inside.
    assert_eq!(
        app.exec(&["/opt/imds-router", "get", "meta-data/placement/region"]),
        "eu-west-1"
    );
    let wrong = app.try_exec(&["/opt/imds-router", "get", "meta-data/nonsense"]);
    assert_eq!(wrong.status.code(), Some(1));
    assert!(wrong.fails().contains("status 404"));
    daemon.stop();
}

fn the_engine_comes_later(engine: &Arc<Engine>) {
    let app = engine.run("app").label("imds.role", "app").start();
    let moto = engine.moto();
    let intruder = app.intruder("curl");
    engine.kill();
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let status = daemon.status();
    assert_eq!(status["engine"]["state"], "away", "{status}");
    let reply = crate::rig::http::request(intruder, "GET", IMDS, &[]).expect("an answer");
    assert_eq!(reply.status, 503, "nothing is known yet");
    engine.restart();
    let back = Instant::now();
    poll(
        Duration::from_secs(5),
        "the first answer after the engine has come",
        || (app.request("GET", LIST, &[]).ok()?.body == "app").then_some(()),
    );
    println!("served {:?} after the engine has come", back.elapsed());
    daemon.stop();
}

fn the_engine_is_killed_under_load(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let daemon = Daemon::start(engine, ACCOUNT, &moto.daemon_environment());
    let known = engine.run("known").label("imds.role", "known").start();
    assert_eq!(known.get(LIST, &[]).body, "known");
    // One shell of the container's own, many requests: it must not need the engine, which will be away.
    let load = format!(
        "n=0; bad=0; while [ ! -e /tmp/stop ]; do n=$((n+1)); \
         [ \"$(curl -s --max-time 1 --noproxy '*' {IMDS})\" = known ] || bad=$((bad+1)); done; echo $n $bad > /tmp/sum; mv /tmp/sum /tmp/result"
    );
    known.exec(&["sh", "-c", &format!("({load}) >/dev/null 2>&1 &")]);
    for round in 0..2 {
        std::thread::sleep(Duration::from_millis(700));
        engine.kill();
        std::thread::sleep(Duration::from_millis(700));
        engine.restart();
        let back = Instant::now();
        let name = format!("new-{round}");
        let new = engine.run(&name).label("imds.role", &name).start();
        let started = Instant::now();
        poll(Duration::from_secs(2), "a new container", || {
            (new.request("GET", LIST, &[]).ok()?.body == name).then_some(())
        });
        assert!(
            started.elapsed() < Duration::from_secs(1),
            "served only {:?} after its start",
            started.elapsed()
        );
        println!(
            "started after the engine's return, served {:?} after that return",
            back.elapsed()
        );
    }
    let end = "touch /tmp/stop; while [ ! -e /tmp/result ]; do sleep 0.05; done; cat /tmp/result";
    let answers = known.exec(&["sh", "-c", end]);
    let (asked, failed) = answers.split_once(' ').expect("two numbers");
    println!("{asked} requests while the engine was killed twice, {failed} failed");
    assert_eq!(failed, "0", "of {asked} requests");
    assert!(
        asked.parse::<u32>().expect("a number") > 50,
        "{asked} requests are no load"
    );
    daemon.stop();
}
