//! The only reader of time.
//!
//! Three clocks exist and they disagree: wall time (what AWS writes into `Expiration`; it jumps), monotonic time (for
//! deadlines; pausable in tests), and boot time (what IMDS tokens are measured in: it neither jumps with the wall clock
//! nor stops while a laptop sleeps, and it outlives a restart of the daemon).

use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

/// A source of wall, monotonic and boot time. Cheap to clone; all clones tell the same time.
#[derive(Clone, Debug)]
pub struct Clock {
    source: Source,
    evidence: Arc<Mutex<Evidence>>,
}

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
    /// How long the machine has slept since, in milliseconds.
    slept: AtomicI64,
}

/// What is known of whether wall time is right.
#[derive(Debug, Default)]
struct Evidence {
    /// Time since 1970 at boot, by the clock of AWS. Boot time does not jump, so it holds until the next answer.
    aws_at_boot: Option<Duration>,
    /// The last time that the clocks went apart.
    last: Option<(SystemTime, Shift)>,
}

/// All clocks at one moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Wall time.
    pub wall: SystemTime,
    /// Boot time.
    pub boot: Duration,
    /// Monotonic time.
    pub now: Instant,
}

/// How the clocks went apart between two moments.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shift {
    /// By how much wall time moved against boot time: somebody set it. In milliseconds; negative is back.
    pub wall: i64,
    /// How long the machine slept.
    pub slept: Duration,
}

/// How far wall time is from what others say, in seconds; positive: it is ahead of them. `None`: they have said nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Skew {
    /// From AWS's own clock.
    pub aws: Option<i64>,
    /// From the machine's battery-backed clock.
    pub rtc: Option<i64>,
    /// The last time that the clocks went apart, and how.
    pub last: Option<(SystemTime, Shift)>,
}

/// What NTP's slewing does in one [`Clock::shift`] is far below, what matters to a credential is far above.
const TOLERANCE: Duration = Duration::from_secs(2);
/// How often clocks are compared.
const LOOK: Duration = Duration::from_secs(1);
/// A battery-backed clock that is kept in local time differs by time zone: a multiple of this, to within [`AT_MOST_OFF`].
const TIME_ZONES: i64 = 900;
/// The difference that a battery-backed clock may have without meaning anything, in seconds.
const AT_MOST_OFF: i64 = 60;

impl Clock {
    /// The machine's own clocks.
    pub fn system() -> Self {
        Self::of(Source::System)
    }

    /// A clock for tests: wall and boot time follow tokio's (pausable) time from `wall` on.
    pub fn scripted(wall: SystemTime) -> Self {
        Self::of(Source::Scripted(Arc::new(Scripted {
            wall,
            start: Instant::now(),
            jumped: AtomicI64::new(0),
            slept: AtomicI64::new(0),
        })))
    }

    fn of(source: Source) -> Self {
        Self {
            source,
            evidence: Arc::default(),
        }
    }

    /// Moves the wall clock of a scripted clock by `milliseconds`, as a correction by NTP or a waking VM does.
    /// The system's clock is not touched.
    pub fn jump(&self, milliseconds: i64) {
        if let Source::Scripted(scripted) = &self.source {
            scripted.jumped.fetch_add(milliseconds, Ordering::Relaxed);
        }
    }

    /// Lets the machine of a scripted clock sleep: wall and boot time go on, monotonic time and its timers do not.
    pub fn suspend(&self, milliseconds: i64) {
        if let Source::Scripted(scripted) = &self.source {
            scripted.slept.fetch_add(milliseconds, Ordering::Relaxed);
        }
    }

    /// Wall time: what an `Expiration` is compared with.
    pub fn wall(&self) -> SystemTime {
        match &self.source {
            Source::System => SystemTime::now(),
            Source::Scripted(scripted) => {
                let moved = scripted.jumped.load(Ordering::Relaxed) + scripted.slept.load(Ordering::Relaxed);
                moved_by(scripted.wall + scripted.start.elapsed(), moved)
            }
        }
    }

    /// Wall time in whole seconds since 1970.
    pub fn wall_seconds(&self) -> u64 {
        self.wall().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
    }

    /// Waits for a moment of the wall clock, or for a second: somebody may set the clock meanwhile.
    pub async fn until(&self, moment: Option<SystemTime>) {
        let wait = moment.map_or(LOOK, |moment| moment.duration_since(self.wall()).unwrap_or_default());
        // Timers are as coarse as a millisecond: never a moment before.
        tokio::time::sleep(wait.min(LOOK)).await;
    }

    /// Monotonic time, for deadlines within this process. It stops while the machine sleeps.
    pub fn now(&self) -> Instant {
        Instant::now()
    }

    /// Time since the machine booted, including sleep (`CLOCK_BOOTTIME`, clock_gettime(2)).
    pub fn boot(&self) -> Duration {
        match &self.source {
            Source::System => boot_time(),
            // An arbitrary uptime, so that subtractions near zero do not hide mistakes.
            Source::Scripted(scripted) => {
                let slept = u64::try_from(scripted.slept.load(Ordering::Relaxed)).unwrap_or(0);
                Duration::from_secs(100_000) + scripted.start.elapsed() + Duration::from_millis(slept)
            }
        }
    }

    /// All clocks now.
    pub fn moment(&self) -> Moment {
        Moment {
            wall: self.wall(),
            boot: self.boot(),
            now: self.now(),
        }
    }

    /// Waits until the clocks go apart: wall time was set, or the machine slept. `from` is where they are compared from,
    /// and becomes the moment of the return.
    pub async fn shift(&self, from: &mut Moment) -> Shift {
        loop {
            tokio::time::sleep(LOOK).await;
            let moment = self.moment();
            let booted = moment.boot.saturating_sub(from.boot);
            let shift = Shift {
                wall: millis_between(from.wall, moment.wall) - i64::try_from(booted.as_millis()).unwrap_or(i64::MAX),
                slept: booted.saturating_sub(moment.now.saturating_duration_since(from.now)),
            };
            if shift.wall.unsigned_abs() >= TOLERANCE.as_millis() as u64 || shift.slept >= TOLERANCE {
                *from = moment;
                self.evidence().last = Some((moment.wall, shift));
                return shift;
            }
            // What is slewed slowly is no jump.
            *from = moment;
        }
    }

    /// AWS has just said what time it is, to the second.
    pub fn heard_from_aws(&self, said: SystemTime) {
        let since_1970 = said.duration_since(UNIX_EPOCH).unwrap_or_default();
        self.evidence().aws_at_boot = since_1970.checked_sub(self.boot());
    }

    /// What time it is for AWS, by what it said last.
    pub fn heard(&self) -> Option<SystemTime> {
        let at_boot = self.evidence().aws_at_boot;
        at_boot.map(|at_boot| UNIX_EPOCH + at_boot + self.boot())
    }

    /// What time it is for AWS: by what it said last, else wall time.
    pub fn aws(&self) -> SystemTime {
        self.heard().unwrap_or_else(|| self.wall())
    }

    /// How wrong wall time seems to be.
    pub fn skew(&self) -> Skew {
        let (wall, heard) = (self.wall(), self.heard());
        let rtc = match &self.source {
            Source::System => rtc_time().map(|rtc| rtc_skew(millis_between(rtc, wall) / 1000)),
            Source::Scripted(_) => None,
        };
        let evidence = self.evidence();
        Skew {
            aws: heard.map(|aws| millis_between(aws, wall) / 1000),
            rtc,
            last: evidence.last,
        }
    }

    fn evidence(&self) -> std::sync::MutexGuard<'_, Evidence> {
        self.evidence.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn moved_by(time: SystemTime, milliseconds: i64) -> SystemTime {
    let by = Duration::from_millis(milliseconds.unsigned_abs());
    if milliseconds < 0 { time - by } else { time + by }
}

/// Milliseconds from one wall time to another; negative when that is before.
fn millis_between(from: SystemTime, to: SystemTime) -> i64 {
    let millis = |duration: Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    match to.duration_since(from) {
        Ok(ahead) => millis(ahead),
        Err(behind) => -millis(behind.duration()),
    }
}

/// A difference from the battery-backed clock, in seconds, without what is only a time zone: many are kept in local time.
fn rtc_skew(seconds: i64) -> i64 {
    let within_a_day = (AT_MOST_OFF..=14 * 3600 + AT_MOST_OFF).contains(&seconds.abs());
    let beside = (seconds + TIME_ZONES / 2).rem_euclid(TIME_ZONES) - TIME_ZONES / 2;
    if within_a_day && beside.abs() <= AT_MOST_OFF {
        beside
    } else {
        seconds
    }
}

/// The battery-backed clock, where the kernel has one (rtc(4), sysfs `since_epoch`).
fn rtc_time() -> Option<SystemTime> {
    let text = std::fs::read_to_string("/sys/class/rtc/rtc0/since_epoch").ok()?;
    Some(UNIX_EPOCH + Duration::from_secs(text.trim().parse().ok()?))
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

    #[tokio::test(start_paused = true)]
    async fn a_shift_is_seen_and_slewing_is_not() {
        let clock = Clock::scripted(UNIX_EPOCH + Duration::from_secs(1_000_000));
        let mut from = clock.moment();
        let slewing = async {
            for _ in 0..100 {
                clock.jump(500);
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            shift = clock.shift(&mut from) => panic!("{shift:?}"),
            () = slewing => {}
        }
        for (jump, slept) in [(36_000_000, 0), (-36_000_000, 0), (0, 36_000_000), (-5_000, 7_000)] {
            clock.jump(jump);
            clock.suspend(slept);
            let shift = clock.shift(&mut from).await;
            let expected = Duration::from_millis(slept.unsigned_abs());
            // The clock also ran while it was looked at.
            assert!((shift.wall - jump).abs() <= 1_000, "{shift:?}");
            assert!(shift.slept.abs_diff(expected) <= LOOK, "{shift:?}");
            assert_eq!(clock.skew().last.unwrap().1, shift);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_aws_said_outlives_jumps_and_sleep() {
        let clock = Clock::scripted(UNIX_EPOCH + Duration::from_secs(1_000_000));
        assert_eq!(clock.skew(), Skew::default());
        assert_eq!(clock.aws(), clock.wall());
        clock.heard_from_aws(UNIX_EPOCH + Duration::from_secs(1_000_100));
        assert_eq!(clock.skew().aws, Some(-100));
        clock.jump(100_000);
        assert_eq!(clock.skew().aws, Some(0));
        clock.suspend(5_000);
        clock.jump(-36_000_000);
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(clock.skew().aws, Some(-36_000));
        assert_eq!(clock.aws(), UNIX_EPOCH + Duration::from_secs(1_000_110));
    }

    #[test]
    fn a_time_zone_is_no_skew() {
        for (seconds, skew) in [
            (0, 0),
            (59, 59),
            (7_200, 0),
            (-3_590, 10),
            (20_700 - 5, -5),
            (500, 500),
            (-36_000 - 300, -36_300),
            (1_000_000, 1_000_000),
        ] {
            assert_eq!(rtc_skew(seconds), skew, "{seconds}");
        }
    }
}
