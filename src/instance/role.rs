//! The session that a container gets, or why it gets none.

use std::cell::RefCell;
use std::sync::Arc;

use super::{Base, Role, RuntimeFacts, image_labels};
use crate::config::{CredentialSource, Settings, fill};
use crate::containers::label_sources::Origin;
use crate::containers::labels::ContainerSpec;
use crate::containers::{Definition, NetworkEndpoints, NetworkMode, compose};
use crate::credentials::allow_rules::{self, Attribute, NotAllowed, Requester, RoleRequest};
use crate::credentials::role_reference::{NamedRole, read_role};
use crate::credentials::session_inputs::{CHAINED, Inputs};
use crate::credentials::{ProfileSession, RoleArn, RoleSession, Session, clean_session_name, offline};

/// What decides.
pub(super) struct Case<'a> {
    pub container: &'a Definition,
    pub attachments: &'a NetworkEndpoints,
    pub spec: &'a ContainerSpec,
    pub settings: &'a Settings,
    pub facts: &'a RuntimeFacts,
    pub region: &'a str,
    pub partition: &'a str,
}

/// What comes of it.
pub(super) struct Verdict {
    pub role: Role,
    /// The role that IMDS lists.
    pub listed: Option<RoleArn>,
    /// The profile that has to be read.
    pub profile: Option<String>,
    /// The rule that decided.
    pub rule: Option<String>,
    /// It may turn out that it asks for none.
    pub open: bool,
    /// Why it is treated as if it asked for none.
    pub note: Option<String>,
    /// Whether a refusal has another cause than an error of labels: a rule, or a limit of STS. Errors of labels come first, so that a
    /// pair of the image cannot replace one by such a cause.
    pub labels_in_order: bool,
}

impl Verdict {
    fn of(role: Role) -> Self {
        Self {
            role,
            listed: None,
            profile: None,
            rule: None,
            open: false,
            note: None,
            labels_in_order: false,
        }
    }
}

/// Refuses credentials to a container because of `problem`.
///
/// A container that neither has a label of its own nor gets the default role asked for none, and finds no metadata service
/// ([`crate::config::HttpEndpoint::Labeled`]): pairs of its image must not change that.
pub(super) fn refuse(case: &Case<'_>, problem: &str) -> Verdict {
    let refused = Verdict::of(Role::Refused(problem.to_owned()));
    let default_role = case.settings.default_role.as_deref();
    match default_role.map(|template| case.fill(template)) {
        _ if case.spec.labeled => refused,
        Some(Ok(Some(_))) => refused,
        Some(Err(Role::Pending(_))) => Verdict { open: true, ..refused },
        Some(Ok(None) | Err(_)) | None => Verdict::of(Role::None),
    }
}

/// Decides on the role of a container whose labels are in order.
pub(super) fn decide(case: &Case<'_>) -> Verdict {
    let mut verdict = Verdict::of(Role::None);
    match case.grant(&mut verdict) {
        Ok((session, listed)) => {
            verdict.role = Role::Session(Arc::new(session));
            verdict.listed = Some(listed);
        }
        Err(role) => verdict.role = role,
    }
    verdict
}

impl Verdict {
    /// The role of a container that the rules do not allow to have one.
    fn not_allowed(&mut self, why: NotAllowed) -> Role {
        match why {
            NotAllowed::Pending(what) => Role::Pending(what),
            NotAllowed::Refused(why) => {
                self.labels_in_order = true;
                Role::Refused(why)
            }
            // A pair of the image must not make the container freer than it was.
            NotAllowed::Ambiguous(why) => Role::Refused(why),
        }
    }
}

impl Case<'_> {
    fn grant(&self, verdict: &mut Verdict) -> Result<(Session, RoleArn), Role> {
        let (spec, rules) = (self.spec, &self.settings.allow);
        if spec.waits_for_environment {
            verdict.open = true;
            return Err(Role::Pending(
                "its variables may name a role, and are not known yet".to_owned(),
            ));
        }
        let typed = match (&spec.role, &spec.profile, &self.settings.default_role) {
            (Some(typed), ..) => Some(typed.clone()),
            (None, None, Some(template)) => match self.fill(template) {
                Ok(filled) => filled,
                // It may have no role at all, so that it finds no metadata service either.
                Err(Role::Refused(why)) => {
                    verdict.note = Some(why);
                    return Err(Role::None);
                }
                Err(pending) => {
                    verdict.open = true;
                    return Err(pending);
                }
            },
            _ => None,
        };
        let who = self.applicant();
        if let Some(profile) = &spec.profile {
            allow_rules::may_name(rules, &who, profile).map_err(|why| verdict.not_allowed(why))?;
            verdict.profile = Some(profile.clone());
        }
        let profile = spec.profile.as_deref();
        let base = self.facts.base(profile);
        let Some(typed) = typed else {
            return match profile {
                Some(profile) => self.profile_as_it_is(profile, base, verdict),
                None if spec.inputs == Inputs::default() || !spec.labeled => Err(Role::None),
                None => Err(Role::Refused(format!(
                    "labels {prefix}.role.… without {prefix}.role: there is no role that they are for",
                    prefix = self.settings.label_prefix
                ))),
            };
        };
        let role = self.role(&typed, base)?;
        let chain: Result<Vec<_>, _> = spec.inputs.chain.iter().map(|typed| self.role(typed, base)).collect();
        let chain = chain?;

        let mut inputs = spec.inputs.clone();
        if let Some(template) = &inputs.session_name {
            let name = self.fill(template)?.ok_or_else(|| {
                Role::Refused(format!(
                    "label {}.role.session-name={template:?}: a part of it is not set for this container",
                    self.settings.label_prefix
                ))
            })?;
            inputs.session_name = Some(clean_session_name(&name));
        }
        let session_name = match &inputs.session_name {
            Some(name) => name.clone(),
            None => {
                let name = self.fill(&self.settings.session_name)?;
                clean_session_name(&name.unwrap_or_else(|| self.container.name.clone()))
            }
        };
        let wish = RoleRequest {
            role: Some(&role),
            profile,
            chain: &chain,
            inputs: &inputs,
            default_duration: self.settings.duration,
        };
        let rule = allow_rules::decide(rules, &who, &wish).map_err(|why| verdict.not_allowed(why))?;
        verdict.rule = rule.map(ToString::to_string);
        let abroad = |role: &&RoleArn| base.partition().is_some_and(|partition| partition != role.partition());
        if let (Some(abroad), Some(arn)) = (chain.iter().chain([&role]).find(abroad), &base.arn) {
            verdict.labels_in_order = true;
            return Err(Role::Refused(format!(
                "role {abroad} is in partition {}, and the base credentials, {arn}, are not: {}.profile names others",
                abroad.partition(),
                self.settings.label_prefix
            )));
        }

        // Whoever asks with a role's session is bound to an hour, be it one of the chain or the base's own.
        let chained = !chain.is_empty() || base.role_name().is_some();
        if let Some(asked) = inputs.duration.filter(|asked| chained && *asked > CHAINED) {
            verdict.labels_in_order = true;
            return Err(Role::Refused(format!(
                "label {}.role.duration asks for {}m, and STS gives at most 60m to whoever asks with a role's session, \
                 as the base credentials are",
                self.settings.label_prefix,
                asked.as_secs() / 60
            )));
        }
        let mut duration = self.duration(rule);
        if chained {
            duration = duration.min(CHAINED);
        }
        // A session of another length is another session: none is begun that STS might refuse.
        if duration > CHAINED && base.arn.is_none() && self.settings.source == CredentialSource::Sts {
            let why = base.problem.as_deref().unwrap_or("STS has not said it yet");
            return Err(Role::Pending(format!(
                "a session of {}m depends on whose the base credentials are: {why}",
                duration.as_secs() / 60
            )));
        }
        let mut session = RoleSession::new(role.clone(), session_name, duration, self.region);
        session.profile = spec.profile.clone();
        session.chain = chain;
        session.external_id = inputs.external_id;
        session.source_identity = inputs.source_identity;
        session.tags = inputs.tags;
        session.transitive_tag_keys = inputs.transitive_tag_keys;
        // Never both: session policies of one call are joined, and the rule has refused a label's where it has its own.
        match rule {
            Some(rule) if rule.has_ceiling() => {
                session.policy = rule.session_policy.clone();
                session.policy_arns = rule.session_policy_arns.clone();
            }
            _ => {
                session.policy = inputs.policy;
                session.policy_arns = inputs.policy_arns;
            }
        }
        Ok((Session::Role(session), role))
    }

    fn profile_as_it_is(&self, profile: &str, base: &Base, verdict: &mut Verdict) -> Result<(Session, RoleArn), Role> {
        let wish = RoleRequest {
            role: None,
            profile: Some(profile),
            chain: &[],
            inputs: &self.spec.inputs,
            default_duration: self.settings.duration,
        };
        let rule = allow_rules::decide(&self.settings.allow, &self.applicant(), &wish);
        let rule = rule.map_err(|why| verdict.not_allowed(why))?;
        verdict.rule = rule.map(ToString::to_string);
        let account = self.account(base).ok_or_else(|| {
            let why = base.problem.as_deref().unwrap_or("STS has not said yet whose it is");
            Role::Pending(format!("profile {profile}: {why}"))
        })?;
        // The role that it is a session of; a user has none, and the profile's name stands for it.
        let name = base
            .role_name()
            .map_or_else(|| clean_session_name(profile), str::to_owned);
        let session = ProfileSession {
            profile: Some(profile.to_owned()),
            duration: self.duration(rule),
            region: self.region.to_owned(),
        };
        Ok((Session::Profile(session), RoleArn::of(self.partition, account, &name)))
    }

    /// As long as the label or the configuration says, and never longer than the rule.
    fn duration(&self, rule: Option<&allow_rules::Rule>) -> std::time::Duration {
        let by_default = self.settings.duration;
        let asked = match self.spec.inputs.duration {
            Some(asked) if self.spec.duration_only_restricts => asked.min(by_default),
            Some(asked) => asked,
            None => by_default,
        };
        rule.and_then(|rule| rule.max_duration)
            .map_or(asked, |most| asked.min(most))
    }

    /// The account in which roles by name are.
    fn account<'a>(&'a self, base: &'a Base) -> Option<&'a str> {
        let configured = self
            .settings
            .account_id
            .as_deref()
            .filter(|_| self.spec.profile.is_none());
        let offline = (self.settings.source == CredentialSource::Offline).then_some(offline::ACCOUNT);
        configured.or(base.account.as_deref()).or(offline)
    }

    fn role(&self, typed: &str, base: &Base) -> Result<RoleArn, Role> {
        let named =
            read_role(typed, self.settings, self.partition).map_err(|error| Role::Refused(error.to_string()))?;
        let account = match &named {
            NamedRole::Arn(_) => None,
            NamedRole::InBaseAccount(_) => self.account(base),
        };
        named.arn(self.partition, account).ok_or_else(|| {
            let why = match (&base.problem, &self.spec.profile) {
                (Some(problem), _) => format!(": {problem}"),
                (None, Some(profile)) => format!(" (profile {profile})"),
                (None, None) => "; account_id in the configuration says it, too".to_owned(),
            };
            Role::Pending(format!(
                "role {typed} is in the account of the base credentials, which STS has not said yet{why}"
            ))
        })
    }

    /// Fills a template; `None` when a part is not set for this container. A part that the image may have set is an error: with it
    /// and without it, the result is another one.
    fn fill(&self, template: &str) -> Result<Option<String>, Role> {
        let container = self.container;
        if template.contains("{env:") && container.environment.is_none() {
            return Err(Role::Pending("its variables are not known yet".to_owned()));
        }
        let unclear = RefCell::new(Vec::new());
        let own = |name: String, pair: Option<(&str, Origin)>| {
            let (value, origin) = pair?;
            if origin == Origin::Ambiguous {
                unclear.borrow_mut().push(name);
            }
            Some(value.to_owned())
        };
        let filled = fill(template, |name| match (name, name.split_once(':')) {
            ("container", _) => Some(container.name.clone()),
            ("project", _) => own(format!("label {}", compose::PROJECT), container.project()),
            ("service", _) => own(format!("label {}", compose::SERVICE), container.service()),
            ("id", _) => Some(container.id.short().to_owned()),
            ("host", _) => Some(self.facts.host.clone()),
            (_, Some(("label", key))) => own(format!("label {key}"), container.labels.get(key)),
            (_, Some(("env", key))) => own(format!("variable {key}"), container.environment.as_ref()?.get(key)),
            _ => None,
        });
        let unclear = unclear.into_inner();
        match unclear.is_empty() {
            true => Ok(filled),
            false => Err(Role::Refused(image_labels::unknown_setter(
                container,
                &unclear.join(", "),
            ))),
        }
    }

    fn applicant(&self) -> Requester<'_> {
        let container = self.container;
        Requester {
            container: &container.name,
            image: &container.image,
            image_id: &container.image_id,
            project: container.project().map(attribute),
            service: container.service().map(attribute),
            networks: match container.network_mode {
                NetworkMode::Host => Some(vec!["host"]),
                // What its namespace is on is not its own.
                NetworkMode::Container(_) => Some(Vec::new()),
                NetworkMode::Own if self.attachments.0.is_empty() => None,
                NetworkMode::Own => Some(self.attachments.0.values().map(|it| it.network.as_str()).collect()),
            },
            labels: container
                .labels
                .iter()
                .map(|(name, value, origin)| (name.as_str(), attribute((value, origin))))
                .collect(),
        }
    }
}

fn attribute((value, origin): (&str, Origin)) -> Attribute<'_> {
    Attribute {
        value,
        is_own: origin == Origin::Own,
    }
}
