//! Asks a daemon, for the verbs of the command line.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::net::UnixStream;

use super::{EventStatus, Explanation, Handover, Modify, Options, Status, Trigger, Trust};
use crate::logging::printable;

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
    /// A process listens and does not answer.
    #[error(
        "imds-router on {path} does not answer within {} s; is it stopped?\n\
         hint: a process in state T is stopped (ps -C imds-router -o pid,stat); kill -CONT PID continues it",
        TIME_LIMIT.as_secs()
    )]
    Silent {
        /// The socket.
        path: String,
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
    ApiError(String),
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
        _ => Err(AskError::ApiError(printable(&String::from_utf8_lossy(&said), 400))),
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

/// The longest that a verb waits for the daemon, which answers within a second.
pub const TIME_LIMIT: Duration = Duration::from_secs(10);

async fn send(socket: &Path, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), AskError> {
    tokio::time::timeout(TIME_LIMIT, exchange(socket, method, path, body))
        .await
        .unwrap_or_else(|_| {
            Err(AskError::Silent {
                path: socket.display().to_string(),
            })
        })
}

/// connect(2): a Unix socket whose backlog is full gives `EAGAIN` at once, as with a daemon that is stopped.
async fn connect(socket: &Path) -> io::Result<UnixStream> {
    const RETRY_INTERVAL: Duration = Duration::from_millis(50);
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(RETRY_INTERVAL).await,
            connected => return connected,
        }
    }
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), AskError> {
    let shown = socket.display().to_string();
    let stream = connect(socket).await.map_err(|source| AskError::Unreachable {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A stopped daemon: the kernel accepts connections until the backlog is full, and no process answers.
    #[tokio::test(start_paused = true)]
    async fn verbs_give_up_on_a_daemon_that_does_not_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let stopped = |error: AskError| {
            let said = error.to_string();
            let expected = format!(
                "imds-router on {} does not answer within 10 s; is it stopped?",
                path.display()
            );
            assert_eq!(said.lines().next(), Some(expected.as_str()));
        };
        stopped(ask_status(&path).await.unwrap_err());
        stopped(ask_readiness(&path).await.unwrap_err());
        stopped(ask_explanation(&path, "web").await.unwrap_err());
        stopped(modify(&path, "web", &Modify::default()).await.unwrap_err());
        // Until the backlog is full. Connections that nobody accepts stay there.
        let mut waiting = Vec::new();
        while let Ok(connection) = UnixStream::connect(&path).await {
            waiting.push(connection);
        }
        stopped(ask_status(&path).await.unwrap_err());
    }
}
