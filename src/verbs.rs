//! What each verb of the command line does.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{self, Read as _, Write as _};
use std::time::Duration;

use clap::ValueEnum as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use crate::admin;
use crate::cli::{Cli, Identity, OnOff, Tokens, Verb};
#[cfg(target_os = "linux")]
use crate::cli::{Common, Intercept, Serve};
use crate::config;
use crate::metadata::file;
use crate::telemetry;

/// Why a verb failed, and whose fault it is.
#[derive(Debug)]
pub enum Failure {
    /// What was typed or configured: exit code 2.
    Usage(Box<dyn Error>),
    /// Everything else: exit code 1.
    Failed(Box<dyn Error>),
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Failed(Box::new(error))
    }
}

/// An error that is a sentence.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Said(String);

/// Does what was asked.
///
/// # Errors
/// Why not.
pub fn run(cli: Cli) -> Result<(), Failure> {
    match cli.verb {
        #[cfg(target_os = "linux")]
        Verb::Serve(flags) => serve(&flags),
        #[cfg(target_os = "linux")]
        Verb::Check { common, compat } => block_on(check(&common, compat))?,
        #[cfg(target_os = "linux")]
        Verb::Doctor { common } => block_on(doctor(&common))?,
        #[cfg(target_os = "linux")]
        Verb::Intercept { what } => intercept(what),
        #[cfg(not(target_os = "linux"))]
        Verb::Serve(_) | Verb::Check { .. } | Verb::Doctor { .. } | Verb::Intercept { .. } => Err(Failure::Failed(Box::new(Said(
            "containers run in a Linux VM on this system: run the image imds-router there \
             (docker run --net=host --pid=host --privileged -v /var/run/docker.sock:/var/run/docker.sock imds-router serve)"
                .to_owned(),
        )))),
        Verb::Status { json, admin } => block_on(async move {
            let status = admin::ask_status(&admin).await?;
            let text = if json { serde_json::to_string_pretty(&status)? + "\n" } else { admin::render(&status) };
            Ok(io::stdout().write_all(text.as_bytes())?)
        })?,
        Verb::Explain {
            container,
            json,
            trust_policy: true,
            admin,
        } => block_on(async move {
            let trust = admin::ask_trust(&admin, &container).await?;
            if trust.is_empty() {
                return Err(Said(format!("{container} has no role")).into());
            }
            let text = match json {
                true => serde_json::to_string_pretty(&trust)? + "\n",
                false => admin::render_trust(&trust),
            };
            Ok(io::stdout().write_all(text.as_bytes())?)
        })?,
        Verb::Explain { container, json, admin, .. } => block_on(async move {
            let explanation = admin::ask_explanation(&admin, &container).await?;
            let text = match json {
                true => serde_json::to_string_pretty(&explanation)? + "\n",
                false => admin::render_explanation(&explanation),
            };
            Ok(io::stdout().write_all(text.as_bytes())?)
        })?,
        Verb::Trigger {
            container,
            event,
            action,
            after,
            cancel,
            stop,
            json,
            admin,
        } => block_on(async move {
            let in_seconds = match after {
                Some(text) => Some(config::parse_duration(&text).map(|it| it.as_secs()).ok_or_else(|| {
                    usage(Said(format!("--in {text:?}: expected a duration such as 90s, 10m or 2h")))
                })?),
                None => None,
            };
            let events = match event {
                Some(event) => {
                    let event = event.to_possible_value().map(|it| it.get_name().to_owned()).unwrap_or_default();
                    let trigger = admin::Trigger { event, action, in_seconds, cancel, stop };
                    admin::trigger(&admin, &container, &trigger).await?
                }
                None => admin::ask_events(&admin, &container).await?,
            };
            let text = match json {
                true => serde_json::to_string_pretty(&events)? + "\n",
                false => admin::render_events(&events),
            };
            Ok(io::stdout().write_all(text.as_bytes())?)
        })?,
        Verb::Modify {
            container,
            http_endpoint,
            http_tokens,
            http_put_response_hop_limit,
            instance_metadata_tags,
            http_protocol_ipv6,
            json,
            admin,
        } => block_on(async move {
            let on = |it: Option<OnOff>| it.map(|it| it == OnOff::Enabled);
            let modify = admin::Modify {
                http_endpoint: on(http_endpoint),
                http_tokens_required: http_tokens.map(|it| it == Tokens::Required),
                http_put_response_hop_limit,
                instance_metadata_tags: on(instance_metadata_tags),
                http_protocol_ipv6: on(http_protocol_ipv6),
            };
            let options = admin::modify(&admin, &container, &modify).await?;
            let text = match json {
                true => serde_json::to_string_pretty(&options)? + "\n",
                false => admin::render_options(&options),
            };
            Ok(io::stdout().write_all(text.as_bytes())?)
        })?,
        Verb::Identity { what: Identity::Certificate, admin } => block_on(async move {
            let certificate = admin::ask_identity_certificate(&admin).await?;
            Ok(io::stdout().write_all(certificate.as_bytes())?)
        })?,
        Verb::Login { profile, admin, .. } => block_on(async move {
            let mut text = String::new();
            io::stdin().take(MOST_HANDED_OVER).read_to_string(&mut text)?;
            let handover = admin::Handover::read(&text).map_err(|why| usage(Said(why.to_owned())))?;
            let said = admin::hand_over(&admin, profile.as_deref(), &handover).await?;
            Ok(writeln!(io::stdout(), "{said}")?)
        })?,
        Verb::Record { file, user_data } => block_on(record(&file, user_data))?,
        Verb::Get { path } => block_on(get(&path))?,
    }
}

/// The most that `login` reads.
const MOST_HANDED_OVER: u64 = 64 * 1024;

fn block_on<T>(work: impl Future<Output = T>) -> io::Result<T> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(work))
}

fn usage(error: impl Error + 'static) -> Failure {
    Failure::Usage(Box::new(error))
}

#[cfg(target_os = "linux")]
fn serve(flags: &Serve) -> Result<(), Failure> {
    let sources = flags.sources();
    let settings = config::load(&sources).map_err(usage)?;
    let level = std::env::var(telemetry::LOG_VARIABLE).ok();
    telemetry::start(flags.log_format, level.as_deref()).map_err(|error| usage(Said(error)))?;
    block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        let mut hangups = signal(SignalKind::hangup())?;
        let (sender, reloads) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            while hangups.recv().await.is_some() {
                let sent = match config::load(&sources) {
                    Ok(settings) => sender.send(settings).await.is_ok(),
                    Err(error) => {
                        tracing::error!("{}; what held before holds on", telemetry::with_causes(&error));
                        true
                    }
                };
                if !sent {
                    return;
                }
            }
        });
        Ok(crate::app::run(settings, reloads, shutdown).await?)
    })?
}

/// Configuration and labels of this host's containers, without serving.
#[cfg(target_os = "linux")]
async fn check(flags: &Common, compat: bool) -> Result<(), Failure> {
    let settings = config::load(&flags.sources()).map_err(usage)?;
    let checked = crate::app::check(settings, compat).await?;
    io::stdout().write_all(checked.text.as_bytes())?;
    match checked.problems {
        0 => Ok(()),
        problems => Err(Failure::Failed(Box::new(Said(format!(
            "{problems} of the containers above do not get what they ask for"
        ))))),
    }
}

/// What keeps this host from serving.
#[cfg(target_os = "linux")]
async fn doctor(flags: &Common) -> Result<(), Failure> {
    let settings = config::load(&flags.sources()).map_err(usage)?;
    let found = crate::app::doctor::examine(&settings).await;
    io::stdout().write_all(found.render().as_bytes())?;
    match found.wrong() {
        0 => Ok(()),
        wrong => Err(Said(format!(
            "{wrong} of the above keep this host from serving as configured"
        ))
        .into()),
    }
}

#[cfg(target_os = "linux")]
fn intercept(what: Intercept) -> Result<(), Failure> {
    use crate::host::apply;
    let mut plans = crate::app::plans();
    let (does, nothing): (fn(&_) -> _, _) = match what {
        Intercept::Up => (apply::install, "everything is there already"),
        Intercept::Down => (apply::clear, "nothing of ours is there"),
        Intercept::Plan => (apply::pending, "everything is there already"),
    };
    if what == Intercept::Down {
        plans.reverse();
    }
    let mut steps = Vec::new();
    for plan in &plans {
        steps.extend(does(plan)?);
    }
    let mut out = io::stdout();
    if steps.is_empty() {
        writeln!(out, "{nothing}")?;
    }
    for step in steps {
        writeln!(out, "{step}")?;
    }
    Ok(())
}

/// The longest that `get` waits for one answer.
const GET_TIMEOUT: Duration = Duration::from_secs(5);

/// An IMDSv2 client that needs nothing: a token, then the path; the value on stdout as it is.
async fn get(typed: &str) -> Result<(), Failure> {
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

/// The most directories and values that `record` asks for: no instance has so many.
const MOST_PATHS: usize = 10_000;

/// Writes what stands below `meta-data/` here, but for secrets, to a file that `--metadata-file` serves.
async fn record(path: &std::path::Path, with_user_data: bool) -> Result<(), Failure> {
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
    let mut found = BTreeMap::new();
    let mut dirs = vec!["meta-data/".to_owned(), "dynamic/fws/".to_owned()];
    let mut asked = 0;
    while let Some(dir) = dirs.pop() {
        let listing = get(&dir).await?.unwrap_or_default();
        for name in String::from_utf8_lossy(&listing).lines() {
            // Public keys are listed with their names: `0=me`.
            let path = match name.split_once('=') {
                Some((number, _)) => format!("{dir}{number}/"),
                None => format!("{dir}{name}"),
            };
            asked += 1;
            if asked > MOST_PATHS || !path.bytes().all(|b| b.is_ascii_graphic()) || !file::is_recorded(&path) {
                continue;
            }
            if path.ends_with('/') {
                dirs.push(path);
            } else if let Some(value) = get(&path).await? {
                found.insert(path, String::from_utf8_lossy(&value).into_owned());
            }
        }
    }
    let user_data = if with_user_data { get("user-data").await? } else { None };
    let text = file::write(&found, user_data.as_deref());
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
            .then(|| telemetry::printable(value.trim(), 200))
    });
    Ok(Answer {
        status,
        hint,
        body: bytes.split_off(end + 4),
    })
}
