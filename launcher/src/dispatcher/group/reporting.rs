//! Reports about the ranks that ended, for people and for programs.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ice_proto::exit::ExitCode;

use super::Group;
use crate::dispatcher::member::Member;
use crate::logs::LogFolder;
use crate::report::{
    ErrorDocument, ExitRecord, Failure, OtherEnd, OtherRank, RankFailure, RoundRecord, Rounds, Summary,
    exception, store_hint,
};
use ice_agent::{End, Exit};

/// Number of lines of stderr that a report shows, and that are searched for an exception.
const SHOWN: usize = 20;
const SEARCHED: usize = 300;

impl Group<'_> {
    /// Prints and records how the ranks of an attempt ended.
    pub(in crate::dispatcher) async fn report(&mut self, ends: Vec<End>) -> Option<Failure> {
        let mut ends = ends.into_iter();
        let first = ends.next()?;
        let (round, node, attempt) = self
            .round
            .as_ref()
            .map(|round| (round.number, round.assignment.group_rank, round.restart_count))?;
        let others = ends.map(|end| self.other(&end)).collect();
        let rank = self.rank(first.local_rank);
        let member = self.ranks.get_mut(&first.local_rank)?;
        let record = member.record();
        // Stopped processes have no stacks, and without redirection there may be no file.
        let stacks = member.files.stacks.as_ref().filter(|_| matches!(first.exit, Exit::Hung(_)));
        let folder = member.files.error.as_ref().and_then(|error| error.parent());
        let logs = match stacks.filter(|stacks| stacks.exists()) {
            Some(stacks) => Some(stacks.clone()),
            None => folder.filter(|folder| has_files(folder)).map(Path::to_owned),
        };
        let mut stderr = member.last_lines(SEARCHED).await;
        let exception = exception(&stderr);
        stderr.drain(..stderr.len().saturating_sub(SHOWN));
        let said = record.as_ref().map(|record| record.message.clone());
        let root_cause = RankFailure {
            rank,
            local_rank: first.local_rank,
            pid: member.pid(),
            exit: ExitRecord::from(&first.exit),
            message: said.or(exception),
            callstack: record.map(|record| record.callstack).filter(|stack| !stack.is_empty()),
            stderr,
            logs,
        };
        self.error = Some(ErrorDocument::of_rank(&root_cause, &self.host, member.files.error.as_deref()));
        let command = self.plan.program.command();
        if self.plan.logs.are_wanted()
            && let Some(Err((path, error))) = self.logs.as_ref().map(LogFolder::check)
        {
            self.files.health().failed(path, &error);
        }
        let log_failure = self.files.health().first_failure();
        let host = self.host.clone();
        let failure = Failure { attempt, round, host, node, command, root_cause, others, log_failure };
        self.console.say(&failure.to_string());
        let served = self
            .round
            .as_ref()
            .is_some_and(|round| round.ranks_store.as_ref().is_some_and(|store| store.by_rank));
        if let Some(hint) = store_hint(&failure.root_cause, self.store_port).filter(|_| !served) {
            self.console.note(&hint);
        }
        locked(&self.summary).add(failure.clone());
        self.write_summary();
        if let Some(logs) = &mut self.logs {
            logs.keep();
        }
        Some(failure)
    }

    fn other(&self, end: &End) -> OtherRank {
        let record = self.ranks.get(&end.local_rank).and_then(Member::record);
        let how = match end.exit {
            Exit::Code(0) if end.asked => OtherEnd::Stopped,
            Exit::Code(0) => OtherEnd::Finished,
            _ if end.asked && record.is_none() => OtherEnd::Stopped,
            _ => OtherEnd::Failed,
        };
        OtherRank {
            rank: self.rank(end.local_rank),
            local_rank: end.local_rank,
            end: how,
            exit: ExitRecord::from(&end.exit),
            message: record.map(|record| record.message),
        }
    }

    fn write_summary(&self) {
        let Some(folder) = self.logs.as_ref().and_then(LogFolder::path) else { return };
        let summary = Arc::clone(&self.summary);
        self.files.replace(folder.join("report.json"), move |log_failure| locked(&summary).text(log_failure));
    }

    /// Appends a round to `rounds.jsonl` in the folder of the job.
    pub(in crate::dispatcher) fn write_round(&mut self, record: &RoundRecord) {
        let Some(folder) = self.logs.as_ref().and_then(LogFolder::path) else { return };
        let path = folder.join("rounds.jsonl");
        let file = match self.rounds.take() {
            Some(file) => Ok(file),
            None => {
                let opened = self.files.append_to(&path, None);
                opened.inspect(|_| self.files.health().works(&path, 0))
            }
        };
        let line = serde_json::to_vec(record).map_err(io::Error::other);
        match file.and_then(|file| Ok((file, line?))) {
            Ok((file, mut line)) => {
                line.push(b'\n');
                self.files.add(&file, line);
                self.rounds = Some(file);
            }
            Err(error) => self.files.health().failed(&path, &error),
        }
    }

    /// Takes the content of the launcher's error file for the last round.
    pub(in crate::dispatcher) fn error(&mut self) -> Option<ErrorDocument> {
        self.error.take()
    }

    /// Records the end of the job. A temporary folder is removed, unless its content may be wanted.
    pub(in crate::dispatcher) fn finish(&mut self, code: ExitCode, rounds: &Rounds, now: Duration) {
        let has_failures = {
            let mut summary = locked(&self.summary);
            summary.end(code);
            summary.set_rounds(rounds.past(), rounds.goodput(now));
            summary.has_failures()
        };
        let plan = &self.plan.logs;
        let wanted = code != ExitCode::Success || !plan.redirects.is_empty() || !plan.tee.is_empty();
        if self.logs.as_ref().is_some_and(LogFolder::is_named) || has_failures {
            self.write_summary();
        }
        if let Some(logs) = &mut self.logs
            && wanted
        {
            logs.keep();
        }
    }
}

/// Locks the report, which the thread that writes files reads, too.
pub(super) fn locked(summary: &Mutex<Summary>) -> MutexGuard<'_, Summary> {
    summary.lock().unwrap_or_else(PoisonError::into_inner)
}

fn has_files(folder: &Path) -> bool {
    fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some())
}
