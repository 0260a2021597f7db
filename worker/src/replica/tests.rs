use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use ice_c10d::Store;
use ice_c10d::testing::{TestStoreServer, serve_store};
use ice_proto::frame;
use ice_proto::replica::OwnerHello;

use super::*;

#[test]
fn copies_are_held_on_another_node_where_there_is_one() {
    assert_eq!(assign_buddies(&[0]), [0]);
    assert_eq!(assign_buddies(&[0, 0, 0]), [1, 2, 0]);
    assert_eq!(assign_buddies(&[0, 0, 1, 1]), [2, 3, 0, 1]);
    assert_eq!(assign_buddies(&[0, 1, 1, 1]), [1, 0, 0, 0]);
    // Node ranks are independent of the order of the ranks.
    let nodes = [2, 2, 0, 0, 1];
    for (rank, holder) in assign_buddies(&nodes).into_iter().enumerate() {
        assert_ne!(nodes[rank], nodes[holder], "rank {rank}");
    }
}

fn replica(number: u64, owner: usize, len: usize) -> Arc<ShardReplica> {
    let bytes = (0..len).map(|at| (at * 31 + owner + number as usize) as u8).collect();
    let parts = vec![("about".into(), vec![number as u8]), ("data".into(), bytes)];
    Arc::new(ShardReplica { number, owner, of: 3, step: 10 * number, parts })
}

/// Starts ranks that hold each other's replicas.
fn ranks(count: usize) -> (TestStoreServer, u16, Vec<(ReplicaStore, Replication)>) {
    let (server, port) = serve_store().unwrap();
    let nodes: Vec<u32> = vec![0; count];
    let open = |own: usize| {
        let holders = assign_buddies(&nodes);
        thread::spawn(move || {
            let store = Store::tcp("127.0.0.1", port, Duration::from_secs(60)).unwrap();
            let replicas = ReplicaStore::default();
            let replication = Replication::with_store(&store, None, own, &holders, &replicas).unwrap();
            (replicas, replication)
        })
    };
    let opening: Vec<_> = (0..count).map(open).collect();
    let ranks = opening.into_iter().map(|thread| thread.join().unwrap()).collect();
    (server, port, ranks)
}

fn held(replicas: &ReplicaStore) -> Vec<(u64, usize)> {
    let mut held: Vec<_> = replicas.all().iter().map(|replica| (replica.number, replica.owner)).collect();
    held.sort_unstable();
    held
}

#[test]
fn a_copy_is_with_its_holder_once_that_has_been_waited_for() {
    let (_server, _, ranks) = ranks(3);
    for number in 0..4_u64 {
        let whole = number.checked_sub(1);
        for (rank, (replicas, replication)) in ranks.iter().enumerate() {
            replicas.release(rank, whole);
            let own = replica(number, rank, 3_000_000 + 1000 * number as usize);
            replicas.put(Arc::clone(&own));
            replication.send(own, whole);
        }
        for (rank, (_, replication)) in ranks.iter().enumerate() {
            replication.wait().unwrap();
            let (replicas, _) = &ranks[(rank + 1) % 3];
            let sent = replica(number, rank, 3_000_000 + 1000 * number as usize);
            assert!(replicas.all().contains(&sent), "copy {number} of rank {rank}");
        }
    }
    // The last two replicas, of the rank itself and of the rank before it.
    assert_eq!(held(&ranks[1].0), [(2, 0), (2, 1), (3, 0), (3, 1)]);
    ranks[1].0.keep(Some(2));
    assert_eq!(held(&ranks[1].0), [(2, 0), (2, 1)]);
}

#[test]
fn who_waits_hears_that_the_holder_is_gone() {
    let (_server, _, mut ranks) = ranks(2);
    let (told, hears) = mpsc::channel();
    let (replicas, replication) = ranks.remove(0);
    replication.send(replica(1, 0, 10), None);
    replication.wait().unwrap();
    drop(ranks);
    let waits = thread::spawn(move || {
        replication.send(replica(2, 0, 50_000_000), Some(1));
        told.send(replication.wait()).unwrap();
    });
    let problem = hears.recv_timeout(Duration::from_secs(60)).unwrap().unwrap_err();
    assert!(problem.contains("rank 1 at 127.0.0.1:") && problem.contains("rank 0's copy"), "{problem}");
    waits.join().unwrap();
    assert_eq!(held(&replicas), []);
}

/// Returns the bytes that the server answers before it closes the connection.
fn answer_to(address: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    // Closing with unread input is a reset.
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn strangers_get_nothing_and_ranks_are_served_beside_them() {
    let (_server, port, ranks) = ranks(2);
    let store = Store::tcp("127.0.0.1", port, Duration::from_secs(60)).unwrap();
    let endpoint = String::from_utf8(store.get("copies/1").unwrap()).unwrap();
    let (address, token) = endpoint.split_once(' ').unwrap();
    let idle: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    let hello = |token: [u8; 32], owner| frame::encode(&OwnerHello { token, owner }).unwrap();
    let token: Vec<u8> =
        (0..32).map(|at| u8::from_str_radix(&token[2 * at..2 * at + 2], 16).unwrap()).collect();
    let token: [u8; 32] = token.try_into().unwrap();
    let mut wrong = token;
    wrong[31] ^= 1;
    for bytes in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), hello(wrong, 0), hello(token, 1)] {
        assert!(answer_to(address, &bytes).is_empty(), "{bytes:?}");
    }
    // A rank that sends less than announced, or damaged bytes, leaves no replica.
    let part = |bytes: &[u8]| ice_proto::replica::ReplicaPart {
        name: "data".into(),
        bytes: bytes.len() as u64,
        crc32c: ice_proto::replica::checksum(bytes),
    };
    let announced = |owner| ice_proto::replica::ReplicaHeader {
        number: 9,
        whole: None,
        owner,
        of: 2,
        step: 0,
        parts: vec![part(b"right")],
    };
    for (owner, data) in [(0, b"wrong"), (1, b"right")] {
        let bytes = [hello(token, 0), frame::encode(&announced(owner)).unwrap(), data.to_vec()].concat();
        assert!(answer_to(address, &bytes).is_empty());
    }
    let (replicas, replication) = &ranks[0];
    let own = replica(1, 0, 10);
    replication.send(Arc::clone(&own), None);
    replication.wait().unwrap();
    assert_eq!(ranks[1].0.all(), [own]);
    assert_eq!(held(replicas), []);
    drop(idle);
}
