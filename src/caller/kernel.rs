//! The real kernel behind [`Kernel`] and [`Witness`].

use std::collections::BTreeSet;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use dashmap::DashMap;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::cgroup::{self, CgroupError, Cgroups, FirstProcess};
use super::connection::Interfaces;
use super::namespace::open_in;
use super::socket::DiagSocket;
use crate::containers::watcher::{Birth, Kernel, Run};
use crate::containers::{CgroupId, ContainerId, LinkSeen, NamespaceId, NetworkMode, SocketEvidence, Witness};
use crate::telemetry::with_causes;

/// How the service comes to listen inside a network namespace, and leaves it. `open` and `close` are called on a thread
/// that is inside.
pub trait Doors: Send + Sync + 'static {
    /// Puts addresses and rules up, and listens, at those addresses of the service that this namespace can have now. What is
    /// `open` already stays so; what is missing of its addresses and rules is put back.
    ///
    /// # Errors
    /// Why not; nothing new is left then.
    fn open(&self, open: &[SocketAddr]) -> io::Result<Opened>;

    /// Takes addresses and rules down.
    ///
    /// # Errors
    /// What is left, and why.
    fn close(&self) -> io::Result<()>;

    /// Serves what the listeners accept, until aborted.
    fn serve(&self, opened: Opened, namespace: NamespaceId) -> AbortHandle;
}

/// How often, and how many times, is looked for what the engine takes away while it sets a namespace's network up: for two
/// seconds after the life's first process is there, at most.
const LOOKED_FOR: Duration = Duration::from_millis(5);
const TIMES: u32 = 400;

/// The service, open inside a network namespace.
#[derive(Default)]
pub struct Opened {
    /// One an address, and the interfaces that who lives there comes in over, as the kernel tells it: those that have the
    /// address.
    pub listeners: Vec<(TcpListener, Vec<u32>)>,
    /// The interfaces in there, where who comes in over one of its bridges is to be heard.
    pub bridges: Option<Interfaces>,
    /// What another program had put there; it stays.
    pub left_alone: Vec<String>,
}

/// This host's kernel.
pub struct HostKernel {
    cgroups: Cgroups,
    host: NamespaceId,
    doors: Arc<dyn Doors>,
    runtime: Handle,
    /// Namespaces that some life is in.
    namespaces: DashMap<NamespaceId, Weak<Namespace>>,
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
}

impl HostKernel {
    /// Must be called within the runtime whose tasks wait for lives to end.
    ///
    /// # Errors
    /// When this host cannot prove who made a connection.
    pub fn new(doors: Arc<dyn Doors>) -> Result<Self, KernelError> {
        let cgroups = Cgroups::find()?;
        let host = cgroups.host_namespace().map_err(KernelError::Namespace)?;
        Ok(Self {
            cgroups,
            host,
            doors,
            runtime: Handle::current(),
            namespaces: DashMap::new(),
        })
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
            diag,
            doors: self.doors.clone(),
            door: Mutex::default(),
            listens: AtomicBool::new(false),
            settled: AtomicBool::new(false),
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
    fn birth(&self, id: &ContainerId, run: Option<&Run>, mode: Option<&NetworkMode>) -> Result<Birth, String> {
        let first = self.cgroups.first_process(id, run.map(|run| run.pid), mode)?;
        let namespace = self
            .namespace(&first)
            .map_err(|error| format!("its network namespace cannot be entered: {error}"))?;
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
        Ok(Birth {
            cgroup,
            pid,
            started,
            witness: Box::new(KernelWitness {
                directory,
                cgroup,
                pidfd,
                namespace,
                attached: AtomicBool::new(false),
                calls: AtomicU64::new(0),
            }),
        })
    }
}

/// A network namespace that at least one life is in. Goes with the last of them, and lets the kernel's go.
struct Namespace {
    id: NamespaceId,
    is_host: bool,
    /// Keeps the namespace from vanishing, and its number from being used again.
    diag: DiagSocket,
    doors: Arc<dyn Doors>,
    door: Mutex<Door>,
    /// Whether the door is open, or being opened: from then on nobody in it is heard over a bridge.
    listens: AtomicBool,
    /// Whether the engine is done with its network. Before that its IPv6 address comes and goes, and who asks there may be led
    /// to the host instead.
    settled: AtomicBool,
}

/// The service inside a namespace: there while somebody in it wants it.
#[derive(Default)]
struct Door {
    wanted_by: BTreeSet<CgroupId>,
    /// Where it listens.
    open: Vec<SocketAddr>,
    serving: Vec<AbortHandle>,
    left_alone: Vec<String>,
}

impl Door {
    fn abort(&mut self) {
        self.open.clear();
        self.serving.drain(..).for_each(|serving| serving.abort());
    }
}

struct KernelWitness {
    directory: PathBuf,
    cgroup: CgroupId,
    pidfd: AsyncFd<OwnedFd>,
    namespace: Arc<Namespace>,
    /// Whether this very witness has attached: a life may be found twice, and the second finding is dropped at once.
    attached: AtomicBool,
    /// How often it was to attach or to detach: the last call has the say.
    calls: AtomicU64,
}

impl Drop for KernelWitness {
    fn drop(&mut self) {
        if !self.attached.load(Ordering::Acquire) {
            return;
        }
        let mut door = self.namespace.door.lock().unwrap_or_else(PoisonError::into_inner);
        door.wanted_by.remove(&self.cgroup);
        if door.wanted_by.is_empty() {
            // Who else lives there is not served; address and rules refuse until the namespace goes.
            door.abort();
        }
    }
}

impl KernelWitness {
    fn inside<T: Send>(&self, what: impl FnOnce(&dyn Doors) -> io::Result<T> + Send) -> io::Result<T> {
        let namespace = &self.namespace;
        open_in(self.pidfd.get_ref().as_fd(), || {
            if Cgroups::this_threads_namespace()? != namespace.id {
                return Err(io::Error::other("its first process has changed its network namespace"));
            }
            what(namespace.doors.as_ref())
        })
    }

    /// Has the service listen, unless another call for this life came after the one with this number.
    fn attach_now(&self, number: u64) -> Result<Vec<String>, String> {
        let mut door = self.namespace.door.lock().unwrap_or_else(PoisonError::into_inner);
        if self.calls.load(Ordering::Acquire) != number {
            return Ok(door.left_alone.clone());
        }
        let listened = self.namespace.listens.swap(true, Ordering::AcqRel);
        let open = door.open.clone();
        let mut opened = self.inside(|doors| doors.open(&open)).map_err(|error| {
            self.namespace.listens.store(listened, Ordering::Release);
            with_causes(&error)
        })?;
        door.left_alone.append(&mut opened.left_alone);
        if !opened.listeners.is_empty() {
            let local = opened.listeners.iter().filter_map(|(it, _)| it.local_addr().ok());
            door.open.extend(local);
            door.serving.push(self.namespace.doors.serve(opened, self.namespace.id));
        }
        door.wanted_by.insert(self.cgroup);
        self.attached.store(true, Ordering::Release);
        Ok(door.left_alone.clone())
    }
}

impl Witness for KernelWitness {
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
        self.namespace.diag.find(client, server)
    }

    fn holds(&self, cgroup: CgroupId) -> bool {
        cgroup::holds(&self.directory, self.cgroup, cgroup)
    }

    fn namespace(&self) -> NamespaceId {
        self.namespace.id
    }

    fn links(&self) -> io::Result<Vec<LinkSeen>> {
        self.namespace.diag.links()
    }

    fn listens_inside(&self, at: IpAddr) -> bool {
        let namespace = &self.namespace;
        namespace.listens.load(Ordering::Acquire) && (at.is_ipv4() || namespace.settled.load(Ordering::Acquire))
    }

    fn attach(&self, settled: bool) -> Result<Vec<String>, String> {
        // The host's own listener serves who is in the host's network.
        if self.namespace.is_host {
            return Ok(Vec::new());
        }
        let number = self.calls.fetch_add(1, Ordering::AcqRel) + 1;
        let mut left_alone = self.attach_now(number)?;
        let superseded = || self.calls.load(Ordering::Acquire) != number || !self.alive();
        if !settled {
            for _ in 0..TIMES {
                std::thread::sleep(LOOKED_FOR);
                if superseded() {
                    return Ok(left_alone);
                }
                left_alone = self.attach_now(number)?;
            }
        }
        self.namespace.settled.store(true, Ordering::Release);
        Ok(left_alone)
    }

    fn detach(&self) -> Result<(), String> {
        let mut door = self.namespace.door.lock().unwrap_or_else(PoisonError::into_inner);
        self.calls.fetch_add(1, Ordering::AcqRel);
        if !door.wanted_by.remove(&self.cgroup) || !door.wanted_by.is_empty() {
            return Ok(());
        }
        door.abort();
        self.inside(Doors::close).map_err(|error| with_causes(&error))?;
        self.namespace.listens.store(false, Ordering::Release);
        Ok(())
    }
}
