//! What each container would get, without serving anybody.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use super::host_mode::Kept;
use super::image_files::ImageFiles;
use super::{NOTHING_OF_HOST, base_identity, engine_host, host_metadata, host_name};
use crate::clock::Clock;
use crate::config::{Compat, CredentialSource, Settings};
use crate::containers::compose::{self, ComposeError};
use crate::containers::docker::Engine;
use crate::containers::image_labels::Images;
use crate::containers::legacy_labels;
use crate::containers::lookups::read_image;
use crate::containers::reconciler::{ContainerEngine as _, EngineError, split_environment};
use crate::containers::{ContainerId, Definition, NetworkEndpoints};
use crate::credentials::sts::Sts;
use crate::instance::{Instance, Role, RuntimeFacts, resolve};
use crate::logging::printable;

/// What `check` found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Checked {
    /// A line a container, for people.
    pub text: String,
    /// How many do not get what they ask for.
    pub problems: usize,
}

/// What each container of this host would get, without serving anybody; with `compat`, also what it got from the settings
/// of the programs that `[compat]` knows.
///
/// # Errors
/// When the engine does not answer.
pub async fn containers(settings: Settings, compat: bool) -> Result<Checked, EngineError> {
    let host = engine_host(&settings);
    let engine = Engine::new(&host, Clock::system());
    // The subscription connects; the events themselves are not wanted.
    drop(engine.subscribe().await?);
    let images = Images::new(Arc::new(ImageFiles::new(&settings.state_dir))).known();
    let mut checker = Checker::new(settings).await;
    let mut attachments = attachments(&engine).await?;
    let listed = engine.containers().await?;
    if let Some((id, why)) = listed.undescribed.first() {
        return Err(EngineError(format!("container {}: {why}", id.short())));
    }
    for row in listed.rows {
        let image = match row.image_is_certain {
            true => read_image(&engine, &images, &row.image_id).await?,
            false => None,
        };
        let all = engine
            .inspect(&row.id)
            .await?
            .map(|it| it.environment)
            .unwrap_or_default();
        let attached = attachments.remove(&row.id).unwrap_or_default();
        let settings = &checker.settings;
        let prefix = format!("{}.", settings.label_prefix);
        let mut whole = row.clone().define(None, true);
        let mut definition = row.define(image.as_deref(), settings.image_labels);
        definition.environment = Some(split_environment(&all, image.as_deref(), settings.image_labels));
        checker.look_at(&definition, &attached).await;
        let name = printable(&definition.name, 40);
        let settings = &checker.settings;
        let found = legacy_labels::found(&whole.labels, &all, &settings.label_prefix);
        if !compat || found.is_empty() {
            continue;
        }
        // What the other program saw: all labels and variables, the image's among them, and none of ours.
        whole
            .labels
            .retain(|label| !label.starts_with(&prefix) || found.iter().any(|it| it == label));
        whole.environment = Some(all.0.into_iter().collect());
        let old = Settings {
            compat: Compat::ALL,
            allow: Vec::new(),
            default_role: None,
            ..settings.clone()
        };
        let new = Settings {
            compat: Compat::ALL,
            ..settings.clone()
        };
        let (by_old, by_new) = (
            checker.gets(&whole, &attached, &old).0,
            checker.gets(&definition, &attached, &new).0,
        );
        let found = found.join(", ");
        checker.text.push_str(&format!(
            "{name}:   by {found} alone: {by_old}\n{name}:   with all of [compat]: {by_new}\n"
        ));
    }
    Ok(checker.end(&format!("containers on {host}")))
}

/// Resolves the services of a compose file, as `docker compose config` or `docker stack config` prints it. `project` overrides the name of the project.
///
/// # Errors
/// When it is not.
pub async fn services(settings: Settings, text: &str, project: Option<&str>) -> Result<Checked, ComposeError> {
    let composed = compose::services(text, project)?;
    let mut checker = Checker::new(settings).await;
    if composed.project.is_none() {
        checker.text.push_str(NO_PROJECT);
    }
    let prefix = format!("{}.", checker.settings.label_prefix);
    for container in &composed.containers {
        checker.look_at(&container.definition, &container.attachments).await;
        let ours = container
            .labels_of_deploy
            .iter()
            .filter(|name| name.starts_with(&prefix));
        let ours: Vec<_> = ours.map(|name| printable(name, 100)).collect();
        if !ours.is_empty() {
            checker.problems += 1;
            checker.text.push_str(&format!(
                "{}: deploy.labels has {}: a label of the swarm service, not of its containers; move it to labels:\n",
                printable(&container.definition.name, 40),
                ours.join(", ")
            ));
        }
    }
    Ok(checker.end("services"))
}

const NO_PROJECT: &str = "warning: the file has no name of a project: rules and templates that use the project are checked without it; \
    COMPOSE_PROJECT_NAME=NAME sets it\n";

/// Finds out what containers would get.
struct Checker {
    settings: Settings,
    facts: RuntimeFacts,
    sts: Option<Sts>,
    text: String,
    containers: usize,
    problems: usize,
}

impl Checker {
    async fn new(settings: Settings) -> Self {
        let mut facts = RuntimeFacts {
            host: host_name(),
            ..RuntimeFacts::default()
        };
        let mut text = String::new();
        let sts = (settings.source == CredentialSource::Sts).then(|| {
            let clock = Clock::system();
            Sts::new(base_identity::bases(&settings, &clock), clock)
        });
        if let Some(sts) = &sts {
            let (base, _) = base_identity::ask(sts, None).await;
            let said = base.arn.as_ref().or(base.problem.as_ref());
            text.push_str(&format!(
                "base credentials: {}\n",
                said.map_or("unknown", String::as_str)
            ));
            base_identity::note(&mut facts, None, base);
        }
        text.push_str(&rules(&settings));
        if settings.metadata_of_host {
            let service = Kept::here(&settings).and_then(|kept| kept.ec2());
            let found = match service {
                Some(service) => host_metadata::gather(&service).await,
                None => Err(NOTHING_OF_HOST.to_owned()),
            };
            match found {
                Ok(found) => facts.instance = Arc::new(found),
                Err(why) => text.push_str(&format!("warning: what EC2 says of this host: {why}\n")),
            }
        }
        Self {
            settings,
            facts,
            sts,
            text,
            containers: 0,
            problems: 0,
        }
    }

    /// One container: a line.
    async fn look_at(&mut self, definition: &Definition, attached: &NetworkEndpoints) {
        let first = self.resolved(definition, attached, &self.settings);
        if let (Some(sts), Some(profile)) = (&self.sts, &first.profile)
            && !self.facts.profiles.contains_key(profile)
        {
            let (base, _) = base_identity::ask(sts, Some(profile)).await;
            base_identity::note(&mut self.facts, Some(profile), base);
        }
        let instance = self.resolved(definition, attached, &self.settings);
        let (said, fine) = described(&instance);
        self.containers += 1;
        self.problems += usize::from(!fine);
        let name = printable(&definition.name, 40);
        self.text.push_str(&format!("{name}: {said}\n"));
        for note in &instance.notes {
            self.text.push_str(&format!("{name}: {}\n", printable(note, 800)));
        }
    }

    fn resolved(&self, definition: &Definition, attached: &NetworkEndpoints, settings: &Settings) -> Instance {
        resolve(definition, attached, SystemTime::UNIX_EPOCH, settings, &self.facts)
    }

    fn gets(&self, definition: &Definition, attached: &NetworkEndpoints, settings: &Settings) -> (String, bool) {
        described(&self.resolved(definition, attached, settings))
    }

    fn end(mut self, of_what: &str) -> Checked {
        self.text.push_str(&format!("{} {of_what}\n", self.containers));
        Checked {
            text: self.text,
            problems: self.problems,
        }
    }
}

/// What a container gets, and whether that is what it asks for.
fn described(instance: &Instance) -> (String, bool) {
    let rule = instance
        .rule
        .as_ref()
        .map(|rule| format!(", by {rule}"))
        .unwrap_or_default();
    match &instance.role {
        _ if !instance.endpoint => (
            "not served: no label of ours, or its endpoint is disabled".to_owned(),
            true,
        ),
        Role::None => ("metadata, no role".to_owned(), true),
        Role::Session(session) => (format!("{}{rule}", printable(&session.to_string(), 400)), true),
        Role::Pending(why) | Role::Refused(why) => (format!("no credentials: {}", printable(why, 800)), false),
    }
}

/// What there is to say about the rules themselves.
fn rules(settings: &Settings) -> String {
    let mut text = String::new();
    if settings.allow.is_empty() {
        text.push_str("no [[allow]] rules: any container gets any role that it names and that the base may assume\n");
    }
    for rule in &settings.allow {
        if let Some(keys) = rule.rests_on_its_applicants() {
            text.push_str(&format!(
                "warning: {rule} rests on {keys}: whoever writes a container's role label writes that, too, so the rule \
                 keeps mistakes out, but nobody who means it; image_id would\n"
            ));
        }
    }
    text
}

/// Which container is on which network.
async fn attachments(engine: &Engine) -> Result<HashMap<ContainerId, NetworkEndpoints>, EngineError> {
    let mut all: HashMap<ContainerId, NetworkEndpoints> = HashMap::new();
    for id in engine.networks().await? {
        // One that has gone meanwhile has nobody on it.
        let Some(network) = engine.network(&id).await? else {
            continue;
        };
        for (container, endpoint) in network.endpoints {
            all.entry(container).or_default().0.insert(id.clone(), endpoint);
        }
    }
    Ok(all)
}
