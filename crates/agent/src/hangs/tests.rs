use super::*;

const fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A heartbeat: steps, operations and state of a rank.
type Beat = (u64, u64, Doing);

fn beat(watch: &mut HangWatch, now: u64, local_rank: u32, (step, activity, doing): Beat) {
    watch.heartbeat(s(now), local_rank, step, activity, doing);
}

fn steps(count: u64) -> Beat {
    (count, count, Doing::Steps)
}

fn watch(timeout: HangTimeout) -> HangWatch {
    let mut watch = HangWatch::new(timeout, Duration::from_millis(100));
    watch.start(2, 1);
    watch
}

#[test]
fn the_group_hangs_when_its_last_rank_stands_still() {
    let mut watch = watch(HangTimeout::After(s(10)));
    for now in 1..30 {
        beat(&mut watch, now, 0, steps(now.min(5)));
        if now < 8 {
            beat(&mut watch, now, 1, steps(now.min(4)));
        }
        let hang = watch.check(s(now));
        assert_eq!(hang.is_some(), now >= 15, "{now}");
        if let Some(hang) = hang {
            assert_eq!(hang.local_rank, 1);
            assert!(hang.reason.contains("10 s; it is at step 4 of 5, silent for"), "{}", hang.reason);
        }
    }
}

#[test]
fn ranks_that_load_data_or_have_finished_are_not_watched() {
    let mut watch = watch(HangTimeout::Default);
    assert_eq!(watch.standstill(), None, "nothing was heard of them");
    beat(&mut watch, 1, 0, (0, 0, Doing::Alone));
    beat(&mut watch, 1, 1, (0, 0, Doing::Alone));
    assert_eq!(watch.standstill(), None, "before the group is formed");
    beat(&mut watch, 2, 0, steps(1));
    beat(&mut watch, 2, 1, steps(1));
    assert_eq!(watch.standstill(), Some(s(2) + DEFAULT));
    beat(&mut watch, 3, 0, (1, 1, Doing::Resting));
    beat(&mut watch, 3, 1, (1, 1, Doing::Resting));
    assert_eq!(watch.standstill(), None, "paused, or after the end");
    beat(&mut watch, 4, 0, steps(1));
    watch.gone(0);
    assert_eq!(watch.standstill(), None);
}

#[test]
fn ranks_that_wait_for_each_other_before_the_first_step_stand_still() {
    // The group is not formed yet, or a rank waits in a step that the other rank will not do.
    for doing in [Doing::Meeting, Doing::Steps] {
        let mut watch = watch(HangTimeout::After(s(10)));
        for now in 1..30 {
            beat(&mut watch, now, 0, (0, 0, Doing::Meeting));
            beat(&mut watch, now, 1, (0, 3, doing));
            let hang = watch.check(s(now));
            assert_eq!(hang.map(|hang| hang.local_rank), (now >= 11).then_some(0), "{doing:?} {now}");
        }
    }
}

#[test]
fn a_rank_that_left_the_steps_while_others_wait_in_one_is_behind() {
    for nodes in [1, 2] {
        let mut watch = watch(HangTimeout::After(s(10)));
        watch.start(2, nodes);
        for now in 1..30 {
            let left = (now.min(4), now.min(4), if now < 5 { Doing::Steps } else { Doing::Meeting });
            beat(&mut watch, now, 0, left);
            beat(&mut watch, now, 1, steps(now.min(6)));
            let hang = if nodes == 1 { watch.check(s(now)) } else { watch.confirmed(s(now)) };
            assert_eq!(hang.as_ref().map(|hang| hang.local_rank), (now >= 16).then_some(0), "{now}");
            assert!(hang.is_none_or(|hang| hang.reason.contains("at step 4 of 6")));
        }
    }
}

#[test]
fn a_rank_that_is_alone_at_work_is_waited_for() {
    for other in [Doing::Meeting, Doing::Steps] {
        let mut watch = watch(HangTimeout::After(s(10)));
        for now in 1..100 {
            beat(&mut watch, now, 0, (7, 7, Doing::Alone));
            beat(&mut watch, now, 1, (7, 9, other));
            assert_eq!(watch.check(s(now)), None, "{now}");
        }
        // Rank 0 joins the others, and then they all stand still.
        beat(&mut watch, 100, 0, (7, 7, Doing::Meeting));
        beat(&mut watch, 109, 1, (7, 9, other));
        assert_eq!(watch.check(s(109)), None);
        beat(&mut watch, 110, 0, (7, 7, Doing::Meeting));
        assert_eq!(watch.check(s(110)).map(|hang| hang.local_rank), Some(0));
    }
}

/// Returns a watch of one node of two.
fn one_of_two(timeout: HangTimeout) -> HangWatch {
    let mut watch = watch(timeout);
    watch.start(2, 2);
    watch
}

/// Returns the progress of a waiting node whose last rank has done this much.
fn waiting(step: u64, activity: u64) -> Option<NodeProgress> {
    Some(NodeProgress::Waiting(Achieved { step, activity }))
}

#[test]
fn node_of_several_that_waits_says_so_and_hangs_only_once_that_is_confirmed() {
    for doing in [Doing::Meeting, Doing::Steps] {
        let mut watch = one_of_two(HangTimeout::After(s(10)));
        for now in 1..100 {
            beat(&mut watch, now, 0, (7, 9, doing));
            beat(&mut watch, now, 1, (7, 8, Doing::Meeting));
            assert_eq!(watch.check(s(now)), None, "{doing:?} {now}");
            assert_eq!(watch.confirmed(s(now)).map(|hang| hang.local_rank), (now >= 11).then_some(1));
            assert_eq!(watch.deadline().unwrap() > s(now), now != 11, "{doing:?} {now}");
            assert_eq!(watch.news(s(now)), (now == 11).then(|| waiting(7, 8)).flatten(), "{doing:?} {now}");
            assert!(watch.deadline().unwrap() > s(now), "it is not woken for what it has said");
        }
        // The rank of another node that these ranks waited for has finished its work.
        beat(&mut watch, 100, 1, (7, 10, Doing::Steps));
        assert_eq!(watch.confirmed(s(100)), None, "the message has crossed this one");
        assert_eq!(watch.news(s(100)), Some(NodeProgress::Working));
    }
}

#[test]
fn node_whose_ranks_rest_says_so_after_the_timeout() {
    let mut watch = one_of_two(HangTimeout::Default);
    for now in 1..700 {
        beat(&mut watch, now, 0, (7, 9, Doing::Resting));
        beat(&mut watch, now, 1, (7, 9, Doing::Resting));
        let said = (now == 601).then_some(NodeProgress::Resting);
        assert_eq!((watch.news(s(now)), watch.confirmed(s(now))), (said, None), "{now}");
    }
    beat(&mut watch, 700, 0, (7, 10, Doing::Meeting));
    assert_eq!(watch.news(s(700)), Some(NodeProgress::Working));
    for now in 701..1400 {
        beat(&mut watch, now, 0, (7, 10, Doing::Meeting));
        beat(&mut watch, now, 1, (7, 9, Doing::Resting));
        let said = (now == 1300).then(|| waiting(7, 10)).flatten();
        assert_eq!(watch.news(s(now)), said, "one that rests is not behind, {now}");
    }
}

#[test]
fn node_says_nothing_while_it_works_or_alone_or_without_a_timeout() {
    let after = HangTimeout::After(s(10));
    let meets = (7, 9, Doing::Meeting);
    let cases = [
        (after, 2, (7, 8, Doing::Alone), "a rank works alone"),
        (after, 1, (7, 8, Doing::Meeting), "it is the only node"),
        (HangTimeout::Never, 2, (7, 8, Doing::Meeting), "hangs are of no interest"),
    ];
    for (timeout, nodes, other, reason) in cases {
        let mut watch = watch(timeout);
        watch.start(2, nodes);
        for now in 1..100 {
            beat(&mut watch, now, 0, meets);
            beat(&mut watch, now, 1, other);
            assert_eq!(watch.news(s(now)), None, "{reason}");
        }
    }
    let mut watch = one_of_two(after);
    for now in 1..100 {
        beat(&mut watch, now, 0, meets);
        watch.cpu_time(s(now), 1, s(now));
        assert_eq!(watch.news(s(now)), None, "a plain program works");
    }
    watch.start(2, 2);
    for now in 101..200 {
        beat(&mut watch, now, 0, steps(0));
        assert_eq!(watch.news(s(now)), None, "a process that starts is waited for");
    }
}

#[test]
fn a_rank_that_is_silent_hangs_whatever_it_was_doing() {
    let mut watch = watch(HangTimeout::After(s(10)));
    for now in 1..20 {
        beat(&mut watch, now, 0, (7, 0, Doing::Alone));
        if now <= 4 {
            beat(&mut watch, now, 1, (7, 0, Doing::Alone));
        }
        let hang = watch.check(s(now));
        assert_eq!(hang.as_ref().map(|hang| hang.local_rank), (now >= 14).then_some(1), "{now}");
        assert!(hang.is_none_or(|hang| hang.reason.contains("silent for") && hang.since == s(4)));
    }
}

#[test]
fn rank_that_a_debugger_has_stopped_is_not_silent() {
    let mut watch = watch(HangTimeout::After(s(10)));
    beat(&mut watch, 1, 0, (7, 0, Doing::Steps));
    beat(&mut watch, 1, 1, (7, 1, Doing::Steps));
    assert_eq!(watch.check(s(11)).map(|hang| hang.local_rank), Some(0));
    watch.inspected(s(30));
    assert_eq!(watch.check_silence(s(31)), None);
    assert_eq!(watch.check_silence(s(40)).map(|hang| hang.local_rank), Some(0));
}

#[test]
fn a_new_process_that_does_not_begin_is_behind_those_that_did_steps() {
    let mut watch = watch(HangTimeout::After(s(10)));
    beat(&mut watch, 1, 0, (7, 9, Doing::Meeting));
    let hang = watch.check(s(11)).unwrap();
    assert_eq!((hang.local_rank, hang.reason.ends_with("it has not begun")), (1, true), "{}", hang.reason);
    beat(&mut watch, 1, 1, (0, 0, Doing::Alone));
    assert_eq!(watch.check(s(11)).unwrap().local_rank, 1);
    beat(&mut watch, 1, 1, (7, 0, Doing::Resting));
    assert_eq!(watch.check(s(11)).unwrap().local_rank, 0, "one that rests is not");
}

#[test]
fn a_rank_that_works_alone_keeps_the_others_waiting() {
    let mut watch = watch(HangTimeout::After(s(10)));
    for now in 1..100 {
        beat(&mut watch, now, 0, (7, now, Doing::Steps));
        beat(&mut watch, now, 1, (7, 7, Doing::Steps));
        assert_eq!(watch.check(s(now)), None);
    }
}

#[test]
fn node_with_a_silent_rank_acts_by_itself_and_the_others_wait() {
    let after = HangTimeout::After(s(10));
    let (mut here, mut there) = (one_of_two(after), one_of_two(after));
    for now in 1..30 {
        // The first rank of the other node is stopped.
        beat(&mut here, now, 0, steps(now.min(5)));
        beat(&mut here, now, 1, steps(now.min(5)));
        beat(&mut there, now, 1, steps(now.min(5)));
        if now <= 5 {
            beat(&mut there, now, 0, steps(now));
        }
        assert_eq!(there.check(s(now)).map(|hang| hang.local_rank), (now >= 15).then_some(0), "{now}");
        assert_eq!((here.check(s(now)), there.news(s(now))), (None, None), "{now}");
        assert_eq!(here.news(s(now)), (now == 15).then(|| waiting(5, 5)).flatten(), "{now}");
    }
}

#[test]
fn of_a_plain_program_the_cpu_time_tells_if_that_was_asked_for() {
    let plain = watch(HangTimeout::Default);
    assert!(!plain.wants_cpu_times());
    assert_eq!((plain.sampling(), plain.deadline()), (Some(s(60)), None), "for files alone");

    let mut plain = watch(HangTimeout::After(s(10)));
    assert_eq!(plain.sampling(), Some(s(1)));
    for now in 1..=12 {
        // The first rank works for four seconds, the other rank only polls.
        plain.cpu_time(s(now), 0, s(now.min(4)));
        plain.cpu_time(s(now), 1, Duration::from_millis(10 * now));
        assert_eq!(plain.check(s(now)), None);
    }
    plain.cpu_time(s(14), 0, s(4));
    let hang = plain.check(s(14)).unwrap();
    assert_eq!((hang.local_rank, hang.reason.contains("used the CPU for 10 s")), (1, true));
    assert_eq!(watch(HangTimeout::Never).check(s(9999)), None);
}
#[test]
fn a_rank_that_touches_a_file_is_to_go_on_with_that_from_the_first_time() {
    for (timeout, seconds) in [(HangTimeout::After(s(10)), 10), (HangTimeout::Default, 600)] {
        let mut watch = watch(timeout);
        assert_eq!(watch.deadline(), None);
        // The other rank uses the CPU, like a program that spins.
        for now in 1..2000 {
            watch.touched(s(now), 1, s(now.min(5)));
            if watch.wants_cpu_times() {
                watch.cpu_time(s(now), 0, s(now));
                watch.cpu_time(s(now), 1, s(now));
            }
            let hang = watch.check(s(now));
            assert_eq!(hang.is_some(), now >= 5 + seconds, "{now}");
            if let Some(hang) = hang {
                let said = format!("did not touch its heartbeat file for {seconds} s");
                assert!(hang.local_rank == 1 && hang.reason.contains(&said), "{hang:?}");
                break;
            }
        }
    }
    let mut never = watch(HangTimeout::Never);
    never.touched(s(1), 1, s(1));
    assert_eq!((never.sampling(), never.deadline(), never.check(s(9999))), (None, None, None));
}

#[test]
fn a_rank_that_touches_its_file_keeps_those_without_one_waiting() {
    let mut watch = watch(HangTimeout::After(s(10)));
    for now in 1..100 {
        watch.touched(s(now), 0, s(now));
        watch.cpu_time(s(now), 1, s(1));
        assert_eq!(watch.check(s(now)), None, "{now}");
    }
}
