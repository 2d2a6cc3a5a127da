//! What each verb of the command line does.

mod imds_client;

use std::error::Error;
use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::path::Path;
#[cfg(target_os = "linux")]
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum as _;

use crate::admin;
use crate::cli::{Cli, Identity, OnOff, Tokens, Verb};
#[cfg(target_os = "linux")]
use crate::cli::{Common, Intercept, Serve};
use crate::config;
#[cfg(target_os = "linux")]
use crate::files;
use crate::logging;

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

/// The error on systems whose containers run in a Linux VM.
#[cfg(any(test, not(target_os = "linux")))]
fn in_a_vm() -> Said {
    Said(format!(
        "containers run in a Linux VM on this system, and imds-router has to run there\nhint: {}",
        config::DOCKER_RUN
    ))
}

/// Does what was asked.
///
/// # Errors
/// Why not.
pub fn run(cli: Cli) -> Result<(), Failure> {
    match cli.verb {
        #[cfg(target_os = "linux")]
        Verb::Serve(flags) => serve(&flags),
        #[cfg(target_os = "linux")]
        Verb::Check {
            common,
            compose: Some(file),
            ..
        } => block_on(check_compose(&common, &file))?,
        #[cfg(target_os = "linux")]
        Verb::Check { common, compat, .. } => block_on(check(&common, compat))?,
        #[cfg(target_os = "linux")]
        Verb::Doctor { common } => block_on(doctor(&common))?,
        #[cfg(target_os = "linux")]
        Verb::Intercept { what, config } => intercept(what, config.as_ref()),
        #[cfg(not(target_os = "linux"))]
        Verb::Serve(_) | Verb::Check { .. } | Verb::Doctor { .. } | Verb::Intercept { .. } => Err(in_a_vm().into()),
        Verb::Status {
            json,
            watch: true,
            admin,
        } => block_on(watch(json, &admin))?,
        Verb::Status { json, admin, .. } => block_on(async move {
            let status = admin::ask_status(&admin).await?;
            let text = if json {
                serde_json::to_string_pretty(&status)? + "\n"
            } else {
                admin::render(&status)
            };
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
        Verb::Explain {
            container, json, admin, ..
        } => block_on(async move {
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
                    usage(Said(format!(
                        "--in {text:?}: expected a duration such as 90s, 10m or 2h"
                    )))
                })?),
                None => None,
            };
            let events = match event {
                Some(event) => {
                    let event = event
                        .to_possible_value()
                        .map(|it| it.get_name().to_owned())
                        .unwrap_or_default();
                    let trigger = admin::Trigger {
                        event,
                        action,
                        in_seconds,
                        cancel,
                        stop,
                    };
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
        Verb::Identity {
            what: Identity::Certificate,
            admin,
        } => block_on(async move {
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
        Verb::Record { file, user_data } => block_on(imds_client::record(&file, user_data))?,
        Verb::Get { path } => block_on(imds_client::get(&path))?,
        Verb::Wait { timeout } => block_on(imds_client::wait(timeout))?,
        Verb::Health { admin } => block_on(async move {
            let said = admin::ask_readiness(&admin).await?;
            Ok(writeln!(io::stdout(), "{said}")?)
        })?,
    }
}

/// How often `status --watch` asks.
const WATCH: Duration = Duration::from_secs(1);

/// What a daemon sees, until somebody has seen enough. One that is started again meanwhile is found again.
async fn watch(json: bool, socket: &Path) -> Result<(), Failure> {
    let mut out = io::stdout();
    let screen = out.is_terminal() && !json;
    let mut every = tokio::time::interval(WATCH);
    let mut found = false;
    loop {
        every.tick().await;
        let text = match admin::ask_status(socket).await {
            Ok(status) if json => serde_json::to_string(&status)? + "\n",
            Ok(status) => admin::render(&status),
            Err(error) if !found => return Err(error.into()),
            Err(error) if screen => logging::with_causes(&error) + "\n",
            Err(error) => {
                eprintln!("imds-router: {}", logging::with_causes(&error));
                continue;
            }
        };
        found = true;
        // Written over what was there, so that it does not flicker (ECMA-048: CUP, EL, ED).
        let text = match screen {
            true => format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")),
            false => text,
        };
        match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
            // Whoever has read it has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            written => written?,
        }
    }
}

/// The most that `check --compose` reads.
#[cfg(target_os = "linux")]
const MOST_COMPOSE: u64 = 16 * 1024 * 1024;

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
    let level = std::env::var(logging::LOG_VARIABLE).ok();
    logging::start(flags.log_format, level.as_deref()).map_err(|error| usage(Said(error)))?;
    let inherited = crate::daemon::Inherited::from_environment()?;
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
                        tracing::error!("{}; what held before holds on", logging::with_causes(&error));
                        true
                    }
                };
                if !sent {
                    return;
                }
            }
        });
        Ok(crate::daemon::run(settings, inherited, reloads, shutdown).await?)
    })?
}

/// Configuration and labels of this host's containers, without serving.
#[cfg(target_os = "linux")]
async fn check(flags: &Common, compat: bool) -> Result<(), Failure> {
    let settings = config::load(&flags.sources()).map_err(usage)?;
    report(&crate::daemon::check::containers(settings, compat).await?)
}

/// What the services of a compose file would get, without a container.
#[cfg(target_os = "linux")]
async fn check_compose(flags: &Common, file: &Path) -> Result<(), Failure> {
    let settings = config::load(&flags.sources()).map_err(usage)?;
    let text = if file == Path::new("-") {
        io::read_to_string(io::stdin().take(MOST_COMPOSE))?
    } else {
        files::read_argument(file, MOST_COMPOSE)
            .map_err(|error| usage(Said(format!("cannot read {}: {error}", file.display()))))?
    };
    let project = std::env::var("COMPOSE_PROJECT_NAME")
        .ok()
        .filter(|name| !name.is_empty());
    let checked = crate::daemon::check::services(settings, &text, project.as_deref())
        .await
        .map_err(usage)?;
    report(&checked)
}

#[cfg(target_os = "linux")]
fn report(checked: &crate::daemon::check::Checked) -> Result<(), Failure> {
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
    let found = crate::daemon::doctor::examine(&settings).await;
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
fn intercept(what: Intercept, file: Option<&PathBuf>) -> Result<(), Failure> {
    use crate::interception::reconcile;
    let mut plans = match what {
        // Whatever the configuration says now, and said before.
        Intercept::Down => crate::daemon::everything(),
        Intercept::Up | Intercept::Plan => {
            crate::daemon::plans(&config::load(&crate::cli::sources(file)).map_err(usage)?)
        }
    };
    let (does, nothing): (fn(&_) -> _, _) = match what {
        Intercept::Up => (reconcile::install, "everything is there already"),
        Intercept::Down => (reconcile::clear, "nothing of ours is there"),
        Intercept::Plan => (reconcile::pending, "everything is there already"),
    };
    if what == Intercept::Down {
        plans.reverse();
    }
    let mut steps = Vec::new();
    for plan in &plans {
        steps.extend(does(plan)?.iter().map(ToString::to_string));
    }
    // Only now is it certain that no daemon serves this host.
    if what == Intercept::Down {
        let settings = config::load(&crate::cli::sources(file)).unwrap_or_default();
        steps.extend(crate::daemon::clear_links(&settings.state_dir)?);
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A test of `app` compares that line with the documented one.
    #[test]
    fn other_systems_get_the_documented_command() {
        let said = in_a_vm().to_string();
        assert!(said.ends_with(&format!("\nhint: {}", config::DOCKER_RUN)), "{said}");
    }
}
