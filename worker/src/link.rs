//! The rank's end of the link.

use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ice_c10d::Store;
use ice_proto::frame::{self, Decoder};
use ice_proto::link::{Down, Request, Up};

use crate::agree::{self, Boundaries, Part, Turn};

/// How often the rank says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// An agent that reads nothing for so long is given up on; a message is then dropped rather than the step held up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a rank may take to find out by itself that its round is over.
const BROKEN_PATIENCE: Duration = Duration::from_secs(5);

/// The connection to the agent. Without an agent that knows the link, everything here does nothing.
///
/// When the agent is gone (end of file), the rank leaves: nobody would stop it any more.
#[derive(Clone, Default)]
pub struct Link {
    inner: Option<Arc<Inner>>,
}

struct Inner {
    stream: Mutex<UnixStream>,
    step: AtomicU64,
    activity: AtomicU64,
    leaving: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// What all ranks are to be told.
    requests: mpsc::Sender<Request>,
    /// The same until there is a round.
    waiting: Mutex<Option<mpsc::Receiver<Request>>>,
}

/// What the agent wants, and what the rank is about.
#[derive(Default)]
struct State {
    stop: Option<Stop>,
    /// Whether the rank's work has seen it.
    noticed: bool,
    /// Writes under way that are not to be cut off.
    holds: usize,
    boundaries: Boundaries,
    /// Where the agent was told that this rank is paused: how much it had got done.
    rests: Option<u64>,
    /// Rank of this node.
    node: u32,
}

/// Why a rank is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// It has come to the step boundary at which the ranks of its node end.
    Requested,
    /// The round is over: another rank is gone, and no collective will succeed any more.
    Broken,
}

/// What is to be done at a step boundary, by all ranks of the job at the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boundary {
    /// Nothing: go on to the next step.
    GoOn,
    /// Save a checkpoint, and ask again.
    Save,
    /// Save a checkpoint where that is said, and end if this rank is one of those that are to.
    Stop {
        /// Whether this rank ends; others ask again, and will find the round broken.
        here: bool,
        /// Whether all ranks save.
        save: bool,
    },
    /// The round is over: end.
    Broken,
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
    pub(crate) fn open(fd: RawFd, rank: u32) -> io::Result<Self> {
        let stream = UnixStream::from(ice_c10d::inherit::descriptor(fd)?);
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let reader = stream.try_clone()?;
        let (requests, waiting) = mpsc::channel();
        let inner = Arc::new(Inner {
            stream: Mutex::new(stream),
            step: AtomicU64::new(0),
            activity: AtomicU64::new(0),
            leaving: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
            requests,
            waiting: Mutex::new(Some(waiting)),
        });
        let link = Self { inner: Some(Arc::clone(&inner)) };
        link.send(&Up::Hello { pid: process::id(), rank });
        let listening = Arc::clone(&inner);
        thread::Builder::new().name("ice-link".into()).spawn(move || listening.listen(reader))?;
        let _ = OPEN.set(link.clone());
        let beating = link.clone();
        thread::Builder::new().name("ice-heartbeat".into()).spawn(move || beating.beat())?;
        Ok(link)
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

    /// Notes that something got done, and the optimizer steps applied so far. From now on the agent expects more of it, until
    /// [`Link::rest`].
    pub fn advance(&self, step: u64) {
        if let Some(inner) = &self.inner {
            inner.step.store(step, Ordering::Relaxed);
            inner.activity.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that something got done within a step: where a job stands still, the rank that got less done is behind.
    pub fn tick(&self) {
        if let Some(inner) = &self.inner {
            // A rank that is not at work stays so.
            let more = |activity: u64| (activity > 0).then_some(activity + 1);
            let _ = inner.activity.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        }
    }

    /// Notes that no more is to be expected.
    pub fn rest(&self) {
        if let Some(inner) = &self.inner {
            inner.rest();
        }
    }

    /// Whether the rank is to end.
    pub fn stop(&self) -> Option<Stop> {
        self.wait_for_stop(Duration::ZERO)
    }

    /// Whether the round is over. Unlike [`Link::stop`] it is no promise that the rank will end by itself.
    pub fn is_broken(&self) -> bool {
        self.inner.as_ref().is_some_and(|inner| inner.state().stop == Some(Stop::Broken))
    }

    /// As [`Link::stop`], giving a request that is under way this long to arrive.
    pub fn wait_for_stop(&self, timeout: Duration) -> Option<Stop> {
        let inner = self.inner.as_ref()?;
        let (mut state, _) = inner
            .changed
            .wait_timeout_while(inner.state(), timeout, |state| state.stop.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        state.noticed |= state.stop.is_some();
        state.stop
    }

    /// To be held while something is written that is of no use half done.
    pub fn hold(&self) -> Hold {
        if let Some(inner) = &self.inner {
            inner.state().holds += 1;
        }
        Hold { inner: self.inner.clone() }
    }

    /// Takes part in what the ranks of a round agree on over its store.
    pub(crate) fn join_round(&self, store: &Store, node: u32, world_size: usize) -> io::Result<()> {
        let Some(inner) = &self.inner else { return Ok(()) };
        let hearing = store.reconnect().map_err(io::Error::other)?;
        inner.state().node = node;
        let part = Arc::clone(inner);
        thread::Builder::new().name("ice-agree".into()).spawn(move || {
            if let Err(error) = agree::take_part(&*part, &hearing, world_size) {
                tracing::debug!(%error, "no more requests will come");
            }
        })?;
        let waiting = inner.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (store, requests) = (store.clone(), waiting.into_iter().flatten());
        // The listener must not wait for a store that is gone: it hears of that.
        thread::Builder::new().name("ice-request".into()).spawn(move || {
            for request in requests {
                // The work of this rank may hold the connection while it waits for something else.
                let told = store.reconnect().and_then(|store| agree::publish(&store, request));
                if let Err(error) = told {
                    tracing::warn!(%error, ?request, "the other ranks could not be told");
                }
            }
        })?;
        Ok(())
    }

    /// To be called on every rank at the same places of its work. Waits while the job is paused, or while it is not clear yet which ranks
    /// are how far.
    pub fn boundary(&self) -> Boundary {
        let Some(inner) = &self.inner else { return Boundary::GoOn };
        let mut state = inner.state();
        let found = loop {
            if state.stop == Some(Stop::Broken) {
                state.noticed = true;
                break Boundary::Broken;
            }
            let was_free = state.boundaries.is_free();
            let turn = state.boundaries.arrive();
            if !was_free && state.boundaries.is_free() {
                inner.changed.notify_all();
            }
            match turn {
                Turn::Pass => break Boundary::GoOn,
                Turn::Do(Request::Stop { node, save }) => {
                    let here = state.node == node;
                    if here {
                        (state.stop, state.noticed) = (Some(Stop::Requested), true);
                    }
                    break Boundary::Stop { here, save };
                }
                Turn::Do(_) => break Boundary::Save,
                Turn::Wait => {
                    if state.boundaries.is_paused() && state.rests.is_none() {
                        state.rests = Some(inner.rest());
                        drop(state);
                        self.send(&Up::Paused);
                        state = inner.state();
                        continue;
                    }
                    state = inner.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        };
        let done = if found == Boundary::GoOn { state.rests.take() } else { None };
        drop(state);
        if let Some(done) = done {
            // It is at work again where it was before.
            inner.activity.store(done + u64::from(done > 0), Ordering::Relaxed);
            self.send(&Up::Resumed);
        }
        found
    }

    /// Notes that no boundary will come any more.
    pub fn end(&self) {
        if let Some(inner) = &self.inner {
            inner.state().boundaries.end();
            inner.changed.notify_all();
        }
        self.rest();
    }

    /// Says that the work is done; the agent may be gone from now on.
    pub(crate) fn finish(&self) {
        if let Some(inner) = &self.inner {
            inner.leaving.store(true, Ordering::SeqCst);
        }
        self.send(&Up::Done);
    }

    fn beat(&self) {
        let Some(inner) = &self.inner else { return };
        while !inner.leaving.load(Ordering::SeqCst) {
            let (step, activity) =
                (inner.step.load(Ordering::Relaxed), inner.activity.load(Ordering::Relaxed));
            self.send(&Up::Heartbeat { step, activity });
            thread::sleep(HEARTBEAT);
        }
    }
}

impl Part for Inner {
    fn ask(&self, request: Request) -> u64 {
        let mut state = self
            .changed
            .wait_while(self.state(), |state| !state.boundaries.is_free())
            .unwrap_or_else(PoisonError::into_inner);
        state.boundaries.ask(request)
    }

    fn settle(&self, target: u64) {
        self.state().boundaries.settle(target);
        self.changed.notify_all();
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(self: &Arc<Self>, mut stream: UnixStream) {
        let mut decoder = Decoder::new();
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => decoder.feed(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            }
            loop {
                match decoder.next_message::<Down>() {
                    Ok(Some(Down::Ask(request))) => _ = self.requests.send(request),
                    Ok(Some(Down::RoundBroken { reason, .. })) => {
                        tracing::debug!(reason, "the round is over");
                        self.broken();
                    }
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "the link to the agent is unusable");
                        process::exit(1);
                    }
                }
            }
        }
        if !self.leaving.load(Ordering::SeqCst) {
            tracing::error!("the agent is gone: leaving");
            process::exit(1);
        }
    }

    /// Notes that no more is to be expected; returns how much the rank had got done.
    fn rest(&self) -> u64 {
        self.activity.swap(0, Ordering::Relaxed)
    }

    fn broken(self: &Arc<Self>) {
        let before = self.state().stop.replace(Stop::Broken);
        self.changed.notify_all();
        let inner = Arc::clone(self);
        if before != Some(Stop::Broken)
            && let Err(error) = thread::Builder::new().name("ice-stop".into()).spawn(move || inner.enforce())
        {
            tracing::warn!(%error, "the agent will have to end this rank");
        }
    }

    /// Ends a rank that waits in a collective for one that is gone, and would never learn of it; but not while it writes.
    fn enforce(&self) {
        let (state, _) = self
            .changed
            .wait_timeout_while(self.state(), BROKEN_PATIENCE, |state| !state.noticed)
            .unwrap_or_else(PoisonError::into_inner);
        if state.noticed {
            return;
        }
        let state =
            self.changed.wait_while(state, |state| state.holds > 0).unwrap_or_else(PoisonError::into_inner);
        drop(state);
        process::exit(1);
    }
}
