//! Agreeing with the other ranks, over the store of the round, at which step boundary something is done.
//!
//! Each rank has a thread that waits for requests; the store tells it. A step costs nothing while there is none. Keys, below those of the
//! round: `requests` counts; `request/<n>` is the n-th; `request/<n>/<rank>` are the answers, which `request/<n>/answers` counts;
//! `request/<n>/target` is the boundary.

mod boundaries;
#[cfg(test)]
mod simulation;

use std::time::Duration;

use ice_c10d::{ErrorKind, Store};
use ice_proto::frame::{self, Decoder};
use ice_proto::link::Request;

pub(crate) use boundaries::{Boundaries, END, Turn};

/// A request may come at any time in a month.
const PATIENCE: Duration = Duration::from_secs(24 * 60 * 60);

/// The rank's side of an agreement.
pub(crate) trait Part {
    /// Waits until the last request was acted on, then takes the next one up; the first boundary that this rank can act at.
    fn ask(&self, request: Request) -> u64;

    /// All have answered.
    fn settle(&self, target: u64);
}

/// Tells all ranks of a request.
pub(crate) fn publish(store: &Store, request: Request) -> Result<(), ice_c10d::Error> {
    let Ok(bytes) = frame::encode(&request) else { return Ok(()) };
    let number = store.add("requests", 1)?;
    store.set(&format!("request/{number}"), &bytes)
}

/// Takes part in all agreements of the round, until its store is gone.
pub(crate) fn take_part(
    part: &impl Part,
    store: &Store,
    rank: usize,
    world_size: usize,
) -> Result<(), ice_c10d::Error> {
    for number in 1.. {
        let key = |what: &dyn std::fmt::Display| format!("request/{number}/{what}");
        let request = wait(store, &format!("request/{number}"))?;
        // What cannot be understood is so for all ranks alike.
        let answer = parse(&request).map_or(END, |request| part.ask(request));
        store.set(&key(&rank), answer.to_string().as_bytes())?;
        if store.add(&key(&"answers"), 1)? == world_size as i64 {
            let mut target = 0;
            for rank in 0..world_size {
                target = target.max(number_in(&store.get(&key(&rank))?));
            }
            store.set(&key(&"target"), target.to_string().as_bytes())?;
        }
        part.settle(number_in(&wait(store, &key(&"target"))?));
    }
    Ok(())
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
        match store.wait(&[key], PATIENCE) {
            Err(error) if error.kind() == ErrorKind::Timeout => {}
            Err(error) => return Err(error),
            Ok(()) => return store.get(key),
        }
    }
}
