//! The file descriptors of this process: their limit, the reserve that connections never take, and shortages.
//!
//! Each open connection takes one descriptor, and each container with a link takes [`PER_CONTAINER`]. Most systems start a
//! process with a soft limit of 1,024 (`RLIMIT_NOFILE`, getrlimit(2)), which is for programs that use `select`. The daemon
//! raises it to the hard limit.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Descriptors of a container with a link of its own: its init process, the link, and two sockets in its network namespace.
/// A trial on a real engine counts them.
pub const PER_CONTAINER: usize = 4;
/// Descriptors of the daemon itself: log, runtime, listeners, and connections to the engine and STS.
const OWN: usize = 64;
/// Descriptors that the shares of connections leave free; of a low limit it is a quarter. One half is for the connections that every
/// container may have, and for those whose callers are not proven. A quarter is for new links, and a quarter is left for the engine,
/// the admin socket and STS.
const RESERVE: usize = 256;

/// The soft limit that this process was started with.
static AT_START: OnceLock<u64> = OnceLock::new();
/// How often no descriptor was left, by the work that failed.
static SHORTAGES: Mutex<BTreeMap<&str, u64>> = Mutex::new(BTreeMap::new());

/// Raises the soft limit to the hard one.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_limit() -> io::Result<()> {
    let now = getrlimit(Resource::Nofile);
    if let Some(soft) = now.current {
        // Only the first call sees the limit of the start.
        let _ = AT_START.set(soft);
    }
    let raised = Rlimit {
        current: now.maximum,
        maximum: now.maximum,
    };
    Ok(setrlimit(Resource::Nofile, raised)?)
}

/// The soft limit for programs that the daemon runs: the one that it was started with. `None`: there was none.
pub fn limit_of_children() -> Option<u64> {
    AT_START.get().copied()
}

/// The soft limit now.
pub fn limit() -> usize {
    let soft = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    usize::try_from(soft).unwrap_or(usize::MAX)
}

/// How many are open.
///
/// # Errors
/// When /proc cannot be read.
pub fn open() -> io::Result<usize> {
    // The list itself is one of them.
    Ok(std::fs::read_dir("/proc/self/fd")?.count().saturating_sub(1))
}

/// Whether an error says that no descriptor was left, for this process (EMFILE) or for the whole system (ENFILE).
pub fn is_shortage(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [Errno::MFILE, Errno::NFILE]
        .iter()
        .any(|errno| code == Some(errno.raw_os_error()))
}

/// Counts an error that is a shortage, as met during `work`.
pub fn note(work: &'static str, error: &io::Error) {
    if is_shortage(error) {
        note_shortage(work);
    }
}

/// Counts a shortage met during `work`.
pub fn note_shortage(work: &'static str) {
    *SHORTAGES
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .entry(work)
        .or_default() += 1;
}

/// Shortages so far, by the work that failed.
pub fn shortages() -> Vec<(&'static str, u64)> {
    let shortages = SHORTAGES.lock().unwrap_or_else(PoisonError::into_inner);
    shortages.iter().map(|(work, count)| (*work, *count)).collect()
}

/// Returns the descriptor of a container's link, unless its number is in the part of the reserve for the engine, the admin socket and
/// STS. Without this part, a host with too many containers could not show its status.
///
/// # Errors
/// EMFILE, the kernel's own error for a shortage.
pub fn for_link<F: AsFd>(descriptor: F) -> io::Result<F> {
    let number = usize::try_from(descriptor.as_fd().as_raw_fd()).unwrap_or(usize::MAX);
    match Budget::of(limit()).is_reserved_from_links(number) {
        true => Err(Errno::MFILE.into()),
        false => Ok(descriptor),
    }
}

/// How the descriptors of one limit are shared out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Budget {
    limit: usize,
    reserve: usize,
}

impl Budget {
    /// Of a limit.
    pub fn of(limit: usize) -> Self {
        Self {
            limit,
            reserve: RESERVE.min(limit / 4),
        }
    }

    /// Descriptors for connections, all together, beside that many containers that run.
    pub fn for_connections(self, containers: usize) -> usize {
        self.limit
            .saturating_sub(self.reserve + OWN + containers * PER_CONTAINER)
    }

    /// Whether a connection with this descriptor takes from the half of the reserve that is not for connections. The kernel gives
    /// out the lowest number that is free, so all below it are in use.
    pub fn is_reserved(self, descriptor: usize) -> bool {
        descriptor >= self.limit - self.reserve / 2
    }

    /// Whether a container's link with this descriptor takes from the quarter of the reserve that is not for links.
    fn is_reserved_from_links(self, descriptor: usize) -> bool {
        descriptor >= self.limit - self.reserve / 4
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_a_reserve() {
        let budget = Budget::of(1024);
        assert_eq!(budget.for_connections(0), 704);
        assert_eq!(budget.for_connections(100), 304);
        assert_eq!(budget.for_connections(1000), 0);
        assert!(!budget.is_reserved(895) && budget.is_reserved(896));
        assert!(!budget.is_reserved_from_links(959) && budget.is_reserved_from_links(960));
        // A quarter of a low limit.
        assert_eq!(Budget::of(256).for_connections(2), 120);
        assert!(Budget::of(usize::MAX).for_connections(10) > 1 << 40);
    }

    #[test]
    fn a_shortage_is_told_from_other_errors() {
        let error = |errno: Errno| io::Error::from(errno);
        assert!(is_shortage(&error(Errno::MFILE)) && is_shortage(&error(Errno::NFILE)));
        assert!(!is_shortage(&error(Errno::NOENT)) && !is_shortage(&io::Error::other("too many open files")));
        note("a test", &error(Errno::NOENT));
        note("a test", &error(Errno::MFILE));
        note_shortage("a test");
        assert!(shortages().contains(&("a test", 2)));
    }
}
