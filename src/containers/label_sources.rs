//! Labels and variables of a container, and where each of them comes from: `docker run`, or perhaps the image.
//!
//! Docker merges the labels and variables of the image into those of the container, and does not record where a pair comes from. A
//! pair that the image lacks, or has with another value, was set when the container was created: it is *own*. A pair that the
//! image has with the same value may come from either: it is *ambiguous*. [`super::labels`] defines what an ambiguous pair may
//! do.

use std::collections::BTreeMap;
use std::fmt;

use litemap::LiteMap;

/// Where a pair comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// From the command that created the container: the image lacks the pair, or has another value.
    Own,
    /// The image has the same pair, or cannot be read.
    Ambiguous,
}

/// Labels or variables, by name. Two sorted lists, exactly as long as they are: there are as many of these as containers.
///
/// Applications keep secrets in variables, so `Debug` shows names only.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Pairs {
    own: LiteMap<String, String>,
    ambiguous: LiteMap<String, String>,
}

impl Pairs {
    /// Compares the pairs of a container with those of its image (`None`: the image cannot be read, so that every pair is
    /// ambiguous).
    pub fn split(all: &BTreeMap<String, String>, image: Option<&BTreeMap<String, String>>) -> Self {
        let is_own = |name: &String, value: &String| image.is_some_and(|image| image.get(name) != Some(value));
        let (own, ambiguous): (Vec<_>, Vec<_>) = all.iter().partition(|(name, value)| is_own(name, value));
        let copy = |pairs: Vec<(&String, &String)>| {
            let pairs = pairs.into_iter();
            pairs.map(|(name, value)| (name.clone(), value.clone())).collect()
        };
        Self {
            own: copy(own),
            ambiguous: copy(ambiguous),
        }
    }

    /// The pairs that were set when the container was created.
    pub fn own(&self) -> &LiteMap<String, String> {
        &self.own
    }

    /// The pairs that the image may have set.
    pub fn ambiguous(&self) -> &LiteMap<String, String> {
        &self.ambiguous
    }

    /// All of them, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &String, Origin)> {
        let own = self.own.iter().map(|(name, value)| (name, value, Origin::Own));
        let ambiguous = self.ambiguous.iter();
        own.chain(ambiguous.map(|(name, value)| (name, value, Origin::Ambiguous)))
    }

    /// The value of a pair, and where it comes from.
    pub fn get(&self, name: &str) -> Option<(&str, Origin)> {
        let own = self.own.get(name).map(|value| (value.as_str(), Origin::Own));
        own.or_else(|| {
            let ambiguous = self.ambiguous.get(name);
            ambiguous.map(|value| (value.as_str(), Origin::Ambiguous))
        })
    }

    /// The value of a pair that is own.
    pub fn get_own(&self, name: &str) -> Option<&str> {
        self.own.get(name).map(String::as_str)
    }

    /// Adds a pair that is own.
    pub fn insert(&mut self, name: &str, value: &str) {
        self.ambiguous.remove(name);
        self.own.insert(name.to_owned(), value.to_owned());
    }

    /// Counts ambiguous pairs with these names as own: something else shows that the image did not set them.
    pub fn count_as_own(&mut self, names: &[&str]) {
        for name in names {
            if let Some(value) = self.ambiguous.remove(*name) {
                self.own.insert((*name).to_owned(), value);
            }
        }
    }

    /// Keeps the pairs whose names are as `keep` says.
    pub fn retain(&mut self, keep: impl Fn(&str) -> bool) {
        self.own.retain(|name, _| keep(name));
        self.ambiguous.retain(|name, _| keep(name));
    }
}

/// All of them own.
impl FromIterator<(String, String)> for Pairs {
    fn from_iter<T: IntoIterator<Item = (String, String)>>(pairs: T) -> Self {
        Self {
            own: pairs.into_iter().collect(),
            ambiguous: LiteMap::new(),
        }
    }
}

impl fmt::Debug for Pairs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = |pairs: &LiteMap<String, String>| pairs.keys().cloned().collect::<Vec<_>>();
        f.debug_struct("Pairs")
            .field("own", &names(&self.own))
            .field("ambiguous", &names(&self.ambiguous))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn a_pair_that_the_image_has_with_the_same_value_is_ambiguous() {
        let all = map(&[("a", "1"), ("b", "2"), ("c", "3")]);
        let pairs = Pairs::split(&all, Some(&map(&[("b", "other"), ("c", "3"), ("d", "4")])));
        assert_eq!(pairs.get("a"), Some(("1", Origin::Own)));
        assert_eq!(pairs.get("b"), Some(("2", Origin::Own)));
        assert_eq!(pairs.get("c"), Some(("3", Origin::Ambiguous)));
        assert_eq!((pairs.get_own("c"), pairs.get("d")), (None, None));
        assert_eq!(pairs.iter().count(), 3);
    }

    #[test]
    fn every_pair_is_ambiguous_if_the_image_cannot_be_read() {
        let pairs = Pairs::split(&map(&[("a", "1")]), None);
        assert_eq!(pairs.get("a"), Some(("1", Origin::Ambiguous)));
        assert!(pairs.own().is_empty());
    }

    #[test]
    fn debug_shows_no_values() {
        let pairs = Pairs::split(&map(&[("NAME", "hidden")]), None);
        let text = format!("{pairs:?}");
        assert!(text.contains("NAME") && !text.contains("hidden"), "{text}");
    }
}
