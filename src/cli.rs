//! Verbs and flags.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::config::{DEFAULT_ADMIN_SOCKET, Sources, parse_duration};
use crate::logging::LogFormat;

/// The EC2 instance metadata service of every container on a Docker host, each with its own role.
#[derive(Parser, Debug)]
#[command(
    version,
    about,
    after_help = "Containers get a role with a label: docker run --label imds.role=my-role …\n\
                  Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Verb {
    /// Serve the containers of this host until SIGTERM or SIGINT; SIGHUP reads the configuration again
    Serve(Serve),
    /// Show what each running container would get, and what is wrong with its labels, without serving
    Check {
        /// Flags of the configuration.
        #[command(flatten)]
        common: Common,
        /// Also what each container got from iam-docker, metadataproxy, ec2metaproxy or imds-server
        #[arg(long)]
        compat: bool,
        /// Instead of what runs: the services of what `docker compose config` prints; - is standard input
        #[arg(long, value_name = "FILE", conflicts_with = "compat")]
        compose: Option<PathBuf>,
    },
    /// Show what is wrong on this host, why it matters, and the command that fixes it; changes nothing
    Doctor {
        /// Flags of the configuration.
        #[command(flatten)]
        common: Common,
    },
    /// Put up or down by itself what refuses containers without a daemon: address, routes, rules
    Intercept {
        /// up: callers are refused until a daemon serves; down: removes what is ours; plan: says what up would do
        #[arg(value_enum)]
        what: Intercept,
        /// Configuration [default: /etc/imds-router/config.toml, if it is there]
        #[arg(long, value_name = "FILE", env = "IMDS_ROUTER_CONFIG")]
        config: Option<PathBuf>,
    },
    /// Show every container: addresses, role, credentials until, last request, why not
    Status {
        /// As JSON, with stable names
        #[arg(long)]
        json: bool,
        /// Again every second, until it is interrupted; with --json, one line each time
        #[arg(long)]
        watch: bool,
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
    /// Show how a request of a container is judged, step by step, and what was refused lately
    Explain {
        /// Name, beginning of the id, or compose service
        container: String,
        /// As JSON, with stable names
        #[arg(long)]
        json: bool,
        /// Print instead what the trust policies of its roles must say
        #[arg(long)]
        trust_policy: bool,
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
    /// Hand over session credentials to the daemon, as base: aws configure export-credentials | imds-router login --stdin
    Login {
        /// For containers of this profile; without it, for the daemon itself
        #[arg(long, value_name = "P")]
        profile: Option<String>,
        /// Read them from standard input. They are kept in memory until they expire, and never shown
        #[arg(long, required = true)]
        stdin: bool,
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
    /// Let something happen to a container, as EC2 would tell it; without EVENT, list what is to happen
    Trigger {
        /// Name, beginning of an id, or compose service
        container: String,
        /// What
        #[arg(value_enum)]
        event: Option<Happening>,
        /// What it does: terminate, stop, hibernate; system-reboot, instance-stop, …; Terminated, Standby, …
        #[arg(long, value_name = "A", requires = "event")]
        action: Option<String>,
        /// How long until it happens, such as 90s, 10m, 2h [default: 2m, now, 1h, now]
        #[arg(long = "in", value_name = "TIME", requires = "event")]
        after: Option<String>,
        /// Call it off
        #[arg(long, requires = "event", conflicts_with_all = ["action", "after"])]
        cancel: bool,
        /// With spot-interruption: really stop the container when the notice is over, if the configuration (imds.triggers_may_stop) allows it
        #[arg(long, requires = "event", conflicts_with = "cancel")]
        stop: bool,
        /// Print JSON, whose names are stable
        #[arg(long)]
        json: bool,
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
    /// Change a container's instance metadata options while it runs, over what labels and configuration say
    Modify {
        /// Name, beginning of an id, or compose service
        container: String,
        /// Whether it finds a metadata service
        #[arg(long, value_enum)]
        http_endpoint: Option<OnOff>,
        /// Whether it must use IMDSv2
        #[arg(long, value_enum)]
        http_tokens: Option<Tokens>,
        /// How many routers the answer with a token may pass
        #[arg(long, value_name = "1..64", value_parser = clap::value_parser!(u8).range(1..=64))]
        http_put_response_hop_limit: Option<u8>,
        /// Whether it sees its tags
        #[arg(long, value_enum)]
        instance_metadata_tags: Option<OnOff>,
        /// Whether it is answered over IPv6
        #[arg(long, value_enum)]
        http_protocol_ipv6: Option<OnOff>,
        /// Print JSON, whose names are stable
        #[arg(long)]
        json: bool,
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
    /// What instance identities are verified with
    Identity {
        /// Print the certificate that they are signed by, in PEM
        #[arg(value_enum)]
        what: Identity,
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
    /// On an EC2 instance: write what its metadata is to a file that --metadata-file serves. No credentials, no signatures
    Record {
        /// Which file; it must not be there yet. Only its owner can read it
        file: PathBuf,
        /// User data as well: it may hold secrets
        #[arg(long)]
        user_data: bool,
    },
    /// Ask the metadata service for a path, as an IMDSv2 client; works inside containers
    Get {
        /// Such as meta-data/instance-id, or /latest/meta-data/instance-id
        path: String,
    },
    /// Wait until the metadata service answers here: before what cannot do without it starts
    Wait {
        /// How long at most, such as 30s
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = typed_duration)]
        timeout: Duration,
    },
    /// Ask the daemon whether it serves, for health checks: its own way from the address to an answer, never AWS
    Health {
        /// The daemon's admin socket
        #[arg(long, value_name = "PATH", env = "IMDS_ROUTER_SERVE_ADMIN_SOCKET", default_value = DEFAULT_ADMIN_SOCKET)]
        admin: PathBuf,
    },
}

fn typed_duration(text: &str) -> Result<Duration, String> {
    parse_duration(text).ok_or_else(|| "expected a duration such as 500ms, 30s, 2m or 1h30m".to_owned())
}

/// What can happen to a container.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Happening {
    /// A spot instance is taken back
    SpotInterruption,
    /// It is at risk of that
    Rebalance,
    /// The host is to be maintained
    Maintenance,
    /// The Auto Scaling group moves it to another state
    Lifecycle,
}

/// Whether.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum OnOff {
    /// Yes.
    Enabled,
    /// No.
    Disabled,
}

/// EC2's `HttpTokens`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Tokens {
    /// IMDSv1 and IMDSv2.
    Optional,
    /// IMDSv2 only.
    Required,
}

/// What of instance identity.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Identity {
    /// The certificate.
    Certificate,
}

/// Which way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Intercept {
    /// Put up.
    Up,
    /// Take down.
    Down,
    /// Say what would be done.
    Plan,
}

/// Flags of verbs that read the configuration.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Configuration [default: /etc/imds-router/config.toml, if it is there]
    #[arg(long, value_name = "FILE", env = "IMDS_ROUTER_CONFIG")]
    pub config: Option<PathBuf>,
    /// Well-formed fake credentials, without AWS
    #[arg(long)]
    pub offline: bool,
    /// Profile of the base credentials
    #[arg(long, value_name = "P")]
    pub profile: Option<String>,
    /// Region of containers that name none
    #[arg(long, value_name = "R")]
    pub region: Option<String>,
    /// Role of containers that name none
    #[arg(long, value_name = "ROLE")]
    pub default_role: Option<String>,
    /// Values of metadata for every container: a configuration of amazon-ec2-metadata-mock
    #[arg(long, value_name = "FILE")]
    pub metadata_file: Option<String>,
}

/// Flags of `serve`.
#[derive(Args, Clone, Debug)]
pub struct Serve {
    #[command(flatten)]
    /// Flags of the configuration.
    pub common: Common,
    /// How containers are reached: auto, namespace, host or network
    #[arg(long, value_name = "WAY")]
    pub attach: Option<String>,
    /// Where to put the admin socket
    #[arg(long, value_name = "PATH")]
    pub admin: Option<String>,
    /// How log lines look; IMDS_ROUTER_LOG sets the level
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

impl Common {
    /// What was typed, together with the environment.
    pub fn sources(&self) -> Sources {
        let text = |value: &Option<String>| value.clone();
        let flags = [
            (
                "--offline",
                "credentials.source",
                self.offline.then(|| "offline".to_owned()),
            ),
            ("--profile", "credentials.profile", text(&self.profile)),
            ("--region", "region", text(&self.region)),
            ("--default-role", "credentials.default_role", text(&self.default_role)),
            ("--metadata-file", "metadata.file", text(&self.metadata_file)),
        ];
        let flags = flags.into_iter();
        Sources {
            flags: flags
                .filter_map(|(flag, key, value)| Some((flag, key, value?)))
                .collect(),
            ..sources(self.config.as_ref())
        }
    }
}

/// A configuration file, if one was typed, together with the environment.
pub fn sources(file: Option<&PathBuf>) -> Sources {
    Sources {
        file: file.cloned(),
        // Variables that are no text are none of ours.
        variables: std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect(),
        flags: Vec::new(),
    }
}

impl Serve {
    /// What was typed, together with the environment.
    pub fn sources(&self) -> Sources {
        let mut sources = self.common.sources();
        sources
            .flags
            .extend(self.attach.clone().map(|value| ("--attach", "serve.attach", value)));
        sources
            .flags
            .extend(self.admin.clone().map(|value| ("--admin", "serve.admin_socket", value)));
        sources
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::KEYS;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_flag_of_the_configuration_sets_a_key() {
        let cli = Cli::parse_from([
            "imds-router",
            "serve",
            "--offline",
            "--profile",
            "p",
            "--region",
            "eu-west-1",
            "--default-role",
            "r",
            "--attach",
            "host",
            "--admin",
            "/a",
            "--metadata-file",
            "/m.json",
            "--log-format",
            "json",
        ]);
        let Verb::Serve(serve) = cli.verb else { panic!("serve") };
        let sources = serve.sources();
        assert_eq!(sources.flags.len(), 7);
        for (flag, key, _) in &sources.flags {
            assert!(KEYS.iter().any(|known| known.path == *key), "{flag} {key}");
        }
    }
}
