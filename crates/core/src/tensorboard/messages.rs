//! The messages of an event file: `tensorflow/core/util/event.proto` and `summary.proto`.

use super::Histogram;
use super::wire::Message;

/// An event with its time and step.
pub(super) struct Event {
    /// Seconds since the Unix epoch.
    pub(super) wall_time: f64,
    pub(super) step: u64,
    pub(super) content: Content,
}

pub(super) enum Content {
    /// The first event of a file.
    Version,
    /// Events of other files from this step on are discarded.
    SessionStart,
    Summary(Vec<Item>),
}

pub(super) enum Item {
    Scalar {
        tag: String,
        value: f32,
    },
    Histogram {
        tag: String,
        histogram: Histogram,
    },
    /// Data for a plugin, without a value.
    Plugin {
        tag: &'static str,
        plugin: &'static str,
        content: Vec<u8>,
    },
}

/// Format version. Readers honour the start of a session since the second version.
const VERSION: &str = "brain.Event:2";
const START: u64 = 1;

impl Event {
    pub(super) fn encoded(&self) -> Vec<u8> {
        let event = Message::new().double(1, self.wall_time);
        let event = if self.step == 0 { event } else { event.integer(2, self.step) };
        match &self.content {
            Content::Version => event.text(3, VERSION),
            Content::SessionStart => event.message(7, Message::new().integer(1, START)),
            Content::Summary(items) => event
                .message(5, items.iter().fold(Message::new(), |all, item| all.message(1, item.message()))),
        }
        .encoded()
    }
}

impl Item {
    fn message(&self) -> Message {
        match self {
            Self::Scalar { tag, value } => Message::new().text(1, tag).float(2, *value),
            Self::Histogram { tag, histogram } => Message::new().text(1, tag).message(5, histogram.message()),
            Self::Plugin { tag, plugin, content } => {
                let data = Message::new().text(1, plugin).bytes(2, content);
                Message::new().text(1, tag).message(9, Message::new().message(1, data))
            }
        }
    }
}

impl Histogram {
    fn message(&self) -> Message {
        Message::new()
            .double(1, self.min)
            .double(2, self.max)
            .double(3, self.counts.iter().sum())
            .double(4, self.sum)
            .double(5, self.sum_of_squares)
            .doubles(6, &self.limits)
            .doubles(7, &self.counts)
    }
}
