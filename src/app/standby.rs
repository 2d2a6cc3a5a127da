//! Standing by while another imds-router serves the host. The table of rules that it owns is the lock: the kernel takes it
//! away when its owner ends, however that ends.

use std::future::Future;
use std::os::unix::fs::MetadataExt as _;
use std::pin::Pin;
use std::time::Duration;

use tracing::info;

use crate::clock::Clock;
use crate::containers::ContainerId;
use crate::host::apply::Interception;
use crate::host::{HostError, Plan};

/// The table of a daemon that was killed a moment ago may still be there: a child that was just being forked had a copy of
/// its socket. That is nobody to stand by for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the lock is tried: whoever takes over is there this long after the other has gone.
const AGAIN: Duration = Duration::from_millis(100);

/// Puts `plan` up as soon as nobody else has. `said` hears who serves meanwhile, and nothing more once it is our turn.
/// `None`: it was `shutdown` that came first.
///
/// # Errors
/// Why it cannot be put up, apart from that.
pub async fn our_turn(
    plan: &Plan,
    clock: &Clock,
    shutdown: Pin<&mut impl Future<Output = ()>>,
    said: impl Fn(Option<String>),
) -> Result<Option<Interception>, HostError> {
    let patience = clock.now() + PATIENCE;
    let mut standing_by = false;
    let turn = async {
        loop {
            match Interception::up(plan.clone()) {
                Err(HostError::Busy { .. }) if clock.now() < patience => {}
                Err(HostError::Busy { holder, .. }) if !standing_by => {
                    let who = who(holder);
                    info!("standing by: {who} serves this host; this one takes over when that one ends");
                    said(Some(who));
                    standing_by = true;
                }
                Err(HostError::Busy { .. }) => {}
                done => {
                    if standing_by {
                        info!("taking over");
                        said(None);
                    }
                    return done.map(Some);
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    };
    tokio::select! {
        biased;
        () = shutdown => Ok(None),
        done = turn => done,
    }
}

/// Who holds the table, as far as it can be seen: the other process of our name in our network.
fn who(holder: u32) -> String {
    let network = |process: &str| {
        std::fs::metadata(format!("/proc/{process}/ns/net"))
            .map(|it| it.ino())
            .ok()
    };
    let (own, ours) = (std::process::id().to_string(), network("self"));
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = processes
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|pid| pid.bytes().all(|byte| byte.is_ascii_digit()) && *pid != own)
        .filter(|pid| std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it.trim_end() == NAME))
        .filter(|pid| ours.is_some() && network(pid) == ours);
    let found: Vec<_> = found.map(|pid| shown(&pid)).collect();
    match found.as_slice() {
        [] => format!("another process (netlink port {holder})"),
        found => format!("{NAME}, {}", found.join(" or ")),
    }
}

const NAME: &str = "imds-router";

fn shown(pid: &str) -> String {
    let cgroup = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    match container(&cgroup) {
        Some(id) => format!("process {pid} in container {}", id.short()),
        None => format!("process {pid}"),
    }
}

/// The container that a process is of, by the names that Docker gives to cgroups. For people: it proves nothing.
fn container(cgroup: &str) -> Option<ContainerId> {
    cgroup.split(['/', '\n', '-', '.']).rev().find_map(ContainerId::parse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whose_process_it_is() {
        let id = "ab".repeat(32);
        for cgroup in [
            format!("0::/system.slice/docker-{id}.scope\n"),
            format!("12:pids:/docker/{id}\n0::/docker/{id}\n"),
            format!("0::/docker/{id}/below\n"),
        ] {
            assert_eq!(
                container(&cgroup).as_ref().map(ContainerId::as_str),
                Some(id.as_str()),
                "{cgroup}"
            );
        }
        assert_eq!(container("0::/system.slice/imds-router.service\n"), None);
    }
}
