//! RV-12: which node receives a standstill, and when.

use ice_proto::rendezvous::Achieved;
use ice_proto::rendezvous::NodeProgress::{self, Resting, Working};

use super::*;

const NODES: u64 = 3;

const fn waiting(step: u64) -> NodeProgress {
    NodeProgress::Waiting(Achieved { step, activity: 9 - step })
}

/// A coordinator whose first round has three nodes, the peers 0 to 2.
fn running() -> Coordinator {
    let mut coordinator = new_coordinator();
    for peer in 0..NODES {
        enter(&mut coordinator, peer, hello(None, NODES as u32, 1));
    }
    coordinator
}

fn progress(coordinator: &mut Coordinator, peer: Peer, progress: NodeProgress) -> Vec<Action> {
    send(coordinator, peer, ToCoordinator::Progress { round: 0, progress })
}

fn standstill(peer: Peer) -> Vec<Action> {
    vec![Action::Send(peer, ToAgent::Standstill { round: 0 })]
}

#[test]
fn standstill_is_sent_to_the_node_furthest_behind_once_no_node_works() {
    let mut coordinator = running();
    assert_eq!(progress(&mut coordinator, 0, waiting(7)), []);
    assert_eq!(progress(&mut coordinator, 1, waiting(6)), []);
    assert_eq!(progress(&mut coordinator, 0, Working), []);
    assert_eq!(progress(&mut coordinator, 2, waiting(9)), []);
    assert_eq!(progress(&mut coordinator, 0, waiting(8)), standstill(1));
}

#[test]
fn node_that_has_done_less_in_the_same_step_is_behind() {
    let mut coordinator = running();
    for (peer, activity) in [(0, 4), (1, 2)] {
        let word = NodeProgress::Waiting(Achieved { step: 5, activity });
        assert_eq!(progress(&mut coordinator, peer, word), []);
    }
    assert_eq!(progress(&mut coordinator, 2, waiting(6)), standstill(1));
}

#[test]
fn resting_nodes_are_no_standstill_unless_another_node_waits() {
    let mut coordinator = running();
    for peer in 0..NODES {
        assert_eq!(progress(&mut coordinator, peer, Resting), [], "a paused job rests as a whole");
    }
    assert_eq!(progress(&mut coordinator, 2, waiting(1)), standstill(2));
}

#[test]
fn finished_node_is_not_waited_for() {
    let mut coordinator = running();
    assert_eq!(progress(&mut coordinator, 0, waiting(7)), []);
    assert_eq!(progress(&mut coordinator, 2, waiting(7)), []);
    assert_eq!(send(&mut coordinator, 1, ToCoordinator::Finished { round: 0 }), standstill(0));
    assert_eq!(progress(&mut coordinator, 1, Working), [], "a late word of a node that has finished");
}

#[test]
fn progress_in_another_round_or_of_a_stranger_changes_nothing() {
    let mut coordinator = running();
    for peer in 0..NODES {
        let late = ToCoordinator::Progress { round: 1, progress: waiting(0) };
        assert_eq!(send(&mut coordinator, peer, late), []);
    }
    send(&mut coordinator, 9, ToCoordinator::Hello(hello(None, NODES as u32, 1)));
    assert_eq!(progress(&mut coordinator, 9, waiting(0)), []);
    // A new round starts with all nodes working.
    for peer in 0..NODES - 1 {
        progress(&mut coordinator, peer, waiting(0));
    }
    send(&mut coordinator, 0, failed(0, "r"));
    for peer in 0..NODES {
        send(&mut coordinator, peer, ToCoordinator::Join);
    }
    coordinator.handle(NOW + Duration::from_secs(60), Event::Tick);
    let now = |coordinator: &mut Coordinator, peer| {
        send(coordinator, peer, ToCoordinator::Progress { round: 1, progress: waiting(0) })
    };
    assert_eq!((now(&mut coordinator, 2), now(&mut coordinator, 1)), (vec![], vec![]));
    assert_eq!(now(&mut coordinator, 0), [Action::Send(0, ToAgent::Standstill { round: 1 })]);
}

proptest! {
    #[test]
    fn standstill_agrees_with_a_plain_model(words in prop::collection::vec((0..NODES, 0..4_u64, 0..5_u64), 1..60)) {
        let mut coordinator = running();
        let mut model: BTreeMap<Peer, NodeProgress> = (0..NODES).map(|peer| (peer, Working)).collect();
        for (peer, kind, step) in words {
            let word = match kind {
                0 => Working,
                1 => Resting,
                _ => waiting(step),
            };
            model.insert(peer, word);
            let achieved = model.iter().filter_map(|(peer, word)| match word {
                NodeProgress::Waiting(achieved) => Some((*achieved, *peer)),
                _ => None,
            });
            let stands = !model.values().any(|word| *word == Working);
            let expected = achieved.min().filter(|_| stands).map(|(_, peer)| standstill(peer));
            prop_assert_eq!(progress(&mut coordinator, peer, word), expected.unwrap_or_default());
        }
    }
}
