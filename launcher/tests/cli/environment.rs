//! What ranks find in their environment.

use std::fs;

use tempfile::tempdir;

use crate::TWO;
use crate::support::{launch, run};

#[test]
fn ranks_find_the_contract_in_their_environment() {
    let folder = tempdir().unwrap();
    let script = "env > $OUT/$RANK";
    let mut command = launch(&[&TWO[..], &["--role", "trainer", "--run-id", "digits"]].concat(), script);
    command.env("OUT", folder.path());
    let outcome = run(command);
    assert_eq!(outcome.expect(0, &[]).stderr, "");
    let threads = (std::thread::available_parallelism().unwrap().get() / 2).max(1).to_string();
    for rank in ["0", "1"] {
        let text = fs::read_to_string(folder.path().join(rank)).unwrap();
        let value = |name: &str| {
            let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_else(|| panic!("{name} is missing in {text}")).to_owned()
        };
        for (name, expected) in [
            ("RANK", rank),
            ("LOCAL_RANK", rank),
            ("ROLE_RANK", rank),
            ("GROUP_RANK", "0"),
            ("ROLE_NAME", "trainer"),
            ("WORLD_SIZE", "2"),
            ("LOCAL_WORLD_SIZE", "2"),
            ("GROUP_WORLD_SIZE", "1"),
            ("ROLE_WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("TORCHELASTIC_RESTART_COUNT", "0"),
            ("TORCHELASTIC_MAX_RESTARTS", "0"),
            ("TORCHELASTIC_RUN_ID", "digits"),
            ("TORCHELASTIC_USE_AGENT_STORE", "True"),
            ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
            ("OMP_NUM_THREADS", &threads),
            ("ICE_DEVICE", "cpu"),
            ("ICE_DIST_BACKEND", "gloo"),
            ("ICE_ROUND", "0"),
        ] {
            assert_eq!(value(name), expected, "{name}");
        }
        assert!(value("MASTER_PORT").parse::<u16>().unwrap() > 0);
        assert!(value("TORCHELASTIC_ERROR_FILE").ends_with(&format!("/attempt_0/{rank}/error.json")));
        assert!(value("ICE_LINK_FD").parse::<i32>().unwrap() > 2);
        assert!(!text.contains("PYTHONUNBUFFERED=") || std::env::var_os("PYTHONUNBUFFERED").is_some());
    }
}

#[test]
fn ranks_have_the_limits_of_the_agent() {
    let mut command = std::process::Command::new("sh");
    command.args([
        "-c",
        "ulimit -Sn 1000; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_ice-launch"),
        "--devices=cpu",
    ]);
    command.args(["sh", "-c", "ulimit -n; grep 'open files' /proc/$PPID/limits"]);
    let outcome = run(command);
    let [rank, agent] = &outcome.stdout[..] else { panic!("{outcome:?}") };
    assert_eq!(rank, "1000");
    // The agent itself has what it may have.
    let limits: Vec<_> = agent.split_whitespace().skip(3).take(2).collect();
    assert_eq!(limits[0], limits[1], "{agent}");
}

#[test]
fn every_variable_of_the_contract_is_set() {
    let outcome = run(launch(&TWO, "[ $RANK = 0 ] || exit 0; env"));
    // A spare alone has that one.
    for (name, _) in ice_proto::env::ALL.iter().filter(|(name, _)| *name != ice_proto::env::ICE_SPARE) {
        let set = outcome.stdout.iter().any(|line| line.starts_with(&format!("{name}=")));
        assert!(set, "{name} is missing: {outcome:#?}");
    }
}

#[test]
fn one_rank_keeps_its_threads() {
    let outcome = run(launch(&["--devices", "cpu"], "echo \"[$OMP_NUM_THREADS]\""));
    assert_eq!((outcome.stdout, outcome.stderr), (vec!["[]".to_owned()], String::new()));
}
