//! The limit on the open connections of one container run.
//!
//! At the limit a new connection waits. The connection that has been idle longest is asked to close and frees its slot. A
//! connection is idle from the moment its answer is ready until its next request. If no connection becomes idle before the
//! deadline of the new one, the server answers it with 503.
//!
//! A client may send its next request while an idle connection is being closed, and some clients do not repeat it. Above
//! [`KEPT_LIMIT`] a connection therefore closes with its answer, which the client sees before it sends another request.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout_at};

/// Open connections of one container run, at most.
pub const LIMIT: usize = 64;
/// Open connections of one container run up to which idle ones are kept.
pub const KEPT_LIMIT: usize = LIMIT / 2;
/// New connections of one container run that wait for a slot, or have waited and are being answered with 503, at most.
pub const WAITING_LIMIT: usize = 192;
/// New connections of one container run that are answered with 503 at once, at most.
const TURNED_AWAY_LIMIT: usize = 64;
/// The smallest share of a container run.
const LOWEST_SHARE: usize = 4;

/// How many connections one container run may have at once, in each state.
#[derive(Clone, Copy, Debug)]
struct Limits {
    open: usize,
    waiting: usize,
    turned_away: usize,
}

impl Limits {
    /// Where descriptors are scarce, all connections together stay within `share`. A quarter of it is for those that wait, since a
    /// connection closes for a new one only if that one can wait. As many more are being answered with 503, for a moment.
    fn of(share: usize) -> Self {
        let share = share.max(LOWEST_SHARE);
        let quarter = share / 4;
        let open = (share - quarter).min(LIMIT);
        Self {
            open,
            waiting: (share - open).min(WAITING_LIMIT),
            turned_away: quarter.min(TURNED_AWAY_LIMIT),
        }
    }
}

/// The connections of one container run. Each open one holds a [`Slot`].
#[derive(Debug, Default)]
pub struct ConnectionSlots(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    open: Vec<Open>,
    /// New connections in the order of their arrival. The sender of one that gave up is closed.
    waiting: VecDeque<oneshot::Sender<Slot>>,
    /// How many hold a [`Waiting`]: those of `waiting`, and those that gave up and have not been answered yet.
    places: usize,
    /// How many are answered with 503 at once.
    turned_away: usize,
    /// The number given last, to a connection or to an idle period.
    last_number: u64,
    made_room: u64,
    refused: u64,
}

/// One open connection.
#[derive(Debug)]
struct Open {
    number: u64,
    /// Number of its idle period: the smallest is the longest. `None`: it waits for its first request, or answers one.
    idle_since: Option<u64>,
    asked_to_close: bool,
    /// It closes with the answer that it has just got.
    closes: bool,
    close: Arc<Notify>,
}

/// Why a connection gets no slot.
#[derive(Debug)]
pub enum Full {
    /// No slot became free before the deadline. The caller answers with 503 and then drops the place.
    TimedOut(Waiting),
    /// Too many connections wait already. The caller answers with 503 at once and then drops the place.
    TooManyWaiting(TurnedAway),
    /// As many are being answered with 503 at once: the caller closes this one.
    TooManyTurnedAway,
}

impl ConnectionSlots {
    /// Takes a slot. At the limit it waits for one until `deadline`. `share`: how many connections this run may have at once, if that
    /// is less than [`LIMIT`] and [`WAITING_LIMIT`] together.
    ///
    /// # Errors
    /// When there is none; counted in [`refused`](Self::refused).
    pub async fn take(self: &Arc<Self>, deadline: Instant, share: usize) -> Result<Slot, Full> {
        let limits = Limits::of(share);
        let (place, granted) = {
            let mut state = self.lock();
            if state.open.len() < limits.open {
                return Ok(self.occupy(&mut state));
            }
            if state.places >= limits.waiting {
                state.refused += 1;
                if state.turned_away >= limits.turned_away {
                    return Err(Full::TooManyTurnedAway);
                }
                state.turned_away += 1;
                return Err(Full::TooManyWaiting(TurnedAway(self.clone())));
            }
            let (grant, granted) = oneshot::channel();
            state.waiting.push_back(grant);
            state.places += 1;
            state.make_room();
            (Waiting(self.clone()), granted)
        };
        if let Ok(Ok(slot)) = timeout_at(deadline, granted).await {
            return Ok(slot);
        }
        self.lock().refused += 1;
        Err(Full::TimedOut(place))
    }

    /// Open connections now.
    pub fn open(&self) -> usize {
        self.lock().open.len()
    }

    /// Idle connections that were asked to close for a new one, so far.
    pub fn made_room(&self) -> u64 {
        self.lock().made_room
    }

    /// New connections that got no slot, so far. The server answers them with 503.
    pub fn refused(&self) -> u64 {
        self.lock().refused
    }

    fn occupy(self: &Arc<Self>, state: &mut State) -> Slot {
        let (number, close) = (state.number(), Arc::new(Notify::new()));
        state.open.push(Open {
            number,
            idle_since: None,
            asked_to_close: false,
            closes: false,
            close: close.clone(),
        });
        Slot {
            slots: self.clone(),
            number,
            close,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.last_number += 1;
        self.last_number
    }

    fn find(&mut self, number: u64) -> Option<&mut Open> {
        self.open.iter_mut().find(|open| open.number == number)
    }

    /// Asks idle connections to close, longest idle first, until one closes for each new connection that waits.
    fn make_room(&mut self) {
        self.waiting.retain(|grant| !grant.is_closed());
        if self.waiting.is_empty() {
            return;
        }
        let closing = self.open.iter().filter(|open| open.asked_to_close).count();
        for _ in closing..self.waiting.len() {
            // First those that have had their last answer: they only wait for their clients to close.
            let idle = self.open.iter_mut().filter(|open| !open.asked_to_close);
            let idlest = idle.filter_map(|open| Some((!open.closes, open.idle_since?, open)));
            let Some((.., idlest)) = idlest.min_by_key(|(kept, since, _)| (*kept, *since)) else {
                return;
            };
            idlest.asked_to_close = true;
            idlest.close.notify_one();
            self.made_room += 1;
        }
    }
}

/// The slot of one open connection. Dropping it frees the slot, for the connection that has waited longest.
#[derive(Debug)]
pub struct Slot {
    slots: Arc<ConnectionSlots>,
    number: u64,
    close: Arc<Notify>,
}

impl Slot {
    /// A request has started: until [`idle`](Self::idle), the connection is not asked to close.
    pub fn busy(&self) {
        if let Some(open) = self.slots.lock().find(self.number) {
            open.idle_since = None;
        }
    }

    /// The answer to a request is ready. True: the connection has to close after it, because many are open or a new one needs
    /// the slot.
    pub fn idle(&self) -> bool {
        let mut state = self.slots.lock();
        let now = state.number();
        let closes = state.open.len() > KEPT_LIMIT;
        if let Some(open) = state.find(self.number) {
            (open.idle_since, open.closes) = (Some(now), closes);
        }
        state.make_room();
        closes || state.find(self.number).is_some_and(|open| open.asked_to_close)
    }

    /// Whether the connection was asked to close for a new one.
    pub fn asked_to_close(&self) -> bool {
        let mut state = self.slots.lock();
        state.find(self.number).is_some_and(|open| open.asked_to_close)
    }

    /// Completes once, when the connection is asked to close for a new one.
    pub async fn close_asked(&self) {
        self.close.notified().await;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut state = self.slots.lock();
        state.open.retain(|open| open.number != self.number);
        let granted = state.waiting.pop_front().map(|grant| {
            let slot = self.slots.occupy(&mut state);
            (grant, slot)
        });
        // Without the lock: if the new connection has given up, the slot comes back and is dropped here.
        drop(state);
        if let Some((grant, slot)) = granted {
            drop(grant.send(slot));
        }
    }
}

/// The place of a new connection that is answered with 503 at once. Dropping it frees the place.
#[derive(Debug)]
pub struct TurnedAway(Arc<ConnectionSlots>);

impl Drop for TurnedAway {
    fn drop(&mut self) {
        self.0.lock().turned_away -= 1;
    }
}

/// The place of a new connection that waits for a slot. Dropping it frees the place.
#[derive(Debug)]
pub struct Waiting(Arc<ConnectionSlots>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.lock().places -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const WAIT: Duration = Duration::from_millis(400);

    /// Slots that are all taken, each by a connection that reads its first request, but for those of these numbers, which
    /// become idle in that order.
    async fn full(idle: &[usize]) -> (Arc<ConnectionSlots>, Vec<Slot>) {
        let slots = Arc::new(ConnectionSlots::default());
        let mut taken: Vec<Slot> = Vec::new();
        for number in 0..LIMIT {
            if number == KEPT_LIMIT {
                idle.iter().for_each(|number| assert!(!taken[*number].idle()));
            }
            taken.push(slots.take(Instant::now(), usize::MAX).await.unwrap());
        }
        (slots, taken)
    }

    fn spawn_take(slots: &Arc<ConnectionSlots>) -> tokio::task::JoinHandle<Result<Slot, Full>> {
        let slots = slots.clone();
        tokio::spawn(async move { slots.take(Instant::now() + WAIT, usize::MAX).await })
    }

    /// Lets every other task run until it waits.
    async fn settle() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn longest_idle_connection_is_asked_to_close() {
        let (slots, mut taken) = full(&[7, 3, 9]).await;
        // Idle for longest, but busy again.
        taken[7].busy();
        let new = spawn_take(&slots);
        taken[3].close_asked().await;
        assert!(taken[3].asked_to_close() && !taken[9].asked_to_close() && !new.is_finished());
        drop(taken.remove(3));
        assert!(new.await.unwrap().is_ok());
        assert_eq!((slots.made_room(), slots.refused()), (1, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn one_connection_closes_for_each_that_waits() {
        let (slots, taken) = full(&[0, 1, 2]).await;
        let new = [spawn_take(&slots), spawn_take(&slots)];
        settle().await;
        let asked: Vec<_> = taken.iter().take(4).map(Slot::asked_to_close).collect();
        assert_eq!(asked, [true, true, false, false]);
        drop(taken);
        for new in new {
            assert!(new.await.unwrap().is_ok());
        }
        assert_eq!(slots.made_room(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_has_had_its_last_answer_makes_room_first() {
        let (slots, taken) = full(&[7]).await;
        assert!(taken[5].idle(), "many are open");
        let _new = spawn_take(&slots);
        settle().await;
        assert!(taken[5].asked_to_close() && !taken[7].asked_to_close());
        assert_eq!(slots.made_room(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_asked_while_it_answers_closes_after_the_answer() {
        let (slots, taken) = full(&[0]).await;
        let _new = spawn_take(&slots);
        taken[0].close_asked().await;
        // Its next request had arrived already.
        taken[0].busy();
        assert!(taken[0].idle());
        assert_eq!(slots.made_room(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn without_an_idle_connection_a_new_one_waits_until_its_deadline() {
        let (slots, taken) = full(&[]).await;
        let started = Instant::now();
        assert!(matches!(spawn_take(&slots).await.unwrap(), Err(Full::TimedOut(_))));
        assert_eq!(started.elapsed(), WAIT);
        assert_eq!((slots.open(), slots.made_room(), slots.refused()), (LIMIT, 0, 1));
        // It no longer waits: no connection closes for it.
        assert!(!taken[0].asked_to_close());
        drop(taken);
        assert_eq!(slots.open(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn slots_go_to_those_who_wait_in_the_order_of_arrival() {
        let (slots, mut taken) = full(&[]).await;
        let gives_up = spawn_take(&slots);
        settle().await;
        gives_up.abort();
        assert!(gives_up.await.unwrap_err().is_cancelled());
        let (first, second) = (spawn_take(&slots), spawn_take(&slots));
        settle().await;
        drop(taken.pop());
        assert!(timeout(WAIT / 2, first).await.unwrap().unwrap().is_ok());
        assert!(second.await.unwrap().is_ok(), "the first one has dropped its slot");
        assert_eq!(slots.open(), LIMIT - 1);
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_connections_are_limited() {
        let (slots, _taken) = full(&[]).await;
        let waiting: Vec<_> = (0..WAITING_LIMIT).map(|_| spawn_take(&slots)).collect();
        settle().await;
        let now = Instant::now();
        let full = timeout(WAIT / 2, slots.take(now + WAIT, usize::MAX)).await.unwrap();
        let Err(Full::TooManyWaiting(first)) = full else {
            panic!("{full:?}")
        };
        // Those that are turned away are limited, too.
        let mut turned_away = vec![first];
        let last = loop {
            match slots.take(now + WAIT, usize::MAX).await {
                Err(Full::TooManyWaiting(place)) => turned_away.push(place),
                other => break other,
            }
        };
        assert!(matches!(last, Err(Full::TooManyTurnedAway)), "{last:?}");
        assert_eq!(turned_away.len(), LIMIT);
        drop(turned_away);
        // Those that gave up keep their places until they are answered.
        let mut unanswered = Vec::new();
        for waiting in waiting {
            unanswered.push(waiting.await.unwrap().unwrap_err());
        }
        assert!(matches!(
            slots.take(now, usize::MAX).await,
            Err(Full::TooManyWaiting(_))
        ));
        drop(unanswered);
        assert!(matches!(slots.take(now, usize::MAX).await, Err(Full::TimedOut(_))));
        assert_eq!(slots.refused(), (WAITING_LIMIT + LIMIT) as u64 + 3);
    }

    #[tokio::test(start_paused = true)]
    async fn where_descriptors_are_scarce_fewer_are_open() {
        let slots = Arc::new(ConnectionSlots::default());
        let now = Instant::now();
        let mut taken = Vec::new();
        for _ in 0..6 {
            taken.push(slots.take(now, 8).await.unwrap());
        }
        let first = slots.take(now, 8).await.unwrap_err();
        let second = slots.take(now, 8).await.unwrap_err();
        assert!(matches!((&first, &second), (Full::TimedOut(_), Full::TimedOut(_))));
        // 8 in all: more are told so, a few at a time, and the others are closed.
        let third = slots.take(now, 8).await.unwrap_err();
        assert!(matches!(third, Full::TooManyWaiting(_)));
        let fourth = slots.take(now, 8).await.unwrap_err();
        assert!(matches!(fourth, Full::TooManyWaiting(_)));
        assert!(matches!(slots.take(now, 8).await, Err(Full::TooManyTurnedAway)));
        // Later there are more again, and never fewer than a client needs.
        taken.push(slots.take(now, 64).await.unwrap());
        let few = Arc::new(ConnectionSlots::default());
        assert!(few.take(now, 0).await.is_ok());
    }

    #[test]
    fn the_limits_of_a_share() {
        let limits = |share| {
            let Limits {
                open,
                waiting,
                turned_away,
            } = Limits::of(share);
            [open, waiting, turned_away]
        };
        assert_eq!(limits(0), [3, 1, 1]);
        assert_eq!(limits(32), [24, 8, 8]);
        assert_eq!(limits(LIMIT + WAITING_LIMIT), [LIMIT, WAITING_LIMIT, TURNED_AWAY_LIMIT]);
        assert_eq!(limits(usize::MAX), [LIMIT, WAITING_LIMIT, TURNED_AWAY_LIMIT]);
    }
}
