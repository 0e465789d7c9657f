//! The one way to ask the kernel: a thread of its own that owns the sockets.
//!
//! ```text
//!   async side                       the thread
//!   run(job) ──── channel ────────▶  job(&mut Kernel) ── sendmsg ─▶ kernel
//!            ◀──── oneshot ───────   its answer       ◀── recv ───
//!   changes  ◀─────────────────────  Monitor          ◀── its word of changes
//! ```
//!
//! A job runs to its end even if nobody waits for it any more. What went wrong
//! with the socket itself makes the next job open a new one. Between jobs the
//! thread listens (see [`super::monitor`]).
//!
//! Requests that change something go many to a datagram. The kernel takes them
//! in order and answers each that it refuses; only the last is asked to be
//! acknowledged, and its answer tells that all before it were taken up. An answer
//! costs 832 bytes of the receive buffer whatever it says, and the default buffer
//! holds 256 of them, so a datagram has fewer requests than that.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use flannel_core::host::HostError;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{MsgFlags, setsockopt, sockopt};
use nix::sys::time::TimeVal;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE,
    NLMSG_ERROR, NLMSG_OVERRUN, NetlinkBuffer, NetlinkDeserializable, NetlinkHeader, NetlinkSerializable,
    NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use thiserror::Error;
use tokio::sync::oneshot;
use tracing::debug;

use super::link;
use super::monitor::{Listener, Monitor};

/// How many requests go in one datagram.
pub(crate) const BATCH: usize = 192;

/// What one `recv` may bring. The kernel fills at most 32 KiB of it with a dump,
/// and a smaller buffer makes dumps of forwarding entries quadratic.
const RECEIVE_BUFFER: usize = 64 * 1024;

/// What the kernel keeps for us until we read it, if it lets us.
const SOCKET_BUFFER: usize = 1024 * 1024;

/// The kernel answers while it takes the request; this is for a lost answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often a dump that was disturbed is begun anew.
const DUMP_ATTEMPTS: usize = 10;

/// Bytes of a netlink message before its own (`struct nlmsghdr`).
const HEADER: usize = 16;

/// Attribute of an extended acknowledgement: the kernel's words (`linux/netlink.h`).
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Why there is no answer to go by.
#[derive(Debug, Error)]
pub(crate) enum NetlinkError {
    /// The socket failed. Trying again may help.
    #[error("netlink socket")]
    Socket(#[from] io::Error),
    /// An answer was lost. Trying again may help.
    #[error("no answer from the kernel within {} s", PATIENCE.as_secs())]
    Silent,
    /// A list changed each time while it was read. Trying again may help.
    #[error("the list changed while it was read, {DUMP_ATTEMPTS} times in a row")]
    Disturbed,
    /// The kernel would not answer. It helps to look at why.
    #[error("{0}")]
    Refused(Refusal),
    /// The answer makes no sense. A newer kernel, or a fault of ours.
    #[error("an answer that cannot be read: {0}")]
    Garbled(String),
}

/// The kernel's no.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    /// Which.
    pub(crate) errno: Errno,
    /// Its own words, if it said any.
    pub(crate) words: Option<String>,
}

impl Refusal {
    /// The error's name with what it may mean: the hint if there is one, else
    /// what the kernel said.
    pub(crate) fn reason(&self, hint: Option<String>) -> String {
        let hint = match self.errno {
            Errno::EPERM => Some("needs CAP_NET_ADMIN".into()),
            _ => hint.or_else(|| self.words.clone()),
        };
        let name = match self.errno {
            // nix says more than the C library does.
            Errno::EOPNOTSUPP => "Operation not supported",
            other => other.desc(),
        };
        match hint {
            Some(hint) => format!("{name} ({hint})"),
            None => name.into(),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason(None))
    }
}

/// A message to the kernel that changes something.
pub(crate) struct Request {
    /// `NLM_F_CREATE` and the like; the rest is added on the way.
    pub(crate) flags: u16,
    /// What to do.
    pub(crate) message: Message,
}

/// What follows the header of a netlink message.
#[derive(Clone, Debug)]
pub(crate) enum Message {
    /// In rtnetlink's vocabulary.
    Typed(Box<RouteNetlinkMessage>),
    /// In bytes, where that has no word for it; with the message type.
    Raw(u16, Vec<u8>),
}

impl From<RouteNetlinkMessage> for Message {
    fn from(message: RouteNetlinkMessage) -> Self {
        Self::Typed(Box::new(message))
    }
}

type Job = Box<dyn FnOnce(&mut Kernel) + Send>;

/// The handle to the thread; the thread ends with it.
pub(crate) struct KernelThread {
    /// Always there but while it is dropped.
    jobs: Option<mpsc::Sender<Job>>,
    wake: Arc<EventFd>,
    /// What the thread has heard.
    pub(crate) listener: Listener,
}

impl Drop for KernelThread {
    fn drop(&mut self) {
        self.jobs = None;
        // A thread that has ended needs no waking.
        let _ = self.wake.write(1);
    }
}

impl KernelThread {
    /// Opens the sockets and starts the thread, all in the caller's network
    /// namespace; with so many bytes of room for what the kernel tells.
    pub(crate) fn start(room: usize) -> Result<Self, HostError> {
        let broken = |source: io::Error| HostError::Broken {
            operation: "cannot open a netlink socket".into(),
            source: Box::new(source),
        };
        let listener = Listener::default();
        let mut kernel = Kernel::new(Monitor::open(listener.clone(), room).map_err(broken)?);
        kernel.socket().map_err(broken)?;
        let wake = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC);
        let wake = Arc::new(wake.map_err(|errno| broken(errno.into()))?);
        let (jobs, queue) = mpsc::channel::<Job>();
        let woken = wake.clone();
        let work = move || work(&mut kernel, &queue, &woken);
        thread::Builder::new().name("netlink".into()).spawn(work).map_err(broken)?;
        Ok(Self { jobs: Some(jobs), wake, listener })
    }

    /// Runs `job` on the thread.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        operation: &str,
        job: impl FnOnce(&mut Kernel) -> Result<T, NetlinkError> + Send + 'static,
    ) -> Result<T, HostError> {
        let broken = |source: Box<dyn std::error::Error + Send + Sync>| HostError::Broken {
            operation: operation.into(),
            source,
        };
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |kernel| {
            let outcome = job(kernel);
            if outcome.is_err() {
                // Answers to what failed may still be on their way.
                kernel.socket = None;
            }
            // Nobody waits any more: then nobody needs the answer.
            drop(answer.send(outcome));
        });
        let sent = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
        if !sent || self.wake.write(1).is_err() {
            return Err(broken("the netlink thread has ended".into()));
        }
        let outcome = answered.await.map_err(|_| broken("the netlink thread has ended".into()))?;
        outcome.map_err(|error| broken(Box::new(error)))
    }
}

/// Jobs as they come, and the kernel's word of changes, until nobody has the handle any more.
fn work(kernel: &mut Kernel, queue: &mpsc::Receiver<Job>, wake: &EventFd) {
    loop {
        let mut ready = [
            PollFd::new(wake.as_fd(), PollFlags::POLLIN),
            PollFd::new(kernel.monitor.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => {
                debug!(%errno, "the netlink thread ends");
                return;
            }
        }
        // Whether or not it was this that woke us.
        let _ = wake.read();
        loop {
            match queue.try_recv() {
                Ok(job) => job(kernel),
                Err(mpsc::TryRecvError::Empty) => break,
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
        kernel.hear();
    }
}

/// The sockets, for whoever is on their thread.
pub(crate) struct Kernel {
    socket: Option<Socket>,
    sequence: u32,
    received: Box<[u8]>,
    /// What the kernel tells by itself.
    pub(crate) monitor: Monitor,
}

impl Kernel {
    fn new(monitor: Monitor) -> Self {
        let received = vec![0; RECEIVE_BUFFER].into_boxed_slice();
        Self { socket: None, sequence: 0, received, monitor }
    }

    /// Takes in what the kernel has told, and looks at a device of ours before it tells that
    /// neighbours are gone: they would be put back only to be dropped again.
    fn hear(&mut self) {
        for name in self.monitor.take_in() {
            match link::by_name(self, name) {
                Ok(seen) => self.monitor.look_at(name, seen),
                Err(error) => {
                    self.socket = None;
                    self.monitor.everything(&format!("{name} cannot be looked at: {error}"));
                }
            }
        }
        self.monitor.tell();
    }

    /// Takes the requests in their order; tells for each whether the kernel did.
    pub(crate) fn change(
        &mut self,
        requests: Vec<Request>,
    ) -> Result<Vec<Result<(), Refusal>>, NetlinkError> {
        let mut outcomes = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        let mut datagram = Vec::new();
        while requests.peek().is_some() {
            datagram.clear();
            let first = self.sequence.wrapping_add(1);
            let mut count = 0;
            while let Some(request) = requests.next_if(|_| count < BATCH) {
                count += 1;
                let last = count == BATCH || requests.peek().is_none();
                let flags = request.flags | if last { NLM_F_ACK } else { 0 };
                self.write(&mut datagram, flags, &request.message);
            }
            let from = outcomes.len();
            outcomes.resize(from + count, Ok(()));
            self.send(&datagram)?;
            self.read_outcomes(first, &mut outcomes[from..])?;
        }
        Ok(outcomes)
    }

    /// Takes one request.
    pub(crate) fn change_one(&mut self, request: Request) -> Result<Result<(), Refusal>, NetlinkError> {
        let outcome = self.change(vec![request])?.pop();
        outcome.ok_or_else(|| NetlinkError::Garbled("nothing for one request".into()))
    }

    /// Asks for one object.
    pub(crate) fn get(
        &mut self,
        message: RouteNetlinkMessage,
    ) -> Result<Result<RouteNetlinkMessage, Refusal>, NetlinkError> {
        let mut datagram = Vec::new();
        let sequence = self.write(&mut datagram, 0, &message.into());
        self.send(&datagram)?;
        loop {
            let bytes = self.receive()?;
            for frame in Frames(&self.received[..bytes]) {
                let frame = frame?;
                if frame.sequence_number() != sequence {
                    continue;
                }
                if frame.message_type() != NLMSG_ERROR {
                    let message = decode(frame.message_type(), frame.payload());
                    return message.map(Ok).map_err(NetlinkError::Garbled);
                }
                return match refusal(&frame)? {
                    Some(refusal) => Ok(Err(refusal)),
                    None => Err(NetlinkError::Garbled("an acknowledgement instead of an object".into())),
                };
            }
        }
    }

    /// Asks for a list, and keeps what `pick` makes of its parts: of the type and the bytes of each.
    pub(crate) fn dump<T>(
        &mut self,
        message: impl Into<Message>,
        mut pick: impl FnMut(u16, &[u8]) -> Option<T>,
    ) -> Result<Vec<T>, NetlinkError> {
        let message = message.into();
        for _ in 0..DUMP_ATTEMPTS {
            let mut list = Vec::new();
            if self.dump_once(&message, &mut |kind, payload| list.extend(pick(kind, payload)))? {
                return Ok(list);
            }
        }
        Err(NetlinkError::Disturbed)
    }

    /// Whether the list stood still while it was read.
    fn dump_once(
        &mut self,
        message: &Message,
        take: &mut dyn FnMut(u16, &[u8]),
    ) -> Result<bool, NetlinkError> {
        let mut datagram = Vec::new();
        let sequence = self.write(&mut datagram, NLM_F_DUMP, message);
        self.send(&datagram)?;
        let mut steady = true;
        loop {
            let bytes = self.receive()?;
            match read_dump(&self.received[..bytes], sequence, take)? {
                Progress::Done { disturbed } => return Ok(steady && !disturbed),
                Progress::More { disturbed } => steady &= !disturbed,
            }
        }
    }

    /// Reads answers until the last request has its own.
    fn read_outcomes(
        &mut self,
        first: u32,
        outcomes: &mut [Result<(), Refusal>],
    ) -> Result<(), NetlinkError> {
        loop {
            let bytes = self.receive()?;
            for frame in Frames(&self.received[..bytes]) {
                let frame = frame?;
                let index = frame.sequence_number().wrapping_sub(first) as usize;
                if frame.message_type() != NLMSG_ERROR || index >= outcomes.len() {
                    continue;
                }
                if let Some(refusal) = refusal(&frame)? {
                    outcomes[index] = Err(refusal);
                }
                if index + 1 == outcomes.len() {
                    return Ok(());
                }
            }
        }
    }

    /// Adds a message to a datagram; returns its sequence number.
    fn write(&mut self, datagram: &mut Vec<u8>, flags: u16, message: &Message) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let (kind, length) = match message {
            Message::Typed(message) => (message.message_type(), message.buffer_len()),
            Message::Raw(kind, bytes) => (*kind, bytes.len()),
        };
        let whole = u32::try_from(HEADER + length).expect("a message is shorter than four gigabytes");
        datagram.extend(whole.to_ne_bytes());
        datagram.extend(kind.to_ne_bytes());
        datagram.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        datagram.extend(self.sequence.to_ne_bytes());
        datagram.extend([0; 4]);
        let from = datagram.len();
        // Messages in one datagram begin at multiples of four.
        datagram.resize(from + length.next_multiple_of(4), 0);
        match message {
            Message::Typed(message) => message.serialize(&mut datagram[from..from + length]),
            Message::Raw(_, bytes) => datagram[from..from + length].copy_from_slice(bytes),
        }
        self.sequence
    }

    fn send(&mut self, datagram: &[u8]) -> Result<(), NetlinkError> {
        let sent = self.socket()?.send(datagram, 0)?;
        if sent == datagram.len() {
            Ok(())
        } else {
            Err(NetlinkError::Garbled(format!("{sent} of {} bytes were sent", datagram.len())))
        }
    }

    /// Reads one datagram into `received`; returns its length.
    fn receive(&mut self) -> Result<usize, NetlinkError> {
        let Some(socket) = &self.socket else {
            return Err(NetlinkError::Silent);
        };
        loop {
            // With MSG_TRUNC the length is the datagram's, even if it did not fit.
            match socket.recv(&mut &mut self.received[..], MsgFlags::MSG_TRUNC.bits()) {
                Ok(bytes) if bytes <= self.received.len() => return Ok(bytes),
                Ok(bytes) => return Err(NetlinkError::Garbled(format!("{bytes} bytes in one datagram"))),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(NetlinkError::Silent),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn socket(&mut self) -> io::Result<&Socket> {
        match &mut self.socket {
            Some(socket) => Ok(socket),
            empty => {
                let (socket, port) = open()?;
                self.monitor.pass_over_writes_of(port);
                Ok(empty.insert(socket))
            }
        }
    }
}

/// The socket and the port number that the kernel knows it by.
fn open() -> io::Result<(Socket, u32)> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    let port = socket.bind_auto()?.port_number();
    // Connected, it takes nothing from other processes.
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_netlink_get_strict_chk(true)?;
    socket.set_ext_ack(true)?;
    socket.set_cap_ack(true)?;
    if let Err(error) = setsockopt(&socket, sockopt::RcvBufForce, &SOCKET_BUFFER) {
        debug!(%error, "the netlink socket keeps its receive buffer");
    }
    setsockopt(
        &socket,
        sockopt::ReceiveTimeout,
        &TimeVal::from(nix::libc::timeval { tv_sec: PATIENCE.as_secs() as nix::libc::time_t, tv_usec: 0 }),
    )?;
    Ok((socket, port))
}

/// The messages of a datagram.
pub(crate) struct Frames<'a>(pub(crate) &'a [u8]);

impl<'a> Iterator for Frames<'a> {
    type Item = Result<NetlinkBuffer<&'a [u8]>, NetlinkError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let frame = match NetlinkBuffer::new_checked(self.0) {
            Ok(frame) => frame,
            Err(error) => {
                self.0 = &[];
                return Some(Err(NetlinkError::Garbled(error.to_string())));
            }
        };
        let next = (frame.length() as usize).next_multiple_of(4).min(self.0.len());
        self.0 = &self.0[next..];
        Some(Ok(frame))
    }
}

/// How far a dump has come, and whether the kernel flagged a change meanwhile.
#[derive(Debug, PartialEq, Eq)]
enum Progress {
    More { disturbed: bool },
    Done { disturbed: bool },
}

/// Reads one datagram of a dump. A refused dump ends with an error in its
/// closing message, which must not pass for an empty list.
fn read_dump(
    datagram: &[u8],
    sequence: u32,
    take: &mut dyn FnMut(u16, &[u8]),
) -> Result<Progress, NetlinkError> {
    let mut disturbed = false;
    for frame in Frames(datagram) {
        let frame = frame?;
        if frame.sequence_number() != sequence {
            continue;
        }
        disturbed |= frame.flags() & NLM_F_DUMP_INTR != 0;
        match frame.message_type() {
            NLMSG_DONE | NLMSG_ERROR => {
                return match refusal(&frame)? {
                    Some(refusal) => Err(NetlinkError::Refused(refusal)),
                    None => Ok(Progress::Done { disturbed }),
                };
            }
            NLMSG_OVERRUN => return Err(NetlinkError::Garbled("the kernel lost a part".into())),
            kind => take(kind, frame.payload()),
        }
    }
    Ok(Progress::More { disturbed })
}

/// One object in rtnetlink's vocabulary.
pub(crate) fn decode(kind: u16, payload: &[u8]) -> Result<RouteNetlinkMessage, String> {
    let mut header = NetlinkHeader::default();
    header.message_type = kind;
    RouteNetlinkMessage::deserialize(&header, payload).map_err(|error| error.to_string())
}

/// One object of a list; `None` for one of somebody else's with attributes that the vocabulary lacks.
pub(crate) fn decode_part(kind: u16, payload: &[u8]) -> Option<RouteNetlinkMessage> {
    decode(kind, payload)
        .inspect_err(|error| debug!(error, "passing over an object that cannot be read"))
        .ok()
}

/// The attributes behind the first `fixed` bytes of an object: type and value of each.
pub(crate) fn attributes(payload: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    /// `NLA_TYPE_MASK`: the two highest bits tell how a value is laid out.
    const TYPE: u16 = 0x3fff;
    let mut rest = payload.get(fixed..).unwrap_or_default();
    std::iter::from_fn(move || {
        let &[a, b, c, d] = rest.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([c, d]) & TYPE, value))
    })
}

/// The error in a closing or acknowledging message; `None` if it says that all went well.
fn refusal(frame: &NetlinkBuffer<&[u8]>) -> Result<Option<Refusal>, NetlinkError> {
    let payload = frame.payload();
    let garbled = || NetlinkError::Garbled("an acknowledgement without a code".into());
    let code = payload.first_chunk::<4>().map(|bytes| i32::from_ne_bytes(*bytes)).ok_or_else(garbled)?;
    // The code of a closing message may be positive: what is left in a count.
    if code >= 0 {
        return Ok(None);
    }
    let words = if frame.flags() & NLM_F_ACK_TLVS != 0 { words(frame, payload) } else { None };
    Ok(Some(Refusal { errno: Errno::from_raw(-code), words }))
}

/// The kernel's words, behind the code and, in an acknowledgement, the request's header.
fn words(frame: &NetlinkBuffer<&[u8]>, payload: &[u8]) -> Option<String> {
    let mut at = 4;
    if frame.message_type() == NLMSG_ERROR {
        let echoed = NetlinkBuffer::new(payload.get(4..20)?).length() as usize;
        let whole = frame.flags() & NLM_F_CAPPED == 0;
        at += if whole { echoed.next_multiple_of(4) } else { 16 };
    }
    let attributes = NlasIterator::new(payload.get(at..)?);
    let message = attributes.flatten().find(|attribute| attribute.kind() == NLMSGERR_ATTR_MSG)?;
    let text = String::from_utf8_lossy(message.value());
    Some(text.trim_end_matches(['\0', '.', '\n']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![];
        bytes.extend((16 + payload.len() as u32).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(sequence.to_ne_bytes());
        bytes.extend(0u32.to_ne_bytes());
        bytes.extend(payload);
        bytes
    }

    fn said(text: &str) -> Vec<u8> {
        let mut attribute = vec![];
        attribute.extend((4 + text.len() as u16 + 1).to_ne_bytes());
        attribute.extend(NLMSGERR_ATTR_MSG.to_ne_bytes());
        attribute.extend(text.as_bytes());
        attribute.push(0);
        attribute
    }

    fn kernel() -> Kernel {
        Kernel::new(Monitor::open(Listener::default(), SOCKET_BUFFER).unwrap())
    }

    fn read(datagram: &[u8]) -> Result<Progress, NetlinkError> {
        read_dump(datagram, 7, &mut |_, _| {})
    }

    #[test]
    fn a_refused_dump_is_an_error_and_not_an_empty_list() {
        let mut payload = (-22i32).to_ne_bytes().to_vec();
        payload.extend(said("Invalid values in header for dump request"));

        let error = read(&frame(NLMSG_DONE, NLM_F_ACK_TLVS, 7, &payload)).unwrap_err();

        assert_eq!(error.to_string(), "Invalid argument (Invalid values in header for dump request)");
    }

    #[test]
    fn a_dump_is_done_at_its_closing_message() {
        assert_eq!(read(&frame(NLMSG_DONE, 0, 7, &[0; 4])).unwrap(), Progress::Done { disturbed: false });
        assert_eq!(read(&frame(NLMSG_DONE, 0, 6, &[0; 4])).unwrap(), Progress::More { disturbed: false });
    }

    #[test]
    fn a_dump_that_was_disturbed_says_so() {
        let progress = read(&frame(NLMSG_DONE, NLM_F_DUMP_INTR, 7, &[0; 4])).unwrap();

        assert_eq!(progress, Progress::Done { disturbed: true });
    }

    #[test]
    fn a_datagram_cut_short_is_an_error() {
        let whole = frame(NLMSG_DONE, 0, 7, &[0; 4]);

        assert!(matches!(read(&whole[..18]), Err(NetlinkError::Garbled(_))));
        assert!(matches!(read(&frame(NLMSG_DONE, 0, 7, &[])), Err(NetlinkError::Garbled(_))));
    }

    #[test]
    fn the_kernel_s_words_are_found_behind_a_whole_and_a_capped_request() {
        let mut request = frame(24, 0, 7, &[0; 12]);
        for flags in [NLM_F_ACK_TLVS, NLM_F_ACK_TLVS | NLM_F_CAPPED] {
            if flags & NLM_F_CAPPED != 0 {
                request.truncate(16);
            }
            let mut payload = (-101i32).to_ne_bytes().to_vec();
            payload.extend(&request);
            payload.extend(said("Nexthop has invalid gateway."));
            let bytes = frame(NLMSG_ERROR, flags, 7, &payload);

            let refusal = refusal(&NetlinkBuffer::new(&bytes[..])).unwrap().unwrap();

            assert_eq!(refusal.to_string(), "Network is unreachable (Nexthop has invalid gateway)");
        }
    }

    #[test]
    fn a_lack_of_permission_names_the_capability() {
        let refusal = Refusal { errno: Errno::EPERM, words: Some("whatever".into()) };

        assert_eq!(refusal.reason(None), "Operation not permitted (needs CAP_NET_ADMIN)");
    }

    #[test]
    fn a_socket_that_does_not_answer_is_an_error_in_the_end() {
        let mut kernel = kernel();
        kernel.socket().unwrap();
        let socket = kernel.socket.as_ref().unwrap();
        let soon = TimeVal::from(nix::libc::timeval { tv_sec: 0, tv_usec: 1000 });
        setsockopt(socket, sockopt::ReceiveTimeout, &soon).unwrap();

        assert!(matches!(kernel.receive(), Err(NetlinkError::Silent)));
    }

    #[test]
    fn a_dump_that_this_kernel_refuses_is_an_error() {
        let mut message = rtnetlink::packet_route::neighbour::NeighbourMessage::default();
        // Strict checking wants the device as an attribute.
        message.header.ifindex = 1;

        let outcome = kernel().dump(RouteNetlinkMessage::GetNeighbour(message), decode_part);

        let Err(NetlinkError::Refused(refusal)) = outcome else { panic!("{outcome:?}") };
        assert_eq!(refusal.errno, Errno::EINVAL);
        assert!(refusal.words.is_some());
    }

    #[tokio::test]
    async fn a_thread_that_has_ended_is_an_error_and_not_an_empty_answer() {
        let mut thread = KernelThread::start(SOCKET_BUFFER).unwrap();
        thread.jobs = Some(mpsc::channel::<Job>().0);

        let outcome = thread.run("cannot read", |_| Ok(())).await;

        assert!(matches!(outcome, Err(HostError::Broken { .. })));
    }
}
