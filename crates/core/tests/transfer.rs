//! Transfer of tensors from one rank to all ranks.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::RefCell;
use std::rc::Rc;

use common::as_ranks;
use ice_core::{HyperGraph, ModuleNode, Repeat, Run, RunConfig};
use ice_worker::Worker;
use tch::{Tensor, nn};

/// Numbers of elements of tensors below the limit for packing, at the limit, and above.
const SIZES: [i64; 5] = [1, 1000, (16 << 10) - 1, 16 << 10, 100_000];
/// Number of tensors, more than the portions in flight.
const TENSORS: i64 = 200;
/// Number of elements of the last tensor, which travels in parts.
const LARGE: i64 = 5_000_000;

/// Returns the minimum and maximum of each tensor at the start of a rank. Every rank initializes
/// its tensors differently.
fn begin(worker: Worker) -> Vec<(f64, f64)> {
    let out = tempfile::tempdir().unwrap();
    let rank = worker.rank() as i64;
    let mut graph = HyperGraph::new();
    let make = move |path: &nn::Path| {
        let tensor = |n: i64| {
            let value = nn::Init::Const((1000 * rank + n) as f64);
            let size = if n == TENSORS - 1 { LARGE } else { SIZES[n as usize % SIZES.len()] };
            path.var(&format!("tensor{n}"), &[size], value)
        };
        (0..TENSORS).map(tensor).collect::<Vec<_>>()
    };
    graph.add("net", ModuleNode::new(make, |net, _| Ok(net[0].shallow_clone())), "*").unwrap();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let noted = Rc::clone(&seen);
    let tasks = Repeat::once().call(move |run| {
        let node = run.graph().node::<ModuleNode<Vec<Tensor>, Tensor>>("net")?;
        let ends = |tensor: &Tensor| (tensor.min().double_value(&[]), tensor.max().double_value(&[]));
        noted.replace(node.module()?.iter().map(ends).collect());
        Ok(())
    });
    let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
    Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap();
    seen.take()
}

#[test]
fn all_ranks_begin_with_the_tensors_of_rank_0_however_many_there_are() {
    let of_rank_0: Vec<_> = (0..TENSORS).map(|n| (n as f64, n as f64)).collect();
    for ranks in [2, 3, 8] {
        for (rank, begun) in as_ranks(ranks, begin).into_iter().enumerate() {
            assert_eq!(begun, of_rank_0, "rank {rank} of {ranks}");
        }
    }
}
