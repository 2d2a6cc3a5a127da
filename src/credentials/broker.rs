//! One keeper per [`Session`] keeps its credentials fresh for as long as somebody holds a lease on it.
//!
//! A keeper fetches, publishes, sleeps to 40–47 % of the session's life and fetches again. From that follow: a single
//! flight however many ask, refresh ahead of need, the last good credentials while STS fails, and warm-up (a lease is
//! taken when a container is *created*). A caller that leaves cancels nothing; a keeper whose last lease is gone ends.
//!
//! Keepers wait in one line for a limited number of calls at once: each stands in it once, so that however many fetch at
//! the same time, and whatever happens to the others, each is served in its turn. A quarter of the places is kept for those
//! whose container is asking just now: after a restart among thousands, nobody waits for what nobody wants yet.
//!
//! # Clocks
//! Wall time jumps, and may be wrong from the beginning. What holds is how *long* AWS lets credentials live, which it said
//! when it gave them: they are dead when that much time has passed by boot time, or by wall time unless wall time is still
//! before the expiration that AWS wrote ([`Published::is_live`]). After a jump or a sleep every keeper looks again.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::{Credentials, Session};
use crate::clock::{Clock, Moment};

/// What a provider's call becomes.
pub type Provided = Pin<Box<dyn Future<Output = Result<Credentials, ProviderError>> + Send>>;
/// What getting ready for a call becomes.
pub type Prepared = Pin<Box<dyn Future<Output = Result<(), ProviderError>> + Send>>;

/// Where credentials come from: [`super::sts`], [`super::offline`], or a script.
pub trait CredentialProvider: Send + Sync + 'static {
    /// Fetches new credentials for `session`.
    fn credentials(&self, session: &Session) -> Provided;

    /// What may take long and is no call of STS, such as fetching base credentials: done before a place among the calls
    /// at once is taken, so that a base that hangs holds up only what needs it.
    fn prepare(&self, session: &Session) -> Prepared {
        let _ = session;
        Box::pin(std::future::ready(Ok(())))
    }
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
    /// There are none until a person does something.
    #[error("needs attention: {why}; run: {command}")]
    NeedsAttention {
        /// What has ended, or is wanted.
        why: String,
        /// What to type.
        command: String,
    },
    /// STS knows us, and wants to be asked less.
    #[error("sts asks for fewer calls: {0}")]
    Throttled(String),
    /// Anything that may pass: network, 5xx.
    #[error("sts cannot be asked now: {0}")]
    Unavailable(String),
}

impl ProviderError {
    /// In one word or two, for the hint header of the container's own reply.
    pub fn summary(&self) -> &'static str {
        match self {
            Self::Denied { .. } => "role denied by sts",
            Self::NoBase(_) => "no base credentials",
            Self::NeedsAttention { .. } => "base credentials need attention",
            Self::Throttled(_) => "throttled by sts",
            Self::Unavailable(_) => "sts not reachable",
        }
    }

    /// The first and the longest pause before the next try. A denial changes only when somebody changes a policy.
    fn back_off(&self) -> (Duration, Duration) {
        match self {
            Self::Denied { .. } => (Duration::from_secs(5), Duration::from_secs(60)),
            Self::NoBase(_) | Self::NeedsAttention { .. } => (Duration::from_secs(1), Duration::from_secs(15)),
            Self::Throttled(_) => (Duration::from_secs(1), Duration::from_secs(60)),
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
    /// When they were asked for.
    asked: Moment,
}

impl Published {
    /// How long AWS lets them live from when they were asked for, whatever the clocks here say.
    fn life(&self) -> Duration {
        let Credentials {
            updated, expiration, ..
        } = &self.credentials;
        expiration.duration_since(*updated).unwrap_or_default()
    }

    /// How old they are, by boot time and by wall time.
    fn ages(&self, clock: &Clock) -> (Duration, Duration) {
        let (boot, wall) = (clock.boot(), clock.wall());
        (
            boot.saturating_sub(self.asked.boot),
            wall.duration_since(self.asked.wall).unwrap_or_default(),
        )
    }

    /// Whether they are good. Two clocks must think so. Boot time counts a laptop's sleep, and nobody can set it, but it
    /// stands still while a hypervisor holds a VM, and then wall time is what jumps. Wall time may also jump because it
    /// was wrong before: as long as it is before the expiration, that is no reason.
    pub fn is_live(&self, clock: &Clock) -> bool {
        let (boot, wall) = self.ages(clock);
        boot < self.life() && (wall < self.life() || clock.wall() < self.credentials.expiration)
    }

    /// Whether they are older than `age` by any clock, or nobody can say how old they are.
    fn may_be_older(&self, age: Duration, clock: &Clock) -> bool {
        let (boot, wall) = self.ages(clock);
        boot.max(wall) >= age || wall.saturating_sub(boot) >= CLOCKS_AGREE
    }
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

struct SessionEntry {
    state: watch::Sender<State>,
    /// Leases held now; the keeper ends a while after the last.
    leases: watch::Sender<usize>,
    /// The largest time that leases asked to be kept after their end, in milliseconds.
    linger: AtomicU64,
    /// Something has changed: the keeper looks again.
    look: Notify,
    /// Somebody is waiting for the first credentials, or for new ones.
    wanted: Notify,
}

/// What the operator sets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Calls of STS at once.
    pub calls: usize,
    /// The least life of what is served while STS works.
    pub min_remaining: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            calls: 16,
            min_remaining: Duration::from_secs(1800),
        }
    }
}

/// Keeps credentials for all sessions that somebody holds.
pub struct Broker {
    slots: DashMap<Arc<Session>, Arc<SessionEntry>>,
    provider: Box<dyn CredentialProvider>,
    render: fn(&Credentials) -> Bytes,
    clock: Clock,
    limits: Limits,
    /// Places among the calls at once. Whoever waits gets one in the order of coming.
    calls: Semaphore,
    /// The rest of them: for those that somebody is waiting for.
    wanted_calls: Semaphore,
    /// Random numbers for jitter; any will do.
    jitter: AtomicU64,
    /// How calls ended, by the place of their name in [`OUTCOMES`].
    outcomes: [AtomicU64; OUTCOMES.len()],
}

/// How a call can end.
const OUTCOMES: [&str; 6] = ["ok", "denied", "no_base", "needs_attention", "throttled", "unavailable"];

/// Its place in [`OUTCOMES`].
fn outcome(of: &Result<Credentials, ProviderError>) -> usize {
    match of {
        Ok(_) => 0,
        Err(ProviderError::Denied { .. }) => 1,
        Err(ProviderError::NoBase(_)) => 2,
        Err(ProviderError::NeedsAttention { .. }) => 3,
        Err(ProviderError::Throttled(_)) => 4,
        Err(ProviderError::Unavailable(_)) => 5,
    }
}

/// A counted wish for credentials to be kept fresh.
pub struct Lease {
    broker: Arc<Broker>,
    session: Arc<Session>,
    slot: Arc<SessionEntry>,
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

    /// What it is for: one for all leases of it.
    pub fn session(&self) -> &Arc<Session> {
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
    pub fn new(
        provider: Box<dyn CredentialProvider>,
        render: fn(&Credentials) -> Bytes,
        clock: Clock,
        limits: Limits,
    ) -> Arc<Self> {
        let seed = clock
            .wall()
            .duration_since(SystemTime::UNIX_EPOCH)
            .map_or(1, |it| it.subsec_nanos());
        Arc::new(Self {
            slots: DashMap::new(),
            provider,
            render,
            clock,
            limits,
            calls: Semaphore::new((limits.calls - limits.calls / 4).max(1)),
            wanted_calls: Semaphore::new(limits.calls / 4),
            jitter: AtomicU64::new(u64::from(seed) | 1),
            outcomes: Default::default(),
        })
    }

    /// Asks for `session` to be kept fresh until the lease is dropped. The first lease starts the first fetch at once.
    pub fn lease(self: &Arc<Self>, session: &Arc<Session>) -> Lease {
        let (session, slot) = match self.slots.entry(session.clone()) {
            Entry::Occupied(entry) => {
                let slot = entry.get().clone();
                slot.leases.send_modify(|leases| *leases += 1);
                // Somebody starts the container anew, perhaps because something was put right.
                if slot.state.borrow().error.is_some() {
                    slot.look.notify_one();
                }
                (entry.key().clone(), slot)
            }
            Entry::Vacant(entry) => {
                let slot = Arc::new(SessionEntry {
                    state: watch::Sender::new(State::default()),
                    leases: watch::Sender::new(1),
                    linger: AtomicU64::new(0),
                    look: Notify::new(),
                    wanted: Notify::new(),
                });
                entry.insert(slot.clone());
                tokio::spawn(keep(self.clone(), session.clone(), slot.clone()));
                (session.clone(), slot)
            }
        };
        Lease {
            broker: self.clone(),
            session,
            slot,
            linger: LINGER,
        }
    }

    /// The credentials of `session`: at once if they are there, else as soon as they come, at most until `deadline`.
    ///
    /// # Errors
    /// Why there are none.
    pub async fn get(&self, session: &Session, deadline: Instant) -> Result<Arc<Published>, NoCredentials> {
        let Some(slot) = self.slots.get(session).map(|slot| slot.clone()) else {
            return Err(NoCredentials::NotLeased);
        };
        let mut state = slot.state.subscribe();
        let waits = {
            let state = state.borrow();
            match &state.published {
                Some(published) if published.is_live(&self.clock) => return Ok(published.clone()),
                // The clock has jumped, or the machine has slept, and the keeper does not know it yet.
                Some(_) if state.error.is_none() => {
                    slot.look.notify_one();
                    true
                }
                Some(_) => false,
                None => state.tries == 0,
            }
        };
        if waits {
            slot.wanted.notify_one();
        }
        // The first try's end, whatever it was, answers: a second one would be longer than any SDK waits.
        let answered = state.wait_for(|state| match &state.published {
            Some(published) => state.error.is_some() || published.is_live(&self.clock),
            None => state.tries > 0,
        });
        let in_time = tokio::time::timeout_at(deadline, answered).await.is_ok();
        let state = state.borrow();
        match (&state.published, &state.error) {
            (Some(published), _) if published.is_live(&self.clock) => Ok(published.clone()),
            (_, Some(error)) if in_time => Err(error.clone().into()),
            (Some(_), _) => Err(NoCredentials::Expired),
            (None, _) => Err(NoCredentials::NotYet),
        }
    }

    /// Tries again at once what has failed, of the sessions that `which` means: what they need has changed.
    pub fn try_again(&self, which: impl Fn(&Session) -> bool) {
        for slot in self.slots.iter().filter(|slot| which(slot.key())) {
            if slot.state.borrow().error.is_some() {
                slot.look.notify_one();
            }
        }
    }

    /// Has every keeper look again whenever the clocks go apart, until the task is dropped.
    pub async fn watch_clocks(self: Arc<Self>) {
        let mut from = self.clock.moment();
        loop {
            let shift = self.clock.shift(&mut from).await;
            warn!(
                wall_milliseconds = shift.wall,
                slept_seconds = shift.slept.as_secs(),
                "the clock was set, or this machine has slept: every credential is looked at again"
            );
            for slot in self.slots.iter() {
                slot.look.notify_one();
            }
        }
    }

    /// What is known of `session` now, for `status`.
    pub fn state(&self, session: &Session) -> Option<State> {
        self.slots.get(session).map(|slot| slot.state.borrow().clone())
    }

    /// How many calls for credentials ended in which way.
    pub fn outcomes(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        let counts = self.outcomes.iter().map(|count| count.load(Ordering::Relaxed));
        OUTCOMES.into_iter().zip(counts)
    }

    /// How many sessions are `live`, `failed`, or still `pending`. Live is what can be served, whatever the last try said.
    pub fn by_state(&self) -> [(&'static str, i64); 3] {
        let (mut live, mut failed, mut pending) = (0, 0, 0);
        for slot in &self.slots {
            let state = slot.state.borrow();
            match (&state.published, &state.error) {
                (Some(published), _) if published.is_live(&self.clock) => live += 1,
                (_, Some(_)) => failed += 1,
                _ => pending += 1,
            }
        }
        [("live", live), ("failed", failed), ("pending", pending)]
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

    /// At which age to fetch again: at 40 to 47 % of the life, so that containers that started together do not refresh
    /// together, and half an hour of an hour's session is always left.
    fn refresh_age(&self, life: Duration) -> Duration {
        let early = life * (400 + self.permille() * 70 / 1000) / 1000;
        let least = self.limits.min_remaining.min(life / 2);
        // What lives for no time at all must not make a busy loop.
        early.min(life - least).max(Duration::from_secs(1))
    }

    /// One fetch, and when AWS was asked.
    async fn fetch(&self, session: &Session, slot: &SessionEntry) -> (Moment, Result<Credentials, ProviderError>) {
        if let Err(error) = alone(self.provider.prepare(session)).await {
            return (self.clock.moment(), Err(error));
        }
        let wanted = async {
            slot.wanted.notified().await;
            self.wanted_calls.acquire().await
        };
        // Nobody closes these semaphores.
        let _place = tokio::select! {
            biased;
            place = self.calls.acquire() => place,
            place = wanted => place,
        };
        let asked = self.clock.moment();
        let fetched = alone(self.provider.credentials(session)).await;
        self.outcomes[outcome(&fetched)].fetch_add(1, Ordering::Relaxed);
        (asked, fetched)
    }
}

/// Foreign code may panic, when a clock goes back for example: then this fetch has failed, and nothing else.
async fn alone<T: Send + 'static>(
    work: impl Future<Output = Result<T, ProviderError>> + Send + 'static,
) -> Result<T, ProviderError> {
    tokio::spawn(work)
        .await
        .unwrap_or_else(|_| Err(ProviderError::Unavailable("the call has panicked; see stderr".into())))
}

impl Lease {
    /// The broker that this lease is of.
    pub fn broker(&self) -> &Arc<Broker> {
        &self.broker
    }
}

/// As far as wall and boot time may go apart in the life of credentials without a doubt about their age.
const CLOCKS_AGREE: Duration = Duration::from_secs(60);
/// How often a failure that goes on is said again.
const SAY_AGAIN: Duration = Duration::from_secs(300);
/// The least time between two tries, whoever asks for one.
const BETWEEN_TRIES: Duration = Duration::from_secs(1);

async fn keep(broker: Arc<Broker>, session: Arc<Session>, slot: Arc<SessionEntry>) {
    let mut failures = 0_u32;
    let mut said: Option<(Duration, ProviderError)> = None;
    loop {
        let (asked, fetched) = broker.fetch(&session, &slot).await;
        let due = match fetched {
            Ok(credentials) => {
                (failures, said) = (0, None);
                let body = Body((broker.render)(&credentials));
                info!(
                    %session, key = credentials.access_key_id, fake = credentials.fake, "credentials fetched"
                );
                let published = Arc::new(Published {
                    credentials,
                    body,
                    asked,
                });
                let due = Due::Age(broker.refresh_age(published.life()), published.clone());
                slot.state.send_modify(|state| {
                    state.published = Some(published);
                    state.error = None;
                    state.tries = state.tries.saturating_add(1);
                });
                due
            }
            Err(error) => {
                let (first, longest) = error.back_off();
                let pause = (first * 2_u32.saturating_pow(failures.min(16))).min(longest);
                failures = failures.saturating_add(1);
                let boot = broker.clock.boot();
                // What a person has to do is said once, by whoever found it out, and not for every session.
                let again =
                    |(at, last): &(Duration, ProviderError)| *last != error || boot.saturating_sub(*at) >= SAY_AGAIN;
                if !matches!(error, ProviderError::NeedsAttention { .. }) && said.as_ref().is_none_or(again) {
                    warn!(%session, %error, failures, "no new credentials");
                    said = Some((boot, error.clone()));
                } else {
                    debug!(%session, %error, failures, "no new credentials");
                }
                slot.state.send_modify(|state| {
                    state.error = Some(error);
                    state.tries = state.tries.saturating_add(1);
                });
                // Half of it and up to as much again.
                Due::Boot(boot + pause / 2 + pause * broker.permille() / 2000)
            }
        };
        loop {
            let wake = broker.clock.now() + due.left(&broker.clock);
            match next(&broker, &session, &slot, wake).await {
                Next::Gone => {
                    debug!(%session, "no container uses this session any more");
                    return;
                }
                Next::Due => break,
                // Something has changed. A failure is tried again; what is good is kept until it is due.
                Next::Look => match &due {
                    Due::Age(age, published) if !published.may_be_older(*age, &broker.clock) => {}
                    Due::Age(..) => break,
                    Due::Boot(_) => {
                        let soon = asked.boot + BETWEEN_TRIES;
                        tokio::time::sleep(soon.saturating_sub(broker.clock.boot())).await;
                        break;
                    }
                },
            }
        }
    }
}

/// When a keeper fetches next.
enum Due {
    /// When what is published is so old.
    Age(Duration, Arc<Published>),
    /// At a boot time.
    Boot(Duration),
}

impl Due {
    fn left(&self, clock: &Clock) -> Duration {
        match self {
            Self::Age(age, published) => age.saturating_sub(published.ages(clock).0),
            Self::Boot(at) => at.saturating_sub(clock.boot()),
        }
    }
}

/// Why a keeper goes on.
enum Next {
    /// It is time.
    Due,
    /// Something has changed.
    Look,
    /// The last lease ended, and nobody took another within the time that it was to be kept; the slot is gone.
    Gone,
}

async fn next(broker: &Broker, session: &Session, slot: &Arc<SessionEntry>, wake: Instant) -> Next {
    tokio::select! {
        () = slot.look.notified() => Next::Look,
        leased = leased_until(broker, session, slot, wake) => if leased { Next::Due } else { Next::Gone },
    }
}

/// Sleeps until `wake`. `false`: the last lease ended, and nobody took another within the time that it was to be kept;
/// the slot is gone.
async fn leased_until(broker: &Broker, session: &Session, slot: &Arc<SessionEntry>, wake: Instant) -> bool {
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
    use proptest::prelude::*;
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
            Broker::new(
                Box::new(script),
                |_| Bytes::from_static(b"{}"),
                clock.clone(),
                Limits::default(),
            ),
            calls,
            clock,
        )
    }

    fn session() -> Arc<Session> {
        let role = RoleArn::parse("arn:aws:iam::111122223333:role/x").unwrap();
        Session::Role(RoleSession::new(role, "s1", Duration::from_secs(3600), "us-east-1")).into()
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

    /// STS that works but for outages, and takes 200 ms; counts the calls that run at once.
    #[derive(Clone, Default)]
    struct Sometimes {
        outage: Arc<Mutex<Option<(Instant, Instant)>>>,
        running: Arc<Mutex<(usize, usize)>>,
        error: Option<ProviderError>,
        panics: bool,
    }

    impl CredentialProvider for (Sometimes, Clock) {
        fn credentials(&self, session: &Session) -> Provided {
            let (sometimes, clock, duration) = (self.0.clone(), self.1.clone(), session.duration());
            Box::pin(async move {
                {
                    let mut running = sometimes.running.lock().unwrap();
                    running.0 += 1;
                    running.1 = running.1.max(running.0);
                }
                let updated = clock.aws();
                tokio::time::sleep(Duration::from_millis(200)).await;
                sometimes.running.lock().unwrap().0 -= 1;
                let away = |(from, to): (Instant, Instant)| (from..to).contains(&Instant::now());
                let outage = *sometimes.outage.lock().unwrap();
                assert!(!sometimes.panics || !outage.is_some_and(away), "as foreign code does");
                if outage.is_some_and(away) {
                    return Err(sometimes
                        .error
                        .unwrap_or_else(|| ProviderError::Unavailable("down".into())));
                }
                Ok(Credentials {
                    access_key_id: "ASIAEXAMPLE".into(),
                    secret_access_key: Secret::new("s"),
                    token: Secret::new("t"),
                    updated,
                    expiration: updated + duration,
                    fake: false,
                })
            })
        }
    }

    fn sometimes(sometimes: &Sometimes, calls: usize) -> (Arc<Broker>, Clock) {
        let clock = Clock::scripted(UNIX_EPOCH + Duration::from_secs(1_767_607_872));
        let limits = Limits {
            calls,
            ..Limits::default()
        };
        let provider = Box::new((sometimes.clone(), clock.clone()));
        let broker = Broker::new(provider, |_| Bytes::from_static(b"{}"), clock.clone(), limits);
        (broker, clock)
    }

    fn numbered(number: usize) -> Session {
        let role = RoleArn::parse(&format!("arn:aws:iam::111122223333:role/r{number}")).unwrap();
        Session::Role(RoleSession::new(role, "s1", Duration::from_secs(3600), "us-east-1"))
    }

    const MINUTE: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_half_an_hour_is_never_noticed_whenever_it_begins() {
        for error in [
            ProviderError::Unavailable("down".into()),
            ProviderError::Throttled("slower".into()),
            ProviderError::NoBase("expired".into()),
        ] {
            // Every 41 s over two lives: no two beginnings are at the same place of a life.
            for beginning in (1..7200).step_by(41) {
                let sts = Sometimes {
                    error: Some(error.clone()),
                    ..Sometimes::default()
                };
                let (broker, clock) = sometimes(&sts, 8);
                let start = clock.now();
                let from = start + Duration::from_secs(beginning);
                *sts.outage.lock().unwrap() = Some((from, from + 30 * MINUTE));
                let _lease = broker.lease(&session());
                tokio::time::sleep(Duration::from_secs(1)).await;
                while clock.now() < from + 35 * MINUTE {
                    let published = broker.get(&session(), clock.now()).await;
                    assert!(published.is_ok(), "{beginning}: {published:?}");
                    tokio::time::sleep(Duration::from_secs(20)).await;
                }
                assert!(broker.state(&session()).unwrap().error.is_none());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_outage_of_two_hours_ends_in_no_credentials_exactly_at_expiry() {
        for beginning in (1..3600).step_by(173) {
            let sts = Sometimes::default();
            let (broker, clock) = sometimes(&sts, 8);
            let from = clock.now() + Duration::from_secs(beginning);
            *sts.outage.lock().unwrap() = Some((from, from + 120 * MINUTE));
            let _lease = broker.lease(&session());
            tokio::time::sleep_until(from + MINUTE).await;
            let held = broker.get(&session(), clock.now()).await.unwrap();
            let left = held.credentials.expiration.duration_since(clock.wall()).unwrap();
            tokio::time::sleep(left - Duration::from_millis(1)).await;
            let last = broker.get(&session(), clock.now()).await.unwrap();
            assert!(Arc::ptr_eq(&last, &held));
            tokio::time::sleep(Duration::from_millis(1)).await;
            let asked = clock.now();
            let error = broker.get(&session(), clock.now() + HOLD).await.unwrap_err();
            assert_eq!(error, NoCredentials::Failed(ProviderError::Unavailable("down".into())));
            assert_eq!(clock.now(), asked, "and nobody waits for it");
            tokio::time::sleep_until(from + 121 * MINUTE).await;
            assert!(broker.get(&session(), clock.now()).await.is_ok());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn five_hundred_that_expire_together_are_fetched_in_turn_and_none_starves() {
        const SESSIONS: usize = 500;
        const CALLS: usize = 8;
        let sts = Sometimes::default();
        let (broker, clock) = sometimes(&sts, CALLS);
        // All of them are born in an outage, which ends for all at once.
        let end = clock.now() + 10 * MINUTE;
        *sts.outage.lock().unwrap() = Some((clock.now(), end));
        let leases: Vec<_> = (0..SESSIONS)
            .map(|number| broker.lease(&numbered(number).into()))
            .collect();
        tokio::time::sleep_until(end).await;
        let all = |broker: &Broker| {
            let live = |number: &usize| broker.state(&numbered(*number)).unwrap().published.is_some();
            (0..SESSIONS).filter(live).count()
        };
        // Back-off ends at 15 s; then the line: 500 calls of 200 ms, 8 at once, of which 2 are for whoever is waited for.
        let line = Duration::from_millis(200 * 500 / 6 + 1_000);
        tokio::time::sleep(Duration::from_secs(15) + line).await;
        assert_eq!(all(&broker), SESSIONS);
        // And a machine that sleeps until all of them are dead.
        let watching = tokio::spawn(broker.clone().watch_clocks());
        tokio::time::sleep(Duration::from_secs(2)).await;
        clock.suspend(36_000_000);
        let woken = clock.now();
        assert_eq!(
            broker.get(&numbered(7), clock.now()).await.unwrap_err(),
            NoCredentials::Expired
        );
        tokio::time::sleep(Duration::from_secs(1) + line).await;
        for number in 0..SESSIONS {
            assert!(broker.get(&numbered(number), clock.now()).await.is_ok(), "{number}");
        }
        assert!(clock.now() - woken < Duration::from_secs(20));
        let most = sts.running.lock().unwrap().1;
        assert!((CALLS - CALLS / 4..=CALLS).contains(&most), "{most}");
        watching.abort();
        drop(leases);
    }

    #[tokio::test(start_paused = true)]
    async fn who_is_asking_does_not_wait_for_what_nobody_wants_yet() {
        let sts = Sometimes::default();
        let (broker, clock) = sometimes(&sts, 16);
        let _leases: Vec<_> = (0..1000).map(|number| broker.lease(&numbered(number).into())).collect();
        tokio::time::sleep(Duration::from_millis(1)).await;
        // The line takes 16 s.
        for number in [999, 500, 998] {
            assert!(
                broker.get(&numbered(number), clock.now() + HOLD).await.is_ok(),
                "{number}"
            );
        }
        let none = broker.get(&numbered(997), clock.now()).await.unwrap_err();
        assert_eq!(none, NoCredentials::NotYet);
        assert!(sts.running.lock().unwrap().1 <= 16);
    }

    #[tokio::test(start_paused = true)]
    async fn one_session_that_is_always_throttled_does_not_hold_up_the_others() {
        let throttled = Err(ProviderError::Throttled("slower".into()));
        let (broker, calls, _) = broker(&[(10, throttled)]);
        let _lease = broker.lease(&session());
        tokio::time::sleep(Duration::from_secs(3600)).await;
        let calls = calls.lock().unwrap();
        assert!((60..140).contains(&calls.len()), "{}", calls.len());
        let pauses: std::collections::BTreeSet<_> = calls.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(pauses.len() > calls.len() / 2, "there is jitter: {pauses:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn clocks_that_lie() {
        let hours = |hours: i64| hours * 3_600_000;
        for (jump, sleep, good) in [
            // A wrong clock that is put right, or the other way round, forwards: what cannot be told from a VM that was
            // held is not served, until STS has been asked again, which is at once.
            (hours(10), 0, false),
            // Backwards, nothing has expired.
            (hours(-10), 0, true),
            // Little jumps are nothing.
            (600_000, 0, true),
            (-600_000, 0, true),
            // A laptop that slept for ten hours; the second one's clock also went back while it did.
            (0, hours(10), false),
            (hours(-10), hours(10), false),
            (0, 600_000, true),
        ] {
            let sts = Sometimes::default();
            let (broker, clock) = sometimes(&sts, 8);
            let _watching = tokio::spawn(broker.clone().watch_clocks());
            let _lease = broker.lease(&session());
            tokio::time::sleep(Duration::from_secs(1)).await;
            let held = broker.get(&session(), clock.now()).await.unwrap();
            clock.jump(jump);
            clock.suspend(sleep);
            let now = broker.get(&session(), clock.now()).await;
            assert_eq!(now.is_ok(), good, "{jump} {sleep}");
            // Whoever waits gets new ones, as soon as STS answers.
            let served = broker.get(&session(), clock.now() + HOLD).await.unwrap();
            assert_eq!(Arc::ptr_eq(&served, &held), good, "{jump} {sleep}");
            // Whatever the clock says, an hour is an hour. Whose age is in doubt has been fetched again by now.
            tokio::time::sleep(Duration::from_secs(2)).await;
            *sts.outage.lock().unwrap() = Some((clock.now(), clock.now() + 120 * MINUTE));
            tokio::time::sleep(if sleep > 0 && good { 45 * MINUTE } else { 58 * MINUTE }).await;
            assert!(broker.get(&session(), clock.now()).await.is_ok(), "{jump} {sleep}");
            tokio::time::sleep(17 * MINUTE).await;
            assert!(broker.get(&session(), clock.now()).await.is_err(), "{jump} {sleep}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_wrong_all_the_time_does_no_harm() {
        for skew in [-36_000_000, 36_000_000] {
            let sts = Sometimes::default();
            let (broker, clock) = sometimes(&sts, 8);
            let _watching = tokio::spawn(broker.clone().watch_clocks());
            clock.heard_from_aws(clock.wall());
            clock.jump(skew);
            tokio::time::sleep(Duration::from_secs(2)).await;
            let _lease = broker.lease(&session());
            tokio::time::sleep(Duration::from_secs(1)).await;
            for _ in 0..200 {
                assert!(broker.get(&session(), clock.now()).await.is_ok(), "{skew}");
                tokio::time::sleep(MINUTE).await;
            }
            // Put right, while STS is away: still good, and good no longer than it is.
            let held = broker.get(&session(), clock.now()).await.unwrap();
            *sts.outage.lock().unwrap() = Some((clock.now(), clock.now() + 120 * MINUTE));
            clock.jump(-skew);
            assert!(broker.get(&session(), clock.now()).await.is_ok(), "{skew}");
            let left = held.credentials.expiration.duration_since(clock.wall()).unwrap();
            tokio::time::sleep(left - MINUTE).await;
            assert!(broker.get(&session(), clock.now()).await.is_ok(), "{skew}");
            tokio::time::sleep(2 * MINUTE).await;
            assert!(broker.get(&session(), clock.now()).await.is_err(), "{skew}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_panic_in_the_sdk_is_a_failure_like_any_other() {
        let sts = Sometimes {
            panics: true,
            ..Sometimes::default()
        };
        let (broker, clock) = sometimes(&sts, 1);
        *sts.outage.lock().unwrap() = Some((clock.now(), clock.now() + Duration::from_secs(5)));
        let _lease = broker.lease(&session());
        let error = broker.get(&session(), clock.now() + HOLD).await.unwrap_err();
        assert!(error.to_string().contains("has panicked"), "{error}");
        tokio::time::sleep(Duration::from_secs(15)).await;
        assert!(broker.get(&session(), clock.now()).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn what_failed_is_tried_again_at_once_when_something_changes() {
        let denied = || {
            Err(ProviderError::Denied {
                code: "AccessDenied".into(),
                message: "no".into(),
            })
        };
        let (broker, calls, clock) = broker(&[(50, denied()), (50, denied()), (50, denied()), (50, Ok(()))]);
        let _lease = broker.lease(&session());
        tokio::time::sleep(Duration::from_millis(1_100)).await;
        broker.try_again(|_| false);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(calls.lock().unwrap().len(), 1);
        broker.try_again(|session| session.profile().is_none());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(calls.lock().unwrap().len(), 2);
        // However often it is said: once a second.
        for _ in 0..5 {
            broker.try_again(|_| true);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(calls.lock().unwrap().len(), 2);
        tokio::time::sleep(Duration::from_millis(500)).await;
        assert_eq!(calls.lock().unwrap().len(), 3);
        // A container that is started anew says it, too.
        tokio::time::sleep(Duration::from_millis(1_000)).await;
        let _other = broker.lease(&session());
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(broker.get(&session(), clock.now()).await.is_ok());
        broker.try_again(|_| true);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(calls.lock().unwrap().len(), 4, "what is good is left alone");
    }

    /// What happens to clocks.
    #[derive(Clone, Copy, Debug)]
    enum Happens {
        /// Time goes by.
        Passes(u64),
        /// The machine sleeps.
        Sleeps(u64),
        /// Wall time is set.
        Set(i64),
    }

    proptest! {
        #[test]
        fn whatever_happens_to_clocks_nothing_dead_is_served_and_nothing_good_is_lost_without_a_doubt(
            wrong in -50_000_i64..50_000,
            all in proptest::collection::vec(
                prop_oneof![
                    (0_u64..2_000).prop_map(Happens::Passes),
                    (0_u64..40_000).prop_map(Happens::Sleeps),
                    (-40_000_i64..40_000).prop_map(Happens::Set),
                ],
                0..10,
            ),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let life = Duration::from_secs(3600);
                let truth = UNIX_EPOCH + Duration::from_secs(1_767_607_872);
                let clock = Clock::scripted(truth);
                clock.jump(wrong * 1_000);
                let published = Published {
                    credentials: Credentials {
                        access_key_id: "ASIAEXAMPLE".into(),
                        secret_access_key: Secret::new("s"),
                        token: Secret::new("t"),
                        updated: truth,
                        expiration: truth + life,
                        fake: false,
                    },
                    body: Body(Bytes::new()),
                    asked: clock.moment(),
                };
                let (mut age, mut set) = (0_u64, 0_i64);
                for happens in all {
                    match happens {
                        Happens::Passes(seconds) => {
                            tokio::time::advance(Duration::from_secs(seconds)).await;
                            age += seconds;
                        }
                        Happens::Sleeps(seconds) => {
                            clock.suspend(i64::try_from(seconds).unwrap() * 1_000);
                            age += seconds;
                        }
                        Happens::Set(seconds) => {
                            clock.jump(seconds * 1_000);
                            set += seconds;
                        }
                    }
                    let live = published.is_live(&clock);
                    prop_assert!(!live || age < 3600, "{age} s old and served");
                    // Good, and no reason to doubt it: wall time does not say that more has gone by, or agrees with AWS.
                    let doubt = set > 0 && clock.wall() >= published.credentials.expiration;
                    prop_assert!(live || age >= 3600 || doubt, "{age} s old and not served");
                }
                Ok(())
            })?;
        }
    }
}
