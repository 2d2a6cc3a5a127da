//! Network namespaces without a way out, for trials that need no engine.

use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);
/// How long the kernel and a busy machine may take for what is over in milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace with nothing but `lo`. Dropping it removes it, also during a panic.
pub struct Namespace {
    pub name: String,
}

impl Namespace {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("host{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let made = Command::new("ip")
            .args(["netns", "add", &name])
            .status()
            .expect("iproute2 is installed");
        assert!(made.success(), "a namespace needs root");
        let this = Self { name };
        this.run("ip", &["link", "set", "lo", "up"]);
        this
    }

    /// Runs on a thread that sits in this namespace and does only this.
    pub fn enter<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let namespace = std::fs::File::open(format!("/run/netns/{}", self.name)).expect("it is there");
        let inside = move || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("root may enter");
            work()
        };
        std::thread::spawn(inside)
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    pub fn listen(&self, at: SocketAddrV4, freebind: bool) -> TcpListener {
        self.enter(move || {
            let flags = SocketFlags::CLOEXEC;
            let listener = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None);
            let listener = listener.expect("a socket");
            sockopt::set_ip_freebind(&listener, freebind).expect("an option");
            sockopt::set_socket_reuseaddr(&listener, true).expect("an option");
            eventually(|| bind(&listener, &at).is_ok());
            listen(&listener, 16).expect("to listen");
            listener.into()
        })
    }

    /// A new connection to 169.254.169.254:80.
    pub fn connect(&self) -> io::Result<TcpStream> {
        self.enter(|| {
            let stream = TcpStream::connect_timeout(&(ADDRESS, 80).into(), PATIENCE)?;
            stream.set_read_timeout(Some(PATIENCE))?;
            Ok(stream)
        })
    }

    /// A pair of links to `guest`, which has its default route here. Returns the address there.
    pub fn bridge_to(&self, guest: &Self) -> Ipv4Addr {
        self.bridge_to_at(guest, "10.9.0")
    }

    /// The same, on another network.
    pub fn bridge_to_at(&self, guest: &Self, network: &str) -> Ipv4Addr {
        let (near, far) = (format!("{network}.1"), format!("{network}.2"));
        self.run(
            "ip",
            &[
                "link",
                "add",
                "veth0",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                &guest.name,
            ],
        );
        self.run("ip", &["addr", "add", &format!("{near}/24"), "dev", "veth0"]);
        self.run("ip", &["link", "set", "veth0", "up"]);
        guest.run("ip", &["addr", "add", &format!("{far}/24"), "dev", "eth0"]);
        guest.run("ip", &["link", "set", "eth0", "up"]);
        guest.run("ip", &["route", "add", "default", "via", &near]);
        far.parse().expect("an address")
    }

    pub fn try_run(&self, program: &str, arguments: &[&str]) -> std::process::Output {
        let inside = ["--net".to_owned() + "=/run/netns/" + &self.name, program.to_owned()];
        Command::new("nsenter")
            .args(inside)
            .args(arguments)
            .output()
            .expect("util-linux is installed")
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.try_run(program, arguments);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).expect("text")
    }

    /// Sets a network setting, such as `ipv4/ip_forward` (`sysctl` is not on every Debian).
    pub fn set(&self, setting: &str, value: &str) {
        self.run("sh", &["-c", &format!("echo {value} > /proc/sys/net/{setting}")]);
    }

    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.run("ip", &[&["-j"], arguments].concat())).expect("JSON")
    }

    /// Each table as nft lists it, with numbers as priorities, by name: the kernel has them in order of creation.
    pub fn rules(&self) -> Vec<String> {
        let text = self.run("nft", &["--numeric-priority", "list", "ruleset"]);
        sorted(
            text.split_inclusive("\n}\n")
                .map(|table| without_comment(table.trim_end())),
        )
    }

    /// Everything that an interception could change.
    pub fn listing(&self) -> (String, String, Vec<String>) {
        (
            self.run("ip", &["-j", "addr"]),
            self.run("ip", &["-j", "route", "show", "table", "all"]),
            self.rules(),
        )
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A second panic would hide the first; a namespace that stays shows in `ip netns`.
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// nft names the owner of a table behind its name.
fn without_comment(table: &str) -> String {
    let (first, rest) = table.split_once('\n').expect("a table has lines");
    format!("{}\n{rest}", first.split(" #").next().expect("split has a first part"))
}

pub fn sorted(tables: impl Iterator<Item = String>) -> Vec<String> {
    let mut list: Vec<String> = tables.collect();
    list.sort();
    list
}

/// Waits for what takes a moment: a program that another trial is just starting keeps our descriptors open until it runs.
pub fn eventually(mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
