//! Writes files that survive a power loss: at every moment, the path names the old file or the whole new one.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// Replaces a file of mode 0600. Creates its directory (0700) if it is missing.
///
/// # Errors
/// As from the system calls. The file is then the old one or, if only the last sync failed, perhaps the new one.
pub(super) fn write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    write_to(&System, path, bytes)
}

/// Renames a file to a name that may exist.
///
/// # Errors
/// As from the system calls.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    System.rename(from, to)?;
    System.sync_directory(directory_of(to))
}

/// The order matters:
/// 1. A temporary file that an earlier crash left goes away, so that `create` finds none.
/// 2. The new content is on the disk before the path names it; otherwise the file may be empty after a power loss.
/// 3. The rename is on the disk before this returns; otherwise a reported change may be lost.
fn write_to<D: Disk>(disk: &D, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = directory_of(path);
    create_directory(disk, directory)?;
    let new = path.with_extension("new");
    disk.remove(&new)?;
    let file = disk.create(&new, bytes)?;
    disk.sync_file(&file)?;
    disk.rename(&new, path)?;
    disk.sync_directory(directory)
}

/// Creates a directory and its missing parents.
fn create_directory(disk: &impl Disk, directory: &Path) -> io::Result<()> {
    if disk.is_directory(directory) {
        return Ok(());
    }
    let parent = directory_of(directory);
    create_directory(disk, parent)?;
    match disk.create_directory(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    disk.sync_directory(parent)
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

/// The system calls of a write, so that tests can record them.
trait Disk {
    type File;
    fn is_directory(&self, path: &Path) -> bool;
    fn create_directory(&self, path: &Path) -> io::Result<()>;
    /// Removes a file if it exists.
    fn remove(&self, path: &Path) -> io::Result<()>;
    fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<Self::File>;
    fn sync_file(&self, file: &Self::File) -> io::Result<()>;
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
}

struct System;

impl Disk for System {
    type File = File;

    fn is_directory(&self, path: &Path) -> bool {
        path.is_dir()
    }

    fn create_directory(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().mode(0o700).create(path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<File> {
        let mut file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
            .open(path)?;
        file.write_all(bytes)?;
        Ok(file)
    }

    fn sync_file(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        std::fs::rename(from, to)
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        match File::open(path)?.sync_all() {
            // fsync(2): some file systems cannot sync a directory.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            synced => synced,
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::cell::RefCell;
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::PathBuf;

    use super::*;

    /// One system call that changes the disk.
    #[derive(Clone, Debug)]
    enum Call {
        CreateDirectory(PathBuf),
        Remove(PathBuf),
        /// The number of the file, since its name changes.
        Create(PathBuf, usize, Vec<u8>),
        SyncFile(usize),
        Rename(PathBuf, PathBuf),
        SyncDirectory(PathBuf),
    }

    /// Records calls. Directories exist once they are created; the root does.
    #[derive(Default)]
    pub(in crate::daemon) struct Recorder {
        calls: RefCell<Vec<Call>>,
    }

    impl Recorder {
        /// Records a write.
        pub(in crate::daemon) fn write(&self, path: &Path, bytes: &[u8]) {
            write_to(self, path, bytes).unwrap();
        }

        fn push(&self, call: Call) {
            self.calls.borrow_mut().push(call);
        }

        /// Every content of the disk (file by path) that a power loss can leave after the first `calls` calls; and how many calls
        /// there are.
        ///
        /// As ext4 with `data=writeback`: changes of directories reach the disk in their order, and surely by a sync of their
        /// directory. The content of a file reaches it surely by a sync of the file. Before, the file may be empty, cut, or zeros.
        pub(in crate::daemon) fn after_power_loss(&self, calls: usize) -> BTreeSet<BTreeMap<PathBuf, Vec<u8>>> {
            let all = self.calls.borrow();
            let done = &all[..calls.min(all.len())];
            let is_synced = |at: usize| {
                let (Call::CreateDirectory(path) | Call::Remove(path) | Call::Create(path, ..) | Call::Rename(_, path)) =
                    &done[at]
                else {
                    return false;
                };
                let directory = directory_of(path);
                done[at..]
                    .iter()
                    .any(|call| matches!(call, Call::SyncDirectory(it) if it == directory))
            };
            let durable = (0..done.len())
                .rev()
                .find(|at| is_synced(*at))
                .map_or(0, |last| last + 1);
            let mut outcomes = BTreeSet::new();
            for reached in durable..=done.len() {
                let mut files: BTreeMap<PathBuf, usize> = BTreeMap::new();
                for call in &done[..reached] {
                    match call {
                        Call::Remove(path) => drop(files.remove(path)),
                        Call::Create(path, number, _) => drop(files.insert(path.clone(), *number)),
                        Call::Rename(from, to) => {
                            let number = files.remove(from).expect("it was created");
                            files.insert(to.clone(), number);
                        }
                        Call::CreateDirectory(_) | Call::SyncFile(_) | Call::SyncDirectory(_) => {}
                    }
                }
                for damage in [0, 1, 2, 3] {
                    let content = |number: usize| {
                        let bytes = done.iter().find_map(|call| match call {
                            Call::Create(_, created, bytes) if *created == number => Some(bytes.clone()),
                            _ => None,
                        });
                        let bytes = bytes.expect("it was created");
                        let synced = done
                            .iter()
                            .any(|call| matches!(call, Call::SyncFile(it) if *it == number));
                        match damage {
                            _ if synced => bytes,
                            0 => bytes,
                            1 => Vec::new(),
                            2 => bytes[..bytes.len() / 2].to_vec(),
                            _ => vec![0; bytes.len()],
                        }
                    };
                    outcomes.insert(files.iter().map(|(path, it)| (path.clone(), content(*it))).collect());
                }
            }
            outcomes
        }

        pub(in crate::daemon) fn calls(&self) -> usize {
            self.calls.borrow().len()
        }
    }

    impl Disk for Recorder {
        type File = usize;

        fn is_directory(&self, path: &Path) -> bool {
            let created = |call: &Call| matches!(call, Call::CreateDirectory(it) if it == path);
            path == Path::new("/") || self.calls.borrow().iter().any(created)
        }

        fn create_directory(&self, path: &Path) -> io::Result<()> {
            self.push(Call::CreateDirectory(path.to_owned()));
            Ok(())
        }

        fn remove(&self, path: &Path) -> io::Result<()> {
            self.push(Call::Remove(path.to_owned()));
            Ok(())
        }

        fn create(&self, path: &Path, bytes: &[u8]) -> io::Result<usize> {
            let number = self.calls();
            self.push(Call::Create(path.to_owned(), number, bytes.to_vec()));
            Ok(number)
        }

        fn sync_file(&self, file: &usize) -> io::Result<()> {
            self.push(Call::SyncFile(*file));
            Ok(())
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.push(Call::Rename(from.to_owned(), to.to_owned()));
            Ok(())
        }

        fn sync_directory(&self, path: &Path) -> io::Result<()> {
            self.push(Call::SyncDirectory(path.to_owned()));
            Ok(())
        }
    }

    /// Each directory that a write created is synced in its parent.
    #[test]
    fn syncs_the_directories_that_it_creates() {
        let disk = Recorder::default();
        disk.write(Path::new("/a/b/file"), b"1");
        let calls: Vec<_> = disk.calls.borrow().iter().map(|call| format!("{call:?}")).collect();
        let expected = [
            "CreateDirectory(\"/a\")",
            "SyncDirectory(\"/\")",
            "CreateDirectory(\"/a/b\")",
            "SyncDirectory(\"/a\")",
            "Remove(\"/a/b/file.new\")",
            "Create(\"/a/b/file.new\", 5, [49])",
            "SyncFile(5)",
            "Rename(\"/a/b/file.new\", \"/a/b/file\")",
            "SyncDirectory(\"/a/b\")",
        ];
        assert_eq!(calls, expected);
    }

    /// A file is never anything but the last or the present content; once a write has returned, it is the present one.
    #[test]
    fn leaves_the_old_or_the_new_file_after_a_power_loss() {
        let disk = Recorder::default();
        let path = Path::new("/state/orders.json");
        let contents: [&[u8]; 3] = [b"first", b"second", b"third"];
        let mut returned = Vec::new();
        for content in contents {
            disk.write(path, content);
            returned.push(disk.calls());
        }
        for calls in 0..=disk.calls() {
            let written = returned.iter().filter(|end| **end <= calls).count();
            let mut allowed: Vec<Option<&[u8]>> = contents.get(written).map(|it| Some(*it)).into_iter().collect();
            allowed.push(written.checked_sub(1).map(|last| contents[last]));
            for files in disk.after_power_loss(calls) {
                let found = files.get(path).map(Vec::as_slice);
                assert!(allowed.contains(&found), "after {calls} calls: {found:?}");
            }
        }
    }

    #[test]
    fn writes_for_this_user_only_and_replaces_a_temporary_file_of_a_crash() {
        use std::os::unix::fs::MetadataExt as _;

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/file.json");
        write(&path, b"1").unwrap();
        std::fs::write(path.with_extension("new"), "of a crash").unwrap();
        write(&path, b"2").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"2");
        assert!(!path.with_extension("new").exists());
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let directory = std::fs::metadata(path.parent().unwrap()).unwrap();
        assert_eq!(directory.mode() & 0o777, 0o700);
        // `path` is a file, so that nothing can be below it.
        assert!(write(&path.join("x"), b"3").is_err());
    }
}
