//! Podman's containers, as their cgroups appear (inotify(7)).
//!
//! Podman announces a container up to 250 ms after its first instruction, and does not answer questions about it while it
//! starts. Its cgroup appears about 50 ms before the first instruction: time enough for the link. The name of a cgroup only
//! says which container to look up; nothing is served because of it.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use futures_util::stream::{self, BoxStream, StreamExt as _};
use rustix::fs::inotify::{self, CreateFlags, Reader, WatchFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use crate::containers::ContainerId;

/// Where Podman puts the cgroups of containers, with the drivers cgroupfs and systemd.
const PARENTS: [&str; 2] = ["libpod_parent", "machine.slice"];
/// How it names them, around the ID.
const NAME: (&str, &str) = ("libpod-", ".scope");
/// Appearances that wait for the reconciler; one that does not fit is announced by Podman later.
const WAITING: usize = 256;

/// The containers whose cgroups appear below `root`, the mount point of cgroup v2, from now on.
///
/// # Errors
/// When the kernel does not watch directories.
pub(super) fn appearing(root: &Path, runtime: &Handle) -> io::Result<BoxStream<'static, ContainerId>> {
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let _runtime = runtime.enter();
    #[expect(
        deprecated,
        reason = "an OwnedFd is and stays one descriptor, which is what the unsafe successor asks for"
    )]
    let inotify = AsyncFd::with_interest(inotify, Interest::READABLE)?;
    let mut watches = Watches {
        inotify,
        root: root.to_owned(),
        parents: HashMap::new(),
    };
    watches.watch_root()?;
    for parent in PARENTS {
        // Containers that run already are in Podman's list.
        watches.watch_parent(parent);
    }
    let (sender, mut receiver) = mpsc::channel(WAITING);
    runtime.spawn(watch(watches, sender));
    Ok(stream::poll_fn(move |cx| receiver.poll_recv(cx)).boxed())
}

struct Watches {
    inotify: AsyncFd<OwnedFd>,
    root: PathBuf,
    /// The directories that are watched, by the number of the watch. That of `root` has none.
    parents: HashMap<i32, PathBuf>,
}

impl Watches {
    fn watch_root(&self) -> io::Result<()> {
        let flags = WatchFlags::CREATE | WatchFlags::ONLYDIR;
        inotify::add_watch(self.inotify.get_ref(), &self.root, flags)?;
        Ok(())
    }

    /// Watches a parent, if it exists. Returns its directory if it was not watched before.
    fn watch_parent(&mut self, parent: &str) -> Option<PathBuf> {
        let path = self.root.join(parent);
        let flags = WatchFlags::CREATE | WatchFlags::ONLYDIR;
        let number = inotify::add_watch(self.inotify.get_ref(), &path, flags).ok()?;
        self.parents.insert(number, path.clone()).is_none().then_some(path)
    }

    /// The containers that a new directory stands for: itself, or, if it is a new parent, those that are in it by now.
    fn appeared(&mut self, watch: i32, name: &str) -> Vec<ContainerId> {
        if self.parents.contains_key(&watch) {
            return container(name).into_iter().collect();
        }
        let parent = PARENTS.contains(&name).then(|| self.watch_parent(name)).flatten();
        let entries = parent.and_then(|path| std::fs::read_dir(path).ok());
        let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| container(name.to_str()?)).collect()
    }

    /// All that has happened.
    fn read(&mut self) -> Vec<ContainerId> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut created = Vec::new();
        let mut reader = Reader::new(self.inotify.get_ref(), &mut buffer);
        // Ends with EAGAIN, as a rule.
        while let Ok(event) = reader.next() {
            if let Some(Ok(name)) = event.file_name().map(|name| name.to_str()) {
                created.push((event.wd(), name.to_owned()));
            }
        }
        let created = created.into_iter();
        created.flat_map(|(watch, name)| self.appeared(watch, &name)).collect()
    }
}

/// The container that a cgroup of that name belongs to.
fn container(name: &str) -> Option<ContainerId> {
    let id = name.strip_prefix(NAME.0)?;
    ContainerId::parse(id.strip_suffix(NAME.1).unwrap_or(id))
}

/// Sends what appears, until the receiver is gone.
async fn watch(mut watches: Watches, sender: mpsc::Sender<ContainerId>) {
    loop {
        match watches.inotify.readable().await {
            Ok(mut ready) => ready.clear_ready(),
            Err(_) => return,
        }
        for id in watches.read() {
            match sender.try_send(id) {
                Err(mpsc::error::TrySendError::Closed(_)) => return,
                Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn containers_appear_below_parents_that_exist_or_come() {
        let root = tempfile::tempdir().unwrap();
        let make = |path: String| std::fs::create_dir(root.path().join(path)).unwrap();
        let id = |digits: &str| digits.repeat(32);
        make("machine.slice".to_owned());
        make(format!("machine.slice/libpod-{}.scope", id("00")));
        let mut appearing = appearing(root.path(), &Handle::current()).unwrap();
        make("docker".to_owned());
        make(format!("docker/libpod-{}", id("11")));
        make(format!("machine.slice/libpod-conmon-{}.scope", id("22")));
        make(format!("machine.slice/libpod-{}.scope", id("33")));
        assert_eq!(appearing.next().await.unwrap().as_str(), id("33"));
        make("libpod_parent".to_owned());
        make(format!("libpod_parent/libpod-{}", id("44")));
        assert_eq!(appearing.next().await.unwrap().as_str(), id("44"));
        make(format!("libpod_parent/libpod-{}", id("55")));
        assert_eq!(appearing.next().await.unwrap().as_str(), id("55"));
    }
}
