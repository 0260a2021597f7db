//! The rank's end of the link.

mod activity;
mod listen;
mod local;
mod state;

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ice_proto::env::{RankEnv, TORCHELASTIC_ERROR_FILE};
use ice_proto::frame;
use ice_proto::link::{BoundaryRequest, FromRank};

use crate::consensus::{self, Boundaries, BoundaryDecision, Participant};
use crate::process::{Connections, inherit, signals};
use crate::{Error, Store};

use activity::Activity;
pub use activity::{Alone, Waiting};
use local::Local;
pub use state::{Boundary, Group, NextRound, Stop};
use state::{Requests, State};

/// Interval of heartbeats. Short in tests, so that they see several.
const HEARTBEAT: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 1000 });
/// Interval at which the answering thread polls the rank's collectives, which are counted without a
/// lock.
const COLLECTIVES_POLL: Duration = Duration::from_millis(5);
/// Time to wait for the end of the round after a failed collective: the agent of the lost rank
/// knows more of the cause than the ranks that waited for it.
const ROUND_OVER_GRACE: Duration = Duration::from_secs(1);
/// Timeout of writes. A message to an agent that does not read is dropped, so that it does not
/// block the step.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection to the agent. Without an agent that knows the link, all methods do nothing.
///
/// At end of file the agent is gone, and the process exits, since no other process would stop it.
#[derive(Clone, Default)]
pub struct Link {
    inner: Option<Arc<Inner>>,
    /// Agreements with other ranks of a job without an agent.
    local: Arc<Local>,
}

struct Inner {
    stream: Mutex<UnixStream>,
    step: AtomicU64,
    activity: Activity,
    /// Time of applied steps, in microseconds: many steps are shorter than a millisecond.
    applied_us: AtomicU64,
    /// Whether the process is about to exit, so that the agent may be gone.
    leaving: AtomicBool,
    /// Whether heartbeats have ended.
    silent: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Requests of the agent, to be published to all ranks.
    requests: mpsc::Sender<BoundaryRequest>,
}

/// Keeps the process alive after the end of its round until dropped.
pub struct ExitGuard {
    inner: Option<Arc<Inner>>,
}

impl Drop for ExitGuard {
    fn drop(&mut self) {
        if let Some(inner) = &self.inner {
            inner.state().exit_guards -= 1;
            inner.changed.notify_all();
        }
    }
}

/// The link of this process, which is one rank. Global, since a failure anywhere is reported over
/// it.
static OPEN: OnceLock<Link> = OnceLock::new();

impl Link {
    /// Returns the link of this process, or one that does nothing.
    pub fn current() -> Self {
        OPEN.get().cloned().unwrap_or_default()
    }

    /// Adopts the inherited descriptor, and says hello. `rank` and `round` are those that the
    /// process was started for; `None` for a spare.
    ///
    /// # Errors
    /// The descriptor is not open or was adopted before, or a thread cannot be started.
    pub fn open(fd: RawFd, rank: Option<u32>, round: Option<u64>) -> io::Result<Self> {
        let stream = UnixStream::from(inherit::descriptor(fd)?);
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let reader = stream.try_clone()?;
        let (requests, wanted) = mpsc::channel();
        let inner = Arc::new(Inner {
            stream: Mutex::new(stream),
            step: AtomicU64::new(0),
            activity: Activity::new(),
            applied_us: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            silent: AtomicBool::new(false),
            state: Mutex::new(State { round, ..State::default() }),
            changed: Condvar::new(),
            requests,
        });
        let link = Self { inner: Some(Arc::clone(&inner)), local: Arc::default() };
        link.send(&FromRank::Hello { pid: process::id(), rank });
        let listening = Arc::clone(&inner);
        thread::Builder::new().name("ice-link".into()).spawn(move || listening.listen(reader))?;
        // A thread of its own: the listener must not wait for a store that is gone, since it
        // receives the end of the round.
        let asking = Arc::clone(&inner);
        thread::Builder::new().name("ice-request".into()).spawn(move || asking.publish(wanted))?;
        let _ = OPEN.set(link.clone());
        let beating = link.clone();
        thread::Builder::new().name("ice-heartbeat".into()).spawn(move || beating.heartbeat_loop())?;
        Ok(link)
    }

    /// Leaves the signals that stop a job to the agent, which receives them as well. Asks the agent
    /// for a stop when this process alone receives SIGTERM.
    ///
    /// # Errors
    /// No pipe or thread can be made for the handler.
    pub fn take_signals(&self) -> io::Result<()> {
        if self.inner.is_none() {
            return Ok(());
        }
        let Some(mut terminations) = signals::leave_to_launcher()? else { return Ok(()) };
        let link = self.clone();
        let ask = move || {
            while terminations.wait().is_ok() {
                link.send(&FromRank::Terminated);
            }
        };
        thread::Builder::new().name("ice-signals".into()).spawn(ask).map(drop)
    }

    /// Sends a message. A failed write is ignored, since the listener notices an agent that is
    /// gone.
    pub fn send(&self, message: &FromRank) {
        let Some(inner) = &self.inner else { return };
        let frame = match frame::encode(message) {
            Ok(frame) => frame,
            Err(error) => return tracing::warn!(%error, "a message to the agent was dropped"),
        };
        let mut stream = inner.stream.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = stream.write_all(&frame) {
            tracing::debug!(%error, "the agent did not take a message");
        }
    }

    /// Tells the agent that a checkpoint is complete on disk.
    pub fn checkpoint_saved(&self, path: &Path, step: u64) {
        self.send(&FromRank::CheckpointSaved { path: path.display().to_string(), step });
    }

    /// Notes a completed step, and the number of applied optimizer steps. From now on the agent
    /// expects more steps, until the rank is [alone](Link::alone) or at the [end](Link::end).
    pub fn advance(&self, step: u64) {
        if let Some(inner) = &self.inner {
            inner.step.store(step, Ordering::Relaxed);
            inner.activity.step();
        }
    }

    /// Notes that the rank begins a run, and from now on waits for other ranks.
    pub fn begin_run(&self) {
        if let Some(inner) = &self.inner {
            inner.state().noticed = false;
        }
    }

    /// Notes that the rank is between runs. It checks at the start of the next run whether the
    /// round is over, and is not ended before.
    pub fn end_run(&self) {
        if let Some(inner) = &self.inner {
            inner.state().noticed = true;
            inner.changed.notify_all();
        }
    }

    /// Notes that all ranks of the round begin to work, with equal counters.
    pub fn begin(&self) {
        if let Some(inner) = &self.inner {
            inner.state().boundaries.begin();
            inner.activity.begin();
        }
        self.local.begin();
    }

    /// Notes the duration of an applied step.
    pub fn applied(&self, took: Duration) {
        if let Some(inner) = &self.inner {
            inner.applied_us.fetch_add(took.as_micros() as u64, Ordering::Relaxed);
        }
    }

    /// Notes progress within a step. If a job hangs, the rank with the least progress is blamed.
    pub fn note_activity(&self) {
        if let Some(inner) = &self.inner {
            inner.activity.note_activity();
        }
    }

    /// Marks this rank as working alone until the value is dropped: it saves, or evaluates while
    /// other ranks wait. The agent does not count this time as a hang.
    #[must_use]
    pub fn alone(&self) -> Alone {
        Alone::new(self.inner.as_ref())
    }

    /// Marks this rank as waiting for other ranks until the value is dropped.
    #[must_use]
    pub fn waiting(&self) -> Waiting {
        Waiting::new(self.inner.as_ref())
    }

    /// Returns why the rank is to stop, if it is. The caller must then stop by itself.
    pub fn stop(&self) -> Option<Stop> {
        self.wait_for_stop(Duration::ZERO)
    }

    /// Returns whether the round is over. Unlike [`Link::stop`], this does not promise that the
    /// rank stops by itself.
    pub fn is_broken(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.state().stop() == Some(Stop::Broken))
    }

    /// Waits up to `timeout` for a request to stop; otherwise like [`Link::stop`].
    pub fn wait_for_stop(&self, timeout: Duration) -> Option<Stop> {
        let inner = self.inner.as_ref()?;
        let (mut state, _) = inner
            .changed
            .wait_timeout_while(inner.state(), timeout, |state| state.stop().is_none())
            .unwrap_or_else(PoisonError::into_inner);
        let stop = state.stop();
        state.noticed |= stop.is_some();
        stop
    }

    /// Waits for the end of the round after a failed collective. If no end arrives in time, this
    /// rank reports the round as lost, for the reason `problem`.
    pub fn report_lost_round(&self, problem: &str) {
        if self.wait_for_stop(ROUND_OVER_GRACE) != Some(Stop::Broken) {
            self.send(&FromRank::RoundLost { round: self.round(), reason: problem.into() });
            self.wait_for_round_end();
        }
    }

    /// Waits until the round is over.
    pub fn wait_for_round_end(&self) {
        let Some(inner) = &self.inner else { return };
        let is_live = |state: &mut State| state.stop() != Some(Stop::Broken);
        let mut state =
            inner.changed.wait_while(inner.state(), is_live).unwrap_or_else(PoisonError::into_inner);
        state.noticed = true;
    }

    /// Returns the round that the rank is in, or was in last.
    pub fn round(&self) -> u64 {
        self.inner.as_ref().and_then(|inner| inner.state().round).unwrap_or(0)
    }

    /// Returns whether there is an agent.
    pub fn is_open(&self) -> bool {
        self.inner.is_some()
    }

    /// Leaves the round, whose group is gone, and waits for the next one; `None` if the rank is to
    /// exit.
    pub fn next_round(&self) -> Option<NextRound> {
        let inner = self.inner.as_ref()?;
        inner.activity.mark_idle();
        loop {
            let mut state = inner.state();
            state.noticed = true;
            let (round, group, store) = (state.round, state.group.take(), state.store.take());
            drop(state);
            // Dropped without the lock: dropping waits for running collectives, which the listener
            // must be able to abort under the lock.
            drop((group, store));
            inner.state().connections = None;
            self.send(&FromRank::Parked { round });
            let waits = |state: &mut State| state.next_round.is_none() && !state.ended;
            let mut state =
                inner.changed.wait_while(inner.state(), waits).unwrap_or_else(PoisonError::into_inner);
            let next_round = state.next_round.take().filter(|_| !state.ended)?;
            state.round = Some(next_round.env.round);
            // A round that is over before it began is skipped.
            if state.stop() != Some(Stop::Broken) {
                return Some(next_round);
            }
        }
    }

    /// Returns the error file of this rank.
    pub fn error_file(&self) -> Option<PathBuf> {
        let assigned = self.inner.as_ref().and_then(|inner| inner.state().error_file.clone());
        assigned.or_else(|| std::env::var_os(TORCHELASTIC_ERROR_FILE).map(PathBuf::from))
    }

    /// Leaves it to the agent to end this process if it does not notice the end of its round. The
    /// agent waits for its shutdown timeout, and so for a long step of a program that looks at the
    /// link in collectives and between steps only. By default the process exits after 5 s.
    pub fn leave_stuck_to_agent(&self) {
        if let Some(inner) = &self.inner {
            inner.state().agent_ends_stuck = true;
        }
    }

    /// Returns a guard to hold during a write that must not be interrupted.
    pub fn exit_guard(&self) -> ExitGuard {
        if let Some(inner) = &self.inner {
            inner.state().exit_guards += 1;
        }
        ExitGuard { inner: self.inner.clone() }
    }

    /// Begins a round. Connections that are opened from now on belong to it.
    pub fn begin_round(&self, env: &RankEnv) -> Connections {
        let connections = Connections::watch();
        if let Some(inner) = &self.inner {
            let mut state = inner.state();
            state.round = Some(env.round);
            (state.boundaries, state.work_before_pause, state.noticed) = (Boundaries::default(), None, false);
            (state.node, state.stopping) = (env.group_rank, false);
            (state.connections, state.cancel_hooks) = (Some(connections.clone()), Vec::new());
            drop(state);
            inner.activity.enter_round();
        }
        connections
    }

    /// Registers a function to call when the round is over; calls it at once if it is.
    pub fn on_round_end(&self, cancel: impl Fn() + Send + Sync + 'static) {
        let Some(inner) = &self.inner else { return };
        let mut state = inner.state();
        if state.stop() == Some(Stop::Broken) {
            drop(state);
            return cancel();
        }
        state.cancel_hooks.push(Arc::new(cancel));
    }

    /// Runs work in a thread, and waits for it until the round is over. Some waits within libtorch
    /// cannot be aborted, such as gloo's for a connection from a lost rank. An abandoned thread
    /// ends with the timeout of its wait.
    ///
    /// # Errors
    /// Errors of the work, and [`Error`].
    pub fn within_round<T: Send + 'static, E: From<Error> + Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, E> + Send + 'static,
    ) -> Result<T, E> {
        let (tell, told) = mpsc::channel();
        let over = tell.clone();
        self.on_round_end(move || _ = over.send(Err(Error::RoundOver.into())));
        let done = move || _ = tell.send(work());
        thread::Builder::new().name("ice-form".into()).spawn(done).map_err(Error::Thread)?;
        let _waiting = self.waiting();
        told.recv().unwrap_or_else(|_| Err(Error::RoundOver.into()))
    }

    /// Takes part in the agreements of the ranks of a round through its store. The link keeps the
    /// group until the rank leaves the round.
    ///
    /// # Errors
    /// The store is gone, or no thread can be started.
    pub fn join_round<S: Store>(&self, store: &S, group: Arc<dyn Group>, env: &RankEnv) -> io::Result<()> {
        let world_size = env.world_size as usize;
        let Some(inner) = &self.inner else { return self.join_group(store, env.rank, world_size) };
        let request_store = store.reconnect().map_err(io::Error::other)?;
        let requests: Arc<dyn Requests> = Arc::new(store.clone());
        let mut state = inner.state();
        (state.group, state.store) = (Some(group), Some(requests));
        drop(state);
        inner.changed.notify_all();
        let (inner, local) = (Arc::clone(inner), Arc::clone(&self.local));
        let participant = InRound { inner, local, round: env.round, rank: env.rank.into() };
        thread::Builder::new().name("ice-agree".into()).spawn(move || {
            if let Err(error) = consensus::participate(&participant, &request_store, world_size) {
                tracing::debug!(%error, "no more requests will come");
            }
        })?;
        Ok(())
    }

    /// Takes part in the agreements of a group without an agent.
    ///
    /// # Errors
    /// The store is gone, or no thread can be started.
    pub fn join_group(&self, store: &impl Store, rank: u32, world_size: usize) -> io::Result<()> {
        Local::join(&self.local, store, rank, world_size)
    }

    /// Returns the action at this step boundary. Every rank calls this at the same points of its
    /// work. Waits while the job is paused, and while the ranks agree on the boundary of a request.
    ///
    /// `asked` says that this rank has published a request that was not performed yet. Then the
    /// boundary waits until the ranks agree on one, so that the rank does not run past it.
    pub fn boundary(&self, asked: bool) -> Boundary {
        let Some(inner) = &self.inner else { return self.local.boundary(asked) };
        let mut state = inner.state();
        let found = loop {
            if state.stop() == Some(Stop::Broken) {
                state.noticed = true;
                break Boundary::Broken;
            }
            let decision = if asked && state.boundaries.is_free() {
                BoundaryDecision::Wait
            } else {
                state.boundaries.arrive()
            };
            match decision {
                BoundaryDecision::Pass => break Boundary::Continue,
                BoundaryDecision::Do(BoundaryRequest::Stop { node, save }) => {
                    let here = state.node == node;
                    if here {
                        (state.stopping, state.noticed) = (true, true);
                    }
                    break Boundary::Stop { here, save };
                }
                BoundaryDecision::Do(BoundaryRequest::Regroup) => {
                    // All ranks leave at this boundary, so none waits for a message.
                    (state.over, state.noticed) = (state.over.max(state.round), true);
                    break Boundary::Regroup;
                }
                BoundaryDecision::Do(BoundaryRequest::Leave { all, task }) => {
                    break Boundary::Leave { all, task };
                }
                BoundaryDecision::Do(_) => break Boundary::Save,
                BoundaryDecision::Wait => {
                    if state.boundaries.is_paused() {
                        // Idle again after a save during the pause.
                        let before = inner.activity.mark_idle();
                        if state.work_before_pause.is_none() {
                            state.work_before_pause = Some(before);
                            drop(state);
                            self.send(&FromRank::Paused);
                            state = inner.state();
                            continue;
                        }
                    }
                    state = inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        let mut before = None;
        if found == Boundary::Continue {
            before = state.work_before_pause.take();
            // Reset under the lock: the answering thread reads both together.
            self.local.collectives.store(0, Ordering::Relaxed);
        }
        drop(state);
        if let Some(before) = before {
            inner.activity.resume(before);
            self.send(&FromRank::Resumed);
        }
        found
    }

    /// Counts a collective in which this rank takes part.
    pub fn collective(&self) {
        self.local.collectives.fetch_add(1, Ordering::Relaxed);
        self.note_activity();
    }

    /// Returns the number of collectives since the last step boundary. A backward pass that
    /// averages gradients counts as one.
    pub fn collectives(&self) -> u64 {
        self.local.collectives.load(Ordering::Relaxed)
    }

    /// Notes that this rank leaves the step before its end. Returns the request that asks whether
    /// all ranks do so.
    pub fn leave_step(&self) -> BoundaryRequest {
        let (step, collectives) = match &self.inner {
            None => self.local.leave_step(),
            Some(inner) => {
                let collectives = self.collectives();
                (inner.state().boundaries.leave_step(collectives), collectives)
            }
        };
        BoundaryRequest::Left { step, collectives }
    }

    /// Waits for the answers of all ranks whether they have left the step. Returns a rank that has
    /// not.
    ///
    /// # Errors
    /// [`Error::RoundOver`]: another rank is gone.
    pub fn await_left_step(&self) -> Result<Option<u64>, Error> {
        let answer = match &self.inner {
            None => self.local.left_by_all(),
            Some(inner) => {
                let mut state = inner.state();
                loop {
                    if state.stop() == Some(Stop::Broken) {
                        state.noticed = true;
                        break None;
                    }
                    let answer = state.boundaries.take_left_by_all();
                    if answer.is_some() {
                        break answer;
                    }
                    state = inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        answer.map(|answer| answer.checked_sub(1)).ok_or(Error::RoundOver)
    }

    /// Notes that no further boundary will follow.
    pub fn end(&self) {
        if let Some(inner) = &self.inner {
            inner.state().boundaries.end();
            inner.changed.notify_all();
            inner.activity.end();
        }
        self.local.end();
    }

    /// Tells the agent that the work is done, and ends the heartbeats. The agent may be gone from
    /// now on.
    pub fn finish(&self) {
        if let Some(inner) = &self.inner {
            inner.silent.store(true, Ordering::SeqCst);
        }
        self.announce_exit();
    }

    /// Tells the agent that the work is done, like [`Link::finish`]. Heartbeats continue while the
    /// process lives: an interpreter may take longer to exit than the agent waits for a silent
    /// rank.
    pub fn announce_exit(&self) {
        if let Some(inner) = &self.inner {
            inner.activity.mark_idle();
            inner.leaving.store(true, Ordering::SeqCst);
            self.send(&inner.heartbeat());
        }
        self.send(&FromRank::Done);
        // No boundary is left at which this process could stop, so SIGTERM ends it again.
        signals::restore_termination();
    }

    fn heartbeat_loop(&self) {
        let Some(inner) = &self.inner else { return };
        while !inner.silent.load(Ordering::SeqCst) {
            self.send(&inner.heartbeat());
            thread::sleep(HEARTBEAT);
        }
    }
}

/// This process's side of the agreements of one round.
struct InRound {
    inner: Arc<Inner>,
    local: Arc<Local>,
    round: u64,
    rank: u64,
}

/// Returns a rank's answer to the question whether it has left a step.
fn answer(has_left: bool, rank: u64) -> u64 {
    if has_left { 0 } else { rank + 1 }
}

impl Participant for InRound {
    fn ask(&self, request: BoundaryRequest) -> u64 {
        let mut state = self.inner.state();
        if state.round == Some(self.round) { state.boundaries.ask(request) } else { consensus::NO_BOUNDARY }
    }

    fn settle(&self, target: u64) {
        let mut state = self.inner.state();
        if state.round == Some(self.round) {
            state.boundaries.settle(target);
        }
        drop(state);
        self.inner.changed.notify_all();
    }

    fn has_left(&self, step: u64, collectives: u64) -> u64 {
        let mut state = self.inner.state();
        loop {
            let own = self.local.collectives.load(Ordering::Relaxed);
            let is_over = state.round != Some(self.round) || state.stop() == Some(Stop::Broken);
            let known = if is_over { Some(false) } else { state.boundaries.has_left(step, collectives, own) };
            if let Some(has_left) = known {
                return answer(has_left, self.rank);
            }
            let changed = self.inner.changed.wait_timeout(state, COLLECTIVES_POLL);
            state = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn settle_left(&self, step: u64, collectives: u64, answer: u64) {
        let mut state = self.inner.state();
        if state.round == Some(self.round) {
            state.boundaries.settle_left(step, collectives, answer);
        }
        drop(state);
        self.inner.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::IntoRawFd;

    use ice_proto::frame::Decoder;
    use ice_proto::link::Doing;

    use super::*;

    #[test]
    fn process_that_takes_long_to_exit_is_not_silent() {
        let (mut agent, rank) = UnixStream::pair().unwrap();
        let link = Link::open(rank.into_raw_fd(), Some(0), Some(0)).unwrap();
        link.announce_exit();
        let (mut decoder, mut buffer) = (Decoder::new(), [0; 4096]);
        let (mut is_done, mut resting) = (false, 0);
        while resting < 3 {
            let read = agent.read(&mut buffer).unwrap();
            decoder.feed(&buffer[..read]);
            while let Some(message) = decoder.next_message::<FromRank>().unwrap() {
                is_done |= message == FromRank::Done;
                let rests = matches!(message, FromRank::Heartbeat { doing: Doing::Resting, .. });
                resting += u32::from(is_done && rests);
            }
        }
        link.finish();
    }
}
