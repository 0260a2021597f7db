//! Our client against our server.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::{Duration, Instant};

use ice_proto::rendezvous::KeepAlive;
use ice_rendezvous::store::client::{Client, Error};
use ice_rendezvous::{Server, ServerConfig};

const LIMIT: Duration = Duration::from_secs(20);

async fn host() -> Server {
    let config = ServerConfig {
        addresses: vec![[127, 0, 0, 1].into()],
        port: 0,
        run_id: "job".into(),
        join_timeout: LIMIT,
        last_call: LIMIT,
        keep_alive: KeepAlive::default(),
        token: None,
    };
    Server::bind(config).await.unwrap()
}

fn address(host: &Server) -> String {
    format!("127.0.0.1:{}", host.port())
}

async fn client(host: &Server) -> Client {
    Client::connect(address(host), LIMIT).await.unwrap()
}

#[tokio::test]
async fn every_operation_round_trips() {
    let host = host().await;
    let mut store = client(&host).await;
    store.set("a", b"1").await.unwrap();
    store.append("a", b"2").await.unwrap();
    assert_eq!(store.get("a").await.unwrap(), b"12");
    assert_eq!(store.add("n", 5).await.unwrap(), 5);
    assert_eq!(store.add("n", -7).await.unwrap(), -2);
    assert_eq!(store.compare_set("c", b"", b"x").await.unwrap(), b"x");
    assert_eq!(store.compare_set("c", b"y", b"z").await.unwrap(), b"x");
    assert!(store.check(&["a", "n"]).await.unwrap() && !store.check(&["a", "b"]).await.unwrap());
    store.multi_set(&[("d", b"4"), ("e", b"")]).await.unwrap();
    assert_eq!(store.multi_get(&["e", "d"]).await.unwrap(), [b"".to_vec(), b"4".to_vec()]);
    assert_eq!(store.num_keys().await.unwrap(), 5);
    assert!(store.delete("d").await.unwrap() && !store.delete("d").await.unwrap());
    let mut keys = store.list_keys().await.unwrap();
    keys.sort();
    assert_eq!(keys, [b"/a", b"/c", b"/e", b"/n"]);
    store.queue_push("q", b"first").await.unwrap();
    store.queue_push("q", b"second").await.unwrap();
    assert_eq!(store.queue_len("q").await.unwrap(), 2);
    assert_eq!(store.queue_pop("q").await.unwrap().unwrap(), b"first");
    assert_eq!(store.queue_pop("q").await.unwrap().unwrap(), b"second");
    assert_eq!(store.queue_pop("q").await.unwrap(), None);
    let mut other = client(&host).await;
    let (here, there) = tokio::join!(store.barrier("b", 2), other.barrier("b", 2));
    here.and(there).unwrap();
}

#[tokio::test]
async fn timed_out_wait_leaves_the_client_usable() {
    let host = host().await;
    let limit = Duration::from_millis(50);
    let mut store = Client::connect(address(&host), limit).await.unwrap();
    store.ping().await.unwrap();
    let start = Instant::now();
    let error = store.get("never").await.unwrap_err();
    assert!(matches!(&error, Error::Timeout { .. }) && start.elapsed() >= limit);
    assert!(error.to_string().contains("never"), "{error}");
    assert_eq!(store.add("n", 1).await.unwrap(), 1);
}

#[tokio::test]
async fn client_that_leaves_a_barrier_still_counts() {
    let host = host().await;
    let (mut first, mut second) = (client(&host).await, client(&host).await);
    first.set_limit(Duration::from_millis(50));
    assert!(matches!(first.barrier("b", 2).await.unwrap_err(), Error::Timeout { .. }));
    second.barrier("b", 2).await.unwrap();
    // The answer to the barrier is not mistaken for the answer to another request.
    assert_eq!(first.get("b").await.unwrap(), b"2");
}

#[tokio::test]
async fn errors_name_the_store() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = silent.local_addr().unwrap();
    let limit = Duration::from_millis(100);
    let start = Instant::now();
    let error = Client::connect(address, limit).await.map(drop).unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert!(start.elapsed() < 2 * limit);
}

#[tokio::test]
async fn clients_wait_for_each_other() {
    let host = host().await;
    let (mut first, mut second) = (client(&host).await, client(&host).await);
    let ping = async {
        for round in 0..200 {
            first.set(&format!("ping{round}"), b"").await.unwrap();
            first.wait(&[&format!("pong{round}")]).await.unwrap();
        }
    };
    let pong = async {
        for round in 0..200 {
            second.wait(&[&format!("ping{round}")]).await.unwrap();
            second.set(&format!("pong{round}"), b"").await.unwrap();
        }
    };
    tokio::join!(ping, pong);
}

#[tokio::test]
async fn large_values_pass_and_too_large_ones_are_not_sent() {
    let host = host().await;
    let mut store = client(&host).await;
    let mut value: Vec<u8> = (0..8 << 20).map(|at| (at % 251) as u8).collect();
    store.set("k", &value).await.unwrap();
    assert!(store.get("k").await.unwrap() == value);
    value.push(0);
    let error = store.set("k", &value).await.unwrap_err();
    assert!(error.to_string().contains("8388609 bytes is over"), "{error}");
    assert!(store.set(&"k".repeat(9000), b"").await.is_err());
    assert_eq!(store.num_keys().await.unwrap(), 1);
}

#[tokio::test]
async fn client_that_does_not_read_does_not_block_others() {
    let host = host().await;
    let mut store = client(&host).await;
    store.set("k", &vec![7; 8 << 20]).await.unwrap();
    // A set has no answer; the ping after it has.
    store.ping().await.unwrap();
    // A thousand times 8 MiB are asked for and not taken.
    let mut greedy = tokio::net::TcpStream::connect(("127.0.0.1", host.port())).await.unwrap();
    let get = [&[3][..], &2_u64.to_le_bytes(), b"/k"].concat();
    let requests = [&[0, 0xCE, 0xF7, 0x85, 0x3C][..], &get.repeat(1000)].concat();
    tokio::io::AsyncWriteExt::write_all(&mut greedy, &requests).await.unwrap();
    for number in 1..100 {
        assert_eq!(store.add("n", 1).await.unwrap(), number);
    }
    // The slow reader gets its answers in time, each complete.
    let mut length = [0; 8];
    let mut value = vec![0; 8 << 20];
    for _ in 0..3 {
        tokio::io::AsyncReadExt::read_exact(&mut greedy, &mut length).await.unwrap();
        assert_eq!(u64::from_le_bytes(length), 8 << 20);
        tokio::io::AsyncReadExt::read_exact(&mut greedy, &mut value).await.unwrap();
        assert!(value.iter().all(|byte| *byte == 7));
    }
}

#[tokio::test]
async fn prefix_matches_torchs_prefix_store() {
    let host = host().await;
    let mut plain = client(&host).await;
    let mut inner = client(&host).await.with_prefix("outer").with_prefix("inner");
    inner.set("k", b"v").await.unwrap();
    // PrefixStore("inner", PrefixStore("outer", store)) asks for `outer/inner/k`.
    assert_eq!(plain.list_keys().await.unwrap(), [b"/outer/inner/k"]);
}

#[tokio::test]
async fn large_value_reaches_many_clients_and_repeats_within_one_answer() {
    let host = host().await;
    let mut source = client(&host).await;
    let object: Vec<u8> = (0..8 << 20).map(|number: usize| (number % 251) as u8).collect();
    source.set("object", &object).await.unwrap();
    source.set("small", b"1").await.unwrap();
    // Like ranks that receive one object through the store at once.
    let receive = async || client(&host).await.get("object").await.unwrap();
    let (first, second, third) = tokio::join!(receive(), receive(), receive());
    assert!(first == object && second == object && third == object);
    let values = source.multi_get(&["object", "small", "object", "small"]).await.unwrap();
    assert!(values[0] == object && values[2] == object && values[1] == b"1" && values[3] == b"1");
    source.queue_push("queue", &object).await.unwrap();
    assert!(source.queue_pop("queue").await.unwrap().unwrap() == object);
    assert_eq!(source.compare_set("small", b"2", &object).await.unwrap(), b"1");
    assert!(source.compare_set("small", b"1", &object).await.unwrap() == object);
    source.append("small", &object).await.unwrap();
    assert!(source.get("small").await.unwrap() == [&object[..], &object].concat());
}
