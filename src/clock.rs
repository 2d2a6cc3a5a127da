//! The only reader of time.
//!
//! Three clocks exist and they disagree: wall time (what AWS writes into `Expiration`; it jumps), monotonic time (for
//! deadlines; pausable in tests), and boot time (what IMDS tokens are measured in: it neither jumps with the wall clock
//! nor stops while a laptop sleeps, and it outlives a restart of the daemon).

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// A source of wall, monotonic and boot time. Cheap to clone; all clones tell the same time.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Scripted(Arc<Scripted>),
}

#[derive(Debug)]
struct Scripted {
    wall: SystemTime,
    start: Instant,
    /// How far somebody has moved the wall clock since, in milliseconds.
    jumped: AtomicI64,
}

impl Clock {
    /// The machine's own clocks.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock for tests: wall and boot time follow tokio's (pausable) time from `wall` on.
    pub fn scripted(wall: SystemTime) -> Self {
        Self(Source::Scripted(Arc::new(Scripted {
            wall,
            start: Instant::now(),
            jumped: AtomicI64::new(0),
        })))
    }

    /// Moves the wall clock of a scripted clock by `milliseconds`, as a correction by NTP or a waking VM does.
    /// The system's clock is not touched.
    pub fn jump(&self, milliseconds: i64) {
        if let Source::Scripted(scripted) = &self.0 {
            scripted.jumped.fetch_add(milliseconds, Ordering::Relaxed);
        }
    }

    /// Wall time: what an `Expiration` is compared with.
    pub fn wall(&self) -> SystemTime {
        match &self.0 {
            Source::System => SystemTime::now(),
            Source::Scripted(scripted) => {
                let wall = scripted.wall + scripted.start.elapsed();
                let jumped = scripted.jumped.load(Ordering::Relaxed);
                let by = Duration::from_millis(jumped.unsigned_abs());
                if jumped < 0 { wall - by } else { wall + by }
            }
        }
    }

    /// Wall time in whole seconds since 1970.
    pub fn wall_seconds(&self) -> u64 {
        self.wall().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
    }

    /// Monotonic time, for deadlines within this process.
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Time since the machine booted, including sleep (`CLOCK_BOOTTIME`, clock_gettime(2)).
    pub fn boot(&self) -> Duration {
        match &self.0 {
            Source::System => boot_time(),
            // An arbitrary uptime, so that subtractions near zero do not hide mistakes.
            Source::Scripted(scripted) => Duration::from_secs(100_000) + scripted.start.elapsed(),
        }
    }
}

#[cfg(target_os = "linux")]
fn boot_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(
        u64::try_from(now.tv_sec).unwrap_or(0),
        u32::try_from(now.tv_nsec).unwrap_or(0),
    )
}

#[cfg(not(target_os = "linux"))]
fn boot_time() -> Duration {
    Duration::ZERO
}

/// The form of every time in EC2's credential documents: `2026-01-05T10:11:12Z`, UTC, no fraction (botocore parses
/// only this; imds-contract 0.10).
pub fn rfc3339_seconds(time: SystemTime) -> String {
    match jiff::Timestamp::try_from(time) {
        Ok(time) => time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
        // Outside of the years −9999 to 9999: nothing that STS says.
        Err(_) => "1970-01-01T00:00:00Z".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_as_botocore_reads_them() {
        let time = UNIX_EPOCH + Duration::from_millis(1_767_607_872_999);
        assert_eq!(rfc3339_seconds(time), "2026-01-05T10:11:12Z");
    }

    #[tokio::test(start_paused = true)]
    async fn a_scripted_clock_follows_paused_time_and_jumps() {
        let clock = Clock::scripted(UNIX_EPOCH + Duration::from_secs(1_000));
        let boot = clock.boot();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(clock.wall_seconds(), 1_005);
        clock.jump(-100_000);
        assert_eq!(clock.wall_seconds(), 905);
        assert_eq!(clock.boot() - boot, Duration::from_secs(5));
    }
}
