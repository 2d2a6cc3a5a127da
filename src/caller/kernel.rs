//! The real kernel behind [`Kernel`] and [`Witness`].

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::pin::Pin;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;

use super::cgroup::{self, CgroupError, Cgroups, FirstProcess};
use super::namespace::open_in;
use super::socket::DiagSocket;
use crate::containers::watcher::{Birth, Kernel};
use crate::containers::{CgroupId, ContainerId, SocketEvidence, Witness};

/// This host's kernel.
#[derive(Debug)]
pub struct HostKernel {
    cgroups: Cgroups,
    runtime: Handle,
}

impl HostKernel {
    /// Must be called within the runtime whose tasks wait for lives to end.
    ///
    /// # Errors
    /// When this host has no cgroup v2: then no connection can be proven.
    pub fn new() -> Result<Self, CgroupError> {
        Ok(Self {
            cgroups: Cgroups::find()?,
            runtime: Handle::current(),
        })
    }
}

impl Kernel for HostKernel {
    fn birth(&self, id: &ContainerId, pid: Option<u32>) -> Result<Birth, String> {
        let FirstProcess {
            directory,
            cgroup,
            pid,
            pidfd,
            started,
        } = self.cgroups.first_process(id, pid)?;
        let diag = open_in(pidfd.as_fd(), DiagSocket::open)
            .map_err(|error| format!("its network namespace cannot be entered: {error}"))?;
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
                diag,
            }),
        })
    }
}

struct KernelWitness {
    directory: PathBuf,
    cgroup: CgroupId,
    pidfd: AsyncFd<OwnedFd>,
    /// Stays in the container's namespace, and keeps that from vanishing: it goes with the life.
    diag: DiagSocket,
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
        self.diag.find(client, server)
    }

    fn holds(&self, cgroup: CgroupId) -> bool {
        cgroup::holds(&self.directory, self.cgroup, cgroup)
    }
}
