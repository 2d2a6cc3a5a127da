//! Puts a [`Plan`] up, keeps it up, and takes it down.
//!
//! Everything here works on the network namespace that the calling thread sits in; an [`Interception`] stays with
//! the one in which it was made. The calls block for a few netlink round trips, well below a millisecond each.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::netlink::{ChangeListener, Kernel};
use super::{Family, GUARD_TABLE, HostError, Part, Plan, RULES_TABLE, Step, diff, teardown};

/// Changes come in bursts (one deletion of a link is four messages): this long after the first, one look sees all.
const SETTLE: Duration = Duration::from_millis(20);

/// A [`Plan`] that is up.
///
/// Dropping it is what a crash does: the owned table goes with its socket, the rest stays and refuses connections.
/// [`Interception::down`] is the clean way.
#[must_use = "what it owns is gone when this is dropped"]
pub struct Interception {
    plan: Plan,
    kernel: Kernel,
    bell: ChangeListener,
    taken_over: Vec<Part>,
}

impl Interception {
    /// Puts up what is missing of `plan`; takes over what an earlier process left behind. The listener is bound by
    /// now (`IP_FREEBIND`: the address comes last).
    ///
    /// # Errors
    /// [`HostError::Busy`] if another process holds the table of this host; otherwise whatever the kernel refused.
    /// What this call had added is gone again.
    pub fn up(plan: Plan) -> Result<Self, HostError> {
        let (mut kernel, bell) = Kernel::open()?;
        let before = kernel.observe(&plan)?;
        // The lock comes first: a second daemon finds out before it has touched anything.
        let held = kernel.hold(&plan, &before)?;
        put_up(&mut kernel, held.into_iter().collect(), diff(&plan, &before))?;
        let taken_over = teardown(&plan, &before).into_iter().map(|step| match step {
            Step::Add(part) | Step::Repair(part) | Step::Remove(part) => part,
        });
        let taken_over = taken_over.collect();
        Ok(Self {
            plan,
            kernel,
            bell,
            taken_over,
        })
    }

    /// What was there already and is ours: an earlier process did not end cleanly, or `intercept up` came first.
    pub fn taken_over(&self) -> &[Part] {
        &self.taken_over
    }

    /// Puts back whatever is missing, and says what. Free of effect, and of notifications, where nothing is.
    ///
    /// # Errors
    /// What could not be put back, after everything else was.
    pub fn verify(&mut self) -> Result<Vec<Step>, HostError> {
        let observed = self.kernel.observe(&self.plan)?;
        self.kernel.hold(&self.plan, &observed)?;
        all(&mut self.kernel, diff(&self.plan, &observed))
    }

    /// Waits until something changed that may concern us; call [`Interception::verify`] then. Our own changes count
    /// too, so each repair is followed by one look that finds nothing to do.
    ///
    /// # Errors
    /// If the notifications cannot be read.
    ///
    /// # Panics
    /// Outside a tokio runtime with I/O and time.
    pub async fn changed(&self) -> io::Result<()> {
        let route = readable(&self.bell.route)?;
        let netfilter = readable(&self.bell.netfilter)?;
        tokio::select! {
            ready = route.readable() => ready.map(drop)?,
            ready = netfilter.readable() => ready.map(drop)?,
        }
        tokio::time::sleep(SETTLE).await;
        // Before the caller looks, so that what happens while it looks rings again.
        drain(route.get_ref())?;
        drain(netfilter.get_ref())
    }

    /// Takes everything of ours down, in the reverse order, but for what stays without a daemon by design
    /// ([`Plan::rejecting`]). What is gone already is fine.
    ///
    /// # Errors
    /// Everything that could not be removed.
    pub fn down(mut self) -> Result<(), HostError> {
        let plan = self.plan.ending();
        let observed = self.kernel.observe(&plan)?;
        all(&mut self.kernel, teardown(&plan, &observed)).map(drop)
    }
}

/// What [`Interception::up`] or [`install`] would do now. Changes nothing.
///
/// # Errors
/// If the kernel does not show what is there.
pub fn pending(plan: &Plan) -> Result<Vec<Step>, HostError> {
    let (mut kernel, _) = Kernel::open()?;
    Ok(diff(plan, &kernel.observe(plan)?))
}

/// What a host is like, as far as a [`Plan`] is concerned. For people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// The plan's address family.
    pub family: Family,
    /// The netlink port of the process that serves.
    pub holder: Option<u32>,
    /// What stays without a daemon is there.
    pub guarded: bool,
    /// Addresses of the plan that somebody else put somewhere.
    pub foreign: Vec<String>,
    /// There is a link of ours.
    pub dummy: bool,
    /// Chains that look at what comes in for this host, and drop what they do not know.
    pub dropping: Vec<String>,
}

/// Looks at a host. Changes nothing.
///
/// # Errors
/// If the kernel does not show what is there.
pub fn survey(plan: &Plan) -> Result<Survey, HostError> {
    let (mut kernel, _) = Kernel::open()?;
    let observed = kernel.observe(plan)?;
    let family = plan.family();
    let table = |name| observed.tables.iter().find(move |seen| seen.name == name);
    Ok(Survey {
        family,
        holder: table(RULES_TABLE).and_then(|seen| seen.owner),
        guarded: table(GUARD_TABLE).is_some(),
        foreign: plan
            .foreign(&observed)
            .iter()
            .map(|(part, _)| part.to_string())
            .collect(),
        dummy: observed.link.is_some(),
        dropping: kernel.dropping(family)?,
    })
}

/// Puts up what may stay without a daemon ([`Plan::persistent`]): callers are refused until one serves.
///
/// # Errors
/// Whatever the kernel refused; what this call had added is gone again.
pub fn install(plan: &Plan) -> Result<Vec<Step>, HostError> {
    let plan = plan.clone().persistent();
    let (mut kernel, _) = Kernel::open()?;
    let observed = kernel.observe(&plan)?;
    put_up(&mut kernel, Vec::new(), diff(&plan, &observed))
}

/// Takes down what nobody serves any more: the left-overs of a crash, or of [`install`].
///
/// # Errors
/// [`HostError::Busy`] if a daemon serves; otherwise everything that could not be removed.
pub fn clear(plan: &Plan) -> Result<Vec<Step>, HostError> {
    let (mut kernel, _) = Kernel::open()?;
    let observed = kernel.observe(plan)?;
    kernel.refuse_others(&observed.tables)?;
    all(&mut kernel, teardown(plan, &observed))
}

/// All or nothing, including what was `done` before. A repair is not undone: what was there before was broken.
///
/// The owned table is removed like the rest, not left to the end of its socket: a process that is just being started
/// keeps a copy of every descriptor until it has become its program.
fn put_up(kernel: &mut Kernel, mut done: Vec<Step>, steps: Vec<Step>) -> Result<Vec<Step>, HostError> {
    for step in steps {
        match kernel.execute(step) {
            Ok(step) => done.extend(step),
            Err(first) => {
                let added = done.into_iter().rev().filter_map(|step| match step {
                    Step::Add(part) => Some(Step::Remove(part)),
                    Step::Repair(_) | Step::Remove(_) => None,
                });
                let errors = std::iter::once(first).chain(added.filter_map(|step| kernel.execute(step).err()));
                return Err(HostError::all(errors.collect()).expect("the first one is in the list"));
            }
        }
    }
    Ok(done)
}

/// As much as possible: one failure does not keep the rest from being done.
fn all(kernel: &mut Kernel, steps: Vec<Step>) -> Result<Vec<Step>, HostError> {
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    for step in steps {
        match kernel.execute(step) {
            Ok(step) => done.extend(step),
            Err(error) => errors.push(error),
        }
    }
    HostError::all(errors).map_or(Ok(done), Err)
}

#[allow(
    deprecated,
    reason = "the descriptor is borrowed for as long as it is registered, which is what the unsafe successor asks for"
)]
fn readable(socket: &OwnedFd) -> io::Result<AsyncFd<BorrowedFd<'_>>> {
    AsyncFd::with_interest(socket.as_fd(), Interest::READABLE)
}

fn drain(socket: impl AsFd) -> io::Result<()> {
    // The messages themselves do not matter, only that there were some: a short buffer cuts them off.
    let mut head = [0; 16];
    loop {
        match recv(&socket, &mut head, RecvFlags::DONTWAIT) {
            // NOBUFS: some were lost, which is news as well.
            Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => (),
            Err(Errno::AGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
