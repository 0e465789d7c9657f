//! The subnet file on disk: replaced whole or not at all.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use flannel_core::subnet_env::FormerEnv;
use thiserror::Error;

use crate::whole_file::{directory_of, make_directory, read, replace, tidy};

/// A subnet file has some hundred bytes, and whoever edits it has had a reason; in bytes.
const MOST: u64 = 64 << 10;

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
        let text = read(&self.path, MOST).map_err(|source| self.failed(source))?;
        Ok(text.map(|text| text.parse().unwrap_or_default()))
    }

    /// Replaces the file by `text`, making its directory if need be; whether
    /// that was needed. One that is right already is not touched: a host whose
    /// disk is full or read-only now has all that it needs.
    ///
    /// A new file has mode 0644 whatever the umask says, as flannel's; the mode
    /// of an old one is kept.
    ///
    /// # Errors
    /// Any step failed; the old file is then as it was.
    pub fn write(&self, text: &str) -> Result<bool, SubnetFileError> {
        if read(&self.path, MOST).is_ok_and(|old| old.as_deref() == Some(text)) {
            drop(tidy(&self.path));
            return Ok(false);
        }
        let mode = fs::metadata(&self.path).map_or(0o644, |old| old.permissions().mode() & 0o7777);
        let written =
            make_directory(directory_of(&self.path), 0o755).and_then(|()| replace(&self.path, text, mode));
        written.map(|()| true).map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> SubnetFileError {
        SubnetFileError { path: self.path.display().to_string(), source }
    }
}
#[cfg(test)]
mod tests {
    use std::fs::Permissions;

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
