//! Credentials from AWS: AssumeRole with base credentials from the usual AWS chain.
//!
//! The chain's own instance metadata provider is off (`AWS_EC2_METADATA_DISABLED`, set before any thread exists): this
//! daemon answers at that address, and must never be its own customer.

use std::error::Error;
use std::time::{Duration, SystemTime};

use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::ProvideCredentials;
use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};

use super::broker::{CredentialProvider, Provided, ProviderError};
use super::{Credentials, RoleSession, Secret};
use crate::telemetry::{printable, with_causes};

/// A call of STS that has not ended after this is given up; requests never wait for it.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// The longest piece of a foreign message that is shown.
const MESSAGE_CHARACTERS: usize = 300;

/// Who the base credentials are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseIdentity {
    /// Account id.
    pub account: String,
    /// The caller's ARN.
    pub arn: String,
}

/// AssumeRole.
#[derive(Clone, Debug)]
pub struct Sts {
    base: SdkConfig,
}

impl Sts {
    /// Reads the AWS configuration; credentials themselves are fetched when they are needed.
    pub async fn load(profile: Option<&str>, region: Option<&str>) -> Self {
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .operation_attempt_timeout(ATTEMPT_TIMEOUT)
            .operation_timeout(OPERATION_TIMEOUT)
            .build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest()).timeout_config(timeouts);
        if let Some(profile) = profile {
            loader = loader.profile_name(profile);
        }
        if let Some(region) = region {
            loader = loader.region(Region::new(region.to_owned()));
        }
        Self {
            base: loader.load().await,
        }
    }

    /// The region that the AWS configuration names.
    pub fn region(&self) -> Option<String> {
        self.base.region().map(ToString::to_string)
    }

    /// Asks STS who the base credentials are.
    ///
    /// # Errors
    /// When there are none, or STS cannot be asked.
    pub async fn base_identity(&self, region: &str) -> Result<BaseIdentity, ProviderError> {
        match self.client(region).get_caller_identity().send().await {
            Ok(identity) => match (identity.account, identity.arn) {
                (Some(account), Some(arn)) => Ok(BaseIdentity { account, arn }),
                _ => Err(ProviderError::Unavailable(
                    "GetCallerIdentity answered without account".into(),
                )),
            },
            Err(error) => Err(self.explain(error).await),
        }
    }

    fn client(&self, region: &str) -> aws_sdk_sts::Client {
        let config = aws_sdk_sts::config::Builder::from(&self.base).region(Region::new(region.to_owned()));
        aws_sdk_sts::Client::from_conf(config.build())
    }

    async fn assume(self, session: RoleSession) -> Result<Credentials, ProviderError> {
        let seconds = i32::try_from(session.duration.as_secs()).unwrap_or(i32::MAX);
        let answer = self
            .client(&session.region)
            .assume_role()
            .role_arn(session.role.to_string())
            .role_session_name(&session.session_name)
            .duration_seconds(seconds)
            .send()
            .await;
        let credentials = match answer {
            Ok(answer) => answer.credentials,
            Err(error) => return Err(self.explain(error).await),
        };
        let credentials =
            credentials.ok_or_else(|| ProviderError::Unavailable("AssumeRole answered without credentials".into()))?;
        let expiration = SystemTime::try_from(credentials.expiration)
            .map_err(|_| ProviderError::Unavailable("AssumeRole answered with an unreadable expiration".into()))?;
        Ok(Credentials {
            access_key_id: credentials.access_key_id,
            secret_access_key: Secret::new(credentials.secret_access_key),
            token: Secret::new(credentials.session_token),
            updated: expiration - session.duration,
            expiration,
            fake: false,
        })
    }

    async fn explain<E, R>(&self, error: SdkError<E, R>) -> ProviderError
    where
        E: ProvideErrorMetadata + Error + 'static,
        R: std::fmt::Debug,
    {
        if let SdkError::ServiceError(answer) = &error {
            let code = printable(answer.err().code().unwrap_or("Unknown"), 64);
            let message = printable(answer.err().message().unwrap_or("no message"), MESSAGE_CHARACTERS);
            return classify(code, message);
        }
        let message = printable(&with_causes(&error), MESSAGE_CHARACTERS);
        let base = match self.base.credentials_provider() {
            Some(provider) => provider
                .provide_credentials()
                .await
                .map(drop)
                .map_err(|error| with_causes(&error)),
            None => Err("the AWS configuration names no credentials".to_owned()),
        };
        match base {
            Err(why) => ProviderError::NoBase(printable(&why, MESSAGE_CHARACTERS)),
            Ok(()) => ProviderError::Unavailable(message),
        }
    }
}

/// What an error code of STS means for the next try (STS API reference, AssumeRole and common errors).
fn classify(code: String, message: String) -> ProviderError {
    match code.as_str() {
        "Throttling"
        | "ThrottlingException"
        | "RequestLimitExceeded"
        | "InternalFailure"
        | "InternalError"
        | "ServiceUnavailable"
        | "IDPCommunicationError"
        | "RequestTimeout"
        | "Unknown" => ProviderError::Unavailable(format!("{code}: {message}")),
        "ExpiredToken"
        | "ExpiredTokenException"
        | "InvalidClientTokenId"
        | "SignatureDoesNotMatch"
        | "UnrecognizedClientException"
        | "RequestExpired"
        | "MissingAuthenticationToken" => ProviderError::NoBase(format!("{code}: {message}")),
        _ => ProviderError::Denied { code, message },
    }
}

impl CredentialProvider for Sts {
    fn credentials(&self, session: &RoleSession) -> Provided {
        Box::pin(self.clone().assume(session.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_lead_to_the_right_kind_of_retry() {
        let kind = |code: &str| classify(code.into(), "m".into()).summary();
        assert_eq!(kind("AccessDenied"), "role denied by sts");
        assert_eq!(kind("ValidationError"), "role denied by sts");
        assert_eq!(kind("Throttling"), "sts not reachable");
        assert_eq!(kind("ExpiredToken"), "no base credentials");
    }
}
