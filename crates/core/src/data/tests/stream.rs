use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use proptest::prelude::*;

use super::{seat, within_time};
use crate::data::{BatchStream, PrefetchOptions, SamplerCursor, Stream, StreamLoader, StreamOrder, stream};
use crate::{BatchShare, Error, Result};

const SHARDS: [usize; 5] = [7, 0, 11, 1, 4];
const ALL: usize = 23;

/// Creates samples with the value 100 × shard + position in the shard, and a random number.
fn numbers(sized: bool) -> impl BatchStream<Batch = Vec<(i64, f64)>> {
    let numbers =
        stream(
            SHARDS.len(),
            |shard| Ok((0..SHARDS[shard]).map(move |at| Ok(100 * shard as i64 + at as i64))),
        );
    let numbers = if sized { numbers.of_samples(ALL as u64) } else { numbers };
    numbers.map_random(|number, rng| Ok((number, rng.uniform()))).collate(Ok)
}

#[derive(Debug, Clone, Copy)]
struct Setting {
    sized: bool,
    shuffled: Option<usize>,
    global: u64,
    drop_last: bool,
    iterations: Option<u64>,
}

type Step = Vec<(i64, f64)>;

/// The ranks of a job.
struct Job<S: BatchStream>(Vec<StreamLoader<S>>);

fn job(
    setting: Setting,
    ahead: PrefetchOptions,
    world_size: u64,
) -> Job<impl BatchStream<Batch = Step> + 'static> {
    let Setting { sized, shuffled, global, drop_last, iterations } = setting;
    let order = StreamOrder { shuffled: shuffled.map(|buffer| (3, buffer)), global_batch: global, drop_last };
    let feed = |rank| {
        let stream = Arc::new(numbers(sized));
        StreamLoader::new(stream, order, iterations, 3, ahead, seat(rank, world_size)).unwrap()
    };
    Job((0..world_size).map(feed).collect())
}

impl<S: BatchStream<Batch = Step> + 'static> Job<S> {
    fn step(&mut self) -> Step {
        let mut samples = Vec::new();
        for feed in &mut self.0 {
            if feed.remaining() == Some(0) {
                feed.next_epoch();
            }
            let (batch, BatchShare { here, .. }) = feed.next().unwrap();
            assert_eq!(batch.len() as u64, here.max(1));
            samples.extend(&batch[..here as usize]);
            feed.advance();
        }
        samples
    }

    fn steps(&mut self, count: usize) -> Vec<Step> {
        (0..count).map(|_| self.step()).collect()
    }

    fn place(&self) -> SamplerCursor {
        assert!(self.0.iter().all(|feed| feed.place() == self.0[0].place()));
        self.0[0].place()
    }
}

const INLINE: PrefetchOptions = PrefetchOptions { workers: 0, prefetch: None };

fn settings() -> impl Strategy<Value = Setting> {
    let shuffled = proptest::option::of(0_usize..30);
    (any::<bool>(), shuffled, 1_u64..12, any::<bool>(), proptest::option::of(1_u64..9)).prop_map(
        |(sized, shuffled, global, drop_last, iterations)| Setting {
            sized,
            shuffled,
            global,
            drop_last,
            iterations,
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn batches_depend_on_neither_workers_nor_prefetch_nor_ranks_nor_known_sizes(
        setting in settings(), workers in 0_usize..5, prefetch in proptest::option::of(0_usize..6), world_size in 1_u64..4,
    ) {
        let expected = job(setting, INLINE, 1).steps(40);
        let other = Setting { sized: !setting.sized, ..setting };
        prop_assert_eq!(&job(other, INLINE, 1).steps(40), &expected);
        prop_assert_eq!(job(setting, PrefetchOptions { workers, prefetch }, world_size).steps(40), expected);
    }

    #[test]
    fn each_pass_has_each_sample_once(setting in settings(), world_size in 1_u64..4) {
        let setting = Setting { drop_last: false, ..setting };
        let mut job = job(setting, INLINE, world_size);
        let per_pass = ALL.div_ceil(setting.global as usize);
        let mut random = BTreeSet::new();
        for _ in 0..3 {
            let mut pass = job.steps(per_pass).concat();
            prop_assert!(pass.iter().all(|(_, number)| random.insert(number.to_bits())));
            if setting.shuffled.is_none() {
                prop_assert!(pass.is_sorted());
            }
            pass.sort_by_key(|&(number, _)| number);
            let found: Vec<i64> = pass.into_iter().map(|(number, _)| number).collect();
            let all = (0..5).flat_map(|shard| (0..SHARDS[shard]).map(move |at| (100 * shard + at) as i64));
            prop_assert_eq!(found, all.collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_stream_resumed_anywhere_goes_on_with_the_next_batch(
        setting in settings(), stop in 0_usize..30, worlds in (1_u64..4, 1_u64..4), workers in (0_usize..4, 0_usize..4),
    ) {
        let ahead = |workers| PrefetchOptions { workers, prefetch: None };
        let mut whole = job(setting, ahead(workers.0), worlds.0);
        whole.steps(stop);
        let mut resumed = job(setting, ahead(workers.1), worlds.1);
        // Batches made before a checkpoint is loaded must be discarded.
        resumed.step();
        let place = whole.place();
        resumed.0.iter_mut().for_each(|feed| feed.seek(place));
        prop_assert_eq!(resumed.steps(12), whole.steps(12));
        prop_assert_eq!(resumed.place(), whole.place());
    }
}

#[test]
fn each_pass_has_an_order_of_shards_and_samples_of_its_own() {
    let setting = Setting { sized: true, shuffled: Some(5), global: 23, drop_last: false, iterations: None };
    let order = |step: Step| step.into_iter().map(|(number, _)| number).collect::<Vec<_>>();
    // With a buffer of 1, the order is only that of the shards. `of_buffer` has one shard, and thus
    // only the order of the buffer.
    for buffer in [1, 5] {
        let mut passes = job(Setting { shuffled: Some(buffer), ..setting }, INLINE, 1);
        let seen: BTreeSet<Vec<i64>> = (0..4).map(|_| order(passes.step())).collect();
        assert!(seen.len() > 1);
    }
    let of_buffer = |pass| {
        let one = stream(1, |_| Ok((0..20_i64).map(Ok))).of_samples(20).collate(Ok);
        let order = StreamOrder { shuffled: Some((3, 5)), global_batch: 20, drop_last: false };
        let mut feed = StreamLoader::new(Arc::new(one), order, None, 0, INLINE, seat(0, 1)).unwrap();
        feed.seek(SamplerCursor { pass, cursor: 0, iteration: 0 });
        feed.next().unwrap().0
    };
    assert_ne!(of_buffer(0), of_buffer(1));
    assert_eq!(of_buffer(1), of_buffer(1));
}

#[test]
fn an_epoch_is_a_pass_of_a_sized_stream_and_has_no_end_otherwise() {
    let setting = Setting { sized: true, shuffled: None, global: 5, drop_last: false, iterations: None };
    let remaining = |setting| job(setting, INLINE, 2).0[0].remaining();
    assert_eq!(remaining(setting), Some(5));
    assert_eq!(remaining(Setting { drop_last: true, ..setting }), Some(4));
    assert_eq!(remaining(Setting { iterations: Some(9), ..setting }), Some(9));
    assert_eq!(remaining(Setting { sized: false, ..setting }), None);
}

fn failure(stream: impl BatchStream<Batch = Vec<i64>> + 'static, workers: usize, global: u64) -> String {
    let order = StreamOrder { shuffled: None, global_batch: global, drop_last: true };
    let ahead = PrefetchOptions { workers, prefetch: None };
    let mut feed = StreamLoader::new(Arc::new(stream), order, Some(99), 0, ahead, seat(0, 1)).unwrap();
    for _ in 0..50 {
        match feed.next() {
            Ok(_) => feed.advance(),
            Err(error) => {
                // The same batch fails again, instead of the one after it.
                assert_eq!(feed.next().unwrap_err().to_string(), error.to_string());
                return error.to_string();
            }
        }
    }
    panic!("nothing failed");
}

#[test]
fn errors_and_panics_are_named() {
    let of = |shards, len: usize| stream(shards, move |_| Ok((0..len).map(|at| Ok(at as i64))));
    for workers in [0, 1, 3] {
        let check = |message: String, part: &str| assert!(message.contains(part), "{message}");
        check(failure(of(0, 0).collate(Ok), workers, 4), "0 samples in 0 shards");
        check(failure(of(2, 0).collate(Ok), workers, 4), "0 samples in 2 shards");
        check(
            failure(of(1, 3).collate(Ok), workers, 4),
            "3 samples in 1 shards, which do not fill one batch of 4",
        );
        check(failure(of(2, 4).of_samples(9).collate(Ok), workers, 2), "ended after 8 samples of 9");
        check(failure(of(2, 4).of_samples(7).collate(Ok), workers, 2), "7 samples and has more");
        check(failure(of(2, 4).of_samples(6).collate(Ok), workers, 2), "6 samples and has more");
        let fails = of(2, 4).map(|at| if at == 3 { Err(Error::Usage("a hole".into())) } else { Ok(at) });
        check(failure(fails.collate(Ok), workers, 2), "sample 3: a hole");
        let panics = of(2, 4).map(|at| if at == 2 { panic!("a bug") } else { Ok(at) });
        check(failure(panics.collate(Ok), workers, 2), "sample 2: panicked: a bug");
        let unread = stream(2, |shard| match shard {
            1 => Err(Error::Usage("no such shard".into())),
            _ => Ok((0..4).map(|at| if at == 9 { panic!() } else { Ok(at) })),
        });
        check(failure(unread.collate(Ok), workers, 2), "no such shard");
    }
}

#[test]
fn a_rank_loads_its_own_samples_only() {
    for workers in [0, 2] {
        let loaded = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&loaded);
        let samples = stream(3, |_| Ok((0..10).map(Ok))).of_samples(30).map(move |at| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(at)
        });
        let order = StreamOrder { shuffled: Some((1, 8)), global_batch: 6, drop_last: false };
        let ahead = PrefetchOptions { workers, prefetch: None };
        let stream = Arc::new(samples.collate(|items: Vec<i32>| Ok(items)));
        let mut feed = StreamLoader::new(stream, order, None, 0, ahead, seat(1, 3)).unwrap();
        // Starts in the middle: moving to a position loads nothing.
        feed.seek(SamplerCursor { pass: 2, cursor: 12, iteration: 2 });
        while feed.remaining() != Some(0) {
            feed.next().unwrap();
            feed.advance();
        }
        assert_eq!(loaded.load(Ordering::Relaxed), 6);
    }
}

#[test]
fn a_feed_dropped_while_it_looks_for_a_place_ends() {
    within_time(|| {
        let (begun, begins) = mpsc::channel();
        let begun = Mutex::new(begun);
        let endless = stream(1, move |_| -> Result<_> {
            begun.lock().unwrap().send(()).unwrap();
            Ok((0_i64..).map(Ok))
        });
        let order = StreamOrder { shuffled: None, global_batch: 1, drop_last: false };
        let ahead = PrefetchOptions { workers: 2, prefetch: None };
        let stream = Arc::new(endless.collate(Ok));
        let feed = StreamLoader::new(Arc::clone(&stream), order, None, 0, ahead, seat(0, 1)).unwrap();
        // The step waits in its own thread, and ends with the feed although the position is never
        // found.
        let stop = feed.stop();
        let step = std::thread::spawn(move || {
            let mut feed = feed;
            feed.seek(SamplerCursor { pass: 0, cursor: u64::MAX, iteration: 0 });
            assert!(matches!(feed.next(), Err(Error::Stopped)));
        });
        begins.recv().unwrap();
        stop.store(true, Ordering::Relaxed);
        step.join().unwrap();
        assert_eq!(Arc::strong_count(&stream), 1);
    });
}
