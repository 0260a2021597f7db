//! The environment of ranks.

use std::fs;

use tempfile::tempdir;

use crate::TWO;
use crate::support::{Job, free_port, launch, run};

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
            ("MKL_NUM_THREADS", &threads),
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
    // The agent itself has raised its soft limit to the hard one.
    let limits: Vec<_> = agent.split_whitespace().skip(3).take(2).collect();
    assert_eq!(limits[0], limits[1], "{agent}");
}

#[test]
fn every_variable_of_the_contract_is_set() {
    let outcome = run(launch(&TWO, "[ $RANK = 0 ] || exit 0; env"));
    // ICE_SPARE is only set for spares, TORCHELASTIC_TIMER_FILE only if torchrun's variable asks
    // for timers.
    let not_here = [ice_proto::env::ICE_SPARE, ice_proto::env::TORCHELASTIC_TIMER_FILE];
    for (name, _) in ice_proto::env::ALL.iter().filter(|(name, _)| !not_here.contains(name)) {
        let set = outcome.stdout.iter().any(|line| line.starts_with(&format!("{name}=")));
        assert!(set, "{name} is missing: {outcome:#?}");
    }
}

#[test]
fn one_rank_keeps_its_threads() {
    let outcome = run(launch(&["--devices", "cpu"], "echo \"[$OMP_NUM_THREADS$MKL_NUM_THREADS]\""));
    assert_eq!((outcome.stdout, outcome.stderr), (vec!["[]".to_owned()], String::new()));
}

#[test]
fn ranks_of_a_role_are_numbered_over_all_nodes() {
    let port = free_port();
    let script = "echo \"$RANK: $ROLE_NAME $ROLE_RANK of $ROLE_WORLD_SIZE\"";
    let node = |rank, role, devices| {
        let nodes = ["--nnodes", "3", "--node-rank", rank, "--master-port", &port];
        Job::start(launch(&[&nodes[..], &["--role", role, "--devices", devices]].concat(), script))
    };
    let jobs = [node("0", "master", "cpu"), node("1", "trainer", "cpu"), node("2", "trainer", "cpu:0-1")];
    let mut lines: Vec<_> =
        jobs.into_iter().flat_map(|job| job.finish().expect(0, &[]).stdout.clone()).collect();
    lines.sort();
    let expected = ["0: master 0 of 1", "1: trainer 0 of 3", "2: trainer 1 of 3", "3: trainer 2 of 3"];
    assert_eq!(lines, expected);
}

#[test]
fn rank_0_serves_the_store_if_it_is_not_to_be_shared() {
    const VARIABLE: &str = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE";
    let script = "echo \"$MASTER_ADDR $MASTER_PORT $TORCHELASTIC_USE_AGENT_STORE $ICE_STORE\"";
    let endpoint = format!("127.0.0.1:{}", free_port());
    let options = ["--devices=cpu", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint", &endpoint];
    let jobs = [(); 2].map(|()| {
        let mut command = launch(&options, script);
        command.env(VARIABLE, "1");
        Job::start(command)
    });
    let lines = jobs.map(|job| job.finish().expect(0, &[]).stdout.concat());
    assert_eq!(lines[0], lines[1]);
    let [_, port, shared, store] = lines[0].split(' ').collect::<Vec<_>>()[..] else { panic!("{lines:?}") };
    assert_eq!((shared, store), ("False", &*endpoint));
    assert!(!endpoint.ends_with(&format!(":{port}")), "{lines:?}");

    // The rank can bind its reserved port, because no process serves a store there before.
    let serve = "python3 -c 'import os, socket; socket.create_server((\"127.0.0.1\", int(os.environ[\"MASTER_PORT\"])))'";
    let mut command = launch(&["--devices=cpu"], serve);
    command.env(VARIABLE, "1");
    run(command).expect(0, &[]);

    let mut command = launch(&["--devices=cpu", "--master-port", &free_port()], script);
    command.env(VARIABLE, "1");
    let finished = run(command);
    finished.expect(0, &["TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 has no effect with --rdzv-backend static"]);
    assert!(finished.stdout[0].contains(" True "), "{finished:?}");
}

#[test]
fn local_address_of_the_host_is_the_ranks_master_address() {
    let script = "echo $MASTER_ADDR";
    let of = |options: &[&str]| run(launch(options, script)).expect(0, &[]).stdout.concat();
    assert_eq!(of(&["--devices=cpu", "--local-addr=127.0.0.5"]), "127.0.0.5");
    // Like torchrun's static rendezvous, MASTER_ADDR is the address that was given.
    let port = free_port();
    assert_eq!(of(&["--devices=cpu", "--local-addr=127.0.0.5", "--master-port", &port]), "127.0.0.1");
    let endpoint = format!("127.0.0.1:{}", free_port());
    let options = ["--devices=cpu", "--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint", &endpoint];
    let host = Job::start(launch(
        &[&options[..], &["--local-addr=127.0.0.5", "--rdzv-conf=is_host=1"]].concat(),
        script,
    ));
    let other = Job::start(launch(&[&options[..], &["--rdzv-conf=is_host=0"]].concat(), script));
    let lines = [host, other].map(|job| job.finish().expect(0, &[]).stdout.concat());
    assert_eq!(lines, ["127.0.0.5", "127.0.0.5"]);
}

#[test]
fn virtual_local_rank_maps_the_list_of_rocm_devices_too() {
    let mut command = launch(
        &["--devices=cpu:0-1", "--virtual-local-rank"],
        "echo \"$RANK: $CUDA_VISIBLE_DEVICES $HIP_VISIBLE_DEVICES\"",
    );
    command.env("CUDA_VISIBLE_DEVICES", "0,1").env("HIP_VISIBLE_DEVICES", "4, 6");
    let mut lines = run(command).expect(0, &[]).stdout.clone();
    lines.sort();
    assert_eq!(lines, ["0: 4 4", "1: 6 6"]);
    let mut command = launch(&["--devices=cpu:0-1"], "echo \"$HIP_VISIBLE_DEVICES\"");
    command.env("HIP_VISIBLE_DEVICES", "4,6");
    assert_eq!(run(command).expect(0, &[]).stdout, ["4,6", "4,6"]);
}

#[test]
fn threads_that_the_user_set_stay() {
    let script = "[ $RANK = 1 ] || echo \"$OMP_NUM_THREADS $MKL_NUM_THREADS\"";
    let seen = |options: &[&str], variables: &[(&str, &str)]| {
        let mut command = launch(&[&TWO[..], options].concat(), script);
        command.envs(variables.iter().copied());
        run(command).expect(0, &[]).stdout.concat()
    };
    assert_eq!(seen(&["--omp-num-threads", "3"], &[]), "3 3");
    assert_eq!(seen(&["--omp-num-threads", "3"], &[("MKL_NUM_THREADS", "5")]), "3 5");
    // If MKL has no variable of its own, it uses OpenMP's number.
    assert_eq!(seen(&[], &[("OMP_NUM_THREADS", "4")]), "4 ");
    assert!(seen(&[], &[("MKL_NUM_THREADS", "5")]).ends_with(" 5"));
}
