//! Helpers of tests of whole runs.
#![allow(dead_code, reason = "each test uses a part")]

use std::rc::Rc;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use ice_c10d::testing::serve_store;
use ice_c10d::{GlooOptions, ProcessGroup, Store};
use ice_core::data::Dataset;
use ice_core::{HyperGraph, Result, Run, RunConfig, TaskItem};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor};

const TIMEOUT: Duration = Duration::from_secs(30);

/// libtorch has one random number generator per process, as if a process were one rank. Runs in
/// threads must therefore take turns.
static ONE_RUN_AT_A_TIME: Mutex<()> = Mutex::new(());

pub(crate) fn turn() -> impl Drop {
    ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This many points on a line, each as `[1]` of f32.
pub(crate) struct Line(pub(crate) usize);

impl Dataset for Line {
    type Batch = Tensor;

    fn len(&self) -> usize {
        self.0
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(indices).to_device(device).to_kind(Kind::Float).unsqueeze(1) / self.0 as f64)
    }
}

/// Runs a graph on `world_size` ranks, each a thread with its own graph. Returns the results by
/// rank.
pub(crate) fn on_ranks<T: Send, K: TaskItem>(
    world_size: usize,
    make: impl Fn(usize) -> (HyperGraph, K, Box<dyn Fn() -> T>) + Sync,
) -> Vec<T> {
    let out = tempfile::tempdir().unwrap();
    as_ranks(world_size, |worker| {
        let config = RunConfig { seed: 7, out_dir: out.path().to_owned(), ..RunConfig::default() };
        let (graph, tasks, result) = make(worker.rank());
        Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap();
        result()
    })
}

/// Runs a function on `world_size` ranks, each a thread. Returns the results by rank.
pub(crate) fn as_ranks<T: Send>(world_size: usize, body: impl Fn(Worker) -> T + Sync) -> Vec<T> {
    let _turn = turn();
    let (_server, port) = serve_store().unwrap();
    let rank = |rank: usize| {
        let store = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap();
        let options =
            GlooOptions { timeout: TIMEOUT, hostname: Some("127.0.0.1".into()), ..GlooOptions::default() };
        let group = ProcessGroup::gloo(&store, rank, world_size, &options).unwrap();
        body(Worker::of_group(group, store, Device::Cpu))
    };
    let rank = &rank;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..world_size).map(|number| scope.spawn(move || rank(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
