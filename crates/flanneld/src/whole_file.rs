//! Files that are there whole or not at all.
//!
//! Readers (dockerd's start, the CNI plugin, our own next start) may look at any
//! moment, and power may fail at any moment: so a text goes to a file beside
//! the real one, is synced, is renamed over it, and the directory is synced too.
//! The file beside it has always the same name: what a crash has left of it goes
//! with the next write.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;

/// Replaces the file at `path` by `text`, with that mode whatever the umask says.
///
/// # Errors
/// Any step failed; an old file is then as it was.
pub(crate) fn replace(path: &Path, text: &str, mode: u32) -> io::Result<()> {
    let beside = write_beside(path, text, mode)?;
    fs::rename(&beside, path).inspect_err(|_| drop(fs::remove_file(&beside)))?;
    sync(path)
}

/// Makes the file at `path` with that text if nothing is there; whether it did.
///
/// # Errors
/// Any step failed; nothing is at `path` then that was not there before.
pub(crate) fn create(path: &Path, text: &str, mode: u32) -> io::Result<bool> {
    let beside = write_beside(path, text, mode)?;
    let linked = fs::hard_link(&beside, path);
    drop(fs::remove_file(&beside));
    match linked {
        Ok(()) => sync(path).map(|()| true),
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Removes what a crash has left beside the file at `path`, if anything.
///
/// # Errors
/// It is there and cannot be removed.
pub(crate) fn tidy(path: &Path) -> io::Result<()> {
    match fs::remove_file(beside(path)?) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The text of the file at `path`; `None` if there is none. Bytes that are no
/// UTF-8 become U+FFFD.
///
/// # Errors
/// It cannot be read, is no file, or has more than `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> io::Result<Option<String>> {
    // Whatever somebody has put there: a pipe must not keep us waiting for a writer.
    let opened = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(ErrorKind::InvalidInput, "it is not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(ErrorKind::FileTooLarge, format!("it has more than {limit} bytes")));
    }
    Ok(Some(String::from_utf8_lossy(&bytes).into_owned()))
}

/// The directory that a file is in.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Makes a directory with all above it.
pub(crate) fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(mode).create(path)
}

fn beside(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, "it names no file"))?;
    Ok(directory_of(path).join(format!(".{}.new", name.to_string_lossy())))
}

fn write_beside(path: &Path, text: &str, mode: u32) -> io::Result<PathBuf> {
    tidy(path)?;
    let beside = beside(path)?;
    let written = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(text.as_bytes())?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()
    };
    written().inspect_err(|_| drop(fs::remove_file(&beside)))?;
    Ok(beside)
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(directory_of(path))?.sync_all()
}

#[cfg(test)]
mod tests {
    use nix::sys::stat::Mode;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let name = |entry: io::Result<fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        fs::read_dir(directory).unwrap().map(name).collect()
    }

    #[test]
    fn what_a_crash_has_left_beside_a_file_goes_with_the_next_write() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(".file.new"), "half").unwrap();

        replace(&directory.path().join("file"), "whole", 0o644).unwrap();

        assert_eq!(names(directory.path()), ["file"]);
        assert_eq!(fs::read_to_string(directory.path().join("file")).unwrap(), "whole");
    }

    #[test]
    fn what_is_there_is_not_created_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");

        assert!(create(&path, "first", 0o644).unwrap());
        assert!(!create(&path, "second", 0o644).unwrap());

        assert_eq!(fs::read_to_string(&path).unwrap(), "first");
        assert_eq!(names(directory.path()), ["file"]);
    }

    #[test]
    fn a_pipe_a_directory_and_a_huge_file_are_refused_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let pipe = directory.path().join("pipe");
        nix::unistd::mkfifo(&pipe, Mode::S_IRWXU).unwrap();
        let huge = directory.path().join("huge");
        File::create(&huge).unwrap().set_len(1 << 30).unwrap();

        assert_eq!(read(&pipe, 10).unwrap_err().to_string(), "it is not a regular file");
        assert_eq!(read(directory.path(), 10).unwrap_err().to_string(), "it is not a regular file");
        assert_eq!(read(&huge, 10).unwrap_err().to_string(), "it has more than 10 bytes");
        assert_eq!(read(&directory.path().join("none"), 10).unwrap(), None);
    }
}
