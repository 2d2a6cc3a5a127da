//! How fast requests are answered, in process: `cargo test --release --test throughput`. Two figures of one run: requests a
//! second on one connection for `instance-id`, with a token; and the slowest path of the whole tree.

#![allow(clippy::unwrap_used, reason = "a test")]
#![allow(dead_code, reason = "what others use of the script")]

#[path = "conformance/mod.rs"]
mod conformance;
#[path = "daemon/script.rs"]
mod script;

use std::time::{Duration, Instant};

use script::{Client, Daemon, settings};

const PATH: &str = "/latest/meta-data/instance-id";
/// A connection takes a thousand.
const TOGETHER: u32 = 900;
/// The slowest path may take so long, half of the times that it is asked.
const MOST: Duration = Duration::from_millis(1);

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let daemon = Daemon::start(settings());
        daemon.synchronised().await;
        let address = daemon.run(1, &[("imds.role", "app")]).await;
        let token = daemon.connect(1, address).token(600).await;
        let headers = [("X-aws-ec2-metadata-token", token.as_str())];
        let mut best = 0.0_f64;
        for _ in 0..30 {
            let mut client = daemon.connect(1, address).keep_alive();
            client.send("GET", PATH, &headers).await.unwrap();
            let start = Instant::now();
            for _ in 0..TOGETHER {
                let reply = client.send("GET", PATH, &headers).await.unwrap();
                assert_eq!(reply.status, 200);
            }
            best = best.max(f64::from(TOGETHER) / start.elapsed().as_secs_f64());
        }
        println!("{best:.0} requests a second for instance-id");
        let mut paths = Vec::new();
        list(&mut daemon.connect(1, address).keep_alive(), "/latest/", &mut paths).await;
        assert!(paths.len() > 10, "{paths:?}");
        let mut client = daemon.connect(1, address).keep_alive();
        let mut slowest = (Duration::ZERO, String::new());
        for path in paths {
            let mut times = Vec::new();
            for _ in 0..9 {
                let start = Instant::now();
                let reply = client.send("GET", &path, &headers).await.unwrap();
                times.push(start.elapsed());
                assert_eq!(reply.status, 200, "{path}");
            }
            times.sort();
            slowest = slowest.max((times[4], path));
        }
        println!("the slowest path: {} in {:?}", slowest.1, slowest.0);
        assert!(slowest.0 < MOST);
    });
    println!("2 passed, 0 failed");
}

/// Every path that is listed.
async fn list(client: &mut Client, root: &str, paths: &mut Vec<String>) {
    let mut dirs = vec![root.to_owned()];
    while let Some(dir) = dirs.pop() {
        let listing = client.get(&dir).await.unwrap().text();
        for name in listing.lines() {
            let path = format!("{dir}{}", name.split('=').next().unwrap());
            if name.ends_with('/') || name.contains('=') || (dir == root && name != "user-data") {
                dirs.push(format!("{}/", path.trim_end_matches('/')));
            }
            paths.push(path);
        }
    }
}
