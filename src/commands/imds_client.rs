//! The verbs that are clients of the metadata service, for inside containers: they need nothing but the address.

use std::io::{self, Write as _};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout_at};

use super::{Failure, Said, usage};
use crate::clock::Clock;
use crate::logging;
use crate::metadata::{aemm, crawl};

/// The longest that `get` waits for one answer.
const GET_TIMEOUT: Duration = Duration::from_secs(5);

/// An IMDSv2 client that needs nothing: a token, then the path; the value on stdout as it is.
pub(super) async fn get(typed: &str) -> Result<(), Failure> {
    if typed.is_empty() || !typed.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(usage(Said(format!(
            "{typed:?} is not a path: expected visible characters without blanks"
        ))));
    }
    let path = match typed.trim_start_matches('/') {
        path if path.starts_with("latest") || path.starts_with(|c: char| c.is_ascii_digit()) => format!("/{path}"),
        path => format!("/latest/{path}"),
    };
    let answer = async {
        let token = ask("PUT /latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60").await?;
        let token = match token.status {
            200 => String::from_utf8_lossy(&token.body).into_owned(),
            _ => return Ok(token),
        };
        ask(&format!("GET {path}"), &format!("X-aws-ec2-metadata-token: {token}")).await
    };
    let answer = tokio::time::timeout(GET_TIMEOUT, answer)
        .await
        .map_err(|_| Said(format!("no answer from 169.254.169.254 within {} s", GET_TIMEOUT.as_secs())))?
        .map_err(|error| {
            Said(format!("169.254.169.254 does not answer: {error}\nhint: does imds-router serve on this host? imds-router status"))
        })?;
    if answer.status != 200 {
        let hint = answer.hint.map(|hint| format!("\nhint: {hint}")).unwrap_or_default();
        return Err(Said(format!("{path}: status {}{hint}", answer.status)).into());
    }
    Ok(io::stdout().write_all(&answer.body)?)
}

struct Answer {
    status: u16,
    hint: Option<String>,
    body: Vec<u8>,
}

/// One request on a connection of its own, so that the end of the answer is the end of the stream.
async fn ask(what: &str, header: &str) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(("169.254.169.254", 80)).await?;
    let request = format!(
        "{what} HTTP/1.1\r\nHost: 169.254.169.254\r\n{header}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await?;
    let strange = || io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer");
    let end = bytes.windows(4).position(|it| it == b"\r\n\r\n").ok_or_else(strange)?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|it| it.parse().ok())
        .ok_or_else(strange)?;
    let hint = head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("x-imds-router-hint")
            .then(|| logging::printable(value.trim(), 200))
    });
    Ok(Answer {
        status,
        hint,
        body: bytes.split_off(end + 4),
    })
}

/// How often `wait` asks.
const WAIT_AGAIN: Duration = Duration::from_millis(100);
/// The longest that it waits for one answer: whoever listens answers within half a second.
const WAIT_ONE: Duration = Duration::from_secs(1);

/// Waits until the metadata service answers the caller: with a value, with "token, please", or with "no such thing". What
/// refuses goes on being asked: before the daemon knows a container, it refuses it.
pub(super) async fn wait(most: Duration) -> Result<(), Failure> {
    let asking = || async {
        ask("GET /latest/meta-data/", "Accept: */*")
            .await
            .map(|answer| answer.status)
    };
    Ok(until_ready(&Clock::system(), most, asking).await?)
}

async fn until_ready(
    clock: &Clock,
    most: Duration,
    mut asking: impl AsyncFnMut() -> io::Result<u16>,
) -> Result<(), Said> {
    let end = clock.now() + most;
    let mut last = "no answer".to_owned();
    loop {
        match timeout_at(end.min(clock.now() + WAIT_ONE), asking()).await {
            Ok(Ok(200 | 401 | 404)) => return Ok(()),
            Ok(Ok(status)) => last = format!("status {status}"),
            Ok(Err(error)) => last = error.to_string(),
            Err(_) => {}
        }
        if timeout_at(end, sleep(WAIT_AGAIN)).await.is_err() || clock.now() >= end {
            return Err(Said(format!(
                "169.254.169.254 does not answer this container within {most:?}; the last that was heard: {last}\n\
                 hint: does imds-router serve on this host, and has this container an imds label? imds-router status"
            )));
        }
    }
}

/// Writes what stands below `meta-data/` here, but for secrets, to a file that `--metadata-file` serves.
pub(super) async fn record(path: &std::path::Path, with_user_data: bool) -> Result<(), Failure> {
    let silent = |error: io::Error| {
        Said(format!(
            "169.254.169.254 does not answer: {error}\nhint: this is for an EC2 instance, or a container that imds-router serves"
        ))
    };
    let token = ask("PUT /latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 600");
    let token = tokio::time::timeout(GET_TIMEOUT, token)
        .await
        .map_err(|_| silent(io::ErrorKind::TimedOut.into()))?;
    let token = token.map_err(silent)?;
    if token.status != 200 {
        return Err(Said(format!("169.254.169.254 gives no token: status {}", token.status)).into());
    }
    let header = format!("X-aws-ec2-metadata-token: {}", String::from_utf8_lossy(&token.body));
    let get = async |path: &str| -> Result<Option<Vec<u8>>, Failure> {
        let answer = ask(&format!("GET /latest/{path}"), &header).await.map_err(silent)?;
        Ok((answer.status == 200).then_some(answer.body))
    };
    let text = async |path: String| -> Result<Option<String>, Failure> {
        Ok(get(&path)
            .await?
            .map(|value| String::from_utf8_lossy(&value).into_owned()))
    };
    let found = crawl::gather(text).await?;
    let user_data = if with_user_data { get("user-data").await? } else { None };
    let text = aemm::write(&found, user_data.as_deref());
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let written = options.open(path).and_then(|mut file| file.write_all(text.as_bytes()));
    written.map_err(|error| {
        Said(format!(
            "cannot write {}: {error}\nhint: expected a file that is not there yet",
            path.display()
        ))
    })?;
    Ok(writeln!(
        io::stdout(),
        "{}: imds-router serve --metadata-file serves it",
        path.display()
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `wait` makes of answers, one a time, and how long it took.
    async fn waited(answers: &[Result<u16, io::ErrorKind>]) -> (Result<(), String>, Duration) {
        let clock = Clock::system();
        let began = clock.now();
        let mut answers = answers.iter().copied();
        let asking = async || match answers.next() {
            Some(answer) => answer.map_err(io::Error::from),
            None => std::future::pending().await,
        };
        let waited = until_ready(&clock, Duration::from_secs(3), asking).await;
        (waited.map_err(|error| error.to_string()), clock.now() - began)
    }

    #[tokio::test(start_paused = true)]
    async fn what_answers_is_ready_and_what_refuses_is_not() {
        for ready in [200, 401, 404] {
            assert_eq!(waited(&[Ok(ready)]).await, (Ok(()), Duration::ZERO), "{ready}");
        }
        for not_yet in [Ok(403), Ok(503), Ok(500), Err(io::ErrorKind::ConnectionRefused)] {
            assert_eq!(waited(&[not_yet, Ok(401)]).await, (Ok(()), WAIT_AGAIN), "{not_yet:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn it_ends_in_time_and_says_what_was_heard_last() {
        let (said, took) = waited(&[Err(io::ErrorKind::ConnectionRefused), Ok(403)]).await;
        let said = said.expect_err("nobody was ready");
        assert!(
            said.starts_with(
                "169.254.169.254 does not answer this container within 3s; the last that was heard: status 403\n"
            ),
            "{said}"
        );
        assert_eq!(took, Duration::from_secs(3));
    }
}
