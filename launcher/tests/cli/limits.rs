//! Limits of the system that leave no room for a job.

use std::process::Command;

use crate::support::{launch, run, within};

#[test]
fn too_few_open_files_start_nothing_and_name_the_limit() {
    let command = launch(&["--devices", "cpu"], "echo started");
    for limit in [5, 6, 9, 14, 15, 16, 20] {
        let outcome = run(within(&format!("ulimit -n {limit}"), &command));
        outcome
            .expect(2, &["cannot start: ", &format!("open files are limited to {limit}\nhint: ulimit -Hn ")]);
        assert!(outcome.stdout.is_empty() && !outcome.stderr.contains("panicked"), "{outcome:#?}");
    }
    let outcome = run(within("ulimit -n 40", &command));
    assert_eq!(outcome.expect(0, &[]).stdout, ["started"]);
}

#[test]
fn too_few_processes_are_an_error_and_no_panic() {
    let command = launch(&["--devices", "cpu"], "echo started");
    // The limit applies only to users other than root, and to all processes of the user.
    let user = std::process::id() % 10_000 + 70_000;
    let drop_root = format!("setpriv --reuid {user} --regid {user} --clear-groups");
    let mut may_run = Command::new("bash");
    may_run.args(["-c", &format!("{drop_root} test -x \"$0\"")]).arg(command.get_program());
    if !may_run.status().is_ok_and(|status| status.success()) {
        eprintln!("skipped: another user cannot run the launcher");
        return;
    }
    for limit in 1..=4 {
        let mut limited = Command::new("bash");
        let line = format!("exec {drop_root} bash -c 'ulimit -u {limit} && exec \"$@\"' bash \"$@\"");
        limited.args(["-c", &line, "bash"]).arg(command.get_program()).args(command.get_args());
        let outcome = run(limited);
        outcome.expect(2, &["cannot start: a thread: ", &format!("of this user are limited to {limit}\n")]);
        assert!(outcome.stdout.is_empty() && !outcome.stderr.contains("panicked"), "{outcome:#?}");
    }
}

#[test]
fn too_little_memory_for_a_thread_names_the_limit() {
    let command = launch(&["--devices", "cpu"], "echo started");
    // Between the size of the program and its needs. With less, the program cannot be loaded at
    // all.
    let with = |kib: u32| run(within(&format!("ulimit -v {kib}"), &command));
    let kib =
        (1..200).map(|step| step * 2000).find(|kib| with(*kib).stderr.contains("cannot start")).unwrap();
    with(kib).expect(2, &[&format!("bytes of memory of a process are limited to {}:", u64::from(kib) << 10)]);
}
