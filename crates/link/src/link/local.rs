//! Agreements of ranks without an agent: under torchrun, or in a group that the program made
//! itself.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use ice_proto::link::BoundaryRequest;

use super::state::Boundary;
use super::{COLLECTIVES_POLL, answer};
use crate::Store;
use crate::consensus::{self, Boundaries, BoundaryDecision, Participant};

/// The rank's side of the agreements. Does nothing before [`Local::join`].
#[derive(Default)]
pub(super) struct Local {
    is_joined: AtomicBool,
    boundaries: Mutex<Boundaries>,
    changed: Condvar,
    /// Collectives since the last boundary. Ranks with an agent count theirs here as well.
    pub(super) collectives: AtomicU64,
}

/// A [`Local`] in the group of a store.
struct Member {
    local: Arc<Local>,
    rank: u64,
}

impl Local {
    /// Starts the thread that answers requests of other ranks until the store is gone.
    pub(super) fn join(this: &Arc<Self>, store: &impl Store, rank: u32, world_size: usize) -> io::Result<()> {
        if world_size == 1 {
            return Ok(());
        }
        let request_store = store.reconnect().map_err(io::Error::other)?;
        let participant = Member { local: Arc::clone(this), rank: rank.into() };
        this.is_joined.store(true, Ordering::SeqCst);
        let answer = move || {
            if let Err(error) = consensus::participate(&participant, &request_store, world_size) {
                tracing::debug!(%error, "no more requests will come");
            }
            // A rank that waits at a boundary must not wait for an answer that cannot come.
            participant.local.is_joined.store(false, Ordering::SeqCst);
            participant.local.lock().close();
            participant.local.changed.notify_all();
        };
        thread::Builder::new().name("ice-agree".into()).spawn(answer).map(drop)
    }

    /// Arrives at a boundary, like [`super::Link::boundary`].
    pub(super) fn boundary(&self, asked: bool) -> Boundary {
        if !self.is_joined.load(Ordering::SeqCst) {
            return Boundary::Continue;
        }
        let mut boundaries = self.lock();
        loop {
            let waits = asked && boundaries.is_free() && self.is_joined.load(Ordering::SeqCst);
            let decision = if waits { BoundaryDecision::Wait } else { boundaries.arrive() };
            match decision {
                BoundaryDecision::Pass => {
                    self.collectives.store(0, Ordering::Relaxed);
                    return Boundary::Continue;
                }
                BoundaryDecision::Do(BoundaryRequest::Leave { all, task }) => {
                    return Boundary::Leave { all, task };
                }
                // Without an agent there are no other requests.
                BoundaryDecision::Do(_) => {}
                BoundaryDecision::Wait => boundaries = self.wait(boundaries),
            }
        }
    }

    /// Notes that this rank leaves the step before its end. Returns the boundaries and collectives
    /// before that.
    pub(super) fn leave_step(&self) -> (u64, u64) {
        let collectives = self.collectives.load(Ordering::Relaxed);
        (self.lock().leave_step(collectives), collectives)
    }

    /// Waits for the answer of all ranks to [`Local::leave_step`]; `None` if the store is gone.
    pub(super) fn left_by_all(&self) -> Option<u64> {
        let mut boundaries = self.lock();
        loop {
            match boundaries.take_left_by_all() {
                None if self.is_joined.load(Ordering::SeqCst) => boundaries = self.wait(boundaries),
                answer => return answer,
            }
        }
    }

    /// Notes that a run begins.
    pub(super) fn begin(&self) {
        self.lock().begin();
    }

    /// Notes that no further boundary will follow.
    pub(super) fn end(&self) {
        self.lock().end();
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Boundaries> {
        self.boundaries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, boundaries: MutexGuard<'a, Boundaries>) -> MutexGuard<'a, Boundaries> {
        self.changed.wait(boundaries).unwrap_or_else(PoisonError::into_inner)
    }
}

impl Participant for Member {
    fn ask(&self, request: BoundaryRequest) -> u64 {
        self.local.lock().ask(request)
    }

    fn settle(&self, target: u64) {
        self.local.lock().settle(target);
        self.local.changed.notify_all();
    }

    fn has_left(&self, step: u64, collectives: u64) -> u64 {
        let mut boundaries = self.local.lock();
        loop {
            let own = self.local.collectives.load(Ordering::Relaxed);
            if let Some(has_left) = boundaries.has_left(step, collectives, own) {
                return answer(has_left, self.rank);
            }
            let changed = self.local.changed.wait_timeout(boundaries, COLLECTIVES_POLL);
            boundaries = changed.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn settle_left(&self, step: u64, collectives: u64, answer: u64) {
        self.local.lock().settle_left(step, collectives, answer);
        self.local.changed.notify_all();
    }
}
