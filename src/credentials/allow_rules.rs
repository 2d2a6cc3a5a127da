//! Which container may have which role: the operator's `[[allow]]` rules. Pure.
//!
//! Without rules every container may have every role. With any rule, a container gets only what a rule allows. The first
//! rule that covers the container and the role decides; the rules after it are not asked, so that no label can choose a
//! laxer one.
//!
//! Who writes what a rule may look at:
//!
//! | key | who writes it |
//! |---|---|
//! | `container`, `project`, `service`, `label`, `network` | whoever starts the container, who writes `imds.role`, too |
//! | `image` | the same: any image can be given any name |
//! | `image_id` | whoever built the image; whoever starts the container chooses among images, and what runs in it |
//!
//! # The ceiling
//! `session_policy` and `session_policy_arns` of a rule are given to STS as session policies: what the session may do is
//! the intersection of the role's own policies and of them. The session policies of *one* AssumeRole are joined, not
//! intersected (IAM user guide, "Session policies"): a second one widens what the first one leaves. So where a rule has a
//! ceiling, a label's own session policy is refused. A resource's policy that names the session itself is not bounded by
//! session policies.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use super::session_inputs::Inputs;
use super::{RoleArn, Secret};

/// A pattern: `*`, `?`, `[abc]`. In roles and images, `*` stays between two `/`, and `**` does not.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Glob(glob::Pattern);

impl Glob {
    /// Reads a pattern; `None` where it is none.
    pub fn parse(text: &str) -> Option<Self> {
        (!text.is_empty()).then(|| glob::Pattern::new(text).ok())?.map(Self)
    }

    fn matches(&self, text: &str, paths: bool) -> bool {
        let options = glob::MatchOptions {
            case_sensitive: true,
            require_literal_separator: paths,
            require_literal_leading_dot: false,
        };
        self.0.matches_with(text, options)
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_str())
    }
}

/// `KEY`, or `KEY=VALUE`, both of them patterns.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Pair {
    key: Glob,
    value: Option<Glob>,
}

impl Pair {
    /// Reads `KEY` or `KEY=VALUE`.
    pub fn parse(text: &str) -> Option<Self> {
        let (key, value) = match text.split_once('=') {
            Some((key, value)) => (key, Some(Glob::parse(value)?)),
            None => (text, None),
        };
        Some(Self {
            key: Glob::parse(key)?,
            value,
        })
    }

    fn matches(&self, key: &str, value: &str) -> bool {
        self.key.matches(key, false) && self.value.as_ref().is_none_or(|it| it.matches(value, false))
    }
}

impl fmt::Display for Pair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={value}", self.key),
            None => self.key.fmt(f),
        }
    }
}

/// One `[[allow]]`. Of a list of patterns one must match; an empty list is a key that is not there.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Rule {
    /// Its number, from 1.
    pub number: usize,
    /// The line where it begins.
    pub line: usize,
    /// Containers by name.
    pub container: Vec<Glob>,
    /// Containers by the image as named.
    pub image: Vec<Glob>,
    /// Containers by the image's id (`sha256:…`).
    pub image_id: Vec<Glob>,
    /// Containers by compose project.
    pub project: Vec<Glob>,
    /// Containers by compose service.
    pub service: Vec<Glob>,
    /// Containers by the networks that they are on: one of them must match.
    pub network: Vec<Glob>,
    /// Containers by their labels: each of these must be there.
    pub label: Vec<Pair>,
    /// Roles, by ARN.
    pub role: Vec<Glob>,
    /// Profiles that labels may name. Without `role`: profiles that may be served as they are.
    pub profile: Vec<Glob>,
    /// Session names that labels may set.
    pub session_name: Vec<Glob>,
    /// External ids that labels may set.
    pub external_id: Vec<Glob>,
    /// Source identities that labels may set.
    pub source_identity: Vec<Glob>,
    /// Session tags that labels may set.
    pub session_tags: Vec<Pair>,
    /// The ceiling: managed session policies.
    pub session_policy_arns: BTreeSet<String>,
    /// The ceiling: an inline session policy.
    pub session_policy: Option<String>,
    /// The longest session. Without it, labels can make sessions shorter, not longer.
    pub max_duration: Option<Duration>,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "allow rule {} (line {})", self.number, self.line)
    }
}

/// A label of a container.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Attribute<'a> {
    /// Its value.
    pub value: &'a str,
    /// Whether it was set when the container was created. Otherwise it may come from the image.
    pub is_own: bool,
}

/// The container that asks, as far as rules look at it.
#[derive(Clone, Debug)]
pub struct Requester<'a> {
    /// Name.
    pub container: &'a str,
    /// Image as named.
    pub image: &'a str,
    /// Image id.
    pub image_id: &'a str,
    /// Compose project.
    pub project: Option<Attribute<'a>>,
    /// Compose service.
    pub service: Option<Attribute<'a>>,
    /// Names of its networks; `None`: not known yet.
    pub networks: Option<Vec<&'a str>>,
    /// Its labels, by name.
    pub labels: Vec<(&'a str, Attribute<'a>)>,
}

/// What it asks for.
#[derive(Clone, Copy, Debug)]
pub struct RoleRequest<'a> {
    /// The role; `None`: the profile as it is.
    pub role: Option<&'a RoleArn>,
    /// The profile that a label names.
    pub profile: Option<&'a str>,
    /// Roles to go through.
    pub chain: &'a [RoleArn],
    /// What labels set, the session name filled in.
    pub inputs: &'a Inputs,
    /// How long sessions are without a label.
    pub default_duration: Duration,
}

/// Why it does not get it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotAllowed {
    /// Something that decides is not known yet.
    #[error("{0}")]
    Pending(String),
    /// Never, as things are.
    #[error("{0}")]
    Refused(String),
    /// A rule looks at a label that may come from the image.
    #[error("{0}")]
    Ambiguous(String),
}

/// Whether a rule is the one that decides.
enum Covers {
    Yes,
    /// What of it does not fit.
    No(String),
    /// It matches by a label that may come from the image, so that it is unknown whether the rule decides.
    Ambiguous(String),
    /// What has to be known first.
    Unknown(&'static str),
}

/// The rule by which the wish is granted; `None`: there are no rules.
///
/// # Errors
/// Why it is not granted, with the rule's name.
pub fn decide<'r>(
    rules: &'r [Rule],
    who: &Requester<'_>,
    wish: &RoleRequest<'_>,
) -> Result<Option<&'r Rule>, NotAllowed> {
    if rules.is_empty() {
        return Ok(None);
    }
    for hop in wish.chain {
        first(rules, who, Some(hop), wish.profile)?;
    }
    let rule = first(rules, who, wish.role, wish.profile)?;
    rule.permits(wish).map_err(NotAllowed::Refused)?;
    Ok(Some(rule))
}

/// Whether any rule lets the container name the profile, whatever for. Before the answer is yes, the profile is not read.
///
/// # Errors
/// Why not, with each rule's name.
pub fn may_name(rules: &[Rule], who: &Requester<'_>, profile: &str) -> Result<(), NotAllowed> {
    if rules.is_empty() {
        return Ok(());
    }
    search(rules, &format!("profile {profile}"), |rule| {
        rule.covers(who, |rule| rule.of_profile(Some(profile)))
    })
    .map(drop)
}

fn first<'r>(
    rules: &'r [Rule],
    who: &Requester<'_>,
    role: Option<&RoleArn>,
    profile: Option<&str>,
) -> Result<&'r Rule, NotAllowed> {
    let what = match (role, profile) {
        (Some(role), Some(profile)) => format!("role {role} by profile {profile}"),
        (Some(role), None) => format!("role {role}"),
        (None, profile) => format!("profile {} as it is", profile.unwrap_or("of the daemon")),
    };
    search(rules, &what, |rule| {
        rule.covers(who, |rule| rule.of_role(role).and_then(|()| rule.of_profile(profile)))
    })
}

fn search<'r>(rules: &'r [Rule], what: &str, covers: impl Fn(&Rule) -> Covers) -> Result<&'r Rule, NotAllowed> {
    // As many as a line can bear.
    const TOLD: usize = 5;
    let mut why = Vec::new();
    for rule in rules {
        match covers(rule) {
            Covers::Yes => return Ok(rule),
            Covers::No(reason) => why.push(format!("{rule}: {reason}")),
            Covers::Ambiguous(label) => {
                return Err(NotAllowed::Ambiguous(format!(
                    "{what}: {rule} looks at label {label}, and it is unknown whether the image set it; use an image that can be \
                     read and does not have the label, or set [docker] image_labels = true"
                )));
            }
            Covers::Unknown(what) => return Err(NotAllowed::Pending(format!("{rule} looks at {what}, not known yet"))),
        }
    }
    let more = why.len().saturating_sub(TOLD);
    why.truncate(TOLD);
    let more = if more > 0 {
        format!("; and {more} more")
    } else {
        String::new()
    };
    Err(NotAllowed::Refused(format!(
        "{what} is not allowed to this container: {}{more}",
        why.join("; ")
    )))
}

fn list<T: fmt::Display>(items: &[T]) -> String {
    let items: Vec<_> = items.iter().map(ToString::to_string).collect();
    items.join(", ")
}

impl Rule {
    fn covers(&self, who: &Requester<'_>, what: impl Fn(&Self) -> Result<(), String>) -> Covers {
        let own = |value| Some(Attribute { value, is_own: true });
        let texts = [
            ("container", &self.container, own(who.container), false),
            ("image", &self.image, own(who.image), true),
            ("image_id", &self.image_id, own(who.image_id), false),
            ("project", &self.project, who.project, false),
            ("service", &self.service, who.service, false),
        ];
        let mut ambiguous = None;
        for (key, globs, attribute, paths) in texts {
            if globs.is_empty() {
                continue;
            }
            let matches = |it: &Attribute<'_>| globs.iter().any(|glob| glob.matches(it.value, paths));
            match attribute.filter(matches) {
                Some(attribute) if attribute.is_own => {}
                Some(_) => ambiguous = Some(format!("com.docker.compose.{key}")),
                None => {
                    let value = attribute.map_or("none", |it| it.value);
                    return Covers::No(format!("the container's {key} is {value}"));
                }
            }
        }
        for pair in &self.label {
            let mut matching = who
                .labels
                .iter()
                .filter(|(key, it)| pair.matches(key, it.value))
                .peekable();
            match matching.peek() {
                None => return Covers::No(format!("there is no label {pair}")),
                Some((key, _)) => {
                    let key = (*key).to_owned();
                    if !matching.any(|(_, it)| it.is_own) {
                        ambiguous = Some(key);
                    }
                }
            }
        }
        if let Err(why) = what(self) {
            return Covers::No(why);
        }
        let fits = ambiguous.map_or(Covers::Yes, Covers::Ambiguous);
        // Last, since it may not be known yet: a rule that does not fit anyhow must not make it wait.
        match &who.networks {
            _ if self.network.is_empty() => fits,
            None => Covers::Unknown("the container's networks"),
            Some(names)
                if names
                    .iter()
                    .any(|name| self.network.iter().any(|it| it.matches(name, false))) =>
            {
                fits
            }
            Some(names) => Covers::No(format!(
                "the container is on network {}",
                if names.is_empty() {
                    "none".to_owned()
                } else {
                    list(names)
                }
            )),
        }
    }

    fn of_role(&self, role: Option<&RoleArn>) -> Result<(), String> {
        match role {
            Some(role) => match self.role.iter().any(|it| it.matches(&role.to_string(), true)) {
                true => Ok(()),
                false if self.role.is_empty() => Err("it is for profiles as they are".to_owned()),
                false => Err(format!("it is for role {}", list(&self.role))),
            },
            None if self.role.is_empty() => Ok(()),
            None => Err("it is for roles, not for a profile as it is".to_owned()),
        }
    }

    fn of_profile(&self, profile: Option<&str>) -> Result<(), String> {
        match profile {
            // The daemon's own base is what a container has that names none.
            None if !self.role.is_empty() => Ok(()),
            Some(profile) if self.profile.iter().any(|it| it.matches(profile, false)) => Ok(()),
            _ if self.profile.is_empty() => Err("it names no profile".to_owned()),
            _ => Err(format!("it is for profile {}", list(&self.profile))),
        }
    }

    /// Whether what labels set is within the rule.
    fn permits(&self, wish: &RoleRequest<'_>) -> Result<(), String> {
        let inputs = wish.inputs;
        let external_id = inputs.external_id.as_ref().map(Secret::reveal);
        for (input, globs, value, shown) in [
            ("session-name", &self.session_name, inputs.session_name.as_deref(), true),
            ("external-id", &self.external_id, external_id, false),
            (
                "source-identity",
                &self.source_identity,
                inputs.source_identity.as_deref(),
                true,
            ),
        ] {
            let Some(value) = value else { continue };
            if globs.is_empty() {
                let key = input.replace('-', "_");
                return Err(format!(
                    "{self} does not let labels set {input}; {key} = \"*\" in it would"
                ));
            }
            if !globs.iter().any(|it| it.matches(value, false)) {
                return Err(match shown {
                    true => format!("{self} lets labels set {input} to {}, not to {value}", list(globs)),
                    false => format!("{self} lets labels set {input}, but not to this one"),
                });
            }
        }
        for (key, value) in &inputs.tags {
            if !self.session_tags.iter().any(|pair| pair.matches(key, value)) {
                return Err(match self.session_tags.as_slice() {
                    [] => {
                        format!("{self} does not let labels set session tags; session_tags = [\"{key}\"] in it would")
                    }
                    pairs => format!("{self} lets labels set session tags {}, not {key}={value}", list(pairs)),
                });
            }
        }
        for (input, set) in [
            ("policy", inputs.policy.is_some()),
            ("policy-arns", !inputs.policy_arns.is_empty()),
        ] {
            if let (true, Some(ceiling)) = (set, self.ceiling()) {
                return Err(format!(
                    "{self} has a ceiling ({ceiling}), and STS joins the session policies of one call instead of \
                     intersecting them: a label {input} would lift it"
                ));
            }
        }
        let minutes = |duration: Duration| duration.as_secs() / 60;
        match (inputs.duration, self.max_duration) {
            (Some(asked), Some(most)) if asked > most => Err(format!(
                "{self} has max_duration = {}m, and the label asks for {}m",
                minutes(most),
                minutes(asked)
            )),
            (Some(asked), None) if asked > wish.default_duration => Err(format!(
                "{self} does not let labels set sessions longer than {}m (credentials.duration), and the label asks for {asked}m; \
                 max_duration = \"{asked}m\" in it would",
                minutes(wish.default_duration),
                asked = minutes(asked)
            )),
            _ => Ok(()),
        }
    }

    /// Whether there are session policies that no label can lift.
    pub fn has_ceiling(&self) -> bool {
        self.ceiling().is_some()
    }

    fn ceiling(&self) -> Option<&'static str> {
        match (&self.session_policy, self.session_policy_arns.is_empty()) {
            (Some(_), _) => Some("session_policy"),
            (None, false) => Some("session_policy_arns"),
            (None, true) => None,
        }
    }

    /// The keys on which the rule rests, where whoever writes the role's label writes all of them, too.
    pub fn rests_on_its_applicants(&self) -> Option<String> {
        let keys = [
            ("container", !self.container.is_empty()),
            ("image", !self.image.is_empty()),
            ("project", !self.project.is_empty()),
            ("service", !self.service.is_empty()),
            ("network", !self.network.is_empty()),
            ("label", !self.label.is_empty()),
        ];
        let keys: Vec<_> = keys.into_iter().filter_map(|(key, set)| set.then_some(key)).collect();
        (self.image_id.is_empty() && !keys.is_empty()).then(|| keys.join(", "))
    }
}
