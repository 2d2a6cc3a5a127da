//! Look-ups at the container engine: their subjects, answers and time limits. One container or image that the engine cannot
//! describe never costs the answer about others.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::stream::StreamExt as _;
use tokio::time::timeout;

use super::image_labels::{Image, KnownImages};
use super::reconciler::{ContainerEngine, ContainerSummary, EngineError, Inspection, Network, blocking};
use super::{ContainerId, NetworkId};

/// Images that are asked for at once.
const IMAGES: usize = 16;
/// How long containers that were looked up wait for images that are not known yet. Those of images that take longer follow.
const IMAGES_WAIT: Duration = Duration::from_secs(2);

/// The object of a look-up.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) enum LookupKey {
    /// The list of all containers.
    Rows,
    /// The list of all networks.
    Networks,
    Container(ContainerId),
    Inspect(ContainerId),
    Network(NetworkId),
    /// An image, by ID, that could not be read when a container of it was looked up.
    Image(String),
}

impl LookupKey {
    pub(super) fn is_list(&self) -> bool {
        matches!(self, Self::Rows | Self::Networks)
    }

    /// The call, without its object.
    pub(super) fn call(&self) -> &'static str {
        match self {
            Self::Rows => "list of containers",
            Self::Networks => "list of networks",
            Self::Container(_) => "look-up of a container",
            Self::Inspect(_) => "inspection of a container",
            Self::Network(_) => "inspection of a network",
            Self::Image(_) => "inspection of an image",
        }
    }

    /// The lower, the more depends on it.
    pub(super) fn rank(&self) -> u8 {
        match self {
            Self::Rows => 0,
            Self::Networks => 1,
            Self::Container(_) | Self::Inspect(_) | Self::Network(_) | Self::Image(_) => 2,
        }
    }
}

impl fmt::Display for LookupKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rows | Self::Networks => f.write_str(self.call()),
            Self::Container(id) | Self::Inspect(id) => write!(f, "{} ({})", self.call(), id.short()),
            Self::Network(id) => write!(f, "{} ({})", self.call(), id.0),
            Self::Image(id) => write!(f, "{} ({id})", self.call()),
        }
    }
}

/// A row, and its image: `None` if that does not exist any more, or why it could not be read.
pub(super) type ReadRow = (ContainerSummary, Result<Option<Arc<Image>>, EngineError>);

/// The list of all containers, with their images.
pub(super) struct ReadRows {
    pub(super) read: Vec<ReadRow>,
    /// Containers that the list names, and why they could not be described.
    pub(super) undescribed: Vec<(ContainerId, EngineError)>,
    /// Why the list may lack containers.
    pub(super) incomplete: Option<EngineError>,
}

/// The answer to a look-up. `None`: its object does not exist.
pub(super) enum LookupResult {
    Rows(ReadRows),
    Networks(Vec<NetworkId>),
    Container(Option<Box<ReadRow>>),
    Inspect(Option<Inspection>),
    Network(Option<Network>),
    Image(Option<Arc<Image>>),
}

impl LookupResult {
    /// Why the answer may lack something.
    pub(super) fn incomplete(&self) -> Option<EngineError> {
        match self {
            Self::Rows(rows) => rows.incomplete.clone(),
            _ => None,
        }
    }
}

/// One look-up.
pub(super) struct Lookup {
    pub(super) engine: Arc<dyn ContainerEngine>,
    pub(super) images: KnownImages,
    pub(super) image_labels_count: bool,
    /// How long the engine may take for one call.
    pub(super) limit: Duration,
}

impl Lookup {
    pub(super) async fn make(&self, subject: &LookupKey) -> Result<LookupResult, EngineError> {
        let (engine, limit) = (&self.engine, self.limit);
        Ok(match subject {
            LookupKey::Rows => {
                let listed = answer_within(limit, engine.containers()).await?;
                LookupResult::Rows(ReadRows {
                    read: self.with_images(listed.rows).await,
                    undescribed: listed.undescribed,
                    incomplete: listed.incomplete,
                })
            }
            LookupKey::Networks => LookupResult::Networks(answer_within(limit, engine.networks()).await?),
            LookupKey::Container(id) => {
                let row = answer_within(limit, engine.container(id)).await?;
                let read = self.with_images(row.into_iter().collect()).await;
                LookupResult::Container(read.into_iter().next().map(Box::new))
            }
            LookupKey::Inspect(id) => LookupResult::Inspect(answer_within(limit, engine.inspect(id)).await?),
            LookupKey::Network(id) => LookupResult::Network(answer_within(limit, engine.network(id)).await?),
            LookupKey::Image(id) => {
                LookupResult::Image(answer_within(limit, read_image(&**engine, &self.images, id)).await?)
            }
        })
    }

    /// Rows with their images, if these make a difference.
    async fn with_images(&self, rows: Vec<ContainerSummary>) -> Vec<ReadRow> {
        let late = tokio::time::sleep(IMAGES_WAIT).shared();
        let read = futures_util::stream::iter(rows).map(|row| async {
            if self.image_labels_count || !row.image_is_certain {
                return (row, Ok(None));
            }
            let image = tokio::select! {
                image = read_image(&*self.engine, &self.images, &row.image_id) => image,
                () = late.clone() => Err(no_answer(IMAGES_WAIT)),
            };
            (row, image)
        });
        read.buffered(IMAGES).collect().await
    }
}

/// Reads an image: as known, from the engine, or as an earlier daemon has stored it. `None`: it does not exist any more.
///
/// # Errors
/// When the engine does not answer, and the image is not stored.
pub async fn read_image(
    engine: &dyn ContainerEngine,
    images: &KnownImages,
    id: &str,
) -> Result<Option<Arc<Image>>, EngineError> {
    if let Some(image) = images.get(id) {
        return Ok(Some(image));
    }
    let answer = engine.image(id).await;
    let image = match answer {
        Ok(Some(image)) => Some(image),
        Ok(None) | Err(_) => {
            let (images, id) = (images.clone(), id.to_owned());
            let stored = blocking(move || images.load(&id)).await;
            if stored.is_none() {
                answer?;
            }
            stored
        }
    };
    Ok(image.map(|image| images.insert(id, image)))
}

/// # Errors
/// The engine's, or that it did not answer in time.
pub async fn answer_within<T>(
    limit: Duration,
    answer: impl Future<Output = Result<T, EngineError>>,
) -> Result<T, EngineError> {
    timeout(limit, answer).await.unwrap_or_else(|_| Err(no_answer(limit)))
}

fn no_answer(limit: Duration) -> EngineError {
    EngineError(format!("no answer within {} s", limit.as_secs()))
}
