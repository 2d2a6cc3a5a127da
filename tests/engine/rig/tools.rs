//! What `tests/setup` has installed, and what cargo has built.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use super::run;

/// The daemon under test.
pub const DAEMON: &str = env!("CARGO_BIN_EXE_imds-router");

/// cargo's output directory, wherever it is.
fn target() -> &'static Path {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    tmp.parent().expect("cargo puts tmp/ into its target directory")
}

/// The installed clients; the same path inside the containers, since a Python environment cannot be moved.
pub fn directory() -> &'static Path {
    static DIRECTORY: LazyLock<PathBuf> = LazyLock::new(|| {
        let directory = target().join("test-tools");
        fs::canonicalize(&directory).unwrap_or(directory)
    });
    &DIRECTORY
}

/// A file of this repository.
pub fn repository(path: &str) -> String {
    format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))
}

/// What is in the image, as `tests/run` has built it.
pub fn image() -> PathBuf {
    target().join("image")
}

/// Where the examples are, outside.
pub fn examples() -> PathBuf {
    Path::new(DAEMON).with_file_name("examples")
}

/// The clients' scripts, outside.
pub fn scripts() -> PathBuf {
    run::directory().join("clients")
}

/// Puts the clients' scripts where they are run from; says what is missing.
pub fn prepare() -> Result<(), String> {
    for (path, remedy) in [
        (directory().join("stamp"), "run tests/setup"),
        (examples().join("whoami"), "run `cargo build --examples`"),
        (image().join("imds-router"), "run tests/run, which builds it"),
    ] {
        if !path.exists() {
            return Err(format!("there is no {}: {remedy}", path.display()));
        }
    }
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(scripts().join("attacks"))?;
        for (name, text) in [
            ("whoami.py", include_str!("../../clients/whoami.py")),
            ("whoami.mjs", include_str!("../../clients/whoami.mjs")),
            ("crawl.py", include_str!("../../clients/crawl.py")),
            ("gaps.py", include_str!("../../clients/gaps.py")),
            ("hops.py", include_str!("../../clients/hops.py")),
            ("supervisor.py", include_str!("../../clients/supervisor.py")),
            ("ec2.py", include_str!("../../clients/ec2.py")),
            ("poll.py", include_str!("../../clients/poll.py")),
            ("ask.py", include_str!("../../clients/ask.py")),
            ("many.py", include_str!("../../clients/many.py")),
            ("many.mjs", include_str!("../../clients/many.mjs")),
            ("half_closed.py", include_str!("../../clients/half_closed.py")),
            ("small_writes.py", include_str!("../../clients/small_writes.py")),
            ("repaired.py", include_str!("../../clients/repaired.py")),
            ("remove.py", include_str!("../../clients/remove.py")),
            ("reach.py", include_str!("../../clients/reach.py")),
            ("local_server.py", include_str!("../../clients/local_server.py")),
            ("interfaces.py", include_str!("../../clients/interfaces.py")),
            ("attacks/bind_all.py", include_str!("../../clients/attacks/bind_all.py")),
            ("attacks/divert.py", include_str!("../../clients/attacks/divert.py")),
            ("attacks/frames.py", include_str!("../../clients/attacks/frames.py")),
            (
                "attacks/impersonate.py",
                include_str!("../../clients/attacks/impersonate.py"),
            ),
            ("attacks/intrude.py", include_str!("../../clients/attacks/intrude.py")),
            ("attacks/life.py", include_str!("../../clients/attacks/life.py")),
            ("attacks/naive.py", include_str!("../../clients/attacks/naive.py")),
            (
                "attacks/net_admin.py",
                include_str!("../../clients/attacks/net_admin.py"),
            ),
            ("attacks/passive.py", include_str!("../../clients/attacks/passive.py")),
            ("attacks/slow.py", include_str!("../../clients/attacks/slow.py")),
            ("attacks/squat.py", include_str!("../../clients/attacks/squat.py")),
            ("attacks/takeover.py", include_str!("../../clients/attacks/takeover.py")),
            ("attacks/tricks.py", include_str!("../../clients/attacks/tricks.py")),
            ("attacks/victim.py", include_str!("../../clients/attacks/victim.py")),
        ] {
            fs::write(scripts().join(name), text)?;
        }
        // An ECMAScript module looks for packages beside itself, and nowhere else.
        let packages = directory().join("node_modules");
        std::os::unix::fs::symlink(packages, scripts().join("node_modules"))
    };
    write().map_err(|e| format!("cannot write {}: {e}", scripts().display()))
}
