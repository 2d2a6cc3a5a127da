//! Labels and variables of images, kept while a container of the image exists: `docker rmi -f` removes the image of a container
//! and leaves the container, whose labels must keep their meaning.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use dashmap::DashMap;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};

use super::Environment;
use super::watcher::{ContainerEngine, EngineError, blocking};

/// The labels and variables that an image brings to each container that is made of it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Image {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Variables.
    pub environment: Environment,
}

/// Where images outlive the daemon. An image ID is a digest of the image's configuration, so that a stored image never becomes
/// wrong. Calls block.
pub trait ImageStore: Send + Sync + 'static {
    /// The image with this ID, if it is stored.
    fn load(&self, id: &str) -> Option<Image>;

    /// Stores exactly these images, by ID, and forgets all others. A call with a lower `version` than an earlier one does
    /// nothing: calls may overtake each other.
    fn store(&self, version: u64, images: &BTreeMap<String, Arc<Image>>);
}

/// Images by ID: those of the containers that exist.
pub struct Images {
    known: Arc<DashMap<String, Arc<Image>>>,
    store: Arc<dyn ImageStore>,
    stored: HashSet<String>,
    version: u64,
}

impl Images {
    /// No image is known yet; `store` has those of an earlier daemon.
    pub fn new(store: Arc<dyn ImageStore>) -> Self {
        Self {
            known: Arc::default(),
            store,
            stored: HashSet::new(),
            version: 0,
        }
    }

    /// Reads an image: as known, from the engine, or from the store if the engine does not have it any more. `None`: it cannot be
    /// read.
    pub fn read(
        &self,
        engine: Arc<dyn ContainerEngine>,
    ) -> impl Fn(String) -> BoxFuture<'static, Result<Option<Arc<Image>>, EngineError>> + use<> {
        let (known, store) = (self.known.clone(), self.store.clone());
        move |id| {
            let (known, store, engine) = (known.clone(), store.clone(), engine.clone());
            Box::pin(async move {
                if let Some(image) = known.get(&id) {
                    return Ok(Some(image.clone()));
                }
                let key = id.clone();
                let image = match engine.image(&id).await? {
                    Some(image) => Some(image),
                    None => blocking(move || store.load(&id)).await,
                };
                let image = image.map(Arc::new);
                if let Some(image) = &image {
                    known.insert(key, image.clone());
                }
                Ok(image)
            })
        }
    }

    /// Notes the images of the containers that exist. Returns the work of storing them, if they are others than before.
    pub fn keep(&mut self, in_use: BTreeMap<String, Arc<Image>>) -> Option<BoxFuture<'static, ()>> {
        self.known.retain(|id, _| in_use.contains_key(id));
        for (id, image) in &in_use {
            self.known.entry(id.clone()).or_insert_with(|| image.clone());
        }
        if self.stored.len() == in_use.len() && in_use.keys().all(|id| self.stored.contains(id)) {
            return None;
        }
        self.stored = in_use.keys().cloned().collect();
        self.version += 1;
        let (store, version) = (self.store.clone(), self.version);
        Some(blocking(move || store.store(version, &in_use)))
    }
}
