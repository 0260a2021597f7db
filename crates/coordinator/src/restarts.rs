//! Decisions about restarts of the worker group after failures.

use std::collections::VecDeque;
use std::time::Duration;

use ice_proto::rendezvous::RestartPolicy;
use serde::{Deserialize, Serialize};

/// Maximum uptime of an attempt that counts as failed at its start.
const QUICK_FAILURE: Duration = Duration::from_secs(10);
/// Maximum pause before a restart.
const MAX_PAUSE: Duration = Duration::from_secs(300);

/// The failure of an attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) reason: String,
    /// Time since the start of the ranks.
    pub(super) uptime: Duration,
    /// Why a restart cannot help, if that is known.
    pub(super) fatal_reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Decision {
    Restart {
        after: Duration,
        note: String,
    },
    /// No restart. The reason is `None` if restarts were never allowed.
    Abort {
        why: Option<String>,
    },
}

/// The restarts of a job so far.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Restarts {
    count: u32,
    /// Times of the failures that count against the budget.
    recent: VecDeque<Duration>,
    /// Number of consecutive attempts that failed at their start.
    quick_failures: u32,
}

impl Restarts {
    /// Returns the number of restarts since the start of the job.
    pub(super) fn count(&self) -> u32 {
        self.count
    }

    /// Judges a failure, and counts the restart if it grants one.
    pub(super) fn decide(&mut self, policy: &RestartPolicy, now: Duration, failure: &Failure) -> Decision {
        let close_for_missing_nodes = |why: String| Decision::Abort { why: Some(why) };
        if policy.max_restarts == 0 {
            return Decision::Abort { why: None };
        }
        if let Some(why) = &failure.fatal_reason {
            return close_for_missing_nodes(why.clone());
        }
        self.quick_failures = if failure.uptime < QUICK_FAILURE { self.quick_failures + 1 } else { 0 };
        if policy.crash_loop > 0 && self.quick_failures >= policy.crash_loop {
            return close_for_missing_nodes(format!(
                "{} attempts in a row failed within {} s of their start, the last one after {:.1} s (--crash-loop-limit {})",
                self.quick_failures,
                QUICK_FAILURE.as_secs(),
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
            return close_for_missing_nodes(format!(
                "all {allowed} restarts{within} are used up (--max-restarts)"
            ));
        }
        self.recent.push_back(now);
        self.count += 1;
        let after = match self.quick_failures {
            0 | 1 => Duration::ZERO,
            quick_failures => policy.backoff.saturating_mul(1 << (quick_failures - 2).min(16)).min(MAX_PAUSE),
        };
        let pause = match after {
            Duration::ZERO => String::new(),
            after => format!(", after a pause of {} s", after.as_secs_f64()),
        };
        Decision::Restart { after, note: format!("restart {} of {allowed}{within}{pause}", used + 1) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICY: RestartPolicy =
        RestartPolicy { max_restarts: 2, window: None, backoff: Duration::from_secs(1), crash_loop: 0 };

    fn failure(uptime: u64) -> Failure {
        Failure { reason: "r".into(), uptime: Duration::from_secs(uptime), fatal_reason: None }
    }

    /// Judges failures given as (second, uptime in seconds) and compares the pauses before restarts
    /// and the final reason.
    #[track_caller]
    fn check(policy: &RestartPolicy, failures: &[(u64, u64)], pauses: &[u64], end: Option<&str>) {
        let mut restarts = Restarts::default();
        let mut seen = Vec::new();
        let mut last = None;
        for (at, uptime) in failures {
            match restarts.decide(policy, Duration::from_secs(*at), &failure(*uptime)) {
                Decision::Restart { after, .. } => seen.push(after.as_secs()),
                Decision::Abort { why } => last = Some(why.unwrap_or_default()),
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
    fn restart_budget_covers_the_job_or_the_window() {
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
    fn quick_failures_are_restarted_with_growing_pauses() {
        let policy = RestartPolicy { max_restarts: 100, ..POLICY };
        check(&policy, &[(1, 1), (2, 1), (3, 1), (4, 1), (99, 90), (100, 1)], &[0, 1, 2, 4, 0, 0], None);
        let forever = vec![(1, 1); 40];
        let mut restarts = Restarts::default();
        for (at, uptime) in forever {
            let decision = restarts.decide(&policy, Duration::from_secs(at), &failure(uptime));
            assert!(matches!(decision, Decision::Restart { after, .. } if after <= MAX_PAUSE));
        }
    }

    #[test]
    fn crash_loop_ends_the_job_before_the_restart_budget() {
        let policy = RestartPolicy { max_restarts: 100, crash_loop: 3, backoff: Duration::ZERO, ..POLICY };
        check(&policy, &[(1, 1), (2, 1), (3, 2)], &[0, 0], Some("3 attempts in a row"));
        check(&policy, &[(1, 1), (2, 1), (30, 20), (31, 1)], &[0, 0, 0, 0], None);
    }

    #[test]
    fn fatal_failure_is_not_restarted() {
        let fatal_reason = Failure { fatal_reason: Some("exit code 2 is final".into()), ..failure(100) };
        let decision = Restarts::default().decide(&POLICY, Duration::ZERO, &fatal_reason);
        assert_eq!(decision, Decision::Abort { why: Some("exit code 2 is final".into()) });
    }

    proptest! {
        #[test]
        fn restarts_never_exceed_the_budget_in_any_window(
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
                    Decision::Restart { .. } => granted.push(now),
                    Decision::Abort { .. } => break,
                }
                let within = granted.iter().filter(|at| **at + window > now).count();
                prop_assert!(within <= max_restarts as usize, "RV-4");
            }
        }
    }
}
