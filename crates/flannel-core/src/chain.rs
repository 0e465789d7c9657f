//! An error with its causes, on one line.
//!
//! An error says what failed and on what; why is in its source. Only who
//! prints it puts the two together.

use std::error::Error;

/// The words of an error and of all its causes.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Some libraries repeat the cause in their own words.
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    #[error("{0}")]
    struct Words(&'static str, #[source] Option<Box<Words>>);

    #[test]
    fn causes_follow_after_a_colon_and_none_is_said_twice() {
        let cause = Words("b", Some(Box::new(Words("c", None))));
        let repeated = Words("a: b", Some(Box::new(Words("b", None))));

        assert_eq!(chain(&Words("a", Some(Box::new(cause)))), "a: b: c");
        assert_eq!(chain(&repeated), "a: b");
    }
}
