//! Runs with files of other programs: parameters in safetensors, and modules in TorchScript.
//! tests/python/init_reference.py and script_reference.py write the files of PyTorch.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use ice_core::data::Dataset;
use ice_core::optim::Sgd;
use ice_core::{
    Better, Context, DatasetNode, HyperGraph, InitFrom, LossNode, MetricNode, ModuleNode, Node, NodeState,
    Outputs, Repeat, Result, ResumeFrom, Run, RunConfig, SaveBest, SaveCheckpoint, Task, TorchScript, Value,
};
use ice_worker::Worker;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};
use tch::{Device, Kind, Tensor, TrainableCModule, nn};

use common::{Line, as_ranks, turn};

const WEIGHT: [f32; 3] = [1.0, 2.0, 3.0];
const BIAS: [f32; 3] = [4.0, 5.0, 6.0];

/// Writes a safetensors file with a weight of this shape and a bias of three elements, under these
/// keys.
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

/// Returns the initial parameters of a run, after its first task.
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

fn config(out: &Path, init_from: impl Into<InitFrom>) -> RunConfig {
    RunConfig { out_dir: out.to_owned(), init_from: Some(init_from.into()), ..RunConfig::default() }
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

/// Returns the path of a file that PyTorch has written.
fn of_pytorch(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/init").join(name)
}

/// Returns the floats of that file, rounded to bfloat16 with `round`.
fn floats_of(name: &str, round: bool) -> BTreeMap<String, Vec<f32>> {
    let bytes = std::fs::read(of_pytorch(name)).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = tensors.iter().filter(|(_, tensor)| tensor.dtype() == Dtype::F32).map(|(key, tensor)| {
        let values = tensor.data().chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()));
        let values = Tensor::from_slice(&values.collect::<Vec<_>>());
        let values = if round { values.to_kind(Kind::BFloat16).to_kind(Kind::Float) } else { values };
        (key.to_owned(), Vec::try_from(values).unwrap())
    });
    floats.collect()
}

/// State of PyTorch's network in that file, in a program whose layer `fc` has `classes` outputs.
struct Net {
    /// The floating-point tensors.
    state: BTreeMap<String, Vec<f32>>,
    batches: Option<i64>,
}

/// Returns the initial state of that network in a program of one rank.
fn net(init: InitFrom, classes: i64, counts_batches: bool) -> Result<Net> {
    let (out, _turn) = (tempfile::tempdir().unwrap(), turn());
    let module = ModuleNode::new(
        move |path| {
            nn::conv2d(path / "conv", 1, 2, 3, Default::default());
            nn::batch_norm2d(path / "norm", 2, Default::default());
            nn::linear(path / "fc", 8, classes, Default::default());
            if counts_batches {
                let zero = Tensor::zeros([], (Kind::Int64, Device::Cpu));
                let _ = (path / "norm").add("num_batches_tracked", zero, false);
            }
        },
        |_, x| x.tensor("x"),
    );
    let mut graph = HyperGraph::new();
    graph.add("net", module, "*").unwrap();
    Run::execute(&graph, &Repeat::once(), Rc::new(Worker::alone(Device::Cpu)), config(out.path(), init))?;
    let state = graph.node::<ModuleNode<(), Tensor>>("net")?.state().model;
    let (floats, counters): (Vec<_>, Vec<_>) =
        state.into_iter().partition(|(_, tensor)| tensor.kind() == Kind::Float);
    let floats = floats.into_iter().map(|(key, tensor)| (key, Vec::try_from(tensor.flatten(0, -1)).unwrap()));
    Ok(Net { state: floats.collect(), batches: counters.first().map(|(_, tensor)| tensor.int64_value(&[])) })
}

#[test]
fn state_dict_of_pytorch_is_loaded_whether_batches_are_counted_or_not() {
    let expected = floats_of("net.safetensors", false);
    let without = net(InitFrom::new(of_pytorch("net.safetensors")), 3, false).unwrap();
    assert_eq!((&without.state, without.batches), (&expected, None));
    let with = net(InitFrom::new(of_pytorch("net.safetensors")), 3, true).unwrap();
    assert_eq!((&with.state, with.batches), (&expected, Some(1)));

    let folder = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(of_pytorch("net.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let path = folder.path().join("uncounted.safetensors");
    let floats = tensors.iter().filter(|(_, tensor)| tensor.dtype() == Dtype::F32);
    serialize_to_file(floats, None, &path).unwrap();
    let missing = net(InitFrom::new(path), 3, true).unwrap();
    assert_eq!((&missing.state, missing.batches), (&expected, Some(0)));
}

#[test]
fn sharded_half_precision_of_hugging_face_is_loaded_into_single_precision() {
    let expected = floats_of("net.safetensors", true);
    // The cache of huggingface_hub contains links to files in other folders.
    let cache = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(of_pytorch("sharded")).unwrap().map(|file| file.unwrap()) {
        std::os::unix::fs::symlink(file.path(), cache.path().join(file.file_name())).unwrap();
    }
    let index = of_pytorch("sharded/model.safetensors.index.json");
    for path in [&index, &of_pytorch("sharded"), cache.path()] {
        assert_eq!(net(InitFrom::new(path), 3, true).unwrap().state, expected, "{}", path.display());
    }
}

#[test]
fn renamed_keys_are_loaded_and_a_common_prefix_is_named() {
    let init = || InitFrom::new(of_pytorch("ddp.safetensors"));
    let error = net(init(), 3, false).err().unwrap();
    let text = error.to_string();
    assert!(error.is_usage() && text.contains(r"hint: --init-rename '^module\.='"), "{text}");
    let renamed = net(init().rename(r"^module\.", "").unwrap(), 3, false).unwrap();
    assert_eq!(renamed.state, floats_of("net.safetensors", false));
    let renamed = net(init().rename(r"^module\.(fc|conv|norm)", "net.$1").unwrap(), 3, false).unwrap();
    assert_eq!(renamed.state, floats_of("net.safetensors", false));

    let equal = init().rename("weight|bias", "x").unwrap();
    let text = net(equal, 3, false).err().unwrap().to_string();
    assert!(
        text.contains("`module.conv.bias` and `module.conv.weight` both become `module.conv.x`"),
        "{text}"
    );
    let text = init().rename("(", "").err().unwrap().to_string();
    assert!(text.contains("`(` is not a regular expression for keys"), "{text}");
}

#[test]
fn other_shapes_are_an_error_even_in_part_and_skipped_parameters_stay_random() {
    let init = || InitFrom::new(of_pytorch("net.safetensors"));
    for strict in [true, false] {
        let text = net(init().strict(strict), 5, false).err().unwrap().to_string();
        for named in
            ["`fc.weight` has the shape [3, 8] in the file and [5, 8] here", "`fc.bias`", "--init-skip"]
        {
            assert!(text.contains(named), "{named}: {text}");
        }
    }
    let skipped = net(init().skip(r"^fc\.").unwrap(), 5, false).unwrap();
    let file = floats_of("net.safetensors", false);
    for (key, values) in &skipped.state {
        assert_eq!(Some(values) == file.get(key), !key.starts_with("fc."), "{key}");
    }
    assert_eq!(skipped.state["fc.weight"].len(), 40);
}

#[test]
fn partial_files_are_an_error_unless_asked_for() {
    let out = tempfile::tempdir().unwrap();
    let path = file(out.path(), ("layer.weight", &[3, 1]), "other.bias");
    let begin = |init: InitFrom| {
        let _turn = turn();
        begin(Worker::alone(Device::Cpu), &["net"], config(out.path(), init))
    };
    let text = begin(InitFrom::new(&path)).unwrap_err().to_string();
    for named in ["missing `layer.bias`", "unexpected `other.bias`", "--init-partial"] {
        assert!(text.contains(named), "{named}: {text}");
    }
    let partial = begin(InitFrom::new(&path).strict(false)).unwrap();
    assert_eq!(partial["net.weight"], WEIGHT);
    assert_ne!(partial["net.bias"], BIAS);

    let nothing = InitFrom::new(&path).rename("^", "elsewhere.").unwrap().strict(false);
    let text = begin(nothing).unwrap_err().to_string();
    assert!(text.contains("has no parameter of this program"), "{text}");
}

#[test]
fn types_that_would_lose_values_are_an_error() {
    let out = tempfile::tempdir().unwrap();
    let save = |dtype, weight: &[u8], bias: &[u8]| {
        let path = out.path().join("typed.safetensors");
        let view = |shape, bytes| TensorView::new(dtype, shape, bytes).unwrap();
        let tensors = [("layer.weight", view(vec![3, 1], weight)), ("layer.bias", view(vec![3], bias))];
        serialize_to_file(tensors, None, &path).unwrap();
        path
    };
    let _turn = turn();
    let begin = |path: PathBuf| {
        let run = begin(Worker::alone(Device::Cpu), &["net"], config(out.path(), path));
        run.map_err(|error| error.to_string())
    };
    let doubles = |values: [f64; 3]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>();
    let (weight, bias) = (doubles([1.0, 2.0, f64::INFINITY]), doubles([4.0, 5.0, 6.0]));
    let begun = begin(save(Dtype::F64, &weight, &bias)).unwrap();
    assert_eq!(
        (&begun["net.weight"][..], &begun["net.bias"][..]),
        (&[1.0, 2.0, f32::INFINITY][..], &BIAS[..])
    );
    let error = begin(save(Dtype::F64, &doubles([1.0, 2.0, 1e300]), &bias)).unwrap_err();
    assert!(error.contains("`net.layer.weight` has values that are infinite in Float"), "{error}");
    let error = begin(save(Dtype::I32, &[0; 12], &[0; 12])).unwrap_err();
    assert!(error.contains("`layer.bias` is I32 in the file and Float here"), "{error}");
}

#[test]
fn damaged_indexes_and_other_formats_are_named() {
    let out = tempfile::tempdir().unwrap();
    let index = out.path().join("model.safetensors.index.json");
    let error = |path: &Path| net(InitFrom::new(path), 3, false).err().unwrap().to_string();
    let of_index = |map: &str| {
        std::fs::write(&index, format!("{{\"weight_map\": {map}}}")).unwrap();
        error(&index)
    };
    std::fs::copy(of_pytorch("net.safetensors"), out.path().join("a.safetensors")).unwrap();
    let outside = of_index(r#"{"conv.weight": "../a.safetensors"}"#);
    assert!(outside.contains("names `../a.safetensors`, which lies outside of its folder"), "{outside}");
    let lacks = of_index(r#"{"conv.weight": "a.safetensors", "gone": "a.safetensors"}"#);
    assert!(lacks.contains("names `gone` in a.safetensors, which does not have it"), "{lacks}");
    let absent = of_index(r#"{"conv.weight": "b.safetensors"}"#);
    assert!(absent.contains("b.safetensors"), "{absent}");
    let other = of_index("[]");
    assert!(other.contains("is not an index of a sharded model"), "{other}");

    rustix::fs::mkfifoat(rustix::fs::CWD, out.path().join("fifo"), rustix::fs::Mode::RUSR).unwrap();
    let fifo = of_index(r#"{"conv.weight": "fifo"}"#);
    assert!(fifo.contains("fifo") && fifo.contains("not a regular file"), "{fifo}");
    std::fs::File::create(&index).unwrap().set_len(65 << 20).unwrap();
    assert!(error(&index).contains("an index may have"), "{}", error(&index));

    let archive = out.path().join("pytorch_model.bin");
    std::fs::write(&archive, b"PK\x03\x04 and so on, as torch.save writes").unwrap();
    let text = error(&archive);
    assert!(
        text.contains("archive of torch.save") && text.contains("save_file(model.state_dict(), path)"),
        "{text}"
    );
    let empty = tempfile::tempdir().unwrap();
    let text = error(empty.path());
    assert!(text.contains("has neither model.safetensors.index.json nor"), "{text}");
}

#[test]
fn a_checkpoint_gives_its_parameters_and_not_its_optimizers() {
    let out = tempfile::tempdir().unwrap();
    let _turn = turn();
    let path = file(out.path(), ("layer.weight", &[3, 1]), "layer.bias");
    begin(Worker::alone(Device::Cpu), &["net"], config(out.path(), path)).unwrap();
    let run = std::fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().path());
    let run = run.into_iter().find(|path| path.is_dir()).unwrap();
    let other = tempfile::tempdir().unwrap();
    let begun = begin(Worker::alone(Device::Cpu), &["net"], config(other.path(), run.join("ckpts/latest")));
    assert_eq!(begun.unwrap(), given());
}

/// A custom node that counts training steps.
#[derive(Default)]
struct Steps(u64);

impl Node for Steps {
    fn set_up(&mut self, _: &Context) -> Result<()> {
        Ok(())
    }

    fn forward(&mut self, _: &Outputs) -> Result<Value> {
        Ok(Value::new(self.0))
    }

    fn before_step(&mut self) -> Result<()> {
        self.0 += 1;
        Ok(())
    }

    fn state(&self) -> NodeState {
        NodeState { values: self.0.into(), ..NodeState::default() }
    }

    fn load_state(&mut self, saved: &NodeState) -> Result<()> {
        self.0 = saved.values.as_u64().unwrap();
        Ok(())
    }
}

fn line_net() -> ModuleNode<nn::Linear, Tensor> {
    let build = |path: &nn::Path| nn::linear(path, 1, 1, Default::default());
    ModuleNode::new(build, |net: &nn::Linear, x| Ok(x.tensor("line")?.apply(net)))
}

#[test]
fn what_a_run_trained_is_used_without_its_data_and_losses() {
    let (out, _turn) = (tempfile::tempdir().unwrap(), turn());
    let mut graph = HyperGraph::new();
    let error = |x: &Outputs| Ok((x.tensor("net")? - x.tensor("line")? * 3.0).square());
    graph.add("line", DatasetNode::new(Line(8)).batch_size(2), "train").unwrap();
    graph.add("line", DatasetNode::new(Line(6)).batch_size(3), "val").unwrap();
    graph.add("steps", Steps::default(), "*").unwrap();
    graph.add("net", line_net().optimizer(Sgd::new(0.1)), "*").unwrap();
    graph.add("loss", LossNode::new(move |x| Ok(error(x)?.mean(Kind::Float))), "train").unwrap();
    graph.add("error", MetricNode::average(error), "val").unwrap();
    let seen = Rc::new(RefCell::new(Vec::new()));
    let note = Rc::clone(&seen);
    // The error falls: the first epoch has the highest error, and the second highest is newer.
    let tasks = Repeat::new(4)
        .then(Task::train("train"))
        .then(Task::eval("val"))
        .then(SaveCheckpoint::new())
        .then(SaveBest::new("val/error", Better::Higher).max_keep(2))
        .call(move |run| {
            let net = run.graph().node::<ModuleNode<nn::Linear, Tensor>>("net")?;
            note.borrow_mut().push((net.module()?.ws.double_value(&[0, 0]), run.measure("val/error")?));
            Ok(())
        });
    let no_init = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
    Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), no_init).unwrap();
    let run = std::fs::read_dir(out.path()).unwrap().next().unwrap().unwrap().path();
    let [first, .., last] = &seen.take()[..] else { panic!("four epochs") };
    assert!(first.1 > last.1);

    let mut used = HyperGraph::new();
    used.add("net", line_net(), "*").unwrap().add("steps", Steps::default(), "*").unwrap();
    let eager = used.eager(Device::Cpu, 9).unwrap();
    for (path, (weight, _)) in [("ckpts/latest", last), ("", last), ("best", first), ("ckpts", last)] {
        eager.load(&*run.join(path)).unwrap();
        let output = |at: f32| {
            eager.set_input("line", Tensor::from_slice(&[at]).view([1, 1]));
            let output =
                eager.forward("*", |x| Ok((x.tensor("net")?.double_value(&[0, 0]), *x.get::<u64>("steps")?)));
            output.unwrap()
        };
        let ((zero, steps), (one, _)) = (output(0.0), output(1.0));
        assert!((one - zero - weight).abs() < 1e-6, "{path}: {} for {weight}", one - zero);
        assert_eq!(steps, if path == "best" { 4 } else { 16 }, "{path}");
    }
    // The graph of the training program, at the start of its data, with the measures of the run.
    let eager = graph.eager(Device::Cpu, 9).unwrap();
    eager.load(&*run.join("best")).unwrap();
    assert_eq!(eager.evaluate("val").unwrap(), BTreeMap::from([("val/error".to_owned(), first.1)]));
    assert_eq!(eager.evaluate("val").unwrap()["val/error"], first.1);

    let mut other = HyperGraph::new();
    other.add("network", line_net(), "*").unwrap();
    let eager = other.eager(Device::Cpu, 9).unwrap();
    let text = eager.load(&*run).unwrap_err().to_string();
    assert!(text.contains("node `*/network`: missing `bias`, `weight`") && text.contains("rename"), "{text}");
    let text = eager.load(out.path()).unwrap_err().to_string();
    assert!(text.contains("nor a valid checkpoint"), "{text}");
    assert!(text.ends_with(&format!("its newest run is {}", run.display())), "{text}");
}

/// Returns PyTorch's results of the TorchScript module, by name.
fn script_tensors() -> BTreeMap<String, Tensor> {
    let tensors = Tensor::read_safetensors(of_pytorch("../script/steps.safetensors")).unwrap();
    tensors.into_iter().collect()
}

/// PyTorch's inputs and targets.
struct Pairs([Vec<Vec<f32>>; 2]);

impl Dataset for Pairs {
    type Batch = (Tensor, Tensor);

    fn len(&self) -> usize {
        12
    }

    fn batch(&self, indices: &[i64], _: Device) -> Result<Self::Batch> {
        let [x, target] = &self.0;
        let stacked = |rows: &[Vec<f32>]| {
            let rows: Vec<_> =
                indices.iter().map(|&index| Tensor::from_slice(&rows[index as usize])).collect();
            Tensor::stack(&rows, 0)
        };
        Ok((stacked(x), stacked(target)))
    }
}

type Script = ModuleNode<TorchScript, Tensor>;

fn script_graph(file: &str) -> HyperGraph {
    let mut graph = HyperGraph::new();
    let tensors = script_tensors();
    let pairs = Pairs(["x", "target"].map(|name| Vec::try_from(&tensors[name]).unwrap()));
    graph.add("data", DatasetNode::new(pairs).batch_size(12), "*").unwrap();
    let input = |x: &Outputs| -> Result<_> { Ok(x.get::<(Tensor, Tensor)>("data")?.0.shallow_clone()) };
    let net = ModuleNode::torch_script(of_pytorch("../script").join(file), move |net, x| {
        net.forward(x, &[input(x)?])
    });
    graph.add("net", net.optimizer(Sgd::new(0.1).momentum(0.9)), "*").unwrap();
    let loss = LossNode::new(|x| {
        let target = &x.get::<(Tensor, Tensor)>("data")?.1;
        Ok(x.tensor("net")?.mse_loss(target, tch::Reduction::Mean))
    });
    graph.add("loss", loss, "train").unwrap();
    graph.add("sum", MetricNode::average(|x| Ok(x.tensor("net")?.sum(Kind::Float))), "val").unwrap();
    graph
}

fn state_of(graph: &HyperGraph) -> BTreeMap<String, Tensor> {
    let state = graph.node::<Script>("net").unwrap().state().model;
    state.into_iter().map(|(key, tensor)| (key, tensor.copy())).collect()
}

/// Runs `steps` training steps of PyTorch's script, each an epoch, and evaluates. Returns the
/// state, and the measure of the evaluation.
fn run_script(worker: Worker, steps: u64, config: RunConfig) -> (BTreeMap<String, Tensor>, f64) {
    let graph = script_graph("net.pt");
    let measured = Rc::new(Cell::new(f64::NAN));
    let measure = Rc::clone(&measured);
    let tasks = Repeat::new(steps)
        .then(Task::train("train"))
        .then(SaveCheckpoint::new())
        .then(Task::eval("val"))
        .call(move |run| {
            measure.set(run.measure("val/sum")?);
            Ok(())
        });
    Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap();
    (state_of(&graph), measured.get())
}

#[test]
fn torch_script_is_trained_and_evaluated_as_in_pytorch() {
    let _turn = turn();
    let (tensors, graph) = (script_tensors(), script_graph("net.pt"));
    let eager = graph.eager(Device::Cpu, 5).unwrap();
    let close = |a: &Tensor, b: &Tensor| a.allclose(b, 1e-5, 1e-6, false);
    let evaluate = || eager.forward("val", |x| x.tensor("net")).unwrap();
    assert!(close(&evaluate(), &tensors["before"]));
    for _ in 0..3 {
        eager.train_step("train").unwrap();
    }
    assert!(close(&evaluate(), &tensors["after"]));
    let state = state_of(&graph);
    let of_pytorch: BTreeMap<_, _> = tensors
        .iter()
        .filter_map(|(key, tensor)| Some((key.strip_prefix("state.")?.to_owned(), tensor)))
        .collect();
    assert!(state.keys().eq(of_pytorch.keys()), "{:?}", state.keys());
    for (key, tensor) in &state {
        assert!(close(tensor, of_pytorch[key]), "{key}: {tensor:?}");
    }
    assert_eq!(state["norm.num_batches_tracked"].int64_value(&[]), 3);
}

#[test]
fn resumed_torch_script_ends_with_the_same_bits() {
    let _turn = turn();
    let alone = || Worker::alone(Device::Cpu);
    let begin = |out: &Path| RunConfig { out_dir: out.to_owned(), ..RunConfig::default() };
    let whole = tempfile::tempdir().unwrap();
    let expected = run_script(alone(), 5, begin(whole.path()));
    let run = std::fs::read_dir(whole.path()).unwrap().next().unwrap().unwrap().path();
    for from in ["E1S1", "E3S3"] {
        let resumed = tempfile::tempdir().unwrap();
        let resume_from = Some(ResumeFrom::Path(run.join("ckpts").join(from)));
        let got = run_script(alone(), 5, RunConfig { resume_from, ..begin(resumed.path()) });
        assert_eq!(got, expected, "{from}");
    }
}

#[test]
fn ranks_of_torch_script_share_gradients_and_buffers() {
    let out = tempfile::tempdir().unwrap();
    let config = || RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
    let states = as_ranks(2, |worker| run_script(worker, 3, config()));
    assert_eq!(states[0], states[1]);
    let tensors = script_tensors();
    let moved = &states[0].0["first.weight"] - &tensors["state.first.weight"];
    // Each rank computes its batch norm over half of the samples.
    assert!(moved.abs().max().double_value(&[]) > 1e-4);
    assert_eq!(states[0].0["norm.num_batches_tracked"].int64_value(&[]), 3);
}

#[test]
fn torch_script_that_cannot_be_trained_is_named() {
    let _turn = turn();
    let error = |file: &str| {
        let graph = script_graph(file);
        let error = graph.eager(Device::Cpu, 0).err().unwrap();
        assert!(error.is_usage(), "{error}");
        error.to_string()
    };
    let traced = error("traced.pt");
    assert!(
        traced.contains("traced.pt") && traced.contains("save the module with torch.jit.script"),
        "{traced}"
    );
    let other = error("steps.safetensors");
    assert!(other.contains("cannot be loaded as a TorchScript module"), "{other}");
    let nowhere = error("nowhere.pt");
    assert!(nowhere.contains("nowhere.pt"), "{nowhere}");

    let mut graph = HyperGraph::new();
    let net = ModuleNode::new(
        |path: &nn::Path| TrainableCModule::load(of_pytorch("../script/net.pt"), path / "net").unwrap(),
        |net: &TrainableCModule, x| Ok(net.forward_ts(&[x.tensor("x")?])?),
    );
    graph.add("net", net.optimizer(Sgd::new(0.1)), "*").unwrap();
    let of_tch = graph.eager(Device::Cpu, 0).err().unwrap().to_string();
    assert!(of_tch.contains("use ModuleNode::torch_script"), "{of_tch}");

    // Without an optimizer, the fixed mode of the module does not matter.
    let mut graph = HyperGraph::new();
    let net =
        Script::torch_script(of_pytorch("../script/traced.pt"), |net, x| net.forward(x, &[x.tensor("x")?]));
    graph.add("net", net, "*").unwrap();
    let eager = graph.eager(Device::Cpu, 0).unwrap();
    eager.set_input("x", script_tensors()["x"].shallow_clone());
    let output = eager.forward("*", |x| x.tensor("net")).unwrap();
    assert!(output.allclose(&script_tensors()["before"], 1e-5, 1e-6, false));
}
