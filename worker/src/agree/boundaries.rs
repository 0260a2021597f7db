//! One rank's part in the agreement. Pure: nothing here waits or talks.

use std::collections::VecDeque;

use ice_proto::link::Request;

/// The answer of a rank that has no boundary left.
pub(crate) const END: u64 = u64::MAX;
/// How far the numbers of the boundaries of two runs lie apart: more than a run has.
const RUN: u64 = 1 << 40;

/// What a rank does at its boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Go on to the next one.
    Pass,
    /// Stay until something changes.
    Wait,
    /// Do this, then ask again.
    Do(Request),
}

/// Where this rank is, and what is being agreed on.
///
/// All ranks come to the same boundaries in the same order, and count them. Asked for a request, each answers with the first one that it
/// can still act at, and stays there until it knows the target: the last of all these answers. A rank that waits for others within a step
/// answers all the same, with the boundary after it, so that those which stay behind are let go on and reach it there.
///
/// A rank that has come to the end of a run answers with the first boundary of the next run. If the program has no further run, nobody acts.
#[derive(Debug, Default)]
pub(crate) struct Boundaries {
    /// How many were left behind.
    passed: u64,
    /// The requests that this rank has yet to act on, in the order in which all ranks take them up. Targets do not fall from one to the next.
    pending: VecDeque<Pending>,
    paused: bool,
    ended: bool,
    /// The collectives since the last boundary at which this rank has left what comes after it before its end.
    left: Option<u64>,
    /// The answer to that: 0 if all ranks have left the step, or else 1 more than a rank that has not.
    left_by_all: Option<u64>,
}

#[derive(Debug)]
struct Pending {
    request: Request,
    target: Option<u64>,
}

impl Boundaries {
    /// The rank is at the boundary after those that it has left behind.
    pub(crate) fn arrive(&mut self) -> Turn {
        let here = self.passed + 1;
        loop {
            match self.pending.front() {
                Some(Pending { target: None, .. }) => return Turn::Wait,
                Some(Pending { target: Some(target), request }) if *target <= here => {
                    let request = *request;
                    self.pending.pop_front();
                    match request {
                        Request::Pause => self.paused = true,
                        Request::Resume => self.paused = false,
                        request => return Turn::Do(request),
                    }
                }
                None if self.paused => return Turn::Wait,
                _ => {
                    self.passed = here;
                    return Turn::Pass;
                }
            }
        }
    }

    /// Whether this rank has acted on all requests that it knows.
    pub(crate) fn is_free(&self) -> bool {
        self.pending.is_empty()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// Takes a request up, and returns the first boundary that this rank can act at. Earlier requests may be pending: a rank that has left
    /// a step comes to no boundary before all ranks have answered for that, which the same thread does after it has taken this request up.
    pub(crate) fn ask(&mut self, request: Request) -> u64 {
        self.pending.push_back(Pending { request, target: None });
        if self.ended { self.next_run() + 1 } else { self.passed + 1 }
    }

    /// The number before that of the first boundary of the next run.
    fn next_run(&self) -> u64 {
        (self.passed / RUN + 1) * RUN
    }

    /// All have answered for the request that was taken up last.
    pub(crate) fn settle(&mut self, target: u64) {
        if let Some(pending) = self.pending.back_mut() {
            pending.target.get_or_insert(target);
        }
    }

    /// Notes that this rank leaves the step before its end, after so many collectives in it. Returns the number of boundaries left behind.
    pub(crate) fn leave_step(&mut self, collectives: u64) -> u64 {
        (self.left, self.left_by_all) = (Some(collectives), None);
        self.passed
    }

    /// Whether this rank has left the step `step` as well, after `collectives` of them in the step; `None` while the rank may still do so.
    /// A rank that takes part in more collectives than the one that asks waits for it there, and never leaves. Each rank that leaves asks, so
    /// that a question may come after the ranks have agreed: they vote then, and more collectives mark what they leave later.
    pub(crate) fn has_left(&self, step: u64, collectives: u64, own_collectives: u64) -> Option<bool> {
        match self.passed {
            _ if self.ended => Some(false),
            passed if passed > step => Some(false),
            passed if passed < step => None,
            _ if self.left == Some(collectives) => Some(true),
            _ => (own_collectives > collectives).then_some(false),
        }
    }

    /// All have answered whether they have left the step. The first answer counts: all ranks have it, and a rank that acts on it before
    /// another one has read it leaves the step behind, so that it answers the next question otherwise.
    pub(crate) fn settle_left(&mut self, step: u64, collectives: u64, answer: u64) {
        if self.left == Some(collectives) && self.passed == step {
            self.left_by_all.get_or_insert(answer);
        }
    }

    /// The answer of all ranks to [`Boundaries::leave_step`], once it is known.
    pub(crate) fn take_left_by_all(&mut self) -> Option<u64> {
        let answer = self.left_by_all.take();
        if answer.is_some() {
            self.left = None;
        }
        answer
    }

    /// A run begins: there are boundaries again. The same on all ranks, since all have come to the end of the run before.
    pub(crate) fn begin(&mut self) {
        if std::mem::take(&mut self.ended) {
            self.passed = self.next_run();
        }
    }

    /// The run has no more boundaries. What all ranks were asked for is done at the first one of the next run.
    pub(crate) fn end(&mut self) {
        (self.ended, self.paused) = (true, false);
    }

    /// The other ranks cannot be heard any more: nothing will be agreed on.
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
        assert_eq!(one.arrive(), Turn::Pass);
        // Both come within the first step.
        assert_eq!(one.ask(Request::Save), 2);
        one.settle(3);
        assert_eq!(one.ask(Request::Pause), 2);
        // What all ranks leave can be agreed on before.
        assert_eq!(one.leave_step(4), 1);
        assert_eq!(one.has_left(1, 4, 4), Some(true));
        one.settle(3);
        assert_eq!(one.arrive(), Turn::Pass);
        assert_eq!(one.arrive(), Turn::Do(Request::Save));
        assert_eq!(one.arrive(), Turn::Wait);
        assert!(one.is_paused() && one.is_free());
    }

    #[test]
    fn late_question_of_an_agreement_is_not_for_what_is_left_next() {
        let mut one = Boundaries::default();
        assert_eq!(one.arrive(), Turn::Pass);
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
