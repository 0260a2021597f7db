//! The times of a save and a load, for `scripts/bench-checkpoint`. Prints `<name> <seconds>` lines.
//!
//! usage: bench_checkpoint DIR MEGABYTES

use std::error::Error;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;

use ice_core::optim::AdamW;
use ice_core::{HyperGraph, ModuleNode, Repeat, Run, RunConfig};
use ice_worker::Worker;
use tch::{Device, Kind, Tensor, nn};

/// Number of tensors into which the parameters are divided.
const LAYERS: i64 = 40;
/// Number of saves before the measured one.
const WARM_UP: usize = 3;
/// Bytes of a parameter: an f32, and AdamW's two moments.
const BYTES_PER_PARAMETER: i64 = 12;

fn main() -> Result<(), Box<dyn Error>> {
    let usage = "usage: bench_checkpoint DIR MEGABYTES";
    let mut arguments = std::env::args().skip(1);
    let folder = PathBuf::from(arguments.next().ok_or(usage)?);
    let bytes = arguments.next().ok_or(usage)?.parse::<i64>()? * 1_000_000;
    let width = bytes / BYTES_PER_PARAMETER / LAYERS;

    let mut graph = HyperGraph::new();
    let build = move |path: &nn::Path| {
        (0..LAYERS)
            .map(|layer| path.randn(&format!("layer{layer}"), &[width], 0.0, 1.0))
            .collect::<Vec<Tensor>>()
    };
    let net = ModuleNode::new(build, |_, _| Ok(()));
    graph.add("net", net.optimizer(AdamW::new(0.1)), "*")?;

    let config = RunConfig {
        seed: 0,
        out_dir: folder.clone(),
        save_every_steps: None,
        resume_from: None,
        ..RunConfig::default()
    };
    let tasks = Repeat::once().call(move |run| measure(run, bytes, &folder));
    Ok(Run::execute(&graph, &tasks, Rc::new(Worker::alone(Device::Cpu)), config)?)
}

fn measure(run: &Run, bytes: i64, folder: &std::path::Path) -> ice_core::Result<()> {
    let print = |name: &str, since: Instant| println!("{name} {}", since.elapsed().as_secs_f64());
    let from = Tensor::ones([bytes / 4], (Kind::Float, Device::Cpu));
    let mut to = vec![0_u8; bytes as usize];
    from.f_copy_data_u8(&mut to, from.numel())?;
    let copy = Instant::now();
    from.f_copy_data_u8(&mut to, from.numel())?;
    print("memcpy", copy);
    drop((from, to));

    // The first saves make the system provide the memory that later saves reuse.
    for number in 0..WARM_UP {
        let first = Instant::now();
        run.save_checkpoint(Some(&folder.join(format!("checkpoint{number}"))), None)?;
        if number == 0 {
            print("first-stall", first);
        }
        run.finish_saving()?;
        rustix::fs::sync();
    }
    let checkpoint = folder.join("checkpoint");

    let save = Instant::now();
    run.save_checkpoint(Some(&checkpoint), None)?;
    print("stall", save);
    run.finish_saving()?;
    print("save", save);

    let load = Instant::now();
    run.load_checkpoint(&ice_core::ResumeFrom::Path(checkpoint), true, None)?;
    print("load", load);
    Ok(())
}
