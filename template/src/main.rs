//! A small network learns which of two spirals a point lies on.

use std::f64::consts::PI;
use std::process::ExitCode;

use ice::prelude::*;

#[derive(Parser)]
struct Options {
    /// Times to go through the points.
    #[arg(long, default_value_t = 30)]
    epochs: u64,
    #[command(flatten)]
    run: RunOptions,
}

/// Point `index` and its spiral: float `[2]` and 0 or 1.
fn point(index: usize) -> (Tensor, i64) {
    let (spiral, along) = (index % 2, index as f64 / 1000.0);
    let angle = 3.0 * PI * along + PI * spiral as f64;
    (Tensor::from_slice(&[(along * angle.cos()) as f32, (along * angle.sin()) as f32]), spiral as i64)
}

fn main() -> ExitCode {
    let options = Options::parse();
    ice::main(|| train(&options))
}

fn train(options: &Options) -> Result<(), ice::Error> {
    let mut graph = HyperGraph::new();
    let points = items(1000, |index| Ok(point(index))).stack();
    graph.add("points", DatasetNode::new(points).shuffle(true).batch_size(20), "*")?;

    let net = ModuleNode::new(
        |path| {
            let layer = |name, from, to| nn::Linear::new(path / name, from, to);
            [layer("first", 2, 64), layer("second", 64, 64), layer("last", 64, 2)]
        },
        |[first, second, last], x| {
            let points = &x.get::<(Tensor, Tensor)>("points")?.0;
            Ok(points.apply(first).relu().apply(second).relu().apply(last))
        },
    );
    graph.add("net", net.optimizer(AdamW::new(1e-2)), "*")?;

    let loss = LossNode::new(|x| {
        Ok(x.tensor("net")?.cross_entropy_for_logits(&x.get::<(Tensor, Tensor)>("points")?.1))
    });
    graph.add("loss", loss, "*")?;
    let accuracy = MetricNode::average(|x| {
        Ok(x.tensor("net")?.argmax(-1, false).eq_tensor(&x.get::<(Tensor, Tensor)>("points")?.1))
    });
    graph.add("accuracy", accuracy, "val")?;

    let epoch = Repeat::new(options.epochs).then(Task::train("train")).then(SaveCheckpoint::new());
    let tasks = Repeat::once().then(epoch).then(Task::eval("val")).call(|run| {
        if run.is_main() {
            println!("accuracy {:.3}", run.measure("val/accuracy")?);
        }
        Ok(())
    });
    graph.run(tasks, &options.run)
}
