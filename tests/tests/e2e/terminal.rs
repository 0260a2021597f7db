//! Output for people at a terminal.

use tempfile::tempdir;

use crate::forms::Run;
use crate::support::{Program, TRAINING};

/// Returns the output of a program at a terminal that can rewrite lines.
fn printed(program: Program) -> String {
    let outcome = program.env("TERM", "xterm").at_a_terminal().start().finish(TRAINING);
    outcome.expect_code(0);
    outcome.stdout
}

#[test]
fn progress_is_one_line_that_all_other_output_goes_around() {
    let folder = tempdir().unwrap();
    let run = Run::new(folder.path()).args(["--epochs", "2", "--steps", "30"]);
    let options = ["--devices", "cpu:0-1"];
    let text = printed(run.by_itself(&options));
    let status: Vec<_> = text.match_indices("\rtrain  epoch ").collect();
    assert!(status.len() >= 2, "{text:?}");
    for (at, _) in status {
        let end = text[at..].find("\x1b[K").unwrap_or_else(|| panic!("not cleared to its end: {text:?}"));
        assert!(!text[at..at + end].contains('\n'), "{text:?}");
    }
    // Output of the ranks starts on its own line, and so does the shell's prompt afterwards.
    for (at, _) in text.match_indices("val epoch ") {
        assert!(["\n", "\r\x1b[K"].iter().any(|before| text[..at].ends_with(before)), "{text:?}");
    }
    let before = text
        .rsplit_once("ice-launch: goodput ")
        .map(|(before, _)| before)
        .unwrap_or_else(|| panic!("{text:?}"));
    assert!(text.contains("val epoch 2/2") && before.ends_with("\r\x1b[K"), "{text:?}");

    let quiet = printed(run.by_itself(&[&options[..], &["--progress-interval", "0"]].concat()));
    assert!(!quiet.contains("samples/s") && quiet.contains("val epoch 2/2"), "{quiet:?}");
}

#[test]
fn a_program_that_writes_to_the_terminal_itself_gets_lines() {
    let folder = tempdir().unwrap();
    let run = Run::new(folder.path()).args(["--epochs", "1", "--steps", "30"]);
    let text = printed(run.under_ice_launch(&["--devices", "cpu:0-1"]));
    let lines: Vec<_> = text.lines().filter(|line| line.starts_with("train  epoch 1/1")).collect();
    assert!(!lines.is_empty() && !text.contains("\x1b[K"), "{text:?}");
}
