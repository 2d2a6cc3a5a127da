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
    let source = read("src/app/metrics.rs");
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
    let source = read("src/caller/mod.rs");
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
    for directory in ["deploy", ".github"] {
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
