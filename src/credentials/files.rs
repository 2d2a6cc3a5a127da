//! The files of AWS's tools: where they are, and that nobody else has written them.
//!
//! Whoever writes these files decides whose credentials the daemon uses, and with `allow_process` which programs it runs:
//! they count only if they belong to root, to the daemon's user, or to the user that was named, and nobody else may write
//! them. They are looked at anew each time, because shared folders of VMs send no notifications.

use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use crate::files;

/// The largest file that is read; real ones have a few kilobytes.
const MAX_BYTES: u64 = 1 << 20;
/// The permissions of group and others to write (inode(7)).
const WRITABLE_BY_OTHERS: u32 = 0o022;

/// Where the files are, and whose they may be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AwsFiles {
    /// `config`.
    pub config: PathBuf,
    /// `credentials`.
    pub credentials: PathBuf,
    /// The directory of both, as a rule.
    pub directory: PathBuf,
    /// Users beside root who may own them.
    users: Vec<u32>,
}

/// Why a file is not used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{} is not used: {why}", path.display())]
    Untrusted {
        /// Which file.
        path: PathBuf,
        /// What is wrong, and what was expected.
        why: String,
    },
}

/// A file as it was at one moment. Its contents are not in `Debug`: they are mostly secrets.
#[derive(Clone)]
pub struct Contents {
    /// What it held.
    pub text: String,
    /// Which file that was.
    pub stamp: Stamp,
}

impl std::fmt::Debug for Contents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of {:?}", self.text.len(), self.stamp)
    }
}

/// What tells whether a file has changed: device, inode, size, mode, owner, and times in nanoseconds.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stamp([i128; 7]);

impl Stamp {
    fn of(meta: &std::fs::Metadata) -> Self {
        let time = |seconds: i64, nanos: i64| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        Self([
            meta.dev().into(),
            meta.ino().into(),
            meta.size().into(),
            meta.mode().into(),
            meta.uid().into(),
            time(meta.mtime(), meta.mtime_nsec()),
            time(meta.ctime(), meta.ctime_nsec()),
        ])
    }

    /// Whether both are of one file, whatever it holds.
    fn same_file(&self, other: &Self) -> bool {
        self.0[..2] == other.0[..2]
    }
}

/// Who asked for the daemon to be run, where that is another than its user: `sudo` says it in its variables.
struct Sudo {
    user: u32,
    home: PathBuf,
}

impl Sudo {
    fn find(daemon: u32, variable: &impl Fn(&str) -> Option<String>, passwd: &str) -> Option<Self> {
        let user: u32 = variable("SUDO_UID")?.parse().ok().filter(|user| *user != 0)?;
        // Anybody may have such a variable; it means something only to root.
        let named = |line: &&str| line.split(':').nth(2) == Some(&user.to_string());
        let home = passwd.lines().find(named)?.split(':').nth(5)?;
        (daemon == 0).then(|| Self {
            user,
            home: home.into(),
        })
    }
}

impl AwsFiles {
    /// Finds them: in `aws_dir` if the operator names it; else where AWS's own variables say; else in `.aws` of the user's
    /// home, who is the one that called `sudo`, if it was called and that directory exists.
    pub fn find(aws_dir: Option<&Path>, variable: impl Fn(&str) -> Option<String>) -> Self {
        let daemon = rustix::process::geteuid().as_raw();
        let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
        let mut users = vec![daemon];
        if let Some(directory) = aws_dir {
            // Naming a directory names its owner.
            users.extend(std::fs::metadata(directory).map(|meta| meta.uid()).ok());
            return Self {
                config: directory.join("config"),
                credentials: directory.join("credentials"),
                directory: directory.to_owned(),
                users,
            };
        }
        let own = || PathBuf::from(variable("HOME").unwrap_or_else(|| "/root".to_owned())).join(".aws");
        let directory = match Sudo::find(daemon, &variable, &passwd) {
            Some(sudo) => {
                users.push(sudo.user);
                Some(sudo.home.join(".aws"))
                    .filter(|it| it.is_dir())
                    .unwrap_or_else(own)
            }
            None => own(),
        };
        let path = |name: &str, default: &str| {
            variable(name)
                .filter(|it| !it.is_empty())
                .map_or_else(|| directory.join(default), PathBuf::from)
        };
        Self {
            config: path("AWS_CONFIG_FILE", "config"),
            credentials: path("AWS_SHARED_CREDENTIALS_FILE", "credentials"),
            directory,
            users,
        }
    }

    /// Where the AWS CLI keeps the tokens of `aws sso login`.
    pub fn sso_cache(&self) -> PathBuf {
        self.directory.join("sso/cache")
    }

    /// Reads a file, if there is one.
    ///
    /// # Errors
    /// When it cannot be read, or others may have written it.
    pub fn read(&self, path: &Path) -> Result<Option<Contents>, FileError> {
        let unreadable = |source| FileError::Unreadable {
            path: path.to_owned(),
            source,
        };
        let file = match files::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(unreadable(error)),
        };
        let meta = file.metadata().map_err(unreadable)?;
        self.trust(path, &meta)?;
        let mut text = String::new();
        file.take(MAX_BYTES).read_to_string(&mut text).map_err(unreadable)?;
        Ok(Some(Contents {
            text,
            stamp: Stamp::of(&meta),
        }))
    }

    fn trust(&self, path: &Path, meta: &std::fs::Metadata) -> Result<(), FileError> {
        let untrusted = |why: String| {
            Err(FileError::Untrusted {
                path: path.to_owned(),
                why,
            })
        };
        let (mode, owner) = (meta.mode() & 0o7777, meta.uid());
        if !meta.is_file() {
            return untrusted("it is not a file".to_owned());
        }
        if owner != 0 && !self.users.contains(&owner) {
            return untrusted(format!(
                "it belongs to user {owner}; expected root or user {}; [credentials] aws_dir names a directory, and with \
                 it its owner",
                self.users.last().copied().unwrap_or(0)
            ));
        }
        if mode & WRITABLE_BY_OTHERS != 0 {
            return untrusted(format!(
                "others may write it (mode {mode:04o}); chmod go-w {}",
                path.display()
            ));
        }
        if meta.len() >= MAX_BYTES {
            return untrusted(format!("it has {} bytes; expected less than {MAX_BYTES}", meta.len()));
        }
        Ok(())
    }

    /// Writes into the file that was read before, and into no other.
    ///
    /// # Errors
    /// When that cannot be done: a directory that is mounted for reading only, for example.
    pub fn write(&self, path: &Path, read: &Stamp, text: &str) -> io::Result<()> {
        let flags = (rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK).bits();
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .custom_flags(flags.cast_signed())
            .open(path)?;
        let meta = file.metadata()?;
        if !Stamp::of(&meta).same_file(read) || self.trust(path, &meta).is_err() {
            return Err(io::Error::other("it is not the file any more that was read"));
        }
        // In one piece, and the end of what was there before cut off after it: who reads meanwhile sees JSON that is too
        // long at worst, and asks again.
        file.rewind()?;
        file.write_all(text.as_bytes())?;
        file.set_len(text.len() as u64)
    }

    /// What changes when any of the files does: those two, and the tokens of `aws sso login`.
    pub fn stamps(&self) -> Vec<(PathBuf, Stamp)> {
        let tokens = std::fs::read_dir(self.sso_cache()).into_iter().flatten().flatten();
        // A directory with more than that holds something else.
        let mut paths: Vec<PathBuf> = tokens.take(1000).map(|entry| entry.path()).collect();
        paths.sort();
        paths.extend([self.config.clone(), self.credentials.clone()]);
        let stamped = paths.into_iter().filter_map(|path| {
            let stamp = Stamp::of(&std::fs::metadata(&path).ok()?);
            Some((path, stamp))
        });
        stamped.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn no_variable(_: &str) -> Option<String> {
        None
    }

    #[test]
    fn files_that_others_may_write_are_refused_and_say_why() {
        let dir = tempfile::tempdir().unwrap();
        let files = AwsFiles::find(Some(dir.path()), no_variable);
        assert!(files.read(&files.config).unwrap().is_none());
        std::fs::write(&files.config, "[default]").unwrap();
        for (mode, why) in [
            (0o600, None),
            (0o644, None),
            (0o620, Some("others may write it (mode 0620); chmod go-w ")),
            (0o602, Some("others may write it (mode 0602)")),
        ] {
            std::fs::set_permissions(&files.config, std::fs::Permissions::from_mode(mode)).unwrap();
            match (files.read(&files.config), why) {
                (Ok(Some(contents)), None) => assert_eq!(contents.text, "[default]"),
                (Err(error), Some(why)) => assert!(error.to_string().contains(why), "{error}"),
                other => panic!("{mode:o}: {other:?}"),
            }
        }
        let error = files.read(dir.path()).unwrap_err().to_string();
        assert!(error.contains("it is a directory; expected a regular file"), "{error}");
        let stranger = AwsFiles {
            users: vec![4_000_000],
            ..files.clone()
        };
        std::fs::set_permissions(&files.config, std::fs::Permissions::from_mode(0o600)).unwrap();
        match rustix::process::geteuid().as_raw() {
            // Root's files are everybody's to trust.
            0 => assert!(stranger.read(&files.config).is_ok()),
            user => {
                let error = stranger.read(&files.config).unwrap_err().to_string();
                assert!(
                    error.contains(&format!("it belongs to user {user}; expected")),
                    "{error}"
                );
            }
        }
        let large = dir.path().join("large");
        std::fs::File::create(&large).unwrap().set_len(MAX_BYTES).unwrap();
        assert!(
            files
                .read(&large)
                .unwrap_err()
                .to_string()
                .contains("bytes; expected less")
        );
    }

    #[test]
    fn where_the_files_are() {
        let variables = |name: &str| {
            Some(match name {
                "HOME" => "/home/me".to_owned(),
                "AWS_CONFIG_FILE" => "/elsewhere/c".to_owned(),
                _ => return None,
            })
        };
        let files = AwsFiles::find(None, variables);
        assert_eq!(files.config, Path::new("/elsewhere/c"));
        assert_eq!(files.credentials, Path::new("/home/me/.aws/credentials"));
        assert_eq!(files.sso_cache(), Path::new("/home/me/.aws/sso/cache"));
        let named = AwsFiles::find(Some(Path::new("/aws")), variables);
        assert_eq!(named.config, Path::new("/aws/config"));

        let passwd = "root:x:0:0:root:/root:/bin/sh\nme:x:1000:1000::/home/me:/bin/sh\n";
        let sudo = |user: &str| {
            let user = user.to_owned();
            move |name: &str| (name == "SUDO_UID").then(|| user.clone())
        };
        let found = Sudo::find(0, &sudo("1000"), passwd).unwrap();
        assert_eq!((found.user, found.home.as_path()), (1000, Path::new("/home/me")));
        assert!(
            Sudo::find(1001, &sudo("1000"), passwd).is_none(),
            "only root was called by sudo"
        );
        assert!(Sudo::find(0, &sudo("1001"), passwd).is_none());
        assert!(Sudo::find(0, &sudo("0"), passwd).is_none());
    }

    #[test]
    fn only_the_file_that_was_read_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let files = AwsFiles::find(Some(dir.path()), no_variable);
        std::fs::create_dir_all(files.sso_cache()).unwrap();
        let path = files.sso_cache().join("a.json");
        std::fs::write(&path, "a longer text").unwrap();
        let before = files.stamps();
        let read = files.read(&path).unwrap().unwrap();
        files.write(&path, &read.stamp, "short").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
        assert_ne!(files.stamps(), before);
        // Another file in its place, and a link to another.
        std::fs::rename(&path, dir.path().join("b")).unwrap();
        assert!(files.write(&path, &read.stamp, "x").is_err());
        std::fs::write(&path, "new").unwrap();
        assert!(files.write(&path, &read.stamp, "x").is_err());
        std::fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink(dir.path().join("b"), &path).unwrap();
        assert!(files.write(&path, &read.stamp, "x").is_err());
        assert_eq!(std::fs::read_to_string(dir.path().join("b")).unwrap(), "short");
    }
}
