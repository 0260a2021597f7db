//! Text that comes from another node, and that ends up on a terminal, in logs and in events.
//!
//! [`printable`] is responsible for all of it: every text of the messages between agents passes through it when a message is read. A
//! stranger's host name cannot clear a screen, forge a line, or fill a disk. No other code escapes such text.
//!
//! In the book: `docs/design.md#the-network-is-hostile`.

use std::borrow::Cow;
use std::fmt::Write;

use serde::{Deserialize, Deserializer};

/// Longest text, in bytes; the rest is left out.
pub const LONGEST_TEXT: usize = 8 << 10;

/// The text with control characters written as `\u{1b}`, line ends as `\n`, and with at most [`LONGEST_TEXT`] bytes. A text
/// that has passed through does not change again.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.len() <= LONGEST_TEXT && !text.chars().any(is_control) {
        return Cow::Borrowed(text);
    }
    let mut printable = String::new();
    let mut escaped = String::new();
    for character in text.chars() {
        escaped.clear();
        match character {
            '\n' => escaped.push_str("\\n"),
            '\r' => escaped.push_str("\\r"),
            '\t' => escaped.push(' '),
            // Writing to a string does not fail.
            character if is_control(character) => _ = write!(escaped, "\\u{{{:x}}}", u32::from(character)),
            character => escaped.push(character),
        }
        if printable.len() + escaped.len() > LONGEST_TEXT - '…'.len_utf8() {
            printable.push('…');
            break;
        }
        printable.push_str(&escaped);
    }
    Cow::Owned(printable)
}

/// Whether a terminal may act on it instead of showing it, or shows other text in another order because of it.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}'
        )
}

/// Reads a text of a message.
pub(crate) fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(match printable(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(printable) => printable,
    })
}

/// The same of a text that may be missing.
pub(crate) fn read_option<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    let text = Option::<String>::deserialize(deserializer)?;
    Ok(text.map(|text| printable(&text).into_owned()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde::Serialize;
    use serde::de::DeserializeOwned;

    use super::*;
    use crate::frame::{self, Decoder};
    use crate::rendezvous::{Hello, KeepAlive, RanksStore, RestartPolicy, Round, ToAgent, ToCoordinator};

    const HOSTILE: &str = "a\u{1b}[2J\u{9b}31m\r\n\u{7}\u{202e}b\0";
    const HARMLESS: &str = "a\\u{1b}[2J\\u{9b}31m\\r\\n\\u{7}\\u{202e}b\\u{0}";

    #[test]
    fn controls_are_escaped_once_and_other_text_stays() {
        assert_eq!(printable(HOSTILE), HARMLESS);
        assert_eq!(printable(HARMLESS), HARMLESS);
        assert!(matches!(printable("Größe: 中文 \\ \"é\""), Cow::Borrowed(_)));
    }

    #[test]
    fn long_text_is_cut_and_not_cut_again() {
        for text in ["x".repeat(1 << 20), "\u{1b}".repeat(1 << 20), "中".repeat(1 << 20)] {
            let cut = printable(&text).into_owned();
            assert!(cut.len() <= LONGEST_TEXT && cut.len() > LONGEST_TEXT - 10 && cut.ends_with('…'));
            assert_eq!(printable(&cut), cut);
        }
        let whole = "x".repeat(LONGEST_TEXT);
        assert_eq!(printable(&whole), whole);
    }

    /// A message as the other end receives it, as JSON, which has all of its texts.
    fn received<T: Serialize + DeserializeOwned>(message: &T) -> String {
        let mut decoder = Decoder::new();
        decoder.feed(&frame::encode(message).unwrap());
        serde_json::to_string(&decoder.next_message::<T>().unwrap()).unwrap()
    }

    #[test]
    fn every_text_of_a_message_between_agents_is_printable() {
        let hostile = || HOSTILE.to_owned();
        let store = RanksStore { host: hostile(), port: 1, by_rank: true };
        let hello = Hello {
            run_id: hostile(),
            node_rank: None,
            nnodes: (1, 1),
            local_world_size: 1,
            role: hostile(),
            ranks_store: Some(store.clone()),
            restarts: RestartPolicy { max_restarts: 0, window: None, backoff: Duration::ZERO, crash_loop: 0 },
            keep_alive: KeepAlive::default(),
            agent: 7,
            run_stamp: Some(hostile()),
            place: None,
            addresses: Vec::new(),
            host: hostile(),
            pid: 7,
        };
        let failed = ToCoordinator::Failed {
            round: 0,
            reason: hostile(),
            uptime: Duration::ZERO,
            hopeless: Some(hostile()),
        };
        let left = ToCoordinator::Leave { reason: hostile(), preempted: false };
        let round = Round {
            number: 0,
            restart_count: 0,
            nodes: 1,
            world_size: 1,
            run_stamp: hostile(),
            ranks_store: Some(store),
            you: crate::rendezvous::Member::default(),
        };
        let closed = ToAgent::Closed {
            success: false,
            reason: hostile(),
            no_restart: Some(hostile()),
            preempted: false,
        };
        let texts = [
            (received(&ToCoordinator::Hello(hello)), 5),
            (received(&failed), 2),
            (received(&left), 1),
            (received(&ToAgent::Refused { reason: hostile() }), 1),
            (received(&ToAgent::Waiting { run_stamp: hostile(), reason: hostile() }), 2),
            (received(&ToAgent::RoundStarted(round)), 2),
            (received(&ToAgent::RoundBroken { round: 0, reason: hostile(), gentle: false }), 1),
            (received(&closed), 2),
        ];
        let harmless = serde_json::to_string(HARMLESS).unwrap();
        for (text, count) in texts {
            assert_eq!(text.matches(&harmless).count(), count, "{text}");
        }
    }
}
