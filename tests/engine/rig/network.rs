//! What the network of a host looks like, in a form that two looks can be compared by.

use std::collections::BTreeSet;
use std::fmt;

use serde_json::Value;

use super::engine::Engine;

/// Links, addresses, routes and firewall rules, one per line, without what changes by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(Vec<String>);

impl Snapshot {
    #[track_caller]
    pub(super) fn take(engine: &Engine) -> Snapshot {
        let mut lines = Vec::new();
        for (what, arguments) in [
            ("address", &["-j", "addr"][..]),
            ("link", &["-j", "link"]),
            ("route", &["-4", "-j", "route", "show", "table", "all"]),
            ("route6", &["-6", "-j", "route", "show", "table", "all"]),
        ] {
            let text = engine.host("ip", arguments);
            let rows: Value = serde_json::from_str(&text)
                .unwrap_or_else(|e| panic!("ip {arguments:?} printed no JSON ({e}): {text}"));
            let rows = rows.as_array().into_iter().flatten();
            let mut rows: Vec<String> = rows
                .map(|row| format!("{what} {}", without_passing_state(row.clone())))
                .collect();
            rows.sort(); // the kernel's order is the order of making
            lines.extend(rows);
        }
        let rules = engine.host("nft", &["list", "ruleset"]);
        let rules = rules.lines().filter(|line| !line.starts_with('#'));
        lines.extend(rules.map(|line| format!("nft {}", without_counts(line))));
        Snapshot(lines)
    }

    /// The lines that contain `text`.
    pub fn lines_with(&self, text: &str) -> Vec<&str> {
        let lines = self.0.iter().map(String::as_str);
        lines.filter(|line| line.contains(text)).collect()
    }

    /// Without the IPv6 routes and addresses of a link.
    pub fn without_ipv6_of(mut self, link: &str) -> Snapshot {
        self.0
            .retain(|line| !(line.starts_with("route6 ") && line.contains(link)));
        for line in self.0.iter_mut().filter(|line| line.contains(link)) {
            let json = line
                .strip_prefix("address ")
                .and_then(|it| serde_json::from_str(it).ok());
            let Some(mut shown): Option<serde_json::Value> = json else {
                continue;
            };
            if let Some(addresses) = shown["addr_info"].as_array_mut() {
                addresses.retain(|address| address["family"] != "inet6");
                *line = format!("address {shown}");
            }
        }
        self
    }

    /// Fails with the difference when `later` is not the same.
    #[track_caller]
    pub fn assert_same(&self, later: &Snapshot) {
        let (before, after): (BTreeSet<_>, BTreeSet<_>) = (self.0.iter().collect(), later.0.iter().collect());
        let gone = before.difference(&after).map(|line| format!("- {line}"));
        let new = after.difference(&before).map(|line| format!("+ {line}"));
        let difference: Vec<String> = gone.chain(new).collect();
        assert!(
            self == later,
            "the network is not as it was:\n{}",
            if difference.is_empty() {
                "(the same lines in another order)".to_owned()
            } else {
                difference.join("\n")
            }
        );
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

/// Duplicate address detection of a new address ends by itself, a while later.
fn without_passing_state(mut row: Value) -> Value {
    let addresses = row.get_mut("addr_info").and_then(Value::as_array_mut);
    for address in addresses.into_iter().flatten() {
        if let Some(address) = address.as_object_mut() {
            address.remove("tentative");
            address.remove("dadfailed");
        }
    }
    row
}

/// `counter packets 3 bytes 180` → `counter`: traffic goes on.
fn without_counts(line: &str) -> String {
    let mut words = line.split(' ').peekable();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        kept.push(word);
        if word.trim_start() == "counter" && words.peek() == Some(&"packets") {
            for _ in 0..4 {
                words.next();
            }
        }
    }
    kept.join(" ")
}
