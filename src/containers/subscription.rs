//! When the engine's stream of events is subscribed to again. A stream that ends soon after its start costs little: the pause
//! grows with each of them, and the engine is not asked for everything before a stream has lasted.

use std::time::Duration;

use tokio::time::Instant;

/// The pauses before the next attempt where the engine cannot be reached: the first, which doubles, and the longest. An attempt is a
/// connect(2) that fails.
const UNREACHABLE: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(250));
/// The pauses after a stream that ended: the first one, and the longest. Each stream that ends soon makes it four times as long.
const ENDED: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(8));
/// A stream that ends earlier than this has ended soon.
const SOON: Duration = Duration::from_secs(10);
/// The stream after one that ended must last this long before the engine is asked for everything. Meanwhile its events are read.
const PROVEN: Duration = Duration::from_millis(500);

/// The streams of events so far.
#[derive(Default)]
pub(super) struct Subscription {
    /// When the present stream, or the last one, started.
    started: Option<Instant>,
    /// The last stream ended, and the engine could be reached all the time.
    has_ended: bool,
    /// Streams in a row that ended soon.
    ended_soon: u32,
    /// Attempts in a row that did not reach the engine.
    unreachable: u32,
}

impl Subscription {
    /// A stream has started. Returns when it has proven itself: now, or in a moment if it lasts.
    pub(super) fn started(&mut self, now: Instant) -> Instant {
        (self.started, self.unreachable) = (Some(now), 0);
        match self.has_ended {
            true => now + PROVEN,
            false => now,
        }
    }

    /// The stream has ended. Returns the pause before the next attempt.
    pub(super) fn ended(&mut self, now: Instant) -> Duration {
        let is_soon = self.started.is_some_and(|started| now - started < SOON);
        self.ended_soon = if is_soon { self.ended_soon.saturating_add(1) } else { 0 };
        self.has_ended = true;
        let times = self.ended_soon.saturating_sub(1).min(8);
        (ENDED.0 * 4_u32.pow(times)).min(ENDED.1)
    }

    /// The engine cannot be reached, so it is being restarted, which ends every stream. Returns the pause before the next attempt.
    pub(super) fn unreachable(&mut self) -> Duration {
        (self.has_ended, self.ended_soon) = (false, 0);
        let pause = UNREACHABLE.0 * 2_u32.pow(self.unreachable.min(8));
        self.unreachable = self.unreachable.saturating_add(1);
        pause.min(UNREACHABLE.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    #[test]
    fn streams_that_end_at_once_cost_few_attempts() {
        let mut subscription = Subscription::default();
        let start = Clock::system().now();
        let (mut now, mut attempts) = (start, 0);
        while now - start < Duration::from_secs(60) {
            subscription.started(now);
            attempts += 1;
            now += subscription.ended(now);
        }
        assert!(attempts <= 13, "{attempts}");
    }

    #[test]
    fn pause_is_short_again_after_a_stream_that_lasted() {
        let mut subscription = Subscription::default();
        let mut now = Clock::system().now();
        for _ in 0..20 {
            subscription.started(now);
            now += subscription.ended(now);
        }
        subscription.started(now);
        assert_eq!(subscription.ended(now), ENDED.1);
        subscription.started(now);
        assert_eq!(subscription.ended(now + SOON), ENDED.0);
    }

    #[test]
    fn only_a_stream_after_one_that_ended_must_prove_itself() {
        let mut subscription = Subscription::default();
        let now = Clock::system().now();
        assert_eq!(subscription.started(now), now);
        subscription.ended(now + SOON);
        assert_eq!(subscription.started(now), now + PROVEN);
    }

    #[test]
    fn an_engine_that_is_restarted_is_not_taken_for_one_whose_streams_break() {
        let mut subscription = Subscription::default();
        let now = Clock::system().now();
        for _ in 0..20 {
            subscription.started(now);
            subscription.ended(now);
            assert!(subscription.unreachable() <= UNREACHABLE.1);
        }
        assert_eq!(subscription.started(now), now);
        let pauses: Vec<_> = (0..20).map(|_| subscription.unreachable()).collect();
        assert_eq!((pauses[0], pauses[19]), UNREACHABLE);
    }
}
