//! Checks whether the kernel can authenticate callers on this host, and lists the missing prerequisites.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use rustix::thread::{CapabilitySet, capabilities};

use super::cgroup::{CgroupError, Cgroups};

/// Something without which the kernel cannot be asked who made a connection.
#[derive(Debug, thiserror::Error)]
pub enum MissingPrerequisite {
    /// Rights.
    #[error("{} missing: network namespaces of containers cannot be entered", .0.join(", "))]
    Capabilities(Vec<&'static str>),
    /// A cgroup v2 hierarchy.
    #[error("{}", without_hint(.0))]
    Cgroups(CgroupError),
    /// The host's view of processes.
    #[error("the engine's processes are not visible: this process has a PID namespace of its own")]
    Processes,
    /// The host's network.
    #[error(
        "the engine is in another network namespace than this process (rootless Docker, or a container without the host's network)"
    )]
    Network,
    /// A processor of its own.
    #[error(
        "this is an {ours} program on an {engines} machine, and the kernel cannot be asked through an emulator: take the image for that \
         (docker pull --platform linux/{engines}, and docker run with it)"
    )]
    Emulated {
        /// What this program was built for.
        ours: &'static str,
        /// What the engine's machine is.
        engines: String,
    },
    /// The engine itself.
    #[error("the engine at {0} is another machine's: the kernel to ask is there")]
    Remote(String),
}

fn without_hint(error: &CgroupError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The capabilities (capabilities(7)) that full proof takes, and what for: entering network namespaces, looking at processes
/// of others, addresses and rules.
const NEEDED: [(CapabilitySet, &str); 3] = [
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
];

/// What is lacking here. An engine that does not answer yet lacks nothing: it may come.
pub async fn missing_prerequisites(engine: &str) -> Vec<MissingPrerequisite> {
    let mut lacks = Vec::new();
    let have = capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective);
    let missing: Vec<_> = NEEDED
        .iter()
        .filter(|(needed, _)| !have.contains(*needed))
        .map(|(_, name)| *name)
        .collect();
    if !missing.is_empty() {
        lacks.push(MissingPrerequisite::Capabilities(missing));
    }
    if let Err(error) = Cgroups::find() {
        lacks.push(MissingPrerequisite::Cgroups(error));
    }
    if let Some(path) = engine.strip_prefix("unix://") {
        lacks.extend(of_peer(Path::new(path)).await);
    }
    lacks
}

/// Whether this program is run by an emulator, where the engine's machine is of this architecture, in Docker's words. The
/// emulator itself would say that all is well.
pub fn emulated(engines: &str) -> Option<MissingPrerequisite> {
    let ours = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        // Docker has other words for these, too, and nobody emulates them.
        _ => return None,
    };
    (engines != ours).then(|| MissingPrerequisite::Emulated {
        ours,
        engines: engines.to_owned(),
    })
}

/// What the process that listens on the engine's socket tells of where this process sits.
async fn of_peer(socket: &Path) -> Option<MissingPrerequisite> {
    let peer = tokio::net::UnixStream::connect(socket).await.ok()?.peer_cred().ok()?;
    // 0: not visible from here (unix(7), pid_namespaces(7)).
    let Some(pid) = peer.pid().filter(|pid| *pid > 0) else {
        return Some(MissingPrerequisite::Processes);
    };
    let network = |process: &str| std::fs::metadata(format!("/proc/{process}/ns/net")).map(|it| it.ino());
    match (network(&pid.to_string()), network("self")) {
        (Ok(theirs), Ok(ours)) if theirs != ours => Some(MissingPrerequisite::Network),
        // Without the right to look that is what is lacking, and said already.
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_for_another_machine_says_so() {
        let (ours, other) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", "arm64"),
            "aarch64" => ("arm64", "amd64"),
            _ => return,
        };
        assert!(emulated(ours).is_none());
        let said = emulated(other).map(|lack| lack.to_string());
        let expected = format!("this is an {ours} program on an {other} machine");
        assert!(
            said.as_ref().is_some_and(|said| said.starts_with(&expected)),
            "{said:?}"
        );
    }
}
