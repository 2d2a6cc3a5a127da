//! What was typed → what is meant: configuration file, environment and flags become [`Settings`].
//!
//! Every key stands once, in [`KEYS`]: its name, its default, what it takes, and how it is read. File, environment
//! variable (`IMDS_ROUTER_<SECTION>_<KEY>`) and flag all go through that one row, so they cannot disagree; precedence is
//! flag, variable, file, default.

mod keys;
mod reading;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;

pub use self::keys::{KEYS, Key};
pub use self::reading::{ConfigError, DEFAULT_FILE, ENV_PREFIX, Nearest, Origin, Sources, load, variable};
use crate::credentials::RoleArn;
use crate::credentials::policy::Rule;
use crate::metadata::catalogue::{self, PathError};
use crate::metadata::file::{Given, MOST_USER_DATA};

/// Where the admin socket is when nothing else is said.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/imds-router/admin.sock";
/// Where the kernel shows what the firmware says of this machine.
pub const DEFAULT_DMI_DIR: &str = "/sys/class/dmi/id";

/// How containers are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attach {
    /// [`Attach::Namespace`].
    Auto,
    /// Each container's network namespace has a link of its own to the service: no packet crosses a bridge.
    Namespace,
    /// The address on the host, over its bridges. The source address is the only evidence.
    Host,
    /// The daemon is a container, and the address its own on a network of the engine's: without any right, and with the
    /// engine's word on who is at which address.
    Network,
}

/// What becomes of the metadata service that the host itself has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HostService {
    /// [`HostService::Keep`] on a machine of a cloud, else [`HostService::Replace`].
    Auto,
    /// The host's processes go on with it; containers are rejected there, and served over their own links only.
    Keep,
    /// Its address is ours, for everybody on this host.
    Replace,
}

/// The least that a caller must be proven by.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proof {
    /// The kernel, on every connection. Where it cannot be asked, the daemon does not start.
    Full,
    /// Where the kernel cannot be asked, the engine's word on who is at which address.
    Address,
}

/// What containers inside a container get.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nested {
    /// Nothing.
    Refuse,
    /// What the outer container gets.
    Outer,
}

/// Who finds an instance metadata service at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HttpEndpoint {
    /// Containers with an `imds.` label or a role; the others get 403, so that nothing in them believes that it is on EC2.
    Labelled,
    /// All containers.
    Enabled,
    /// None; with `labels_may_lower`, except for those whose label says `enabled`.
    Disabled,
}

/// EC2's `HttpTokens`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum HttpTokens {
    /// IMDSv1 and IMDSv2.
    Optional,
    /// IMDSv2 only.
    Required,
}

/// Where credentials come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CredentialSource {
    /// AssumeRole.
    Sts,
    /// Well-formed fakes, without AWS.
    Offline,
}

/// Which settings of other programs count.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Compat {
    /// `compat.iam_docker`
    pub iam_docker: bool,
    /// `compat.env`
    pub env: bool,
    /// `compat.imds_server`
    pub imds_server: bool,
}

impl Compat {
    /// All of them.
    pub const ALL: Self = Self {
        iam_docker: true,
        env: true,
        imds_server: true,
    };
}

/// Everything that an operator can decide. One field per key of [`KEYS`]; the tables of the file at the end.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// `region`
    pub region: Option<String>,
    /// `account_id`
    pub account_id: Option<String>,
    /// `docker.host`
    pub docker_host: Option<String>,
    /// `docker.label_prefix`
    pub label_prefix: String,
    /// `docker.image_labels`
    pub image_labels: bool,
    /// `docker.unknown_labels`: whether an unknown label of ours is an error of its container.
    pub unknown_labels_are_errors: bool,
    /// `serve.attach`
    pub attach: Attach,
    /// `serve.host_service`
    pub host_service: HostService,
    /// `serve.dmi_dir`: where the firmware's own words are.
    pub dmi_dir: PathBuf,
    /// `serve.proof`
    pub proof: Proof,
    /// `serve.nested`
    pub nested: Nested,
    /// `serve.hold`: the longest that a request waits, in all.
    pub hold: Duration,
    /// `serve.admin_socket`
    pub admin_socket: PathBuf,
    /// `serve.metrics`: where else, beside the admin socket, metrics are.
    pub metrics: Option<SocketAddr>,
    /// `serve.state_dir`
    pub state_dir: PathBuf,
    /// `imds.labels_may_lower`
    pub labels_may_lower: bool,
    /// `imds.http_endpoint`
    pub http_endpoint: HttpEndpoint,
    /// `imds.http_tokens`
    pub http_tokens: HttpTokens,
    /// `imds.http_protocol_ipv6`: whether the service is also at its IPv6 address.
    pub ipv6: bool,
    /// `imds.hosts`: names accepted in `Host` beside EC2's own.
    pub hosts: Vec<String>,
    /// `credentials.source`
    pub source: CredentialSource,
    /// `credentials.profile`
    pub profile: Option<String>,
    /// `credentials.default_role`
    pub default_role: Option<String>,
    /// `credentials.session_name`
    pub session_name: String,
    /// `credentials.duration`
    pub duration: Duration,
    /// `credentials.min_remaining`
    pub min_remaining: Duration,
    /// `credentials.concurrent_calls`: calls of STS at once.
    pub sts_calls: usize,
    /// `credentials.aws_dir`: where the files of AWS's tools are.
    pub aws_dir: Option<PathBuf>,
    /// `credentials.allow_process`: whether these files may run programs and name endpoints.
    pub allow_process: bool,
    /// `credentials.ec2_error_documents`: whether a role that is denied is answered as EC2 does it.
    pub ec2_error_documents: bool,
    /// `[compat]`
    pub compat: Compat,
    /// `[[allow]]`: none means that every container may have every role.
    pub allow: Vec<Rule>,
    /// `[roles]`: alias → ARN.
    pub roles: BTreeMap<String, RoleArn>,
    /// `[accounts]`: alias → account id.
    pub accounts: BTreeMap<String, String>,
    /// `imds.http_put_response_hop_limit`
    pub hop_limit: u8,
    /// `imds.instance_metadata_tags`
    pub instance_metadata_tags: bool,
    /// `imds.triggers_may_stop`: whether `trigger --stop` may stop containers.
    pub triggers_may_stop: bool,
    /// `imds.compose_tags`: whether what compose wrote on a container is among its tags.
    pub compose_tags: bool,
    /// `imds.user_data`, `imds.user_data_base64`, `imds.user_data_file`
    pub user_data: Option<Bytes>,
    /// `metadata.base`: whether containers see what EC2 says of this host.
    pub metadata_of_host: bool,
    /// `metadata.file`
    pub metadata_file: Option<PathBuf>,
    /// What is in it.
    pub from_file: Given,
    /// `[metadata]`: values by path, from the version on, for every container.
    pub metadata: BTreeMap<String, String>,
    /// `[public_keys]`: name → key.
    pub public_keys: BTreeMap<String, String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            region: None,
            account_id: None,
            docker_host: None,
            label_prefix: "imds".to_owned(),
            image_labels: false,
            unknown_labels_are_errors: true,
            attach: Attach::Auto,
            host_service: HostService::Auto,
            dmi_dir: DEFAULT_DMI_DIR.into(),
            proof: Proof::Full,
            nested: Nested::Refuse,
            hold: Duration::from_millis(400),
            admin_socket: DEFAULT_ADMIN_SOCKET.into(),
            metrics: None,
            state_dir: "/var/lib/imds-router".into(),
            labels_may_lower: false,
            http_endpoint: HttpEndpoint::Labelled,
            http_tokens: HttpTokens::Optional,
            ipv6: true,
            hosts: Vec::new(),
            source: CredentialSource::Sts,
            profile: None,
            default_role: None,
            session_name: "{container}@{host}".to_owned(),
            duration: Duration::from_secs(3600),
            min_remaining: Duration::from_secs(1800),
            sts_calls: 16,
            aws_dir: None,
            allow_process: false,
            ec2_error_documents: false,
            compat: Compat::default(),
            allow: Vec::new(),
            roles: BTreeMap::new(),
            accounts: BTreeMap::new(),
            hop_limit: 2,
            instance_metadata_tags: false,
            triggers_may_stop: false,
            compose_tags: false,
            user_data: None,
            metadata_of_host: false,
            metadata_file: None,
            from_file: Given::default(),
            metadata: BTreeMap::new(),
            public_keys: BTreeMap::new(),
        }
    }
}

impl Settings {
    /// These settings with everything of `new` that a running daemon can change ([`RELOADED`]), and whether that is all
    /// that differs.
    pub fn reloaded(&self, new: &Self) -> (Self, bool) {
        let settings = Self {
            region: new.region.clone(),
            account_id: new.account_id.clone(),
            unknown_labels_are_errors: new.unknown_labels_are_errors,
            labels_may_lower: new.labels_may_lower,
            http_endpoint: new.http_endpoint,
            http_tokens: new.http_tokens,
            default_role: new.default_role.clone(),
            session_name: new.session_name.clone(),
            duration: new.duration,
            compat: new.compat,
            allow: new.allow.clone(),
            roles: new.roles.clone(),
            accounts: new.accounts.clone(),
            hop_limit: new.hop_limit,
            instance_metadata_tags: new.instance_metadata_tags,
            triggers_may_stop: new.triggers_may_stop,
            compose_tags: new.compose_tags,
            user_data: new.user_data.clone(),
            metadata_of_host: new.metadata_of_host,
            metadata_file: new.metadata_file.clone(),
            from_file: new.from_file.clone(),
            metadata: new.metadata.clone(),
            public_keys: new.public_keys.clone(),
            ..self.clone()
        };
        let whole = settings == *new;
        (settings, whole)
    }
}

/// What [`Settings::reloaded`] takes over, as a message says it.
pub const RELOADED: &str = "region, account_id, roles, accounts, allow, compat, metadata, public_keys, docker.unknown_labels, \
    imds.http_endpoint, imds.http_tokens, imds.labels_may_lower, imds.http_put_response_hop_limit, imds.instance_metadata_tags, imds.triggers_may_stop, \
    imds.compose_tags, imds.user_data, imds.user_data_base64, imds.user_data_file, credentials.default_role, credentials.session_name, credentials.duration";

/// Reads `400ms`, `30s`, `15m`, `1h`: a whole number and its unit.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => Some(Duration::from_secs(number)),
        "m" => number.checked_mul(60).map(Duration::from_secs),
        "h" => number.checked_mul(3600).map(Duration::from_secs),
        _ => None,
    }
}

/// Whether `text` looks like an AWS region: `eu-west-1`, `us-gov-east-1`.
pub fn is_region(text: &str) -> bool {
    let mut parts = text.split('-').rev();
    let number = parts
        .next()
        .is_some_and(|it| !it.is_empty() && it.bytes().all(|b| b.is_ascii_digit()));
    let mut words = 0;
    number
        && parts.all(|it| {
            words += 1;
            !it.is_empty() && it.bytes().all(|b| b.is_ascii_lowercase())
        })
        && words >= 2
}

/// Reads EC2's `HttpPutResponseHopLimit` (API reference, InstanceMetadataOptionsRequest).
pub fn hop_limit(text: &str) -> Option<u8> {
    text.parse().ok().filter(|limit| (1..=64).contains(limit))
}

/// Whether these bytes can be user data.
pub fn is_user_data(data: &[u8]) -> bool {
    (1..=MOST_USER_DATA).contains(&data.len())
}

/// The path in the tree of what stands at `path` below `meta-data/`, if it may be given that value.
///
/// # Errors
/// Why not, with what was expected.
pub fn metadata_path(path: &str, value: &str) -> Result<String, String> {
    let whole = format!("meta-data/{path}");
    match catalogue::known(&whole, value) {
        Ok(()) => Ok(whole),
        Err(error @ PathError::Unknown) => {
            let paths = catalogue::paths().filter_map(|known| known.strip_prefix("meta-data/"));
            Err(format!("{error}{}", Nearest::among(path, paths)))
        }
        Err(error) => Err(error.to_string()),
    }
}

/// What may stand between braces in a template.
pub const PLACEHOLDERS: &[&str] = &["container", "project", "service", "id", "host"];
/// What may stand there with the name of a label or of a variable behind it.
const KEYED_PLACEHOLDERS: &[&str] = &["label:", "env:"];

/// Whether every part of a template is one that there is.
pub fn template_fits(text: &str) -> bool {
    let keyed = |name: &str| {
        let key = KEYED_PLACEHOLDERS.iter().find_map(|it| name.strip_prefix(it));
        key.is_some_and(|key| !key.is_empty())
    };
    fill(text, |name| {
        (PLACEHOLDERS.contains(&name) || keyed(name)).then(String::new)
    })
    .is_some()
}

/// Fills a template; `None` when a brace is not closed or a part is missing: a missing part means no value, never a
/// shorter one.
pub fn fill(template: &str, part: impl Fn(&str) -> Option<String>) -> Option<String> {
    let mut filled = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        let (name, after) = after.split_once('}')?;
        filled.push_str(before);
        filled.push_str(&part(name)?);
        rest = after;
    }
    filled.push_str(rest);
    Some(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates() {
        let part = |name: &str| (name == "container").then(|| "web".to_owned());
        assert_eq!(fill("{container}@h", part).as_deref(), Some("web@h"));
        assert_eq!(fill("{project}-{container}", part), None);
        assert_eq!(fill("{container", part), None);
    }
}
