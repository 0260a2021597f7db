use std::collections::BTreeSet;
use std::time::Duration;

use ice_proto::exit::ExitCode;
use ice_proto::rendezvous::{NodeAssignment, Round, ToAgent, ToCoordinator};
use proptest::prelude::*;

use super::*;

const TIMEOUT: Duration = Duration::from_secs(30);
const NOW: Duration = Duration::from_secs(1);

fn started(number: u64) -> Event {
    let assignment = NodeAssignment {
        group_rank: 0,
        first_rank: 0,
        local_world_size: 2,
        ranks_on_host: 2,
        first_role_rank: 0,
        role_world_size: 2,
    };
    let restart_count = number as u32;
    let round = Round {
        number,
        restart_count,
        nodes: 1,
        world_size: 2,
        run_stamp: "s".into(),
        ranks_store: None,
        assignment,
    };
    Event::Coordinator(ToAgent::RoundStarted(round))
}

fn closed(success: bool) -> Event {
    Event::Coordinator(ToAgent::Closed { success, reason: "r".into(), no_restart: None, preempted: false })
}

fn exited(local_rank: u32, exit: Exit) -> Event {
    Event::Exited { local_rank, exit, failed_at: None }
}

fn config() -> GroupConfig {
    let (local_world_size, shutdown_timeout) = (2, TIMEOUT);
    GroupConfig {
        may_restart: true,
        local_world_size,
        shutdown_timeout,
        fatal_exit_codes: BTreeSet::new(),
        reconnect_timeout: None,
        requeue_exit_code: 75,
    }
}

fn agent() -> WorkerGroup {
    let fatal_exit_codes = BTreeSet::from([64]);
    WorkerGroup::new(GroupConfig { fatal_exit_codes, ..config() })
}

/// Returns the ranks and exits of a report, in its order.
fn reported(actions: &[Action]) -> Vec<(u32, Exit)> {
    let report = actions.iter().find_map(|action| match action {
        Action::Report(ends) => Some(ends.iter().map(|end| (end.local_rank, end.exit.clone())).collect()),
        _ => None,
    });
    report.unwrap_or_else(|| panic!("no report in {actions:?}"))
}

#[test]
fn a_good_run_waits_for_the_others() {
    let mut agent = agent();
    assert!(matches!(agent.handle(NOW, started(0))[..], [Action::Spawn(_)]));
    assert_eq!(agent.handle(NOW, exited(0, Exit::Code(0))), []);
    let finished = Action::Send(ToCoordinator::Finished { round: 0 });
    assert_eq!(agent.handle(NOW, exited(1, Exit::Code(0))), [finished]);
    assert_eq!(agent.handle(NOW, closed(true)), [Action::Exit(ExitCode::Success)]);
}

#[test]
fn a_spare_that_was_not_needed_ends_well() {
    let mut agent = agent();
    let waiting = Event::Coordinator(ToAgent::Waiting { run_stamp: "s".into(), reason: "enough".into() });
    assert_eq!(agent.handle(NOW, waiting), [Action::Notify("enough".into())]);
    assert_eq!(agent.handle(NOW, closed(true)), [Action::Exit(ExitCode::Success)]);
}

#[test]
fn a_failed_rank_stops_the_others_and_its_code_passes_through() {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    let actions = agent.handle(NOW + Duration::from_secs(7), exited(1, Exit::Code(3)));
    let [
        Action::Send(ToCoordinator::Failed { round: 0, reason, uptime, fatal_reason: None }),
        Action::RequestStop(StopRequest::Broken(_)),
    ] = &actions[..]
    else {
        panic!("{actions:?}")
    };
    assert!(reason.contains("local rank 1: exit code 3"), "{reason}");
    assert_eq!(uptime.as_secs(), 7);
    assert_eq!(agent.handle(NOW, closed(false)), [], "AG-1");
    let actions = agent.handle(NOW, exited(0, Exit::Signal(15)));
    assert_eq!(reported(&actions), [(1, Exit::Code(3)), (0, Exit::Signal(15))], "AG-5");
    assert_eq!(actions[1], Action::Exit(ExitCode::Rank(3)));
    assert_eq!(agent.handle(NOW, started(1)), [], "AG-3");
}

#[test]
fn the_cause_is_what_failed_first_not_what_ended_first() {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    agent.handle(NOW + Duration::from_secs(9), exited(1, Exit::Code(1)));
    agent.handle(NOW, closed(false));
    let earlier = Event::Exited { local_rank: 0, exit: Exit::Code(5), failed_at: Some(NOW * 2) };
    let actions = agent.handle(NOW + Duration::from_secs(10), earlier);
    assert_eq!(reported(&actions), [(0, Exit::Code(5)), (1, Exit::Code(1))]);
    assert_eq!(actions[1], Action::Exit(ExitCode::Rank(5)));
}

#[test]
fn why_there_is_no_restart_is_said() {
    for exit in [Exit::Code(64), Exit::NotStarted { code: ExitCode::NotFound, reason: "r".into() }] {
        let mut agent = agent();
        agent.handle(NOW, started(0));
        let actions = agent.handle(NOW, exited(1, exit));
        let Action::Send(ToCoordinator::Failed { fatal_reason: Some(why), .. }) = &actions[0] else {
            panic!("{actions:?}")
        };
        let no_restart = Some(why.clone());
        let over = ToAgent::Closed { success: false, reason: "r".into(), no_restart, preempted: false };
        let said = agent.handle(NOW, Event::Coordinator(over));
        assert_eq!(said, [Action::Notify(format!("no restart: {why}"))]);
    }
}

#[test]
fn who_could_have_gone_on_from_memory_is_told_how() {
    for (may_restart, stays) in [(false, true), (true, true), (false, false)] {
        let mut agent = WorkerGroup::new(GroupConfig { may_restart, ..config() });
        agent.handle(NOW, started(0));
        if stays {
            agent.handle(NOW, Event::Survivor(0));
        }
        agent.handle(NOW, exited(1, Exit::Signal(9)));
        let said = agent.handle(NOW, closed(false));
        let is_told = said
            .iter()
            .any(|action| matches!(action, Action::Notify(text) if text.contains("--max-restarts")));
        assert_eq!(is_told, !may_restart && stays, "{said:?}");
    }
}

#[test]
fn a_hang_is_the_cause_of_what_follows() {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    let hang = Event::Hung { local_rank: 1, reason: "no step".into() };
    let actions = agent.handle(NOW, hang.clone());
    assert!(
        matches!(
            &actions[..],
            [
                Action::Notify(_),
                Action::Send(_),
                Action::RequestStop(StopRequest::Broken(_)),
                Action::TerminateRank(1)
            ]
        ),
        "{actions:?}"
    );
    assert_eq!(agent.handle(NOW, hang), [], "once");
    agent.handle(NOW, closed(false));
    agent.handle(NOW, exited(1, Exit::Signal(9)));
    let actions = agent.handle(NOW, exited(0, Exit::Code(1)));
    assert_eq!(reported(&actions), [(1, Exit::Hung("no step".into())), (0, Exit::Code(1))], "AG-5");
    assert_eq!(actions[1], Action::Exit(ExitCode::Failure));
}

fn broken(round: u64, graceful: bool) -> Event {
    Event::Coordinator(ToAgent::RoundBroken { round, reason: "r".into(), graceful })
}

/// Returns an agent whose ranks keep their process when their round ends.
fn staying() -> WorkerGroup {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    for local_rank in 0..2 {
        assert_eq!(agent.handle(NOW, Event::Survivor(local_rank)), []);
    }
    agent
}

fn parked(local_rank: u32, round: u64) -> Event {
    Event::Parked { local_rank, round }
}

#[test]
fn a_rank_that_stays_is_waited_for_until_it_has_left_the_round() {
    let mut agent = staying();
    let actions = agent.handle(NOW, exited(0, Exit::Signal(9)));
    assert!(
        matches!(actions[..], [Action::Send(_), Action::RequestStop(StopRequest::Broken(_))]),
        "{actions:?}"
    );
    assert_eq!(agent.handle(NOW, broken(0, false)), [Action::Notify("r".into())]);
    assert_eq!(agent.handle(NOW, parked(1, 9)), [], "of another round");
    let actions = agent.handle(NOW, parked(1, 0));
    assert!(matches!(actions[..], [Action::Report(_), Action::Send(ToCoordinator::Join)]), "{actions:?}");
    assert!(matches!(agent.handle(NOW, started(1))[..], [Action::Spawn(_)]));
    // The next round fails before the new rank has reported that it will stay.
    assert!(!agent.handle(NOW, exited(0, Exit::Code(1))).is_empty());
    agent.handle(NOW, broken(1, false));
    let actions = agent.handle(NOW, parked(1, 1));
    assert!(matches!(actions[..], [Action::Report(_), Action::Send(ToCoordinator::Join)]), "{actions:?}");
}

#[test]
fn ranks_that_wait_for_a_round_are_told_when_there_is_none() {
    let mut agent = staying();
    agent.handle(NOW, exited(0, Exit::Signal(9)));
    agent.handle(NOW, parked(1, 0));
    let actions = agent.handle(NOW, closed(false));
    assert!(
        matches!(
            actions[..],
            [Action::Notify(_), .., Action::RequestStop(StopRequest::End(_))]
                | [Action::RequestStop(StopRequest::End(_))]
        ),
        "{actions:?}"
    );
    let actions = agent.handle(NOW, exited(1, Exit::Code(0)));
    assert!(matches!(actions[..], [Action::Report(_), Action::Exit(_)]), "{actions:?}");
}

#[test]
fn where_no_rank_is_gone_they_end_the_round_by_themselves_and_take_their_time() {
    let mut agent = staying();
    let actions = agent.handle(NOW, broken(0, true));
    assert_eq!(actions, [Action::Notify("r".into()), Action::RequestStop(StopRequest::Regroup)]);
    assert_eq!(agent.deadline(), None, "a step may be long");
    assert_eq!(agent.handle(NOW, parked(0, 0)), []);
    assert_eq!(agent.handle(NOW, parked(1, 0)), [Action::Send(ToCoordinator::Join)]);

    // A rank that dies while the ranks regroup is a failure like any other.
    let mut agent = staying();
    agent.handle(NOW, broken(0, true));
    let actions = agent.handle(NOW, exited(0, Exit::Signal(9)));
    assert!(
        matches!(
            actions[..],
            [Action::Send(ToCoordinator::Failed { .. }), Action::RequestStop(StopRequest::Broken(_))]
        ),
        "{actions:?}"
    );
    assert!(agent.deadline().is_some());

    // If another node has lost a rank meanwhile, the ranks of this node are asked to leave at once.
    let mut agent = staying();
    agent.handle(NOW, broken(0, true));
    let again = Event::Coordinator(ToAgent::RoundBroken { round: 0, reason: "lost".into(), graceful: false });
    let actions = agent.handle(NOW, again);
    assert!(
        matches!(&actions[..], [Action::Notify(_), Action::RequestStop(StopRequest::Broken(_))]),
        "{actions:?}"
    );
}

#[test]
fn a_group_that_nobody_else_knows_to_be_lost_ends_the_round() {
    let mut agent = staying();
    let lost = |round| Event::RoundLost { local_rank: 1, round, reason: "no route".into() };
    assert_eq!(agent.handle(NOW, lost(7)), []);
    let actions = agent.handle(NOW, lost(0));
    let [
        Action::Notify(_),
        Action::Send(ToCoordinator::Failed { reason, .. }),
        Action::RequestStop(StopRequest::Broken(_)),
    ] = &actions[..]
    else {
        panic!("{actions:?}");
    };
    assert!(reason.contains("local rank 1 has lost the others: no route"), "{reason}");
    assert_eq!(agent.handle(NOW, lost(0)), [], "once");
}

#[test]
fn what_makes_progress_is_no_crash_loop() {
    let uptime = |progress: bool| {
        let mut agent = staying();
        if progress {
            agent.handle(NOW, Event::FirstStep { round: 0 });
        }
        let actions = agent.handle(NOW + Duration::from_secs(1), exited(0, Exit::Signal(9)));
        let [Action::Send(ToCoordinator::Failed { uptime, .. }), ..] = &actions[..] else {
            panic!("{actions:?}")
        };
        *uptime
    };
    assert_eq!(uptime(false), Duration::from_secs(1));
    assert!(uptime(true) > Duration::from_secs(10));
}

#[test]
fn a_restart_waits_for_the_last_rank() {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    agent.handle(NOW, exited(0, Exit::Signal(9)));
    let broken = Event::Coordinator(ToAgent::RoundBroken { round: 0, reason: "r".into(), graceful: false });
    assert_eq!(agent.handle(NOW, broken), [Action::Notify("r".into())]);
    let actions = agent.handle(NOW, exited(1, Exit::Signal(15)));
    assert!(matches!(actions[..], [Action::Report { .. }, Action::Send(ToCoordinator::Join)]), "{actions:?}");
    assert!(matches!(agent.handle(NOW, started(1))[..], [Action::Spawn(_)]));
}

fn stop(signal: i32) -> Event {
    Event::Stop { signal, save: true, together: false, notice: None }
}

#[test]
fn ranks_that_end_together_are_waited_for_before_the_node_leaves() {
    let leaves = |actions: &[Action]| {
        actions.iter().any(|action| matches!(action, Action::Send(ToCoordinator::Leave { .. })))
    };
    let asked = |actions: &[Action]| actions.contains(&Action::RequestStop(StopRequest::End("r".into())));
    let told = || {
        let mut agent = agent();
        agent.handle(NOW, started(0));
        let actions = agent.handle(NOW, Event::Stop { signal: 15, save: true, together: true, notice: None });
        assert!(
            !leaves(&actions) && actions.contains(&Action::RequestStop(StopRequest::Stop(15, true))),
            "{actions:?}"
        );
        agent
    };
    assert_eq!(told().handle(NOW, exited(0, Exit::Code(0))).len(), 1);
    assert!(leaves(&told().handle(NOW, exited(0, Exit::Code(0)))), "AG-8");
    // A failed rank makes the common checkpoint impossible, and so does another node's.
    let actions = told().handle(NOW, exited(0, Exit::Code(3)));
    assert!(
        leaves(&actions) && matches!(actions[1], Action::RequestStop(StopRequest::End(_))),
        "AG-8: {actions:?}"
    );
    let broken =
        || Event::Coordinator(ToAgent::RoundBroken { round: 0, reason: "r".into(), graceful: false });
    let actions = told().handle(NOW, broken());
    assert!(leaves(&actions) && asked(&actions), "AG-8: {actions:?}");
    let actions = told().handle(NOW, Event::CoordinatorLost("r".into()));
    assert!(asked(&actions), "AG-8: {actions:?}");
    let mut agent = told();
    let due = agent.deadline().unwrap();
    assert!(leaves(&agent.handle(due, Event::Tick)), "AG-8");
    assert!(leaves(&told().handle(NOW * 2, stop(2))), "AG-8");
}

#[test]
fn terminate_to_one_rank_stops_all_of_its_node_after_a_checkpoint() {
    let asks = |local_rank| Event::RankTerminated { local_rank, together: true };
    let mut agent = agent();
    agent.handle(NOW, started(0));
    let said = Action::Notify("local rank 1 was told to stop by SIGTERM".into());
    assert_eq!(agent.handle(NOW, asks(1)), [said, Action::RequestStop(StopRequest::Stop(15, true))]);
    // The other ranks of this node, and this agent, may have received SIGTERM, too.
    assert_eq!(agent.handle(NOW, asks(0)), []);
    assert_eq!(agent.handle(NOW, stop(15)), []);
    assert!(agent.handle(NOW * 2, stop(2)).contains(&Action::Kill));
    agent.handle(NOW, exited(0, Exit::Code(0)));
    let actions = agent.handle(NOW, exited(1, Exit::Code(0)));
    assert_eq!(actions, [Action::Exit(ExitCode::Signal(15))]);

    let mut agent = self::agent();
    agent.handle(NOW, started(0));
    agent.handle(NOW, stop(2));
    assert_eq!(agent.handle(NOW * 2, asks(1)), [], "all were told before");
}

#[test]
fn ranks_that_do_not_end_are_asked_then_told_then_killed() {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    let actions = agent.handle(NOW, stop(2));
    assert!(actions.contains(&Action::RequestStop(StopRequest::Stop(2, true))), "{actions:?}");
    let told_at = agent.deadline().unwrap();
    assert!(told_at > NOW && told_at < NOW + TIMEOUT);
    assert_eq!(
        agent.handle(NOW, Event::CoordinatorLost("gone".into())),
        [],
        "the reason to end stays the signal"
    );
    assert_eq!(agent.handle(NOW, Event::Tick), []);
    assert_eq!(agent.handle(told_at, Event::Tick), [Action::Terminate]);
    assert_eq!(agent.deadline(), Some(NOW + TIMEOUT));
    assert_eq!(agent.handle(NOW + TIMEOUT, Event::Tick)[1], Action::Kill, "AG-4");
    agent.handle(NOW, exited(0, Exit::Signal(9)));
    let actions = agent.handle(NOW, exited(1, Exit::Signal(9)));
    assert_eq!(actions, [Action::Exit(ExitCode::Signal(2))]);
}

#[test]
fn interrupt_or_quit_after_any_signal_kills_at_once() {
    for (first, second) in [(2, 2), (15, 2), (1, 2), (2, 3), (15, 3), (3, 3)] {
        let mut agent = agent();
        agent.handle(NOW, started(0));
        assert!(
            agent.handle(NOW, stop(first)).contains(&Action::RequestStop(StopRequest::Stop(first, true)))
        );
        assert_eq!(agent.handle(NOW, stop(second)), [], "an echo");
        assert!(agent.handle(NOW * 2, stop(second)).contains(&Action::Kill), "{first} {second}");
        agent.handle(NOW * 2, exited(0, Exit::Signal(9)));
        let end = agent.handle(NOW * 2, exited(1, Exit::Signal(9)));
        assert_eq!(
            end,
            [Action::Exit(ExitCode::Signal(first.try_into().unwrap()))],
            "the first one is the reason"
        );
    }
}

#[test]
fn repeated_terminate_or_hangup_is_said_and_leaves_the_ranks_their_time() {
    for (first, again, name) in
        [(15, 15, "SIGTERM"), (15, 1, "SIGHUP"), (1, 15, "SIGTERM"), (2, 15, "SIGTERM")]
    {
        let mut agent = agent();
        agent.handle(NOW, started(0));
        agent.handle(NOW, stop(first));
        let due = agent.deadline();
        assert_eq!(agent.handle(NOW, stop(again)), [], "an echo");
        let later = NOW + Duration::from_secs(7);
        let actions = agent.handle(later, stop(again));
        let said = format!(
            "told to stop again by {name}: ranks have 23 s left (--shutdown-timeout), SIGINT kills them at once"
        );
        assert_eq!(actions, [Action::Notify(said)]);
        for ms in [1, 100, 249] {
            assert_eq!(agent.handle(later + Duration::from_millis(ms), stop(again)), [], "not a flood");
        }
        assert_eq!(agent.handle(later + Duration::from_millis(250), stop(again)).len(), 1);
        assert_eq!(agent.deadline(), due);
        assert!(agent.handle(later + Duration::from_millis(251), stop(2)).contains(&Action::Kill));
    }
}

#[test]
fn rank_that_outlives_its_kill_is_given_up_when_the_user_asks_again() {
    for again in [15, 2] {
        let mut agent = agent();
        agent.handle(NOW, started(0));
        agent.handle(NOW, stop(15));
        let killed = NOW + Duration::from_secs(30);
        assert!(agent.handle(killed, Event::Tick).contains(&Action::Kill));
        // The kernel may need a moment to end a killed process.
        let soon = agent.handle(killed + Duration::from_millis(999), stop(again));
        assert!(!soon.contains(&Action::GiveUp), "{soon:?}");
        let actions = agent.handle(killed + Duration::from_secs(1), stop(again));
        assert!(actions.contains(&Action::GiveUp), "{actions:?}");
        assert_eq!(actions.last(), Some(&Action::Exit(ExitCode::Signal(15))));
        assert_eq!(agent.handle(killed + Duration::from_secs(2), stop(again)), []);
    }
}

#[test]
fn who_does_not_wait_for_a_pause_ends_the_ranks_at_once() {
    let mut agent = agent();
    agent.handle(NOW, started(0));
    let actions = agent.handle(NOW, Event::Abort(2));
    assert!(
        matches!(&actions[..], [Action::Notify(_), Action::Kill, Action::Send(ToCoordinator::Leave { .. })]),
        "{actions:?}"
    );
    agent.handle(NOW, exited(0, Exit::Signal(9)));
    let end = agent.handle(NOW, exited(1, Exit::Signal(9)));
    assert_eq!(end, [Action::Exit(ExitCode::Signal(2))], "AG-1");
}

#[test]
fn other_signals_are_passed_on_while_ranks_live() {
    let mut agent = agent();
    assert!(matches!(agent.handle(NOW, Event::Forward(10))[..], [Action::Notify(_)]));
    agent.handle(NOW, started(0));
    assert_eq!(agent.handle(NOW, Event::Forward(10)), [Action::Forward(10)]);
}

#[test]
fn another_coordinator_is_looked_for_and_joined_once_the_ranks_have_ended() {
    let mut agent =
        WorkerGroup::new(GroupConfig { reconnect_timeout: Some(Duration::from_secs(600)), ..config() });
    agent.handle(NOW, started(0));
    let actions = agent.handle(NOW, Event::CoordinatorLost("lost".into()));
    assert!(
        matches!(
            &actions[..],
            [Action::Notify(_), Action::Reconnect, Action::RequestStop(StopRequest::Broken(_))]
        ),
        "{actions:?}"
    );
    agent.handle(NOW, exited(0, Exit::Signal(15)));
    assert_eq!(agent.handle(NOW, exited(1, Exit::Signal(15))), [], "AG-6");
    assert_eq!(agent.handle(NOW, Event::Reconnected), [Action::Send(ToCoordinator::Join)]);
    assert!(matches!(agent.handle(NOW, started(1))[..], [Action::Spawn(_)]));
    // The coordinator is found before the ranks have ended, and then lost while no rank runs.
    agent.handle(NOW, Event::CoordinatorLost("lost".into()));
    assert_eq!(agent.handle(NOW, Event::Reconnected), []);
    agent.handle(NOW, exited(0, Exit::Signal(15)));
    assert_eq!(agent.handle(NOW, exited(1, Exit::Signal(15))), [Action::Send(ToCoordinator::Join)]);
    assert!(matches!(
        agent.handle(NOW, Event::CoordinatorLost("l".into()))[..],
        [Action::Notify(_), Action::Reconnect]
    ));
    let actions = agent.handle(NOW, Event::ReconnectFailed("nobody".into()));
    assert_eq!(actions, [Action::Notify("nobody".into()), Action::Exit(ExitCode::Failure)]);
}

#[test]
fn a_failure_is_reported_until_the_next_round_starts() {
    let lost = || Event::CoordinatorLost("lost".into());
    let broken =
        |round| Event::Coordinator(ToAgent::RoundBroken { round, reason: "r".into(), graceful: false });
    let mut agent =
        WorkerGroup::new(GroupConfig { reconnect_timeout: Some(Duration::from_secs(600)), ..config() });
    agent.handle(NOW, started(0));
    let actions = agent.handle(NOW * 3, exited(0, Exit::Code(3)));
    let report = actions[0].clone();
    assert!(
        matches!(&report, Action::Send(ToCoordinator::Failed { round: 0, uptime, .. }) if *uptime == NOW * 2)
    );
    // A coordinator is found while the other rank ends, and lost before it answers.
    agent.handle(NOW * 4, lost());
    assert_eq!(agent.handle(NOW * 5, Event::Reconnected), std::slice::from_ref(&report), "AG-7");
    agent.handle(NOW, exited(1, Exit::Signal(15)));
    agent.handle(NOW, lost());
    let join = Action::Send(ToCoordinator::Join);
    assert_eq!(agent.handle(NOW, Event::Reconnected), [report.clone(), join.clone()], "AG-7");
    assert_eq!(agent.handle(NOW, broken(0)), [Action::Notify("r".into())]);
    agent.handle(NOW, lost());
    // The round may have ended for another reason, and the report may not have arrived.
    assert_eq!(agent.handle(NOW, Event::Reconnected), [report, join.clone()], "AG-7");
    assert_eq!(agent.handle(NOW, broken(0)), [], "it is said once");
    agent.handle(NOW, started(1));
    // A message about a round that is over does not end the running one.
    assert_eq!(agent.handle(NOW, broken(0)), [Action::Notify("r".into())]);
    assert_eq!(agent.handle(NOW, broken(1))[1], Action::RequestStop(StopRequest::Broken("r".into())));
}

fn event() -> impl Strategy<Value = Event> {
    let exit = prop_oneof![Just(Exit::Code(0)), Just(Exit::Code(3)), Just(Exit::Signal(9))];
    prop_oneof![
        4 => (0_u32..2, exit).prop_map(|(rank, exit)| exited(rank, exit)),
        2 => (0_u64..3).prop_map(started),
        1 => (0_u64..3)
            .prop_map(|round| Event::Coordinator(ToAgent::RoundBroken { round, reason: "r".into(), graceful: false })),
        1 => any::<bool>().prop_map(closed),
        1 => any::<bool>().prop_map(|together| Event::Stop { signal: 15, save: true, together, notice: None }),
        1 => any::<bool>().prop_map(|together| Event::RankTerminated { local_rank: 1, together }),
        1 => Just(Event::Abort(2)),
        1 => (0_u32..2).prop_map(|local_rank| Event::Hung { local_rank, reason: "h".into() }),
        1 => Just(Event::Forward(10)),
        1 => Just(Event::CoordinatorLost("l".into())),
        1 => Just(Event::Reconnected),
        1 => Just(Event::Tick),
    ]
}

proptest! {
    #[test]
    fn invariants_hold_for_every_sequence(
        events in proptest::collection::vec(event(), 0..80), reconnect_timeout in any::<bool>(),
    ) {
        let mut agent = WorkerGroup::new(GroupConfig { reconnect_timeout: reconnect_timeout.then_some(Duration::from_secs(600)), ..config() });
        let mut connected = true;
        let mut alive = BTreeSet::new();
        let mut done = false;
        let (mut asked, mut left) = (false, false);
        for event in events.into_iter().chain([stop(15), exited(0, Exit::Code(0)), exited(1, Exit::Code(0))]) {
            let is_start = matches!(event, Event::Coordinator(ToAgent::RoundStarted(_)));
            match &event {
                Event::CoordinatorLost(_) => connected = false,
                Event::Reconnected => connected = true,
                _ => {}
            }
            if let Event::Exited { local_rank, .. } = &event {
                alive.remove(local_rank);
            }
            for action in agent.handle(NOW, event) {
                prop_assert!(!done, "AG-3");
                match action {
                    Action::RequestStop(StopRequest::Stop(..)) => asked = true,
                    Action::Send(ToCoordinator::Leave { .. }) => left = true,
                    Action::Report(ends) => {
                        let ranks: BTreeSet<_> = ends.iter().map(|end| end.local_rank).collect();
                        prop_assert_eq!((ranks.len(), ends.len()), (2, 2), "AG-5");
                        prop_assert!(!ends[0].exit.is_success(), "AG-5");
                    }
                    Action::Spawn(_) => {
                        prop_assert!(is_start && alive.is_empty(), "AG-1, AG-2");
                        alive = BTreeSet::from([0, 1]);
                    }
                    Action::Send(ToCoordinator::Join) => prop_assert!(alive.is_empty() && connected, "AG-1, AG-6"),
                    Action::Exit(_) => {
                        prop_assert!(alive.is_empty(), "AG-1");
                        done = true;
                    }
                    _ => {}
                }
            }
        }
        prop_assert!(!asked || left, "AG-8");
        prop_assert!(done, "a signal and the end of all ranks always end the agent");
    }
}
