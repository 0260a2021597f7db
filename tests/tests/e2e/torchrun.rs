//! Comparison with torchrun: the same command line has the same meaning.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::tempdir;

use crate::support::{Program, SOON, newest_peer, peer, python_script, root};

/// Environment and arguments of a rank, as recorded by the rank itself.
struct Given {
    environment: BTreeMap<String, String>,
    rest: Value,
}

/// Runs the script that records environment and arguments, and returns the records by rank.
fn given(launcher: Program, python: &Path, options: &[&str], command: &[&str], folder: &Path) -> Vec<Given> {
    fs::create_dir(folder).unwrap();
    let bin = python.parent().unwrap().to_str().unwrap().to_owned();
    let path = format!("{bin}:{}", std::env::var("PATH").unwrap());
    let modules = root().join("tests/python");
    let program = launcher
        .args(options)
        .args(command)
        .args([folder.to_str().unwrap(), "--lr", "0.1", "${local_rank}"])
        .env("PATH", path)
        .env("PYTHONPATH", modules)
        .env("OMP_NUM_THREADS", "1");
    program.run(SOON * 2).expect_code(0);
    let read = |rank: usize| {
        let text = fs::read(folder.join(format!("{rank}.json"))).unwrap();
        let mut rest: Value = serde_json::from_slice(&text).unwrap();
        let environment = serde_json::from_value(rest["environment"].take()).unwrap();
        rest["arguments"].as_array_mut().unwrap().remove(0);
        Given { environment, rest }
    };
    (0..2).map(read).collect()
}

/// Variables that both launchers set, to values that may differ.
const OWN: [(&str, &str); 8] = [
    ("PYTHONPATH", "the Python of the tests puts itself in, and torchrun is one"),
    ("MASTER_ADDR", "the host's name there"),
    ("MASTER_PORT", "a free port"),
    ("TORCHELASTIC_ERROR_FILE", "below a temporary folder"),
    ("TORCHELASTIC_RUN_ID", "made up with --standalone"),
    ("TORCHELASTIC_USE_AGENT_STORE", "not for every backend there"),
    ("TMPDIR", "of the test"),
    ("ICE_TEST_MARK", "of the test"),
];

fn check(test: &str, options: &[&str], command: &[&str]) {
    for python in [peer(test), newest_peer(test)].into_iter().flatten() {
        check_beside(&python, options, command);
    }
}

fn check_beside(python: &Path, options: &[&str], command: &[&str]) {
    let folder = tempdir().unwrap();
    let torchrun = Program::new(python.with_file_name("torchrun"));
    let theirs = given(torchrun, python, options, command, &folder.path().join("theirs"));
    let launch = Program::ice_launch([] as [&str; 0]);
    let ours = given(launch, python, options, command, &folder.path().join("ours"));
    for (theirs, ours) in theirs.iter().zip(&ours) {
        assert_eq!(theirs.rest, ours.rest, "arguments");
        for (name, value) in &theirs.environment {
            let inherited = std::env::var(name).is_ok_and(|inherited| inherited == *value);
            let own = OWN.iter().any(|(own, _)| own == name);
            match ours.environment.get(name) {
                Some(ours) => assert!(ours == value || own, "{name} is {value} there and {ours} here"),
                None => panic!("{name}={value} is missing here (inherited: {inherited})"),
            }
        }
        for name in ours.environment.keys() {
            let known = theirs.environment.contains_key(name) || name.starts_with("ICE_");
            assert!(known, "{name} is set here alone");
        }
    }
}

#[test]
fn a_worker_finds_the_same_in_its_environment() {
    let script = python_script("print_environment.py");
    let script = script.to_str().unwrap();
    let test = "torchrun::a_worker_finds_the_same_in_its_environment";
    check(test, &["--standalone", "--nproc-per-node", "2"], &[script]);
    let named = ["--nnodes=1", "--nproc_per_node=2", "--max_restarts=2", "--role=trainer", "--rdzv_id=job7"];
    check(test, &named, &[script]);
    let signals = ["--standalone", "--nproc-per-node=2", "--signals-to-handle=SIGTERM,SIGUSR1"];
    check(test, &signals, &[script]);
    check(test, &["--standalone", "--nproc-per-node=2", "--virtual-local-rank"], &[script]);
}

#[test]
fn other_ways_to_start_are_the_same() {
    let test = "torchrun::other_ways_to_start_are_the_same";
    check(test, &["--nproc-per-node=2", "-m"], &["print_environment"]);
    let script = python_script("print_environment.py");
    let script = script.to_str().unwrap();
    check(test, &["--nproc-per-node=2", "--no-python"], &["python", "-u", script]);
}

/// Options and names that a torchrun accepts, according to its own parser and code.
struct Taken {
    /// Spellings, variable, `flag` or `value`, default.
    options: Vec<[String; 4]>,
    /// Variables that torchrun reads, keys of `--rdzv-conf`, names in templates: by kind.
    names: Vec<(String, String)>,
}

/// Returns the options and names of the installed torchruns: the peer's and, if installed, the
/// newest one's.
fn taken(test: &str) -> Vec<Taken> {
    let pythons = [peer(test), newest_peer(test)];
    let list = |python: PathBuf| {
        let listed = Command::new(&python).arg(python_script("torchrun_flags.py")).output().unwrap();
        assert!(listed.status.success(), "{}", String::from_utf8_lossy(&listed.stderr));
        let (mut options, mut names) = (Vec::new(), Vec::new());
        for line in String::from_utf8(listed.stdout).unwrap().lines() {
            match line.split('\t').collect::<Vec<_>>()[..] {
                ["option", spellings, variable, takes, default] => {
                    options.push([spellings, variable, takes, default].map(ToOwned::to_owned));
                }
                [kind, name] => names.push((kind.to_owned(), name.to_owned())),
                _ => panic!("{line}"),
            }
        }
        assert!(options.len() > 25 && names.len() > 20, "{python:?}");
        Taken { options, names }
    };
    pythons.into_iter().flatten().map(list).collect()
}

/// Returns the spelling with hyphens.
fn name_of(spellings: &str) -> &str {
    spellings.split(' ').find(|spelling| spelling.starts_with("--") && !spelling.contains('_')).unwrap()
}

#[test]
fn every_option_of_torchrun_is_taken_and_described() {
    let page = fs::read_to_string(root().join("docs/torchrun.md")).unwrap();
    // Values for options that do not accept an arbitrary one.
    let value = |name: &str, default: &str| match name {
        "--numa-binding" => "node".to_owned(),
        "--rdzv-backend" => "c10d".into(),
        "--rdzv-conf" => "is_host=1".into(),
        "--local-addr" => "127.0.0.1".into(),
        "--master-port" => "0".into(),
        "--print-completion" => "bash".into(),
        "--log-dir" => std::env::temp_dir().display().to_string(),
        "--shutdown-timeout" => "30".into(),
        _ if ["None", "", "[]"].contains(&default) => "0".into(),
        _ => default.to_owned(),
    };
    for taken in taken("torchrun::every_option_of_torchrun_is_taken_and_described") {
        for [spellings, variable, takes, default] in &taken.options {
            let name = name_of(spellings);
            assert!(page.contains(&format!("`{name}`")), "docs/torchrun.md does not name {name}");
            for spelling in spellings.split(' ') {
                let mut program = Program::ice_launch([spelling]);
                if takes == "value" {
                    program = program.arg(value(name, default));
                }
                let command = match name {
                    "--module" => vec!["this"],
                    "--run-path" => vec!["/dev/null"],
                    "--print-completion" => vec![],
                    _ => vec!["true"],
                };
                program.args(command).run(SOON).expect_code(0);
            }
            if !variable.is_empty() && takes == "value" {
                Program::ice_launch(["true"]).env(variable, value(name, default)).run(SOON).expect_code(0);
            }
        }
    }
}

/// torchrun's defaults that the page, or the help, compares with ours.
const DEFAULTS: [(&str, &str); 20] = [
    ("--nnodes", "1:1"),
    ("--nproc-per-node", "1"),
    ("--rdzv-backend", "static"),
    ("--rdzv-id", "none"),
    ("--standalone", "False"),
    ("--max-restarts", "0"),
    ("--monitor-interval", "0.1"),
    ("--start-method", "spawn"),
    ("--event-log-handler", "null"),
    ("--role", "default"),
    ("--module", "False"),
    ("--no-python", "False"),
    ("--run-path", "False"),
    ("--redirects", "0"),
    ("--tee", "0"),
    ("--node-rank", "0"),
    ("--master-addr", "127.0.0.1"),
    ("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT"),
    ("--virtual-local-rank", "False"),
    ("--duplicate-stdout-filters", "[]"),
];

#[test]
fn defaults_of_torchrun_are_those_that_ours_were_compared_with() {
    for taken in taken("torchrun::defaults_of_torchrun_are_those_that_ours_were_compared_with") {
        for [spellings, _, _, default] in &taken.options {
            let name = name_of(spellings);
            match DEFAULTS.iter().find(|(known, _)| *known == name) {
                Some((_, known)) => assert_eq!(default, known, "the default of {name} is another one"),
                None => assert!(["None", "", "[]"].contains(&&**default), "{name} has a default: {default}"),
            }
        }
    }
}

#[test]
fn every_variable_conf_key_and_macro_of_torchrun_is_known() {
    let page = |name: &str| fs::read_to_string(root().join("docs").join(name)).unwrap();
    let pages = page("torchrun.md") + &page("clusters.md");
    for taken in taken("torchrun::every_variable_conf_key_and_macro_of_torchrun_is_known") {
        for (kind, name) in &taken.names {
            if kind == "macro" {
                let prefix = format!("--log-prefix=<${{{name}}}>");
                let outcome = Program::ice_launch(["--tee=1", &prefix, "echo", "x"]).run(SOON);
                assert!(!outcome.expect_code(0).stdout.contains('$'), "{}", outcome.transcript());
            } else {
                assert!(pages.contains(&format!("`{name}`")), "no page of the book names the {kind} {name}");
            }
        }
    }
}

#[test]
fn a_job_whose_rank_is_killed_recovers() {
    let Some(python) = peer("torchrun::a_job_whose_rank_is_killed_recovers") else { return };
    for _ in 0..2 {
        let folder = tempdir().unwrap();
        let outcome = Program::ice_launch(["--nproc-per-node", "4", "--max-restarts", "3"])
            .arg(&python)
            .arg(python_script("ddp_crash.py"))
            .arg(folder.path().join("checkpoint"))
            .run(SOON * 2);
        outcome.expect_code(0).expect_in_stderr(&["rank 2 failed: killed by SIGKILL", "restart 1 of 3"]);
        assert!(
            outcome.stdout.contains("done after 60 steps, of which 40 were not"),
            "{}",
            outcome.transcript()
        );
    }
}

#[test]
fn a_recorded_exception_is_the_root_cause() {
    let Some(python) = peer("torchrun::a_recorded_exception_is_the_root_cause") else { return };
    let folder = tempdir().unwrap();
    let outcome = Program::ice_launch(["--devices", "cpu:0-1", "--log-dir", folder.path().to_str().unwrap()])
        .arg(&python)
        .arg(python_script("record_failure.py"))
        .run(SOON * 2);
    outcome
        .expect_code(1)
        .expect_in_stderr(&["rank 1 failed: exit code 1", "error    ValueError: no such colour"]);
    let run = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
    let report: Value = serde_json::from_slice(&fs::read(run.join("report.json")).unwrap()).unwrap();
    let cause = &report["failures"][0]["root_cause"];
    assert_eq!((cause["rank"].as_u64(), cause["exit_code"].as_i64()), (Some(1), Some(1)), "{report}");
    assert!(cause["callstack"].as_str().unwrap().contains("Traceback"), "{report}");
}
