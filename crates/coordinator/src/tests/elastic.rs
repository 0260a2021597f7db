//! Nodes that join, leave and are lost.

use super::*;

#[test]
fn lost_node_ends_a_fixed_size_job_unless_restarts_are_allowed() {
    for (max_restarts, closes) in [(0, true), (1, false)] {
        let mut coordinator = new_coordinator();
        let restarts = RestartPolicy { max_restarts, ..POLICY };
        for (peer, rank) in [(1, 0), (2, 1)] {
            enter(&mut coordinator, peer, Hello { restarts, ..hello(Some(rank), 2, 1) });
        }
        let actions = coordinator.handle(NOW, Event::Lost(2));
        if closes {
            let [Action::Send(1, ToAgent::Closed { success: false, reason, .. })] = &actions[..] else {
                panic!("{actions:?}")
            };
            assert!(reason.contains("lost node 1"), "{reason}");
            continue;
        }
        assert!(broken_reason(&actions).contains("lost node 1"), "{actions:?}");
        assert!(rounds(&send(&mut coordinator, 1, ToCoordinator::Join)).is_empty(), "RV-3");
        let started = rounds(&enter(&mut coordinator, 3, Hello { restarts, ..hello(Some(1), 2, 1) }));
        assert_eq!((group_rank(&started, 3), started[&3].restart_count), (1, 0), "a loss is no failure");
    }
}

#[test]
fn elastic_job_starts_after_the_last_call() {
    let mut coordinator = new_coordinator();
    assert_eq!(enter(&mut coordinator, 1, elastic((2, 4))), []);
    assert_eq!(enter(&mut coordinator, 2, elastic((2, 4))), []);
    let due = coordinator.deadline().unwrap();
    assert_eq!(due, NOW + Duration::from_secs(30));
    assert_eq!(rounds(&coordinator.handle(due, Event::Tick)).len(), 2);
}

#[test]
fn elastic_job_grows_and_shrinks_and_keeps_its_ranks() {
    let mut coordinator = new_coordinator();
    for peer in 1..=3 {
        enter(&mut coordinator, peer, elastic((2, 3)));
    }
    // The node in the middle is lost, and the last one gets its rank.
    let actions = coordinator.handle(NOW, Event::Lost(2));
    assert!(
        broken_reason(&actions).contains("lost node 1") && broken_reason(&actions).contains("with 2 nodes")
    );
    assert_eq!(send(&mut coordinator, 1, ToCoordinator::Join), [], "RV-8");
    let started = rounds(&send(&mut coordinator, 3, ToCoordinator::Join));
    assert_eq!((group_rank(&started, 1), group_rank(&started, 3)), (0, 1), "at once: nobody else is there");
    // Another node joins.
    let actions = enter(&mut coordinator, 4, elastic((2, 3)));
    assert!(broken_reason(&actions).contains("has come"), "{actions:?}");
    send(&mut coordinator, 3, ToCoordinator::Join);
    let started = rounds(&send(&mut coordinator, 1, ToCoordinator::Join));
    assert_eq!((group_rank(&started, 1), group_rank(&started, 3), group_rank(&started, 4)), (0, 1, 2));
    assert_eq!(started[&1].restart_count, 0);
    // A fourth node waits, and gets the rank of the next lost one.
    let waiting = enter(&mut coordinator, 5, elastic((2, 3)));
    assert!(matches!(&waiting[..], [Action::Send(5, ToAgent::Waiting { .. })]), "{waiting:?}");
    coordinator.handle(NOW, Event::Lost(1));
    send(&mut coordinator, 3, ToCoordinator::Join);
    let started = rounds(&send(&mut coordinator, 4, ToCoordinator::Join));
    assert_eq!((group_rank(&started, 5), group_rank(&started, 3), group_rank(&started, 4)), (0, 1, 2));
}

#[test]
fn waiting_node_does_not_displace_a_member_that_still_stops() {
    let mut coordinator = new_coordinator();
    let restarts = RestartPolicy { max_restarts: 9, ..POLICY };
    for peer in 1..=3 {
        enter(&mut coordinator, peer, Hello { restarts, ..hello(None, 2, 1) });
    }
    send(&mut coordinator, 1, failed(0, "r"));
    assert_eq!(send(&mut coordinator, 1, ToCoordinator::Join), [], "RV-8");
    let started = rounds(&send(&mut coordinator, 2, ToCoordinator::Join));
    assert_eq!(started.keys().copied().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn node_of_an_earlier_round_does_not_displace_a_member() {
    let mut coordinator = new_coordinator();
    let hello = |last_node_rank| Hello { nnodes: (2, 2), ..returning_node(last_node_rank, 9) };
    for (peer, last_node_rank) in [(2, 0), (3, 1)] {
        enter(&mut coordinator, peer, hello(last_node_rank));
    }
    // This node connects before the others, and joins after them.
    enter(&mut coordinator, 1, hello(1));
    send(&mut coordinator, 3, failed(0, "r"));
    send(&mut coordinator, 2, ToCoordinator::Join);
    let started = rounds(&send(&mut coordinator, 3, ToCoordinator::Join));
    assert_eq!(started.keys().copied().collect::<Vec<_>>(), [2, 3], "RV-8");
}

#[test]
fn record_of_a_closed_job_counts_its_last_round() {
    let mut coordinator = new_coordinator();
    (0..2).for_each(|last_node_rank| {
        _ = enter(&mut coordinator, last_node_rank.into(), returning_node(last_node_rank, 0))
    });
    let running = coordinator.record(NOW).next_round;
    send(&mut coordinator, 1, failed(0, "r"));
    assert_eq!((running, coordinator.record(NOW).next_round), (1, 1));
}

#[test]
fn node_that_returns_before_its_loss_is_noticed_waits_for_its_rank() {
    let mut coordinator = new_coordinator();
    let restarts = RestartPolicy { max_restarts: 1, ..POLICY };
    for (peer, rank) in [(1, 0), (2, 1)] {
        enter(&mut coordinator, peer, Hello { restarts, ..hello(Some(rank), 2, 1) });
    }
    let waiting = enter(&mut coordinator, 3, Hello { restarts, ..hello(Some(1), 2, 1) });
    assert!(matches!(&waiting[..], [Action::Send(3, ToAgent::Waiting { .. })]), "{waiting:?}");
    coordinator.handle(NOW, Event::Lost(2));
    assert_eq!(rounds(&send(&mut coordinator, 1, ToCoordinator::Join))[&3].assignment.group_rank, 1);
}

#[test]
fn node_is_in_no_round_between_hello_and_join() {
    // A node that was cut off may still stop its ranks; a new one is about to join.
    for last_node_rank in [Some(1), None] {
        let mut coordinator = new_coordinator();
        enter(&mut coordinator, 1, elastic((1, 3)));
        enter(&mut coordinator, 2, elastic((1, 3)));
        coordinator.handle(NOW + Duration::from_secs(30), Event::Tick);
        assert_eq!(
            send(&mut coordinator, 3, ToCoordinator::Hello(Hello { last_node_rank, ..elastic((1, 3)) })),
            []
        );
        assert!(broken_reason(&coordinator.handle(NOW, Event::Lost(2))).contains("lost node 1"));
        assert_eq!(send(&mut coordinator, 1, ToCoordinator::Join), []);
        assert_eq!(rounds(&send(&mut coordinator, 3, ToCoordinator::Join)).len(), 2);
    }
}

#[test]
fn second_connection_of_an_agent_replaces_the_first() {
    // In no round yet, with a requested rank.
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(Some(0), 2, 1));
    let actions = enter(&mut coordinator, 2, Hello { agent_id: 1, ..hello(Some(0), 2, 1) });
    assert_eq!(actions, [Action::Close(1)]);
    assert_eq!(coordinator.handle(NOW, Event::Lost(1)), []);
    let started = rounds(&enter(&mut coordinator, 3, hello(Some(1), 2, 1)));
    assert_eq!((group_rank(&started, 2), group_rank(&started, 3)), (0, 1), "nobody is twice in a round");
    // In a round.
    let actions =
        enter(&mut coordinator, 4, Hello { agent_id: 1, last_node_rank: Some(0), ..hello(Some(0), 2, 1) });
    assert_eq!(actions[0], Action::Close(2));
    assert!(broken_reason(&actions).contains("lost node 0 (host host1, pid 7): its agent has come back"));
    assert_eq!(rounds(&send(&mut coordinator, 3, ToCoordinator::Join)).len(), 2);
    // The hello of the first connection arrives after that of the next one.
    let late = send(&mut coordinator, 1, ToCoordinator::Hello(Hello { agent_id: 1, ..hello(None, 2, 1) }));
    assert_eq!(late, [Action::Close(1)]);
}

#[test]
fn leaving_node_ends_a_fixed_size_job() {
    let leave = || ToCoordinator::Leave { reason: "told to stop".into(), preempted: false };
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(None, 2, 1));
    enter(&mut coordinator, 2, hello(None, 2, 1));
    let actions = send(&mut coordinator, 2, leave());
    assert!(
        matches!(&actions[..], [Action::Close(2), Action::Send(1, ToAgent::Closed { .. })]),
        "{actions:?}"
    );
    let mut coordinator = new_coordinator();
    (1..=3).for_each(|peer| _ = enter(&mut coordinator, peer, elastic((1, 3))));
    assert!(broken_reason(&send(&mut coordinator, 2, leave())).contains("left: told to stop"));
}

#[test]
fn job_that_never_gets_its_preempted_node_back_ends_as_preempted() {
    for (preempted, in_a_round) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut coordinator = new_coordinator();
        (1..=3).for_each(|peer| _ = enter(&mut coordinator, peer, elastic((2, 3))));
        coordinator.handle(NOW, Event::Lost(3));
        if in_a_round {
            (1..=2).for_each(|peer| _ = send(&mut coordinator, peer, ToCoordinator::Join));
            coordinator.handle(NOW + Duration::from_secs(60), Event::Tick);
        }
        let leave = ToCoordinator::Leave { reason: "told to".into(), preempted };
        let actions = send(&mut coordinator, 2, leave);
        assert!(!in_a_round || broken_reason(&actions).contains("waiting for another node"));
        send(&mut coordinator, 1, ToCoordinator::Join);
        // The next coordinator knows it, too.
        let mut next = successor(&coordinator, NOW);
        enter(&mut next, 1, elastic((2, 3)));
        for coordinator in [&mut coordinator, &mut next] {
            let late = coordinator.deadline().unwrap();
            let actions = coordinator.handle(late, Event::Tick);
            let Some(ToAgent::Closed { success: false, preempted: said, .. }) =
                actions.iter().find_map(|action| match action {
                    Action::Send(1, message) => Some(message),
                    _ => None,
                })
            else {
                panic!("{actions:?}")
            };
            assert_eq!(*said, preempted);
        }
    }
}
