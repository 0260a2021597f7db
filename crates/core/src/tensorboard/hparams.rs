//! Hyper-parameters: `tensorboard/plugins/hparams/plugin_data.proto`.

use super::messages::Item;
use super::wire::Message;

const PLUGIN: &str = "hparams";
const SUCCESS: u64 = 1;
const FAILURE: u64 = 2;

/// The value of a hyper-parameter. Converts from numbers, `bool` and text.
#[derive(Debug, Clone, PartialEq)]
pub enum HParam {
    /// A number.
    Number(f64),
    /// On or off.
    Flag(bool),
    /// A name.
    Text(String),
}

macro_rules! from_numbers {
    ($($number:ty),*) => {$(
        impl From<$number> for HParam {
            fn from(number: $number) -> Self {
                Self::Number(number as f64)
            }
        }
    )*};
}

from_numbers!(f64, f32, i32, u32, i64, u64, usize);

impl From<bool> for HParam {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl From<&str> for HParam {
    fn from(text: &str) -> Self {
        Self::Text(text.into())
    }
}

impl From<String> for HParam {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

/// Returns the start of a session with these hyper-parameters.
pub(super) fn start(hparams: &[(String, HParam)], seconds: f64) -> Item {
    let entry = |all: Message, (name, value): &(String, HParam)| {
        let value = match value {
            HParam::Number(number) => Message::new().double(2, *number),
            HParam::Text(text) => Message::new().text(3, text),
            HParam::Flag(flag) => Message::new().integer(4, (*flag).into()),
        };
        all.message(1, Message::new().text(1, name).message(2, value))
    };
    let info = hparams.iter().fold(Message::new(), entry).double(5, seconds);
    item("_hparams_/session_start_info", Message::new().message(3, info))
}

/// Returns the end of the session.
pub(super) fn end(succeeded: bool, seconds: f64) -> Item {
    let status = if succeeded { SUCCESS } else { FAILURE };
    let info = Message::new().integer(1, status).double(2, seconds);
    item("_hparams_/session_end_info", Message::new().message(4, info))
}

fn item(tag: &'static str, data: Message) -> Item {
    Item::Plugin { tag, plugin: PLUGIN, content: data.encoded() }
}
