//! The question that Ctrl-C on a terminal leads to, while the job pauses.

use std::io::{self, IsTerminal};
use std::thread;

use nix::unistd::{getpgrp, tcgetpgrp};
use tokio::sync::mpsc;

use super::RankEvent;

/// The user's answer about a paused job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    SaveAndEnd,
    End,
    GoOn,
}

/// Whether the launcher is in the foreground of a terminal, so that the user can answer.
pub(super) fn is_possible() -> bool {
    let is_ours = || tcgetpgrp(io::stdin()).is_ok_and(|group| group == getpgrp());
    io::stdin().is_terminal() && io::stderr().is_terminal() && is_ours()
}

/// Starts to read the answer, which arrives as an event.
pub(super) fn ask(events: mpsc::UnboundedSender<RankEvent>) -> io::Result<()> {
    // A thread, because a read from a terminal cannot be cancelled. The thread ends with the
    // process.
    let read = move || {
        let mut line = String::new();
        let answer = match io::stdin().read_line(&mut line) {
            Ok(_) => parse(&line),
            Err(_) => Answer::SaveAndEnd,
        };
        let _ = events.send(RankEvent::Answered(answer));
    };
    thread::Builder::new().name("question".into()).spawn(read).map(drop)
}

fn parse(line: &str) -> Answer {
    match line.trim().to_ascii_lowercase().as_str() {
        "n" | "no" => Answer::End,
        "c" | "continue" => Answer::GoOn,
        _ => Answer::SaveAndEnd,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_clear_no_saves() {
        let answers = ["", "\n", "y\n", "Y\n", "what\n"].map(parse);
        assert_eq!(answers, [Answer::SaveAndEnd; 5]);
        assert_eq!(["n\n", " No \n"].map(parse), [Answer::End; 2]);
        assert_eq!(["c\n", "continue\n"].map(parse), [Answer::GoOn; 2]);
    }
}
