//! torchrun's options, and the plan that a command line becomes.

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
    // A Python that prints its arguments.
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

#[test]
fn last_of_two_values_counts() {
    let outcome = run(launch(
        &["--role", "a", "--devices", "cpu:0-3", "--role=b", "--devices", "cpu"],
        "echo $ROLE_NAME",
    ));
    assert_eq!(outcome.expect(0, &[]).stdout, ["b"]);
    let outcome = run(launch(
        &["--standalone", "--standalone", "--nproc-per-node=2", "--nproc_per_node=1"],
        "echo one",
    ));
    assert_eq!(outcome.expect(0, &[]).stdout, ["one"]);
    // An option has precedence over the variable of another option.
    let mut command = launch(&["--devices=cpu", "--run-id=mine"], "echo $TORCHELASTIC_RUN_ID");
    command.env("PET_NPROC_PER_NODE", "8").env("PET_RDZV_ID", "theirs");
    assert_eq!(run(command).expect(0, &[]).stdout, ["mine"]);
    // All values of a repeatable option count.
    let notices = ["--devices=cpu", "--preempt-notice=/no/such/file", "--preempt-notice", "nonsense"];
    run(launch(&notices, "exit 0")).expect(2, &["--preempt-notice", "`nonsense`"]);
}

#[test]
fn variable_that_is_empty_counts_as_unset() {
    let mut command = launch(&["--devices=cpu"], "echo \"$ROLE_NAME $TORCHELASTIC_MAX_RESTARTS\"");
    for name in ["NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ENDPOINT", "RDZV_ID", "RDZV_CONF"]
        .into_iter()
        .chain([
            "MAX_RESTARTS",
            "MONITOR_INTERVAL",
            "SHUTDOWN_TIMEOUT",
            "ROLE",
            "TEE",
            "STANDALONE",
            "LOG_DIR",
        ])
        .chain(["NPROC_PER_NODE", "SIGNALS_TO_HANDLE", "RDZV_BACKEND", "LOCAL_ADDR", "START_METHOD"])
    {
        command.env(format!("PET_{name}"), "");
    }
    assert_eq!(run(command).expect(0, &[]).stdout, ["default 0"]);
}

#[test]
fn address_in_brackets_and_quotes_around_conf_are_understood() {
    let options = ["--devices=cpu", "--master-addr=[::1]", "--rdzv-conf='join_timeout=9'"];
    let outcome = run(launch(&options, "echo $MASTER_ADDR"));
    assert_eq!(outcome.expect(0, &[]).stdout, ["::1"]);
    assert_eq!(outcome.stderr, "");
}

#[test]
fn signal_that_this_system_does_not_have_is_left_out() {
    let options = ["--devices=cpu", "--signals-to-handle=SIGTERM,SIGBREAK,SIGINT"];
    let outcome = run(launch(&options, "echo $TORCHELASTIC_SIGNALS_TO_HANDLE"));
    assert_eq!(outcome.expect(0, &["`SIGBREAK` is not the name of a signal"]).stdout, ["SIGTERM,SIGINT"]);
}

#[test]
fn restarts_that_a_crash_loop_will_not_get_are_said_at_the_start() {
    let restarts = |more: &[&str]| run(launch(&[&["--devices=cpu"], more].concat(), "exit 0")).stderr;
    let said = restarts(&["--max-restarts=5"]);
    assert!(said.contains("not all 5 restarts") && said.contains("--crash-loop-limit 0"), "{said}");
    assert_eq!(restarts(&["--max-restarts=4"]), "");
    assert_eq!(restarts(&["--max-restarts=99", "--crash-loop-limit=0"]), "");
    assert_eq!(restarts(&["--max-restarts=99", "--crash-loop-limit=5"]), "");
}

#[test]
fn prefix_is_torchruns_option_and_both_of_its_variables() {
    const OLD: &str = "TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE";
    let line = |options: &[&str], variables: &[(&str, &str)]| {
        let mut command = launch(&[&["--devices=cpu", "--tee=3"], options].concat(), "echo x");
        command.envs(variables.iter().copied());
        run(command).expect(0, &[]).stdout.concat()
    };
    let host = nix::unistd::gethostname().unwrap().into_string().unwrap();
    assert_eq!(line(&["--log-line-prefix-template", "${hostname}:${rank}: "], &[]), format!("{host}:0: x"));
    assert_eq!(line(&["--log_line_prefix_template=$rank "], &[(OLD, "old ")]), "0 x");
    assert_eq!(line(&[], &[(OLD, "old ")]), "old x");
    assert_eq!(line(&[], &[(OLD, "old "), ("PET_LOG_LINE_PREFIX_TEMPLATE", "new ")]), "new x");
    assert_eq!(line(&[], &[(OLD, "")]), "[default0]:x");
    // TorchX passes an empty role.
    assert_eq!(line(&["--role", ""], &[]), "[0]:x");
}

#[test]
fn link_named_torchrun_is_torchrun() {
    let folder = tempdir().unwrap();
    let torchrun = folder.path().join("torchrun");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_ice-launch"), &torchrun).unwrap();
    let torchrun = |args: &[&str]| {
        let mut command = crate::support::without_ours(std::process::Command::new(&torchrun));
        command.args(args);
        run(command)
    };
    // A command line of TorchX.
    let outcome = torchrun(&[
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        "--rdzv_id",
        "job-1",
        "--nnodes",
        "1",
        "--nproc_per_node",
        "2",
        "--tee",
        "3",
        "--role",
        "",
        "--no-python",
        "sh",
        "-c",
        "echo $RANK",
    ]);
    let mut lines = outcome.expect(0, &[]).stdout.clone();
    lines.sort();
    assert_eq!(lines, ["[0]:0", "[1]:1"]);
    torchrun(&["--nproc-per-nod3", "3", "x"]).expect(2, &["Usage: torchrun ", "--nproc-per-node"]);
    let completions = torchrun(&["--print-completion", "bash"]).expect(0, &[]).stdout.join("\n");
    assert!(
        completions.contains("complete -F _torchrun") && completions.contains(" torchrun\n"),
        "{completions}"
    );
    torchrun(&["--print_completion", "tcsh"]).expect(2, &["'tcsh'"]);
}

#[test]
fn diagnostics_are_selected_by_ice_log() {
    let with = |filter: &str| {
        let mut command = launch(&["--devices=cpu"], "exit 0");
        command.env("ICE_LOG", filter);
        let outcome = run(command);
        outcome.expect(0, &[]);
        outcome.stderr
    };
    for filter in ["", "off", "ice_rendezvous=debug,warn"] {
        assert_eq!(with(filter), "", "{filter}");
    }
    for filter in ["debug", "ice_launch=debug"] {
        let stderr = with(filter);
        assert!(stderr.contains("DEBUG ice_launch::dispatcher: event"), "{filter}: {stderr}");
    }
    let stderr = with("loud");
    assert!(stderr.contains("ICE_LOG=`loud`: `loud` is not a level"), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}
