//! Many namespaces, and many who ask what they may not. `IMDS_TRIALS_ROUNDS` scales (500: five hundred namespaces).

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{daemon, is_itself};
use crate::rig::hostile::last_line;
use crate::rig::{BOX, Container, Daemon, Done, Engine, Rig, poll, rounds};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("load::namespaces", namespaces),
        rig.once("load::a_flood_of_the_unproven", a_flood_of_the_unproven),
    ]
}

/// What one served namespace takes of the daemon: descriptors, memory, and time after a start.
fn namespaces(engine: &Arc<Engine>) {
    let many = rounds(20);
    let alone = {
        let daemon = daemon(engine, "namespace");
        let taken = Taken::by(&daemon);
        daemon.stop();
        taken
    };
    let containers: Vec<Container> = (0..many)
        .map(|number| {
            let run = engine.run(&format!("ns-{number}")).bare_image(BOX);
            run.label("imds.role", "app").network("none").start()
        })
        .collect();
    // What a daemon takes that knows them and serves nobody.
    let idle = {
        let config = "[imds]\nhttp_endpoint = \"disabled\"";
        let daemon = Daemon::start(engine, config, &engine.moto().daemon_environment());
        poll(Duration::from_secs(20), "all lives to be known", || {
            let status = daemon.status();
            let all = status["containers"].as_array().expect("a list");
            (all.iter().filter(|it| it["alive"] == true).count() >= many as usize).then_some(())
        });
        let taken = Taken::by(&daemon);
        daemon.stop();
        taken
    };
    let started = Instant::now();
    let daemon = daemon(engine, "namespace");
    let is_connected = |container: &Container| {
        let mut ip = container.intruder("ip");
        ip.args(["route", "get", "169.254.169.254", "ipproto", "tcp"]);
        Done::of(ip).stdout.contains("dev imds0")
    };
    // The last that was started is as a rule the last that is served; then all of them are looked at.
    poll(Duration::from_secs(60), "the last namespace to be served", || {
        containers.last().is_none_or(is_connected).then_some(())
    });
    let took = started.elapsed();
    poll(Duration::from_secs(60), "all namespaces to be served", || {
        containers.iter().all(is_connected).then_some(())
    });
    let served = Taken::by(&daemon);
    let each = f64::from(many);
    println!(
        "{many} namespaces: served {took:?} after the start, {:.1} descriptors and {:.1} kB each (known, but not served: \
         {:.1} descriptors); {} threads",
        (served.descriptors as f64 - alone.descriptors as f64) / each,
        (served.kilobytes as f64 - idle.kilobytes as f64) / each,
        (idle.descriptors as f64 - alone.descriptors as f64) / each,
        served.threads,
    );
    assert!(
        served.descriptors < 64 + 8 * many as usize,
        "{} descriptors",
        served.descriptors
    );
    daemon.stop();
    assert!(!containers.iter().any(is_connected), "a link is left");
}

struct Taken {
    descriptors: usize,
    kilobytes: u64,
    threads: u64,
}

impl Taken {
    fn by(daemon: &Daemon) -> Taken {
        let process = format!("/proc/{}", daemon.pid());
        let status = fs::read_to_string(format!("{process}/status")).expect("it runs");
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            number.unwrap_or_else(|| panic!("no {name} in {status}"))
        };
        Taken {
            descriptors: fs::read_dir(format!("{process}/fd")).expect("it runs").count(),
            kilobytes: field("VmRSS:"),
            threads: field("Threads:"),
        }
    }
}

/// How long others wait while processes of the host, who are nobody, ask as fast as they can.
fn a_flood_of_the_unproven(engine: &Arc<Engine>) {
    const ASK: &str = "
import json, socket, sys, time
end, took = time.monotonic() + float(sys.argv[1]), []
while time.monotonic() < end:
    began = time.monotonic()
    s = socket.create_connection(('169.254.169.254', 80), 5)
    s.sendall(b'GET /latest/meta-data/instance-id HTTP/1.1\\r\\nHost: 169.254.169.254\\r\\nConnection: close\\r\\n\\r\\n')
    data = b''
    while chunk := s.recv(4096): data += chunk
    assert b' 200 ' in data[:15], data
    took.append(time.monotonic() - began)
    time.sleep(0.002)
took.sort()
at = lambda share: took[int((len(took) - 1) * share)] * 1000
print(json.dumps({'asked': len(took), 'p50': at(0.5), 'p99': at(0.99), 'max': at(1)}))
";
    const FLOOD: &str = "
import json, socket, sys, time
end, asked, refused = time.monotonic() + float(sys.argv[1]), 0, 0
while time.monotonic() < end:
    try:
        s = socket.create_connection(('169.254.169.254', 80), 1)
        s.sendall(b'GET /latest/meta-data/instance-id HTTP/1.1\\r\\nHost: 169.254.169.254\\r\\n\\r\\n')
        asked += 1
        refused += b' 403 ' in s.recv(4096)[:15]
        s.close()
    except OSError:
        pass
print(json.dumps({'asked': asked, 'refused': refused}))
";
    const SECONDS: &str = "4";
    for attach in ["namespace", "host"] {
        let daemon = daemon(engine, attach);
        let victim = engine.run("asking").label("imds.role", "asking").start();
        is_itself(&victim);
        let ask = || last_line(&victim.exec(&["/usr/bin/python3", "-c", ASK, SECONDS]));
        let alone = ask();
        let flooding: Vec<_> = (0..4)
            .map(|_| {
                let mut flood = engine.command("/usr/bin/python3");
                flood.args(["-c", FLOOD, SECONDS]);
                std::thread::spawn(move || last_line(&Done::of(flood).ok()))
            })
            .collect();
        let flooded = ask();
        let floods: Vec<Value> = flooding
            .into_iter()
            .map(|flood| flood.join().expect("a flood"))
            .collect();
        let sum = |name: &str| -> u64 { floods.iter().filter_map(|it| it[name].as_u64()).sum() };
        println!(
            "flood | attach {attach} | alone {alone}, beside {} unproven requests ({} refused) in {SECONDS} s {flooded}",
            sum("asked"),
            sum("refused")
        );
        assert!(sum("asked") > 100 && sum("refused") > 0, "{floods:?}");
        // Two cores, shared with those who flood: what counts is that nobody waits until they have ended.
        assert!(flooded["max"].as_f64().is_some_and(|max| max < 400.0), "{flooded}");
        daemon.stop();
    }
}
