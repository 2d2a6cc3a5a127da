//! GET requests to the engine whose answers are read piece by piece, which bollard does not: it reads a list or an event as a whole,
//! and parses the beginning of a long line again with each part that arrives (quadratic: 2 s for 8 MB, 12 s for 20 MB).

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Incoming;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::reconciler::EngineError;
use crate::logging::{printable, with_causes};

/// The longest list that is read. That of ten thousand containers has some 20 MB.
const LONGEST_ANSWER: usize = 256 * 1024 * 1024;
/// The longest event that is read. Docker's have some hundred bytes, and the labels of the container.
const LONGEST_LINE: usize = 1024 * 1024;
/// The longest text of an error.
const LONGEST_ERROR: usize = 64 * 1024;
/// An engine that sends the head of its answer only with the first event has accepted the subscription by then.
const HEAD: Duration = Duration::from_millis(500);

/// An answer, and the task that moves its bytes. Both end together.
struct Answer {
    response: Response<Incoming>,
    _connection: JoinSet<()>,
}

fn failed(error: &(dyn std::error::Error + 'static)) -> EngineError {
    EngineError(printable(&with_causes(error), 300))
}

/// The whole answer to a GET request.
///
/// # Errors
/// When there is no answer, or the engine answers with an error.
pub(super) async fn get(host: &str, path_and_query: &str) -> Result<Bytes, EngineError> {
    let answer = successful(send(host, path_and_query).await?.await?).await?;
    let body = Limited::new(answer.response.into_body(), LONGEST_ANSWER)
        .collect()
        .await;
    body.map(|body| body.to_bytes()).map_err(|error| failed(&*error))
}

/// The lines of the answer to a GET request, as they arrive.
///
/// # Errors
/// When the engine cannot be reached. All later errors are in the stream, which ends with them.
pub(super) async fn lines(
    host: &str,
    path_and_query: &str,
) -> Result<BoxStream<'static, Result<Line, EngineError>>, EngineError> {
    let mut answer = Box::pin(send(host, path_and_query).await?);
    let head = timeout(HEAD, &mut answer).await;
    let lines = async move {
        let answer = match head {
            Ok(answer) => answer,
            Err(_) => answer.await,
        };
        match async { successful(answer?).await }.await {
            Ok(answer) => lines_of(answer),
            Err(error) => stream::iter([Err(error)]).boxed(),
        }
    };
    Ok(stream::once(lines).flatten().boxed())
}

/// Sends a GET request. Returns the future of its answer.
async fn send(
    host: &str,
    path_and_query: &str,
) -> Result<impl Future<Output = Result<Answer, EngineError>> + Send + use<>, EngineError> {
    let request = Request::get(path_and_query)
        .header("host", "docker")
        .body(Empty::<Bytes>::new());
    let request = request.map_err(|error| failed(&error))?;
    let stream: Box<dyn Stream> = match host.split_once("://") {
        Some(("unix", path)) => Box::new(UnixStream::connect(path).await.map_err(|error| failed(&error))?),
        Some(("tcp" | "http", address)) => {
            let address = address.split('/').next().unwrap_or_default();
            Box::new(TcpStream::connect(address).await.map_err(|error| failed(&error))?)
        }
        _ => return Err(EngineError("expected unix:///PATH or tcp://HOST:PORT".to_owned())),
    };
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.map_err(|error| failed(&error))?;
    let mut task = JoinSet::new();
    task.spawn(async move {
        // An error of the connection is one of the answer, too.
        let _ = connection.await;
    });
    Ok(async move {
        let response = sender.send_request(request).await.map_err(|error| failed(&error))?;
        Ok(Answer {
            response,
            _connection: task,
        })
    })
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// The text of an error of the engine.
#[derive(Deserialize)]
struct Message {
    message: String,
}

/// # Errors
/// What the engine says, if it is an error.
async fn successful(answer: Answer) -> Result<Answer, EngineError> {
    let status = answer.response.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = Limited::new(answer.response.into_body(), LONGEST_ERROR).collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let text = match serde_json::from_slice::<Message>(&body) {
        Ok(it) => it.message,
        Err(_) => String::from_utf8_lossy(&body).into_owned(),
    };
    Err(EngineError(printable(
        &format!("status {}: {text}", status.as_u16()),
        300,
    )))
}

fn lines_of(answer: Answer) -> BoxStream<'static, Result<Line, EngineError>> {
    stream::unfold(
        (Some(answer), Splitter::default()),
        |(answer, mut splitter)| async move {
            let mut answer = answer?;
            let frame = answer.response.body_mut().frame().await?;
            Some(match frame {
                Ok(frame) => {
                    let lines = frame.data_ref().map(|bytes| splitter.split(bytes)).unwrap_or_default();
                    let lines: Vec<_> = lines.into_iter().map(Ok).collect();
                    (lines, (Some(answer), splitter))
                }
                Err(error) => (vec![Err(failed(&error))], (None, splitter)),
            })
        },
    )
    .flat_map(stream::iter)
    .boxed()
}

/// A line without its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Line {
    Whole(Vec<u8>),
    /// It has more than [`LONGEST_LINE`] bytes, and is not kept.
    TooLong,
}

/// Splits bytes into lines.
#[derive(Default)]
struct Splitter {
    line: Vec<u8>,
    /// The present line is too long.
    skips: bool,
}

impl Splitter {
    fn split(&mut self, mut bytes: &[u8]) -> Vec<Line> {
        let mut lines = Vec::new();
        while !bytes.is_empty() {
            let (part, end) = match bytes.iter().position(|byte| *byte == b'\n') {
                Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
                None => (bytes, None),
            };
            if !self.skips && self.line.len() + part.len() > LONGEST_LINE {
                (self.line, self.skips) = (Vec::new(), true);
                lines.push(Line::TooLong);
            }
            if !self.skips {
                self.line.extend_from_slice(part);
            }
            if end.is_some() {
                let line = std::mem::take(&mut self.line);
                if !std::mem::take(&mut self.skips) && !line.trim_ascii().is_empty() {
                    lines.push(Line::Whole(line));
                }
            }
            bytes = end.unwrap_or_default();
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(text: &[u8], part: usize) -> Vec<Line> {
        let mut splitter = Splitter::default();
        text.chunks(part).flat_map(|bytes| splitter.split(bytes)).collect()
    }

    #[test]
    fn lines_do_not_depend_on_the_parts_in_which_they_arrive() {
        let text = b"one\n\ntwo\r\n\xff three\nnot ended";
        let whole = |line: &[u8]| Line::Whole(line.to_vec());
        let expected = [whole(b"one"), whole(b"two\r"), whole(b"\xff three")];
        for part in 1..text.len() {
            assert_eq!(split(text, part), expected, "parts of {part} bytes");
        }
    }

    #[test]
    fn a_line_that_is_too_long_costs_itself_only() {
        let mut text = b"before\n".to_vec();
        text.extend(vec![b'x'; 20 * LONGEST_LINE]);
        text.extend(b"\nafter\n");
        let expected = [
            Line::Whole(b"before".to_vec()),
            Line::TooLong,
            Line::Whole(b"after".to_vec()),
        ];
        for part in [8192, 100_000, text.len()] {
            assert_eq!(split(&text, part), expected, "parts of {part} bytes");
        }
    }
}
