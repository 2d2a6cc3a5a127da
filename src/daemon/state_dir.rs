//! The files of the state directory, which survive restarts of the daemon. Only its user can read them.

use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::{AppError, durable_files};
use crate::clock::Clock;
use crate::files;
use crate::metadata::identity_document::Signer;
use crate::orders::RuntimeOverrides;
use crate::protocol::token::{TokenAuthority, TokenKey};

/// Issues and verifies IMDS tokens.
pub(super) fn token_authority(state_dir: &Path, clock: &Clock) -> Result<TokenAuthority, AppError> {
    let path = "/proc/sys/kernel/random/boot_id";
    let boot_id = std::fs::read_to_string(path).map_err(|source| AppError::State {
        path: path.into(),
        what: "cannot be read",
        source,
    })?;
    Ok(TokenAuthority::new(
        &token_key(state_dir)?,
        boot_id.trim(),
        clock.clone(),
    ))
}

/// The key of IMDS tokens, so that tokens stay valid when the daemon restarts.
fn token_key(state_dir: &Path) -> Result<TokenKey, AppError> {
    let create = || {
        let mut bytes = vec![0; 32];
        getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(bytes)
    };
    let read = |bytes: &[u8]| match <[u8; 32]>::try_from(bytes) {
        // After a power loss, some file systems have the length of a file and not its content. Such a key is known to everyone.
        Ok(key) if key == [0; 32] => Err("it has only zeros".to_owned()),
        Ok(key) => Ok(TokenKey(key)),
        Err(_) => Err(format!("it has {} bytes; expected 32", bytes.len())),
    };
    key(
        &state_dir.join("token.key"),
        create,
        read,
        "IMDS tokens that clients have are invalid, and clients request new ones",
    )
}

/// The key of identity documents, so that its certificate stays the same.
pub(super) fn signer(state_dir: &Path) -> Result<Signer, AppError> {
    let create = || Signer::generate().map(String::into_bytes).map_err(io::Error::other);
    let read = |bytes: &[u8]| Signer::new(&String::from_utf8_lossy(bytes)).map_err(|error| error.to_string());
    key(
        &state_dir.join("identity.pem"),
        create,
        read,
        "instance identities have another certificate: imds-router identity certificate",
    )
}

const ORDERS: &str = "orders.json";

/// Changes by `modify` and `trigger`. A damaged file keeps the daemon from starting: a change that it lost may be a restriction.
pub(super) fn orders(state_dir: &Path) -> Result<RuntimeOverrides, AppError> {
    let path = state_dir.join(ORDERS);
    let damaged = |why: String| AppError::RuntimeOverrides {
        path: path.clone(),
        why,
    };
    let bytes = match existing(&path)? {
        // This daemon never writes an empty file.
        Some(bytes) if bytes.is_empty() => return Err(damaged("it is empty".to_owned())),
        bytes => bytes.unwrap_or_default(),
    };
    let written = path.clone();
    let keep = move |bytes: &[u8]| durable_files::write(&written, bytes);
    RuntimeOverrides::new(&bytes, Box::new(keep)).map_err(|error| damaged(error.to_string()))
}

/// A key in a file. Creates it if it is missing. Replaces it if it is damaged and only this user could have written it.
fn key<T>(
    path: &Path,
    create: impl FnOnce() -> io::Result<Vec<u8>>,
    read: impl Fn(&[u8]) -> Result<T, String>,
    consequence: &str,
) -> Result<T, AppError> {
    if let Some(bytes) = existing(path)? {
        match read(&bytes) {
            Ok(key) => return Ok(key),
            Err(why) => set_aside(path, &why, &format!("a new key replaces it: {consequence}"))?,
        }
    }
    let bytes = create().map_err(|source| failed(path, "a key cannot be created", source))?;
    durable_files::write(path, &bytes).map_err(|source| failed(path, "cannot be written", source))?;
    read(&bytes).map_err(|why| failed(path, "the new key cannot be used", io::Error::other(why)))
}

/// The content of a file that only this user can read and write. `None`: the file does not exist.
fn existing(path: &Path) -> Result<Option<Vec<u8>>, AppError> {
    match read_private(path, MAX_BYTES) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(failed(path, "cannot be trusted", error)),
        Err(error) => Err(failed(path, "cannot be read", error)),
    }
}

/// The name of a damaged file.
fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".damaged");
    name.into()
}

fn set_aside(path: &Path, why: &str, consequence: &str) -> Result<(), AppError> {
    let aside = aside(path);
    durable_files::rename(path, &aside).map_err(|source| failed(path, "is damaged and cannot be renamed", source))?;
    warn!(
        path = %path.display(), why, kept_as = %aside.display(),
        "a file in the state directory is damaged; {consequence}"
    );
    Ok(())
}

fn failed(path: &Path, what: &'static str, source: io::Error) -> AppError {
    AppError::State {
        path: path.to_owned(),
        what,
        source,
    }
}

/// The largest file that is read.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Reads a file that only this user can read and write. Follows no symbolic link.
///
/// # Errors
/// `InvalidInput`: the file is not a regular file of mode 0600 that belongs to this user. Others as from open(2) and read(2).
pub(super) fn read_private(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let file = files::open_no_follow(path)?;
    let meta = file.metadata()?;
    let own = meta.uid() == rustix::process::geteuid().as_raw();
    if meta.mode() & 0o077 != 0 || !own {
        let what = "expected a file of mode 0600, owned by this user";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut bytes = Vec::new();
    file.take(max_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};

    use super::*;
    use crate::containers::ContainerId;
    use crate::daemon::durable_files::tests::Recorder;
    use crate::logging::with_causes;

    #[test]
    fn the_token_key_is_made_once_and_only_ours() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let key = token_key(&state).unwrap();
        assert!(token_key(&state).unwrap() == key);
        let file = state.join("token.key");
        assert_eq!(std::fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);

        let why = |error: AppError| with_causes(&error);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        let said = why(token_key(&state).unwrap_err());
        assert!(said.contains("mode 0600, owned by this user"), "{said}");

        let elsewhere = dir.path().join("elsewhere");
        std::fs::write(&elsewhere, [7; 32]).unwrap();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        assert!(token_key(&state).is_err());

        std::fs::remove_file(&file).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &file, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let said = why(token_key(&state).unwrap_err());
        assert!(said.contains("it is a named pipe; expected a regular file"), "{said}");
    }

    #[test]
    fn replaces_damaged_keys_and_renames_the_damaged_files() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let (key, certificate) = (
            token_key(state).unwrap(),
            signer(state).unwrap().certificate().to_owned(),
        );
        for content in [&b""[..], b"short", &[7; 33], &[0; 32]] {
            for name in ["token.key", "identity.pem"] {
                std::fs::write(state.join(name), content).unwrap();
            }
            let (new_key, new_certificate) = (
                token_key(state).unwrap(),
                signer(state).unwrap().certificate().to_owned(),
            );
            assert!(new_key != key && new_key != TokenKey([0; 32]), "{content:?}");
            assert_ne!(new_certificate, certificate, "{content:?}");
            for name in ["token.key", "identity.pem"] {
                let damaged = state.join(format!("{name}.damaged"));
                assert_eq!(std::fs::read(damaged).unwrap(), content);
            }
            // The next start finds the new keys.
            assert!(token_key(state).unwrap() == new_key);
            assert_eq!(signer(state).unwrap().certificate(), new_certificate);
        }
    }

    #[test]
    fn damaged_orders_are_an_error_since_one_may_be_a_restriction() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let id = ContainerId::parse(&"a".repeat(64)).unwrap();
        orders(state)
            .unwrap()
            .order(&id, |_| true, |ordered| ordered.options.tokens_required = Some(true))
            .unwrap();
        let required = orders(state).unwrap().of(&id).unwrap();
        assert_eq!(required.options.tokens_required, Some(true));
        // An option that only a later version knows may be a restriction.
        let unknown = format!(
            r#"{{"containers":{{"{}":{{"options":{{"frozen":true}}}}}}}}"#,
            id.as_str()
        );
        for content in ["", "{\"containers\":", "\0\0\0", "[]", &unknown] {
            std::fs::write(state.join(ORDERS), content).unwrap();
            let told = orders(state).err().unwrap().to_string();
            assert!(told.contains("orders.json is damaged: "), "{content:?}: {told}");
            assert!(
                told.contains("repair it, or delete it and make the changes again"),
                "{told}"
            );
            assert_eq!(std::fs::read_to_string(state.join(ORDERS)).unwrap(), content);
        }
        std::fs::remove_file(state.join(ORDERS)).unwrap();
        assert_eq!(orders(state).unwrap().of(&id), None);
    }

    /// Whatever a power loss leaves of the writes, the daemon starts, and a reported change is there.
    #[test]
    fn starts_after_a_power_loss_at_any_moment() {
        let dir = tempfile::tempdir().unwrap();
        // The content of each write, as the daemon produces it.
        let source = dir.path().join("source");
        token_key(&source).unwrap();
        signer(&source).unwrap();
        let id = ContainerId::parse(&"b".repeat(64)).unwrap();
        let made = orders(&source).unwrap();
        let mut versions = Vec::new();
        for limit in 1..=3 {
            made.order(&id, |_| true, |ordered| ordered.options.hop_limit = Some(limit))
                .unwrap();
            versions.push(std::fs::read(source.join(ORDERS)).unwrap());
        }
        let disk = Recorder::default();
        for name in ["token.key", "identity.pem"] {
            disk.write(
                &Path::new("/state").join(name),
                &std::fs::read(source.join(name)).unwrap(),
            );
        }
        let mut returned = Vec::new();
        for version in &versions {
            disk.write(&Path::new("/state").join(ORDERS), version);
            returned.push(disk.calls());
        }
        for calls in 0..=disk.calls() {
            let ordered = returned.iter().filter(|end| **end <= calls).count();
            for files in disk.after_power_loss(calls) {
                let root = tempfile::tempdir_in(dir.path()).unwrap();
                let state = root.path().join("state");
                std::fs::DirBuilder::new().mode(0o700).create(&state).unwrap();
                for (path, bytes) in &files {
                    let file = root.path().join(path.strip_prefix("/").unwrap());
                    std::fs::write(&file, bytes).unwrap();
                    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
                }
                let trace = format!("after {calls} calls: {:?}", files.keys());
                token_key(&state).unwrap_or_else(|error| panic!("{trace}: {error}"));
                // A new RSA key takes long.
                if files.contains_key(Path::new("/state/identity.pem")) {
                    signer(&state).unwrap_or_else(|error| panic!("{trace}: {error}"));
                }
                let orders = orders(&state).unwrap_or_else(|error| panic!("{trace}: {error}"));
                let limit = orders
                    .of(&id)
                    .map_or(0, |it| usize::from(it.options.hop_limit.unwrap()));
                assert!(
                    limit == ordered || limit == ordered + 1,
                    "{trace}: {limit} of {ordered}"
                );
                let damaged = std::fs::read_dir(&state).unwrap().flatten();
                let damaged = damaged.filter(|it| it.path().extension().is_some_and(|it| it == "damaged"));
                assert_eq!(damaged.count(), 0, "{trace}: a power loss damages no file");
            }
        }
    }
}
