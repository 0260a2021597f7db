//! One rank's part in the agreement. Pure: nothing here waits or talks.

use ice_proto::link::Request;

/// The answer of a rank that has no boundary left.
pub(crate) const END: u64 = u64::MAX;

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
#[derive(Debug, Default)]
pub(crate) struct Boundaries {
    /// How many were left behind.
    passed: u64,
    pending: Option<Pending>,
    paused: bool,
    ended: bool,
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
        if self.ended {
            return END;
        }
        self.pending = Some(Pending { request, target: None });
        self.passed + 1
    }

    /// All have answered.
    pub(crate) fn settle(&mut self, target: u64) {
        if let Some(pending) = &mut self.pending {
            pending.target = Some(target);
        }
    }

    /// There are no more boundaries. What was to be done at one of them will not be done by anybody.
    pub(crate) fn end(&mut self) {
        (self.ended, self.pending, self.paused) = (true, None, false);
    }
}
