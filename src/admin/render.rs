//! What people read.

use std::fmt::Write as _;

use super::{BaseStatus, CredentialStatus, EventStatus, Explanation, Options, Status, Trust};
use crate::logging::printable;

/// An explanation for people.
pub fn render_explanation(explanation: &Explanation) -> String {
    let mut text = format!(
        "{} ({})\n",
        printable(&explanation.name, 60),
        &explanation.id[..explanation.id.len().min(12)]
    );
    for judgement in &explanation.steps {
        let sign = if judgement.ok { "ok " } else { "NO " };
        text.push_str(&format!(
            "  {sign} {:<12} {}\n",
            judgement.step,
            printable(&judgement.seen, 400)
        ));
    }
    for refusal in &explanation.refused {
        let evidence = printable(&refusal.evidence, 400);
        text.push_str(&format!(
            "  refused at {} from {}: {evidence}\n",
            refusal.at, refusal.client
        ));
    }
    text
}

/// A status for people.
pub fn render(status: &Status) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        text,
        "imds-router {}  attach {}  proof {}  credentials {}  region {}  account {}\nlistening on {}  engine {}{}",
        status.version,
        status.attach,
        status.proof,
        if status.source == "offline" {
            "offline (fake)"
        } else {
            &status.source
        },
        status.region,
        status.account.as_deref().unwrap_or("not known yet"),
        status.listening,
        status.engine.state,
        status
            .engine
            .reason
            .as_ref()
            .map(|why| format!(": {}", printable(why, 200)))
            .unwrap_or_default(),
    );
    for base in &status.bases {
        let _ = writeln!(text, "base {}", shown_base(base));
    }
    if let Some(at) = &status.clock.last_shift {
        let _ = writeln!(
            text,
            "clock set by {} s at {at}, after a sleep of {} s",
            status.clock.last_shift_seconds.unwrap_or(0),
            status.clock.last_sleep_seconds.unwrap_or(0)
        );
    }
    for warning in &status.warnings {
        let _ = writeln!(text, "warning: {warning}");
    }
    if !status.refused_connections.is_empty() {
        let counts: Vec<_> = status
            .refused_connections
            .iter()
            .map(|(why, count)| format!("{why} {count}"))
            .collect();
        let _ = writeln!(text, "refused connections: {}", counts.join(", "));
    }
    let mut rows = vec![["CONTAINER", "ADDRESSES", "ROLE", "CREDENTIALS", "LAST REQUEST"].map(str::to_owned)];
    let mut problems = Vec::new();
    for container in &status.containers {
        rows.push([
            printable(&container.name, 40),
            if container.alive {
                or_dash(container.addresses.join(" "))
            } else {
                "not running".to_owned()
            },
            match &container.role {
                Some(role) => role.clone(),
                None if container.endpoint == "disabled" => "not served (403)".to_owned(),
                None => "-".to_owned(),
            },
            container
                .credentials
                .as_ref()
                .map_or_else(|| "-".to_owned(), shown_credentials),
            container
                .last_request
                .as_ref()
                .map_or_else(|| "-".to_owned(), |it| format!("{} {}", it.at, it.status)),
        ]);
        problems.extend(
            container
                .problems
                .iter()
                .map(|why| format!("{}: {}", printable(&container.name, 40), printable(why, 400))),
        );
    }
    let widths: Vec<usize> = (0..5)
        .map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0))
        .collect();
    text.push('\n');
    for row in &rows {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    if !problems.is_empty() {
        let _ = writeln!(text, "\n{}", problems.join("\n"));
    }
    text
}

fn shown_base(base: &BaseStatus) -> String {
    let profile = base.profile.as_deref().map_or("(the daemon's own)", |profile| profile);
    let mut text = format!("{}: {}", printable(profile, 60), base.state);
    if let Some(arn) = &base.arn {
        text.push_str(&format!(", {}", printable(arn, 200)));
    }
    if let Some(origin) = &base.origin {
        text.push_str(&format!(", by {}", printable(origin, 200)));
    }
    if let Some(until) = &base.until {
        text.push_str(&format!(", until {until}"));
    }
    if let Some(error) = &base.error {
        text.push_str(&format!(", {}", printable(error, 400)));
    }
    text
}

/// What is to happen to a container, for people.
pub fn render_events(events: &[EventStatus]) -> String {
    let mut text = String::new();
    for event in events {
        let action = event
            .action
            .as_ref()
            .map(|action| format!(" {action}"))
            .unwrap_or_default();
        text.push_str(&format!("{}{action} at {}: {}", event.event, event.at, event.state));
        if event.state == "not told yet" {
            text.push_str(&format!(", told from {}", event.noticed));
        }
        if event.stops {
            text.push_str(", and really stops it");
        }
        text.push('\n');
    }
    if text.is_empty() {
        text.push_str("nothing is to happen to it\n");
    }
    text
}

/// Options for people.
pub fn render_options(options: &Options) -> String {
    format!(
        "http-endpoint {}\nhttp-tokens {}\nhttp-put-response-hop-limit {}\ninstance-metadata-tags {}\nhttp-protocol-ipv6 {}\n",
        options.http_endpoint,
        options.http_tokens,
        options.http_put_response_hop_limit,
        options.instance_metadata_tags,
        options.http_protocol_ipv6
    )
}

/// Trust policies for people: each is JSON that IAM takes.
pub fn render_trust(trust: &[Trust]) -> String {
    let mut text = String::new();
    for trust in trust {
        let statement = serde_json::to_string_pretty(&trust.statement).unwrap_or_default();
        text.push_str(&format!(
            "{} must have this statement in its trust policy:\n{statement}\n",
            printable(&trust.role, 200)
        ));
    }
    text
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn shown_credentials(credentials: &CredentialStatus) -> String {
    let fake = if credentials.fake { " (fake)" } else { "" };
    match (&credentials.until, &credentials.error) {
        (Some(until), None) => format!("{} until {until}{fake}", credentials.state),
        (Some(until), Some(error)) => format!(
            "{} until {until}{fake}, but: {}",
            credentials.state,
            printable(error, 200)
        ),
        (None, Some(error)) => format!("{}: {}", credentials.state, printable(error, 200)),
        (None, None) => credentials.state.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::{ClockStatus, ConnectionStatus, ContainerStatus, EngineStatus, RequestStatus};
    use super::*;

    #[test]
    fn a_status_for_people() {
        let status = Status {
            version: "1.2.3".into(),
            attach: "host".into(),
            proof: "full".into(),
            source: "offline".into(),
            listening: "169.254.169.254:51254".into(),
            engine: EngineStatus {
                state: "away".into(),
                reason: Some("no\nsocket".into()),
            },
            region: "eu-west-1".into(),
            account: None,
            warnings: vec!["w".into()],
            bases: vec![BaseStatus {
                profile: Some("dev".into()),
                state: "needs attention".into(),
                error: Some("its login has expired".into()),
                ..BaseStatus::default()
            }],
            clock: ClockStatus {
                last_shift: Some("2026-01-05T08:11:12Z".into()),
                last_shift_seconds: Some(-36_000),
                last_sleep_seconds: Some(7),
                ..ClockStatus::default()
            },
            containers: vec![ContainerStatus {
                id: "ab".repeat(32),
                name: "web\u{1b}[2J".into(),
                addresses: vec!["172.17.0.2".into()],
                alive: true,
                endpoint: "enabled".into(),
                tokens: "optional".into(),
                role: Some("arn:aws:iam::000000000000:role/web".into()),
                session_name: Some("web@h".into()),
                profile: None,
                rule: None,
                credentials: Some(CredentialStatus {
                    state: "live".into(),
                    key: Some("ASIAFAKE".into()),
                    fake: true,
                    until: Some("2026-01-05T10:11:12Z".into()),
                    error: None,
                }),
                connections: ConnectionStatus { open: 3, limit: 64 },
                last_request: Some(RequestStatus {
                    at: "2026-01-05T09:11:12Z".into(),
                    status: 200,
                }),
                problems: vec!["p".into()],
            }],
            refused_connections: BTreeMap::from([("no-socket".into(), 3)]),
        };
        let text = render(&status);
        assert!(!text.contains('\u{1b}'));
        for part in [
            "credentials offline (fake)",
            "engine away: no\\u{a}socket",
            "warning: w",
            "base dev: needs attention, its login has expired",
            "clock set by -36000 s at 2026-01-05T08:11:12Z, after a sleep of 7 s",
            "refused connections: no-socket 3",
            "live until 2026-01-05T10:11:12Z (fake)",
            "2026-01-05T09:11:12Z 200",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        let json = serde_json::to_string(&status).unwrap();
        assert_eq!(serde_json::from_str::<Status>(&json).unwrap(), status);
    }
}
