//! The lower level: no kernel to ask, only the engine's word on who is at which address.
//!
//! For hosts on which nobody can be proven (a remote engine, cgroup v1 alone, no rights), and only where the operator has
//! said `[serve] proof = "address"`. A neighbour that sends with another's address is taken for it.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::SystemTime;

use dashmap::DashMap;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;

use crate::clock::Clock;
use crate::containers::reconciler::{Kernel, Run, RunStart};
use crate::containers::{CgroupId, ContainerId, NamespaceId, NetworkMode, ProofLevel, RunHandle, SocketEvidence};

/// Lives as the engine tells them. They end when it says so, or when it is away: addresses may move then.
pub struct EngineAttestor {
    clock: Clock,
    /// A life ends when its sender is dropped.
    lives: DashMap<ContainerId, (CgroupId, watch::Sender<()>)>,
}

impl EngineAttestor {
    /// Nobody lives yet.
    pub fn new(clock: Clock) -> Self {
        Self {
            clock,
            lives: DashMap::new(),
        }
    }
}

impl Kernel for EngineAttestor {
    fn run_start(&self, id: &ContainerId, run: Option<&Run>, mode: Option<&NetworkMode>) -> Result<RunStart, String> {
        let run = run.ok_or("the engine has not said yet that it runs")?;
        match mode {
            Some(NetworkMode::Own) => {}
            Some(_) => {
                return Err(
                    "it has no network of its own: with proof \"address\" it cannot be told from others".to_owned(),
                );
            }
            None => return Err("the engine has not said yet whose network it has".to_owned()),
        }
        // What stands for the kernel's number of a run: anything that differs from run to run.
        let digest = Sha256::digest(format!("{}|{}|{}", id.as_str(), run.pid, run.started));
        let life = CgroupId(u64::from_be_bytes(*digest.first_chunk().expect("SHA-256 has 32 bytes")));
        let mut entry = self
            .lives
            .entry(id.clone())
            .or_insert_with(|| (life, watch::Sender::new(())));
        if entry.0 != life {
            *entry = (life, watch::Sender::new(()));
        }
        Ok(RunStart {
            cgroup: life,
            pid: run.pid,
            started: started(&run.started).unwrap_or_else(|| self.clock.wall()),
            handle: std::sync::Arc::new(EngineRunHandle {
                life,
                runs: entry.1.subscribe(),
            }),
        })
    }

    fn engine_says_ended(&self, id: &ContainerId) {
        self.lives.remove(id);
    }

    fn engine_lost(&self) {
        self.lives.clear();
    }
}

fn started(text: &str) -> Option<SystemTime> {
    text.parse::<jiff::Timestamp>().ok().map(SystemTime::from)
}

struct EngineRunHandle {
    life: CgroupId,
    runs: watch::Receiver<()>,
}

impl RunHandle for EngineRunHandle {
    fn level(&self) -> ProofLevel {
        ProofLevel::Address
    }

    fn alive(&self) -> bool {
        self.runs.has_changed().is_ok()
    }

    fn ended(&self) -> Pin<Box<dyn Future<Output = ()> + Send + '_>> {
        let mut runs = self.runs.clone();
        Box::pin(async move { while runs.changed().await.is_ok() {} })
    }

    fn socket(&self, _: SocketAddr, _: SocketAddr) -> io::Result<Option<SocketEvidence>> {
        Ok(None)
    }

    fn owns_cgroup(&self, _: CgroupId) -> io::Result<bool> {
        Ok(false)
    }

    fn namespace(&self) -> NamespaceId {
        // Nobody else's: the kernel's numbers of namespaces have 32 bits (proc_ns, linux/proc_ns.h).
        NamespaceId(self.life.0 | 1 << 63)
    }

    fn is_attached(&self) -> bool {
        false
    }

    fn attach(&self) -> Result<Vec<String>, String> {
        Err("its network namespace cannot be entered".to_owned())
    }

    fn detach(&self) -> Result<(), String> {
        Ok(())
    }

    fn check_path(&self) -> Result<(), String> {
        // It is reached over its network, or not at all: the kernel of another machine may have the answer.
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> ContainerId {
        ContainerId::parse(&"ab".repeat(32)).unwrap()
    }

    fn run(pid: u32) -> Run {
        Run {
            pid,
            started: "2026-11-25T10:00:00.5Z".into(),
        }
    }

    #[tokio::test]
    async fn a_life_is_what_the_engine_says_and_ends_when_it_says_so() {
        let engine = EngineAttestor::new(Clock::system());
        let own = Some(&NetworkMode::Own);
        assert!(engine.run_start(&id(), None, own).is_err());
        assert!(
            engine
                .run_start(&id(), Some(&run(7)), Some(&NetworkMode::Host))
                .is_err()
        );
        let first = engine.run_start(&id(), Some(&run(7)), own).unwrap();
        assert!(first.handle.alive() && first.handle.level() == ProofLevel::Address);
        // Told twice, it is the same life; another run is another.
        let again = engine.run_start(&id(), Some(&run(7)), own).unwrap();
        assert!(first.cgroup == again.cgroup && first.handle.alive());
        let next = engine.run_start(&id(), Some(&run(8)), own).unwrap();
        assert!(next.cgroup != first.cgroup && !first.handle.alive() && next.handle.alive());
        first.handle.ended().await;
        engine.engine_says_ended(&id());
        assert!(!next.handle.alive());
        next.handle.ended().await;
    }

    #[test]
    fn without_the_engine_nobody_lives() {
        let engine = EngineAttestor::new(Clock::system());
        let run_start = engine.run_start(&id(), Some(&run(7)), Some(&NetworkMode::Own)).unwrap();
        engine.engine_lost();
        assert!(!run_start.handle.alive());
    }
}
