//! Answers on the socket, and what Prometheus asks on a loopback port.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
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
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::AbortHandle;
use tokio::time::timeout;
use tracing::warn;

use super::{AdminApi, ApiError, Handover};
use crate::descriptors;

/// Answers on the socket until the task is dropped.
pub async fn serve(listener: UnixListener, api: Arc<dyn AdminApi>) {
    let mut open = Open::default();
    let mut spare = Spare::default();
    loop {
        let stream = accepted(&mut spare, || listener.accept()).await;
        open.spawn(converse(stream, api.clone(), |request, api| {
            Box::pin(answer(request, api))
        }));
    }
}

/// Connections that are open at once on the admin socket, and on the port of metrics.
const CONNECTIONS: usize = 64;
/// How long a client may take to send the head of its first request, or of the next one.
const IDLE: Duration = Duration::from_secs(15);
/// How long a connection lasts at most.
const CONNECTION_LIFE: Duration = Duration::from_secs(300);

/// The open connections of one listener. At the limit the oldest one closes for a new one, so that a client that holds
/// connections does not keep others out.
#[derive(Default)]
struct Open(VecDeque<AbortOnDrop>);

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Open {
    fn spawn(&mut self, connection: impl Future<Output = ()> + Send + 'static) {
        self.0.retain(|open| !open.0.is_finished());
        if self.0.len() >= CONNECTIONS {
            self.0.pop_front();
        }
        let connection = tokio::spawn(async move {
            // A client that takes longer loses the connection, and opens another.
            let _ = timeout(CONNECTION_LIFE, connection).await;
        });
        self.0.push_back(AbortOnDrop(connection.abort_handle()));
    }
}

/// A descriptor that [`accepted`] closes when no other is free, so that an operator can still query the daemon.
#[derive(Default)]
struct Spare(Option<File>);

impl Spare {
    /// Opens it again if a descriptor is free.
    fn restore(&mut self) {
        if self.0.is_none() {
            self.0 = File::open("/dev/null").ok();
        }
    }
}

/// The next connection. An error is one of the moment (out of descriptors, mostly, which come back): it ends nothing.
async fn accepted<S, From, A>(spare: &mut Spare, accept: impl Fn() -> A) -> S
where
    A: Future<Output = io::Result<(S, From)>>,
{
    // Only here: opened again before the next try, it would take the number that it has just left.
    spare.restore();
    loop {
        match accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                descriptors::note("admin socket and metrics", &error);
                warn!(%error, "cannot accept a connection");
                if descriptors::is_shortage(&error) && spare.0.take().is_some() {
                    // Its number is free now: accept the same connection.
                    continue;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

/// Answers what Prometheus and health checks ask, and nothing else, until the task is dropped.
pub async fn serve_metrics(listener: TcpListener, api: Arc<dyn AdminApi>) {
    let mut open = Open::default();
    let mut spare = Spare::default();
    loop {
        let stream = accepted(&mut spare, || listener.accept()).await;
        open.spawn(converse(stream, api.clone(), |request, api| {
            Box::pin(async move {
                let known = matches!(request.uri().path(), "/metrics" | "/livez" | "/readyz");
                match known && request.method() == Method::GET {
                    true => answer(request, api).await,
                    false => reply(StatusCode::NOT_FOUND, "text/plain", Vec::new()),
                }
            })
        }));
    }
}

/// One connection.
async fn converse<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    api: Arc<dyn AdminApi>,
    answer: impl for<'a> Fn(Request<Incoming>, &'a dyn AdminApi) -> BoxFuture<'a, Response<Full<Bytes>>>,
) {
    let api = api.as_ref();
    let service = service_fn(|request: Request<Incoming>| {
        let answer = answer(request, api);
        async move { Ok::<_, std::convert::Infallible>(answer.await) }
    });
    // Whoever hangs up has seen enough.
    let _ = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
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
const MAX_BYTES: usize = 64 * 1024;

async fn answer(request: Request<Incoming>, api: &dyn AdminApi) -> Response<Full<Bytes>> {
    let (parts, body) = request.into_parts();
    let path = percent_encoding::percent_decode_str(parts.uri.path())
        .decode_utf8_lossy()
        .into_owned();
    let absent = || (StatusCode::NOT_FOUND, JSON, b"{}".to_vec());
    let (verb, of) = match path.trim_start_matches('/').split_once('/') {
        Some((verb, of)) => (verb, Some(of)),
        None => (path.trim_start_matches('/'), None),
    };
    let (status, content_type, body) = match (&parts.method, verb, of) {
        (&Method::GET, "metrics", None) => {
            let (content_type, text) = api.metrics();
            (StatusCode::OK, content_type, text.into_bytes())
        }
        (&Method::GET, "status", None) => json(serde_json::to_vec_pretty(&api.status())),
        (&Method::GET, "explain", Some(container)) => api
            .explain(container)
            .map_or_else(absent, |it| json(serde_json::to_vec_pretty(&it))),
        (&Method::GET, "trust-policy", Some(container)) => api
            .trust(container)
            .map_or_else(absent, |it| json(serde_json::to_vec_pretty(&it))),
        (&Method::GET, "identity-certificate", None) => json(serde_json::to_vec(&api.identity_certificate())),
        (&Method::GET, "events", Some(container)) => api
            .events(container)
            .map_or_else(absent, |it| json(serde_json::to_vec_pretty(&it))),
        (&Method::POST, "modify", Some(container)) => {
            let asked = serde_json::from_slice(&whole(body).await).map_err(|error| ApiError::Wrong(error.to_string()));
            done(asked.and_then(|modify| api.modify(container, &modify)))
        }
        (&Method::POST, "trigger", Some(container)) => {
            let asked = serde_json::from_slice(&whole(body).await).map_err(|error| ApiError::Wrong(error.to_string()));
            done(asked.and_then(|trigger| api.trigger(container, &trigger)))
        }
        (&Method::GET, "livez", None) => text(StatusCode::OK, "alive".to_owned()),
        (&Method::GET, "readyz", None) => match api.readiness().await {
            Ok(said) => text(StatusCode::OK, said),
            Err(why) => text(StatusCode::SERVICE_UNAVAILABLE, why),
        },
        (&Method::POST, "login", profile) => {
            let handed = whole(body).await;
            let taken = Handover::read(&String::from_utf8_lossy(&handed))
                .map_err(str::to_owned)
                .and_then(|handover| api.login(profile, &handover));
            match taken {
                Ok(said) => text(StatusCode::OK, said),
                Err(why) => text(StatusCode::BAD_REQUEST, why),
            }
        }
        _ => absent(),
    };
    reply(status, content_type, body)
}

const JSON: &str = "application/json";

/// Status, content type and body of a reply.
type Answered = (StatusCode, &'static str, Vec<u8>);

fn json(value: serde_json::Result<Vec<u8>>) -> Answered {
    match value {
        Ok(body) => (StatusCode::OK, JSON, body),
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn text(status: StatusCode, text: String) -> Answered {
    (status, "text/plain; charset=utf-8", text.into_bytes())
}

/// A body, or nothing where it is too large or breaks off.
async fn whole(body: Incoming) -> Bytes {
    let body = Limited::new(body, MAX_BYTES).collect().await;
    body.map(|body| body.to_bytes()).unwrap_or_default()
}

fn done<T: Serialize>(done: Result<T, ApiError>) -> Answered {
    match done {
        Ok(done) => json(serde_json::to_vec_pretty(&done)),
        Err(ApiError::NoContainer) => (StatusCode::NOT_FOUND, JSON, b"{}".to_vec()),
        Err(ApiError::Wrong(why)) => text(StatusCode::BAD_REQUEST, why),
        Err(ApiError::Failed(why)) => text(StatusCode::INTERNAL_SERVER_ERROR, why),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Knows no container, and is not ready.
    struct Nothing;

    impl AdminApi for Nothing {
        fn status(&self) -> crate::admin::Status {
            unimplemented!("no test asks for it")
        }
        fn explain(&self, _: &str) -> Option<crate::admin::Explanation> {
            None
        }
        fn trust(&self, _: &str) -> Option<Vec<crate::admin::Trust>> {
            None
        }
        fn modify(&self, _: &str, _: &crate::admin::Modify) -> Result<crate::admin::Options, ApiError> {
            Err(ApiError::Failed("no".to_owned()))
        }
        fn trigger(&self, _: &str, _: &crate::admin::Trigger) -> Result<Vec<crate::admin::EventStatus>, ApiError> {
            Ok(Vec::new())
        }
        fn events(&self, _: &str) -> Option<Vec<crate::admin::EventStatus>> {
            None
        }
        fn identity_certificate(&self) -> String {
            "certificate".to_owned()
        }
        fn login(&self, _: Option<&str>, _: &Handover) -> Result<String, String> {
            Err("offline".to_owned())
        }
        fn metrics(&self) -> (&'static str, String) {
            ("application/openmetrics-text", String::new())
        }
        fn readiness(&self) -> BoxFuture<'_, Result<String, String>> {
            Box::pin(std::future::ready(Err("not yet".to_owned())))
        }
    }

    #[tokio::test]
    async fn each_answer_has_the_content_type_of_its_body() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        const TEXT: &str = "text/plain; charset=utf-8";
        for (request, status, content_type, body) in [
            ("GET /livez", 200, TEXT, "alive"),
            ("GET /readyz", 503, TEXT, "not yet"),
            ("POST /modify/web", 500, TEXT, "no"),
            ("POST /login", 400, TEXT, "offline"),
            ("POST /trigger/web", 200, JSON, "[]"),
            ("GET /identity-certificate", 200, JSON, "\"certificate\""),
            ("GET /explain/web", 404, JSON, "{}"),
            ("GET /nothing", 404, JSON, "{}"),
            ("GET /metrics", 200, "application/openmetrics-text", ""),
        ] {
            let (mut client, server) = tokio::io::duplex(4096);
            let served = tokio::spawn(converse(server, Arc::new(Nothing), |request, api| {
                Box::pin(answer(request, api))
            }));
            let sent = match request.strip_prefix("POST /login") {
                Some(_) => r#"{"AccessKeyId":"A","SecretAccessKey":"s","SessionToken":"t"}"#,
                None => "{}",
            };
            let head = format!(
                "{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
                sent.len()
            );
            client.write_all(format!("{head}{sent}").as_bytes()).await.unwrap();
            let mut answered = String::new();
            client.read_to_string(&mut answered).await.unwrap();
            served.await.unwrap();
            let (head, found) = answered.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{request}: {head}");
            assert!(
                head.contains(&format!("\r\ncontent-type: {content_type}\r\n")),
                "{request}: {head}"
            );
            assert_eq!(found, body, "{request}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_connection_closes_for_a_new_one() {
        let mut open = Open::default();
        let (closed, mut oldest) = tokio::sync::mpsc::channel::<()>(1);
        let hold = |held: Option<tokio::sync::mpsc::Sender<()>>| async move {
            std::future::pending::<()>().await;
            drop(held);
        };
        open.spawn(hold(Some(closed)));
        (1..CONNECTIONS).for_each(|_| open.spawn(hold(None)));
        tokio::task::yield_now().await;
        assert_eq!(oldest.try_recv(), Err(tokio::sync::mpsc::error::TryRecvError::Empty));
        open.spawn(hold(None));
        assert_eq!(oldest.recv().await, None, "it has ended");
        assert_eq!(open.0.len(), CONNECTIONS);
        // All end at last.
        tokio::time::sleep(CONNECTION_LIFE * 2).await;
        open.spawn(hold(None));
        assert_eq!(open.0.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_spare_descriptor_closes_once_for_a_connection() {
        const PAUSE: Duration = Duration::from_millis(50);
        let mut spare = Spare::default();
        // How often accept(2) fails, and how long it takes until a connection is accepted.
        for (failures, waited) in [(0, Duration::ZERO), (1, Duration::ZERO), (2, PAUSE), (4, PAUSE * 3)] {
            let tries = std::sync::atomic::AtomicU32::new(0);
            let began = tokio::time::Instant::now();
            let accept = async || match tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                number if number < failures => Err(rustix::io::Errno::MFILE.into()),
                number => Ok((number, ())),
            };
            let accepting = timeout(Duration::from_secs(5), accepted(&mut spare, accept));
            assert_eq!(accepting.await, Ok(failures));
            let took = began.elapsed();
            assert!(
                took >= waited && took < waited + PAUSE,
                "{failures} failures took {took:?}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_cannot_be_accepted_ends_nothing() {
        let tries = std::sync::atomic::AtomicU32::new(0);
        let mut spare = Spare::default();
        let next = accepted(&mut spare, async || {
            match tries.fetch_add(1, std::sync::atomic::Ordering::Relaxed) {
                0 | 1 => Err(io::Error::other("too many open files")),
                number => Ok((number, ())),
            }
        });
        assert_eq!(next.await, 2);
    }
}
