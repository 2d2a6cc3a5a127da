//! Connections whose callers are not proven: those that wait for a look-up, and those that are told that they are refused.
//!
//! A proof takes microseconds, so a connection takes a place here only if its first proof has failed. Places are limited, and
//! each sender has a share of them: a newcomer finds places free however many connections others hold.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::caller::Via;

/// Places of one sender, at most.
const PER_SENDER: usize = 64;
/// The smallest and the largest number of all places. In between it is a sixteenth of the limit on descriptors.
const PLACES: (usize, usize) = (64, 4096);

/// Whose places are counted together: those of one address behind one link or bridge, and on the host those of one user.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Sender {
    pub via: Via,
    pub address: IpAddr,
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
    by_sender: HashMap<Sender, usize>,
    turned_away: u64,
}

impl Unproven {
    /// With a limit on descriptors.
    pub fn new(descriptors: usize) -> Self {
        Self {
            places: (descriptors / 16).clamp(PLACES.0, PLACES.1),
            taken: Mutex::default(),
        }
    }

    /// A place for one connection. `None`: this sender has its share already.
    ///
    /// A sender may have half as many as there are free places. Any number of senders that take all they get therefore leave
    /// some free (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on Networking 6(2), 1998).
    pub fn take(&self, sender: Sender) -> Option<Place<'_>> {
        let mut taken = self.lock();
        let free = self.places.saturating_sub(taken.all);
        let own = taken.by_sender.get(&sender).copied().unwrap_or_default();
        if own >= PER_SENDER || own * 2 >= free {
            taken.turned_away += 1;
            return None;
        }
        taken.all += 1;
        taken.by_sender.insert(sender, own + 1);
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
        if let Some(own) = taken.by_sender.get_mut(&self.sender) {
            *own -= 1;
            if *own == 0 {
                taken.by_sender.remove(&self.sender);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sender(number: u32) -> Sender {
        Sender {
            via: Via::Bridge(number),
            address: [10, 0, 0, 1].into(),
            user: None,
        }
    }

    #[test]
    fn one_sender_cannot_take_all_places() {
        let places = Unproven::new(1024);
        let taken: Vec<_> = (0..200).map_while(|_| places.take(sender(1))).collect();
        assert_eq!(taken.len(), 22);
        assert_eq!(places.turned_away(), 1);
        assert!(places.take(sender(2)).is_some());
        drop(taken);
        assert!(places.lock().by_sender.is_empty());
        assert_eq!(places.lock().all, 0);
    }

    #[test]
    fn a_sender_has_at_most_64() {
        let places = Unproven::new(1 << 20);
        let taken: Vec<_> = (0..200).map_while(|_| places.take(sender(1))).collect();
        assert_eq!(taken.len(), PER_SENDER);
    }

    proptest! {
        /// However many senders take whatever they get, a new one gets a place.
        #[test]
        fn a_newcomer_finds_a_place(senders in 1_u32..60, descriptors in 256_usize..1 << 20) {
            let places = Unproven::new(descriptors);
            let mut taken = Vec::new();
            loop {
                let before = taken.len();
                taken.extend((0..senders).filter_map(|number| places.take(sender(number))));
                prop_assert!(taken.len() <= places.places);
                if taken.len() == before {
                    break;
                }
            }
            prop_assert!(places.take(sender(senders)).is_some());
        }
    }
}
