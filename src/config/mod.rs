//! What was typed → what is meant: configuration file, environment and flags become [`Settings`].
//!
//! Every key stands once, in [`KEYS`]: its name, its default, what it takes, and how it is read. File, environment
//! variable (`IMDS_ROUTER_<SECTION>_<KEY>`) and flag all go through that one row, so they cannot disagree; precedence is
//! flag, variable, file, default.

mod load;
mod schema;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;

pub use self::load::{ConfigError, DEFAULT_FILE, ENV_PREFIX, Origin, Sources, Suggestion, load, variable};
pub use self::schema::{KEYS, Key};
use crate::credentials::RoleArn;
use crate::credentials::allow_rules::Rule;
use crate::metadata::aemm::{Given, MOST_USER_DATA};
use crate::metadata::tree::{self, PathError};

/// Where the admin socket is when nothing else is said.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/imds-router/admin.sock";
/// Where the kernel shows what the firmware says of this machine.
pub const DEFAULT_DMI_DIR: &str = "/sys/class/dmi/id";

/// The command that runs the daemon as a container with all that it needs.
pub const DOCKER_RUN: &str = "docker run -d --name imds-router --restart unless-stopped --network host --pid host --cgroupns host \
    --cap-drop ALL --cap-add NET_ADMIN --cap-add SYS_ADMIN --cap-add SYS_PTRACE --cap-add DAC_OVERRIDE \
    --security-opt apparmor=unconfined --security-opt label=disable --ulimit core=0 --ulimit nofile=16384 \
    -v /var/run/docker.sock:/var/run/docker.sock -v /sys/fs/cgroup:/sys/fs/cgroup:ro -v imds-router:/var/lib/imds-router \
    -v ~/.aws:/aws:ro -e IMDS_ROUTER_CREDENTIALS_AWS_DIR=/aws imds-router";

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
pub enum HostImds {
    /// [`HostImds::Keep`] on a machine of a cloud, else [`HostImds::Replace`].
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
pub enum DockerInDocker {
    /// Nothing.
    Refuse,
    /// What the outer container gets.
    Inherit,
}

/// Who finds an instance metadata service at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum HttpEndpoint {
    /// Containers with an `imds.` label or a role; the others get 403, so that nothing in them believes that it is on EC2.
    Labeled,
    /// All containers.
    Enabled,
    /// None; with `labels_may_relax`, except for those whose label says `enabled`.
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
    /// `serve.host_imds`
    pub host_imds: HostImds,
    /// `serve.dmi_dir`: where the firmware's own words are.
    pub dmi_dir: PathBuf,
    /// `serve.proof`
    pub proof: Proof,
    /// `serve.docker_in_docker`
    pub docker_in_docker: DockerInDocker,
    /// `serve.max_wait`: the longest that a request waits, in all.
    pub max_wait: Duration,
    /// `serve.admin_socket`
    pub admin_socket: PathBuf,
    /// `serve.metrics`: where else, beside the admin socket, metrics are.
    pub metrics: Option<SocketAddr>,
    /// `serve.state_dir`
    pub state_dir: PathBuf,
    /// `imds.labels_may_relax`
    pub labels_may_relax: bool,
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
            host_imds: HostImds::Auto,
            dmi_dir: DEFAULT_DMI_DIR.into(),
            proof: Proof::Full,
            docker_in_docker: DockerInDocker::Refuse,
            max_wait: Duration::from_millis(400),
            admin_socket: DEFAULT_ADMIN_SOCKET.into(),
            metrics: None,
            state_dir: "/var/lib/imds-router".into(),
            labels_may_relax: false,
            http_endpoint: HttpEndpoint::Labeled,
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
            labels_may_relax: new.labels_may_relax,
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
    imds.http_endpoint, imds.http_tokens, imds.labels_may_relax, imds.http_put_response_hop_limit, imds.instance_metadata_tags, imds.triggers_may_stop, \
    imds.compose_tags, imds.user_data, imds.user_data_base64, imds.user_data_file, credentials.default_role, credentials.session_name, credentials.duration";

/// Reads `400ms`, `30s`, `15m`, `1h`, `1h30m` (largest unit first), and seconds as AWS writes them: `3600`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)];
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if is_number(text) {
        return text.parse().ok().map(Duration::from_secs);
    }
    let (mut rest, mut milliseconds, mut units) = (text, 0_u64, UNITS.as_slice());
    while !rest.is_empty() {
        let (number, after) = rest.split_at(rest.find(|c: char| !c.is_ascii_digit())?);
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let at = units.iter().position(|(name, _)| *name == unit)?;
        let part = number.parse::<u64>().ok()?.checked_mul(units[at].1)?;
        milliseconds = milliseconds.checked_add(part)?;
        (rest, units) = (after, &units[at + 1..]);
    }
    (!text.is_empty()).then(|| Duration::from_millis(milliseconds))
}

/// Reads base64, also in lines, as `base64 FILE` prints it.
pub fn decode_base64(text: &str) -> Option<Vec<u8>> {
    let text: String = text.chars().filter(|c| !c.is_ascii_whitespace()).collect();
    STANDARD.decode(text).ok()
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
    match tree::known(&whole, value) {
        Ok(()) => Ok(whole),
        Err(error @ PathError::Unknown) => {
            let paths = tree::paths().filter_map(|known| known.strip_prefix("meta-data/"));
            Err(format!("{error}{}", Suggestion::among(path, paths)))
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
    fn durations_have_units_or_are_seconds() {
        for (text, milliseconds) in [
            ("400ms", 400),
            ("30s", 30_000),
            ("15m", 900_000),
            ("1h", 3_600_000),
            ("1h30m", 5_400_000),
            ("1h0m5s7ms", 3_605_007),
            ("1m500ms", 60_500),
            ("3600", 3_600_000),
            ("0", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Some(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        for text in [
            "",
            "h",
            "1d",
            "-1s",
            "1.5h",
            "1h30",
            "30m1h",
            "1h1h",
            "1s1m",
            " 1h",
            "1h ",
            "1 h",
            "+1",
            "1H",
            "99999999999999999999",
            "99999999999999999h",
            "5124095576030431h1h",
        ] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }

    #[test]
    fn base64_may_have_lines() {
        assert_eq!(decode_base64("aGVs\nbG8=\n").as_deref(), Some(&b"hello"[..]));
        assert_eq!(decode_base64(" aGVs\r\n\tbG8= ").as_deref(), Some(&b"hello"[..]));
        assert_eq!(decode_base64("aGVsbG8"), None);
        assert_eq!(decode_base64("a-b_"), None);
    }

    #[test]
    fn templates() {
        let part = |name: &str| (name == "container").then(|| "web".to_owned());
        assert_eq!(fill("{container}@h", part).as_deref(), Some("web@h"));
        assert_eq!(fill("{project}-{container}", part), None);
        assert_eq!(fill("{container", part), None);
    }
}
