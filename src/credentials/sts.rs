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
use aws_sdk_sts::operation::assume_role::builders::AssumeRoleFluentBuilder;
use aws_sdk_sts::types::{PolicyDescriptorType, Tag};

use super::broker::{CredentialProvider, Provided, ProviderError};
use super::{Credentials, RoleArn, RoleSession, Secret, Session};
use crate::telemetry::{printable, with_causes};

/// A call of STS that has not ended after this is given up; requests never wait for it.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(10);
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Life of the credentials of a role that is only gone through, and used at once: the shortest that STS gives (STS API
/// reference, AssumeRole, `DurationSeconds`).
const HOP_SECONDS: i32 = 900;
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

    /// Goes through the chain to the role.
    async fn assume(self, session: RoleSession) -> Result<Credentials, ProviderError> {
        let mut client = self.client(&session.region);
        let mut source_identity = session.source_identity.clone();
        for role in &session.chain {
            let request = client
                .assume_role()
                .role_arn(role.to_string())
                .role_session_name(&session.session_name)
                .duration_seconds(HOP_SECONDS)
                .set_source_identity(source_identity.take());
            let credentials = self.ask(request).await.map_err(|error| error.at(role))?;
            let config = client
                .config()
                .to_builder()
                .credentials_provider(aws_credential_types::Credentials::new(
                    credentials.access_key_id,
                    credentials.secret_access_key,
                    Some(credentials.session_token),
                    SystemTime::try_from(credentials.expiration).ok(),
                    "chain",
                ));
            client = aws_sdk_sts::Client::from_conf(config.build());
        }
        let tag = |(key, value): (&String, &String)| Tag::builder().key(key).value(value).build();
        let tags: Result<Vec<_>, _> = session.tags.iter().map(tag).collect();
        let tags =
            tags.map_err(|error| ProviderError::Unavailable(printable(&with_causes(&error), MESSAGE_CHARACTERS)))?;
        let arn = |arn: &String| PolicyDescriptorType::builder().arn(arn).build();
        let some = |any: bool| any.then_some(());
        let request = client
            .assume_role()
            .role_arn(session.role.to_string())
            .role_session_name(&session.session_name)
            .duration_seconds(i32::try_from(session.duration.as_secs()).unwrap_or(i32::MAX))
            .set_source_identity(source_identity)
            .set_external_id(session.external_id.as_ref().map(|id| id.reveal().to_owned()))
            .set_policy(session.policy.clone())
            .set_policy_arns(
                some(!session.policy_arns.is_empty()).map(|()| session.policy_arns.iter().map(arn).collect()),
            )
            .set_tags(some(!tags.is_empty()).map(|()| tags))
            .set_transitive_tag_keys(
                some(!session.transitive_tag_keys.is_empty())
                    .map(|()| session.transitive_tag_keys.iter().cloned().collect()),
            );
        let credentials = self.ask(request).await?;
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

    async fn ask(&self, request: AssumeRoleFluentBuilder) -> Result<aws_sdk_sts::types::Credentials, ProviderError> {
        match request.send().await {
            Ok(answer) => answer
                .credentials
                .ok_or_else(|| ProviderError::Unavailable("AssumeRole answered without credentials".into())),
            Err(error) => Err(self.explain(error).await),
        }
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

impl ProviderError {
    /// With the role of a chain where it happened.
    fn at(self, role: &RoleArn) -> Self {
        match self {
            Self::Denied { code, message } => Self::Denied {
                code,
                message: format!("on the way, at {role}: {message}"),
            },
            other => other,
        }
    }
}

impl CredentialProvider for Sts {
    fn credentials(&self, session: &Session) -> Provided {
        let (sts, session) = (self.clone(), session.clone());
        Box::pin(async move {
            match session {
                Session::Role(RoleSession {
                    profile: Some(profile), ..
                }) => Err(ProviderError::NoBase(format!("profile {profile} is not read yet"))),
                Session::Role(session) => sts.assume(session).await,
                Session::Profile(_) => Err(ProviderError::NoBase("no profile is served yet".into())),
            }
        })
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
