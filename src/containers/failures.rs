//! Look-ups at the container engine that failed. Each is made again while the engine is connected, however often it fails; the log
//! and `status` say so once, not per attempt.

use std::collections::HashMap;
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::index::Failing;
use super::lookups::LookupKey;

/// The pauses between two attempts, the first and the longest. In between, the pause is a fifth of the time since the first
/// failure: after an outage of some seconds, the next attempt follows within a second.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// A request that needs the answer brings the next attempt forward, if the last one is at least this long ago.
const HURRY: Duration = Duration::from_millis(500);
/// The log mentions the look-up of a single object only if it has failed for this long. A failing list is mentioned at once.
const MENTIONED: Duration = Duration::from_secs(1);
/// How long the engine may take to answer, at the first attempt and at most. The limit doubles with each attempt, so that a slow
/// engine is not asked in vain for ever.
const ANSWER: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(80));
/// The same for an inspection: it blocks while the container starts.
const INSPECTION: Duration = Duration::from_secs(60);

struct Failure {
    error: String,
    since: (Instant, SystemTime),
    tried: Instant,
    due: Option<Instant>,
    count: u32,
    mentioned: bool,
}

/// The look-ups that failed at their last attempt.
#[derive(Default)]
pub(super) struct Failures {
    all: HashMap<LookupKey, Failure>,
}

impl Failures {
    /// Notes an attempt that failed, and plans the next one. Returns whether it is the first in a row, or has another error.
    pub(super) fn note(&mut self, subject: &LookupKey, error: String, (now, wall): (Instant, SystemTime)) -> bool {
        let is_mentioned = self
            .all
            .iter()
            .any(|(it, failure)| failure.mentioned && it.call() == subject.call());
        let failure = self.all.entry(subject.clone()).or_insert_with(|| Failure {
            error: String::new(),
            since: (now, wall),
            tried: now,
            due: None,
            count: 0,
            mentioned: false,
        });
        failure.count = failure.count.saturating_add(1);
        let lasts = now - failure.since.0;
        let pause = (lasts / 5).clamp(PAUSE.0, PAUSE.1);
        (failure.tried, failure.due) = (now, Some(now + pause));
        debug!(%subject, error, attempts = failure.count, "look-up failed");
        if !failure.mentioned && (subject.is_list() || lasts >= MENTIONED) {
            failure.mentioned = true;
            if !is_mentioned {
                warn!(
                    error,
                    "the container engine fails: {subject}; trying again until it answers"
                );
            }
        }
        let is_new = failure.error != error;
        failure.error = error;
        is_new
    }

    /// The look-up was successful, or its object does not exist any more. Returns whether it failed before.
    pub(super) fn end(&mut self, subject: &LookupKey) -> bool {
        let Some(failure) = self.all.remove(subject) else {
            return false;
        };
        let others = || {
            self.all
                .iter()
                .any(|(it, other)| other.mentioned && it.call() == subject.call())
        };
        if failure.mentioned && !others() {
            info!("the container engine answers again: {}", subject.call());
        }
        true
    }

    /// The engine is not connected: all is looked up once it is.
    pub(super) fn clear(&mut self) {
        self.all.clear();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    /// Whether the look-up failed and its next attempt is planned.
    pub(super) fn is_planned(&self, subject: &LookupKey) -> bool {
        self.all.get(subject).is_some_and(|failure| failure.due.is_some())
    }

    /// The look-ups that failed and whose next attempt is planned.
    pub(super) fn planned(&self) -> impl Iterator<Item = &LookupKey> {
        let planned = self.all.iter().filter(|(_, failure)| failure.due.is_some());
        planned.map(|(subject, _)| subject)
    }

    /// Takes the look-ups whose next attempt is due.
    pub(super) fn take_due(&mut self, now: Instant) -> Vec<LookupKey> {
        let due = self
            .all
            .iter_mut()
            .filter(|(_, failure)| failure.due.is_some_and(|at| at <= now));
        due.map(|(subject, failure)| {
            failure.due = None;
            subject.clone()
        })
        .collect()
    }

    /// A caller waits for what these look-ups may tell.
    pub(super) fn hurry(&mut self) {
        for failure in self.all.values_mut() {
            let soonest = failure.tried + HURRY;
            failure.due = failure.due.map(|at| at.min(soonest));
        }
    }

    /// The error of the last attempt.
    pub(super) fn error(&self, subject: &LookupKey) -> Option<&str> {
        self.all.get(subject).map(|failure| failure.error.as_str())
    }

    /// How long the engine may take to answer the next attempt.
    pub(super) fn limit(&self, subject: &LookupKey) -> Duration {
        if matches!(subject, LookupKey::Inspect(_)) {
            return INSPECTION;
        }
        let failures = self.all.get(subject).map_or(0, |failure| failure.count);
        (ANSWER.0 * 2_u32.pow(failures.min(8))).min(ANSWER.1)
    }

    /// The failure on which most depends, for `status`.
    pub(super) fn worst(&self) -> Option<Failing> {
        let first = |(subject, failure): &(&LookupKey, &Failure)| (subject.rank(), failure.since.0);
        let (subject, failure) = self.all.iter().min_by_key(first)?;
        Some(Failing {
            call: subject.to_string(),
            error: failure.error.clone(),
            since: failure.since.1,
            others: self.all.len() - 1,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    /// The times of the attempts within `outage`, and that of the first one after it.
    fn attempts(outage: Duration) -> (usize, Duration) {
        let (start, wall) = (Clock::system().now(), SystemTime::UNIX_EPOCH);
        let mut failures = Failures::default();
        let (mut now, mut count) = (start, 0);
        while now - start < outage {
            failures.note(&LookupKey::Rows, "no".to_owned(), (now, wall));
            count += 1;
            while failures.take_due(now).is_empty() {
                now += Duration::from_millis(5);
            }
        }
        (count, now - start - outage)
    }

    #[test]
    fn pauses_grow_to_five_seconds_and_are_a_fifth_of_the_outage() {
        for (outage, attempts_at_most, late_at_most) in [(1, 10, 250), (4, 20, 900), (30, 35, 5_000), (600, 150, 5_000)]
        {
            let (count, late) = attempts(Duration::from_secs(outage));
            assert!(count <= attempts_at_most, "{outage} s: {count} attempts");
            assert!(late <= Duration::from_millis(late_at_most), "{outage} s: {late:?} late");
        }
    }

    #[test]
    fn a_waiting_caller_brings_the_next_attempt_forward_but_not_without_limit() {
        let (start, wall) = (Clock::system().now(), SystemTime::UNIX_EPOCH);
        let mut failures = Failures::default();
        failures.note(&LookupKey::Rows, "no".to_owned(), (start, wall));
        let later = start + Duration::from_secs(60);
        failures.note(&LookupKey::Rows, "no".to_owned(), (later, wall));
        failures.hurry();
        assert!(failures.take_due(later + HURRY - Duration::from_millis(1)).is_empty());
        assert_eq!(failures.take_due(later + HURRY), [LookupKey::Rows]);
        // It is under way: nothing is planned, and nothing to bring forward.
        failures.hurry();
        assert!(failures.take_due(later + Duration::from_secs(60)).is_empty());
    }

    #[test]
    fn status_tells_the_failure_on_which_most_depends() {
        let (now, wall) = (Clock::system().now(), SystemTime::UNIX_EPOCH);
        let mut failures = Failures::default();
        failures.note(&LookupKey::Image("sha256:ab".to_owned()), "500".to_owned(), (now, wall));
        failures.note(&LookupKey::Rows, "502".to_owned(), (now + Duration::from_secs(1), wall));
        let worst = failures.worst().unwrap();
        assert_eq!(
            (worst.call.as_str(), worst.error.as_str(), worst.others),
            ("list of containers", "502", 1)
        );
        assert!(failures.end(&LookupKey::Rows));
        assert_eq!(failures.worst().unwrap().call, "inspection of an image (sha256:ab)");
        assert!(!failures.end(&LookupKey::Rows));
    }

    #[test]
    fn an_engine_that_answers_slowly_gets_more_time_at_each_attempt() {
        let (now, wall) = (Clock::system().now(), SystemTime::UNIX_EPOCH);
        let mut failures = Failures::default();
        let limits: Vec<_> = (0..5)
            .map(|_| {
                let limit = failures.limit(&LookupKey::Rows).as_secs();
                failures.note(&LookupKey::Rows, "no answer".to_owned(), (now, wall));
                limit
            })
            .collect();
        assert_eq!(limits, [10, 20, 40, 80, 80]);
    }
}
