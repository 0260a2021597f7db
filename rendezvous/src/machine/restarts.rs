//! Whether the worker group is started again after a failure.

use std::collections::VecDeque;
use std::time::Duration;

use ice_proto::rendezvous::RestartPolicy;
use serde::{Deserialize, Serialize};

/// An attempt that fails within this time has failed right at its start.
const QUICK: Duration = Duration::from_secs(10);
/// Longest pause before a restart.
const LONGEST: Duration = Duration::from_secs(300);

/// How an attempt failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) reason: String,
    /// From the start of the ranks.
    pub(super) uptime: Duration,
    /// Why a restart cannot help, where that is known.
    pub(super) hopeless: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    Restart {
        after: Duration,
        note: String,
    },
    /// Without a reason where no restart was ever allowed.
    GiveUp {
        why: Option<String>,
    },
}

/// The restarts of a job so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Restarts {
    count: u32,
    /// When failures happened that still count.
    recent: VecDeque<Duration>,
    /// Attempts in a row that failed right at their start.
    quick: u32,
}

impl Restarts {
    /// Restarts since the start of the job.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Judges a failure, and counts the restart that follows from it.
    pub(super) fn decide(&mut self, policy: &RestartPolicy, now: Duration, failure: &Failure) -> Verdict {
        let give_up = |why: String| Verdict::GiveUp { why: Some(why) };
        if policy.max_restarts == 0 {
            return Verdict::GiveUp { why: None };
        }
        if let Some(why) = &failure.hopeless {
            return give_up(why.clone());
        }
        self.quick = if failure.uptime < QUICK { self.quick + 1 } else { 0 };
        if policy.crash_loop > 0 && self.quick >= policy.crash_loop {
            return give_up(format!(
                "{} attempts in a row failed within {} s of their start, the last one after {:.1} s (--crash-loop-limit {})",
                self.quick,
                QUICK.as_secs(),
                failure.uptime.as_secs_f64(),
                policy.crash_loop
            ));
        }
        if let Some(window) = policy.window {
            while self.recent.front().is_some_and(|at| at.saturating_add(window) <= now) {
                self.recent.pop_front();
            }
        }
        let (used, allowed) = (self.recent.len(), policy.max_restarts);
        let within =
            policy.window.map(|window| format!(" within {} s", window.as_secs_f64())).unwrap_or_default();
        if used >= allowed as usize {
            return give_up(format!("all {allowed} restarts{within} are used up (--max-restarts)"));
        }
        self.recent.push_back(now);
        self.count += 1;
        let after = match self.quick {
            0 | 1 => Duration::ZERO,
            quick => policy.backoff.saturating_mul(1 << (quick - 2).min(16)).min(LONGEST),
        };
        let pause = match after {
            Duration::ZERO => String::new(),
            after => format!(", after a pause of {} s", after.as_secs_f64()),
        };
        Verdict::Restart { after, note: format!("restart {} of {allowed}{within}{pause}", used + 1) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: RestartPolicy =
        RestartPolicy { max_restarts: 2, window: None, backoff: Duration::from_secs(1), crash_loop: 0 };

    fn failure(uptime: u64) -> Failure {
        Failure { reason: "r".into(), uptime: Duration::from_secs(uptime), hopeless: None }
    }

    /// What becomes of failures at these seconds, each after an attempt of so many seconds: pauses, or the last word.
    #[track_caller]
    fn check(policy: &RestartPolicy, failures: &[(u64, u64)], pauses: &[u64], end: Option<&str>) {
        let mut restarts = Restarts::default();
        let mut seen = Vec::new();
        let mut last = None;
        for (at, uptime) in failures {
            match restarts.decide(policy, Duration::from_secs(*at), &failure(*uptime)) {
                Verdict::Restart { after, .. } => seen.push(after.as_secs()),
                Verdict::GiveUp { why } => last = Some(why.unwrap_or_default()),
            }
        }
        assert_eq!(seen, pauses);
        match (&last, end) {
            (None, None) => {}
            (Some(why), Some(part)) => assert!(why.contains(part), "{why}"),
            other => panic!("{other:?}"),
        }
        assert_eq!(restarts.count() as usize, pauses.len());
    }

    #[test]
    fn the_budget_is_for_the_whole_job_unless_there_is_a_window() {
        let failures = [(100, 100), (10_000, 100), (20_000, 100), (30_000, 100)];
        check(&POLICY, &failures, &[0, 0], Some("all 2 restarts are used up"));
        let window = RestartPolicy { window: Some(Duration::from_secs(3600)), ..POLICY };
        check(&window, &failures, &[0, 0, 0, 0], None);
        let close = [(100, 100), (200, 100), (300, 100)];
        check(&window, &close, &[0, 0], Some("all 2 restarts within 3600 s"));
        check(&window, &[(100, 100), (200, 100), (3700, 100)], &[0, 0, 0], None);
        check(&RestartPolicy { max_restarts: 0, ..POLICY }, &[(1, 1)], &[], Some(""));
    }

    #[test]
    fn quick_failures_are_answered_slower_and_slower() {
        let policy = RestartPolicy { max_restarts: 100, ..POLICY };
        check(&policy, &[(1, 1), (2, 1), (3, 1), (4, 1), (99, 90), (100, 1)], &[0, 1, 2, 4, 0, 0], None);
        let forever = vec![(1, 1); 40];
        let mut restarts = Restarts::default();
        for (at, uptime) in forever {
            let verdict = restarts.decide(&policy, Duration::from_secs(at), &failure(uptime));
            assert!(matches!(verdict, Verdict::Restart { after, .. } if after <= LONGEST));
        }
    }

    #[test]
    fn a_crash_loop_ends_the_job_before_the_budget_does() {
        let policy = RestartPolicy { max_restarts: 100, crash_loop: 3, backoff: Duration::ZERO, ..POLICY };
        check(&policy, &[(1, 1), (2, 1), (3, 2)], &[0, 0], Some("3 attempts in a row"));
        check(&policy, &[(1, 1), (2, 1), (30, 20), (31, 1)], &[0, 0, 0, 0], None);
    }

    #[test]
    fn what_cannot_help_is_not_tried() {
        let hopeless = Failure { hopeless: Some("exit code 2 is final".into()), ..failure(100) };
        let verdict = Restarts::default().decide(&POLICY, Duration::ZERO, &hopeless);
        assert_eq!(verdict, Verdict::GiveUp { why: Some("exit code 2 is final".into()) });
    }

    proptest! {
        #[test]
        fn never_more_than_allowed_in_any_window(
            max_restarts in 0_u32..5, window in 1_u64..50, crash_loop in 0_u32..4,
            failures in proptest::collection::vec((0_u64..20, 0_u64..20), 0..60),
        ) {
            let window = Duration::from_secs(window);
            let policy = RestartPolicy { max_restarts, window: Some(window), crash_loop, ..POLICY };
            let mut restarts = Restarts::default();
            let mut granted: Vec<Duration> = Vec::new();
            let mut now = Duration::ZERO;
            for (pause, uptime) in failures {
                now += Duration::from_secs(pause);
                match restarts.decide(&policy, now, &failure(uptime)) {
                    Verdict::Restart { .. } => granted.push(now),
                    Verdict::GiveUp { .. } => break,
                }
                let within = granted.iter().filter(|at| **at + window > now).count();
                prop_assert!(within <= max_restarts as usize, "RV-4");
            }
        }
    }
}
