//! The tables of the documentation and what the program knows are the same, and what is linked is there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use clap::{ArgAction, Command, CommandFactory as _, Parser as _};
use imds_router::cli::{Cli, Verb};
use imds_router::config::KEYS;
use imds_router::containers::labels;

/// Sections of the configuration whose keys are the user's own.
const TABLES: [&str; 5] = ["[roles]", "[accounts]", "[metadata]", "[public_keys]", "[[allow]]"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: impl AsRef<Path>) -> String {
    let file = file.as_ref();
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The cells of the first table below a heading of README, without its head.
fn rows(heading: &str) -> Vec<Vec<String>> {
    let readme = read("README.md");
    let lines = readme.lines().skip_while(|line| *line != heading);
    let table = lines
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'));
    let rows: Vec<Vec<String>> = table
        .skip(2)
        .map(|line| {
            // A bar that belongs to a cell is written \|.
            let line = line.replace("\\|", "\u{1}");
            let cells = line.trim_matches('|').split('|');
            cells.map(|cell| cell.trim().replace('\u{1}', "|")).collect()
        })
        .collect();
    assert!(rows.len() > 3, "README, {heading}: there is no table");
    rows
}

/// What stands between backticks.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_table_of_labels_is_what_is_read() {
    let rows = rows("### Labels");
    let documented: BTreeSet<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    let known: Vec<String> = labels::names().map(|name| format!("imds.{name}")).collect();
    assert_eq!(documented, known.iter().map(String::as_str).collect());
}

/// A key of the configuration as README has it.
struct Documented {
    flag: Option<String>,
    default: String,
}

/// Those of the table, by path.
fn documented_keys() -> BTreeMap<String, Documented> {
    let mut keys = BTreeMap::new();
    for row in rows("### Configuration") {
        let (flags, names): (Vec<&str>, Vec<&str>) = quoted(&row[0]).into_iter().partition(|it| it.starts_with("--"));
        let mut section = String::new();
        for name in names {
            let mut path = name.to_owned();
            if let Some((of, key)) = name.split_once(' ') {
                section = format!("{}.", of.trim_matches(['[', ']']));
                path = format!("{section}{key}");
            } else if !TABLES.contains(&name) {
                path = format!("{section}{name}");
            }
            let flag = flags.first().map(|flag| (*flag).to_owned());
            let default = row[1].replace('`', "");
            keys.insert(path, Documented { flag, default });
        }
    }
    keys
}

#[test]
fn the_table_of_the_configuration_is_what_is_read() {
    let documented = documented_keys();
    let known = KEYS.iter().map(|key| key.path).chain(TABLES);
    assert_eq!(
        documented.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        known.collect()
    );
    for key in KEYS {
        assert_eq!(documented[key.path].default, key.default, "{}", key.path);
    }
}

fn verb<'a>(cli: &'a Command, name: &str) -> &'a Command {
    cli.find_subcommand(name)
        .unwrap_or_else(|| panic!("README: there is no verb {name:?}"))
}

#[test]
fn the_flags_of_the_table_set_their_keys() {
    let cli = Cli::command();
    let mut flags = BTreeMap::new();
    for argument in verb(&cli, "serve").get_arguments() {
        let Some(name) = argument.get_long() else { continue };
        let flag = format!("--{name}");
        let value = match (argument.get_action(), name) {
            (ArgAction::Set, "log-format") => "json",
            (ArgAction::Set, _) => "x",
            _ => "",
        };
        let typed = ["imds-router", "serve", &flag, value];
        let typed = typed.into_iter().filter(|it| !it.is_empty());
        let Ok(Cli {
            verb: Verb::Serve(serve),
        }) = Cli::try_parse_from(typed)
        else {
            continue; // --help
        };
        flags.extend(
            serve
                .sources()
                .flags
                .into_iter()
                .map(|(flag, key, _)| (key.to_owned(), flag.to_owned())),
        );
    }
    let documented = documented_keys();
    let documented = documented.into_iter().filter_map(|(key, it)| Some((key, it.flag?)));
    assert_eq!(documented.collect::<BTreeMap<_, _>>(), flags);
}

#[test]
fn the_table_of_commands_is_what_can_be_typed() {
    let cli = Cli::command();
    let mut documented = BTreeSet::new();
    for row in rows("## Use it") {
        for command in quoted(&row[0]) {
            let (_, typed) = command.split_once("imds-router ").expect("the program's name");
            let mut words = typed.split([' ', '[', ']', '|']);
            let name = words.next().unwrap_or_default();
            let verb = verb(&cli, name);
            documented.insert(name.to_owned());
            for flag in words.filter_map(|word| word.strip_prefix("--")) {
                assert!(
                    verb.get_arguments().any(|it| it.get_long() == Some(flag)),
                    "README: {name} has no flag --{flag}"
                );
            }
        }
    }
    let known = cli.get_subcommands().map(|verb| verb.get_name().to_owned());
    assert_eq!(documented, known.collect());
}

#[test]
fn the_table_of_events_is_what_can_be_triggered() {
    let cli = Cli::command();
    let trigger = verb(&cli, "trigger");
    let event = trigger.get_arguments().find(|it| it.get_id() == "event");
    let known = event.expect("an event").get_possible_values();
    let rows = rows("### Events");
    let documented: BTreeSet<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    assert_eq!(documented, known.iter().map(|it| it.get_name()).collect());
}

/// By the source: names are given where a metric is registered.
#[test]
fn the_table_of_metrics_has_every_metric() {
    let source = read("src/daemon/metrics.rs");
    let known: Vec<&str> = source
        .split("registry.register")
        .skip(1)
        .filter_map(|call| call.split('"').nth(1))
        .collect();
    assert!(known.len() > 10, "{known:?}");
    let rows = rows("### Watching it");
    let documented: Vec<&str> = rows.iter().flat_map(|row| quoted(&row[0])).collect();
    for name in known {
        let found = documented.iter().any(|metric| {
            let metric = metric.split('{').next().unwrap_or_default();
            let metric = metric.trim_end_matches("_total").trim_end_matches("_seconds");
            metric.strip_prefix("imds_router_").or(metric.strip_prefix("…_")) == Some(name)
        });
        assert!(found, "README: {name} is not in the table of metrics");
    }
}

/// By the source, since only there all of them stand beside each other.
#[test]
fn the_table_of_refusals_has_every_reason() {
    let source = read("src/attribution/mod.rs");
    let body = source.split("pub fn reason(&self)").nth(1).expect("Refusal::reason");
    let arms = body.split("\n    }\n").next().unwrap_or_default();
    let known: BTreeSet<&str> = arms.split('"').skip(1).step_by(2).collect();
    assert!(known.len() > 10, "{known:?}");
    let readme = read("README.md");
    let heading = "| reason | is |";
    let table = readme.lines().skip_while(|line| *line != heading).skip(2);
    let documented = table
        .take_while(|line| line.starts_with('|'))
        .flat_map(|line| quoted(line.split('|').nth(1).unwrap_or_default()));
    assert_eq!(documented.collect::<BTreeSet<_>>(), known);
}

/// A heading's anchor, as GitHub makes it.
fn anchor(heading: &str) -> String {
    let kept = heading
        .trim()
        .chars()
        .filter(|it| it.is_alphanumeric() || " -_".contains(*it));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// Headings of a page, but not what looks like them within code.
fn anchors(page: &str) -> BTreeSet<String> {
    let prose = page.split("\n```").step_by(2);
    prose
        .flat_map(str::lines)
        .filter(|line| line.starts_with('#'))
        .map(|line| anchor(line.trim_start_matches('#')))
        .collect()
}

fn pages() -> Vec<PathBuf> {
    let mut pages = vec![PathBuf::from("README.md"), PathBuf::from("CHANGELOG.md")];
    for directory in ["deploy", "deploy/reference", ".github"] {
        let files = fs::read_dir(root().join(directory)).expect("it is there");
        let files = files.map(|file| file.expect("it can be read").file_name());
        pages.extend(files.map(|name| Path::new(directory).join(name)));
    }
    pages.retain(|page| page.extension().is_some_and(|it| it == "md"));
    assert!(pages.len() > 5, "{pages:?}");
    pages
}

#[test]
fn what_is_linked_is_there() {
    let mut broken = Vec::new();
    let mut links = 0;
    for page in pages() {
        let text = read(&page);
        // In README some stand in text that is broken over two lines.
        for link in text.replace('\n', " ").split("](").skip(1) {
            let link = link.split(')').next().unwrap_or_default();
            if link.starts_with("http") {
                continue;
            }
            links += 1;
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => page.clone(),
                _ => page.parent().unwrap_or(Path::new("")).join(file),
            };
            if !root().join(&target).exists() {
                broken.push(format!("{}: {link}: there is no such file", page.display()));
            } else if !heading.is_empty() && !anchors(&read(&target)).contains(heading) {
                broken.push(format!("{}: {link}: there is no such heading", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
    assert!(
        links > 10,
        "only {links} links were found: this no longer reads the pages"
    );
}

/// One sentence of the page of promises, or several that no test is about, with the comment that follows.
struct Claim<'a> {
    text: String,
    comment: &'a str,
}

/// The texts of paragraphs and list items, without headings.
fn blocks(markdown: &str) -> Vec<String> {
    let mut texts = vec![String::new()];
    for line in markdown.lines().filter(|line| !line.starts_with('#')) {
        if line.trim().is_empty() || line.starts_with("- ") {
            texts.push(String::new());
        }
        let text = texts.last_mut().expect("there is one");
        text.push_str(line.trim_start_matches("- ").trim());
        text.push(' ');
    }
    texts.retain(|text| !text.trim().is_empty());
    texts
}

/// All that a page claims. A paragraph or list item that ends without a comment has an empty one.
fn claims(page: &str) -> Vec<Claim<'_>> {
    let mut claims = Vec::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once("<!--") {
        let (comment, after) = after.split_once("-->").unwrap_or((after, ""));
        let mut texts = blocks(before);
        let text = texts.pop().unwrap_or_default();
        claims.extend(texts.into_iter().map(|text| Claim { text, comment: "" }));
        claims.push(Claim {
            text,
            comment: comment.trim(),
        });
        rest = after;
    }
    claims.extend(blocks(rest).into_iter().map(|text| Claim { text, comment: "" }));
    claims
}

/// How many sentences a text has: a full stop, and a capital letter or code after it.
fn sentences(text: &str) -> usize {
    let begins = |after: &str| after.starts_with(|c: char| c.is_uppercase() || c == '`' || c == '[');
    1 + text
        .match_indices(". ")
        .filter(|(at, _)| begins(&text[at + 2..]))
        .count()
}

/// The sources of all tests: of the trials on a real engine, and of the others by their path.
struct Tests {
    trials: BTreeMap<String, String>,
    others: BTreeMap<String, String>,
}

impl Tests {
    fn read() -> Self {
        let sources = |directory: &str| {
            let mut left = vec![root().join(directory)];
            let mut files = BTreeMap::new();
            while let Some(path) = left.pop() {
                if path.is_dir() {
                    left.extend(
                        fs::read_dir(&path)
                            .expect("it is there")
                            .map(|file| file.expect("a name").path()),
                    );
                } else if path.extension().is_some_and(|it| it == "rs") {
                    let below = path.strip_prefix(root().join(directory)).expect("it was found there");
                    let module = below.with_extension("").to_string_lossy().replace('/', "::");
                    files.insert(module.trim_end_matches("::mod").to_owned(), read(&path));
                }
            }
            files
        };
        let mut others = sources("src");
        for file in ["cli", "documentation", "house", "fuzz"] {
            if root().join(format!("tests/{file}.rs")).exists() {
                others.insert(format!("tests {file}"), read(format!("tests/{file}.rs")));
            }
        }
        others.extend(
            sources("tests/daemon")
                .into_iter()
                .map(|(module, text)| (format!("tests daemon::{module}"), text)),
        );
        Self {
            trials: sources("tests/engine"),
            others,
        }
    }

    /// Whether there is a trial or a test of that name.
    fn has(&self, name: &str) -> bool {
        let Some((module, test)) = name.rsplit_once("::") else {
            return false;
        };
        // Some trials are registered by the name of their file, or with a suffix that is filled in.
        let of_file = |(file, text): (&String, &String)| {
            let by_file = text.contains(&format!("\"{file}::{{"));
            text.contains(&format!("\"{name}\""))
                || text.contains(&format!("\"{name}::{{"))
                || (by_file && module == file && text.contains(&format!("(\"{test}\",")))
                || (by_file && module == file && text.contains(&format!("            \"{test}\",\n")))
        };
        if self.trials.iter().any(of_file) {
            return true;
        }
        let unit = module
            .strip_suffix("::tests")
            .map(|module| [module.to_owned(), format!("{module}::tests")]);
        let modules = unit
            .into_iter()
            .flatten()
            .chain([format!("tests {module}"), module.to_owned()]);
        let declared = |text: &String| {
            text.match_indices(&format!("fn {test}(")).any(|(at, _)| {
                let before = &text[..at];
                let item = before.rfind("\n\n").map_or(before, |start| &before[start..]);
                item.contains("#[test]") || item.contains("#[tokio::test")
            })
        };
        let mut found = modules.filter_map(|module| self.others.get(&module));
        found.any(declared)
    }
}

/// What is wrong with a page of promises.
fn unproven(page: &str, tests: &Tests) -> Vec<String> {
    let mut wrong = Vec::new();
    for Claim { text, comment } in claims(page) {
        let text = text.trim();
        match (comment.strip_prefix("tests:"), comment.strip_prefix("no test:")) {
            _ if text.is_empty() => wrong.push(format!("{comment}: follows no sentence")),
            (Some(_), _) if sentences(text) > 1 => wrong.push(format!("{text}: each sentence names its own tests")),
            (Some(names), _) => {
                let names = names.split(',').map(str::trim).filter(|name| !tests.has(name));
                wrong.extend(names.map(|name| format!("{text}: there is no test {name}")));
            }
            (None, Some(reason)) if !reason.trim().is_empty() => {}
            _ => wrong.push(format!(
                "{text}: expected <!-- tests: … --> or <!-- no test: reason --> after it"
            )),
        }
    }
    wrong
}

#[test]
fn every_promise_names_tests_that_exist() {
    let page = read("deploy/reference/security.md");
    let wrong = unproven(&page, &Tests::read());
    assert!(wrong.is_empty(), "deploy/reference/security.md:\n{}", wrong.join("\n"));
    let tested = claims(&page)
        .iter()
        .filter(|claim| claim.comment.starts_with("tests:"))
        .count();
    assert!(
        tested > 50,
        "only {tested} promises were found: this no longer reads the page"
    );
}

#[test]
fn the_check_of_promises_finds_what_is_wrong() {
    let tests = Tests::read();
    let page = "# Security\n\nNo comment at all.\n\n- A.\n  <!-- tests: TODO -->\n- B.\n- C. D.\n  \
        <!-- tests: cli::no_verb_dumps_core -->\n- E.\n  <!-- tests: cli::no_verb_dumps_core,\n       \
        secrecy::writes_no_core_dump, links::restores_what_is_removed, networks::ipv6, interception::cloud::tests::other_machines_are_none -->\n\n\
        ## More\n\nF. G.\n<!-- no test: advice -->\n\n- H.\n  <!-- no test: -->\n- I.\n  <!-- tests: cli::run, links::x, daemon::tests -->\n";
    let wrong = unproven(page, &tests);
    let wrong: Vec<&str> = wrong.iter().map(String::as_str).collect();
    let missing = "expected <!-- tests: … --> or <!-- no test: reason --> after it";
    assert_eq!(
        wrong,
        [
            &format!("No comment at all.: {missing}"),
            "A.: there is no test TODO",
            &format!("B.: {missing}"),
            "C. D.: each sentence names its own tests",
            &format!("H.: {missing}"),
            "I.: there is no test cli::run",
            "I.: there is no test links::x",
            "I.: there is no test daemon::tests",
        ]
    );
}

/// Files that deployments consist of.
fn deployments() -> Vec<PathBuf> {
    let mut files = Vec::new();
    for directory in [
        "deploy",
        "examples/compose",
        "examples/unprivileged",
        "examples/two-roles",
    ] {
        let entries = fs::read_dir(root().join(directory)).expect("it is there");
        let paths = entries.map(|entry| entry.expect("it can be listed").path());
        files.extend(paths.filter(|path| path.is_file()));
    }
    assert!(files.len() > 10, "{files:?}");
    files
}

#[test]
fn deployments_name_only_files_that_exist() {
    let mut missing = Vec::new();
    for file in deployments() {
        let text = fs::read_to_string(&file).expect("it is text");
        let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || "/._-*".contains(c)));
        let ours = words.filter(|word| ["deploy/", "examples/", "tests/"].iter().any(|it| word.starts_with(it)));
        for word in ours.map(|word| word.trim_end_matches(['.', '/'])) {
            let exists = match word.split_once('*') {
                Some((before, _)) => root().join(before).exists(),
                None => root().join(word).exists(),
            };
            if !exists {
                missing.push(format!("{}: {word}", file.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}

/// No registry has the image. A swarm builds none: deploy/README.md says how each host gets it.
#[test]
fn compose_builds_the_image_that_it_names() {
    let mut services = 0;
    for file in deployments() {
        let is_compose = file.file_name().is_some_and(|name| name == "compose.yaml");
        if !is_compose {
            continue;
        }
        let text = fs::read_to_string(&file).expect("it is text");
        let lines: Vec<&str> = text.lines().collect();
        for (at, _) in lines
            .iter()
            .enumerate()
            .filter(|(_, line)| line.trim() == "image: imds-router")
        {
            services += 1;
            let rest = lines[at + 1..].iter().take_while(|line| line.starts_with("    "));
            let build = rest.clone().find_map(|line| line.trim().strip_prefix("build: "));
            let build = build.unwrap_or_else(|| panic!("{}: no build for the image", file.display()));
            if build == "*build" {
                continue;
            }
            let context = build.split("context: ").nth(1).and_then(|rest| rest.split(',').next());
            let context = file
                .parent()
                .expect("it is in a directory")
                .join(context.expect("it has a context"));
            assert!(
                context.join("deploy/Dockerfile").exists(),
                "{}: {build}",
                file.display()
            );
            assert!(
                build.contains("dockerfile: deploy/Dockerfile"),
                "{}: {build}",
                file.display()
            );
        }
    }
    assert_eq!(services, 4);
}
