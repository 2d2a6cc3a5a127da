//! What the operator has ordered for single containers while the daemon runs: changed instance options, and events. Kept, so
//! that a restart of the daemon forgets nothing.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::containers::ContainerId;
use crate::instance::Ordered;

/// Writes what is kept.
pub type Keep = Box<dyn Fn(&[u8]) -> std::io::Result<()> + Send + Sync>;

/// Orders, by container.
pub struct Orders {
    all: Mutex<BTreeMap<String, Ordered>>,
    keep: Keep,
}

/// As it is kept.
#[derive(Serialize, Deserialize, Default)]
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

impl Orders {
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
        let mut all = self.all();
        let mut ordered = all.get(container.as_str()).cloned().unwrap_or_default();
        change(&mut ordered);
        let mut new = all.clone();
        new.retain(|id, _| ContainerId::parse(id).is_some_and(|id| exists(&id)));
        new.insert(container.as_str().to_owned(), ordered.clone());
        let kept = Kept { containers: new };
        (self.keep)(&serde_json::to_vec_pretty(&kept)?)?;
        *all = kept.containers;
        Ok(ordered)
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Ordered>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

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
        let orders = Orders::new(&[], keep(&file)).unwrap();
        for digit in ["a", "b"] {
            orders
                .order(&id(digit), |_| true, |it| it.options.hop_limit = Some(1))
                .unwrap();
        }
        let again = Orders::new(&file.lock().unwrap().clone(), keep(&file)).unwrap();
        assert_eq!(again.of(&id("a")).unwrap().options.hop_limit, Some(1));
        assert_eq!(again.of(&id("c")), None);
        // `b` is no more.
        again
            .order(&id("a"), |it| *it == id("a"), |it| it.options.hop_limit = Some(2))
            .unwrap();
        assert_eq!(again.of(&id("b")), None);
        let full = Orders::new(
            &file.lock().unwrap().clone(),
            Box::new(|_| Err(std::io::Error::other("full"))),
        )
        .unwrap();
        assert!(
            full.order(&id("a"), |_| true, |it| it.options.hop_limit = Some(3))
                .is_err()
        );
        assert_eq!(full.of(&id("a")).unwrap().options.hop_limit, Some(2));
        assert!(Orders::new(b"nonsense", keep(&file)).is_err());
    }
}
