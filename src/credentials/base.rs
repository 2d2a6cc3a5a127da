//! Base credentials: whose credentials ask STS, for the daemon itself and for every profile that a container names.
//!
//! The usual chain, in the SDK's order: variables, profile, web identity, container endpoint; the instance metadata service,
//! which is us, only where the host has one of its own and keeps it. The files are read anew whenever they have changed, by one caller at a time for each profile, and
//! [`Bases::changes`] tells of it. What `imds-router login` hands over comes before all of it, as long as it lives.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use aws_config::ecs::EcsCredentialsProvider;
use aws_config::profile::ProfileSet;
use aws_config::provider_config::ProviderConfig;
use aws_config::retry::RetryConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::provider::ProvideCredentials as _;
use aws_types::sdk_config::{SharedHttpClient, TimeSource};
use dashmap::DashMap;
use tokio::io::AsyncReadExt as _;
use tokio::sync::watch;
use tracing::{info, warn};

use super::Secret;
use super::broker::ProviderError;
use super::files::{AwsFiles, FileError, Stamp};
use super::http;
use super::instance_profile;
use super::profile::{self, Allowed, Keys, Plan, ProfileError, Source};
use super::sso::SsoTokens;
use super::sts::{MESSAGE_CHARACTERS, assume_step, exchange_web_identity};
use crate::clock::Clock;
use crate::descriptors;
use crate::logging::{printable, with_causes};

/// The longest that one attempt of a call to AWS takes. Requests of containers do not wait for it: they have a deadline of their own
/// (`serve.max_wait`), and a session is refreshed long before it expires.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(30);
/// The same of all attempts. A service that does not answer has one: the second is for services that answered.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(35);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Two: the second is signed with what the first told of the clock. Further tries are the broker's.
const ATTEMPTS: u32 = 2;
/// The longest that loading base credentials takes: all roles of a profile, or its program.
const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// The most that a `credential_process` prints.
const MAX_PRINTED_BYTES: u64 = 64 * 1024;
/// Base credentials that expire within this are fetched anew, if that is possible.
pub const RENEW_BEFORE: Duration = Duration::from_secs(300);
/// They are used for so long if it is not.
const USE_UNTIL: Duration = Duration::from_secs(10);
/// A failure is not looked into again before the first of these, then twice as long, up to the second: many sessions have
/// one base. A change of the files ends it.
const FAILURE_HOLDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(15));
/// How often what a person has to do is said again.
const SAY_AGAIN: Duration = Duration::from_secs(300);
/// How often the files are looked at.
const LOOK: Duration = Duration::from_secs(2);

/// The addresses that this daemon answers, or may be asked to: those of EC2's and ECS's metadata services.
const OURSELVES: &[&str] = &[
    "169.254.169.254",
    "169.254.170.2",
    "169.254.170.23",
    "[fd00:ec2::254]",
    "[fd00:ec2::23]",
    "instance-data",
    "instance-data.ec2.internal",
];

/// The time that requests are signed with: AWS's, as far as it is known.
#[derive(Debug)]
struct AwsTime(Clock);

impl TimeSource for AwsTime {
    fn now(&self) -> SystemTime {
        self.0.aws()
    }
}

/// Base credentials, and how to ask with them.
#[derive(Clone)]
pub struct Base {
    /// Region, endpoints, time-outs; without credentials.
    pub sdk: SdkConfig,
    /// The credentials.
    pub credentials: aws_credential_types::Credentials,
    /// Where they come from, for people.
    pub origin: String,
    /// When they were fetched, by AWS's clock.
    pub fetched: SystemTime,
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Base")
            .field("origin", &self.origin)
            .finish_non_exhaustive()
    }
}

impl Base {
    fn left(&self, clock: &Clock) -> Option<Duration> {
        let until = self.credentials.expiry()?;
        Some(until.duration_since(clock.aws()).unwrap_or_default())
    }

    /// Whether they live for more than `at_least`, or for ever.
    fn has(&self, at_least: Duration, clock: &Clock) -> bool {
        self.left(clock).is_none_or(|left| left > at_least)
    }
}

/// Session credentials that somebody has handed over.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HandedOver {
    /// The keys; with a session token.
    pub keys: Keys,
    /// Until when they are good, if that was said.
    pub until: Option<SystemTime>,
}

/// What is known of one base, for `status`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct BaseState {
    /// Where its credentials come from.
    pub origin: Option<String>,
    /// Until when they are good; `None`: they do not expire, or nobody knows.
    pub until: Option<SystemTime>,
    /// Why there are none, or no new ones.
    pub error: Option<ProviderError>,
}

/// What the operator sets.
#[derive(Clone)]
pub struct Setup {
    /// The profile of the daemon itself; `None`: the usual chain.
    pub profile: Option<String>,
    /// Region, where it is not the files' to say.
    pub region: Option<String>,
    /// Where the files are.
    pub files: AwsFiles,
    /// Whether files may run programs and name endpoints.
    pub allow_process: bool,
    /// The host's own instance metadata service, where there is one that is not us.
    pub instance_metadata: Option<String>,
    /// The environment.
    pub variables: HashMap<String, String>,
}

/// All base credentials.
pub struct Bases {
    setup: Setup,
    clock: Clock,
    slots: DashMap<Option<String>, Arc<Slot>>,
    sso: SsoTokens,
    http: SharedHttpClient,
    changes: watch::Sender<u64>,
}

impl std::fmt::Debug for Bases {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bases")
            .field("files", &self.setup.files)
            .finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Slot {
    /// Held while credentials are fetched: one at a time.
    held: tokio::sync::Mutex<Held>,
    handed: Mutex<Option<HandedOver>>,
    shown: Mutex<Shown>,
}

#[derive(Default)]
struct Shown {
    state: BaseState,
    /// When the error was said last, by boot time.
    said: Option<Duration>,
}

#[derive(Default)]
struct Held {
    base: Option<Arc<Base>>,
    /// What the files were, and how often something was handed over, when that was fetched.
    of: (Vec<(PathBuf, Stamp)>, u64),
    /// The last failure, and until when it holds, by boot time.
    failed: Option<(Duration, ProviderError)>,
    /// Failures since the last success or change.
    failures: u32,
}

impl Held {
    fn fails(&mut self, error: ProviderError, now: Duration) {
        let pause = FAILURE_HOLDS.0 * 2_u32.saturating_pow(self.failures.min(16));
        self.failures = self.failures.saturating_add(1);
        self.failed = Some((now + pause.min(FAILURE_HOLDS.1), error));
    }
}

impl Shown {
    /// Whether what a person has to do is to be said now: when it is new, and again and again.
    fn says(&mut self, error: Option<&ProviderError>, now: Duration) -> bool {
        let Some(error @ ProviderError::NeedsAttention { .. }) = error else {
            return false;
        };
        let new = self.state.error.as_ref() != Some(error);
        let says = new || self.said.is_none_or(|said| now.saturating_sub(said) >= SAY_AGAIN);
        if says {
            self.said = Some(now);
        }
        says
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Bases {
    /// None is fetched yet.
    pub fn new(setup: Setup, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            sso: SsoTokens::new(setup.files.clone(), clock.clone()),
            setup,
            clock,
            slots: DashMap::new(),
            http: http::client(),
            changes: watch::Sender::new(0),
        })
    }

    /// Wakes whenever the files have changed, or something was handed over.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Looks at the files until the task is dropped.
    pub async fn watch_files(self: Arc<Self>) {
        let mut before = self.setup.files.stamps();
        loop {
            tokio::time::sleep(LOOK).await;
            let now = self.setup.files.stamps();
            if now != before {
                info!(directory = %self.setup.files.directory.display(), "the AWS files have changed");
                before = now;
                self.changes.send_modify(|version| *version += 1);
            }
        }
    }

    /// Takes over session credentials, for `profile` or for the daemon itself. They are held in memory only.
    ///
    /// # Errors
    /// Why not.
    pub fn hand_over(&self, profile: Option<&str>, handed: HandedOver) -> Result<(), String> {
        if handed.keys.session_token.is_none() {
            return Err("these are long-lived keys; expected session credentials, with a SessionToken".to_owned());
        }
        if handed.until.is_some_and(|until| until <= self.clock.aws()) {
            return Err("these credentials have expired already".to_owned());
        }
        *lock(&self.slot(profile).handed) = Some(handed);
        info!(
            profile = profile.unwrap_or("(the daemon's own)"),
            "credentials were handed over"
        );
        self.changes.send_modify(|version| *version += 1);
        Ok(())
    }

    /// What is known of every base that somebody wanted.
    pub fn states(&self) -> BTreeMap<Option<String>, BaseState> {
        let shown = |slot: &Slot| lock(&slot.shown).state.clone();
        self.slots
            .iter()
            .map(|slot| (slot.key().clone(), shown(slot.value())))
            .collect()
    }

    /// The base of `profile`, or the daemon's own, with credentials that live for `at_least`, if that can be had.
    ///
    /// # Errors
    /// Why there is none.
    pub async fn get(&self, profile: Option<&str>, at_least: Duration) -> Result<Arc<Base>, ProviderError> {
        let slot = self.slot(profile);
        let mut held = slot.held.lock().await;
        let of = (self.setup.files.stamps(), *self.changes.borrow());
        let same = held.of == of;
        if let Some(base) = held
            .base
            .as_ref()
            .filter(|base| same && base.has(at_least, &self.clock))
        {
            return Ok(base.clone());
        }
        if let Some((until, error)) = held.failed.as_ref().filter(|_| same)
            && self.clock.boot() < *until
        {
            return match held.base.as_ref().filter(|base| base.has(USE_UNTIL, &self.clock)) {
                Some(base) => Ok(base.clone()),
                None => Err(error.clone()),
            };
        }
        let name = self.name(profile);
        let fetched = tokio::time::timeout(LOAD_TIMEOUT, self.fetch(name, &slot)).await;
        let fetched = fetched.unwrap_or_else(|_| {
            Err(ProviderError::NoBase(format!(
                "{}they did not come within {} s",
                of_profile(name),
                LOAD_TIMEOUT.as_secs()
            )))
        });
        held.of = of;
        match fetched {
            Ok(base) => {
                let base = Arc::new(base);
                // Failures are counted until STS takes them, which is not known here; a change begins anew.
                (held.base, held.failed) = (Some(base.clone()), None);
                if !same {
                    held.failures = 0;
                }
                self.show(&slot, Some(&base), None);
                Ok(base)
            }
            Err(error) => {
                // What a changed file no longer says is not used any more.
                let still = |base: &Arc<Base>| same && base.has(USE_UNTIL, &self.clock);
                held.base = held.base.take().filter(still);
                if !same {
                    held.failures = 0;
                }
                held.fails(error.clone(), self.clock.boot());
                self.show(&slot, held.base.as_deref(), Some(&error));
                held.base.clone().ok_or(error)
            }
        }
    }

    /// STS does not take the credentials of this base: they are fetched anew before it is asked again.
    pub async fn refused(&self, profile: Option<&str>, error: &ProviderError) {
        let slot = self.slot(profile);
        let mut held = slot.held.lock().await;
        // Where there are none, that has been noted already.
        if held.base.take().is_some() {
            held.fails(error.clone(), self.clock.boot());
            self.show(&slot, None, Some(error));
        }
    }

    /// STS has taken the credentials of this base.
    pub async fn taken(&self, profile: Option<&str>) {
        self.slot(profile).held.lock().await.failures = 0;
    }

    /// Nobody names this profile any more. What was handed over for it stays.
    pub fn forget(&self, profile: &str) {
        self.slots
            .remove_if(&Some(profile.to_owned()), |_, slot| lock(&slot.handed).is_none());
    }

    /// The region that the configuration of `profile` names.
    pub async fn region(&self, profile: Option<&str>) -> Option<String> {
        match self.configuration(self.name(profile)).await {
            Ok((sdk, _)) => sdk.region().map(ToString::to_string),
            // The files say nothing now; a variable does, and wins over them in any case.
            Err(_) => self.region_of(&ProfileSet::default(), ""),
        }
    }

    /// What is configured, else the variables, else the profile.
    fn region_of(&self, set: &ProfileSet, profile: &str) -> Option<String> {
        let variable = || {
            self.variable("AWS_REGION")
                .or_else(|| self.variable("AWS_DEFAULT_REGION"))
        };
        let named = || set.get_profile(profile)?.get("region");
        let configured = self.setup.region.as_deref();
        configured.or_else(variable).or_else(named).map(str::to_owned)
    }

    fn name<'a>(&'a self, profile: Option<&'a str>) -> Option<&'a str> {
        profile.or(self.setup.profile.as_deref())
    }

    /// One slot for one base, however it is named.
    fn slot(&self, profile: Option<&str>) -> Arc<Slot> {
        self.slots
            .entry(self.name(profile).map(str::to_owned))
            .or_default()
            .clone()
    }

    fn show(&self, slot: &Slot, base: Option<&Base>, error: Option<&ProviderError>) {
        let mut shown = lock(&slot.shown);
        if let Some(error) = error.filter(|error| shown.says(Some(error), self.clock.boot())) {
            warn!("{error}");
        }
        shown.state = BaseState {
            origin: base.map(|base| base.origin.clone()),
            until: base.and_then(|base| base.credentials.expiry()),
            error: error.cloned(),
        };
    }

    async fn fetch(&self, name: Option<&str>, slot: &Slot) -> Result<Base, ProviderError> {
        let handed = lock(&slot.handed).clone();
        let (sdk, set) = self.configuration(name).await?;
        let fetched = self.clock.aws();
        let made = |credentials, origin: String| {
            Ok(Base {
                sdk: sdk.clone(),
                credentials,
                origin,
                fetched,
            })
        };
        if let Some(handed) = handed {
            if handed.until.is_none_or(|until| fetched + USE_UNTIL < until) {
                return made(
                    as_sdk(&handed.keys, handed.until),
                    "handed over by imds-router login".to_owned(),
                );
            }
            // What was handed over has ended, and nothing else may be there: then that is what is to be said.
            return match self.chain(name, &sdk, &set).await {
                Ok((credentials, origin)) => made(credentials, origin),
                Err(error) => Err(match error {
                    ProviderError::NoBase(_) => ProviderError::NeedsAttention {
                        why: format!("{}what was handed over has expired", of_profile(name)),
                        command: login_command(name),
                    },
                    other => other,
                }),
            };
        }
        let (credentials, origin) = self.chain(name, &sdk, &set).await?;
        made(credentials, origin)
    }

    /// Configuration without credentials, and the profiles that there are.
    async fn configuration(&self, name: Option<&str>) -> Result<(SdkConfig, ProfileSet), ProviderError> {
        let read = |path| self.setup.files.read(path).map(|contents| contents.map(|it| it.text));
        let (mut config, mut credentials) = (read(&self.setup.files.config), read(&self.setup.files.credentials));
        if name.is_none() && self.environment().is_some() {
            // The files are not wanted, so that one that is not trusted stops nobody.
            for file in [&mut config, &mut credentials] {
                if let Err(FileError::Untrusted { .. }) = file {
                    *file = Ok(None);
                }
            }
        }
        let refused = |error: FileError| ProviderError::NoBase(error.to_string());
        let (config, credentials) = (config.map_err(refused)?, credentials.map_err(refused)?);
        let files = profile::as_sdk_files(config.as_deref(), credentials.as_deref());
        let set = profile::parse(&files).await.map_err(no_base)?;
        let selected = name.unwrap_or_else(|| self.selected());
        // Endpoints are taken from it, whoever the credentials are.
        profile::check_endpoints(&set, selected, self.allowed()).map_err(no_base)?;
        let loader = aws_config::defaults(BehaviorVersion::latest())
            .profile_files(files)
            .profile_name(selected)
            // Said in any case, though it be none: the SDK would ask the instance metadata service, which is us.
            .region(self.region_of(&set, selected).map(Region::new))
            .no_credentials()
            .time_source(AwsTime(self.clock.clone()))
            .retry_config(RetryConfig::standard().with_max_attempts(ATTEMPTS))
            .timeout_config(
                TimeoutConfig::builder()
                    .connect_timeout(CONNECT_TIMEOUT)
                    .operation_attempt_timeout(ATTEMPT_TIMEOUT)
                    .operation_timeout(OPERATION_TIMEOUT)
                    .build(),
            )
            .http_client(self.http.clone());
        Ok((loader.load().await, set))
    }

    fn allowed(&self) -> Allowed<'_> {
        Allowed {
            process: self.setup.allow_process,
            instance_profile: self.setup.instance_metadata.is_some(),
            directory: &self.setup.files.directory,
        }
    }

    fn variable(&self, name: &str) -> Option<&str> {
        self.setup
            .variables
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    fn selected(&self) -> &str {
        self.variable("AWS_PROFILE").unwrap_or("default")
    }

    fn environment(&self) -> Option<Keys> {
        Some(Keys {
            access_key_id: self.variable("AWS_ACCESS_KEY_ID")?.to_owned(),
            secret_access_key: Secret::new(self.variable("AWS_SECRET_ACCESS_KEY")?),
            session_token: self.variable("AWS_SESSION_TOKEN").map(Secret::new),
        })
    }

    /// The usual chain; a profile that is named is all of it.
    async fn chain(
        &self,
        name: Option<&str>,
        sdk: &SdkConfig,
        set: &ProfileSet,
    ) -> Result<(aws_credential_types::Credentials, String), ProviderError> {
        if let Some(name) = name {
            return self.follow(name, profile::plan(set, name, self.allowed()), sdk).await;
        }
        if let Some(keys) = self.environment() {
            return Ok((as_sdk(&keys, None), "environment variables".to_owned()));
        }
        let selected = self.selected();
        let plan = profile::plan(set, selected, self.allowed());
        // A default profile that is not there, or says nothing of credentials, leaves it to the rest of the chain.
        let silent = match &plan {
            Err(ProfileError::Missing { by, .. }) => by.is_empty(),
            Err(ProfileError::Empty(of)) => of == selected,
            _ => false,
        };
        if !silent || self.variable("AWS_PROFILE").is_some() {
            return self.follow(selected, plan, sdk).await;
        }
        if let (Some(file), Some(role)) = (
            self.variable("AWS_WEB_IDENTITY_TOKEN_FILE"),
            self.variable("AWS_ROLE_ARN"),
        ) {
            let session_name = self.variable("AWS_ROLE_SESSION_NAME");
            let token = self.token_file(file.as_ref())?;
            let credentials = exchange_web_identity(sdk, role, session_name, &token).await?;
            return Ok((credentials, format!("web identity, role {role}")));
        }
        self.container_endpoint().await
    }

    async fn container_endpoint(&self) -> Result<(aws_credential_types::Credentials, String), ProviderError> {
        let full = self.variable("AWS_CONTAINER_CREDENTIALS_FULL_URI");
        let relative = self.variable("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI");
        let (name, uri) = match (relative, full) {
            (Some(_), _) => ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "http://169.254.170.2/"),
            (None, Some(uri)) => ("AWS_CONTAINER_CREDENTIALS_FULL_URI", uri),
            (None, None) => return self.instance_profile().await,
        };
        if leads_to_us(uri) {
            return Err(ProviderError::NoBase(format!(
                "variable {name} leads to an address that this daemon answers: it cannot be its own base"
            )));
        }
        let provider = EcsCredentialsProvider::builder()
            .configure(&ProviderConfig::without_region().with_http_client(self.http.clone()));
        let credentials = provider.build().provide_credentials().await;
        let credentials = credentials.map_err(|error| {
            ProviderError::Unavailable(printable(
                &format!("container credentials endpoint: {}", with_causes(&error)),
                MESSAGE_CHARACTERS,
            ))
        })?;
        Ok((credentials, "container credentials endpoint".to_owned()))
    }

    /// What the host itself has, where that is somebody else's to give.
    async fn instance_profile(&self) -> Result<(aws_credential_types::Credentials, String), ProviderError> {
        let none = |rest: &str| {
            ProviderError::NoBase(format!(
                "there are none: no variables AWS_ACCESS_KEY_ID …, and no default profile in {} or {}{rest}; \
                 --profile names another, [credentials] aws_dir another directory",
                self.setup.files.config.display(),
                self.setup.files.credentials.display()
            ))
        };
        let Some(service) = &self.setup.instance_metadata else {
            return Err(none(""));
        };
        let found = instance_profile::credentials(service, self.http.clone()).await?;
        found.ok_or_else(|| none(", and this host has no instance profile"))
    }

    /// Goes the way to a profile's credentials.
    async fn follow(
        &self,
        name: &str,
        plan: Result<Plan, ProfileError>,
        sdk: &SdkConfig,
    ) -> Result<(aws_credential_types::Credentials, String), ProviderError> {
        let plan = plan.map_err(|error| match error {
            ProfileError::Person { .. } => ProviderError::NeedsAttention {
                why: error.to_string(),
                command: login_command(Some(name)),
            },
            error => no_base(error),
        })?;
        let (mut credentials, kind) = match &plan.source {
            Source::Keys(keys) => (as_sdk(keys, None), "keys"),
            Source::Environment => match self.environment() {
                Some(keys) => (as_sdk(&keys, None), "environment variables"),
                None => {
                    return Err(ProviderError::NoBase(format!(
                        "profile {name}: credential_source = Environment, and there are no variables AWS_ACCESS_KEY_ID …"
                    )));
                }
            },
            Source::InstanceProfile => (self.instance_profile().await?.0, "instance profile of this host"),
            Source::Sso(sso) => (self.sso.credentials(sdk, sso, name).await?, "sso"),
            Source::WebIdentity {
                role_arn,
                session_name,
                token_file,
            } => {
                let token = self.token_file(token_file)?;
                let credentials = exchange_web_identity(sdk, role_arn, session_name.as_deref(), &token).await?;
                (credentials, "web identity")
            }
            Source::Process(command) => (process(name, command).await?, "credential_process"),
        };
        for step in &plan.roles {
            credentials = assume_step(sdk, credentials, step).await?;
        }
        let way = plan.roles.last().map(|step| format!(", role {}", step.role_arn));
        Ok((
            credentials,
            format!("profile {name} ({kind}{})", way.unwrap_or_default()),
        ))
    }

    fn token_file(&self, path: &std::path::Path) -> Result<Secret, ProviderError> {
        match self.setup.files.read(path) {
            Ok(Some(contents)) => Ok(Secret::new(contents.text.trim())),
            Ok(None) => Err(ProviderError::NoBase(format!(
                "there is no web identity token {}",
                path.display()
            ))),
            Err(error) => Err(ProviderError::NoBase(error.to_string())),
        }
    }
}

/// What a `credential_process` prints (AWS SDKs and Tools reference guide, process credential provider).
#[derive(serde::Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    version: u32,
    access_key_id: String,
    secret_access_key: String,
    #[serde(default)]
    session_token: Option<String>,
    #[serde(default)]
    expiration: Option<jiff::Timestamp>,
}

/// A program and all that it has started, until it is done with.
struct Running(Option<rustix::process::Pid>);

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended by itself.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

/// Runs a program for its credentials. One that hangs is ended with its children: the SDK's own leaves it behind.
async fn process(name: &str, command: &Secret) -> Result<aws_credential_types::Credentials, ProviderError> {
    // What such a program prints may be secret, whatever comes of it.
    let failed = || {
        ProviderError::NoBase(format!(
            "profile {name}: its credential_process gives no credentials; running it by hand says why"
        ))
    };
    // With the limit on open files that the daemon was started with: programs that use select(2) fail above 1,024.
    let limit = descriptors::limit_of_children().map_or("unlimited".to_owned(), |limit| limit.to_string());
    let mut child = tokio::process::Command::new("sh")
        .args([
            "-c",
            r#"ulimit -S -n "$1"; exec sh -c "$2""#,
            "sh",
            &limit,
            command.reveal(),
        ])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .process_group(0)
        .kill_on_drop(true)
        .spawn()
        .map_err(|_| failed())?;
    let pid = child.id().and_then(|id| i32::try_from(id).ok());
    let mut running = Running(pid.and_then(rustix::process::Pid::from_raw));
    let stdout = child.stdout.take().ok_or_else(failed)?;
    let mut output = Vec::new();
    let read = stdout.take(MAX_PRINTED_BYTES + 1).read_to_end(&mut output).await;
    if read.is_err() || u64::try_from(output.len()).is_ok_and(|length| length > MAX_PRINTED_BYTES) {
        return Err(failed());
    }
    let status = child.wait().await.map_err(|_| failed())?;
    // Its number may be somebody else's from now on.
    running.0 = None;
    let printed: Printed = serde_json::from_slice(&output).map_err(|_| failed())?;
    if !status.success() || printed.version != 1 {
        return Err(failed());
    }
    Ok(aws_credential_types::Credentials::new(
        printed.access_key_id,
        printed.secret_access_key,
        printed.session_token,
        printed.expiration.map(SystemTime::from),
        "credential_process",
    ))
}

fn as_sdk(keys: &Keys, until: Option<SystemTime>) -> aws_credential_types::Credentials {
    aws_credential_types::Credentials::new(
        &keys.access_key_id,
        keys.secret_access_key.reveal(),
        keys.session_token.as_ref().map(|token| token.reveal().to_owned()),
        until,
        "imds-router",
    )
}

fn no_base(error: ProfileError) -> ProviderError {
    ProviderError::NoBase(printable(&error.to_string(), MESSAGE_CHARACTERS))
}

fn of_profile(name: Option<&str>) -> String {
    name.map(|name| format!("profile {name}: ")).unwrap_or_default()
}

/// What hands over credentials of `name`, typed on the host.
pub fn login_command(name: Option<&str>) -> String {
    let profile = name.map(|name| format!(" --profile {name}")).unwrap_or_default();
    format!("aws configure export-credentials{profile} | imds-router login{profile} --stdin")
}

/// Whether a URI names an address that this daemon answers.
fn leads_to_us(uri: &str) -> bool {
    let Ok(uri) = uri.parse::<hyper::Uri>() else {
        // The SDK takes none of these either.
        return false;
    };
    uri.host()
        .is_some_and(|host| OURSELVES.iter().any(|it| it.eq_ignore_ascii_case(host)))
}

#[cfg(test)]
mod tests;
