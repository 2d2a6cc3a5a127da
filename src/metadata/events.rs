//! What is going to happen to an instance, as EC2 announces it: interruptions of spot instances, recommendations to rebalance,
//! maintenance, and what an Auto Scaling group is about to do.
//!
//! Everything follows from the events and the time; nothing here looks at a clock. Times are seconds since 1970: EC2 tells
//! no more.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::document_line;
use super::tree::made_id;
use crate::clock::rfc3339_seconds;

/// What happens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A spot instance is taken back.
    SpotInterruption,
    /// It is at risk of that.
    Rebalance,
    /// The host is to be maintained.
    Maintenance,
    /// The Auto Scaling group moves it to another state.
    Lifecycle,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::SpotInterruption,
        Self::Rebalance,
        Self::Maintenance,
        Self::Lifecycle,
    ];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::SpotInterruption => "spot-interruption",
            Self::Rebalance => "rebalance",
            Self::Maintenance => "maintenance",
            Self::Lifecycle => "lifecycle",
        }
    }

    /// As it was typed.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == text)
    }

    /// What it can do, the default first; nothing: there is nothing to choose. EC2's API reference has the codes of events,
    /// its user guides the actions and the states.
    pub fn actions(self) -> &'static [&'static str] {
        match self {
            Self::SpotInterruption => &["terminate", "stop", "hibernate"],
            Self::Rebalance => &[],
            Self::Maintenance => &[
                "system-reboot",
                "instance-reboot",
                "system-maintenance",
                "instance-retirement",
                "instance-stop",
            ],
            Self::Lifecycle => &[
                "Terminated",
                "Detached",
                "InService",
                "Standby",
                "Warmed:Hibernated",
                "Warmed:Running",
                "Warmed:Stopped",
                "Warmed:Terminated",
            ],
        }
    }

    /// How long after it was asked for it happens, if nothing else is said.
    pub fn lead(self) -> Duration {
        match self {
            Self::SpotInterruption => NOTICE,
            Self::Rebalance | Self::Lifecycle => Duration::ZERO,
            Self::Maintenance => WINDOW,
        }
    }

    /// Which of its actions `typed` is; `None`: the default one.
    pub fn action(self, typed: Option<&str>) -> Option<&'static str> {
        match (typed, self.actions()) {
            (None, actions) => Some(actions.first().copied().unwrap_or_default()),
            (Some(typed), actions) => actions.iter().find(|it| **it == typed).copied(),
        }
    }
}

/// How long before a spot instance is interrupted it is told (user guide, "Spot Instance interruption notices").
const NOTICE: Duration = Duration::from_secs(120);
/// How long a maintenance takes.
const WINDOW: Duration = Duration::from_secs(3600);

/// One event of one container.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// What.
    pub kind: Kind,
    /// What it does, one of [`Kind::actions`].
    pub action: String,
    /// Since when it is decided.
    pub decided: u64,
    /// When it happens.
    pub at: u64,
    /// Called off.
    #[serde(default)]
    pub cancelled: bool,
    /// The run that is really stopped when it happens; `None`: it is only told.
    #[serde(default)]
    pub stops: Option<Run>,
}

/// One run of a container, so that it is known again after a restart of the daemon.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// The kernel's number of its cgroup, which no other run has until the machine boots again.
    pub cgroup: u64,
    /// When it started.
    pub started: u64,
}

impl Run {
    /// By how much the start of one run may seem to differ: `/proc/stat` has the time of boot in whole seconds, and follows
    /// a clock that is slewed.
    const JITTER: u64 = 2;

    /// Whether these are the same run; in doubt they are not.
    pub fn is(&self, other: &Self) -> bool {
        self.cgroup == other.cgroup && self.started.abs_diff(other.started) <= Self::JITTER
    }
}

impl Event {
    /// When it is told.
    pub fn noticed(&self) -> u64 {
        match self.kind {
            // "The hibernation process begins immediately" (user guide).
            Kind::SpotInterruption if self.action == "hibernate" => self.at,
            Kind::SpotInterruption => self.at.saturating_sub(NOTICE.as_secs()).max(self.decided),
            Kind::Rebalance => self.at,
            Kind::Maintenance | Kind::Lifecycle => self.decided,
        }
    }

    fn ends(&self) -> u64 {
        self.at + WINDOW.as_secs()
    }

    /// When the tree changes because of it.
    fn changes(&self) -> [u64; 3] {
        match self.kind {
            Kind::Maintenance => [self.noticed(), self.ends(), 0],
            _ => [self.noticed(), self.at, 0],
        }
    }
}

/// Values of the tree, by path.
type Values = BTreeMap<String, String>;

/// What events make of the tree of `container` at `now`, and when that is next different.
pub fn told(events: &[Event], container: &str, now: u64) -> (Values, Option<u64>) {
    let mut told = Values::new();
    let mut tell = |path: &str, value: String| drop(told.insert(format!("meta-data/{path}"), value));
    let spot = |event: &Event| matches!(event.kind, Kind::SpotInterruption | Kind::Rebalance);
    if events.iter().any(|event| spot(event) && !event.cancelled) {
        tell("instance-life-cycle", "spot".to_owned());
    }
    for event in events.iter().filter(|event| event.noticed() <= now) {
        let time = rfc3339_seconds(moment(event.at));
        match event.kind {
            Kind::Maintenance => {
                let done = if event.cancelled {
                    Some("canceled")
                } else {
                    (now >= event.ends()).then_some("completed")
                };
                let path = if done.is_some() {
                    "events/maintenance/history"
                } else {
                    "events/maintenance/scheduled"
                };
                tell(path, maintenance(event, container, done));
            }
            _ if event.cancelled => {}
            Kind::SpotInterruption => {
                tell(
                    "spot/instance-action",
                    document_line(&[("action", &event.action), ("time", &time)]),
                );
                if event.action == "terminate" {
                    tell("spot/termination-time", time);
                }
            }
            Kind::Rebalance => tell(
                "events/recommendations/rebalance",
                document_line(&[("noticeTime", &time)]),
            ),
            Kind::Lifecycle => {
                let state = if now >= event.at {
                    event.action.as_str()
                } else {
                    "InService"
                };
                tell("autoscaling/target-lifecycle-state", state.to_owned());
            }
        }
    }
    let next = events.iter().flat_map(Event::changes).filter(|at| *at > now).min();
    (told, next)
}

/// A maintenance in the list of them.
fn maintenance(event: &Event, container: &str, done: Option<&str>) -> String {
    let what = match event.action.as_str() {
        "system-reboot" | "instance-reboot" => "scheduled reboot",
        "instance-stop" => "The instance is running on degraded hardware",
        "instance-retirement" => "The instance is scheduled for retirement",
        _ => "scheduled maintenance",
    };
    let prefix = match done {
        Some("canceled") => "[Canceled] ",
        Some(_) => "[Completed] ",
        None => "",
    };
    let seed = format!("{container} {} {}", event.decided, event.at);
    let fields = [
        ("NotBefore", english(event.at)),
        ("Code", event.action.clone()),
        ("Description", format!("{prefix}{what}")),
        ("EventId", made_id("instance-event-", &seed)),
        ("NotAfter", english(event.ends())),
        ("State", done.unwrap_or("active").to_owned()),
    ];
    let lines: Vec<_> = fields
        .iter()
        .map(|(key, value)| format!("    {} : {}", super::quoted(key), super::quoted(value)))
        .collect();
    format!("[ \n  {{\n{}\n  }} \n]", lines.join(",\n"))
}

/// `5 Jan 2026 10:04:05 GMT`: maintenance has a format of its own, and its days have no leading zero (user guide, "View
/// scheduled events").
fn english(at: u64) -> String {
    let date = httpdate::fmt_http_date(moment(at));
    let date = date.split_once(", ").map_or(date.as_str(), |(_, date)| date);
    date.strip_prefix('0').unwrap_or(date).to_owned()
}

fn moment(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

#[cfg(test)]
mod tests {
    use super::super::tree::known;
    use super::*;
    use proptest::prelude::*;

    const NOON: u64 = 1_767_607_320;

    fn event(kind: Kind, action: &str, at: u64) -> Event {
        Event {
            kind,
            action: action.to_owned(),
            decided: NOON,
            at,
            cancelled: false,
            stops: None,
        }
    }

    fn at(event: &Event, now: u64, path: &str) -> Option<String> {
        told(std::slice::from_ref(event), "c", now)
            .0
            .remove(&format!("meta-data/{path}"))
    }

    #[test]
    fn a_spot_instance_is_told_two_minutes_before() {
        let interruption = event(Kind::SpotInterruption, "terminate", NOON + 600);
        let told = NOON + 480;
        for (now, there) in [(NOON, false), (told - 1, false), (told, true), (NOON + 601, true)] {
            assert_eq!(at(&interruption, now, "spot/instance-action").is_some(), there, "{now}");
            assert_eq!(
                at(&interruption, now, "spot/termination-time").is_some(),
                there,
                "{now}"
            );
            assert_eq!(at(&interruption, now, "instance-life-cycle").as_deref(), Some("spot"));
        }
        let document = at(&interruption, told, "spot/instance-action").unwrap();
        assert_eq!(document, r#"{"action": "terminate", "time": "2026-01-05T10:12:00Z"}"#);
        assert_eq!(
            at(&interruption, told, "spot/termination-time").unwrap(),
            "2026-01-05T10:12:00Z"
        );
        let next = |now| super::told(std::slice::from_ref(&interruption), "c", now).1;
        assert_eq!(
            [next(NOON), next(told), next(NOON + 600)],
            [Some(told), Some(NOON + 600), None]
        );
        // Sooner than that: at once. Hibernation begins when it is told.
        assert!(
            at(
                &event(Kind::SpotInterruption, "stop", NOON + 60),
                NOON,
                "spot/instance-action"
            )
            .is_some()
        );
        assert!(
            at(
                &event(Kind::SpotInterruption, "stop", NOON),
                NOON,
                "spot/termination-time"
            )
            .is_none()
        );
        let hibernation = event(Kind::SpotInterruption, "hibernate", NOON + 60);
        assert!(at(&hibernation, NOON + 59, "spot/instance-action").is_none());
        assert!(at(&hibernation, NOON + 60, "spot/instance-action").is_some());
    }

    #[test]
    fn rebalance_lifecycle_and_maintenance_are_told_as_ec2_does() {
        let rebalance = event(Kind::Rebalance, "", NOON + 5);
        assert_eq!(at(&rebalance, NOON + 4, "events/recommendations/rebalance"), None);
        let notice = at(&rebalance, NOON + 5, "events/recommendations/rebalance").unwrap();
        assert_eq!(notice, r#"{"noticeTime": "2026-01-05T10:02:05Z"}"#);
        let lifecycle = event(Kind::Lifecycle, "Terminated", NOON + 5);
        let state = |now| at(&lifecycle, now, "autoscaling/target-lifecycle-state").unwrap();
        assert_eq!([state(NOON), state(NOON + 5)], ["InService", "Terminated"]);
        let mut reboot = event(Kind::Maintenance, "system-reboot", NOON + 43);
        let scheduled = at(&reboot, NOON, "events/maintenance/scheduled").unwrap();
        let read: serde_json::Value = serde_json::from_str(&scheduled).unwrap();
        assert_eq!(read[0]["NotBefore"], "5 Jan 2026 10:02:43 GMT");
        assert_eq!(read[0]["NotAfter"], "5 Jan 2026 11:02:43 GMT");
        assert_eq!(read[0]["State"], "active");
        assert_eq!(read[0]["Description"], "scheduled reboot");
        let id = read[0]["EventId"].as_str().unwrap();
        assert!(id.starts_with("instance-event-") && id.len() == 32, "{id}");
        let over = NOON + 43 + 3600;
        assert_eq!(at(&reboot, over, "events/maintenance/scheduled"), None);
        assert!(
            at(&reboot, over, "events/maintenance/history")
                .unwrap()
                .contains("[Completed] scheduled reboot")
        );
        reboot.cancelled = true;
        assert!(
            at(&reboot, NOON, "events/maintenance/history")
                .unwrap()
                .contains("\"canceled\"")
        );
    }

    proptest! {
        /// Between two of the moments that it names, nothing changes; and everything that it tells has a place in the tree.
        #[test]
        fn what_is_told_changes_only_when_it_is_said_to(
            kinds in proptest::collection::vec((0..4_usize, 0..8_usize, 0..10_000_u64, any::<bool>()), 0..5),
            now in NOON..NOON + 20_000,
            later in 0..10_000_u64,
        ) {
            let events: Vec<_> = kinds.into_iter().map(|(kind, action, after, cancelled)| {
                let kind = Kind::ALL[kind];
                let action = kind.actions().get(action).or(kind.actions().first()).copied().unwrap_or_default();
                Event { cancelled, ..event(kind, action, NOON + after) }
            }).collect();
            let (values, next) = told(&events, "c", now);
            for (path, value) in &values {
                prop_assert_eq!(known(path, value), Ok(()), "{}", path);
            }
            if next.is_none_or(|next| now + later < next) {
                prop_assert_eq!(told(&events, "c", now + later).0, values);
            }
        }
    }
}
