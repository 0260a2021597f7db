//! torchrun's options, and what the command line is made into.

use std::fs;

use tempfile::tempdir;

use crate::support::{executable, ice_launch, launch, run};

#[test]
fn torchruns_spelling_and_variables_are_understood() {
    let count = |outcome: &crate::support::Finished| outcome.expect(0, &[]).stdout.len();
    let short = run(launch(&["--nproc_per_node=3", "--nnodes=1:1", "--rdzv_backend=c10d"], "echo $RANK"));
    assert_eq!(count(&short), 3);
    let mut command = launch(&[], "echo $ROLE_NAME");
    command.env("PET_NPROC_PER_NODE", "2").env("PET_ROLE", "trainer").env("PET_STANDALONE", "1");
    assert_eq!(run(command).stdout, ["trainer", "trainer"]);
    let mut command = launch(&["--nproc-per-node", "1", "--role=x"], "echo $ROLE_NAME");
    command.env("PET_NPROC_PER_NODE", "2").env("PET_ROLE", "trainer");
    assert_eq!(run(command).stdout, ["x"], "a flag beats its variable");
}

#[test]
fn what_has_no_effect_is_said() {
    let outcome = run(launch(&["--start_method=fork", "--logs-specs=mine"], "exit 0"));
    outcome.expect(0, &["--start-method fork has no effect", "--logs-specs mine has no effect"]);
}

#[test]
fn the_local_rank_is_put_into_arguments() {
    let mut command = ice_launch();
    command.args(["--devices", "cpu:0-1", "echo", "rank=${local_rank}"]);
    let mut lines = run(command).stdout;
    lines.sort();
    assert_eq!(lines, ["rank=0", "rank=1"]);
}

#[test]
fn scripts_and_modules_run_with_the_users_python() {
    let folder = tempdir().unwrap();
    // It says how it was called.
    let python = folder.path().join("python");
    executable(&python, "#!/bin/sh\necho \"$@\"\n");
    let script = folder.path().join("train.py");
    fs::write(&script, "").unwrap();
    let script = script.to_str().unwrap();
    for (args, expected) in [
        (&["--", script, "--lr", "1"][..], format!("-u {script} --lr 1")),
        (&["-m", "a.module", "x"], "-u -m a.module x".into()),
        (&["--run-path", script], format!("-u {script}")),
    ] {
        let mut command = ice_launch();
        command.args(["--devices", "cpu"]).args(args).env("PATH", folder.path());
        assert_eq!(run(command).stdout, [expected]);
        let mut command = ice_launch();
        command.args(["--devices", "cpu"]).args(args).env("PYTHON_EXEC", &python);
        assert_eq!(run(command).expect(0, &[]).stdout.len(), 1);
    }
    executable(script.as_ref(), "#!/bin/sh\necho itself\n");
    let mut command = ice_launch();
    command.args(["--devices", "cpu", "--no-python", script]);
    assert_eq!(run(command).stdout, ["itself"]);
    let mut command = ice_launch();
    command.args(["--devices", "cpu", script]).env("PATH", "/nowhere");
    run(command).expect(2, &["PYTHON_EXEC"]);
}

#[test]
fn unknown_options_suggest_the_nearest() {
    run(launch(&["--max-restart-count", "3"], "exit 0")).expect(2, &["--max-restarts"]);
    run(launch(&["--nproc-per-nod3", "3"], "exit 0")).expect(2, &["--nproc-per-node"]);
}

#[test]
fn a_cluster_is_asked_for_what_is_not_given() {
    let mut command = launch(&["--devices", "cpu"], "echo \"$TORCHELASTIC_RUN_ID $WORLD_SIZE\"");
    for (name, value) in [
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_STEP_ID", "0"),
        ("SLURM_PROCID", "0"),
        ("SLURM_NODEID", "0"),
        ("SLURM_STEP_NUM_NODES", "1"),
        ("SLURM_STEP_NODELIST", "here"),
        ("SLURM_STEP_TASKS_PER_NODE", "1"),
    ] {
        command.env(name, value);
    }
    let outcome = run(command);
    assert_eq!(outcome.expect(0, &["Slurm: ", "run id 4711 (SLURM_JOB_ID)"]).stdout, ["4711 1"]);
}

#[test]
fn man_page_and_completions_are_made_from_the_definition() {
    for (what, part) in
        [("man", ".TH ice-launch"), ("bash", "complete -F"), ("zsh", "#compdef"), ("fish", "complete -c")]
    {
        let mut command = ice_launch();
        command.args(["--generate", what]);
        let outcome = run(command);
        let text = outcome.expect(0, &[]).stdout.join("\n");
        assert!(
            text.contains(part) && text.contains("max-restarts") | text.contains("max\\-restarts"),
            "{text}"
        );
    }
}

#[test]
fn ranks_are_bound_to_cpus() {
    let script = "sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status";
    let outcome = run(launch(&["--devices", "cpu", "--numa-binding", "node"], script));
    assert_eq!(outcome.expect(0, &[]).stdout.len(), 1);
    run(launch(&["--devices", "cpu:0-4095", "--numa-binding", "exclusive"], "exit 0"))
        .expect(2, &["--numa-binding", "4096 ranks"]);
}
