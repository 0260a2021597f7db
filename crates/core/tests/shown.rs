//! Output of a run in addition to its events: times, and outputs of nodes.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod common;

use std::cell::RefCell;
use std::io::{self, Write};
use std::num::NonZeroU64;
use std::rc::Rc;

use common::{Line, as_ranks, on_ranks};
use ice_core::optim::Sgd;
use ice_core::{
    DatasetNode, HyperGraph, LossNode, ModuleNode, Probe, Repeat, ResumeFrom, Run, RunConfig, SaveCheckpoint,
    Task,
};
use tch::{Kind, nn};

fn graph() -> HyperGraph {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(8)).batch_size(2), "*").unwrap();
    let net = ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 1, Default::default()),
        |net, x| Ok(x.tensor("x")?.apply(net)),
    );
    graph.add("net", net.optimizer(Sgd::new(0.0)), "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.mean(Kind::Float) * 0.0 + 0.5)), "*").unwrap();
    graph
}

#[test]
fn a_timed_task_writes_what_each_node_took() {
    let times = |timed: bool| {
        let out = tempfile::tempdir().unwrap();
        as_ranks(2, |worker| {
            let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
            let train = if timed { Task::train("train").timed() } else { Task::train("train") };
            let eval = Task::eval(if timed { "val,timer" } else { "val" });
            Run::execute(&graph(), &Repeat::new(2).then(train).then(eval), Rc::new(worker), config).unwrap();
        });
        std::fs::read_to_string(out.path().join("none_local/timers.csv")).ok()
    };
    assert_eq!(times(false), None);
    let csv = times(true).unwrap();
    let mut lines = csv.lines();
    assert_eq!(lines.next(), Some("task,node,phase,count,mean_ms,min_ms,max_ms,total_ms"));
    // Two epochs of two steps. Only one of the two ranks measures.
    for row in [
        "\"train\",\"*/x\",forward,4",
        "\"train\",\"*/net\",forward,4",
        "\"train\",\"*/loss\",forward,4",
        "\"train\",\"*\",backward,4",
        "\"train\",\"*/net\",update,4",
        "\"timer,val\",\"*/net\",forward,4",
    ] {
        let line =
            csv.lines().find(|line| line.starts_with(row)).unwrap_or_else(|| panic!("no {row} in {csv}"));
        let numbers: Vec<f64> =
            line[row.len() + 1..].split(',').map(|number| number.parse().unwrap()).collect();
        let [mean, min, max, total] = numbers[..] else { panic!("{line}") };
        assert!(0.0 < min && min <= mean && mean <= max && max < total, "{line}");
        assert!((mean * 4.0 - total).abs() < 1e-4, "{line}");
    }
    assert!(!csv.contains("\"timer,val\",\"*\",backward"), "{csv}");
}

#[derive(Clone, Default)]
struct Page(Rc<RefCell<Vec<u8>>>);

impl Write for Page {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Returns the output of a probe on each of two ranks. The run trains for an epoch of 2 steps,
/// evaluates for one, and repeats both.
fn printed(probe: impl Fn() -> Probe + Sync) -> Vec<String> {
    on_ranks(2, |_| {
        let (mut graph, page) = (graph(), Page::default());
        graph.print_forward_output(probe().to(page.clone()), "#train,#val").unwrap();
        let tasks = Repeat::new(2).then(Task::train("train")).then(Task::eval("val"));
        (graph, tasks, Box::new(move || String::from_utf8(page.0.take()).unwrap()) as Box<_>)
    })
}

#[test]
fn a_probe_prints_outputs_with_their_place() {
    let every = |n: u64| NonZeroU64::new(n).unwrap();
    let places = |pages: Vec<String>| -> Vec<Vec<String>> {
        let of = |line: &str| line.strip_suffix(": loss = 0.5").map(str::to_owned);
        pages.iter().map(|page| page.lines().map(|line| of(line).unwrap()).collect()).collect()
    };
    let all = ["E0S0", "E0S1", "E1S2", "E1S2", "E1S2", "E1S3", "E2S4", "E2S4"];
    assert_eq!(places(printed(|| Probe::of(["loss"]))), [&all[..], &[]]);
    assert_eq!(places(printed(|| Probe::of(["loss"]).on_all_ranks())), [&all[..], &all[..]]);
    let training = places(printed(|| Probe::of(["loss"]).train_only().every(every(2))));
    assert_eq!(training, [&["E0S0", "E1S2"][..], &[]]);
    assert_eq!(
        places(printed(|| Probe::of(["loss"]).every(every(3)).total(2))),
        [&["E0S0", "E1S2"][..], &[]]
    );

    let tensors = printed(|| Probe::of(["x", "net"]).total(1)).remove(0);
    let x = "E0S0: x = \n[[0.0000],\n [0.1250]]\nTensor[[2, 1], Float]\nE0S0: net = \n[[";
    assert!(tensors.starts_with(x) && tensors.lines().count() == 8, "{tensors}");
}

#[test]
fn scalars_of_nodes_are_shown_once_in_each_step_that_counts() {
    let out = tempfile::tempdir().unwrap();
    as_ranks(2, |worker| {
        let config = RunConfig { out_dir: out.path().to_owned(), ..RunConfig::default() };
        let mut graph = graph();
        let shown = LossNode::new(|x| {
            x.show_scalar("own/weight", 1.0);
            x.show_scalar("own/weight", x.train_steps() as f64);
            Ok(x.tensor("net")?.mean(Kind::Float))
        });
        graph.add("shown", shown, "train").unwrap();
        let tasks = Repeat::new(2).then(Task::train("train")).then(Task::eval("val"));
        Run::execute(&graph, &tasks, Rc::new(worker), config).unwrap();
    });
    let files = std::fs::read_dir(out.path().join("none_local")).unwrap().map(|entry| entry.unwrap().path());
    let events = files
        .filter(|path| path.to_str().unwrap().contains("tfevents"))
        .map(|path| std::fs::read(path).unwrap());
    let events: Vec<u8> = events.flatten().collect();
    let tag = b"own/weight";
    assert_eq!(events.windows(tag.len()).filter(|window| window == tag).count(), 4);
}

#[test]
fn events_of_resumed_runs_share_a_folder_if_one_is_given() {
    let out = tempfile::tempdir().unwrap();
    let events = out.path().join("curve");
    for epochs in [1, 2] {
        as_ranks(2, |worker| {
            let config = RunConfig {
                out_dir: out.path().to_owned(),
                events_dir: Some(events.clone()),
                log_every: NonZeroU64::new(1),
                resume_from: Some(ResumeFrom::Auto),
                ..RunConfig::default()
            };
            let tasks = Repeat::new(epochs).then(Task::train("train")).then(SaveCheckpoint::new());
            Run::execute(&graph(), &tasks, Rc::new(worker), config).unwrap();
        });
    }
    let files = |folder: &std::path::Path| {
        let names = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        names.filter(|name| name.to_string_lossy().contains("tfevents")).count()
    };
    assert_eq!((files(&events), files(&out.path().join("none_local"))), (2, 0));
}
