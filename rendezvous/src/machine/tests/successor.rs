//! What another coordinator knows of the first one's job, and what each has judged.

use super::*;

#[test]
fn another_coordinator_goes_on_where_the_first_was() {
    let mut machine = coordinator();
    enter(&mut machine, 1, hello(None, 2, 1));
    enter(&mut machine, 2, hello(None, 2, 1));
    say(&mut machine, 1, failed(0, "r"));
    let mut machine = taken_over(&machine, NOW);
    // The nodes come in another order, and keep their places.
    enter(&mut machine, 1, Hello { place: Some(1), ..hello(None, 2, 1) });
    let started = rounds(&enter(&mut machine, 2, Hello { place: Some(0), ..hello(None, 2, 1) }));
    assert_eq!((place(&started, 1), place(&started, 2)), (1, 0));
    assert_eq!((started[&1].number, started[&1].restart_count), (1, 1), "RV-10");
    assert_eq!(started[&1].run_stamp, "stamp", "the job's folders stay");
    // The round that runs has a number, too, and the only restart was used.
    let mut machine = taken_over(&machine, NOW);
    enter(&mut machine, 1, hello(None, 2, 1));
    assert_eq!(rounds(&enter(&mut machine, 2, hello(None, 2, 1)))[&1].number, 2, "RV-10");
    let closed = say(&mut machine, 1, failed(2, "r"));
    assert!(matches!(&closed[0], Action::Send(_, ToAgent::Closed { success: false, .. })), "RV-10");
    let mut machine = taken_over(&machine, NOW);
    assert!(rounds(&enter(&mut machine, 1, hello(None, 1, 1))).is_empty(), "RV-5, RV-10");
}

#[test]
fn what_a_node_has_finished_is_not_done_again_by_another_coordinator() {
    let mut machine = coordinator();
    enter(&mut machine, 1, hello(None, 2, 1));
    enter(&mut machine, 2, hello(None, 2, 1));
    say(&mut machine, 1, ToCoordinator::Finished { round: 0 });
    let mut machine = taken_over(&machine, NOW);
    let actions = say(&mut machine, 2, ToCoordinator::Hello(hello(None, 2, 1)));
    let Action::Send(2, ToAgent::Closed { success: false, reason, .. }) = &actions[0] else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("cannot be done again"), "{reason}");
}

#[test]
fn a_failure_that_the_first_coordinator_did_not_hear_of_counts_once_with_the_next() {
    for max_restarts in [1, 0] {
        let mut machine = coordinator();
        (0..2).for_each(|place| _ = enter(&mut machine, place.into(), back(place, max_restarts)));
        let mut machine = taken_over(&machine, NOW);
        (0..2).for_each(|place| {
            _ = say(&mut machine, place.into(), ToCoordinator::Hello(back(place, max_restarts)))
        });
        let actions = say(&mut machine, 1, failed(0, "exit code 3"));
        if max_restarts == 0 {
            let [Action::Send(0, ToAgent::Closed { success: false, reason, .. }), Action::Send(1, _)] =
                &actions[..]
            else {
                panic!("{actions:?}")
            };
            assert!(reason.contains("node 1") && reason.contains("exit code 3"), "{reason}");
            continue;
        }
        assert_eq!(actions.len(), 2, "{actions:?}");
        assert!(broken(&actions).contains("node 1 (host host1, pid 7): exit code 3; restart 1 of 1"));
        assert_eq!(
            say(&mut machine, 0, failed(0, "exit code 4")),
            [],
            "another node saw it, too, and was told"
        );
        say(&mut machine, 0, ToCoordinator::Join);
        let started = rounds(&say(&mut machine, 1, ToCoordinator::Join));
        assert_eq!((started[&0].number, started[&0].restart_count), (1, 1), "RV-11");
        assert_eq!(say(&mut machine, 0, failed(7, "r")), [], "nobody was in that round");
    }
}

#[test]
fn a_failure_that_was_judged_is_not_judged_by_the_next_coordinator() {
    let mut machine = coordinator();
    (0..2).for_each(|place| _ = enter(&mut machine, place.into(), back(place, 9)));
    let said = broken(&say(&mut machine, 1, failed(0, "r")));
    let mut machine = taken_over(&machine, NOW);
    say(&mut machine, 1, ToCoordinator::Hello(back(1, 9)));
    assert_eq!(broken(&say(&mut machine, 1, failed(0, "r"))), said);
    say(&mut machine, 1, ToCoordinator::Join);
    let started = rounds(&enter(&mut machine, 0, back(0, 9)));
    assert_eq!((started[&0].number, started[&0].restart_count), (1, 1), "RV-11");
    assert_eq!(say(&mut machine, 1, failed(0, "r")), []);
    assert_eq!(machine.record(NOW).restarts.count(), 1, "RV-11");
}

#[test]
fn a_pause_before_a_restart_is_kept_by_the_next_coordinator() {
    let mut machine = coordinator();
    enter(&mut machine, 1, Hello { nnodes: (1, 1), ..back(0, 9) });
    say(&mut machine, 1, failed(0, "r"));
    say(&mut machine, 1, ToCoordinator::Join);
    // Judged before the takeover, or after it.
    let before = taken_over(&machine, NOW);
    say(&mut machine, 1, failed(1, "r"));
    let after = taken_over(&machine, NOW);
    for mut machine in [before, after] {
        say(&mut machine, 1, ToCoordinator::Hello(Hello { nnodes: (1, 1), ..back(0, 9) }));
        assert!(broken(&say(&mut machine, 1, failed(1, "r"))).contains("after a pause of 5 s"));
        assert_eq!(say(&mut machine, 1, ToCoordinator::Join), []);
        assert_eq!(machine.deadline(), Some(NOW + Duration::from_secs(5)));
    }
}

#[test]
fn a_failure_that_was_lost_with_the_connection_counts_once() {
    for heard in [true, false] {
        let mut machine = coordinator();
        (0..2).for_each(|place| _ = enter(&mut machine, place.into(), back(place, 9)));
        if heard {
            say(&mut machine, 1, failed(0, "r"));
        }
        machine.handle(NOW, Event::Lost(1));
        say(&mut machine, 0, ToCoordinator::Join);
        say(&mut machine, 2, ToCoordinator::Hello(back(1, 9)));
        let actions = say(&mut machine, 2, failed(0, "r"));
        assert!(broken(&actions).contains("restart 1 of 9"));
        assert_eq!(actions.len(), if heard { 1 } else { 2 }, "each is told once: {actions:?}");
        let started = rounds(&say(&mut machine, 2, ToCoordinator::Join));
        assert_eq!((started[&2].number, started[&2].restart_count), (1, 1), "RV-11");
    }
}

#[test]
fn a_failure_is_heard_on_the_second_connection_before_the_first_is_missed() {
    let mut machine = coordinator();
    (0..2).for_each(|place| _ = enter(&mut machine, place.into(), back(place, 9)));
    say(&mut machine, 2, ToCoordinator::Hello(back(1, 9)));
    let actions = say(&mut machine, 2, failed(0, "r"));
    assert!(broken(&actions).contains("restart 1 of 9"));
    assert_eq!(actions.len(), 3, "{actions:?}");
    for peer in [0, 2] {
        assert_eq!(say(&mut machine, peer, ToCoordinator::Join), [], "the first one may be a third node");
    }
    assert_eq!(rounds(&machine.handle(NOW, Event::Lost(1)))[&2].restart_count, 1);
}

#[test]
fn a_late_report_of_a_failure_counts_and_leaves_the_round_that_runs() {
    let mut machine = coordinator();
    let hello = |place| Hello { nnodes: (1, 3), ..back(place, 2) };
    (0..3).for_each(|place| _ = enter(&mut machine, place.into(), hello(place)));
    for round in 0..2 {
        machine.handle(NOW, Event::Lost(2 - round));
        let started = (0..2 - round).flat_map(|peer| rounds(&say(&mut machine, peer, ToCoordinator::Join)));
        assert_eq!(started.map(|(_, view)| view.number).max(), Some(round + 1));
    }
    // That of the second round comes first.
    for (peer, place, round, left) in [(3, 1, 1, false), (4, 2, 0, true)] {
        say(&mut machine, peer, ToCoordinator::Hello(hello(place)));
        let actions = say(&mut machine, peer, failed(round, "r"));
        assert_eq!(actions.is_empty(), left, "{actions:?}");
        assert!(actions.iter().all(|action| matches!(action, Action::Send(3, ToAgent::RoundBroken { .. }))));
    }
    say(&mut machine, 3, ToCoordinator::Join);
    say(&mut machine, 4, ToCoordinator::Join);
    let started = rounds(&say(&mut machine, 0, ToCoordinator::Join));
    assert_eq!((started.len(), started[&0].number, started[&0].restart_count), (3, 3, 1), "RV-11");
}
