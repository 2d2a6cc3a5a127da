//! Base credentials on a real engine: profiles, files that change and files that are refused, what a person hands over, and
//! clocks that jump.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use libtest_mimic::Trial;
use serde_json::Value;

use crate::rig::{Container, Daemon, Engine, Rig, poll, run, tools};

const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const SOON: Duration = Duration::from_secs(10);
/// What stands in files or is handed over; not to be seen in any log.
const FILE_SECRET: &str = "file-secret-of-the-trials-0123456789abcd";
const HANDED_SECRET: &str = "handed-secret-of-the-trials-0123456789ab";
const HANDED_TOKEN: &str = "handed-token-of-the-trials-0123456789abc";

pub fn trials(rig: &Rig) -> Vec<Trial> {
    run::remember_secrets([FILE_SECRET, HANDED_SECRET, HANDED_TOKEN].map(str::to_owned).to_vec());
    vec![
        rig.once("bases::profiles_and_files_that_change", profiles_and_files_that_change),
        rig.once("bases::what_a_person_hands_over", what_a_person_hands_over),
        rig.once("bases::clocks_that_jump", clocks_that_jump),
        rig.once(
            "bases::programs_keep_the_limit_on_open_files",
            programs_keep_the_limit_on_open_files,
        ),
        rig.once(
            "bases::the_unit_reads_the_files_of_a_user",
            the_unit_reads_the_files_of_a_user,
        ),
    ]
}

/// A directory of AWS files of its own.
fn aws_directory(engine: &Engine) -> PathBuf {
    let directory = engine.directory().join(format!("aws-{}", run::next_number()));
    fs::create_dir_all(directory.join("sso/cache")).expect("a directory");
    directory
}

fn write(path: &Path, text: &str, mode: u32) {
    fs::write(path, text).expect("a file");
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("its mode");
}

/// A daemon whose only base credentials are those of `directory`.
fn daemon(engine: &Arc<Engine>, directory: &Path) -> Daemon {
    let moto = engine.moto();
    let environment = moto.daemon_environment().into_iter();
    let environment: Vec<_> = environment
        .filter(|(name, _)| !name.starts_with("AWS_ACCESS") && !name.starts_with("AWS_SECRET"))
        .collect();
    let config = format!("[credentials]\naws_dir = '{}'", directory.display());
    Daemon::start(engine, &config, &environment)
}

/// The daemon raises its limit, and starts a credential_process with the limit that it was started with.
fn programs_keep_the_limit_on_open_files(engine: &Arc<Engine>) {
    let directory = aws_directory(engine);
    let seen = directory.join("seen");
    let program = format!(
        "[default]\ncredential_process = sh -c 'ulimit -Sn > {}'\n",
        seen.display()
    );
    write(&directory.join("config"), &program, 0o644);
    let config = format!(
        "[credentials]\naws_dir = '{}'\nallow_process = true\n",
        directory.display()
    );
    let moto = engine.moto().daemon_environment().into_iter();
    let environment: Vec<_> = moto
        .filter(|(name, _)| !name.starts_with("AWS_ACCESS") && !name.starts_with("AWS_SECRET"))
        .collect();
    let limit = ["sh", "-c", "ulimit -Sn 1000; ulimit -Hn 5000; exec \"$@\"", "sh"];
    let daemon = Daemon::start_by(engine, &limit, &config, &environment);
    let seen = poll(SOON, "the program", || {
        fs::read_to_string(&seen).ok().filter(|text| text.ends_with('\n'))
    });
    assert_eq!(seen, "1000\n");
    let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.pid())).expect("it runs");
    let files = limits.lines().find(|line| line.starts_with("Max open files"));
    let files: Vec<&str> = files.expect("a limit").split_whitespace().collect();
    assert_eq!(files[3..5], ["5000", "5000"], "{limits}");
    daemon.stop();
}

/// With the capabilities of the unit, and no others: root without them is an ordinary user to the files of others.
fn the_unit_reads_the_files_of_a_user(engine: &Arc<Engine>) {
    const USER: u32 = 65_534;
    let unit = fs::read_to_string(tools::repository("deploy/imds-router.service")).expect("it is there");
    let capabilities = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="));
    let capabilities: Vec<String> = capabilities
        .expect("the unit has capabilities")
        .split(' ')
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let bounding_set = format!("--bounding-set=-all,{}", capabilities.join(","));
    let directory = aws_directory(engine);
    let keys = format!("[default]\naws_access_key_id = AKIATRIALUSER\naws_secret_access_key = {FILE_SECRET}\n");
    write(&directory.join("credentials"), &keys, 0o600);
    for path in [directory.join("credentials"), directory.clone()] {
        std::os::unix::fs::chown(&path, Some(USER), Some(USER)).expect("root may give it away");
    }
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).expect("its mode");

    let environment = engine.moto().daemon_environment().into_iter();
    let environment: Vec<_> = environment
        .filter(|(name, _)| !name.starts_with("AWS_ACCESS") && !name.starts_with("AWS_SECRET"))
        .collect();
    let config = format!("[credentials]\naws_dir = '{}'", directory.display());
    let by = ["setpriv", &bounding_set, "--inh-caps=-all"];
    let daemon = Daemon::start_by(engine, &by, &config, &environment);
    let container = engine.run("of-user").label("imds.role", "app").start();
    let (role, _) = credentials(&container);
    assert_eq!(role, "app");
    let status = daemon.status();
    let own = status["bases"]
        .as_array()
        .expect("a list")
        .iter()
        .find(|base| base["profile"].is_null());
    let own = own.unwrap_or_else(|| panic!("no base of the daemon itself: {status}"));
    assert_eq!(
        (&own["state"], &own["origin"]),
        (&"good".into(), &"profile default (keys)".into()),
        "{own}"
    );
    daemon.stop();
}

/// The one role of a container, and its credentials, as soon as there are some.
fn credentials(container: &Container) -> (String, Value) {
    poll(SOON, &format!("credentials of {}", container.name()), || {
        now(container).ok()
    })
}

/// The same, or the status of the role list.
fn now(container: &Container) -> Result<(String, Value), u16> {
    let list = container.get(LIST, &[]);
    if list.status != 200 {
        return Err(list.status);
    }
    let document = container.get(&format!("{LIST}{}", list.body), &[]);
    let document = serde_json::from_str(&document.body).map_err(|_| document.status)?;
    Ok((list.body, document))
}

fn base<'a>(status: &'a Value, profile: &str) -> Option<&'a Value> {
    let bases = status["bases"].as_array().expect("a list");
    bases.iter().find(|base| base["profile"] == profile)
}

fn container<'a>(status: &'a Value, name: &str) -> &'a Value {
    let containers = status["containers"].as_array().expect("a list");
    containers.iter().find(|it| it["name"] == name).expect("it is there")
}

fn profiles_and_files_that_change(engine: &Arc<Engine>) {
    let directory = aws_directory(engine);
    let keys = format!("[keys]\naws_access_key_id = AKIATRIALKEYS\naws_secret_access_key = {FILE_SECRET}\n");
    write(&directory.join("credentials"), &keys, 0o600);
    let admin = |account: &str| {
        format!("[profile admin]\nrole_arn = arn:aws:iam::{account}:role/admin\nsource_profile = keys\n")
    };
    write(&directory.join("config"), &admin("444455556666"), 0o644);
    let daemon = daemon(engine, &directory);

    // A profile as it is: its long-lived keys are exchanged.
    let as_it_is = engine.run("as-it-is").label("imds.profile", "keys").start();
    let (_, document) = credentials(&as_it_is);
    assert!(document["AccessKeyId"] != "AKIATRIALKEYS" && document["SecretAccessKey"] != FILE_SECRET);
    assert!(document["Token"].as_str().is_some_and(|token| !token.is_empty()));
    let secret = |key: &str| document[key].as_str().unwrap_or_default().to_owned();
    run::remember_secrets(vec![secret("SecretAccessKey"), secret("Token")]);

    // A role by name is in the account of the profile that asks for it, here a role itself.
    let by_role = engine
        .run("by-role")
        .label("imds.profile", "admin")
        .label("imds.role", "app")
        .start();
    let (role, first) = credentials(&by_role);
    assert_eq!(role, "app");
    let account = |name: &str| {
        container(&daemon.status(), name)["role"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(account("by-role"), "arn:aws:iam::444455556666:role/app");
    let status = daemon.status();
    let shown = base(&status, "admin").expect("it is shown");
    assert_eq!(shown["state"], "good", "{shown}");
    assert_eq!(
        shown["origin"], "profile admin (keys, role arn:aws:iam::444455556666:role/admin)",
        "{shown}"
    );
    assert_eq!(shown["arn"], "arn:aws:sts::444455556666:assumed-role/admin/imds-router");

    // A profile that is not there yet, and a file that is written while the daemon runs.
    let late = engine
        .run("late")
        .label("imds.profile", "late")
        .label("imds.role", "app")
        .start();
    poll(SOON, "the reason", || {
        let status = daemon.status();
        let problems = container(&status, "late")["problems"].to_string();
        problems.contains("there is no profile \\\"late\\\"").then_some(())
    });
    assert_eq!(now(&late).expect_err("none yet"), 404);
    let config = format!(
        "{}[profile late]\nrole_arn = arn:aws:iam::777788889999:role/late\nsource_profile = keys\n",
        admin("222233334444")
    );
    write(&directory.join("config"), &config, 0o644);
    let changed = Instant::now();
    assert_eq!(credentials(&late).0, "app");
    println!("a changed file counted after {:?}", changed.elapsed());
    assert_eq!(account("late"), "arn:aws:iam::777788889999:role/app");
    // The other profile leads elsewhere now, and with it roles by name.
    poll(SOON, "the other account", || {
        (account("by-role") == "arn:aws:iam::222233334444:role/app").then_some(())
    });
    let second = poll(SOON, "credentials of the other account", || {
        now(&by_role)
            .ok()
            .filter(|(_, it)| it["AccessKeyId"] != first["AccessKeyId"])
    });
    assert_eq!(second.0, "app");

    // A file that others may write is not used any more; who has credentials keeps them.
    fs::set_permissions(directory.join("config"), fs::Permissions::from_mode(0o666)).expect("its mode");
    poll(SOON, "the refusal", || {
        let status = daemon.status();
        let error = base(&status, "admin")?["error"].to_string();
        error
            .contains("others may write it (mode 0666); chmod go-w")
            .then_some(())
    });
    assert_eq!(
        now(&by_role).expect("it has them").1["AccessKeyId"],
        second.1["AccessKeyId"]
    );
    let refused = engine
        .run("refused")
        .label("imds.profile", "admin")
        .label("imds.role", "arn:aws:iam::111122223333:role/x")
        .start();
    assert_eq!(now(&refused).expect_err("none"), 404);
    // What runs a program needs to be allowed.
    write(
        &directory.join("config"),
        "[profile admin]\ncredential_process = touch /tmp/it-was-run-by-imds-router\n",
        0o644,
    );
    poll(SOON, "the other refusal", || {
        let status = daemon.status();
        let error = base(&status, "admin")?["error"].to_string();
        error
            .contains("credential_process runs a program; [credentials] allow_process")
            .then_some(())
    });
    assert!(!Path::new("/tmp/it-was-run-by-imds-router").exists());
    write(&directory.join("config"), &admin("444455556666"), 0o644);
    assert_eq!(credentials(&refused).0, "x");
    daemon.stop();
}

fn what_a_person_hands_over(engine: &Arc<Engine>) {
    let directory = aws_directory(engine);
    let config = "[sso-session corp]\nsso_start_url = https://corp.awsapps.com/start\nsso_region = eu-west-1\n\
                  [profile dev]\nsso_session = corp\nsso_account_id = 111122223333\nsso_role_name = Dev\n";
    write(&directory.join("config"), config, 0o600);
    let daemon = daemon(engine, &directory);
    let role = "arn:aws:iam::111122223333:role/app";
    let app = engine
        .run("app")
        .label("imds.profile", "dev")
        .label("imds.role", role)
        .label("imds.role.external-id", "between-us")
        .label("imds.role.session-tag.team", "a")
        .start();
    // Nobody has logged in: that is said, with what to do, and nothing hangs.
    poll(SOON, "the state", || {
        let status = daemon.status();
        let dev = base(&status, "dev")?;
        (dev["state"] == "needs attention" && dev["command"] == "aws sso login --profile dev").then_some(())
    });
    let asked = Instant::now();
    let reply = app.get(LIST, &[]);
    assert_eq!(reply.status, 404);
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    let hint = reply.header("x-imds-router-hint").unwrap_or_default().to_owned();
    assert!(hint.starts_with("base credentials need attention"), "{hint}");
    let shown = daemon.cli(&["status"]).ok();
    assert!(shown.contains("base dev: needs attention"), "{shown}");
    assert!(shown.contains("run: aws sso login --profile dev"), "{shown}");

    let login = |document: &str| daemon.cli_with_input(&["login", "--profile", "dev", "--stdin"], document);
    let document = |more: &str| {
        format!(r#"{{"Version":1,"AccessKeyId":"ASIATRIALHANDED","SecretAccessKey":"{HANDED_SECRET}"{more}}}"#)
    };
    let said = login(&document("")).fails();
    assert!(said.contains("not taken over: these are long-lived keys"), "{said}");
    let expired = document(&format!(
        r#","SessionToken":"{HANDED_TOKEN}","Expiration":"2020-01-01T00:00:00Z""#
    ));
    assert!(login(&expired).fails().contains("have expired already"));
    let wrong = login(&format!("export AWS_SECRET_ACCESS_KEY={HANDED_SECRET}"));
    assert_eq!(wrong.status.code(), Some(2), "{wrong}");
    assert!(
        wrong
            .stderr
            .contains("the JSON that `aws configure export-credentials` prints"),
        "{wrong}"
    );
    let good = document(&format!(
        r#","SessionToken":"{HANDED_TOKEN}","Expiration":"2100-01-01T00:00:00+00:00""#
    ));
    let said = login(&good).ok();
    assert!(
        said.starts_with("handed over for profile dev, until 2100-01-01"),
        "{said}"
    );
    assert_eq!(credentials(&app).0, "app");
    let status = daemon.status();
    let dev = base(&status, "dev").expect("it is shown");
    assert_eq!(dev["origin"], "handed over by imds-router login", "{dev}");
    assert_eq!(
        (&dev["state"], &dev["until"]),
        (&"good".into(), &"2100-01-01T00:00:00Z".into())
    );

    let trust = daemon.cli(&["explain", "app", "--trust-policy"]).ok();
    let (line, statement) = trust.split_once('\n').expect("a line, and the statement");
    assert_eq!(line, format!("{role} must have this statement in its trust policy:"));
    let statement: Value = serde_json::from_str(statement).expect("JSON");
    assert_eq!(
        statement["Action"],
        serde_json::json!(["sts:AssumeRole", "sts:TagSession"])
    );
    assert_eq!(statement["Condition"]["StringEquals"]["sts:ExternalId"], "between-us");
    assert!(
        statement["Principal"]["AWS"]
            .as_str()
            .is_some_and(|arn| arn.starts_with("arn:aws:")),
        "{statement}"
    );
    assert!(
        daemon
            .cli(&["explain", "nobody", "--trust-policy"])
            .fails()
            .contains("is called \"nobody\"")
    );
    daemon.stop();
}

/// Where Debian's libfaketime is: it moves the clock of one process, here the daemon's.
fn libfaketime() -> String {
    format!(
        "/usr/lib/{}-linux-gnu/faketime/libfaketimeMT.so.1",
        std::env::consts::ARCH
    )
}

fn clocks_that_jump(engine: &Arc<Engine>) {
    let moto = engine.moto();
    let directory = aws_directory(engine);
    let clock = directory.join("clock");
    write(&clock, "+0", 0o644);
    let mut environment = moto.daemon_environment();
    for (name, value) in [
        ("LD_PRELOAD", libfaketime()),
        ("FAKETIME_TIMESTAMP_FILE", clock.display().to_string()),
        ("FAKETIME_NO_CACHE", "1".to_owned()),
        // Boot time does not jump with wall time, nor do timers.
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
    ] {
        environment.push((name.to_owned(), value));
    }
    let daemon = Daemon::start(engine, "account_id = \"111122223333\"", &environment);
    let app = engine.run("app").label("imds.role", "app").start();
    let key = || now(&app).expect("credentials").1["AccessKeyId"].to_string();
    credentials(&app);
    let mut before = key();
    for (offset, seconds) in [("+36000", 36_000_i64), ("+0", 0), ("-36000", -36_000), ("+0", 0)] {
        write(&clock, offset, 0o644);
        // The very next request gets good ones: old, or new.
        let (asked, after) = (Instant::now(), key());
        println!("clock at {offset}: answered after {:?}", asked.elapsed());
        if seconds > 0 {
            assert_ne!(
                after, before,
                "ten hours later by this clock: not served without asking STS"
            );
        }
        poll(SOON, "the jump to be seen", || {
            let clock = daemon.status()["clock"].clone();
            let ahead = clock["ahead_of_aws"].as_i64()?;
            let seen = (ahead - seconds).abs() <= 3 && clock["last_shift_seconds"].as_i64()?.abs() >= 35_990;
            seen.then_some(())
        });
        before = key();
        let warned = daemon.status()["warnings"].to_string().contains("this clock is ");
        assert_eq!(warned, seconds != 0, "{}", daemon.status()["warnings"]);
    }
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
    daemon.stop();
}
