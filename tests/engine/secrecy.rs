//! The last trial: nothing that any of them has produced holds a secret.

use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;

use crate::rig::{Daemon, Engine, Rig, poll};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let all = rig.clone();
    vec![rig.once("secrecy::no_secret_in_any_log_or_status", move |engine| {
        no_secret(&all, engine)
    })]
}

fn no_secret(rig: &Rig, engine: &Arc<Engine>) {
    // A whole job at the finest level, so that this trial says something when it is run alone.
    let moto = engine.moto();
    let account = "account_id = \"111122223333\"";
    let daemon = Daemon::start(engine, account, &moto.daemon_environment());
    let app = engine.run("app").label("imds.role", "app").start();
    let token = app.token();
    let headers = [("X-aws-ec2-metadata-token", token.as_str())];
    let document = app.get(&format!("{LIST}app"), &headers);
    assert!(document.body.contains("SecretAccessKey"), "{document:?}");
    daemon.status();
    daemon.cli(&["status"]).ok();
    daemon.cli(&["check"]);
    assert!(daemon.log().contains("TRACE"), "the daemon logs at its finest level");
    daemon.stop();
    let offline = Daemon::start(engine, "[credentials]\nsource = \"offline\"", &[]);
    let fake = poll(Duration::from_secs(5), "fake credentials", || {
        let document: serde_json::Value = serde_json::from_str(&app.get(&format!("{LIST}app"), &[]).body).ok()?;
        Some(["SecretAccessKey", "Token"].map(|key| document[key].as_str().expect("a text").to_owned()))
    });
    offline.status();
    offline.stop();

    let output = rig.all_output();
    let mut secrets: Vec<String> = rig.secrets().into_iter().collect();
    assert!(secrets.len() >= 3, "there were secrets: base, key and token at least");
    secrets.push(token);
    secrets.extend(fake);
    for secret in &secrets {
        assert!(
            !output.contains(secret.as_str()),
            "a secret that begins with {secret:.4} is in a log"
        );
    }
}
