//! What is asked of STS: AssumeRole, GetSessionToken, GetCallerIdentity, with the base credentials of [`super::base`].
//!
//! Endpoints are regional, of the container's region; but where that is in another partition than the role, of the role's.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_config::{Region, SdkConfig};
use aws_sdk_sts::config::interceptors::FinalizerInterceptorContextRef;
use aws_sdk_sts::config::{ConfigBag, Intercept, RuntimeComponents};
use aws_sdk_sts::error::{BoxError, ProvideErrorMetadata, SdkError};
use aws_sdk_sts::operation::assume_role::builders::AssumeRoleFluentBuilder;
use aws_sdk_sts::types::{PolicyDescriptorType, Tag};

use super::base::{Base, BaseState, Bases, HandedOver, RENEW_BEFORE, login_command};
use super::broker::{CredentialProvider, Prepared, Provided, ProviderError};
use super::profile::Step;
use super::{Credentials, ProfileSession, RoleArn, RoleSession, Secret, Session, region_in};
use crate::clock::Clock;
use crate::logging::{printable, with_causes};

/// Life of the credentials of a role that is only gone through, and used at once: the shortest that STS gives (STS API
/// reference, AssumeRole, `DurationSeconds`).
const HOP_SECONDS: i32 = 900;
/// The longest piece of a foreign message that is shown.
pub const MESSAGE_CHARACTERS: usize = 300;
/// Session name of roles on the way to a profile's credentials, where the profile names none.
const SESSION_NAME: &str = "imds-router";
/// Region of an STS where nothing names one.
const FALLBACK_REGION: &str = "us-east-1";
/// How far what STS says of the time may be behind: a whole second, and the way.
const DATE_PRECISION: Duration = Duration::from_secs(2);
/// At least half of the life that a profile's own credentials had at first is left when they are given on.
const HALF: u32 = 2;

/// Who the base credentials are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BaseIdentity {
    /// Account id.
    pub account: String,
    /// The caller's ARN.
    pub arn: String,
}

/// STS, as the base credentials see it.
#[derive(Clone, Debug)]
pub struct Sts {
    bases: Arc<Bases>,
    clock: Clock,
}

/// Hears what time it is for AWS, in every answer.
#[derive(Debug)]
struct Listener(Clock);

impl Intercept for Listener {
    fn name(&self) -> &'static str {
        "Listener"
    }

    // Not before the end: the SDK corrects a wrong clock by itself between two attempts, from the time that it had before.
    fn read_after_execution(
        &self,
        context: &FinalizerInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let date = context.response().and_then(|response| response.headers().get("date"));
        if let Some(date) = date.and_then(|date| httpdate::parse_http_date(date).ok()) {
            self.0.heard_from_aws(date);
        }
        Ok(())
    }
}

impl Sts {
    /// Asks with `bases`.
    pub fn new(bases: Arc<Bases>, clock: Clock) -> Self {
        Self { bases, clock }
    }

    /// The region that the configuration of a profile names; `None`: of the daemon's own base.
    pub async fn region(&self, profile: Option<&str>) -> Option<String> {
        self.bases.region(profile).await
    }

    /// Asks STS who the base credentials are.
    ///
    /// # Errors
    /// When there are none, or STS cannot be asked.
    pub async fn base_identity(&self, profile: Option<&str>) -> Result<BaseIdentity, ProviderError> {
        let base = self.bases.get(profile, RENEW_BEFORE).await?;
        let region = base.sdk.region().map_or(FALLBACK_REGION, Region::as_ref).to_owned();
        match self.client(&base, region).get_caller_identity().send().await {
            Ok(identity) => match (identity.account, identity.arn) {
                (Some(account), Some(arn)) => Ok(BaseIdentity { account, arn }),
                _ => Err(ProviderError::Unavailable(
                    "GetCallerIdentity answered without account".into(),
                )),
            },
            Err(error) => Err(explain(&error, &base, profile)),
        }
    }

    /// What is known of all bases.
    pub fn states(&self) -> std::collections::BTreeMap<Option<String>, BaseState> {
        self.bases.states()
    }

    /// Takes over session credentials of a base.
    ///
    /// # Errors
    /// Why not.
    pub fn hand_over(&self, profile: Option<&str>, handed: HandedOver) -> Result<(), String> {
        self.bases.hand_over(profile, handed)
    }

    /// Nobody names this profile any more.
    pub fn forget(&self, profile: &str) {
        self.bases.forget(profile);
    }

    fn client(&self, base: &Base, region: String) -> aws_sdk_sts::Client {
        let config = aws_sdk_sts::config::Builder::from(&base.sdk)
            .region(Region::new(region))
            .credentials_provider(base.credentials.clone())
            .interceptor(Listener(self.clock.clone()));
        aws_sdk_sts::Client::from_conf(config.build())
    }

    /// Goes through the chain to the role.
    async fn assume(self, session: RoleSession) -> Result<Credentials, ProviderError> {
        let profile = session.profile.as_deref();
        let base = self.bases.get(profile, RENEW_BEFORE).await?;
        let region = region_in(session.role.partition(), &session.region);
        let mut client = self.client(&base, region);
        let ask = async |request| {
            ask(request).await.map_err(|error| match error {
                Ok(error) => explain(&error, &base, profile),
                Err(error) => error,
            })
        };
        let mut source_identity = session.source_identity.clone();
        for role in &session.chain {
            let request = client
                .assume_role()
                .role_arn(role.to_string())
                .role_session_name(&session.session_name)
                .duration_seconds(HOP_SECONDS)
                .set_source_identity(source_identity.take());
            let credentials = ask(request).await.map_err(|error| error.at(role))?;
            let config = client.config().to_builder().credentials_provider(as_base(credentials));
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
            .duration_seconds(seconds(session.duration))
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
        let credentials = ask(request).await?;
        made(credentials, session.duration, &self.clock)
    }

    /// A profile's own credentials. Long-lived keys are exchanged, and never given on.
    async fn own(self, session: ProfileSession) -> Result<Credentials, ProviderError> {
        let profile = session.profile.as_deref();
        let mut base = self.bases.get(profile, RENEW_BEFORE).await?;
        if base.credentials.session_token().is_none() {
            let region = base.sdk.region().map_or(session.region.clone(), ToString::to_string);
            let answer = self
                .client(&base, region)
                .get_session_token()
                .duration_seconds(seconds(session.duration))
                .send()
                .await
                .map_err(|error| explain(&error, &base, profile))?;
            let given = answer.credentials.ok_or_else(|| without("GetSessionToken"))?;
            return made(given, session.duration, &self.clock);
        }
        let name = profile.unwrap_or("(the daemon's own)");
        let Some(until) = base.credentials.expiry() else {
            return Err(ProviderError::NoBase(format!(
                "profile {name} has a session token, and nothing says until when it is good: it can be a base for roles, \
                 but not be served as it is; what hands it over with its end: {}",
                login_command(profile)
            )));
        };
        let whole = until.duration_since(base.fetched).unwrap_or_default();
        base = self.bases.get(profile, whole / HALF).await?;
        let (keys, Some(token), Some(until)) = (
            &base.credentials,
            base.credentials.session_token(),
            base.credentials.expiry(),
        ) else {
            return Err(ProviderError::Unavailable(format!("profile {name} has just changed")));
        };
        Ok(Credentials {
            access_key_id: keys.access_key_id().to_owned(),
            secret_access_key: Secret::new(keys.secret_access_key()),
            token: Secret::new(token),
            updated: self.clock.aws(),
            expiration: until,
            fake: false,
        })
    }
}

fn seconds(duration: Duration) -> i32 {
    i32::try_from(duration.as_secs()).unwrap_or(i32::MAX)
}

fn without(call: &str) -> ProviderError {
    ProviderError::Unavailable(format!("{call} answered without credentials"))
}

/// Credentials that STS has just made, for so long at most: it gives root users less than they ask for.
fn made(
    given: aws_sdk_sts::types::Credentials,
    duration: Duration,
    clock: &Clock,
) -> Result<Credentials, ProviderError> {
    let expiration = SystemTime::try_from(given.expiration)
        .map_err(|_| ProviderError::Unavailable("STS answered with an unreadable expiration".into()))?;
    let asked = expiration - duration;
    let updated = clock.heard().map_or(asked, |now| asked.max(now - DATE_PRECISION));
    Ok(Credentials {
        access_key_id: given.access_key_id,
        secret_access_key: Secret::new(given.secret_access_key),
        token: Secret::new(given.session_token),
        updated,
        expiration,
        fake: false,
    })
}

fn as_base(given: aws_sdk_sts::types::Credentials) -> aws_credential_types::Credentials {
    aws_credential_types::Credentials::new(
        given.access_key_id,
        given.secret_access_key,
        Some(given.session_token),
        SystemTime::try_from(given.expiration).ok(),
        "sts",
    )
}

type AssumeRoleFailure = SdkError<aws_sdk_sts::operation::assume_role::AssumeRoleError>;

async fn ask(
    request: AssumeRoleFluentBuilder,
) -> Result<aws_sdk_sts::types::Credentials, Result<AssumeRoleFailure, ProviderError>> {
    match request.send().await {
        Ok(answer) => answer.credentials.ok_or_else(|| Err(without("AssumeRole"))),
        Err(error) => Err(Ok(error)),
    }
}

/// Goes on to a role on the way to a profile's credentials.
///
/// # Errors
/// When STS does not give it.
pub async fn assume_step(
    sdk: &SdkConfig,
    credentials: aws_credential_types::Credentials,
    step: &Step,
) -> Result<aws_credential_types::Credentials, ProviderError> {
    let config = aws_sdk_sts::config::Builder::from(sdk)
        .region(step_region(sdk, &step.role_arn))
        .credentials_provider(credentials);
    let answer = aws_sdk_sts::Client::from_conf(config.build())
        .assume_role()
        .role_arn(&step.role_arn)
        .role_session_name(step.session_name.as_deref().unwrap_or(SESSION_NAME))
        .set_external_id(step.external_id.as_ref().map(|id| id.reveal().to_owned()))
        .set_duration_seconds(step.seconds)
        .send()
        .await
        .map_err(|error| no_step(&error, &step.role_arn))?;
    answer.credentials.map(as_base).ok_or_else(|| without("AssumeRole"))
}

/// Exchanges a token of another identity provider for credentials.
///
/// # Errors
/// When STS does not take it.
pub async fn exchange_web_identity(
    sdk: &SdkConfig,
    role_arn: &str,
    session_name: Option<&str>,
    token: &Secret,
) -> Result<aws_credential_types::Credentials, ProviderError> {
    let config = aws_sdk_sts::config::Builder::from(sdk).region(step_region(sdk, role_arn));
    let answer = aws_sdk_sts::Client::from_conf(config.build())
        .assume_role_with_web_identity()
        .role_arn(role_arn)
        .role_session_name(session_name.unwrap_or(SESSION_NAME))
        .web_identity_token(token.reveal())
        .send()
        .await
        .map_err(|error| no_step(&error, role_arn))?;
    let given = answer.credentials.map(as_base);
    given.ok_or_else(|| without("AssumeRoleWithWebIdentity"))
}

fn step_region(sdk: &SdkConfig, role_arn: &str) -> Region {
    let region = sdk.region().map_or(FALLBACK_REGION, Region::as_ref);
    let partition = role_arn.split(':').nth(1).unwrap_or_default();
    Region::new(region_in(partition, region))
}

/// A role on the way to the base is a matter of the base.
fn no_step<E, R>(error: &SdkError<E, R>, role_arn: &str) -> ProviderError
where
    E: ProvideErrorMetadata + Error + 'static,
    R: std::fmt::Debug,
{
    match meaning(error) {
        ProviderError::Denied { code, message } => {
            ProviderError::NoBase(format!("role {role_arn} of the profile: {code}: {message}"))
        }
        other => other,
    }
}

/// What a call of AWS came to that failed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Failure {
    /// AWS has answered, and says no.
    Service {
        /// Its code.
        code: String,
        /// Its message, fit to be shown.
        message: String,
    },
    /// It has not, or not in words that we understand.
    Passing(String),
}

/// Reads the SDK's error.
pub fn failure<E, R>(error: &SdkError<E, R>) -> Failure
where
    E: ProvideErrorMetadata + Error + 'static,
    R: std::fmt::Debug,
{
    if let SdkError::ServiceError(answer) = error
        && let Some(code) = answer.err().code()
    {
        return Failure::Service {
            code: printable(code, 64),
            message: printable(answer.err().message().unwrap_or("no message"), MESSAGE_CHARACTERS),
        };
    }
    Failure::Passing(printable(&with_causes(error), MESSAGE_CHARACTERS))
}

/// What a failed call means, and what can be done where the base has ended.
fn explain<E, R>(error: &SdkError<E, R>, base: &Base, profile: Option<&str>) -> ProviderError
where
    E: ProvideErrorMetadata + Error + 'static,
    R: std::fmt::Debug,
{
    match meaning(error) {
        // Session credentials that somebody has put there: only somebody can put others there.
        ProviderError::NoBase(why) if why.starts_with("ExpiredToken") && base.credentials.expiry().is_none() => {
            ProviderError::NeedsAttention {
                why: format!("the session credentials of {} have expired", base.origin),
                command: login_command(profile),
            }
        }
        other => other,
    }
}

fn meaning<E, R>(error: &SdkError<E, R>) -> ProviderError
where
    E: ProvideErrorMetadata + Error + 'static,
    R: std::fmt::Debug,
{
    match failure(error) {
        Failure::Passing(message) => ProviderError::Unavailable(message),
        Failure::Service { code, message } => classify(code, message),
    }
}

/// What an error code of STS means for the next try (STS API reference, AssumeRole and common errors).
fn classify(code: String, message: String) -> ProviderError {
    match code.as_str() {
        "Throttling" | "ThrottlingException" | "TooManyRequestsException" | "RequestLimitExceeded" => {
            ProviderError::Throttled(format!("{code}: {message}"))
        }
        "InternalFailure"
        | "InternalError"
        | "ServiceUnavailable"
        | "IDPCommunicationError"
        | "RequestTimeout"
        | "RequestTimeTooSkewed"
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
            let bases = sts.bases.clone();
            let profile = session.profile().map(str::to_owned);
            let answer = match session {
                Session::Role(session) => sts.assume(session).await,
                Session::Profile(session) => sts.own(session).await,
            };
            match &answer {
                Err(error @ (ProviderError::NoBase(_) | ProviderError::NeedsAttention { .. })) => {
                    bases.refused(profile.as_deref(), error).await;
                }
                Ok(_) => bases.taken(profile.as_deref()).await,
                Err(_) => {}
            }
            answer
        })
    }

    fn prepare(&self, session: &Session) -> Prepared {
        let (bases, profile) = (self.bases.clone(), session.profile().map(str::to_owned));
        Box::pin(async move { bases.get(profile.as_deref(), RENEW_BEFORE).await.map(drop) })
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
        assert_eq!(kind("Throttling"), "throttled by sts");
        assert_eq!(kind("ServiceUnavailable"), "sts not reachable");
        assert_eq!(kind("ExpiredToken"), "no base credentials");
    }
}
