//! Text of strangers, made fit for a line of the log.
//!
//! Whoever may write to the store writes keys and values of any length, with
//! line breaks, colours and cursor movements in them. What is said of them
//! stays one readable line: everything of theirs that goes into a phrase goes
//! through here.

/// So many characters are shown; what is longer says enough by then.
const MOST: usize = 60;

/// `text` on one line and cut to a readable length; what does not print is
/// written as Rust writes it in a string, `\n` or `\u{1b}`.
pub fn shown(text: &str) -> String {
    let mut shown = String::new();
    let mut room = MOST;
    for c in text.chars() {
        let escaped = c.escape_debug();
        // Quotes and backslashes print as they are, and JSON is full of them.
        let (width, prints) = if matches!(c, '"' | '\'' | '\\') { (1, true) } else { (escaped.len(), false) };
        if width > room {
            shown.push('…');
            break;
        }
        room -= width;
        if prints { shown.push(c) } else { shown.extend(escaped) }
    }
    if shown.is_empty() { "empty".into() } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_prints_is_shown_as_it_is() {
        for text in [r#"{"Port":70000,"Path":"C:\\x"}"#, "it's ünïcode 東京"] {
            assert_eq!(shown(text), text);
        }
    }

    #[test]
    fn line_breaks_colours_and_what_turns_the_line_around_are_written_out() {
        assert_eq!(shown("a\nb\r\tc"), r"a\nb\r\tc");
        assert_eq!(shown("\u{1b}[31mred\u{7f}\u{9b}1m\0"), r"\u{1b}[31mred\u{7f}\u{9b}1m\0");
        assert_eq!(shown("a\u{202e}b\u{2028}c\u{feff}d\u{200b}"), r"a\u{202e}b\u{2028}c\u{feff}d\u{200b}");
    }

    #[test]
    fn what_is_long_is_cut_whatever_it_is_made_of() {
        for c in ["x", "\n", "\u{202e}", "東"] {
            let shown = shown(&c.repeat(1 << 20));

            assert!(shown.chars().count() <= MOST + 1 && shown.ends_with('…'), "{shown}");
        }
        assert_eq!(shown(&"x".repeat(MOST)), "x".repeat(MOST));
    }

    #[test]
    fn nothing_is_called_by_its_name() {
        assert_eq!(shown(""), "empty");
    }
}
