//! Interleaves several streams on one screen: a terminal, a pipe or a file.
//!
//! Each line has the prefix of its stream. A carriage return starts a refresh of the same line,
//! which gets the prefix again. A line without an end stays open: the rest of the line continues
//! it, unless another stream has written in between.

use std::borrow::Cow;
use std::collections::BTreeSet;

use memchr::{memchr, memchr2};

/// Number of the agent, which has no stream.
const AGENT: u64 = 0;

/// A rank's stream that is shown on a screen.
#[derive(Debug)]
pub(crate) struct Stream {
    /// Number of the stream, from 1.
    pub(super) number: u64,
    /// Prefix of each line. If it is empty, the bytes are written unchanged.
    pub(super) prefix: String,
}

/// State of a screen.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// The line that contains the cursor.
    open: Option<Open>,
    /// Streams whose line was ended by another stream, so that their own line end must not be
    /// written.
    interrupted: BTreeSet<u64>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    stream: u64,
    has_prefix: bool,
    /// Whether a carriage return was read that has to be written before the next text.
    returned: bool,
}

impl Layout {
    /// Returns the bytes to write for output of a stream.
    pub(super) fn output<'a>(&mut self, stream: &Stream, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        let Some(last) = bytes.last() else { return Cow::Borrowed(bytes) };
        if stream.prefix.is_empty() {
            let before = self.open.filter(|open| open.has_prefix || open.stream == AGENT);
            let open = Open { stream: stream.number, has_prefix: false, returned: false };
            self.open = Some(open).filter(|_| *last != b'\n');
            return match before {
                Some(_) => [b"\n", bytes].concat().into(),
                None => Cow::Borrowed(bytes),
            };
        }
        // Room for prefixes of ten bytes before lines of forty.
        let mut out = Vec::with_capacity(bytes.len() + bytes.len() / 4 + stream.prefix.len());
        let (mut is_fresh, mut returned) = match self.open.take() {
            Some(open) if open.stream == stream.number => (false, open.returned),
            Some(open) => {
                out.push(b'\n');
                self.interrupted.insert(open.stream);
                (true, false)
            }
            None => (true, false),
        };
        let prefix = stream.prefix.as_bytes();
        let mut rest = bytes;
        if self.interrupted.remove(&stream.number) {
            let start = rest.iter().position(|byte| *byte != b'\r').unwrap_or(0);
            rest = rest[start..].strip_prefix(b"\n").unwrap_or(rest);
        }
        while !rest.is_empty() {
            let end = memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
            let (text, after) = rest.split_at(end);
            let is_line_end = after.first() == Some(&b'\n');
            if !text.is_empty() || (is_line_end && is_fresh) {
                if returned && !is_fresh {
                    out.push(b'\r');
                }
                if is_fresh || returned {
                    out.extend_from_slice(prefix);
                }
                out.extend_from_slice(text);
                (is_fresh, returned) = (false, false);
            }
            match after.first() {
                Some(b'\n') => {
                    out.push(b'\n');
                    (is_fresh, returned) = (true, false);
                }
                // There is nothing to refresh at the beginning of a line.
                Some(_) => returned = !is_fresh,
                None => {}
            }
            rest = after.get(1..).unwrap_or_default();
        }
        if !is_fresh {
            self.open = Some(Open { stream: stream.number, has_prefix: true, returned });
        }
        out.into()
    }

    /// Returns the bytes to write at the end of a stream. An open line with a prefix is ended, so
    /// that no other stream continues it.
    pub(super) fn end(&mut self, stream: &Stream) -> &'static [u8] {
        self.interrupted.remove(&stream.number);
        match self.open {
            Some(open) if open.stream == stream.number && open.has_prefix => {
                self.open = None;
                b"\n"
            }
            _ => b"",
        }
    }

    /// Returns the bytes to write for a text of the agent, which never continues a line of a rank.
    pub(super) fn agent<'a>(&mut self, text: &'a [u8]) -> Cow<'a, [u8]> {
        let before = self.open.filter(|open| open.stream != AGENT && text.first() != Some(&b'\n'));
        let is_open = memchr(b'\n', &text[text.len().saturating_sub(1)..]).is_none() && !text.is_empty();
        self.open = is_open.then_some(Open { stream: AGENT, has_prefix: false, returned: false });
        let Some(before) = before else { return Cow::Borrowed(text) };
        if before.has_prefix {
            self.interrupted.insert(before.stream);
        }
        [b"\n", text].concat().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A screen with these streams.
    struct Screen {
        layout: Layout,
        streams: Vec<Stream>,
        text: String,
    }

    impl Screen {
        fn of(prefixes: &[&str]) -> Self {
            let stream =
                |(at, prefix): (usize, &&str)| Stream { number: at as u64 + 1, prefix: (*prefix).into() };
            let streams = prefixes.iter().enumerate().map(stream).collect();
            Self { layout: Layout::default(), streams, text: String::new() }
        }

        fn write(&mut self, stream: usize, text: &str) -> &mut Self {
            let out = self.layout.output(&self.streams[stream], text.as_bytes());
            self.text += std::str::from_utf8(&out).unwrap();
            self
        }

        fn say(&mut self, text: &str) -> &mut Self {
            self.text += std::str::from_utf8(&self.layout.agent(text.as_bytes())).unwrap();
            self
        }

        fn end(&mut self, stream: usize) -> &mut Self {
            self.text += std::str::from_utf8(self.layout.end(&self.streams[stream])).unwrap();
            self
        }
    }

    #[test]
    fn a_line_in_two_halves_has_one_prefix() {
        let mut screen = Screen::of(&["[a]:", "[b]:"]);
        screen.write(0, "on").write(0, "e\n\ntwo\nth").write(0, "ree").end(0).end(0);
        assert_eq!(screen.text, "[a]:one\n[a]:\n[a]:two\n[a]:three\n");
    }

    #[test]
    fn a_half_line_that_is_interrupted_begins_again_with_its_prefix() {
        let mut screen = Screen::of(&["[a]:", "[b]:"]);
        screen.write(0, "on").write(1, "other\n").write(0, "e\n").write(1, "x").say("note\n").write(1, "y\n");
        assert_eq!(screen.text, "[a]:on\n[b]:other\n[a]:e\n[b]:x\nnote\n[b]:y\n");
    }

    #[test]
    fn a_refresh_is_one_line_with_one_prefix() {
        // One progress bar begins with its carriage return (tqdm), another one ends with it. Pieces
        // are cut at different places.
        for pieces in [
            &["\r 10%", "\r 20%", "\r 30%\n"][..],
            &["\r 10%\r", " 20%\r", " 30%", "\n"],
            &["\r", " 10%", "\r", " 20%\r 30%\r\n"],
            &[" 10%\r\r 20%\r", "\r 30%\r", "\n"],
        ] {
            let mut screen = Screen::of(&["[a]:"]);
            pieces.iter().for_each(|piece| _ = screen.write(0, piece));
            assert_eq!(screen.text, "[a]: 10%\r[a]: 20%\r[a]: 30%\n", "{pieces:?}");
        }
    }

    #[test]
    fn bars_of_two_ranks_take_turns_in_lines() {
        let mut screen = Screen::of(&["[a]:", "[b]:"]);
        screen.write(0, "\r1%").write(1, "\r2%").write(1, "\r3%").write(0, "\r4%").end(1).end(0);
        assert_eq!(screen.text, "[a]:1%\n[b]:2%\r[b]:3%\n[a]:4%\n");
        screen.write(0, "x").write(1, "y").write(0, "\nz\n\n").write(1, "\r\n");
        assert!(screen.text.ends_with("[a]:x\n[b]:y\n[a]:z\n[a]:\n"), "{:?}", screen.text);
    }

    #[test]
    fn bytes_without_a_prefix_stay_as_they_are() {
        let mut screen = Screen::of(&["", ""]);
        screen.write(0, "\r1%").write(1, "x\r\n").write(0, "2%\r").end(0).write(1, "");
        assert_eq!(screen.text, "\r1%x\r\n2%\r");
        screen.say("note\n").write(0, "3").write(1, "4");
        assert!(screen.text.ends_with("2%\r\nnote\n34"), "{:?}", screen.text);
    }

    #[test]
    fn the_agents_question_is_not_answered_by_a_rank() {
        let mut screen = Screen::of(&["[a]:"]);
        screen.say("save? ").write(0, "step\n").say("save? ").say("\n").say("ended\n");
        assert_eq!(screen.text, "save? \n[a]:step\nsave? \nended\n");
    }
}
