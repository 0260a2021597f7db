//! The second example, made small: it learns, with all features of a training step, and resumes bit
//! by bit.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::tempdir;

use crate::support::{Program, TRAINING, built, checkpoints};

fn train(out: &Path, more: &[&str]) -> Program {
    let text = concat!(env!("CARGO_MANIFEST_DIR"), "/../LICENSE-APACHE");
    let size = ["--context", "16", "--layers", "2", "--width", "32", "--batch-size", "8", "--write", "10"];
    let steps = ["--steps", "60", "--eval-every", "20", "--bf16", "--accumulate", "2", "--lr", "0.01"];
    Program::ice_launch(["--devices", "cpu:0-1"])
        .arg(built("gpt"))
        .args(["--text", text, "--out-dir", out.to_str().unwrap()])
        .args(size)
        .args(steps)
        .args(more)
}

/// Returns the checkpoint of the only run after this number of steps.
fn checkpoint(out: &Path, steps: u64) -> PathBuf {
    let wanted = |path: &PathBuf| path.to_str().unwrap().ends_with(&format!("S{steps}"));
    checkpoints(out)
        .into_iter()
        .find(wanted)
        .unwrap_or_else(|| panic!("no checkpoint after {steps} steps in {out:?}"))
}

#[test]
fn learns_and_resumes_in_the_middle_of_its_schedule() {
    let folder = tempdir().unwrap();
    let [whole, resumed] = ["whole", "resumed"].map(|name| folder.path().join(name));
    let outcome = train(&whole, &[]).run(TRAINING);
    outcome.expect_code(0);
    let loss = outcome.stdout.lines().find_map(|line| line.strip_prefix("validation loss "));
    let loss: f64 = loss.unwrap_or_else(|| panic!("{}", outcome.transcript())).parse().unwrap();
    // Equally likely bytes would have 5.5, single bytes of this text have about 3.1.
    assert!(loss < 3.0, "{loss}");
    // The generated text continues `And`.
    assert!(outcome.stdout.lines().any(|line| line.starts_with("And")), "{}", outcome.transcript());

    let from = checkpoint(&whole, 40);
    train(&resumed, &["--resume-from", from.to_str().unwrap()]).run(TRAINING).expect_code(0);
    let last = |out: &Path| {
        let folder = checkpoint(out, 60);
        ["model.safetensors", "optimizer-00000-of-00001.safetensors"]
            .map(|file| fs::read(folder.join(file)).unwrap())
    };
    assert!(last(&whole) == last(&resumed), "the resumed run has other bits");
}
