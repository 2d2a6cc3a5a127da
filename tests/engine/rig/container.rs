//! Containers: how a trial describes one, and what it can do with it.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::Arc;

use super::engine::{Engine, SDK};
use super::http::{self, IMDS, NoReply, Reply};
use super::shell::Done;
use super::tools;

/// Where the examples that cargo has built are, in containers of the image `sdk`.
pub const EXAMPLES: &str = "/opt/examples";
/// Where the clients' scripts are, in containers of the image `sdk`.
pub const SCRIPTS: &str = "/opt/clients";
/// Where the daemon's own program is (for `imds-router get` and `wait`), in containers of the image `sdk`.
pub const IMDS_ROUTER: &str = "/opt/imds-router";

/// A container to be started. Unless told otherwise it sleeps for ever.
#[derive(Clone)]
pub struct Start {
    engine: Arc<Engine>,
    name: String,
    image: String,
    options: Vec<String>,
    command: Option<Vec<String>>,
    with_machine: bool,
}

impl Start {
    pub(super) fn new(engine: &Arc<Engine>, name: &str) -> Start {
        Start {
            engine: Arc::clone(engine),
            name: name.to_owned(),
            image: SDK.to_owned(),
            options: Vec::new(),
            command: None,
            with_machine: true,
        }
    }

    pub fn label(self, key: &str, value: &str) -> Start {
        self.arg("--label").arg(&format!("{key}={value}"))
    }

    pub fn env(self, key: &str, value: &str) -> Start {
        self.arg("--env").arg(&format!("{key}={value}"))
    }

    /// A network's name, `host`, `none`, or `container:NAME`.
    pub fn network(self, network: &str) -> Start {
        self.arg("--network").arg(network)
    }

    /// Any option of `docker run`.
    pub fn arg(mut self, option: &str) -> Start {
        self.options.push(option.to_owned());
        self
    }

    /// Another image that has the machine's `/usr`: one made by [`Engine::image_with`].
    pub fn image(mut self, image: &str) -> Start {
        self.image = image.to_owned();
        self
    }

    /// An image that brings all it needs ([`BOX`](super::engine::BOX)): nothing of the machine is mounted, and its start is quicker.
    pub fn bare_image(mut self, image: &str) -> Start {
        self.with_machine = false;
        self.image(image)
    }

    /// What to run.
    pub fn command(mut self, words: &[&str]) -> Start {
        self.command = Some(words.iter().map(|word| (*word).to_owned()).collect());
        self
    }

    /// Runs it to its end, which is the answer to "what if the first thing it does is …".
    #[track_caller]
    pub fn to_its_end(&self) -> Done {
        Done::of(self.docker_run(&["--rm"]))
    }

    /// Starts it.
    #[track_caller]
    pub fn start(&self) -> Container {
        let id = Done::of(self.docker_run(&["--detach"])).ok();
        Container {
            engine: Arc::clone(&self.engine),
            name: self.name.clone(),
            id,
            ours: true,
        }
    }

    fn docker_run(&self, options: &[&str]) -> Command {
        let mut docker = self.engine.docker_command();
        docker.args(["run", "--name", &self.name]);
        docker.args(options);
        if self.with_machine {
            for mount in of_the_machine(&self.engine) {
                docker.args(["-v", &mount]);
            }
        }
        docker.args(&self.options).arg(&self.image);
        match &self.command {
            Some(words) => docker.args(words),
            // Both images have it, and no busybox knows "infinity" for certain.
            None => docker.args(["sleep", "1000000"]),
        };
        docker
    }
}

/// What containers of the image `sdk` have of the machine, as `docker run -v` and compose take it.
pub fn of_the_machine(engine: &Engine) -> Vec<String> {
    let tools = tools::directory().display().to_string();
    let mounts = [
        ("/usr", "/usr"),
        ("/etc/ssl", "/etc/ssl"),
        (tools.as_str(), tools.as_str()),
        (tools::scripts().to_string_lossy().as_ref(), SCRIPTS),
        (tools::examples().to_string_lossy().as_ref(), EXAMPLES),
        (tools::DAEMON, IMDS_ROUTER),
    ]
    .map(|(outside, inside)| format!("{}:{inside}:ro", engine.outside(outside)));
    mounts.to_vec()
}

/// A container that has been started; removed when it is dropped, if it is ours.
pub struct Container {
    engine: Arc<Engine>,
    name: String,
    id: String,
    ours: bool,
}

impl Container {
    /// One that somebody else has started, such as compose, and removes.
    #[track_caller]
    pub fn of(engine: &Arc<Engine>, name: &str) -> Container {
        Container {
            engine: Arc::clone(engine),
            name: name.to_owned(),
            id: engine.docker(&["inspect", "--format", "{{.Id}}", name]),
            ours: false,
        }
    }

    /// The same, which nobody else removes.
    pub fn made_ours(mut self) -> Container {
        self.ours = true;
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// `docker exec` in it: what the program printed; its failure fails the trial.
    #[track_caller]
    pub fn exec(&self, words: &[&str]) -> String {
        self.try_exec(words).ok()
    }

    /// `docker exec` in it, whatever comes of it.
    #[track_caller]
    pub fn try_exec(&self, words: &[&str]) -> Done {
        let mut docker = self.exec_command(&[]);
        docker.args(words);
        Done::of(docker)
    }

    /// `docker exec` in it, up to where the program's own words start.
    pub fn exec_command(&self, environment: &[(&str, &str)]) -> Command {
        let mut docker = self.engine.docker_command();
        docker.arg("exec");
        for (name, value) in environment {
            docker.arg("--env").arg(format!("{name}={value}"));
        }
        docker.arg(&self.id);
        docker
    }

    /// `program` as a process of the engine's host that has moved into the container's network namespace: an intruder.
    pub fn intruder(&self, program: &str) -> Command {
        let mut command = self.engine.command("nsenter");
        command.arg(format!("--net=/proc/{}/ns/net", self.pid()));
        command.arg(program);
        command
    }

    /// GET of a path below 169.254.169.254. Needs the image `sdk`.
    #[track_caller]
    pub fn get(&self, path: &str, headers: &[(&str, &str)]) -> Reply {
        self.request("GET", path, headers)
            .unwrap_or_else(|why| panic!("no answer to {}: {why}", self.name))
    }

    /// PUT, likewise.
    #[track_caller]
    pub fn put(&self, path: &str, headers: &[(&str, &str)]) -> Reply {
        self.request("PUT", path, headers)
            .unwrap_or_else(|why| panic!("no answer to {}: {why}", self.name))
    }

    /// Any request; `target` is a path below 169.254.169.254, or a whole URL.
    pub fn request(&self, method: &str, target: &str, headers: &[(&str, &str)]) -> Result<Reply, NoReply> {
        let url = match target.starts_with('/') {
            true => format!("{IMDS}{target}"),
            false => target.to_owned(),
        };
        let mut docker = self.exec_command(&[]);
        docker.arg("curl");
        http::request(docker, method, &url, headers)
    }

    /// Sends these bytes to 169.254.169.254:80 and returns what comes back until the other side closes (or says nothing for
    /// two seconds): for requests that no decent client makes.
    #[track_caller]
    pub fn raw(&self, request: &str) -> String {
        self.raw_to("169.254.169.254", 80, request)
    }

    /// As [`raw`](Self::raw), to somebody else.
    #[track_caller]
    pub fn raw_to(&self, address: &str, port: u16, request: &str) -> String {
        let mut docker = self.engine.docker_command();
        // A client that closes its half at once is in no state to be proven: it waits for its answer, as clients do.
        let ask = format!("(/busybox cat; /busybox sleep 1) | /busybox nc -w 2 {address} {port}");
        docker.args(["exec", "--interactive", &self.id, "/busybox", "sh", "-c", &ask]);
        Done::of_input(docker, request.as_bytes()).stdout
    }

    /// An IMDSv2 token, got as every SDK gets it.
    #[track_caller]
    pub fn token(&self) -> String {
        let ttl = ("X-aws-ec2-metadata-token-ttl-seconds", "21600");
        let reply = self.put("/latest/api/token", &[ttl]);
        assert_eq!(reply.status, 200, "{} gets no token: {reply:?}", self.name);
        reply.body
    }

    /// Does not remove it, since the trial has done so.
    pub fn forget(mut self) {
        self.ours = false;
    }

    /// A field of `docker inspect`, as a Go template.
    #[track_caller]
    pub fn inspect(&self, template: &str) -> String {
        self.engine.docker(&["inspect", "--format", template, &self.id])
    }

    /// Its first process, as the machine numbers it.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        let pid = self.inspect("{{.State.Pid}}");
        pid.parse()
            .ok()
            .filter(|pid| *pid != 0)
            .unwrap_or_else(|| panic!("{} does not run", self.name))
    }

    /// Its address in a network (`bridge` is the default one).
    #[track_caller]
    pub fn address(&self, network: &str) -> Ipv4Addr {
        let template = format!("{{{{(index .NetworkSettings.Networks {network:?}).IPAddress}}}}");
        let address = self.inspect(&template);
        address
            .parse()
            .unwrap_or_else(|_| panic!("{} has no address in {network}: {address:?}", self.name))
    }

    /// Where it reaches the engine's host: its default gateway; without one (host network, none) itself.
    #[track_caller]
    pub fn gateway(&self) -> Ipv4Addr {
        let path = format!("/proc/{}/net/route", self.pid());
        let routes =
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {path} of {}: {e}", self.name));
        let gateway = routes.lines().find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let (destination, gateway) = (fields.get(1)?, fields.get(2)?);
            // Written as a number of the machine's own byte order.
            let gateway = u32::from_str_radix(gateway, 16).ok()?.to_ne_bytes();
            (*destination == "00000000").then(|| Ipv4Addr::from(gateway))
        });
        gateway.unwrap_or(Ipv4Addr::LOCALHOST)
    }

    #[track_caller]
    pub fn is_running(&self) -> bool {
        self.inspect("{{.State.Running}}") == "true"
    }

    /// Ends its first process, at once.
    #[track_caller]
    pub fn kill(&self) {
        self.engine.docker(&["kill", &self.id]);
    }

    /// Another life of the same container.
    #[track_caller]
    pub fn restart(&self) {
        self.engine.docker(&["restart", "--time", "0", &self.id]);
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if !self.ours {
            return;
        }
        let done = self.engine.try_docker(&["rm", "--force", "--volumes", &self.id]);
        if !done.succeeded() && !std::thread::panicking() {
            eprintln!("a trial leaves a container behind: {done}");
        }
    }
}
