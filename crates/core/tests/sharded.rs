//! Optimizers whose state is sharded over the ranks.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::path::Path;
use std::rc::Rc;

use common::{Line, as_ranks};
use ice_core::optim::{AdamW, Optimizer, Schedule, Sgd};
use ice_core::{
    DatasetNode, HyperGraph, LossNode, ModuleNode, Node, Repeat, ResumeFrom, Run, RunConfig, SaveCheckpoint,
    Task,
};
use tch::{Kind, Tensor, nn};

type Net = ModuleNode<nn::Sequential, Tensor>;

/// Deterministic parameters: ranks that are threads share a generator, so that random parameters
/// would differ between runs.
fn net(path: &nn::Path) -> nn::Sequential {
    let wave = |mut tensor: Tensor| {
        let values = Tensor::arange(tensor.numel() as i64, (Kind::Float, tensor.device())).sin() * 0.3;
        tch::no_grad(|| tensor.copy_(&values.view_as(&tensor)));
    };
    let layer = |name, inputs, outputs| {
        let layer = nn::linear(path / name, inputs, outputs, Default::default());
        wave(layer.ws.shallow_clone());
        wave(layer.bs.as_ref().unwrap().shallow_clone());
        layer
    };
    nn::seq().add(layer("first", 1, 150)).add_fn(Tensor::tanh).add(layer("second", 150, 7))
}

fn graph(sharded: bool) -> HyperGraph {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(24)).shuffle(true).global_batch_size(12), "*").unwrap();
    let node = Net::new(net, |net, x| Ok(x.tensor("x")?.apply(net)))
        .optimizer_for("second.weight", AdamW::new(0.01).schedule(Schedule::cosine(8, 0.1)))
        .optimizer_for("weight", AdamW::new(0.02).amsgrad(true))
        .optimizer(Sgd::new(0.05).momentum(0.9))
        .clip_grad_norm(0.5)
        .shard_optimizer(sharded);
    graph.add("net", node, "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "*").unwrap();
    graph
}

/// Returns, for each rank, the final parameters, the number of elements of the optimizers' state,
/// and whether it is sharded.
fn run(
    ranks: usize,
    sharded: bool,
    steps: [u64; 2],
    out: &Path,
    from: Option<&Path>,
) -> Vec<(Vec<f32>, usize, bool)> {
    as_ranks(ranks, |worker| {
        let config = RunConfig {
            seed: 7,
            out_dir: out.to_owned(),
            resume_from: from.map(|from| ResumeFrom::Path(from.to_owned())),
            ..RunConfig::default()
        };
        let graph = graph(sharded);
        let tasks = Repeat::once()
            .then(Task::train("*").steps(steps[0]))
            .then(SaveCheckpoint::new())
            .then(Task::train("*").steps(steps[1]));
        Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap();
        let net = graph.node::<Net>("net").unwrap();
        let state = net.state();
        let parameters: Vec<Tensor> = state.model.iter().map(|(_, tensor)| tensor.flatten(0, -1)).collect();
        let parameters = Vec::try_from(Tensor::cat(&parameters, 0)).unwrap();
        let held = state.optimizer.iter().map(|(_, tensor)| tensor.numel()).sum();
        (parameters, held, net.is_sharded())
    })
}

#[test]
fn a_sharded_optimizer_makes_the_same_bits_with_a_part_of_the_state() {
    let out = tempfile::tempdir().unwrap();
    let whole = run(3, false, [3, 5], &out.path().join("whole"), None);
    let sharded = run(3, true, [3, 5], &out.path().join("sharded"), None);
    for (whole, sharded) in whole.iter().zip(&sharded) {
        assert_eq!(whole.0, sharded.0);
        assert!(sharded.2 && sharded.1 < whole.1 / 2, "{} of {}", sharded.1, whole.1);
    }
    let alone = run(1, true, [3, 5], &out.path().join("alone"), None);
    assert_eq!(alone[0].1, whole[0].1);
}

#[test]
fn sharded_state_goes_on_with_other_ranks_or_whole() {
    let out = tempfile::tempdir().unwrap();
    let (first, second) = (out.path().join("first"), out.path().join("second"));
    let undisturbed = run(3, true, [3, 5], &first, None);
    let saved = first.join("none_local/ckpts/E1S3");
    for (ranks, sharded) in [(3, true), (3, false), (2, true), (1, false), (4, true)] {
        let resumed = run(ranks, sharded, [3, 5], &second, Some(&saved));
        let exact = ranks == 3;
        for rank in &resumed {
            let differences = rank.0.iter().zip(&undisturbed[0].0).map(|(a, b)| (a - b).abs());
            let largest = differences.fold(0.0, f32::max);
            let allowed = if exact { 0.0 } else { 1e-5 };
            assert!(largest <= allowed, "{ranks} ranks, sharded {sharded}: {largest}");
        }
    }
    // State that was saved whole is loaded in shards.
    let whole = out.path().join("whole");
    run(2, false, [3, 5], &whole, None);
    let resumed = run(3, true, [3, 5], &second, Some(&whole.join("none_local/ckpts/E1S3")));
    assert!(resumed[0].0.iter().zip(&undisturbed[0].0).all(|(a, b)| (a - b).abs() < 1e-5));
}
