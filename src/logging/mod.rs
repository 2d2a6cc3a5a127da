//! What the daemon says of itself: the log, and how foreign text gets into it.

mod rate_limit;

use std::io;

use tracing_subscriber::Layer as _;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;

use self::rate_limit::LineLimit;
pub use self::rate_limit::{lines_left_out, report_lines_left_out};
use crate::clock::Clock;

/// Environment variable of the log level: `error`, `warn`, `info` (default), `debug`, `trace`.
pub const LOG_VARIABLE: &str = "IMDS_ROUTER_LOG";

/// Crates whose finer levels may print requests and answers of AWS: they stay at `info` whatever is asked, because no
/// level may bring a secret into the log.
const CAPPED: &[&str] = &[
    "aws_config",
    "aws_credential_types",
    "aws_runtime",
    "aws_sdk_sts",
    "aws_sdk_sso",
    "aws_sdk_ssooidc",
    "aws_sigv4",
    "aws_smithy_http_client",
    "aws_smithy_runtime",
    "aws_smithy_runtime_api",
    "bollard",
    "h2",
    "hyper",
    "hyper_util",
    "rustls",
];

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// The filter for a level as typed; `None` when it is not one.
fn filter(level: &str) -> Option<Targets> {
    // Anything else that is one word would be taken for the name of a crate, and silence all others.
    const LEVELS: &[&str] = &["error", "warn", "info", "debug", "trace", "off"];
    if !level.contains('=') && !LEVELS.contains(&level) {
        return None;
    }
    let asked: Targets = level.parse().ok()?;
    // A part of such a crate would be more specific than the crate itself, and win.
    let capped = asked.iter().map(|(target, level)| {
        let is_of_capped = CAPPED.iter().any(|name| target.starts_with(name));
        (
            target,
            if is_of_capped {
                level.min(LevelFilter::INFO)
            } else {
                level
            },
        )
    });
    let filter = Targets::from_iter(capped).with_default(asked.default_level().unwrap_or(LevelFilter::OFF));
    Some(filter.with_targets(CAPPED.iter().map(|name| (*name, LevelFilter::INFO))))
}

/// Starts the log on stderr.
///
/// # Errors
/// When the level is none; the text says what was expected.
pub fn start(format: LogFormat, level: Option<&str>) -> Result<(), String> {
    let level = level.unwrap_or("info");
    let filter = filter(level)
        .ok_or_else(|| format!("variable {LOG_VARIABLE}: {level:?}: expected error, warn, info, debug or trace"))?;
    let registry = tracing_subscriber::registry().with(filter);
    let layer = tracing_subscriber::fmt::layer().with_writer(|| OneLine(std::io::stderr()));
    let limit = LineLimit::new(Clock::system());
    // A second start, in tests, keeps the first: nothing to be said about it.
    let _ = match format {
        LogFormat::Text => registry.with(layer.with_ansi(false).with_filter(limit)).try_init(),
        LogFormat::Json => registry.with(layer.json().with_filter(limit)).try_init(),
    };
    Ok(())
}

/// Writes each log record as one line: line breaks of its fields are escaped. The log writes a record with one call.
struct OneLine<W>(W);

impl<W: io::Write> io::Write for OneLine<W> {
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let text = record.strip_suffix(b"\n").unwrap_or(record);
        if !text.iter().any(|byte| b"\r\n".contains(byte)) {
            self.0.write_all(record)?;
            return Ok(record.len());
        }
        let mut line = Vec::with_capacity(record.len() + 16);
        for byte in text {
            match byte {
                b'\n' => line.extend(b"\\n"),
                b'\r' => line.extend(b"\\r"),
                byte => line.push(*byte),
            }
        }
        line.extend(&record[text.len()..]);
        self.0.write_all(&line)?;
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// An error with its causes, outermost first, in one line. Hints come last.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let (mut causes, mut hints) = (Vec::new(), Vec::new());
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        let mut parts = text.split("\nhint: ");
        causes.extend(parts.next().map(str::to_owned));
        hints.extend(parts.map(|hint| format!("; hint: {hint}")));
        cause = error.source();
    }
    causes.join(": ") + &hints.concat()
}

/// Text from outside, fit for a terminal and a log: control characters, line ends and bidirectional overrides escaped,
/// cut after `most` characters.
pub fn printable(text: &str, most: usize) -> String {
    let mut shown = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == most {
            shown.push('…');
            break;
        }
        let bidi = matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
        if c.is_control() || bidi {
            shown.extend(c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;

    #[test]
    fn foreign_text_cannot_move_the_cursor_or_fake_a_line() {
        assert_eq!(
            printable("a\u{1b}[2Jb\nc\u{202e}d", 99),
            "a\\u{1b}[2Jb\\u{a}c\\u{202e}d"
        );
        assert_eq!(printable("abcdef", 3), "abc…");
        assert_eq!(printable("abc", 3), "abc");
    }

    #[test]
    fn a_record_is_one_line() {
        use std::io::Write as _;
        let mut written = OneLine(Vec::new());
        written.write_all(b"WARN a\nWARN forged\r\n").unwrap();
        written.write_all(b"INFO b\n").unwrap();
        assert_eq!(written.0, b"WARN a\\nWARN forged\\r\nINFO b\n");
    }

    #[test]
    fn hints_come_after_causes_in_one_line() {
        #[derive(Debug, thiserror::Error)]
        #[error("outer\nhint: do a\nhint: do b")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("inner\nhint: do c"));
        assert_eq!(with_causes(&error), "outer: inner; hint: do a; hint: do b; hint: do c");
    }

    #[test]
    fn only_levels_are_levels() {
        assert!(filter("trace").is_some());
        assert!(filter("imds_router=debug").is_some());
        assert!(filter("imds_router=loud").is_none());
        assert!(filter("loud").is_none());
        assert!(filter("").is_none());
    }

    #[test]
    fn no_level_makes_crates_that_know_secrets_say_more() {
        let would = |level: &str, name: &str, at| filter(level).unwrap().would_enable(name, &at);
        assert!(would("trace", "imds_router::server", Level::TRACE));
        for name in ["hyper::proto", "aws_config", "rustls::client"] {
            assert!(would("trace", name, Level::INFO), "{name}");
            // Whoever asks for one part of such a crate is told no more.
            for asked in [
                "trace".to_owned(),
                format!("info,{name}=trace"),
                format!("{name}::deeper=trace"),
            ] {
                assert!(!would(&asked, name, Level::DEBUG), "{name}, {asked}");
                assert!(
                    !would(&asked, &format!("{name}::deeper"), Level::DEBUG),
                    "{name}, {asked}"
                );
            }
        }
    }
}
