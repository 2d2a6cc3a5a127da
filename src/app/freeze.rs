//! Who may say what on this host's bridges, kept in step with who runs: for [`crate::host::freeze`].

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use tracing::warn;

use crate::clock::Clock;
use crate::containers::index::Index;
use crate::containers::{Attachments, CgroupId, LinkSeen};
use crate::host::HostError;
use crate::host::freeze::{Frozen, Held};
use crate::telemetry::with_causes;

/// Puts the rules up. The table of a daemon that was killed a moment ago may still be there.
pub(super) async fn freeze(clock: &Clock) -> Result<Frozen, HostError> {
    let patience = clock.now() + Duration::from_secs(1);
    loop {
        match Frozen::up() {
            Err(_) if clock.now() < patience => tokio::time::sleep(Duration::from_millis(50)).await,
            done => return done,
        }
    }
}

/// Has every served container's MACs and IPv4 addresses taken from its own links only, for as long as it runs.
pub(super) async fn keep_frozen(mut frozen: Frozen, index: Arc<Index>) {
    /// A link comes a moment before or after the engine tells of its address.
    const AGAIN: Duration = Duration::from_millis(20);
    let mut changes = index.changes();
    let mut known = BTreeMap::new();
    loop {
        changes.mark_unchanged();
        let (held, complete) = held(&index, &mut known);
        if let Err(error) = frozen.hold(held) {
            warn!(error = with_causes(&error), "links are not frozen");
        }
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(AGAIN), if !complete => {}
        }
    }
}

/// Links of a life, as they were when it had these networks.
type KnownLinks = BTreeMap<CgroupId, (Arc<Attachments>, Vec<LinkSeen>)>;

/// Who holds what on the bridges of this host, and whether that is all of it.
fn held(index: &Index, known: &mut KnownLinks) -> (Held, bool) {
    let mut held = Held::default();
    let mut complete = true;
    let mut still = KnownLinks::new();
    for record in index.all() {
        let Some(life) = record.life.as_ref().filter(|life| life.alive()) else {
            continue;
        };
        if !record.instance.endpoint || record.attachments.0.is_empty() {
            continue;
        }
        let links = match known.remove(&life.cgroup) {
            Some((attachments, links)) if attachments == record.attachments => links,
            _ => life.witness.links().unwrap_or_default(),
        };
        let endpoints = record.attachments.0.values();
        let macs: Vec<_> = endpoints
            .clone()
            .filter_map(|endpoint| parse_mac(&endpoint.mac))
            .collect();
        let own: Vec<_> = links.iter().filter(|link| macs.contains(&link.mac)).copied().collect();
        complete &= own.len() == macs.len();
        // A container may send from any of its addresses over any of its links.
        for link in &own {
            held.macs.insert((link.mac, link.peer));
            let addresses = endpoints.clone().filter_map(|endpoint| endpoint.ipv4);
            held.addresses
                .extend(addresses.map(|(address, _)| (address, link.peer)));
        }
        if own.len() == macs.len() {
            still.insert(life.cgroup, (record.attachments.clone(), links));
        }
    }
    *known = still;
    held.nobodys
        .extend(index.gateways().into_iter().filter_map(|it| match it {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        }));
    (held, complete)
}

/// Reads `02:42:ac:11:00:02`.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> = text.split(':').map(|part| u8::from_str_radix(part, 16).ok()).collect();
    bytes?.try_into().ok()
}
