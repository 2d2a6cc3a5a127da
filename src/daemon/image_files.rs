//! Images in files of the state directory, so that they outlive the daemon: one JSON file for each image, named by its ID.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tracing::warn;

use super::durable_files;
use super::state_dir::read_private;
use crate::containers::image_labels::{Image, ImageStore, InUse};

/// The largest file that is read or written. An image with more labels and variables is not stored: once it is removed, none of
/// them counts in favor of its containers.
const MAX_BYTES: u64 = 1024 * 1024;

/// A directory with the images of the containers that exist.
pub(super) struct ImageFiles {
    directory: PathBuf,
    /// The version of the last call that stored images.
    version: Mutex<u64>,
}

impl ImageFiles {
    /// In the state directory, which is created at the first write.
    pub(super) fn new(state_dir: &Path) -> Self {
        Self {
            directory: state_dir.join("images"),
            version: Mutex::new(0),
        }
    }

    /// The file of an image. `None`: the text is not an ID of Docker or Podman (`sha256:` and hexadecimal digits).
    fn path(&self, id: &str) -> Option<PathBuf> {
        let name = file_name(id)?;
        Some(self.directory.join(name))
    }

    fn replace_all(&self, images: &InUse) -> io::Result<()> {
        for (id, image) in images {
            let (Some(path), Some(image)) = (self.path(id), image) else {
                continue;
            };
            let bytes = serde_json::to_vec(&**image).map_err(io::Error::other)?;
            let fits = u64::try_from(bytes.len()).is_ok_and(|length| length <= MAX_BYTES);
            // A damaged file is written again.
            if fits && read_private(&path, MAX_BYTES).ok().as_ref() != Some(&bytes) {
                durable_files::write(&path, &bytes)?;
            }
        }
        let names: Vec<_> = images.keys().filter_map(|id| file_name(id)).collect();
        let entries = match std::fs::read_dir(&self.directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if !names.iter().any(|name| entry.file_name() == name.as_str()) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

fn file_name(id: &str) -> Option<String> {
    let digits = id.strip_prefix("sha256:").unwrap_or(id);
    let is_hex = (32..=128).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| format!("{digits}.json"))
}

impl ImageStore for ImageFiles {
    fn load(&self, id: &str) -> Option<Image> {
        let path = self.path(id)?;
        let read = || -> io::Result<Image> {
            let bytes = read_private(&path, MAX_BYTES)?;
            serde_json::from_slice(&bytes).map_err(io::Error::other)
        };
        match read() {
            Ok(image) => Some(image),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                warn!(path = %path.display(), %error, "cannot read a stored image; of its containers' labels, only restrictions count");
                None
            }
        }
    }

    fn store(&self, version: u64, images: &InUse) {
        let mut stored = self.version.lock().unwrap_or_else(PoisonError::into_inner);
        if version <= *stored {
            return;
        }
        *stored = version;
        if let Err(error) = self.replace_all(images) {
            warn!(
                directory = %self.directory.display(),
                %error,
                "cannot store the labels of images; a container whose image is removed loses its role when the daemon starts again"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    use std::sync::Arc;

    use super::*;
    use crate::containers::Environment;

    fn image(label: &str) -> Option<Arc<Image>> {
        Some(Arc::new(Image {
            labels: [("imds.role".to_owned(), label.to_owned())].into(),
            environment: Environment::of(["A=b"]),
        }))
    }

    fn id(digit: char) -> String {
        format!("sha256:{}", digit.to_string().repeat(64))
    }

    #[test]
    fn images_outlive_the_daemon_until_their_last_container_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let both = InUse::from([(id('a'), image("x")), (id('b'), image("y"))]);
        ImageFiles::new(&state).store(1, &both);

        let files = ImageFiles::new(&state);
        assert_eq!(files.load(&id('a')).map(Arc::new), image("x"));
        assert_eq!(files.load(&id('c')), None);
        let path = files.path(&id('a')).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().mode() & 0o777, 0o700);

        // The first one cannot be read by the engine at this moment.
        files.store(2, &InUse::from([(id('a'), None), (id('b'), image("y"))]));
        assert!(files.load(&id('a')).is_some());
        files.store(3, &InUse::from([(id('b'), image("y"))]));
        assert_eq!(files.load(&id('a')), None);
        assert!(files.load(&id('b')).is_some());
        // A call that was overtaken changes nothing.
        files.store(1, &InUse::new());
        assert!(files.load(&id('b')).is_some());
    }

    #[test]
    fn rejects_files_that_others_can_write_and_ids_that_are_paths() {
        let dir = tempfile::tempdir().unwrap();
        let files = ImageFiles::new(dir.path());
        files.store(
            1,
            &InUse::from([(id('a'), image("x")), ("../../../x".to_owned(), image("y"))]),
        );
        assert_eq!(std::fs::read_dir(dir.path().join("images")).unwrap().count(), 1);
        assert_eq!(files.load("../../../x"), None);
        let path = files.path(&id('a')).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
        assert_eq!(files.load(&id('a')), None);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "{").unwrap();
        assert_eq!(files.load(&id('a')), None);
        files.store(2, &InUse::from([(id('a'), image("x"))]));
        assert!(files.load(&id('a')).is_some(), "the damaged file is replaced");
    }
}
