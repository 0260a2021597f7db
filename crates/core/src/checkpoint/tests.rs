//! Ranks that write and read checkpoints together, as threads of one process.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use ice_worker::Worker;
use proptest::prelude::*;
use serde_json::Value as Json;
use tch::{Device, Kind, Tensor};

use super::exchange::Exchange;
use super::{Checkpoint, Keep, Manifest, Request, Selection, Strictness, UnclaimedState, Writer, load};
use crate::{Context, Error, HyperGraph, Node, NodeState, Outputs, Part, Result, Value};

/// Messages between ranks that are threads.
#[derive(Default)]
struct Meeting {
    messages: Mutex<BTreeMap<String, Vec<u8>>>,
    changed: Condvar,
    forgotten: Mutex<Vec<String>>,
}

impl Meeting {
    fn rank_1_was_heard(&self) -> bool {
        self.forgotten.lock().unwrap().iter().any(|key| key.ends_with("/1"))
    }
}

impl Exchange for Meeting {
    fn post(&self, key: &str, message: &[u8]) -> Result<()> {
        self.messages.lock().unwrap().insert(key.into(), message.into());
        self.changed.notify_all();
        Ok(())
    }

    fn look(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let missing = |messages: &mut BTreeMap<String, Vec<u8>>| !messages.contains_key(key);
        let (messages, _) = self
            .changed
            .wait_timeout_while(self.messages.lock().unwrap(), Duration::from_millis(100), missing)
            .unwrap();
        Ok(messages.get(key).cloned())
    }

    fn forget(&self, key: &str) {
        self.messages.lock().unwrap().remove(key);
        self.forgotten.lock().unwrap().push(key.into());
    }
}

/// The distribution of a tensor over the ranks.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Held {
    Whole,
    Rows,
    Flat,
    /// The rank of this number, modulo the number of ranks, holds all of it.
    By(usize),
}

/// A node whose optimizer's tensors are divided among the ranks.
struct Sharded {
    model: Vec<(String, Tensor)>,
    optimizer: Vec<(String, Tensor)>,
    parts: BTreeMap<String, Part>,
}

impl Node for Sharded {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, _: &Outputs) -> Result<Value> {
        Ok(Value::new(()))
    }

    fn is_sharded(&self) -> bool {
        true
    }

    fn state(&self) -> NodeState {
        let copy = |tensors: &[(String, Tensor)]| {
            tensors.iter().map(|(k, t)| (k.clone(), t.shallow_clone())).collect()
        };
        NodeState {
            model: copy(&self.model),
            optimizer: copy(&self.optimizer),
            optimizer_parts: self.parts.clone(),
            ..NodeState::default()
        }
    }
}

/// The tensors of a job: shape and distribution.
type Job = Vec<(Vec<i64>, Held)>;

fn whole(index: usize, shape: &[i64]) -> Tensor {
    let kind = [Kind::Float, Kind::Double, Kind::BFloat16][index % 3];
    let numel: i64 = shape.iter().product();
    (Tensor::arange(numel, (Kind::Float, Device::Cpu)) + (index * 1000) as f64).to_kind(kind).view(shape)
}

/// Returns a rank's part of a tensor. The numbers of rows and elements need not divide evenly.
fn part(tensor: &Tensor, held: Held, rank: usize, ranks: usize) -> (Tensor, Option<Part>) {
    let share = |all: i64| {
        let each = (all as usize).div_ceil(ranks);
        let start = (rank * each).min(all as usize);
        (start as i64, ((rank + 1) * each).min(all as usize) as i64 - start as i64)
    };
    let shape = tensor.size();
    match held {
        Held::Whole => (tensor.copy(), None),
        Held::Rows => {
            let (first, rows) = share(shape[0]);
            (tensor.narrow(0, first, rows).copy(), Some(Part::rows(first as u64, &shape)))
        }
        Held::Flat => {
            let (start, len) = share(tensor.numel() as i64);
            (tensor.reshape([-1]).narrow(0, start, len).copy(), Some(Part::flat(start as u64, &shape)))
        }
        Held::By(owner) => {
            let len = if owner % ranks == rank { tensor.numel() as i64 } else { 0 };
            (tensor.reshape([-1]).narrow(0, 0, len).copy(), Some(Part::flat(0, &shape)))
        }
    }
}

/// Creates the graph of a rank. Without `filled`, all its tensors are zero.
fn graph(job: &Job, rank: usize, ranks: usize, filled: bool) -> HyperGraph {
    let mut node = Sharded { model: Vec::new(), optimizer: Vec::new(), parts: BTreeMap::new() };
    for (index, (shape, held)) in job.iter().enumerate() {
        let tensor = whole(index, shape);
        let zeroed = |tensor: Tensor| if filled { tensor } else { tensor.zeros_like() };
        let (piece, place) = part(&tensor, *held, rank, ranks);
        let name = format!("p{index}.exp_avg");
        node.parts.extend(place.map(|place| (name.clone(), place)));
        node.optimizer.push((name, zeroed(piece)));
        node.model.push((format!("p{index}"), zeroed(tensor)));
    }
    let mut graph = HyperGraph::new();
    graph.add("net", node, "*").unwrap();
    graph
}

fn manifest(step: u64) -> Manifest {
    let counts = ice_checkpoint::Counts { train_steps: step, ..Default::default() };
    Manifest::new("none", 1, 7, counts, Json::Null)
}

fn request(folder: &Path, step: u64) -> Request {
    Request { folder: folder.to_owned(), manifest: manifest(step), keep: Keep::All }
}

/// Saves with this many ranks, and returns the outcome of each.
fn save(folder: &Path, job: &Job, ranks: usize, split: bool) -> Vec<Result<()>> {
    let meeting = Arc::new(Meeting::default());
    let rank = |rank: usize| {
        let exchange: Arc<dyn Exchange> = Arc::clone(&meeting) as _;
        let graph = graph(job, rank, ranks, true);
        let mut writer = Writer::of_several(rank, ranks, split, exchange, || false);
        writer
            .save(request(folder, 1), &graph, &Selection::All, &UnclaimedState::new(), None)
            .and_then(|()| writer.finish())
    };
    thread::scope(|scope| {
        let ranks: Vec<_> = (0..ranks).map(|number| scope.spawn(move || rank(number))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn check_loaded(folder: &Path, job: &Job, ranks: usize) {
    let checkpoint = Checkpoint::open(folder).unwrap();
    for rank in 0..ranks {
        let (empty, full) = (graph(job, rank, ranks, false), graph(job, rank, ranks, true));
        load(
            &checkpoint,
            None,
            &empty,
            &Selection::All,
            Strictness::Strict,
            &mut Vec::new(),
            &Worker::alone(Device::Cpu),
        )
        .unwrap();
        let states = [&empty, &full].map(|graph| graph.entries()[0].node.borrow().state());
        for (loaded, expected) in
            [(&states[0].model, &states[1].model), (&states[0].optimizer, &states[1].optimizer)]
        {
            assert_eq!(loaded, expected, "rank {rank} of {ranks}");
        }
    }
}

fn job() -> Job {
    vec![
        (vec![7, 5], Held::Rows),
        (vec![3, 4, 2], Held::Flat),
        (vec![10], Held::Whole),
        (vec![6], Held::By(1)),
        (vec![2, 9], Held::By(2)),
        (vec![], Held::Flat),
    ]
}

#[test]
fn state_moves_from_four_ranks_to_two_to_three_to_one() {
    let out = tempfile::tempdir().unwrap();
    let mut from = 4;
    for to in [2, 3, 1] {
        let folder = out.path().join(format!("from{from}"));
        for outcome in save(&folder, &job(), from, from == 2) {
            outcome.unwrap();
        }
        check_loaded(&folder, &job(), to);
        check_loaded(&folder, &job(), from);
        from = to;
    }
}

#[test]
fn files_of_the_model_stay_readable_by_others() {
    let out = tempfile::tempdir().unwrap();
    let names = |folder: &Path| {
        let mut names: Vec<_> = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    };
    let together = out.path().join("together");
    save(&together, &job(), 2, false);
    assert_eq!(
        names(&together),
        [
            "manifest.json",
            "model.safetensors",
            "optimizer-00000-of-00002.safetensors",
            "optimizer-00001-of-00002.safetensors"
        ]
    );
    let bytes = fs::read(together.join("model.safetensors")).unwrap();
    let model = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(model.len(), job().len());

    let split = out.path().join("split");
    save(&split, &job(), 2, true);
    let index: Json =
        serde_json::from_slice(&fs::read(split.join("model.safetensors.index.json")).unwrap()).unwrap();
    for (key, file) in index["weight_map"].as_object().unwrap() {
        let bytes = fs::read(split.join(file.as_str().unwrap())).unwrap();
        assert!(safetensors::SafeTensors::deserialize(&bytes).unwrap().tensor(key).is_ok(), "{key}");
    }
    assert_eq!(index["weight_map"].as_object().unwrap().len(), job().len());
}

#[test]
fn a_rank_that_cannot_write_fails_the_save_on_all_and_leaves_nothing() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("E0S1");
    // A folder takes the place of rank 1's file.
    let taken = out.path().join(".E0S1.test-1.partial/optimizer-00001-of-00003.safetensors");
    fs::create_dir_all(&taken).unwrap();
    let outcomes = save(&folder, &job(), 3, false);
    for (rank, outcome) in outcomes.into_iter().enumerate() {
        let message = outcome.unwrap_err().to_string();
        assert!(
            message.contains("optimizer-00001-of-00003.safetensors: Is a directory"),
            "rank {rank}: {message}"
        );
    }
    assert!(!folder.exists());
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0);
}

#[test]
fn nobody_waits_for_a_rank_that_is_gone() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("E0S1");
    let meeting = Arc::new(Meeting::default());
    // Rank 2 of 3 never joins, and the round is over once rank 1 has written.
    let over = {
        let meeting = Arc::clone(&meeting);
        move || {
            meeting.messages.lock().unwrap().keys().any(|key| key.ends_with("/1"))
                || meeting.rank_1_was_heard()
        }
    };
    thread::scope(|scope| {
        for rank in 0..2 {
            let (exchange, over, folder): (Arc<dyn Exchange>, _, _) =
                (meeting.clone(), over.clone(), &folder);
            scope.spawn(move || {
                let mut writer = Writer::of_several(rank, 3, false, exchange, over);
                let graph = graph(&job(), rank, 3, true);
                writer
                    .save(request(folder, 1), &graph, &Selection::All, &UnclaimedState::new(), None)
                    .unwrap();
                assert!(matches!(writer.finish(), Err(Error::Stopped)), "rank {rank}");
            });
        }
    });
    assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "nothing is left");
}

#[test]
fn a_missing_shard_is_named() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("E0S1");
    save(&folder, &job(), 4, false);
    fs::remove_file(folder.join("optimizer-00002-of-00004.safetensors")).unwrap();
    let message = Checkpoint::open(&folder).unwrap_err().to_string();
    assert!(message.contains("optimizer-00002-of-00004.safetensors"), "{message}");
}

fn held() -> impl Strategy<Value = Held> {
    prop_oneof![Just(Held::Whole), Just(Held::Rows), Just(Held::Flat), (0..4_usize).prop_map(Held::By)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]
    #[test]
    fn any_state_moves_between_any_numbers_of_ranks(
        job in proptest::collection::vec((proptest::collection::vec(0..6_i64, 1..4), held()), 1..6),
        from in 1..5_usize,
        to in 1..5_usize,
        split in any::<bool>(),
    ) {
        let out = tempfile::tempdir().unwrap();
        let folder = out.path().join("E0S1");
        for outcome in save(&folder, &job, from, split) {
            outcome.unwrap();
        }
        check_loaded(&folder, &job, to);
    }
}

/// Creates a graph of one node that has only these named tensors.
fn plain(model: &[&str], optimizer: &[&str], value: f64) -> HyperGraph {
    let tensors = |names: &[&str]| {
        names
            .iter()
            .map(|name| ((*name).to_owned(), Tensor::full([2], value, (Kind::Float, Device::Cpu))))
            .collect()
    };
    let node = Sharded { model: tensors(model), optimizer: tensors(optimizer), parts: BTreeMap::new() };
    let mut graph = HyperGraph::new();
    graph.add("net", node, "*").unwrap();
    graph
}

fn write(folder: &Path, graph: &HyperGraph, kept: &UnclaimedState) {
    let mut writer = Writer::of_several(0, 1, false, Arc::new(Meeting::default()), || false);
    writer.save(request(folder, 1), graph, &Selection::All, kept, None).unwrap();
    writer.finish().unwrap();
}

fn first(graph: &HyperGraph) -> f64 {
    graph.entries()[0].node.borrow().state().model[0].1.double_value(&[0])
}

#[test]
fn what_does_not_fit_is_listed_or_passed_over() {
    let out = tempfile::tempdir().unwrap();
    let folder = out.path().join("x");
    write(&folder, &plain(&["a", "b", "c"], &["a.exp_avg", "z.exp_avg"], 1.0), &UnclaimedState::new());
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let worker = Worker::alone(Device::Cpu);

    let other = plain(&["a", "d", "e"], &["d.exp_avg"], 5.0);
    let Err(Error::Resume(message)) =
        load(&checkpoint, None, &other, &Selection::All, Strictness::Strict, &mut Vec::new(), &worker)
    else {
        panic!("it was loaded")
    };
    for part in ["node `*/net`", "missing `d`, `e`, `d.exp_avg`", "unexpected `b`, `c`, `z.exp_avg`"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert_eq!(first(&other), 5.0, "nothing is half loaded");

    load(&checkpoint, None, &other, &Selection::All, Strictness::Any, &mut Vec::new(), &worker).unwrap();
    assert_eq!(first(&other), 1.0);
    assert_eq!(other.entries()[0].node.borrow().state().model[1].1.double_value(&[0]), 5.0);
}

#[test]
fn state_of_an_optimizer_that_is_not_in_use_is_kept() {
    let out = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| out.path().join(name));
    write(&old, &plain(&["a", "b"], &["a.exp_avg", "b.exp_avg"], 1.0), &UnclaimedState::new());
    let worker = Worker::alone(Device::Cpu);
    let half = plain(&["a", "b"], &["b.exp_avg"], 2.0);
    let kept = load(
        &Checkpoint::open(&old).unwrap(),
        None,
        &half,
        &Selection::All,
        Strictness::Strict,
        &mut Vec::new(),
        &worker,
    )
    .unwrap();
    write(&new, &half, &kept);

    let whole = plain(&["a", "b"], &["a.exp_avg", "b.exp_avg"], 3.0);
    let kept = load(
        &Checkpoint::open(&new).unwrap(),
        None,
        &whole,
        &Selection::All,
        Strictness::Strict,
        &mut Vec::new(),
        &worker,
    )
    .unwrap();
    assert!(kept.is_empty());
    let state = whole.entries()[0].node.borrow().state();
    assert_eq!(state.optimizer[0].1.double_value(&[1]), 1.0);
}
