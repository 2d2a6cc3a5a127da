//! The credentials of the host's own instance profile, as EC2 gives them to it: by IMDSv2.
//!
//! The SDK's provider for it is switched off for this whole process (main.rs), for where the address is ours it would ask us;
//! its client is not, and is told whom to ask.

use std::time::{Duration, SystemTime};

use aws_config::imds::Client;
use aws_config::imds::client::SensitiveString;
use aws_config::imds::client::error::ImdsError;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::Credentials;
use aws_types::sdk_config::SharedHttpClient;

use super::broker::ProviderError;
use super::sts::MESSAGE_CHARACTERS;
use crate::logging::{printable, with_causes};

/// EC2 answers at once, or is not there.
const TIMEOUT: Duration = Duration::from_secs(2);
/// Where the one role is listed; its credentials stand below.
const LIST: &str = "/latest/meta-data/iam/security-credentials/";

/// The document that stands there (EC2 user guide, "Retrieve security credentials from instance metadata").
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Document {
    code: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    access_key_id: String,
    #[serde(default)]
    secret_access_key: String,
    #[serde(default)]
    token: String,
    #[serde(default)]
    expiration: Option<jiff::Timestamp>,
}

/// The host's own metadata service.
#[derive(Clone)]
pub struct HostMetadata(Client);

impl HostMetadata {
    /// At `service`, `http://169.254.169.254`.
    ///
    /// # Errors
    /// When that is no address of a service.
    pub fn at(service: &str, http: SharedHttpClient) -> Result<Self, String> {
        let config = ProviderConfig::without_region().with_http_client(http);
        let client = Client::builder()
            .configure(&config)
            .endpoint(service)
            .map_err(|error| error.to_string())?;
        let client = client.connect_timeout(TIMEOUT).read_timeout(TIMEOUT).max_attempts(2);
        Ok(Self(client.build()))
    }

    /// What stands at a path; `None`: nothing does.
    ///
    /// # Errors
    /// When it does not say.
    pub async fn get(&self, path: &str) -> Result<Option<SensitiveString>, ImdsError> {
        match self.0.get(path).await {
            Ok(value) => Ok(Some(value)),
            Err(ImdsError::ErrorResponse(answer)) if answer.response().status().as_u16() == 404 => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Asks for them at `service`, `http://169.254.169.254`; and where they come from, for people. `None`: the host has no instance
/// profile.
///
/// # Errors
/// Why there are none.
pub(super) async fn credentials(
    service: &str,
    http: SharedHttpClient,
) -> Result<Option<(Credentials, String)>, ProviderError> {
    let host = HostMetadata::at(service, http).map_err(|error| {
        ProviderError::NoBase(format!("the instance metadata service cannot be at {service}: {error}"))
    })?;
    let Some(list) = host.get(LIST).await.map_err(failed)? else {
        return Ok(None);
    };
    let role = list.as_ref().lines().next().unwrap_or_default().trim();
    if role.is_empty()
        || !role
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"+=,.@_-".contains(&b))
    {
        return Err(ProviderError::Unavailable(
            "instance profile: no role is listed".to_owned(),
        ));
    }
    let document = host.get(&format!("{LIST}{role}")).await.map_err(failed)?;
    let document = document.as_ref().map_or("", SensitiveString::as_ref);
    let strange = || ProviderError::Unavailable(format!("instance profile, role {role}: no credentials document"));
    let document: Document = serde_json::from_str(document).map_err(|_| strange())?;
    if document.code != "Success" {
        let said = printable(&format!("{}: {}", document.code, document.message), MESSAGE_CHARACTERS);
        return Err(ProviderError::NoBase(format!("instance profile, role {role}: {said}")));
    }
    if document.access_key_id.is_empty() || document.secret_access_key.is_empty() || document.token.is_empty() {
        return Err(strange());
    }
    let credentials = Credentials::new(
        document.access_key_id,
        document.secret_access_key,
        Some(document.token),
        document.expiration.map(SystemTime::from),
        "instance profile",
    );
    Ok(Some((
        credentials,
        format!("instance profile of this host, role {role}"),
    )))
}

fn failed(error: ImdsError) -> ProviderError {
    ProviderError::Unavailable(printable(
        &format!("the host's own instance metadata service: {}", with_causes(&error)),
        MESSAGE_CHARACTERS,
    ))
}
