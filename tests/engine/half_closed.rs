//! Clients that close their half of the connection after the request, as every netcat in a pipe does.

use std::sync::Arc;

use libtest_mimic::Trial;
use serde_json::json;

use crate::connections::served;
use crate::rig::{Engine, Rig, run_script};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![rig.once("half_closed::answers_each_netcat", answers_each_netcat)]
}

fn answers_each_netcat(engine: &Arc<Engine>) {
    let (daemon, container) = served(engine, "netcat");
    let results = run_script(&container, "half_closed.py", &["50"]);
    println!("{results}");
    for program in ["busybox nc", "ncat", "socat", "openbsd nc"] {
        let expected = json!({ "tokens": 50, "credentials": 50 });
        assert_eq!(results[program], expected, "{program}: {results}");
    }
    daemon.stop();
}
