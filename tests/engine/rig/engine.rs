//! A Docker engine of the trials' own, on a host of its own: a network namespace that has no way out.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::container::Start;
use super::http::{self, NoReply, Reply};
use super::moto::Moto;
use super::network::Snapshot;
use super::run;
use super::shell::{Done, away_from_the_terminal, limited, poll, poll_quietly, sh, tail};
use super::tools;

/// How the engine's host shows its cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum View {
    /// Controllers on v1, and beside them v2 without any at `/sys/fs/cgroup/unified`.
    Hybrid,
    /// v2 alone.
    V2,
}

impl View {
    /// The views that this machine can show: controllers that its init has given to v2 cannot be had as v1.
    pub fn available() -> Vec<View> {
        let hybrid = Path::new("/sys/fs/cgroup/unified/cgroup.procs").exists();
        if hybrid {
            vec![View::Hybrid, View::V2]
        } else {
            vec![View::V2]
        }
    }

    /// As it stands in the names of trials and logs.
    pub fn name(self) -> &'static str {
        match self {
            View::Hybrid => "hybrid",
            View::V2 => "v2",
        }
    }
}

/// Whose Docker it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Release {
    /// This machine's own (Debian 12: Docker 20.10).
    Machine,
    /// That of another Debian, out of a root of its own that `tests/setup` has made.
    Debian(&'static str),
}

impl Release {
    /// Newer generations: Docker 26.1 and 28.5.
    pub const NEWER: [Release; 2] = [Release::Debian("trixie"), Release::Debian("sid")];

    /// As it stands in the names of trials and logs.
    pub fn name(self) -> &'static str {
        match self {
            Release::Machine => "machine",
            Release::Debian(name) => name,
        }
    }

    fn root(self) -> Option<PathBuf> {
        match self {
            Release::Machine => None,
            Release::Debian(name) => Some(Path::new(ROOTS).join(name)),
        }
    }
}

/// Where `tests/setup` makes roots of other Debians.
const ROOTS: &str = "/var/cache/imds-router-tests";

/// Which engine a trial wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kind {
    pub view: View,
    pub release: Release,
    /// Containers go on without dockerd. A swarm does not go with that.
    pub live_restore: bool,
}

impl From<View> for Kind {
    fn from(view: View) -> Kind {
        Kind {
            view,
            release: Release::Machine,
            live_restore: true,
        }
    }
}

/// The image that has the machine's `/usr` when it runs, and so curl, Python, and the SDKs of the test tools.
pub const SDK: &str = "sdk";
/// The image that has a static busybox and nothing else.
pub const BOX: &str = "box";

/// Makes the engine's host out of the namespace it starts in. `/run` is its own: no system-wide containerd, firewalld or
/// systemd may be found there and asked to do things on the real host.
const HOST: &str = "
    ip link set lo up
    ip route add blackhole 169.254.0.0/16
    echo 1 > /proc/sys/net/ipv4/ip_forward
    mount -t tmpfs tmpfs /run
";
/// Where the machine's own files are for an engine that has a root of its own.
const OUTSIDE: &str = "/old";
/// Another root, in which the run's files are where they are outside. A plain chroot will not do: runc moves roots itself.
const OTHER_ROOT: &str = "
    mkdir -p \"$1/old\"
    mount --bind \"$1\" \"$1\"
    cd \"$1\"
    for part in proc sys dev var/tmp; do mount --rbind /$part $part; done
    mount -t tmpfs tmpfs run
    mount -t tmpfs tmpfs tmp
    pivot_root . old
    echo ready
    exec sleep infinity
";
const ONLY_CGROUP2: &str = "
    umount -R /sys/fs/cgroup
    mount -t cgroup2 none /sys/fs/cgroup
";

/// A running engine. Dropping it ends it with everything that runs in it or beside it.
pub struct Engine {
    pub kind: Kind,
    namespace: String,
    directory: PathBuf,
    /// The process that keeps the host's namespaces open while engine and daemons come and go.
    host: Child,
    /// The process that keeps its other root, if it has one.
    root: Option<Child>,
    containerd: Mutex<Option<Child>>,
    dockerd: Mutex<Option<Child>>,
    moto: OnceLock<Moto>,
}

impl Engine {
    /// Starts an engine of one's own, for trials that do to it what others could not stand. Everybody else shares those of
    /// [`Rig::engine`](super::Rig::engine).
    #[track_caller]
    pub fn start(kind: impl Into<Kind>) -> Arc<Engine> {
        let kind = kind.into();
        let namespace = run::new_namespace();
        let directory = run::directory().join(&namespace);
        for part in ["containerd", "docker", "client"] {
            let path = directory.join(part);
            fs::create_dir_all(&path).unwrap_or_else(|e| panic!("cannot make {}: {e}", path.display()));
        }
        let host = start_host(kind.view, &namespace);
        let root = kind.release.root().map(|root| start_root(&host, &namespace, &root));
        let engine = Arc::new(Engine {
            kind,
            host,
            root,
            namespace,
            directory,
            containerd: Mutex::default(),
            dockerd: Mutex::default(),
            moto: OnceLock::new(),
        });
        engine.start_containerd();
        engine.restart();
        engine.import(SDK, &sdk_files(), &[]);
        engine.import(BOX, &box_files(), &[]);
        engine
    }

    /// Its host's network namespace, as `ip netns` knows it.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The engine's socket, as a path.
    pub fn socket(&self) -> PathBuf {
        self.directory.join("docker.sock")
    }

    /// The engine's socket, as `DOCKER_HOST` has it.
    pub fn docker_host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// Where files may be put that go with the engine.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Runs the docker client against this engine and returns what it printed.
    #[track_caller]
    pub fn docker(&self, arguments: &[&str]) -> String {
        let done = self.try_docker(arguments);
        assert!(
            done.succeeded(),
            "{done}\n--- dockerd:\n{}",
            tail(&self.log("dockerd"), 15)
        );
        done.ok()
    }

    /// Runs the docker client against this engine, whatever comes of it.
    #[track_caller]
    pub fn try_docker(&self, arguments: &[&str]) -> Done {
        let mut docker = self.docker_command();
        docker.args(arguments);
        Done::of(docker)
    }

    /// The docker client, to be told what to do.
    pub fn docker_command(&self) -> Command {
        let mut docker = limited("docker");
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("DOCKER_") {
                docker.env_remove(name);
            }
        }
        // Not the developer's own configuration: it may set proxies and labels.
        docker.env("DOCKER_CONFIG", self.directory.join("client"));
        docker.arg("-H").arg(self.docker_host());
        docker
    }

    /// `program` as a process of the engine's host: in its network and its mounts, in no container, with a clean environment.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = nsenter(&self.namespace, &self.host);
        command.arg(program);
        command
    }

    /// A part of the engine itself: in its own root, where it has one.
    fn part(&self, program: &str) -> Command {
        let mut command = match &self.root {
            None => return self.command(program),
            Some(root) => nsenter(&self.namespace, root),
        };
        command.arg(program);
        command
    }

    /// docker-compose, which only the root of Debian 13 has in a version of the day, against this engine: in the engine's
    /// own root, with a home of its own.
    pub fn compose(&self, home: &Path, words: &[&str]) -> Command {
        let mut command = self.part("timeout");
        command
            .args(["--kill-after=5", "90", "docker-compose"])
            .args(words)
            .env("DOCKER_HOST", self.docker_host())
            .env("HOME", home);
        command
    }

    /// Has the engine's socket where everybody looks for it: `/run` is the engine's own.
    #[track_caller]
    pub fn socket_in_its_usual_place(&self) {
        let mut link = self.part("ln");
        link.args(["-sfn".as_ref(), self.socket().as_os_str()])
            .arg("/run/docker.sock");
        Done::of(link).ok();
    }

    /// Makes the image out of what is built, as whoever has built it outside does.
    #[track_caller]
    pub fn build_image(&self) {
        let mut build = self.docker_command();
        // The client's builder for this engine may not be installed; the engine has one itself.
        build
            .env("DOCKER_BUILDKIT", "0")
            .args(["build", "--quiet", "--target", "prebuilt", "--tag", "imds-router"])
            .args(["--build-arg", "VERSION=0.0.0-trials", "--build-arg", "REVISION=trials"])
            .args(["--file", &tools::repository("deploy/Dockerfile")])
            .arg(tools::image());
        Done::of(build).ok();
    }

    /// A path of the machine, as the engine sees it.
    pub fn outside(&self, path: &str) -> String {
        match self.root {
            None => path.to_owned(),
            Some(_) => format!("{OUTSIDE}{path}"),
        }
    }

    /// Runs a program on the engine's host and returns what it printed.
    #[track_caller]
    pub fn host(&self, program: &str, arguments: &[&str]) -> String {
        let mut command = self.command("timeout");
        command.args(["60", program]).args(arguments);
        Done::of(command).ok()
    }

    /// Sets a network setting of the engine's host, such as `ipv4/ip_forward` (`sysctl` is not on every Debian).
    #[track_caller]
    pub fn set(&self, setting: &str, value: &str) {
        self.host("sh", &["-c", &format!("echo {value} > /proc/sys/net/{setting}")]);
    }

    /// An HTTP request of a process of the engine's host.
    pub fn request(&self, method: &str, url: &str, headers: &[(&str, &str)]) -> Result<Reply, NoReply> {
        http::request(self.command("curl"), method, url, headers)
    }

    /// What `ip` and `nft` say about the engine's host, to be compared with what they say later.
    #[track_caller]
    pub fn snapshot_network(&self) -> Snapshot {
        Snapshot::take(self)
    }

    /// The same when no container is left on it: Docker's own bridge loses its carrier a moment after the last.
    #[track_caller]
    pub fn network_at_rest(&self) -> Snapshot {
        poll(Duration::from_secs(5), "the last container's link to go", || {
            let now = self.snapshot_network();
            let docker0 = now.lines_with("\"ifname\":\"docker0\"");
            let rests = now.lines_with("veth").is_empty() && docker0.iter().all(|link| link.contains("NO-CARRIER"));
            // IPv6 comes and goes on that bridge a while after its carrier; nothing of ours is ever there.
            rests.then(|| now.without_ipv6_of("docker0"))
        })
    }

    /// Describes a container of the image [`SDK`] named `name`; `start()` starts it.
    pub fn run(self: &Arc<Self>, name: &str) -> Start {
        Start::new(self, name)
    }

    /// A network, removed when it is dropped (after its containers).
    #[track_caller]
    pub fn network(self: &Arc<Self>, name: &str, options: &[&str]) -> Network {
        let mut arguments = vec!["network", "create"];
        arguments.extend(options);
        arguments.push(name);
        self.docker(&arguments);
        Network {
            engine: Arc::clone(self),
            name: name.to_owned(),
        }
    }

    /// A network that has IPv6 as well; its bridge has its name.
    #[track_caller]
    pub fn network_with_ipv6(self: &Arc<Self>, name: &str, subnet: &str) -> Network {
        let bridge = format!("--opt=com.docker.network.bridge.name={name}");
        self.network(name, &["--ipv6", &format!("--subnet={subnet}"), &bridge])
    }

    /// The image [`SDK`] under another name, with labels and environment of its own, as a Dockerfile's LABEL and ENV set them.
    #[track_caller]
    pub fn image_with(&self, name: &str, labels: &[(&str, &str)], environment: &[(&str, &str)]) -> String {
        let quoted = |word: &str, (key, value): &(&str, &str)| format!("{word} {key}={value:?}");
        let changes: Vec<String> = labels
            .iter()
            .map(|pair| quoted("LABEL", pair))
            .chain(environment.iter().map(|pair| quoted("ENV", pair)))
            .collect();
        self.import(name, &sdk_files(), &changes);
        name.to_owned()
    }

    /// The STS of this engine's host, started when it is first asked for.
    #[track_caller]
    pub fn moto(&self) -> &Moto {
        self.moto.get_or_init(|| Moto::start(self))
    }

    /// Kills dockerd as a crash would. Containers go on.
    pub fn kill(&self) {
        if let Some(mut dockerd) = self.lock_dockerd().take() {
            let _ = dockerd.kill(); // it may have died by itself
            let _ = dockerd.wait();
        }
    }

    /// Stops dockerd as an administrator would. Containers go on.
    #[track_caller]
    pub fn stop(&self) {
        if let Some(mut dockerd) = self.lock_dockerd().take() {
            let pid = Pid::from_child(&dockerd);
            let _ = kill_process(pid, Signal::TERM);
            let ended = poll_quietly(Duration::from_secs(20), || dockerd.try_wait().ok().flatten());
            if ended.is_none() {
                let _ = dockerd.kill();
                panic!("dockerd did not stop:\n{}", tail(&self.log("dockerd"), 25));
            }
        }
    }

    /// Starts dockerd, after killing the one that runs, and waits until it answers.
    #[track_caller]
    pub fn restart(&self) {
        self.kill();
        let empty = self.directory.join("daemon.json");
        fs::write(&empty, "{}").expect("the engine's directory is writable");
        let mut dockerd = self.part("dockerd");
        if self.kind.live_restore {
            dockerd.arg("--live-restore");
        }
        dockerd
            // Neither the machine's own configuration nor its containerd.
            .args(["--config-file".into(), empty])
            .args(["--containerd".into(), self.containerd_socket()])
            .args(["--data-root".into(), self.directory.join("docker")])
            .args(["--exec-root".into(), self.directory.join("exec")])
            .args(["--pidfile".into(), self.directory.join("dockerd.pid")])
            .args(["-H", &self.docker_host()]);
        let mut child = start_logged(&mut dockerd, &self.log("dockerd"));
        let answered = poll_quietly(Duration::from_secs(30), || {
            let died = child.try_wait().is_ok_and(|status| status.is_some());
            (died || self.answers()).then_some(!died)
        });
        if answered != Some(true) {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "dockerd does not start ({} view):\n{}\n--- containerd:\n{}",
                self.kind.view.name(),
                tail(&self.log("dockerd"), 25),
                tail(&self.log("containerd"), 10)
            );
        }
        *self.lock_dockerd() = Some(child);
    }

    /// Starts a program that goes on by itself, a [`command`](Self::command) of the engine's host as a rule. What it prints
    /// goes into the log of `part`; it ends when it is dropped, or with the engine.
    #[track_caller]
    pub fn background(&self, command: &mut Command, part: &str) -> Background {
        let log = self.log(part);
        Background {
            child: start_logged(command, &log),
            log,
        }
    }

    /// The STS, if somebody has asked for it.
    pub(super) fn moto_if_started(&self) -> Option<&Moto> {
        self.moto.get()
    }

    /// The log of a part of this engine.
    pub fn log(&self, part: &str) -> PathBuf {
        let number = self.namespace.rsplit('-').next().unwrap_or_default();
        let Kind { view, release, .. } = self.kind;
        run::log_file(&format!("{}-{}-{number}-{part}", release.name(), view.name()))
    }

    /// Ends the engine and all that is in it; what is left nevertheless is in the answer.
    pub fn end(&self) -> Vec<String> {
        if !Path::new(&run::namespace_file(&self.namespace)).exists() {
            return Vec::new(); // it has ended before
        }
        let mut left = Vec::new();
        // After this nobody can tell any more what must not be in the logs.
        match self.moto.get().map(|moto| moto.secrets(self)) {
            Some(Ok(secrets)) => run::remember_secrets(secrets),
            Some(Err(why)) => left.push(why),
            None => {}
        }
        left.extend(run::end_namespace(&self.namespace));
        // Reap our children, or they stay as zombies until the run ends.
        for child in [&self.dockerd, &self.containerd] {
            if let Some(mut child) = child.lock().unwrap_or_else(PoisonError::into_inner).take() {
                let _ = child.wait();
            }
        }
        let _ = fs::remove_dir_all(&self.directory); // leftovers() looks at what matters
        left
    }

    fn answers(&self) -> bool {
        let ping = || -> std::io::Result<String> {
            let mut socket = UnixStream::connect(self.socket())?;
            socket.set_read_timeout(Some(Duration::from_secs(2)))?;
            socket.write_all(b"GET /_ping HTTP/1.0\r\nHost: docker\r\n\r\n")?;
            let mut answer = String::new();
            socket.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ping().is_ok_and(|answer| answer.contains(" 200 "))
    }

    /// A containerd of its own, as under systemd: it outlives a dockerd that is killed.
    fn start_containerd(&self) {
        let directory = self.directory.join("containerd");
        let config = directory.join("config.toml");
        let text = format!(
            "version = 2\nroot = '{0}/root'\nstate = '{0}/state'\n\
             disabled_plugins = ['io.containerd.grpc.v1.cri']\n[grpc]\naddress = '{1}'\n",
            directory.display(),
            self.containerd_socket().display()
        );
        fs::write(&config, text).expect("the engine's directory is writable");
        let mut containerd = self.part("containerd");
        containerd.arg("--config").arg(config);
        let child = start_logged(&mut containerd, &self.log("containerd"));
        *self.containerd.lock().unwrap_or_else(PoisonError::into_inner) = Some(child);
    }

    fn containerd_socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Makes an image out of files made by a shell script in an empty directory.
    fn import(&self, name: &str, script: &str, changes: &[String]) {
        let files = self.directory.join(format!("image-{name}"));
        fs::create_dir_all(&files).expect("the engine's directory is writable");
        let tar = files.with_extension("tar");
        let in_files = format!("cd '{}'\n{script}\ntar -cf '{}' .", files.display(), tar.display());
        sh("sh", &["-ec", &in_files]);
        let mut docker = self.docker_command();
        docker.arg("import");
        for change in changes {
            docker.args(["--change", change]);
        }
        docker.arg(&tar).arg(name);
        Done::of(docker).ok();
        let _ = fs::remove_dir_all(&files); // it goes with the engine at the latest
        let _ = fs::remove_file(&tar);
    }

    fn lock_dockerd(&self) -> std::sync::MutexGuard<'_, Option<Child>> {
        self.dockerd.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        for left in self.end() {
            eprintln!("left behind: {left}");
        }
        let _ = self.host.wait();
        if let Some(root) = &mut self.root {
            let _ = root.wait();
        }
    }
}

/// A program in the background. Dropping it ends it, the hard way.
pub struct Background {
    pub child: Child,
    pub log: PathBuf,
}

impl Background {
    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().ok().flatten()
    }

    /// All that it has printed.
    pub fn output(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Ends it the hard way.
    pub fn end(&mut self) {
        let _ = self.child.kill(); // it may have ended already
        let _ = self.child.wait();
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.end();
    }
}

/// A network of the engine.
pub struct Network {
    engine: Arc<Engine>,
    name: String,
}

impl Network {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Waits until a [`network_with_ipv6`](Engine::network_with_ipv6) that has a container is heard over IPv6. With its first
    /// link a bridge asks for up to two seconds whether its addresses are anybody else's (RFC 4862, 5.4), and is silent
    /// meanwhile. That is between the engine and the kernel, and lasts longer than a client that asks once.
    #[track_caller]
    pub fn await_ipv6(&self) {
        poll(Duration::from_secs(5), "the bridge to have its addresses", || {
            let show = ["-6", "address", "show", "dev", self.name(), "tentative"];
            self.engine.host("ip", &show).is_empty().then_some(())
        });
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let done = self.engine.try_docker(&["network", "rm", &self.name]);
        if !done.succeeded() && !std::thread::panicking() {
            eprintln!("a trial leaves a network behind: {done}");
        }
    }
}

fn start_host(view: View, namespace: &str) -> Child {
    let cgroups = match view {
        View::Hybrid => "",
        View::V2 => ONLY_CGROUP2,
    };
    // The last word names the run, so that a process list explains itself.
    let script = format!("{HOST}{cgroups}echo ready\nexec sleep infinity");
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", run::namespace_file(namespace)))
        .args(["unshare", "--mount", "--propagation", "private"])
        .args(["sh", "-ec", &script]);
    until_ready(&mut command)
}

fn start_root(host: &Child, namespace: &str, root: &Path) -> Child {
    assert!(
        root.join("usr/sbin/dockerd").exists(),
        "there is no {}: run tests/setup",
        root.display()
    );
    let mut command = nsenter(namespace, host);
    command
        .args(["unshare", "--mount", "--propagation", "private"])
        .args(["sh", "-ec", OTHER_ROOT, "sh"])
        .arg(root);
    until_ready(&mut command)
}

/// Starts what prints "ready" when it is.
fn until_ready(command: &mut Command) -> Child {
    let mut child = away_from_the_terminal(command.stdout(Stdio::piped()))
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run nsenter: {e}"));
    let mut line = String::new();
    if let Some(stdout) = child.stdout.take() {
        let _ = BufReader::new(stdout).read_line(&mut line); // nothing read is not "ready"
    }
    assert_eq!(
        line, "ready\n",
        "the engine's host could not be set up; the reason is above"
    );
    child
}

/// In that network and the mounts of that process, with a clean environment.
fn nsenter(namespace: &str, mounts: &Child) -> Command {
    let mut command = Command::new("nsenter");
    command
        .arg(format!("--net={}", run::namespace_file(namespace)))
        .arg(format!("--mount=/proc/{}/ns/mnt", mounts.id()))
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        // Whosever machine this is, the trials' own hosts are nobody's unless a trial says so.
        .env("IMDS_ROUTER_SERVE_DMI_DIR", "/nonexistent");
    command
}

fn start_logged(command: &mut Command, log: &Path) -> Child {
    let open = || -> std::io::Result<(File, File)> {
        let file = File::options().create(true).append(true).open(log)?;
        Ok((file.try_clone()?, file))
    };
    let (stdout, stderr) = open().unwrap_or_else(|e| panic!("cannot write {}: {e}", log.display()));
    away_from_the_terminal(command.stdout(stdout).stderr(stderr))
        .spawn()
        .unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"))
}

/// Directories to mount the machine's `/usr` into, with the links that a merged-/usr system has, and just enough `/etc`.
fn sdk_files() -> String {
    let mut script = String::from(
        "mkdir -p usr etc/ssl root tmp var/tmp run proc sys dev opt
         echo 'root:x:0:0:root:/root:/bin/sh' > etc/passwd
         echo 'root:x:0:' > etc/group
         cp /bin/busybox busybox\n",
    );
    for name in ["bin", "sbin", "lib", "lib32", "lib64", "libx32"] {
        if fs::read_link(Path::new("/").join(name)).is_ok() {
            script.push_str(&format!("ln -s usr/{name} {name}\n"));
        }
    }
    script
}

fn box_files() -> String {
    "mkdir -p bin etc root tmp run proc sys dev
     cp /bin/busybox bin/busybox
     for applet in $(/bin/busybox --list); do [ -e bin/\"$applet\" ] || ln -s busybox bin/\"$applet\"; done"
        .to_owned()
}
