//! Several agents, one job.

use std::process::Command;

use rustix::process::Signal;

use crate::STAY;
use crate::support::{Gate, Job, free_port, launch, run, wait_for_text};

fn node<'a>(rank: &'a str, port: &'a str) -> Vec<&'a str> {
    vec!["--devices", "cpu", "--nnodes", "2", "--node-rank", rank, "--master-port", port]
}

#[test]
fn two_nodes_are_one_job() {
    let port = free_port();
    let script = "echo \"rank $RANK of $WORLD_SIZE on node $GROUP_RANK of $GROUP_WORLD_SIZE\"";
    let [second, first] = ["1", "0"].map(|rank| Job::start(launch(&node(rank, &port), script)));
    let (first, second) = (first.finish(), second.finish());
    assert_eq!(first.expect(0, &[]).stdout, ["rank 0 of 2 on node 0 of 2"]);
    assert_eq!(second.expect(0, &[]).stdout, ["rank 1 of 2 on node 1 of 2"]);
}

#[test]
fn a_failure_on_one_node_ends_the_other() {
    let port = free_port();
    let script = format!("[ $RANK = 1 ] || {STAY}; exit 9");
    let [first, second] = ["0", "1"].map(|rank| Job::start(launch(&node(rank, &port), &script)));
    first.finish().expect(1, &["the job is over", "node 1", "exit code 9"]);
    second.finish().expect(9, &["rank 1 failed: exit code 9"]);
}

#[test]
fn a_lost_agent_ends_the_other_with_a_reason() {
    for (lost, reason) in [(0, "lost the coordinator at 127.0.0.1:"), (1, "lost node 1")] {
        let port = free_port();
        let script = format!("echo ready; {STAY}");
        let mut jobs = ["0", "1"].map(|rank| Job::start(launch(&node(rank, &port), &script)));
        jobs.iter_mut().for_each(|job| _ = job.expect_line("ready"));
        jobs[lost].signal(Signal::KILL);
        let [first, second] = jobs.map(Job::finish);
        let (lost, other) = if lost == 0 { (first, second) } else { (second, first) };
        assert_eq!(lost.signal, Some(Signal::KILL.as_raw()), "{lost:#?}");
        other.expect(1, &[reason]);
    }
}

#[test]
fn whoever_has_the_address_of_the_endpoint_hosts_it() {
    let endpoint = format!("127.0.0.1:{}", free_port());
    let options =
        ["--devices", "cpu", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", &endpoint];
    let script = "echo \"rank $RANK of $WORLD_SIZE\"";
    let jobs = [(); 2].map(|()| Job::start(launch(&options, script)));
    let mut lines: Vec<_> =
        jobs.into_iter().flat_map(|job| job.finish().expect(0, &[]).stdout.clone()).collect();
    lines.sort();
    assert_eq!(lines, ["rank 0 of 2", "rank 1 of 2"]);
}

#[test]
fn a_failure_on_one_node_restarts_both() {
    let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
    // Rank 1 fails once rank 0 has started.
    let said = folder.path().join("said");
    assert!(Command::new("mkfifo").arg(&said).status().unwrap().success());
    let script = "
        echo \"$RANK attempt $TORCHELASTIC_RESTART_COUNT\"
        [ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0
        [ $RANK = 1 ] || { echo > $SAID; exec sleep 600; }
        read -r line < $SAID; exit 9";
    let options = |rank| [&node(rank, &port)[..], &["--max-restarts", "1"]].concat();
    let [first, second] = ["0", "1"].map(|rank| {
        let mut command = launch(&options(rank), script);
        command.env("SAID", &said);
        Job::start(command)
    });
    let (first, second) = (first.finish(), second.finish());
    assert_eq!(
        first.expect(0, &["node 1", "exit code 9; restart 1 of 1"]).stdout,
        ["0 attempt 0", "0 attempt 1"]
    );
    assert_eq!(second.expect(0, &["rank 1 failed", "restart 1 of 1"]).stdout, ["1 attempt 0", "1 attempt 1"]);
}

#[test]
fn nodes_that_share_a_folder_keep_their_logs_apart() {
    let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
    let logs = ["-r", "3", "--log-dir", folder.path().to_str().unwrap()];
    let script = "echo rank $RANK";
    let jobs = ["0", "1"].map(|rank| Job::start(launch(&[&node(rank, &port)[..], &logs].concat(), script)));
    jobs.into_iter().for_each(|job| _ = job.finish().expect(0, &[]));
    for entry in std::fs::read_dir(folder.path()).unwrap() {
        let folder = entry.unwrap().path();
        let node = folder.to_str().unwrap().rsplit("_node").next().unwrap().to_owned();
        let log = std::fs::read_to_string(folder.join("attempt_0/0/stdout.log")).unwrap();
        assert_eq!(log, format!("rank {node}\n"));
    }
}

#[test]
fn nodes_that_do_not_come_end_the_job() {
    let port = free_port();
    let options = [&node("0", &port)[..], &["--rdzv-conf", "join_timeout=0.2"]].concat();
    run(launch(&options, "echo started")).expect(1, &["1 of 2 nodes came", "not seen: --node-rank 1"]);
    let options = [&node("1", &port)[..], &["--rdzv-conf", "join_timeout=0.2"]].concat();
    run(launch(&options, "echo started")).expect(1, &["no coordinator at 127.0.0.1:"]);
}

#[test]
fn an_elastic_job_shrinks_and_grows() {
    let (endpoint, folder) = (format!("127.0.0.1:{}", free_port()), tempfile::tempdir().unwrap());
    let options =
        ["--devices", "cpu", "--nnodes", "1:2", "--rdzv-backend", "c10d", "--rdzv-endpoint", &endpoint];
    let more =
        ["--rdzv-conf", "last_call_timeout=0.05", "-t", "1", "--log-dir", folder.path().to_str().unwrap()];
    let options = [&options[..], &more].concat();
    let script = "
        echo \"$RANK of $WORLD_SIZE, restart $TORCHELASTIC_RESTART_COUNT\"
        [ $RANK = 0 ] && gate=$FIRST || gate=$SECOND; read -r go < $gate";
    let mut command = launch(&options, script);
    let gates = ["FIRST", "SECOND"].map(|name| (name, Gate::named(name, &mut command)));
    let events = folder.path().join("events");
    let another = || {
        let mut command = launch(&[&options[..], &["--events", events.to_str().unwrap()]].concat(), script);
        gates.iter().for_each(|(name, gate)| gate.lead(name, &mut command));
        Job::start(command)
    };

    let mut host = Job::start(command);
    host.expect_line("[default0]:0 of 1, restart 0");
    let mut lost = another();
    lost.expect_line("[default1]:1 of 2, restart 0");
    host.expect_line("[default0]:0 of 2, restart 0");
    lost.signal(Signal::KILL);
    assert_eq!(lost.finish().signal, Some(Signal::KILL.as_raw()));
    host.expect_line("[default0]:0 of 1, restart 0");
    let mut late = another();
    late.expect_line("[default1]:1 of 2, restart 0");
    host.expect_line("[default0]:0 of 2, restart 0");
    // An agent beyond MAX is not needed, and exits with the others, with code 0.
    let spare = another();
    wait_for_text(&events, "takes the place of one that goes");
    gates.iter().for_each(|(_, gate)| gate.open());
    late.finish().expect(0, &[]);
    host.finish().expect(0, &["has come", "lost node 1", "going on with 1 node\n"]);
    assert!(spare.finish().expect(0, &[]).stdout.is_empty());

    let rounds = |text: &str| {
        let mut runs = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path());
        let of_host = runs.find(|run| run.is_dir() && !run.to_str().unwrap().contains("_node1")).unwrap();
        std::fs::read_to_string(of_host.join(text).join("0/stdout.log")).unwrap()
    };
    assert_eq!(rounds("attempt_0"), "0 of 1, restart 0\n");
    assert_eq!(rounds("attempt_0_round_3"), "0 of 2, restart 0\n");
}

#[test]
fn an_agent_without_the_token_does_not_get_in() {
    let (port, folder) = (free_port(), tempfile::tempdir().unwrap());
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "correct horse battery staple\n").unwrap();
    let with_secret = |rank| {
        let file = ["--rdzv-token-file", secret.to_str().unwrap()];
        [&node(rank, &port)[..], &file].concat()
    };
    let script = "echo rank $RANK; [ -z \"$ICE_RDZV_TOKEN\" ]";
    let host = Job::start(launch(&with_secret("0"), script));
    run(launch(&node("1", &port), script)).expect(1, &["asks for a token", "--rdzv-token-file"]);
    let mut wrong = launch(&node("1", &port), script);
    wrong.env("ICE_RDZV_TOKEN", "incorrect horse battery staple");
    run(wrong).expect(1, &["does not know this agent's token"]);
    let mut second = launch(&node("1", &port), script);
    second.env("ICE_RDZV_TOKEN", "correct horse battery staple");
    assert_eq!(run(second).expect(0, &[]).stdout, ["rank 1"]);
    host.finish().expect(0, &["an agent without the job's token was turned away"]);
    let options = ["--devices", "cpu", "--rdzv-token-file", "/nowhere/secret"];
    run(launch(&options, script)).expect(2, &["--rdzv-token-file", "`/nowhere/secret`"]);
}
