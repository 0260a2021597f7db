//! Runs of a small graph in one process: checkpoints that are saved, found, and refused.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::cell::RefCell;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Mutex, PoisonError};

use ice_core::data::Dataset;
use ice_core::optim::AdamW;
use ice_core::{
    Better, Checkpoint, CheckpointOptions, DatasetNode, HyperGraph, LoadCheckpoint, LossNode, Manifest,
    ModuleNode, Repeat, Result, ResumeFrom, Run, RunConfig, SaveBest, SaveCheckpoint, Task,
};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor, nn};

/// `samples` points on a line.
struct Line(usize);

impl Dataset for Line {
    type Batch = Tensor;

    fn len(&self) -> usize {
        self.0
    }

    fn batch(&self, indices: &[i64], device: Device) -> Result<Tensor> {
        Ok(Tensor::from_slice(indices).to_device(device).to_kind(Kind::Float).unsqueeze(1) / self.0 as f64)
    }
}

fn graph(samples: usize) -> HyperGraph {
    let mut graph = HyperGraph::new();
    graph.add("x", DatasetNode::new(Line(samples)).shuffle(true).batch_size(4), "train").unwrap();
    let net = ModuleNode::new(
        |path| nn::linear(path / "layer", 1, 3, Default::default()),
        |net, x| Ok(x.tensor("x")?.apply(net).dropout(0.5, x.is_training())),
    );
    graph.add("net", net.optimizer(AdamW::new(0.05)), "*").unwrap();
    graph.add("loss", LossNode::new(|x| Ok(x.tensor("net")?.square().mean(Kind::Float))), "train").unwrap();
    graph
}

fn tasks(epochs: u64) -> Repeat {
    Repeat::new(epochs).then(Task::train("train")).then(SaveCheckpoint::new())
}

/// libtorch has one random number generator per process, as if a process were one rank. Runs in
/// threads must therefore take turns.
static ONE_RUN_AT_A_TIME: Mutex<()> = Mutex::new(());

struct Options<'a> {
    out: &'a Path,
    samples: usize,
    epochs: u64,
    every: Option<u64>,
    from: Option<ResumeFrom>,
    seed: u64,
}

impl<'a> Options<'a> {
    fn new(out: &'a Path) -> Self {
        Self { out, samples: 22, epochs: 3, every: None, from: None, seed: 7 }
    }

    fn run(self) -> Result<()> {
        self.run_with(CheckpointOptions::default())
    }

    fn run_with(self, checkpoints: CheckpointOptions) -> Result<()> {
        let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let config = RunConfig {
            seed: self.seed,
            out_dir: self.out.to_owned(),
            save_every_steps: self.every,
            resume_from: self.from,
            checkpoints,
            ..RunConfig::default()
        };
        let worker = Rc::new(Worker::alone(Device::Cpu));
        Run::execute(&graph(self.samples), &tasks(self.epochs), worker, config)
    }
}

fn saved(out: &Path, name: &str) -> PathBuf {
    out.join("none_local/ckpts").join(name)
}

fn bits(out: &Path, name: &str) -> [Vec<u8>; 2] {
    ["model.safetensors", "optimizer-00000-of-00001.safetensors"]
        .map(|file| fs::read(saved(out, name).join(file)).unwrap())
}

#[test]
fn a_run_resumed_anywhere_ends_with_the_same_bits() {
    let whole = tempfile::tempdir().unwrap();
    Options { every: Some(1), ..Options::new(whole.path()) }.run().unwrap();
    // 22 samples in batches of 4 are 6 steps per epoch. E0S4 lies within the first epoch, E1S6 at
    // its end.
    for from in ["E0S1", "E0S4", "E1S6", "E1S11", "E2S17"] {
        let resumed = tempfile::tempdir().unwrap();
        let from = Some(ResumeFrom::Path(saved(whole.path(), from)));
        Options { from, ..Options::new(resumed.path()) }.run().unwrap();
        assert_eq!(bits(whole.path(), "E3S18"), bits(resumed.path(), "E3S18"));
    }
}

#[test]
fn the_end_of_an_epoch_is_not_lost_where_steps_end_with_it() {
    // 22 samples in batches of 4 are 6 steps per pass. The first task ends with a pass, the second
    // within one.
    let tasks = || {
        Repeat::new(2)
            .then(Task::train("train").steps(6))
            .then(Task::train("train").steps(8).simulate_epoch())
            .then(SaveCheckpoint::new())
    };
    let run = |out: &Path, from: Option<PathBuf>| {
        let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let config = RunConfig {
            out_dir: out.to_owned(),
            save_every_steps: Some(1),
            resume_from: from.map(ResumeFrom::Path),
            ..RunConfig::default()
        };
        Run::execute(&graph(22), &tasks(), Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
        let Manifest { counters, tasks, measures, nodes, .. } =
            Checkpoint::newest_of_runs(&out.join("none_local"), 0).unwrap().manifest().clone();
        (counters, tasks, measures, nodes)
    };
    let whole = tempfile::tempdir().unwrap();
    let expected = run(whole.path(), None);
    assert_eq!((expected.0.train_steps, expected.0.train_epochs), (28, 4));
    let all = names(&whole.path().join("none_local/ckpts"));
    for from in all.iter().filter(|name| name.starts_with('E') && *name != "E4S28") {
        let resumed = tempfile::tempdir().unwrap();
        let from = saved(whole.path(), from);
        assert_eq!(run(resumed.path(), Some(from.clone())), expected, "{}", from.display());
        assert_eq!(bits(whole.path(), "E4S28"), bits(resumed.path(), "E4S28"));
    }
}

#[test]
fn a_damaged_checkpoint_is_passed_over_for_an_older_one() {
    let out = tempfile::tempdir().unwrap();
    Options::new(out.path()).run().unwrap();
    let newest =
        |out: &Path| Checkpoint::find(&ResumeFrom::Latest, out, "none").map(|found| found.path().to_owned());
    assert_eq!(newest(out.path()).unwrap(), saved(out.path(), "E3S18"));

    let file = saved(out.path(), "E3S18").join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    assert_eq!(newest(out.path()).unwrap(), saved(out.path(), "E2S12"));
    let message = Checkpoint::open(&saved(out.path(), "E3S18")).err().unwrap().to_string();
    assert!(message.contains("model.safetensors") && message.contains("damaged"), "{message}");

    fs::write(saved(out.path(), "E2S12").join("manifest.json"), "{").unwrap();
    fs::remove_file(saved(out.path(), "E1S6").join("optimizer-00000-of-00001.safetensors")).unwrap();
    let error = newest(out.path()).unwrap_err();
    assert!(error.is_usage() && error.to_string().contains("no valid checkpoint"), "{error}");
}

#[test]
fn what_does_not_fit_is_refused_before_anything_is_loaded() {
    let out = tempfile::tempdir().unwrap();
    Options { epochs: 2, every: Some(4), ..Options::new(out.path()) }.run().unwrap();
    let from = || Some(ResumeFrom::Latest);
    let within = Some(ResumeFrom::Path(saved(out.path(), "E0S4")));
    for (options, named) in [
        (Options { from: from(), seed: 8, ..Options::new(out.path()) }, "--seed 7"),
        (Options { from: within, samples: 23, ..Options::new(out.path()) }, "22 samples"),
        (Options { from: from(), epochs: 0, ..Options::new(out.path()) }, "only 0"),
    ] {
        let message = options.run().unwrap_err().to_string();
        assert!(message.contains(named), "{message}");
    }
}

/// Executes a run with custom tasks over the small graph.
fn run(out: &Path, tasks: &Repeat, options: CheckpointOptions) -> Result<()> {
    let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let config = RunConfig {
        seed: 7,
        out_dir: out.to_owned(),
        save_every_steps: None,
        resume_from: None,
        checkpoints: options,
        ..RunConfig::default()
    };
    Run::execute(&graph(22), tasks, Rc::new(Worker::alone(Device::Cpu)), config)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_newest_and_the_best_are_kept() {
    let out = tempfile::tempdir().unwrap();
    let options = CheckpointOptions { keep_last: NonZeroUsize::new(2), ..CheckpointOptions::default() };
    let values: Rc<RefCell<Vec<(f64, String)>>> = Rc::default();
    let seen = Rc::clone(&values);
    let tasks = tasks(6).then(SaveBest::new("train/loss", Better::Lower).max_keep(2)).call(move |run| {
        let name = format!("E{}S{}", run.counters().train_epochs(), run.counters().train_steps());
        seen.borrow_mut().push((run.measure("train/loss")?, name));
        Ok(())
    });
    run(out.path(), &tasks, options).unwrap();
    let folder = out.path().join("none_local");
    assert_eq!(names(&folder.join("ckpts")), ["E5S30", "E6S36", "latest"]);
    assert_eq!(fs::read_link(folder.join("ckpts/latest")).unwrap(), Path::new("E6S36"));

    let mut values = values.borrow().clone();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut best: Vec<_> = values.iter().take(2).map(|(_, name)| name.clone()).collect();
    best.sort();
    let kept: Vec<_> = names(&folder.join("best")).into_iter().filter(|name| name != "latest").collect();
    assert_eq!(kept, best, "{values:?}");
}

#[test]
fn best_checkpoint_is_that_of_the_whole_run_after_a_resume() {
    let out = tempfile::tempdir().unwrap();
    let [whole, first, second] = ["whole", "first", "second"].map(|name| out.path().join(name));
    let train = |out: &Path, epochs: u64, resume_from: Option<ResumeFrom>| {
        let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        // The loss falls, so that the first epoch stays the best.
        let tasks = Repeat::new(epochs)
            .then(Task::train("train"))
            .then(SaveBest::new("train/loss", Better::Higher))
            .then(SaveCheckpoint::new());
        let config = RunConfig { out_dir: out.to_owned(), resume_from, ..RunConfig::default() };
        Run::execute(&graph(22), &tasks, Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
        let best = names(&out.join("none_local/best"));
        best.into_iter().filter(|name| name != "latest").collect::<Vec<_>>()
    };
    let best = train(&whole, 4, None);
    assert_eq!(best, ["E1S6"]);
    assert_eq!(train(&first, 2, None), best);
    let from = ResumeFrom::Path(first.join("none_local/ckpts/latest"));
    assert_eq!(train(&second, 4, Some(from)), best);
    let model = |out: &Path| out.join("none_local/best/E1S6/model.safetensors");
    assert_eq!(fs::read(model(&second)).unwrap(), fs::read(model(&whole)).unwrap());
    assert!(model(&first).exists());
    // A checkpoint after the one that is resumed from does not belong to the resumed run.
    let of_best = first.join("none_local/best");
    fs::rename(of_best.join("E1S6"), of_best.join("E2S12")).unwrap();
    fs::copy(saved(&first, "E2S12").join("manifest.json"), of_best.join("E2S12/manifest.json")).unwrap();
    let mut manifest = Manifest::read(&of_best.join("E2S12")).unwrap();
    manifest.counters.train_steps = 13;
    fs::write(of_best.join("E2S12/manifest.json"), manifest.to_bytes().unwrap()).unwrap();
    let from = ResumeFrom::Path(saved(&first, "E2S12"));
    assert_eq!(train(&out.path().join("third"), 3, Some(from)), ["E3S18"]);
}

#[test]
fn damaged_checkpoints_do_not_count_among_those_to_keep() {
    let out = tempfile::tempdir().unwrap();
    Options { epochs: 3, ..Options::new(out.path()) }.run().unwrap();
    let newest = saved(out.path(), "E3S18").join("model.safetensors");
    fs::write(&newest, "short").unwrap();
    let removed = ice_checkpoint::keep_last(&out.path().join("none_local/ckpts"), 1, None).unwrap();
    assert_eq!(removed, [saved(out.path(), "E1S6")]);
    assert_eq!(names(&out.path().join("none_local/ckpts")), ["E2S12", "E3S18", "latest"]);
}

#[test]
fn parameters_of_some_nodes_go_to_a_folder_and_back() {
    let out = tempfile::tempdir().unwrap();
    let pretrained = out.path().join("pretrained");
    let save = SaveCheckpoint::new().to(&pretrained).tags("other");
    run(out.path(), &Repeat::once().then(Task::train("train")).then(save), CheckpointOptions::default())
        .unwrap();
    let checkpoint = Checkpoint::open(&pretrained).unwrap();
    // The net is tagged `*`, all other nodes `train`.
    assert!(checkpoint.catalog().model.keys().all(|key| key.starts_with("net.")));
    assert_eq!(checkpoint.manifest().nodes.len(), 0);

    let again = out.path().join("again");
    let tasks = Repeat::once()
        .then(LoadCheckpoint::from(&pretrained).tags("other"))
        .then(SaveCheckpoint::new().to(&again).tags("other"));
    run(out.path(), &tasks, CheckpointOptions::default()).unwrap();
    for file in ["model.safetensors", "optimizer-00000-of-00001.safetensors"] {
        assert_eq!(fs::read(pretrained.join(file)).unwrap(), fs::read(again.join(file)).unwrap(), "{file}");
    }

    let from = Some(ResumeFrom::Path(pretrained.clone()));
    let message = Options { from, ..Options::new(out.path()) }.run().unwrap_err().to_string();
    assert!(message.contains("LoadCheckpoint"), "{message}");
    let whole = Repeat::once().then(LoadCheckpoint::from(&pretrained));
    let message = run(out.path(), &whole, CheckpointOptions::default()).unwrap_err().to_string();
    assert!(message.contains("node `train/x`: missing"), "{message}");
}

#[test]
fn a_run_that_need_not_fit_starts_from_the_beginning() {
    let [old, new] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    Options { epochs: 1, every: Some(4), ..Options::new(old.path()) }.run().unwrap();
    let other = |from| Options { samples: 23, epochs: 1, from, ..Options::new(new.path()) };
    // The checkpoint lies within a pass over other data.
    let from = Some(ResumeFrom::Path(saved(old.path(), "E0S4")));
    let strict = other(from.clone()).run().unwrap_err();
    assert!(strict.is_usage(), "{strict}");
    let lenient = CheckpointOptions { begin_if_misfit: true, ..CheckpointOptions::default() };
    other(from).run_with(lenient).unwrap();
    let fresh = tempfile::tempdir().unwrap();
    Options { samples: 23, epochs: 1, ..Options::new(fresh.path()) }.run().unwrap();
    assert_eq!(bits(new.path(), "E1S6"), bits(fresh.path(), "E1S6"), "nothing of the checkpoint was loaded");
}

#[test]
fn random_numbers_of_an_evaluation_are_the_same_after_a_resume_and_others_in_each_step() {
    let measured = |out: &Path, from: Option<&str>| {
        let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let mut graph = graph(8);
        graph.add("x", DatasetNode::new(Line(8)).batch_size(4), "val").unwrap();
        let noise = |x: &ice_core::Outputs| Ok(x.tensor("x")?.rand_like());
        graph.add("noise", ice_core::MetricNode::average(noise), "val").unwrap();
        let seen = Rc::new(RefCell::new(Vec::new()));
        let see = Rc::clone(&seen);
        let tasks = Repeat::new(3)
            .then(Task::train("train"))
            .then(SaveCheckpoint::new())
            .then(Task::eval("val"))
            .call(move |run| {
                see.borrow_mut().push(run.measure("val/noise")?);
                Ok(())
            });
        let resume_from = from.map(|name| ResumeFrom::Path(saved(out, name)));
        let config = RunConfig { out_dir: out.to_owned(), resume_from, ..RunConfig::default() };
        Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config).unwrap();
        seen.take()
    };
    let out = tempfile::tempdir().unwrap();
    let whole = measured(out.path(), None);
    assert!(whole[0] != whole[1] && whole[1] != whole[2], "{whole:?}");
    assert_eq!(measured(out.path(), Some("E1S2")), whole);
    assert_eq!(measured(out.path(), Some("E2S4")), whole[1..]);
}

#[test]
fn auto_begins_where_nothing_was_saved_and_resumes_later_but_not_past_damage() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("not/yet");
    let run = |epochs| Options { from: Some(ResumeFrom::Auto), epochs, ..Options::new(&out) }.run();
    // Checkpoints of another run do not belong to this run, even damaged ones.
    fs::create_dir_all(out.join("none_other_1129_ab/ckpts/E0S1")).unwrap();
    run(1).unwrap();
    assert_eq!(names(&out.join("none_local/ckpts")), ["E1S6", "latest"]);
    run(2).unwrap();
    assert_eq!(names(&out.join("none_local/ckpts")), ["E1S6", "E2S12", "latest"]);
    let whole = tempfile::tempdir().unwrap();
    Options { epochs: 2, ..Options::new(whole.path()) }.run().unwrap();
    assert_eq!(bits(&out, "E2S12"), bits(whole.path(), "E2S12"), "it has resumed");
    for name in ["E1S6", "E2S12"] {
        fs::write(saved(&out, name).join("manifest.json"), "{").unwrap();
    }
    let problem = run(3).unwrap_err().to_string();
    assert!(problem.contains("`none` has checkpoints") && problem.contains("none is valid"), "{problem}");
}

#[test]
fn output_folder_that_cannot_be_written_is_an_error_before_the_first_task() {
    let out = tempfile::tempdir().unwrap();
    // The tests may run as root, which ignores permissions, but even root cannot create a folder in
    // /proc.
    let proc = Path::new("/proc/none");
    for (folder, saves) in [(proc, true), (proc, false), (out.path(), true)] {
        let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Rc::new(RefCell::new(false));
        let note = Rc::clone(&begun);
        let mut tasks = Repeat::once().call(move |_| {
            *note.borrow_mut() = true;
            Ok(())
        });
        if saves {
            tasks = tasks.then(SaveCheckpoint::new());
        }
        let config = RunConfig { out_dir: folder.to_owned(), ..RunConfig::default() };
        let worker = Rc::new(Worker::alone(Device::Cpu));
        let outcome = Run::execute(&graph(4), &tasks, worker, config);
        let works = folder != proc || !saves;
        assert_eq!((outcome.is_ok(), *begun.borrow()), (works, works), "{outcome:?}");
        if let Err(error) = outcome {
            assert!(error.to_string().contains("/proc/none"), "{error}");
        }
    }
}

#[test]
fn half_written_checkpoint_of_a_killed_run_of_the_same_id_is_removed() {
    let out = tempfile::tempdir().unwrap();
    Options::new(out.path()).run().unwrap();
    let first = fs::read_dir(out.path()).unwrap().next().unwrap().unwrap().file_name();
    let id = first.to_str().unwrap().strip_suffix("_local").unwrap().to_owned();
    let left = |run: &str| out.path().join(run).join("ckpts/.E1S1.1-0.partial");
    let (own, other) = (left(&format!("{id}_01020304_0123abcd")), left("other_01020304_0123abcd"));
    fs::create_dir_all(&own).unwrap();
    fs::create_dir_all(&other).unwrap();
    Options::new(out.path()).run().unwrap();
    assert_eq!((own.exists(), other.exists()), (false, true));
}

/// Resumes the small graph, changed by `change`, with other tasks.
fn resume_changed(
    out: &Path,
    from: &Path,
    strict: bool,
    change: impl Fn(&mut HyperGraph),
    tasks: &Repeat,
) -> Result<()> {
    let _turn = ONE_RUN_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let mut graph = graph(22);
    change(&mut graph);
    let config = RunConfig {
        seed: 7,
        out_dir: out.to_owned(),
        resume_from: Some(ResumeFrom::Path(from.to_owned())),
        checkpoints: CheckpointOptions { strict, ..CheckpointOptions::default() },
        ..RunConfig::default()
    };
    Run::execute(&graph, tasks, Rc::new(Worker::alone(Device::Cpu)), config)
}

#[test]
fn measures_validation_and_tasks_may_change_and_the_training_is_resumed() {
    let [whole, old] = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    Options::new(whole.path()).run().unwrap();
    Options { epochs: 2, every: Some(4), ..Options::new(old.path()) }.run().unwrap();
    let change = |graph: &mut HyperGraph| {
        graph.remove_node("train/loss").unwrap();
        let loss = |x: &ice_core::Outputs| Ok(x.tensor("net")?.square().mean(Kind::Float));
        graph.add("error", LossNode::new(loss), "*").unwrap();
        let mean = |x: &ice_core::Outputs| Ok(x.tensor("net")?.mean_dim(1, false, Kind::Float));
        graph.add("mean", ice_core::MetricNode::average(mean), "*").unwrap();
        graph.add("x", DatasetNode::new(Line(8)).batch_size(4), "val").unwrap();
    };
    // One checkpoint lies within the second epoch, one at its end.
    for (from, validated) in [("E1S8", 2), ("E2S12", 2)] {
        let new = tempfile::tempdir().unwrap();
        let (seen, called) = (Rc::new(RefCell::new(0)), Rc::new(RefCell::new(0)));
        let (see, call) = (Rc::clone(&seen), Rc::clone(&called));
        // The first item is new, and training comes after it.
        let tasks = || {
            let (see, call) = (Rc::clone(&see), Rc::clone(&call));
            Repeat::new(3)
                .then(Task::eval("val").steps(0))
                .then(Task::train("train"))
                .call(move |run| {
                    *see.borrow_mut() += 1;
                    run.measure("*/mean").map(drop)
                })
                .then(Task::eval("val"))
                .then(SaveCheckpoint::new())
                .call(move |_| {
                    *call.borrow_mut() += 1;
                    Ok(())
                })
        };
        let from = saved(old.path(), from);
        let error = resume_changed(new.path(), &from, true, change, &tasks()).unwrap_err().to_string();
        assert!(error.contains("6 items and had 2"), "{error}");
        resume_changed(new.path(), &from, false, change, &tasks()).unwrap();
        assert_eq!(bits(whole.path(), "E3S18"), bits(new.path(), "E3S18"), "{}", from.display());
        assert!(*seen.borrow() >= 1 && *called.borrow() == validated, "{seen:?} {called:?}");
    }
    // Parameters and the state of optimizers must fit.
    let other = |graph: &mut HyperGraph| {
        let more = ModuleNode::new(|path| path.ones("w", &[2]), |w: &tch::Tensor, _| Ok(w.shallow_clone()));
        graph.add("more", more, "*").unwrap();
    };
    let new = tempfile::tempdir().unwrap();
    let error = resume_changed(new.path(), &saved(old.path(), "E2S12"), false, other, &tasks(3));
    let error = error.unwrap_err().to_string();
    assert!(error.contains("node `*/more`: missing `w`"), "{error}");
}

#[test]
fn task_that_was_made_longer_is_continued_and_what_follows_is_done_after_it() {
    let [whole, old, new] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let tasks = |epochs| Repeat::once().then(Task::train("train").epochs(epochs)).then(SaveCheckpoint::new());
    run(whole.path(), &tasks(3), CheckpointOptions::default()).unwrap();
    run(old.path(), &tasks(2), CheckpointOptions::default()).unwrap();
    let from = saved(old.path(), "E2S12");
    let error = resume_changed(new.path(), &from, true, |_| {}, &tasks(3)).unwrap_err().to_string();
    assert!(error.contains("Epochs(3)") && error.contains("Epochs(2)"), "{error}");
    resume_changed(new.path(), &from, false, |_| {}, &tasks(3)).unwrap();
    assert_eq!(bits(whole.path(), "E3S18"), bits(new.path(), "E3S18"));
    let error = resume_changed(new.path(), &from, false, |_| {}, &tasks(1)).unwrap_err().to_string();
    assert!(error.contains("only Epochs(1) are asked for"), "{error}");
}

#[test]
fn run_is_found_in_a_folder_above_its_own() {
    let [whole, old, new] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    Options::new(whole.path()).run().unwrap();
    Options { epochs: 2, ..Options::new(old.path()) }.run().unwrap();
    let from = Some(ResumeFrom::Path(old.path().to_owned()));
    Options { from, ..Options::new(new.path()) }.run().unwrap();
    assert_eq!(bits(whole.path(), "E3S18"), bits(new.path(), "E3S18"));
    let dataset = DatasetNode::new(Line(22));
    assert!(dataset.len() == 22 && !dataset.is_empty());
}
