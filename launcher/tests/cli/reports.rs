//! Reports about a job for programs.

use std::fs;

use serde_json::Value;
use tempfile::tempdir;

use crate::TWO;
use crate::support::{Gate, Job, executable, ice_launch, launch, run};

#[test]
fn events_and_report_tell_the_whole_story() {
    let folder = tempdir().unwrap();
    let (events, logs) = (folder.path().join("events.jsonl"), folder.path().join("logs"));
    let options =
        ["--events", events.to_str().unwrap(), "--log-dir", logs.to_str().unwrap(), "--max-restarts", "1"];
    let error = r#"{"message": {"message": "ValueError: no such colour", "extraInfo": {"py_callstack": "at line 7"}}}"#;
    let script = format!(
        "[ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0
         [ $RANK = 1 ] || {{ echo ready; exec sleep 600; }}
         read -r go < $GATE; echo '{error}' > $TORCHELASTIC_ERROR_FILE; echo sorry >&2; exit 4"
    );
    let mut command = launch(&[&TWO[..], &options].concat(), &script);
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("ready");
    gate.open();
    job.finish().expect(0, &[]);

    let text = fs::read_to_string(&events).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let names: Vec<_> = lines.iter().map(|line| line["event"].as_str().unwrap()).collect();
    let first = ["agent_started", "round_started", "rank_started", "rank_started", "rank_ended", "stopping"];
    assert_eq!(names[..6], first, "{text}");
    assert_eq!(names.last(), Some(&"agent_ended"));
    for name in ["decision", "attempt_failed"] {
        assert!(names.contains(&name), "{name} is missing: {text}");
    }
    for line in &lines {
        assert_eq!((line["version"].as_u64(), line["run_id"].as_str()), (Some(1), Some("none")), "{line}");
        assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
    }
    let failed = &lines[names.iter().position(|name| *name == "attempt_failed").unwrap()];
    assert_eq!((&failed["rank"], &failed["attempt"]), (&Value::from(1), &Value::from(0)));

    let run = fs::read_dir(&logs).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    assert_eq!((&report["outcome"], &report["exit_code"]), (&Value::from("succeeded"), &Value::from(0)));
    let cause = &report["failures"][0]["root_cause"];
    assert_eq!((&cause["rank"], &cause["exit_code"]), (&Value::from(1), &Value::from(4)), "{report}");
    assert_eq!(cause["message"], "ValueError: no such colour");
    assert_eq!(
        (&cause["callstack"], &cause["stderr"][0]),
        (&Value::from("at line 7"), &Value::from("sorry"))
    );
    let other = &report["failures"][0]["others"][0];
    assert_eq!((&other["rank"], &other["end"]), (&Value::from(0), &Value::from("stopped")), "{report}");
}

#[test]
fn every_event_is_documented() {
    let source = include_str!("../../src/report/events.rs");
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/events.md")).unwrap();
    let body = source.split("enum JobEvent {").nth(1).unwrap().split("\n}\n").next().unwrap();
    let variants = body.lines().filter(|line| line.starts_with("    ") && !line.starts_with("     "));
    let mut found = 0;
    for variant in variants
        .filter_map(|line| line.trim().split([' ', '{']).next())
        .filter(|word| word.starts_with(|letter: char| letter.is_ascii_uppercase()))
    {
        let snake: String = variant
            .chars()
            .enumerate()
            .map(|(at, letter)| match letter.is_ascii_uppercase() && at > 0 {
                true => format!("_{}", letter.to_ascii_lowercase()),
                false => letter.to_ascii_lowercase().to_string(),
            })
            .collect();
        assert!(page.contains(&format!("`{snake}`")), "docs/events.md does not name `{snake}`");
        found += 1;
    }
    assert!(found > 8, "{found}");
}

/// Waits until the times of files have advanced by two ticks of their clock.
fn wait_for_later_file_times() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for _ in 0..2 {
        let before = file.as_file().metadata().unwrap().modified().unwrap();
        while file.as_file().metadata().unwrap().modified().unwrap() <= before {
            fs::write(file.path(), "touched").unwrap();
        }
    }
}

#[test]
fn the_failure_that_came_first_is_the_cause() {
    // Rank 0 writes its error first and ends last.
    let script = "
        error() { echo \"{\\\"message\\\": {\\\"message\\\": \\\"$1\\\", \\\"extraInfo\\\": {}}}\" > $TORCHELASTIC_ERROR_FILE; }
        if [ $RANK = 0 ]; then trap '' TERM; error 'the cause'; echo told; read -r go < $LAST; exit 5; fi
        read -r go < $FIRST; error 'a victim'; echo gone; exit 6";
    let mut command = launch(&TWO, script);
    let (first, last) = (Gate::named("FIRST", &mut command), Gate::named("LAST", &mut command));
    let mut job = Job::start(command);
    job.expect_line("told");
    wait_for_later_file_times();
    first.open();
    job.expect_line("gone");
    last.open();
    job.finish().expect(
        5,
        &["rank 0 failed: exit code 5", "error    the cause", "later    rank 1: exit code 6: a victim"],
    );
}

#[test]
fn a_script_is_named_and_its_exception_is_the_message() {
    let folder = tempdir().unwrap();
    let (script, python) = (folder.path().join("train.py"), folder.path().join("python"));
    fs::write(&script, "").unwrap();
    let traceback = "#!/bin/sh
cat >&2 <<END
Traceback (most recent call last):
  File \"train.py\", line 1, in <module>
    main()
ValueError: no such colour
while painting
END
exit 1";
    executable(&python, traceback);
    let (logs, events) = (folder.path().join("logs"), folder.path().join("events.jsonl"));
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "--log-dir"]).arg(&logs).arg("--events").arg(&events);
    command.arg(&script).args(["--lr", "0.1"]).env("PYTHON_EXEC", &python);
    let (name, python) = (script.to_str().unwrap(), python.to_str().unwrap());
    let logs_of = logs.join("none_");
    let outcome = run(command);
    outcome.expect(
        1,
        &[
            &format!("ice-launch: run none: 1 rank on 1 node, {python}, logs in {}", logs_of.display()),
            &format!("  program  {name} --lr 0.1\n  error    ValueError: no such colour\n"),
            "ice-launch: run none failed (exit code 1) after ",
            " s, no restarts\n",
        ],
    );
    let run = fs::read_dir(&logs).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    let failure = &report["failures"][0];
    assert_eq!(failure["root_cause"]["message"], "ValueError: no such colour", "{report}");
    let text = fs::read_to_string(&events).unwrap();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    for record in [failure, &first] {
        assert_eq!((&record["program"], &record["executable"]), (&Value::from(name), &Value::from(python)));
        assert_eq!(record["args"], Value::from(vec!["--lr", "0.1"]), "{record}");
    }
}

#[test]
fn slow_disk_delays_report_and_no_restart() {
    let logs = tempdir().unwrap();
    // The pipe stands for a disk that hangs: a write waits until the successor reads.
    let script = "cd $LOGS/none_*
        if [ $TORCHELASTIC_RESTART_COUNT = 0 ]; then mkfifo report.json.partial; exit 3; fi
        cat report.json.partial";
    let options = ["--devices", "cpu", "--max-restarts", "1", "--log-dir", logs.path().to_str().unwrap()];
    let mut command = launch(&options, script);
    command.env("LOGS", logs.path());
    let outcome = run(command);
    outcome.expect(0, &["rank 0 failed: exit code 3"]);
    let said: Value = serde_json::from_str(&outcome.stdout.join("\n")).unwrap();
    let run = fs::read_dir(logs.path()).unwrap().next().unwrap().unwrap().path();
    let last: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    assert_eq!((&said["outcome"], &last["outcome"]), (&Value::from("running"), &Value::from("succeeded")));
    assert_eq!(said["failures"], last["failures"]);
}

#[test]
fn report_of_many_failures_has_the_first_and_the_newest_ones() {
    let logs = tempdir().unwrap();
    let mut options = vec!["--devices", "cpu", "--max-restarts", "120", "--restart-backoff", "0"];
    options.extend(["--crash-loop-limit", "0", "--log-dir", logs.path().to_str().unwrap()]);
    run(launch(&options, "exit 3")).expect(3, &["rank 0 failed: exit code 3"]);
    let run = fs::read_dir(logs.path()).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    let attempts: Vec<_> =
        report["failures"].as_array().unwrap().iter().map(|failure| failure["attempt"].as_u64()).collect();
    let expected: Vec<_> = [0].into_iter().chain(22..=120).map(Some).collect();
    assert_eq!(attempts, expected);
    assert_eq!((&report["failures_left_out"], &report["rounds_left_out"]), (&21.into(), &21.into()));
    let rounds = fs::read_to_string(run.join("rounds.jsonl")).unwrap();
    assert_eq!(rounds.lines().count(), 121, "the file has all of them");
}

#[test]
fn a_job_of_defaults_says_nothing_to_a_pipe() {
    let outcome = run(launch(&TWO, "echo done"));
    assert_eq!(outcome.expect(0, &[]).stderr, "");
}
