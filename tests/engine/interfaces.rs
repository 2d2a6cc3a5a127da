//! What a program in a container sees of the link: a link without addresses, and nothing else.

use std::sync::Arc;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::{daemon, is_itself};
use crate::rig::{Engine, Rig, run_script, tools};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![rig.once("interfaces::only_lists_of_links_change", only_lists_of_links_change)]
}

fn only_lists_of_links_change(engine: &Arc<Engine>) {
    let network = engine.network_with_ipv6("interfaces6", "fd00:4ed::/64");
    let container = engine
        .run("interfaces")
        .label("imds.role", "interfaces")
        .network(network.name())
        .start();
    network.await_ipv6();
    let go = tools::directory().join("sdk-go").display().to_string();
    let list = || run_script(&container, "interfaces.py", &[&go]);
    let before = list();
    let daemon = daemon(engine, "namespace");
    is_itself(&container);
    let with = list();
    println!("before: {before}\nwith the daemon: {with}");
    for (name, value) in before.as_object().expect("an object") {
        let mut expected = value.clone();
        if name.ends_with("links") {
            expected.as_array_mut().expect("a list").push("imds0".into());
        }
        assert_eq!(sorted(&with[name]), sorted(&expected), "{name}");
    }
    daemon.stop();
    assert_eq!(list(), before);
}

/// The kernel lists links in the order of their numbers, which does not matter here.
fn sorted(list: &Value) -> Vec<String> {
    let mut texts: Vec<String> = list.as_array().expect("a list").iter().map(Value::to_string).collect();
    texts.sort();
    texts
}
