//! Labels and variables of images, kept while a container of the image exists: `docker rmi -f` removes the image of a container
//! and leaves the container, whose labels must keep their meaning.

use std::collections::BTreeMap;
use std::sync::Arc;

use dashmap::DashMap;
use serde::{Deserialize, Serialize};

use super::Environment;

/// The labels and variables that an image brings to each container that is made of it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Image {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Variables.
    pub environment: Environment,
}

/// The images of all containers, by ID. `None`: it could not be read this time, so that a stored one stays.
pub type InUse = BTreeMap<String, Option<Arc<Image>>>;

/// Where images outlive the daemon. The ID of an image is a digest, and one that names images for several platforms is read for the
/// platform of the host only, so that a stored image never becomes wrong. Calls block.
pub trait ImageStore: Send + Sync + 'static {
    /// The image with this ID, if it is stored.
    fn load(&self, id: &str) -> Option<Image>;

    /// Stores these images and forgets all others. A call with a lower `version` than an earlier one does nothing: calls may
    /// overtake each other.
    fn store(&self, version: u64, images: &InUse);
}

/// The images that are known, by ID. Cheap to clone: all clones share them.
#[derive(Clone)]
pub struct KnownImages {
    by_id: Arc<DashMap<String, Arc<Image>>>,
    store: Arc<dyn ImageStore>,
}

impl KnownImages {
    /// An image that was read before.
    pub fn get(&self, id: &str) -> Option<Arc<Image>> {
        self.by_id.get(id).map(|image| image.clone())
    }

    /// An image that an earlier daemon has stored. Blocks.
    pub fn load(&self, id: &str) -> Option<Image> {
        self.store.load(id)
    }

    /// Remembers an image that was read, until [`Images::keep`] finds no container of it.
    pub fn insert(&self, id: &str, image: Image) -> Arc<Image> {
        let image = Arc::new(image);
        self.by_id.insert(id.to_owned(), image.clone());
        image
    }
}

/// Images of the containers that exist: in memory, and in the store.
pub struct Images {
    known: KnownImages,
    /// The images that are stored, and whether they could be read. `None`: those of an earlier daemon.
    stored: Option<BTreeMap<String, bool>>,
    version: u64,
}

impl Images {
    /// No image is known yet; `store` has those of an earlier daemon.
    pub fn new(store: Arc<dyn ImageStore>) -> Self {
        Self {
            known: KnownImages {
                by_id: Arc::default(),
                store,
            },
            stored: None,
            version: 0,
        }
    }

    /// The images that are known.
    pub fn known(&self) -> KnownImages {
        self.known.clone()
    }

    /// Keeps the images of the containers that exist, and forgets all others. Returns the work of storing them, which blocks, if
    /// they differ from those that are stored.
    pub fn keep(&mut self, in_use: InUse) -> Option<impl FnOnce() + Send + use<>> {
        let by_id = &self.known.by_id;
        by_id.retain(|id, _| in_use.contains_key(id));
        for (id, image) in in_use.iter().filter_map(|(id, image)| Some((id, image.as_ref()?))) {
            by_id.entry(id.clone()).or_insert_with(|| image.clone());
        }
        let new: BTreeMap<_, _> = in_use.iter().map(|(id, image)| (id.clone(), image.is_some())).collect();
        if self.stored.as_ref() == Some(&new) {
            return None;
        }
        self.stored = Some(new);
        self.version += 1;
        let (store, version) = (self.known.store.clone(), self.version);
        Some(move || store.store(version, &in_use))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    /// The IDs of the images that were stored last.
    #[derive(Default)]
    struct Stored(Mutex<Vec<String>>);

    impl ImageStore for Stored {
        fn load(&self, _: &str) -> Option<Image> {
            None
        }

        fn store(&self, _: u64, images: &InUse) {
            *self.0.lock().unwrap() = images.keys().cloned().collect();
        }
    }

    #[test]
    fn forgets_the_images_of_an_earlier_daemon_although_no_container_exists() {
        let stored = Arc::new(Stored(Mutex::new(vec!["earlier".to_owned()])));
        let mut images = Images::new(stored.clone());
        images.keep(InUse::new()).expect("the stored images are not known")();
        assert!(stored.0.lock().unwrap().is_empty());
        assert!(images.keep(InUse::new()).is_none());
    }

    #[test]
    fn stores_the_images_in_use_whenever_one_takes_the_place_of_another() {
        let stored = Arc::new(Stored::default());
        let mut images = Images::new(stored.clone());
        for in_use in [&["a", "b"][..], &["a", "c"], &["c"], &[]] {
            let keep = || {
                in_use
                    .iter()
                    .map(|id| ((*id).to_owned(), Some(Arc::default())))
                    .collect()
            };
            images.keep(keep()).expect("others than before")();
            assert_eq!(*stored.0.lock().unwrap(), in_use);
            assert!(images.keep(keep()).is_none(), "the same as before: {in_use:?}");
        }
    }
}
