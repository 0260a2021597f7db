use std::collections::BTreeMap;
use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, RestartPolicy, Round, ToAgent, ToCoordinator};
use proptest::prelude::*;

use super::*;

mod elastic;
mod failover;
mod roles;
mod standstill;

const NOW: Duration = Duration::from_secs(1);

const POLICY: RestartPolicy =
    RestartPolicy { max_restarts: 1, window: None, backoff: Duration::from_secs(5), crash_loop: 0 };

fn failed(round: u64, reason: &str) -> ToCoordinator {
    ToCoordinator::Failed { round, reason: reason.into(), uptime: Duration::ZERO, fatal_reason: None }
}

fn hello(node_rank: Option<u32>, nnodes: u32, local_world_size: u32) -> Hello {
    Hello {
        run_id: "job".into(),
        node_rank,
        nnodes: (nnodes, nnodes),
        local_world_size,
        role: "default".into(),
        ranks_store: None,
        restarts: POLICY,
        host: format!("host{local_world_size}"),
        keep_alive: KeepAlive::default(),
        agent_id: 0,
        run_stamp: None,
        last_node_rank: None,
        addresses: Vec::new(),
        pid: 7,
    }
}

fn new_coordinator() -> Coordinator {
    Coordinator::new(Settings {
        run_id: "job".into(),
        join_timeout: Duration::from_secs(600),
        last_call: Duration::from_secs(30),
        run_stamp: "stamp".into(),
    })
}

/// Sends a message of a peer, which is an agent of its own unless its hello says otherwise.
fn send(coordinator: &mut Coordinator, peer: Peer, mut message: ToCoordinator) -> Vec<Action> {
    if let ToCoordinator::Hello(hello) = &mut message
        && hello.agent_id == 0
    {
        hello.agent_id = peer;
    }
    coordinator.handle(NOW, Event::Message(peer, message))
}

fn enter(coordinator: &mut Coordinator, peer: Peer, hello: Hello) -> Vec<Action> {
    let mut actions = send(coordinator, peer, ToCoordinator::Hello(hello));
    actions.extend(send(coordinator, peer, ToCoordinator::Join));
    actions
}

fn rounds(actions: &[Action]) -> BTreeMap<Peer, Round> {
    let round = |action: &Action| match action {
        Action::Send(peer, ToAgent::RoundStarted(round)) => Some((*peer, round.clone())),
        _ => None,
    };
    let rounds: BTreeMap<Peer, Round> = actions.iter().filter_map(round).collect();
    check_round(rounds.values()).unwrap();
    rounds
}

/// Returns the group rank of a peer.
fn group_rank(started: &BTreeMap<Peer, Round>, peer: Peer) -> u32 {
    started[&peer].assignment.group_rank
}

fn refusal(actions: &[Action]) -> String {
    match &actions[0] {
        Action::Send(_, ToAgent::Refused { reason }) => reason.clone(),
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn job_runs_restarts_once_and_closes() {
    let mut coordinator = new_coordinator();
    assert_eq!(enter(&mut coordinator, 1, hello(Some(1), 2, 3)), []);
    let actions = enter(&mut coordinator, 2, hello(Some(0), 2, 2));
    assert_eq!(actions[0], Action::ClearStore);
    let started = rounds(&actions);
    assert_eq!((group_rank(&started, 2), group_rank(&started, 1)), (0, 1));
    assert_eq!(started[&1].assignment.first_rank, 2);

    let failed = |round| failed(round, "rank 3 exited with code 1");
    let broken_reason = send(&mut coordinator, 1, failed(0));
    assert_eq!(broken_reason.len(), 2);
    assert!(
        broken_reason.iter().all(|a| matches!(a, Action::Send(_, ToAgent::RoundBroken { round: 0, .. })))
    );
    assert_eq!(send(&mut coordinator, 2, failed(0)), [], "an old round's failure counts once");
    assert_eq!(send(&mut coordinator, 2, ToCoordinator::Join), []);
    let started = rounds(&send(&mut coordinator, 1, ToCoordinator::Join));
    assert_eq!((started[&1].number, started[&1].restart_count), (1, 1));

    let closed = send(&mut coordinator, 1, failed(1));
    let Action::Send(_, ToAgent::Closed { success: false, reason, .. }) = &closed[0] else {
        panic!("{closed:?}")
    };
    assert!(reason.contains("node 1 (host host3") && reason.contains("code 1"), "{reason}");
    assert!(rounds(&enter(&mut coordinator, 3, hello(None, 2, 1))).is_empty(), "RV-5");
}

#[test]
fn message_names_the_address_next_to_the_host_name() {
    let mut coordinator = new_coordinator();
    // Both hosts have the same name.
    let told = |last: u8| Hello {
        addresses: vec![[10, 0, 0, last].into(), [10, 9, 9, 9].into()],
        ..hello(Some(0), 2, 1)
    };
    enter(&mut coordinator, 1, told(7));
    let reason = refusal(&enter(&mut coordinator, 2, told(8)));
    assert!(reason.contains("on host1 at 10.0.0.7 (pid 7) and on host1 at 10.0.0.8 (pid 7)"), "{reason}");
    enter(&mut coordinator, 3, Hello { node_rank: Some(1), ..told(8) });
    let broken_reason = send(&mut coordinator, 3, failed(0, "exit code 3"));
    let Action::Send(_, ToAgent::RoundBroken { reason, .. }) = &broken_reason[0] else {
        panic!("{broken_reason:?}")
    };
    assert!(reason.contains("node 1 (host host1 at 10.0.0.8, pid 7): exit code 3"), "{reason}");
    // A loopback address is left out.
    let mut coordinator = new_coordinator();
    let here = |rank| Hello { addresses: vec![[127, 0, 0, 1].into()], ..hello(Some(rank), 2, 1) };
    enter(&mut coordinator, 1, here(0));
    let reason = refusal(&enter(&mut coordinator, 2, here(0)));
    assert!(reason.contains("on host1 (pid 7)"), "{reason}");
}

#[test]
fn restart_waits_for_its_backoff() {
    let mut coordinator = new_coordinator();
    let hello = Hello { restarts: RestartPolicy { max_restarts: 9, ..POLICY }, ..hello(None, 1, 1) };
    enter(&mut coordinator, 1, hello);
    send(&mut coordinator, 1, failed(0, "r"));
    assert_eq!(
        rounds(&send(&mut coordinator, 1, ToCoordinator::Join)).len(),
        1,
        "the first restart comes at once"
    );
    let broken_reason = send(&mut coordinator, 1, failed(1, "r"));
    let [Action::Send(1, ToAgent::RoundBroken { reason, .. })] = &broken_reason[..] else {
        panic!("{broken_reason:?}")
    };
    assert!(reason.contains("restart 2 of 9, after a pause of 5 s"), "{reason}");
    assert_eq!(send(&mut coordinator, 1, ToCoordinator::Join), []);
    let due = coordinator.deadline().unwrap();
    assert_eq!(due, NOW + Duration::from_secs(5));
    assert_eq!(coordinator.handle(due - Duration::from_millis(1), Event::Tick), []);
    assert_eq!(rounds(&coordinator.handle(due, Event::Tick)).len(), 1);
}

#[test]
fn job_succeeds_once_all_nodes_finish() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(None, 2, 1));
    enter(&mut coordinator, 2, hello(None, 2, 1));
    assert_eq!(send(&mut coordinator, 1, ToCoordinator::Finished { round: 0 }), []);
    let actions = send(&mut coordinator, 2, ToCoordinator::Finished { round: 0 });
    assert!(actions.iter().all(|a| matches!(a, Action::Send(_, ToAgent::Closed { success: true, .. }))));
    assert_eq!(actions.len(), 2);
}

/// Returns the next coordinator, continued from the record as etcd stores it.
fn successor(coordinator: &Coordinator, now: Duration) -> Coordinator {
    let json = serde_json::to_string(&coordinator.record(now)).unwrap();
    let settings = Settings {
        run_id: "job".into(),
        join_timeout: Duration::from_secs(600),
        last_call: Duration::from_secs(30),
        run_stamp: "another".into(),
    };
    Coordinator::resume(settings, serde_json::from_str(&json).unwrap())
}

/// Hello of a node of a two-node job that had this rank, with this budget of restarts.
fn returning_node(last_node_rank: u32, max_restarts: u32) -> Hello {
    Hello {
        last_node_rank: Some(last_node_rank),
        restarts: RestartPolicy { max_restarts, ..POLICY },
        ..hello(None, 2, 1)
    }
}

/// Hello of a node of an elastic job.
fn elastic(nnodes: (u32, u32)) -> Hello {
    Hello { nnodes, restarts: RestartPolicy { max_restarts: 0, ..POLICY }, ..hello(None, 2, 1) }
}

/// Returns the only reason of all broken rounds in these actions.
fn broken_reason(actions: &[Action]) -> String {
    let reasons = actions.iter().filter_map(|action| match action {
        Action::Send(_, ToAgent::RoundBroken { reason, .. }) => Some(reason.clone()),
        _ => None,
    });
    reasons.reduce(|first, second| if first == second { first } else { panic!("{first}, {second}") }).unwrap()
}

#[test]
fn finished_node_that_disconnects_does_not_end_the_round() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(None, 2, 1));
    enter(&mut coordinator, 2, hello(None, 2, 1));
    send(&mut coordinator, 1, ToCoordinator::Finished { round: 0 });
    assert_eq!(coordinator.handle(NOW, Event::Lost(1)), []);
    let actions = send(&mut coordinator, 2, ToCoordinator::Finished { round: 0 });
    assert!(matches!(&actions[..], [Action::Send(2, ToAgent::Closed { success: true, .. })]), "{actions:?}");
}

#[test]
fn mismatched_nodes_are_refused_with_both_values() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(Some(0), 2, 1));
    let twice = refusal(&enter(&mut coordinator, 2, hello(Some(0), 2, 3)));
    assert!(twice.contains("host1") && twice.contains("host3"), "{twice}");
    let nodes = refusal(&enter(&mut coordinator, 3, hello(Some(1), 4, 1)));
    assert!(nodes.contains("--nnodes is 4") && nodes.contains("and 2"), "{nodes}");
    let other = Hello { run_id: "other".into(), ..hello(Some(1), 2, 1) };
    let other = refusal(&enter(&mut coordinator, 4, other));
    assert!(other.contains("`job`") && other.contains("`other`"), "{other}");
    let rank = refusal(&enter(&mut coordinator, 5, hello(Some(2), 2, 1)));
    assert!(rank.contains("0 to 1"), "{rank}");
    for nonsense in [
        Hello { nnodes: (0, 0), node_rank: Some(0), ..hello(None, 2, 1) },
        Hello { local_world_size: u32::MAX, ..hello(Some(1), 2, 1) },
    ] {
        let nonsense = refusal(&enter(&mut new_coordinator(), 7, nonsense));
        assert!(nonsense.contains("makes no job"), "{nonsense}");
    }
    let stranger = refusal(&send(&mut coordinator, 6, ToCoordinator::Join));
    assert!(stranger.contains("hello"), "{stranger}");
}

#[test]
fn missing_nodes_are_counted_in_the_reason() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(Some(1), 3, 1));
    assert_eq!(coordinator.handle(Duration::from_secs(599), Event::Tick), []);
    let actions = coordinator.handle(Duration::from_secs(600), Event::Tick);
    let [Action::Send(1, ToAgent::Closed { success: false, reason, .. })] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("1 of 3 nodes") && reason.contains("host1"), "{reason}");
    assert!(reason.contains("--node-rank 0, 2"), "{reason}");
}

#[test]
fn nodes_of_a_big_job_join_in_any_order_and_each_receives_its_own_assignment() {
    let (nodes, mut coordinator) = (3000, new_coordinator());
    let hello = |peer: u64| Hello {
        // The last third requests the ranks in reverse order.
        node_rank: (peer > 2000).then(|| nodes - peer as u32),
        local_world_size: 1 + peer as u32 % 3,
        host: format!("host{}", peer / 10),
        ..elastic((2, nodes))
    };
    let mut started = BTreeMap::new();
    for peer in 1..=u64::from(nodes) {
        assert!(started.is_empty(), "before {peer}");
        started = rounds(&enter(&mut coordinator, peer, hello(peer)));
    }
    assert_eq!(started.len(), nodes as usize);
    assert_eq!(
        (group_rank(&started, 3000), group_rank(&started, 2001), group_rank(&started, 1)),
        (0, 999, 1000)
    );
    let ranks = |peers: std::ops::Range<u64>| peers.map(|peer| 1 + peer as u32 % 3).sum::<u32>();
    for (peer, peers) in [(5, 1..10), (1239, 1230..1240), (3000, 3000..3001)] {
        assert_eq!(started[&peer].assignment.ranks_on_host, ranks(peers));
    }
    let sizes: Vec<_> = [started[&1].clone(), Round { nodes: 1, ..started[&2].clone() }]
        .map(|round| ice_proto::frame::encode(&ToAgent::RoundStarted(round)).unwrap().len())
        .into();
    assert!(sizes[0] == sizes[1] && sizes[0] < 200, "{sizes:?}");
    // All nodes but one are lost one by one, and the last one waits.
    let first = coordinator.handle(NOW, Event::Lost(1));
    assert_eq!(first.len(), nodes as usize - 1);
    (2..u64::from(nodes)).for_each(|peer| assert_eq!(coordinator.handle(NOW, Event::Lost(peer)), []));
    assert_eq!(send(&mut coordinator, u64::from(nodes), ToCoordinator::Join), [], "RV-3");
}

#[test]
fn agent_of_another_job_is_refused() {
    let mut coordinator = new_coordinator();
    let other = Hello { run_stamp: Some("another".into()), ..returning_node(1, 9) };
    enter(&mut coordinator, 0, returning_node(0, 9));
    assert!(refusal(&enter(&mut coordinator, 1, other.clone())).contains("start the agent again"), "RV-10");
    // A node that only waited knows the job, too.
    enter(&mut coordinator, 1, returning_node(1, 9));
    let waiting = enter(&mut coordinator, 2, returning_node(1, 9));
    let [Action::Send(2, ToAgent::Waiting { run_stamp, .. })] = &waiting[..] else { panic!("{waiting:?}") };
    assert_eq!(run_stamp, "stamp");
    // It does not receive the end of the other job either.
    (0..2).for_each(|peer| _ = send(&mut coordinator, peer, ToCoordinator::Finished { round: 0 }));
    assert!(coordinator.is_closed());
    assert!(refusal(&enter(&mut coordinator, 3, other)).contains("is gone"));
    let own = Hello { run_stamp: Some("stamp".into()), ..returning_node(1, 9) };
    assert!(matches!(
        &enter(&mut coordinator, 4, own)[0],
        Action::Send(4, ToAgent::Closed { success: true, .. })
    ));
}

fn event() -> impl Strategy<Value = Event> {
    let peer = 1_u64..5;
    let round = 0_u64..4;
    prop_oneof![
        (peer.clone(), 1_u64..5, proptest::option::of(0_u32..3), 1_u32..4).prop_map(
            |(peer, agent_id, rank, local)| {
                Event::Message(peer, ToCoordinator::Hello(Hello { agent_id, ..hello(rank, 2, local) }))
            }
        ),
        peer.clone().prop_map(|peer| Event::Message(peer, ToCoordinator::Join)),
        peer.clone().prop_map(|peer| Event::Message(peer, ToCoordinator::Join)),
        (peer.clone(), round.clone()).prop_map(|(peer, round)| { Event::Message(peer, failed(round, "r")) }),
        (peer.clone(), round)
            .prop_map(|(peer, round)| Event::Message(peer, ToCoordinator::Finished { round })),
        peer.prop_map(Event::Lost),
    ]
}

proptest! {
    #[test]
    fn invariants_hold_for_every_sequence(events in proptest::collection::vec(event(), 0..60)) {
        let mut coordinator = new_coordinator();
        for event in events {
            let closed = coordinator.is_closed();
            let actions = coordinator.handle(NOW, event);
            let started = rounds(&actions);
            if started.is_empty() {
                continue;
            }
            prop_assert!(!closed, "RV-5");
            prop_assert_eq!(started.len(), 2, "RV-3, RV-6");
            let restarts: Vec<_> = started.values().map(|round| round.restart_count).collect();
            prop_assert!(restarts.iter().all(|count| *count <= 1), "RV-4");
        }
    }
}
