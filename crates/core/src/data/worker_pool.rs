//! Makes batches in order, either in the calling thread or ahead of it in worker threads.
//!
//! Invariants, cited by the tests:
//!
//! - LA-1: results come in the order of the jobs, for any number of threads.
//! - LA-2: the first half of a job runs one at a time and in the order of the jobs; the second
//!   halves run in parallel.
//! - LA-3: only submitted jobs run. The submitter thereby bounds the batches that are made ahead.
//! - LA-4: an error or a panic is the result of its own job only.
//! - LA-5: when a lane is dropped, its threads have ended.

use std::any::Any;
use std::collections::VecDeque;
use std::panic::{self, AssertUnwindSafe};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use crate::{Error, Result};

/// Held while worker threads set libtorch's number of threads. The number belongs to the thread
/// that sets it, but new threads start with the number that was set last.
pub(super) static INTRA_OP: Mutex<()> = Mutex::new(());

/// The half of a job that must run in order.
type Ordered<J, P> = Box<dyn FnMut(J) -> Result<P> + Send>;
/// The half of a job that may run in parallel with others.
type Parallel<P, B> = Box<dyn Fn(P) -> Result<B> + Send + Sync>;

/// A queue of jobs `J`, which become plans `P` in order, and results `B` in parallel.
pub(super) struct OrderedWorkerPool<J, P, B>(Mode<J, P, B>);

enum Mode<J, P, B> {
    Inline {
        jobs: VecDeque<J>,
        ordered: Ordered<J, P>,
        parallel: Parallel<P, B>,
    },
    Threads {
        shared: Arc<Shared<J, P, B>>,
        results: VecDeque<Receiver<Result<B>>>,
        threads: Vec<JoinHandle<()>>,
    },
}

struct Shared<J, P, B> {
    queue: Mutex<Queue<J, B>>,
    submitted: Condvar,
    /// Held from taking a job until its first half is done (LA-2).
    ordered: Mutex<Ordered<J, P>>,
    parallel: Parallel<P, B>,
}

struct Queue<J, B> {
    jobs: VecDeque<(J, SyncSender<Result<B>>)>,
    closed: bool,
}

impl<J: Send + 'static, P: 'static, B: Send + 'static> OrderedWorkerPool<J, P, B> {
    /// Creates a lane with this many threads. Without threads, a job runs when its result is taken.
    pub(super) fn new(
        workers: usize,
        ordered: impl FnMut(J) -> Result<P> + Send + 'static,
        parallel: impl Fn(P) -> Result<B> + Send + Sync + 'static,
    ) -> Result<Self> {
        let (ordered, parallel): (Ordered<J, P>, Parallel<P, B>) = (Box::new(ordered), Box::new(parallel));
        if workers == 0 {
            return Ok(Self(Mode::Inline { jobs: VecDeque::new(), ordered, parallel }));
        }
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue { jobs: VecDeque::new(), closed: false }),
            submitted: Condvar::new(),
            ordered: Mutex::new(ordered),
            parallel,
        });
        // The lane exists before its threads. If a thread cannot be started, dropping the lane ends
        // the others.
        let mut lane = Self(Mode::Threads {
            shared: Arc::clone(&shared),
            results: VecDeque::new(),
            threads: Vec::new(),
        });
        if let Mode::Threads { threads, .. } = &mut lane.0 {
            let _turn = lock(&INTRA_OP);
            let intra_op = tch::get_num_threads();
            let (ready, started) = mpsc::channel();
            for index in 0..workers {
                let (shared, ready) = (Arc::clone(&shared), ready.clone());
                let work = move || {
                    // One libtorch thread per worker, since the step needs the cores. The call of
                    // get_num_threads comes first: at its first operation, a thread that has never
                    // asked for the number gets that of the process, which would replace the 1.
                    tch::get_num_threads();
                    tch::set_num_threads(1);
                    drop(ready);
                    shared.work();
                };
                let thread = thread::Builder::new().name(format!("ice-data-{index}")).spawn(work);
                threads.push(thread.map_err(Error::io(Path::new("data worker thread")))?);
            }
            drop(ready);
            // Returns when the last thread has dropped its sender. Then restores the number of this
            // thread: threads started later inherit the number that was set last.
            let _: std::result::Result<(), _> = started.recv();
            tch::set_num_threads(intra_op);
        }
        Ok(lane)
    }

    /// Adds a job.
    pub(super) fn submit(&mut self, job: J) {
        match &mut self.0 {
            Mode::Inline { jobs, .. } => jobs.push_back(job),
            Mode::Threads { shared, results, .. } => {
                let (reply, result) = mpsc::sync_channel(1);
                results.push_back(result);
                lock(&shared.queue).jobs.push_back((job, reply));
                shared.submitted.notify_one();
            }
        }
    }

    /// Waits for the result of the oldest job, and returns it.
    pub(super) fn take(&mut self) -> Result<B> {
        let nothing = || Error::Graph("no batch was asked for".into());
        match &mut self.0 {
            Mode::Inline { jobs, ordered, parallel } => {
                let job = jobs.pop_front().ok_or_else(nothing)?;
                let plan = guard(|| ordered(job))?;
                guard(|| parallel(plan))
            }
            Mode::Threads { results, .. } => {
                let result = results.pop_front().ok_or_else(nothing)?;
                result.recv().unwrap_or_else(|_| Err(Error::Panicked("a data worker thread is gone".into())))
            }
        }
    }

    /// Drops all jobs. Jobs in progress are finished, and their results dropped.
    pub(super) fn clear(&mut self) {
        match &mut self.0 {
            Mode::Inline { jobs, .. } => jobs.clear(),
            Mode::Threads { shared, results, .. } => {
                lock(&shared.queue).jobs.clear();
                results.clear();
            }
        }
    }
}

impl<J, P, B> Shared<J, P, B> {
    fn work(&self) {
        while let Some((plan, reply)) = self.next() {
            let result = plan.and_then(|plan| guard(|| (self.parallel)(plan)));
            // If the receiver is gone, the lane was cleared.
            let _: std::result::Result<(), _> = reply.send(result);
        }
    }

    fn next(&self) -> Option<(Result<P>, SyncSender<Result<B>>)> {
        // Lock order: `ordered` before `queue`. `ordered` stays locked until the first half is
        // done, so that the next thread takes the next job only afterwards (LA-2). `queue` is
        // released before, so that `submit` and `clear` never wait for a job. At most one thread
        // waits for `submitted`, while the others wait for `ordered`.
        let mut ordered = lock(&self.ordered);
        let mut queue = lock(&self.queue);
        let (job, reply) = loop {
            if queue.closed {
                return None;
            }
            match queue.jobs.pop_front() {
                Some(job) => break job,
                None => queue = self.submitted.wait(queue).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(queue);
        Some((guard(|| ordered(job)), reply))
    }
}

impl<J, P, B> Drop for Mode<J, P, B> {
    fn drop(&mut self) {
        let Self::Threads { shared, threads, .. } = self else { return };
        let mut queue = lock(&shared.queue);
        queue.closed = true;
        queue.jobs.clear();
        drop(queue);
        shared.submitted.notify_all();
        for thread in threads.drain(..) {
            // A panic within a job is the result of that job, so the threads themselves cannot
            // panic.
            let _: thread::Result<()> = thread.join();
        }
    }
}

/// Notifies threads that make batches that their node is being dropped.
///
/// Must be declared before the lane in a struct, so that it is dropped first: dropping the lane
/// waits for its threads.
#[derive(Default)]
pub(super) struct StopOnDrop(pub(super) Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Converts a panic into an error. Unwind safety: the closure's state is either not used again, or
/// cannot be left half done by a panic.
pub(super) fn guard<T>(f: impl FnOnce() -> Result<T>) -> Result<T> {
    panic::catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|panic| Err(Error::Panicked(message(&*panic))))
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text =
        panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").into()
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
