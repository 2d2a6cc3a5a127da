//! What outlives the daemon: files of its state directory, which only it can read.

use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use super::AppError;
use crate::clock::Clock;
use crate::metadata::identity::Signer;
use crate::orders::Orders;
use crate::wire::token::{TokenAuthority, TokenKey};

/// Who issues tokens and verifies them.
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

/// The key of tokens: kept on disk, so that a restart of the daemon logs nobody out.
fn token_key(state_dir: &Path) -> Result<TokenKey, AppError> {
    let path = state_dir.join("token.key");
    let make = || {
        let mut bytes = vec![0; 32];
        getrandom::fill(&mut bytes).map_err(|error| io::Error::other(error.to_string()))?;
        Ok(bytes)
    };
    let what = "is not a key that only we know; remove it, and clients ask for new tokens";
    let bytes = kept_secret(&path, make, what)?;
    let bytes = bytes.try_into().map_err(|_| AppError::State {
        path,
        what,
        source: io::Error::other("expected 32 bytes"),
    })?;
    Ok(TokenKey(bytes))
}

/// The key of identity documents: kept on disk, so that its certificate stays what it is.
pub(super) fn signer(state_dir: &Path) -> Result<Signer, AppError> {
    let path = state_dir.join("identity.pem");
    let make = || Signer::generate().map(String::into_bytes).map_err(io::Error::other);
    let what = "is not a key that only we know; remove it, and identities are signed with a new one";
    let bytes = kept_secret(&path, make, what)?;
    Signer::new(&String::from_utf8_lossy(&bytes)).map_err(|error| AppError::State {
        path,
        what,
        source: io::Error::other(error),
    })
}

/// What was ordered for containers: kept on disk, so that a restart of the daemon forgets nothing.
pub(super) fn orders(state_dir: &Path) -> Result<Orders, AppError> {
    let path = state_dir.join("orders.json");
    let what = "is not what this daemon has written; remove it, and what was ordered is forgotten";
    let kept = kept_secret(&path, || Ok(Vec::new()), what)?;
    let written = path.clone();
    let keep = Box::new(move |bytes: &[u8]| write_whole(&written, bytes));
    Orders::new(&kept, keep).map_err(|error| AppError::State {
        path,
        what,
        source: io::Error::other(error),
    })
}

/// Writes a file that only we can read, whole or not at all: a crash in between leaves what was there before.
fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .custom_flags(no_follow())
        .open(&new)?;
    file.write_all(bytes)?;
    std::fs::rename(&new, path)
}

/// Linux O_NOFOLLOW (open(2)).
fn no_follow() -> i32 {
    i32::try_from(rustix::fs::OFlags::NOFOLLOW.bits()).unwrap_or(0)
}

/// The most that a file of ours may hold.
const MOST_KEPT: u64 = 16 * 1024 * 1024;

/// Creates the directory of a file, 0700, if it does not exist.
fn create_directory(path: &Path) -> io::Result<()> {
    let Some(directory) = path.parent() else { return Ok(()) };
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

/// Writes a file of mode 0600 in a directory of mode 0700, whole or not at all.
pub(super) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    create_directory(path)?;
    write_whole(path, bytes)
}

/// Reads a file that only this user can read and write. Follows no symbolic link.
///
/// # Errors
/// `InvalidInput`: the file is not a regular file of mode 0600 that belongs to this user. Others as from open(2) and read(2).
pub(super) fn read_private(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let file = std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(no_follow())
        .open(path)?;
    let meta = file.metadata()?;
    let own = meta.uid() == rustix::process::geteuid().as_raw();
    if !meta.is_file() || meta.mode() & 0o077 != 0 || !own {
        let what = "expected a file of mode 0600, owned by this user";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut bytes = Vec::new();
    file.take(max_bytes).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A secret that is kept on disk. Made on first use, 0600 in a 0700 directory; no symbolic link is followed, and a file that
/// others could have read is not used. `bad`: what is said of such a file.
fn kept_secret(
    path: &Path,
    make: impl FnOnce() -> io::Result<Vec<u8>>,
    bad: &'static str,
) -> Result<Vec<u8>, AppError> {
    let state = |what| {
        let path = path.to_owned();
        move |source| AppError::State { path, what, source }
    };
    create_directory(path).map_err(state("its directory cannot be made"))?;
    match read_private(path, MOST_KEPT) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let bytes = make().map_err(state("cannot be made up"))?;
            write_whole(path, &bytes).map_err(state("cannot be written"))?;
            Ok(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Err(state(bad)(error)),
        Err(error) => Err(state("cannot be read")(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_token_key_is_made_once_and_only_ours() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let key = token_key(&state).unwrap();
        assert!(token_key(&state).unwrap() == key);
        let file = state.join("token.key");
        assert_eq!(std::fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o600);

        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
        assert!(
            token_key(&state)
                .unwrap_err()
                .to_string()
                .contains("not a key that only we know")
        );

        let elsewhere = dir.path().join("elsewhere");
        std::fs::write(&elsewhere, [7; 32]).unwrap();
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
        assert!(token_key(&state).is_err());
    }
}
