//! JSON objects as Go reads them, with errors that name the key.
//!
//! Flannel's network config and lease values are read by Go's `encoding/json`:
//! key names match whatever their case, the last of several equal keys wins,
//! and `null` leaves the default. serde has no such mode, so an object is first
//! taken apart into its members, and each member is then asked for by name.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use thiserror::Error;

use crate::shown::shown;

/// A value that is not what its key allows.
///
/// Trying again helps only once somebody has changed the value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{key} is {found}: must be {allowed}")]
pub struct BadValue {
    /// The key, with its parents: `Backend.Port`.
    pub key: String,
    /// What stands there, as it stands there, cut to a readable length.
    pub found: String,
    /// What may stand there, as a phrase that follows "must be".
    pub allowed: String,
}

/// The members of one JSON object, in the order they stand, still unread.
#[derive(Clone, Debug, Default)]
pub struct Object {
    path: String,
    members: Vec<(String, Box<RawValue>)>,
}

impl Object {
    /// Takes apart the object `text`; `path` is what its keys are named after
    /// in errors (`Backend`, or nothing at the top).
    ///
    /// # Errors
    /// `text` is not JSON, or not an object.
    pub fn parse(path: &str, text: &str) -> Result<Self, BadValue> {
        let bad = |allowed: String| BadValue {
            key: if path.is_empty() { "the value".into() } else { path.into() },
            found: shown(text),
            allowed,
        };
        match serde_json::from_str::<Members>(text) {
            Ok(Members(members)) => Ok(Self { path: path.into(), members }),
            Err(error) if error.is_data() => Err(bad("a JSON object".into())),
            Err(error) => Err(bad(format!("a JSON object ({error})"))),
        }
    }

    /// The last member of that name, in any case; `None` if absent or `null`.
    pub fn get(&self, key: &str) -> Option<&str> {
        let (_, value) = self.members.iter().rev().find(|(name, _)| name.eq_ignore_ascii_case(key))?;
        Some(value.get()).filter(|text| *text != "null")
    }

    /// A text member.
    ///
    /// # Errors
    /// The member is there and is not a JSON string.
    pub fn text(&self, key: &str) -> Result<Option<String>, BadValue> {
        self.typed(key, "a JSON string")
    }

    /// A text member read by `FromStr`.
    ///
    /// # Errors
    /// The member is there and is not a string, or the string does not parse.
    pub fn parsed<T: std::str::FromStr>(&self, key: &str, allowed: &str) -> Result<Option<T>, BadValue> {
        let Some(text) = self.typed::<String>(key, allowed)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| self.bad(key, allowed))
    }

    /// A whole number within `range`.
    ///
    /// # Errors
    /// The member is there and is not a JSON number, not whole, or out of range.
    pub fn number(&self, key: &str, range: std::ops::RangeInclusive<u32>) -> Result<Option<u32>, BadValue> {
        let allowed = format!("a whole number from {} to {}", range.start(), range.end());
        let Some(number) = self.typed::<u32>(key, &allowed)? else { return Ok(None) };
        if range.contains(&number) { Ok(Some(number)) } else { Err(self.bad(key, &allowed)) }
    }

    /// A switch.
    ///
    /// # Errors
    /// The member is there and is neither `true` nor `false`.
    pub fn switch(&self, key: &str) -> Result<Option<bool>, BadValue> {
        self.typed(key, "true or false")
    }

    /// An object inside this one.
    ///
    /// # Errors
    /// The member is there and is not an object.
    pub fn object(&self, key: &str) -> Result<Option<Object>, BadValue> {
        self.get(key).map(|text| Object::parse(&self.named(key), text)).transpose()
    }

    /// The names of members that are none of `known`, with their parents; only
    /// the first of them if there are many.
    pub fn unknown(&self, known: &[&str]) -> Vec<String> {
        const MOST: usize = 20;
        let is_known = |name: &str| known.iter().any(|key| key.eq_ignore_ascii_case(name));
        let unknown = self.members.iter().filter(|(name, _)| !is_known(name));
        let mut names: Vec<String> =
            unknown.clone().take(MOST).map(|(name, _)| self.named(&shown(name))).collect();
        let more = unknown.count() - names.len();
        if more > 0 {
            names.push(format!("and {more} more"));
        }
        names
    }

    /// The error for a member of this object that is not as `allowed` says.
    pub fn bad(&self, key: &str, allowed: impl Into<String>) -> BadValue {
        let found = self.get(key).map_or_else(|| "missing".into(), shown);
        BadValue { key: self.named(key), found, allowed: allowed.into() }
    }

    fn named(&self, key: &str) -> String {
        if self.path.is_empty() { key.into() } else { format!("{}.{key}", self.path) }
    }

    fn typed<'a, T: Deserialize<'a>>(&'a self, key: &str, allowed: &str) -> Result<Option<T>, BadValue> {
        let Some(text) = self.get(key) else { return Ok(None) };
        serde_json::from_str(text).map(Some).map_err(|_| self.bad(key, allowed))
    }
}

struct Members(Vec<(String, Box<RawValue>)>);

impl<'de> Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;

        impl<'de> Visitor<'de> for InOrder {
            type Value = Members;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
                let mut members = Vec::new();
                while let Some(member) = map.next_entry()? {
                    members.push(member);
                }
                Ok(Members(members))
            }
        }

        deserializer.deserialize_map(InOrder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_in_any_case_and_the_last_one_wins() {
        let object = Object::parse("", r#"{"network":"a","NETWORK":"b"}"#).unwrap();

        assert_eq!(object.text("Network").unwrap().as_deref(), Some("b"));
    }

    #[test]
    fn null_is_as_good_as_absent() {
        let object = Object::parse("", r#"{"Port":null}"#).unwrap();

        assert_eq!(object.number("Port", 0..=65535).unwrap(), None);
    }

    #[test]
    fn an_error_names_the_key_with_its_parents_what_was_found_and_what_is_allowed() {
        let object = Object::parse("Backend", r#"{"Port":70000}"#).unwrap();

        let error = object.number("Port", 0..=65535).unwrap_err();

        assert_eq!(error.to_string(), "Backend.Port is 70000: must be a whole number from 0 to 65535");
    }

    #[test]
    fn a_long_value_is_cut_in_the_error() {
        let long = "x".repeat(10_000);

        let error = Object::parse("", &long).unwrap_err();

        assert!(error.to_string().len() < 200, "{error}");
    }

    #[test]
    fn what_would_bend_the_log_is_written_out() {
        let object = Object::parse("", "{\"Network\":\"\u{9b}2J\",\"\u{202e}\":1,\"a\\n\":1}").unwrap();
        let torn = Object::parse("", "\u{1b}[2J\n{").unwrap_err().to_string();

        assert_eq!(
            object.bad("Network", "a prefix").to_string(),
            r#"Network is "\u{9b}2J": must be a prefix"#
        );
        assert_eq!(object.unknown(&["Network"]), [r"\u{202e}", r"a\n"]);
        assert!(torn.starts_with(r"the value is \u{1b}[2J\n{: must be a JSON object ("), "{torn}");
    }

    #[test]
    fn of_many_unknown_keys_the_first_are_named() {
        let members: Vec<String> = (0..100_000).map(|number| format!(r#""key {number}":{number}"#)).collect();
        let object = Object::parse("Backend", &format!("{{{}}}", members.join(","))).unwrap();

        let unknown = object.unknown(&[]);

        assert_eq!((unknown.len(), &*unknown[19], &*unknown[20]), (21, "Backend.key 19", "and 99980 more"));
    }

    #[test]
    fn text_of_any_depth_is_read_or_refused_without_climbing_down() {
        for (open, close) in [("[", "]"), (r#"{"a":"#, "}"), ("[{\"a\":", "}]")] {
            let deep = format!("{}1{}", open.repeat(100_000), close.repeat(100_000));
            let torn = open.repeat(100_000);
            assert!(Object::parse("", &torn).is_err());
            assert!(Object::parse("", &format!(r#"{{"A":{torn}"#)).is_err());
            drop(Object::parse("", &deep));

            let object = Object::parse("", &format!(r#"{{"A":{deep},"B":1}}"#)).unwrap();
            assert_eq!(object.number("B", 0..=1).unwrap(), Some(1));
            assert!(object.text("A").is_err() && object.number("A", 0..=1).is_err());
            assert_eq!(object.object("A").is_ok(), open.starts_with('{'));
        }
    }

    #[test]
    fn numbers_and_texts_that_no_type_holds_are_refused_by_name() {
        let long = "x".repeat(1 << 20);
        let object = Object::parse(
            "",
            &format!(r#"{{"A":1e999,"B":-0,"C":"\ud800","D":"{long}","E":99999999999999999999}}"#),
        )
        .unwrap();

        assert_eq!(
            object.number("A", 0..=1).unwrap_err().to_string(),
            "A is 1e999: must be a whole number from 0 to 1"
        );
        assert!(object.number("B", 0..=1).is_err() && object.number("E", 0..=1).is_err());
        assert!(object.text("C").is_err());
        assert_eq!(object.text("D").unwrap().map(|text| text.len()), Some(1 << 20));
        assert!(object.parsed::<u8>("D", "a byte").unwrap_err().to_string().len() < 100);
    }

    #[test]
    fn a_key_that_is_no_text_spoils_its_object_only() {
        let object = Object::parse("", r#"{"A":{"\ud800":1},"B":1}"#).unwrap();

        assert!(object.object("A").is_err());
        assert_eq!(object.number("B", 0..=1).unwrap(), Some(1));
        let lossy = String::from_utf8_lossy(b"{\"A\xff\":\"\xfe\"}").into_owned();
        assert_eq!(Object::parse("", &lossy).unwrap().unknown(&[]), ["A\u{fffd}"]);
    }

    proptest::proptest! {
        #[test]
        fn no_text_whatever_makes_reading_panic(text in r#"(\{"[A-c]":){0,3}([\[\]{}:,"\\u0-9eE+\-. a-z]|\PC){0,40}"#) {
            if let Ok(object) = Object::parse("", &text) {
                drop((object.text("A"), object.number("A", 0..=9), object.object("A"), object.unknown(&["A"])));
            }
        }
    }

    #[test]
    fn an_array_is_not_an_object() {
        assert_eq!(
            Object::parse("Backend", "[1]").unwrap_err().to_string(),
            "Backend is [1]: must be a JSON object"
        );
    }
}
