//! Turns events and messages of ranks into events of the agent machine.

use std::time::{Duration, SystemTime};

use ice_proto::link::FromRank;

use super::{Dispatcher, RankEvent};
use crate::report::{ExitRecord, JobEvent};
use crate::supervise::{ProcessId, Remains};
use ice_agent::Event;

/// Resolution of the modification times of files.
const MTIME_RESOLUTION: Duration = Duration::from_millis(10);

impl Dispatcher<'_> {
    pub(super) fn rank_event(&mut self, event: RankEvent) -> Option<Event> {
        let now = self.clock.now();
        match event {
            RankEvent::Exited(process, exit) => {
                let Some(local_rank) = self.group.local_rank(process) else {
                    self.group.spare_exited(process, &exit);
                    return None;
                };
                let (rank, exit) = (self.group.rank(local_rank), self.group.explained(local_rank, exit));
                self.event_log.add(&JobEvent::RankEnded { rank, local_rank, exit: ExitRecord::from(&exit) });
                self.hangs.gone(local_rank);
                self.timers.iter_mut().for_each(|timers| timers.gone(local_rank));
                match exit.is_success() {
                    true => self.finished.add(rank, now),
                    false => {
                        self.first_failure_at.get_or_insert(now);
                        self.import_hint.look(self.group.living().into_values());
                    }
                }
                self.paused.remove(&local_rank);
                self.console.no_status();
                let failed_at = self.group.exited(local_rank, &exit).map(|at| on_clock(now, at));
                Some(Event::Exited { local_rank, exit, failed_at })
            }
            RankEvent::Remains(process, what) => {
                self.remains(process, what);
                None
            }
            // The hang was in a round that is over: another one has begun.
            RankEvent::Inspected(round, ..) if Some(round) != self.group.round() => None,
            RankEvent::Inspected(_, hang, found) => {
                self.hangs.inspected(now);
                self.first_failure_at.get_or_insert(hang.since);
                if let Some((pid, signal)) = hang.ends_by {
                    self.end_by_timer(hang.local_rank, pid, signal);
                }
                let reason = format!("{}; stacks of all ranks were written ({found})", hang.reason);
                Some(Event::Hung { local_rank: hang.local_rank, reason })
            }
            RankEvent::Answered(answer) => self.answered(answer),
            RankEvent::Warned(what) => {
                self.console.note(&what);
                None
            }
            RankEvent::Noticed(what) => Some(self.noticed(what)),
            RankEvent::Said(process, message) => {
                let local_rank = self.group.said(process, &message)?;
                if let FromRank::Heartbeat { applied_ms, .. } = message {
                    self.rounds.applied(process, local_rank, Duration::from_millis(applied_ms));
                }
                self.said(now, local_rank, message)
            }
        }
    }

    fn said(&mut self, now: Duration, local_rank: u32, message: FromRank) -> Option<Event> {
        match message {
            FromRank::Paused => self.rank_paused(local_rank, true),
            FromRank::Resumed => self.rank_paused(local_rank, false),
            FromRank::Stays => return Some(Event::Survivor(local_rank)),
            // The agent's own SIGTERM arrived before the message over the link that confirms it.
            FromRank::Terminated if self.group.was_signalled(local_rank) => {}
            FromRank::Terminated => {
                let together = self.group.agrees();
                return Some(Event::RankTerminated { local_rank, together });
            }
            FromRank::Parked { round: Some(round) } => return Some(Event::Parked { local_rank, round }),
            FromRank::RoundLost { round, reason } => {
                return Some(Event::RoundLost { local_rank, round, reason });
            }
            FromRank::FirstStep { round, step, repeated } => {
                if self.rounds.first_step(now, round, step, repeated) {
                    self.event_log.add(&JobEvent::FirstStep { round, step, repeated });
                }
                self.start_spares();
                return Some(Event::FirstStep { round });
            }
            FromRank::Progress(progress) => {
                // A message that a rank sent just before it paused or ended is out of date.
                let is_current = self.worker_group.is_running() && !self.is_paused();
                if let Some(line) = self.progress.due(&progress, self.clock.instant(now).into_std())
                    && is_current
                {
                    match self.progress.is_rewritten() {
                        true => self.console.status_if_idle(&line),
                        false => self.console.say_if_idle(&(line + "\n")),
                    }
                }
            }
            FromRank::Heartbeat { step, activity, doing, .. } => {
                self.hangs.heartbeat(now, local_rank, step, activity, doing);
                self.tell_progress(now);
            }
            FromRank::CheckpointSaved { path, step } => {
                let rank = self.group.rank(local_rank);
                self.saved = Some((path.clone(), step));
                self.event_log.add(&JobEvent::CheckpointSaved { rank, path, step });
            }
            FromRank::Hello { .. }
            | FromRank::Error { .. }
            | FromRank::Done
            | FromRank::Parked { round: None } => {}
        }
        None
    }

    /// Prints which processes a rank has left behind.
    fn remains(&mut self, process: ProcessId, what: Remains) {
        let local_rank = self.group.local_rank(process);
        let name = local_rank
            .map_or_else(|| "a spare".into(), |local_rank| format!("rank {}", self.group.rank(local_rank)));
        match what {
            // The rank's own process has ended, so its missing progress is not a hang.
            Remains::Behind => local_rank.into_iter().for_each(|local_rank| self.hangs.gone(local_rank)),
            Remains::Ended(what) => {
                self.console.note(&format!("{name} has ended, and what it left has not: {what}"))
            }
            Remains::Stuck(what) => self.console.note(&format!("{name}: {what}")),
        }
    }
}

/// Converts the time of a file to the agent's clock. Files are stamped with a clock that is up to a
/// tick behind, so a tick is added: otherwise a victim's failure could look older than its cause.
fn on_clock(now: Duration, at: SystemTime) -> Duration {
    match SystemTime::now().duration_since(at + MTIME_RESOLUTION) {
        Ok(ago) => now.saturating_sub(ago),
        Err(ahead) => now + ahead.duration(),
    }
}
