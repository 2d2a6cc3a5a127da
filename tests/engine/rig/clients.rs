//! The clients whose credentials it is all about: real SDKs, each with its default chain, started by `docker exec`.

use serde_json::Value;

use super::container::{Container, EXAMPLES, SCRIPTS};
use super::hostile::last_line;
use super::moto::{Moto, REGION};
use super::shell::Done;
use super::tools;

/// Who STS says somebody is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub arn: String,
}

impl Identity {
    /// Who uses credentials of this role under this session name.
    pub fn of_role(account: &str, role: &str, session: &str) -> Identity {
        Identity {
            arn: format!("arn:aws:sts::{account}:assumed-role/{role}/{session}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    Boto3,
    AwsCli,
    Rust,
    JavaScript,
}

impl Client {
    pub const ALL: [Client; 4] = [Client::Boto3, Client::AwsCli, Client::Rust, Client::JavaScript];

    /// Who the client is when it runs in the container with nothing but region and STS endpoint, and `environment`, given.
    #[track_caller]
    pub fn whoami(self, container: &Container, moto: &Moto, environment: &[(&str, &str)]) -> Identity {
        match self.try_whoami(container, moto, environment) {
            Ok(identity) => identity,
            Err(done) => panic!("{self:?} in {}: {done}", container.name()),
        }
    }

    /// As [`whoami`](Self::whoami), for trials in which it is to fail.
    #[track_caller]
    pub fn try_whoami(
        self,
        container: &Container,
        moto: &Moto,
        environment: &[(&str, &str)],
    ) -> Result<Identity, Done> {
        let endpoint = moto.url_for(container);
        let mut all = vec![
            ("AWS_REGION", REGION),
            ("AWS_DEFAULT_REGION", REGION), // botocore knows only this one
            ("AWS_ENDPOINT_URL_STS", &endpoint),
        ];
        all.extend(environment);
        let mut command = container.exec_command(&all);
        let tools = tools::directory();
        match self {
            Client::Boto3 => command
                .arg(tools.join("venv/bin/python"))
                .arg(format!("{SCRIPTS}/whoami.py")),
            Client::AwsCli => command
                .arg(tools.join("venv/bin/aws"))
                .args(["sts", "get-caller-identity", "--query", "Arn"])
                .args(["--output", "text"]),
            Client::Rust => command.arg(format!("{EXAMPLES}/whoami")),
            Client::JavaScript => command.arg(tools.join("node")).arg(format!("{SCRIPTS}/whoami.mjs")),
        };
        let done = Done::of(command);
        match done.succeeded() {
            true => Ok(Identity {
                arn: done.stdout.trim().to_owned(),
            }),
            false => Err(done),
        }
    }
}

/// Runs a client of `tests/clients` in a container (a Python script, or a JavaScript module) and returns the last line that it
/// prints, as JSON.
#[track_caller]
pub fn run_script(container: &Container, script: &str, arguments: &[&str]) -> Value {
    let program = if script.ends_with(".mjs") {
        "node"
    } else {
        "venv/bin/python"
    };
    let script = format!("{SCRIPTS}/{script}");
    run_tool(container, program, &[&[script.as_str()], arguments].concat())
}

/// Runs a program that `tests/setup` has installed in a container, and returns the last line that it prints, as JSON.
#[track_caller]
pub fn run_tool(container: &Container, program: &str, arguments: &[&str]) -> Value {
    let mut command = container.exec_command(&[("AWS_REGION", REGION), ("AWS_DEFAULT_REGION", REGION)]);
    command.arg(tools::directory().join(program)).args(arguments);
    let done = Done::of(command);
    assert!(done.succeeded(), "{done}");
    if !done.stderr.is_empty() {
        println!("{}", done.stderr);
    }
    last_line(&done.stdout)
}
