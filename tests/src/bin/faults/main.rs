//! Faults done to real parts, and whether anything was lost by them.
//!
//! Run by `scripts/faults`. Each scenario has a lab of its own: hosts with real
//! agents and a real kernel, an etcd of three members, and recorders. What was
//! recorded is checked when it is over.
//!
//! ```text
//!   scenario, soak    what is done, and what has to follow
//!        │
//!        ├─▶ world        hosts, agents and their surroundings; members, store, peers
//!        ├─▶ history, watch_host, flow      the recorders ─▶ record
//!        └─▶ check        the invariants, over the records
//! ```

mod check;
mod etcd_faults;
mod flow;
mod history;
mod host_faults;
mod kernel;
mod members;
mod owner_faults;
mod peers;
mod record;
mod scenario;
mod soak;
mod store;
mod store_faults;
mod watch_host;
mod world;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use crate::check::{Verdict, check};
use crate::record::Records;
use crate::scenario::{ALL, Scenario, Shown};
use crate::world::Form;

const USAGE: &str = "\
Usage: faults [--long] [--jobs N] [SCENARIO...]   all scenarios, or these; in their short form if not told otherwise
       faults --soak MINUTES [--seed N]           faults by chance, and what the agents use meanwhile
       faults --check SCENARIO                    the checks again, over what was recorded
       faults --list";

/// What is asked for.
struct Wish {
    form: Form,
    jobs: usize,
    names: Vec<String>,
    soak: Option<u64>,
    seed: Option<u64>,
    check: bool,
    list: bool,
}

impl Wish {
    fn read(words: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut wish = Self {
            form: Form::Short,
            jobs: 1,
            names: vec![],
            soak: None,
            seed: None,
            check: false,
            list: false,
        };
        let mut words = words.into_iter();
        while let Some(word) = words.next() {
            let mut number = || {
                let number = words.next().and_then(|word| word.parse::<u64>().ok());
                number.ok_or_else(|| format!("{word} needs a number"))
            };
            match word.as_str() {
                "--long" => wish.form = Form::Long,
                "--jobs" => wish.jobs = usize::try_from(number()?).unwrap_or(1).max(1),
                "--soak" => wish.soak = Some(number()?),
                "--seed" => wish.seed = Some(number()?),
                "--check" => wish.check = true,
                "--list" => wish.list = true,
                name if ALL.iter().any(|scenario| scenario.name == name) => wish.names.push(word),
                // A part of one, as in E-9 for E-9a to E-9d.
                name if ALL.iter().any(|scenario| scenario.name.starts_with(name))
                    && name.starts_with("E-") =>
                {
                    let all = ALL
                        .iter()
                        .filter(|scenario| scenario.name.trim_end_matches(char::is_alphabetic) == name);
                    wish.names.extend(all.map(|scenario| scenario.name.to_owned()));
                }
                _ => return Err(format!("{word}: no such flag or scenario")),
            }
        }
        Ok(wish)
    }
}

#[allow(clippy::print_stdout, clippy::print_stderr)]
fn main() -> ExitCode {
    let wish = match Wish::read(std::env::args().skip(1)) {
        Ok(wish) => wish,
        Err(error) => {
            eprintln!("faults: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    if wish.list {
        ALL.iter().for_each(|scenario| println!("{:6} {}", scenario.name, scenario.about));
        return ExitCode::SUCCESS;
    }
    if let Some(minutes) = wish.soak {
        return match soak::soak(minutes, wish.seed, &records("soak")) {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        };
    }
    let is_wanted =
        |scenario: &&Scenario| wish.names.is_empty() || wish.names.iter().any(|name| name == scenario.name);
    let wanted: Vec<&Scenario> = ALL.iter().filter(is_wanted).collect();
    let rows = if wish.check {
        wanted.iter().map(|scenario| Row::of_records(scenario)).collect()
    } else {
        run_all(&wanted, wish.form, wish.jobs)
    };
    print(&rows);
    if rows.iter().all(|row| row.broken.is_empty()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Where the records of a scenario go; they stay when it is over.
fn records(name: &str) -> PathBuf {
    let directory = std::env::var_os("FAULTS_RECORDS").map_or_else(|| "target/faults".into(), PathBuf::from);
    directory.join(name)
}

/// One line of the table.
struct Row {
    name: &'static str,
    about: &'static str,
    broken: Vec<String>,
    verdict: Verdict,
    converged: Option<Duration>,
    notes: Vec<String>,
    took: Duration,
}

impl Row {
    fn of(scenario: &Scenario, shown: Shown, verdict: Verdict, took: Duration) -> Self {
        let broken = [shown.broken, verdict.broken.clone()].concat();
        let Shown { converged, notes, .. } = shown;
        Self { name: scenario.name, about: scenario.about, broken, verdict, converged, notes, took }
    }

    fn of_records(scenario: &Scenario) -> Self {
        let shown = Shown::default();
        let verdict = check(&Records::open(records(scenario.name)), shown.bounds);
        Self::of(scenario, shown, verdict, Duration::ZERO)
    }
}

/// Runs so many at a time.
fn run_all(wanted: &[&'static Scenario], form: Form, jobs: usize) -> Vec<Row> {
    let (next, rows) = (Mutex::new(0), Mutex::new(vec![]));
    let worker = || {
        loop {
            let index = {
                let mut next = next.lock().expect("nobody panics while holding it");
                *next += 1;
                *next - 1
            };
            let Some(scenario) = wanted.get(index) else { return };
            tell(&format!("{}: {} …", scenario.name, scenario.about));
            let row = run_one(scenario, form);
            let words = if row.broken.is_empty() { "passed".into() } else { row.broken.join("\n    ") };
            tell(&format!("{}: {words} ({:.0?})", row.name, row.took));
            rows.lock().expect("nobody panics while holding it").push((index, row));
        }
    };
    thread::scope(|scope| (0..jobs).for_each(|_| drop(scope.spawn(worker))));
    let mut rows = rows.into_inner().expect("nobody panics while holding it");
    rows.sort_by_key(|(index, _)| *index);
    rows.into_iter().map(|(_, row)| row).collect()
}

fn run_one(scenario: &'static Scenario, form: Form) -> Row {
    let (start, directory) = (Instant::now(), records(scenario.name));
    // On a thread of its own, because a thread that has entered a namespace stays there.
    let run = || (scenario.run)(Records::create(directory.clone()), form);
    match thread::scope(|scope| scope.spawn(run).join()) {
        Ok(shown) => {
            let verdict = check(&Records::open(directory), shown.bounds);
            Row::of(scenario, shown, verdict, start.elapsed())
        }
        Err(panic) => {
            let words = panic.downcast_ref::<String>().cloned();
            let words = words.or_else(|| panic.downcast_ref::<&str>().map(|words| (*words).to_owned()));
            let broken = vec![words.unwrap_or_else(|| "it panicked".into())];
            let shown = Shown { broken, ..Shown::default() };
            Row::of(scenario, shown, Verdict::default(), start.elapsed())
        }
    }
}

#[allow(clippy::print_stdout)]
fn print(rows: &[Row]) {
    println!(
        "\n| Scenario | | Result | Packets lost | Right again in | Shown in | Log, memory, descriptors at most | |"
    );
    println!("|---|---|---|---|---|---|---|---|");
    for row in rows {
        let Verdict { lost, excused, sent, shown, log, memory, descriptors, .. } = row.verdict;
        let result = if row.broken.is_empty() { "passed" } else { "**failed**" };
        let excused =
            if excused > 0 { format!(" (and {excused} on pairs that were hurt)") } else { String::new() };
        let seconds = |time: Option<f64>| time.map_or("–".into(), |time| format!("{time:.1} s"));
        let converged = seconds(row.converged.map(|time| time.as_secs_f64()));
        let shown = seconds(shown);
        println!(
            "| {} | {} | {result} | {lost}{excused} of {sent} | {converged} | {shown} | {:.1} kB, {:.1} MB, {descriptors} | {} |",
            row.name,
            row.about,
            log as f64 / 1000.0,
            memory as f64 / 1024.0,
            row.notes.join("; ")
        );
    }
    println!(
        "\nChecked over the records of each: I1 one owner, I2 in step at the end, I3 foreign things untouched, I4 no \
         removal before its key's, I5 subnet.env the same, I7 the password nowhere, I8 bounds, I9 honest readiness and \
         every fault shown within 10 s, I10 the way stands without agents. I6, revisions never going back, cannot be \
         seen from outside: the simulation checks it."
    );
    for row in rows.iter().filter(|row| !row.broken.is_empty()) {
        println!("\n{} ({}):", row.name, records(row.name).display());
        row.broken.iter().for_each(|words| println!("- {words}"));
    }
}

/// Says on stderr how far it is.
#[allow(clippy::print_stderr)]
pub(crate) fn tell(what: &str) {
    eprintln!("faults: {what}");
}
