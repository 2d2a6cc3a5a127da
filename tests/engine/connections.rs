//! Many clients in one container, each of which gets an answer.

use std::sync::Arc;

use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::cases::is_itself;
use crate::rig::{Container, Daemon, Engine, Rig, run_script, run_tool};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    [
        ("keeps_200_boto3_sessions", keeps_200_boto3_sessions as fn(&Arc<Engine>)),
        (
            "serves_150_javascript_clients_at_once",
            serves_150_javascript_clients_at_once,
        ),
        ("keeps_200_go_clients", keeps_200_go_clients),
        ("serves_100_forked_workers", serves_100_forked_workers),
        ("does_not_reset_pipelined_requests", does_not_reset_pipelined_requests),
        ("answers_small_writes_at_once", answers_small_writes_at_once),
    ]
    .map(|(name, trial)| rig.once(&format!("connections::{name}"), trial))
    .into()
}

/// A daemon, and a container that has credentials already.
pub fn served(engine: &Arc<Engine>, name: &str) -> (Daemon, Container) {
    let daemon = crate::cases::daemon(engine, "namespace");
    let container = engine.run(name).label("imds.role", name).start();
    is_itself(&container);
    (daemon, container)
}

/// Prints the result and checks how many clients have credentials.
#[track_caller]
fn all_have_credentials(result: &Value, count: u32) {
    println!("{result}");
    assert_eq!(result["credentials"], json!(count), "{result}");
}

fn keeps_200_boto3_sessions(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "sessions");
    all_have_credentials(&run_script(&container, "many.py", &["sessions", "200"]), 200);
    daemon.stop();
}

fn serves_150_javascript_clients_at_once(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "javascript");
    all_have_credentials(&run_script(&container, "many.mjs", &["150"]), 150);
    daemon.stop();
}

fn keeps_200_go_clients(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "go");
    all_have_credentials(&run_tool(&container, "sdk-go", &["credentials", "200"]), 200);
    daemon.stop();
}

fn serves_100_forked_workers(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "workers");
    all_have_credentials(&run_script(&container, "many.py", &["workers", "100"]), 100);
    daemon.stop();
}

/// A server that closes a connection with unread data in its buffer makes the kernel send a reset, which can destroy the
/// answer before the client has read it.
fn does_not_reset_pipelined_requests(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "pipelined");
    let answers = run_script(&container, "many.py", &["pipelined", "1000"]);
    println!("{answers}");
    assert_eq!(answers, json!({ "HTTP/1.1 200 OK": 1000 }));
    daemon.stop();
}

/// The kernel acknowledges small segments late as long as nobody reads them, and the proof waits for acknowledgments.
fn answers_small_writes_at_once(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "writes");
    let results = run_script(&container, "small_writes.py", &["100"]);
    println!("{results}");
    assert_eq!(results["answered"], json!(100), "{results}");
    // The delay of an acknowledgment is 40 ms.
    assert!(results["median_ms"].as_f64().is_some_and(|it| it < 20.0), "{results}");
    daemon.stop();
}
