//! Whether the ranks of this node still do something.

use std::time::Duration;

use ice_proto::rendezvous::ToCoordinator;

use super::{Dispatcher, inspect};
use crate::agent::{Event, Hang, HangWatch};
use crate::report::Happened;
use crate::supervise::cpu_times;

impl Dispatcher<'_> {
    /// Looks whether the ranks still do something; one that is silent is not looked into.
    pub(super) fn look(&mut self) -> Option<Event> {
        let now = self.clock.now();
        let hang = match (self.agent.is_running(), self.agent.is_regrouping()) {
            (true, _) if self.inspecting => None,
            (true, _) => self.timer_expired(now).or_else(|| self.sampled(now).check(now)),
            (false, true) => self.hangs.check_silence(now),
            (false, false) => None,
        };
        self.tell_progress(now);
        hang.and_then(|hang| self.hung(hang))
    }

    /// Tells the coordinator whether the ranks of this node get anything done, if that has changed.
    pub(super) fn tell_progress(&mut self, now: Duration) {
        // Ranks that are ended or looked into are a failure already.
        if !self.agent.is_running() || self.inspecting {
            return;
        }
        if let (Some(session), Some(round)) = (&self.session, self.group.round())
            && let Some(progress) = self.hangs.news(now)
        {
            session.send(ToCoordinator::Progress { round, progress });
        }
    }

    /// The coordinator has found that no node of a round works, and that this one is behind. The
    /// message may cross one that says that a rank of this node got something done.
    pub(super) fn stands_still(&mut self, round: u64) -> Option<Event> {
        let is_current = self.agent.is_running() && self.group.round() == Some(round);
        let now = self.clock.now();
        let hang = self.hangs.confirmed(now).filter(|_| is_current && !self.inspecting);
        hang.and_then(|hang| self.hung(hang))
    }

    /// Says which ranks have ended long before the others.
    pub(super) fn say_finished(&mut self) {
        if self.agent.is_running() {
            let running: Vec<u32> =
                self.group.living().into_keys().map(|rank| self.group.rank(rank)).collect();
            if let Some(line) = self.finished.line(self.clock.now(), &running) {
                self.console.note(&line);
            }
        }
    }

    /// What is known of the ranks, their files and CPU times included.
    fn sampled(&mut self, now: Duration) -> &HangWatch {
        if let Some(period) = self.hangs.sampling().filter(|_| now >= self.sample_at) {
            self.sample_at = now + period;
            for (local_rank, touched) in self.group.touched() {
                self.hangs.touched(now, local_rank, touched);
            }
            if self.hangs.wants_cpu_times() {
                let living = self.group.living();
                let times = cpu_times(living.values().copied());
                for (local_rank, pid) in living {
                    if let Some(time) = times.get(&pid) {
                        self.hangs.cpu_time(now, local_rank, *time);
                    }
                }
            }
        }
        &self.hangs
    }

    /// Finds out how a rank got where it hangs, unless it is silent.
    fn hung(&mut self, hang: Hang) -> Option<Event> {
        let rank = self.group.rank(hang.local_rank);
        self.log.add(&Happened::Hang { rank, reason: hang.reason.clone() });
        if hang.is_silent {
            self.hangs.gone(hang.local_rank);
            self.trouble.get_or_insert(hang.since);
            return Some(Event::Hung { local_rank: hang.local_rank, reason: hang.reason });
        }
        self.inspecting = true;
        self.console.note(&format!("rank {rank}: {}: writing the stacks", hang.reason));
        let round = self.group.round().unwrap_or_default();
        tokio::spawn(inspect::inspect(round, hang, self.group.stack_files(), self.sender.clone()));
        None
    }
}
