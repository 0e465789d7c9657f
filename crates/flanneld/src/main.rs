//! `flanneld`: read what is asked, log, run, say how it ended.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::time::Duration;

use flannel_core::chain::chain;
use flanneld::args::Request;
use flanneld::startup;
use nix::sys::prctl::set_dumpable;
use nix::sys::resource::{Resource, setrlimit};
use tracing::warn;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

/// After a signal, what still runs elsewhere (a program that waits for a lock, say) is not waited for.
const LAST_WAIT: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let settings = match Request::read(std::env::args_os().skip(1), |name| std::env::var_os(name)) {
        Ok(Request::Run(settings)) => *settings,
        Ok(Request::Print(text)) => {
            say(std::io::stdout(), text.trim_end());
            return ExitCode::SUCCESS;
        }
        Err(mistakes) => {
            say(std::io::stderr(), &mistakes.to_string());
            return ExitCode::from(2);
        }
    };
    log(settings.verbosity);
    if settings.etcd_user.is_some() || settings.etcd_key.is_some() {
        leave_no_core();
    }
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(std::io::stderr(), &format!("flanneld: no runtime: {error}"));
            return ExitCode::FAILURE;
        }
    };
    let ended = runtime.block_on(startup::run(settings));
    runtime.shutdown_timeout(LAST_WAIT);
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(std::io::stderr(), &format!("flanneld: {}", chain(&error)));
            ExitCode::from(error.status())
        }
    }
}

/// A core would hold the password or the key for whoever finds it: ours, and,
/// as they inherit our variables, those of the programs that we start.
fn leave_no_core() {
    let done = setrlimit(Resource::RLIMIT_CORE, 0, 0).and_then(|()| set_dumpable(false));
    if let Err(error) = done {
        warn!(%error, "a crash may leave a core with a secret in it");
    }
}

/// One line or several to a stream; that nobody reads it any more (`| head`) is no trouble of ours.
fn say(mut stream: impl Write, text: &str) {
    drop(writeln!(stream, "{text}"));
}

/// Logs to stderr: 0 is a day's history, 1 to 4 each step, above that the wire.
fn log(verbosity: i64) {
    let ours = match verbosity {
        0 => LevelFilter::INFO,
        1..=4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    // What the libraries have to say is of interest only together with the wire.
    let others = if verbosity > 4 { LevelFilter::DEBUG } else { LevelFilter::WARN };
    let targets = ["flannel_core", "flannel_etcd", "flannel_linux", "flanneld"].map(|target| (target, ours));
    tracing_subscriber::registry()
        .with(Targets::new().with_targets(targets).with_default(others))
        .with(
            tracing_subscriber::fmt::layer()
                .with_writer(std::io::stderr)
                // Which room a line comes from is for whoever looks closer.
                .with_target(verbosity > 0)
                .with_ansi(std::io::stderr().is_terminal()),
        )
        .init();
}
