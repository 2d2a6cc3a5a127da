//! One run of the trials on this machine: its directory, and how everything of it ends.
//!
//! All that a run starts lives in network namespaces named after the run's process id, so the namespaces are enough to
//! find the rest: whoever sits in one, and their children, the containers. That is why the same few lines clean up after
//! a good run, after Ctrl-C, and after a run that was killed outright (the next one does it).

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::shell::{Done, poll_quietly, sh};

const NAMESPACES: &str = "/run/netns";
/// Names of namespaces: `imds-trials-<pid of the run>-<number>`.
const PREFIX: &str = "imds-trials-";
/// Not `/tmp`: it may be memory, and images do not belong there.
const DIRECTORIES: &str = "/var/tmp";

static SECRETS: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
static NUMBER: AtomicU32 = AtomicU32::new(0);
/// Somebody has interrupted the run, and only the thread that takes it down may still do anything.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static TAKES_DOWN: Cell<bool> = const { Cell::new(false) };
}

/// The directory of this run; made on first use, gone after a good run.
pub fn directory() -> &'static Path {
    static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
        let directory = directory_of(std::process::id());
        fs::create_dir_all(directory.join("logs"))
            .unwrap_or_else(|e| panic!("cannot make {}: {e}", directory.display()));
        directory
    });
    &DIRECTORY
}

fn directory_of(run: u32) -> PathBuf {
    Path::new(DIRECTORIES).join(format!("{PREFIX}{run}"))
}

/// Keeps what must not be in any log beyond the life of the STS that issued it.
pub fn remember_secrets(new: Vec<String>) {
    let mut secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    secrets.extend(new);
}

/// What has been [remembered](remember_secrets).
pub fn remembered_secrets() -> BTreeSet<String> {
    let secrets = SECRETS.lock().unwrap_or_else(PoisonError::into_inner);
    secrets.clone()
}

/// Makes the calling thread the one that takes the run down: all others stop where they would start something.
pub fn interrupt() {
    TAKES_DOWN.set(true);
    INTERRUPTED.store(true, Ordering::SeqCst);
}

/// To be called before something is started. Does not return once the run is interrupted.
pub fn go_on() {
    while INTERRUPTED.load(Ordering::SeqCst) && !TAKES_DOWN.get() {
        std::thread::park();
    }
}

/// A number for the name of something that is new.
pub fn next_number() -> u32 {
    NUMBER.fetch_add(1, Ordering::Relaxed)
}

/// Where the output of a program goes that runs beside the trials.
pub fn log_file(name: &str) -> PathBuf {
    directory().join("logs").join(format!("{name}.log"))
}

/// Every log of this run.
pub fn logs() -> Vec<PathBuf> {
    let mut logs: Vec<_> = fs::read_dir(directory().join("logs"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .collect();
    logs.sort();
    logs
}

/// Makes a network namespace of this run and returns its name.
pub fn new_namespace() -> String {
    let name = format!("{PREFIX}{}-{}", std::process::id(), next_number());
    sh("ip", &["netns", "add", &name]);
    name
}

/// The file by which nsenter finds a namespace.
pub fn namespace_file(name: &str) -> String {
    format!("{NAMESPACES}/{name}")
}

/// Ends everything of this run; what could not be ended is in the answer.
pub fn end() -> Vec<String> {
    let ours = std::process::id();
    let mut left = Vec::new();
    // Again, for what was being started when the first look was taken.
    let ended = poll_quietly(Duration::from_secs(20), || {
        left.clear();
        for name in namespaces_of(|run| run == ours) {
            left.extend(end_namespace(&name));
        }
        // Docker clients and the like are outside of the namespaces.
        let mut outside = with_descendants(&processes(), BTreeSet::from([ours]));
        outside.remove(&ours);
        outside.extend(programs_of(ours));
        for pid in &outside {
            kill(*pid);
        }
        (outside.is_empty() && left.is_empty() && leftovers().is_empty()).then_some(())
    });
    if ended.is_none() {
        left.extend(leftovers());
    }
    left
}

/// Ends what runs that were killed have left behind.
pub fn end_stale_runs() {
    let alive = |run: u32| fs::read_to_string(format!("/proc/{run}/comm")).is_ok_and(|c| c.starts_with("engine-"));
    for name in namespaces_of(|run| !alive(run)) {
        end_namespace(&name);
    }
    for entry in fs::read_dir(DIRECTORIES).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let run = name.strip_prefix(PREFIX).and_then(|run| run.parse::<u32>().ok());
        if run.is_some_and(|run| run != std::process::id() && !alive(run)) {
            let _ = fs::remove_dir_all(entry.path()); // best effort: it is somebody else's rubbish
        }
    }
}

/// What there still is of this run: namespaces, processes, mounts.
pub fn leftovers() -> Vec<String> {
    let ours = std::process::id();
    let namespaces = namespaces_of(|run| run == ours);
    let mut left: Vec<String> = namespaces.iter().map(|name| format!("namespace {name}")).collect();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let directory = directory_of(ours);
    let mark = directory.to_string_lossy();
    left.extend(
        mounts
            .lines()
            .filter(|line| line.contains(&*mark) || line.contains(&format!("{PREFIX}{ours}-")))
            .map(|line| format!("mount {line}")),
    );
    left.extend(programs_of(ours).iter().map(|pid| {
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        format!("process {pid}: {}", arguments.replace('\0', " "))
    }));
    left
}

fn namespaces_of(run_matches: impl Fn(u32) -> bool) -> Vec<String> {
    let entries = fs::read_dir(NAMESPACES).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| {
            let run = name
                .strip_prefix(PREFIX)
                .and_then(|rest| rest.split('-').next()?.parse().ok());
            run.is_some_and(&run_matches)
        })
        .collect()
}

/// The programs of that run: each has the run's directory, or a path in it, among its arguments. By name, since somebody
/// who reads a log of it has that, too.
fn programs_of(run: u32) -> Vec<u32> {
    const PROGRAMS: [&str; 6] = [
        "timeout",
        "docker",
        "dockerd",
        "containerd",
        "containerd-shim-runc-v2",
        "imds-router",
    ];
    let directory = directory_of(run);
    let mark = directory.to_string_lossy();
    let ours = |process: &Process| {
        let program = process.arguments.split(' ').next().unwrap_or_default();
        let name = program.rsplit('/').next().unwrap_or_default();
        process.alive && PROGRAMS.contains(&name) && process.arguments.contains(&*mark)
    };
    let all = processes().into_iter();
    all.filter(|(_, process)| ours(process)).map(|(pid, _)| pid).collect()
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, Signal::KILL); // gone already is fine
    }
}

/// Ends everybody in the namespace and below, removes the namespace; says what did not work.
pub fn end_namespace(name: &str) -> Vec<String> {
    let mut left = Vec::new();
    let mut containers = BTreeSet::new();
    let done = poll_quietly(Duration::from_secs(20), || {
        let inside = inside(name);
        // Each time, for dockerd may have made one since.
        containers.extend(containers_of(name));
        for pid in &inside {
            kill(*pid);
        }
        inside.is_empty().then_some(())
    });
    if done.is_none() {
        left.push(format!("{name}: processes that do not die: {:?}", inside(name)));
    }
    for id in &containers {
        // A process that has just been killed keeps its cgroup for a moment.
        let gone = poll_quietly(Duration::from_secs(5), || {
            remove_cgroups(&format!("docker/{id}")).then_some(())
        });
        if gone.is_none() {
            left.push(format!("{name}: the cgroup of container {id}"));
        }
    }
    // The parent that Docker made, unless another Docker of this machine uses it: only an empty one can be removed.
    remove_cgroups("docker");
    let mut delete = Command::new("ip");
    delete.args(["netns", "del", name]);
    let deleted = Done::of(delete);
    if !deleted.succeeded() {
        left.push(deleted.to_string());
    }
    left
}

struct Process {
    parent: u32,
    alive: bool,
    arguments: String,
}

fn processes() -> BTreeMap<u32, Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
            // The name may contain anything, so count from its closing bracket: state, parent.
            let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
            let alive = fields.next()? != "Z";
            let parent = fields.next()?.parse().ok()?;
            let arguments = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            let arguments = arguments.replace('\0', " ");
            Some((
                pid,
                Process {
                    parent,
                    alive,
                    arguments,
                },
            ))
        })
        .collect()
}

/// Everybody in the namespace, and their descendants in whatever namespace (a container's parent is its shim).
fn inside(name: &str) -> BTreeSet<u32> {
    use std::os::unix::fs::MetadataExt;
    let Ok(wanted) = fs::metadata(namespace_file(name)) else {
        return BTreeSet::new();
    };
    let all = processes();
    let sits_in = |pid: u32| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| (ns.dev(), ns.ino()) == (wanted.dev(), wanted.ino()))
    };
    let there = all.keys().copied().filter(|pid| sits_in(*pid)).collect();
    let mut inside = with_descendants(&all, there);
    inside.remove(&std::process::id());
    inside
}

/// These processes and their descendants, as far as they are alive.
fn with_descendants(all: &BTreeMap<u32, Process>, these: BTreeSet<u32>) -> BTreeSet<u32> {
    let mut family = these;
    loop {
        let before = family.len();
        let children = all.iter().filter(|(_, process)| family.contains(&process.parent));
        let children: Vec<u32> = children.map(|(pid, _)| *pid).collect();
        family.extend(children);
        if family.len() == before {
            break;
        }
    }
    family.retain(|pid| all.get(pid).is_some_and(|process| process.alive));
    family
}

/// The ids of the containers that the engine of this namespace knew: the names of their cgroups.
fn containers_of(name: &str) -> Vec<String> {
    let run = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
    let Some(run) = run.and_then(|run| run.parse().ok()) else {
        return Vec::new();
    };
    let containers = directory_of(run).join(name).join("docker/containers");
    let entries = fs::read_dir(containers).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Removes an empty cgroup, and the empty ones below it, from every hierarchy. Whether it is nowhere any more.
fn remove_cgroups(path: &str) -> bool {
    fn remove(directory: &Path) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                remove(&entry.path());
            }
        }
        let _ = fs::remove_dir(directory); // busy: somebody uses it; absent: not every hierarchy has it
    }
    let root = Path::new("/sys/fs/cgroup");
    let hierarchies = fs::read_dir(root).into_iter().flatten().flatten();
    let mut gone = true;
    for hierarchy in hierarchies.map(|entry| entry.path()).chain([root.to_owned()]) {
        let cgroup = hierarchy.join(path);
        if path == "docker" {
            let _ = fs::remove_dir(&cgroup); // itself alone: below it may be another engine's containers
        } else {
            remove(&cgroup);
        }
        gone &= !cgroup.exists();
    }
    gone
}
