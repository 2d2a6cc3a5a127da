//! The interception, in network namespaces without any way out.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4};
use std::time::{Duration, Instant};

use imds_router::interception::reconcile::{Interception, clear, install, pending};
use imds_router::interception::{HostError, Part, Plan, Step};
use libtest_mimic::{Failed, Trial};
use rustix::thread::{CapabilitySet, capabilities, set_capabilities};

use crate::rig::namespace::{ADDRESS, Namespace, PATIENCE, eventually, sorted};

const LISTENER: SocketAddrV4 = SocketAddrV4::new(ADDRESS, 51254);
const LISTENER_IPV6: SocketAddr =
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)), 51254);
const OTHER_LISTENER: SocketAddrV4 = SocketAddrV4::new(ADDRESS, 51255);

type Outcome = Result<(), Failed>;
type Case = (&'static str, fn() -> Outcome);

/// All of them.
pub fn trials() -> Vec<Trial> {
    let all: [Case; 20] = [
        ("up_is_what_the_documentation_lists", up_is_what_the_documentation_lists),
        (
            "clients_reach_the_listener_and_keep_their_address",
            clients_reach_the_listener_and_keep_their_address,
        ),
        ("a_second_daemon_is_told", a_second_daemon_is_told),
        (
            "of_two_that_start_together_one_serves",
            of_two_that_start_together_one_serves,
        ),
        ("a_crash_refuses_everybody", a_crash_refuses_everybody),
        (
            "a_real_service_is_reached_only_without_us",
            a_real_service_is_reached_only_without_us,
        ),
        (
            "a_real_service_stays_the_hosts_and_is_nobody_elses",
            a_real_service_stays_the_hosts_and_is_nobody_elses,
        ),
        ("the_next_daemon_takes_over", the_next_daemon_takes_over),
        ("what_is_removed_is_put_back", what_is_removed_is_put_back),
        ("a_flush_of_all_rules_is_survived", a_flush_of_all_rules_is_survived),
        ("own_changes_do_not_ring_for_ever", own_changes_do_not_ring_for_ever),
        ("a_foreign_link_is_used_and_stays", a_foreign_link_is_used_and_stays),
        (
            "foreign_closed_routes_are_left_alone",
            foreign_closed_routes_are_left_alone,
        ),
        (
            "a_foreign_open_route_stays_behind_ours",
            a_foreign_open_route_stays_behind_ours,
        ),
        ("a_foreign_address_stays", a_foreign_address_stays),
        ("a_failure_half_way_leaves_nothing", a_failure_half_way_leaves_nothing),
        (
            "without_the_right_nothing_is_touched",
            without_the_right_nothing_is_touched,
        ),
        ("down_finds_nothing_left", down_finds_nothing_left),
        ("down_without_the_right_says_so", down_without_the_right_says_so),
        (
            "without_a_daemon_everybody_is_refused",
            without_a_daemon_everybody_is_refused,
        ),
    ];
    all.into_iter()
        .map(|(name, run)| Trial::test(format!("host::{name}"), run))
        .collect()
}

fn up_is_what_the_documentation_lists() -> Outcome {
    let ns = Namespace::new();
    let before = ns.listing();
    let up = ns.up(LISTENER)?;
    let also = ns.up(LISTENER_IPV6)?;
    let plans = [Plan::host(LISTENER), Plan::host(LISTENER_IPV6)];
    let tables = sorted(plans.iter().flat_map(Plan::parts).filter_map(text));
    assert_eq!(ns.rules(), tables, "as nft lists them");
    assert_eq!((up.taken_over(), also.taken_over()), (&[][..], &[][..]));
    for address in ["169.254.169.254", "fd00:ec2::254"] {
        let carrier = &ns.json(&["addr", "show", "to", address])[0]["ifname"];
        assert_eq!(carrier, "lo", "no dummy in this kernel");
    }
    // Beside the kernel's own route to the address, which comes and goes with it.
    let routes = ns.json(&["-6", "route", "show", "fd00:ec2::254"]);
    let closed = routes.as_array().into_iter().flatten();
    let closed = closed.filter(|route| (&route["type"], &route["protocol"]) == (&"unreachable".into(), &"169".into()));
    assert_eq!(closed.count(), 1, "{routes}");
    let route = &ns.json(&["route", "show", "169.254.169.254"])[0];
    assert_eq!(
        (&route["type"], &route["protocol"]),
        (&"unreachable".into(), &"169".into())
    );
    for plan in plans {
        assert_eq!(ns.enter(move || pending(&plan))?, [], "complete");
    }
    also.down()?;
    up.down()?;
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn clients_reach_the_listener_and_keep_their_address() -> Outcome {
    let (host, guest) = (Namespace::new(), Namespace::new());
    let client = host.bridge_to(&guest);
    let listener = host.listen(LISTENER, true);
    let up = host.up(LISTENER)?;
    // What Docker does for `docker run -p 80:80`: neither the rule (to where nobody listens) nor the proxy takes ours.
    let _proxy = host.listen(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80), false);
    for hook in ["prerouting", "output"] {
        let chain = format!("chain ip nat {hook} {{ type nat hook {hook} priority -100; }}");
        let rule = format!("rule ip nat {hook} fib daddr type local tcp dport 80 dnat to 10.9.0.1:9");
        host.run("nft", &["add table ip nat; add ", &chain, "; add ", &rule]);
    }
    for (from, source) in [(&guest, client), (&host, ADDRESS)] {
        let (mut near, far) = (from.connect()?, listener.accept()?);
        assert_eq!(near.peer_addr()?, SocketAddr::from((ADDRESS, 80)));
        assert_eq!(far.1.ip(), source);
        assert_eq!(near.local_addr()?, far.1);
        (&far.0).write_all(b"pong")?;
        let mut answer = [0; 4];
        near.read_exact(&mut answer)?;
        assert_eq!(&answer, b"pong");
    }
    up.down()?;
    Ok(())
}

fn a_second_daemon_is_told() -> Outcome {
    let ns = Namespace::new();
    let first = ns.up(LISTENER)?;
    let before = ns.listing();
    match ns.up(OTHER_LISTENER).map(drop) {
        Err(HostError::Busy {
            table: "imds_router",
            holder,
        }) => assert_eq!(holder, std::process::id()),
        other => return Err(format!("{other:?}").into()),
    }
    let cleared = ns.enter(|| clear(&Plan::host(LISTENER)));
    assert!(matches!(cleared, Err(HostError::Busy { .. })), "{cleared:?}");
    assert_eq!(ns.enter(|| install(&Plan::host(LISTENER)))?, [], "all there");
    assert_eq!(ns.listing(), before, "nothing was touched");
    first.down()?;
    ns.up(OTHER_LISTENER)?.down()?;
    Ok(())
}

fn of_two_that_start_together_one_serves() -> Outcome {
    let ns = Namespace::new();
    let before = ns.listing();
    let alone = ns.up(LISTENER)?;
    let complete = ns.listing();
    alone.down()?;
    for round in 0..20 {
        let outcomes: Vec<_> = std::thread::scope(|scope| {
            let starting: Vec<_> = (0..2).map(|_| scope.spawn(|| ns.up(LISTENER))).collect();
            starting.into_iter().map(|one| one.join().expect("no panic")).collect()
        });
        let (mut served, refused): (Vec<_>, Vec<_>) = outcomes.into_iter().partition(Result::is_ok);
        assert_eq!((served.len(), refused.len()), (1, 1), "round {round}");
        assert!(matches!(refused[0], Err(HostError::Busy { .. })), "round {round}");
        assert_eq!(ns.listing(), complete, "round {round}: the loser touched nothing");
        served.remove(0)?.down()?;
        assert_eq!(ns.listing(), before, "round {round}");
    }
    Ok(())
}

fn a_crash_refuses_everybody() -> Outcome {
    let (host, guest) = (Namespace::new(), Namespace::new());
    host.bridge_to(&guest);
    let listener = host.listen(LISTENER, true);
    let _publisher = host.listen(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80), false);
    let up = host.up(LISTENER)?;
    host.connect()?;
    drop(listener);
    host.crash(up);
    let _squatter = host.listen(LISTENER, false);
    for from in [&host, &guest] {
        assert_eq!(
            from.connect().map_err(|e| e.kind()).err(),
            Some(ErrorKind::ConnectionRefused)
        );
    }
    Ok(())
}

fn a_real_service_is_reached_only_without_us() -> Outcome {
    // The other end of the default route plays EC2.
    let (ec2, host) = (Namespace::new(), Namespace::new());
    ec2.bridge_to(&host);
    ec2.run("ip", &["addr", "add", "169.254.169.254/32", "dev", "lo"]);
    let real = ec2.listen(SocketAddrV4::new(ADDRESS, 80), false);
    let reached = || host.connect().map(drop).map_err(|e| e.kind());
    reached().map_err(|e| format!("{e:?} before"))?;
    real.accept()?;

    let listener = host.listen(LISTENER, true);
    let up = host.up(LISTENER)?;
    let near = host.connect()?;
    assert_eq!(listener.accept()?.1, near.local_addr()?);
    host.crash(up);
    // Whatever of the rest is lost as well: the address, then the route, and the guard still refuses.
    assert_eq!(reached(), Err(ErrorKind::ConnectionRefused));
    host.run("ip", &["addr", "del", "169.254.169.254/32", "dev", "lo"]);
    assert_eq!(reached(), Err(ErrorKind::HostUnreachable));
    host.run("ip", &["route", "del", "unreachable", "169.254.169.254"]);
    assert_eq!(reached(), Err(ErrorKind::ConnectionRefused));

    assert_eq!(host.enter(|| clear(&Plan::host(LISTENER)))?.len(), 1);
    reached().map_err(|e| format!("{e:?} afterwards"))?;
    real.accept()?;
    Ok(())
}

/// Between a container and EC2: the host reaches what it reached before, and passes nobody on to it, without a daemon, too.
fn a_real_service_stays_the_hosts_and_is_nobody_elses() -> Outcome {
    let (ec2, host, guest) = (Namespace::new(), Namespace::new(), Namespace::new());
    ec2.bridge_to(&host);
    host.bridge_to_at(&guest, "10.9.1");
    ec2.run("ip", &["route", "add", "10.9.1.0/24", "via", "10.9.0.2"]);
    host.set("ipv4/ip_forward", "1");
    ec2.run("ip", &["addr", "add", "169.254.169.254/32", "dev", "lo"]);
    let real = ec2.listen(SocketAddrV4::new(ADDRESS, 80), false);
    let reaches = |who: &Namespace| -> Result<(), ErrorKind> {
        who.connect().map_err(|e| e.kind())?;
        real.accept().map(drop).map_err(|e| e.kind())
    };
    let listing = || {
        (
            host.run("ip", &["-4", "-j", "route", "show", "table", "all"]),
            host.rules(),
        )
    };
    let before = listing();
    assert_eq!((reaches(&host), reaches(&guest)), (Ok(()), Ok(())), "both, without us");

    let addresses = ["169.254.169.254", "169.254.170.2"].map(|it| it.parse().expect("an address"));
    let plan = || Plan::rejecting(&addresses, &[]);
    let refused = || {
        assert_eq!(reaches(&host), Ok(()));
        assert_eq!(reaches(&guest), Err(ErrorKind::ConnectionRefused));
    };
    let (first, second, third) = (plan(), plan(), plan());
    // Somebody else's accept, before and after ours, is none.
    host.run(
        "nft",
        &["add table ip other; add chain ip other f { type filter hook forward priority -400; policy accept; }; add rule ip other f accept"],
    );
    assert_eq!(host.enter(move || install(&first))?.len(), 1, "without a daemon");
    refused();
    // What is no TCP is told, too.
    let datagram = guest.enter(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
        socket.connect((ADDRESS, 80))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.send(b"?")?;
        socket.recv(&mut [0; 8])
    });
    assert!(datagram.is_err_and(|e| e.kind() == ErrorKind::HostUnreachable || e.kind() == ErrorKind::PermissionDenied));
    let up = host.enter(move || Interception::up(second))?;
    assert_eq!(
        host.rules()
            .iter()
            .filter(|table| table.contains("imds_router"))
            .cloned()
            .collect::<Vec<_>>(),
        sorted(plan().parts().iter().filter_map(text))
    );
    refused();
    let other = plan();
    assert!(matches!(
        host.enter(move || Interception::up(other)).map(drop),
        Err(HostError::Busy { .. })
    ));
    host.crash(up);
    refused();
    let mut up = host.enter(move || Interception::up(third))?;
    host.run("nft", &["delete", "table", "ip", "imds_router_guard"]);
    assert_eq!(up.verify()?.len(), 1);
    refused();
    // A clean end does not open it.
    up.down()?;
    refused();
    assert!(!host.has_owned_table());
    host.run("nft", &["delete", "table", "ip", "other"]);
    assert_eq!(host.enter(|| clear(&Plan::host(LISTENER)))?.len(), 1, "intercept down");
    assert_eq!(listing(), before);
    assert_eq!((reaches(&host), reaches(&guest)), (Ok(()), Ok(())));
    Ok(())
}

fn the_next_daemon_takes_over() -> Outcome {
    let ns = Namespace::new();
    let before = ns.listing();
    ns.crash(ns.up(LISTENER)?);
    ns.run("nft", &["add", "table", "ip", "imds_router"]);
    let squatter = ns.listen(LISTENER, false);
    let listener = ns.listen(OTHER_LISTENER, false);
    let up = ns.up(OTHER_LISTENER)?;
    let taken: Vec<String> = up.taken_over().iter().map(Part::to_string).collect();
    let expected = [
        "address 169.254.169.254/32 on lo",
        "table ip imds_router",
        "unreachable route 169.254.169.254/32",
        "table ip imds_router_guard",
    ];
    assert_eq!(taken, expected);
    let near = ns.connect()?;
    assert_eq!(listener.accept()?.1, near.local_addr()?);
    drop(squatter);
    up.down()?;
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn what_is_removed_is_put_back() -> Outcome {
    let damages: [(&str, &[&str], &str); 7] = [
        (
            "ip",
            &["addr", "del", "169.254.169.254/32", "dev", "lo"],
            "add address 169.254.169.254/32 on lo",
        ),
        (
            "ip",
            &["addr", "flush", "dev", "lo"],
            "add address 169.254.169.254/32 on lo",
        ),
        (
            "ip",
            &["route", "del", "unreachable", "169.254.169.254"],
            "add unreachable route 169.254.169.254/32",
        ),
        (
            "nft",
            &["delete", "table", "ip", "imds_router_guard"],
            "add table ip imds_router_guard",
        ),
        (
            "nft",
            &["flush", "table", "ip", "imds_router_guard"],
            "repair table ip imds_router_guard",
        ),
        (
            "nft",
            &["insert", "rule", "ip", "imds_router_guard", "out", "accept"],
            "repair table ip imds_router_guard",
        ),
        (
            "nft",
            &["add", "table", "ip", "imds_router_guard", "{ flags dormant; }"],
            "repair table ip imds_router_guard",
        ),
    ];
    let ns = Namespace::new();
    let mut up = ns.up(LISTENER)?;
    let before = ns.listing();
    for (program, arguments, repair) in damages {
        up.verify()?;
        settle(&up)?;
        ns.run(program, arguments);
        let damaged = Instant::now();
        wait(&up)?;
        let done: Vec<String> = up.verify()?.iter().map(Step::to_string).collect();
        println!(
            "{program} {}: put back after {:?}",
            arguments.join(" "),
            damaged.elapsed()
        );
        assert_eq!(done, [repair], "{program} {arguments:?}");
        assert!(damaged.elapsed() < Duration::from_secs(1), "{:?}", damaged.elapsed());
        ns.run("ip", &["addr", "replace", "127.0.0.1/8", "dev", "lo", "scope", "host"]);
        assert_eq!(ns.rules(), before.2, "{program} {arguments:?}");
        assert_eq!(ns.enter(|| pending(&Plan::host(LISTENER)))?, []);
    }
    up.down()?;
    Ok(())
}

fn a_flush_of_all_rules_is_survived() -> Outcome {
    let ns = Namespace::new();
    let listener = ns.listen(LISTENER, true);
    let mut up = ns.up(LISTENER)?;
    let before = ns.listing();
    ns.run("nft", &["flush", "ruleset"]);
    let near = ns.connect()?;
    assert_eq!(
        listener.accept()?.1,
        near.local_addr()?,
        "the owned table does not care"
    );
    assert_eq!(up.verify()?.len(), 1);
    assert_eq!(ns.listing(), before);
    up.down()?;
    Ok(())
}

fn own_changes_do_not_ring_for_ever() -> Outcome {
    let ns = Namespace::new();
    let mut up = ns.up(LISTENER)?;
    ns.run("ip", &["addr", "del", "169.254.169.254/32", "dev", "lo"]);
    let (mut repairs, mut rings) = (0, 0);
    while ring(&up, Duration::from_millis(300))? {
        repairs += up.verify()?.len();
        rings += 1;
        assert!(rings <= 3, "the damage, the repair, and one to spare");
    }
    assert_eq!(repairs, 1);
    up.down()?;
    Ok(())
}

fn a_foreign_link_is_used_and_stays() -> Outcome {
    let ns = Namespace::new();
    ns.run("ip", &["link", "add", "imds0", "type", "bridge"]);
    let mut up = ns.up(LISTENER)?;
    assert_eq!(
        ns.json(&["addr", "show", "to", "169.254.169.254"])[0]["ifname"],
        "imds0"
    );
    ns.run("ip", &["link", "set", "imds0", "down"]);
    assert_eq!(
        up.verify()?.iter().map(Step::to_string).collect::<Vec<_>>(),
        ["repair link imds0 (dummy)"]
    );
    let listener = ns.listen(LISTENER, false);
    let near = ns.connect()?;
    assert_eq!(listener.accept()?.1, near.local_addr()?);
    ns.run("ip", &["addr", "flush", "dev", "imds0"]);
    let done: Vec<String> = up.verify()?.iter().map(Step::to_string).collect();
    assert_eq!(done, ["add address 169.254.169.254/32 on imds0"]);
    up.down()?;
    assert_eq!(
        ns.json(&["link", "show", "imds0"])[0]["ifname"],
        "imds0",
        "it was not ours"
    );

    let mut up = ns.up(LISTENER)?;
    ns.run("ip", &["link", "del", "imds0"]);
    let done: Vec<String> = up.verify()?.iter().map(Step::to_string).collect();
    assert_eq!(
        done,
        ["add address 169.254.169.254/32 on lo"],
        "no dummy in this kernel"
    );
    up.down()?;
    Ok(())
}

fn foreign_closed_routes_are_left_alone() -> Outcome {
    for kind in ["blackhole", "prohibit", "unreachable"] {
        let ns = Namespace::new();
        ns.run("ip", &["route", "add", kind, "169.254.169.254"]);
        let before = ns.listing();
        let mut up = ns.up(LISTENER)?;
        assert_eq!(
            ns.json(&["route", "show", "169.254.169.254"]).as_array().map(Vec::len),
            Some(1),
            "{kind}"
        );
        assert_eq!(up.verify()?, []);
        up.down()?;
        assert_eq!(ns.listing(), before, "{kind}");
        ns.crash(ns.up(LISTENER)?);
        ns.enter(|| clear(&Plan::host(LISTENER)))?;
        assert_eq!(ns.listing(), before, "{kind}");
    }
    let ns = Namespace::new();
    ns.run("ip", &["route", "add", "blackhole", "169.254.0.0/16"]);
    let before = ns.listing();
    let up = ns.up(LISTENER)?;
    assert_eq!(
        ns.json(&["route", "show", "169.254.169.254"])[0]["type"],
        "unreachable",
        "a wider one is not enough"
    );
    up.down()?;
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn a_foreign_open_route_stays_behind_ours() -> Outcome {
    let (ns, other) = (Namespace::new(), Namespace::new());
    ns.bridge_to(&other);
    ns.run("ip", &["route", "add", "169.254.169.254", "dev", "veth0"]);
    let before = ns.listing();
    let mut up = ns.up(LISTENER)?;
    ns.run("ip", &["addr", "del", "169.254.169.254/32", "dev", "lo"]);
    let get = ns.try_run("ip", &["route", "get", "169.254.169.254"]);
    assert!(!get.status.success(), "unreachable: {get:?}");
    assert_eq!(up.verify()?.len(), 1);
    up.down()?;
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn a_foreign_address_stays() -> Outcome {
    let ns = Namespace::new();
    ns.run("ip", &["addr", "add", "169.254.169.254/32", "dev", "lo"]);
    let before = ns.listing();
    ns.up(LISTENER)?.down()?;
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn a_failure_half_way_leaves_nothing() -> Outcome {
    let ns = Namespace::new();
    // Without a dummy and without `lo` there is nothing to put the address on: the very last step fails.
    ns.run("ip", &["link", "set", "lo", "down"]);
    ns.run("ip", &["link", "set", "lo", "name", "loop"]);
    let before = ns.listing();
    let failed = ns.up(LISTENER).map(drop).expect_err("no link");
    assert_eq!(failed.to_string(), "cannot add address 169.254.169.254/32 on lo");
    assert_eq!(ns.listing(), before);
    ns.enter(|| install(&Plan::host(LISTENER))).expect_err("no link");
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn without_the_right_nothing_is_touched() -> Outcome {
    let ns = Namespace::new();
    let before = ns.listing();
    let failed = ns.enter(|| {
        let mut sets = capabilities(None).expect("own capabilities");
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).expect("fewer are always allowed");
        Interception::up(Plan::host(LISTENER)).map(drop).expect_err("no right")
    });
    assert!(matches!(failed, HostError::Denied { .. }), "{failed:?}");
    assert!(failed.to_string().contains("CAP_NET_ADMIN"), "{failed}");
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn down_finds_nothing_left() -> Outcome {
    let ns = Namespace::new();
    let before = ns.listing();
    let up = ns.up(LISTENER)?;
    ns.run("nft", &["delete", "table", "ip", "imds_router_guard"]);
    ns.run("ip", &["route", "del", "unreachable", "169.254.169.254"]);
    ns.run("ip", &["addr", "del", "169.254.169.254/32", "dev", "lo"]);
    up.down()?;
    assert_eq!(ns.enter(|| clear(&Plan::host(LISTENER)))?, []);
    assert_eq!(ns.listing(), before);
    Ok(())
}

fn down_without_the_right_says_so() -> Outcome {
    let ns = Namespace::new();
    ns.crash(ns.up(LISTENER)?);
    let owner = ns.up(LISTENER)?;
    let before = ns.listing();
    // A thread without the right to change anything, through sockets of one that had it.
    let failed = ns.enter(move || {
        let mut sets = capabilities(None).expect("own capabilities");
        sets.effective.remove(CapabilitySet::NET_ADMIN);
        set_capabilities(None, sets).expect("fewer are always allowed");
        owner.down().expect_err("no right")
    });
    assert!(matches!(failed, HostError::Denied { .. }), "{failed:?}");
    assert_eq!(ns.listing().0, before.0, "the address is still there");
    eventually(|| !ns.has_owned_table());
    let left: Vec<String> = ns
        .enter(|| clear(&Plan::host(LISTENER)))?
        .iter()
        .map(Step::to_string)
        .collect();
    assert_eq!(left.len(), 3, "{left:?}");
    Ok(())
}

fn without_a_daemon_everybody_is_refused() -> Outcome {
    let ns = Namespace::new();
    let _publisher = ns.listen(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80), false);
    let before = ns.listing();
    let plan = Plan::host(LISTENER);
    let done = ns.enter(|| install(&Plan::host(LISTENER)))?;
    assert_eq!(done.len(), 3, "guard, route, address: {done:?}");
    assert_eq!(
        ns.connect().map_err(|e| e.kind()).err(),
        Some(ErrorKind::ConnectionRefused)
    );
    assert_eq!(ns.enter(|| install(&Plan::host(LISTENER)))?, []);
    assert_eq!(ns.enter(move || clear(&plan))?.len(), 3);
    assert_eq!(ns.listing(), before);
    Ok(())
}

impl Namespace {
    fn up(&self, listener: impl Into<SocketAddr>) -> Result<Interception, HostError> {
        let listener = listener.into();
        self.enter(move || Interception::up(Plan::host(listener)))
    }

    /// The daemon is gone without a word.
    fn crash(&self, up: Interception) {
        drop(up);
        eventually(|| !self.has_owned_table());
    }

    fn has_owned_table(&self) -> bool {
        self.rules().iter().any(|table| table.contains("flags owner"))
    }
}

fn text(part: &Part) -> Option<String> {
    match part {
        Part::Table(table) => Some(table.to_string()),
        _ => None,
    }
}

/// Whether something rang within `patience`.
fn ring(up: &Interception, patience: Duration) -> io::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        tokio::time::timeout(patience, up.changed())
            .await
            .map_or(Ok(false), |rung| rung.map(|()| true))
    })
}

fn wait(up: &Interception) -> Outcome {
    if ring(up, PATIENCE)? {
        Ok(())
    } else {
        Err("no notification".into())
    }
}

/// Until what we did ourselves has been heard.
fn settle(up: &Interception) -> Outcome {
    let deadline = Instant::now() + PATIENCE;
    while ring(up, Duration::from_millis(100))? {
        if Instant::now() > deadline {
            return Err("it rings for ever".into());
        }
    }
    Ok(())
}
