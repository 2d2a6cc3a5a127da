//! What is known of all containers, for many readers; the watcher is the one writer.

use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::{ArcSwap, ArcSwapOption};
use dashmap::{DashMap, DashSet};
use tokio::sync::{mpsc, oneshot, watch};

use super::{ContainerId, NamespaceId, NetworkId, NetworkMode, Record};

/// How it stands with the engine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EngineState {
    /// Not reached yet, or lost; with the reason. Known containers are served on: the kernel says whether they live.
    Away(String),
    /// Reached, and being asked who runs here.
    Synchronising,
    /// Everything that its lists named is in the index, and events follow.
    Synchronised,
}

/// A call to the engine that fails although the engine is connected. The daemon repeats it until it is answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failing {
    /// The call, such as `list of containers`.
    pub call: String,
    /// The error of the last attempt.
    pub error: String,
    /// The first failure.
    pub since: SystemTime,
    /// How many other calls fail as well.
    pub others: usize,
}

/// A caller whose address leads to no living container. Whoever asks waits for the engine to be asked once more.
#[derive(Debug)]
pub struct Miss {
    /// The address.
    pub address: IpAddr,
    /// Answered when the engine knows nothing more of the address than the index; dropped when it is not to be had.
    pub looked: oneshot::Sender<()>,
}

/// All containers, by id and by address.
pub struct Index {
    records: DashMap<ContainerId, Arc<Record>>,
    /// Few ids an address: two at once are possible (networks of the same subnet, an address that moves).
    by_address: DashMap<IpAddr, Vec<ContainerId>>,
    /// Who lives in a network namespace.
    by_namespace: DashMap<NamespaceId, Vec<ContainerId>>,
    /// Namespaces of runs whose definition the engine has not told yet.
    undefined: DashSet<NamespaceId>,
    /// Containers that the engine's list names and that could not be described.
    undescribed: DashSet<ContainerId>,
    /// Who is, or will be, in a network namespace that is not its own: few.
    joining: DashSet<ContainerId>,
    /// Each network's gateways: addresses of this host.
    gateways: DashMap<NetworkId, Vec<IpAddr>>,
    /// Networks whose last inspection failed.
    unread_networks: DashSet<NetworkId>,
    version: watch::Sender<u64>,
    engine: ArcSwap<EngineState>,
    failing: ArcSwapOption<Failing>,
    misses: mpsc::Sender<Miss>,
}

/// Misses that wait for the watcher. More than these wait for a place.
const MISSES: usize = 512;

impl Index {
    /// An empty index, and where its misses arrive.
    pub fn new() -> (Arc<Self>, mpsc::Receiver<Miss>) {
        let (misses, receiver) = mpsc::channel(MISSES);
        let index = Self {
            records: DashMap::new(),
            by_address: DashMap::new(),
            by_namespace: DashMap::new(),
            undefined: DashSet::new(),
            undescribed: DashSet::new(),
            joining: DashSet::new(),
            gateways: DashMap::new(),
            unread_networks: DashSet::new(),
            version: watch::Sender::new(0),
            engine: ArcSwap::from_pointee(EngineState::Away("not asked yet".to_owned())),
            failing: ArcSwapOption::empty(),
            misses,
        };
        (Arc::new(index), receiver)
    }

    /// One container.
    pub fn get(&self, id: &ContainerId) -> Option<Arc<Record>> {
        self.records.get(id).map(|record| record.clone())
    }

    /// All containers, by name.
    pub fn all(&self) -> Vec<Arc<Record>> {
        let mut all: Vec<_> = self.records.iter().map(|record| record.value().clone()).collect();
        all.sort_by(|a, b| (&a.definition.name, &a.definition.id).cmp(&(&b.definition.name, &b.definition.id)));
        all
    }

    /// How many network namespaces have runs in them.
    pub fn namespaces(&self) -> usize {
        self.by_namespace.len()
    }

    /// Who may be at `address`: candidates, never a proof.
    pub fn at(&self, address: IpAddr) -> Vec<Arc<Record>> {
        let ids = self.by_address.get(&address).map(|ids| ids.clone()).unwrap_or_default();
        ids.iter().filter_map(|id| self.get(id)).collect()
    }

    /// Who lives in a network namespace.
    pub fn within(&self, namespace: NamespaceId) -> Vec<Arc<Record>> {
        let ids = self
            .by_namespace
            .get(&namespace)
            .map(|ids| ids.clone())
            .unwrap_or_default();
        ids.iter().filter_map(|id| self.get(id)).collect()
    }

    /// Containers that are, or will be, in a network namespace that is not their own.
    pub fn joining(&self) -> Vec<Arc<Record>> {
        self.joining.iter().filter_map(|id| self.get(&id)).collect()
    }

    /// Whether there is a run in that namespace whose definition the engine has not told yet.
    pub fn is_undefined(&self, namespace: NamespaceId) -> bool {
        self.undefined.contains(&namespace)
    }

    /// Notes whether that is so. For the writer.
    pub(super) fn set_undefined(&self, namespace: NamespaceId, undefined: bool) {
        let changed = match undefined {
            true => self.undefined.insert(namespace),
            false => self.undefined.remove(&namespace).is_some(),
        };
        if changed {
            self.changed();
        }
    }

    /// Whether `address` is the gateway of a network.
    pub fn is_gateway(&self, address: IpAddr) -> bool {
        self.gateways.iter().any(|gateways| gateways.contains(&address))
    }

    /// The gateways of all networks.
    pub fn gateways(&self) -> Vec<IpAddr> {
        self.gateways.iter().flat_map(|gateways| gateways.clone()).collect()
    }

    /// Whether a container is on a network whose last inspection failed: another one may have its address by now.
    pub fn is_on_unread_network(&self, id: &ContainerId) -> bool {
        let record = self.get(id);
        record.is_some_and(|it| {
            it.attachments
                .0
                .iter()
                .any(|(network, _)| self.unread_networks.contains(network))
        })
    }

    /// How it stands with the engine.
    pub fn engine(&self) -> Arc<EngineState> {
        self.engine.load_full()
    }

    /// The call to the engine that fails, if one does.
    pub fn failing(&self) -> Option<Arc<Failing>> {
        self.failing.load_full()
    }

    /// Whether the engine says that the container does not exist: it has answered with a list that does not name it, or has
    /// announced its removal. An engine that does not answer says nothing.
    pub fn is_gone(&self, id: &ContainerId) -> bool {
        let is_named = self.records.contains_key(id) || self.undescribed.contains(id);
        *self.engine.load_full() == EngineState::Synchronised && !is_named
    }

    /// Wakes whenever anything in the index has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Asks the watcher to ask the engine about `address`. Completes when that has been done, or cannot be.
    pub async fn look_again(&self, address: IpAddr) {
        let (looked, answer) = oneshot::channel();
        if self.misses.send(Miss { address, looked }).await.is_ok() {
            // A dropped sender is an answer, too: nothing more will come.
            let _ = answer.await;
        }
    }

    /// Replaces what is known of one container. For the writer.
    pub(super) fn put(&self, record: Record) {
        let id = record.definition.id.clone();
        self.undescribed.remove(&id);
        let record = Arc::new(record);
        let old = self.records.insert(id.clone(), record.clone());
        if let Some(old) = old {
            for address in old.attachments.addresses() {
                if !record.attachments.addresses().any(|it| it == address) {
                    unlink(&self.by_address, &address, &id);
                }
            }
            if let Some(namespace) = namespace(&old).filter(|it| Some(*it) != namespace(&record)) {
                unlink(&self.by_namespace, &namespace, &id);
            }
        }
        if record.definition.network_mode != NetworkMode::Own {
            self.joining.insert(id.clone());
        }
        for address in record.attachments.addresses() {
            link(&self.by_address, address, &id);
        }
        if let Some(namespace) = namespace(&record) {
            link(&self.by_namespace, namespace, &id);
        }
        self.changed();
    }

    /// Forgets one container. For the writer.
    pub(super) fn remove(&self, id: &ContainerId) {
        self.joining.remove(id);
        self.undescribed.remove(id);
        if let Some((_, old)) = self.records.remove(id) {
            for address in old.attachments.addresses() {
                unlink(&self.by_address, &address, id);
            }
            if let Some(namespace) = namespace(&old) {
                unlink(&self.by_namespace, &namespace, id);
            }
            self.changed();
        }
    }

    /// Notes the gateways of a network; none, and it is gone. For the writer.
    pub(super) fn set_gateways(&self, network: &NetworkId, gateways: Vec<IpAddr>) {
        if gateways.is_empty() {
            self.gateways.remove(network);
        } else {
            self.gateways.insert(network.clone(), gateways);
        }
    }

    /// Notes whether the last inspection of a network failed. For the writer.
    pub(super) fn set_unread_network(&self, network: &NetworkId, unread: bool) {
        let changed = match unread {
            true => self.unread_networks.insert(network.clone()),
            false => self.unread_networks.remove(network).is_some(),
        };
        if changed {
            self.changed();
        }
    }

    /// Notes a container that the engine's list names and that could not be described. For the writer.
    pub(super) fn set_undescribed(&self, id: &ContainerId) {
        if !self.records.contains_key(id) {
            self.undescribed.insert(id.clone());
        }
    }

    /// Notes the call to the engine that fails. For the writer.
    pub(super) fn set_failing(&self, failing: Option<Failing>) {
        if self.failing.load().as_deref() != failing.as_ref() {
            self.failing.store(failing.map(Arc::new));
        }
    }

    /// Notes how it stands with the engine. For the writer.
    pub(super) fn set_engine(&self, state: EngineState) {
        self.engine.store(Arc::new(state));
        self.changed();
    }

    fn changed(&self) {
        self.version.send_modify(|version| *version += 1);
    }
}

fn namespace(record: &Record) -> Option<NamespaceId> {
    record.life.as_ref().map(|life| life.handle.namespace())
}

fn link<K: Eq + Hash>(map: &DashMap<K, Vec<ContainerId>>, key: K, id: &ContainerId) {
    let mut ids = map.entry(key).or_default();
    if !ids.contains(id) {
        ids.push(id.clone());
    }
}

/// Takes a key from one container, and from nobody else who holds it by now.
fn unlink<K: Eq + Hash>(map: &DashMap<K, Vec<ContainerId>>, key: &K, id: &ContainerId) {
    map.remove_if_mut(key, |_, ids| {
        ids.retain(|other| other != id);
        ids.is_empty()
    });
}
