//! Programs that speak to the kernel for us: started, fed, and their words
//! turned into errors that say what to look at.

use std::io::{self, Write};
use std::process::{Command, Output, Stdio};

use flannel_core::host::HostError;
use tokio::task::spawn_blocking;

/// Runs what forks and waits where it holds nobody up.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, HostError> + Send + 'static,
) -> Result<T, HostError> {
    let outcome = spawn_blocking(work).await;
    outcome.unwrap_or_else(|error| match error.try_into_panic() {
        Ok(panic) => std::panic::resume_unwind(panic),
        Err(error) => {
            Err(HostError::Broken { operation: "the check was given up".into(), source: error.into() })
        }
    })
}

/// Runs a program with `text` for its input.
pub(super) fn feed(mut command: Command, text: &str) -> io::Result<Output> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let fed = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(text.as_bytes()));
    let output = child.wait_with_output()?;
    // A program that ends early leaves the pipe broken; what it says is worth more.
    match fed {
        Err(error) if output.status.success() => Err(error),
        _ => Ok(output),
    }
}

/// A program that could not be started.
pub(super) fn not_run(program: &str, error: io::Error, remedy: &str) -> HostError {
    if error.kind() == io::ErrorKind::NotFound {
        return HostError::Missing { missing: program.into(), remedy: remedy.into() };
    }
    HostError::Broken { operation: format!("cannot run {program}"), source: error.into() }
}

/// What programs say where the kernel lacks a part.
const LACKS: [&str; 6] = [
    "Table does not exist",
    "missing kernel module",
    "do you need to insmod",
    "Protocol not supported",
    // What nft says of a chain or a statement that the kernel has no module for.
    "Could not process rule: No such file or directory",
    "Could not process rule: Operation not supported",
];

/// A program that was not content.
pub(super) fn failed(program: &str, operation: String, output: &Output) -> HostError {
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let said = said.join("; ");
    // It tells how long it has waited, differently each time.
    if said.contains("holding the xtables lock") {
        return HostError::Broken {
            operation: "somebody holds the xtables lock".into(),
            source: "another iptables keeps it; `fuser /run/xtables.lock` names its process".into(),
        };
    }
    if LACKS.iter().any(|words| said.contains(words)) {
        return HostError::Missing {
            missing: format!("a part of the kernel that {program} needs ({said})"),
            remedy: "load its module, or take a kernel that has it; masquerading needs NAT, and comments and marks \
                     their matches"
                .into(),
        };
    }
    HostError::Broken { operation, source: format!("{program}: {}: {said}", output.status).into() }
}
