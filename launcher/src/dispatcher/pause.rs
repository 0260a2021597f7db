//! Requests of the user to all ranks: pause, resume, save, end.

use ice_proto::link::BoundaryRequest;
use nix::sys::signal::Signal;

use super::Dispatcher;
use super::prompt::{self, Answer};
use crate::report::JobEvent;
use ice_agent::Event;

impl Dispatcher<'_> {
    pub(super) fn is_paused(&self) -> bool {
        !self.paused.is_empty()
    }

    /// Pauses the job and asks the user what to do. Returns false if that is not possible.
    pub(super) fn asks(&mut self) -> bool {
        if self.asking || !self.worker_group.is_running() || !self.group.agrees() || !prompt::is_possible() {
            return false;
        }
        if let Err(error) = prompt::ask(self.sender.clone()) {
            tracing::warn!(%error, "the user cannot be asked");
            return false;
        }
        self.asking = true;
        if self.paused.is_empty() {
            self.request(BoundaryRequest::Pause);
            self.console.note("pausing at the next step boundary; Ctrl-C again ends the job at once");
        } else {
            self.prompt();
        }
        true
    }

    pub(super) fn request(&self, request: BoundaryRequest) {
        self.event_log.add(&JobEvent::Requested { request });
        self.group.request(request);
    }

    pub(super) fn prompt(&self) {
        self.console.say("Should I save the checkpoint? [Y/n] (c continues) ");
    }

    pub(super) fn answered(&mut self, answer: Answer) -> Option<Event> {
        if !std::mem::take(&mut self.asking) {
            return None;
        }
        let interrupt = Signal::SIGINT as i32;
        match answer {
            Answer::SaveAndEnd => Some(self.stop(interrupt, true)),
            Answer::End => Some(self.stop(interrupt, false)),
            Answer::GoOn => {
                self.request(BoundaryRequest::Resume);
                None
            }
        }
    }

    /// Records that a rank paused or resumed.
    pub(super) fn rank_paused(&mut self, local_rank: u32, paused: bool) {
        let (before, rank) = (self.paused.len(), self.group.rank(local_rank));
        if paused {
            self.paused.insert(local_rank);
            self.progress.pause();
            self.console.no_status();
            self.event_log.add(&JobEvent::Paused { rank });
        } else {
            self.paused.remove(&local_rank);
            self.event_log.add(&JobEvent::Resumed { rank });
        }
        match (before, self.paused.len()) {
            (0, 1) if self.asking => self.prompt(),
            (0, 1) => self.console.note("paused; SIGUSR2 resumes"),
            (1, 0) if self.worker_group.is_running() => self.console.note("resumed"),
            _ => {}
        }
    }
}
