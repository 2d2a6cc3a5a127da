//! How the address comes to the host: listener first, rules, address last.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::time::Duration;

use tokio::net::TcpListener;
use tracing::{error, warn};

use super::host_mode::{Kept, in_its_place};
use super::systemd::Inherited;
use super::{DEFAULT_PORT, IMDS_ADDRESS, IMDS_ADDRESS_IPV6};
use crate::attribution::ingress::remember_ingress;
use crate::clock::Clock;
use crate::config::{Attach, Settings};
use crate::interception::reconcile::Interception;
use crate::interception::{HostError, Plan};
use crate::logging::with_causes;

/// Ports that are tried.
pub(super) const PORTS: u16 = 64;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// How often interception is looked at even if nobody says that it has changed.
const VERIFY: Duration = Duration::from_secs(10);

/// The IPv6 address as well: served by a listener, or else nobody answers there. Containers' links may have IPv6 where the
/// loopback has not, and may have it later.
pub(super) async fn intercept_ipv6(
    settings: &Settings,
    inherited: &mut Inherited,
    clock: &Clock,
) -> Option<(Interception, Option<TcpListener>)> {
    if serves_ipv6(settings) {
        match serve_ipv6(settings, inherited, clock).await {
            Ok((up, listener)) => return Some((up, Some(listener))),
            Err(why) => warn!(why, "not served at {IMDS_ADDRESS_IPV6}"),
        }
    }
    match intercept(&refusing_ipv6(settings)?, clock).await {
        Ok(up) => Some((up, None)),
        Err(error) => {
            warn!(
                error = with_causes(&error),
                "who asks at {IMDS_ADDRESS_IPV6} is not refused: another service may answer there; mend what is said, then: \
                 imds-router intercept up"
            );
            None
        }
    }
}

async fn serve_ipv6(
    settings: &Settings,
    inherited: &mut Inherited,
    clock: &Clock,
) -> Result<(Interception, TcpListener), String> {
    let listener = inherited.listen(IMDS_ADDRESS_IPV6.into());
    let (listener, listening) = listener.map_err(|error| error.to_string())?;
    let listener = TcpListener::from_std(listener).map_err(|error| error.to_string())?;
    let interception = intercept(&host_plan(settings, listening), clock).await;
    Ok((interception.map_err(|error| with_causes(&error))?, listener))
}

/// Whether this host serves at the IPv6 address.
fn serves_ipv6(settings: &Settings) -> bool {
    settings.ipv6 && has_ipv6()
}

/// What is on the host with these settings, without a daemon: one plan an address family.
pub fn plans(settings: &Settings) -> Vec<Plan> {
    match Kept::here(settings) {
        Some(kept) => kept.plans(),
        // The address is a container's own, by the engine.
        None if settings.attach == Attach::Network => Vec::new(),
        None => {
            let ipv6 = match serves_ipv6(settings) {
                true => Some(host_plan(settings, without_a_listener(IMDS_ADDRESS_IPV6.into()))),
                false => refusing_ipv6(settings),
            };
            let ipv4 = host_plan(settings, without_a_listener(IMDS_ADDRESS.into()));
            std::iter::once(ipv4).chain(ipv6).collect()
        }
    }
}

/// What is on the host where the address is ours, and this listens.
pub(super) fn host_plan(settings: &Settings, listening: SocketAddr) -> Plan {
    in_its_place(settings, Plan::host(listening))
}

/// What keeps anybody else from answering at the IPv6 address where we do not.
fn refusing_ipv6(settings: &Settings) -> Option<Plan> {
    knows_ipv6().then(|| in_its_place(settings, Plan::refusing(IMDS_ADDRESS_IPV6.into())))
}

/// All that can ever be ours on a host, with whatever settings: to be taken away from the last to the first.
pub fn everything() -> Vec<Plan> {
    let host = |address| Plan::host(without_a_listener(address));
    std::iter::once(Plan::delivery(IMDS_ADDRESS.into()))
        .chain(addresses(knows_ipv6()).map(host))
        .collect()
}

/// The listener's port does not matter for what stays without a daemon.
fn without_a_listener(address: IpAddr) -> SocketAddr {
    SocketAddr::new(address, DEFAULT_PORT)
}

/// The addresses of the service.
fn addresses(ipv6: bool) -> impl Iterator<Item = IpAddr> {
    std::iter::once(IMDS_ADDRESS.into()).chain(ipv6.then_some(IMDS_ADDRESS_IPV6.into()))
}

/// Whether the network namespace of the calling thread speaks IPv6 on its loopback (ip-sysctl, `disable_ipv6`).
fn has_ipv6() -> bool {
    std::fs::read("/proc/sys/net/ipv6/conf/lo/disable_ipv6").is_ok_and(|text| text.starts_with(b"0"))
}

/// Whether the kernel knows IPv6 (ip-sysctl, `net.ipv6`). Where it does, it can be off now, or on one link, and on later.
pub(super) fn knows_ipv6() -> bool {
    std::fs::exists("/proc/sys/net/ipv6").unwrap_or(true)
}

/// Puts interception up. The table of a daemon that was killed a moment ago may still be there: the kernel takes it away
/// when the last copy of its socket is closed, and a child that was just being forked had one.
pub(super) async fn intercept(plan: &Plan, clock: &Clock) -> Result<Interception, HostError> {
    let patience = clock.now() + Duration::from_secs(1);
    loop {
        match Interception::up(plan.clone()) {
            Err(HostError::Busy { .. }) if clock.now() < patience => {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            done => return done,
        }
    }
}

/// Takes down what a start has put up that fails: why it fails is the more important of two errors.
pub(super) fn give_up(interception: Vec<Interception>) {
    for failed in interception.into_iter().filter_map(|it| it.down().err()) {
        warn!(error = with_causes(&failed), "interception is not taken down whole");
    }
}

/// Puts interception back whenever somebody removes it, until `shutdown`. Where there is none, that is all.
pub(super) async fn guard(
    mut interception: Vec<Interception>,
    shutdown: impl Future<Output = ()>,
) -> Vec<Interception> {
    let mut shutdown = std::pin::pin!(shutdown);
    if interception.is_empty() {
        shutdown.await;
        return interception;
    }
    loop {
        tokio::select! {
            () = &mut shutdown => return interception,
            // Each hears of every change: one bell is enough.
            changed = interception[0].changed() => if let Err(error) = changed {
                warn!(%error, "changes of the host's network are not seen at once");
                tokio::time::sleep(Duration::from_secs(1)).await;
            },
            () = tokio::time::sleep(VERIFY) => {}
        }
        for part in &mut interception {
            match part.verify() {
                Ok(steps) => {
                    for step in steps {
                        warn!(%step, "interception was changed by somebody else; put back");
                    }
                }
                Err(error) => error!(%error, "interception is not whole"),
            }
        }
    }
}

/// Listens, in the network namespace of the calling thread, before the address is there (IP_FREEBIND, ip(7)): rules and
/// listener come first, the address last.
pub(super) fn listen(address: IpAddr) -> io::Result<(std::net::TcpListener, SocketAddr)> {
    let mut taken = io::Error::other("no port was tried");
    for port in DEFAULT_PORT..DEFAULT_PORT + PORTS {
        let address = SocketAddr::new(address, port);
        let socket = socket2::Socket::new(
            socket2::Domain::for_address(address),
            socket2::Type::STREAM,
            Some(socket2::Protocol::TCP),
        )?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
            socket.set_freebind_v6(true)?;
        } else {
            socket.set_freebind_v4(true)?;
        }
        // Connections of an earlier daemon in TIME_WAIT must not move the port.
        socket.set_reuse_address(true)?;
        make_ours(&socket)?;
        match socket.bind(&address.into()).and_then(|()| socket.listen(BACKLOG)) {
            Ok(()) => return Ok((socket.into(), address)),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => taken = error,
            Err(error) => return Err(error),
        }
    }
    Err(taken)
}

/// Lets what it accepts answer from an address that no link of this host has (ip(7), IP_TRANSPARENT).
pub(super) fn make_transparent(listener: &impl AsFd) -> io::Result<()> {
    socket2::SockRef::from(listener).set_ip_transparent_v4(true)
}

/// What a listener has to be before it hears of its first connection.
pub(super) fn make_ours(listener: &impl AsFd) -> io::Result<()> {
    remember_ingress(listener)?;
    socket2::SockRef::from(listener).set_nonblocking(true)
}
