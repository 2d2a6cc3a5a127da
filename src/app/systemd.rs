//! What a service manager and the daemon tell each other, in systemd's own protocol: which listener outlives a daemon
//! (sd_listen_fds(3)), that it serves, and that it is alive (sd_notify(3)). Without systemd, all of it is nothing.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};

use listenfd::ListenFd;
use sd_notify::NotifyState;
use tracing::{debug, warn};

use super::{AppError, interception};

/// Listeners that the daemon was started with.
#[derive(Default)]
pub struct Inherited(Vec<TcpListener>);

impl Inherited {
    /// Those that systemd has handed over. To be called while there is one thread: it takes them out of the environment.
    ///
    /// # Errors
    /// When what was handed over is not a listener.
    pub fn from_environment() -> Result<Self, AppError> {
        let mut handed = ListenFd::from_env();
        let listeners = (0..handed.len()).filter_map(|index| handed.take_tcp_listener(index).transpose());
        let listeners = listeners.collect::<io::Result<_>>();
        listeners.map(Self).map_err(AppError::Inherited)
    }

    /// A listener at `address`: the one that was handed over, else a new one.
    ///
    /// # Errors
    /// When there is none to be had.
    pub(super) fn listen(&mut self, address: IpAddr) -> io::Result<(TcpListener, SocketAddr)> {
        let at = |listener: &TcpListener| listener.local_addr().ok().filter(|it| it.ip() == address);
        let Some(index) = self.0.iter().position(|it| at(it).is_some()) else {
            return interception::listen(address);
        };
        let listener = self.0.swap_remove(index);
        interception::make_ours(&listener)?;
        let listening = listener.local_addr()?;
        debug!(%listening, "the listener is the service manager's");
        Ok((listener, listening))
    }

    /// What was handed over and is of no use here.
    pub(super) fn left(&self) -> impl Iterator<Item = SocketAddr> {
        self.0.iter().filter_map(|listener| listener.local_addr().ok())
    }
}

/// Tells the service manager, if there is one.
pub(super) fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!(%error, "the service manager cannot be told how this daemon is (NOTIFY_SOCKET)");
    }
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
