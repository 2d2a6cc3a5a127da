//! One keeper per [`Session`] keeps its credentials fresh for as long as somebody holds a lease on it.
//!
//! A keeper fetches, publishes, sleeps to 40–47 % of the session's life and fetches again. From that follow: a single
//! flight however many ask, refresh ahead of need, the last good credentials while STS fails, and warm-up (a lease is
//! taken when a container is *created*). A caller that leaves cancels nothing; a keeper whose last lease is gone ends.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Credentials, Session};
use crate::clock::Clock;

/// What a provider's call becomes.
pub type Provided = Pin<Box<dyn Future<Output = Result<Credentials, ProviderError>> + Send>>;

/// Where credentials come from: [`super::sts`], [`super::offline`], or a script.
pub trait CredentialProvider: Send + Sync + 'static {
    /// Fetches new credentials for `session`.
    fn credentials(&self, session: &Session) -> Provided;
}

/// Why there are no new credentials. The texts carry no secret: providers trim what they pass on.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProviderError {
    /// STS knows the caller and says no.
    #[error("denied by sts: {code}: {message}")]
    Denied {
        /// STS's error code.
        code: String,
        /// STS's message.
        message: String,
    },
    /// There are no base credentials to ask with.
    #[error("no base credentials: {0}")]
    NoBase(String),
    /// Anything that may pass: network, throttling, 5xx.
    #[error("sts cannot be asked now: {0}")]
    Unavailable(String),
}

impl ProviderError {
    /// In one word or two, for the hint header of the container's own reply.
    pub fn summary(&self) -> &'static str {
        match self {
            Self::Denied { .. } => "role denied by sts",
            Self::NoBase(_) => "no base credentials",
            Self::Unavailable(_) => "sts not reachable",
        }
    }

    /// The first and the longest pause before the next try. A denial changes only when somebody changes a policy.
    fn back_off(&self) -> (Duration, Duration) {
        match self {
            Self::Denied { .. } => (Duration::from_secs(5), Duration::from_secs(60)),
            Self::NoBase(_) => (Duration::from_secs(1), Duration::from_secs(15)),
            Self::Unavailable(_) => (Duration::from_millis(250), Duration::from_secs(15)),
        }
    }
}

/// Credentials together with the finished reply body, so that a request copies a pointer.
#[derive(Clone, Debug)]
pub struct Published {
    /// The credentials.
    pub credentials: Credentials,
    /// Made by the function that [`Broker::new`] got.
    pub body: Body,
}

/// A rendered credentials document. Its `Debug` shows only its length.
#[derive(Clone)]
pub struct Body(pub Bytes);

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

/// What a keeper knows.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The newest credentials that were fetched.
    pub published: Option<Arc<Published>>,
    /// Why the last try failed; `None` after a success.
    pub error: Option<ProviderError>,
    /// Tries so far.
    pub tries: u32,
}

/// Why a caller gets no credentials.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NoCredentials {
    /// The last try failed and nothing live is left.
    #[error("{0}")]
    Failed(#[from] ProviderError),
    /// The first answer of STS was not there in time.
    #[error("the first AssumeRole has not ended yet")]
    NotYet,
    /// What there was has expired.
    #[error("the credentials have expired and new ones have not come yet")]
    Expired,
    /// Nobody holds a lease: the container has no such session any more.
    #[error("no container holds this session")]
    NotLeased,
}

struct Slot {
    state: watch::Sender<State>,
    /// Leases held now; the keeper ends a while after the last.
    leases: watch::Sender<usize>,
    /// The largest time that leases asked to be kept after their end, in milliseconds.
    linger: AtomicU64,
}

/// Keeps credentials for all sessions that somebody holds.
pub struct Broker {
    slots: DashMap<Session, Arc<Slot>>,
    provider: Box<dyn CredentialProvider>,
    render: fn(&Credentials) -> Bytes,
    clock: Clock,
    /// Random numbers for jitter; any will do.
    jitter: AtomicU64,
}

/// A counted wish for credentials to be kept fresh.
pub struct Lease {
    broker: Arc<Broker>,
    session: Session,
    slot: Arc<Slot>,
    linger: Duration,
}

/// How long credentials are kept after the last container that used them is gone: a restart or a redeploy finds them
/// warm.
pub const LINGER: Duration = Duration::from_secs(300);
/// The same for a container that was created and never started.
pub const LINGER_NEVER_STARTED: Duration = Duration::from_secs(60);

impl Lease {
    /// Sets how long the credentials are kept after this lease.
    pub fn set_linger(&mut self, linger: Duration) {
        self.linger = linger;
    }

    /// What it is for.
    pub fn session(&self) -> &Session {
        &self.session
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let linger = u64::try_from(self.linger.as_millis()).unwrap_or(u64::MAX);
        self.slot.linger.store(linger, Ordering::Relaxed);
        self.slot.leases.send_modify(|leases| *leases -= 1);
    }
}

impl std::fmt::Debug for Lease {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lease")
            .field("session", &self.session)
            .finish_non_exhaustive()
    }
}

impl Broker {
    /// A broker without sessions. `render` makes the reply body of credentials.
    pub fn new(provider: Box<dyn CredentialProvider>, render: fn(&Credentials) -> Bytes, clock: Clock) -> Arc<Self> {
        let seed = clock
            .wall()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |it| it.subsec_nanos());
        Arc::new(Self {
            slots: DashMap::new(),
            provider,
            render,
            clock,
            jitter: AtomicU64::new(u64::from(seed) | 1),
        })
    }

    /// Asks for `session` to be kept fresh until the lease is dropped. The first lease starts the first fetch at once.
    pub fn lease(self: &Arc<Self>, session: &Session) -> Lease {
        let slot = match self.slots.entry(session.clone()) {
            Entry::Occupied(entry) => {
                let slot = entry.get().clone();
                slot.leases.send_modify(|leases| *leases += 1);
                slot
            }
            Entry::Vacant(entry) => {
                let slot = Arc::new(Slot {
                    state: watch::Sender::new(State::default()),
                    leases: watch::Sender::new(1),
                    linger: AtomicU64::new(0),
                });
                entry.insert(slot.clone());
                tokio::spawn(keep(self.clone(), session.clone(), slot.clone()));
                slot
            }
        };
        Lease {
            broker: self.clone(),
            session: session.clone(),
            slot,
            linger: LINGER,
        }
    }

    /// The credentials of `session`: at once if they are there, else as soon as they come, at most until `deadline`.
    ///
    /// # Errors
    /// Why there are none.
    pub async fn get(&self, session: &Session, deadline: Instant) -> Result<Arc<Published>, NoCredentials> {
        let Some(mut state) = self.slots.get(session).map(|slot| slot.state.subscribe()) else {
            return Err(NoCredentials::NotLeased);
        };
        // The first try's end, whatever it was, answers: a second one would be longer than any SDK waits.
        let first_try = state.wait_for(|state| state.tries > 0 || state.published.is_some());
        if tokio::time::timeout_at(deadline, first_try).await.is_err() {
            return Err(NoCredentials::NotYet);
        }
        let state = state.borrow();
        match (&state.published, &state.error) {
            (Some(published), _) if self.clock.wall() < published.credentials.expiration => Ok(published.clone()),
            (_, Some(error)) => Err(error.clone().into()),
            (Some(_), None) => Err(NoCredentials::Expired),
            (None, None) => Err(NoCredentials::NotYet),
        }
    }

    /// What is known of `session` now, for `status`.
    pub fn state(&self, session: &Session) -> Option<State> {
        self.slots.get(session).map(|slot| slot.state.borrow().clone())
    }

    /// How many sessions are kept.
    pub fn sessions(&self) -> usize {
        self.slots.len()
    }

    /// A number in `0..1000` that differs from call to call (xorshift): jitter needs no better.
    fn permille(&self) -> u32 {
        let mut x = self.jitter.load(Ordering::Relaxed);
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        self.jitter.store(x, Ordering::Relaxed);
        u32::try_from(x % 1000).unwrap_or(0)
    }

    /// When to fetch again: at 40 to 47 % of the life that is left now, so that containers that started together do not
    /// refresh together and half an hour of an hour's session is always left.
    fn refresh_after(&self, credentials: &Credentials) -> Duration {
        let left = credentials
            .expiration
            .duration_since(self.clock.wall())
            .unwrap_or_default();
        // Credentials that are born expired (a clock that lies) must not make a busy loop.
        (left * (400 + self.permille() * 70 / 1000) / 1000).max(Duration::from_secs(1))
    }
}

impl Lease {
    /// The broker that this lease is of.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }
}

async fn keep(broker: Arc<Broker>, session: Session, slot: Arc<Slot>) {
    let mut failures = 0_u32;
    loop {
        let pause = match broker.provider.credentials(&session).await {
            Ok(credentials) => {
                failures = 0;
                let body = Body((broker.render)(&credentials));
                let pause = broker.refresh_after(&credentials);
                info!(
                    %session, key = credentials.access_key_id, fake = credentials.fake, "credentials fetched"
                );
                slot.state.send_modify(|state| {
                    state.published = Some(Arc::new(Published { credentials, body }));
                    state.error = None;
                    state.tries = state.tries.saturating_add(1);
                });
                pause
            }
            Err(error) => {
                let (first, longest) = error.back_off();
                let pause = (first * 2_u32.saturating_pow(failures.min(16))).min(longest);
                failures = failures.saturating_add(1);
                warn!(%session, %error, failures, "no new credentials");
                slot.state.send_modify(|state| {
                    state.error = Some(error);
                    state.tries = state.tries.saturating_add(1);
                });
                // Half of it and up to as much again.
                pause / 2 + pause * broker.permille() / 2000
            }
        };
        if !leased_until(&broker, &session, &slot, broker.clock.now() + pause).await {
            debug!(%session, "no container uses this session any more");
            return;
        }
    }
}

/// Sleeps until `wake`. `false`: the last lease ended, and nobody took another within the time that it was to be kept;
/// the slot is gone.
async fn leased_until(broker: &Broker, session: &Session, slot: &Arc<Slot>, wake: Instant) -> bool {
    let mut leases = slot.leases.subscribe();
    loop {
        // The sender lives in `slot`, so waiting cannot fail; an error would mean that nobody holds a lease.
        let unused = async { leases.wait_for(|leases| *leases == 0).await.is_ok() };
        if tokio::time::timeout_at(wake, unused).await.is_err() {
            return true;
        }
        let linger = Duration::from_millis(slot.linger.load(Ordering::Relaxed));
        let used = leases.wait_for(|leases| *leases > 0);
        let end = broker.clock.now() + linger;
        if tokio::time::timeout_at(end.min(wake), used).await.is_ok() {
            continue;
        }
        if end <= wake {
            // Under the map's lock: a lease that is being taken now either comes first, and the slot stays, or finds none.
            if broker
                .slots
                .remove_if(session, |_, slot| *slot.leases.borrow() == 0)
                .is_some()
            {
                return false;
            }
        } else {
            return true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::{RoleArn, RoleSession, Secret};
    use std::collections::VecDeque;
    use std::sync::Mutex;
    use std::time::UNIX_EPOCH;

    /// STS as told: how long each call takes and what it says; the last one repeats.
    struct Script {
        clock: Clock,
        calls: Arc<Mutex<Vec<Instant>>>,
        answers: Mutex<VecDeque<(Duration, Result<(), ProviderError>)>>,
    }

    impl CredentialProvider for Script {
        fn credentials(&self, session: &Session) -> Provided {
            self.calls.lock().unwrap().push(Instant::now());
            let mut answers = self.answers.lock().unwrap();
            let (pause, answer) = if answers.len() > 1 {
                answers.pop_front().unwrap()
            } else {
                answers[0].clone()
            };
            let (clock, duration) = (self.clock.clone(), session.duration());
            Box::pin(async move {
                tokio::time::sleep(pause).await;
                answer.map(|()| Credentials {
                    access_key_id: "ASIAEXAMPLE".into(),
                    secret_access_key: Secret::new("s"),
                    token: Secret::new("t"),
                    updated: clock.wall(),
                    expiration: clock.wall() + duration,
                    fake: false,
                })
            })
        }
    }

    type Calls = Arc<Mutex<Vec<Instant>>>;

    fn broker(answers: &[(u64, Result<(), ProviderError>)]) -> (Arc<Broker>, Calls, Clock) {
        let clock = Clock::scripted(UNIX_EPOCH + Duration::from_secs(1_767_607_872));
        let calls = Calls::default();
        let answers = answers
            .iter()
            .map(|(ms, answer)| (Duration::from_millis(*ms), answer.clone()))
            .collect();
        let script = Script {
            clock: clock.clone(),
            calls: calls.clone(),
            answers: Mutex::new(answers),
        };
        (
            Broker::new(Box::new(script), |_| Bytes::from_static(b"{}"), clock.clone()),
            calls,
            clock,
        )
    }

    fn session() -> Session {
        let role = RoleArn::parse("arn:aws:iam::111122223333:role/x").unwrap();
        Session::Role(RoleSession::new(role, "s1", Duration::from_secs(3600), "us-east-1"))
    }

    fn down() -> Result<(), ProviderError> {
        Err(ProviderError::Unavailable("down".into()))
    }

    const HOLD: Duration = Duration::from_millis(400);

    #[tokio::test(start_paused = true)]
    async fn a_thousand_callers_of_a_cold_role_share_one_call() {
        let (broker, calls, clock) = broker(&[(100, Ok(()))]);
        let _lease = broker.lease(&session());
        let tasks: Vec<_> = (0..1000)
            .map(|_| {
                let (broker, deadline) = (broker.clone(), clock.now() + HOLD);
                tokio::spawn(async move { broker.get(&session(), deadline).await })
            })
            .collect();
        let mut first: Option<Arc<Published>> = None;
        for task in tasks {
            let published = task.await.unwrap().unwrap();
            assert!(Arc::ptr_eq(first.get_or_insert(published.clone()), &published));
        }
        assert_eq!(calls.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_caller_that_leaves_cancels_nothing() {
        let (broker, calls, clock) = broker(&[(2000, Ok(()))]);
        let _lease = broker.lease(&session());
        assert_eq!(
            broker.get(&session(), clock.now() + HOLD).await.unwrap_err(),
            NoCredentials::NotYet
        );
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(broker.get(&session(), clock.now()).await.is_ok());
        assert_eq!(calls.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn refreshed_at_40_to_47_percent_and_never_under_half_an_hour() {
        let (broker, calls, clock) = broker(&[(100, Ok(()))]);
        let _lease = broker.lease(&session());
        for _ in 0..20 * 60 {
            tokio::time::sleep(Duration::from_secs(60)).await;
            let left = broker
                .get(&session(), clock.now() + HOLD)
                .await
                .unwrap()
                .credentials
                .expiration;
            assert!(left.duration_since(clock.wall()).unwrap() >= Duration::from_secs(1800));
        }
        let calls = calls.lock().unwrap();
        for pair in calls.windows(2) {
            let pause = (pair[1] - pair[0]).as_secs_f64() / 3600.0;
            assert!((0.40..0.4701).contains(&pause), "{pause}");
        }
        assert!(calls.len() > 40);
    }

    #[tokio::test(start_paused = true)]
    async fn stale_while_error_until_expiry_and_well_after_recovery() {
        let mut answers = vec![(2000, Ok(()))];
        // Enough failures for about two hours at 15 s each at the most.
        answers.extend((0..2000).map(|_| (10, down())));
        let (broker, _, clock) = broker(&answers);
        let _lease = broker.lease(&session());
        tokio::time::sleep(Duration::from_secs(3)).await;
        let expiration = broker
            .get(&session(), clock.now())
            .await
            .unwrap()
            .credentials
            .expiration;
        while clock.wall() + Duration::from_secs(7) < expiration {
            assert!(broker.get(&session(), clock.now()).await.is_ok());
            tokio::time::sleep(Duration::from_secs(7)).await;
        }
        tokio::time::sleep(Duration::from_secs(7)).await;
        let error = broker.get(&session(), clock.now()).await.unwrap_err();
        assert_eq!(error, NoCredentials::Failed(ProviderError::Unavailable("down".into())));
    }

    #[tokio::test(start_paused = true)]
    async fn two_seconds_then_ten_minutes_of_failure_then_recovery_go_unnoticed() {
        let mut answers = vec![(2000, Ok(()))];
        answers.extend((0..60).map(|_| (10, down())));
        answers.push((50, Ok(())));
        let (broker, calls, clock) = broker(&answers);
        let _lease = broker.lease(&session());
        tokio::time::sleep(Duration::from_secs(3)).await;
        let first = broker.get(&session(), clock.now()).await.unwrap();
        for _ in 0..3 * 360 {
            tokio::time::sleep(Duration::from_secs(10)).await;
            let asked = clock.now();
            assert!(broker.get(&session(), clock.now() + HOLD).await.is_ok());
            assert!(clock.now() - asked <= HOLD);
        }
        assert!(calls.lock().unwrap().len() > 62);
        let last = broker.get(&session(), clock.now()).await.unwrap();
        assert!(last.credentials.expiration > first.credentials.expiration);
    }

    #[tokio::test(start_paused = true)]
    async fn a_denial_is_told_at_once_and_asked_again_slowly() {
        let denied = Err(ProviderError::Denied {
            code: "AccessDenied".into(),
            message: "no".into(),
        });
        let (broker, calls, clock) = broker(&[(50, denied)]);
        let _lease = broker.lease(&session());
        let error = broker.get(&session(), clock.now() + HOLD).await.unwrap_err();
        assert_eq!(error.to_string(), "denied by sts: AccessDenied: no");
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let calls = calls.lock().unwrap().len();
        assert!((60..140).contains(&calls), "{calls}");
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_holds_is_forgotten_after_a_while_and_not_before() {
        let (broker, calls, clock) = broker(&[(50, Ok(()))]);
        drop(broker.lease(&session()));
        tokio::time::sleep(LINGER - Duration::from_secs(1)).await;
        let lease = broker.lease(&session());
        assert!(broker.get(&session(), clock.now()).await.is_ok());
        assert_eq!(calls.lock().unwrap().len(), 1);
        drop(lease);
        tokio::time::sleep(LINGER + Duration::from_secs(1)).await;
        assert_eq!(broker.sessions(), 0);
        assert_eq!(
            broker.get(&session(), clock.now()).await.unwrap_err(),
            NoCredentials::NotLeased
        );
        let mut lease = broker.lease(&session());
        lease.set_linger(LINGER_NEVER_STARTED);
        drop(lease);
        tokio::time::sleep(LINGER_NEVER_STARTED + Duration::from_secs(1)).await;
        assert_eq!(broker.sessions(), 0);
        assert_eq!(calls.lock().unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_expired_is_served_after_a_jump_of_the_clock() {
        let (broker, _, clock) = broker(&[(50, Ok(()))]);
        let _lease = broker.lease(&session());
        tokio::time::sleep(Duration::from_secs(1)).await;
        clock.jump(36_000_000);
        assert_eq!(
            broker.get(&session(), clock.now()).await.unwrap_err(),
            NoCredentials::Expired
        );
    }
}
