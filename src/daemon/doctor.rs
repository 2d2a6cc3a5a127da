//! What is wrong on this host, why it matters, and the command that fixes it. Changes nothing.

use std::fmt::Write as _;
use std::time::Duration;

use super::host_mode::Kept;
use super::{ATTACH_HOST, DOCKER_RUN, IMDS_ADDRESS, base_identity, engine_host, plans};
use crate::admin;
use crate::attribution::prerequisites::MissingPrerequisite;
use crate::clock::Clock;
use crate::config::{Attach, CredentialSource, Proof, Settings};
use crate::containers::docker::Engine;
use crate::containers::lookups::answer_within;
use crate::containers::reconciler::{ContainerEngine as _, EngineError};
use crate::credentials::sts::Sts;
use crate::interception::reconcile::{Survey, survey};
use crate::interception::{GUARD_TABLE, HostError, LINK, Plan, RULES_TABLE};
use crate::logging::{printable, with_causes};

/// How long the engine may take to list its containers.
const PATIENCE: Duration = Duration::from_secs(10);

/// How it stands with one thing.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Verdict {
    /// As it should be.
    Fine,
    /// Works, and should be known.
    Note,
    /// Does not work.
    Wrong,
}

/// One thing that was looked at.
struct Finding {
    verdict: Verdict,
    /// What was looked at, and what is so.
    seen: String,
    /// Why that matters.
    why: &'static str,
    /// What to do.
    fix: Option<String>,
}

/// Everything that was found.
#[derive(Default)]
pub struct Diagnosis(Vec<Finding>);

impl Diagnosis {
    /// How many things do not work.
    pub fn wrong(&self) -> usize {
        self.0.iter().filter(|it| it.verdict == Verdict::Wrong).count()
    }

    /// For people, the worst last: that is what is read.
    pub fn render(&self) -> String {
        let mut all: Vec<_> = self.0.iter().collect();
        all.sort_by_key(|finding| finding.verdict);
        let mut text = String::new();
        for finding in all {
            let mark = match finding.verdict {
                Verdict::Fine => "ok   ",
                Verdict::Note => "note ",
                Verdict::Wrong => "WRONG",
            };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{mark} {}", printable(&finding.seen, 600));
            if finding.verdict != Verdict::Fine {
                let _ = writeln!(text, "      why it matters: {}", finding.why);
            }
            if let Some(fix) = &finding.fix {
                let _ = writeln!(text, "      fix: {fix}");
            }
        }
        text
    }

    fn fine(&mut self, seen: impl Into<String>) {
        self.add(Verdict::Fine, seen, "", None);
    }

    fn add(&mut self, verdict: Verdict, seen: impl Into<String>, why: &'static str, fix: Option<&str>) {
        self.0.push(Finding {
            verdict,
            seen: seen.into(),
            why,
            fix: fix.map(str::to_owned),
        });
    }
}

/// Looks at everything that serving takes.
pub async fn examine(settings: &Settings) -> Diagnosis {
    let mut found = Diagnosis::default();
    engine(settings, &mut found).await;
    if settings.attach == Attach::Network {
        network(&mut found);
    } else {
        let kept = Kept::here(settings);
        proof(settings, kept, &mut found).await;
        host(settings, kept, &mut found);
    }
    let status = admin::ask_status(&settings.admin_socket).await.ok();
    match (&status, settings.source) {
        (_, CredentialSource::Offline) => {
            found.fine("base credentials: none are needed; credentials are fakes (offline)")
        }
        (Some(status), CredentialSource::Sts) => bases_of_daemon(&status.bases, &mut found),
        (None, CredentialSource::Sts) => bases_of_this_process(settings, &mut found).await,
    }
    if let Some(status) = &status {
        daemon(settings, status, &mut found).await;
    }
    found
}

/// The longest that STS is waited for.
const STS_LIMIT: Duration = Duration::from_secs(10);
const NO_BASE: &str = "containers get metadata, and no credentials for their roles";

/// Asks STS with the base credentials that a daemon would have with the present variables and files.
async fn bases_of_this_process(settings: &Settings, found: &mut Diagnosis) {
    let clock = Clock::system();
    let sts = Sts::new(base_identity::bases(settings, &clock), clock);
    let asked = tokio::time::timeout(STS_LIMIT, base_identity::ask(&sts, None)).await;
    let why = match asked {
        Ok((base, _)) => match (base.arn, base.problem) {
            (Some(arn), _) => return found.fine(format!("base credentials: {arn}")),
            (None, why) => why.unwrap_or_else(|| "unknown".to_owned()),
        },
        Err(_) => format!("STS does not answer within {} s", STS_LIMIT.as_secs()),
    };
    found.add(
        Verdict::Note,
        format!("base credentials: {why}"),
        NO_BASE,
        Some("--profile or AWS_PROFILE names a profile, [credentials] aws_dir its directory; or imds-router serve --offline"),
    );
}

fn bases_of_daemon(bases: &[admin::BaseStatus], found: &mut Diagnosis) {
    for base in bases {
        let name = base
            .profile
            .as_ref()
            .map(|name| format!(" of profile {name}"))
            .unwrap_or_default();
        let who = base.arn.as_deref().or(base.origin.as_deref()).unwrap_or("unknown");
        match &base.error {
            None => found.fine(format!("base credentials{name}: {who}")),
            Some(error) => found.add(
                Verdict::Note,
                format!("base credentials{name}: {}: {error}", base.state),
                NO_BASE,
                Some(
                    base.command
                        .as_deref()
                        .unwrap_or("imds-router status; the daemon tries again by itself"),
                ),
            ),
        }
    }
}

async fn engine(settings: &Settings, found: &mut Diagnosis) {
    let at = engine_host(settings);
    let engine = Engine::new(&at, Clock::system());
    let listed = async {
        drop(engine.subscribe().await?);
        let listed = answer_within(PATIENCE, engine.containers()).await;
        listed.map_err(|EngineError(why)| EngineError(format!("{at}: list of containers: {why}")))
    };
    match listed.await {
        Ok(listed) => {
            found.fine(format!("engine: {at} answers"));
            for (id, why) in listed.undescribed {
                found.add(
                    Verdict::Wrong,
                    format!("engine: container {} cannot be described: {why}", id.short()),
                    "the daemon does not serve the container until the engine describes it",
                    Some(&format!("docker inspect {}", id.short())),
                );
            }
        }
        Err(error) => found.add(
            Verdict::Wrong,
            format!("engine: {error}"),
            "without it nobody knows which containers there are; a daemon waits for it",
            Some("start Docker, or name its socket: DOCKER_HOST=unix:///path/to/docker.sock; sudo, if it belongs to root"),
        ),
    }
}

fn network(found: &mut Diagnosis) {
    found.add(
        Verdict::Note,
        format!("attach: network; who has a link to the network that {IMDS_ADDRESS} is on is told by its address only"),
        "a neighbour with NET_RAW on that network can send with another's address, and read what others are answered",
        Some(&format!(
            "docker run --cap-drop NET_RAW; or the daemon with all that it needs: {DOCKER_RUN}"
        )),
    );
}

async fn proof(settings: &Settings, kept: Option<Kept>, found: &mut Diagnosis) {
    let lacks = super::lacks(settings).await;
    if lacks.is_empty() {
        found.fine("proof: full; the kernel says who made a connection");
    }
    let accepted = settings.proof == Proof::Address;
    for lack in &lacks {
        let fix = match lack {
            MissingPrerequisite::Cgroups(_) => {
                "mount -t cgroup2 none /sys/fs/cgroup/unified (in a container: -v /sys/fs/cgroup:/sys/fs/cgroup:ro)"
            }
            MissingPrerequisite::Remote(_) => "run imds-router on the engine's own host",
            MissingPrerequisite::Capabilities(_)
            | MissingPrerequisite::Processes
            | MissingPrerequisite::Network
            | MissingPrerequisite::Emulated { .. } => DOCKER_RUN,
        };
        let verdict = if accepted { Verdict::Note } else { Verdict::Wrong };
        found.add(
            verdict,
            format!("proof: {lack}"),
            "a caller could be proven by its address only, and a neighbour with NET_RAW can send with it",
            Some(fix),
        );
    }
    let inside = lacks.is_empty() && settings.attach != Attach::Host;
    if inside {
        let hosts = match kept {
            Some(_) => "those in the host's network are not served",
            None => "those in the host's network are answered over the host",
        };
        found.fine(format!(
            "attach: namespace; each served container gets a link of its own to the service ({hosts})"
        ));
    } else if let Some(kept) = kept.filter(|kept| !(kept.meant && settings.attach == Attach::Host)) {
        found.add(
            Verdict::Wrong,
            format!("attach: host, and this host has a metadata service of its own: {kept}"),
            "the daemon does not start: it would take that away from the host's own processes, and their role with it",
            Some("attach = \"auto\" with full proof; or [serve] host_imds = \"keep\" or \"replace\", if that is meant"),
        );
    } else {
        found.add(
            Verdict::Note,
            format!("attach: host; {ATTACH_HOST}"),
            "an address can be taken by a neighbor, and the credentials with it",
            Some("attach = \"auto\" with full proof; or docker run --cap-drop NET_RAW"),
        );
    }
}

fn host(settings: &Settings, kept: Option<Kept>, found: &mut Diagnosis) {
    if let Some(kept) = kept {
        found.add(
            Verdict::Note,
            format!(
                "host: its own metadata service is kept ({kept}); containers are rejected there, and served inside"
            ),
            "containers in the host's network are its processes: they get that service, with the host's role",
            Some("give them a network of their own"),
        );
    }
    // What only refuses where we do not serve has nobody who serves.
    for plan in plans(settings).into_iter().filter(Plan::is_a_lock) {
        match survey(&plan) {
            Ok(survey) if kept.is_some() => of_rejection(&survey, found),
            Ok(survey) => of_survey(settings, &survey, found),
            Err(error) => {
                let text = with_causes(&error);
                let (text, hint) = text.split_once("; hint: ").unwrap_or((&text, ""));
                let fix = match (&error, hint) {
                    (HostError::Denied { .. }, _) => "run imds-router doctor as root",
                    (_, "") => "see the kernel's own words above",
                    (_, hint) => hint,
                };
                found.add(
                    Verdict::Wrong,
                    format!("rules: {text}"),
                    "without rules of nf_tables a listener would need port 80, which applications and published ports want",
                    Some(fix),
                );
            }
        }
    }
}

/// Where the host keeps its own service.
fn of_rejection(survey: &Survey, found: &mut Diagnosis) {
    let family = survey.family;
    if survey.guarded {
        found.fine(format!(
            "rules: table {family} {GUARD_TABLE} rejects containers at the host's own metadata service"
        ));
    } else {
        found.add(
            Verdict::Wrong,
            format!("rules: there is no table {family} {GUARD_TABLE}"),
            "containers reach the host's own metadata service, and have its role",
            Some("imds-router intercept up; or imds-router serve, which puts it up, too"),
        );
    }
}

fn of_survey(settings: &Settings, survey: &Survey, found: &mut Diagnosis) {
    let family = survey.family;
    found.fine(format!("rules: the kernel has nf_tables ({family})"));
    match survey.holder {
        Some(holder) => found.fine(format!(
            "daemon: table {family} {RULES_TABLE} belongs to a live process (netlink port {holder})"
        )),
        None if survey.guarded => found.add(
            Verdict::Note,
            format!("daemon: none holds table {family} {RULES_TABLE}, and what it leaves behind refuses everybody"),
            "containers get \"connection refused\"; SDKs go on to their next source of credentials",
            Some("imds-router serve; or imds-router intercept down"),
        ),
        None => found.add(
            Verdict::Note,
            format!("daemon: none holds table {family} {RULES_TABLE}"),
            "requests of containers leave through the default route, to whatever answers there",
            Some("imds-router serve; or imds-router intercept up, which refuses them until it does"),
        ),
    }
    for foreign in &survey.foreign {
        found.add(
            Verdict::Note,
            format!("address: {foreign}, and not by imds-router"),
            "another metadata service may be set up here; with imds-router up its port 80 is not reached at that address",
            Some("stop the program that put it there, or take it away with ip addr del"),
        );
    }
    if family.is_ip() && !survey.dummy {
        found.fine(format!(
            "address: {IMDS_ADDRESS} goes to lo where the kernel can make no dummy link {LINK}; both will do"
        ));
    }
    for chain in &survey.dropping {
        let verdict = match settings.attach {
            Attach::Host => Verdict::Wrong,
            Attach::Auto | Attach::Namespace | Attach::Network => Verdict::Note,
        };
        found.add(
            verdict,
            format!("firewall: {chain} drops what it does not know"),
            "requests over a bridge (attach host) end in a timeout; attach namespace does not meet it",
            Some("iptables -I INPUT -d 169.254.169.254/32 -p tcp --dport 51254 -j ACCEPT"),
        );
    }
}

async fn daemon(settings: &Settings, status: &admin::Status, found: &mut Diagnosis) {
    found.fine(format!(
        "daemon: serves, version {}, attach {}, proof {}, engine {}",
        status.version, status.attach, status.proof, status.engine.state
    ));
    if let Some(why) = &status.engine.reason {
        found.add(
            Verdict::Wrong,
            format!("daemon: engine {}: {why}", status.engine.state),
            "the daemon does not know all containers; it repeats the call until the engine answers",
            Some("docker ps --all; journalctl --unit docker"),
        );
    }
    for warning in &status.warnings {
        found.add(
            Verdict::Note,
            format!("daemon: {warning}"),
            "it says so itself",
            Some("imds-router status"),
        );
    }
    links(settings, status, found).await;
    for container in status.containers.iter().filter(|it| !it.problems.is_empty()) {
        found.add(
            Verdict::Note,
            format!("container {}: {}", container.name, container.problems.join("; ")),
            "it does not get what it asks for, or shares it",
            Some(&format!("imds-router explain {}", container.name)),
        );
    }
}

/// Has the daemon look at the link of each container that runs.
async fn links(settings: &Settings, status: &admin::Status, found: &mut Diagnosis) {
    let mut reached = 0;
    for container in status
        .containers
        .iter()
        .filter(|it| it.alive && it.endpoint == "enabled")
    {
        let Ok(explained) = admin::ask_explanation(&settings.admin_socket, &container.id).await else {
            continue;
        };
        match explained.steps.iter().find(|step| step.step == "attach") {
            Some(step) if step.ok => reached += 1,
            Some(step) => found.add(
                Verdict::Note,
                format!("container {}: {}", container.name, step.seen),
                "its requests do not reach the daemon",
                Some(&format!("imds-router explain {}", container.name)),
            ),
            None => {}
        }
    }
    found.fine(format!("containers: {reached} reach the service (looked at now)"));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base_credentials_of_the_daemon_are_told() {
        let base = |profile: Option<&str>, arn: Option<&str>, error: Option<&str>, command: Option<&str>| {
            let text = |text: Option<&str>| text.map(str::to_owned);
            admin::BaseStatus {
                profile: text(profile),
                state: if error.is_some() { "failed" } else { "good" }.to_owned(),
                arn: text(arn),
                error: text(error),
                command: text(command),
                ..admin::BaseStatus::default()
            }
        };
        let bases = [
            base(None, Some("arn:aws:iam::111122223333:user/me"), None, None),
            base(
                Some("dev"),
                None,
                Some("the SSO login has ended"),
                Some("aws sso login --profile dev"),
            ),
        ];
        let mut found = Diagnosis::default();
        bases_of_daemon(&bases, &mut found);
        assert_eq!(
            found.render(),
            "ok    base credentials: arn:aws:iam::111122223333:user/me\n\
             note  base credentials of profile dev: failed: the SSO login has ended\n      \
             why it matters: containers get metadata, and no credentials for their roles\n      \
             fix: aws sso login --profile dev\n"
        );
        assert_eq!(found.wrong(), 0);
    }

    #[tokio::test]
    async fn missing_base_credentials_are_told_without_a_daemon() {
        let directory = tempfile::tempdir().unwrap();
        let settings = Settings {
            aws_dir: Some(directory.path().to_owned()),
            profile: Some("none".to_owned()),
            ..Settings::default()
        };
        let mut found = Diagnosis::default();
        bases_of_this_process(&settings, &mut found).await;
        let text = found.render();
        assert!(text.starts_with("note  base credentials: "), "{text}");
        assert!(text.contains("fix: --profile or AWS_PROFILE names a profile"), "{text}");
        assert!(text.ends_with('\n'), "{text}");
    }
}
