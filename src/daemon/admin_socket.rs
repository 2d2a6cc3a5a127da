//! The admin socket: whose it is, and that nobody else may use it.

use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tracing::warn;

use super::AppError;
use super::admin_api::Observer;
use crate::admin;
use crate::logging::with_causes;

/// The mode of the admin socket: root and its group.
const ADMIN_MODE: u32 = 0o660;

/// Whether a process listens there. Never waits: a process that does not accept connections has a full backlog after a while, and
/// connect(2) would wait for it.
pub(super) fn another_answers(admin_socket: &Path) -> bool {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

    let connected = SocketAddrUnix::new(admin_socket).and_then(|address| {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &address)
    });
    matches!(connected, Ok(()) | Err(rustix::io::Errno::AGAIN))
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
    bind(path).map_err(failed)
}

/// A listener that has its mode before any other user can reach it: bound in a directory that only this user may enter, then
/// linked to its path. Unlike a rename, a link never replaces a file. The umask would apply to all threads of the process.
fn bind(path: &Path) -> io::Result<UnixListener> {
    let directory = PrivateDirectory::beside(path)?;
    let private = directory.socket();
    let listener = UnixListener::bind(&private)?;
    std::fs::set_permissions(&private, std::fs::Permissions::from_mode(ADMIN_MODE))?;
    std::fs::hard_link(&private, path)?;
    Ok(listener)
}

/// A directory for one socket. Dropping it removes both.
struct PrivateDirectory(PathBuf);

impl PrivateDirectory {
    /// In the directory of `path`. Its name is short, since the path of a socket has at most 107 bytes (unix(7)).
    fn beside(path: &Path) -> io::Result<Self> {
        loop {
            let mut random = [0; 2];
            getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
            let directory = path.with_file_name(format!(".{:04x}", u16::from_be_bytes(random)));
            match std::fs::DirBuilder::new().mode(0o700).create(&directory) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => return made.map(|()| Self(directory)),
            }
        }
    }

    fn socket(&self) -> PathBuf {
        self.0.join("s")
    }
}

impl Drop for PrivateDirectory {
    fn drop(&mut self) {
        // What stays is an empty directory, or a second name of the socket that only this user can use.
        let _ = std::fs::remove_file(self.socket());
        let _ = std::fs::remove_dir(&self.0);
    }
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

    #[test]
    fn a_process_that_never_accepts_is_found_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        assert!(!another_answers(&path));
        let stranger = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let asked = path.clone();
        std::thread::spawn(move || {
            // More than any backlog (net.core.somaxconn).
            let answers: Vec<bool> = (0..10_000).map(|_| another_answers(&asked)).collect();
            sender.send(answers)
        });
        let answers = receiver.recv_timeout(Duration::from_secs(30)).expect("it waits");
        assert!(answers.iter().all(|it| *it));
        drop(stranger);
        assert!(!another_answers(&path), "a crash left it");
    }

    /// By the events of the directory: the name appears once, and no attribute of it changes afterwards.
    #[tokio::test]
    async fn the_socket_never_has_another_mode() {
        use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};

        let dir = tempfile::tempdir().unwrap();
        let inotify = init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).unwrap();
        let flags = WatchFlags::CREATE | WatchFlags::MOVED_TO | WatchFlags::ATTRIB;
        add_watch(&inotify, dir.path(), flags).unwrap();
        let path = dir.path().join("admin.sock");
        let _listener = listen(&path).unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = Reader::new(&inotify, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = events.next() {
            if event.file_name().is_some_and(|name| name.to_bytes() == b"admin.sock") {
                seen.push(event.events());
            }
        }
        assert_eq!(seen, [ReadFlags::CREATE]);
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, ADMIN_MODE);
        assert!(std::os::unix::net::UnixStream::connect(&path).is_ok());
        let names = std::fs::read_dir(dir.path()).unwrap();
        assert_eq!(names.count(), 1, "the private directory is removed");
    }

    #[test]
    fn only_this_user_may_enter_the_private_directory() {
        let dir = tempfile::tempdir().unwrap();
        let private = PrivateDirectory::beside(&dir.path().join("admin.sock")).unwrap();
        assert_eq!(std::fs::metadata(&private.0).unwrap().mode() & 0o777, 0o700);
        assert_eq!(private.0.parent(), Some(dir.path()));
    }
}
