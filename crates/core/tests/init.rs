//! Runs that begin with parameters from a safetensors file.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ice_core::{HyperGraph, ModuleNode, Repeat, Result, ResumeFrom, Run, RunConfig, SaveCheckpoint};
use ice_worker::Worker;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tch::{Device, Tensor, nn};

use common::{as_ranks, turn};

const WEIGHT: [f32; 3] = [1.0, 2.0, 3.0];
const BIAS: [f32; 3] = [4.0, 5.0, 6.0];

/// A safetensors file with a weight of this shape and a bias of three, under these keys.
fn file(folder: &Path, weight: (&str, &[usize]), bias: &str) -> PathBuf {
    let bytes = |values: [f32; 3]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let (weights, biases) = (bytes(WEIGHT), bytes(BIAS));
    let view = |shape: &[usize], bytes| TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap();
    let tensors = [(weight.0, view(weight.1, &weights)), (bias, view(&[3], &biases))];
    let path = folder.join("given.safetensors");
    serialize_to_file(tensors, None, &path).unwrap();
    path
}

fn add(graph: &mut HyperGraph, name: &str) {
    let net = ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 3, Default::default()),
        |net: &nn::Linear, x| Ok(x.tensor("x")?.apply(net)),
    );
    graph.add(name, net, "*").unwrap();
}

/// The parameters that a run begins with, after its first task.
fn begin(worker: Worker, nodes: &[&str], config: RunConfig) -> Result<BTreeMap<String, Vec<f32>>> {
    let mut graph = HyperGraph::new();
    nodes.iter().for_each(|name| add(&mut graph, name));
    let seen = Rc::new(RefCell::new(BTreeMap::new()));
    let (noted, names) = (Rc::clone(&seen), nodes.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
    let tasks = Repeat::once().then(SaveCheckpoint::new()).call(move |run| {
        for name in &names {
            let node = run.graph().node::<ModuleNode<nn::Linear, Tensor>>(name)?;
            let layer = node.module()?;
            let floats = |tensor: &Tensor| Vec::<f32>::try_from(tensor.detach().flatten(0, -1)).unwrap();
            noted.borrow_mut().insert(format!("{name}.weight"), floats(&layer.ws));
            noted.borrow_mut().insert(format!("{name}.bias"), floats(layer.bs.as_ref().unwrap()));
        }
        Ok(())
    });
    Run::execute(&graph, &tasks, Rc::new(worker), config)?;
    Ok(seen.take())
}

fn config(out: &Path, init_from: PathBuf) -> RunConfig {
    RunConfig { out_dir: out.to_owned(), init_from: Some(init_from), ..RunConfig::default() }
}

fn given() -> BTreeMap<String, Vec<f32>> {
    BTreeMap::from([("net.weight".into(), WEIGHT.into()), ("net.bias".into(), BIAS.into())])
}

#[test]
fn all_ranks_begin_with_the_parameters_of_the_file() {
    let out = tempfile::tempdir().unwrap();
    let path = file(out.path(), ("net.layer.weight", &[3, 1]), "net.layer.bias");
    let begun = as_ranks(2, |worker| begin(worker, &["net"], config(out.path(), path.clone())).unwrap());
    assert_eq!(begun, [given(), given()]);
}

#[test]
fn pytorchs_keys_belong_to_the_only_node_with_parameters() {
    let out = tempfile::tempdir().unwrap();
    let _turn = turn();
    let path = file(out.path(), ("layer.weight", &[3, 1]), "layer.bias");
    let alone = || Worker::alone(Device::Cpu);
    assert_eq!(begin(alone(), &["net"], config(out.path(), path.clone())).unwrap(), given());
    let error = begin(alone(), &["net", "other"], config(out.path(), path)).unwrap_err().to_string();
    for named in
        ["missing `layer.bias`, `layer.weight`", "`*/net`", "`*/other`", "unexpected `bias`, `weight`"]
    {
        assert!(error.contains(named), "{named}: {error}");
    }
}

#[test]
fn all_that_does_not_fit_is_named() {
    let out = tempfile::tempdir().unwrap();
    let _turn = turn();
    let path = file(out.path(), ("net.layer.weight", &[1, 3]), "net.layer.offset");
    let begin =
        |path: PathBuf| begin(Worker::alone(Device::Cpu), &["net"], config(out.path(), path)).unwrap_err();
    let error = begin(path.clone());
    assert!(error.is_usage());
    let error = error.to_string();
    for named in
        ["given.safetensors", "[1, 3]", "[3, 1]", "missing `layer.bias`", "unexpected `layer.offset`"]
    {
        assert!(error.contains(named), "{named}: {error}");
    }

    let nowhere = begin(out.path().join("nowhere.safetensors"));
    assert!(nowhere.is_usage() && nowhere.to_string().contains("nowhere.safetensors"), "{nowhere}");
    std::fs::write(&path, "{}").unwrap();
    let damaged = begin(path).to_string();
    assert!(damaged.contains("given.safetensors") && damaged.contains("no safetensors file"), "{damaged}");
}

#[test]
fn a_run_that_goes_on_from_a_checkpoint_does_not_read_the_file() {
    let out = tempfile::tempdir().unwrap();
    let _turn = turn();
    let path = file(out.path(), ("layer.weight", &[3, 1]), "layer.bias");
    begin(Worker::alone(Device::Cpu), &["net"], config(out.path(), path.clone())).unwrap();
    std::fs::remove_file(&path).unwrap();
    let resume_from = Some(ResumeFrom::Latest);
    let resumed = RunConfig { resume_from, ..config(out.path(), path) };
    assert_eq!(begin(Worker::alone(Device::Cpu), &["net"], resumed).unwrap(), given());
}
