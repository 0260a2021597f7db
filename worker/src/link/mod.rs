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

use ice_c10d::{Connections, ProcessGroup, Store, signals};
use ice_proto::env::{RankEnv, TORCHELASTIC_ERROR_FILE};
use ice_proto::frame;
use ice_proto::link::{Request, Up};

use crate::Error;
use crate::agree::{self, Boundaries, Part, Turn};

pub use activity::Alone;
use activity::{Activity, Waiting};
use local::Local;
use state::State;
pub use state::{Boundary, Stop};

/// How often the rank says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How often a thread that answers for its rank looks at the rank's collectives, which are counted without a lock.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// An agent that reads nothing for so long is given up on; a message is then dropped rather than the step held up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// The connection to the agent. Without an agent that knows the link, everything here does nothing.
///
/// When the agent is gone (end of file), the rank leaves: nobody would stop it any more.
#[derive(Clone, Default)]
pub struct Link {
    inner: Option<Arc<Inner>>,
    /// Agreements with the other ranks of a job that has no agent.
    local: Arc<Local>,
}

struct Inner {
    stream: Mutex<UnixStream>,
    step: AtomicU64,
    activity: Activity,
    applied_ms: AtomicU64,
    leaving: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// What all ranks are to be told.
    requests: mpsc::Sender<Request>,
}

/// Keeps the process alive, after its round is over, until this is dropped.
pub struct Hold {
    inner: Option<Arc<Inner>>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        if let Some(inner) = &self.inner {
            inner.state().holds -= 1;
            inner.changed.notify_all();
        }
    }
}

/// The link of this process: a process is one rank, and its last words need the link wherever it fails.
static OPEN: OnceLock<Link> = OnceLock::new();

impl Link {
    /// The link that this process has opened, or one that does nothing.
    pub(crate) fn current() -> Self {
        OPEN.get().cloned().unwrap_or_default()
    }

    /// Takes over the inherited descriptor and says hello.
    pub(crate) fn open(fd: RawFd, rank: Option<u32>, round: Option<u64>) -> io::Result<Self> {
        let stream = UnixStream::from(ice_c10d::inherit::descriptor(fd)?);
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let reader = stream.try_clone()?;
        let (requests, wanted) = mpsc::channel();
        let inner = Arc::new(Inner {
            stream: Mutex::new(stream),
            step: AtomicU64::new(0),
            activity: Activity::new(),
            applied_ms: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            state: Mutex::new(State { round, ..State::default() }),
            changed: Condvar::new(),
            requests,
        });
        let link = Self { inner: Some(Arc::clone(&inner)), local: Arc::default() };
        link.send(&Up::Hello { pid: process::id(), rank });
        let listening = Arc::clone(&inner);
        thread::Builder::new().name("ice-link".into()).spawn(move || listening.listen(reader))?;
        // The listener must not wait for a store that is gone: it hears of that.
        let asking = Arc::clone(&inner);
        thread::Builder::new().name("ice-request".into()).spawn(move || asking.publish(wanted))?;
        let _ = OPEN.set(link.clone());
        let beating = link.clone();
        thread::Builder::new().name("ice-heartbeat".into()).spawn(move || beating.beat())?;
        Ok(link)
    }

    /// Leaves the signals that stop a job to the agent, which gets them as well, and asks it for a
    /// stop when SIGTERM comes to this process alone.
    pub(crate) fn take_signals(&self) -> io::Result<()> {
        if self.inner.is_none() {
            return Ok(());
        }
        let Some(mut terminations) = signals::leave_to_launcher()? else { return Ok(()) };
        let link = self.clone();
        let ask = move || {
            while terminations.wait().is_ok() {
                link.send(&Up::Terminated);
            }
        };
        thread::Builder::new().name("ice-signals".into()).spawn(ask).map(drop)
    }

    /// Sends a message. An agent that is gone is noticed by the listener, so a failure to write is no error here.
    pub fn send(&self, message: &Up) {
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

    /// Says that a checkpoint is whole on disk.
    pub fn checkpoint_saved(&self, path: &Path, step: u64) {
        self.send(&Up::CheckpointSaved { path: path.display().to_string(), step });
    }

    /// Notes that a step got done, and the optimizer steps applied so far. From now on the agent
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

    /// Notes that the rank is in no run: it will look by itself, at the beginning of the next one, whether the round is over, and is not to be
    /// ended before.
    pub fn end_run(&self) {
        if let Some(inner) = &self.inner {
            inner.state().noticed = true;
            inner.changed.notify_all();
        }
    }

    /// Notes that all ranks of the round are at work from here on, and have got as much done as each other.
    pub fn begin(&self) {
        if let Some(inner) = &self.inner {
            inner.state().boundaries.begin();
            inner.activity.begin();
        }
        self.local.begin();
    }

    /// Notes how long a step took that was applied.
    pub fn applied(&self, took: Duration) {
        if let Some(inner) = &self.inner {
            inner.applied_ms.fetch_add(took.as_millis() as u64, Ordering::Relaxed);
        }
    }

    /// Notes that something got done within a step: where a job stands still, the rank that got less done is behind.
    pub fn tick(&self) {
        if let Some(inner) = &self.inner {
            inner.activity.tick();
        }
    }

    /// Says that this rank does work of its own until the value is dropped: it saves, or evaluates
    /// while the others wait for it. The agent takes no time that this takes for a hang.
    #[must_use]
    pub fn alone(&self) -> Alone {
        Alone::new(self.inner.as_ref())
    }

    /// Says that this rank waits for others until the value is dropped.
    pub(crate) fn waiting(&self) -> Waiting {
        Waiting::new(self.inner.as_ref())
    }

    /// Whether the rank is to end.
    pub fn stop(&self) -> Option<Stop> {
        self.wait_for_stop(Duration::ZERO)
    }

    /// Whether the round is over. Unlike [`Link::stop`] it is no promise that the rank will end by itself.
    pub fn is_broken(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.state().stop() == Some(Stop::Broken))
    }

    /// As [`Link::stop`], giving a request that is under way this long to arrive.
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

    /// Waits until the round is over.
    pub(crate) fn wait_for_the_end(&self) {
        let Some(inner) = &self.inner else { return };
        let goes_on = |state: &mut State| state.stop() != Some(Stop::Broken);
        let mut state =
            inner.changed.wait_while(inner.state(), goes_on).unwrap_or_else(PoisonError::into_inner);
        state.noticed = true;
    }

    /// The round that the rank is in, or was in last.
    pub(crate) fn round(&self) -> u64 {
        self.inner.as_ref().and_then(|inner| inner.state().round).unwrap_or(0)
    }

    /// Whether there is an agent that can be told.
    pub(crate) fn is_open(&self) -> bool {
        self.inner.is_some()
    }

    /// Leaves the round, whose group is gone, and waits for the next one; `None` where the rank is to end.
    pub(crate) fn next_round(&self) -> Option<RankEnv> {
        let inner = self.inner.as_ref()?;
        inner.activity.rest();
        loop {
            let mut state = inner.state();
            state.noticed = true;
            let (round, group, store) = (state.round, state.group.take(), state.store.take());
            drop(state);
            // Not under the lock: what is still under way is waited for, and must be cut.
            drop((group, store));
            inner.state().connections = None;
            self.send(&Up::Parked { round });
            let waits = |state: &mut State| state.given.is_none() && !state.ended;
            let mut state =
                inner.changed.wait_while(inner.state(), waits).unwrap_or_else(PoisonError::into_inner);
            let given = state.given.take().filter(|_| !state.ended)?;
            state.round = Some(given.round);
            // One that is over before it began is left at once.
            if state.stop() != Some(Stop::Broken) {
                return Some(given);
            }
        }
    }

    /// Where a rank that fails leaves its last words.
    pub(crate) fn error_file(&self) -> Option<PathBuf> {
        let given = self.inner.as_ref().and_then(|inner| inner.state().error_file.clone());
        given.or_else(|| std::env::var_os(TORCHELASTIC_ERROR_FILE).map(PathBuf::from))
    }

    /// To be held while something is written that is of no use half done.
    pub fn hold(&self) -> Hold {
        if let Some(inner) = &self.inner {
            inner.state().holds += 1;
        }
        Hold { inner: self.inner.clone() }
    }

    /// The connections that are opened from now on are those of a round.
    pub(crate) fn begin_round(&self, env: &RankEnv) -> Connections {
        let connections = Connections::watch();
        if let Some(inner) = &self.inner {
            let mut state = inner.state();
            state.round = Some(env.round);
            (state.boundaries, state.rests, state.noticed) = (Boundaries::default(), None, false);
            (state.node, state.stopping) = (env.group_rank, false);
            (state.connections, state.cuts) = (Some(connections.clone()), Vec::new());
            drop(state);
            inner.activity.enter_round();
        }
        connections
    }

    /// Has this called when the round that the rank is in is over; at once where it is.
    pub(crate) fn cut_with_round(&self, cut: impl Fn() + Send + Sync + 'static) {
        let Some(inner) = &self.inner else { return };
        let mut state = inner.state();
        if state.stop() == Some(Stop::Broken) {
            drop(state);
            return cut();
        }
        state.cuts.push(Arc::new(cut));
    }

    /// Does this in a thread, and waits for it as long as the round lasts: of some waits within libtorch nothing can be cut, such as gloo's for a
    /// connection from a rank that is gone. A thread that is left behind ends with the timeout of what it waits for.
    ///
    /// # Errors
    /// Those of the work, and [`Error::RoundOver`].
    pub(crate) fn within_round<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let (tell, told) = mpsc::channel();
        let over = tell.clone();
        self.cut_with_round(move || _ = over.send(Err(Error::RoundOver)));
        let done = move || _ = tell.send(work());
        thread::Builder::new()
            .name("ice-form".into())
            .spawn(done)
            .map_err(|source| Error::Link { source })?;
        let _waiting = self.waiting();
        told.recv().unwrap_or(Err(Error::RoundOver))
    }

    /// Takes part in what the ranks of a round agree on over its store.
    pub(crate) fn join_round(&self, store: &Store, group: &ProcessGroup, env: &RankEnv) -> io::Result<()> {
        let world_size = env.world_size as usize;
        let Some(inner) = &self.inner else { return self.join_group(store, env.rank, world_size) };
        let hearing = store.reconnect().map_err(io::Error::other)?;
        let mut state = inner.state();
        (state.group, state.store) = (Some(group.clone()), Some(store.clone()));
        drop(state);
        inner.changed.notify_all();
        let (inner, local) = (Arc::clone(inner), Arc::clone(&self.local));
        let part = InRound { inner, local, round: env.round, rank: env.rank.into() };
        thread::Builder::new().name("ice-agree".into()).spawn(move || {
            if let Err(error) = agree::take_part(&part, &hearing, world_size) {
                tracing::debug!(%error, "no more requests will come");
            }
        })?;
        Ok(())
    }

    /// Takes part in the agreements of a group without an agent.
    pub(crate) fn join_group(&self, store: &Store, rank: u32, world_size: usize) -> io::Result<()> {
        Local::join(&self.local, store, rank, world_size)
    }

    /// Says what is to be done at this step boundary. Every rank calls it at the same places of its work. Waits while the job is paused, and
    /// while the ranks have yet to agree on the boundary of a request.
    ///
    /// `asked` says that this rank has published a request that was not acted on yet: the boundary then waits until the ranks agree on one,
    /// so that the rank does not run past it.
    pub fn boundary(&self, asked: bool) -> Boundary {
        let Some(inner) = &self.inner else { return self.local.boundary(asked) };
        let mut state = inner.state();
        let found = loop {
            if state.stop() == Some(Stop::Broken) {
                state.noticed = true;
                break Boundary::Broken;
            }
            let turn =
                if asked && state.boundaries.is_free() { Turn::Wait } else { state.boundaries.arrive() };
            match turn {
                Turn::Pass => break Boundary::GoOn,
                Turn::Do(Request::Stop { node, save }) => {
                    let here = state.node == node;
                    if here {
                        (state.stopping, state.noticed) = (true, true);
                    }
                    break Boundary::Stop { here, save };
                }
                Turn::Do(Request::Regroup) => {
                    // All ranks know.
                    (state.over, state.noticed) = (state.over.max(state.round), true);
                    break Boundary::Regroup;
                }
                Turn::Do(Request::Leave { all, task }) => break Boundary::Leave { all, task },
                Turn::Do(_) => break Boundary::Save,
                Turn::Wait => {
                    if state.boundaries.is_paused() {
                        // Also after a save in between.
                        let before = inner.activity.rest();
                        if state.rests.is_none() {
                            state.rests = Some(before);
                            drop(state);
                            self.send(&Up::Paused);
                            state = inner.state();
                            continue;
                        }
                    }
                    state = inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        let mut before = None;
        if found == Boundary::GoOn {
            before = state.rests.take();
            // Under the lock: the thread that answers for this rank reads both together.
            self.local.collectives.store(0, Ordering::Relaxed);
        }
        drop(state);
        if let Some(before) = before {
            inner.activity.resume(before);
            self.send(&Up::Resumed);
        }
        found
    }

    /// Counts a collective that this rank takes part in from now on.
    pub fn collective(&self) {
        self.local.collectives.fetch_add(1, Ordering::Relaxed);
        self.tick();
    }

    /// Returns the number of collectives since the last step boundary. A backward pass that averages gradients counts as one.
    pub fn collectives(&self) -> u64 {
        self.local.collectives.load(Ordering::Relaxed)
    }

    /// Notes that this rank leaves the step before its end. Returns the request that asks all ranks whether they do so, too.
    pub(crate) fn leave_step(&self) -> Request {
        let (step, collectives) = match &self.inner {
            None => self.local.leave_step(),
            Some(inner) => {
                let collectives = self.collectives();
                (inner.state().boundaries.leave_step(collectives), collectives)
            }
        };
        Request::Left { step, collectives }
    }

    /// Waits until all ranks have said whether they have left the step as well. Returns a rank that has not.
    ///
    /// # Errors
    /// [`Error::RoundOver`]: another rank is gone.
    pub(crate) fn await_left(&self) -> Result<Option<u64>, Error> {
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

    /// Notes that no boundary will come any more.
    pub fn end(&self) {
        if let Some(inner) = &self.inner {
            inner.state().boundaries.end();
            inner.changed.notify_all();
            inner.activity.end();
        }
        self.local.end();
    }

    /// Says that the work is done; the agent may be gone from now on.
    pub(crate) fn finish(&self) {
        if let Some(inner) = &self.inner {
            inner.activity.rest();
            inner.leaving.store(true, Ordering::SeqCst);
            self.send(&inner.heartbeat());
        }
        self.send(&Up::Done);
        // There is no boundary left at which this process would stop.
        signals::restore_termination();
    }

    fn beat(&self) {
        let Some(inner) = &self.inner else { return };
        while !inner.leaving.load(Ordering::SeqCst) {
            self.send(&inner.heartbeat());
            thread::sleep(HEARTBEAT);
        }
    }
}

/// The part that this process has in the agreements of one round.
struct InRound {
    inner: Arc<Inner>,
    local: Arc<Local>,
    round: u64,
    rank: u64,
}

/// The answer of a rank to the question whether it has left a step.
fn answer(has_left: bool, rank: u64) -> u64 {
    if has_left { 0 } else { rank + 1 }
}

impl Part for InRound {
    fn ask(&self, request: Request) -> u64 {
        let mut state = self.inner.state();
        if state.round == Some(self.round) { state.boundaries.ask(request) } else { agree::END }
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
            let changed = self.inner.changed.wait_timeout(state, LOOK_AGAIN);
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
