//! Figures as they are printed.

use std::time::Duration;

/// One line of the table of work.
pub(crate) struct Row {
    work: String,
    figure: String,
    bound: String,
    outside: String,
    go: String,
}

impl Row {
    pub(crate) fn new(work: impl Into<String>, figure: impl Into<String>) -> Self {
        let none = || "–".to_owned();
        Self { work: work.into(), figure: figure.into(), bound: none(), outside: none(), go: none() }
    }

    /// What the figure is to be; one that is not is printed in bold.
    pub(crate) fn bound(mut self, bound: impl Into<String>, is_kept: bool) -> Self {
        self.bound = bound.into();
        if !is_kept {
            self.figure = format!("**{}**", self.figure);
        }
        self
    }

    /// What others take for it.
    pub(crate) fn outside(mut self, outside: impl Into<String>) -> Self {
        self.outside = outside.into();
        self
    }

    /// What a Go flanneld takes for it.
    pub(crate) fn go(mut self, go: Option<String>) -> Self {
        self.go = go.unwrap_or(self.go);
        self
    }
}

#[allow(clippy::print_stdout)]
pub(crate) fn print(rows: &[Row]) {
    println!("\n| Work | flannel-rs | Bound | Outside reference | Go flanneld |");
    println!("|---|---|---|---|---|");
    for Row { work, figure, bound, outside, go } in rows {
        println!("| {work} | {figure} | {bound} | {outside} | {go} |");
    }
    println!("\nIn bold: outside its bound.");
}

/// Says on stderr how far it is.
#[allow(clippy::print_stderr)]
pub(crate) fn tell(what: &str) {
    eprintln!("bench: {what}");
}

pub(crate) fn time(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    match ms {
        ..10.0 => format!("{ms:.2} ms"),
        ..10_000.0 => format!("{ms:.0} ms"),
        _ => format!("{:.1} s", ms / 1000.0),
    }
}

/// `memory` is in KiB.
pub(crate) fn megabytes(memory: u64) -> String {
    format!("{:.1} MB", memory as f64 / 1024.0)
}

/// 50,000.
pub(crate) fn thousands(number: u32) -> String {
    match number {
        ..1000 => number.to_string(),
        _ => format!("{},{:03}", number / 1000, number % 1000),
    }
}

pub(crate) fn median<T: Ord>(values: impl IntoIterator<Item = T>) -> T {
    percentile(50, values)
}

/// The smallest value that so many percent of all do not exceed.
pub(crate) fn percentile<T: Ord>(percent: usize, values: impl IntoIterator<Item = T>) -> T {
    let mut values: Vec<T> = values.into_iter().collect();
    values.sort_unstable();
    values.swap_remove((values.len() * percent).div_ceil(100).saturating_sub(1))
}
