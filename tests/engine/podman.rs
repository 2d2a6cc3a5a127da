//! Podman instead of Docker: the same daemon, over Podman's Docker API, which tells of less and later.

use std::ffi::OsStr;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use libtest_mimic::Trial;

use crate::cases::LIST;
use crate::rig::container::SCRIPTS;
use crate::rig::engine::SDK;
use crate::rig::tools::{directory, scripts};
use crate::rig::{Background, Daemon, Done, Engine, Rig, attach_keys, http, poll, rounds, run};

const ACCOUNT: &str = "111122223333";
/// Podman's own choice for its default network (podman-network(1)).
const GATEWAY: &str = "10.88.0.1";
/// What works without the rights and the controllers that a test machine may lack.
const CONFIGURATION: &str = "
    [containers]
    default_ulimits = ['nofile=1024:1024', 'nproc=1024:1024']
    pids_limit = 0
    [engine]
    cgroup_manager = 'cgroupfs'
    events_logger = 'file'
    [network]
    network_backend = 'netavark'
";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = Vec::new();
    for view in rig.views().to_vec() {
        for attach in ["auto", "host"] {
            // On a host of its own: its rules stay there.
            let name = format!("podman::two_containers_two_roles::{attach}::{}", view.name());
            trials.push(rig.alone(&name, move || two_containers_two_roles(&Engine::start(view), attach)));
        }
    }
    let view = rig.views()[0];
    trials.push(rig.alone("podman::first_acts", move || first_acts(&Engine::start(view))));
    trials
}

/// A Podman on the engine's host. Dropping it ends what runs in it.
struct Podman {
    engine: Arc<Engine>,
    home: PathBuf,
    service: Option<Background>,
}

impl Podman {
    fn start(engine: &Arc<Engine>) -> Podman {
        let home = engine.directory().join(format!("podman-{}", run::next_number()));
        fs::create_dir_all(&home).expect("the engine's directory is writable");
        let configuration = format!("{CONFIGURATION}\nnetwork_config_dir = '{}/net'\n", home.display());
        fs::write(home.join("containers.conf"), configuration).expect("the directory is writable");
        let mut podman = Podman {
            engine: Arc::clone(engine),
            home,
            service: None,
        };
        let image = podman.home.join("image.tar");
        engine.docker(&["save", "--output", &image.to_string_lossy(), SDK]);
        podman.does(&["load", "--quiet", "--input", &image.to_string_lossy()]);
        let serve = &mut podman.command(&["system", "service", "--time=0", &podman.host()]);
        podman.service = Some(engine.background(serve, "podman"));
        podman
    }

    fn host(&self) -> String {
        format!("unix://{}/podman.sock", self.home.display())
    }

    fn command(&self, arguments: &[impl AsRef<OsStr>]) -> Command {
        let mut podman = self.engine.command("env");
        let at = |what: &str| self.home.join(what);
        podman
            .arg(format!("CONTAINERS_CONF={}", at("containers.conf").display()))
            .arg("podman");
        // Short, as Podman wants it, and the engine's host's own.
        let run = format!("/run/{}", self.home.file_name().unwrap_or_default().display());
        podman.args(["--runroot", &run, "--root"]).arg(at("root"));
        podman.arg("--tmpdir").arg(at("tmp"));
        podman.args(["--storage-driver", "overlay"]).args(arguments);
        podman
    }

    #[track_caller]
    fn does(&self, arguments: &[&str]) -> String {
        Done::of(self.command(arguments)).ok().trim().to_owned()
    }

    #[track_caller]
    fn run(&self, name: &str, options: &[&str]) {
        let tools = directory().display().to_string();
        let mounts = [
            "--volume=/usr:/usr:ro".to_owned(),
            format!("--volume={tools}:{tools}:ro"),
            format!("--volume={}:{SCRIPTS}:ro", scripts().display()),
        ];
        let mut all = vec!["run", "--detach", "--name", name];
        all.extend(mounts.iter().map(String::as_str));
        all.extend(options);
        all.extend([SDK, "sleep", "1000000"]);
        self.does(&all);
    }

    /// What it is told at `url`, or nothing.
    fn asks(&self, container: &str, path: &str) -> Option<(String, String)> {
        let url = format!("{}{path}", http::IMDS);
        let words = [
            "exec",
            container,
            "curl",
            "-sS",
            "--max-time",
            "3",
            "-w",
            " %{http_code}",
            &url,
        ];
        let done = Done::of(self.command(&words));
        let (body, status) = done.stdout.trim_end().rsplit_once(' ')?;
        Some((status.to_owned(), body.to_owned()))
    }

    #[track_caller]
    fn is_refused(&self, container: &str) {
        let refused = self.asks(container, LIST);
        assert_eq!(refused, Some(("403".to_owned(), String::new())), "{container}");
    }

    #[track_caller]
    fn is(&self, container: &str, role: &str) {
        let expected = ("200".to_owned(), role.to_owned());
        poll(Duration::from_secs(5), &format!("the role of {container}"), || {
            let told = self.asks(container, LIST)?;
            assert!(told.0 != "200" || told == expected, "{told:?} in {container}");
            (told == expected).then_some(())
        });
    }
}

impl Drop for Podman {
    fn drop(&mut self) {
        // One that lends its network to another goes after that.
        for _ in 0..2 {
            let _ = Done::of(self.command(&["rm", "--all", "--force", "--time", "0"]));
        }
        drop(self.service.take());
        for mount in ["root/overlay", "root"] {
            let mut umount = self.engine.command("umount");
            umount.arg(self.home.join(mount));
            let _ = Done::of(umount);
        }
    }
}

fn two_containers_two_roles(engine: &Arc<Engine>, attach: &str) {
    let podman = Podman::start(engine);
    let moto = engine.moto();
    let config = format!("account_id = \"{ACCOUNT}\"\n[serve]\n{}", attach_keys(attach));
    let mut environment = moto.daemon_environment();
    environment.push(("DOCKER_HOST".to_owned(), podman.host()));
    podman.run("before", &["--label=imds.role=before"]);
    let daemon = Daemon::start(engine, &config, &environment);
    podman.run("orders", &["--label=imds.role=orders"]);
    podman.run("reports", &["--label=imds.role=reports"]);
    podman.run("nobody", &[]);
    let sts = format!(
        "--env=AWS_ENDPOINT_URL_STS={}",
        moto.url().replace("127.0.0.1", GATEWAY)
    );
    podman.is("before", "before");
    for role in ["orders", "reports"] {
        podman.is(role, role);
        let python = directory().join("venv/bin/python").display().to_string();
        let script = format!("{SCRIPTS}/whoami.py");
        let words = [
            "exec",
            &sts,
            "--env=AWS_DEFAULT_REGION=us-east-1",
            role,
            &python,
            &script,
        ];
        let arn = podman.does(&words);
        let expected = format!("arn:aws:sts::{ACCOUNT}:assumed-role/{role}/{role}@");
        assert!(arn.starts_with(&expected), "{arn}");
    }
    podman.is_refused("nobody");
    // In one namespace, with a role of its own; and in the host's.
    podman.run("sharer", &["--label=imds.role=sharer", "--network=container:orders"]);
    podman.run("at-host", &["--label=imds.role=at-host", "--network=host"]);
    for container in ["sharer", "orders", "at-host"] {
        match attach {
            // They share their source address with others.
            "host" => podman.is_refused(container),
            _ => podman.is(container, container),
        }
    }
    // What has gone is nobody any more; its address is the next one's.
    podman.does(&["rm", "--force", "--time", "0", "reports"]);
    podman.run("next", &["--label=imds.role=next"]);
    podman.is("next", "next");
    podman.does(&["restart", "--time", "0", "next"]);
    podman.is("next", "next");
    let status = daemon.status();
    let shown = status["containers"].as_array().expect("a list");
    let names: Vec<_> = shown
        .iter()
        .filter(|it| it["alive"] == true)
        .map(|it| it["name"].to_string())
        .collect();
    assert!(!names.iter().any(|name| name.contains("reports")), "{names:?}");
    assert!(names.iter().any(|name| name.contains("before")), "{names:?}");
    daemon.stop();
}

/// Podman reports a container after its first instruction, and does not answer questions about it before that. It has its link
/// nevertheless, and its first request waits there.
fn first_acts(engine: &Arc<Engine>) {
    // curl's exit code, what it got, status and seconds.
    const ASK: &str =
        "got=$(curl -s -w ' %{http_code} %{time_total}' --max-time 2 http://169.254.169.254$0); echo \"$? $got\"";
    let podman = Podman::start(engine);
    let config = format!("account_id = \"{ACCOUNT}\"");
    let mut environment = engine.moto().daemon_environment();
    environment.push(("DOCKER_HOST".to_owned(), podman.host()));
    let daemon = Daemon::start(engine, &config, &environment);
    poll(Duration::from_secs(5), "Podman to be known", || {
        (daemon.status()["engine"]["state"] == "synchronised").then_some(())
    });
    for number in 0..rounds(10) {
        let name = format!("first-{number}");
        let label = format!("--label=imds.role={name}");
        let run = ["run", "--rm", "--name", &name, "--volume=/usr:/usr:ro", &label, SDK];
        let said = podman.does(&[&run[..], &["/bin/sh", "-c", ASK, LIST]].concat());
        println!("first act under Podman: {said}");
        assert!(said.starts_with(&format!("0 {name} 200 ")), "{said}");
    }
    println!("refused: {}", daemon.status()["refused_connections"]);
    daemon.stop();
}
