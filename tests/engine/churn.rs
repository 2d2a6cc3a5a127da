//! Short lives on few addresses, as fast as the engine makes and ends them; and what a life's first act gets.
//!
//! `IMDS_TRIALS_ROUNDS` scales both (200: 2,000 lives, 200 first acts), `IMDS_TRIALS_ATTACH` says how the daemon is attached.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::container::SCRIPTS;
use crate::rig::hostile::{last_line, on_host};
use crate::rig::{Attach, Container, Daemon, Engine, Rig, poll, rounds, run};

/// Lives at once.
const PARALLEL: u32 = 8;
/// Fewer roles than lives, more than addresses: neighbours in time have different ones.
const ROLES: u32 = 7;
/// `[serve] max_wait` (400 ms), and what Python and eight containers on two cores add to a measurement.
const WITHIN: f64 = 400.0 + 150.0;
/// Longer than `life.py` waits for an answer.
const LONGEST: Duration = Duration::from_secs(5);
/// Where a life tells its story, in the container.
const STORIES: &str = "/stories";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    let mut trials = vec![
        rig.once("churn::short_lives_on_few_addresses", short_lives_on_few_addresses),
        rig.once("churn::first_act", first_act),
    ];
    trials.extend(rig.on_newer("churn::short_lives_on_few_addresses", short_lives_on_few_addresses));
    trials.extend(rig.on_newer("churn::first_act", first_act));
    trials
}

/// What the lives of a trial got, told by themselves.
#[derive(Default, Debug)]
struct Judgement {
    /// Those that lived long enough to read an answer.
    spoken: u32,
    answers: u32,
    foreign: Vec<String>,
    /// Those whose first answer was not their own role in time: what it was.
    late: Vec<String>,
    slowest: f64,
}

fn short_lives_on_few_addresses(engine: &Arc<Engine>) {
    let attach = Attach::of_this_run();
    let lives = rounds(12) * 10;
    let daemon = Daemon::start(engine, &attach.config(), &engine.moto().daemon_environment());
    let few = engine.network("few", &["--subnet", "172.31.99.0/27"]);
    let stories = engine.directory().join(format!("stories-{}", run::next_number()));
    fs::create_dir_all(&stories).expect("the engine's directory is writable");
    let next = AtomicU32::new(0);
    let started = Instant::now();
    thread::scope(|scope| {
        for slot in 0..PARALLEL {
            let (stories, next, network) = (&stories, &next, few.name());
            scope.spawn(move || {
                // Each of the eight has an address that it uses again at once, and another one to exchange it with.
                let addresses = [format!("172.31.99.{}", 2 + slot), format!("172.31.99.{}", 16 + slot)];
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= lives {
                        break;
                    }
                    let at = |number, address: &String| start(engine, network, address, stories, number);
                    let first = at(number, &addresses[0]);
                    if number % 8 == 7 {
                        // A role of its own, so that an answer for the other one shows.
                        let pair = [first, at(lives + number + 1, &addresses[1])];
                        exchange(engine, network, stories, &pair, &addresses);
                    } else if number % 2 == 0 {
                        // As soon as it has said something, it is killed, and removed.
                        hear(&stories.join(first.name()));
                    } else {
                        // The same 0 to 450 ms after the engine says that it has begun.
                        thread::sleep(Duration::from_millis(u64::from(number * 37 % 10) * 50));
                    }
                }
            });
        }
    });
    let took = started.elapsed();
    let all = lives + lives / 8;
    let judged = judge(&stories);
    println!(
        "churn | attach {} | {all} lives in {:.0?} ({:.1} a second), {} of them spoke, {} answers, {} foreign, {} late; slowest first answer {:.0} ms",
        attach.name(),
        took,
        f64::from(all) / took.as_secs_f64(),
        judged.spoken,
        judged.answers,
        judged.foreign.len(),
        judged.late.len(),
        judged.slowest,
    );
    println!("churn refusals: {}", daemon.status()["refused_connections"]);
    assert!(judged.foreign.is_empty(), "another's role: {:?}", judged.foreign);
    let spoken = judged.spoken;
    assert!(
        spoken > all / 3,
        "{spoken} of {all} lives lived long enough to say anything"
    );
    // 99.9 %; one of a hundred would say nothing against that.
    assert!(
        u32::try_from(judged.late.len()).unwrap_or(u32::MAX) <= spoken.div_ceil(1000),
        "{} of {spoken} lives did not get their own role first, within {WITHIN} ms: {:?}",
        judged.late.len(),
        judged.late
    );
    daemon.stop();
}

fn start(engine: &Arc<Engine>, network: &str, address: &str, stories: &Path, number: u32) -> Container {
    let role = format!("role-{}", number % ROLES);
    let name = format!("life-{number}");
    // A third asks in its first act.
    let first_ask = if number.is_multiple_of(3) { "0" } else { "0.1" };
    engine
        .run(&name)
        .label("imds.role", &role)
        .env("ROLE", &role)
        .network(network)
        .arg(&format!("--ip={address}"))
        .arg(&format!("--volume={}:{STORIES}", stories.display()))
        .command(&[
            "/usr/bin/python3",
            &format!("{SCRIPTS}/attacks/life.py"),
            "on",
            &format!("{STORIES}/{name}"),
            "--first-ask",
            first_ask,
        ])
        .start()
}

/// Waits until a life has said something.
fn hear(story: &PathBuf) {
    let end = Instant::now() + LONGEST;
    while rows(story).is_empty() && Instant::now() < end {
        thread::sleep(Duration::from_millis(5));
    }
}

/// Two lives take each other's address while they ask.
fn exchange(engine: &Arc<Engine>, network: &str, stories: &Path, pair: &[Container; 2], addresses: &[String; 2]) {
    // What is under way while a link is taken away is late, or lost: that says nothing of a first act.
    for life in pair {
        hear(&stories.join(life.name()));
    }
    for life in pair {
        engine.docker(&["network", "disconnect", network, life.id()]);
    }
    for (life, address) in pair.iter().zip(addresses.iter().rev()) {
        engine.docker(&["network", "connect", "--ip", address, network, life.id()]);
    }
    for life in pair {
        let story = stories.join(life.name());
        let told = rows(&story).len();
        // What was under way when the link went may fail; after that, it must be answered.
        poll(Duration::from_secs(5), "an answer at the exchanged address", || {
            let rows = rows(&story);
            let mut new = rows.iter().skip(told);
            new.any(|row| row["kind"] == "own" || row["kind"] == "foreign")
                .then_some(())
        });
    }
}

fn rows(story: &PathBuf) -> Vec<Value> {
    let text = fs::read_to_string(story).unwrap_or_default();
    // A last line that was cut by death is none.
    text.lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

fn judge(stories: &Path) -> Judgement {
    let mut judged = Judgement::default();
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(stories).into_iter().flatten().flatten() {
        all.insert(entry.file_name(), rows(&entry.path()));
    }
    for (name, rows) in all {
        let name = name.to_string_lossy();
        judged.answers += u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let foreign = rows.iter().filter(|row| row["kind"] == "foreign");
        judged.foreign.extend(foreign.map(|row| format!("{name}: {row}")));
        // Without a link nobody was asked.
        let unreachable = |row: &Value| {
            row["body"]
                .as_str()
                .is_some_and(|it| it.contains("Network is unreachable"))
        };
        let Some(first) = rows.iter().find(|row| !unreachable(row)) else {
            continue;
        };
        judged.spoken += 1;
        let took = first["ms"].as_f64().unwrap_or(f64::MAX);
        judged.slowest = judged.slowest.max(took);
        if first["kind"] != "own" || took > WITHIN {
            judged.late.push(format!("{name}: {first}"));
        }
    }
    judged
}

/// Everybody's first act is a token and its credentials, while STS takes 100 ms.
fn first_act(engine: &Arc<Engine>) {
    const SLOW_PORT: &str = "5100";
    let attach = Attach::of_this_run();
    let moto = engine.moto();
    let port = moto.url().rsplit(':').next().unwrap_or_default();
    let _slow = on_host(engine, "slow", &["--port", SLOW_PORT, "--to-port", port]);
    let mut environment = moto.daemon_environment();
    for (name, value) in &mut environment {
        if name == "AWS_ENDPOINT_URL_STS" {
            *value = format!("http://127.0.0.1:{SLOW_PORT}");
        }
    }
    let daemon = Daemon::start(engine, &attach.config(), &environment);
    poll(Duration::from_secs(5), "the daemon to reach the slow STS", || {
        daemon.log().contains("base credentials").then_some(())
    });
    let acts = rounds(20);
    let next = AtomicU32::new(0);
    let results: Vec<(String, Value)> = thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let mut results = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= acts {
                            return results;
                        }
                        // A role of its own each: nobody has fetched it before.
                        let name = format!("first-{number}");
                        let act = engine.run(&name).label("imds.role", &name).env("ROLE", &name);
                        let script = format!("{SCRIPTS}/attacks/life.py");
                        let done = act.command(&["/usr/bin/python3", &script, "first-act"]).to_its_end();
                        assert!(done.succeeded(), "{done}");
                        results.push((name, last_line(&done.stdout)));
                    }
                })
            })
            .collect();
        threads
            .into_iter()
            .flat_map(|thread| thread.join().expect("a first act"))
            .collect()
    });
    let ms = |row: &Value| -> Vec<f64> {
        row["ms"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_f64)
            .collect()
    };
    let mut all: Vec<f64> = results.iter().flat_map(|(_, row)| ms(row)).collect();
    all.sort_by(f64::total_cmp);
    let at = |share: f64| all[((all.len() - 1) as f64 * share) as usize];
    println!(
        "first act | attach {} | {} containers, STS 100 ms: a request p50 {:.1} ms, p99 {:.1} ms, max {:.1} ms",
        attach.name(),
        results.len(),
        at(0.5),
        at(0.99),
        at(1.0)
    );
    for (name, row) in &results {
        assert_eq!(row["well"], true, "{name}: {row}");
        assert!(ms(row).iter().all(|ms| *ms < 500.0), "{name} waited too long: {row}");
    }
    daemon.stop();
}
