//! Countdown timers that processes of ranks set and release. A process whose timer is not released
//! in time hangs.

use std::collections::BTreeMap;
use std::time::Duration;

/// Limit for the timers of all ranks together. A program has a few at a time; a program that sets a
/// new timer in each step and never releases one must not fill the memory.
const MOST: usize = 10_000;

/// A timer that was not released in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expired {
    /// The rank that the process belongs to.
    pub local_rank: u32,
    /// The process that set it.
    pub pid: u32,
    /// Name of the timer within the process.
    pub scope: String,
    /// Signal that ends the process. `None` leaves the process alone.
    pub signal: Option<i32>,
    /// Time by which the timer had to be released.
    pub at: Duration,
}

/// The timers of the ranks of a node, by process and scope.
#[derive(Debug, Default)]
pub struct Timers(BTreeMap<(u32, String), Timer>);

#[derive(Debug)]
struct Timer {
    local_rank: u32,
    at: Duration,
    signal: Option<i32>,
}

impl Timers {
    /// Sets or resets a timer. Returns whether there was room for it.
    pub fn set(&mut self, timer: Expired) -> bool {
        let Expired { local_rank, pid, scope, signal, at } = timer;
        let key = (pid, scope);
        if self.0.len() >= MOST && !self.0.contains_key(&key) {
            return false;
        }
        self.0.insert(key, Timer { local_rank, at, signal });
        true
    }

    /// Removes a timer that was released in time.
    pub fn release(&mut self, pid: u32, scope: String) {
        self.0.remove(&(pid, scope));
    }

    /// Removes the timers of a rank that has ended, and with it all of its processes.
    pub fn gone(&mut self, local_rank: u32) {
        self.0.retain(|_, timer| timer.local_rank != local_rank);
    }

    /// Returns the time at which the next timer expires.
    pub fn deadline(&self) -> Option<Duration> {
        self.0.values().map(|timer| timer.at).min()
    }

    /// Returns an expired timer and removes all timers of its process. Of several expired timers,
    /// one with a signal has precedence, then the earliest.
    pub fn expired(&mut self, now: Duration) -> Option<Expired> {
        let due = self.0.iter().filter(|(_, timer)| timer.at <= now);
        let ((pid, scope), timer) = due.min_by_key(|(_, timer)| (timer.signal.is_none(), timer.at))?;
        let Timer { local_rank, at, signal } = *timer;
        let expired = Expired { local_rank, pid: *pid, scope: scope.clone(), signal, at };
        self.0.retain(|(pid, _), _| *pid != expired.pid);
        Some(expired)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn timer(pid: u32, scope: &str, at: u64, signal: Option<i32>) -> Expired {
        Expired { local_rank: pid / 10, pid, scope: scope.into(), signal, at: s(at) }
    }

    #[test]
    fn a_timer_expires_unless_it_is_released_or_set_again() {
        let mut timers = Timers::default();
        assert_eq!((timers.deadline(), timers.expired(s(99))), (None, None));
        for scope in ["a", "b", "c"] {
            assert!(timers.set(timer(10, scope, 5, Some(9))));
        }
        timers.release(10, "a".into());
        timers.set(timer(10, "b", 8, Some(9)));
        timers.set(timer(10, "c", 9, Some(6)));
        timers.release(11, "b".into());
        assert_eq!((timers.deadline(), timers.expired(s(7))), (Some(s(8)), None));
        assert_eq!(timers.expired(s(9)), Some(timer(10, "b", 8, Some(9))));
        assert_eq!((timers.deadline(), timers.expired(s(9))), (None, None), "once for a process");
    }

    #[test]
    fn of_the_timers_of_a_process_the_first_with_a_signal_counts() {
        let mut timers = Timers::default();
        timers.set(timer(10, "silent", 1, None));
        timers.set(timer(10, "second", 3, Some(9)));
        timers.set(timer(10, "first", 2, Some(6)));
        assert_eq!(timers.expired(s(4)), Some(timer(10, "first", 2, Some(6))));
        timers.set(timer(10, "silent", 1, None));
        assert_eq!(timers.expired(s(4)), Some(timer(10, "silent", 1, None)));
    }

    #[test]
    fn timers_go_with_their_rank_and_have_a_limit() {
        let mut timers = Timers::default();
        timers.set(timer(10, "a", 1, Some(9)));
        timers.set(timer(20, "a", 2, Some(9)));
        timers.gone(1);
        assert_eq!(timers.deadline(), Some(s(2)));
        let refused = (0..2 * MOST).filter(|n| !timers.set(timer(20, &n.to_string(), 3, None))).count();
        assert_eq!(refused, MOST + 1);
        assert!(timers.set(timer(20, "a", 9, None)), "one that is there can be set again");
    }
}
