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

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tracing::warn;

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
pub enum NotDone {
    /// There is no such container, or several.
    NoContainer,
    /// What was asked for makes no sense: 400.
    Wrong(String),
    /// It failed: 500.
    Failed(String),
}

/// Makes the answers.
pub trait Observatory: Send + Sync + 'static {
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
    fn modify(&self, container: &str, modify: &Modify) -> Result<Options, NotDone>;
    /// Has something happen to a container, or calls it off; answers all that is to happen to it.
    ///
    /// # Errors
    /// Why not.
    fn trigger(&self, container: &str, trigger: &Trigger) -> Result<Vec<EventStatus>, NotDone>;
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

/// Answers on the socket until the task is dropped.
pub async fn serve(listener: UnixListener, observatory: Arc<dyn Observatory>) {
    loop {
        let stream = accepted(|| listener.accept()).await;
        tokio::spawn(converse(stream, observatory.clone(), |request, observatory| {
            Box::pin(answer(request, observatory))
        }));
    }
}

/// The next connection. An error is one of the moment (out of descriptors, mostly, which come back): it ends nothing.
async fn accepted<S, From, A>(accept: impl Fn() -> A) -> S
where
    A: Future<Output = io::Result<(S, From)>>,
{
    loop {
        match accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Answers what Prometheus and health checks ask, and nothing else, until the task is dropped.
pub async fn serve_metrics(listener: TcpListener, observatory: Arc<dyn Observatory>) {
    loop {
        let stream = accepted(|| listener.accept()).await;
        tokio::spawn(converse(stream, observatory.clone(), |request, observatory| {
            Box::pin(async move {
                let known = matches!(request.uri().path(), "/metrics" | "/livez" | "/readyz");
                match known && request.method() == Method::GET {
                    true => answer(request, observatory).await,
                    false => reply(StatusCode::NOT_FOUND, "text/plain", Vec::new()),
                }
            })
        }));
    }
}

/// One connection.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    observatory: Arc<dyn Observatory>,
    answer: impl for<'a> Fn(Request<Incoming>, &'a dyn Observatory) -> BoxFuture<'a, Response<Full<Bytes>>>,
) {
    let observatory = observatory.as_ref();
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(request, observatory);
        async move { Ok::<_, std::convert::Infallible>(answer.await) }
    });
    // Whoever hangs up has seen enough.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .serve_connection(TokioIo::new(stream), service)
        .await;
}

fn reply(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let content_type = hyper::header::HeaderValue::from_static(content_type);
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, content_type);
    response
}

/// The largest body of a request.
const MOST_BYTES: usize = 64 * 1024;

async fn answer(request: Request<Incoming>, observatory: &dyn Observatory) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let path = percent_encoding::percent_decode_str(parts.uri.path())
        .decode_utf8_lossy()
        .into_owned();
    let json = |value: serde_json::Result<Vec<u8>>| match value {
        Ok(body) => (StatusCode::OK, body),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
    };
    let absent = || (StatusCode::NOT_FOUND, b"{}".to_vec());
    let (verb, of) = match path.trim_start_matches('/').split_once('/') {
        Some((verb, of)) => (verb, Some(of)),
        None => (path.trim_start_matches('/'), None),
    };
    let (status, body) = match (&parts.method, verb, of) {
        (&Method::GET, "metrics", None) => {
            let (content_type, text) = observatory.metrics();
            return reply(StatusCode::OK, content_type, text.into_bytes());
        }
        (&Method::GET, "status", None) => json(serde_json::to_vec_pretty(&observatory.status())),
        (&Method::GET, "explain", Some(container)) => observatory
            .explain(container)
            .map_or_else(absent, |it| json(serde_json::to_vec_pretty(&it))),
        (&Method::GET, "trust-policy", Some(container)) => observatory
            .trust(container)
            .map_or_else(absent, |it| json(serde_json::to_vec_pretty(&it))),
        (&Method::GET, "identity-certificate", None) => json(serde_json::to_vec(&observatory.identity_certificate())),
        (&Method::GET, "events", Some(container)) => observatory
            .events(container)
            .map_or_else(absent, |it| json(serde_json::to_vec_pretty(&it))),
        (&Method::POST, "modify", Some(container)) => {
            let asked = serde_json::from_slice(&whole(body).await).map_err(|error| NotDone::Wrong(error.to_string()));
            done(asked.and_then(|modify| observatory.modify(container, &modify)))
        }
        (&Method::POST, "trigger", Some(container)) => {
            let asked = serde_json::from_slice(&whole(body).await).map_err(|error| NotDone::Wrong(error.to_string()));
            done(asked.and_then(|trigger| observatory.trigger(container, &trigger)))
        }
        (&Method::GET, "livez", None) => (StatusCode::OK, b"alive".to_vec()),
        (&Method::GET, "readyz", None) => match observatory.readiness().await {
            Ok(said) => (StatusCode::OK, said.into_bytes()),
            Err(why) => (StatusCode::SERVICE_UNAVAILABLE, why.into_bytes()),
        },
        (&Method::POST, "login", profile) => {
            let text = whole(body).await;
            let taken = Handover::read(&String::from_utf8_lossy(&text))
                .map_err(str::to_owned)
                .and_then(|handover| observatory.login(profile, &handover));
            match taken {
                Ok(said) => (StatusCode::OK, said.into_bytes()),
                Err(why) => (StatusCode::BAD_REQUEST, why.into_bytes()),
            }
        }
        _ => absent(),
    };
    reply(status, "application/json", body)
}

/// A body, or nothing where it is too large or breaks off.
async fn whole(body: Incoming) -> Bytes {
    let body = Limited::new(body, MOST_BYTES).collect().await;
    body.map(|body| body.to_bytes()).unwrap_or_default()
}

fn done<T: Serialize>(done: Result<T, NotDone>) -> (StatusCode, Vec<u8>) {
    match done {
        Ok(done) => match serde_json::to_vec_pretty(&done) {
            Ok(body) => (StatusCode::OK, body),
            Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string().into_bytes()),
        },
        Err(NotDone::NoContainer) => (StatusCode::NOT_FOUND, b"{}".to_vec()),
        Err(NotDone::Wrong(why)) => (StatusCode::BAD_REQUEST, why.into_bytes()),
        Err(NotDone::Failed(why)) => (StatusCode::INTERNAL_SERVER_ERROR, why.into_bytes()),
    }
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
    /// It did not do what was asked for.
    #[error("not done: {0}")]
    NotDone(String),
    /// It does not serve.
    #[error("not ready: {0}\nhint: imds-router doctor says what is wrong on this host")]
    NotReady(String),
    /// It did not take what was handed over.
    #[error("not taken over: {0}")]
    NotTaken(String),
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
    ask_for(socket, "/status").await
}

/// Asks a daemon for the certificate that instance identities are signed by, in PEM.
///
/// # Errors
/// When none answers.
pub async fn ask_identity_certificate(socket: &Path) -> Result<String, AskError> {
    ask_for(socket, "/identity-certificate").await
}

async fn ask_for<T: serde::de::DeserializeOwned>(socket: &Path, path: &str) -> Result<T, AskError> {
    let strange = |what: String| AskError::Strange {
        path: socket.display().to_string(),
        what,
    };
    let (status, body) = ask(socket, path).await?;
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
    ask_about(socket, "explain", container).await
}

/// Asks a daemon what the trust policies of a container's roles must say.
///
/// # Errors
/// When none answers, or knows no such container.
pub async fn ask_trust(socket: &Path, container: &str) -> Result<Vec<Trust>, AskError> {
    ask_about(socket, "trust-policy", container).await
}

/// Hands over session credentials for `profile`, or for the daemon itself; answers what was taken.
///
/// # Errors
/// When no daemon answers, or it does not take them.
pub async fn hand_over(socket: &Path, profile: Option<&str>, handover: &Handover) -> Result<String, AskError> {
    let strange = |what: String| AskError::Strange {
        path: socket.display().to_string(),
        what,
    };
    let profile = profile
        .map(|profile| format!("/{}", encoded(profile)))
        .unwrap_or_default();
    let body = serde_json::to_vec(handover).map_err(|error| strange(error.to_string()))?;
    let (status, said) = send(socket, Method::POST, &format!("/login{profile}"), body.into()).await?;
    let said = printable(&String::from_utf8_lossy(&said), 400);
    match status {
        StatusCode::OK => Ok(said),
        StatusCode::BAD_REQUEST => Err(AskError::NotTaken(said)),
        status => Err(strange(format!("status {status}"))),
    }
}

/// Has a daemon change a container's options; answers those that hold then.
///
/// # Errors
/// When none answers, knows no such container, or does not do it.
pub async fn modify(socket: &Path, container: &str, modify: &Modify) -> Result<Options, AskError> {
    order(socket, "modify", container, modify).await
}

/// Has a daemon let something happen to a container; answers all that is to happen to it.
///
/// # Errors
/// When none answers, knows no such container, or does not do it.
pub async fn trigger(socket: &Path, container: &str, trigger: &Trigger) -> Result<Vec<EventStatus>, AskError> {
    order(socket, "trigger", container, trigger).await
}

/// Asks a daemon what is to happen to a container.
///
/// # Errors
/// When none answers, or knows no such container.
pub async fn ask_events(socket: &Path, container: &str) -> Result<Vec<EventStatus>, AskError> {
    ask_about(socket, "events", container).await
}

async fn order<T: serde::de::DeserializeOwned>(
    socket: &Path,
    what: &str,
    container: &str,
    order: &impl Serialize,
) -> Result<T, AskError> {
    let strange = |what: String| AskError::Strange {
        path: socket.display().to_string(),
        what,
    };
    let body = serde_json::to_vec(order).map_err(|error| strange(error.to_string()))?;
    let path = format!("/{what}/{}", encoded(container));
    let (status, said) = send(socket, Method::POST, &path, body.into()).await?;
    match status {
        StatusCode::OK => serde_json::from_slice(&said).map_err(|error| strange(error.to_string())),
        StatusCode::NOT_FOUND => Err(AskError::NoContainer {
            container: container.to_owned(),
        }),
        _ => Err(AskError::NotDone(printable(&String::from_utf8_lossy(&said), 400))),
    }
}

/// Asks a daemon whether it serves; what it says of that.
///
/// # Errors
/// When none answers, or it does not serve.
pub async fn ask_readiness(socket: &Path) -> Result<String, AskError> {
    let (status, said) = ask(socket, "/readyz").await?;
    let said = printable(&String::from_utf8_lossy(&said), 400);
    match status {
        StatusCode::OK => Ok(said),
        _ => Err(AskError::NotReady(said)),
    }
}

fn encoded(text: &str) -> percent_encoding::PercentEncode<'_> {
    percent_encoding::utf8_percent_encode(text, percent_encoding::NON_ALPHANUMERIC)
}

async fn ask_about<T: serde::de::DeserializeOwned>(socket: &Path, what: &str, container: &str) -> Result<T, AskError> {
    let (status, body) = ask(socket, &format!("/{what}/{}", encoded(container))).await?;
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
    send(socket, Method::GET, path, Bytes::new()).await
}

async fn send(socket: &Path, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), AskError> {
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
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(hyper::header::HOST, "imds-router")
        .body(Full::new(body))
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
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_cannot_be_accepted_ends_nothing() {
        let tries = std::sync::atomic::AtomicU32::new(0);
        let next = accepted(
            async || match tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0 | 1 => Err(io::Error::other("too many open files")),
                number => Ok((number, ())),
            },
        );
        assert_eq!(next.await, 2);
    }

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
