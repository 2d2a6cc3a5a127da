//! The image, run as `deploy/` and `examples/` say: by hand, by compose, without privileges, in a swarm.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use imds_router::config::DOCKER_RUN;
use libtest_mimic::Trial;
use rustix::process::{Pid, Signal, kill_process};

use crate::cases::{LIST, is_itself};
use crate::rig::container::{SCRIPTS, of_the_machine};
use crate::rig::moto::{BASE_KEY, BASE_SECRET, REGION};
use crate::rig::tools::{self, repository};
use crate::rig::{Background, Client, Container, Daemon, Done, Engine, Identity, Kind, Moto, Release, Rig, poll};

/// Who base credentials belong to that moto has not issued.
const ACCOUNT: &str = "123456789012";
/// Maximum time from any kind of restart of the daemon until its containers are served.
const SERVED_AGAIN: Duration = Duration::from_secs(2);

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = rig.in_each_view("image::as_the_daemon_itself_says", as_the_daemon_itself_says);
    // The compose that Debian 12 has knows neither `name` nor `cgroup`.
    let newer = Kind {
        release: Release::Debian("trixie"),
        ..rig.views()[0].into()
    };
    let with_compose = |name: &str, trial: fn(&Arc<Engine>)| {
        let rig = rig.clone();
        rig.clone().alone(name, move || trial(&rig.engine(newer)))
    };
    trials.push(with_compose("image::compose", compose));
    trials.push(with_compose("image::unprivileged", unprivileged));
    let in_a_swarm = Kind {
        live_restore: false,
        ..rig.views()[0].into()
    };
    trials.push(rig.alone("image::swarm", move || swarm(&Engine::start(in_a_swarm))));
    trials
}

/// What the kernel and the engine see of a daemon in a container, beside what it serves.
fn inside(daemon: &Container, words: &[&str]) -> Done {
    let mut all = vec!["/imds-router"];
    all.extend(words);
    daemon.try_exec(&all)
}

/// What the daemon in this container has said goes where the other logs are.
fn keep_log(daemon: &Container) {
    let mut logs = daemon.engine().docker_command();
    logs.args(["logs", daemon.id()]);
    let said = Done::of(logs);
    let log = daemon.engine().log(&format!("daemon-{}", daemon.name()));
    fs::write(&log, said.stdout + &said.stderr).unwrap_or_else(|e| panic!("cannot write {}: {e}", log.display()));
}

/// Keeps the log of a daemon in a container when a trial fails before it does that itself.
struct KeptLog(Arc<Engine>, &'static str);

impl Drop for KeptLog {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let mut logs = self.0.docker_command();
            logs.args(["logs", self.1]);
            let said = Done::of(logs);
            let _ = fs::write(self.0.log(&format!("daemon-{}", self.1)), said.stdout + &said.stderr);
        }
    }
}

/// The line that the daemon prints where something is lacking, and the image that it is about.
fn as_the_daemon_itself_says(engine: &Arc<Engine>) {
    engine.socket_in_its_usual_place();
    engine.build_image();
    let about = |template: &str| engine.docker(&["image", "inspect", "--format", template, "imds-router"]);
    assert_eq!(about("{{len .RootFS.Layers}}"), "1");
    assert_eq!(
        about("{{json .Config.Entrypoint}} {{json .Config.Cmd}}"),
        r#"["/imds-router"] ["serve"]"#
    );
    for (label, value) in [("version", "0.0.0-trials"), ("revision", "trials")] {
        let template = format!("{{{{index .Config.Labels \"org.opencontainers.image.{label}\"}}}}");
        assert_eq!(about(&template), value);
    }
    // docker0 is another one once it has had a container.
    engine.run("first").command(&["true"]).to_its_end().ok();
    let before = engine.network_at_rest();

    let moto = engine.moto();
    // Credentials are in a home directory, and STS is moto.
    let line = DOCKER_RUN.replace('~', &home(engine).display().to_string());
    let mut words: Vec<&str> = line.split_whitespace().skip(1).collect();
    let endpoint = format!("AWS_ENDPOINT_URL_STS={}", moto.url());
    let region = format!("AWS_REGION={REGION}");
    words.splice(
        1..1,
        ["--env", &endpoint, "--env", &region, "--env", "IMDS_ROUTER_LOG=trace"],
    );
    engine.docker(&words);
    let daemon = Container::of(engine, "imds-router").made_ours();
    let _log = KeptLog(Arc::clone(engine), "imds-router");
    let app = engine.run("app").label("imds.role", "app").start();
    is_itself(&app);
    let whoami = Client::Boto3.whoami(&app, moto, &[]);
    assert_eq!(
        whoami,
        Identity::of_role(ACCOUNT, "app", &format!("app@{}", hostname(engine)))
    );
    let status = inside(&daemon, &["status", "--json"]).ok();
    let status: serde_json::Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(
        (&status["attach"], &status["proof"]),
        (&"namespace".into(), &"full".into()),
        "{status}"
    );
    let said = inside(&daemon, &["doctor"]).ok();
    for part in ["ok    proof: full", "ok    daemon: serves"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    // The image as a client.
    let client = engine
        .run("client")
        .label("imds.role", "client")
        .bare_image("imds-router");
    let got = client
        .command(&["get", "meta-data/iam/security-credentials/"])
        .to_its_end();
    assert_eq!(got.ok(), "client");
    keep_log(&daemon);
    engine.docker(&["stop", "imds-router"]);
    assert_eq!(daemon.inspect("{{.State.ExitCode}}"), "0");
    drop(daemon);
    drop(app);
    engine.docker(&["volume", "rm", "imds-router"]);
    before.assert_same(&engine.network_at_rest());
}

fn hostname(engine: &Engine) -> String {
    engine.host("hostname", &[]).trim().to_owned()
}

/// docker-compose, with files of this repository and one that takes the place of what cannot be had here.
struct Compose {
    engine: Arc<Engine>,
    project: &'static str,
    home: PathBuf,
    files: Vec<String>,
}

impl Compose {
    /// `file`: of this repository; `instead`: another compose file, merged over it.
    fn new(engine: &Arc<Engine>, project: &'static str, file: &str, instead: &str) -> Compose {
        let directory = engine.directory().join(format!("compose-{project}"));
        fs::create_dir_all(&directory).expect("the engine's directory is writable");
        let over = directory.join("instead.yaml");
        fs::write(&over, instead).expect("the engine's directory is writable");
        Compose {
            engine: Arc::clone(engine),
            project,
            home: home(engine),
            files: vec![engine.outside(&repository(file)), over.display().to_string()],
        }
    }

    fn command(&self, words: &[&str]) -> std::process::Command {
        let files = self.files.iter().flat_map(|file| ["--file", file]);
        let all: Vec<&str> = files
            .chain(["--project-name", self.project])
            .chain(words.iter().copied())
            .collect();
        let mut command = self.engine.compose(&self.home, &all);
        // As a user's shell has them: what passes them on is the file.
        command.env("AWS_REGION", REGION);
        command
            .env("AWS_ACCESS_KEY_ID", BASE_KEY)
            .env("AWS_SECRET_ACCESS_KEY", BASE_SECRET);
        command
    }

    #[track_caller]
    fn run(&self, words: &[&str]) -> String {
        Done::of(self.command(words)).ok()
    }

    /// The first container of a service.
    #[track_caller]
    fn container(&self, service: &str) -> Container {
        Container::of(&self.engine, &format!("{}-{service}-1", self.project))
    }
}

impl Drop for Compose {
    fn drop(&mut self) {
        let done = Done::of(self.command(&["down", "--volumes", "--timeout", "10"]));
        if !done.succeeded() && !std::thread::panicking() {
            eprintln!("a trial leaves a compose project behind: {done}");
        }
    }
}

/// As the AWS CLI writes them.
fn base_credentials() -> String {
    format!("[default]\naws_access_key_id = {BASE_KEY}\naws_secret_access_key = {BASE_SECRET}\n")
}

/// A user's home, with AWS files that only that user may read.
fn home(engine: &Engine) -> PathBuf {
    let home = engine.directory().join("home");
    let make = || -> std::io::Result<()> {
        fs::create_dir_all(home.join(".aws/sso/cache"))?;
        let credentials = home.join(".aws/credentials");
        fs::write(&credentials, base_credentials())?;
        fs::set_permissions(&credentials, fs::Permissions::from_mode(0o600))?;
        fs::set_permissions(home.join(".aws"), fs::Permissions::from_mode(0o700))?;
        for part in ["", ".aws", ".aws/sso", ".aws/sso/cache", ".aws/credentials"] {
            std::os::unix::fs::chown(home.join(part), Some(1000), Some(1000))?;
        }
        Ok(())
    };
    make().unwrap_or_else(|e| panic!("cannot make {}: {e}", home.display()));
    home
}

/// As a list in YAML.
fn quoted(words: &[String]) -> String {
    let words: Vec<String> = words.iter().map(|it| format!("{it:?}")).collect();
    words.join(", ")
}

/// Services of these names that go on until they are ended, in an image that can be had here.
fn services(engine: &Engine, names: &[&str]) -> String {
    let volumes = quoted(&of_the_machine(engine));
    let service = |name: &&str| {
        format!("  {name}: {{ image: sdk, command: [sleep, '1000000'], stop_signal: KILL, volumes: [{volumes}] }}\n")
    };
    let services: String = names.iter().map(service).collect();
    format!("services:\n{services}")
}

/// A container that compose has made, its role, and a token that it has.
struct App {
    container: Container,
    role: &'static str,
    token: String,
}

impl App {
    fn of(compose: &Compose, role: &'static str) -> App {
        let container = compose.container(role);
        let token = container.token();
        App { container, role, token }
    }

    /// Its boto3 has its own role.
    #[track_caller]
    fn is_who_it_is(&self, moto: &Moto) {
        let engine = self.container.engine();
        let session = format!("{}@{}", self.container.name(), hostname(engine));
        let whoami = Client::Boto3.whoami(&self.container, moto, &[]);
        assert_eq!(whoami, Identity::of_role(ACCOUNT, self.role, &session));
    }

    /// It is served, soon, and by the token that it has.
    #[track_caller]
    fn is_served(&self) {
        let reply = poll(Duration::from_secs(10), "an answer", || {
            let token = ("X-aws-ec2-metadata-token", self.token.as_str());
            let reply = self.container.request("GET", LIST, &[token]).ok()?;
            // Until the daemon knows who runs here, it refuses.
            (reply.status != 403 && reply.status != 503).then_some(reply)
        });
        assert_eq!((reply.status, reply.body.as_str()), (200, self.role));
    }
}

/// Does something to the daemon. Who asks all the time with the token that it has is answered again soon, and never wrongly.
#[track_caller]
fn again(what: &str, within: Duration, apps: &[App], act: impl FnOnce()) {
    let asking = apps.iter().map(|app| {
        let engine = app.container.engine();
        let mut ask = app.container.exec_command(&[]);
        ask.args(["/usr/bin/python3", &format!("{SCRIPTS}/gaps.py"), &app.token, app.role]);
        let asking = engine.background(&mut ask, &format!("gaps-{}-{}", app.role, what.replace(' ', "-")));
        poll(Duration::from_secs(5), "it to ask", || {
            asking.output().starts_with("asks").then_some(())
        });
        asking
    });
    let asking: Vec<_> = asking.collect();
    act();
    for (app, mut asking) in apps.iter().zip(asking) {
        app.is_served();
        app.container.exec(&["touch", "/tmp/stop"]);
        let ended = poll(Duration::from_secs(5), "it to end", || asking.ended());
        app.container.exec(&["rm", "/tmp/stop"]);
        let said = asking.output();
        assert!(ended.success(), "{what}: {said}");
        let gap: f64 = said.lines().last().and_then(|line| line.parse().ok()).expect("a time");
        assert!(
            gap < within.as_secs_f64(),
            "{what}: {} was not served for {gap:.3} s",
            app.role
        );
    }
}

fn compose(engine: &Arc<Engine>) {
    engine.socket_in_its_usual_place();
    engine.build_image();
    engine.run("first").command(&["true"]).to_its_end().ok();
    let before = engine.network_at_rest();
    let moto = engine.moto();
    // Somebody else has port 80, before the daemon.
    let publish = |name: &str| {
        let server = ["/usr/bin/python3", "-m", "http.server", "80"];
        engine.run(name).arg("--publish=80:80").command(&server).start()
    };
    let published = || {
        poll(Duration::from_secs(5), "port 80 of the host", || {
            let reply = engine.request("GET", "http://127.0.0.1/", &[]).ok()?;
            (reply.status == 200).then_some(reply.body)
        })
    };
    let first = publish("first-on-80");
    published();

    // The services come before the daemon, and wait for it.
    let shop = Compose::new(
        engine,
        "shop",
        "examples/compose/compose.yaml",
        &services(engine, &["orders", "reports"]),
    );
    let mut up: Background = engine.background(&mut shop.command(&["up", "--detach"]), "compose");
    let waiting = || {
        engine
            .try_docker(&["inspect", "--format", "{{.State.Running}}", "shop-imds-1"])
            .stdout
    };
    poll(Duration::from_secs(20), "somebody to wait", || {
        (waiting().trim() == "true").then_some(())
    });
    // The daemon finds STS by name.
    let instead = "services:\n  imds-router:\n    extra_hosts: ['sts.test:127.0.0.1']\n    \
        environment: [AWS_ENDPOINT_URL_STS=http://sts.test:5000, IMDS_ROUTER_LOG=trace]\n";
    let mut ours = Compose::new(engine, "imds-router", "deploy/compose.yaml", instead);
    // Without AWS files there is no daemon, and no directory of root's in a user's home.
    let empty = engine.directory().join("empty");
    fs::create_dir_all(&empty).expect("the engine's directory is writable");
    let with_files = std::mem::replace(&mut ours.home, empty.clone());
    let told = Done::of(ours.command(&["up", "--detach"])).fails();
    assert!(told.contains(".aws") && !empty.join(".aws").exists(), "{told}");
    ours.home = with_files;
    assert!(up.ended().is_none(), "nobody waits: {}", up.output());
    ours.run(&["up", "--detach"]);
    let ended = poll(Duration::from_secs(20), "the services to be up", || up.ended());
    assert!(ended.success(), "{ended}: {}", up.output());

    let apps = ["orders", "reports"].map(|role| App::of(&shop, role));
    for app in &apps {
        app.is_who_it_is(moto);
    }
    assert!(published().contains("Directory listing"));
    drop(first);
    let second = publish("second-on-80");
    assert!(published().contains("Directory listing"));
    drop(second);

    let daemon = ours.container("imds-router");
    let id = daemon.id().to_owned();
    let (health, pid) = (|| daemon.inspect("{{.State.Health.Status}}"), || daemon.pid());
    poll(Duration::from_secs(25), "its health", || {
        (health() == "healthy").then_some(())
    });
    again("docker restart", SERVED_AGAIN, &apps, || {
        engine.docker(&["restart", &id]);
    });
    again("docker kill, docker start", SERVED_AGAIN, &apps, || {
        engine.docker(&["kill", &id]);
        engine.docker(&["start", &id]);
    });
    again("a crash", SERVED_AGAIN, &apps, || {
        let pid = Pid::from_raw(i32::try_from(pid()).expect("a process id")).expect("a process id");
        kill_process(pid, Signal::KILL).expect("it runs");
    });
    keep_log(&daemon);
    again("a new container", SERVED_AGAIN, &apps, || {
        ours.run(&["up", "--detach", "--force-recreate"]);
    });
    let daemon = ours.container("imds-router");
    assert_ne!(daemon.id(), id);

    // Another project that ships the daemon as well.
    let theirs = Compose::new(engine, "theirs", "deploy/compose.yaml", instead);
    theirs.run(&["up", "--detach"]);
    let other = theirs.container("imds-router");
    let serving = format!("in container {} serves this host", &daemon.id()[..12]);
    poll(Duration::from_secs(5), "the other to stand by", || {
        let said = inside(&other, &["health"]).stdout;
        (said.starts_with("stands by: imds-router, process ") && said.trim().ends_with(&serving)).then_some(())
    });
    keep_log(&daemon);
    let began = Instant::now();
    ours.run(&["stop"]);
    // Its key of tokens is its own project's.
    for app in &apps {
        let role = poll(Duration::from_secs(10), "an answer", || {
            let reply = app.container.request("GET", LIST, &[]).ok()?;
            (reply.status == 200).then_some(reply.body)
        });
        assert_eq!(role, app.role);
    }
    let took = began.elapsed();
    assert!(took < SERVED_AGAIN, "taken over after {took:?}");
    assert!(inside(&other, &["health"]).ok().starts_with("serves "));
    keep_log(&other);
    drop((theirs, ours, shop));
    before.assert_same(&engine.network_at_rest());
}

fn unprivileged(engine: &Arc<Engine>) {
    engine.socket_in_its_usual_place();
    engine.build_image();
    engine.run("first").command(&["true"]).to_its_end().ok();
    // A process of the host: it has no container's address.
    let vain = "[serve]\nattach = \"network\"\n";
    for (config, told) in [
        (vain.to_owned(), "proof = \"address\" accepts the source address"),
        (
            format!("{vain}proof = \"address\""),
            "for a container that has this address on a network",
        ),
    ] {
        let (code, said) = Daemon::start_in_vain(engine, &config, &[]);
        assert!(code == Some(1) && said.contains(told), "{said}");
    }
    let before = engine.network_at_rest();

    // The daemon finds its STS by the name that the engine's DNS gives it.
    let sts = format!(
        "  sts: {{ image: sdk, command: [{moto}, --host, 0.0.0.0], stop_signal: KILL, volumes: [{mounts}] }}\n  \
         imds-router: {{ environment: [AWS_ENDPOINT_URL_STS=http://sts:5000, IMDS_ROUTER_LOG=trace] }}\n",
        moto = tools::directory().join("venv/bin/moto_server").display(),
        mounts = quoted(&of_the_machine(engine)),
    );
    let instead = services(engine, &["orders", "reports"]) + &sts;
    let shop = Compose::new(engine, "shop", "examples/unprivileged/compose.yaml", &instead);
    shop.run(&["up", "--detach", "sts"]);
    let sts = shop.container("sts");
    poll(Duration::from_secs(30), "moto", || {
        sts.request("GET", "http://127.0.0.1:5000/moto-api/", &[])
            .ok()
            .filter(|it| it.status == 200)
    });
    shop.run(&["up", "--detach"]);
    let daemon = shop.container("imds-router");
    let apps = ["orders", "reports"].map(|role| App::of(&shop, role));
    for app in &apps {
        let session = format!("{}@{}", app.container.name(), &daemon.id()[..12]);
        let endpoint = ("AWS_ENDPOINT_URL_STS", "http://sts:5000");
        let whoami = Client::Boto3.whoami(&app.container, engine.moto(), &[endpoint]);
        assert_eq!(whoami, Identity::of_role(ACCOUNT, app.role, &session));
        assert_ne!(
            app.container.gateway().octets()[..2],
            [169, 254],
            "the way out leads to the metadata"
        );
    }
    let ask = |words: &[&str]| {
        let said = inside(&daemon, words).ok();
        serde_json::from_str::<serde_json::Value>(&said).unwrap_or_else(|e| panic!("{e}: {said}"))
    };
    let status = ask(&["status", "--json"]);
    assert_eq!(
        (&status["attach"], &status["proof"]),
        (&"network".into(), &"address".into()),
        "{status}"
    );
    assert!(inside(&daemon, &["health"]).ok().starts_with("serves "));
    let said = inside(&daemon, &["doctor"]).ok();
    assert!(said.contains("note  attach: network"), "{said}");

    // Nobody else: a process of the host, a container that it has no label for, and one of another network of the daemon's
    // that has made itself a way.
    let url = format!("{}{LIST}", crate::rig::http::IMDS);
    let process = engine.request("GET", &url, &[]).expect("a refusal");
    assert_eq!((process.status, process.body.as_str()), (403, ""));
    let unlabeled = engine.run("unlabeled").network("shop_metadata").start();
    assert_eq!(unlabeled.get(LIST, &[]).status, 403);
    let outside = engine
        .run("outside")
        .label("imds.role", "outside")
        .network("shop_default");
    let outside = outside.arg("--cap-add=NET_ADMIN").start();
    let way = daemon.address("shop_default").to_string();
    outside.exec(&["/sbin/ip", "route", "add", "169.254.169.254", "via", &way]);
    assert!(outside.request("GET", LIST, &[]).is_err(), "closed without a byte");
    let status = ask(&["status", "--json"]);
    let refused = &status["refused_connections"];
    assert!(
        refused["other-network"].as_u64() >= Some(1) && refused["unknown-address"].as_u64() >= Some(1),
        "{refused}"
    );
    let shown = status["containers"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|it| it["name"] == "outside");
    let problems = shown.expect("it is shown")["problems"].to_string();
    assert!(problems.contains("docker network connect shop_metadata"), "{problems}");
    // One that comes to the network while it runs is served.
    outside.exec(&["/sbin/ip", "route", "del", "169.254.169.254"]);
    engine.docker(&["network", "connect", "shop_metadata", "outside"]);
    is_itself(&outside);
    // Who comes after it to its address has nothing of it.
    let (token, address) = (outside.token(), outside.address("shop_metadata").to_string());
    drop(outside);
    let heir = engine.run("heir").label("imds.role", "heir").network("shop_metadata");
    let heir = heir.arg(&format!("--ip={address}")).start();
    assert_eq!(heir.address("shop_metadata").to_string(), address);
    is_itself(&heir);
    assert_eq!(heir.get(LIST, &[("X-aws-ec2-metadata-token", &token)]).status, 401);
    // While its container is away the address is on no link: a client waits for the kernel to look for it in vain.
    again("docker restart", Duration::from_secs(6), &apps, || {
        engine.docker(&["restart", daemon.id()]);
    });
    keep_log(&daemon);
    drop((unlabeled, heir));
    drop(shop);
    before.assert_same(&engine.network_at_rest());
}

/// One daemon on each host of a swarm, here on one, and a service of which each task has its role by docker_gwbridge.
fn swarm(engine: &Arc<Engine>) {
    engine.socket_in_its_usual_place();
    engine.build_image();
    let moto = engine.moto();
    engine.docker(&["swarm", "init", "--advertise-addr=127.0.0.1"]);
    let file = |name: &str, text: &str| {
        let path = engine.directory().join(name);
        fs::write(&path, text).unwrap_or_else(|e| panic!("cannot write {}: {e}", path.display()));
        path.display().to_string()
    };
    let credentials = file("credentials", &base_credentials());
    // Where STS is comes by a file of AWS's, since the stack names no endpoint.
    // Over the host: then a task's address is one that only docker_gwbridge knows.
    let config = format!(
        "region = \"{REGION}\"\n[serve]\nattach = \"host\"\nproof = \"address\"\n[credentials]\nallow_process = true\n"
    );
    let config = file("config.toml", &config);
    let aws = file("aws", &format!("[default]\nendpoint_url = {}\n", moto.url()));
    engine.docker(&["config", "create", "imds-router-config", &config]);
    engine.docker(&["secret", "create", "imds-router-credentials", &credentials]);
    let instead = format!(
        "version: '3.8'\nservices:\n  daemon:\n    image: sdk\n    volumes: [{}]\n    \
         configs: [{{ source: aws, target: /imds/aws/config }}]\nconfigs: {{ aws: {{ file: {aws} }} }}\n",
        quoted(&of_the_machine(engine))
    );
    let instead = file("instead.yaml", &instead);
    let deploy = |name: &str, files: &[&str]| {
        let files = files.iter().flat_map(|file| ["--compose-file", file]);
        // Without --detach, which Debian 12's client does not know: every client returns at once by default.
        let words = ["stack", "deploy", "--resolve-image=never"]
            .into_iter()
            .chain(files)
            .chain([name]);
        engine.docker(&words.collect::<Vec<_>>());
    };
    deploy("imds-router", &[&repository("deploy/stack.yaml"), &instead]);
    let shop = format!(
        "version: '3.8'\nservices:\n  orders:\n    image: sdk\n    command: [sleep, '1000000']\n    stop_signal: KILL\n    \
         deploy: {{ replicas: 2 }}\n    labels: {{ imds.role: orders }}\n    volumes: [{}]\n",
        quoted(&of_the_machine(engine))
    );
    deploy("shop", &[&file("shop.yaml", &shop)]);
    let running = |filter: &str| -> Vec<String> {
        let names = engine.docker(&["ps", "--filter", filter, "--format", "{{.Names}}"]);
        names.lines().map(str::to_owned).collect()
    };
    let tasks = poll(Duration::from_secs(30), "two tasks", || {
        let tasks = running("label=com.docker.swarm.service.name=shop_orders");
        (tasks.len() == 2).then_some(tasks)
    });
    poll(Duration::from_secs(30), "the daemon", || {
        (running("name=^imds-router$").len() == 1).then_some(())
    });
    let daemon = Container::of(engine, "imds-router");
    for name in &tasks {
        let task = Container::of(engine, name);
        let role = poll(Duration::from_secs(10), "its role", || {
            let reply = task.request("GET", LIST, &[]).ok()?;
            (reply.status == 200).then_some(reply.body)
        });
        assert_eq!(role, "orders");
        let gwbridge = engine.docker(&["network", "inspect", "docker_gwbridge"]);
        assert!(gwbridge.contains(task.id()), "{gwbridge}");
        let whoami = Client::Boto3.whoami(&task, moto, &[]).arn;
        assert!(
            whoami.starts_with(&format!("arn:aws:sts::{ACCOUNT}:assumed-role/orders/")),
            "{whoami}"
        );
    }
    keep_log(&daemon);
    // What the stack has started ends with it.
    engine.docker(&["stack", "rm", "imds-router"]);
    poll(Duration::from_secs(20), "the daemon to end", || {
        running("name=imds-router").is_empty().then_some(())
    });
}
