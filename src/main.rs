//! `imds-router`: argv → verb. Errors are printed once, with their causes; the exit code says whose they are.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser as _;
use imds_router::cli::Cli;
use imds_router::commands::{self, Failure};

/// Wrong usage or configuration.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    keep_the_aws_sdk_off_imds();
    if let Err(error) = forbid_core_dumps() {
        return report(&error, 1);
    }
    let cli = Cli::parse();
    match commands::run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => report(error.as_ref(), USAGE),
        Err(Failure::Failed(error)) => report(error.as_ref(), 1),
    }
}

/// The AWS SDK's chain ends at the instance metadata service: this daemon. It must never be its own customer.
fn keep_the_aws_sdk_off_imds() {
    // SAFETY: no other thread exists yet: this is the first line of `main`.
    #[allow(unsafe_code, reason = "the SDK reads nothing but this variable")]
    unsafe {
        std::env::set_var("AWS_EC2_METADATA_DISABLED", "true");
    }
}

/// Memory holds session and base credentials, so the kernel must not dump it. The limit covers dumps to files, and child processes
/// inherit it. A `core_pattern` that is a pipe ignores a limit of 0, so the process is not dumpable, either: then only a process
/// with `CAP_SYS_PTRACE` can read or trace it. See prctl(2) and core(5).
#[cfg(target_os = "linux")]
fn forbid_core_dumps() -> std::io::Result<()> {
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    Ok(setrlimit(Resource::Core, none)?)
}

#[cfg(not(target_os = "linux"))]
fn forbid_core_dumps() -> std::io::Result<()> {
    Ok(())
}

fn report(error: &dyn Error, code: u8) -> ExitCode {
    let text = error.to_string();
    // A hint goes last, after the causes.
    let (what, hint) = match text.split_once("\nhint: ") {
        Some((what, hint)) => (what, Some(hint)),
        None => (text.as_str(), None),
    };
    eprint!("imds-router: {what}");
    let mut cause = error.source();
    let mut hints: Vec<String> = hint.map(str::to_owned).into_iter().collect();
    while let Some(error) = cause {
        let text = error.to_string();
        let (what, hint) = text.split_once("\nhint: ").unwrap_or((&text, ""));
        eprint!(": {what}");
        hints.extend((!hint.is_empty()).then(|| hint.to_owned()));
        cause = error.source();
    }
    eprintln!();
    for hint in hints {
        eprintln!("hint: {hint}");
    }
    ExitCode::from(code)
}
