//! Agreeing with the other ranks, over the store of the round, at which step boundary something is done.
//!
//! Each rank has a thread that waits for requests; the store tells it. A step costs nothing while there is none. Keys, below those of the
//! round: `requests` counts; `request/<n>` is the n-th; `request/<n>/last` is the last of the answers so far, which `request/<n>/answers`
//! counts; `request/<n>/target` is the boundary. What a rank does for a request does not grow with the number of ranks.

mod boundaries;
#[cfg(test)]
mod simulation;

use std::time::Duration;

use ice_c10d::{ErrorKind, Store};
use ice_proto::frame::{self, Decoder};
use ice_proto::link::Request;

pub(crate) use boundaries::{Boundaries, END, Turn};

/// A wait is begun anew so often: what lies between two nodes may forget a connection that is silent for some minutes. Tests see it happen.
const RENEWAL: Duration = Duration::from_millis(if cfg!(test) { 1 } else { 100_000 });

/// The rank's side of an agreement.
pub(crate) trait Part {
    /// Takes a request up. Returns the first boundary that this rank can act at.
    fn ask(&self, request: Request) -> u64;

    /// All have answered.
    fn settle(&self, target: u64);

    /// Waits until this rank has left a step before its end, or is bound not to: 0 if it has, or else its number and 1.
    fn has_left(&self, step: u64, collectives: u64) -> u64;

    /// All have answered whether they have left the step.
    fn settle_left(&self, step: u64, collectives: u64, answer: u64);
}

/// Tells all ranks of a request.
pub(crate) fn publish(store: &Store, request: Request) -> Result<(), ice_c10d::Error> {
    let Ok(bytes) = frame::encode(&request) else { return Ok(()) };
    let number = store.add("requests", 1)?;
    store.set(&format!("request/{number}"), &bytes)
}

/// Takes part in all agreements of the round, until its store is gone.
pub(crate) fn take_part(part: &impl Part, store: &Store, world_size: usize) -> Result<(), ice_c10d::Error> {
    for number in 1.. {
        let key = |what: &dyn std::fmt::Display| format!("request/{number}/{what}");
        let request = wait(store, &format!("request/{number}"))?;
        let request = parse(&request);
        let answer = match request {
            Some(Request::Left { step, collectives }) => part.has_left(step, collectives),
            Some(request) => part.ask(request),
            // What cannot be understood is so for all ranks alike.
            None => END,
        };
        raise(store, &key(&"last"), answer)?;
        if store.add(&key(&"answers"), 1)? == world_size as i64 {
            store.set(&key(&"target"), &store.get(&key(&"last"))?)?;
        }
        let target = number_in(&wait(store, &key(&"target"))?);
        match request {
            Some(Request::Left { step, collectives }) => part.settle_left(step, collectives, target),
            _ => part.settle(target),
        }
    }
    Ok(())
}

/// Makes the number at a key no less than this one. Most ranks give the same answer, and find it there.
fn raise(store: &Store, key: &str, to: u64) -> Result<(), ice_c10d::Error> {
    let (mut known, desired) = (String::new(), to.to_string());
    loop {
        let there = store.compare_set(key, &known, &desired)?;
        if number_in(&there) >= to {
            return Ok(());
        }
        known = String::from_utf8_lossy(&there).into_owned();
    }
}

fn parse(bytes: &[u8]) -> Option<Request> {
    let mut decoder = Decoder::new();
    decoder.feed(bytes);
    decoder.next_message().ok().flatten()
}

fn number_in(bytes: &[u8]) -> u64 {
    str::from_utf8(bytes).ok().and_then(|text| text.parse().ok()).unwrap_or(END)
}

/// The value of a key, whenever it comes.
fn wait(store: &Store, key: &str) -> Result<Vec<u8>, ice_c10d::Error> {
    loop {
        match store.wait(&[key], RENEWAL) {
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => return Err(error),
            Ok(()) => return store.get(key),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use ice_c10d::testing::serve_store;

    use super::*;

    /// A rank that gives these answers, one after the other, and tells what was settled.
    struct Fake(mpsc::Sender<u64>, std::sync::Mutex<Vec<u64>>);

    impl Part for Fake {
        fn ask(&self, request: Request) -> u64 {
            assert_eq!(request, Request::Save);
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
        let (server, port) = serve_store().unwrap();
        let connect = || Store::tcp("127.0.0.1", port, Duration::from_secs(60)).unwrap();
        let answers = [[7, 1, END], [8, 2, 5], [19, 1, 5], [8, 3, 4]];
        let (settled, targets) = mpsc::channel();
        let ranks = answers.map(|answers| {
            let (store, settled) = (connect(), settled.clone());
            let fake = Fake(settled, answers.into_iter().rev().collect::<Vec<_>>().into());
            thread::spawn(move || take_part(&fake, &store, answers.len() + 1))
        });
        drop(settled);
        let asking = connect();
        for expected in [19, 3, END] {
            publish(&asking, Request::Save).unwrap();
            let all: Vec<_> = targets.iter().take(ranks.len()).collect();
            assert_eq!(all, [expected; 4]);
        }
        // They wait for the next one, as long as there is a store.
        drop(server);
        for rank in ranks {
            assert_eq!(rank.join().unwrap().unwrap_err().kind(), ErrorKind::Network);
        }
    }
}
