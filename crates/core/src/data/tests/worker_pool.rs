use std::sync::mpsc;
use std::sync::{Arc, Barrier, Mutex};

use super::within_time;
use crate::data::worker_pool::{INTRA_OP, OrderedWorkerPool, lock};
use crate::{Error, Result};

#[test]
fn la_1_results_come_in_the_order_of_the_jobs_even_where_they_are_done_in_another() {
    within_time(|| {
        // The first job can end only after the second one has.
        let (second_is_done, wait) = mpsc::channel::<()>();
        let (second_is_done, wait) = (Mutex::new(second_is_done), Mutex::new(wait));
        let work = move |job: usize| {
            match job {
                0 => wait.lock().unwrap().recv().unwrap(),
                1 => second_is_done.lock().unwrap().send(()).unwrap(),
                _ => {}
            }
            Ok(job)
        };
        let mut lane = OrderedWorkerPool::new(2, Ok, work).unwrap();
        (0..10).for_each(|job| lane.submit(job));
        assert_eq!((0..10).map(|_| lane.take().unwrap()).collect::<Vec<_>>(), Vec::from_iter(0..10));
    });
}

#[test]
fn la_2_first_halves_run_in_order_and_second_halves_side_by_side() {
    within_time(|| {
        let in_order = || {
            let mut next = 0;
            move |job: usize| {
                assert_eq!(job, next);
                next += 1;
                // Gives other threads time to overtake.
                std::thread::yield_now();
                Ok(job)
            }
        };
        // The barrier opens only when four jobs run at once.
        let together = Barrier::new(4);
        let mut lane = OrderedWorkerPool::new(4, in_order(), move |job| {
            together.wait();
            Ok(job)
        })
        .unwrap();
        (0..400).for_each(|job| lane.submit(job));
        (0..400).for_each(|job| assert_eq!(lane.take().unwrap(), job));
        // Threads overtake each other wherever the lane permits it.
        let mut lane = OrderedWorkerPool::new(4, in_order(), Ok).unwrap();
        (0..20_000).for_each(|job| lane.submit(job));
        (0..20_000).for_each(|job| assert_eq!(lane.take().unwrap(), job));
    });
}

#[test]
fn la_4_an_error_or_a_panic_is_the_result_of_its_own_job() {
    for workers in [0, 1, 4] {
        let first = |job: i32| match job {
            2 => Err(Error::Usage("first".into())),
            3 => panic!("first {job}"),
            _ => Ok(job),
        };
        let second = |job: i32| match job {
            5 => Err(Error::Usage("second".into())),
            6 => panic!("second"),
            _ => Ok(job),
        };
        let mut lane = OrderedWorkerPool::new(workers, first, second).unwrap();
        (0..9).for_each(|job| lane.submit(job));
        let results: Vec<String> = (0..9)
            .map(|_| lane.take().map_or_else(|error| error.to_string(), |job| job.to_string()))
            .collect();
        let expected = ["0", "1", "first", "panicked: first 3", "4", "second", "panicked: second", "7", "8"];
        assert_eq!(results, expected);
        assert!(lane.take().is_err());
    }
}

#[test]
fn la_5_no_thread_is_left_when_a_lane_is_dropped() {
    within_time(|| {
        for workers in [1, 3] {
            let held = Arc::new(());
            let (by_first, by_second) = (Arc::clone(&held), Arc::clone(&held));
            let first = move |job: u32| Ok((job, Arc::clone(&by_first)));
            let second = move |(job, _): (u32, Arc<()>)| Ok((job, Arc::clone(&by_second)));
            let mut lane = OrderedWorkerPool::new(workers, first, second).unwrap();
            (0..20).for_each(|job| lane.submit(job));
            lane.take().unwrap();
            drop(lane);
            assert_eq!(Arc::strong_count(&held), 1);
        }
    });
}

#[test]
fn a_cleared_lane_starts_anew() {
    for workers in [0, 1, 4] {
        let mut lane = OrderedWorkerPool::new(workers, Ok, |job: u32| -> Result<u32> { Ok(job) }).unwrap();
        (0..20).for_each(|job| lane.submit(job));
        assert_eq!(lane.take().unwrap(), 0);
        lane.clear();
        lane.submit(100);
        assert_eq!(lane.take().unwrap(), 100);
    }
}

#[test]
fn workers_compute_on_one_core_each_and_leave_the_number_of_the_step_alone() {
    let before = tch::get_num_threads();
    let mut lane = OrderedWorkerPool::new(3, Ok, |_: ()| Ok(tch::get_num_threads())).unwrap();
    (0..30).for_each(|_| lane.submit(()));
    assert!((0..30).all(|_| lane.take().unwrap() == 1));
    assert_eq!(tch::get_num_threads(), before);
    let _turn = lock(&INTRA_OP);
    assert_eq!(std::thread::spawn(tch::get_num_threads).join().unwrap(), before);
}
