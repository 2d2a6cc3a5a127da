//! A container's cgroup: where it is, its id, its first process.
//!
//! Names of cgroups prove nothing: anybody with a delegated cgroup makes one of any name. What proves is the id of the
//! directory that holds the verified first process; names only say where to look for that process.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::containers::{CgroupId, ContainerId, NamespaceId, NetworkMode};
use crate::descriptors;

/// Directories below a container's cgroup that are looked through for a process or an id: enough for systemd in a
/// container, too few to keep the daemon busy.
const DIRECTORIES: usize = 512;

/// Where engines put a container's cgroup unless they are told otherwise, around its id: Docker and Podman, with the drivers
/// cgroupfs and systemd. Names only say where to look.
const USUAL: [(&str, &str); 4] = [
    ("docker/", ""),
    ("system.slice/docker-", ".scope"),
    ("libpod_parent/libpod-", ""),
    ("machine.slice/libpod-", ".scope"),
];

/// Where this host keeps cgroups and processes.
#[derive(Clone, Debug)]
pub struct Cgroups {
    /// Mount point of the cgroup v2 hierarchy.
    root: PathBuf,
    proc: PathBuf,
}

/// A container's first process, verified.
#[derive(Debug)]
pub struct FirstProcess {
    /// The container's cgroup directory.
    pub directory: PathBuf,
    /// Its id.
    pub cgroup: CgroupId,
    /// The process.
    pub pid: u32,
    /// A handle on exactly this process: numbers are used again, handles are not.
    pub pidfd: OwnedFd,
    /// When it started.
    pub started: SystemTime,
    /// Its network namespace.
    pub namespace: NamespaceId,
}

/// Why the host's cgroups cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `/proc/self/mountinfo` cannot be read.
    #[error("cannot read {path}")]
    Unreadable {
        /// Which file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// There is no cgroup v2.
    #[error(
        "no cgroup v2 hierarchy is mounted: the kernel cannot say which container a socket belongs to\n\
         hint: mount -t cgroup2 none /sys/fs/cgroup/unified; in a container: --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup:ro"
    )]
    NoVersion2,
}

impl Cgroups {
    /// Looks where cgroup v2 is mounted: the whole tree, or beside version 1.
    ///
    /// # Errors
    /// When it is nowhere.
    pub fn find() -> Result<Self, CgroupError> {
        let path = "/proc/self/mountinfo";
        let table = fs::read_to_string(path).map_err(|source| CgroupError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        let root = mount_point(&table).ok_or(CgroupError::NoVersion2)?;
        Ok(Self {
            root,
            proc: "/proc".into(),
        })
    }

    /// Mount point of the cgroup v2 hierarchy.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// With other roots, for tests.
    pub fn at(root: impl Into<PathBuf>, proc: impl Into<PathBuf>) -> Self {
        Self {
            root: root.into(),
            proc: proc.into(),
        }
    }

    /// Finds a container's first process: where Docker's default parents put its cgroup, or by the number that the
    /// engine says. Then verifies it, whichever way it came. `mode`: whose network namespace the engine says that it is in;
    /// unknown is one of its own.
    ///
    /// # Errors
    /// Why it is not there, or not yet.
    pub fn first_process(
        &self,
        id: &ContainerId,
        pid: Option<u32>,
        mode: Option<&NetworkMode>,
    ) -> Result<FirstProcess, String> {
        let usual = USUAL.map(|(before, after)| format!("{before}{}{after}", id.as_str()));
        let mut why = "its cgroup is not there".to_owned();
        for directory in usual
            .map(|path| self.root.join(path))
            .into_iter()
            .filter(|path| path.is_dir())
        {
            match self.first_in(&directory) {
                Ok(pid) => match self.verify(&directory, pid, mode, true) {
                    Ok(first) => return Ok(first),
                    Err(error) => why = error,
                },
                Err(error) => why = error,
            }
        }
        let Some(pid) = pid else { return Err(why) };
        let path = self
            .cgroup_of(pid)
            .map_err(|error| format!("process {pid} that the engine names: {error}"))?;
        let directory = self.container_directory(&path, id)?;
        self.verify(&directory, pid, mode, false)
    }

    /// The process of a container's cgroup that is number 1 in a PID namespace of its own, the outermost of those.
    fn first_in(&self, path: &Path) -> Result<u32, String> {
        let mut first: Option<(usize, u32)> = None;
        for directory in below(path) {
            let list = directory
                .map_err(|error| unreadable(path, &error))?
                .join("cgroup.procs");
            let processes = unless_scarce(fs::read_to_string(&list)).map_err(|error| unreadable(&list, &error))?;
            for pid in processes.lines().filter_map(|line| line.parse().ok()) {
                let status = self.proc.join(format!("{pid}/status"));
                // A process that ends meanwhile is not the first: the first ends last.
                let status = unless_scarce(fs::read_to_string(&status)).map_err(|error| unreadable(&status, &error))?;
                let Ok(numbers) = namespace_pids(&status) else {
                    continue;
                };
                if numbers.last() == Some(&1) && first.is_none_or(|(depth, _)| numbers.len() < depth) {
                    first = Some((numbers.len(), pid));
                }
            }
            if first.is_some() {
                break;
            }
        }
        first.map(|(_, pid)| pid).ok_or_else(|| {
            "no process of its cgroup is number 1 of a PID namespace (still starting, or --pid host)".to_owned()
        })
    }

    fn verify(
        &self,
        directory: &Path,
        pid: u32,
        mode: Option<&NetworkMode>,
        own_pid_namespace: bool,
    ) -> Result<FirstProcess, String> {
        let id = |directory: &Path| {
            fs::metadata(directory)
                .map(|it| it.ino())
                .map_err(|error| error.to_string())
        };
        let cgroup = id(directory)?;
        let number = i32::try_from(pid)
            .ok()
            .and_then(Pid::from_raw)
            .ok_or("not a process number")?;
        let pidfd = pidfd_open(number, PidfdFlags::empty())
            .map_err(io::Error::from)
            .and_then(descriptors::for_link)
            .map_err(|error| {
                descriptors::note(STARTS, &error);
                format!("process {pid}: {error}")
            })?;
        // From here on the handle holds the process; everything read before may have been somebody else's.
        let path = self.cgroup_of(pid)?;
        if !path.starts_with(directory) {
            return Err(format!(
                "process {pid} is in cgroup {}, not in {}",
                path.display(),
                directory.display()
            ));
        }
        if id(directory)? != cgroup {
            return Err("its cgroup was made anew meanwhile".to_owned());
        }
        if own_pid_namespace && self.namespace_pids(pid)?.last() != Some(&1) {
            return Err(format!("process {pid} is not number 1 of a PID namespace"));
        }
        let (namespace, host) = (self.network_namespace(&pid.to_string())?, self.host_namespace()?);
        // Early stages of the runtime are still in the host's: only for a container that belongs there is that the end.
        match mode.unwrap_or(&NetworkMode::Own) {
            NetworkMode::Own if namespace == host => {
                return Err("its first process is in the host's network namespace".to_owned());
            }
            NetworkMode::Host if namespace != host => {
                return Err("its first process is not in the host's network namespace".to_owned());
            }
            _ => {}
        }
        let started = self.started(pid)?;
        if !alive(&pidfd) {
            return Err("its first process has ended".to_owned());
        }
        Ok(FirstProcess {
            directory: directory.to_owned(),
            cgroup: CgroupId(cgroup),
            pid,
            pidfd,
            started,
            namespace,
        })
    }

    /// The directory of a process's cgroup on the v2 hierarchy.
    fn cgroup_of(&self, pid: u32) -> Result<PathBuf, String> {
        let table = self.read(&format!("{pid}/cgroup"))?;
        // `0::/path` (cgroups(7)).
        let path = table
            .lines()
            .find_map(|line| line.strip_prefix("0::/"))
            .ok_or("no cgroup v2 of its own")?;
        if path.is_empty() || path.split('/').any(|part| part == "..") {
            return Err("its cgroup is outside of what this process sees (a private cgroup namespace?)".to_owned());
        }
        Ok(self.root.join(path))
    }

    /// The part of a first process's path that is the container's own: up to the part that carries its id, if one does
    /// (below it the container made its own), else all of it.
    fn container_directory(&self, path: &Path, id: &ContainerId) -> Result<PathBuf, String> {
        let below = path
            .strip_prefix(&self.root)
            .map_err(|_| "its cgroup is not below the root".to_owned())?;
        let mut directory = self.root.clone();
        for part in below.components() {
            directory.push(part);
            if part.as_os_str().to_string_lossy().contains(id.as_str()) {
                return Ok(directory);
            }
        }
        Err(format!(
            "its first process is in cgroup {}, which does not carry its id",
            path.display()
        ))
    }

    fn namespace_pids(&self, pid: u32) -> Result<Vec<u32>, String> {
        namespace_pids(&self.read(&format!("{pid}/status"))?)
    }

    /// The network namespace of this process: the host's.
    ///
    /// # Errors
    /// When the kernel does not show it.
    pub fn host_namespace(&self) -> Result<NamespaceId, String> {
        self.network_namespace("self")
    }

    /// The network namespace of the calling thread, wherever that has gone.
    ///
    /// # Errors
    /// When the kernel does not show it.
    pub fn this_threads_namespace() -> io::Result<NamespaceId> {
        Ok(NamespaceId(fs::metadata("/proc/thread-self/ns/net")?.ino()))
    }

    fn network_namespace(&self, process: &str) -> Result<NamespaceId, String> {
        let path = self.proc.join(process).join("ns/net");
        fs::metadata(&path)
            .map(|it| NamespaceId(it.ino()))
            .map_err(|error| unreadable(&path, &error))
    }

    /// When a process started: field 22 of `stat`, in clock ticks after boot (proc_pid_stat(5)).
    fn started(&self, pid: u32) -> Result<SystemTime, String> {
        let stat = self.read(&format!("{pid}/stat"))?;
        // The name in field 2 may hold anything, closing brackets included.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let ticks: u64 = after_name
            .split_whitespace()
            .nth(19)
            .and_then(|it| it.parse().ok())
            .ok_or("unreadable stat")?;
        let boot = self.read("stat")?;
        let boot: u64 = boot
            .lines()
            .find_map(|line| line.strip_prefix("btime "))
            .and_then(|it| it.trim().parse().ok())
            .ok_or("no boot time")?;
        let per_second = rustix::param::clock_ticks_per_second().max(1);
        Ok(UNIX_EPOCH + Duration::from_secs(boot) + Duration::from_millis(ticks * 1000 / per_second))
    }

    fn read(&self, path: &str) -> Result<String, String> {
        let path = self.proc.join(path);
        fs::read_to_string(&path).map_err(|error| unreadable(&path, &error))
    }
}

/// The work of finding the processes of a container that starts, in the counts of shortages.
const STARTS: &str = "containers that start";

fn unreadable(path: &Path, error: &io::Error) -> String {
    descriptors::note(STARTS, error);
    format!("cannot read {}: {error}", path.display())
}

/// Reads nothing where the kernel reports that there is nothing to read; an error only if no descriptor was left.
fn unless_scarce<T: Default>(read: io::Result<T>) -> io::Result<T> {
    match read {
        Err(error) if descriptors::is_shortage(&error) => Err(error),
        read => Ok(read.unwrap_or_default()),
    }
}

/// The numbers of a process in its PID namespaces, the outermost first, by its `status` (proc_pid_status(5)).
fn namespace_pids(status: &str) -> Result<Vec<u32>, String> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("NSpid:"))
        .ok_or("the kernel shows no NSpid")?;
    Ok(line.split_whitespace().filter_map(|it| it.parse().ok()).collect())
}

/// Whether the process behind a handle still runs: the handle becomes readable when it ends (pidfd_open(2)).
pub fn alive(pidfd: &OwnedFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    // A poll that fails proves no life.
    matches!(poll(&mut fds, Some(&at_once)), Ok(0))
}

/// Whether a cgroup is `directory`'s or lies below it.
///
/// # Errors
/// When a directory cannot be read because no descriptor is left.
pub fn owns_cgroup(directory: &Path, own: CgroupId, cgroup: CgroupId) -> io::Result<bool> {
    if own == cgroup {
        return Ok(true);
    }
    for directory in below(directory).skip(1) {
        if fs::metadata(directory?).is_ok_and(|it| it.ino() == cgroup.0) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A directory and those below it, outermost first. An error if no descriptor is left.
fn below(directory: &Path) -> impl Iterator<Item = io::Result<PathBuf>> {
    let mut left = std::collections::VecDeque::from([directory.to_owned()]);
    std::iter::from_fn(move || {
        let next = left.pop_front()?;
        let directories = match unless_scarce(fs::read_dir(&next).map(Some)) {
            Ok(entries) => entries.into_iter().flatten().flatten(),
            Err(error) => return Some(Err(error)),
        };
        let directories = directories.filter(|it| it.file_type().is_ok_and(|it| it.is_dir()));
        left.extend(directories.map(|it| it.path()));
        left.truncate(DIRECTORIES);
        Some(Ok(next))
    })
    .take(DIRECTORIES)
}

/// The mount point of cgroup v2 in `/proc/self/mountinfo` (proc_pid_mountinfo(5)): field 5, and the type after ` - `.
fn mount_point(table: &str) -> Option<PathBuf> {
    table.lines().find_map(|line| {
        let (mount, source) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        // Field 4 is the root of the mount: anything but `/` is a part of the tree only.
        let (root, point) = (fields.next()?, fields.next()?);
        (source.split(' ').next() == Some("cgroup2") && root == "/").then(|| PathBuf::from(point))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_of_version_2_is_found_alone_and_beside_version_1() {
        let hybrid = "24 18 0:21 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                      25 24 0:22 / /sys/fs/cgroup/unified rw,nosuid shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(mount_point(hybrid), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(
            mount_point("30 24 0:26 / /sys/fs/cgroup rw - cgroup2 none rw\n"),
            Some("/sys/fs/cgroup".into())
        );
        assert_eq!(
            mount_point("30 24 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 none rw\n"),
            None
        );
        assert_eq!(mount_point("24 18 0:21 / /sys/fs/cgroup ro - cgroup cpu ro\n"), None);
    }

    /// A tree like the kernel's: cgroups below `c`, processes below `p`.
    struct Host {
        dir: tempfile::TempDir,
    }

    impl Host {
        fn new() -> Self {
            let host = Self {
                dir: tempfile::tempdir().unwrap(),
            };
            host.write("p/stat", "cpu 1\nbtime 1700000000\n");
            host.process("self", "/", "1", "net-host");
            host
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn process(&self, pid: &str, cgroup: &str, nspid: &str, net: &str) {
            self.write(
                &format!("p/{pid}/cgroup"),
                &format!("1:name=x:/elsewhere\n0::{cgroup}\n"),
            );
            self.write(&format!("p/{pid}/status"), &format!("Name:\tx\nNSpid:\t{nspid}\n"));
            let tail = ["0"; 18].join(" ");
            self.write(&format!("p/{pid}/stat"), &format!("{pid} (a) b) S {tail} 500 0"));
            self.write(&format!("ns/{net}"), "");
            fs::create_dir_all(self.dir.path().join(format!("p/{pid}/ns"))).unwrap();
            let link = self.dir.path().join(format!("p/{pid}/ns/net"));
            let _ = fs::remove_file(&link);
            fs::hard_link(self.dir.path().join(format!("ns/{net}")), link).unwrap();
        }

        fn cgroups(&self) -> Cgroups {
            Cgroups::at(self.dir.path().join("c"), self.dir.path().join("p"))
        }
    }

    fn id() -> ContainerId {
        ContainerId::parse(&"ab".repeat(32)).unwrap()
    }

    /// This test's own process number stands for the container's first process: its handle must be real.
    fn me() -> String {
        std::process::id().to_string()
    }

    #[test]
    fn the_first_process_is_found_where_engines_put_it() {
        for path in [
            format!("docker/{}", id().as_str()),
            format!("system.slice/docker-{}.scope", id().as_str()),
            format!("libpod_parent/libpod-{}", id().as_str()),
            format!("machine.slice/libpod-{}.scope", id().as_str()),
        ] {
            let host = Host::new();
            host.write(&format!("c/{path}/cgroup.procs"), &format!("{}\n", me()));
            host.process(&me(), &format!("/{path}"), "77 1", "net-1");
            let first = host.cgroups().first_process(&id(), None, None).unwrap();
            assert_eq!(first.pid.to_string(), me());
            assert_eq!(
                first.cgroup.0,
                fs::metadata(host.dir.path().join("c").join(path)).unwrap().ino()
            );
            assert_eq!(first.started, UNIX_EPOCH + Duration::from_secs(1_700_000_005));
        }
    }

    #[test]
    fn a_first_process_that_moved_to_a_cgroup_of_its_own_is_found_below() {
        let host = Host::new();
        let path = format!("docker/{}/init.scope", id().as_str());
        host.write(&format!("c/docker/{}/cgroup.procs", id().as_str()), "");
        host.write(&format!("c/{path}/cgroup.procs"), &format!("{}\n", me()));
        host.process(&me(), &format!("/{path}"), "77 1", "net-1");
        let first = host.cgroups().first_process(&id(), None, None).unwrap();
        assert!(first.directory.ends_with(id().as_str()));
        let nested = fs::metadata(host.dir.path().join("c").join(path)).unwrap().ino();
        assert!(owns_cgroup(&first.directory, first.cgroup, CgroupId(nested)).unwrap());
        assert!(!owns_cgroup(&first.directory, first.cgroup, CgroupId(nested + 100_000)).unwrap());
    }

    #[test]
    fn what_is_not_the_containers_first_process_is_refused() {
        let path = format!("docker/{}", id().as_str());
        for (cgroup, nspid, net, why) in [
            // runc's early stages.
            (format!("/{path}"), "77 1", "net-host", "host's network namespace"),
            (format!("/{path}"), "77 5", "net-1", "number 1"),
            // The number was used again by somebody else.
            ("/user.slice".to_owned(), "77 1", "net-1", "not in"),
            (format!("/{path}-evil"), "77 1", "net-1", "not in"),
        ] {
            let host = Host::new();
            host.write(&format!("c/{path}/cgroup.procs"), &format!("{}\n", me()));
            host.process(&me(), &cgroup, nspid, net);
            let error = host.cgroups().first_process(&id(), None, None).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn with_a_parent_of_its_own_the_engine_says_the_number_and_the_kernel_the_rest() {
        let host = Host::new();
        let path = format!("tenants/a/{}/child", id().as_str());
        host.write(&format!("c/{path}/cgroup.procs"), "");
        host.process(&me(), &format!("/{path}"), "77", "net-1");
        assert!(host.cgroups().first_process(&id(), None, None).is_err());
        let first = host
            .cgroups()
            .first_process(&id(), Some(std::process::id()), None)
            .unwrap();
        assert!(first.directory.ends_with(id().as_str()));
        host.process(&me(), "/tenants/a/other", "77", "net-1");
        assert!(
            host.cgroups()
                .first_process(&id(), Some(std::process::id()), None)
                .unwrap_err()
                .contains("carry its id")
        );
    }
}
