//! One rank's part in the agreement. Pure: nothing here waits or talks.

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
    pending: Option<Pending>,
    paused: bool,
    ended: bool,
    /// Whether this rank has left the step after the last boundary before the end of the step.
    has_left: bool,
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
            match &self.pending {
                Some(Pending { target: None, .. }) => return Turn::Wait,
                Some(Pending { target: Some(target), request }) if *target <= here => {
                    let request = *request;
                    self.pending = None;
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

    /// Whether the next request can be taken up.
    pub(crate) fn is_free(&self) -> bool {
        self.pending.is_none()
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// The first boundary that this rank can act at.
    pub(crate) fn ask(&mut self, request: Request) -> u64 {
        self.pending = Some(Pending { request, target: None });
        if self.ended { self.next_run() + 1 } else { self.passed + 1 }
    }

    /// The number before that of the first boundary of the next run.
    fn next_run(&self) -> u64 {
        (self.passed / RUN + 1) * RUN
    }

    /// All have answered.
    pub(crate) fn settle(&mut self, target: u64) {
        if let Some(pending) = &mut self.pending {
            pending.target = Some(target);
        }
    }

    /// Notes that this rank leaves the step before its end. Returns the number of boundaries left behind.
    pub(crate) fn leave_step(&mut self) -> u64 {
        (self.has_left, self.left_by_all) = (true, None);
        self.passed
    }

    /// Whether this rank has left the step `step` as well, after `collectives` of them in the step; `None` while the rank may still do so.
    /// A rank that takes part in more collectives than the one that asks waits for it there, and never leaves.
    pub(crate) fn has_left(&self, step: u64, collectives: u64, own_collectives: u64) -> Option<bool> {
        match self.passed {
            _ if self.ended => Some(false),
            passed if passed > step => Some(false),
            passed if passed < step => None,
            _ if self.has_left => Some(true),
            _ => (own_collectives > collectives).then_some(false),
        }
    }

    /// All have answered whether they have left the step.
    pub(crate) fn settle_left(&mut self, step: u64, answer: u64) {
        if self.has_left && self.passed == step {
            self.left_by_all = Some(answer);
        }
    }

    /// The answer of all ranks to [`Boundaries::leave_step`], once it is known.
    pub(crate) fn take_left_by_all(&mut self) -> Option<u64> {
        let answer = self.left_by_all.take();
        self.has_left &= answer.is_none();
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
        (self.ended, self.pending, self.paused) = (true, None, false);
    }
}
