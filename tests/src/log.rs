//! What the agents say: counted, and kept where somebody is to read it.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Hears every line from `info` on.
#[derive(Clone, Default)]
pub struct Log {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    lines: AtomicUsize,
    reader: Mutex<Option<Reader>>,
}

type Reader = Box<dyn FnMut(String) + Send>;

impl Log {
    /// Has somebody read each line.
    ///
    /// # Panics
    /// A reader has panicked.
    pub fn read_by(&self, reader: impl FnMut(String) + Send + 'static) {
        *self.inner.reader.lock().expect("no reader panics") = Some(Box::new(reader));
    }

    /// How many lines there were so far.
    pub fn lines(&self) -> usize {
        self.inner.lines.load(Ordering::Relaxed)
    }
}

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO && metadata.is_event()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::INFO)
    }

    fn event(&self, event: &Event<'_>) {
        self.inner.lines.fetch_add(1, Ordering::Relaxed);
        if let Some(reader) = self.inner.reader.lock().expect("no reader panics").as_mut() {
            let mut line = Line(event.metadata().level().to_string());
            event.record(&mut line);
            reader(line.0);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => write!(self.0, " {value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        }
        .expect("a string takes everything");
    }
}
