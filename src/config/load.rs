//! File, variables and flags → [`Settings`]; what means nothing is told with its place.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};

use super::schema::{KEYS, Key, RULE_KEYS, RawType, RawValue, TABLES, is_public_key};
use super::{Settings, metadata_path};
use crate::credentials::allow_rules::Rule;
use crate::credentials::{MAX_ROLE_NAME, RoleArn, long_role_name};
use crate::files;
use crate::metadata::aemm;

/// Where the configuration is read from when `--config` does not say.
pub const DEFAULT_FILE: &str = "/etc/imds-router/config.toml";
/// What variables of ours start with.
pub const ENV_PREFIX: &str = "IMDS_ROUTER_";
/// Variables with our prefix that are not configuration keys: they belong to the log and to the client verbs.
const OTHER_VARIABLES: &[&str] = &["IMDS_ROUTER_LOG", "IMDS_ROUTER_CONFIG"];

/// Where a value was typed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// In a file, at a line (from 1).
    File(PathBuf, usize),
    /// In an environment variable.
    Variable(String),
    /// In a flag.
    Flag(String),
}

impl Origin {
    /// Whether both are in a file, both are variables, or both are flags.
    fn same_place(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path, line) => write!(f, "{}, line {line}", path.display()),
            Self::Variable(name) => write!(f, "variable {name}"),
            Self::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// Why what was typed means nothing. The text has where, what was there, and what was expected.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}\nhint: --config names another file; without one, all defaults hold", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("{origin}: not TOML: {message}")]
    NotToml {
        /// Where.
        origin: Origin,
        /// The parser's words.
        message: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key {key}{nearest}")]
    UnknownKey {
        /// Where.
        origin: Origin,
        /// What was typed.
        key: String,
        /// `; did you mean …?`, or nothing.
        nearest: Suggestion,
    },
    /// The file of values.
    #[error("{origin}: metadata.file = {path:?}: {what}")]
    MetadataFile {
        /// The place that names the file.
        origin: Origin,
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        what: String,
    },
    /// A path that has no value of its own, or takes no such value.
    #[error("{origin}: {key}: {what}")]
    BadPath {
        /// Where.
        origin: Origin,
        /// Which key.
        key: String,
        /// What is wrong, and what was expected.
        what: String,
    },
    /// Keys of which only one can count.
    #[error("{origin}: {key}: expected one of {}; {} is at {other_origin}", keys.join(", "), other)]
    Exclusive {
        /// Where.
        origin: Origin,
        /// The second of the keys.
        key: &'static str,
        /// All keys of which only one can count.
        keys: &'static [&'static str],
        /// The first of them that is set.
        other: &'static str,
        /// The place of the first one.
        other_origin: Origin,
    },
    /// A value that the key does not take.
    #[error("{origin}: {key} = {value:?}: expected {expected}")]
    BadValue {
        /// Where.
        origin: Origin,
        /// Which key.
        key: String,
        /// What was typed.
        value: String,
        /// What it takes.
        expected: String,
    },
}

/// The nearest name to one that does not exist, as the end of a message.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Suggestion(pub Option<String>);

impl Suggestion {
    /// Looks for the name nearest to `typed`.
    pub fn among<'a>(typed: &str, names: impl IntoIterator<Item = &'a str>) -> Self {
        // Jaro-Winkler below 0.7 is a different word, not a typo.
        const SIMILAR: f64 = 0.7;
        let nearest = names
            .into_iter()
            .map(|name| (strsim::jaro_winkler(typed, name), name))
            .filter(|(similarity, _)| *similarity >= SIMILAR)
            .max_by(|a, b| a.0.total_cmp(&b.0));
        Self(nearest.map(|(_, name)| name.to_owned()))
    }
}

impl fmt::Display for Suggestion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(name) => write!(f, "; did you mean {name}?"),
            None => Ok(()),
        }
    }
}

/// What was typed, before it means anything.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// `--config`; must exist if given.
    pub file: Option<PathBuf>,
    /// The environment.
    pub variables: Vec<(String, String)>,
    /// Flags: the flag's name, the key that it sets, the value.
    pub flags: Vec<(&'static str, &'static str, String)>,
}

/// The largest configuration, and the largest file of metadata.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Reads everything that was typed.
///
/// # Errors
/// The first thing that means nothing, with where it stands and what was expected.
pub fn load(sources: &Sources) -> Result<Settings, ConfigError> {
    let mut read = Reading::default();
    let (path, required) = match &sources.file {
        Some(path) => (path.as_path(), true),
        None => (Path::new(DEFAULT_FILE), false),
    };
    match files::read_argument(path, MAX_BYTES) {
        Ok(text) => read_file(&mut read, path, &text)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => {}
        Err(source) => {
            return Err(ConfigError::Unreadable {
                path: path.to_owned(),
                source,
            });
        }
    }
    for (name, value) in &sources.variables {
        if name.starts_with(ENV_PREFIX) && !OTHER_VARIABLES.contains(&name.as_str()) {
            let key = KEYS.iter().find(|key| variable(key.path) == *name).ok_or_else(|| {
                let names: Vec<_> = KEYS.iter().map(|key| variable(key.path)).collect();
                ConfigError::UnknownKey {
                    origin: Origin::Variable(name.clone()),
                    key: name.clone(),
                    nearest: Suggestion::among(name, names.iter().map(String::as_str)),
                }
            })?;
            let typed = match key.path {
                "imds.hosts" => RawValue(value.split(',').map(|it| it.trim().to_owned()).collect(), RawType::Text),
                _ => RawValue::of(value),
            };
            set(&mut read, key, &typed, Origin::Variable(name.clone()))?;
        }
    }
    read_docker_host(&mut read, &sources.variables)?;
    for (flag, path, value) in &sources.flags {
        // A flag that names no key is a mistake of this program, not of its user; the test of the table holds it.
        if let Some(key) = KEYS.iter().find(|key| key.path == *path) {
            set(&mut read, key, &RawValue::of(value), Origin::Flag((*flag).to_owned()))?;
        }
    }
    let mut settings = read.settings;
    if let (Some(path), Some(origin)) = (&settings.metadata_file, read.origins.remove("metadata.file")) {
        let text = files::read_text(path, MAX_BYTES).map_err(|error| error.to_string());
        settings.from_file = text
            .and_then(|text| aemm::read(&text))
            .map_err(|what| ConfigError::MetadataFile {
                origin,
                path: path.clone(),
                what,
            })?;
    }
    Ok(settings)
}

/// The environment variable of a key.
pub fn variable(path: &str) -> String {
    format!("{ENV_PREFIX}{}", path.replace('.', "_").to_ascii_uppercase())
}

/// Settings, and where each key of them was typed last.
#[derive(Default)]
struct Reading {
    settings: Settings,
    origins: BTreeMap<&'static str, Origin>,
}

/// Keys of which only one can count in one place: a file, the variables, or the flags.
const EXCLUSIVE: &[&[&str]] = &[&["imds.user_data", "imds.user_data_base64", "imds.user_data_file"]];

fn set(read: &mut Reading, key: &Key, value: &RawValue, origin: Origin) -> Result<(), ConfigError> {
    let keys = EXCLUSIVE.iter().find(|keys| keys.contains(&key.path));
    for other in keys
        .into_iter()
        .flat_map(|keys| keys.iter())
        .filter(|it| **it != key.path)
    {
        if let (Some(keys), Some(at)) = (keys, read.origins.get(other).filter(|at| at.same_place(&origin))) {
            let other_origin = at.clone();
            return Err(ConfigError::Exclusive {
                origin,
                key: key.path,
                keys,
                other,
                other_origin,
            });
        }
    }
    (key.read)(&mut read.settings, value).ok_or_else(|| {
        let says_so = key.expected.contains("quotes");
        let form = value.other_form(|value| !says_so && (key.read)(&mut read.settings.clone(), value).is_some());
        ConfigError::BadValue {
            origin: origin.clone(),
            key: key.path.to_owned(),
            value: value.shown(),
            expected: format!("{}{form}", key.expected),
        }
    })?;
    read.origins.insert(key.path, origin);
    Ok(())
}

/// `DOCKER_HOST`, as the Docker CLI has it. Our own configuration overrides it.
fn read_docker_host(read: &mut Reading, variables: &[(String, String)]) -> Result<(), ConfigError> {
    const VARIABLE: &str = "DOCKER_HOST";
    let variable = variables
        .iter()
        .find(|(name, value)| name == VARIABLE && !value.is_empty());
    let key = KEYS.iter().find(|key| key.path == "docker.host");
    match (variable, key, &read.settings.docker_host) {
        (Some((name, value)), Some(key), None) => set(read, key, &RawValue::of(value), Origin::Variable(name.clone())),
        _ => Ok(()),
    }
}

/// The lines of a text, by the offset of a byte.
struct Lines(Vec<usize>);

impl Lines {
    fn of(text: &str) -> Self {
        Self(text.match_indices('\n').map(|(at, _)| at).collect())
    }

    /// From 1.
    fn number(&self, at: usize) -> usize {
        self.0.partition_point(|end| *end < at) + 1
    }
}

fn read_file(read: &mut Reading, path: &Path, text: &str) -> Result<(), ConfigError> {
    let lines = Lines::of(text);
    let at = |at: usize| Origin::File(path.to_owned(), lines.number(at));
    let document = DeTable::parse(text).map_err(|error| ConfigError::NotToml {
        origin: at(error.span().map_or(0, |span| span.start)),
        message: error.message().to_owned(),
    })?;
    for (name, value) in document.get_ref() {
        let origin = at(name.span().start);
        let name = name.get_ref().as_ref();
        let section = KEYS.iter().any(|key| key.path.starts_with(&format!("{name}.")));
        let table = TABLES.iter().find(|(table, _)| *table == name);
        match value.get_ref() {
            DeValue::Array(rules) if name == ALLOW => {
                for rule in rules {
                    read_rule(&mut read.settings, rule, &at)?;
                }
            }
            value if name == ALLOW => {
                return Err(ConfigError::BadValue {
                    origin,
                    key: name.to_owned(),
                    value: typed(value).shown(),
                    expected: "rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned(),
                });
            }
            DeValue::Table(entries) if section || table.is_some() => {
                for (key, value) in entries {
                    let origin = at(key.span().start);
                    let key = key.get_ref().as_ref();
                    let path = format!("{name}.{key}");
                    match table.filter(|_| !KEYS.iter().any(|known| known.path == path)) {
                        Some((_, expected)) => {
                            read_entry(&mut read.settings, name, expected, key, value.get_ref(), origin)?;
                        }
                        None => read_key(read, &path, value.get_ref(), origin)?,
                    }
                }
            }
            value if section || table.is_some() => {
                return Err(ConfigError::BadValue {
                    origin,
                    key: name.to_owned(),
                    value: typed(value).shown(),
                    expected: format!("a section: a line [{name}], and its keys below"),
                });
            }
            value => read_key(read, name, value, origin)?,
        }
    }
    Ok(())
}

fn read_key(read: &mut Reading, path: &str, value: &DeValue<'_>, origin: Origin) -> Result<(), ConfigError> {
    let Some(key) = KEYS.iter().find(|key| key.path == path) else {
        let sections = KEYS
            .iter()
            .filter_map(|key| key.path.split_once('.'))
            .map(|(section, _)| section);
        let names = KEYS
            .iter()
            .map(|key| key.path)
            .chain(TABLES.iter().map(|(name, _)| *name))
            .chain([ALLOW])
            .chain(sections);
        return Err(ConfigError::UnknownKey {
            origin,
            key: path.to_owned(),
            nearest: Suggestion::among(path, names),
        });
    };
    set(read, key, &typed(value), origin)
}

/// The rules.
const ALLOW: &str = "allow";

fn read_rule(
    settings: &mut Settings,
    rule: &toml::Spanned<DeValue<'_>>,
    at: &dyn Fn(usize) -> Origin,
) -> Result<(), ConfigError> {
    let place = at(rule.span().start);
    let bad = |origin: Origin, key: &str, value: String, expected: &str| ConfigError::BadValue {
        origin,
        key: key.to_owned(),
        value,
        expected: expected.to_owned(),
    };
    let DeValue::Table(entries) = rule.get_ref() else {
        let expected = "rules: a line [[allow]] in double brackets, and the keys of a rule below";
        return Err(bad(place, ALLOW, typed(rule.get_ref()).shown(), expected));
    };
    let mut read = Rule {
        number: settings.allow.len() + 1,
        line: match &place {
            Origin::File(_, line) => *line,
            _ => 0,
        },
        ..Rule::default()
    };
    for (name, value) in entries {
        let origin = at(name.span().start);
        let name = name.get_ref().as_ref();
        let path = format!("{ALLOW}.{name}");
        let Some(key) = RULE_KEYS.iter().find(|key| key.name == name) else {
            let mut nearest = Suggestion::among(name, RULE_KEYS.iter().map(|key| key.name));
            nearest.0 = nearest.0.map(|name| format!("{ALLOW}.{name}"));
            return Err(ConfigError::UnknownKey {
                origin,
                key: path,
                nearest,
            });
        };
        let value = typed(value.get_ref());
        (key.read)(&mut read, &value).ok_or_else(|| bad(origin, &path, value.shown(), key.expected))?;
    }
    if read.role.is_empty() && read.profile.is_empty() {
        let expected = "role, or profile: what the rule allows; role = \"**\" is every role";
        return Err(bad(place, ALLOW, "neither".to_owned(), expected));
    }
    // GetSessionToken takes no policy (STS API reference), so the ceiling could not be kept.
    let ceiling = read.session_policy.is_some() || !read.session_policy_arns.is_empty();
    if read.role.is_empty() && ceiling {
        let expected = "role: a profile that is served as it is cannot have a session policy";
        return Err(bad(place, ALLOW, "a session policy without role".to_owned(), expected));
    }
    settings.allow.push(read);
    Ok(())
}

fn typed(value: &DeValue<'_>) -> RawValue {
    let number = |text: String| RawValue(vec![text], RawType::Number);
    match value {
        DeValue::Array(items) => {
            let items: Vec<_> = items.iter().map(|item| typed(item.get_ref())).collect();
            let texts = items.iter().all(|it| it.1 == RawType::Text);
            RawValue(
                items.into_iter().flat_map(|it| it.0).collect(),
                if texts { RawType::List } else { RawType::Other },
            )
        }
        DeValue::String(text) => RawValue(vec![text.to_string()], RawType::Text),
        DeValue::Boolean(value) => RawValue(vec![value.to_string()], RawType::Boolean),
        DeValue::Integer(value) => number(value.to_string()),
        DeValue::Float(value) => number(value.to_string()),
        DeValue::Datetime(value) => RawValue(vec![value.to_string()], RawType::Other),
        // Nothing takes a table; no text makes every reader say what it expected.
        DeValue::Table(_) => RawValue(Vec::new(), RawType::Table),
    }
}

fn read_entry(
    settings: &mut Settings,
    table: &str,
    expected: &str,
    name: &str,
    value: &DeValue<'_>,
    origin: Origin,
) -> Result<(), ConfigError> {
    let value = typed(value);
    let read = match (table, value.text()) {
        ("roles", Some(text)) => RoleArn::parse(text)
            .map(|arn| settings.roles.insert(name.to_owned(), arn))
            .is_some(),
        ("accounts", _) => {
            let account = value.account().map(str::to_owned);
            account
                .map(|account| settings.accounts.insert(name.to_owned(), account))
                .is_some()
        }
        ("metadata", Some(text)) => match metadata_path(name, text) {
            Ok(path) => settings.metadata.insert(path, text.to_owned()).is_none(),
            Err(what) => {
                let key = format!("{table}.{name}");
                return Err(ConfigError::BadPath { origin, key, what });
            }
        },
        ("public_keys", Some(text)) => {
            let fits = is_public_key(text) && !name.contains(|c: char| c.is_control() || c == '/');
            fits && settings.public_keys.insert(name.to_owned(), text.to_owned()).is_none()
        }
        _ => false,
    };
    if read {
        return Ok(());
    }
    let long = value.text().is_some_and(|text| long_role_name(text).is_some());
    let limit = match table == "roles" && long {
        true => format!(" whose name has at most {MAX_ROLE_NAME} characters"),
        false => String::new(),
    };
    Err(ConfigError::BadValue {
        origin,
        key: format!("{table}.{name}"),
        value: value.shown(),
        expected: format!("{expected}{limit}"),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::{HttpTokens, RELOADED};
    use super::*;

    fn read(text: &str) -> Result<Settings, String> {
        let mut read = Reading::default();
        read_file(&mut read, Path::new("c.toml"), text).map_err(|error| error.to_string())?;
        Ok(read.settings)
    }

    #[test]
    fn values_have_the_type_of_their_key() {
        for (text, message) in [
            (
                "[credentials]\nconcurrent_calls = \"16\"",
                "credentials.concurrent_calls = \"16\": expected a whole number from 1 to 64, without quotes",
            ),
            (
                "[imds]\nhttp_put_response_hop_limit = \"2\"",
                "imds.http_put_response_hop_limit = \"2\": expected a whole number from 1 to 64, without quotes",
            ),
            (
                "[imds]\nlabels_may_relax = \"true\"",
                "imds.labels_may_relax = \"true\": expected true or false, without quotes",
            ),
            (
                "[credentials]\nprofile = 5",
                "credentials.profile = \"5\": expected the name of a profile, in quotes",
            ),
            (
                "[credentials]\nprofile = true",
                "credentials.profile = \"true\": expected the name of a profile, in quotes",
            ),
            (
                "[credentials]\nprofile = [\"dev\"]",
                "credentials.profile = \"dev\": expected the name of a profile",
            ),
            (
                "[credentials]\nprofile = 2026-01-01",
                "credentials.profile = \"2026-01-01\": expected the name of a profile",
            ),
            ("[imds]\nhosts = [1]", "imds.hosts = \"1\": expected host names"),
            (
                "[imds]\nhosts = 1",
                "imds.hosts = \"1\": expected host names, in quotes",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), format!("c.toml, line 2: {message}"));
        }
        let settings = read("[imds]\nhosts = [\"a\", \"B\"]\n[credentials]\nconcurrent_calls = 3").unwrap();
        assert_eq!(
            (settings.hosts, settings.sts_calls),
            (vec!["a".to_owned(), "b".to_owned()], 3)
        );
    }

    #[test]
    fn only_one_kind_of_user_data_counts() {
        let one = "[imds]\nuser_data = \"a\"\n";
        let error = read(&format!("{one}user_data_base64 = \"YQ==\"")).unwrap_err();
        assert_eq!(
            error,
            "c.toml, line 3: imds.user_data_base64: expected one of imds.user_data, imds.user_data_base64, imds.user_data_file; \
             imds.user_data is at c.toml, line 2"
        );
        let file = tempfile::tempdir().unwrap();
        let path = file.path().join("c.toml");
        std::fs::write(&path, one).unwrap();
        let variable = |name: &str| (name.to_owned(), "Yg==".to_owned());
        // A variable overrides the file, as with every key; two variables contradict each other.
        let mut sources = Sources {
            file: Some(path),
            variables: vec![variable("IMDS_ROUTER_IMDS_USER_DATA_BASE64")],
            flags: Vec::new(),
        };
        assert_eq!(load(&sources).unwrap().user_data.as_deref(), Some(&b"b"[..]));
        sources.variables.push(variable("IMDS_ROUTER_IMDS_USER_DATA"));
        let error = load(&sources).unwrap_err().to_string();
        assert!(
            error.contains("is at variable IMDS_ROUTER_IMDS_USER_DATA_BASE64"),
            "{error}"
        );
    }

    #[test]
    fn docker_host_is_checked_as_the_key_is() {
        let sources = |host: &str, ours: Option<&str>| Sources {
            file: Some("/dev/null".into()),
            variables: [("DOCKER_HOST", Some(host)), ("IMDS_ROUTER_DOCKER_HOST", ours)]
                .into_iter()
                .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
                .collect(),
            flags: Vec::new(),
        };
        for host in [
            "ssh://x",
            "garbage",
            "unix:///",
            "unix://relative",
            "tcp://",
            "http://host:",
            "npipe:////./x",
        ] {
            assert_eq!(
                load(&sources(host, None)).unwrap_err().to_string(),
                format!(
                    "variable DOCKER_HOST: docker.host = {host:?}: expected unix:///path/to/docker.sock or tcp://host:port"
                )
            );
            let ours = load(&sources(host, Some("tcp://[::1]:2375"))).unwrap();
            assert_eq!(
                ours.docker_host.as_deref(),
                Some("tcp://[::1]:2375"),
                "the key overrides the variable"
            );
        }
        for host in [
            "unix:///run/user/1000/docker.sock",
            "tcp://127.0.0.1:2375",
            "http://docker:2375",
        ] {
            assert_eq!(load(&sources(host, None)).unwrap().docker_host.as_deref(), Some(host));
        }
        assert_eq!(load(&sources("", None)).unwrap().docker_host, None);
    }

    #[test]
    fn a_missing_file_of_metadata_is_an_error_at_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.toml");
        std::fs::write(
            &path,
            "region = \"eu-west-1\"\n\n[metadata]\nfile = \"/no/such.json\"\n",
        )
        .unwrap();
        let sources = Sources {
            file: Some(path.clone()),
            ..Sources::default()
        };
        assert_eq!(
            load(&sources).unwrap_err().to_string(),
            format!(
                "{}, line 4: metadata.file = \"/no/such.json\": No such file or directory (os error 2)",
                path.display()
            )
        );
    }

    /// Reading was quadratic: 20,000 roles took 3.6 seconds in a release build.
    #[test]
    fn reads_many_roles_in_linear_time() {
        use std::fmt::Write as _;
        let file = |roles: usize| {
            let mut text = "[roles]\n".to_owned();
            for number in 0..roles {
                writeln!(
                    text,
                    "role-{number} = \"arn:aws:iam::111122223333:role/team/role-{number}\""
                )
                .unwrap();
            }
            text
        };
        let time = |roles: usize| {
            let text = file(roles);
            let start = std::time::Instant::now();
            assert_eq!(read(&text).unwrap().roles.len(), roles);
            start.elapsed()
        };
        let few = time(5_000);
        let many = time(40_000);
        // Eight times as many take 64 times as long if it is quadratic.
        assert!(many < few * 24, "{few:?}, then {many:?}");
    }

    #[test]
    fn an_empty_file_is_the_default() {
        assert_eq!(read(""), Ok(Settings::default()));
    }

    #[test]
    fn every_documented_default_that_can_be_typed_is_the_default() {
        for key in KEYS {
            let mut settings = Settings::default();
            if (key.read)(&mut settings, &RawValue::of(key.default)).is_some()
                && !matches!(
                    key.path,
                    "credentials.profile"
                        | "credentials.default_role"
                        | "imds.user_data"
                        | "imds.user_data_base64"
                        | "metadata.file"
                )
            {
                assert_eq!(settings, Settings::default(), "{}", key.path);
            }
        }
    }

    #[test]
    fn values_of_metadata_come_from_the_table_and_from_a_file() {
        let settings = read("[metadata]\nfile = \"/m.json\"\n\"placement/group-name\" = \"g\"\n").unwrap();
        assert_eq!(settings.metadata_file.as_deref(), Some(Path::new("/m.json")));
        assert_eq!(settings.metadata["meta-data/placement/group-name"], "g");
        for (text, why) in [
            (
                "\"placement\" = \"g\"",
                "c.toml, line 2: metadata.placement: that is a directory",
            ),
            (
                "\"instance-typ\" = \"g\"",
                "there is no such category; did you mean instance-type?",
            ),
            (
                "\"iam/info\" = \"g\"",
                "that follows from the role and the other values, and cannot be given",
            ),
            (
                "\"instance-type\" = \"a\\u001bb\"",
                "expected text without control characters, and not empty",
            ),
        ] {
            let error = read(&format!("[metadata]\n{text}\n")).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("m.json");
        let sources = Sources {
            flags: vec![("--metadata-file", "metadata.file", file.to_str().unwrap().to_owned())],
            ..Sources::default()
        };
        assert!(load(&sources).unwrap_err().to_string().contains("No such file"));
        std::fs::write(&file, r#"{"metadata": {"values": {"ami-launch-index": 3}}}"#).unwrap();
        assert_eq!(
            load(&sources).unwrap().from_file.values["meta-data/ami-launch-index"],
            "3"
        );
    }

    #[test]
    fn the_example_of_the_documentation_is_read() {
        let settings = read(
            r#"
region = "eu-west-1"
account_id = "111122223333"
[serve]
max_wait = "300ms"
[imds]
http_tokens = "required"
hosts = ["Metadata.local", "x"]
[credentials]
source = "offline"
duration = "2h"
[roles]
orders = "arn:aws:iam::111122223333:role/service/orders"
[accounts]
prod = "444455556666"
"#,
        )
        .unwrap();
        assert_eq!(settings.region.as_deref(), Some("eu-west-1"));
        assert_eq!(settings.max_wait, Duration::from_millis(300));
        assert_eq!(settings.http_tokens, HttpTokens::Required);
        assert_eq!(settings.hosts, ["metadata.local", "x"]);
        assert_eq!(settings.duration, Duration::from_secs(7200));
        assert_eq!(settings.roles["orders"].name(), "orders");
        assert_eq!(settings.accounts["prod"], "444455556666");
    }

    #[test]
    fn bad_files_say_where_what_and_what_was_expected() {
        for (text, message) in [
            (
                "regoin = \"x\"",
                "c.toml, line 1: unknown key regoin; did you mean region?",
            ),
            (
                "\n[serve]\nmax_wiat = \"1s\"",
                "c.toml, line 3: unknown key serve.max_wiat; did you mean serve.max_wait?",
            ),
            (
                "[server]\nmax_wait = \"1s\"",
                "c.toml, line 1: unknown key server; did you mean serve?",
            ),
            (
                "[credentials]\n\nduration = \"90\"",
                "c.toml, line 3: credentials.duration = \"90\": expected a duration from 15m to 12h (STS's own bounds)",
            ),
            (
                "region = 7",
                "c.toml, line 1: region = \"7\": expected an AWS region such as \"eu-west-1\"",
            ),
            (
                "account_id = \"12\"",
                "c.toml, line 1: account_id = \"12\": expected 12 digits in quotes",
            ),
            (
                "[roles]\na = \"arn:aws:iam::12:role/x\"",
                "c.toml, line 2: roles.a = \"arn:aws:iam::12:role/x\": expected a role ARN",
            ),
            (
                "[accounts]\np = 12",
                "c.toml, line 2: accounts.p = \"12\": expected an account id: 12 digits in quotes",
            ),
            (
                "[serve]\nattach = \"bridge\"",
                "c.toml, line 2: serve.attach = \"bridge\": expected \"auto\", \"namespace\", \"host\" or \"network\"",
            ),
            (
                "[imds]\nhttp_tokens = true",
                "c.toml, line 2: imds.http_tokens = \"true\": expected \"optional\" or \"required\"",
            ),
            (
                "[credentials]\nsession_name = \"{containr}\"",
                "c.toml, line 2: credentials.session_name = \"{containr}\": expected text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), message);
        }
        for (text, message) in [
            (
                "serve = 3",
                "c.toml, line 1: serve = \"3\": expected a section: a line [serve], and its keys below",
            ),
            (
                "[imds]\nhttp_tokens = {a = 1}",
                "c.toml, line 2: imds.http_tokens = \"a table\": expected \"optional\" or \"required\"",
            ),
            (
                "[accounts]\nprod = 444455556666",
                "c.toml, line 2: accounts.prod = \"444455556666\": expected an account id: 12 digits in quotes",
            ),
            (
                "account_id = 444455556666",
                "c.toml, line 1: account_id = \"444455556666\": expected 12 digits in quotes",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), message);
        }
        assert!(read("a = ").unwrap_err().starts_with("c.toml, line 1: not TOML: "));
    }

    #[test]
    fn rules_are_read_in_their_order() {
        let settings = read(
            r#"
[[allow]]
role = ["arn:aws:iam::111122223333:role/a*", "arn:*:iam::*:role/b/**"]
label = ["team", "stage=test-*"]
session_policy = '{"Statement":[]}'
max_duration = "30m"

[[allow]]
profile = "dev"
"#,
        )
        .unwrap();
        let [first, second] = settings.allow.as_slice() else {
            panic!("two rules")
        };
        assert_eq!(
            (first.to_string(), second.to_string()),
            ("allow rule 1 (line 2)".into(), "allow rule 2 (line 8)".into())
        );
        assert_eq!(first.max_duration, Some(Duration::from_secs(1800)));
        assert!(first.has_ceiling() && !second.has_ceiling());
        assert_eq!(first.rests_on_its_applicants().as_deref(), Some("label"));
        assert_eq!(second.rests_on_its_applicants(), None);
    }

    #[test]
    fn the_rules_of_the_readme_are_read() {
        let readme = include_str!("../../README.md");
        let block = readme
            .split("```toml\n")
            .nth(1)
            .and_then(|rest| rest.split("```").next());
        let settings = read(block.expect("README has rules")).unwrap();
        assert_eq!(settings.allow.len(), 2);
        assert!(settings.allow[1].has_ceiling());
    }

    #[test]
    fn bad_rules_say_where_what_and_what_was_expected() {
        const RULE: &str = "[[allow]]\nrole = \"**\"\n";
        const ROLES: &str = "expected a pattern of role ARNs such as \"arn:aws:iam::111122223333:role/dev-*\" \
            (\"**\": every role), or a list of them";
        const GLOB: &str = "expected a pattern such as \"web-*\", or a list of them";
        const PAIR: &str = "expected \"KEY\" or \"KEY=PATTERN\", or a list of them";
        for (rule, message) in [
            ("[allow]\nrole = \"x\"", "1: allow = \"a table\": expected rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned()),
            ("allow = 3", "1: allow = \"3\": expected rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned()),
            ("allow = [\"x\"]", "1: allow = \"x\": expected rules: a line [[allow]] in double brackets, and the keys of a rule below".to_owned()),
            ("[[allow]]\n", "1: allow = \"neither\": expected role, or profile: what the rule allows; role = \"**\" is every role".to_owned()),
            ("[[allow]]\nprofile = \"p\"\nsession_policy_arns = \"arn:aws:iam::aws:policy/x\"", "1: allow = \"a session policy without role\": expected role: a profile that is served as it is cannot have a session policy".to_owned()),
            ("[[alow]]\nrole = \"**\"", "1: unknown key alow; did you mean allow?".to_owned()),
            ("[[allow]]\nrol = \"**\"", "2: unknown key allow.rol; did you mean allow.role?".to_owned()),
            ("[[allow]]\nsession_policys = \"**\"", "2: unknown key allow.session_policys; did you mean allow.session_policy?".to_owned()),
            ("[[allow]]\nrole = \"dev-*\"", format!("2: allow.role = \"dev-*\": {ROLES}")),
            ("[[allow]]\nrole = \"*\"", format!("2: allow.role = \"*\": {ROLES}")),
            ("[[allow]]\nrole = []", format!("2: allow.role = \"\": {ROLES}")),
            ("[[allow]]\nrole = \"arn:aws:iam::1:role/[x\"", format!("2: allow.role = \"arn:aws:iam::1:role/[x\": {ROLES}")),
            ("container = \"\"", format!("3: allow.container = \"\": {GLOB}")),
            ("project = 7", format!("3: allow.project = \"7\": {GLOB}")),
            ("network = \"a**b\"", format!("3: allow.network = \"a**b\": {GLOB}")),
            ("image_id = \"0123\"", "3: allow.image_id = \"0123\": expected an image id such as \"sha256:0123…\", or a list of them".to_owned()),
            ("label = \"=x\"", format!("3: allow.label = \"=x\": {PAIR}")),
            ("label = \"x=\"", format!("3: allow.label = \"x=\": {PAIR}")),
            ("session_tags = [\"a\", \"\"]", format!("3: allow.session_tags = \"a,\": {PAIR}")),
            ("session_name = true", "3: allow.session_name = \"true\": expected a pattern such as \"web-*\", or a list of them".to_owned()),
            ("session_policy_arns = \"ReadOnlyAccess\"", "3: allow.session_policy_arns = \"ReadOnlyAccess\": expected 1 to 10 policy ARNs such as \"arn:aws:iam::aws:policy/ReadOnlyAccess\"".to_owned()),
            ("session_policy = \"{}\"", "3: allow.session_policy = \"{}\": expected an IAM policy in JSON with a Statement, of at most 2048 characters".to_owned()),
            ("max_duration = \"5m\"", "3: allow.max_duration = \"5m\": expected a duration from 15m to 12h (STS's own bounds)".to_owned()),
        ] {
            let whole = match rule.contains("allow") || rule.contains("alow") {
                true => rule.to_owned(),
                false => format!("{RULE}{rule}"),
            };
            assert_eq!(read(&whole).unwrap_err(), format!("c.toml, line {message}"), "{rule}");
        }
        for (text, message) in [
            ("[compat]\nenv = 1", "2: compat.env = \"1\": expected true or false"),
            (
                "[compat]\niamdocker = true",
                "2: unknown key compat.iamdocker; did you mean compat.iam_docker?",
            ),
            (
                "[credentials]\nsession_name = \"{label:}\"",
                "2: credentials.session_name = \"{label:}\": expected text with {container}, {project}, {service}, {id}, {host}, {label:KEY} and {env:KEY}",
            ),
            (
                "[credentials]\ndefault_role = \"{proj}\"",
                "2: credentials.default_role = \"{proj}\": expected a role: ARN, name, name@account or alias; {container}, {project}, {service} … are filled in",
            ),
        ] {
            assert_eq!(read(text).unwrap_err(), format!("c.toml, line {message}"));
        }
    }

    #[test]
    fn what_a_running_daemon_takes_over_is_what_it_says() {
        let old = read("[serve]\nmax_wait = \"300ms\"").unwrap();
        let same = old.reloaded(&old);
        assert!(same == (old.clone(), true));
        for key in KEYS {
            // Another value than the default of every key, where there is one to be had.
            let values = [
                "eu-west-2",
                "111122223333",
                "warn",
                "true",
                "enabled",
                "required",
                "x-{id}",
                "45m",
            ];
            let mut new = old.clone();
            let set = values
                .iter()
                .any(|value| (key.read)(&mut new, &RawValue::of(value)).is_some() && new != old);
            let (settings, whole) = old.reloaded(&new);
            let says = |path: &str| {
                RELOADED
                    .split(", ")
                    .any(|told| told == path || path.starts_with(&format!("{told}.")))
            };
            assert_eq!(whole && settings == new, says(key.path) || !set, "{}", key.path);
        }
        let mut new = read("[roles]\na = \"arn:aws:iam::111122223333:role/a\"\n[[allow]]\nrole = \"**\"").unwrap();
        assert!(!old.reloaded(&new).1);
        new.max_wait = old.max_wait;
        assert!(old.reloaded(&new) == (new, true));
    }

    #[test]
    fn flag_beats_variable_beats_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("c.toml");
        std::fs::write(&file, "region = \"eu-west-1\"\naccount_id = \"111122223333\"\n").unwrap();
        let mut sources = Sources {
            file: Some(file),
            ..Sources::default()
        };
        assert_eq!(load(&sources).unwrap().region.as_deref(), Some("eu-west-1"));
        sources.variables = vec![
            ("IMDS_ROUTER_REGION".into(), "eu-west-2".into()),
            ("PATH".into(), "/".into()),
        ];
        assert_eq!(load(&sources).unwrap().region.as_deref(), Some("eu-west-2"));
        sources.flags = vec![("--region", "region", "eu-west-3".into())];
        let settings = load(&sources).unwrap();
        assert_eq!(settings.region.as_deref(), Some("eu-west-3"));
        assert_eq!(settings.account_id.as_deref(), Some("111122223333"));
    }

    #[test]
    fn variables_and_missing_files_are_named() {
        let variables = |name: &str, value: &str| Sources {
            variables: vec![(name.into(), value.into())],
            ..Sources::default()
        };
        assert_eq!(
            load(&variables("IMDS_ROUTER_SERVE_MAX_WAITS", "1s"))
                .unwrap_err()
                .to_string(),
            "variable IMDS_ROUTER_SERVE_MAX_WAITS: unknown key IMDS_ROUTER_SERVE_MAX_WAITS; did you mean IMDS_ROUTER_SERVE_MAX_WAIT?"
        );
        assert!(
            load(&variables("IMDS_ROUTER_IMDS_HTTP_TOKENS", "no"))
                .unwrap_err()
                .to_string()
                .starts_with("variable IMDS_ROUTER_IMDS_HTTP_TOKENS: imds.http_tokens = \"no\": expected")
        );
        assert_eq!(
            load(&variables("IMDS_ROUTER_IMDS_HOSTS", "a, b")).unwrap().hosts,
            ["a", "b"]
        );
        let missing = Sources {
            file: Some("/nonexistent/c.toml".into()),
            ..Sources::default()
        };
        assert!(load(&missing).unwrap_err().to_string().contains("/nonexistent/c.toml"));
    }
}
