//! Nodes that come, leave and are lost.

use super::*;

#[test]
fn a_lost_node_ends_a_job_of_a_fixed_size_unless_it_may_restart() {
    for (max_restarts, closes) in [(0, true), (1, false)] {
        let mut machine = coordinator();
        let restarts = RestartPolicy { max_restarts, ..POLICY };
        for (peer, rank) in [(1, 0), (2, 1)] {
            enter(&mut machine, peer, Hello { restarts, ..hello(Some(rank), 2, 1) });
        }
        let actions = machine.handle(NOW, Event::Lost(2));
        if closes {
            let [Action::Send(1, ToAgent::Closed { success: false, reason, .. })] = &actions[..] else {
                panic!("{actions:?}")
            };
            assert!(reason.contains("lost node 1"), "{reason}");
            continue;
        }
        assert!(broken(&actions).contains("lost node 1"), "{actions:?}");
        assert!(rounds(&say(&mut machine, 1, ToCoordinator::Join)).is_empty(), "RV-3");
        let started = rounds(&enter(&mut machine, 3, Hello { restarts, ..hello(Some(1), 2, 1) }));
        assert_eq!((place(&started, 3), started[&3].restart_count), (1, 0), "a loss is no failure");
    }
}

#[test]
fn an_elastic_job_starts_after_the_last_call() {
    let mut machine = coordinator();
    assert_eq!(enter(&mut machine, 1, elastic((2, 4))), []);
    assert_eq!(enter(&mut machine, 2, elastic((2, 4))), []);
    let due = machine.deadline().unwrap();
    assert_eq!(due, NOW + Duration::from_secs(30));
    assert_eq!(rounds(&machine.handle(due, Event::Tick)).len(), 2);
}

#[test]
fn an_elastic_job_grows_and_shrinks_and_keeps_its_ranks() {
    let mut machine = coordinator();
    for peer in 1..=3 {
        enter(&mut machine, peer, elastic((2, 3)));
    }
    // The one in the middle goes, and the last one takes its place.
    let actions = machine.handle(NOW, Event::Lost(2));
    assert!(broken(&actions).contains("lost node 1") && broken(&actions).contains("with 2 nodes"));
    assert_eq!(say(&mut machine, 1, ToCoordinator::Join), [], "RV-8");
    let started = rounds(&say(&mut machine, 3, ToCoordinator::Join));
    assert_eq!((place(&started, 1), place(&started, 3)), (0, 1), "at once: nobody else is there");
    // Another one comes.
    let actions = enter(&mut machine, 4, elastic((2, 3)));
    assert!(broken(&actions).contains("has come"), "{actions:?}");
    say(&mut machine, 3, ToCoordinator::Join);
    let started = rounds(&say(&mut machine, 1, ToCoordinator::Join));
    assert_eq!((place(&started, 1), place(&started, 3), place(&started, 4)), (0, 1, 2));
    assert_eq!(started[&1].restart_count, 0);
    // One too many waits, and takes the place of one that goes.
    let waiting = enter(&mut machine, 5, elastic((2, 3)));
    assert!(matches!(&waiting[..], [Action::Send(5, ToAgent::Waiting { .. })]), "{waiting:?}");
    machine.handle(NOW, Event::Lost(1));
    say(&mut machine, 3, ToCoordinator::Join);
    let started = rounds(&say(&mut machine, 4, ToCoordinator::Join));
    assert_eq!((place(&started, 5), place(&started, 3), place(&started, 4)), (0, 1, 2));
}

#[test]
fn a_spare_does_not_push_out_a_member_that_still_stops() {
    let mut machine = coordinator();
    let restarts = RestartPolicy { max_restarts: 9, ..POLICY };
    for peer in 1..=3 {
        enter(&mut machine, peer, Hello { restarts, ..hello(None, 2, 1) });
    }
    say(&mut machine, 1, failed(0, "r"));
    assert_eq!(say(&mut machine, 1, ToCoordinator::Join), [], "RV-8");
    let started = rounds(&say(&mut machine, 2, ToCoordinator::Join));
    assert_eq!(started.keys().copied().collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn a_node_that_was_in_an_earlier_round_does_not_push_out_a_member() {
    let mut machine = coordinator();
    let hello = |place| Hello { nnodes: (2, 2), ..back(place, 9) };
    for (peer, place) in [(2, 0), (3, 1)] {
        enter(&mut machine, peer, hello(place));
    }
    // It has come before the others, and joins after them.
    enter(&mut machine, 1, hello(1));
    say(&mut machine, 3, failed(0, "r"));
    say(&mut machine, 2, ToCoordinator::Join);
    let started = rounds(&say(&mut machine, 3, ToCoordinator::Join));
    assert_eq!(started.keys().copied().collect::<Vec<_>>(), [2, 3], "RV-8");
}

#[test]
fn the_record_of_a_job_that_is_over_counts_its_last_round() {
    let mut machine = coordinator();
    (0..2).for_each(|place| _ = enter(&mut machine, place.into(), back(place, 0)));
    let running = machine.record(NOW).next_round;
    say(&mut machine, 1, failed(0, "r"));
    assert_eq!((running, machine.record(NOW).next_round), (1, 1));
}

#[test]
fn a_node_that_comes_back_before_it_is_missed_waits_for_its_place() {
    let mut machine = coordinator();
    let restarts = RestartPolicy { max_restarts: 1, ..POLICY };
    for (peer, rank) in [(1, 0), (2, 1)] {
        enter(&mut machine, peer, Hello { restarts, ..hello(Some(rank), 2, 1) });
    }
    let waiting = enter(&mut machine, 3, Hello { restarts, ..hello(Some(1), 2, 1) });
    assert!(matches!(&waiting[..], [Action::Send(3, ToAgent::Waiting { .. })]), "{waiting:?}");
    machine.handle(NOW, Event::Lost(2));
    assert_eq!(rounds(&say(&mut machine, 1, ToCoordinator::Join))[&3].you.group_rank, 1);
}

#[test]
fn a_node_that_has_said_hello_is_not_in_a_round_before_it_joins() {
    // One that was cut off still stops its ranks; one that has just come is about to join.
    for place in [Some(1), None] {
        let mut machine = coordinator();
        enter(&mut machine, 1, elastic((1, 3)));
        enter(&mut machine, 2, elastic((1, 3)));
        machine.handle(NOW + Duration::from_secs(30), Event::Tick);
        assert_eq!(say(&mut machine, 3, ToCoordinator::Hello(Hello { place, ..elastic((1, 3)) })), []);
        assert!(broken(&machine.handle(NOW, Event::Lost(2))).contains("lost node 1"));
        assert_eq!(say(&mut machine, 1, ToCoordinator::Join), []);
        assert_eq!(rounds(&say(&mut machine, 3, ToCoordinator::Join)).len(), 2);
    }
}

#[test]
fn an_agent_that_comes_back_before_it_is_missed_takes_the_place_of_its_first_connection() {
    // In no round yet, with a place that it asks for.
    let mut machine = coordinator();
    enter(&mut machine, 1, hello(Some(0), 2, 1));
    let actions = enter(&mut machine, 2, Hello { agent: 1, ..hello(Some(0), 2, 1) });
    assert_eq!(actions, [Action::Close(1)]);
    assert_eq!(machine.handle(NOW, Event::Lost(1)), []);
    let started = rounds(&enter(&mut machine, 3, hello(Some(1), 2, 1)));
    assert_eq!((place(&started, 2), place(&started, 3)), (0, 1), "nobody is twice in a round");
    // In a round.
    let actions = enter(&mut machine, 4, Hello { agent: 1, place: Some(0), ..hello(Some(0), 2, 1) });
    assert_eq!(actions[0], Action::Close(2));
    assert!(broken(&actions).contains("lost node 0 (host host1, pid 7): its agent has come back"));
    assert_eq!(rounds(&say(&mut machine, 3, ToCoordinator::Join)).len(), 2);
    // What it said on the first one comes after what it said on the next one.
    let late = say(&mut machine, 1, ToCoordinator::Hello(Hello { agent: 1, ..hello(None, 2, 1) }));
    assert_eq!(late, [Action::Close(1)]);
}

#[test]
fn a_node_that_leaves_ends_a_job_of_a_fixed_size() {
    let leave = || ToCoordinator::Leave { reason: "told to stop".into(), preempted: false };
    let mut machine = coordinator();
    enter(&mut machine, 1, hello(None, 2, 1));
    enter(&mut machine, 2, hello(None, 2, 1));
    let actions = say(&mut machine, 2, leave());
    assert!(
        matches!(&actions[..], [Action::Close(2), Action::Send(1, ToAgent::Closed { .. })]),
        "{actions:?}"
    );
    let mut machine = coordinator();
    (1..=3).for_each(|peer| _ = enter(&mut machine, peer, elastic((1, 3))));
    assert!(broken(&say(&mut machine, 2, leave())).contains("left: told to stop"));
}

#[test]
fn a_job_that_waits_in_vain_for_a_preempted_node_is_to_be_started_again() {
    for (preempted, in_a_round) in [(true, true), (true, false), (false, true), (false, false)] {
        let mut machine = coordinator();
        (1..=3).for_each(|peer| _ = enter(&mut machine, peer, elastic((2, 3))));
        machine.handle(NOW, Event::Lost(3));
        if in_a_round {
            (1..=2).for_each(|peer| _ = say(&mut machine, peer, ToCoordinator::Join));
            machine.handle(NOW + Duration::from_secs(60), Event::Tick);
        }
        let leave = ToCoordinator::Leave { reason: "told to".into(), preempted };
        let actions = say(&mut machine, 2, leave);
        assert!(!in_a_round || broken(&actions).contains("waiting for another node"));
        say(&mut machine, 1, ToCoordinator::Join);
        // Another coordinator knows it, too.
        let mut next = taken_over(&machine, NOW);
        enter(&mut next, 1, elastic((2, 3)));
        for machine in [&mut machine, &mut next] {
            let late = machine.deadline().unwrap();
            let actions = machine.handle(late, Event::Tick);
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
