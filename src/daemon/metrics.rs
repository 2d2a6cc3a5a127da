//! What Prometheus reads, in OpenMetrics' text format. Everything is counted where it happens, by plain atomics; here it gets
//! names. No label has a container's name, or anything else that whoever starts containers can make up.

use std::sync::atomic::AtomicU64;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::{Registry, Unit};

use super::admin_api::Observer;
use crate::containers::index::EngineState;
use crate::descriptors;
use crate::logging::lines_left_out;

/// The content type of what [`text`] makes (OpenMetrics 1.0, "Content-Type").
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

type Labels = Vec<(&'static str, String)>;
type Counters = Family<Labels, Counter>;
type Gauges = Family<Labels, Gauge>;

/// Everything at this moment.
pub(super) fn text(observer: &Observer) -> String {
    let mut registry = Registry::with_prefix("imds_router");
    let service = &observer.service;

    let requests = Counters::default();
    for (version, status, count) in service.requests() {
        let labels = vec![("version", version.to_owned()), ("status", status.to_string())];
        requests.get_or_create(&labels).inc_by(count);
    }
    registry.register(
        "requests",
        "Requests of proven callers; status 0 is any other",
        requests,
    );

    let refusals = Counters::default();
    for (reason, count) in service.refusals() {
        refusals
            .get_or_create(&vec![("reason", reason.to_owned())])
            .inc_by(count);
    }
    registry.register(
        "refused_connections",
        "Connections whose caller was not proven",
        refusals,
    );

    let at_limit = Counters::default();
    for (outcome, count) in service.at_limit() {
        at_limit
            .get_or_create(&vec![("outcome", outcome.to_owned())])
            .inc_by(count);
    }
    registry.register(
        "connections_at_limit",
        "Connections at the limit of their container: idle ones closed for a new one, and new ones answered with 503",
        at_limit,
    );

    let turned_away = Counter::<u64>::default();
    turned_away.inc_by(service.turned_away());
    registry.register(
        "unproven_connections_closed",
        "Connections that were closed without an answer: their sender had too many that were not proven",
        turned_away,
    );
    descriptors(&mut registry);
    let left_out = Counter::<u64>::default();
    left_out.inc_by(lines_left_out());
    registry.register(
        "log_lines_left_out",
        "Log lines above the limit of their kind",
        left_out,
    );

    let calls = Counters::default();
    for (outcome, count) in service.broker.outcomes() {
        calls
            .get_or_create(&vec![("outcome", outcome.to_owned())])
            .inc_by(count);
    }
    registry.register("sts_calls", "Calls for credentials, by how they ended", calls);

    let sessions = Gauges::default();
    for (state, count) in service.broker.by_state() {
        sessions.get_or_create(&vec![("state", state.to_owned())]).set(count);
    }
    registry.register("sessions", "Sessions of roles that are kept fresh", sessions);

    let all = service.index.all();
    let open = all.iter().filter_map(|record| record.life.as_ref());
    let open: usize = open.map(|life| life.connections.open()).sum();
    let open = i64::try_from(open).unwrap_or(i64::MAX);
    registry.register("connections_open", "Open connections of containers", of(open));
    let running = all
        .iter()
        .filter(|record| record.life.as_ref().is_some_and(|life| life.alive()));
    let running = i64::try_from(running.count()).unwrap_or(i64::MAX);
    registry.register("containers_running", "Containers that run", of(running));
    let synchronised = matches!(*service.index.engine(), EngineState::Synchronised);
    registry.register(
        "engine_synchronised",
        "Whether all that the engine knows is known",
        of(synchronised.into()),
    );
    let standing_by = observer.standing_by.load().is_some();
    registry.register(
        "standing_by",
        "Whether another imds-router serves this host",
        of(standing_by.into()),
    );

    let (events, behind) = observer.lag.so_far();
    let counted = Counter::<u64>::default();
    counted.inc_by(events);
    registry.register("engine_events", "Events of the engine", counted);
    let lag = Counter::<f64, AtomicU64>::default();
    lag.inc_by(behind.as_secs_f64());
    registry.register_with_unit(
        "engine_event_lag",
        "Time from each event until it came, in all",
        Unit::Seconds,
        lag,
    );

    let build = Gauges::default();
    build
        .get_or_create(&vec![("version", env!("CARGO_PKG_VERSION").to_owned())])
        .set(1);
    registry.register("build", "Version of the daemon; always 1", build);

    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = encode(&mut text, &registry);
    text
}

fn descriptors(registry: &mut Registry) {
    let shortages = Counters::default();
    for (work, count) in descriptors::shortages() {
        shortages.get_or_create(&vec![("work", work.to_owned())]).inc_by(count);
    }
    registry.register(
        "descriptor_shortages",
        "How often no file descriptor was left, by the work that needed one",
        shortages,
    );
    // Without /proc nothing is known, which is no number.
    if let Ok(open) = descriptors::open() {
        let open = i64::try_from(open).unwrap_or(i64::MAX);
        registry.register("descriptors_open", "Open file descriptors", of(open));
    }
    let limit = i64::try_from(descriptors::limit()).unwrap_or(i64::MAX);
    registry.register("descriptors_limit", "The limit on open file descriptors", of(limit));
}

fn of(value: i64) -> Gauge {
    let gauge: Gauge = Gauge::default();
    gauge.set(value);
    gauge
}
