//! Timers that ranks set through PyTorch's `FileTimerClient`, served like by torchrun's agent.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getsid};
use tempfile::TempDir;

use super::Dispatcher;
use crate::cli::FileTimer;
use crate::logs::Console;
use crate::supervise::{TimerPipe, TimerRequest};
use crate::{Error, LaunchPlan};
use ice_agent::{Expired, Hang, Timers};

/// Number of requests that are read before a timer counts as expired. The limit is there for a
/// process that sends requests without pause.
const AT_ONCE: usize = 1000;
/// Maximum length of a timer's name, in characters.
const LONGEST_SCOPE: usize = 200;
/// Maximum duration of a timer; a timer that is set for longer never expires in practice.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// The pipe for requests, and the timers that are set.
pub(super) struct FileTimers {
    pipe: TimerPipe,
    timers: Timers,
    /// Whether a note about an ignored request was printed.
    is_noted: bool,
    _folder: Option<TempDir>,
}

impl FileTimers {
    /// Makes the pipe if the plan asks for timers.
    pub(super) fn open(plan: &LaunchPlan, console: &Console) -> Result<Option<Self>, Error> {
        let Some(wanted) = &plan.file_timer else { return Ok(None) };
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::TimerPipe { path, source }
        };
        if let FileTimer::At(path) = wanted {
            match TimerPipe::make(path) {
                Ok(pipe) => return Ok(Some(Self::new(pipe, None))),
                // A launcher that is itself a rank has inherited the variable from the other
                // launcher.
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                    let path = path.display();
                    console.note(&format!(
                        "TORCHELASTIC_TIMER_FILE={path}: {error}; the ranks get a pipe of their own"
                    ));
                }
                Err(error) => return Err(fail(path)(error)),
            }
        }
        let folder = tempfile::Builder::new().prefix("ice-launch-timers-").tempdir();
        let folder = folder.map_err(fail(&std::env::temp_dir()))?;
        let path = folder.path().join("timers");
        let pipe = TimerPipe::make(&path).map_err(fail(&path))?;
        Ok(Some(Self::new(pipe, Some(folder))))
    }

    fn new(pipe: TimerPipe, folder: Option<TempDir>) -> Self {
        Self { pipe, timers: Timers::default(), is_noted: false, _folder: folder }
    }

    /// Returns the value of `TORCHELASTIC_TIMER_FILE` for the ranks.
    pub(super) fn path(&self) -> &Path {
        self.pipe.path()
    }

    pub(super) fn deadline(&self) -> Option<Duration> {
        self.timers.deadline()
    }

    pub(super) fn gone(&mut self, local_rank: u32) {
        self.timers.gone(local_rank);
    }
}

/// Waits for a request. Cancel-safe.
pub(super) async fn requested(timers: &mut Option<FileTimers>) -> TimerRequest {
    if let Some(timers) = timers {
        match timers.pipe.next().await {
            Ok(request) => return request,
            Err(error) => tracing::warn!(%error, "requests for timers are not read any more"),
        }
    }
    std::future::pending().await
}

impl Dispatcher<'_> {
    /// Sets or releases a timer.
    pub(super) fn timer_requested(&mut self, request: TimerRequest) {
        let Some(file_timers) = &mut self.timers else { return };
        let TimerRequest { pid, scope, expiration_time, signal } = request;
        let scope: String = scope.chars().take(LONGEST_SCOPE).collect();
        if expiration_time < 0.0 {
            return file_timers.timers.release(pid, scope);
        }
        let session = session_of(pid);
        let living = self.group.living();
        let local_rank = living.iter().find(|(_, leader)| Some(**leader) == session).map(|(rank, _)| *rank);
        let ignored = match local_rank {
            None => Some("it belongs to no rank of this node"),
            Some(local_rank) => {
                let left = expiration_time - unix_time();
                let left = Duration::try_from_secs_f64(left.max(0.0)).unwrap_or(FOREVER).min(FOREVER);
                let signal = Signal::try_from(signal).ok().map(|signal| signal as i32);
                let timer = Expired { local_rank, pid, scope, signal, at: self.clock.now() + left };
                (!file_timers.timers.set(timer)).then_some("too many timers are set")
            }
        };
        if let Some(why) = ignored
            && !std::mem::replace(&mut file_timers.is_noted, true)
        {
            self.console.note(&format!("a timer of process {pid} is ignored: {why}"));
        }
    }

    /// Returns the hang of a process that did not release a timer in time.
    pub(super) fn timer_expired(&mut self, now: Duration) -> Option<Hang> {
        // A request to release the timer may still be in the pipe.
        for _ in 0..AT_ONCE {
            let Some(request) = self.timers.as_mut()?.pipe.try_next() else { break };
            self.timer_requested(request);
        }
        let living = self.group.living();
        loop {
            let expired = self.timers.as_mut()?.timers.expired(now)?;
            let Expired { local_rank, pid, scope, signal, at } = expired;
            let leader = living.get(&local_rank).copied();
            // The process may have ended, and its id may belong to another process now.
            if leader.is_none() || session_of(pid) != leader {
                continue;
            }
            let scope = scope.escape_debug();
            let of = if leader == Some(pid) { String::new() } else { format!(" in process {pid}") };
            let reason = format!("it did not release its timer `{scope}`{of} in time");
            let Some(signal) = signal else {
                let rank = self.group.rank(local_rank);
                self.console.note(&format!(
                    "rank {rank}: {reason}; the timer has no signal, so the rank is left alone"
                ));
                continue;
            };
            return Some(Hang {
                local_rank,
                reason,
                since: at,
                is_silent: false,
                ends_by: Some((pid, signal)),
            });
        }
    }

    /// Ends a process by the signal of its timer.
    pub(super) fn end_by_timer(&self, local_rank: u32, pid: u32, signal: i32) {
        let leader = self.group.living().get(&local_rank).copied();
        if let Ok(signal) = Signal::try_from(signal)
            && leader.is_some()
            && session_of(pid) == leader
        {
            let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
        }
    }
}

/// Returns the leader of this process's session. Each rank leads its own session.
fn session_of(pid: u32) -> Option<u32> {
    let pid = i32::try_from(pid).ok().filter(|pid| *pid > 0)?;
    getsid(Some(Pid::from_raw(pid))).ok().map(|leader| leader.as_raw().cast_unsigned())
}

fn unix_time() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64()
}
