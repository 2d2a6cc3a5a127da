//! Connections whose callers are not proven: those that wait for a look-up, and those that are told that they are refused.
//!
//! A proof takes microseconds, so a connection takes a place here only if its first proof has failed. Places are limited. Each
//! ingress (a link, a bridge, the host) has a share of them, and each sender a share of its ingress: a newcomer finds places free
//! however many connections others hold.

use std::collections::HashMap;
use std::hash::Hash;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::attribution::AcceptedFrom;

/// Places of one ingress, at most.
const PER_INGRESS: usize = 256;
/// The smallest and the largest number of all places. In between it is a sixteenth of the limit on descriptors.
const PLACES: (usize, usize) = (64, 4096);

/// The maker of a connection, as far as it is known without a proof: the address behind a bridge, and on the host the user. A
/// container can have any number of addresses, but not of links: behind its link they are one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Sender {
    pub ingress: AcceptedFrom,
    pub address: Option<IpAddr>,
    pub user: Option<u32>,
}

/// The places of all senders.
#[derive(Debug)]
pub(super) struct Unproven {
    places: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_ingress: HashMap<AcceptedFrom, usize>,
    by_sender: HashMap<Sender, usize>,
    turned_away: u64,
}

/// Whether one of those who share `free` places may have one more than its `own`: half as many as are free. Any number of others
/// that take all they get therefore leave some free (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking
/// 6(2), 1998).
fn may_have_one_more(own: usize, free: usize) -> bool {
    own * 2 < free
}

impl Unproven {
    /// With a limit on descriptors.
    pub fn new(descriptors: usize) -> Self {
        Self {
            places: (descriptors / 16).clamp(PLACES.0, PLACES.1),
            taken: Mutex::default(),
        }
    }

    /// A place for one connection. `None`: this sender, or all who come in there, have their share already.
    pub fn take(&self, sender: Sender) -> Option<Place<'_>> {
        let mut taken = self.lock();
        let of_ingress = taken.by_ingress.get(&sender.ingress).copied().unwrap_or_default();
        let of_sender = taken.by_sender.get(&sender).copied().unwrap_or_default();
        let all_free = self.places.saturating_sub(taken.all);
        let ingress_free = PER_INGRESS.saturating_sub(of_ingress);
        // Behind a link there is one sender.
        let is_alone = matches!(sender.ingress, AcceptedFrom::Namespace(_)) && sender.user.is_none();
        let has_share = ingress_free > 0 && (is_alone || may_have_one_more(of_sender, ingress_free));
        if !has_share || !may_have_one_more(of_ingress, all_free) {
            taken.turned_away += 1;
            return None;
        }
        taken.all += 1;
        *taken.by_ingress.entry(sender.ingress).or_default() += 1;
        *taken.by_sender.entry(sender).or_default() += 1;
        Some(Place { of: self, sender })
    }

    /// Connections that got no place, so far.
    pub fn turned_away(&self) -> u64 {
        self.lock().turned_away
    }

    fn lock(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The place of one connection. Dropping it frees the place.
#[derive(Debug)]
pub(super) struct Place<'a> {
    of: &'a Unproven,
    sender: Sender,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut taken = self.of.lock();
        taken.all -= 1;
        give_back(&mut taken.by_ingress, &self.sender.ingress);
        give_back(&mut taken.by_sender, &self.sender);
    }
}

fn give_back<K: Eq + Hash>(counts: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::containers::NamespaceId;

    fn behind_a_bridge(bridge: u32, address: u8) -> Sender {
        Sender {
            ingress: AcceptedFrom::Bridge(bridge),
            address: Some([10, 0, 0, address].into()),
            user: None,
        }
    }

    fn behind_a_link(namespace: u64) -> Sender {
        Sender {
            ingress: AcceptedFrom::Namespace(NamespaceId(namespace)),
            address: None,
            user: None,
        }
    }

    fn take_all(places: &Unproven, sender: Sender) -> Vec<Place<'_>> {
        std::iter::from_fn(|| places.take(sender)).collect()
    }

    #[test]
    fn one_sender_cannot_take_all_places() {
        let places = Unproven::new(1024);
        let taken = take_all(&places, behind_a_link(1));
        assert_eq!(taken.len(), 22);
        assert_eq!(places.turned_away(), 1);
        assert!(places.take(behind_a_link(2)).is_some());
        drop(taken);
        let left = places.lock();
        assert!(left.all == 0 && left.by_ingress.is_empty() && left.by_sender.is_empty());
    }

    #[test]
    fn an_ingress_has_at_most_256() {
        let places = Unproven::new(1 << 20);
        assert_eq!(take_all(&places, behind_a_link(1)).len(), PER_INGRESS);
        let taken: Vec<_> = (0..=255)
            .map(|address| take_all(&places, behind_a_bridge(1, address)))
            .collect();
        assert_eq!(taken.iter().map(Vec::len).sum::<usize>(), PER_INGRESS);
        assert!(places.take(behind_a_bridge(2, 1)).is_some(), "another bridge");
    }

    #[test]
    fn a_neighbor_on_the_bridge_finds_places() {
        let places = Unproven::new(1 << 20);
        let taken = take_all(&places, behind_a_bridge(1, 1));
        assert_eq!(taken.len(), 86);
        assert!(places.take(behind_a_bridge(1, 2)).is_some());
        // Users of the host share its places likewise.
        let user = |user| Sender {
            user: Some(user),
            ..behind_a_link(1)
        };
        let taken = take_all(&places, user(1000));
        assert_eq!(taken.len(), 86);
        assert!(places.take(user(0)).is_some());
    }

    proptest! {
        /// However many take whatever they get, a new one gets a place.
        #[test]
        fn a_newcomer_finds_a_place(others in 1_u64..60, descriptors in 256_usize..1 << 20) {
            let places = Unproven::new(descriptors);
            let mut taken = Vec::new();
            loop {
                let before = taken.len();
                taken.extend((0..others).filter_map(|number| places.take(behind_a_link(number))));
                prop_assert!(taken.len() <= places.places);
                if taken.len() == before {
                    break;
                }
            }
            prop_assert!(places.take(behind_a_link(others)).is_some());
        }
    }
}
