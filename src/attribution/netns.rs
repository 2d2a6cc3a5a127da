//! The one way into a network namespace.

use std::io;
use std::os::fd::BorrowedFd;
use std::thread;

use rustix::thread::{ThreadNameSpaceType, move_into_thread_name_spaces};

/// Runs `open` inside the network namespace of the process behind `pidfd` and hands out what it opened there. Sockets stay
/// in the namespace that they were made in.
///
/// The namespace is entered on a thread that does only this and ends: no other code can find itself in a container.
///
/// # Errors
/// When there are no rights to enter (`CAP_SYS_ADMIN` and `CAP_SYS_PTRACE` are needed), or as `open` says.
pub fn open_in<T: Send>(pidfd: BorrowedFd<'_>, open: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let inside = thread::Builder::new()
            .name("namespace".to_owned())
            .spawn_scoped(scope, move || {
                move_into_thread_name_spaces(pidfd, ThreadNameSpaceType::NETWORK)?;
                open()
            })?;
        inside
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in the namespace has panicked")))
    })
}
