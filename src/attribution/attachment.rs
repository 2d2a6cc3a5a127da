//! The link of one network namespace to the service: made when the first run needs it, restored when something removes it,
//! removed with the last run.
//!
//! A task waits for the kernel's notifications in the namespace. Each of them leads to one look from inside, which adds what
//! is missing and changes nothing where nothing is. A container that removes its link again and again costs a bounded number
//! of repairs: after more than ten within one second they are suspended for a while.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tracing::{debug, warn};

use super::cgroup::Cgroups;
use super::netns::open_in;
use crate::clock::Clock;
use crate::containers::{CgroupId, NamespaceId};
use crate::descriptors;
use crate::logging::with_causes;

/// How a network namespace is connected to the service. Implemented by `app` on the real kernel. All but `serve` are called
/// on a thread that is inside the namespace.
pub trait NamespaceListeners: Send + Sync + 'static {
    /// Opens a socket that becomes readable when the namespace's links or routes have changed.
    ///
    /// # Errors
    /// When no descriptor is left.
    fn watch(&self) -> io::Result<OwnedFd>;

    /// Adds whatever is missing of the link and its routes.
    ///
    /// # Errors
    /// What the kernel refused.
    fn connect(&self, namespace: NamespaceId) -> io::Result<Connected>;

    /// Looks whether a request would go over the link. Changes nothing.
    ///
    /// # Errors
    /// What is missing.
    fn check(&self, namespace: NamespaceId) -> io::Result<()>;

    /// Whether an address is one of the namespace's own.
    ///
    /// # Errors
    /// What the kernel refused.
    fn is_local(&self, address: IpAddr) -> io::Result<bool>;

    /// Removes link and routes.
    ///
    /// # Errors
    /// What is left, and why.
    fn disconnect(&self, namespace: NamespaceId) -> io::Result<()>;

    /// Accepts what comes in over the link, whose near end has that name, until the task is aborted.
    ///
    /// # Errors
    /// When it cannot listen there.
    fn serve(&self, namespace: NamespaceId, near: &str) -> io::Result<AbortHandle>;
}

/// What [`NamespaceListeners::connect`] has found and done.
pub struct Connected {
    /// The name of the near end of the link.
    pub near: String,
    /// Whether the link is a new one.
    pub is_new: bool,
    /// What was missing and has been added.
    pub added: Vec<String>,
    /// What another program has put there beside it.
    pub left_alone: Vec<String>,
}

/// A handle on a process of the namespace, by which it is entered.
pub(super) type Member = Arc<AsyncFd<OwnedFd>>;

/// More removals than these within [`WITHIN`] suspend repairs.
const REMOVALS: usize = 10;
const WITHIN: Duration = Duration::from_secs(1);
/// The first suspension and the longest. Each doubles the one before, unless that is longer ago than [`FORGOTTEN`].
const SUSPENSION: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
const FORGOTTEN: Duration = Duration::from_secs(60);
/// Changes come in bursts: this long after a look, the next one sees all that has happened since.
const SETTLE: Duration = Duration::from_millis(10);
/// The longest pause after a look that took long.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// How links are called where shortages of descriptors are counted.
pub(super) const LINKS: &str = "links";
/// The pauses after a repair that failed.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// The link of one namespace.
pub(super) struct Attachment {
    namespace: NamespaceId,
    listeners: Arc<dyn NamespaceListeners>,
    clock: Clock,
    runtime: Handle,
    is_attached: AtomicBool,
    /// Held while the kernel works in the namespace, so only by threads that may block.
    state: Mutex<State>,
    /// Why the link is not in place now. Apart from `state`, because tasks read it.
    problem: Mutex<Option<String>>,
}

#[derive(Default)]
struct State {
    /// The runs that need the link. The process of any of them leads into the namespace.
    members: BTreeMap<CgroupId, Member>,
    serving: Option<Task>,
    keeper: Option<Task>,
    left_alone: Vec<String>,
    removals: Removals,
}

/// A task that ends when this is dropped.
struct Task(AbortHandle);

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// When the link was removed of late.
#[derive(Default)]
struct Removals {
    recent: VecDeque<Instant>,
    /// The last suspension: until when, and how long it was.
    suspended: Option<(Instant, Duration)>,
}

impl Removals {
    /// Notes a removal. Returns how long repairs are suspended if there were too many.
    fn note(&mut self, now: Instant) -> Option<Duration> {
        self.recent.retain(|at| now - *at < WITHIN);
        self.recent.push_back(now);
        if self.recent.len() <= REMOVALS {
            return None;
        }
        self.recent.clear();
        let pause = match self.suspended {
            Some((until, last)) if now < until + FORGOTTEN => (last * 2).min(SUSPENSION.1),
            _ => SUSPENSION.0,
        };
        self.suspended = Some((now + pause, pause));
        Some(pause)
    }
}

impl Attachment {
    pub(super) fn new(
        namespace: NamespaceId,
        listeners: Arc<dyn NamespaceListeners>,
        clock: Clock,
        runtime: Handle,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            listeners,
            clock,
            runtime,
            is_attached: AtomicBool::new(false),
            state: Mutex::default(),
            problem: Mutex::default(),
        })
    }

    /// Whether there is a link, or should be one that is being restored.
    pub(super) fn is_attached(&self) -> bool {
        self.is_attached.load(Ordering::Acquire)
    }

    /// Connects the namespace for one more run.
    pub(super) fn attach(self: &Arc<Self>, run: CgroupId, member: &Member) -> io::Result<Vec<String>> {
        let mut state = self.lock();
        let is_new = state.members.insert(run, member.clone()).is_none();
        let attached = self.attach_first(&mut state);
        if attached.is_err() && is_new {
            state.members.remove(&run);
        }
        attached.map(|()| state.left_alone.clone())
    }

    fn attach_first(self: &Arc<Self>, state: &mut State) -> io::Result<()> {
        if state.keeper.is_some() {
            return self.restore(state).map(drop);
        }
        // Before the first look, so that no change after it is missed.
        let changes = self.inside(state, |listeners| listeners.watch())?;
        self.restore(state)?;
        let keeper = keep(Arc::downgrade(self), changes);
        state.keeper = Some(Task(self.runtime.spawn(keeper).abort_handle()));
        self.is_attached.store(true, Ordering::Release);
        Ok(())
    }

    /// Disconnects the namespace if no other run needs the link.
    pub(super) fn detach(&self, run: CgroupId, member: &Member) -> io::Result<()> {
        let mut state = self.lock();
        if state.members.remove(&run).is_none() || !state.members.is_empty() {
            return Ok(());
        }
        (state.keeper, state.serving) = (None, None);
        self.enter(member, |listeners| listeners.disconnect(self.namespace))?;
        self.is_attached.store(false, Ordering::Release);
        Ok(())
    }

    /// A run has ended. The link itself goes with the namespace; until then the kernel refuses whatever comes over it.
    pub(super) fn forget(self: &Arc<Self>, run: CgroupId) {
        let forget = move |mut state: MutexGuard<'_, State>| {
            if state.members.remove(&run).is_some() && state.members.is_empty() {
                (state.keeper, state.serving) = (None, None);
            }
        };
        match self.state.try_lock() {
            Ok(state) => forget(state),
            // The kernel works in the namespace, and this may be a task.
            Err(_) => {
                let attachment = self.clone();
                self.runtime.spawn_blocking(move || forget(attachment.lock()));
            }
        }
    }

    /// Why the link was not in place at its last change.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Looks whether a request would reach the service now.
    pub(super) fn check(&self) -> Result<(), String> {
        if let Some(problem) = self.problem() {
            return Err(problem);
        }
        let state = self.lock();
        let serves = state.serving.as_ref().is_some_and(|task| !task.0.is_finished());
        if !serves {
            return Err("nothing listens at its link".to_owned());
        }
        let checked = self.inside(&state, |listeners| listeners.check(self.namespace));
        checked.map_err(|error| with_causes(&error))
    }

    /// Whether an address is one of the namespace's own, which `member` leads into.
    pub(super) fn is_local(&self, member: &Member, address: IpAddr) -> io::Result<bool> {
        self.enter(member, |listeners| listeners.is_local(address))
    }

    /// Adds what is missing, and says what that was.
    fn restore(&self, state: &mut State) -> io::Result<Vec<String>> {
        let connected = self.inside(state, |listeners| listeners.connect(self.namespace))?;
        if connected.is_new || state.serving.as_ref().is_none_or(|task| task.0.is_finished()) {
            // What listened on an earlier link hears nothing any more.
            state.serving = None;
            state.serving = Some(Task(self.listeners.serve(self.namespace, &connected.near)?));
        }
        state.left_alone = connected.left_alone;
        Ok(connected.added)
    }

    /// Runs `work` on a thread inside the namespace, by whichever member still runs.
    fn inside<T: Send>(
        &self,
        state: &State,
        work: impl Fn(&dyn NamespaceListeners) -> io::Result<T> + Sync,
    ) -> io::Result<T> {
        let mut last = io::Error::from(Errno::SRCH);
        for member in state.members.values() {
            match self.enter(member, &work) {
                Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => last = error,
                done => return done,
            }
        }
        Err(last)
    }

    fn enter<T: Send>(
        &self,
        member: &Member,
        work: impl FnOnce(&dyn NamespaceListeners) -> io::Result<T> + Send,
    ) -> io::Result<T> {
        open_in(member.get_ref().as_fd(), || {
            // A process can leave its namespace between two looks.
            if Cgroups::this_threads_namespace()? != self.namespace {
                return Err(io::Error::other("its init process has changed its network namespace"));
            }
            work(self.listeners.as_ref())
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_problem(&self, problem: Option<String>) {
        *self.problem.lock().unwrap_or_else(PoisonError::into_inner) = problem;
    }

    /// Looks once, after a change, and restores what is missing.
    fn look(&self) -> Next {
        let mut state = self.lock();
        // The last run has just ended.
        if state.members.is_empty() {
            return Next::OnChange;
        }
        let namespace = self.namespace.0;
        match self.restore(&mut state) {
            Ok(added) if added.is_empty() => self.set_problem(None),
            Ok(added) => {
                debug!(namespace, ?added, "the link of a container was changed; restored");
                self.set_problem(None);
                if let Some(pause) = state.removals.note(self.clock.now()) {
                    let why = format!(
                        "something in the container removed its link more than {REMOVALS} times within {} s; repairs are \
                         suspended for {} s",
                        WITHIN.as_secs(),
                        pause.as_secs()
                    );
                    warn!(namespace, "{why}");
                    self.set_problem(Some(why));
                    return Next::After(pause);
                }
            }
            Err(error) => {
                let why = with_causes(&error);
                debug!(namespace, why, "the link of a container cannot be restored");
                descriptors::note(LINKS, &error);
                self.set_problem(Some(format!("its link cannot be restored: {why}")));
                return Next::Retry;
            }
        }
        Next::OnChange
    }
}

/// When the next look is due.
enum Next {
    OnChange,
    After(Duration),
    /// After a pause that grows with each failure.
    Retry,
}

/// Restores the link after each change, until the attachment is dropped.
async fn keep(attachment: Weak<Attachment>, changes: OwnedFd) {
    #[expect(
        deprecated,
        reason = "an OwnedFd is and stays one descriptor, which is what the unsafe successor asks for"
    )]
    let changes = match AsyncFd::with_interest(changes, Interest::READABLE) {
        Ok(changes) => changes,
        Err(error) => return warn!(%error, "changes of a container's links are not seen"),
    };
    let mut next = Next::OnChange;
    let mut retry = RETRY.0;
    loop {
        match next {
            Next::OnChange => match changes.readable().await {
                Ok(mut ready) => ready.clear_ready(),
                Err(error) => return warn!(%error, "changes of a container's links are not seen"),
            },
            Next::After(pause) => tokio::time::sleep(pause).await,
            // A change may be what it waits for.
            Next::Retry => {
                tokio::select! {
                    () = tokio::time::sleep(retry) => {}
                    ready = changes.readable() => if let Ok(mut ready) = ready {
                        ready.clear_ready();
                        tokio::time::sleep(SETTLE).await;
                    },
                }
                retry = (retry * 2).min(RETRY.1);
            }
        }
        // Before the look, so that a change during it is seen again.
        drain(&changes);
        let Some(attachment) = attachment.upgrade() else { return };
        let clock = attachment.clock.clone();
        let began = clock.now();
        let looked = tokio::task::spawn_blocking(move || attachment.look()).await;
        // The runtime goes down.
        let Ok(looked) = looked else { return };
        next = looked;
        if matches!(next, Next::OnChange) {
            retry = RETRY.0;
            tokio::time::sleep(pause_after(clock.now() - began)).await;
        }
    }
}

/// The pause after a look that took so long. A container with many links or addresses makes looks slow, and may change them all
/// the time: looking takes a tenth of one processor at most.
fn pause_after(look: Duration) -> Duration {
    (look * 9).clamp(SETTLE, LONGEST_PAUSE)
}

/// The messages themselves do not matter, only that there were some: a short buffer cuts them off.
fn drain(changes: &AsyncFd<OwnedFd>) {
    let mut head = [0; 16];
    loop {
        match recv(changes.get_ref(), &mut head, RecvFlags::DONTWAIT) {
            // NOBUFS: some were lost, which means that there were some.
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_looks_are_rare() {
        let pause = |milliseconds| pause_after(Duration::from_millis(milliseconds)).as_millis();
        assert_eq!([pause(0), pause(1), pause(20), pause(500)], [10, 10, 180, 1000]);
    }

    #[tokio::test(start_paused = true)]
    async fn eleven_removals_within_a_second_suspend_repairs() {
        let clock = Clock::system();
        let mut removals = Removals::default();
        for _ in 0..REMOVALS {
            assert_eq!(removals.note(clock.now()), None);
            tokio::time::advance(Duration::from_millis(50)).await;
        }
        assert_eq!(removals.note(clock.now()), Some(SUSPENSION.0));
        // One a second never does.
        for _ in 0..50 {
            tokio::time::advance(WITHIN).await;
            assert_eq!(removals.note(clock.now()), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn suspensions_double_until_they_are_forgotten() {
        let clock = Clock::system();
        let mut removals = Removals::default();
        let mut storm = |clock: &Clock| (0..=REMOVALS).find_map(|_| removals.note(clock.now()));
        for seconds in [1, 2, 4, 8, 16, 30, 30] {
            let pause = Duration::from_secs(seconds);
            assert_eq!(storm(&clock), Some(pause));
            tokio::time::advance(pause).await;
        }
        tokio::time::advance(FORGOTTEN).await;
        assert_eq!(storm(&clock), Some(SUSPENSION.0));
    }
}
