//! firewalld: its own word that it has written its rules anew, for where the kernel
//! tells nothing, and whether it is at them just now, for where it would mind company.
//!
//! With iptables behind it, firewalld empties all chains as it starts, reloads and
//! stops, and whoever has rules there in x_tables learns of it by the bus of the
//! system or not at all:
//!
//! ```text
//!   Reloaded            it has reloaded ─────────────────────────────────▶ look
//!   NameOwnerChanged  ┬ it has ended ────────────────────────────────────▶ look
//!                     └ it begins ──▶ Ping ──▶ answered: its rules stand ─▶ look
//! ```
//!
//! It takes its name before it touches a rule, and answers nobody until it is done.
//! A host without a bus is no worse off than before; one is looked for now and then.
//!
//! With iptables on nf_tables behind it, a reload fails if somebody else's transaction
//! comes between what its `ebtables-restore` has listed and what that changes, or puts
//! a jump back between its `-F` and its `-X`. So whoever writes there asks it first.

use std::convert::Infallible;
use std::num::NonZeroU32;
use std::time::Duration;

use futures_util::StreamExt;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tracing::{debug, info};
use zbus::message::{Flags, Type};
use zbus::{Connection, Message, MessageStream, connection};

const NAME: &str = "org.fedoraproject.FirewallD1";

/// The bus itself, by its name, which is that of its interface too.
const BUS: &str = "org.freedesktop.DBus";
const BUS_PATH: &str = "/org/freedesktop/DBus";

/// Only firewalld itself is heard, not whoever says the same to all.
const RELOADED: &str = "type='signal',sender='org.fedoraproject.FirewallD1',\
                        interface='org.fedoraproject.FirewallD1',member='Reloaded'";
const NAME_MOVED: &str = "type='signal',sender='org.freedesktop.DBus',interface='org.freedesktop.DBus',\
                          member='NameOwnerChanged',arg0='org.fedoraproject.FirewallD1'";

/// How long a bus may take to let us in.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long firewalld may be at its rules before ours go beside them.
const AT_WORK: Duration = Duration::from_secs(5);

/// Between the first attempts to reach a bus; it doubles up to the other.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Somebody who listens to firewalld; dropping it ends that.
pub(super) struct Firewalld {
    told: watch::Receiver<()>,
    _listener: JoinSet<()>,
}

impl Firewalld {
    /// Listens on the bus of that address, or that of the system, in the background.
    pub(super) fn listen(address: Option<String>) -> Self {
        let (tell, told) = watch::channel(());
        let mut listener = JoinSet::new();
        listener.spawn(listen(address, tell));
        Self { told, _listener: listener }
    }

    /// Waits until firewalld may have written rules. Safe to drop at any moment.
    pub(super) async fn heard(&mut self) {
        if self.told.changed().await.is_err() {
            std::future::pending().await
        }
    }

    /// Forgets what was told so far: all is looked at now.
    pub(super) fn forget(&mut self) {
        self.told.mark_unchanged();
    }
}

/// Whoever asks before writing beside it.
#[derive(Default)]
pub(super) struct Question {
    /// Whether it was told that nobody answered.
    unanswered: bool,
}

impl Question {
    /// Waits until firewalld is not at its rules, by the bus of that address, or that of
    /// the system; without one there is nothing to wait for.
    pub(super) async fn at_rest(&mut self, address: Option<&str>) {
        let answered = timeout(AT_WORK, answer(address)).await;
        if let Ok(Err(error)) = &answered {
            debug!(%error, "no bus to ask firewalld by");
        }
        match (std::mem::replace(&mut self.unanswered, answered.is_err()), answered) {
            (false, Err(_)) => {
                let seconds = AT_WORK.as_secs();
                info!("firewalld has been busy or stuck for {seconds} s; not waiting for it any longer");
            }
            (true, Ok(_)) => info!("firewalld is no longer busy or stuck"),
            _ => {}
        }
    }
}

/// Waits for firewalld's sign of life, or for the bus's word that nobody is there to give one.
async fn answer(address: Option<&str>) -> zbus::Result<()> {
    let bus = connect(address).await?;
    let mut messages = MessageStream::from(&bus);
    let asked = ping(&bus).await?;
    while let Some(message) = messages.next().await {
        if message?.header().reply_serial() == Some(asked) {
            return Ok(());
        }
    }
    Err(gone())
}

async fn listen(address: Option<String>, tell: watch::Sender<()>) {
    let mut pause = FIRST_PAUSE;
    loop {
        let began = Instant::now();
        let error = hear(address.as_deref(), &tell).await.expect_err("it listens until something is wrong");
        debug!(%error, "firewalld tells us nothing; rules in x_tables are looked at by the clock");
        if began.elapsed() > LONGEST_PAUSE {
            pause = FIRST_PAUSE;
        }
        sleep(pause).await;
        pause = LONGEST_PAUSE.min(pause * 2);
    }
}

/// Tells what it hears, for as long as there is somebody to hear.
async fn hear(address: Option<&str>, tell: &watch::Sender<()>) -> zbus::Result<Infallible> {
    let begin = async {
        let bus = connect(address).await?;
        // All there is to hear in one stream, in its order. A stream for each rule would take
        // the rule back as it is dropped, by a task that there may be no runtime for any more.
        let messages = MessageStream::from(&bus);
        for rule in [RELOADED, NAME_MOVED] {
            bus.call_method(Some(BUS), BUS_PATH, Some(BUS), "AddMatch", &rule).await?;
        }
        // What it did before we listened.
        let ping = ping(&bus).await?;
        Ok::<_, zbus::Error>((bus, messages, ping))
    };
    let (bus, mut messages, mut asked) =
        timeout(PATIENCE, begin).await.map_err(|_| failure("the bus does not let us in"))??;
    while let Some(message) = messages.next().await {
        match word(&message?, asked) {
            Some(Word::Reloaded) => debug!("firewalld has reloaded"),
            Some(Word::Answers) => debug!("firewalld answers"),
            Some(Word::Moved) => {
                debug!("firewalld begins or has ended");
                asked = ping(&bus).await?;
            }
            None => continue,
        }
        tell.send_replace(());
    }
    Err(gone())
}

async fn connect(address: Option<&str>) -> zbus::Result<Connection> {
    let builder = match address {
        Some(address) => connection::Builder::address(address)?,
        None => connection::Builder::system()?,
    };
    builder.build().await
}

/// Asks firewalld for a sign of life, without having it started; the serial of the answer.
async fn ping(bus: &Connection) -> zbus::Result<NonZeroU32> {
    let call = Message::method_call("/", "Ping")?
        .destination(NAME)?
        .interface("org.freedesktop.DBus.Peer")?
        .with_flags(Flags::NoAutoStart)?
        .build(&())?;
    bus.send(&call).await?;
    Ok(call.primary_header().serial_num())
}

/// What was heard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Reloaded,
    /// Its name has another owner, or none.
    Moved,
    Answers,
}

fn word(message: &Message, asked: NonZeroU32) -> Option<Word> {
    let header = message.header();
    match message.message_type() {
        // Anybody can say anything to us alone; the rules of a match are for what is said to all.
        Type::Signal if header.destination().is_some() => None,
        Type::Signal => match header.member()?.as_str() {
            "Reloaded" => Some(Word::Reloaded),
            "NameOwnerChanged" => Some(Word::Moved),
            _ => None,
        },
        Type::MethodReturn => (header.reply_serial() == Some(asked)).then_some(Word::Answers),
        Type::MethodCall | Type::Error => None,
    }
}

fn gone() -> zbus::Error {
    failure("the bus has gone")
}

fn failure(words: &str) -> zbus::Error {
    zbus::Error::Failure(words.into())
}
