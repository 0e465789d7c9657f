//! The command line and the environment.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use flanneld::args::{PasswordFrom, Request};

use super::shown;

/// A password that no input holds.
const SECRET: &str = "s3cr3t-0f-j0e";

/// One word per line, then an empty line, then variables as `NAME=value`. A
/// password is added, in one of the ways in which people give one.
///
/// # Panics
/// A mistake that is not one clean line; a password in anything that is shown,
/// or another password than was given.
pub fn flags(data: &[u8]) {
    if data.windows(SECRET.len()).any(|window| window == SECRET.as_bytes()) {
        return;
    }
    let mut lines = data.split(|byte| *byte == b'\n');
    let mut words: Vec<OsString> = lines
        .by_ref()
        .take_while(|line| !line.is_empty())
        .map(|line| OsString::from_vec(line.into()))
        .collect();
    let mut variables: Vec<(&OsStr, OsString)> = lines
        .filter_map(|line| {
            let split = line.iter().position(|byte| *byte == b'=')?;
            Some((OsStr::from_bytes(&line[..split]), OsString::from_vec(line[split + 1..].into())))
        })
        .collect();
    let secret = || OsString::from(SECRET);
    let with = |before: &str, after: &str| OsString::from(format!("{before}{SECRET}{after}"));
    let another = words.iter().any(|word| word.to_string_lossy().contains("etcd-password"));
    let given = match data.len() % 8 {
        0 => vec![with("--etcd-password=", "")],
        1 => vec!["-etcd-password".into(), secret()],
        // A blank too many.
        2 => vec!["--etcd-password=".into(), secret()],
        // Misspelt.
        3 => vec!["--etcd-passwort".into(), secret()],
        4 => vec![with("--etcd_password=", "")],
        5 => vec![with("--etcd-endpoints=http://joe:", "@10.0.0.1:2379,10.0.0.2")],
        6 => vec![],
        _ => vec!["--".into(), with("--etcd-password=", "")],
    };
    // A flag that lacks its value takes one that is misspelt for it.
    let first = matches!(data.len() % 8, 3 | 4) || (data.len() / 8).is_multiple_of(2);
    if given.is_empty() {
        variables.insert(0, ("FLANNELD_ETCD_PASSWORD".as_ref(), secret()));
    }
    let place = if first { 0 } else { words.len() };
    words.splice(place..place, given);
    let variable =
        |name: &str| variables.iter().find(|(variable, _)| *variable == name).map(|(_, value)| value.clone());

    let request = Request::read(words, variable);

    assert!(!format!("{request:?}").contains(SECRET), "the password is shown: {request:?}");
    match &request {
        Err(mistakes) => {
            assert!(!mistakes.0.is_empty(), "refused without a mistake");
            for mistake in &mistakes.0 {
                shown(mistake, 400 + 8 * data.len());
            }
            let text = mistakes.to_string();
            assert_eq!(text.lines().count(), mistakes.0.len() + 1, "{text:?}");
        }
        Ok(Request::Print(text)) => assert!(!text.is_empty(), "nothing to print"),
        Ok(Request::Run(settings)) => {
            let password = match &settings.etcd_user {
                Some((_, PasswordFrom::Flag(password))) => Some(password.reveal()),
                _ => None,
            };
            let given = matches!(data.len() % 8, 0 | 1 | 6);
            assert!(!given || another || password == Some(SECRET), "{password:?} of {settings:?}");
            assert!(!settings.etcd_endpoints.is_empty(), "nowhere to go");
        }
    }
}
