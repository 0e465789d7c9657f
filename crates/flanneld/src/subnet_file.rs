//! The subnet file on disk: replaced whole or not at all.
//!
//! Readers (dockerd's start, the CNI plugin) may look at any moment, and power
//! may fail at any moment: so the text goes to a file beside it, is synced, is
//! renamed over the old one, and the directory is synced too.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use flannel_core::subnet_env::FormerEnv;
use thiserror::Error;

/// The file could not be read or written. Trying again may help.
#[derive(Debug, Error)]
#[error("subnet file {path}")]
pub struct SubnetFileError {
    path: String,
    #[source]
    source: io::Error,
}

/// A file and what it last said.
#[derive(Clone, Debug)]
pub struct SubnetFile {
    path: PathBuf,
}

impl SubnetFile {
    /// The file at `path`, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What an earlier run left there; `None` if there is no file.
    ///
    /// # Errors
    /// There is one and it cannot be read as text.
    pub fn read(&self) -> Result<Option<FormerEnv>, SubnetFileError> {
        match fs::read_to_string(&self.path) {
            Ok(text) => Ok(Some(text.parse().unwrap_or_default())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(self.failed(source)),
        }
    }

    /// Replaces the file by `text`, making its directory if need be.
    ///
    /// A new file has mode 0644 whatever the umask says, as flannel's; the mode
    /// of an old one is kept.
    ///
    /// # Errors
    /// Any step failed; the old file is then as it was.
    pub fn write(&self, text: &str) -> Result<(), SubnetFileError> {
        self.replace(text).map_err(|source| self.failed(source))
    }

    fn replace(&self, text: &str) -> io::Result<()> {
        let directory = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::DirBuilder::new().recursive(true).mode(0o755).create(directory)?;
        let mode = fs::metadata(&self.path).map_or(0o644, |old| old.permissions().mode() & 0o7777);
        let mut file = tempfile::Builder::new().prefix(".subnet.env.").tempfile_in(directory)?;
        file.write_all(text.as_bytes())?;
        file.as_file().set_permissions(Permissions::from_mode(mode))?;
        file.as_file().sync_all()?;
        file.persist(&self.path)?;
        File::open(directory)?.sync_all()
    }

    fn failed(&self, source: io::Error) -> SubnetFileError {
        SubnetFileError { path: self.path.display().to_string(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn the_directory_is_made_and_the_file_is_readable_by_all() {
        let directory = tempfile::tempdir().unwrap();
        let file = SubnetFile::new(directory.path().join("run/flannel/subnet.env"));

        file.write("FLANNEL_MTU=1450\n").unwrap();

        assert_eq!(fs::read_to_string(file.path()).unwrap(), "FLANNEL_MTU=1450\n");
        assert_eq!(mode(file.path()), 0o644);
    }

    #[test]
    fn the_mode_of_an_old_file_is_kept_and_nothing_is_left_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = SubnetFile::new(directory.path().join("subnet.env"));
        fs::write(file.path(), "old").unwrap();
        fs::set_permissions(file.path(), Permissions::from_mode(0o600)).unwrap();

        file.write("new").unwrap();

        assert_eq!(mode(file.path()), 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_written_leaves_the_old_file_and_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let blocked = directory.path().join("subnet.env");
        fs::create_dir(&blocked).unwrap();

        let error = SubnetFile::new(blocked.clone()).write("new").unwrap_err();

        assert_eq!(error.to_string(), format!("subnet file {}", blocked.display()));
        assert!(blocked.is_dir());
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn no_file_is_no_error() {
        let directory = tempfile::tempdir().unwrap();

        let former = SubnetFile::new(directory.path().join("subnet.env")).read().unwrap();

        assert_eq!(former, None);
    }
}
