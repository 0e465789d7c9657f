//! Rung 4, in numbers: clusters of real agents in simulation, one for each seed.
//!
//! `SIM_SEED=1234 cargo test --test sim` prints one seed's whole history,
//! `SIM_SEEDS=100000` runs more of them.

#![allow(clippy::unwrap_used, reason = "the whole target is tests")]

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, mpsc};
use std::time::{Duration, Instant};

use flannel_tests::say;
use flannel_tests::sim::{Bench, Outcome, run};

/// How many seeds are run when nobody says how many.
const SEEDS: u64 = 10_000;

/// How much of a failing seed's history is shown.
const TAIL: usize = 80;

/// No seed takes so long.
const STUCK: Duration = Duration::from_secs(120);

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

fn tail(history: &str) -> String {
    let lines: Vec<&str> = history.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].join("\n")
}

#[test]
fn no_seed_breaks_what_must_be_so() {
    if let Some(seed) = number("SIM_SEED") {
        let Outcome { history, wrong, lines, lasted } = run(seed, &Bench::new(), true);
        say(&format!("{history}seed {seed}: {lines} lines logged in {lasted:?}"));
        assert_eq!(wrong, None, "seed {seed}");
        return;
    }
    let (seeds, next, began) = (number("SIM_SEEDS").unwrap_or(SEEDS), AtomicU64::new(0), Instant::now());
    let threads = std::thread::available_parallelism().unwrap().get();
    let now: Vec<Mutex<(u64, Instant)>> = (0..threads).map(|_| Mutex::new((0, Instant::now()))).collect();
    let (failed, failures) = mpsc::channel();
    let mut total = Duration::ZERO;
    std::thread::scope(|scope| {
        for now in &now {
            let (failed, next) = (failed.clone(), &next);
            scope.spawn(move || {
                let bench = Bench::new();
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds {
                        return;
                    }
                    *now.lock().unwrap() = (seed, Instant::now());
                    let outcome = run(seed, &bench, false);
                    failed.send((seed, outcome)).unwrap();
                }
            });
        }
        drop(failed);
        let mut wrong = 0;
        loop {
            match failures.recv_timeout(Duration::from_secs(10)) {
                Ok((seed, outcome)) => {
                    total += outcome.lasted;
                    if let Some(words) = outcome.wrong {
                        say(&format!("seed {seed}: {words}"));
                        wrong += 1;
                        if wrong == 10 {
                            next.store(seeds, Ordering::Relaxed);
                        }
                    }
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            for (seed, since) in now.iter().map(|now| *now.lock().unwrap()) {
                if since.elapsed() > STUCK && next.load(Ordering::Relaxed) < seeds {
                    say(&format!("seed {seed} does not end"));
                    std::process::abort();
                }
            }
        }
        assert_eq!(wrong, 0);
    });
    say(&format!("{seeds} seeds, {} days of clusters, in {:?}", total.as_secs() / 86_400, began.elapsed()));
}

#[test]
fn a_seed_is_the_same_each_time() {
    let benches = [Bench::new(), Bench::new()];

    for seed in 0..20 {
        let [one, other] = benches.each_ref().map(|bench| run(seed, bench, true).history);

        let differs = one.lines().zip(other.lines()).position(|(one, other)| one != other);
        assert!(one == other, "seed {seed} differs in line {differs:?}:\n{}\n{}", tail(&one), tail(&other));
    }
}
