//! The example on the real MNIST: it learns, and other programs can read its checkpoints.

use tempfile::tempdir;

use crate::forms::{Run, difference, parameters};
use crate::support::{Program, SOON, TRAINING, built, peer, python_script};

#[test]
fn reaches_its_accuracy_and_saves_what_python_reads() {
    let folder = tempdir().unwrap();
    let run = Run::new(folder.path()).args(["--epochs", "3"]);
    let outcome = run.under_ice_launch(&["--devices", "cpu:0-1"]).run(TRAINING);
    outcome.expect_code(0);

    let last = outcome.last_line();
    let accuracy = last.strip_prefix("val accuracy ").and_then(|value| value.parse::<f64>().ok());
    let accuracy =
        accuracy.unwrap_or_else(|| panic!("no accuracy in the last line of {}", outcome.transcript()));
    println!("{last}");
    assert!(accuracy >= 0.975, "{accuracy} after 3 epochs");

    let model = run.newest_model();
    let tensors = parameters(&model);
    let shapes: Vec<_> = tensors.values().map(|tensor| tensor.len()).collect();
    assert_eq!(shapes.iter().sum::<usize>(), 260 + 5020 + 16050 + 510, "{:?}", tensors.keys());

    let Some(python) = peer("the part that reads the checkpoint in Python") else { return };
    let read = Program::new(python).arg(python_script("read_checkpoint.py")).arg(&model).run(SOON);
    read.expect_code(0);
    assert_eq!(read.stdout, "loaded 8\n");
}

#[test]
fn two_half_batches_are_one_batch() {
    let folder = tempdir().unwrap();
    let train = |name: &str, devices: &str, batch_size: &str| {
        let run = Run::new(&folder.path().join(name)).steps(20).args([
            "--dropout",
            "0",
            "--batch-size",
            batch_size,
        ]);
        run.under_ice_launch(&["--devices", devices]).run(TRAINING).expect_code(0);
        parameters(&run.newest_model())
    };
    let (one, two) = (train("one", "cpu:0", "128"), train("two", "cpu:0-1", "64"));
    let largest = difference(&one, &two);
    println!("largest difference after 20 steps: {largest:e}");
    assert!(largest <= 1e-5, "{largest:e}");
    let more = train("more", "cpu:0-1", "32");
    assert!(difference(&one, &more) > 1e-5, "the check sees another batch size");
}

#[test]
fn workers_change_no_bit() {
    let folder = tempdir().unwrap();
    let train = |workers: &str| {
        let run = Run::new(&folder.path().join(workers)).steps(20).args(["--workers", workers]);
        run.under_ice_launch(&["--devices", "cpu:0-1"]).run(TRAINING).expect_code(0);
        parameters(&run.newest_model())
    };
    assert_eq!(difference(&train("0"), &train("3")), 0.0);
}

#[test]
fn ranks_compute_with_the_number_of_threads_that_the_option_says() {
    // More than most machines have cores, and a number that differs from MKL's.
    for (threads, mkl) in [("67", None), ("3", Some("1"))] {
        let launch = Program::ice_launch(["--devices", "cpu:0-1", "--omp-num-threads", threads]);
        let launch = match mkl {
            Some(mkl) => launch.env("MKL_NUM_THREADS", mkl),
            None => launch,
        };
        let outcome = launch.arg(built("rank")).arg("threads").run(SOON);
        outcome.expect_code(0);
        let expected = format!("{threads} threads");
        let said = outcome.stdout.lines().filter(|line| line.ends_with(&expected)).count();
        assert_eq!(said, 2, "{}", outcome.transcript());
    }
}
