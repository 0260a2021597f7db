//! One rank's state in the agreement on step boundaries. Pure: nothing here waits or communicates.

use std::collections::VecDeque;

use ice_proto::link::BoundaryRequest;

/// Answer of a rank that has no boundary left.
pub(crate) const NO_BOUNDARY: u64 = u64::MAX;
/// Distance between the first boundaries of two runs; more than the steps of a run.
const RUN: u64 = 1 << 40;

/// The decision of a rank at a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BoundaryDecision {
    /// Continue to the next boundary.
    Pass,
    /// Wait until the state changes.
    Wait,
    /// Perform this request, then ask again.
    Do(BoundaryRequest),
}

/// Position of this rank, and the request that is being agreed on.
///
/// All ranks pass the same boundaries in the same order, and count them. To a request each rank
/// answers with the first boundary at which it can still act, and stays there until it knows the
/// target: the maximum of all answers. A rank that waits for others within a step answers
/// nevertheless, with the boundary after the step; so ranks that are behind continue to the target.
///
/// A rank at the end of a run answers with the first boundary of the next run. If the program has
/// no further run, no rank acts.
#[derive(Debug, Default)]
pub(crate) struct Boundaries {
    /// Number of boundaries passed.
    passed: u64,
    /// Accepted requests that this rank has not performed, in the order in which all ranks accept
    /// them. Their targets never decrease.
    pending: VecDeque<Pending>,
    paused: bool,
    ended: bool,
    /// Number of collectives since the last boundary when this rank left the step before its end;
    /// `None` if it has not.
    left: Option<u64>,
    /// Answer to that: 0 if all ranks have left the step, otherwise 1 + the number of a rank that
    /// has not.
    left_by_all: Option<u64>,
}

#[derive(Debug)]
struct Pending {
    request: BoundaryRequest,
    target: Option<u64>,
}

impl Boundaries {
    /// Arrives at the next boundary.
    pub(crate) fn arrive(&mut self) -> BoundaryDecision {
        let here = self.passed + 1;
        loop {
            match self.pending.front() {
                Some(Pending { target: None, .. }) => return BoundaryDecision::Wait,
                Some(Pending { target: Some(target), request }) if *target <= here => {
                    let request = *request;
                    self.pending.pop_front();
                    match request {
                        BoundaryRequest::Pause => self.paused = true,
                        BoundaryRequest::Resume => self.paused = false,
                        request => return BoundaryDecision::Do(request),
                    }
                }
                None if self.paused => return BoundaryDecision::Wait,
                _ => {
                    self.passed = here;
                    return BoundaryDecision::Pass;
                }
            }
        }
    }

    /// Returns whether this rank has performed all accepted requests.
    pub(crate) fn is_free(&self) -> bool {
        self.pending.is_empty()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Accepts a request. Returns the first boundary at which this rank can act. Earlier requests
    /// may be pending: a rank that has left a step reaches no boundary before all ranks have
    /// answered about that step, and the same thread answers only after it has accepted this
    /// request.
    pub(crate) fn ask(&mut self, request: BoundaryRequest) -> u64 {
        self.pending.push_back(Pending { request, target: None });
        if self.ended { self.next_run() + 1 } else { self.passed + 1 }
    }

    /// Returns the number before the first boundary of the next run.
    fn next_run(&self) -> u64 {
        (self.passed / RUN + 1) * RUN
    }

    /// Sets the target of the last accepted request, which is known once all ranks have answered.
    pub(crate) fn settle(&mut self, target: u64) {
        if let Some(pending) = self.pending.back_mut() {
            pending.target.get_or_insert(target);
        }
    }

    /// Notes that this rank leaves the step before its end, after this number of collectives in it.
    /// Returns the number of boundaries passed.
    pub(crate) fn leave_step(&mut self, collectives: u64) -> u64 {
        (self.left, self.left_by_all) = (Some(collectives), None);
        self.passed
    }

    /// Returns whether this rank has left the step `step` after the same number of collectives;
    /// `None` while it may still do so. A rank that takes part in more collectives than the asking
    /// one waits for that one there, and never leaves. Each rank that leaves asks, so a question
    /// may arrive after the ranks have agreed. They vote then, and a later departure has more
    /// collectives.
    pub(crate) fn has_left(&self, step: u64, collectives: u64, own_collectives: u64) -> Option<bool> {
        match self.passed {
            _ if self.ended => Some(false),
            passed if passed > step => Some(false),
            passed if passed < step => None,
            _ if self.left == Some(collectives) => Some(true),
            _ => (own_collectives > collectives).then_some(false),
        }
    }

    /// Notes the answer of all ranks whether they have left the step. The first answer counts,
    /// since all ranks receive it. A rank that acts on it before another rank has read it leaves
    /// the step behind, and answers the next question differently.
    pub(crate) fn settle_left(&mut self, step: u64, collectives: u64, answer: u64) {
        if self.left == Some(collectives) && self.passed == step {
            self.left_by_all.get_or_insert(answer);
        }
    }

    /// Takes the answer of all ranks to [`Boundaries::leave_step`], once it is known.
    pub(crate) fn take_left_by_all(&mut self) -> Option<u64> {
        let answer = self.left_by_all.take();
        if answer.is_some() {
            self.left = None;
        }
        answer
    }

    /// Begins a run. All ranks have ended the run before, so the numbers agree.
    pub(crate) fn begin(&mut self) {
        if std::mem::take(&mut self.ended) {
            self.passed = self.next_run();
        }
    }

    /// Ends a run. Pending requests are performed at the first boundary of the next run.
    pub(crate) fn end(&mut self) {
        (self.ended, self.paused) = (true, false);
    }

    /// Ends all agreements, since the other ranks cannot be reached.
    pub(crate) fn close(&mut self) {
        (self.ended, self.paused) = (true, false);
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_taken_up_while_others_are_pending() {
        let mut one = Boundaries::default();
        assert_eq!(one.arrive(), BoundaryDecision::Pass);
        // Both come within the first step.
        assert_eq!(one.ask(BoundaryRequest::Save), 2);
        one.settle(3);
        assert_eq!(one.ask(BoundaryRequest::Pause), 2);
        // The departure of all ranks can be agreed on before.
        assert_eq!(one.leave_step(4), 1);
        assert_eq!(one.has_left(1, 4, 4), Some(true));
        one.settle(3);
        assert_eq!(one.arrive(), BoundaryDecision::Pass);
        assert_eq!(one.arrive(), BoundaryDecision::Do(BoundaryRequest::Save));
        assert_eq!(one.arrive(), BoundaryDecision::Wait);
        assert!(one.is_paused() && one.is_free());
    }

    #[test]
    fn late_question_of_an_agreement_is_not_for_what_is_left_next() {
        let mut one = Boundaries::default();
        assert_eq!(one.arrive(), BoundaryDecision::Pass);
        one.leave_step(4);
        one.settle_left(1, 4, 0);
        // The question of another rank, which has acted on the answer already.
        one.settle_left(1, 4, 2);
        assert_eq!(one.take_left_by_all(), Some(0));
        // The ranks have voted, and leave something else without a boundary between.
        one.leave_step(5);
        assert_eq!(one.has_left(1, 4, 5), Some(false));
        one.settle_left(1, 4, 1);
        assert_eq!(one.take_left_by_all(), None);
        assert_eq!(one.has_left(1, 5, 5), Some(true));
    }
}
