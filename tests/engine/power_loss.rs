//! After a power loss the daemon starts, and has every change that it reported.
//!
//! The state directory is an ext4 file system in a file. The ioctl `EXT4_IOC_SHUTDOWN` with `NOLOGFLUSH` stops it at once: all that is
//! not on the disk by then is lost, as when the power fails.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use libtest_mimic::Trial;
use serde_json::Value;

use crate::cases::is_itself;
use crate::rig::{Container, Daemon, Engine, Rig};

const CONFIG: &str = "account_id = \"111122223333\"\n[serve]\nattach = \"namespace\"";
/// `EXT4_IOC_SHUTDOWN` and `EXT4_GOING_FLAGS_NOLOGFLUSH` (fs/ext4/ext4.h).
const POWER_OFF: &str =
    "import fcntl, os, struct, sys; fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    vec![
        rig.once("power_loss::keeps_reported_changes", keeps_reported_changes),
        rig.once("power_loss::during_the_first_start", during_the_first_start),
    ]
}

/// A daemon's directory whose state directory is a file system of its own.
struct Disk {
    engine: Arc<Engine>,
    directory: PathBuf,
}

impl Disk {
    fn new(engine: &Arc<Engine>, name: &str) -> Self {
        let directory = engine.directory().join(format!("power-{name}"));
        let disk = Self {
            engine: Arc::clone(engine),
            directory,
        };
        disk.sh(
            "mkdir -p \"$1/state\" && truncate -s 16M \"$1/disk\" && mkfs.ext4 -q -E lazy_itable_init=0 \"$1/disk\"",
        );
        disk.mount();
        disk
    }

    #[track_caller]
    fn sh(&self, script: &str) {
        let directory = self.directory.to_str().expect("UTF-8");
        self.engine.host("sh", &["-c", script, "sh", directory]);
    }

    fn state(&self) -> String {
        self.directory.join("state").display().to_string()
    }

    #[track_caller]
    fn mount(&self) {
        self.sh("mount -o loop,data=writeback \"$1/disk\" \"$1/state\" && chmod 700 \"$1/state\"");
    }

    #[track_caller]
    fn power_off(&self) {
        self.engine.host("python3", &["-c", POWER_OFF, &self.state()]);
    }

    /// Mounts the disk again, as after a boot.
    #[track_caller]
    fn power_on(&self) {
        self.sh("umount --recursive \"$1/state\"");
        self.mount();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let state = self.state();
        // The trial has failed if a process still uses it.
        let mut umount = self.engine.command("umount");
        umount.args(["--recursive", "--lazy", &state]);
        let _ = umount.output();
    }
}

fn hop_limit(daemon: &Daemon, container: &Container) -> u64 {
    let text = daemon.cli(&["modify", container.name(), "--json"]).ok();
    let options: Value = serde_json::from_str(&text).expect("JSON");
    options["http_put_response_hop_limit"]
        .as_u64()
        .unwrap_or_else(|| panic!("no hop limit in {text}"))
}

fn keeps_reported_changes(engine: &Arc<Engine>) {
    let environment = engine.moto().daemon_environment();
    let container = engine.run("power").label("imds.role", "power").start();
    let mut reported_at_all = 0;
    for (round, milliseconds) in [120, 210, 330, 470].into_iter().enumerate() {
        let disk = Disk::new(engine, &format!("changes-{round}"));
        let daemon = Daemon::start_in(engine, disk.directory.clone(), CONFIG, &environment);
        is_itself(&container);
        let (off, reported) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for limit in (3..=64).cycle() {
                    let limit: u64 = limit;
                    let change = [
                        "modify",
                        container.name(),
                        "--http-put-response-hop-limit",
                        &limit.to_string(),
                    ];
                    if !daemon.cli(&change).succeeded() || off.load(Ordering::SeqCst) {
                        return;
                    }
                    reported.store(limit, Ordering::SeqCst);
                }
            });
            std::thread::sleep(Duration::from_millis(milliseconds));
            // A change that is reported after this moment does not count.
            let last = reported.load(Ordering::SeqCst);
            off.store(true, Ordering::SeqCst);
            disk.power_off();
            reported.store(last, Ordering::SeqCst);
        });
        let last = reported.load(Ordering::SeqCst);
        reported_at_all += u64::from(last > 0);
        daemon.kill();
        disk.power_on();
        let daemon = Daemon::start_in(engine, disk.directory.clone(), CONFIG, &environment);
        is_itself(&container);
        let found = hop_limit(&daemon, &container);
        println!("after {milliseconds} ms: {last} was reported, {found} is there");
        if last > 0 {
            assert!(
                found == last || found == last + 1,
                "{last} was reported, {found} is there"
            );
        }
        let log = daemon.stop();
        assert!(!log.contains("is damaged"), "{log}");
    }
    assert!(reported_at_all > 0, "no change was reported before the power was off");
}

/// The power fails while the daemon creates its files.
fn during_the_first_start(engine: &Arc<Engine>) {
    let environment = engine.moto().daemon_environment();
    let mut states = Vec::new();
    for (round, milliseconds) in [20, 60, 120, 200, 400].into_iter().enumerate() {
        let disk = Disk::new(engine, &format!("start-{round}"));
        let daemon = Daemon::launch(engine, &[], disk.directory.clone(), CONFIG, &environment);
        std::thread::sleep(Duration::from_millis(milliseconds));
        disk.power_off();
        daemon.end_by(rustix::process::Signal::KILL);
        disk.power_on();
        let files = engine.host("ls", &["-s", &disk.state()]);
        states.push(files.replace('\n', " "));
        let daemon = Daemon::start_in(engine, disk.directory.clone(), CONFIG, &environment);
        let log = daemon.stop();
        assert!(!log.contains("is damaged"), "{log}");
    }
    println!("found at the second start: {states:#?}");
}
