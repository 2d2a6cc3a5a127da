//! What the operator sees: HTTP/1.1 with JSON over a unix socket, and its own serialisable types.
//!
//! A socket with a file mode, not a port: containers in the host's network share the host's loopback.
//!
//! | path | answer |
//! |---|---|
//! | `GET /status` | [`Status`] |
//! | `GET /explain/CONTAINER` | [`Explanation`]; 404 if there is no such container |
//! | `GET /trust-policy/CONTAINER` | a list of [`Trust`]; 404 if there is no such container |
//! | `POST /modify/CONTAINER` | changes options by a [`Modify`]; [`Options`] that hold then |
//! | `POST /trigger/CONTAINER` | has a [`Trigger`] happen; the list of [`EventStatus`] |
//! | `GET /events/CONTAINER` | the list of [`EventStatus`] |
//! | `GET /identity-certificate` | a JSON string: the certificate in PEM |
//! | `GET /metrics` | what Prometheus reads |
//! | `GET /livez` | 200: the daemon runs |
//! | `GET /readyz` | 200 if it answers at the address, or stands by for who does; else 503; a sentence says which |
//! | `POST /login`, `POST /login/PROFILE` | takes over a [`Handover`]; 400 with a sentence if it does not |

mod client;
mod render;
mod server;

use std::collections::BTreeMap;

use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

pub use self::client::{
    AskError, ask_events, ask_explanation, ask_identity_certificate, ask_readiness, ask_status, ask_trust, hand_over,
    modify, trigger,
};
pub use self::render::{render, render_events, render_explanation, render_options, render_trust};
pub use self::server::{serve, serve_metrics};

/// Everything at one moment. Stable: scripts depend on it; fields are added, never renamed.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Status {
    /// Version of the daemon.
    pub version: String,
    /// How containers are reached: `host`.
    pub attach: String,
    /// How callers are proven: `full`.
    pub proof: String,
    /// Where credentials come from: `sts`, or `offline` (fakes).
    pub source: String,
    /// Address and port that the daemon listens on; clients ask port 80.
    pub listening: String,
    /// How it stands with the container engine.
    pub engine: EngineStatus,
    /// Region of containers that name none.
    pub region: String,
    /// Account of roles that are given by name, once it is known.
    pub account: Option<String>,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// Base credentials that somebody needs.
    #[serde(default)]
    pub bases: Vec<BaseStatus>,
    /// How wrong the clock seems to be.
    #[serde(default)]
    pub clock: ClockStatus,
    /// All containers, by name.
    pub containers: Vec<ContainerStatus>,
    /// Connections that were refused because nobody was proven, by reason.
    pub refused_connections: BTreeMap<String, u64>,
}

/// The container engine.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct EngineStatus {
    /// `away`, `synchronising` or `synchronised`.
    pub state: String,
    /// Why it is away.
    pub reason: Option<String>,
}

/// Whose credentials ask STS.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct BaseStatus {
    /// Profile; absent: the daemon's own.
    pub profile: Option<String>,
    /// `good`, `needs attention` or `failed`.
    pub state: String,
    /// Where they come from.
    pub origin: Option<String>,
    /// Who they are, as STS says it.
    pub arn: Option<String>,
    /// When they expire; absent: not at all, or nobody knows.
    pub until: Option<String>,
    /// Why there are none, or no new ones.
    pub error: Option<String>,
    /// What to type, where a person is needed.
    pub command: Option<String>,
}

/// The clock, against others. Seconds; positive: it is ahead.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct ClockStatus {
    /// Against AWS's own clock; absent: it has not answered yet.
    pub ahead_of_aws: Option<i64>,
    /// Against the machine's battery-backed clock, but for time zones; absent: there is none.
    pub ahead_of_rtc: Option<i64>,
    /// When it was set last, or the machine has slept, in UTC.
    pub last_shift: Option<String>,
    /// By how much it was set then.
    pub last_shift_seconds: Option<i64>,
    /// How long the machine had slept then, in seconds.
    pub last_sleep_seconds: Option<u64>,
}

/// What the trust policy of a role must say.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Trust {
    /// The role.
    pub role: String,
    /// The statement, as IAM writes it.
    pub statement: serde_json::Value,
}

/// Session credentials, as `aws configure export-credentials` prints them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Handover {
    /// `ASIA…`.
    pub access_key_id: String,
    /// The secret access key.
    pub secret_access_key: String,
    /// The session token.
    #[serde(default)]
    pub session_token: Option<String>,
    /// Until when they are good.
    #[serde(default)]
    pub expiration: Option<String>,
}

impl std::fmt::Debug for Handover {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "credentials {}", self.access_key_id)
    }
}

impl Handover {
    /// Reads what was piped in.
    ///
    /// # Errors
    /// When it is something else; nothing of it is in the message.
    pub fn read(text: &str) -> Result<Self, &'static str> {
        serde_json::from_str(text).map_err(|_| {
            "this is not what was expected: the JSON that `aws configure export-credentials` prints, with AccessKeyId, \
             SecretAccessKey, SessionToken and Expiration"
        })
    }
}

/// One container.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ContainerStatus {
    /// All 64 digits.
    pub id: String,
    /// Name.
    pub name: String,
    /// Addresses on all its networks.
    pub addresses: Vec<String>,
    /// Whether its first process is known and lives.
    pub alive: bool,
    /// `enabled`, or `disabled`: it gets 403.
    pub endpoint: String,
    /// `optional`, or `required`: IMDSv2 only.
    pub tokens: String,
    /// ARN of its role.
    pub role: Option<String>,
    /// Session name, as CloudTrail shows it.
    pub session_name: Option<String>,
    /// Profile whose base credentials ask for it, or are served; absent: the daemon's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// The rule of `[[allow]]` that let it have it; absent: there are no rules, or it has no role.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<String>,
    /// Its credentials, if it has a role.
    pub credentials: Option<CredentialStatus>,
    /// Its open connections.
    #[serde(default)]
    pub connections: ConnectionStatus,
    /// What was asked last.
    pub last_request: Option<RequestStatus>,
    /// What keeps it from what it asks for.
    pub problems: Vec<String>,
}

/// Connections of one container.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ConnectionStatus {
    /// Open now.
    pub open: usize,
    /// Open at once, at most. At the limit the connection that has been idle longest closes for a new one.
    pub limit: usize,
}

/// Credentials, without any secret.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CredentialStatus {
    /// `live`, `pending`, `expired` or `failed`.
    pub state: String,
    /// Access key id.
    pub key: Option<String>,
    /// They are well-formed and AWS does not know them.
    pub fake: bool,
    /// When they expire.
    pub until: Option<String>,
    /// Why the last try failed.
    pub error: Option<String>,
}

/// A request.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RequestStatus {
    /// When, in UTC.
    pub at: String,
    /// Status of the answer.
    pub status: u16,
}

/// How a request of one container is judged, step by step, and what was refused lately. Stable, as [`Status`] is.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Explanation {
    /// All 64 digits.
    pub id: String,
    /// Name.
    pub name: String,
    /// In the order in which a request meets them; the first that is not `ok` decides.
    pub steps: Vec<ExplainStep>,
    /// Connections that were refused and may have been this container's, the newest last.
    pub refused: Vec<RefusalStatus>,
}

/// One step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct ExplainStep {
    /// What is looked at.
    pub step: String,
    /// Whether a request gets past it.
    pub ok: bool,
    /// What is seen.
    pub seen: String,
}

/// A refused connection.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct RefusalStatus {
    /// When, in UTC.
    pub at: String,
    /// Address and port that it came from.
    pub client: String,
    /// Short name of the reason.
    pub reason: String,
    /// The evidence.
    pub evidence: String,
}

/// Instance metadata options to change, as EC2's ModifyInstanceMetadataOptions has them; what is absent stays.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Modify {
    /// Whether the container finds a metadata service.
    pub http_endpoint: Option<bool>,
    /// Whether it must use IMDSv2.
    pub http_tokens_required: Option<bool>,
    /// How many routers the answer with a token may pass: 1 to 64.
    pub http_put_response_hop_limit: Option<u8>,
    /// Whether it sees its tags.
    pub instance_metadata_tags: Option<bool>,
    /// Whether it is answered over IPv6.
    pub http_protocol_ipv6: Option<bool>,
}

/// Instance metadata options, in EC2's words. Stable, as [`Status`] is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Options {
    /// `enabled` or `disabled`.
    pub http_endpoint: String,
    /// `optional` or `required`.
    pub http_tokens: String,
    /// 1 to 64.
    pub http_put_response_hop_limit: u8,
    /// `enabled` or `disabled`.
    pub instance_metadata_tags: String,
    /// `enabled` or `disabled`.
    pub http_protocol_ipv6: String,
}

/// Something that is to happen to a container.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Trigger {
    /// `spot-interruption`, `rebalance`, `maintenance` or `lifecycle`.
    pub event: String,
    /// What it does; absent: the usual.
    pub action: Option<String>,
    /// In how many seconds; absent: the usual.
    pub in_seconds: Option<u64>,
    /// It is called off.
    pub cancel: bool,
    /// The container is really stopped when it happens.
    pub stop: bool,
}

/// Something that happens to a container. Stable, as [`Status`] is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EventStatus {
    /// `spot-interruption`, `rebalance`, `maintenance` or `lifecycle`.
    pub event: String,
    /// What it does.
    pub action: Option<String>,
    /// When, in UTC.
    pub at: String,
    /// Since when the container is told, in UTC.
    pub noticed: String,
    /// `not told yet`, `told`, `over` or `cancelled`.
    pub state: String,
    /// Whether the container is to be stopped then.
    pub stops: bool,
}

/// Why something is not done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ApiError {
    /// There is no such container, or several.
    NoContainer,
    /// What was asked for makes no sense: 400.
    Wrong(String),
    /// It failed: 500.
    Failed(String),
}

/// Makes the answers.
pub trait AdminApi: Send + Sync + 'static {
    /// Everything at this moment.
    fn status(&self) -> Status;
    /// One container: by name, by the beginning of its id, or by compose service. `None`: there is none, or several.
    fn explain(&self, container: &str) -> Option<Explanation>;
    /// What the trust policies of its roles must say. `None`: there is no such container, or several. An empty list: it has
    /// no role.
    fn trust(&self, container: &str) -> Option<Vec<Trust>>;
    /// Changes a container's options; answers those that hold then.
    ///
    /// # Errors
    /// Why not.
    fn modify(&self, container: &str, modify: &Modify) -> Result<Options, ApiError>;
    /// Has something happen to a container, or calls it off; answers all that is to happen to it.
    ///
    /// # Errors
    /// Why not.
    fn trigger(&self, container: &str, trigger: &Trigger) -> Result<Vec<EventStatus>, ApiError>;
    /// What is to happen to a container. `None`: there is no such container, or several.
    fn events(&self, container: &str) -> Option<Vec<EventStatus>>;
    /// The certificate that instance identities are signed by, in PEM.
    fn identity_certificate(&self) -> String;
    /// Takes over session credentials for `profile`, or for the daemon itself; answers what was taken.
    ///
    /// # Errors
    /// Why not.
    fn login(&self, profile: Option<&str>, handover: &Handover) -> Result<String, String>;
    /// What Prometheus reads, and its content type.
    fn metrics(&self) -> (&'static str, String);
    /// Whether the address is answered, in a sentence either way. Never asks AWS.
    fn readiness(&self) -> BoxFuture<'_, Result<String, String>>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_handed_over_is_read_and_never_shown() {
        let keys = r#""AccessKeyId":"ASIAX","SecretAccessKey":"the-secret""#;
        for (text, fits) in [
            (
                format!(
                    r#"{{"Version":1,{keys},"SessionToken":"the-token","Expiration":"2026-01-05T10:11:12+00:00"}}"#
                ),
                true,
            ),
            (format!("{{{keys}}}"), true),
            (format!(r#"{{{keys},"SessionToken":null}}"#), true),
            (r#"{"AccessKeyId":"ASIAX"}"#.to_owned(), false),
            (format!(r#"{{{keys},"SessionToken":["the-token"]}}"#), false),
            ("export AWS_SECRET_ACCESS_KEY=the-secret".to_owned(), false),
            (String::new(), false),
        ] {
            let read = Handover::read(&text);
            assert_eq!(read.is_ok(), fits, "{text}");
            let shown = format!("{read:?}");
            assert!(!shown.contains("the-secret") && !shown.contains("the-token"), "{shown}");
        }
    }
}
