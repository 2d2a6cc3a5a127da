//! Reads files whose paths the operator configures. No read blocks: a named pipe without a writer is an error at once.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::path::Path;

/// Opens a regular file for reading.
///
/// # Errors
/// `InvalidInput`: the path is a directory, a named pipe, a device or a socket. Others as from open(2).
pub fn open(path: &Path) -> io::Result<File> {
    open_with(path, false)
}

/// As [`open`], and follows no symbolic link.
///
/// # Errors
/// As from [`open`].
#[cfg(target_os = "linux")]
pub fn open_no_follow(path: &Path) -> io::Result<File> {
    open_with(path, true)
}

fn open_with(path: &Path, no_follow: bool) -> io::Result<File> {
    let (file, kind) = open_any(path, no_follow)?;
    match kind {
        None => Ok(file),
        Some(kind) => Err(other_kind(kind)),
    }
}

fn other_kind(kind: &str) -> io::Error {
    io::Error::new(
        io::ErrorKind::InvalidInput,
        format!("it is {kind}; expected a regular file"),
    )
}

/// Opens any file without waiting for the other end of a pipe, and names its kind unless it is regular.
#[cfg(target_os = "linux")]
fn open_any(path: &Path, no_follow: bool) -> io::Result<(File, Option<&'static str>)> {
    use rustix::fs::OFlags;
    use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};

    let mut flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    flags.set(OFlags::NOFOLLOW, no_follow);
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits().cast_signed())
        .open(path);
    let file = match opened {
        // open(2): a socket has no file that can be opened.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Err(other_kind("a socket or a device")),
        opened => opened?,
    };
    let kind = file.metadata()?.file_type();
    let kind = match () {
        () if kind.is_file() => None,
        () if kind.is_dir() => Some("a directory"),
        () if kind.is_fifo() => Some("a named pipe"),
        () => Some("a device"),
    };
    Ok((file, kind))
}

#[cfg(not(target_os = "linux"))]
fn open_any(path: &Path, _no_follow: bool) -> io::Result<(File, Option<&'static str>)> {
    match std::fs::metadata(path)?.is_file() {
        true => Ok((OpenOptions::new().read(true).open(path)?, None)),
        false => Err(other_kind("not a file")),
    }
}

/// Reads a regular file of at most `max_bytes`.
///
/// # Errors
/// `InvalidInput`: the file is another kind of file. `FileTooLarge`: it has more bytes. Others as from open(2) and read(2).
pub fn read(path: &Path, max_bytes: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    read_all(open(path)?, max_bytes, &mut bytes)?;
    Ok(bytes)
}

/// The same, of text.
///
/// # Errors
/// As from [`read`]; `InvalidData`: the file is not UTF-8.
pub fn read_text(path: &Path, max_bytes: u64) -> io::Result<String> {
    text(read(path, max_bytes)?)
}

/// As [`read_text`], of a path on the command line. That may also be a pipe that the shell has opened, as in
/// `--compose <(docker compose config)`: such a pipe has a writer. `/dev/null` is an empty file.
///
/// # Errors
/// As from [`read_text`].
pub fn read_argument(path: &Path, max_bytes: u64) -> io::Result<String> {
    let by_descriptor = ["/dev/fd", "/dev/stdin", "/proc/self/fd"];
    if path == Path::new("/dev/null") {
        return Ok(String::new());
    }
    if !by_descriptor.iter().any(|it| path.starts_with(it)) {
        return read_text(path, max_bytes);
    }
    let mut bytes = Vec::new();
    read_all(File::open(path)?, max_bytes, &mut bytes)?;
    text(bytes)
}

fn read_all(file: File, max_bytes: u64, bytes: &mut Vec<u8>) -> io::Result<()> {
    file.take(max_bytes.saturating_add(1)).read_to_end(bytes)?;
    match u64::try_from(bytes.len()).is_ok_and(|length| length <= max_bytes) {
        true => Ok(()),
        false => Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("it has more than {max_bytes} bytes"),
        )),
    }
}

fn text(bytes: Vec<u8>) -> io::Result<String> {
    String::from_utf8(bytes).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text"))
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    #[test]
    fn rejects_everything_but_regular_files_without_blocking() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let socket = dir.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "text").unwrap();
        for (path, said) in [
            (pipe.as_path(), "it is a named pipe; expected a regular file"),
            (&socket, "it is a socket or a device; expected a regular file"),
            (dir.path(), "it is a directory; expected a regular file"),
            (Path::new("/dev/zero"), "it is a device; expected a regular file"),
        ] {
            for read in [read_text, read_argument] {
                let error = read(path, 100).unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{}", path.display());
                assert_eq!(error.to_string(), said);
            }
        }
        assert_eq!(read_text(&file, 4).unwrap(), "text");
        assert_eq!(read(&file, 3).unwrap_err().to_string(), "it has more than 3 bytes");
        assert_eq!(read_argument(Path::new("/dev/null"), 3).unwrap(), "");
        std::fs::write(&file, [0xff]).unwrap();
        assert_eq!(read_text(&file, 4).unwrap_err().to_string(), "it is not UTF-8 text");
    }

    #[test]
    fn reads_a_pipe_that_the_shell_has_opened() {
        use std::io::Write as _;
        use std::os::fd::AsRawFd as _;

        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"from a pipe").unwrap();
        drop(writer);
        let path = format!("/dev/fd/{}", reader.as_raw_fd());
        assert_eq!(read_argument(Path::new(&path), 100).unwrap(), "from a pipe");
    }
}
