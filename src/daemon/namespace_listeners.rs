//! The link of each served network namespace, and the listener at its near end: what [`crate::attribution::attachment`] needs from
//! the kernel, made with [`crate::interception::container_link`].

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tracing::{info, warn};

use super::{IMDS_ADDRESS, IMDS_ADDRESS_IPV6, systemd};
use crate::attribution::attachment::{Connected, NamespaceListeners};
use crate::containers::NamespaceId;
use crate::containers::index::Index;
use crate::descriptors;
use crate::interception::HostError;
use crate::interception::container_link;
use crate::interception::private_netns::PrivateNetwork;
use crate::server::{self, Service};

/// Where the private namespace is pinned, in the state directory.
pub(super) const PIN: &str = "netns";

/// Removes what a daemon with that state directory has left in containers when it crashed.
///
/// # Errors
/// What could not be removed.
pub fn clear(state_dir: &Path) -> Result<Vec<String>, HostError> {
    container_link::clear(&state_dir.join(PIN), IMDS_ADDRESS, IMDS_ADDRESS_IPV6)
}

/// The listeners of a daemon that proves callers by the kernel.
pub(super) struct HostNamespaceListeners {
    service: Arc<Service>,
    runtime: Handle,
    /// Whether the service is at its IPv6 address, too.
    ipv6: bool,
    /// Whether containers inside a container count as that.
    nested: bool,
    /// Opened once this daemon is the one that serves the host: a standby must not use the namespace of the active one.
    network: OnceLock<PrivateNetwork>,
    /// Whether the daemon stops: the links are then removed together.
    closes: AtomicBool,
}

impl HostNamespaceListeners {
    pub(super) fn new(service: Arc<Service>, ipv6: bool, nested: bool) -> Self {
        Self {
            service,
            runtime: Handle::current(),
            ipv6,
            nested,
            network: OnceLock::new(),
            closes: AtomicBool::new(false),
        }
    }

    /// Creates the private namespace, or adopts that of a daemon that crashed. Before this, no container is attached.
    /// `kept`: the namespace that the service manager has kept.
    pub(super) fn open(&self, state_dir: &Path, kept: Option<OwnedFd>) -> Result<(), HostError> {
        let network = PrivateNetwork::adopt(kept, &state_dir.join(PIN), IMDS_ADDRESS, IMDS_ADDRESS_IPV6)?;
        systemd::keep_namespace(network.descriptor().as_fd());
        if !network.is_pinned() {
            info!(
                "the private network namespace is not pinned, since mounts are not allowed here: after a crash containers get \
                 \"No route to host\" instead of \"Connection refused\""
            );
        }
        // Opened once, by `run`.
        let _ = self.network.set(network);
        Ok(())
    }

    /// Removes the service from every container, then all links at once, then the private namespace.
    pub(super) async fn close(&self, index: &Index) -> Result<(), HostError> {
        let Some(network) = self.network.get() else {
            return Ok(());
        };
        self.closes.store(true, Ordering::Release);
        systemd::forget_namespace();
        leave_namespaces(index).await;
        let removed = container_link::remove_links(network)
            .map_err(|error| HostError::failed(&"remove the links of containers", error));
        removed.and(network.unpin())
    }

    fn network(&self) -> io::Result<&PrivateNetwork> {
        let missing = || io::Error::other("the private network namespace is not there yet");
        self.network.get().ok_or_else(missing)
    }
}

impl NamespaceListeners for HostNamespaceListeners {
    fn watch(&self) -> io::Result<OwnedFd> {
        container_link::watch().and_then(descriptors::for_link)
    }

    fn connect(&self, namespace: NamespaceId) -> io::Result<Connected> {
        let options = container_link::Options {
            ipv6: self.ipv6,
            nested: self.nested,
        };
        let connected = container_link::connect(self.network()?, namespace.0, options)?;
        Ok(Connected {
            near: connected.near,
            is_new: connected.is_new,
            added: connected.added,
            left_alone: connected.left_alone,
        })
    }

    fn check(&self, namespace: NamespaceId) -> io::Result<()> {
        container_link::check(self.network()?, namespace.0)
    }

    fn is_local(&self, address: IpAddr) -> io::Result<bool> {
        container_link::is_local(address)
    }

    fn disconnect(&self, namespace: NamespaceId) -> io::Result<()> {
        match self.closes.load(Ordering::Acquire) {
            true => container_link::leave(self.network()?),
            false => container_link::disconnect(self.network()?, namespace.0),
        }
    }

    fn serve(&self, namespace: NamespaceId, near: &str) -> io::Result<AbortHandle> {
        let network = self.network()?;
        let listener = descriptors::for_link(network.listen(near)?)?;
        let addresses = network.addresses().collect();
        let _runtime = self.runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        let serving = server::accept_on_link(listener, namespace, self.nested, addresses, self.service.clone());
        Ok(self.runtime.spawn(serving).abort_handle())
    }
}

/// Removes the service from every container.
async fn leave_namespaces(index: &Index) {
    let runs = index.all().into_iter().filter_map(|record| record.life.clone());
    let mut leaving = tokio::task::JoinSet::new();
    for run in runs {
        leaving.spawn_blocking(move || {
            // A run that ends meanwhile takes its namespace along.
            if let Err(why) = run.handle.detach()
                && run.alive()
            {
                warn!(container = %run.container, why, "a rule or route of ours is left in a container");
            }
        });
    }
    while leaving.join_next().await.is_some() {}
}
