//! What the operator has ordered for single containers while the daemon runs: changed instance options, and events. Kept, so
//! that a restart of the daemon forgets nothing. Where an event is to stop its container, that is done here.

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use futures_util::stream::{FuturesUnordered, StreamExt as _};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::clock::Clock;
use crate::containers::index::Index;
use crate::containers::reconciler::ContainerEngine;
use crate::containers::{ContainerId, ContainerRun, Record};
use crate::instance::Ordered;
use crate::metadata::events::{Event, Kind, Run};

/// Writes what is kept.
pub type Keep = Box<dyn Fn(&[u8]) -> std::io::Result<()> + Send + Sync>;

/// Orders, by container.
pub struct RuntimeOverrides {
    all: Mutex<BTreeMap<String, Ordered>>,
    /// Held while a change is written, which may take seconds: readers of `all` do not wait for it.
    writing: Mutex<()>,
    keep: Keep,
}

/// As it is kept. A field that this version does not know may be a restriction.
#[derive(Serialize, Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Kept {
    containers: BTreeMap<String, Ordered>,
}

/// Why an order is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// It cannot be kept: a restart would forget it.
    #[error("the order cannot be kept")]
    Keep(#[from] std::io::Error),
    /// It cannot be written down.
    #[error("the order cannot be written down")]
    Write(#[from] serde_json::Error),
}

impl RuntimeOverrides {
    /// What was kept before; `keep` writes it from now on. Nothing was kept: `kept` is empty.
    ///
    /// # Errors
    /// When what was kept is something else.
    pub fn new(kept: &[u8], keep: Keep) -> Result<Self, serde_json::Error> {
        let kept = match kept {
            [] => Kept::default(),
            kept => serde_json::from_slice(kept)?,
        };
        Ok(Self {
            all: Mutex::new(kept.containers),
            writing: Mutex::default(),
            keep,
        })
    }

    /// What is ordered for a container.
    pub fn of(&self, container: &ContainerId) -> Option<Ordered> {
        self.all().get(container.as_str()).cloned()
    }

    /// Changes that. `exists`: whether a container is still there; what was ordered for others is forgotten.
    ///
    /// # Errors
    /// When it cannot be kept; then nothing has changed.
    pub fn order(
        &self,
        container: &ContainerId,
        exists: impl Fn(&ContainerId) -> bool,
        change: impl FnOnce(&mut Ordered),
    ) -> Result<Ordered, OrderError> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut new = self.all().clone();
        let mut ordered = new.get(container.as_str()).cloned().unwrap_or_default();
        change(&mut ordered);
        new.retain(|id, _| ContainerId::parse(id).is_some_and(|id| exists(&id)));
        new.insert(container.as_str().to_owned(), ordered.clone());
        let kept = Kept { containers: new };
        (self.keep)(&serde_json::to_vec_pretty(&kept)?)?;
        *self.all() = kept.containers;
        Ok(ordered)
    }

    /// Events that are to stop their containers.
    fn stops(&self) -> Vec<(ContainerId, u64, Run)> {
        let all = self.all();
        let stops = all.iter().flat_map(|(id, ordered)| {
            let to_stop = |event: &Event| Some((ContainerId::parse(id)?, event.at, event.stops?));
            ordered
                .events
                .iter()
                .filter(|event| !event.cancelled)
                .filter_map(to_stop)
        });
        stops.collect()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Ordered>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why an event cannot stop its container.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StopError {
    /// The operator has not allowed it.
    #[error(
        "stop: the configuration does not allow it; [imds] triggers_may_stop = true does, from the next SIGHUP or start on"
    )]
    NotPermitted,
    /// Others do not end in a stop.
    #[error("stop: expected spot-interruption; nothing else stops a container")]
    NotThisKind,
    /// There is nothing to stop.
    #[error("stop: the container does not run, or is not known to run yet")]
    NotRunning,
}

/// The run that an event which is to stop its container is for: the present one.
///
/// # Errors
/// Why it may not, or cannot.
pub fn to_stop(record: &Record, kind: Kind, permitted: bool) -> Result<Run, StopError> {
    if !permitted {
        return Err(StopError::NotPermitted);
    }
    if kind != Kind::SpotInterruption {
        return Err(StopError::NotThisKind);
    }
    let life = record.life.as_ref().filter(|life| life.alive());
    life.map(|life| run_of(life)).ok_or(StopError::NotRunning)
}

fn run_of(life: &ContainerRun) -> Run {
    Run {
        cgroup: life.cgroup.0,
        started: life.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs(),
    }
}

/// After this a stop that failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Stops containers when their events say so.
pub struct StopScheduler {
    /// What is ordered.
    pub orders: Arc<RuntimeOverrides>,
    /// Who runs.
    pub index: Arc<Index>,
    /// Who stops them.
    pub engine: Arc<dyn ContainerEngine>,
    /// The time.
    pub clock: Clock,
    /// Wakes when something has been ordered.
    pub changed: watch::Receiver<u64>,
    /// Whether the configuration allows it, at this moment.
    pub permitted: Box<dyn Fn() -> bool + Send + Sync>,
}

/// What becomes of a stop that is due.
enum Due {
    /// Whether that run still is cannot be said yet.
    Open,
    /// It is to be stopped.
    Now,
    /// It is not.
    Never(&'static str),
}

impl StopScheduler {
    /// Until the task is dropped, or nobody can order anything any more.
    pub async fn run(mut self) {
        let mut index = self.index.changes();
        let mut stopping = FuturesUnordered::new();
        let mut in_hand = HashSet::new();
        loop {
            index.mark_unchanged();
            let now = self.clock.wall_seconds();
            let (mut next, mut open) = (None::<u64>, false);
            for (id, at, run) in self.orders.stops() {
                if at > now {
                    next = Some(next.map_or(at, |next| next.min(at)));
                } else if !in_hand.contains(&id) {
                    match self.due(&id, run) {
                        Due::Open => open = true,
                        Due::Now => {
                            info!(container = %id, "its notice is over: it is stopped");
                            in_hand.insert(id.clone());
                            let stop = self.engine.stop(&id);
                            stopping.push(async move {
                                let stopped = stop.await;
                                if let Err(why) = &stopped {
                                    warn!(container = %id, %why, "cannot be stopped; it is tried again");
                                    tokio::time::sleep(RETRY).await;
                                }
                                (id, stopped.is_ok().then_some(run))
                            });
                        }
                        Due::Never(why) => {
                            warn!(container = %id, why, "its notice is over, but it is not stopped");
                            self.settled(&id, run);
                        }
                    }
                }
            }
            let next = next.map(|at| UNIX_EPOCH + Duration::from_secs(at));
            tokio::select! {
                Some((id, stopped)) = stopping.next() => {
                    in_hand.remove(&id);
                    if let Some(run) = stopped {
                        self.settled(&id, run);
                    }
                }
                () = self.clock.until(next), if next.is_some() => {}
                _ = index.changed(), if open => {}
                changed = self.changed.changed() => if changed.is_err() {
                    return;
                },
            }
        }
    }

    fn due(&self, id: &ContainerId, run: Run) -> Due {
        if !(self.permitted)() {
            return Due::Never("the configuration does not allow it any more: [imds] triggers_may_stop");
        }
        match self.index.get(id) {
            None if self.index.is_gone(id) => Due::Never("it is no more"),
            None => Due::Open,
            Some(record) => match record.life.as_ref().filter(|life| life.alive()) {
                None => Due::Open,
                Some(life) if run_of(life).is(&run) => Due::Now,
                Some(_) => Due::Never("it has been restarted since it was told"),
            },
        }
    }

    /// Nothing is left to be done for that run.
    fn settled(&self, id: &ContainerId, run: Run) {
        let change = |ordered: &mut Ordered| {
            let of_run = ordered.events.iter_mut().filter(|event| event.stops == Some(run));
            of_run.for_each(|event| event.stops = None);
        };
        if let Err(error) = self.orders.order(id, |_| true, change) {
            // The run has ended, or is told from every other: nobody is stopped who must not be.
            warn!(container = %id, %error, "that it has been settled cannot be kept");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn orders_are_read_while_one_is_written() {
        use std::sync::mpsc;
        let id = ContainerId::parse(&"a".repeat(64)).unwrap();
        let (started, has_started) = mpsc::channel();
        let (finish, may_finish) = mpsc::channel::<()>();
        let may_finish = Mutex::new(may_finish);
        let keep: Keep = Box::new(move |_| {
            started.send(()).unwrap();
            let waited = may_finish.lock().unwrap().recv_timeout(Duration::from_secs(20));
            waited.map_err(std::io::Error::other)
        });
        let orders = Arc::new(RuntimeOverrides::new(&[], keep).unwrap());
        let (writer, written) = (orders.clone(), id.clone());
        let writing = std::thread::spawn(move || {
            let ordered = writer.order(&written, |_| true, |it| it.options.hop_limit = Some(1));
            ordered.is_ok()
        });
        has_started.recv().unwrap();
        // The write has not succeeded yet.
        assert_eq!(orders.of(&id), None);
        finish.send(()).unwrap();
        assert!(writing.join().unwrap(), "reading waited for the write");
        assert_eq!(orders.of(&id).unwrap().options.hop_limit, Some(1));
    }

    #[test]
    fn what_is_ordered_is_kept_and_what_cannot_be_kept_is_not_ordered() {
        let id = |digit: &str| ContainerId::parse(&digit.repeat(64)).unwrap();
        let file: Arc<Mutex<Vec<u8>>> = Arc::default();
        let keep = |file: &Arc<Mutex<Vec<u8>>>| -> Keep {
            let file = file.clone();
            Box::new(move |bytes| {
                *file.lock().unwrap() = bytes.to_vec();
                Ok(())
            })
        };
        let orders = RuntimeOverrides::new(&[], keep(&file)).unwrap();
        for digit in ["a", "b"] {
            orders
                .order(&id(digit), |_| true, |it| it.options.hop_limit = Some(1))
                .unwrap();
        }
        let again = RuntimeOverrides::new(&file.lock().unwrap().clone(), keep(&file)).unwrap();
        assert_eq!(again.of(&id("a")).unwrap().options.hop_limit, Some(1));
        assert_eq!(again.of(&id("c")), None);
        // `b` is no more.
        again
            .order(&id("a"), |it| *it == id("a"), |it| it.options.hop_limit = Some(2))
            .unwrap();
        assert_eq!(again.of(&id("b")), None);
        let full = RuntimeOverrides::new(
            &file.lock().unwrap().clone(),
            Box::new(|_| Err(std::io::Error::other("full"))),
        )
        .unwrap();
        assert!(
            full.order(&id("a"), |_| true, |it| it.options.hop_limit = Some(3))
                .is_err()
        );
        assert_eq!(full.of(&id("a")).unwrap().options.hop_limit, Some(2));
        assert!(RuntimeOverrides::new(b"nonsense", keep(&file)).is_err());
    }
}
