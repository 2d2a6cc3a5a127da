//! The admin socket: whose it is, and that nobody else may use it.

use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tracing::warn;

use super::AppError;
use super::observer::Observer;
use crate::admin;
use crate::telemetry::with_causes;

/// The mode of the admin socket: root and its group.
const ADMIN_MODE: u32 = 0o660;

/// Whether somebody answers there.
pub(super) fn another_answers(admin_socket: &Path) -> bool {
    std::os::unix::net::UnixStream::connect(admin_socket).is_ok()
}

/// The file of the admin socket. Dropping it removes it, unless it is another daemon's by now.
struct AdminFile {
    path: PathBuf,
    inode: Option<u64>,
}

impl AdminFile {
    fn inode(path: &Path) -> Option<u64> {
        std::fs::symlink_metadata(path).map(|it| it.ino()).ok()
    }
}

impl Drop for AdminFile {
    fn drop(&mut self) {
        if Self::inode(&self.path) == self.inode {
            // What is gone already is fine.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Answers on the admin socket until the task is dropped.
pub(super) async fn serve(listener: UnixListener, path: PathBuf, observer: Arc<Observer>) {
    let inode = AdminFile::inode(&path);
    let _file = AdminFile { path, inode };
    admin::serve(listener, observer).await;
}

/// As [`serve`], as soon as the daemon that has served before has left the socket.
pub(super) async fn take_over(path: PathBuf, observer: Arc<Observer>) {
    let mut said = false;
    loop {
        match listen(&path) {
            Ok(listener) => return serve(listener, path, observer).await,
            Err(error) if !said => warn!(error = with_causes(&error), "no admin socket yet"),
            Err(_) => {}
        }
        said = true;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// A listener there, if nobody else answers.
pub(super) fn listen(path: &Path) -> Result<UnixListener, AppError> {
    let failed = |source| AppError::Admin {
        path: path.to_owned(),
        source,
    };
    if let Some(directory) = path.parent() {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(directory)
            .map_err(failed)?;
    }
    // What a crash left; one that still answers is another daemon's, and the table of rules will say so.
    if std::fs::symlink_metadata(path).is_ok_and(|it| it.file_type().is_socket()) && !another_answers(path) {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(ADMIN_MODE)).map_err(failed)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_a_crash_left_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/admin.sock");
        drop(listen(&path).unwrap());
        let _second = listen(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, ADMIN_MODE);
        assert!(listen(&path).is_err());
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        assert!(listen(&file).is_err());
        assert_eq!(std::fs::read(&file).unwrap(), b"x");
    }
}
