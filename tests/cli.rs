//! The built program, as people type it: what is wrong is said with its place, its value and what was expected, and the
//! exit code says whose mistake it is. Needs neither root nor Docker.

use std::fs;
use std::process::{Command, Output, Stdio};

/// Wrong usage or configuration, as design and `--help` have it.
const USAGE: i32 = 2;
const FAILED: i32 = 1;

/// The configuration of every call, in its working directory: errors can then be compared letter by letter.
const FILE: &str = "imds.toml";

struct Case {
    name: &'static str,
    config: Option<&'static str>,
    variable: Option<(&'static str, &'static str)>,
    arguments: &'static [&'static str],
    /// All of stderr.
    says: &'static str,
}

const fn file(name: &'static str, config: &'static str, says: &'static str) -> Case {
    Case {
        name,
        config: Some(config),
        variable: None,
        arguments: &["serve", "--config", FILE],
        says,
    }
}

const fn variable(name: &'static str, value: &'static str, says: &'static str) -> Case {
    Case {
        name,
        config: None,
        variable: Some((name, value)),
        arguments: &["serve"],
        says,
    }
}

const fn typed(name: &'static str, arguments: &'static [&'static str], says: &'static str) -> Case {
    Case {
        name,
        config: None,
        variable: None,
        arguments,
        says,
    }
}

const WRONG: &[Case] = &[
    file(
        "unknown key",
        "[docker]\nlabel_prefix = \"imds\"\n\n[serve]\nmax_wiat = \"200ms\"\n",
        "imds-router: imds.toml, line 5: unknown key serve.max_wiat; did you mean serve.max_wait?\n",
    ),
    file(
        "unknown section",
        "region = \"eu-west-1\"\n\n[credential]\nprofile = \"dev\"\n",
        "imds-router: imds.toml, line 3: unknown key credential; did you mean credentials?\n",
    ),
    file(
        "nothing near",
        "[qqq]\n",
        "imds-router: imds.toml, line 1: unknown key qqq\n",
    ),
    file(
        "bad ARN",
        "[roles]\nweb = \"arn:aws:iam::111122223333:role/web\"\norders = \"arn:aws:iam::12:role/orders\"\n",
        "imds-router: imds.toml, line 3: roles.orders = \"arn:aws:iam::12:role/orders\": expected a role ARN\n",
    ),
    file(
        "bad account",
        "[accounts]\nprod = \"4444\"\n",
        "imds-router: imds.toml, line 2: accounts.prod = \"4444\": expected an account id: 12 digits in quotes\n",
    ),
    file(
        "duration without a unit",
        "[credentials]\nduration = \"90\"\n",
        "imds-router: imds.toml, line 2: credentials.duration = \"90\": \
         expected a duration from 15m to 12h (STS's own bounds)\n",
    ),
    file(
        "duration out of bounds",
        "[credentials]\nduration = \"13h\"\n",
        "imds-router: imds.toml, line 2: credentials.duration = \"13h\": \
         expected a duration from 15m to 12h (STS's own bounds)\n",
    ),
    file(
        "bad choice",
        "[imds]\nhttp_tokens = \"require\"\n",
        "imds-router: imds.toml, line 2: imds.http_tokens = \"require\": expected \"optional\" or \"required\"\n",
    ),
    file(
        "relative path",
        "[serve]\nadmin_socket = \"admin.sock\"\n",
        "imds-router: imds.toml, line 2: serve.admin_socket = \"admin.sock\": expected an absolute path\n",
    ),
    file(
        "metrics for everybody",
        "[serve]\nmetrics = \"0.0.0.0:9254\"\n",
        "imds-router: imds.toml, line 2: serve.metrics = \"0.0.0.0:9254\": \
         expected a loopback address and a port, such as \"127.0.0.1:9254\"\n",
    ),
    file(
        "not TOML",
        "[serve\n",
        "imds-router: imds.toml, line 1: not TOML: unclosed table, expected `]`\n",
    ),
    Case {
        name: "what check reads",
        config: Some("[serve]\nmax_wiat = \"200ms\"\n"),
        variable: None,
        arguments: &["check", "--config", FILE],
        says: "imds-router: imds.toml, line 2: unknown key serve.max_wiat; did you mean serve.max_wait?\n",
    },
    typed(
        "no file",
        &["serve", "--config", "nowhere.toml"],
        "imds-router: cannot read the configuration nowhere.toml: No such file or directory (os error 2)\n\
         hint: --config names another file; without one, all defaults hold\n",
    ),
    // A directory: root may read every file.
    typed(
        "unreadable file",
        &["serve", "--config", "."],
        "imds-router: cannot read the configuration .: it is a directory; expected a regular file\n\
         hint: --config names another file; without one, all defaults hold\n",
    ),
    variable(
        "IMDS_ROUTER_SERVE_MAX_WAIT",
        "5s",
        "imds-router: variable IMDS_ROUTER_SERVE_MAX_WAIT: serve.max_wait = \"5s\": \
         expected a duration from 50ms to 900ms: the strictest SDK gives up at 500ms, most at 1s\n",
    ),
    variable(
        "IMDS_ROUTER_IMDS_HTTP_TOKEN",
        "required",
        "imds-router: variable IMDS_ROUTER_IMDS_HTTP_TOKEN: unknown key IMDS_ROUTER_IMDS_HTTP_TOKEN; \
         did you mean IMDS_ROUTER_IMDS_HTTP_TOKENS?\n",
    ),
    variable(
        "IMDS_ROUTER_CONFIG",
        "nowhere.toml",
        "imds-router: cannot read the configuration nowhere.toml: No such file or directory (os error 2)\n\
         hint: --config names another file; without one, all defaults hold\n",
    ),
    variable(
        "DOCKER_HOST",
        "ssh://host",
        "imds-router: variable DOCKER_HOST: docker.host = \"ssh://host\": \
         expected unix:///path/to/docker.sock or tcp://host:port\n",
    ),
    file(
        "type of a value",
        "[credentials]\nconcurrent_calls = \"16\"\n",
        "imds-router: imds.toml, line 2: credentials.concurrent_calls = \"16\": \
         expected a whole number from 1 to 64, without quotes\n",
    ),
    file(
        "two kinds of user data",
        "[imds]\nuser_data = \"a\"\nuser_data_base64 = \"YQ==\"\n",
        "imds-router: imds.toml, line 3: imds.user_data_base64: expected one of imds.user_data, imds.user_data_base64, \
         imds.user_data_file; imds.user_data is at imds.toml, line 2\n",
    ),
    file(
        "no file of metadata",
        "[metadata]\nfile = \"nowhere.json\"\n",
        "imds-router: imds.toml, line 2: metadata.file = \"nowhere.json\": No such file or directory (os error 2)\n",
    ),
    typed(
        "bad value of a flag",
        &["serve", "--region", "europe"],
        "imds-router: flag --region: region = \"europe\": expected an AWS region such as \"eu-west-1\"\n",
    ),
    typed(
        "bad choice of a flag",
        &["serve", "--log-format", "xml"],
        "error: invalid value 'xml' for '--log-format <LOG_FORMAT>'\n  [possible values: text, json]\n\n\
         For more information, try '--help'.\n",
    ),
    typed(
        "unknown flag",
        &["serve", "--offlien"],
        "error: unexpected argument '--offlien' found\n\n  tip: a similar argument exists: '--offline'\n\n\
         Usage: imds-router serve --offline\n\nFor more information, try '--help'.\n",
    ),
    typed(
        "unknown verb",
        &["serv"],
        "error: unrecognized subcommand 'serv'\n\n  tip: a similar subcommand exists: 'serve'\n\n\
         Usage: imds-router <COMMAND>\n\nFor more information, try '--help'.\n",
    ),
    typed(
        "nothing handed over",
        &["login", "--stdin", "--admin", "admin.sock"],
        "imds-router: this is not what was expected: the JSON that `aws configure export-credentials` prints, with AccessKeyId, \
         SecretAccessKey, SessionToken and Expiration\n",
    ),
    file(
        "calls at once",
        "[credentials]\nconcurrent_calls = 0\n",
        "imds-router: imds.toml, line 2: credentials.concurrent_calls = \"0\": expected a whole number from 1 to 64\n",
    ),
    file(
        "directory of the AWS files",
        "[credentials]\naws_dir = \".aws\"\n",
        "imds-router: imds.toml, line 2: credentials.aws_dir = \".aws\": expected an absolute path\n",
    ),
    typed(
        "path that is none",
        &["get", "/latest/a b"],
        "imds-router: \"/latest/a b\" is not a path: expected visible characters without blanks\n",
    ),
];

#[test]
#[cfg(target_os = "linux")]
fn what_is_wrong_is_said_with_place_value_and_expectation() {
    let mut wrong = Vec::new();
    for case in WRONG {
        let directory = tempfile::tempdir().expect("there is room for temporary files");
        if let Some(text) = case.config {
            fs::write(directory.path().join(FILE), text).expect("the new directory is writable");
        }
        let mut command = imds_router(case.arguments);
        command.current_dir(&directory).envs(case.variable);
        let done = run(command);
        let said = text(&done.stderr);
        if done.status.code() != Some(USAGE) || said != case.says || !done.stdout.is_empty() {
            wrong.push(format!(
                "{}: {}\n{said}--- expected exit code {USAGE}, and:\n{}",
                case.name, done.status, case.says
            ));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// A named pipe that no process writes to.
#[test]
#[cfg(target_os = "linux")]
fn a_pipe_in_place_of_a_file_is_an_error_at_once() {
    let directory = tempfile::tempdir().expect("there is room for temporary files");
    let path = |name: &str| directory.path().join(name);
    let pipe = path("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("it is new");
    fs::create_dir(path("state")).expect("it is new");
    fs::rename(&pipe, path("state/token.key")).expect("it exists");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).expect("it is new");
    let pipe = pipe.to_str().expect("UTF-8");
    let state = path("state").display().to_string();
    let kind = "it is a named pipe; expected a regular file";
    for (arguments, variable, code, said) in [
        (
            &["serve", "--config", pipe][..],
            None,
            USAGE,
            format!("the configuration {pipe}: {kind}"),
        ),
        (
            &["check", "--compose", pipe],
            None,
            USAGE,
            format!("cannot read {pipe}: {kind}"),
        ),
        (
            &["serve", "--metadata-file", pipe],
            None,
            USAGE,
            format!("metadata.file = {pipe:?}: {kind}"),
        ),
        (
            &["serve"],
            Some(("IMDS_ROUTER_IMDS_USER_DATA_FILE", pipe)),
            USAGE,
            "expected an absolute path of a readable file".to_owned(),
        ),
        (
            &["serve"],
            Some(("IMDS_ROUTER_SERVE_STATE_DIR", state.as_str())),
            FAILED,
            format!("{state}/token.key: cannot be trusted: {kind}"),
        ),
    ] {
        let mut command = Command::new("timeout");
        command
            .arg("10")
            .arg(env!("CARGO_BIN_EXE_imds-router"))
            .args(arguments)
            .env_clear();
        command
            .env("IMDS_ROUTER_SERVE_STATE_DIR", "/dev/null/none")
            .envs(variable);
        let done = run(command);
        assert_eq!(done.status.code(), Some(code), "{arguments:?}: {done:?}");
        let stderr = text(&done.stderr);
        assert!(stderr.contains(&said), "{said:?} is not in {stderr}");
    }
}

#[test]
#[cfg(target_os = "linux")]
fn a_compose_file_may_come_from_a_pipe_of_the_shell() {
    let mut command = Command::new("bash");
    let script = "\"$1\" check --offline --compose <(echo '{ name: a, services: { web: { image: web } } }')";
    command.args(["-c", script, "bash", env!("CARGO_BIN_EXE_imds-router")]);
    command.env_remove("IMDS_ROUTER_CONFIG");
    let done = run(command);
    assert!(done.status.success(), "{done:?}");
    assert!(text(&done.stdout).contains("a-web-1: not served"), "{done:?}");
}

#[test]
fn help_and_version_are_no_failure() {
    let done = run(imds_router(&["--version"]));
    assert!(done.status.success(), "{done:?}");
    assert_eq!(
        text(&done.stdout),
        format!("imds-router {}\n", env!("CARGO_PKG_VERSION"))
    );

    let done = run(imds_router(&["--help"]));
    assert!(done.status.success(), "{done:?}");
    let help = text(&done.stdout);
    for verb in [
        "serve",
        "check",
        "intercept",
        "status",
        "explain",
        "login",
        "get",
        "wait",
        "health",
    ] {
        assert!(
            help.contains(&format!("\n  {verb} ")),
            "{verb} is not in the help:\n{help}"
        );
        let done = run(imds_router(&[verb, "--help"]));
        assert!(
            done.status.success() && text(&done.stdout).contains("Usage: imds-router"),
            "{done:?}"
        );
    }
    assert!(
        help.ends_with("Exit codes: 0 fine, 1 failed, 2 wrong usage or configuration.\n"),
        "{help}"
    );
}

/// `check --compose -` with this on standard input.
#[cfg(target_os = "linux")]
fn check_compose(input: &str) -> Output {
    use std::io::Write as _;
    let mut command = imds_router(&["check", "--offline", "--compose", "-"]);
    let command = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("the program has been built");
    let mut stdin = child.stdin.take().expect("it is piped");
    stdin.write_all(input.as_bytes()).expect("it reads all");
    drop(stdin);
    child.wait_with_output().expect("it ends")
}

#[test]
#[cfg(target_os = "linux")]
fn a_compose_file_is_checked_without_an_engine() {
    let done = check_compose(
        "name: shop\nservices:\n  orders:\n    labels: { imds.role: orders }\n  web: { image: web }\n  \
         typo:\n    labels: [ imds.rol=x ]\n",
    );
    assert_eq!(done.status.code(), Some(FAILED), "{done:?}");
    let said = text(&done.stdout);
    for line in [
        "\nshop-orders-1: arn:aws:iam::000000000000:role/orders",
        "\nshop-web-1: not served",
        "\nshop-typo-1: no credentials: unknown label imds.rol",
        "\n3 services\n",
    ] {
        assert!(said.contains(line), "{line:?} is not in:\n{said}");
    }
    assert_eq!(
        text(&done.stderr),
        "imds-router: 1 of the containers above do not get what they ask for\n"
    );

    let done = check_compose("orders: {}\n");
    assert_eq!(done.status.code(), Some(USAGE), "{done:?}");
    let said = text(&done.stderr);
    assert!(
        said.starts_with("imds-router: not what `docker compose config` prints: "),
        "{said}"
    );
    assert!(
        said.ends_with("hint: docker compose config | imds-router check --compose -\n"),
        "{said}"
    );
}

/// Input of `check --compose -`, and all lines of the output between the first, on rules, and the count of services.
#[cfg(target_os = "linux")]
const COMPOSED: &[(&str, &str)] = &[
    (
        "services: { web: { labels: { imds.role: app } } }",
        "warning: the file has no name of a project: rules and templates that use the project are checked without it; \
         COMPOSE_PROJECT_NAME=NAME sets it\nweb-1: arn:aws:iam::000000000000:role/app as web-1@HOST\n",
    ),
    (
        "{ name: p, services: { web: { labels: null } } }",
        "p-web-1: not served: no label of ours, or its endpoint is disabled\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: } } } }",
        "p-web-1: no credentials: label imds.role=\"\": expected a role ARN, name, name@account or alias\n",
    ),
    (
        "{ name: p, services: { web: { labels: [ imds.role ] } } }",
        "p-web-1: no credentials: label imds.role=\"\": expected a role ARN, name, name@account or alias\n",
    ),
    (
        "{ name: p, services: { web: { deploy: { labels: { imds.role: app, team: a } } } } }",
        "p-web-1: not served: no label of ours, or its endpoint is disabled\n\
         p-web-1: deploy.labels has imds.role: a label of the swarm service, not of its containers; move it to labels:\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: app, imds.role.duration: 3600 } } } }",
        "p-web-1: arn:aws:iam::000000000000:role/app as p-web-1@HOST\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: app, imds.role.duration: 1h30m } } } }",
        "p-web-1: arn:aws:iam::000000000000:role/app as p-web-1@HOST\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: app, imds.role.duration: 899 } } } }",
        "p-web-1: no credentials: label imds.role.duration=\"899\": expected a duration from 15m to 12h (STS's own bounds)\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.user-data-base64: \"aGVs\\nbG8=\\n\" } } } }",
        "p-web-1: metadata, no role\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: role/web } } } }",
        "p-web-1: no credentials: \"role/web\" is a part of an ARN: expected web, or for a role with the path /role/ its whole \
         ARN\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn } } } }",
        "p-web-1: no credentials: \"nnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnnn\" is not the name of a \
         role: it has 70 characters; expected at most 64\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: app, imds.availability-zone: ap-northeast-1d } } } }",
        "p-web-1: arn:aws:iam::000000000000:role/app as p-web-1@HOST\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: app, imds.availability-zone: us-west-2-lax-1a } } } }",
        "p-web-1: arn:aws:iam::000000000000:role/app as p-web-1@HOST\n",
    ),
    (
        "{ name: p, services: { web: { labels: { imds.role: app, imds.availability-zone: eu-west } } } }",
        "p-web-1: no credentials: label imds.availability-zone=\"eu-west\": expected a zone such as eu-west-1a, \
         us-west-2-lax-1a or us-east-1-wl1-bos-wlz-1\n",
    ),
];

#[test]
#[cfg(target_os = "linux")]
fn check_compose_says_what_each_service_gets() {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut wrong = Vec::new();
    for (input, expected) in COMPOSED {
        let done = check_compose(input);
        let said = text(&done.stdout);
        let lines: Vec<&str> = said.split_inclusive('\n').collect();
        let between = lines.get(1..lines.len().max(2) - 1).unwrap_or_default().concat();
        if between != expected.replace("HOST", &host) {
            wrong.push(format!(
                "{input}\n{said}{}--- expected:\n{expected}",
                text(&done.stderr)
            ));
        }
        let is_wrong = said.contains("no credentials") || said.contains("deploy.labels");
        assert_eq!(done.status.success(), !is_wrong, "{input}: {done:?}");
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
#[cfg(target_os = "linux")]
fn labels_of_another_type_are_said_with_their_service() {
    let done = check_compose("{ name: p, services: { web: { labels: 5 } } }");
    assert_eq!(done.status.code(), Some(USAGE), "{done:?}");
    assert_eq!(
        text(&done.stderr),
        "imds-router: not what `docker compose config` prints: service web: labels: expected a mapping, or a list of \
         NAME=VALUE\nhint: docker compose config | imds-router check --compose -\n"
    );
}

#[test]
fn status_without_a_daemon_says_what_to_do() {
    let directory = tempfile::tempdir().expect("there is room for temporary files");
    for flags in [&["status"][..], &["status", "--json"], &["health"]] {
        let mut command = imds_router(flags);
        command.current_dir(&directory).args(["--admin", "admin.sock"]);
        let done = run(command);
        assert_eq!(done.status.code(), Some(FAILED), "{done:?}");
        assert_eq!(text(&done.stdout), "");
        assert_eq!(
            text(&done.stderr),
            "imds-router: no imds-router answers on admin.sock: No such file or directory (os error 2)\n\
             hint: is `imds-router serve` running? --admin names another socket; sudo, if it belongs to root\n"
        );
    }
}

/// `login --stdin` waits for its input, with a secret to come. The files of a process that is not dumpable belong to root
/// (proc(5)), and an exit status says whether the kernel dumped core.
#[test]
#[cfg(target_os = "linux")]
fn no_verb_dumps_core() {
    use std::os::fd::AsRawFd as _;
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
    use std::time::{Duration, Instant};

    use rustix::process::{Pid, Signal, geteuid, kill_process};

    // By its descriptor: another user may have no way to the file.
    let program = fs::File::open(env!("CARGO_BIN_EXE_imds-router")).expect("the program has been built");
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command.args(["login", "--stdin", "--admin", "admin.sock"]).env_clear();
    command.stdin(Stdio::piped()).current_dir("/");
    if geteuid().is_root() {
        command.uid(65534).gid(65534);
    }
    let mut child = command.spawn().expect("it starts");
    let files = format!("/proc/{}", child.id());
    let protected = || {
        let limits = fs::read_to_string(format!("{files}/limits")).expect("it runs");
        let limit = limits.lines().find(|line| line.starts_with("Max core file size"));
        let limit = limit.expect("Linux has this limit").split_whitespace().nth(4);
        let owner = fs::metadata(format!("{files}/environ")).expect("it runs").uid();
        limit == Some("0") && owner == 0
    };
    let until = Instant::now() + Duration::from_secs(10);
    while !protected() {
        assert!(Instant::now() < until, "it is dumpable");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::ABORT).expect("it runs");
    let status = child.wait().expect("it ends");
    assert_eq!(status.signal(), Some(Signal::ABORT.as_raw()), "{status}");
    assert!(!status.core_dumped(), "{status}");
}

/// The program, in a clean environment. Should it ever take for right what a test holds for wrong, it must not begin to
/// serve the machine that the test runs on, as root perhaps: its state has no place to be in, which it finds out first.
fn imds_router(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_imds-router"));
    command
        .args(arguments)
        .env_clear()
        .env("IMDS_ROUTER_SERVE_STATE_DIR", "/dev/null/none");
    command
}

fn run(mut command: Command) -> Output {
    command
        .output()
        .unwrap_or_else(|e| panic!("cannot run {command:?}: {e}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("what it says is text")
}
