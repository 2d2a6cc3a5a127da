//! Every key: its name, its default, what it takes, and how it is read.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::{
    Attach, CredentialSource, DEFAULT_ADMIN_SOCKET, DEFAULT_DMI_DIR, DockerInDocker, HostImds, HttpEndpoint,
    HttpTokens, Proof, Settings, decode_base64, hop_limit, is_region, is_user_data, parse_duration, template_fits,
};
use crate::credentials::allow_rules::{Glob, Pair, Rule};
use crate::credentials::{is_account_id, session_inputs};
use crate::files;
use crate::metadata::aemm::MOST_USER_DATA;

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
    pub(super) read: fn(&mut Settings, &RawValue) -> Option<()>,
}

/// A value as typed: one item, or several in a list.
#[derive(Clone)]
pub(super) struct RawValue(pub(super) Vec<String>, pub(super) RawType);

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum RawType {
    /// A variable or a flag: they have no types.
    Untyped,
    /// In quotes.
    Text,
    Number,
    Boolean,
    /// A list of texts.
    List,
    /// No key takes it.
    Table,
    /// A date, or a list of anything but texts. No key takes it.
    Other,
}

impl RawValue {
    pub(super) fn of(text: &str) -> Self {
        Self(vec![text.to_owned()], RawType::Untyped)
    }

    /// How to type this value so that `read` takes it, as the end of a message.
    pub(super) fn other_form(&self, read: impl Fn(&Self) -> bool) -> &'static str {
        let as_form = |form| read(&Self(self.0.clone(), form));
        match self.1 {
            RawType::Text if as_form(RawType::Number) || as_form(RawType::Boolean) => ", without quotes",
            RawType::Number | RawType::Boolean if as_form(RawType::Text) => ", in quotes",
            _ => "",
        }
    }

    /// As a message shows it.
    pub(super) fn shown(&self) -> String {
        if self.1 == RawType::Table {
            "a table".to_owned()
        } else {
            self.0.join(",")
        }
    }

    /// An account id: a number may have lost its leading zeros.
    pub(super) fn account(&self) -> Option<&str> {
        self.text().filter(|text| is_account_id(text))
    }

    pub(super) fn text(&self) -> Option<&str> {
        self.one_as(RawType::Text)
    }

    fn number(&self) -> Option<&str> {
        self.one_as(RawType::Number)
    }

    fn one_as(&self, form: RawType) -> Option<&str> {
        match self.0.as_slice() {
            [one] if !one.is_empty() && [form, RawType::Untyped].contains(&self.1) => Some(one),
            _ => None,
        }
    }

    /// One or more texts.
    fn texts(&self) -> Option<&[String]> {
        let fits = [RawType::Text, RawType::List, RawType::Untyped].contains(&self.1);
        fits.then_some(self.0.as_slice())
    }

    fn one_of<T: Copy>(&self, choices: &[(&str, T)]) -> Option<T> {
        let text = self.text()?;
        choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value)
    }

    fn boolean(&self) -> Option<bool> {
        self.one_as(RawType::Boolean)?.parse().ok()
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
        let items: Option<Vec<_>> = self.texts()?.iter().map(|it| read(it)).collect();
        items.filter(|items| !items.is_empty())
    }

    fn duration(&self, least: Duration, most: Duration) -> Option<Duration> {
        parse_duration(self.text()?).filter(|it| (least..=most).contains(it))
    }
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
            v.text()
                .filter(|it| is_engine(it))
                .map(|it| s.docker_host = Some(it.to_owned()))
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
        about: "Whether labels and variables of images count like those of containers: the author of an image then chooses its role.",
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
        about: "How containers are reached. `auto`, `namespace`: over a link of its own into each container's network namespace. `host`: over the host's bridges. `network`: over the network on which the daemon's container itself has the address. The last two need proof `address`.",
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
        path: "serve.host_imds",
        default: "auto",
        expected: "\"auto\", \"keep\" or \"replace\"",
        about: "How to treat the host's own metadata service. `keep`: host processes keep using it, and containers are blocked from it. `replace`: the daemon takes its address, for all processes on this host. `auto`: `keep` on a machine of a cloud.",
        read: |s, v| {
            v.one_of(&[
                ("auto", HostImds::Auto),
                ("keep", HostImds::Keep),
                ("replace", HostImds::Replace),
            ])
            .map(|it| s.host_imds = it)
        },
    },
    Key {
        path: "serve.dmi_dir",
        default: DEFAULT_DMI_DIR,
        expected: "an absolute path",
        about: "Where the firmware says whose machine this is (sys_vendor, product_name …), for serve.host_imds.",
        read: |s, v| absolute(v).map(|it| s.dmi_dir = it),
    },
    Key {
        path: "serve.proof",
        default: "full",
        expected: "\"full\" or \"address\"",
        about: "The least evidence that is accepted. `full`: the kernel authenticates each connection. `address`: the source address is enough; a neighbor with NET_RAW can use it.",
        read: |s, v| {
            v.one_of(&[("full", Proof::Full), ("address", Proof::Address)])
                .map(|it| s.proof = it)
        },
    },
    Key {
        path: "serve.docker_in_docker",
        default: "refuse",
        expected: "\"refuse\" or \"inherit\"",
        about: "What containers inside a container (Docker-in-Docker) get: nothing, or the outer container's role. Attach `namespace` only.",
        read: |s, v| {
            v.one_of(&[("refuse", DockerInDocker::Refuse), ("inherit", DockerInDocker::Inherit)])
                .map(|it| s.docker_in_docker = it)
        },
    },
    Key {
        path: "serve.max_wait",
        default: "400ms",
        expected: "a duration from 50ms to 900ms: the strictest SDK gives up at 500ms, most at 1s",
        about: "Maximum time that a request waits, in all: for the look-up of its container and for the first credentials.",
        read: |s, v| {
            v.duration(Duration::from_millis(50), Duration::from_millis(900))
                .map(|it| s.max_wait = it)
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
        path: "imds.labels_may_relax",
        default: "false",
        expected: "true or false",
        about: "Whether labels may make the options of this section laxer, not only stricter.",
        read: |s, v| v.boolean().map(|it| s.labels_may_relax = it),
    },
    Key {
        path: "imds.http_endpoint",
        default: "labeled",
        expected: "\"labeled\", \"enabled\" or \"disabled\"",
        about: "Which containers find a metadata service.",
        read: |s, v| {
            v.one_of(&[
                ("labeled", HttpEndpoint::Labeled),
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
        read: |s, v| v.number().and_then(hop_limit).map(|it| s.hop_limit = it),
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
        read: |s, v| user_data(s, decode_base64(v.text()?)?),
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
            let hosts = v.texts()?;
            let named = hosts.iter().all(|it| !it.is_empty());
            named.then(|| s.hosts = hosts.iter().map(|it| it.to_ascii_lowercase()).collect())
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
            v.duration(*session_inputs::DURATION.start(), *session_inputs::DURATION.end())
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
            let number = v.number()?.parse().ok();
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
pub(super) struct RuleKey {
    pub(super) name: &'static str,
    pub(super) expected: &'static str,
    pub(super) read: fn(&mut Rule, &RawValue) -> Option<()>,
}

const GLOBS: &str = "a pattern such as \"web-*\", or a list of them";

pub(super) const RULE_KEYS: &[RuleKey] = &[
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
            let arns: Vec<_> = v.texts()?.iter().map(String::as_str).collect();
            session_inputs::policy_arns(&arns).map(|arns| rule.session_policy_arns = arns)
        },
    },
    RuleKey {
        name: "session_policy",
        expected: "an IAM policy in JSON with a Statement, of at most 2048 characters",
        read: |rule, v| {
            let policy = v.text().filter(|it| session_inputs::is_policy(it));
            policy.map(|it| rule.session_policy = Some(it.to_owned()))
        },
    },
    RuleKey {
        name: "max_duration",
        expected: "a duration from 15m to 12h (STS's own bounds)",
        read: |rule, v| {
            let duration = v.duration(*session_inputs::DURATION.start(), *session_inputs::DURATION.end());
            duration.map(|it| rule.max_duration = Some(it))
        },
    },
];

/// The tables whose keys the operator names, and what a value must be.
pub(super) const TABLES: &[(&str, &str)] = &[
    ("roles", "a role ARN"),
    ("accounts", "an account id: 12 digits in quotes"),
    ("metadata", "text, at the path of a value below meta-data/"),
    (
        "public_keys",
        "a public key in one line, such as \"ssh-ed25519 AAAA… me\"",
    ),
];

/// Whether `text` is the address of an engine that this daemon can reach.
fn is_engine(text: &str) -> bool {
    if let Some(path) = text.strip_prefix("unix://") {
        return path.starts_with('/') && path.len() > 1;
    }
    let uri: Option<hyper::Uri> = text.parse().ok();
    uri.is_some_and(|uri| {
        let known = uri.scheme_str().is_some_and(|it| ["tcp", "http"].contains(&it));
        let port = uri.authority().is_some_and(|it| !it.as_str().ends_with(':'));
        known && port && uri.host().is_some_and(|host| !host.is_empty())
    })
}

fn absolute(value: &RawValue) -> Option<PathBuf> {
    value.text().map(PathBuf::from).filter(|path| path.is_absolute())
}

fn user_data(settings: &mut Settings, data: Vec<u8>) -> Option<()> {
    is_user_data(&data).then(|| settings.user_data = Some(data.into()))
}

/// A whole file of at most so many bytes; one byte more is enough to know that it is too long.
fn read_at_most(path: &Path, most: usize) -> Option<Vec<u8>> {
    files::read(path, u64::try_from(most).ok()?).ok()
}

/// Whether `text` is a public key as OpenSSH writes it.
pub(super) fn is_public_key(text: &str) -> bool {
    let mut words = text.split(' ');
    let kind = words
        .next()
        .is_some_and(|it| ["ssh-", "ecdsa-", "sk-"].iter().any(|kind| it.starts_with(kind)));
    kind && words.next().is_some_and(|key| STANDARD.decode(key).is_ok()) && !text.contains(char::is_control)
}
