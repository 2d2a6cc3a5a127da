//! The link of a network namespace to the private one, without an engine.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use imds_router::interception::container_link::{self, Connected, Options, SOURCES};
use imds_router::interception::private_netns::PrivateNetwork;
use libtest_mimic::{Failed, Trial};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use crate::rig::namespace::{ADDRESS, Namespace, PATIENCE, eventually};

const ADDRESS_IPV6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);

type Outcome = Result<(), Failed>;
type Case = (&'static str, fn() -> Outcome);

pub fn trials() -> Vec<Trial> {
    let all: [Case; 12] = [
        ("adds_no_address_and_leaves_nothing", adds_no_address_and_leaves_nothing),
        (
            "serves_a_namespace_with_its_own_port_80",
            serves_a_namespace_with_its_own_port_80,
        ),
        (
            "keeps_equal_connections_of_two_namespaces_apart",
            keeps_equal_connections_of_two_namespaces_apart,
        ),
        ("removes_all_links_at_once", removes_all_links_at_once),
        ("clears_what_a_crash_left", clears_what_a_crash_left),
        ("restores_what_is_removed", restores_what_is_removed),
        (
            "takes_back_a_link_that_was_given_away",
            takes_back_a_link_that_was_given_away,
        ),
        (
            "refuses_after_a_crash_and_is_adopted",
            refuses_after_a_crash_and_is_adopted,
        ),
        (
            "refuses_without_a_private_namespace",
            refuses_without_a_private_namespace,
        ),
        ("does_not_replace_a_foreign_link", does_not_replace_a_foreign_link),
        (
            "forwards_nothing_between_namespaces",
            forwards_nothing_between_namespaces,
        ),
        (
            "forwards_nothing_from_neighbors_to_the_link",
            forwards_nothing_from_neighbors_to_the_link,
        ),
    ];
    all.into_iter()
        .map(|(name, run)| Trial::test(format!("links::{name}"), run))
        .collect()
}

/// A private namespace, pinned in a directory of its own.
struct Private {
    network: Arc<PrivateNetwork>,
    directory: TempDir,
}

impl Private {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        Self {
            network: Arc::new(open(&directory)),
            directory,
        }
    }

    fn connect(&self, namespace: &Namespace) -> io::Result<Connected> {
        self.connect_with(namespace, false)
    }

    fn connect_with(&self, namespace: &Namespace, nested: bool) -> io::Result<Connected> {
        let (network, number) = (self.network.clone(), number(namespace));
        let options = Options { ipv6: true, nested };
        namespace.enter(move || container_link::connect(&network, number, options))
    }

    fn check(&self, namespace: &Namespace) -> io::Result<()> {
        let (network, number) = (self.network.clone(), number(namespace));
        namespace.enter(move || container_link::check(&network, number))
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = self.network.unpin();
    }
}

fn open(directory: &TempDir) -> PrivateNetwork {
    PrivateNetwork::open(&directory.path().join("netns"), ADDRESS, ADDRESS_IPV6).expect("root may")
}

/// The number of the namespace, as the kernel has it.
fn number(namespace: &Namespace) -> u64 {
    std::fs::metadata(format!("/run/netns/{}", namespace.name))
        .expect("it exists")
        .ino()
}

/// A namespace with a link `eth0` that has an IPv4 and an IPv6 address, as a container has it.
fn container(ipv4: &str) -> Namespace {
    let namespace = Namespace::new();
    namespace.run("ip", &["link", "add", "eth0", "type", "bridge"]);
    namespace.run("ip", &["addr", "add", ipv4, "dev", "eth0"]);
    let ipv6 = format!("fd11::{}/64", ipv4.split(['.', '/']).nth(3).expect("four numbers"));
    namespace.run("ip", &["addr", "add", &ipv6, "dev", "eth0", "nodad"]);
    namespace.run("ip", &["link", "set", "eth0", "up"]);
    namespace
}

/// Connects to the service from inside, from a certain port if it is not 0.
fn dial(namespace: &Namespace, to: IpAddr, from: SocketAddr) -> io::Result<TcpStream> {
    namespace.enter(move || {
        let socket = Socket::new(Domain::for_address((to, 80).into()), Type::STREAM, None)?;
        socket.set_reuse_address(true)?;
        socket.bind(&from.into())?;
        socket.connect_timeout(&SocketAddr::new(to, 80).into(), PATIENCE)?;
        let stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(stream)
    })
}

fn any(ipv6: bool) -> SocketAddr {
    match ipv6 {
        true => (Ipv6Addr::UNSPECIFIED, 0).into(),
        false => (Ipv4Addr::UNSPECIFIED, 0).into(),
    }
}

/// The listener of a link, blocking.
fn listen(private: &Private, near: &str) -> std::net::TcpListener {
    let listener = private.network.listen(near).expect("it can listen");
    listener.set_nonblocking(false).expect("an option");
    listener
}

fn addresses(namespace: &Namespace) -> Vec<String> {
    let all = namespace.json(&["addr"]);
    let links = all.as_array().into_iter().flatten();
    let infos = links.flat_map(|link| link["addr_info"].as_array().cloned().unwrap_or_default());
    infos.map(|info| info["local"].to_string()).collect()
}

fn adds_no_address_and_leaves_nothing() -> Outcome {
    let (private, container) = (Private::new(), container("10.1.0.2/24"));
    let (before, listing) = (addresses(&container), container.listing());
    let connected = private.connect(&container)?;
    assert!(connected.is_new && connected.left_alone.is_empty(), "{connected:?}");
    assert_eq!(addresses(&container), before, "an application sees the same addresses");
    private.check(&container)?;
    let again = private.connect(&container)?;
    assert!(!again.is_new && again.added.is_empty(), "{again:?}");
    let (network, number) = (private.network.clone(), number(&container));
    container.enter(move || container_link::disconnect(&network, number))?;
    assert_eq!(container.listing(), listing);
    Ok(())
}

fn serves_a_namespace_with_its_own_port_80() -> Outcome {
    let (private, container) = (Private::new(), container("10.1.0.2/24"));
    let connected = private.connect(&container)?;
    let application = container.listen(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80), false);
    let listener = listen(&private, &connected.near);
    for to in [IpAddr::from(ADDRESS), ADDRESS_IPV6.into()] {
        let near = dial(&container, to, any(to.is_ipv6()))?;
        let (far, client) = listener.accept()?;
        assert_eq!(
            SocketAddr::new(client.ip().to_canonical(), client.port()),
            near.local_addr()?
        );
        assert_eq!(far.local_addr()?.ip().to_canonical(), to);
        (&far).write_all(b"pong")?;
        let mut answer = [0; 4];
        (&near).read_exact(&mut answer)?;
        assert_eq!(&answer, b"pong");
        if to.is_ipv4() {
            let source: Ipv4Addr = near.local_addr()?.ip().to_string().parse()?;
            assert!(source.to_bits() - SOURCES.0.to_bits() < SOURCES.1, "{source}");
        }
    }
    let local = container.enter(|| TcpStream::connect((Ipv4Addr::LOCALHOST, 80)))?;
    assert_eq!(application.accept()?.1, local.local_addr()?);
    // A client that has bound itself to the address of another link is answered, too.
    let from = SocketAddr::from(([10, 1, 0, 2], 0));
    let near = dial(&container, ADDRESS.into(), from)?;
    assert_eq!(listener.accept()?.1.port(), near.local_addr()?.port());
    Ok(())
}

/// A clean stop.
fn removes_all_links_at_once() -> Outcome {
    let private = Private::new();
    container_link::remove_links(&private.network)?;
    let containers = [container("10.1.0.2/24"), container("10.2.0.2/24")];
    let before: Vec<_> = containers.iter().map(Namespace::listing).collect();
    for container in &containers {
        private.connect(container)?;
        let network = private.network.clone();
        container.enter(move || container_link::leave(&network))?;
    }
    container_link::remove_links(&private.network)?;
    let after: Vec<_> = containers.iter().map(Namespace::listing).collect();
    assert_eq!(after, before);
    Ok(())
}

/// `intercept down` after a crash.
fn clears_what_a_crash_left() -> Outcome {
    let (private, container) = (Private::new(), container("10.1.0.2/24"));
    let before = container.listing();
    private.connect(&container)?;
    let pin = private.directory.path().join("netns");
    // A namespace is found by its processes.
    let mut sleep = std::process::Command::new("nsenter")
        .args([&format!("--net=/run/netns/{}", container.name), "sleep", "60"])
        .spawn()?;
    let inside = format!("/proc/{}/ns/net", sleep.id());
    eventually(|| std::fs::metadata(&inside).is_ok_and(|it| it.ino() == number(&container)));
    let removed = container_link::clear(&pin, ADDRESS, ADDRESS_IPV6);
    sleep.kill()?;
    sleep.wait()?;
    assert_eq!(removed?.len(), 2);
    assert_eq!(container.listing(), before);
    assert_eq!(
        container_link::clear(&pin, ADDRESS, ADDRESS_IPV6)?,
        Vec::<String>::new()
    );
    Ok(())
}

/// Two namespaces may have the same addresses, and their clients the same ports.
fn keeps_equal_connections_of_two_namespaces_apart() -> Outcome {
    let private = Private::new();
    let containers = [container("10.1.0.2/24"), container("10.1.0.2/24")];
    let from = SocketAddr::from(([10, 1, 0, 2], 40_000));
    let mut open = Vec::new();
    for container in &containers {
        let connected = private.connect(container)?;
        let listener = listen(&private, &connected.near);
        let near = dial(container, ADDRESS.into(), from)?;
        let (far, client) = listener.accept()?;
        assert_eq!(client.port(), 40_000);
        open.push((near, far, listener));
    }
    for (number, (_, far, _)) in open.iter_mut().enumerate() {
        far.write_all(&[b'a' + u8::try_from(number)?])?;
    }
    for (number, (near, _, _)) in open.iter_mut().enumerate() {
        let mut answer = [0];
        near.read_exact(&mut answer)?;
        assert_eq!(answer[0], b'a' + u8::try_from(number)?);
    }
    Ok(())
}

fn restores_what_is_removed() -> Outcome {
    let (private, container) = (Private::new(), container("10.1.0.2/24"));
    let near = private.connect(&container)?.near;
    let mut listener = listen(&private, &near);
    for commands in [
        &["link set imds0 down"][..],
        &["route del 169.254.169.254 dev imds0 table 169"],
        &["rule del pref 1"],
        &["route flush table 169"],
        &["route flush table local dev imds0"],
        &["route flush table main"],
        &["-6 route flush table 169"],
        &["link del imds0"],
        &["link set imds0 name other"],
        &["link set imds0 arp on"],
        &["link set imds0 address 02:11:22:33:44:55"],
        &["addr flush dev lo"],
        &["link set lo down", "link set lo up"],
    ] {
        for command in commands {
            let command: Vec<_> = command.split(' ').collect();
            container.try_run("ip", &command);
        }
        let connected = private.connect(&container)?;
        if connected.is_new {
            listener = listen(&private, &near);
        }
        private.check(&container)?;
        let _near = dial(&container, ADDRESS.into(), any(false)).map_err(|error| format!("{commands:?}: {error}"))?;
        listener.accept()?;
    }
    Ok(())
}

/// A container with NET_ADMIN gives its end of the link to another namespace, which then calls as that container.
fn takes_back_a_link_that_was_given_away() -> Outcome {
    let (private, giver, taker) = (Private::new(), container("10.1.0.2/24"), container("10.2.0.2/24"));
    let near = private.connect(&giver)?.near;
    giver.run("ip", &["link", "set", "imds0", "netns", &taker.name]);
    assert!(private.check(&giver).is_err());
    assert!(private.connect(&giver)?.is_new);
    let listener = listen(&private, &near);
    let _near = dial(&giver, ADDRESS.into(), any(false))?;
    listener.accept()?;
    eventually(|| !taker.try_run("ip", &["link", "show", "imds0"]).status.success());
    Ok(())
}

fn refuses_after_a_crash_and_is_adopted() -> Outcome {
    let (mut private, container) = (Private::new(), container("10.1.0.2/24"));
    let near = private.connect(&container)?.near;
    drop(listen(&private, &near));
    // A process of the namespace may listen wherever it likes.
    let _squatters: Vec<_> = [80, 51_254]
        .map(|port| container.listen(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port), false))
        .into();
    let other = crate::links::container("10.1.0.3/24");
    private.connect(&other)?;
    let refused = |container: &Namespace| {
        for to in [IpAddr::from(ADDRESS), ADDRESS_IPV6.into()] {
            let error = dial(container, to, any(to.is_ipv6())).expect_err("nothing serves");
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
    };
    refused(&container);
    // The daemon is gone: nothing holds the namespace but its pin.
    private.network = Arc::new(open(&private.directory));
    assert!(private.network.is_pinned());
    refused(&container);
    let connected = private.connect(&container)?;
    assert!(!connected.is_new && connected.added.is_empty(), "{connected:?}");
    let listener = listen(&private, &near);
    let _near = dial(&container, ADDRESS.into(), any(false))?;
    listener.accept()?;
    Ok(())
}

fn refuses_without_a_private_namespace() -> Outcome {
    let (private, container) = (Private::new(), container("10.1.0.2/24"));
    container.run("ip", &["route", "add", "default", "via", "10.1.0.1"]);
    private.connect(&container)?;
    // It is not pinned any more, and nothing else holds it.
    drop(private);
    eventually(|| !container.try_run("ip", &["link", "show", "imds0"]).status.success());
    let error = dial(&container, ADDRESS.into(), any(false)).expect_err("nothing answers");
    assert_eq!(
        error.kind(),
        ErrorKind::HostUnreachable,
        "and it does not leave by the default route"
    );
    Ok(())
}

fn does_not_replace_a_foreign_link() -> Outcome {
    let (private, container) = (Private::new(), container("10.1.0.2/24"));
    container.run("ip", &["link", "add", "imds0", "type", "bridge"]);
    let error = private.connect(&container).expect_err("it is not ours");
    assert!(error.to_string().contains("imds-router did not make"), "{error}");
    container.run("ip", &["link", "del", "imds0"]);
    container.run("ip", &["addr", "add", "169.254.169.254/32", "dev", "eth0"]);
    let connected = private.connect(&container)?;
    assert_eq!(
        connected.left_alone,
        ["another program has put 169.254.169.254 on eth0; it was left alone"]
    );
    // Its own address comes first, as for every program of that container.
    let error = private.check(&container).expect_err("requests stay inside");
    assert!(error.to_string().contains("does not lead over imds0"), "{error}");
    Ok(())
}

/// A container forwards packets: it has the host's `ip_forward`. A neighbor on its network that sends it a packet for the
/// service does not reach the service. A container inside the container does, if that is configured.
fn forwards_nothing_from_neighbors_to_the_link() -> Outcome {
    let (private, victim, neighbor) = (Private::new(), Namespace::new(), Namespace::new());
    victim.bridge_to(&neighbor);
    victim.set("ipv4/ip_forward", "1");
    for (nested, is_bridge) in [(false, false), (true, false), (false, true), (true, true)] {
        let connected = private.connect_with(&victim, nested)?;
        let listener = listen(&private, &connected.near);
        let inner = Namespace::new();
        if is_bridge {
            // A container inside the victim, on a bridge of its own.
            for command in [
                "link add docker0 type bridge",
                "link set docker0 up",
                "addr add 10.8.0.1/24 dev docker0",
                &format!("link add veth1 type veth peer name eth0 netns {}", inner.name),
                "link set veth1 master docker0 up",
            ] {
                victim.run("ip", &command.split(' ').collect::<Vec<_>>());
            }
            for command in [
                "addr add 10.8.0.2/24 dev eth0",
                "link set eth0 up",
                "route add default via 10.8.0.1",
            ] {
                inner.run("ip", &command.split(' ').collect::<Vec<_>>());
            }
            private.connect_with(&victim, nested)?;
        }
        let caller = if is_bridge { &inner } else { &neighbor };
        let reached = caller.enter(|| TcpStream::connect_timeout(&(ADDRESS, 80).into(), PATIENCE));
        assert_eq!(
            reached.is_ok(),
            nested && is_bridge,
            "nested {nested}, bridge {is_bridge}: {reached:?}"
        );
        drop(listener);
        let (network, number) = (private.network.clone(), number(&victim));
        victim.enter(move || container_link::disconnect(&network, number))?;
        if is_bridge {
            // A namespace that is removed keeps its links for a moment.
            victim.run("ip", &["link", "del", "veth1"]);
            victim.run("ip", &["link", "del", "docker0"]);
        }
    }
    Ok(())
}

fn forwards_nothing_between_namespaces() -> Outcome {
    let private = Private::new();
    let (one, other) = (container("10.1.0.2/24"), container("10.2.0.2/24"));
    private.connect(&one)?;
    private.connect(&other)?;
    let _listener = other.listen(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 80), false);
    for namespace in [&one, &other] {
        namespace.run("ip", &["route", "add", "10.0.0.0/8", "dev", "imds0"]);
    }
    let reached = one.enter(|| {
        TcpStream::connect_timeout(
            &(Ipv4Addr::new(10, 2, 0, 2), 80).into(),
            std::time::Duration::from_millis(300),
        )
    });
    assert!(reached.is_err(), "a neighbor was reached through the private namespace");
    Ok(())
}
