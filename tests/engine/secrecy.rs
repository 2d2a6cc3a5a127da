//! The last trial: nothing that any other has produced holds a secret.

use libtest_mimic::Trial;

use crate::rig::Rig;

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let rig_of_trial = rig.clone();
    vec![rig.alone("secrecy::no_secret_in_any_log_or_status", move || {
        no_secret(&rig_of_trial)
    })]
}

fn no_secret(rig: &Rig) {
    let output = rig.all_output();
    assert!(
        output.contains("TRACE") || output.contains("DEBUG"),
        "the daemons log at their finest level"
    );
    let secrets = rig.secrets();
    assert!(secrets.len() > 1, "there were secrets");
    for secret in &secrets {
        assert!(
            !output.contains(secret.as_str()),
            "a secret that begins with {:.4} is in a log",
            secret
        );
    }
    // Offline fakes are made of the same cloth: their secrets are not to be seen either.
    assert!(!output.contains("FAKE/"), "a fake secret key is in a log");
}
