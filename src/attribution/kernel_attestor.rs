//! The real kernel behind [`Kernel`] and [`RunHandle`].

use std::collections::HashSet;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use dashmap::DashMap;
use futures_util::stream::{self, BoxStream, StreamExt as _};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tracing::warn;

use super::attachment::{Attachment, LINKS, Member, NamespaceListeners};
use super::cgroup::{self, CgroupError, Cgroups, FirstProcess};
use super::cgroup_watch;
use super::netns::open_in;
use super::sock_diag::DiagSocket;
use crate::clock::Clock;
use crate::containers::reconciler::{Kernel, Run, RunStart};
use crate::containers::{CgroupId, ContainerId, NamespaceId, NetworkMode, Open, RunHandle, SocketEvidence};
use crate::descriptors;
use crate::logging::with_causes;

/// The name of the link to the service, in each network namespace.
const LINK: &str = "imds0";

/// This host's kernel.
pub struct HostKernel {
    cgroups: Cgroups,
    host: NamespaceId,
    listeners: Arc<dyn NamespaceListeners>,
    clock: Clock,
    runtime: Handle,
    /// Namespaces that some life is in.
    namespaces: DashMap<NamespaceId, Weak<Namespace>>,
    /// Sockets of the host's namespace that are older than the rules, by their cookies.
    earlier: Arc<OnceLock<HashSet<u64>>>,
}

/// Why the kernel cannot prove anything here.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No cgroup v2.
    #[error(transparent)]
    Cgroups(#[from] CgroupError),
    /// This process's own namespace cannot be looked at.
    #[error("this host's network namespace cannot be told from others: {0}")]
    Namespace(String),
    /// The sockets of the host cannot be listed.
    #[error(
        "cannot list the TCP connections of this host (sock_diag): {0}\nhint: sudo modprobe --all inet_diag tcp_diag"
    )]
    Sockets(io::Error),
}

impl HostKernel {
    /// Must be called within the runtime whose tasks wait for lives to end.
    ///
    /// # Errors
    /// When this host cannot prove who made a connection.
    pub fn new(listeners: Arc<dyn NamespaceListeners>, clock: Clock) -> Result<Self, KernelError> {
        let cgroups = Cgroups::find()?;
        let host = cgroups.host_namespace().map_err(KernelError::Namespace)?;
        Ok(Self {
            cgroups,
            host,
            listeners,
            clock,
            runtime: Handle::current(),
            namespaces: DashMap::new(),
            earlier: Arc::default(),
        })
    }

    /// Remembers the sockets of the host's namespace whose other end is one of `servers`, where the service is. Before the rules were in
    /// place, another process could answer there, and it may still be their other end: they prove nothing. Call it once, when the
    /// rules are in place and no connection has been accepted.
    ///
    /// # Errors
    /// When the kernel does not list them.
    pub async fn remember_earlier_sockets(&self, servers: Vec<SocketAddr>) -> Result<(), KernelError> {
        // A dump reads the tables of the whole machine.
        let dump = tokio::task::spawn_blocking(move || DiagSocket::open()?.connected_to(&servers));
        let cookies = dump.await.map_err(io::Error::other).flatten();
        let cookies: HashSet<u64> = cookies.map_err(KernelError::Sockets)?.into_iter().collect();
        if !cookies.is_empty() {
            let count = cookies.len();
            warn!(
                count,
                "sockets of this host were connected to the address of the service before the daemon started"
            );
        }
        let _ = self.earlier.set(cookies);
        Ok(())
    }

    /// The host's own network namespace.
    pub fn host_namespace(&self) -> NamespaceId {
        self.host
    }

    /// The namespace that the first process is in: one object for all who share it.
    fn namespace(&self, first: &FirstProcess) -> io::Result<Arc<Namespace>> {
        if let Some(known) = self.namespaces.get(&first.namespace).and_then(|known| known.upgrade()) {
            return Ok(known);
        }
        let diag = if first.namespace == self.host {
            DiagSocket::open()?
        } else {
            open_in(first.pidfd.as_fd(), || {
                // A process can leave its namespace between two looks.
                if Cgroups::this_threads_namespace()? != first.namespace {
                    return Err(io::Error::other(
                        "its first process has just changed its network namespace",
                    ));
                }
                DiagSocket::open()
            })?
        };
        let namespace = Arc::new(Namespace {
            id: first.namespace,
            is_host: first.namespace == self.host,
            earlier: self.earlier.clone(),
            diag,
            attachment: Attachment::new(
                first.namespace,
                self.listeners.clone(),
                self.clock.clone(),
                self.runtime.clone(),
            ),
        });
        // Two births at once in one namespace: the second finds the first one's.
        let mut entry = self.namespaces.entry(first.namespace).or_default();
        if let Some(known) = entry.upgrade() {
            return Ok(known);
        }
        *entry = Arc::downgrade(&namespace);
        drop(entry);
        self.namespaces.retain(|_, namespace| namespace.strong_count() > 0);
        Ok(namespace)
    }
}

impl Kernel for HostKernel {
    fn appearing(&self) -> BoxStream<'static, ContainerId> {
        cgroup_watch::appearing(self.cgroups.root(), &self.runtime).unwrap_or_else(|error| {
            warn!(%error, "cgroups that appear are not seen: the first requests of Podman's containers may be refused");
            stream::pending().boxed()
        })
    }

    fn run_start(&self, id: &ContainerId, run: Option<&Run>, mode: Option<&NetworkMode>) -> Result<RunStart, String> {
        let first = self.cgroups.first_process(id, run.map(|run| run.pid), mode)?;
        let namespace = self.namespace(&first).map_err(|error| {
            descriptors::note(LINKS, &error);
            format!("its network namespace cannot be entered: {error}")
        })?;
        let FirstProcess {
            directory,
            cgroup,
            pid,
            pidfd,
            started,
            ..
        } = first;
        let _runtime = self.runtime.enter();
        #[expect(
            deprecated,
            reason = "an OwnedFd is and stays one descriptor, which is what the unsafe successor asks for"
        )]
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)
            .map_err(|error| format!("its first process cannot be watched: {error}"))?;
        Ok(RunStart {
            cgroup,
            pid,
            started,
            handle: Arc::new(KernelRunHandle {
                directory,
                cgroup,
                pidfd: Arc::new(pidfd),
                namespace,
                attached: AtomicBool::new(false),
            }),
        })
    }
}

/// A network namespace that at least one life is in. Goes with the last of them, and lets the kernel's go.
struct Namespace {
    id: NamespaceId,
    is_host: bool,
    /// Sockets of the host's namespace that are older than the rules.
    earlier: Arc<OnceLock<HashSet<u64>>>,
    /// Keeps the namespace from vanishing, and its number from being used again.
    diag: DiagSocket,
    attachment: Arc<Attachment>,
}

struct KernelRunHandle {
    directory: PathBuf,
    cgroup: CgroupId,
    pidfd: Member,
    namespace: Arc<Namespace>,
    /// Whether this very witness has attached: a run may be found twice, and the second finding is dropped at once.
    attached: AtomicBool,
}

impl Drop for KernelRunHandle {
    fn drop(&mut self) {
        if self.attached.load(Ordering::Acquire) {
            self.namespace.attachment.forget(self.cgroup);
        }
    }
}

impl RunHandle for KernelRunHandle {
    fn alive(&self) -> bool {
        cgroup::alive(self.pidfd.get_ref())
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        Box::pin(async {
            // An error means that the runtime goes down: then nobody is to be told that a container has ended.
            if self.pidfd.readable().await.is_err() {
                std::future::pending().await
            }
        })
    }

    fn socket(&self, client: SocketAddr, server: SocketAddr) -> io::Result<Option<SocketEvidence>> {
        let found = self.namespace.diag.find(client, server, LINK)?;
        let is_earlier = |cookie| {
            self.namespace
                .earlier
                .get()
                .is_some_and(|earlier| earlier.contains(&cookie))
        };
        Ok(found.map(|socket| match is_earlier(socket.cookie) {
            true => SocketEvidence {
                open: Open::Earlier,
                ..socket
            },
            false => socket,
        }))
    }

    fn socket_now(&self, client: SocketAddr, server: SocketAddr) -> io::Result<Option<(u8, u64)>> {
        self.namespace.diag.find_now(client, server, LINK)
    }

    fn is_local(&self, address: IpAddr) -> io::Result<bool> {
        self.namespace.attachment.is_local(&self.pidfd, address)
    }

    fn owns_cgroup(&self, cgroup: CgroupId) -> io::Result<bool> {
        cgroup::owns_cgroup(&self.directory, self.cgroup, cgroup)
    }

    fn namespace(&self) -> NamespaceId {
        self.namespace.id
    }

    fn is_attached(&self) -> bool {
        self.namespace.attachment.is_attached()
    }

    fn attach(&self) -> Result<Vec<String>, String> {
        // The host's own listener serves the processes of the host's network.
        if self.namespace.is_host {
            return Ok(Vec::new());
        }
        let attached = self.namespace.attachment.attach(self.cgroup, &self.pidfd);
        self.attached.fetch_or(attached.is_ok(), Ordering::AcqRel);
        attached.map_err(|error| {
            descriptors::note(LINKS, &error);
            with_causes(&error)
        })
    }

    fn detach(&self) -> Result<(), String> {
        let detached = self.namespace.attachment.detach(self.cgroup, &self.pidfd);
        detached.map_err(|error| with_causes(&error))
    }

    fn path_problem(&self) -> Option<String> {
        self.namespace.attachment.problem()
    }

    fn check_path(&self) -> Result<(), String> {
        match self.namespace.is_host {
            true => Ok(()),
            false => self.namespace.attachment.check(),
        }
    }
}
