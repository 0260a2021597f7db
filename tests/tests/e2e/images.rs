//! The example that a program on one's own images begins with.

use std::fs;
use std::path::Path;

use tempfile::tempdir;

use crate::support::{Program, TRAINING, built};

/// Writes small images of two classes, one dark and one bright.
fn write_images(folder: &Path) {
    for (part, count) in [("train", 12), ("val", 4)] {
        for (class, brightness) in [("dark", 30), ("light", 190)] {
            let folder = folder.join(part).join(class);
            fs::create_dir_all(&folder).unwrap();
            for number in 0..count {
                let pixels = [brightness + 5 * number; 3 * 6 * 6];
                let image = [b"P6\n6 6\n255\n".as_slice(), &pixels].concat();
                fs::write(folder.join(format!("{number}.ppm")), image).unwrap();
            }
        }
    }
}

#[test]
fn network_on_images_stops_early_and_is_resumed_evaluated_and_asked() {
    let folder = tempdir().unwrap();
    write_images(folder.path());
    let out = folder.path().join("out");
    let program = |options: &[&str]| {
        let program = Program::new(built("images")).arg("--images").arg(folder.path()).args(options);
        let outcome = program.args(["--devices", "cpu:0-1", "--out-dir"]).arg(&out).run(TRAINING);
        outcome.expect_code(0);
        outcome
    };
    let first = program(&["--epochs", "2"]);
    let patient = ["--epochs", "60", "--patience", "3", "--lr", "1e-4", "--resume-from", "latest"];
    let trained = program(&patient);
    for words in ["resuming from", "was not better than"] {
        assert!(trained.stdout.contains(words), "{words}: {}", trained.transcript());
    }
    let accuracy = |line: &str| line.split("accuracy ").nth(1)?.split(' ').next()?.parse::<f64>().ok();
    let lines = first.stdout.lines().chain(trained.stdout.lines());
    let reached = lines.filter_map(accuracy).fold(0.0, f64::max);

    // The folder of the resumed run has the best checkpoint of both.
    let runs = fs::read_dir(&out).unwrap().map(|run| run.unwrap().path());
    let newest = runs.max_by_key(|run| run.metadata().unwrap().modified().unwrap()).unwrap();
    let best = newest.join("best");
    let best = best.to_str().unwrap();
    let measured = program(&["--evaluate", best]);
    assert_eq!(accuracy(measured.last_line()), Some(reached), "{}", trained.transcript());
    let image = folder.path().join("val/light/0.ppm");
    let said = program(&["--predict", best, "--image", image.to_str().unwrap()]);
    assert!(
        said.last_line().starts_with("light ") || said.last_line().starts_with("dark "),
        "{}",
        said.stdout
    );
}
