//! Standing by while another imds-router serves the host. The table of rules that it owns is the lock: the kernel takes it
//! away when its owner ends, however that ends.

use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use tracing::info;

use crate::clock::Clock;
use crate::containers::ContainerId;
use crate::interception::reconcile::Interception;
use crate::interception::{HostError, Plan};
use crate::logging::printable;

/// The table of a daemon that was killed a moment ago may still be there: a child that was just being forked had a copy of
/// its socket. That is nobody to stand by for.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the lock is tried: whoever takes over is there this long after the other has gone.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

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
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    };
    tokio::select! {
        biased;
        () = shutdown => Ok(None),
        done = turn => done,
    }
}

/// Who holds the table, as far as it can be seen: whose descriptor the holder's netlink socket is.
fn who(holder: u32) -> String {
    let sockets = std::fs::read_to_string("/proc/thread-self/net/netlink").unwrap_or_default();
    let socket = inode(&sockets, holder).map(|inode| PathBuf::from(format!("socket:[{inode}]")));
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().into_string().ok());
    let mut pids = pids.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
    let has_it = |pid: &String| {
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))
            .into_iter()
            .flatten()
            .flatten();
        open.filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .any(|it| Some(&it) == socket.as_ref())
    };
    match socket.is_some().then(|| pids.find(has_it)).flatten() {
        Some(pid) => format!("{}, {}", name(&pid), shown(&pid)),
        None => format!("another process (netlink port {holder})"),
    }
}

/// The inode of the netfilter socket with that port, in what the kernel prints of netlink sockets: `sk Eth Pid Groups Rmem
/// Wmem Dump Locks Drops Inode` (net/netlink/af_netlink.c, `netlink_native_seq_show`).
fn inode(sockets: &str, port: u32) -> Option<u64> {
    const NETLINK_NETFILTER: &str = "12";
    let port = port.to_string();
    sockets.lines().find_map(|line| {
        let mut columns = line.split_whitespace().skip(1);
        let found = columns.next()? == NETLINK_NETFILTER && columns.next()? == port;
        found.then(|| columns.last()?.parse().ok()).flatten()
    })
}

fn name(pid: &str) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm"));
    name.map_or_else(|_| "a process".to_owned(), |name| printable(name.trim_end(), 15))
}

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
    fn the_holders_socket() {
        let printed = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n\
            0000000000000000 0   4242       00000000 0        0        0     2        0        101\n\
            0000000000000000 12  2147483999 00000000 0        0        0     2        0        102\n\
            0000000000000000 12  4242       00000000 0        0        0     2        0        103\n";
        assert_eq!(inode(printed, 4242), Some(103));
        assert_eq!(inode(printed, 2_147_483_999), Some(102));
        assert_eq!(inode(printed, 12), None);
        assert_eq!(inode("", 12), None);
    }

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
