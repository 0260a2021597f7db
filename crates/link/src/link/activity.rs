//! Current work of the rank, for its heartbeat.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use ice_proto::link::Doing;

use super::Inner;

/// Current work of the rank. Several threads change it, so it consists of atomics. A heartbeat that
/// reads between two stores is wrong for a second at most.
pub(super) struct Activity {
    count: AtomicU64,
    /// A [`Doing`], without regard to `alone` and `waits`.
    mode: AtomicU8,
    /// Number of [`Alone`] guards.
    alone: AtomicU32,
    /// Number of [`Waiting`] guards.
    waits: AtomicU32,
}

impl Activity {
    /// Creates the activity of a starting process.
    pub(super) fn new() -> Self {
        let mode = AtomicU8::new(Doing::Alone as u8);
        Self { count: AtomicU64::new(0), mode, alone: AtomicU32::new(0), waits: AtomicU32::new(0) }
    }

    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    fn mode(&self) -> Doing {
        named(self.mode.load(Ordering::Relaxed))
    }

    /// Returns the work that the agent should expect.
    pub(super) fn doing(&self) -> Doing {
        let alone = self.alone.load(Ordering::Relaxed) > 0;
        match self.mode() {
            Doing::Resting => Doing::Resting,
            mode if !alone && mode != Doing::Alone => mode,
            // A closure of the program that waits for other ranks does not work alone.
            _ if self.waits.load(Ordering::Relaxed) > 0 => Doing::Meeting,
            _ => Doing::Alone,
        }
    }

    /// Enters a round. The counter starts at zero on all ranks of the round.
    pub(super) fn enter_round(&self) {
        self.count.store(0, Ordering::Relaxed);
        self.set(Doing::Alone);
    }

    /// Begins the steps of a round. All ranks do so together, so their counters are equal.
    pub(super) fn begin(&self) {
        self.count.store(1, Ordering::Relaxed);
        self.set(Doing::Steps);
    }

    /// Notes a completed step.
    pub(super) fn step(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.set(Doing::Steps);
    }

    /// Notes progress within a step, or on the way to one.
    pub(super) fn note_activity(&self) {
        if self.mode() != Doing::Resting {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that no step will follow; the remaining work has no time limit.
    pub(super) fn end(&self) {
        self.set(Doing::Alone);
    }

    /// Notes that no progress is expected. Returns the work before.
    pub(super) fn mark_idle(&self) -> Doing {
        named(self.mode.swap(Doing::Resting as u8, Ordering::Relaxed))
    }

    /// Resumes the work from before [`Activity::mark_idle`].
    pub(super) fn resume(&self, mode: Doing) {
        self.set(mode);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    fn set(&self, mode: Doing) {
        self.mode.store(mode as u8, Ordering::Relaxed);
    }
}

fn named(mode: u8) -> Doing {
    [Doing::Alone, Doing::Meeting, Doing::Steps]
        .into_iter()
        .find(|doing| *doing as u8 == mode)
        .unwrap_or(Doing::Resting)
}

/// Marks this rank as working alone until dropped.
pub struct Alone {
    inner: Option<Arc<Inner>>,
}

impl Alone {
    pub(super) fn new(inner: Option<&Arc<Inner>>) -> Self {
        inner.into_iter().for_each(|inner| _ = inner.activity.alone.fetch_add(1, Ordering::Relaxed));
        Self { inner: inner.cloned() }
    }
}

impl Drop for Alone {
    fn drop(&mut self) {
        let Some(inner) = &self.inner else { return };
        let activity = &inner.activity;
        if activity.mode() == Doing::Steps {
            activity.set(Doing::Meeting);
        }
        activity.alone.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Marks this rank as waiting for other ranks until dropped.
pub struct Waiting {
    inner: Option<Arc<Inner>>,
}

impl Waiting {
    pub(super) fn new(inner: Option<&Arc<Inner>>) -> Self {
        inner.into_iter().for_each(|inner| _ = inner.activity.waits.fetch_add(1, Ordering::Relaxed));
        Self { inner: inner.cloned() }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.inner.iter().for_each(|inner| _ = inner.activity.waits.fetch_sub(1, Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_of_its_own_ends_with_a_meeting_that_a_step_ends() {
        let activity = Activity::new();
        assert_eq!((activity.doing(), activity.count()), (Doing::Alone, 0), "a process that starts");
        activity.waits.store(1, Ordering::Relaxed);
        assert_eq!(activity.doing(), Doing::Meeting, "the group is formed");
        activity.waits.store(0, Ordering::Relaxed);
        activity.begin();
        activity.note_activity();
        assert_eq!((activity.doing(), activity.count()), (Doing::Steps, 2));
        activity.alone.store(1, Ordering::Relaxed);
        assert_eq!(activity.doing(), Doing::Alone);
        activity.waits.store(1, Ordering::Relaxed);
        assert_eq!(activity.doing(), Doing::Meeting, "a collective in a closure");
        activity.waits.store(0, Ordering::Relaxed);
        activity.alone.store(0, Ordering::Relaxed);
        activity.step();
        assert_eq!((activity.doing(), activity.count()), (Doing::Steps, 3));
        activity.end();
        assert_eq!(activity.doing(), Doing::Alone);
    }

    #[test]
    fn a_rank_that_rests_gets_nothing_done() {
        let activity = Activity::new();
        activity.begin();
        let before = activity.mark_idle();
        activity.note_activity();
        activity.alone.store(1, Ordering::Relaxed);
        assert_eq!((activity.doing(), activity.count()), (Doing::Resting, 1), "also while it saves");
        activity.alone.store(0, Ordering::Relaxed);
        activity.resume(before);
        assert_eq!((activity.doing(), activity.count()), (Doing::Steps, 2));
        activity.enter_round();
        assert_eq!((activity.doing(), activity.count()), (Doing::Alone, 0));
    }
}
