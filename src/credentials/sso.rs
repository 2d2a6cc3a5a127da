//! Credentials by `aws sso login`: the cached token, refreshed while IAM Identity Center lets us, and what it is good for.
//!
//! The AWS CLI and SDKs keep a token in `sso/cache/`, by the SHA-1 of its session's name. Whoever refreshes it writes it back,
//! since a refresh token may be good for once only. Where that is not possible (a directory that is mounted for reading only)
//! the refreshed one is kept in memory until a person logs in again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use aws_config::{Region, SdkConfig};
use serde_json::{Map, Value};
use sha1::{Digest as _, Sha1};
use tracing::{info, warn};

use super::Secret;
use super::broker::ProviderError;
use super::files::{AwsFiles, Contents, Stamp};
use super::profile::Sso;
use super::sts::{Failure, failure};
use crate::clock::{Clock, rfc3339_seconds};

/// A token that expires within this is refreshed, as the SDKs do it.
const REFRESH_BEFORE: Duration = Duration::from_secs(300);

/// The tokens of all profiles.
pub struct SsoTokens {
    files: AwsFiles,
    clock: Clock,
    /// Tokens that could not be written back, and what stood in the file instead. Held while one is refreshed: a refresh
    /// token may be good for once only.
    kept: tokio::sync::Mutex<HashMap<PathBuf, (Stamp, Token)>>,
}

/// A cached token, with whatever else stood in its file.
#[derive(Clone)]
struct Token {
    fields: Map<String, Value>,
    expires: SystemTime,
}

/// What a refresh takes.
struct Refresh<'a> {
    client_id: &'a str,
    client_secret: &'a str,
    refresh_token: &'a str,
}

impl Token {
    fn read(contents: &Contents) -> Result<Self, &'static str> {
        let Ok(Value::Object(fields)) = serde_json::from_str(&contents.text) else {
            return Err("it is not a JSON object");
        };
        let expires = time(&fields, "expiresAt").ok_or("expiresAt is missing, or not a time")?;
        let token = Self { fields, expires };
        token.text("accessToken").ok_or("accessToken is missing")?;
        Ok(token)
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.fields.get(key)?.as_str()
    }

    /// What it takes to refresh it, if that is possible at `now`.
    fn refresh(&self, now: SystemTime) -> Option<Refresh<'_>> {
        let registered = time(&self.fields, "registrationExpiresAt").is_some_and(|until| now < until);
        registered.then_some(())?;
        Some(Refresh {
            client_id: self.text("clientId")?,
            client_secret: self.text("clientSecret")?,
            refresh_token: self.text("refreshToken")?,
        })
    }
}

/// Times are `2026-01-05T10:11:12Z`; older tools wrote `UTC` at the end.
fn time(fields: &Map<String, Value>, key: &str) -> Option<SystemTime> {
    let text = fields.get(key)?.as_str()?.replace("UTC", "Z");
    text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)
}

/// Somebody has to log in.
fn attention(profile: &str, why: &str) -> ProviderError {
    ProviderError::NeedsAttention {
        why: format!("profile {profile}: {why}"),
        command: format!("aws sso login --profile {profile}"),
    }
}

impl SsoTokens {
    /// Those of `files`.
    pub fn new(files: AwsFiles, clock: Clock) -> Self {
        Self {
            files,
            clock,
            kept: tokio::sync::Mutex::default(),
        }
    }

    /// Credentials of a profile's role.
    ///
    /// # Errors
    /// When there are none; [`ProviderError::NeedsAttention`] when somebody has to log in.
    pub async fn credentials(
        &self,
        sdk: &SdkConfig,
        sso: &Sso,
        profile: &str,
    ) -> Result<aws_credential_types::Credentials, ProviderError> {
        let token = self.token(sdk, sso, profile).await?;
        let config = aws_sdk_sso::config::Builder::from(sdk).region(Region::new(sso.region.clone()));
        let answer = aws_sdk_sso::Client::from_conf(config.build())
            .get_role_credentials()
            .account_id(&sso.account)
            .role_name(&sso.role)
            .access_token(token.reveal())
            .send()
            .await;
        let given = answer.map_err(|error| match failure(&error) {
            Failure::Service { code, .. } if code == "UnauthorizedException" => {
                attention(profile, "its login to IAM Identity Center has ended")
            }
            Failure::Service { code, .. } if code == "TooManyRequestsException" => ProviderError::Throttled(code),
            Failure::Service { code, message } => ProviderError::NoBase(format!(
                "profile {profile}: IAM Identity Center gives no role {} in account {}: {code}: {message}",
                sso.role, sso.account
            )),
            Failure::Passing(message) => {
                ProviderError::Unavailable(format!("profile {profile}: IAM Identity Center: {message}"))
            }
        })?;
        let strange = || {
            ProviderError::Unavailable(format!(
                "profile {profile}: IAM Identity Center answered without credentials"
            ))
        };
        let given = given.role_credentials.ok_or_else(strange)?;
        let (Some(id), Some(secret)) = (given.access_key_id, given.secret_access_key) else {
            return Err(strange());
        };
        let expires = SystemTime::UNIX_EPOCH + Duration::from_millis(u64::try_from(given.expiration).unwrap_or(0));
        Ok(aws_credential_types::Credentials::new(
            id,
            secret,
            given.session_token,
            Some(expires),
            "sso",
        ))
    }

    /// A token that is good.
    async fn token(&self, sdk: &SdkConfig, sso: &Sso, profile: &str) -> Result<Secret, ProviderError> {
        let path = self.path(sso);
        let unusable = |why: String| ProviderError::NoBase(format!("profile {profile}: {why}"));
        let mut kept = self.kept.lock().await;
        let contents = self.files.read(&path).map_err(|error| unusable(error.to_string()))?;
        let Some(contents) = contents else {
            return Err(attention(profile, "nobody has logged in to IAM Identity Center"));
        };
        let mut token = match kept.get(&path) {
            Some((stamp, token)) if *stamp == contents.stamp => token.clone(),
            _ => Token::read(&contents).map_err(|why| unusable(format!("{}: {why}", path.display())))?,
        };
        let now = self.clock.aws();
        if token.expires <= now + REFRESH_BEFORE {
            match self.refreshed(sdk, sso, &token, now).await {
                Ok(Some(new)) => {
                    self.write_back(&path, &contents.stamp, &new, &mut kept);
                    token = new;
                }
                Ok(None) if now < token.expires => {}
                Ok(None) => return Err(attention(profile, "its login to IAM Identity Center has expired")),
                Err(_) if now < token.expires => {}
                Err(Failure::Service { code, .. })
                    if code.ends_with("ClientException")
                        || code.ends_with("GrantException")
                        || code == "ExpiredTokenException" =>
                {
                    return Err(attention(profile, "its login to IAM Identity Center has expired"));
                }
                Err(Failure::Service { code, message }) => {
                    return Err(ProviderError::Unavailable(format!(
                        "profile {profile}: the login cannot be refreshed: {code}: {message}"
                    )));
                }
                Err(Failure::Passing(message)) => {
                    return Err(ProviderError::Unavailable(format!(
                        "profile {profile}: the login cannot be refreshed now: {message}"
                    )));
                }
            }
        }
        Ok(Secret::new(token.text("accessToken").unwrap_or_default()))
    }

    /// The file of a session's token, or of a start URL's where there is no session.
    fn path(&self, sso: &Sso) -> PathBuf {
        let named = sso.session.as_deref().unwrap_or(&sso.start_url);
        let digest = Sha1::digest(named.as_bytes());
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        self.files.sso_cache().join(format!("{hex}.json"))
    }

    /// A new token; `None`: this one cannot be refreshed.
    async fn refreshed(
        &self,
        sdk: &SdkConfig,
        sso: &Sso,
        token: &Token,
        now: SystemTime,
    ) -> Result<Option<Token>, Failure> {
        let Some(refresh) = token.refresh(now) else {
            return Ok(None);
        };
        let config = aws_sdk_ssooidc::config::Builder::from(sdk).region(Region::new(sso.region.clone()));
        let given = aws_sdk_ssooidc::Client::from_conf(config.build())
            .create_token()
            .grant_type("refresh_token")
            .client_id(refresh.client_id)
            .client_secret(refresh.client_secret)
            .refresh_token(refresh.refresh_token)
            .send()
            .await
            .map_err(|error| failure(&error))?;
        let Some(access_token) = given.access_token else {
            return Err(Failure::Passing("CreateToken answered without a token".to_owned()));
        };
        let expires = now + Duration::from_secs(u64::try_from(given.expires_in).unwrap_or(0));
        let mut fields = token.fields.clone();
        fields.insert("accessToken".to_owned(), access_token.into());
        fields.insert("expiresAt".to_owned(), rfc3339_seconds(expires).into());
        if let Some(refresh_token) = given.refresh_token {
            fields.insert("refreshToken".to_owned(), refresh_token.into());
        }
        Ok(Some(Token { fields, expires }))
    }

    fn write_back(&self, path: &Path, read: &Stamp, token: &Token, kept: &mut HashMap<PathBuf, (Stamp, Token)>) {
        let text = Value::Object(token.fields.clone()).to_string();
        match self.files.write(path, read, &text) {
            Ok(()) => {
                kept.remove(path);
                info!(file = %path.display(), "login to IAM Identity Center refreshed");
            }
            Err(error) => {
                warn!(
                    file = %path.display(), %error,
                    "login to IAM Identity Center refreshed; it cannot be written back and is kept in memory: after a \
                     restart somebody may have to log in again"
                );
                kept.insert(path.to_owned(), (read.clone(), token.clone()));
            }
        }
    }
}
