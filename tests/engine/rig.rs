//! The rig: real engines, real containers, a real STS API and real SDKs, in network namespaces that have no way out.
//!
//! A trial is a function of an engine. It starts what it needs, in words (`engine.run("orders").label(…).start()`), and
//! whatever it has started ends when it goes out of scope. It fails by panicking; the rig adds the end of every log that
//! the trial has made longer.
//!
//! ```ignore
//! pub fn trials(rig: &Rig) -> Vec<Trial> {
//!     rig.in_each_view("credentials::each_container_has_its_own_role", each_container_has_its_own_role)
//! }
//!
//! fn each_container_has_its_own_role(engine: &Arc<Engine>) {
//!     let moto = engine.moto();
//!     let daemon = Daemon::start(engine, "", &moto.daemon_environment());
//!     let orders = engine.run("orders").label("imds.role", "arn:aws:iam::111122223333:role/orders").start();
//!     for client in Client::ALL {
//!         let identity = client.whoami(&orders, moto, &[]);
//!         assert!(identity.arn.starts_with("arn:aws:sts::111122223333:assumed-role/orders/"), "{identity:?}");
//!     }
//!     daemon.stop();
//! }
//! ```

// A rig offers more than the trials of the day use.
#![allow(dead_code, unused_imports)]

pub mod clients;
pub mod container;
pub mod daemon;
pub mod engine;
pub mod hostile;
pub mod http;
pub mod moto;
pub mod namespace;
pub mod network;
pub mod run;
pub mod shell;
pub mod tools;

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::{Failed, Trial};

pub use clients::{Client, Identity, run_script, run_tool};
pub use container::Container;
pub use daemon::{Daemon, attach_keys};
pub use engine::{BOX, Background, Engine, Kind, Network, Release, View};
pub use hostile::{Attach, rounds};
pub use http::{NoReply, Reply};
pub use moto::Moto;
pub use network::Snapshot;
pub use shell::{Done, poll};

thread_local! {
    static IN_TRIAL: Cell<bool> = const { Cell::new(false) };
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// What the trials share. Cheap to clone.
#[derive(Clone)]
pub struct Rig {
    views: Vec<View>,
    engines: Arc<Mutex<Engines>>,
}

/// The shared engines that have been asked for, or why there is none.
type Engines = BTreeMap<Kind, Result<Arc<Engine>, String>>;

impl Rig {
    pub fn new() -> Rig {
        keep_panics_of_trials();
        Rig {
            views: View::available(),
            engines: Arc::default(),
        }
    }

    /// Makes sure that trials can run here.
    pub fn prepare(&self) -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err("the trials on a real engine need root; `tests/run` asks for it".to_owned());
        }
        tools::prepare()?;
        run::end_stale_runs();
        end_run_on_signal()
    }

    /// The views that the trials run in.
    pub fn views(&self) -> &[View] {
        &self.views
    }

    /// The engine of that kind that the trials share, started on first use.
    #[track_caller]
    pub fn engine(&self, kind: impl Into<Kind>) -> Arc<Engine> {
        let kind = kind.into();
        let mut engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        let engine = engines.entry(kind).or_insert_with(|| {
            // What failed once fails again, and slowly: remember the reason instead.
            catch_unwind(AssertUnwindSafe(|| Engine::start(kind))).map_err(message)
        });
        match engine {
            Ok(engine) => Arc::clone(engine),
            Err(why) => panic!("no engine: {why}"),
        }
    }

    /// One trial, in one view.
    pub fn once(&self, name: &str, trial: impl FnOnce(&Arc<Engine>) + Send + 'static) -> Trial {
        self.in_view(self.views[0], name, trial)
    }

    /// The same trial in each view.
    pub fn in_each_view(&self, name: &str, trial: fn(&Arc<Engine>)) -> Vec<Trial> {
        self.each_view(name, trial)
    }

    /// The same, for trials that carry parameters.
    pub fn each_view(&self, name: &str, trial: impl Fn(&Arc<Engine>) + Copy + Send + 'static) -> Vec<Trial> {
        let views = self.views.iter();
        views
            .map(|view| self.in_view(*view, &format!("{name}::{}", view.name()), trial))
            .collect()
    }

    fn in_view(&self, view: View, name: &str, trial: impl FnOnce(&Arc<Engine>) + Send + 'static) -> Trial {
        let rig = self.clone();
        self.alone(name, move || trial(&rig.engine(view)))
    }

    /// One trial, on each newer generation of the engine.
    pub fn on_newer(&self, name: &str, trial: impl Fn(&Arc<Engine>) + Copy + Send + 'static) -> Vec<Trial> {
        let newer = Release::NEWER.into_iter();
        newer
            .map(|release| {
                let rig = self.clone();
                let kind = Kind {
                    release,
                    ..self.views[0].into()
                };
                self.alone(&format!("{name}::{}", release.name()), move || trial(&rig.engine(kind)))
            })
            .collect()
    }

    /// A trial that does not want a shared engine.
    pub fn alone(&self, name: &str, trial: impl FnOnce() + Send + 'static) -> Trial {
        Trial::test(name, move || {
            let before = log_lengths();
            IN_TRIAL.set(true);
            let outcome = catch_unwind(AssertUnwindSafe(trial));
            IN_TRIAL.set(false);
            outcome.map_err(|panic| Failed::from(message(panic) + &what_logs_say_since(&before)))
        })
    }

    /// All that daemons and the programs beside them have printed so far, with the file in front of each line.
    pub fn all_output(&self) -> String {
        let mut all = String::new();
        for log in run::logs() {
            let name = log.file_name().unwrap_or_default().to_string_lossy();
            let text = fs::read(&log).unwrap_or_default();
            for line in String::from_utf8_lossy(&text).lines() {
                all.push_str(&format!("{name}: {line}\n"));
            }
        }
        all
    }

    /// What must not be in [`all_output`](Self::all_output): everything secret that any STS of this run knows.
    #[track_caller]
    pub fn secrets(&self) -> BTreeSet<String> {
        let engines = self.engines.lock().unwrap_or_else(PoisonError::into_inner);
        let mut secrets = run::remembered_secrets();
        for engine in engines.values().flatten() {
            if let Some(moto) = engine.moto_if_started() {
                secrets.extend(moto.secrets(engine).unwrap_or_else(|why| panic!("{why}")));
            }
        }
        secrets
    }

    /// Ends all that there is of this run, and says what could not be ended.
    pub fn end(&self) -> Vec<String> {
        self.engines.lock().unwrap_or_else(PoisonError::into_inner).clear();
        run::end()
    }
}

fn message(panic: Box<dyn Any + Send>) -> String {
    if let Some(kept) = PANIC.take() {
        return kept;
    }
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    text.unwrap_or("panicked with something that is no text").to_owned()
}

/// A panic of a trial is a result, and shown as one, with its place; a panic anywhere else is printed as ever.
fn keep_panics_of_trials() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if !IN_TRIAL.get() {
            return print(info);
        }
        let text = info.payload_as_str().unwrap_or("panicked");
        let place = info.location().map(|place| format!("{place}: "));
        let all = format!("{}{text}", place.unwrap_or_default());
        PANIC.with(|kept| *kept.borrow_mut() = Some(all));
    }));
}

fn log_lengths() -> BTreeMap<PathBuf, u64> {
    let logs = run::logs().into_iter();
    logs.map(|log| {
        let length = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        (log, length)
    })
    .collect()
}

fn what_logs_say_since(before: &BTreeMap<PathBuf, u64>) -> String {
    let mut said = String::new();
    for (log, length) in log_lengths() {
        let name = log.file_name().unwrap_or_default().to_string_lossy();
        // The daemon is what the trial is about; of the others a few lines.
        let lines = if name.contains("daemon-") { 40 } else { 6 };
        if before.get(&log).is_none_or(|known| *known < length) {
            said.push_str(&format!("\n--- {name}:\n{}", shell::tail(&log, lines)));
        }
    }
    said
}

/// Ctrl-C, and whatever else ends a run from outside, leaves nothing behind.
fn end_run_on_signal() -> Result<(), String> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("no runtime for signals: {e}"))?;
    let _inside = runtime.enter();
    let listen = |kind| signal(kind).map_err(|e| format!("cannot listen for signals: {e}"));
    let mut interrupt = listen(SignalKind::interrupt())?;
    let mut terminate = listen(SignalKind::terminate())?;
    let mut hangup = listen(SignalKind::hangup())?;
    drop(_inside);
    std::thread::spawn(move || {
        let code = runtime.block_on(async {
            // 128 + the signal's number, as shells have it.
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
                _ = hangup.recv() => 129,
            }
        });
        run::interrupt();
        eprintln!("\ninterrupted: taking everything down");
        for left in run::end() {
            eprintln!("left behind: {left}");
        }
        let _ = fs::remove_dir_all(run::directory()); // its logs are of no use
        std::process::exit(code);
    });
    Ok(())
}
