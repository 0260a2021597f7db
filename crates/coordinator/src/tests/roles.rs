//! Roles, and where the ranks find their store.

use ice_proto::rendezvous::{MAX_ROLE_LEN, RanksStore};

use super::*;

/// Returns the first rank of a peer within its role, and the size of the role.
fn of_role(started: &BTreeMap<Peer, Round>, peer: Peer) -> (u32, u32) {
    let you = &started[&peer].assignment;
    (you.first_role_rank, you.role_world_size)
}

#[test]
fn ranks_of_a_role_are_numbered_over_all_nodes() {
    let mut coordinator = new_coordinator();
    let role = |rank, size, role: &str| Hello { role: role.into(), ..hello(Some(rank), 4, size) };
    enter(&mut coordinator, 1, role(3, 4, "trainer"));
    enter(&mut coordinator, 2, role(0, 1, "master"));
    enter(&mut coordinator, 3, role(1, 2, "trainer"));
    let started = rounds(&enter(&mut coordinator, 4, role(2, 3, "reader")));
    assert_eq!([2, 3, 4, 1].map(|peer| of_role(&started, peer)), [(0, 1), (0, 6), (0, 3), (2, 6)]);
}

#[test]
fn role_over_the_limit_is_refused() {
    let mut coordinator = new_coordinator();
    let long = Hello { role: "r".repeat(MAX_ROLE_LEN + 1), ..hello(Some(0), 2, 1) };
    assert!(refusal(&enter(&mut coordinator, 1, long)).contains("--role of 257 bytes"));
    let store = RanksStore { host: "h".repeat(256), port: 1, by_rank: false };
    let long = Hello { ranks_store: Some(store), ..hello(Some(0), 2, 1) };
    assert!(refusal(&enter(&mut coordinator, 2, long)).contains("--local-addr of 256 bytes"));
}

fn with_store(rank: u32, by_rank: bool) -> Hello {
    let store = RanksStore { host: format!("node{rank}"), port: 4000, by_rank };
    Hello { ranks_store: Some(store), ..hello(Some(rank), 2, 1) }
}

#[test]
fn store_of_rank_0_is_on_the_first_node_of_each_round() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, with_store(1, true));
    let started = rounds(&enter(&mut coordinator, 2, with_store(0, true)));
    let stores: Vec<_> = started.values().map(|round| round.ranks_store.clone().unwrap().host).collect();
    assert_eq!(stores, ["node0", "node0"]);
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, with_store(1, true));
    let other = refusal(&enter(&mut coordinator, 2, hello(Some(0), 2, 1)));
    assert!(other.contains("TORCH_DISABLE_SHARE_RDZV_TCP_STORE is not set on host1 and 1 on"), "{other}");
}

#[test]
fn agent_at_the_endpoint_may_name_another_address_for_its_store() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, with_store(1, false));
    let started = rounds(&enter(&mut coordinator, 2, hello(Some(0), 2, 1)));
    assert!(started.values().all(|round| round.ranks_store.as_ref().unwrap().host == "node1"));
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(Some(1), 2, 1));
    let started = rounds(&enter(&mut coordinator, 2, hello(Some(0), 2, 1)));
    assert!(started.values().all(|round| round.ranks_store.is_none()));
}
