//! Full or unwritable disks, which do not end a job that has begun.

use std::fs;
use std::process::Command;

use tempfile::{TempDir, tempdir};

use crate::TWO;
use crate::support::{Gate, Job, launch, with_disk, within};

/// Returns a job whose logs go to a disk. `DISK` is its mount point.
fn logs_on_disk(options: &[&str], script: &str) -> (TempDir, Command) {
    let disk = tempdir().unwrap();
    let logs = disk.path().join("logs");
    let options = [&TWO[..], &["--log-dir", logs.to_str().unwrap()], options].concat();
    let mut command = launch(&options, script);
    command.env("DISK", disk.path());
    (disk, command)
}

const FILL_BYTES: &str = "cat /dev/zero > $DISK/fill 2> /dev/null";
const FILL_INODES: &str = "n=0; while touch $DISK/$n 2> /dev/null; do n=$((n + 1)); done";

#[test]
fn a_full_log_disk_costs_logs_and_no_restart() {
    for (options, fill) in [("size=256k,nr_inodes=60", FILL_INODES), ("size=256k", FILL_BYTES)] {
        let script = format!(
            "if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then
                 [ $RANK = 1 ] || exec sleep 600
                 {fill}; exit 3
             fi
             echo again
             [ $RANK = 1 ] || exec sleep 600
             echo '{{\"message\": {{\"message\": \"last words\", \"extraInfo\": {{}}}}}}' > $TORCHELASTIC_ERROR_FILE; exit 4"
        );
        let (disk, command) = logs_on_disk(&["-r", "1:3", "--max-restarts", "1"], &script);
        let Some(outcome) = with_disk(options, disk.path(), &command) else { return };
        outcome.expect(
            4,
            &[
                "cannot be written: No space left on device",
                "ranks start without log files: their output goes to the console",
                "error    last words",
            ],
        );
        // In the reports of both attempts.
        assert_eq!(outcome.stderr.matches("  missing  ").count(), 2, "{fill}: {outcome:#?}");
        assert_eq!(outcome.stderr.matches("hint: df -h").count(), 1, "{fill}: {outcome:#?}");
        assert!(outcome.stdout.contains(&"[default1]:again".into()), "{fill}: {outcome:#?}");
    }
}

#[test]
fn log_files_come_back_with_the_room_on_the_disk() {
    let script = format!(
        "case $TORCHELASTIC_RESTART_COUNT in
             0) [ $RANK = 0 ] || exec sleep 600; {FILL_INODES}; exit 3 ;;
             1) [ $RANK = 0 ] || exec sleep 600; find $DISK -maxdepth 1 -type f -delete; exit 3 ;;
         esac
         echo logged"
    );
    let (disk, command) = logs_on_disk(&["-r", "3", "--max-restarts", "2"], &script);
    let Some(outcome) = with_disk("size=1m,nr_inodes=60", disk.path(), &command) else { return };
    outcome.expect(0, &["cannot be written: No space left on device", "is written again"]);
    assert!(outcome.stdout.is_empty(), "{outcome:#?}");
}

#[test]
fn logs_that_cannot_be_written_at_first_start_nothing() {
    let (disk, command) = logs_on_disk(&["-r", "3"], "echo started");
    let Some(outcome) = with_disk("size=1m,nr_inodes=2", disk.path(), &command) else { return };
    outcome.expect(2, &["error: cannot write logs to ", "choose another --log-dir"]);
    assert!(outcome.stdout.is_empty(), "{outcome:#?}");
}

#[test]
fn a_job_without_logs_needs_no_folder_for_temporary_files() {
    let error = r#"{"message": {"message": "last words", "extraInfo": {}}}"#;
    let script = format!("echo started; echo '{error}' > $TORCHELASTIC_ERROR_FILE; exit 4");
    let disk = tempdir().unwrap();
    let mut command = launch(&["--devices", "cpu"], &script);
    command.env("TMPDIR", disk.path());
    let Some(outcome) = with_disk("ro", disk.path(), &command) else { return };
    outcome.expect(4, &["error    last words"]);
    assert_eq!(outcome.stdout, ["started"]);
    let mut command = launch(&["--devices", "cpu", "--tee", "3"], "echo started");
    command.env("TMPDIR", disk.path());
    let Some(outcome) = with_disk("ro", disk.path(), &command) else { return };
    outcome.expect(2, &["error: cannot write logs to "]);
    assert!(outcome.stdout.is_empty(), "{outcome:#?}");
}

#[test]
fn a_limit_of_the_file_size_costs_logs_and_no_job() {
    let folder = tempdir().unwrap();
    let logs = folder.path().to_str().unwrap();
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 0 ] && { seq -f 'line %05g' 5000; read -r go < $GATE; exit 3; }
        sh -c 'head -c 100000 /dev/zero > $0/large' $FOLDER 2> /dev/null; echo head $?";
    let options = ["--devices", "cpu", "--tee", "1", "--log-dir", logs, "--max-restarts", "1"];
    let mut command = launch(&options, script);
    command.env("FOLDER", folder.path());
    let mut command = within("ulimit -f 16", &command);
    let gate = Gate::new(&mut command);
    let mut job = Job::start_unread(command);
    job.expect_error("stdout.log cannot be written: File too large");
    job.read_stderr();
    gate.open();
    let outcome = job.finish();
    outcome.expect(0, &["  missing  "]);
    // Ranks have the default action of SIGXFSZ (25), so it ends them: 128 + 25.
    assert_eq!(outcome.stdout.last().unwrap(), "[default0]:head 153", "{}", outcome.stderr);
    let run = fs::read_dir(folder.path()).unwrap().flatten().find(|entry| entry.path().is_dir()).unwrap();
    let text = fs::read_to_string(run.path().join("attempt_0/0/stdout.log")).unwrap();
    assert!(text.ends_with('\n') && text.len() <= 16 << 10, "{}", text.len());
}
