//! What a service manager and the daemon tell each other, in systemd's own protocol: which listener outlives a daemon
//! (sd_listen_fds(3)), that it serves, and that it is alive (sd_notify(3)). Without systemd, all of it is nothing.

use std::fs::File;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{BorrowedFd, OwnedFd};

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tracing::{debug, warn};

use super::{AppError, interception};

/// The name of the private network namespace in the descriptor store.
const NETNS: &str = "netns";

/// Descriptors that the daemon was started with.
#[derive(Default)]
pub struct Inherited {
    listeners: Vec<TcpListener>,
    /// The private network namespace of a daemon that crashed ([`keep_namespace`]).
    netns: Option<File>,
}

impl Inherited {
    /// Those that systemd has handed over. To be called while there is one thread: it takes them out of the environment.
    ///
    /// # Errors
    /// When what was handed over is not a listener.
    pub fn from_environment() -> Result<Self, AppError> {
        let names = sd_notify::listen_fds_with_names().map(|all| all.map(|(_, name)| name).collect::<Vec<_>>());
        let is_netns = |name: &String| name == NETNS;
        let netns = names.ok().and_then(|names| names.iter().position(is_netns));
        let mut handed = ListenFd::from_env();
        // Opened again by its number: a descriptor of its own, without unsafe code.
        let netns = netns.and_then(|index| handed.take_raw_fd(index).ok()?);
        let netns = netns.and_then(|number| File::open(format!("/proc/self/fd/{number}")).ok());
        let listeners = (0..handed.len()).filter_map(|index| handed.take_tcp_listener(index).transpose());
        let listeners = listeners.collect::<io::Result<_>>().map_err(AppError::Inherited)?;
        Ok(Self { listeners, netns })
    }

    /// The private network namespace, if the service manager has kept it.
    pub(super) fn take_netns(&mut self) -> Option<OwnedFd> {
        self.netns.take().map(OwnedFd::from)
    }

    /// A listener at `address`: the one that was handed over, else a new one.
    ///
    /// # Errors
    /// When there is none to be had.
    pub(super) fn listen(&mut self, address: IpAddr) -> io::Result<(TcpListener, SocketAddr)> {
        let at = |listener: &TcpListener| listener.local_addr().ok().filter(|it| it.ip() == address);
        let Some(index) = self.listeners.iter().position(|it| at(it).is_some()) else {
            return interception::listen(address);
        };
        let listener = self.listeners.swap_remove(index);
        interception::make_ours(&listener)?;
        let listening = listener.local_addr()?;
        debug!(%listening, "the listener is the service manager's");
        Ok((listener, listening))
    }

    /// What was handed over and is of no use here.
    pub(super) fn left(&self) -> impl Iterator<Item = SocketAddr> {
        self.listeners.iter().filter_map(|listener| listener.local_addr().ok())
    }
}

/// Tells the service manager, if there is one.
pub(super) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "the service manager cannot be told how this daemon is (NOTIFY_SOCKET)");
    }
}

/// Has the service manager keep the private network namespace while it restarts this daemon (`FileDescriptorStoreMax=`,
/// systemd.service(5)): a unit has mounts of its own, which end with it.
pub(super) fn keep_namespace(netns: BorrowedFd<'_>) {
    let states = [NotifyState::FdStore, NotifyState::FdName(NETNS)];
    if let Err(error) = sd_notify::notify_with_fds(&states, &[netns]) {
        warn!(%error, "the service manager does not keep the private network namespace");
    }
}

/// A clean stop: nothing is to be kept.
pub(super) fn forget_namespace() {
    tell(&[NotifyState::FdStoreRemove, NotifyState::FdName(NETNS)]);
}

/// Says that the daemon is alive, as often as the service manager has asked for. What stops the daemon's threads stops this.
pub(super) async fn alive() {
    // Half the time, as sd_watchdog_enabled(3) recommends.
    let Some(often) = sd_notify::watchdog_enabled()
        .map(|within| within / 2)
        .filter(|it| !it.is_zero())
    else {
        return;
    };
    let mut beat = tokio::time::interval(often);
    loop {
        beat.tick().await;
        tell(&[NotifyState::Watchdog]);
    }
}
