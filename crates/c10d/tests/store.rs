//! The store client against c10d's own server.

use std::net::TcpListener;
use std::time::Duration;

use ice_c10d::testing::serve_store;
use ice_c10d::{ErrorKind, GlooOptions, ProcessGroup, Store};

const TIMEOUT: Duration = Duration::from_secs(10);

#[test]
fn values_are_shared_between_clients() {
    let (_server, port) = serve_store().unwrap();
    let one = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
    let other = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
    one.set("key", b"va\0lue").unwrap();
    assert_eq!(other.get("key").unwrap(), b"va\0lue");
    one.set("empty", b"").unwrap();
    assert_eq!(other.get("empty").unwrap(), b"");
    assert_eq!(one.add("count", 2).unwrap(), 2);
    assert_eq!(other.clone().add("count", -5).unwrap(), -3);
    assert_eq!(one.compare_set("place", "", "1").unwrap(), b"1");
    assert_eq!(other.compare_set("place", "", "2").unwrap(), b"1", "it is taken");
    assert_eq!(other.compare_set("place", "1", "2").unwrap(), b"2");
    assert!(one.check(&["key", "count"]).unwrap());
    assert!(!one.check(&["key", "nothing"]).unwrap());
    assert!(one.delete("key").unwrap());
    assert!(!other.delete("key").unwrap());
}

#[test]
fn a_prefix_keeps_keys_apart() {
    let (_server, port) = serve_store().unwrap();
    let store = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
    let round = store.with_prefix("round").with_prefix("3");
    round.set("key", b"a").unwrap();
    assert!(!store.check(&["key"]).unwrap());
    assert_eq!(store.get("round/3/key").unwrap(), b"a");
    assert_eq!(round.reconnect().unwrap().get("key").unwrap(), b"a");
}

#[test]
fn waiting_for_a_key_ends_when_it_comes_and_at_the_timeout() {
    let (_server, port) = serve_store().unwrap();
    let store = Store::tcp("127.0.0.1", port, Duration::from_millis(200)).unwrap();
    let setter = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| store.wait(&["soon"], TIMEOUT));
        setter.set("soon", b"1").unwrap();
        waiting.join().unwrap().unwrap();
    });
    let error = store.wait(&["never"], Duration::from_millis(50)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    let error = store.get("never").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
    assert!(!error.to_string().contains("Exception raised from"), "{error}");
}

#[test]
fn a_port_where_nobody_listens_is_a_network_error() {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let error = Store::tcp("127.0.0.1", port, Duration::from_millis(300)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
}

#[test]
fn a_rank_that_never_comes_is_a_timeout() {
    let (_server, port) = serve_store().unwrap();
    let store = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
    let options = GlooOptions {
        timeout: Duration::from_millis(300),
        hostname: Some("127.0.0.1".into()),
        ..GlooOptions::default()
    };
    let error = ProcessGroup::gloo(&store, 0, 2, &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Timeout, "{error}");
}

#[test]
fn a_store_that_is_gone_is_a_network_error() {
    let (server, port) = serve_store().unwrap();
    let store = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
    drop(server);
    let error = store.get("key").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Network, "{error}");
}
