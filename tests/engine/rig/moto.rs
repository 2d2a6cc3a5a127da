//! The STS that the trials' daemons ask: moto, on the engine's host.

use std::time::Duration;

use serde_json::Value;

use super::container::Container;
use super::engine::{Background, Engine};
use super::shell::{poll_quietly, tail};
use super::tools;

/// Base credentials and region for a daemon. moto takes any key; these are not to be seen in any log either.
pub const BASE_KEY: &str = "AKIAIMDSROUTERTRIALS";
pub const BASE_SECRET: &str = "base-secret-of-the-trials-0123456789abcdef";
/// The region of daemons and clients.
pub const REGION: &str = "eu-west-1";
const PORT: u16 = 5000;

/// A running moto. It answers AssumeRole for any role of any account, whether it exists or not, and tells whoever uses the
/// credentials by their access key: `get-caller-identity` gives account, role and session name of that AssumeRole.
/// Accounts are those of the role ARNs; an access key that it did not issue belongs to 123456789012.
pub struct Moto {
    host_url: String,
    _process: Background,
}

impl Moto {
    #[track_caller]
    pub(super) fn start(engine: &Engine) -> Moto {
        let mut command = engine.command(tools::directory().join("venv/bin/moto_server"));
        // For the bridges, too: containers come in by their gateway's address.
        command.args(["--host", "0.0.0.0", "--port", &PORT.to_string()]);
        let mut process = engine.background(&mut command, "moto");
        let host_url = format!("http://127.0.0.1:{PORT}");
        let url = format!("{host_url}/moto-api/");
        let answered = poll_quietly(Duration::from_secs(60), || {
            let died = process.ended().is_some();
            (died || engine.request("GET", &url, &[]).is_ok()).then_some(!died)
        });
        assert_eq!(answered, Some(true), "moto does not start:\n{}", tail(&process.log, 25));
        Moto {
            host_url,
            _process: process,
        }
    }

    /// Its address for the engine's host.
    pub fn url(&self) -> &str {
        &self.host_url
    }

    /// Its address for a container.
    #[track_caller]
    pub fn url_for(&self, container: &Container) -> String {
        format!("http://{}:{PORT}", container.gateway())
    }

    /// What a daemon needs to take moto for AWS.
    pub fn daemon_environment(&self) -> Vec<(String, String)> {
        [
            ("AWS_ENDPOINT_URL_STS", self.url()),
            ("AWS_ACCESS_KEY_ID", BASE_KEY),
            ("AWS_SECRET_ACCESS_KEY", BASE_SECRET),
            ("AWS_REGION", REGION),
        ]
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .to_vec()
    }

    /// What must be in no log: the base secret, and the secret key and session token of every AssumeRole so far. Does not
    /// panic, for it is asked when an engine ends.
    pub fn secrets(&self, engine: &Engine) -> Result<Vec<String>, String> {
        let roles = self.try_assumed_roles(engine)?.into_iter();
        let issued = roles.flat_map(|role| [role.secret_access_key, role.session_token]);
        Ok(issued.chain([BASE_SECRET.to_owned()]).collect())
    }

    /// Every AssumeRole so far, in the order of asking.
    #[track_caller]
    pub fn assumed_roles(&self, engine: &Engine) -> Vec<AssumedRole> {
        match self.try_assumed_roles(engine) {
            Ok(roles) => roles,
            Err(why) => panic!("{why}"),
        }
    }

    fn try_assumed_roles(&self, engine: &Engine) -> Result<Vec<AssumedRole>, String> {
        let url = format!("{}/moto-api/data.json", self.host_url);
        let reply = engine
            .request("GET", &url, &[])
            .map_err(|why| format!("moto does not say whom it knows: {why}"))?;
        let data: Value = serde_json::from_str(&reply.body).map_err(|e| format!("moto's data are no JSON: {e}"))?;
        // Absent until the first one.
        let rows = data.pointer("/sts/AssumedRole").and_then(Value::as_array);
        let rows = rows.cloned().unwrap_or_default();
        let text = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        let roles = rows.iter().map(|row| AssumedRole {
            role_arn: text(row, "role_arn"),
            session_name: text(row, "session_name"),
            access_key_id: text(row, "access_key_id"),
            secret_access_key: text(row, "secret_access_key"),
            session_token: text(row, "session_token"),
        });
        Ok(roles.collect())
    }
}

/// One AssumeRole that moto has answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AssumedRole {
    pub role_arn: String,
    pub session_name: String,
    pub access_key_id: String,
    pub secret_access_key: String,
    pub session_token: String,
}
