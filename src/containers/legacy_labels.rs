//! What containers carry for other programs that did this before: read only where `[compat]` says so.
//!
//! | key | of | what |
//! |---|---|---|
//! | `iam_docker` | iam-docker | label `com.swipely.iam-docker.iam-profile`: a role ARN |
//! | `env` | metadataproxy, go-metadataproxy | variables `IAM_ROLE` (name, `name@account`, `name@alias`, ARN) and `IAM_EXTERNAL_ID` |
//! | `env` | ec2metaproxy | variables `IAM_ROLE` (ARN) and `IAM_POLICY` (a session policy) |
//! | `imds_server` | imds-server | labels `imds.aws.role`, `.profile`, `.external-id`, `.session-duration` (seconds), `.ambient` |
//!
//! Labels of ours win: where a container has `imds.role` or `imds.profile`, none of this is looked at. Otherwise the first
//! of the table that names a role (or a profile) gives all. What is read is an input like those of our labels, and subject
//! to the same rules.

use std::time::Duration;

use super::label_sources::Pairs;
use super::labels::{Class, ContainerSpec, LabelError};
use super::{Environment, Labels};
use crate::config::Settings;
use crate::credentials::{Secret, session_inputs};

/// iam-docker's label.
pub const IAM_DOCKER: &str = "com.swipely.iam-docker.iam-profile";
/// What imds-server's labels start with, after our prefix.
pub const IMDS_SERVER: &str = "aws.";
const IAM_ROLE: &str = "IAM_ROLE";
const IAM_EXTERNAL_ID: &str = "IAM_EXTERNAL_ID";
const IAM_POLICY: &str = "IAM_POLICY";
/// The variables, and the effect of each when the image has the same.
pub(super) const VARIABLES: [(&str, Class); 3] = [
    (IAM_ROLE, Class::Chooses),
    (IAM_EXTERNAL_ID, Class::Chooses),
    (IAM_POLICY, Class::SessionPolicy),
];

/// The effect of a label of imds-server, by its name after our prefix, when the image has the same.
pub(super) fn imds_server_class(name: &str) -> Class {
    match name.strip_prefix(IMDS_SERVER) {
        Some("session-duration") => Class::Restricts,
        Some("ambient") => Class::Fact,
        _ => Class::Chooses,
    }
}

/// The labels and variables of other programs that a container has, by name.
pub fn found(labels: &Pairs, environment: &Environment, label_prefix: &str) -> Vec<String> {
    let imds_server = format!("{label_prefix}.{IMDS_SERVER}");
    let labels = labels.iter().map(|(label, ..)| label);
    let labels = labels.filter(|it| *it == IAM_DOCKER || it.starts_with(&imds_server));
    let variables = VARIABLES.into_iter().map(|(name, _)| name);
    let variables = variables.filter(|it| environment.get(it).is_some());
    labels.cloned().chain(variables.map(str::to_owned)).collect()
}

/// Where a value stands, for messages.
fn bad(label: &str, value: &str, expected: &str) -> LabelError {
    LabelError::BadValue {
        label: label.to_owned(),
        value: value.to_owned(),
        expected: expected.to_owned(),
    }
}

/// Adds what other programs' settings say to what ours say.
pub(super) fn read(
    labels: &Labels,
    environment: Option<&Labels>,
    settings: &Settings,
    spec: &mut ContainerSpec,
    errors: &mut Vec<LabelError>,
) {
    let wanted = settings.compat;
    if spec.role.is_some() || spec.profile.is_some() {
        return;
    }
    if let Some(role) = labels.get(IAM_DOCKER).filter(|it| wanted.iam_docker && !it.is_empty()) {
        spec.labeled = true;
        if !role.starts_with("arn:") {
            errors.push(bad(IAM_DOCKER, role, "a role ARN"));
        }
        spec.role = Some(role.clone());
        return;
    }
    if wanted.imds_server
        && imds_server(
            labels,
            &format!("{}.{IMDS_SERVER}", settings.label_prefix),
            spec,
            errors,
        )
    {
        return;
    }
    if wanted.env {
        match environment {
            Some(environment) => variables(environment, spec, errors),
            None => spec.waits_for_environment = true,
        }
    }
}

fn variables(environment: &Labels, spec: &mut ContainerSpec, errors: &mut Vec<LabelError>) {
    let get = |name: &str| environment.get(name).map(String::as_str).filter(|it| !it.is_empty());
    let Some(value) = get(IAM_ROLE) else { return };
    spec.labeled = true;
    spec.role = Some(value.to_owned());
    if let Some(value) = get(IAM_EXTERNAL_ID).filter(|_| spec.inputs.external_id.is_none()) {
        match session_inputs::is_external_id(value) {
            true => spec.inputs.external_id = Some(Secret::new(value)),
            false => errors.push(bad(
                IAM_EXTERNAL_ID,
                "…",
                "2 to 1224 characters: letters, digits and _+=,.@:/-",
            )),
        }
    }
    if let Some(value) = get(IAM_POLICY).filter(|_| spec.inputs.policy.is_none()) {
        match session_inputs::is_policy(value) {
            true => spec.inputs.policy = Some(value.to_owned()),
            false => errors.push(bad(
                IAM_POLICY,
                value,
                "an IAM policy in JSON with a Statement, of at most 2048 characters",
            )),
        }
    }
}

/// Whether these labels say anything.
fn imds_server(labels: &Labels, prefix: &str, spec: &mut ContainerSpec, errors: &mut Vec<LabelError>) -> bool {
    let mut any = false;
    for (label, value) in labels {
        let Some(name) = label.strip_prefix(prefix) else {
            continue;
        };
        any = true;
        let read = match name {
            "role" => {
                spec.role = Some(value.clone());
                value.starts_with("arn:").then_some(()).ok_or("a role ARN")
            }
            "profile" => {
                spec.profile = Some(value.clone());
                (!value.trim().is_empty()).then_some(()).ok_or("the name of a profile")
            }
            "external-id" => {
                spec.inputs.external_id = Some(Secret::new(value));
                session_inputs::is_external_id(value)
                    .then_some(())
                    .ok_or("2 to 1224 characters: letters, digits and _+=,.@:/-")
            }
            "session-duration" => {
                let duration = value.parse().ok().map(Duration::from_secs);
                let duration = duration.filter(|it| session_inputs::DURATION.contains(it));
                duration
                    .map(|it| spec.shorten_session(it))
                    .ok_or("seconds, from 900 to 43200")
            }
            // The daemon's own base credentials for the container: that is what a profile is for.
            "ambient" if value == "false" => Ok(()),
            "ambient" => Err("false: the daemon's own credentials are handed to nobody; imds.profile names a profile"),
            "access-key-id" | "secret-access-key" | "session-token" => {
                Err("no keys in labels: everybody who may look at containers reads them; put them into a profile")
            }
            _ => Err("role, profile, external-id or session-duration behind imds.aws"),
        };
        if let Err(expected) = read {
            let secret = matches!(name, "external-id" | "secret-access-key" | "session-token");
            errors.push(bad(label, if secret { "…" } else { value }, expected));
        }
    }
    any
}
