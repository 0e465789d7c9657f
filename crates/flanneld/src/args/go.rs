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
    let mut words = words.into_iter().map(OsString::into_string);
    while let Some(word) = words.next() {
        let Ok(word) = word else {
            mistakes.push("the command line holds a word that is not UTF-8 text".into());
            continue;
        };
        let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'));
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            // Go stops here and passes over the rest in silence, flags and all.
            let rest: Vec<String> = if word == "--" { words.flatten().collect() } else { vec![word] };
            // A blank too many behind `--etcd-password=` must not bring the password to light.
            let secret = flags.last().is_some_and(|flag| flag.name == "etcd-password");
            mistakes.extend(rest.iter().map(|word| {
                let shown = if secret { "the word after --etcd-password" } else { &format!("{word:?}") };
                format!(
                    "{shown} is no flag: a boolean is written --flag or --flag=false, a value --flag=value"
                )
            }));
            return (flags, mistakes);
        };
        let (name, value) = match name.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (name, None),
        };
        if matches!(name, "h" | "help" | "version") {
            flags.push(Flag { name: name.into(), value });
            continue;
        }
        let Some(argument) = command.get_arguments().find(|argument| argument.get_long() == Some(name))
        else {
            mistakes.push(format!("--{name}: there is no such flag"));
            continue;
        };
        let is_boolean = argument.is_require_equals_set();
        let value = match value {
            None if !is_boolean => match words.next() {
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
