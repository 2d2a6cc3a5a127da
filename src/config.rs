//! What was typed → what is meant: configuration file, environment and flags become [`Settings`].
//!
//! Every key stands once, in [`KEYS`]: its name, its default, what it takes, and how it is read. File, environment
//! variable (`IMDS_ROUTER_<SECTION>_<KEY>`) and flag all go through that one row, so they cannot disagree; precedence is
//! flag, variable, file, default.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use toml::de::{DeTable, DeValue};

use crate::credentials::policy::{Glob, Pair, Rule};
use crate::credentials::{RoleArn, inputs, is_account_id};
use crate::metadata::catalogue::{self, PathError};
use crate::metadata::file::{self, Given, MOST_USER_DATA};

/// Where the configuration is read from when `--config` does not say.
pub const DEFAULT_FILE: &str = "/etc/imds-router/config.toml";
/// Where the admin socket is when nothing else is said.
pub const DEFAULT_ADMIN_SOCKET: &str = "/run/imds-router/admin.sock";
/// Where the kernel shows what the firmware says of this machine.
pub const DEFAULT_DMI_DIR: &str = "/sys/class/dmi/id";
/// What variables of ours start with.
pub const ENV_PREFIX: &str = "IMDS_ROUTER_";
/// Variables with our prefix that are not configuration keys: they belong to the log and to the client verbs.
const OTHER_VARIABLES: &[&str] = &["IMDS_ROUTER_LOG", "IMDS_ROUTER_CONFIG"];

/// How containers are reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Attach {
    /// [`Attach::Namespace`].
    Auto,
    /// The daemon listens inside each container's network namespace: no packet crosses a bridge.
    Namespace,
    /// The address on the host; the source address leads to the container, the kernel decides.
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
    /// The host's processes go on with it; containers are rejected there, and served inside their namespaces only.
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
    /// `serve.freeze_links`: whether neighbours are kept from diverting what goes over a bridge.
    pub freeze_links: bool,
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
            freeze_links: false,
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

/// One configuration key.
pub struct Key {
    /// `section.name`, or `name` at the top.
    pub path: &'static str,
    /// The default, as it would be typed.
    pub default: &'static str,
    /// What the key takes, as an error message says it.
    pub expected: &'static str,
    /// What it means.
    pub about: &'static str,
    read: fn(&mut Settings, &Typed) -> Option<()>,
}

/// A value as typed: text, or several. Whether it was a number matters where leading zeros do.
struct Typed(Vec<String>, Form);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    Text,
    Number,
    Boolean,
    Table,
}

impl Typed {
    fn of(text: &str) -> Self {
        Self(vec![text.to_owned()], Form::Text)
    }

    /// As a message shows it.
    fn shown(&self) -> String {
        if self.1 == Form::Table {
            "a table".to_owned()
        } else {
            self.0.join(",")
        }
    }

    /// An account id: a number may have lost its leading zeros.
    fn account(&self) -> Option<&str> {
        self.text().filter(|text| self.1 == Form::Text && is_account_id(text))
    }

    fn text(&self) -> Option<&str> {
        match self.0.as_slice() {
            [one] if !one.is_empty() => Some(one),
            _ => None,
        }
    }

    fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
    }

    fn boolean(&self) -> Option<bool> {
        self.one_of(&[("true", true), ("false", false)])
    }

    fn globs(&self, into: &mut Vec<Glob>) -> Option<()> {
        *into = self.each(Glob::parse)?;
        Some(())
    }

    fn pairs(&self, into: &mut Vec<Pair>) -> Option<()> {
        *into = self.each(Pair::parse)?;
        Some(())
    }

    /// One or more of something.
    fn each<T>(&self, read: impl Fn(&str) -> Option<T>) -> Option<Vec<T>> {
        let items: Option<Vec<_>> = self.0.iter().map(|it| read(it)).collect();
        items.filter(|items| !items.is_empty() && self.1 == Form::Text)
    }

    fn duration(&self, least: Duration, most: Duration) -> Option<Duration> {
        parse_duration(self.text()?).filter(|it| (least..=most).contains(it))
    }
}

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

const HOUR: Duration = Duration::from_secs(3600);

/// Every key, in the order of the documentation.
pub const KEYS: &[Key] = &[
    Key {
        path: "region",
        default: "AWS_REGION, the base profile's, else us-east-1",
        expected: "an AWS region such as \"eu-west-1\"",
        about: "Region of containers that name none, and of STS.",
        read: |s, v| {
            v.text()
                .filter(|it| is_region(it))
                .map(|it| s.region = Some(it.to_owned()))
        },
    },
    Key {
        path: "account_id",
        default: "the base identity's",
        expected: "12 digits in quotes",
        about: "Account of roles that are given by name.",
        read: |s, v| v.account().map(|it| s.account_id = Some(it.to_owned())),
    },
    Key {
        path: "docker.host",
        default: "DOCKER_HOST, else unix:///var/run/docker.sock",
        expected: "unix:///path/to/docker.sock or tcp://host:port",
        about: "The engine.",
        read: |s, v| {
            let known = |it: &&str| {
                ["unix:///", "tcp://", "http://"]
                    .iter()
                    .any(|scheme| it.starts_with(scheme))
            };
            v.text().filter(known).map(|it| s.docker_host = Some(it.to_owned()))
        },
    },
    Key {
        path: "docker.label_prefix",
        default: "imds",
        expected: "letters, digits, - and . without a dot at either end",
        about: "What labels of ours start with, before the dot.",
        read: |s, v| {
            let fits = |it: &&str| {
                it.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.')
                    && !it.starts_with('.')
                    && !it.ends_with('.')
            };
            v.text().filter(fits).map(|it| s.label_prefix = it.to_owned())
        },
    },
    Key {
        path: "docker.image_labels",
        default: "false",
        expected: "true or false",
        about: "Whether labels that the image brought count: then whoever builds an image chooses roles.",
        read: |s, v| v.boolean().map(|it| s.image_labels = it),
    },
    Key {
        path: "docker.unknown_labels",
        default: "error",
        expected: "\"error\" or \"warn\"",
        about: "What a label with our prefix that this version does not know is: a typo must not drop a restriction.",
        read: |s, v| {
            v.one_of(&[("error", true), ("warn", false)])
                .map(|it| s.unknown_labels_are_errors = it)
        },
    },
    Key {
        path: "serve.attach",
        default: "auto",
        expected: "\"auto\", \"namespace\", \"host\" or \"network\"",
        about: "How containers are reached: inside their own network namespaces (auto), over the host's bridges, or over the network on which the daemon's container itself has the address (needs proof `address`, and no right).",
        read: |s, v| {
            v.one_of(&[
                ("auto", Attach::Auto),
                ("namespace", Attach::Namespace),
                ("host", Attach::Host),
                ("network", Attach::Network),
            ])
            .map(|it| s.attach = it)
        },
    },
    Key {
        path: "serve.host_service",
        default: "auto",
        expected: "\"auto\", \"keep\" or \"replace\"",
        about: "What becomes of a metadata service that the host itself has. `keep`: its processes go on with it, and containers are rejected there. `replace`: its address is ours, for everybody on this host. `auto`: `keep` on a machine of a cloud.",
        read: |s, v| {
            v.one_of(&[
                ("auto", HostService::Auto),
                ("keep", HostService::Keep),
                ("replace", HostService::Replace),
            ])
            .map(|it| s.host_service = it)
        },
    },
    Key {
        path: "serve.dmi_dir",
        default: DEFAULT_DMI_DIR,
        expected: "an absolute path",
        about: "Where the firmware says whose machine this is (sys_vendor, product_name …), for serve.host_service.",
        read: |s, v| absolute(v).map(|it| s.dmi_dir = it),
    },
    Key {
        path: "serve.proof",
        default: "full",
        expected: "\"full\" or \"address\"",
        about: "The least that a caller is proven by. `full`: the kernel, on every connection. `address`: where the kernel cannot be asked, who the engine says is at that address; a neighbour with NET_RAW can send with it.",
        read: |s, v| {
            v.one_of(&[("full", Proof::Full), ("address", Proof::Address)])
                .map(|it| s.proof = it)
        },
    },
    Key {
        path: "serve.nested",
        default: "refuse",
        expected: "\"refuse\" or \"outer\"",
        about: "What containers inside a container (Docker-in-Docker) get: nothing, or what the outer one gets. Attach `namespace` only.",
        read: |s, v| {
            v.one_of(&[("refuse", Nested::Refuse), ("outer", Nested::Outer)])
                .map(|it| s.nested = it)
        },
    },
    Key {
        path: "serve.freeze_links",
        default: "false",
        expected: "true or false",
        about: "Whether a served container's MAC and IPv4 address are taken from its own link only, on every bridge of this host: then no neighbour diverts what goes over one (attach `host`).",
        read: |s, v| v.boolean().map(|it| s.freeze_links = it),
    },
    Key {
        path: "serve.hold",
        default: "400ms",
        expected: "a duration from 50ms to 900ms: the strictest SDK gives up at 500ms, most at 1s",
        about: "The longest that a request waits in all, for its container to be known and for its first credentials.",
        read: |s, v| {
            v.duration(Duration::from_millis(50), Duration::from_millis(900))
                .map(|it| s.hold = it)
        },
    },
    Key {
        path: "serve.admin_socket",
        default: DEFAULT_ADMIN_SOCKET,
        expected: "an absolute path",
        about: "Unix socket that status and the other verbs ask.",
        read: |s, v| absolute(v).map(|it| s.admin_socket = it),
    },
    Key {
        path: "serve.metrics",
        default: "none",
        expected: "a loopback address and a port, such as \"127.0.0.1:9254\"",
        about: "Where /metrics, /livez and /readyz are, beside the admin socket. Containers in the host's network can read them.",
        read: |s, v| {
            let at: SocketAddr = v.text()?.parse().ok()?;
            at.ip().is_loopback().then(|| s.metrics = Some(at))
        },
    },
    Key {
        path: "serve.state_dir",
        default: "/var/lib/imds-router",
        expected: "an absolute path",
        about: "Directory of what outlives the daemon: the key of IMDS tokens.",
        read: |s, v| absolute(v).map(|it| s.state_dir = it),
    },
    Key {
        path: "imds.labels_may_lower",
        default: "false",
        expected: "true or false",
        about: "Whether labels may make the options of this section laxer, not only stricter.",
        read: |s, v| v.boolean().map(|it| s.labels_may_lower = it),
    },
    Key {
        path: "imds.http_endpoint",
        default: "labelled",
        expected: "\"labelled\", \"enabled\" or \"disabled\"",
        about: "Which containers find a metadata service.",
        read: |s, v| {
            v.one_of(&[
                ("labelled", HttpEndpoint::Labelled),
                ("enabled", HttpEndpoint::Enabled),
                ("disabled", HttpEndpoint::Disabled),
            ])
            .map(|it| s.http_endpoint = it)
        },
    },
    Key {
        path: "imds.http_tokens",
        default: "optional",
        expected: "\"optional\" or \"required\"",
        about: "Whether IMDSv1 is answered.",
        read: |s, v| {
            v.one_of(&[("optional", HttpTokens::Optional), ("required", HttpTokens::Required)])
                .map(|it| s.http_tokens = it)
        },
    },
    Key {
        path: "imds.http_protocol_ipv6",
        default: "enabled",
        expected: "\"enabled\" or \"disabled\"",
        about: "Whether the service is also at fd00:ec2::254, where there is IPv6.",
        read: |s, v| {
            v.one_of(&[("enabled", true), ("disabled", false)])
                .map(|it| s.ipv6 = it)
        },
    },
    Key {
        path: "imds.http_put_response_hop_limit",
        default: "2",
        expected: "a whole number from 1 to 64",
        about: "How many routers the answer with a token may pass: IP's own limit. A container's own network has none.",
        read: |s, v| v.text().and_then(hop_limit).map(|it| s.hop_limit = it),
    },
    Key {
        path: "imds.instance_metadata_tags",
        default: "disabled",
        expected: "\"enabled\" or \"disabled\"",
        about: "Whether a container sees its tags (tags/instance).",
        read: |s, v| {
            v.one_of(&[("enabled", true), ("disabled", false)])
                .map(|it| s.instance_metadata_tags = it)
        },
    },
    Key {
        path: "imds.triggers_may_stop",
        default: "false",
        expected: "true or false",
        about: "Whether imds-router trigger CONTAINER spot-interruption --stop may really stop a container.",
        read: |s, v| v.boolean().map(|it| s.triggers_may_stop = it),
    },
    Key {
        path: "imds.compose_tags",
        default: "false",
        expected: "true or false",
        about: "Whether compose's project, service and container number are among a container's tags.",
        read: |s, v| v.boolean().map(|it| s.compose_tags = it),
    },
    Key {
        path: "imds.user_data",
        default: "none",
        expected: "text of 1 to 16384 bytes",
        about: "User data of containers whose labels give none.",
        read: |s, v| user_data(s, v.text()?.as_bytes().to_vec()),
    },
    Key {
        path: "imds.user_data_base64",
        default: "none",
        expected: "base64 of 1 to 16384 bytes",
        about: "The same, of any bytes.",
        read: |s, v| user_data(s, STANDARD.decode(v.text()?).ok()?),
    },
    Key {
        path: "imds.user_data_file",
        default: "none",
        expected: "an absolute path of a readable file of 1 to 16384 bytes",
        about: "The same, from a file.",
        read: |s, v| user_data(s, read_at_most(&absolute(v)?, MOST_USER_DATA)?),
    },
    Key {
        path: "imds.hosts",
        default: "",
        expected: "host names",
        about: "More names to accept in the Host header.",
        read: |s, v| {
            v.0.iter()
                .all(|it| !it.is_empty())
                .then(|| s.hosts = v.0.iter().map(|it| it.to_ascii_lowercase()).collect())
        },
    },
    Key {
        path: "credentials.source",
        default: "sts",
        expected: "\"sts\" or \"offline\"",
        about: "Where credentials come from. `offline`: well-formed fakes, marked as fake everywhere.",
        read: |s, v| {
            v.one_of(&[("sts", CredentialSource::Sts), ("offline", CredentialSource::Offline)])
                .map(|it| s.source = it)
        },
    },
    Key {
        path: "credentials.profile",
        default: "the usual AWS chain",
        expected: "the name of a profile",
        about: "Profile of the base credentials.",
        read: |s, v| v.text().map(|it| s.profile = Some(it.to_owned())),
    },
    Key {
        path: "credentials.default_role",
        default: "none",
        expected: "a role: ARN, name, name@account or alias; {container}, {project}, {service} … are filled in",
        about: "Role of containers that name none; also a template, and a missing part means no role.",
        read: |s, v| {
            v.text()
                .filter(|it| template_fits(it))
                .map(|it| s.default_role = Some(it.to_owned()))
        },
    },
    Key {
        path: "credentials.session_name",
        default: "{container}@{host}",
        expected: "text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}",
        about: "Role session name, as CloudTrail shows it; cleaned to what STS takes.",
        read: |s, v| {
            v.text()
                .filter(|it| template_fits(it))
                .map(|it| s.session_name = it.to_owned())
        },
    },
    Key {
        path: "credentials.duration",
        default: "1h",
        expected: "a duration from 15m to 12h (STS's own bounds)",
        about: "How long a session is asked for.",
        read: |s, v| {
            v.duration(*inputs::DURATION.start(), *inputs::DURATION.end())
                .map(|it| s.duration = it)
        },
    },
    Key {
        path: "credentials.min_remaining",
        default: "30m",
        expected: "a duration from 0s to 6h",
        about: "The least life of what is served while STS works; at most half of the session.",
        read: |s, v| v.duration(Duration::ZERO, HOUR * 6).map(|it| s.min_remaining = it),
    },
    Key {
        path: "credentials.concurrent_calls",
        default: "16",
        expected: "a whole number from 1 to 64",
        about: "Calls of STS at once; who waits for one is served in turn.",
        read: |s, v| {
            let number = v.text()?.parse().ok();
            number.filter(|it| (1..=64).contains(it)).map(|it| s.sts_calls = it)
        },
    },
    Key {
        path: "credentials.aws_dir",
        default: "~/.aws; under sudo, that of the user who called it",
        expected: "an absolute path",
        about: "Directory of the AWS files: config, credentials, sso/cache. Its owner may own them.",
        read: |s, v| absolute(v).map(|it| s.aws_dir = Some(it)),
    },
    Key {
        path: "credentials.allow_process",
        default: "false",
        expected: "true or false",
        about: "Whether the AWS files may run programs (credential_process), name endpoints, and token files anywhere.",
        read: |s, v| v.boolean().map(|it| s.allow_process = it),
    },
    Key {
        path: "credentials.ec2_error_documents",
        default: "false",
        expected: "true or false",
        about: "Whether a role that STS denies is listed, with EC2's own error document in place of credentials; some SDKs \
                abort on it. Else there is no role, which all of them survive.",
        read: |s, v| v.boolean().map(|it| s.ec2_error_documents = it),
    },
    Key {
        path: "metadata.base",
        default: "none",
        expected: "\"none\" or \"host\"",
        about: "What containers see where nothing else is given. `host`: what EC2 says of this host, but for its credentials, signatures, keys and user data.",
        read: |s, v| {
            v.one_of(&[("none", false), ("host", true)])
                .map(|it| s.metadata_of_host = it)
        },
    },
    Key {
        path: "metadata.file",
        default: "none",
        expected: "the path of a file",
        about: "Values for every container, from a file in the form of amazon-ec2-metadata-mock's configuration.",
        read: |s, v| v.text().map(|it| s.metadata_file = Some(it.into())),
    },
    Key {
        path: "compat.iam_docker",
        default: "false",
        expected: "true or false",
        about: "Whether the label com.swipely.iam-docker.iam-profile counts.",
        read: |s, v| v.boolean().map(|it| s.compat.iam_docker = it),
    },
    Key {
        path: "compat.env",
        default: "false",
        expected: "true or false",
        about: "Whether a container's variables IAM_ROLE, IAM_EXTERNAL_ID and IAM_POLICY count (metadataproxy, ec2metaproxy).",
        read: |s, v| v.boolean().map(|it| s.compat.env = it),
    },
    Key {
        path: "compat.imds_server",
        default: "false",
        expected: "true or false",
        about: "Whether labels imds.aws.… count (imds-server).",
        read: |s, v| v.boolean().map(|it| s.compat.imds_server = it),
    },
];

/// One key of `[[allow]]`.
struct RuleKey {
    name: &'static str,
    expected: &'static str,
    read: fn(&mut Rule, &Typed) -> Option<()>,
}

const GLOBS: &str = "a pattern such as \"web-*\", or a list of them";

const RULE_KEYS: &[RuleKey] = &[
    RuleKey {
        name: "role",
        expected: "a pattern of role ARNs such as \"arn:aws:iam::111122223333:role/dev-*\" (\"**\": every role), or a list of them",
        read: |rule, v| {
            // A pattern that begins otherwise matches no role, whatever was meant.
            let arns = v.0.iter().all(|it| it.starts_with("arn:") || it == "**");
            arns.then(|| v.globs(&mut rule.role))?
        },
    },
    RuleKey {
        name: "profile",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.profile),
    },
    RuleKey {
        name: "container",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.container),
    },
    RuleKey {
        name: "image",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.image),
    },
    RuleKey {
        name: "image_id",
        expected: "an image id such as \"sha256:0123…\", or a list of them",
        read: |rule, v| {
            let ids = v.0.iter().all(|it| it.starts_with("sha256:"));
            ids.then(|| v.globs(&mut rule.image_id))?
        },
    },
    RuleKey {
        name: "project",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.project),
    },
    RuleKey {
        name: "service",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.service),
    },
    RuleKey {
        name: "network",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.network),
    },
    RuleKey {
        name: "label",
        expected: "\"KEY\" or \"KEY=PATTERN\", or a list of them",
        read: |rule, v| v.pairs(&mut rule.label),
    },
    RuleKey {
        name: "session_name",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.session_name),
    },
    RuleKey {
        name: "external_id",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.external_id),
    },
    RuleKey {
        name: "source_identity",
        expected: GLOBS,
        read: |rule, v| v.globs(&mut rule.source_identity),
    },
    RuleKey {
        name: "session_tags",
        expected: "\"KEY\" or \"KEY=PATTERN\", or a list of them",
        read: |rule, v| v.pairs(&mut rule.session_tags),
    },
    RuleKey {
        name: "session_policy_arns",
        expected: "1 to 10 policy ARNs such as \"arn:aws:iam::aws:policy/ReadOnlyAccess\"",
        read: |rule, v| {
            let arns: Vec<_> = v.0.iter().map(String::as_str).collect();
            inputs::policy_arns(&arns).map(|arns| rule.session_policy_arns = arns)
        },
    },
    RuleKey {
        name: "session_policy",
        expected: "an IAM policy in JSON with a Statement, of at most 2048 characters",
        read: |rule, v| {
            let policy = v.text().filter(|it| inputs::is_policy(it));
            policy.map(|it| rule.session_policy = Some(it.to_owned()))
        },
    },
    RuleKey {
        name: "max_duration",
        expected: "a duration from 15m to 12h (STS's own bounds)",
        read: |rule, v| {
            let duration = v.duration(*inputs::DURATION.start(), *inputs::DURATION.end());
            duration.map(|it| rule.max_duration = Some(it))
        },
    },
];

/// The tables whose keys the operator names, and what a value must be.
const TABLES: &[(&str, &str)] = &[
    ("roles", "a role ARN"),
    ("accounts", "an account id: 12 digits in quotes"),
    ("metadata", "text, at the path of a value below meta-data/"),
    (
        "public_keys",
        "a public key in one line, such as \"ssh-ed25519 AAAA… me\"",
    ),
];

fn absolute(value: &Typed) -> Option<PathBuf> {
    value.text().map(PathBuf::from).filter(|path| path.is_absolute())
}

/// Reads EC2's `HttpPutResponseHopLimit` (API reference, InstanceMetadataOptionsRequest).
pub fn hop_limit(text: &str) -> Option<u8> {
    text.parse().ok().filter(|limit| (1..=64).contains(limit))
}

/// Whether these bytes can be user data.
pub fn is_user_data(data: &[u8]) -> bool {
    (1..=MOST_USER_DATA).contains(&data.len())
}

fn user_data(settings: &mut Settings, data: Vec<u8>) -> Option<()> {
    is_user_data(&data).then(|| settings.user_data = Some(data.into()))
}

/// A whole file of at most so many bytes; one byte more is enough to know that it is too long.
fn read_at_most(path: &Path, most: usize) -> Option<Vec<u8>> {
    let mut data = Vec::new();
    std::fs::File::open(path)
        .ok()?
        .take(u64::try_from(most).ok()? + 1)
        .read_to_end(&mut data)
        .ok()?;
    Some(data)
}

/// Whether `text` is a public key as OpenSSH writes it.
fn is_public_key(text: &str) -> bool {
    let mut words = text.split(' ');
    let kind = words
        .next()
        .is_some_and(|it| ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| it.starts_with(kind)));
    kind && words.next().is_some_and(|key| STANDARD.decode(key).is_ok()) && !text.contains(char::is_control)
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

/// Where a value was typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// In a file, at a line (from 1).
    File(PathBuf, usize),
    /// In an environment variable.
    Variable(String),
    /// In a flag.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, line) => write!(f, "{}, line {line}", path.display()),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why what was typed means nothing. The text has where, what was there, and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}\nhint: --config names another file; without one, all defaults hold", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{origin}: not TOML: {message}")]
    NotToml {
        /// Where.
        origin: Origin,
        /// The parser's words.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key {key}{nearest}")]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// What was typed.
        key: String,
        /// `; did you mean …?`, or nothing.
        nearest: Nearest,
    },
    /// The file of values.
    #[error("the file of metadata {}: {what}", path.display())]
    MetadataFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        what: String,
    },
    /// A path that has no value of its own, or takes no such value.
    #[error("{origin}: {key}: {what}")]
    BadPath {
        /// Where.
        origin: Origin,
        /// Which key.
        key: String,
        /// What is wrong, and what was expected.
        what: String,
    },
    /// A value that the key does not take.
    #[error("{origin}: {key} = {value:?}: expected {expected}")]
    BadValue {
        /// Where.
        origin: Origin,
        /// Which key.
        key: String,
        /// What was typed.
        value: String,
        /// What it takes.
        expected: String,
    },
}

/// The nearest name to one that does not exist, as the end of a message.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Nearest(pub Option<String>);

impl Nearest {
    /// Looks for the name nearest to `typed`.
    pub fn among<'a>(typed: &str, names: impl IntoIterator<Item = &'a str>) -> Self {
        // Jaro-Winkler below 0.7 is a different word, not a typo.
        const SIMILAR: f64 = 0.7;
        let nearest = names
            .into_iter()
            .map(|name| (strsim::jaro_winkler(typed, name), name))
            .filter(|(similarity, _)| *similarity >= SIMILAR)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        Self(nearest.map(|(_, name)| name.to_owned()))
    }
}

impl fmt::Display for Nearest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(name) => write!(f, "; did you mean {name}?"),
            None => Ok(()),
        }
    }
}

/// What was typed, before it means anything.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `--config`; must exist if given.
    pub file: Option<PathBuf>,
    /// The environment.
    pub variables: Vec<(String, String)>,
    /// Flags: the flag's name, the key that it sets, the value.
    pub flags: Vec<(&'static str, &'static str, String)>,
}

/// Reads everything that was typed.
///
/// # Errors
/// The first thing that means nothing, with where it stands and what was expected.
pub fn load(sources: &Sources) -> Result<Settings, ConfigError> {
    let mut settings = Settings::default();
    let (path, required) = match &sources.file {
        Some(path) => (path.as_path(), true),
        None => (Path::new(DEFAULT_FILE), false),
    };
    match std::fs::read_to_string(path) {
        Ok(text) => read_file(&mut settings, path, &text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {}
        Err(source) => {
            return Err(ConfigError::Unreadable {
                path: path.to_owned(),
                source,
            });
        }
    }
    for (name, value) in &sources.variables {
        if name.starts_with(ENV_PREFIX) && !OTHER_VARIABLES.contains(&name.as_str()) {
            let key = KEYS.iter().find(|key| variable(key.path) == *name).ok_or_else(|| {
                let names: Vec<_> = KEYS.iter().map(|key| variable(key.path)).collect();
                ConfigError::UnknownKey {
                    origin: Origin::Variable(name.clone()),
                    key: name.clone(),
                    nearest: Nearest::among(name, names.iter().map(String::as_str)),
                }
            })?;
            let typed = match key.path {
                "imds.hosts" => Typed(value.split(',').map(|it| it.trim().to_owned()).collect(), Form::Text),
                _ => Typed::of(value),
            };
            set(&mut settings, key, &typed, Origin::Variable(name.clone()))?;
        }
    }
    for (flag, path, value) in &sources.flags {
        // A flag that names no key is a mistake of this program, not of its user; the test of the table holds it.
        if let Some(key) = KEYS.iter().find(|key| key.path == *path) {
            set(&mut settings, key, &Typed::of(value), Origin::Flag((*flag).to_owned()))?;
        }
    }
    if let Some(path) = &settings.metadata_file {
        let text = std::fs::read_to_string(path).map_err(|error| error.to_string());
        settings.from_file = text
            .and_then(|text| file::read(&text))
            .map_err(|what| ConfigError::MetadataFile {
                path: path.clone(),
                what,
            })?;
    }
    Ok(settings)
}

/// The environment variable of a key.
pub fn variable(path: &str) -> String {
    format!("{ENV_PREFIX}{}", path.replace('.', "_").to_ascii_uppercase())
}

fn set(settings: &mut Settings, key: &Key, value: &Typed, origin: Origin) -> Result<(), ConfigError> {
    (key.read)(settings, value).ok_or_else(|| ConfigError::BadValue {
        origin,
        key: key.path.to_owned(),
        value: value.shown(),
        expected: key.expected.to_owned(),
    })
}

fn read_file(settings: &mut Settings, path: &Path, text: &str) -> Result<(), ConfigError> {
    let line = |at: usize| text[..at.min(text.len())].matches('\n').count() + 1;
    let at = |at: usize| Origin::File(path.to_owned(), line(at));
    let document = DeTable::parse(text).map_err(|error| ConfigError::NotToml {
        origin: at(error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    for (name, value) in document.get_ref() {
        let origin = at(name.span().start);
        let name = name.get_ref().as_ref();
        let section = KEYS.iter().any(|key| key.path.starts_with(&format!("{name}.")));
        let table = TABLES.iter().find(|(table, _)| *table == name);
        match value.get_ref() {
            DeValue::Array(rules) if name == ALLOW => {
                for rule in rules {
                    read_rule(settings, rule, &at)?;
                }
            }
            value if name == ALLOW => {
                return Err(ConfigError::BadValue {
                    origin,
                    key: name.to_owned(),
                    value: typed(value).shown(),
                    expected: "rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned(),
                });
            }
            DeValue::Table(entries) if section || table.is_some() => {
                for (key, value) in entries {
                    let origin = at(key.span().start);
                    let key = key.get_ref().as_ref();
                    let path = format!("{name}.{key}");
                    match table.filter(|_| !KEYS.iter().any(|known| known.path == path)) {
                        Some((_, expected)) => read_entry(settings, name, expected, key, value.get_ref(), origin)?,
                        None => read_key(settings, &path, value.get_ref(), origin)?,
                    }
                }
            }
            value if section || table.is_some() => {
                return Err(ConfigError::BadValue {
                    origin,
                    key: name.to_owned(),
                    value: typed(value).shown(),
                    expected: format!("a section: a line [{name}], and its keys below"),
                });
            }
            value => read_key(settings, name, value, origin)?,
        }
    }
    Ok(())
}

fn read_key(settings: &mut Settings, path: &str, value: &DeValue<'_>, origin: Origin) -> Result<(), ConfigError> {
    let Some(key) = KEYS.iter().find(|key| key.path == path) else {
        let sections = KEYS
            .iter()
            .filter_map(|key| key.path.split_once('.'))
            .map(|(section, _)| section);
        let names = KEYS
            .iter()
            .map(|key| key.path)
            .chain(TABLES.iter().map(|(name, _)| *name))
            .chain([ALLOW])
            .chain(sections);
        return Err(ConfigError::UnknownKey {
            origin,
            key: path.to_owned(),
            nearest: Nearest::among(path, names),
        });
    };
    set(settings, key, &typed(value), origin)
}

/// The rules.
const ALLOW: &str = "allow";

fn read_rule(
    settings: &mut Settings,
    rule: &toml::Spanned<DeValue<'_>>,
    at: &dyn Fn(usize) -> Origin,
) -> Result<(), ConfigError> {
    let place = at(rule.span().start);
    let bad = |origin: Origin, key: &str, value: String, expected: &str| ConfigError::BadValue {
        origin,
        key: key.to_owned(),
        value,
        expected: expected.to_owned(),
    };
    let DeValue::Table(entries) = rule.get_ref() else {
        let expected = "rules: a line [[allow]] in double brackets, and the keys of a rule below";
        return Err(bad(place, ALLOW, typed(rule.get_ref()).shown(), expected));
    };
    let mut read = Rule {
        number: settings.allow.len() + 1,
        line: match &place {
            Origin::File(_, line) => *line,
            _ => 0,
        },
        ..Rule::default()
    };
    for (name, value) in entries {
        let origin = at(name.span().start);
        let name = name.get_ref().as_ref();
        let path = format!("{ALLOW}.{name}");
        let Some(key) = RULE_KEYS.iter().find(|key| key.name == name) else {
            let mut nearest = Nearest::among(name, RULE_KEYS.iter().map(|key| key.name));
            nearest.0 = nearest.0.map(|name| format!("{ALLOW}.{name}"));
            return Err(ConfigError::UnknownKey {
                origin,
                key: path,
                nearest,
            });
        };
        let value = typed(value.get_ref());
        (key.read)(&mut read, &value).ok_or_else(|| bad(origin, &path, value.shown(), key.expected))?;
    }
    if read.role.is_empty() && read.profile.is_empty() {
        let expected = "role, or profile: what the rule allows; role = \"**\" is every role";
        return Err(bad(place, ALLOW, "neither".to_owned(), expected));
    }
    // GetSessionToken takes no policy (STS API reference), so the ceiling could not be kept.
    let ceiling = read.session_policy.is_some() || !read.session_policy_arns.is_empty();
    if read.role.is_empty() && ceiling {
        let expected = "role: a profile that is served as it is cannot have a session policy";
        return Err(bad(place, ALLOW, "a session policy without role".to_owned(), expected));
    }
    settings.allow.push(read);
    Ok(())
}

fn typed(value: &DeValue<'_>) -> Typed {
    let number = |text: String| Typed(vec![text], Form::Number);
    match value {
        DeValue::Array(items) => Typed(
            items.iter().flat_map(|item| typed(item.get_ref()).0).collect(),
            Form::Text,
        ),
        DeValue::String(text) => Typed::of(text),
        DeValue::Boolean(value) => Typed(vec![value.to_string()], Form::Boolean),
        DeValue::Integer(value) => number(value.to_string()),
        DeValue::Float(value) => number(value.to_string()),
        DeValue::Datetime(value) => Typed::of(&value.to_string()),
        // Nothing takes a table; no text makes every reader say what it expected.
        DeValue::Table(_) => Typed(Vec::new(), Form::Table),
    }
}

fn read_entry(
    settings: &mut Settings,
    table: &str,
    expected: &str,
    name: &str,
    value: &DeValue<'_>,
    origin: Origin,
) -> Result<(), ConfigError> {
    let value = typed(value);
    let read = match (table, value.text()) {
        ("roles", Some(text)) => RoleArn::parse(text)
            .map(|arn| settings.roles.insert(name.to_owned(), arn))
            .is_some(),
        ("accounts", _) => {
            let account = value.account().map(str::to_owned);
            account
                .map(|account| settings.accounts.insert(name.to_owned(), account))
                .is_some()
        }
        ("metadata", Some(text)) => match metadata_path(name, text) {
            Ok(path) => settings.metadata.insert(path, text.to_owned()).is_none(),
            Err(what) => {
                let key = format!("{table}.{name}");
                return Err(ConfigError::BadPath { origin, key, what });
            }
        },
        ("public_keys", Some(text)) => {
            let fits = is_public_key(text) && !name.contains(|c: char| c.is_control() || c == '/');
            fits && settings.public_keys.insert(name.to_owned(), text.to_owned()).is_none()
        }
        _ => false,
    };
    if read {
        return Ok(());
    }
    Err(ConfigError::BadValue {
        origin,
        key: format!("{table}.{name}"),
        value: value.shown(),
        expected: expected.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let mut settings = Settings::default();
        read_file(&mut settings, Path::new("c.toml"), text).map_err(|error| error.to_string())?;
        Ok(settings)
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(read(""), Ok(Settings::default()));
    }

    #[test]
    fn every_documented_default_that_can_be_typed_is_the_default() {
        for key in KEYS {
            let mut settings = Settings::default();
            if (key.read)(&mut settings, &Typed::of(key.default)).is_some()
                && !matches!(
                    key.path,
                    "credentials.profile"
                        | "credentials.default_role"
                        | "imds.user_data"
                        | "imds.user_data_base64"
                        | "metadata.file"
                )
            {
                assert_eq!(settings, Settings::default(), "{}", key.path);
            }
        }
    }

    #[test]
    fn values_of_metadata_come_from_the_table_and_from_a_file() {
        let settings = read("[metadata]\nfile = \"/m.json\"\n\"placement/group-name\" = \"g\"\n").unwrap();
        assert_eq!(settings.metadata_file.as_deref(), Some(Path::new("/m.json")));
        assert_eq!(settings.metadata["meta-data/placement/group-name"], "g");
        for (text, why) in [
            (
                "\"placement\" = \"g\"",
                "c.toml, line 2: metadata.placement: that is a directory",
            ),
            (
                "\"instance-typ\" = \"g\"",
                "there is no such category; did you mean instance-type?",
            ),
            (
                "\"iam/info\" = \"g\"",
                "that follows from the role and the other values, and cannot be given",
            ),
            (
                "\"instance-type\" = \"a\\u001bb\"",
                "expected text without control characters, and not empty",
            ),
        ] {
            let error = read(&format!("[metadata]\n{text}\n")).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.json");
        let sources = Sources {
            flags: vec![("--metadata-file", "metadata.file", file.to_str().unwrap().to_owned())],
            ..Sources::default()
        };
        assert!(load(&sources).unwrap_err().to_string().contains("No such file"));
        std::fs::write(&file, r#"{"metadata": {"values": {"ami-launch-index": 3}}}"#).unwrap();
        assert_eq!(
            load(&sources).unwrap().from_file.values["meta-data/ami-launch-index"],
            "3"
        );
    }

    #[test]
    fn the_example_of_the_documentation_is_read() {
        let settings = read(
            r#"
region = "eu-west-1"
account_id = "111122223333"
[serve]
hold = "300ms"
[imds]
http_tokens = "required"
hosts = ["Metadata.local", "x"]
[credentials]
source = "offline"
duration = "2h"
[roles]
orders = "arn:aws:iam::111122223333:role/service/orders"
[accounts]
prod = "444455556666"
"#,
        )
        .unwrap();
        assert_eq!(settings.region.as_deref(), Some("eu-west-1"));
        assert_eq!(settings.hold, Duration::from_millis(300));
        assert_eq!(settings.http_tokens, HttpTokens::Required);
        assert_eq!(settings.hosts, ["metadata.local", "x"]);
        assert_eq!(settings.duration, HOUR * 2);
        assert_eq!(settings.roles["orders"].name(), "orders");
        assert_eq!(settings.accounts["prod"], "444455556666");
    }

    #[test]
    fn bad_files_say_where_what_and_what_was_expected() {
        for (text, message) in [
            (
                "regoin = \"x\"",
                "c.toml, line 1: unknown key regoin; did you mean region?",
            ),
            (
                "\n[serve]\nholt = \"1s\"",
                "c.toml, line 3: unknown key serve.holt; did you mean serve.hold?",
            ),
            (
                "[server]\nhold = \"1s\"",
                "c.toml, line 1: unknown key server; did you mean serve?",
            ),
            (
                "[credentials]\n\nduration = \"90\"",
                "c.toml, line 3: credentials.duration = \"90\": expected a duration from 15m to 12h (STS's own bounds)",
            ),
            (
                "region = 7",
                "c.toml, line 1: region = \"7\": expected an AWS region such as \"eu-west-1\"",
            ),
            (
                "account_id = \"12\"",
                "c.toml, line 1: account_id = \"12\": expected 12 digits in quotes",
            ),
            (
                "[roles]\na = \"arn:aws:iam::12:role/x\"",
                "c.toml, line 2: roles.a = \"arn:aws:iam::12:role/x\": expected a role ARN",
            ),
            (
                "[accounts]\np = 12",
                "c.toml, line 2: accounts.p = \"12\": expected an account id: 12 digits in quotes",
            ),
            (
                "[serve]\nattach = \"bridge\"",
                "c.toml, line 2: serve.attach = \"bridge\": expected \"auto\", \"namespace\", \"host\" or \"network\"",
            ),
            (
                "[imds]\nhttp_tokens = true",
                "c.toml, line 2: imds.http_tokens = \"true\": expected \"optional\" or \"required\"",
            ),
            (
                "[credentials]\nsession_name = \"{containr}\"",
                "c.toml, line 2: credentials.session_name = \"{containr}\": expected text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), message);
        }
        for (text, message) in [
            (
                "serve = 3",
                "c.toml, line 1: serve = \"3\": expected a section: a line [serve], and its keys below",
            ),
            (
                "[imds]\nhttp_tokens = {a = 1}",
                "c.toml, line 2: imds.http_tokens = \"a table\": expected \"optional\" or \"required\"",
            ),
            (
                "[accounts]\nprod = 444455556666",
                "c.toml, line 2: accounts.prod = \"444455556666\": expected an account id: 12 digits in quotes",
            ),
            (
                "account_id = 444455556666",
                "c.toml, line 1: account_id = \"444455556666\": expected 12 digits in quotes",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), message);
        }
        assert!(read("a = ").unwrap_err().starts_with("c.toml, line 1: not TOML: "));
    }

    #[test]
    fn rules_are_read_in_their_order() {
        let settings = read(
            r#"
[[allow]]
role = ["arn:aws:iam::111122223333:role/a*", "arn:*:iam::*:role/b/**"]
label = ["team", "stage=test-*"]
session_policy = '{"Statement":[]}'
max_duration = "30m"

[[allow]]
profile = "dev"
"#,
        )
        .unwrap();
        let [first, second] = settings.allow.as_slice() else {
            panic!("two rules")
        };
        assert_eq!(
            (first.to_string(), second.to_string()),
            ("allow rule 1 (line 2)".into(), "allow rule 2 (line 8)".into())
        );
        assert_eq!(first.max_duration, Some(Duration::from_secs(1800)));
        assert!(first.has_ceiling() && !second.has_ceiling());
        assert_eq!(first.rests_on_its_applicants().as_deref(), Some("label"));
        assert_eq!(second.rests_on_its_applicants(), None);
    }

    #[test]
    fn the_rules_of_the_readme_are_read() {
        let readme = include_str!("../README.md");
        let block = readme
            .split("```toml\n")
            .nth(1)
            .and_then(|rest| rest.split("```").next());
        let settings = read(block.expect("README has rules")).unwrap();
        assert_eq!(settings.allow.len(), 2);
        assert!(settings.allow[1].has_ceiling());
    }

    #[test]
    fn bad_rules_say_where_what_and_what_was_expected() {
        const RULE: &str = "[[allow]]\nrole = \"**\"\n";
        const ROLES: &str = "expected a pattern of role ARNs such as \"arn:aws:iam::111122223333:role/dev-*\" \
            (\"**\": every role), or a list of them";
        const GLOB: &str = "expected a pattern such as \"web-*\", or a list of them";
        const PAIR: &str = "expected \"KEY\" or \"KEY=PATTERN\", or a list of them";
        for (rule, message) in [
            ("[allow]\nrole = \"x\"", "1: allow = \"a table\": expected rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned()),
            ("allow = 3", "1: allow = \"3\": expected rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned()),
            ("allow = [\"x\"]", "1: allow = \"x\": expected rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned()),
            ("[[allow]]\n", "1: allow = \"neither\": expected role, or profile: what the rule allows; role = \"**\" is every role".to_owned()),
            ("[[allow]]\nprofile = \"p\"\nsession_policy_arns = \"arn:aws:iam::aws:policy/x\"", "1: allow = \"a session policy without role\": expected role: a profile that is served as it is cannot have a session policy".to_owned()),
            ("[[alow]]\nrole = \"**\"", "1: unknown key alow; did you mean allow?".to_owned()),
            ("[[allow]]\nrol = \"**\"", "2: unknown key allow.rol; did you mean allow.role?".to_owned()),
            ("[[allow]]\nsession_policys = \"**\"", "2: unknown key allow.session_policys; did you mean allow.session_policy?".to_owned()),
            ("[[allow]]\nrole = \"dev-*\"", format!("2: allow.role = \"dev-*\": {ROLES}")),
            ("[[allow]]\nrole = \"*\"", format!("2: allow.role = \"*\": {ROLES}")),
            ("[[allow]]\nrole = []", format!("2: allow.role = \"\": {ROLES}")),
            ("[[allow]]\nrole = \"arn:aws:iam::1:role/[x\"", format!("2: allow.role = \"arn:aws:iam::1:role/[x\": {ROLES}")),
            ("container = \"\"", format!("3: allow.container = \"\": {GLOB}")),
            ("project = 7", format!("3: allow.project = \"7\": {GLOB}")),
            ("network = \"a**b\"", format!("3: allow.network = \"a**b\": {GLOB}")),
            ("image_id = \"0123\"", "3: allow.image_id = \"0123\": expected an image id such as \"sha256:0123…\", or a list of them".to_owned()),
            ("label = \"=x\"", format!("3: allow.label = \"=x\": {PAIR}")),
            ("label = \"x=\"", format!("3: allow.label = \"x=\": {PAIR}")),
            ("session_tags = [\"a\", \"\"]", format!("3: allow.session_tags = \"a,\": {PAIR}")),
            ("session_name = true", "3: allow.session_name = \"true\": expected a pattern such as \"web-*\", or a list of them".to_owned()),
            ("session_policy_arns = \"ReadOnlyAccess\"", "3: allow.session_policy_arns = \"ReadOnlyAccess\": expected 1 to 10 policy ARNs such as \"arn:aws:iam::aws:policy/ReadOnlyAccess\"".to_owned()),
            ("session_policy = \"{}\"", "3: allow.session_policy = \"{}\": expected an IAM policy in JSON with a Statement, of at most 2048 characters".to_owned()),
            ("max_duration = \"5m\"", "3: allow.max_duration = \"5m\": expected a duration from 15m to 12h (STS's own bounds)".to_owned()),
        ] {
            let whole = match rule.contains("allow") || rule.contains("alow") {
                true => rule.to_owned(),
                false => format!("{RULE}{rule}"),
            };
            assert_eq!(read(&whole).unwrap_err(), format!("c.toml, line {message}"), "{rule}");
        }
        for (text, message) in [
            ("[compat]\nenv = 1", "2: compat.env = \"1\": expected true or false"),
            (
                "[compat]\niamdocker = true",
                "2: unknown key compat.iamdocker; did you mean compat.iam_docker?",
            ),
            (
                "[credentials]\nsession_name = \"{label:}\"",
                "2: credentials.session_name = \"{label:}\": expected text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}",
            ),
            (
                "[credentials]\ndefault_role = \"{proj}\"",
                "2: credentials.default_role = \"{proj}\": expected a role: ARN, name, name@account or alias; {container}, {project}, {service} … are filled in",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), format!("c.toml, line {message}"));
        }
    }

    #[test]
    fn what_a_running_daemon_takes_over_is_what_it_says() {
        let old = read("[serve]\nhold = \"300ms\"").unwrap();
        let same = old.reloaded(&old);
        assert!(same == (old.clone(), true));
        for key in KEYS {
            // Another value than the default of every key, where there is one to be had.
            let values = [
                "eu-west-2",
                "111122223333",
                "warn",
                "true",
                "enabled",
                "required",
                "x-{id}",
                "45m",
            ];
            let mut new = old.clone();
            let set = values
                .iter()
                .any(|value| (key.read)(&mut new, &Typed::of(value)).is_some() && new != old);
            let (settings, whole) = old.reloaded(&new);
            let says = |path: &str| {
                RELOADED
                    .split(", ")
                    .any(|told| told == path || path.starts_with(&format!("{told}.")))
            };
            assert_eq!(whole && settings == new, says(key.path) || !set, "{}", key.path);
        }
        let mut new = read("[roles]\na = \"arn:aws:iam::111122223333:role/a\"\n[[allow]]\nrole = \"**\"").unwrap();
        assert!(!old.reloaded(&new).1);
        new.hold = old.hold;
        assert!(old.reloaded(&new) == (new, true));
    }

    #[test]
    fn flag_beats_variable_beats_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "region = \"eu-west-1\"\naccount_id = \"111122223333\"\n").unwrap();
        let mut sources = Sources {
            file: Some(file),
            ..Sources::default()
        };
        assert_eq!(load(&sources).unwrap().region.as_deref(), Some("eu-west-1"));
        sources.variables = vec![
            ("IMDS_ROUTER_REGION".into(), "eu-west-2".into()),
            ("PATH".into(), "/".into()),
        ];
        assert_eq!(load(&sources).unwrap().region.as_deref(), Some("eu-west-2"));
        sources.flags = vec![("--region", "region", "eu-west-3".into())];
        let settings = load(&sources).unwrap();
        assert_eq!(settings.region.as_deref(), Some("eu-west-3"));
        assert_eq!(settings.account_id.as_deref(), Some("111122223333"));
    }

    #[test]
    fn variables_and_missing_files_are_named() {
        let variables = |name: &str, value: &str| Sources {
            variables: vec![(name.into(), value.into())],
            ..Sources::default()
        };
        assert_eq!(
            load(&variables("IMDS_ROUTER_SERVE_HOLDS", "1s"))
                .unwrap_err()
                .to_string(),
            "variable IMDS_ROUTER_SERVE_HOLDS: unknown key IMDS_ROUTER_SERVE_HOLDS; did you mean IMDS_ROUTER_SERVE_HOLD?"
        );
        assert!(
            load(&variables("IMDS_ROUTER_IMDS_HTTP_TOKENS", "no"))
                .unwrap_err()
                .to_string()
                .starts_with("variable IMDS_ROUTER_IMDS_HTTP_TOKENS: imds.http_tokens = \"no\": expected")
        );
        assert_eq!(
            load(&variables("IMDS_ROUTER_IMDS_HOSTS", "a, b")).unwrap().hosts,
            ["a", "b"]
        );
        let missing = Sources {
            file: Some("/nonexistent/c.toml".into()),
            ..Sources::default()
        };
        assert!(load(&missing).unwrap_err().to_string().contains("/nonexistent/c.toml"));
    }

    #[test]
    fn templates() {
        let part = |name: &str| (name == "container").then(|| "web".to_owned());
        assert_eq!(fill("{container}@h", part).as_deref(), Some("web@h"));
        assert_eq!(fill("{project}-{container}", part), None);
        assert_eq!(fill("{container", part), None);
    }
}
