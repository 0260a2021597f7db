//! What must hold for any bytes. Each function panics where it does not.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::time::Duration;

use ice_proto::auth::{Answer, Challenge, Greeting};
use ice_proto::frame::{self, Decoder};
use ice_proto::link::{FromRank, ToRank};
use ice_proto::rendezvous::{ToAgent, ToCoordinator};
use ice_proto::replica;
use ice_rendezvous::coordinator::{Action, Coordinator, Event, Settings, check_round};
use ice_rendezvous::store::codec::{self, Scan};
use ice_rendezvous::store::state::{Replies, Store};

/// Each target with its name, which is that of its corpus.
pub const TARGETS: [(&str, fn(&[u8])); 3] =
    [("frames", frames), ("store", store), ("coordinator", coordinator)];

/// Frames in pieces: the first byte says of what size. What is decoded does not depend on it, and encodes to what it was decoded from.
pub fn frames(bytes: &[u8]) {
    let Some((size, bytes)) = bytes.split_first() else { return };
    let size = usize::from(*size).max(1);
    messages::<Greeting>(bytes, size);
    messages::<Challenge>(bytes, size);
    messages::<Answer>(bytes, size);
    messages::<ToCoordinator>(bytes, size);
    messages::<ToAgent>(bytes, size);
    messages::<FromRank>(bytes, size);
    messages::<ToRank>(bytes, size);
    messages::<replica::OwnerHello>(bytes, size);
    messages::<replica::ReplicaHeader>(bytes, size);
    messages::<replica::ReplicaStored>(bytes, size);
}

fn messages<T: serde_like::Message>(bytes: &[u8], size: usize) {
    let decoded = |size: usize| {
        let mut decoder = Decoder::new();
        let mut messages = Vec::new();
        for piece in bytes.chunks(size) {
            decoder.feed(piece);
            loop {
                match decoder.next_message::<T>() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(_) => return messages,
                }
            }
        }
        messages
    };
    let messages = decoded(size);
    assert_eq!(format!("{:?}", decoded(usize::MAX)), format!("{messages:?}"));
    for message in messages {
        let mut decoder = Decoder::new();
        // Texts are escaped when they are read, so that a message at the limit may be over it then.
        let Ok(frame) = frame::encode(&message) else { continue };
        decoder.feed(&frame);
        let again = decoder.next_message::<T>().expect("it was encoded here");
        assert_eq!(format!("{again:?}"), format!("{:?}", Some(message)));
    }
}

mod serde_like {
    /// What a frame can hold.
    pub trait Message: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug {}
    impl<T: serde::Serialize + serde::de::DeserializeOwned + std::fmt::Debug> Message for T {}
}

/// Clients of the store. Before each request a byte says whose it is, and whether that client goes.
pub fn store(bytes: &[u8]) {
    /// Of the store.
    const LIMIT: usize = 1 << 20;
    /// A key of no bytes takes 8, and a value of less than 1 KiB is copied.
    const ANSWER_PER_BYTE: usize = (1 << 10) / 8 + 4;
    let mut store = Store::new(LIMIT);
    let mut gone = BTreeSet::new();
    let mut rest = bytes;
    let mut next = 0;
    let mut clients = BTreeMap::new();
    while let Some((who, request)) = rest.split_first() {
        let id = *clients.entry(who & 7).or_insert_with(|| {
            next += 1;
            next
        });
        if who & 128 != 0 {
            store.disconnect(id);
            gone.insert(id);
            clients.remove(&(who & 7));
            rest = request;
            continue;
        }
        let (request, length) = match codec::decode(request) {
            Ok(Some(whole)) => whole,
            Ok(None) => {
                in_pieces(request, None);
                return;
            }
            Err(_) => return,
        };
        assert!(length > 0 && length <= rest.len());
        in_pieces(&rest[1..=length], Some(length));
        let mut again = Vec::new();
        codec::encode(&request, &mut again);
        assert_eq!(again, rest[1..=length], "what is read is what is written");
        let mut replies = Replies::default();
        let _ = store.handle(id, request, &mut replies);
        assert!(store.held() <= LIMIT + replies.own.len(), "{}", store.held());
        assert!(replies.own.held() <= 2 * (LIMIT + ANSWER_PER_BYTE * length), "{}", replies.own.held());
        assert!(replies.woken.iter().all(|woken| !gone.contains(woken)), "nobody is told after it went");
        rest = &rest[1 + length..];
    }
}

/// A request that comes byte by byte is whole when its last byte is there and not before.
fn in_pieces(bytes: &[u8], length: Option<usize>) {
    let mut scan = Scan::default();
    for cut in 0..bytes.len() {
        assert!(!matches!(scan.advance(&bytes[..cut]), Ok(true)), "{cut} of {length:?}");
    }
    if length.is_some() {
        assert_eq!(scan.advance(bytes), Ok(true));
    }
}

/// Agents and what becomes of them. Each step is a byte for the peer, one for what happens, and a frame where it says something; the
/// invariants are those of the coordinator's module.
pub fn coordinator(bytes: &[u8]) {
    let settings = || Settings {
        run_id: "job".into(),
        join_timeout: Duration::from_secs(60),
        last_call: Duration::from_secs(1),
        run_stamp: "stamp".into(),
    };
    let mut machine = Coordinator::new(settings());
    let (mut now, mut last_round, mut closed) = (Duration::ZERO, None, false);
    let mut rest = bytes;
    while let [peer, what, more @ ..] = rest {
        rest = more;
        let peer = u64::from(peer & 7);
        let event = match what & 7 {
            0 => {
                now += Duration::from_millis(u64::from(*what) * 100);
                Event::Tick
            }
            1 => Event::Lost(peer),
            2 => {
                // Another coordinator takes over.
                machine = Coordinator::resume(settings(), machine.record(now));
                continue;
            }
            _ => {
                let mut decoder = Decoder::new();
                decoder.feed(rest);
                let Ok(Some(message)) = decoder.next_message::<ToCoordinator>() else { return };
                // Not its length when it is written again: texts are escaped when they are read.
                let body = rest[8..12].try_into().map_or(0, u32::from_le_bytes) as usize;
                rest = &rest[frame::HEADER_LEN + body..];
                Event::Message(peer, message)
            }
        };
        let mut views = Vec::new();
        for action in machine.handle(now, event) {
            match action {
                Action::Send(_, ToAgent::RoundStarted(round)) => views.push(round),
                Action::Send(_, ToAgent::Closed { .. }) => closed = true,
                Action::Send(_, ToAgent::Standstill { round }) => {
                    assert!(!closed && last_round.is_none_or(|last| round >= last), "RV-12");
                }
                _ => {}
            }
        }
        let Some(first) = views.first() else { continue };
        assert!(!closed, "RV-5");
        assert!(last_round.is_none_or(|last| first.number > last), "RV-7, RV-10");
        last_round = Some(first.number);
        check_round(&views).expect("RV-1, RV-2");
    }
    assert_debug(&machine.record(now));
}

/// A record is read as it was written.
fn assert_debug(record: &(impl Debug + serde::Serialize)) {
    assert!(!format!("{record:?}").is_empty());
}
