//! Continuation of a job by another coordinator, and verdicts before and after it.

use super::*;

#[test]
fn next_coordinator_continues_from_the_record() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(None, 2, 1));
    enter(&mut coordinator, 2, hello(None, 2, 1));
    send(&mut coordinator, 1, failed(0, "r"));
    let mut coordinator = successor(&coordinator, NOW);
    // The nodes connect in another order, and keep their ranks.
    enter(&mut coordinator, 1, Hello { last_node_rank: Some(1), ..hello(None, 2, 1) });
    let started = rounds(&enter(&mut coordinator, 2, Hello { last_node_rank: Some(0), ..hello(None, 2, 1) }));
    assert_eq!((group_rank(&started, 1), group_rank(&started, 2)), (1, 0));
    assert_eq!((started[&1].number, started[&1].restart_count), (1, 1), "RV-10");
    assert_eq!(started[&1].run_stamp, "stamp", "the job's folders stay");
    // The running round has used its number, and the only restart was used.
    let mut coordinator = successor(&coordinator, NOW);
    enter(&mut coordinator, 1, hello(None, 2, 1));
    assert_eq!(rounds(&enter(&mut coordinator, 2, hello(None, 2, 1)))[&1].number, 2, "RV-10");
    let closed = send(&mut coordinator, 1, failed(2, "r"));
    assert!(matches!(&closed[0], Action::Send(_, ToAgent::Closed { success: false, .. })), "RV-10");
    let mut coordinator = successor(&coordinator, NOW);
    assert!(rounds(&enter(&mut coordinator, 1, hello(None, 1, 1))).is_empty(), "RV-5, RV-10");
}

#[test]
fn finished_work_is_not_repeated_by_the_next_coordinator() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, hello(None, 2, 1));
    enter(&mut coordinator, 2, hello(None, 2, 1));
    send(&mut coordinator, 1, ToCoordinator::Finished { round: 0 });
    let mut coordinator = successor(&coordinator, NOW);
    let actions = send(&mut coordinator, 2, ToCoordinator::Hello(hello(None, 2, 1)));
    let Action::Send(2, ToAgent::Closed { success: false, reason, .. }) = &actions[0] else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("cannot be done again"), "{reason}");
}

#[test]
fn failure_unseen_by_the_first_coordinator_counts_once_with_the_next() {
    for max_restarts in [1, 0] {
        let mut coordinator = new_coordinator();
        (0..2).for_each(|last_node_rank| {
            _ = enter(&mut coordinator, last_node_rank.into(), returning_node(last_node_rank, max_restarts))
        });
        let mut coordinator = successor(&coordinator, NOW);
        (0..2).for_each(|last_node_rank| {
            _ = send(
                &mut coordinator,
                last_node_rank.into(),
                ToCoordinator::Hello(returning_node(last_node_rank, max_restarts)),
            )
        });
        let actions = send(&mut coordinator, 1, failed(0, "exit code 3"));
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
        assert!(broken_reason(&actions).contains("node 1 (host host1, pid 7): exit code 3; restart 1 of 1"));
        assert_eq!(
            send(&mut coordinator, 0, failed(0, "exit code 4")),
            [],
            "another node saw it, too, and was told"
        );
        send(&mut coordinator, 0, ToCoordinator::Join);
        let started = rounds(&send(&mut coordinator, 1, ToCoordinator::Join));
        assert_eq!((started[&0].number, started[&0].restart_count), (1, 1), "RV-11");
        assert_eq!(send(&mut coordinator, 0, failed(7, "r")), [], "nobody was in that round");
    }
}

#[test]
fn judged_failure_is_not_judged_again_by_the_next_coordinator() {
    let mut coordinator = new_coordinator();
    (0..2).for_each(|last_node_rank| {
        _ = enter(&mut coordinator, last_node_rank.into(), returning_node(last_node_rank, 9))
    });
    let said = broken_reason(&send(&mut coordinator, 1, failed(0, "r")));
    let mut coordinator = successor(&coordinator, NOW);
    send(&mut coordinator, 1, ToCoordinator::Hello(returning_node(1, 9)));
    assert_eq!(broken_reason(&send(&mut coordinator, 1, failed(0, "r"))), said);
    send(&mut coordinator, 1, ToCoordinator::Join);
    let started = rounds(&enter(&mut coordinator, 0, returning_node(0, 9)));
    assert_eq!((started[&0].number, started[&0].restart_count), (1, 1), "RV-11");
    assert_eq!(send(&mut coordinator, 1, failed(0, "r")), []);
    assert_eq!(coordinator.record(NOW).restarts.count(), 1, "RV-11");
}

#[test]
fn restart_waits_for_its_backoff_under_the_next_coordinator() {
    let mut coordinator = new_coordinator();
    enter(&mut coordinator, 1, Hello { nnodes: (1, 1), ..returning_node(0, 9) });
    send(&mut coordinator, 1, failed(0, "r"));
    send(&mut coordinator, 1, ToCoordinator::Join);
    // Judged before the change of coordinators, or after it.
    let before = successor(&coordinator, NOW);
    send(&mut coordinator, 1, failed(1, "r"));
    let after = successor(&coordinator, NOW);
    for mut coordinator in [before, after] {
        send(&mut coordinator, 1, ToCoordinator::Hello(Hello { nnodes: (1, 1), ..returning_node(0, 9) }));
        assert!(broken_reason(&send(&mut coordinator, 1, failed(1, "r"))).contains("after a pause of 5 s"));
        assert_eq!(send(&mut coordinator, 1, ToCoordinator::Join), []);
        assert_eq!(coordinator.deadline(), Some(NOW + Duration::from_secs(5)));
    }
}

#[test]
fn failure_lost_with_its_connection_counts_once() {
    for heard in [true, false] {
        let mut coordinator = new_coordinator();
        (0..2).for_each(|last_node_rank| {
            _ = enter(&mut coordinator, last_node_rank.into(), returning_node(last_node_rank, 9))
        });
        if heard {
            send(&mut coordinator, 1, failed(0, "r"));
        }
        coordinator.handle(NOW, Event::Lost(1));
        send(&mut coordinator, 0, ToCoordinator::Join);
        send(&mut coordinator, 2, ToCoordinator::Hello(returning_node(1, 9)));
        let actions = send(&mut coordinator, 2, failed(0, "r"));
        assert!(broken_reason(&actions).contains("restart 1 of 9"));
        assert_eq!(actions.len(), if heard { 1 } else { 2 }, "each is told once: {actions:?}");
        let started = rounds(&send(&mut coordinator, 2, ToCoordinator::Join));
        assert_eq!((started[&2].number, started[&2].restart_count), (1, 1), "RV-11");
    }
}

#[test]
fn failure_on_a_second_connection_counts_before_the_first_is_lost() {
    let mut coordinator = new_coordinator();
    (0..2).for_each(|last_node_rank| {
        _ = enter(&mut coordinator, last_node_rank.into(), returning_node(last_node_rank, 9))
    });
    send(&mut coordinator, 2, ToCoordinator::Hello(returning_node(1, 9)));
    let actions = send(&mut coordinator, 2, failed(0, "r"));
    assert!(broken_reason(&actions).contains("restart 1 of 9"));
    assert_eq!(actions.len(), 3, "{actions:?}");
    for peer in [0, 2] {
        assert_eq!(
            send(&mut coordinator, peer, ToCoordinator::Join),
            [],
            "the first one may be a third node"
        );
    }
    assert_eq!(rounds(&coordinator.handle(NOW, Event::Lost(1)))[&2].restart_count, 1);
}

#[test]
fn late_failure_report_counts_and_the_running_round_continues() {
    let mut coordinator = new_coordinator();
    let hello = |last_node_rank| Hello { nnodes: (1, 3), ..returning_node(last_node_rank, 2) };
    (0..3)
        .for_each(|last_node_rank| _ = enter(&mut coordinator, last_node_rank.into(), hello(last_node_rank)));
    for round in 0..2 {
        coordinator.handle(NOW, Event::Lost(2 - round));
        let started =
            (0..2 - round).flat_map(|peer| rounds(&send(&mut coordinator, peer, ToCoordinator::Join)));
        assert_eq!(started.map(|(_, view)| view.number).max(), Some(round + 1));
    }
    // The failure of the second round is reported first.
    for (peer, last_node_rank, round, left) in [(3, 1, 1, false), (4, 2, 0, true)] {
        send(&mut coordinator, peer, ToCoordinator::Hello(hello(last_node_rank)));
        let actions = send(&mut coordinator, peer, failed(round, "r"));
        assert_eq!(actions.is_empty(), left, "{actions:?}");
        assert!(actions.iter().all(|action| matches!(action, Action::Send(3, ToAgent::RoundBroken { .. }))));
    }
    send(&mut coordinator, 3, ToCoordinator::Join);
    send(&mut coordinator, 4, ToCoordinator::Join);
    let started = rounds(&send(&mut coordinator, 0, ToCoordinator::Join));
    assert_eq!((started.len(), started[&0].number, started[&0].restart_count), (3, 3, 1), "RV-11");
}
