//! Network settings of the calling thread's network namespace (`/proc/sys/net`, ip-sysctl).

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

/// Where the kernel has the settings of the calling thread's namespace.
const ROOT: &str = "/proc/sys/net";

/// Sets `name`, such as `ipv4/conf/all/rp_filter`, unless it has that value already.
///
/// A container and a sandboxed systemd unit see `/proc/sys` read-only. `CAP_SYS_ADMIN` may mount the same file system once more,
/// without attaching it to any directory.
///
/// # Errors
/// When the setting does not exist, or cannot be written in either way.
pub(super) fn set(name: &str, value: &str) -> io::Result<()> {
    if read(name)? == value {
        return Ok(());
    }
    match fs::write(Path::new(ROOT).join(name), value) {
        Err(error) if is_denied(&error) => {
            let path = format!("sys/net/{name}");
            let file = openat(detached()?, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
            fs::File::from(file).write_all(value.as_bytes())
        }
        done => done,
    }
}

/// The value of `name`, without its line break.
pub(super) fn read(name: &str) -> io::Result<String> {
    let mut value = String::new();
    fs::File::open(Path::new(ROOT).join(name))?.read_to_string(&mut value)?;
    value.truncate(value.trim_end().len());
    Ok(value)
}

fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied
    )
}

/// A procfs that is mounted nowhere. It disappears with the descriptor.
fn detached() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    let flags =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, flags)?)
}
