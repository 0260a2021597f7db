//! Text from other nodes, which ends up on a terminal, in logs and in events.
//!
//! [`printable`] sanitizes all of it: each text of the messages between agents passes through it
//! when a message is decoded. So a peer's host name cannot clear a screen, forge a line, or fill a
//! disk. No other code escapes such text.
//!
//! In the book: `docs/design.md#the-network-is-hostile`.

use std::borrow::Cow;
use std::fmt::Write;

use serde::{Deserialize, Deserializer};

/// Maximum length of a text in bytes; the rest is cut off.
pub const MAX_TEXT_LEN: usize = 8 << 10;

/// Returns the text with control characters as `\u{1b}`, line ends as `\n`, and at most
/// [`MAX_TEXT_LEN`] bytes. Idempotent.
pub fn printable(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_TEXT_LEN && !text.chars().any(is_control) {
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
        if printable.len() + escaped.len() > MAX_TEXT_LEN - '…'.len_utf8() {
            printable.push('…');
            break;
        }
        printable.push_str(&escaped);
    }
    Cow::Owned(printable)
}

/// Returns whether a terminal may act on a character instead of showing it, or reorder other text
/// because of it.
fn is_control(character: char) -> bool {
    character.is_control()
        || matches!(
            character,
            '\u{61c}' | '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}'
        )
}

/// Deserializes a text of a message.
pub(crate) fn read<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    Ok(match printable(&text) {
        Cow::Borrowed(_) => text,
        Cow::Owned(printable) => printable,
    })
}

/// Deserializes an optional text of a message.
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
            assert!(cut.len() <= MAX_TEXT_LEN && cut.len() > MAX_TEXT_LEN - 10 && cut.ends_with('…'));
            assert_eq!(printable(&cut), cut);
        }
        let whole = "x".repeat(MAX_TEXT_LEN);
        assert_eq!(printable(&whole), whole);
    }

    /// Returns a message after transmission as JSON, which contains all of its texts.
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
            agent_id: 7,
            run_stamp: Some(hostile()),
            last_node_rank: None,
            addresses: Vec::new(),
            host: hostile(),
            pid: 7,
        };
        let failed = ToCoordinator::Failed {
            round: 0,
            reason: hostile(),
            uptime: Duration::ZERO,
            fatal_reason: Some(hostile()),
        };
        let left = ToCoordinator::Leave { reason: hostile(), preempted: false };
        let round = Round {
            number: 0,
            restart_count: 0,
            nodes: 1,
            world_size: 1,
            run_stamp: hostile(),
            ranks_store: Some(store),
            assignment: crate::rendezvous::NodeAssignment::default(),
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
            (received(&ToAgent::RoundBroken { round: 0, reason: hostile(), graceful: false }), 1),
            (received(&closed), 2),
        ];
        let harmless = serde_json::to_string(HARMLESS).unwrap();
        for (text, count) in texts {
            assert_eq!(text.matches(&harmless).count(), count, "{text}");
        }
    }
}
