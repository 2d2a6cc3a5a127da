//! HTTP/1.x on one connection: reads requests, sends answers, and decides when the connection closes.
//!
//! As EC2, it closes after each answer unless the request asks for keep-alive.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::time::Duration;

use futures_util::FutureExt as _;
use hyper::Request;
use hyper::body::{Body as _, Incoming};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;
use tracing::trace;

use super::linger;
use crate::protocol::{Reply, asks_keep_alive};

/// Largest head of a request.
const HEAD_BYTES: usize = 16 * 1024;
/// How long an idle connection stays open, as answers announce it.
const IDLE: Duration = Duration::from_secs(15);
/// How long it really stays open, and how long a head may take. A client that polls every [`IDLE`] does not meet a closed
/// connection.
const IDLE_LIMIT: Duration = Duration::from_secs(20);
/// How long a connection that has to close may take to send its last answer.
const LAST_ANSWER: Duration = Duration::from_secs(1);

/// A request gets no answer: the connection is cut at once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the run of the authenticated caller has ended")]
pub(super) struct Ended;

/// Serves one connection until it is closed. `close` completes when it has to close early: at once if it is idle or
/// lingers, else after the present answer.
pub(super) async fn serve<S, A, F>(stream: S, close: impl Future<Output = ()>, answer: A)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    A: Fn(Parts) -> F + Unpin,
    F: Future<Output = Result<Reply, Ended>> + Send,
{
    // Boxed, because hyper returns the stream of such services only.
    let service = service_fn(|request: Request<Incoming>| {
        let keep_alive = stays_open(&request);
        // No IMDS request has a body; hyper discards one that comes.
        let reply = answer(request.into_parts().0);
        async move {
            let reply = reply.await?;
            let reply = if keep_alive { reply.keep_alive(IDLE) } else { reply };
            Ok::<_, Ended>(reply.into_response())
        }
        .boxed()
    });
    // With `half_close`, a client that shuts its side down after the request still reads its answer. The price: hyper does not
    // notice a client that is gone before it writes the answer. Every answer has a deadline, so such a client costs at most
    // that.
    let mut connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE_LIMIT)
        .half_close(true)
        .max_buf_size(HEAD_BYTES)
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), service);
    let mut close = pin!(close);
    // In this order: a request that has arrived is answered first.
    let ended = tokio::select! {
        biased;
        ended = poll_fn(|cx| connection.poll_without_shutdown(cx)) => Some(ended),
        () = &mut close => None,
    };
    let must_close = ended.is_none();
    let ended = match ended {
        Some(ended) => ended,
        None => {
            Pin::new(&mut connection).graceful_shutdown();
            let rest = poll_fn(|cx| connection.poll_without_shutdown(cx));
            match timeout(LAST_ANSWER, rest).await {
                Ok(ended) => ended,
                Err(_) => return,
            }
        }
    };
    let stream = connection.into_parts().io.into_inner();
    if let Err(error) = ended {
        // Clients that leave early, malformed heads: faults of the client.
        trace!(%error, "connection broken");
        if std::error::Error::source(&error).is_some_and(|cause| cause.is::<Ended>()) {
            return;
        }
    }
    if !must_close {
        tokio::select! {
            () = linger::close(stream) => {}
            () = close => {}
        }
    }
}

/// Whether the connection may stay open after the answer to this request. hyper closes it after a body that it has not read,
/// and after requests to change the protocol.
fn stays_open(request: &Request<Incoming>) -> bool {
    let headers = request.headers();
    asks_keep_alive(headers)
        && request.body().is_end_stream()
        && !headers.contains_key(hyper::header::UPGRADE)
        && request.method() != hyper::Method::CONNECT
}
