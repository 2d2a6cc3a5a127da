//! Docker fails: a proxy between the daemon and Docker's socket answers with errors, and closes streams of events.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::LIST;
use crate::rig::{Background, Container, Daemon, Engine, Rig, attach_keys, poll};

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once(
            "docker_failures::containers_that_start_while_the_list_fails_are_served_and_keep_their_orders",
            containers_that_start_while_the_list_fails_are_served_and_keep_their_orders,
        ),
        rig.once(
            "docker_failures::streams_that_close_at_once_cost_few_requests_and_log_lines",
            streams_that_close_at_once_cost_few_requests_and_log_lines,
        ),
    ]
}

// ---- the proxy

/// The argument by which this program becomes the proxy. The daemon verifies that the engine's socket belongs to a process of its
/// own network namespace.
const PROXY: &str = "docker-proxy";

/// What the proxy does. Its file says so.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    Pass,
    ListFails,
    /// Each stream of events is closed at once.
    StreamsClose,
    StreamsCloseAndListFails,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::ListFails => "list fails",
            Self::StreamsClose => "streams close",
            Self::StreamsCloseAndListFails => "streams close, list fails",
        }
    }
}

/// The proxy, as a process: it prints the path of each request.
pub struct Proxy {
    listen: PathBuf,
    docker: PathBuf,
    mode: PathBuf,
}

impl Proxy {
    pub fn of_arguments() -> Option<Self> {
        let mut words = std::env::args_os().skip(1);
        if words.next()? != PROXY {
            return None;
        }
        let mut path = || words.next().map(PathBuf::from);
        Some(Self {
            listen: path()?,
            docker: path()?,
            mode: path()?,
        })
    }

    pub fn serve(self) -> ExitCode {
        let listener = UnixListener::bind(&self.listen).expect("the directory exists");
        let proxy = Arc::new(self);
        for client in listener.incoming().flatten() {
            let proxy = Arc::clone(&proxy);
            // An error ends the connection, as it does anywhere between a client and its server.
            std::thread::spawn(move || drop(proxy.forward(client)));
        }
        ExitCode::FAILURE
    }

    fn does(&self, what: &str) -> bool {
        fs::read_to_string(&self.mode).is_ok_and(|mode| mode.contains(what))
    }

    fn forward(&self, mut client: UnixStream) -> io::Result<()> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            client.read_exact(&mut byte)?;
            head.push(byte[0]);
        }
        let text = String::from_utf8_lossy(&head).into_owned();
        let path = text.split(' ').nth(1).unwrap_or_default();
        println!("{path}");
        let is_stream = path.contains("/events");
        if is_stream && self.does("streams close") {
            return client.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        if path.contains("/containers/json") && self.does("list fails") {
            let body = "{\"message\":\"the proxy fails\"}";
            let length = body.len();
            return write!(
                client,
                "HTTP/1.1 500 Internal Server Error\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
            );
        }
        let mut docker = UnixStream::connect(&self.docker)?;
        // One request a connection: each is seen here.
        docker.write_all(text.replacen("\r\n", "\r\nConnection: close\r\n", 1).as_bytes())?;
        docker.set_read_timeout(Some(Duration::from_millis(50)))?;
        let mut bytes = vec![0; 65536];
        loop {
            match docker.read(&mut bytes) {
                Ok(0) => return Ok(()),
                Ok(count) => client.write_all(&bytes[..count])?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if is_stream && self.does("streams close") {
                return Ok(());
            }
        }
    }
}

/// A running proxy.
struct Docker {
    process: Background,
    directory: PathBuf,
}

impl Docker {
    fn start(engine: &Arc<Engine>, mode: Mode) -> Self {
        let number = crate::rig::run::next_number();
        let directory = engine.directory().join(format!("proxy-{number}"));
        fs::create_dir_all(&directory).expect("the engine's directory can be written to");
        let this = std::env::current_exe().expect("this program has a path");
        let mut command = engine.command(this);
        let (socket, file) = (directory.join("docker.sock"), directory.join("mode"));
        command.arg(PROXY).args([&socket, &engine.socket(), &file]);
        fs::write(&file, mode.name()).expect("the directory can be written to");
        let process = engine.background(&mut command, &format!("proxy-{number}"));
        poll(Duration::from_secs(5), "the proxy", || socket.exists().then_some(()));
        Self { process, directory }
    }

    fn set(&self, mode: Mode) {
        let new = self.directory.join("new");
        fs::write(&new, mode.name()).expect("the directory can be written to");
        fs::rename(new, self.directory.join("mode")).expect("both are in one directory");
    }

    fn host(&self) -> String {
        format!("unix://{}/docker.sock", self.directory.display())
    }

    fn requests(&self) -> Vec<String> {
        self.process.output().lines().map(str::to_owned).collect()
    }
}

// ---- the trials

fn daemon(engine: &Arc<Engine>, docker: &Docker) -> Daemon {
    let mut environment = engine.moto().daemon_environment();
    environment.push(("DOCKER_HOST".to_owned(), docker.host()));
    let config = format!("account_id = \"111122223333\"\n[serve]\n{}", attach_keys("namespace"));
    Daemon::start(engine, &config, &environment)
}

fn start(engine: &Arc<Engine>, name: &str) -> Container {
    engine.run(name).label("imds.role", name).start()
}

fn engine_status(daemon: &Daemon) -> (String, String) {
    let status = daemon.status();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&status["engine"]["state"]), text(&status["engine"]["reason"]))
}

fn is_synchronised(daemon: &Daemon) {
    poll(Duration::from_secs(10), "the daemon to know all containers", || {
        (engine_status(daemon) == ("synchronised".to_owned(), String::new())).then_some(())
    });
}

/// Lines of the log of the daemon that are shown by default.
fn log_lines(daemon: &Daemon) -> Vec<String> {
    let is_shown = |line: &&str| line.contains(" INFO ") || line.contains(" WARN ") || line.contains(" ERROR ");
    daemon.log().lines().filter(is_shown).map(str::to_owned).collect()
}

/// How long it takes until the container gets its own role.
fn is_served(container: &Container, since: Instant) -> Duration {
    poll(Duration::from_secs(20), "the role of a container", || {
        let reply = container.request("GET", LIST, &[]).ok()?;
        let is_own = reply.status == 200 && reply.body == container.name();
        assert!(is_own || reply.status != 200, "{reply:?} in {}", container.name());
        is_own.then_some(())
    });
    since.elapsed()
}

fn is_ordered(directory: &Path, container: &Container) -> bool {
    let orders = fs::read_to_string(directory.join("state/orders.json")).unwrap_or_default();
    orders.contains(container.id())
}

fn containers_that_start_while_the_list_fails_are_served_and_keep_their_orders(engine: &Arc<Engine>) {
    let docker = Docker::start(engine, Mode::ListFails);
    let since = Instant::now();
    let daemon = daemon(engine, &docker);
    let containers = ["early", "late"].map(|name| start(engine, name));
    std::thread::sleep(Duration::from_secs(4).saturating_sub(since.elapsed()));
    let (state, reason) = engine_status(&daemon);
    assert_eq!(state, "synchronising", "{reason}");
    assert!(
        reason.starts_with("list of containers fails since ") && reason.contains("the proxy fails"),
        "{reason}"
    );
    let reply = containers[0].get(LIST, &[]);
    assert_eq!(reply.status, 503, "{reply:?}");
    let doctor = daemon.cli(&["doctor"]).to_string();
    assert!(doctor.contains("list of containers"), "{doctor}");

    // A fifth of the outage, and the time of the requests themselves.
    let outage = since.elapsed();
    docker.set(Mode::Pass);
    let works = Instant::now();
    for container in &containers {
        let took = is_served(container, works);
        assert!(took < Duration::from_secs(1) + outage / 10, "{took:?} after {outage:?}");
    }
    is_synchronised(&daemon);
    let said: Vec<_> = log_lines(&daemon)
        .into_iter()
        .filter(|line| line.contains("list of containers"))
        .collect();
    assert_eq!(said.len(), 2, "its failure and its end: {said:#?}");

    // Events are lost, and the list fails again.
    daemon.cli(&["modify", "late", "--http-tokens", "required"]).ok();
    docker.set(Mode::StreamsCloseAndListFails);
    std::thread::sleep(Duration::from_millis(500));
    docker.set(Mode::ListFails);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(engine_status(&daemon).0, "synchronising");
    daemon.cli(&["trigger", "early", "rebalance"]).ok();
    assert!(is_ordered(daemon.directory(), &containers[1]));
    docker.set(Mode::Pass);
    is_synchronised(&daemon);
    daemon.cli(&["trigger", "early", "rebalance"]).ok();
    assert!(is_ordered(daemon.directory(), &containers[1]));
    assert_eq!(containers[1].get(LIST, &[]).status, 401);

    // A container that Docker has removed takes its orders along.
    let [early, late] = containers;
    engine.docker(&["rm", "--force", "--volumes", late.id()]);
    poll(Duration::from_secs(5), "the orders to be forgotten", || {
        daemon.cli(&["trigger", "early", "rebalance"]).ok();
        (!is_ordered(daemon.directory(), &late)).then_some(())
    });
    late.forget();
    assert!(is_ordered(daemon.directory(), &early));
    daemon.stop();
}

fn streams_that_close_at_once_cost_few_requests_and_log_lines(engine: &Arc<Engine>) {
    let docker = Docker::start(engine, Mode::Pass);
    let daemon = daemon(engine, &docker);
    let before = start(engine, "before");
    is_served(&before, Instant::now());
    is_synchronised(&daemon);
    std::thread::sleep(Duration::from_secs(1));

    let (requests, lines) = (docker.requests().len(), log_lines(&daemon).len());
    docker.set(Mode::StreamsClose);
    std::thread::sleep(Duration::from_secs(20));
    let made = &docker.requests()[requests..];
    assert!((3..=15).contains(&made.len()), "{made:#?}");
    let said = &log_lines(&daemon)[lines..];
    assert!(said.len() <= 3, "{said:#?}");
    is_served(&before, Instant::now());

    // No event tells of it; a list does.
    let during = start(engine, "during");
    let took = is_served(&during, Instant::now());
    assert!(took < Duration::from_secs(10), "{took:?}");
    docker.set(Mode::Pass);
    is_synchronised(&daemon);
    daemon.stop();
}
