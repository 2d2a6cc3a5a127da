//! The limit on log lines: a container can cause events of many kinds as often as it likes.
//!
//! Each kind of line is one place in the code and, of refusals, one reason: a caller that is refused for one reason does not keep the
//! lines about others out of the log. Up to [`BURST`] lines of a kind are written at once, and [`PER_SECOND`] after
//! that. Lines of level `debug` and `trace` are not limited: the operator asks for them.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, Filter};

use crate::clock::Clock;

/// Lines of one kind that are written at once.
const BURST: f64 = 20.0;
/// Lines of one kind a second after that.
const PER_SECOND: f64 = 1.0;

/// Lines that were not written.
static LEFT_OUT: AtomicU64 = AtomicU64::new(0);

/// Log lines of this process that were left out, so far.
pub fn lines_left_out() -> u64 {
    LEFT_OUT.load(Ordering::Relaxed)
}

/// How often the log says that lines were left out.
const REPORTED: Duration = Duration::from_secs(10);

/// Says in the log when lines were left out, until the task is dropped.
pub async fn report_lines_left_out() {
    let mut reported = lines_left_out();
    loop {
        tokio::time::sleep(REPORTED).await;
        let left_out = lines_left_out();
        if left_out > reported {
            tracing::warn!(
                lines = left_out - reported,
                "log lines were left out: of each kind, one a second is written"
            );
        }
        reported = left_out;
    }
}

/// Lets lines through within the limit.
pub(super) struct LineLimit {
    clock: Clock,
    kinds: Mutex<HashMap<(Identifier, Reason), Kind>>,
}

/// The field `reason` of an event. The code has a fixed number of them.
#[derive(Clone, PartialEq, Eq, Hash, Default)]
struct Reason(String);

impl Visit for Reason {
    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "reason" {
            value.clone_into(&mut self.0);
        }
    }

    fn record_debug(&mut self, _: &Field, _: &dyn fmt::Debug) {}
}

struct Kind {
    /// Lines that may be written now.
    lines: f64,
    /// The boot time of the last line.
    last: Duration,
}

impl LineLimit {
    pub(super) fn new(clock: Clock) -> Self {
        Self {
            clock,
            kinds: Mutex::default(),
        }
    }

    /// Whether one more line of the event's kind may be written.
    fn allows(&self, event: &Event<'_>) -> bool {
        let mut reason = Reason::default();
        event.record(&mut reason);
        let kind = (event.metadata().callsite(), reason);
        let now = self.clock.boot();
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let kind = kinds.entry(kind).or_insert(Kind {
            lines: BURST,
            last: now,
        });
        let since = now.saturating_sub(kind.last).as_secs_f64();
        kind.lines = (kind.lines + since * PER_SECOND).min(BURST);
        kind.last = now;
        let allows = kind.lines >= 1.0;
        if allows {
            kind.lines -= 1.0;
        }
        allows
    }
}

impl<S: Subscriber> Filter<S> for LineLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        // More verbose levels are greater.
        let is_written = *event.metadata().level() > Level::INFO || self.allows(event);
        if !is_written {
            LEFT_OUT.fetch_add(1, Ordering::Relaxed);
        }
        is_written
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Arc;
    use std::time::UNIX_EPOCH;

    use tracing::subscriber::DefaultGuard;
    use tracing_subscriber::layer::{Layer as _, SubscriberExt as _};

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        /// A log with the limit, until the guard is dropped.
        fn start() -> (Self, DefaultGuard) {
            let (written, clock) = (Self::default(), Clock::scripted(UNIX_EPOCH));
            let writer = written.clone();
            let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
            let log = tracing_subscriber::registry().with(layer.with_filter(LineLimit::new(clock)));
            (written, tracing::subscriber::set_default(log))
        }

        fn lines(&self, with: &str) -> usize {
            let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
            text.lines().filter(|line| line.contains(with)).count()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn each_kind_of_line_has_a_limit_of_its_own() {
        let (written, _log) = Written::start();
        let before = lines_left_out();
        let often = || (0..1000).for_each(|number| tracing::warn!(number, "often"));
        often();
        assert_eq!(written.lines("often"), 20);
        assert!(lines_left_out() - before >= 980);
        // Another kind, and a level that the operator asks for.
        tracing::warn!("once");
        (0..1000).for_each(|number| tracing::debug!(number, "in detail"));
        assert_eq!((written.lines("once"), written.lines("in detail")), (1, 1000));
        // Later one line a second, and another burst at last.
        tokio::time::advance(Duration::from_secs(3)).await;
        often();
        assert_eq!(written.lines("often"), 23);
        tokio::time::advance(Duration::from_secs(3600)).await;
        often();
        assert_eq!(written.lines("often"), 43);
    }

    #[tokio::test(start_paused = true)]
    async fn lines_with_another_reason_are_of_another_kind() {
        let (written, _log) = Written::start();
        let refuse = |reason: &str| tracing::info!(reason, "refused");
        (0..1000).for_each(|_| refuse("unknown-address"));
        refuse("foreign-cgroup");
        assert_eq!(
            (written.lines("unknown-address"), written.lines("foreign-cgroup")),
            (20, 1)
        );
    }
}
