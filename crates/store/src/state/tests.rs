use super::*;

/// The bytes sent to each client.
type Sent = Vec<(Connection, Vec<u8>)>;

fn handle(store: &mut Store, client: Connection, request: Request<'_>) -> Sent {
    let mut replies = Replies::default();
    store.handle(client, request, &mut replies).unwrap();
    let own = (!replies.own.is_empty()).then_some((client, replies.own.to_vec()));
    own.into_iter().chain(replies.woken.into_iter().map(|woken| (woken, vec![READY]))).collect()
}

fn set(store: &mut Store, key: &str, value: &str) -> Sent {
    handle(store, 9, Request::Set(key.as_bytes(), value.as_bytes()))
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&number(bytes.len()), bytes].concat()
}

fn number(number: usize) -> Vec<u8> {
    (number as i64).to_le_bytes().to_vec()
}

#[test]
fn wait_is_answered_once_when_the_last_key_is_set() {
    let mut store = Store::new(MAX_HELD);
    assert_eq!(handle(&mut store, 1, Request::Wait(vec![b"a", b"b"])), []);
    assert_eq!(set(&mut store, "a", "1"), []);
    assert_eq!(set(&mut store, "b", "2"), [(1, vec![READY])]);
    assert_eq!(set(&mut store, "b", "3"), []);
    assert_eq!(handle(&mut store, 1, Request::Wait(vec![b"b"])), [(1, vec![READY])]);
}

#[test]
fn cancelled_or_lost_wait_is_not_answered() {
    let mut store = Store::new(MAX_HELD);
    handle(&mut store, 1, Request::Wait(vec![b"a"]));
    handle(&mut store, 2, Request::Wait(vec![b"a"]));
    assert_eq!(handle(&mut store, 1, Request::CancelWait), [(1, vec![WAIT_CANCELLED])]);
    store.disconnect(2);
    assert_eq!(set(&mut store, "a", "1"), []);
}

#[test]
fn add_counts_in_decimal_text() {
    let mut store = Store::new(MAX_HELD);
    assert_eq!(handle(&mut store, 1, Request::Add(b"n", 5)), [(1, 5_i64.to_le_bytes().to_vec())]);
    assert_eq!(handle(&mut store, 1, Request::Add(b"n", -7)), [(1, (-2_i64).to_le_bytes().to_vec())]);
    assert_eq!(handle(&mut store, 1, Request::Get(b"n")), [(1, text(b"-2"))]);
}

#[test]
fn compare_set_follows_torch() {
    let mut store = Store::new(MAX_HELD);
    let mut compare = |expected: &str, desired: &str| {
        let (expected, desired) = (expected.as_bytes(), desired.as_bytes());
        handle(&mut store, 1, Request::CompareSet { key: b"k", expected, desired })
    };
    assert_eq!(compare("x", "y"), [(1, text(b"x"))]);
    assert_eq!(compare("", "y"), [(1, text(b"y"))]);
    assert_eq!(compare("x", "z"), [(1, text(b"y"))]);
    assert_eq!(compare("y", "z"), [(1, text(b"z"))]);
}

#[test]
fn queue_wakes_one_waiter_per_element() {
    let mut store = Store::new(MAX_HELD);
    handle(&mut store, 1, Request::Wait(vec![b"q"]));
    handle(&mut store, 2, Request::Wait(vec![b"q"]));
    let push = |store: &mut Store| handle(store, 9, Request::QueuePush(b"q", b"v"));
    assert_eq!(push(&mut store), [(1, vec![READY])]);
    let popped = [number(1), text(b"v")].concat();
    assert_eq!(handle(&mut store, 1, Request::QueuePop(b"q")), [(1, popped)]);
    assert_eq!(push(&mut store), [(2, vec![READY])]);
    assert_eq!(handle(&mut store, 3, Request::Check(vec![b"q"])), [(3, vec![READY])]);
}

#[test]
fn queue_serves_waiters_in_order() {
    let mut store = Store::new(MAX_HELD);
    let push = |store: &mut Store| handle(store, 9, Request::QueuePush(b"q", b"v"));
    handle(&mut store, 3, Request::Wait(vec![b"q", b"x"]));
    handle(&mut store, 2, Request::Wait(vec![b"q"]));
    handle(&mut store, 1, Request::Wait(vec![b"q"]));
    assert_eq!(push(&mut store), [(2, vec![READY])]);
    // Again, after the other.
    handle(&mut store, 2, Request::QueuePop(b"q"));
    handle(&mut store, 2, Request::Wait(vec![b"q"]));
    assert_eq!(push(&mut store), [(1, vec![READY])]);
    handle(&mut store, 1, Request::QueuePop(b"q"));
    assert_eq!(push(&mut store), [(2, vec![READY])]);
    assert_eq!(set(&mut store, "x", ""), [(3, vec![READY])]);
    assert!(store.waiters.is_empty() && store.waiting.is_empty());
}

#[test]
fn add_refuses_what_torch_refuses() {
    let mut store = Store::new(MAX_HELD);
    for (value, sum) in
        [("41abc", 42), (" 7", 8), ("\t\n\u{b}\u{c}\r7", 8), ("+5", 6), ("-3", -2), ("0x10", 1)]
    {
        set(&mut store, "n", value);
        let sent = handle(&mut store, 1, Request::Add(b"n", 1));
        assert_eq!(sent, [(1, i64::to_le_bytes(sum).to_vec())], "{value}");
    }
    for value in ["", "abc", "-", "99999999999999999999"] {
        set(&mut store, "n", value);
        let mut replies = Replies::default();
        assert_eq!(store.handle(1, Request::Add(b"n", 1), &mut replies), Err(Refused::NotANumber));
        assert_eq!(handle(&mut store, 1, Request::Get(b"n")), [(1, text(value.as_bytes()))]);
    }
}

#[test]
fn queue_survives_deletion_of_its_key() {
    let mut store = Store::new(MAX_HELD);
    handle(&mut store, 1, Request::QueuePush(b"q", b"v"));
    assert_eq!(handle(&mut store, 1, Request::Delete(b"q")), [(1, number(0))]);
    assert_eq!(handle(&mut store, 1, Request::QueueLen(b"q")), [(1, number(1))]);
}

#[test]
fn barrier_counts_in_a_key() {
    let mut store = Store::new(MAX_HELD);
    let barrier = |store: &mut Store, client| handle(store, client, Request::Barrier(b"b", 2));
    assert_eq!(barrier(&mut store, 1), []);
    assert_eq!(barrier(&mut store, 2), [(2, vec![READY]), (1, vec![READY])]);
    assert_eq!(handle(&mut store, 1, Request::Get(b"b")), [(1, text(b"2"))]);
    assert_eq!(barrier(&mut store, 3), [(3, vec![READY])]);
    handle(&mut store, 1, Request::Delete(b"b"));
    assert_eq!(barrier(&mut store, 1), []);
    assert_eq!(handle(&mut store, 2, Request::Append(b"b", b"0")), [(1, vec![READY])]);
}

#[test]
fn client_that_cancels_a_barrier_gets_no_further_answer() {
    let mut store = Store::new(MAX_HELD);
    handle(&mut store, 1, Request::Barrier(b"b", 3));
    handle(&mut store, 2, Request::Barrier(b"b", 3));
    assert_eq!(handle(&mut store, 1, Request::CancelWait), [(1, vec![WAIT_CANCELLED])]);
    store.disconnect(2);
    assert_eq!(handle(&mut store, 3, Request::Barrier(b"b", 3)), [(3, vec![READY])]);
    handle(&mut store, 1, Request::Delete(b"b"));
    assert_eq!(store.held(), 0);
}

#[test]
fn cleared_store_has_no_keys() {
    let mut store = Store::new(MAX_HELD);
    set(&mut store, "a", "1");
    store.clear();
    assert_eq!(handle(&mut store, 1, Request::NumKeys), [(1, number(0))]);
    assert_eq!(handle(&mut store, 1, Request::Check(vec![b"a"])), [(1, vec![NOT_READY])]);
}

#[test]
fn held_bytes_are_counted_and_released() {
    let mut store = Store::new(MAX_HELD);
    set(&mut store, "a", "1");
    set(&mut store, "a", "12345");
    handle(&mut store, 1, Request::Append(b"a", b"6"));
    handle(&mut store, 1, Request::CompareSet { key: b"b", expected: b"", desired: b"x" });
    handle(&mut store, 1, Request::Add(b"n", 10));
    handle(&mut store, 1, Request::QueuePush(b"q", b"v"));
    handle(&mut store, 1, Request::QueuePush(b"q", b"vv"));
    handle(&mut store, 2, Request::Wait(vec![b"x", b"y", b"y"]));
    handle(&mut store, 3, Request::Wait(vec![b"x"]));
    assert_eq!(store.held(), 3 * ENTRY + 3 + 9 + 2 * (ENTRY + 1) + 3 + 3 * 2 * (ENTRY + 1));
    handle(&mut store, 1, Request::QueuePop(b"q"));
    handle(&mut store, 1, Request::QueuePop(b"q"));
    for key in [b"a", b"b", b"n"] {
        handle(&mut store, 1, Request::Delete(key));
    }
    set(&mut store, "x", "");
    handle(&mut store, 1, Request::Delete(b"x"));
    store.disconnect(2);
    assert_eq!(store.held(), 0);
}

#[test]
fn full_store_refuses_and_keeps_its_values() {
    let mut store = Store::new(128 << 10);
    let value = vec![0; 1 << 10];
    let mut replies = Replies::default();
    let mut full = None;
    for number in 0..200_u8 {
        if let Err(error) = store.handle(1, Request::Set(&[number], &value), &mut replies) {
            full = Some((number, error));
            break;
        }
    }
    let (number, error) = full.unwrap();
    assert_eq!(number, 110);
    assert!(error.to_string().contains("full"), "{error}");
    assert!(store.handle(1, Request::QueuePush(b"q", &value), &mut replies).is_err());
    assert!(store.handle(1, Request::MultiSet(vec![(b"k", &value)]), &mut replies).is_err());
    assert_eq!(handle(&mut store, 1, Request::NumKeys), [(1, 110_i64.to_le_bytes().to_vec())]);
}

const LARGE: usize = 1 << 20;

#[test]
fn large_value_in_many_answers_is_held_once() {
    let mut store = Store::new(MAX_HELD);
    let value = vec![7; LARGE];
    handle(&mut store, 1, Request::Set(b"k", &value));
    let held = store.held();
    let mut replies = Replies::default();
    // A request of a few bytes for 300 MB.
    store.handle(1, Request::MultiGet(vec![b"k"; 300]), &mut replies).unwrap();
    assert_eq!(replies.own.len(), 300 * (8 + LARGE));
    assert_eq!(store.held(), held);
    assert!(replies.own.held() < LARGE, "{}", replies.own.held());
    // A value in a pending answer counts although the store has dropped it.
    handle(&mut store, 2, Request::Delete(b"k"));
    assert_eq!(store.held(), LARGE);
    store.clear();
    assert_eq!(store.held(), LARGE);
    replies.own.clear();
    assert_eq!(store.held(), 0);
}

#[test]
fn clients_that_do_not_read_cannot_make_the_store_hold_more_than_its_limit() {
    let mut store = Store::new(4 * LARGE);
    let value = vec![7; LARGE];
    let mut unread = Vec::new();
    let full = loop {
        let mut replies = Replies::default();
        let set = store.handle(1, Request::Set(b"k", &value), &mut replies);
        if let Err(full) = set.and_then(|()| store.handle(1, Request::Get(b"k"), &mut replies)) {
            break full;
        }
        unread.push(replies);
    };
    assert!(matches!(full, Refused::Full { .. }) && unread.len() == 3, "{full} {}", unread.len());
    unread.clear();
    set(&mut store, "k", "1");
    assert!(store.held() < LARGE);
}

#[test]
fn largest_answers_are_known_before_they_are_built() {
    // The maximum of keys, each with the largest value that is copied.
    let mut store = Store::new(MAX_HELD);
    let value = vec![7; 1023];
    handle(&mut store, 1, Request::Set(b"k", &value));
    let mut replies = Replies::default();
    let keys = crate::codec::MAX_KEYS as usize;
    store.handle(1, Request::MultiGet(vec![b"k"; keys]), &mut replies).unwrap();
    assert!(replies.own.len() <= MAX_ANSWER && replies.own.held() <= MAX_ANSWER);
    replies.own = Answer::default();
    // Keys are copied: enough keys of 8 KiB exceed the limit of the list.
    let name = vec![b'k'; 8 << 10];
    for number in 0..MAX_ANSWER / name.len() + 1 {
        let key = [&name[8..], &number.to_le_bytes()].concat();
        handle(&mut store, 1, Request::Set(&key, b""));
    }
    let refused = store.handle(1, Request::ListKeys, &mut replies);
    assert!(matches!(refused, Err(Refused::AnswerTooLarge(_))), "{refused:?}");
    assert!(replies.own.is_empty() && replies.own.held() == 0);
}

#[test]
fn appended_value_has_a_longest_size() {
    let mut store = Store::new(MAX_HELD);
    let more = vec![7; 8 << 20];
    let mut replies = Replies::default();
    for _ in 0..MAX_APPENDED / more.len() {
        store.handle(1, Request::Append(b"k", &more), &mut replies).unwrap();
    }
    let held = store.held();
    let refused = store.handle(1, Request::Append(b"k", b"1"), &mut replies);
    assert_eq!(refused, Err(Refused::ValueTooLarge(MAX_APPENDED + 1)));
    assert_eq!(store.held(), held);
    assert!(held < MAX_APPENDED + LARGE);
}
