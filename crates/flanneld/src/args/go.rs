//! The spelling rules of Go's `flag` package.

use std::ffi::OsString;

use super::Secret;

/// A flag as it was written, without its dashes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Flag {
    pub(super) name: String,
    pub(super) value: Option<String>,
}

/// Splits words into flags; mistakes are told beside them.
pub(super) fn split(
    command: &clap::Command,
    words: impl IntoIterator<Item = OsString>,
) -> (Vec<Flag>, Vec<String>) {
    let (mut flags, mut mistakes): (Vec<Flag>, Vec<String>) = (Vec::new(), Vec::new());
    let known = |name: &str| command.get_arguments().find(|argument| argument.get_long() == Some(name));
    // Go takes such a word for a value; but nobody means an interface that is called `--etcd-password=…`.
    let names_a_flag = |word: &Result<String, OsString>| {
        let name = word.as_deref().ok().and_then(dashed);
        name.is_some_and(|name| known(name.split_once('=').map_or(name, |(name, _)| name)).is_some())
    };
    let mut words = words.into_iter().map(OsString::into_string).peekable();
    // The flag before, and whether it takes no word.
    let mut before: Option<(String, bool)> = None;
    while let Some(word) = words.next() {
        let Ok(word) = word else {
            mistakes.push("the command line holds a word that is not UTF-8 text".into());
            continue;
        };
        let Some(name) = dashed(&word) else {
            // Go stops here and passes over the rest in silence, flags and all.
            let more = words.count();
            if word != "--" {
                // A blank too many behind `--etcd-password=`, or that flag misspelt, must not bring the password to
                // light: only what can be nothing but a mistaken boolean is repeated.
                let shown = match before {
                    Some((name, false)) => format!("what follows --{} and its value", name.escape_debug()),
                    _ => format!("{word:?}"),
                };
                mistakes.push(format!(
                    "{shown} is no flag: a boolean is written --flag or --flag=false, a value --flag=value"
                ));
            } else if more > 0 {
                mistakes.push(format!("-- would hide what follows it ({more}): leave it out"));
            }
            return (flags, mistakes);
        };
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        let is_boolean = known(name).is_some_and(clap::Arg::is_require_equals_set);
        before = Some((name.into(), is_boolean));
        if matches!(name, "h" | "help" | "version") {
            flags.push(Flag { name: name.into(), value });
            continue;
        }
        if known(name).is_none() {
            mistakes.push(format!("--{}: there is no such flag", name.escape_debug()));
            continue;
        }
        let value = match value {
            None if !is_boolean => match words.next_if(|word| !names_a_flag(word)) {
                Some(Ok(value)) => Some(value),
                Some(Err(_)) => {
                    mistakes.push(format!("--{name} is not UTF-8 text"));
                    continue;
                }
                None => {
                    mistakes.push(format!("--{name} needs a value"));
                    continue;
                }
            },
            value => value,
        };
        flags.push(Flag { name: name.into(), value });
    }
    (flags, mistakes)
}

/// What follows the dashes of a flag.
fn dashed(word: &str) -> Option<&str> {
    word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|name| !name.is_empty())
}

/// One of Go's twelve spellings.
pub(super) fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "TRUE" | "true" | "True" => Ok(true),
        "0" | "f" | "F" | "FALSE" | "false" | "False" => Ok(false),
        _ => Err("must be true or false".into()),
    }
}

/// A whole number in one of Go's bases: `60`, `0x3c`, `0o74`, `074`, `0b111100`, `1_000`.
pub(super) fn integer(text: &str) -> Result<i64, String> {
    let wrong = || "must be a whole number".to_owned();
    let (negative, digits) = match text.strip_prefix(['-', '+']) {
        Some(digits) => (text.starts_with('-'), digits),
        None => (false, text),
    };
    let lower = digits.to_ascii_lowercase();
    let (digits, base) = if let Some(digits) = lower.strip_prefix("0x") {
        (digits, 16)
    } else if let Some(digits) = lower.strip_prefix("0b") {
        (digits, 2)
    } else if let Some(digits) = lower.strip_prefix("0o") {
        (digits, 8)
    } else if lower.len() > 1 && lower.starts_with('0') {
        (&lower[1..], 8)
    } else {
        (&*lower, 10)
    };
    let digits = digits.replace('_', "");
    if digits.is_empty() || digits.starts_with(['+', '-']) {
        return Err(wrong());
    }
    let number = i64::from_str_radix(&digits, base).map_err(|_| wrong())?;
    Ok(if negative { -number } else { number })
}

/// Anything.
pub(super) fn secret(text: &str) -> Result<Secret, String> {
    Ok(Secret(text.into()))
}
