//! The rules of the house: who may see whom, and what stands in one place only. A rule is a row of a table; to break one,
//! change the row, and say why there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Who sees whom, outside of its own folder. A name on the left stands for the module and all below it, unless a row below
/// says more about one of these. On the right, `credentials` is what `credentials/mod.rs` has, its nouns; `interception::*` is
/// everything in the folder. `clock` and `logging` see nobody: they are leaves, and so is `interception`.
const MAP: &[(&str, &[&str])] = &[
    ("admin", &["descriptors", "logging"]),
    // The composition root sees everything it puts together, and nobody but the verbs sees it.
    (
        "daemon",
        &[
            "admin",
            "attribution::*",
            "clock",
            "config",
            "containers::*",
            "credentials::*",
            "descriptors",
            "files",
            "interception::*",
            "instance",
            "metadata::tree",
            "metadata::events",
            "metadata::identity_document",
            "metadata::crawl",
            "orders",
            "server",
            "logging",
            "protocol::*",
        ],
    ),
    ("attribution", &["containers", "containers::index", "descriptors"]),
    ("attribution::cgroup_watch", &["containers"]),
    // Keeps the link of a namespace in place, and says in the log when it cannot.
    (
        "attribution::attachment",
        &["clock", "containers", "descriptors", "logging"],
    ),
    // What stands in for the kernel behind the watcher's port where there is none to ask.
    (
        "attribution::engine_attestor",
        &["clock", "containers", "containers::reconciler"],
    ),
    // The real kernel behind the watcher's port.
    (
        "attribution::kernel_attestor",
        &[
            "clock",
            "containers",
            "containers::reconciler",
            "descriptors",
            "logging",
        ],
    ),
    ("attribution::cgroup", &["containers", "descriptors"]),
    ("cli", &["config", "logging"]),
    ("clock", &[]),
    // The rules of `[[allow]]` are read here, and STS's limits are kept.
    (
        "config",
        &[
            "credentials",
            "credentials::session_inputs",
            "credentials::allow_rules",
            "files",
            "metadata::tree",
            "metadata::aemm",
        ],
    ),
    // A container's life holds the instance that was resolved for it.
    ("containers", &["instance"]),
    (
        "containers::legacy_labels",
        &["config", "credentials", "credentials::session_inputs"],
    ),
    ("containers::docker", &["clock", "logging"]),
    ("containers::docker_http", &["logging"]),
    (
        "containers::labels",
        &[
            "config",
            "credentials",
            "credentials::session_inputs",
            "metadata::tree",
            "metadata::events",
            "metadata::zones",
        ],
    ),
    ("containers::reconciler", &["clock", "credentials", "instance"]),
    ("credentials", &[]),
    ("credentials::base", &["clock", "descriptors", "logging"]),
    ("credentials::broker", &["clock"]),
    ("credentials::files", &["files"]),
    ("credentials::instance_profile", &["logging"]),
    // How a role is typed is settled by the settings' aliases.
    ("credentials::role_reference", &["config"]),
    ("credentials::offline", &["clock"]),
    ("credentials::profile", &["config", "logging"]),
    ("credentials::sso", &["clock"]),
    ("credentials::sts", &["clock", "logging"]),
    ("descriptors", &[]),
    // A shortage of descriptors is no property of a namespace.
    ("interception::container_link", &["descriptors"]),
    ("files", &[]),
    // Firmware says which cloud a host belongs to.
    ("interception", &["files"]),
    (
        "instance",
        &[
            "config",
            "containers",
            "containers::compose",
            "containers::labels",
            "containers::label_sources",
            "credentials",
            "credentials::session_inputs",
            "credentials::role_reference",
            "credentials::offline",
            "credentials::allow_rules",
            "metadata::tree",
            "metadata::events",
            "metadata::zones",
        ],
    ),
    ("metadata", &[]),
    ("metadata::tree", &["clock", "credentials"]),
    ("metadata::events", &["clock"]),
    ("metadata::identity_document", &["clock"]),
    (
        "orders",
        &[
            "clock",
            "containers",
            "containers::index",
            "containers::reconciler",
            "instance",
            "metadata::events",
        ],
    ),
    (
        "server",
        &[
            "attribution",
            "attribution::ingress",
            "attribution::sock_diag",
            "clock",
            "containers",
            "containers::index",
            "containers::connection_slots",
            "credentials::broker",
            "descriptors",
            "instance",
            "metadata",
            "metadata::tree",
            "metadata::identity_document",
            "logging",
            "protocol::*",
        ],
    ),
    // The limit on lines needs the time.
    ("logging", &["clock"]),
    (
        "commands",
        &[
            "admin",
            "daemon",
            "daemon::check",
            "daemon::doctor",
            "cli",
            "config",
            "files",
            "interception::*",
            "logging",
        ],
    ),
    (
        "commands::imds_client",
        &["clock", "metadata::aemm", "metadata::crawl", "logging"],
    ),
    ("protocol", &[]),
    // A credentials document is written as all documents are.
    ("protocol::request", &["clock", "credentials", "metadata"]),
    ("protocol::token", &["clock", "containers"]),
];

/// Words that stand in these files only, tests apart; and what to do elsewhere.
const WORDS: &[(&str, &[&str], &str)] = &[
    (
        ".unwrap()",
        &[],
        "return an error; where it cannot fail, `expect` and say why",
    ),
    (
        "unsafe",
        &["main.rs", "attribution/ingress.rs"],
        "find the safe way: rustix, or another process",
    ),
    (
        "SystemTime::now",
        &["clock.rs"],
        "ask the Clock that you are given: tests set it",
    ),
    (
        "Instant::now",
        &["clock.rs"],
        "ask the Clock that you are given: tests set it",
    ),
    (
        ".elapsed()",
        &["clock.rs"],
        "ask the Clock that you are given: tests set it",
    ),
    (
        "println!",
        &["main.rs", "commands/mod.rs"],
        "tracing is for the log, and a verb returns or writes what it says",
    ),
    (
        "print!",
        &["main.rs", "commands/mod.rs"],
        "tracing is for the log, and a verb returns or writes what it says",
    ),
    (
        "eprintln!",
        &["main.rs", "commands/mod.rs"],
        "tracing is for the log; an error is returned, and printed once",
    ),
    (
        "eprint!",
        &["main.rs", "commands/mod.rs"],
        "tracing is for the log; an error is returned, and printed once",
    ),
    ("dbg!", &[], "tracing is for the log"),
    (
        "aws_config::defaults",
        &["credentials/base.rs"],
        "without a region that is given to it, it asks 169.254.169.254",
    ),
];

/// What may lie at the top of the repository, beside LICENSE* and what begins with a dot; `target` is cargo's, and ignored.
const TOP: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "src",
    "examples",
    "tests",
    "deploy",
    "README.md",
    "CHANGELOG.md",
    "target",
];

#[test]
fn nobody_sees_whom_it_may_not() {
    let house = House::read();
    let mut used = BTreeSet::new();
    let mut broken = Vec::new();
    for file in &house.files {
        let (found, edges) = house.check_map(file);
        broken.extend(found);
        used.extend(edges);
    }
    for (from, allowed) in MAP {
        if !house.modules.contains(*from) {
            broken.push(format!(
                "MAP of tests/house.rs: there is no module {from}: remove its row"
            ));
        }
        let stale = allowed
            .iter()
            .filter(|to| !used.contains(&((*from).to_owned(), (**to).to_owned())));
        broken.extend(stale.map(|to| format!("MAP of tests/house.rs: {from} → {to} is not used: remove it")));
    }
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn what_stands_in_one_place_stands_nowhere_else() {
    let broken: Vec<String> = House::read().files.iter().flat_map(check_words).collect();
    assert!(broken.is_empty(), "\n{}", broken.join("\n"));
}

#[test]
fn the_top_of_the_repository_has_only_what_belongs_there() {
    let names = fs::read_dir(env!("CARGO_MANIFEST_DIR"))
        .expect("the repository is there")
        .flatten();
    let strange: Vec<String> = names
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| !TOP.contains(&name.as_str()) && !name.starts_with('.') && !name.starts_with("LICENSE"))
        .collect();
    assert!(
        strange.is_empty(),
        "{strange:?} at the top of the repository: expected only {TOP:?}, LICENSE* and dot files"
    );
}

/// CI builds and tests with the oldest Rust that `Cargo.toml` supports.
#[test]
fn the_oldest_rust_is_the_same_everywhere() {
    let read = |file: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let version = env!("CARGO_PKG_RUST_VERSION");
    assert!(
        read("README.md").contains(&format!("Rust ({version} or newer)")),
        "README.md"
    );
    let ci = read(".github/workflows/ci.yml");
    assert!(
        ci.contains("sed -n 's/^rust-version = ") && ci.contains("\n      - run: .ci/run"),
        "ci.yml"
    );
}

/// Each mutant of tests/mutants changes one place, so that a change of the code cannot retire it unnoticed.
#[test]
fn every_mutant_applies() {
    #[derive(serde::Deserialize)]
    struct Mutants {
        mutant: Vec<Mutant>,
    }
    #[derive(serde::Deserialize)]
    struct Mutant {
        name: String,
        file: String,
        old: String,
        new: String,
        breaks: String,
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let table = fs::read_to_string(root.join("tests/mutants.toml")).expect("it is there");
    let table: Mutants = toml::from_str(&table).expect("a table of mutants");
    let mut names = BTreeSet::new();
    for mutant in table.mutant {
        let Mutant {
            name,
            file,
            old,
            new,
            breaks,
        } = mutant;
        let text = fs::read_to_string(root.join(&file)).unwrap_or_else(|error| panic!("{name}: {file}: {error}"));
        let places = text.matches(&old).count();
        assert_eq!(
            places, 1,
            "{name}: `old` must occur once in {file}; change the mutant with the code"
        );
        assert!(old != new && !breaks.is_empty(), "{name}");
        assert!(names.insert(name.clone()), "{name} stands twice");
    }
}

#[test]
fn the_check_itself_finds_what_is_wrong() {
    let mut house = House::read();
    let bad = r##"
        //! crate::daemon in a comment, and SystemTime::now, say nothing.
        use crate::{clock, config::{self, Settings as It}};
        use crate::credentials::{RoleArn, broker::Broker};
        const TEXT: &str = r#"crate::daemon " "#; const QUOTE: char = '"'; fn f<'a>() {}
        use super::daemon::run;
        fn g() { crate::interception::reconcile::install(); it.unwrap(); x.unwrap_or(1); /* unsafe */ tokio::time::Instant::now(); }
        #[cfg(test)]
        mod tests { use crate::daemon; fn f() { x.unwrap(); } }
        fn h() { crate::admin::serve() }
    "##;
    let file = SourceFile {
        name: "logging/mod.rs".to_owned(),
        module: "logging".to_owned(),
        code: code_of(bad),
    };
    house.files.clear();
    let (broken, _) = house.check_map(&file);
    let told: Vec<&str> = broken.iter().filter_map(|line| line.split(": ").nth(1)).collect();
    assert_eq!(
        told,
        [
            "logging → config",
            "logging → credentials",
            "logging → credentials::broker",
            "logging → daemon",
            "logging → interception::reconcile",
            "logging → admin",
        ]
    );
    assert_eq!(
        broken[4],
        "src/logging/mod.rs, line 7: logging → interception::reconcile: not on the map; logging may see clock (tests/house.rs, MAP)"
    );
    let words = check_words(&file);
    assert_eq!(words.len(), 2, "{words:?}");
    assert!(
        words[0].starts_with("src/logging/mod.rs, line 7: `.unwrap()`"),
        "{words:?}"
    );
    assert!(
        words[1].starts_with("src/logging/mod.rs, line 7: `Instant::now`"),
        "{words:?}"
    );

    let file = SourceFile {
        name: "protocol/mod.rs".to_owned(),
        module: "protocol".to_owned(),
        code: code_of("use super::config::KEYS;\nuse self::token::Token;\nuse crate::protocol::request;\n"),
    };
    let (broken, _) = house.check_map(&file);
    assert_eq!(broken.len(), 1, "{broken:?}");
    assert!(broken[0].contains("line 1: protocol → config"), "{broken:?}");
}

struct House {
    files: Vec<SourceFile>,
    /// `credentials`, `credentials::broker` …
    modules: BTreeSet<String>,
}

struct SourceFile {
    /// Below `src/`.
    name: String,
    module: String,
    /// Without comments, literals and tests; line for line.
    code: String,
}

impl House {
    fn read() -> House {
        let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut files: Vec<SourceFile> = rust_files(&src)
            .into_iter()
            .map(|path| {
                let below = path.strip_prefix(&src).expect("it was found there");
                let name = below.to_string_lossy().into_owned();
                let module = name.trim_end_matches(".rs").trim_end_matches("/mod").replace('/', "::");
                let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("cannot read {}: {e}", path.display()));
                SourceFile {
                    name,
                    module,
                    code: code_of(&text),
                }
            })
            .collect();
        // A module of tests in a file of its own.
        files.retain(|file| !file.module.ends_with("::tests"));
        assert!(!files.is_empty(), "there is nothing in {}", src.display());
        let modules = files.iter().map(|file| file.module.clone()).collect();
        House { files, modules }
    }

    /// What of a file breaks the map, and the edges of the map that it uses.
    fn check_map(&self, file: &SourceFile) -> (Vec<String>, Vec<(String, String)>) {
        let (mut broken, mut used) = (Vec::new(), Vec::new());
        // The outside of the house: it names what it passes on.
        if ["lib", "main"].contains(&file.module.as_str()) {
            return (broken, used);
        }
        let row = ancestors(&file.module).find_map(|name| MAP.iter().find(|(from, _)| *from == name));
        let Some((from, allowed)) = row else {
            return (
                vec![format!(
                    "src/{}: {} has no row in MAP of tests/house.rs",
                    file.name, file.module
                )],
                used,
            );
        };
        for (line, path) in paths(&file.code, &file.module) {
            let Some(to) = ancestors(&path).find(|name| self.modules.contains(*name)) else {
                continue;
            };
            if top(to) == top(&file.module) {
                continue;
            }
            let covers = |rule: &str| rule == to || rule.strip_suffix("::*").is_some_and(|folder| folder == top(to));
            match allowed.iter().find(|rule| covers(rule)) {
                Some(rule) => used.push(((*from).to_owned(), (*rule).to_owned())),
                None => broken.push(format!(
                    "src/{}, line {line}: {} → {to}: not on the map; {from} may see {} (tests/house.rs, MAP)",
                    file.name,
                    file.module,
                    if allowed.is_empty() {
                        "nobody".to_owned()
                    } else {
                        allowed.join(", ")
                    },
                )),
            }
        }
        broken.dedup(); // two names of one module
        (broken, used)
    }
}

fn check_words(file: &SourceFile) -> Vec<String> {
    let mut broken = Vec::new();
    for (number, line) in (1..).zip(file.code.lines()) {
        for (word, places, instead) in WORDS {
            if has_word(line, word) && !places.contains(&file.name.as_str()) {
                broken.push(format!(
                    "src/{}, line {number}: `{word}` belongs in {places:?} only: {instead}",
                    file.name
                ));
            }
        }
    }
    broken
}

fn has_word(line: &str, word: &str) -> bool {
    let part_of_name = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    line.match_indices(word).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + word.len()..].chars().next();
        (word.starts_with('.') || !part_of_name(before)) && !part_of_name(after)
    })
}

fn rust_files(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("sources can be read").flatten() {
        let path = entry.path();
        if path.is_dir() {
            files.extend(rust_files(&path));
        } else if path.extension().is_some_and(|it| it == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap_or(module)
}

/// `a::b::c`, `a::b`, `a`.
fn ancestors(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rsplit_once("::").map(|(parent, _)| parent))
}

/// Every path of this crate that the code names, from the root of the crate, and its line.
fn paths(code: &str, module: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    for root in ["crate::", "super::"] {
        for (at, _) in code.match_indices(root) {
            let before = code[..at].chars().next_back().unwrap_or(' ');
            // `$crate`, and `super::super::`, which is read from its beginning.
            if before.is_alphanumeric() || "_$:".contains(before) {
                continue;
            }
            let mut rest = &code[at..];
            let mut base = module;
            while let Some(after) = rest.strip_prefix("super::") {
                base = base.rsplit_once("::").map_or("", |(parent, _)| parent);
                rest = after;
            }
            if let Some(after) = rest.strip_prefix("crate::") {
                (base, rest) = ("", after);
            }
            let mut names = Vec::new();
            read_tree(rest, base, &mut names);
            let line = code[..at].matches('\n').count() + 1;
            found.extend(names.into_iter().map(|name| (line, name)));
        }
    }
    found.sort();
    found
}

/// Reads a path, or a tree of paths as `use` has it; returns what follows.
fn read_tree<'a>(mut rest: &'a str, prefix: &str, found: &mut Vec<String>) -> &'a str {
    let mut path = prefix.to_owned();
    loop {
        rest = rest.trim_start();
        if let Some(mut inside) = rest.strip_prefix('{') {
            loop {
                inside = inside.trim_start();
                if inside.starts_with('}') || inside.is_empty() {
                    return inside.strip_prefix('}').unwrap_or(inside);
                }
                inside = read_tree(inside, &path, found);
                // ` as Name`, and the comma.
                let end = inside.find([',', '}']).unwrap_or(inside.len());
                inside = inside[end..].strip_prefix(',').unwrap_or(&inside[end..]);
            }
        }
        let end = rest
            .find(|c: char| !c.is_alphanumeric() && c != '_')
            .unwrap_or(rest.len());
        let (name, after) = rest.split_at(end);
        if !name.is_empty() && name != "self" {
            path = if path.is_empty() {
                name.to_owned()
            } else {
                format!("{path}::{name}")
            };
        }
        match after.strip_prefix("::") {
            Some(after) if !name.is_empty() => rest = after,
            _ => {
                found.push(path);
                return after;
            }
        }
    }
}

/// The code of a source file, line for line: without comments, without what is in literals, without tests.
fn code_of(text: &str) -> String {
    let mut code = String::new();
    let mut rest = text;
    let mut before = ' ';
    while let Some(c) = rest.chars().next() {
        let length = literal_or_comment(rest, before).unwrap_or(0);
        if length > 0 {
            let (dropped, after) = rest.split_at(length);
            code.push(' ');
            code.extend(dropped.chars().filter(|c| *c == '\n'));
            (rest, before) = (after, ' ');
        } else {
            code.push(c);
            (rest, before) = (&rest[c.len_utf8()..], c);
        }
    }
    without_tests(&code)
}

/// How long the comment or literal is that starts here, if one does.
fn literal_or_comment(text: &str, before: char) -> Option<usize> {
    let until = |from: usize, end: &str| text[from..].find(end).map_or(text.len(), |at| from + at + end.len());
    if text.starts_with("//") {
        return Some(text.find('\n').unwrap_or(text.len()));
    }
    if text.starts_with("/*") {
        return Some(until(2, "*/"));
    }
    let quoted = |quote: char| {
        let mut escaped = false;
        for (at, c) in text.char_indices().skip(1) {
            if c == quote && !escaped {
                return at + 1;
            }
            escaped = c == '\\' && !escaped;
        }
        text.len()
    };
    match text.chars().next()? {
        '"' => Some(quoted('"')),
        // A lifetime is no literal: `'a` and no quote after it.
        '\'' if text[1..].starts_with('\\') || text[1..].chars().nth(1) == Some('\'') => Some(quoted('\'')),
        'r' if !before.is_alphanumeric() && before != '_' => {
            let hashes = text[1..].bytes().take_while(|byte| *byte == b'#').count();
            let opened = text[1 + hashes..].starts_with('"');
            opened.then(|| until(2 + hashes, &format!("\"{}", "#".repeat(hashes))))
        }
        _ => None,
    }
}

/// Blanks every item behind `#[cfg(test)]`.
fn without_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut kept = String::new();
    let mut rest = code;
    while let Some((before, item)) = rest.split_once(MARK) {
        kept.push_str(before);
        let mut depth = 0;
        let mut end = item.len();
        for (at, c) in item.char_indices() {
            depth += i32::from(c == '{') - i32::from(c == '}');
            if depth == 0 && (c == '}' || c == ';') {
                end = at + 1;
                break;
            }
        }
        kept.extend(item[..end].chars().filter(|c| *c == '\n'));
        rest = &item[end..];
    }
    kept + rest
}
