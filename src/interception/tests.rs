use super::*;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
const LISTENER: SocketAddrV4 = SocketAddrV4::new(ADDRESS, 51254);

fn told(steps: &[Step]) -> Vec<String> {
    steps.iter().map(Step::to_string).collect()
}

fn seen(link: &str, ours: bool) -> AddressSeen {
    AddressSeen {
        address: ADDRESS.into(),
        link: link.into(),
        index: 7,
        ours,
    }
}

/// What the kernel shows while everything of [`Plan::host`] is up.
fn complete() -> Observed {
    let table = |name, owner| TableSeen {
        name,
        owner,
        intact: true,
    };
    Observed {
        tables: vec![table(GUARD_TABLE, None), table(RULES_TABLE, Some(4711))],
        own_route: true,
        foreign_closed_route: false,
        delivery: None,
        link: Some(LinkSeen { ours: true, up: true }),
        addresses: vec![seen(LINK, true)],
    }
}

fn host_diff(change: impl FnOnce(&mut Observed)) -> Vec<String> {
    let mut observed = complete();
    change(&mut observed);
    told(&diff(&Plan::host(LISTENER), &observed))
}

fn host_teardown(change: impl FnOnce(&mut Observed)) -> Vec<String> {
    let mut observed = complete();
    change(&mut observed);
    told(&teardown(&Plan::host(LISTENER), &observed))
}

#[test]
fn rules_come_before_the_address_and_the_guard_before_both() {
    assert_eq!(
        told(&diff(&Plan::host(LISTENER), &Observed::default())),
        [
            "add table ip imds_router_guard",
            "add unreachable route 169.254.169.254/32",
            "add table ip imds_router",
            "add link imds0 (dummy)",
            "add address 169.254.169.254/32 on imds0",
        ]
    );
}

#[test]
fn teardown_is_the_reverse() {
    assert_eq!(
        host_teardown(|_| ()),
        [
            "remove address 169.254.169.254/32 on imds0",
            "remove link imds0 (dummy)",
            "remove table ip imds_router",
            "remove unreachable route 169.254.169.254/32",
            "remove table ip imds_router_guard",
        ]
    );
    assert!(teardown(&Plan::host(LISTENER), &Observed::default()).is_empty());
}

#[test]
fn nothing_to_do_when_everything_is_there() {
    assert_eq!(host_diff(|_| ()), [""; 0]);
}

#[test]
fn a_missing_part_is_added_alone() {
    assert_eq!(
        host_diff(|o| o.own_route = false),
        ["add unreachable route 169.254.169.254/32"]
    );
    assert_eq!(
        host_diff(|o| o.addresses.clear()),
        ["add address 169.254.169.254/32 on imds0"]
    );
    assert_eq!(
        host_diff(|o| o.tables.retain(|t| t.name != GUARD_TABLE)),
        ["add table ip imds_router_guard"]
    );
}

#[test]
fn a_link_that_is_down_is_repaired() {
    let down = |o: &mut Observed| o.link = Some(LinkSeen { ours: true, up: false });
    assert_eq!(host_diff(down), ["repair link imds0 (dummy)"]);
}

#[test]
fn a_changed_table_is_replaced() {
    assert_eq!(
        host_diff(|o| o.tables[0].intact = false),
        ["repair table ip imds_router_guard"]
    );
}

#[test]
fn rules_that_nobody_owns_would_outlive_the_daemon() {
    assert_eq!(host_diff(|o| o.tables[1].owner = None), ["repair table ip imds_router"]);
}

#[test]
fn lo_is_good_enough_where_there_is_no_dummy() {
    let on_lo = |o: &mut Observed| {
        o.link = None;
        o.addresses[0].link = LOOPBACK.into();
    };
    assert_eq!(host_diff(on_lo), [""; 0]);
    assert_eq!(host_teardown(on_lo)[0], "remove address 169.254.169.254/32 on lo");
    assert_eq!(host_teardown(on_lo).len(), 4, "the link is not there");
}

#[test]
fn what_others_made_is_used_and_stays() {
    let foreign = |o: &mut Observed| {
        o.own_route = false;
        o.foreign_closed_route = true;
        o.link = Some(LinkSeen { ours: false, up: true });
        o.addresses = vec![seen("eth0", false)];
    };
    assert_eq!(host_diff(foreign), [""; 0]);
    assert_eq!(
        host_teardown(foreign),
        ["remove table ip imds_router", "remove table ip imds_router_guard"]
    );
}

#[test]
fn without_a_daemon_only_the_owned_table_is_left_out() {
    let steps = diff(&Plan::host(LISTENER).persistent(), &Observed::default());
    assert_eq!(steps.len(), 4);
    assert!(!told(&steps).contains(&"add table ip imds_router".to_owned()));
}

#[test]
fn tables_read_as_nft_writes_them() {
    let text: Vec<String> = Plan::host(LISTENER).tables().map(Table::to_string).collect();
    let guard = "table ip imds_router_guard {
\tchain pre {
\t\ttype filter hook prerouting priority -305; policy accept;
\t\tip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
\t}

\tchain out {
\t\ttype filter hook output priority -305; policy accept;
\t\tip daddr 169.254.169.254 tcp dport 80 reject with tcp reset
\t}

\tchain in {
\t\ttype filter hook input priority -305; policy accept;
\t\tip saddr 169.254.169.254 tcp sport 80 tcp flags syn / syn,ack drop
\t}
}";
    let rules = "table ip imds_router {
\tflags owner

\tchain pre {
\t\ttype filter hook prerouting priority -310; policy accept;
\t\tip daddr 169.254.169.254 tcp dport 80 notrack tcp dport set 51254
\t}

\tchain out {
\t\ttype filter hook output priority -310; policy accept;
\t\tip daddr 169.254.169.254 tcp dport 80 notrack tcp dport set 51254
\t\tip saddr 169.254.169.254 tcp sport 51254 notrack tcp sport set 80
\t}
}";
    assert_eq!(text, [guard, rules]);
}

#[test]
fn the_ipv6_guard_drops_headers_that_can_hide_a_syn() {
    let address: IpAddr = "fd00:ec2::254".parse().expect("an address");
    let plan = Plan::host((address, 51254));
    let guard = plan.tables().find(|table| table.name == GUARD_TABLE).expect("a guard");
    let rules: Vec<String> = guard.chains[2].rules.iter().map(Rule::to_string).collect();
    assert_eq!(
        rules,
        [
            "ip6 saddr fd00:ec2::254 tcp sport 80 tcp flags syn / syn,ack drop",
            "ip6 saddr fd00:ec2::254 ip6 nexthdr != tcp ip6 nexthdr != ipv6-icmp drop",
        ]
    );
}

#[test]
fn what_a_host_keeps_for_itself_is_refused_to_whom_it_passes_on() {
    let resolver = IpAddr::from([192, 0, 2, 53]);
    let plan = Plan::rejecting(&[ADDRESS.into(), resolver], &[resolver]);
    let guard = "table ip imds_router_guard {
\tchain forward {
\t\ttype filter hook forward priority -305; policy accept;
\t\tip daddr 192.0.2.53 tcp dport 53 accept
\t\tip daddr 192.0.2.53 udp dport 53 accept
\t\tip daddr 169.254.169.254 reject with tcp reset
\t\tip daddr 169.254.169.254 reject with icmp admin-prohibited
\t\tip daddr 192.0.2.53 reject with tcp reset
\t\tip daddr 192.0.2.53 reject with icmp admin-prohibited
\t}
}";
    let text: Vec<String> = plan.tables().map(Table::to_string).collect();
    assert_eq!(text, [guard, "table ip imds_router {\n\tflags owner\n}"]);
    assert_eq!(plan.parts().len(), 2, "nothing else of the host is touched");
    let up = Observed {
        tables: complete().tables,
        ..Observed::default()
    };
    assert_eq!(told(&diff(&plan, &up)), [""; 0]);
    // What refuses outlives a daemon that ends cleanly; asked for, all of it goes.
    assert_eq!(
        told(&teardown(&plan.clone().ending(), &up)),
        ["remove table ip imds_router"]
    );
    assert_eq!(told(&teardown(&plan, &up)).len(), 2);
    let other = Plan::rejecting(&["fd00:ec2::254".parse().expect("an address")], &[]);
    assert_eq!(other.family(), Family::Ip6);
    assert!(
        other
            .tables()
            .any(|table| table.to_string().contains("reject with icmpv6 admin-prohibited"))
    );
}

#[test]
fn between_containers_and_a_kept_service_only_what_is_passed_on_is_ours() {
    let plan = Plan::between(LISTENER, &[ADDRESS.into()], &[]);
    let text: Vec<String> = plan.tables().map(Table::to_string).collect();
    assert!(
        text[0].contains("hook forward") && !text[0].contains("hook output"),
        "{}",
        text[0]
    );
    assert!(text[1].contains("hook prerouting"), "{}", text[1]);
    let (_, out) = text[1].split_once("hook output").expect("a chain");
    let rules: Vec<_> = out
        .lines()
        .filter(|line| line.contains("169.254.169.254"))
        .map(str::trim)
        .collect();
    let answers = "ip saddr 169.254.169.254 tcp sport 51254 notrack tcp sport set 80";
    assert_eq!(rules, [answers], "the host's own requests go where they went");
    let seen = |delivery| Observed {
        tables: complete().tables,
        delivery,
        ..Observed::default()
    };
    assert_eq!(told(&diff(&plan, &seen(Some(51254)))), [""; 0]);
    let delivery = "delivery of 169.254.169.254/32 (rule and table 169)";
    assert_eq!(told(&diff(&plan, &seen(None))), [format!("add {delivery}")]);
    // That of an earlier daemon, on another port.
    assert_eq!(told(&diff(&plan, &seen(Some(51255)))), [format!("repair {delivery}")]);
    // Only what refuses stays after a clean end, and is there without a daemon.
    let ending = told(&teardown(&plan.clone().ending(), &seen(Some(51254))));
    assert_eq!(
        ending,
        [format!("remove {delivery}"), "remove table ip imds_router".to_owned()]
    );
    assert_eq!(
        told(&diff(&plan.persistent(), &Observed::default())),
        ["add table ip imds_router_guard"]
    );
    assert_eq!(
        told(&teardown(&Plan::delivery(ADDRESS.into()), &seen(Some(0)))),
        [format!("remove {delivery}")]
    );
}

#[test]
fn several_failures_are_all_told() {
    let failed = |attempt: &str| HostError::Failed {
        attempt: attempt.into(),
        source: io::Error::from(io::ErrorKind::TimedOut),
    };
    assert!(HostError::all(Vec::new()).is_none());
    assert_eq!(
        HostError::all(vec![failed("a")]).map(|e| e.to_string()),
        Some("cannot a".into())
    );
    let both = HostError::all(vec![failed("a"), failed("b")]).map(|e| e.to_string());
    assert_eq!(
        both,
        Some("2 failures:\n- cannot a: timed out\n- cannot b: timed out".into())
    );
}

#[test]
fn an_interception_may_live_in_a_task() {
    fn sendable<T: Send>(_: &T) {}
    async fn keep(mut up: reconcile::Interception) {
        while up.changed().await.is_ok() && up.verify().is_ok() {}
    }
    // Only the types count: there is nothing to run it on here.
    let _ = |up| sendable(&keep(up));
}

#[test]
fn ipv6_has_the_same_rules_and_leaves_the_link_to_ipv4() {
    const LISTENER: SocketAddr = SocketAddr::new(
        std::net::IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
        51254,
    );
    assert_eq!(
        told(&diff(&Plan::host(LISTENER), &Observed::default())),
        [
            "add table ip6 imds_router_guard",
            "add unreachable route fd00:ec2::254/128",
            "add table ip6 imds_router",
            "add address fd00:ec2::254/128 on imds0",
        ]
    );
}

#[test]
fn an_address_of_somebody_else_is_told_of() {
    let observed = Observed {
        addresses: vec![seen("eth0", false), seen("lo", true)],
        ..Observed::default()
    };
    let told: Vec<_> = Plan::host(LISTENER)
        .foreign(&observed)
        .iter()
        .map(|(part, link)| format!("{part}, {link}"))
        .collect();
    assert_eq!(told, ["address 169.254.169.254/32 on eth0, 7"]);
}
