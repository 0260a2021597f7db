//! Agreement of all ranks on the step boundary at which a request is performed, through the store
//! of the round.
//!
//! A thread of each rank waits for requests at the store, so a step without a request costs
//! nothing. Keys, below those of the round: `requests` counts the requests; `request/<n>` is the
//! n-th; `request/<n>/last` is the maximum of the answers so far, which `request/<n>/answers`
//! counts; `request/<n>/target` is the boundary. The work of one rank per request does not depend
//! on the number of ranks.

mod boundaries;
#[cfg(test)]
mod simulation;

use std::time::Duration;

use ice_proto::frame::{self, Decoder};
use ice_proto::link::BoundaryRequest;

use crate::Store;

pub(crate) use boundaries::{Boundaries, BoundaryDecision, NO_BOUNDARY};

/// Interval at which a wait is renewed: middleboxes between nodes drop connections that are silent
/// for minutes. Short in tests, so that they cover it.
const RENEWAL: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 100_000 });

/// A rank's side of the agreements.
pub(crate) trait Participant {
    /// Takes a request up. Returns the first boundary that this rank can act at.
    fn ask(&self, request: BoundaryRequest) -> u64;

    /// Sets the target of the request.
    fn settle(&self, target: u64);

    /// Waits until this rank has left a step before its end, or cannot do so any more. Returns 0 if
    /// it has, otherwise 1 + its rank.
    fn has_left(&self, step: u64, collectives: u64) -> u64;

    /// Notes the answer of all ranks whether they have left the step.
    fn settle_left(&self, step: u64, collectives: u64, answer: u64);
}

/// Publishes a request to all ranks of the round.
///
/// # Errors
/// The store is gone.
pub fn publish<S: Store>(store: &S, request: BoundaryRequest) -> Result<(), S::Error> {
    let Ok(bytes) = frame::encode(&request) else { return Ok(()) };
    let number = store.add("requests", 1)?;
    store.set(&format!("request/{number}"), &bytes)
}

/// Takes part in all agreements of the round until its store is gone.
pub(crate) fn participate<S: Store>(
    participant: &impl Participant,
    store: &S,
    world_size: usize,
) -> Result<(), S::Error> {
    for number in 1.. {
        let key = |what: &dyn std::fmt::Display| format!("request/{number}/{what}");
        let request = wait(store, &format!("request/{number}"))?;
        let request = parse(&request);
        let answer = match request {
            Some(BoundaryRequest::Left { step, collectives }) => participant.has_left(step, collectives),
            Some(request) => participant.ask(request),
            // A request that cannot be decoded is ignored by all ranks alike.
            None => NO_BOUNDARY,
        };
        fetch_max(store, &key(&"last"), answer)?;
        if store.add(&key(&"answers"), 1)? == world_size as i64 {
            store.set(&key(&"target"), &store.get(&key(&"last"))?)?;
        }
        let target = number_in(&wait(store, &key(&"target"))?);
        match request {
            Some(BoundaryRequest::Left { step, collectives }) => {
                participant.settle_left(step, collectives, target)
            }
            _ => participant.settle(target),
        }
    }
    Ok(())
}

/// Raises the number at a key to at least `to`. Most ranks have the same answer, and find it
/// stored.
fn fetch_max<S: Store>(store: &S, key: &str, to: u64) -> Result<(), S::Error> {
    let (mut known, desired) = (String::new(), to.to_string());
    loop {
        let there = store.compare_set(key, &known, &desired)?;
        if number_in(&there) >= to {
            return Ok(());
        }
        known = String::from_utf8_lossy(&there).into_owned();
    }
}

fn parse(bytes: &[u8]) -> Option<BoundaryRequest> {
    let mut decoder = Decoder::new();
    decoder.feed(bytes);
    decoder.next_message().ok().flatten()
}

fn number_in(bytes: &[u8]) -> u64 {
    str::from_utf8(bytes).ok().and_then(|text| text.parse().ok()).unwrap_or(NO_BOUNDARY)
}

/// Waits for a key without a limit, and returns its value.
fn wait<S: Store>(store: &S, key: &str) -> Result<Vec<u8>, S::Error> {
    while !store.wait(key, RENEWAL)? {}
    store.get(key)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;
    use crate::store::MemoryStore;

    /// A rank with prepared answers, which sends the targets that it receives.
    struct Fake(mpsc::Sender<u64>, std::sync::Mutex<Vec<u64>>);

    impl Participant for Fake {
        fn ask(&self, request: BoundaryRequest) -> u64 {
            assert_eq!(request, BoundaryRequest::Save);
            self.1.lock().unwrap().pop().unwrap()
        }

        fn settle(&self, target: u64) {
            self.0.send(target).unwrap();
        }

        fn has_left(&self, _: u64, _: u64) -> u64 {
            unreachable!()
        }

        fn settle_left(&self, _: u64, _: u64, _: u64) {
            unreachable!()
        }
    }

    #[test]
    fn the_last_of_the_answers_is_the_target_for_all() {
        let memory = MemoryStore::default();
        let connect = || memory.reconnect().unwrap();
        let answers = [[7, 1, NO_BOUNDARY], [8, 2, 5], [19, 1, 5], [8, 3, 4]];
        let (settled, targets) = mpsc::channel();
        let ranks = answers.map(|answers| {
            let (store, settled) = (connect(), settled.clone());
            let fake = Fake(settled, answers.into_iter().rev().collect::<Vec<_>>().into());
            thread::spawn(move || participate(&fake, &store, answers.len() + 1))
        });
        drop(settled);
        let asking = connect();
        for expected in [19, 3, NO_BOUNDARY] {
            publish(&asking, BoundaryRequest::Save).unwrap();
            let all: Vec<_> = targets.iter().take(ranks.len()).collect();
            assert_eq!(all, [expected; 4]);
        }
        // The ranks wait for the next request as long as the store exists.
        memory.close();
        for rank in ranks {
            assert!(rank.join().unwrap().is_err());
        }
    }
}
