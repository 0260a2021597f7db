//! Destinations of the ranks' output.

use std::fs;

use tempfile::tempdir;

use crate::TWO;
use crate::support::{Gate, Job, launch, run};

#[test]
fn tee_writes_files_and_lines_with_their_rank() {
    let folder = tempdir().unwrap();
    let options = [&TWO[..], &["--tee", "3", "--log-dir", folder.path().to_str().unwrap()]].concat();
    let mut outcome = run(launch(&options, "echo out of $RANK; echo err of $RANK >&2"));
    outcome.expect(0, &["[default0]:err of 0\n", "[default1]:err of 1\n"]);
    outcome.stdout.sort();
    assert_eq!(outcome.stdout, ["[default0]:out of 0", "[default1]:out of 1"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    assert!(run.file_name().unwrap().to_str().unwrap().starts_with("none_"), "{run:?}");
    for rank in 0..2 {
        let read = |name| fs::read_to_string(run.join(format!("attempt_0/{rank}/{name}"))).unwrap();
        assert_eq!(read("stdout.log"), format!("out of {rank}\n"));
        assert_eq!(read("stderr.log"), format!("err of {rank}\n"));
    }
}

#[test]
fn tee_shows_a_progress_bar_as_one_line() {
    let folder = tempdir().unwrap();
    let options = ["--devices", "cpu", "--tee", "3", "--log-dir", folder.path().to_str().unwrap()];
    let outcome = run(launch(&options, r"printf '\r 10%%\r 20%%\nhalf' ; printf ' line\n'"));
    assert_eq!(outcome.expect(0, &[]).stdout, ["[default0]: 10%\r[default0]: 20%", "[default0]:half line"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let file = fs::read_to_string(run.join("attempt_0/0/stdout.log")).unwrap();
    assert_eq!(file, "\r 10%\r 20%\nhalf line\n");
}

#[test]
fn redirects_go_to_files_alone_and_the_report_reads_them() {
    let folder = tempdir().unwrap();
    let options = [&TWO[..], &["-r", "1:3", "--log-dir", folder.path().to_str().unwrap()]].concat();
    let script = "
        echo out of $RANK; [ $RANK = 1 ] || exec sleep 600
        read -r go < $GATE; echo 'the reason' >&2; exit 6";
    let mut command = launch(&options, script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("out of 0");
    gate.open();
    let outcome = job.finish();
    outcome.expect(6, &["    the reason"]);
    assert_eq!(outcome.stdout, ["out of 0"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::read_to_string(run.join("attempt_0/1/stdout.log")).unwrap(), "out of 1\n");
    assert!(!run.join("attempt_0/0/stdout.log").exists());
}

#[test]
fn a_relative_log_folder_is_found_from_everywhere() {
    let folder = tempdir().unwrap();
    let text = r#"{"message": {"message": "lost my way", "extraInfo": {}}}"#;
    let script = format!("cd /; echo '{text}' > $TORCHELASTIC_ERROR_FILE; exit 1");
    let mut command = launch(&["--devices", "cpu", "--log-dir", "logs"], &script);
    command.current_dir(folder.path());
    run(command).expect(1, &["error    lost my way"]);
}

#[test]
fn a_temporary_folder_goes_after_success() {
    let folder = tempdir().unwrap();
    for (script, left) in [("exit 0", 0), ("exit 1", 1)] {
        let mut command = launch(&["--devices", "cpu"], script);
        command.env("TMPDIR", folder.path());
        run(command);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), left, "{script}");
    }
}

#[test]
fn a_closed_console_changes_nothing() {
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 1 ] && { echo again; exit 7; }
        echo ready; read -r go < $GATE; echo words >&2; exit 6";
    let mut command = launch(&["--devices", "cpu", "--max-restarts", "1"], script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    job.expect_line("ready");
    job.close_stderr();
    gate.open();
    job.expect_line("again");
    job.finish().expect(7, &[]);
}

#[test]
fn a_console_that_nobody_reads_holds_up_the_output_alone() {
    let script = "
        [ $RANK = 0 ] || { read -r go < $GATE; exit 5; }
        trap 'echo stopped; kill $!; exit 0' TERM
        head -c 4000000 /dev/zero >&2 & exec 2> /dev/null; echo ready; while :; do wait $!; done";
    let mut command = launch(&TWO, script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    job.expect_line("ready");
    job.wait_until_stderr_is_full();
    gate.open();
    job.expect_line("stopped");
    job.read_stderr();
    job.finish().expect(5, &["rank 1 failed: exit code 5"]);
}

#[test]
fn only_some_ranks_reach_the_console() {
    let folder = tempdir().unwrap();
    let logs = ["--log-dir", folder.path().to_str().unwrap()];
    let script = "echo out of $RANK; echo err of $RANK >&2";
    let outcome = run(launch(&[&TWO[..], &["--local-ranks-filter", "1"]].concat(), script));
    assert_eq!(outcome.expect(0, &[]).stdout, ["out of 1"]);
    assert_eq!(outcome.stderr, "err of 1\n");
    let outcome =
        run(launch(&[&TWO[..], &logs, &["--tee", "3", "--local-ranks-filter", "0"]].concat(), script));
    assert_eq!(outcome.expect(0, &[]).stdout, ["[default0]:out of 0"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    assert_eq!(fs::read_to_string(run.join("attempt_0/1/stdout.log")).unwrap(), "out of 1\n");
}

#[test]
fn a_rank_that_is_not_shown_still_says_why_it_failed() {
    let script = "[ $RANK = 1 ] || exec sleep 600; echo 'the reason' >&2; exit 6";
    let outcome = run(launch(&[&TWO[..], &["--local-ranks-filter", "0"]].concat(), script));
    outcome.expect(6, &["    the reason"]);
}

#[test]
fn lines_with_a_text_are_written_once_more() {
    let folder = tempdir().unwrap();
    let options = [
        "-r",
        "3",
        "--duplicate-stdout-filters",
        "loss,a,,b",
        "--duplicate-stderr-filters",
        "warn",
        "--log-dir",
        folder.path().to_str().unwrap(),
    ];
    let script = "echo loss 1; echo other; echo a,b; echo warn >&2; echo loss >&2";
    run(launch(&[&["--devices", "cpu"][..], &options].concat(), script)).expect(0, &[]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let read = |name| fs::read_to_string(run.join("attempt_0").join(name)).unwrap();
    assert_eq!(read("filtered_stdout.log"), "[default0]:loss 1\n[default0]:a,b\n");
    assert_eq!(read("filtered_stderr.log"), "[default0]:warn\n");
    assert_eq!(read("0/stdout.log"), "loss 1\nother\na,b\n");
}

#[test]
fn the_prefix_is_a_template() {
    let options = ["--tee", "1", "--log-prefix", "${run_id}/${local_rank} ", "--run-id", "digits"];
    let outcome = run(launch(&[&["--devices", "cpu"][..], &options].concat(), "echo one; echo two"));
    assert_eq!(outcome.expect(0, &[]).stdout, ["digits/0 one", "digits/0 two"]);
}

#[test]
fn log_files_are_set_aside_when_they_are_full() {
    let folder = tempdir().unwrap();
    let logs = folder.path().to_str().unwrap();
    let options = ["-r", "1", "--log-max-size", "1K", "--log-keep", "2", "--log-dir", logs];
    let script = "seq -f 'line %04g' 0 399";
    run(launch(&[&["--devices", "cpu"][..], &options].concat(), script)).expect(0, &[]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let read = |name: &str| fs::read_to_string(run.join("attempt_0/0").join(name)).unwrap_or_default();
    let text = read("stdout.log.2") + &read("stdout.log.1") + &read("stdout.log");
    let first = 400 - text.lines().count();
    let expected: String = (first..400).map(|number| format!("line {number:04}\n")).collect();
    assert_eq!(text, expected);
    assert!(read("stdout.log.1").len() <= 1024 && first > 100 && read("stdout.log.3").is_empty());
}
