//! Watches whether the ranks of this node make progress.

use std::time::Duration;

use ice_proto::rendezvous::ToCoordinator;

use super::{Dispatcher, inspect};
use crate::report::JobEvent;
use crate::supervise::cpu_times;
use ice_agent::{Event, Hang, HangWatch};

impl Dispatcher<'_> {
    /// Checks whether the ranks make progress, and returns the event of a hang. For other hangs
    /// than that of a silent rank, the event follows later, with the stacks.
    pub(super) fn look(&mut self) -> Option<Event> {
        let now = self.clock.now();
        let hang = match (self.worker_group.is_running(), self.worker_group.is_regrouping()) {
            (true, _) if self.inspecting => None,
            (true, _) => self.timer_expired(now).or_else(|| self.sampled(now).check(now)),
            (false, true) => self.hangs.check_silence(now),
            (false, false) => None,
        };
        self.tell_progress(now);
        hang.and_then(|hang| self.hung(hang))
    }

    /// Notifies the coordinator whether the ranks of this node make progress, if that has changed.
    pub(super) fn tell_progress(&mut self, now: Duration) {
        // Ranks that are being ended or inspected are already a failure.
        if !self.worker_group.is_running() || self.inspecting {
            return;
        }
        if let (Some(session), Some(round)) = (&self.session, self.group.round())
            && let Some(progress) = self.hangs.news(now)
        {
            session.send(ToCoordinator::Progress { round, progress });
        }
    }

    /// Handles the coordinator's finding that no node of a round works and that this node is
    /// behind. The finding may cross a message that a rank of this node has made progress.
    pub(super) fn stands_still(&mut self, round: u64) -> Option<Event> {
        let is_current = self.worker_group.is_running() && self.group.round() == Some(round);
        let now = self.clock.now();
        let hang = self.hangs.confirmed(now).filter(|_| is_current && !self.inspecting);
        hang.and_then(|hang| self.hung(hang))
    }

    /// Prints which ranks have exited long before the others.
    pub(super) fn say_finished(&mut self) {
        if self.worker_group.is_running() {
            let running: Vec<u32> =
                self.group.living().into_keys().map(|rank| self.group.rank(rank)).collect();
            if let Some(line) = self.finished.line(self.clock.now(), &running) {
                self.console.note(&line);
            }
        }
    }

    /// Samples the ranks' heartbeat files and CPU times, if that is due.
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

    /// Starts to write the stacks of all ranks, unless the hanging rank is silent. A silent rank is
    /// ended at once: it may be stopped, and a stopped process has no stacks to write.
    fn hung(&mut self, hang: Hang) -> Option<Event> {
        let rank = self.group.rank(hang.local_rank);
        self.event_log.add(&JobEvent::Hang { rank, reason: hang.reason.clone() });
        if hang.is_silent {
            self.hangs.gone(hang.local_rank);
            self.first_failure_at.get_or_insert(hang.since);
            return Some(Event::Hung { local_rank: hang.local_rank, reason: hang.reason });
        }
        self.inspecting = true;
        self.console.note(&format!("rank {rank}: {}: writing the stacks", hang.reason));
        let round = self.group.round().unwrap_or_default();
        tokio::spawn(inspect::inspect(round, hang, self.group.stack_files(), self.sender.clone()));
        None
    }
}
