//! Where output goes.

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
