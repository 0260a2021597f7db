use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};

use proptest::prelude::*;
use tch::Device;

use super::{LONG, seat, within_time};
use crate::data::{BatchLoader, BatchSize, Dataset, Pass, PrefetchOptions, Sampler};
use crate::{BatchShare, Error, Result};

/// A batch is the indices of its samples, each with a random number.
struct Numbers(usize);

impl Dataset for Numbers {
    type Batch = Vec<(i64, u64)>;

    fn len(&self) -> usize {
        self.0
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Self::Batch> {
        self.batch_in(&Pass::new(0, 0), indices, device)
    }

    fn batch_in(&self, pass: &Pass, indices: &[i64], _: Device) -> Result<Self::Batch> {
        Ok(indices.iter().map(|&index| (index, pass.rng(index as u64).next_u64())).collect())
    }
}

#[derive(Debug, Clone, Copy)]
struct Setting {
    samples: usize,
    global: u64,
    drop_last: bool,
    iterations: Option<u64>,
    ahead: PrefetchOptions,
}

impl Setting {
    fn feeds(self, world_size: u64) -> Vec<BatchLoader<Numbers>> {
        let feed = |rank| {
            let mut sampler = Sampler::new(self.samples as u64, self.global, Some(5), self.drop_last);
            if let Some(iterations) = self.iterations {
                sampler = sampler.batches_per_epoch(iterations);
            }
            BatchLoader::new(
                Arc::new(Numbers(self.samples)),
                sampler,
                5,
                self.ahead,
                seat(rank, world_size),
                1,
            )
            .unwrap()
        };
        (0..world_size).map(feed).collect()
    }
}

/// Executes a step: returns the next samples of all ranks, those of rank 0 first.
fn step(feeds: &mut [BatchLoader<Numbers>]) -> Vec<(i64, u64)> {
    let mut samples = Vec::new();
    for feed in feeds.iter_mut() {
        let (batch, BatchShare { here, .. }) = feed.next().unwrap();
        assert_eq!(batch.len() as u64, here.max(1));
        samples.extend(&batch[..here as usize]);
        feed.advance();
    }
    samples
}

/// Executes the steps of `epochs` epochs.
fn epochs(feeds: &mut [BatchLoader<Numbers>], epochs: usize) -> Vec<Vec<(i64, u64)>> {
    let mut steps = Vec::new();
    for _ in 0..epochs {
        while feeds[0].sampler().remaining() > 0 {
            steps.push(step(feeds));
        }
        feeds.iter_mut().for_each(|feed| feed.next_epoch());
    }
    steps
}

const INLINE: PrefetchOptions = PrefetchOptions { workers: 0, prefetch: None };

#[test]
fn batches_and_their_random_numbers_depend_on_neither_workers_nor_prefetch_nor_ranks() {
    for (drop_last, iterations) in [(false, None), (true, None), (false, Some(4)), (true, Some(9))] {
        let setting = |ahead| Setting { samples: 47, global: 7, drop_last, iterations, ahead };
        let expected = epochs(&mut setting(INLINE).feeds(1), 3);
        for (workers, prefetch) in
            [(0, None), (1, None), (1, Some(0)), (4, None), (4, Some(1)), (4, Some(50))]
        {
            for world_size in [1, 2, 3] {
                let seen = epochs(&mut setting(PrefetchOptions { workers, prefetch }).feeds(world_size), 3);
                assert_eq!(seen, expected, "{workers} workers, {prefetch:?} ahead, {world_size} ranks");
            }
        }
        if iterations.is_none() {
            let per_epoch = expected.len() / 3;
            let mut first: Vec<_> =
                expected[..per_epoch].concat().into_iter().map(|(index, _)| index).collect();
            let mut random: Vec<_> = expected.concat().into_iter().map(|(_, random)| random).collect();
            first.sort_unstable();
            first.dedup();
            random.sort_unstable();
            random.dedup();
            assert_eq!((first.len(), random.len()), if drop_last { (42, 126) } else { (47, 141) });
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_feed_resumed_anywhere_goes_on_with_the_next_batch(
        stop in 0_usize..20, worlds in (1_u64..4, 1_u64..4), workers in (0_usize..4, 0_usize..4),
        prefetch in proptest::option::of(0_usize..6), iterations in proptest::option::of(1_u64..9),
    ) {
        let setting = |workers| {
            let ahead = PrefetchOptions { workers, prefetch };
            Setting { samples: 23, global: 4, drop_last: false, iterations, ahead }
        };
        let next_of = |feeds: &mut [BatchLoader<Numbers>]| {
            if feeds[0].sampler().remaining() == 0 {
                feeds.iter_mut().for_each(|feed| feed.next_epoch());
            }
            step(feeds)
        };
        let mut whole = setting(workers.0).feeds(worlds.0);
        for _ in 0..stop {
            next_of(&mut whole);
        }
        let mut resumed = setting(workers.1).feeds(worlds.1);
        // Batches made before a checkpoint is loaded must be discarded.
        next_of(&mut resumed);
        let place = whole[0].sampler().place();
        resumed.iter_mut().for_each(|feed| feed.seek(place));
        for _ in 0..8 {
            prop_assert_eq!(next_of(&mut resumed), next_of(&mut whole));
        }
    }
}

#[test]
fn a_step_that_is_made_again_gets_the_same_batch() {
    let setting = Setting {
        samples: 20,
        global: 4,
        drop_last: false,
        iterations: None,
        ahead: PrefetchOptions { workers: 2, prefetch: Some(3) },
    };
    let feed = &mut setting.feeds(1)[0];
    let first = feed.next().unwrap();
    assert_eq!(feed.next().unwrap(), first);
    feed.advance();
    assert_ne!(feed.next().unwrap(), first);
}

#[test]
fn after_the_last_batch_there_is_an_error_and_no_empty_batch() {
    let setting = Setting { samples: 4, global: 4, drop_last: false, iterations: None, ahead: INLINE };
    let mut feeds = setting.feeds(1);
    step(&mut feeds);
    let message = feeds[0].next().unwrap_err().to_string();
    assert!(message.contains("after the last"), "{message}");
}

#[test]
fn a_batch_size_in_total_is_divided_unevenly() {
    let setting = Setting {
        samples: 11,
        global: BatchSize::InTotal(5).global(3).unwrap(),
        drop_last: false,
        iterations: None,
        ahead: INLINE,
    };
    let mut feeds = setting.feeds(3);
    let mut shares = Vec::new();
    for _ in 0..3 {
        for feed in &mut feeds {
            let BatchShare { here, total } = feed.next().unwrap().1;
            shares.push((here, total));
            feed.advance();
        }
    }
    assert_eq!(shares, [(2, 5), (2, 5), (1, 5), (2, 5), (2, 5), (1, 5), (1, 1), (0, 1), (0, 1)]);
    assert_eq!(BatchSize::PerRank(5).global(3).unwrap(), 15);
    assert!(BatchSize::InTotal(0).global(3).is_err() && BatchSize::PerRank(0).global(3).is_err());
}

/// Counts the batches that were begun, and compares them with the batches asked for.
#[derive(Default)]
struct Counted {
    begun: Mutex<usize>,
    more: Condvar,
    wanted: AtomicUsize,
    most_ahead: AtomicUsize,
}

impl Dataset for Arc<Counted> {
    type Batch = ();

    fn len(&self) -> usize {
        100
    }

    fn batch(&self, _: &[i64], _: Device) -> Result<()> {
        let mut begun = self.begun.lock().unwrap();
        *begun += 1;
        let ahead = begun.saturating_sub(self.wanted.load(Ordering::SeqCst));
        self.most_ahead.fetch_max(ahead, Ordering::SeqCst);
        self.more.notify_all();
        Ok(())
    }
}

#[test]
fn la_3_as_many_batches_as_asked_for_are_made_ahead_and_never_more() {
    for (workers, prefetch, bound) in [(1, Some(0), 0), (1, Some(3), 3), (4, Some(2), 2), (3, None, 6)] {
        let counted = Arc::new(Counted::default());
        let sampler = Sampler::new(100, 1, None, false);
        let ahead = PrefetchOptions { workers, prefetch };
        let mut feed =
            BatchLoader::new(Arc::new(Arc::clone(&counted)), sampler, 0, ahead, seat(0, 1), 1).unwrap();
        for step in 1..=100 {
            counted.wanted.store(step, Ordering::SeqCst);
            feed.next().unwrap();
            feed.advance();
            // While the step computes, all permitted batches are made ahead.
            let due = (step + bound).min(100);
            let begun = counted.begun.lock().unwrap();
            let (begun, timeout) =
                counted.more.wait_timeout_while(begun, LONG, |begun| *begun < due).unwrap();
            assert!(!timeout.timed_out(), "{} of {due} batches were begun", *begun);
        }
        assert_eq!(counted.most_ahead.load(Ordering::SeqCst), bound, "{workers} workers");
        assert_eq!(*counted.begun.lock().unwrap(), 100);
    }
}

/// Reports when a batch is begun, and continues until the batch is no longer needed.
struct Endless(Mutex<mpsc::Sender<()>>);

impl Dataset for Endless {
    type Batch = ();

    fn len(&self) -> usize {
        100
    }

    fn batch(&self, _: &[i64], _: Device) -> Result<()> {
        unreachable!("the node calls the other one")
    }

    fn batch_in(&self, pass: &Pass, indices: &[i64], _: Device) -> Result<()> {
        if indices == [0] {
            return Ok(());
        }
        self.0.lock().unwrap().send(()).unwrap();
        loop {
            pass.check()?;
            std::thread::yield_now();
        }
    }
}

#[test]
fn la_5_a_feed_dropped_while_its_workers_are_busy_ends_them() {
    within_time(|| {
        let (begun, begins) = mpsc::channel();
        let dataset = Arc::new(Endless(Mutex::new(begun)));
        let ahead = PrefetchOptions { workers: 3, prefetch: Some(8) };
        let mut feed = BatchLoader::new(
            Arc::clone(&dataset),
            Sampler::new(100, 1, None, false),
            0,
            ahead,
            seat(0, 1),
            1,
        )
        .unwrap();
        feed.next().unwrap();
        (0..3).for_each(|_| begins.recv().unwrap());
        drop(feed);
        assert_eq!(Arc::strong_count(&dataset), 1);
    });
}

/// Fails at sample 7 and panics at sample 9.
struct Faulty;

impl Dataset for Faulty {
    type Batch = i64;

    fn len(&self) -> usize {
        12
    }

    fn batch(&self, indices: &[i64], _: Device) -> Result<i64> {
        match indices {
            [7] => Err(Error::Usage("a hole".into())),
            [9] => panic!("a bug at {}", indices[0]),
            _ => Ok(indices[0]),
        }
    }
}

#[test]
fn la_4_errors_and_panics_reach_the_step_that_wanted_the_batch() {
    for workers in [0, 1, 4] {
        let ahead = PrefetchOptions { workers, prefetch: Some(5) };
        let mut feed =
            BatchLoader::new(Arc::new(Faulty), Sampler::new(12, 1, None, false), 0, ahead, seat(0, 1), 1)
                .unwrap();
        for index in 0..12 {
            match (index, feed.next()) {
                (7, Err(error)) => assert_eq!(error.to_string(), "batch of samples 7: a hole"),
                (9, Err(error)) => assert_eq!(error.to_string(), "batch of samples 9: panicked: a bug at 9"),
                (_, made) => assert_eq!(made.unwrap().0, index),
            }
            feed.advance();
        }
    }
}
