//! What the operator sees: HTTP/1.1 with JSON over a unix socket, and its own serialisable types.
//!
//! A socket with a file mode, not a port: containers in the host's network share the host's loopback.
//!
//! | path | answer |
//! |---|---|
//! | `GET /status` | [`Status`] |
//! | `GET /explain/CONTAINER` | [`Explanation`]; 404 if there is no such container |

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};

use crate::telemetry::printable;

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
    /// What was asked last.
    pub last_request: Option<RequestStatus>,
    /// What keeps it from what it asks for.
    pub problems: Vec<String>,
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
    pub steps: Vec<Judgement>,
    /// Connections that were refused and may have been this container's, the newest last.
    pub refused: Vec<RefusalStatus>,
}

/// One step.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Judgement {
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

/// Makes the answers.
pub trait Observatory: Send + Sync + 'static {
    /// Everything at this moment.
    fn status(&self) -> Status;
    /// One container: by name, by the beginning of its id, or by compose service. `None`: there is none, or several.
    fn explain(&self, container: &str) -> Option<Explanation>;
}

/// Answers on the socket until the task is dropped.
pub async fn serve(listener: UnixListener, observatory: Arc<dyn Observatory>) {
    while let Ok((stream, _)) = listener.accept().await {
        let observatory = observatory.clone();
        tokio::spawn(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let reply = answer(&request, observatory.as_ref());
                async move { Ok::<_, std::convert::Infallible>(reply) }
            });
            // Whoever hangs up has seen enough.
            let _ = http1::Builder::new()
                .timer(TokioTimer::new())
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer(request: &Request<Incoming>, observatory: &dyn Observatory) -> Response<Full<Bytes>> {
    let path = percent_encoding::percent_decode_str(request.uri().path())
        .decode_utf8_lossy()
        .into_owned();
    let json = |value: serde_json::Result<Vec<u8>>| match value {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    };
    let absent = || (StatusCode::NOT_FOUND, b"{}".to_vec());
    let (status, body) = match (request.method(), path.strip_prefix("/explain/")) {
        (&Method::GET, None) if path == "/status" => json(serde_json::to_vec_pretty(&observatory.status())),
        (&Method::GET, Some(container)) => match observatory.explain(container) {
            Some(explanation) => json(serde_json::to_vec_pretty(&explanation)),
            None => absent(),
        },
        _ => absent(),
    };
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(
        hyper::header::CONTENT_TYPE,
        hyper::header::HeaderValue::from_static("application/json"),
    );
    response
}

/// Why the daemon did not answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error(
        "no imds-router answers on {path}\n\
         hint: is `imds-router serve` running? --admin names another socket; sudo, if it belongs to root"
    )]
    Unreachable {
        /// The socket.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// There is no such container.
    #[error(
        "no container, or more than one, is called {container:?}: expected a name, the beginning of an id, or a compose service\n\
         hint: imds-router status lists them"
    )]
    NoContainer {
        /// As typed.
        container: String,
    },
    /// Somebody listens who is not us.
    #[error("what listens on {path} does not answer as imds-router does: {what}")]
    Strange {
        /// The socket.
        path: String,
        /// What it did.
        what: String,
    },
}

/// Asks a daemon for its status.
///
/// # Errors
/// When none answers.
pub async fn ask_status(socket: &Path) -> Result<Status, AskError> {
    let strange = |what: String| AskError::Strange {
        path: socket.display().to_string(),
        what,
    };
    let (status, body) = ask(socket, "/status").await?;
    if status != StatusCode::OK {
        return Err(strange(format!("status {status}")));
    }
    serde_json::from_slice(&body).map_err(|error| strange(error.to_string()))
}

/// Asks a daemon how it judges a container.
///
/// # Errors
/// When none answers, or knows no such container.
pub async fn ask_explanation(socket: &Path, container: &str) -> Result<Explanation, AskError> {
    let name = percent_encoding::utf8_percent_encode(container, percent_encoding::NON_ALPHANUMERIC);
    let (status, body) = ask(socket, &format!("/explain/{name}")).await?;
    if status == StatusCode::NOT_FOUND {
        return Err(AskError::NoContainer {
            container: container.to_owned(),
        });
    }
    serde_json::from_slice(&body).map_err(|error| AskError::Strange {
        path: socket.display().to_string(),
        what: error.to_string(),
    })
}

async fn ask(socket: &Path, path: &str) -> Result<(StatusCode, Bytes), AskError> {
    let shown = socket.display().to_string();
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|source| AskError::Unreachable {
            path: shown.clone(),
            source,
        })?;
    let strange = |error: &dyn std::error::Error| AskError::Strange {
        path: shown.clone(),
        what: error.to_string(),
    };
    let (mut client, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| strange(&error))?;
    let connection = tokio::spawn(connection);
    let request = Request::get(path)
        .header(hyper::header::HOST, "imds-router")
        .body(Full::<Bytes>::default())
        .map_err(|error| strange(&error))?;
    let reply = client.send_request(request).await.map_err(|error| strange(&error))?;
    let status = reply.status();
    let body = reply
        .into_body()
        .collect()
        .await
        .map_err(|error| strange(&error))?
        .to_bytes();
    connection.abort();
    Ok((status, body))
}

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
