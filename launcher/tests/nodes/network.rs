//! Jobs of three nodes, each on its own host.

use rustix::process::Signal;

use crate::hosts::{Network, address};
use crate::server::Etcd;
use crate::support::{self, Job, run};

/// Connects to the store, prints its address, and runs until its host has the file `stop`. The
/// connection comes first, because the test may end the store's agent as soon as it has read the
/// line.
const SCRIPT: &str = "
    exec 3<> /dev/tcp/$MASTER_ADDR/$MASTER_PORT || exit 7
    echo \"$RANK of $WORLD_SIZE in round $ICE_ROUND at $MASTER_ADDR\"
    until [ -e $STOP ]; do sleep 0.05; done";

/// Silent agents are detected after about a second.
const CONF: &str = "keep_alive_interval=0.4,last_call_timeout=0.5,join_timeout=20";

struct Cluster {
    network: Network,
    folder: tempfile::TempDir,
}

impl Cluster {
    fn new() -> Option<Self> {
        Some(Self { network: Network::of(3)?, folder: tempfile::tempdir().unwrap() })
    }

    fn command(&self, host: u32, options: &[&str]) -> std::process::Command {
        let mut command = support::without_ours(self.network.on(host));
        command.arg(env!("CARGO_BIN_EXE_ice-launch"));
        command.args(["--devices", "cpu"]).args(options).args(["bash", "-c", SCRIPT]);
        command.env("STOP", self.folder.path().join("stop"));
        command
    }

    fn agent(&self, host: u32, options: &[&str]) -> Job {
        Job::start(self.command(host, options))
    }

    /// Lets all ranks exit.
    fn stop(&self) {
        std::fs::write(self.folder.path().join("stop"), "").unwrap();
    }
}

/// Waits until all agents have a rank in a round of this size, and returns the number of the round.
fn round_of(size: usize, jobs: &mut [Job]) -> u64 {
    round_at(size, jobs).0
}

/// Like `round_of`, and also returns the address of the store.
fn round_at(size: usize, jobs: &mut [Job]) -> (u64, String) {
    let mut rounds = Vec::new();
    let mut ranks = Vec::new();
    for job in jobs.iter_mut() {
        let (rank, round) = loop {
            let line = job.expect_line("");
            let words: Vec<&str> = line.split(' ').collect();
            let [rank, "of", of, "in", "round", round, "at", store] = words[..] else { panic!("{line}") };
            if of == size.to_string() {
                break (rank.parse::<usize>().unwrap(), (round.parse::<u64>().unwrap(), store.to_owned()));
            }
        };
        ranks.push(rank);
        rounds.push(round);
    }
    ranks.sort_unstable();
    assert_eq!(ranks, (0..size).collect::<Vec<_>>());
    assert!(rounds.iter().all(|round| *round == rounds[0]), "{rounds:?}");
    rounds.remove(0)
}

#[test]
fn three_nodes_with_a_static_endpoint() {
    let Some(cluster) = Cluster::new() else { return };
    let agent = |host: u32| {
        let rank = (host - 1).to_string();
        cluster.agent(host, &["--nnodes", "3", "--node-rank", &rank, "--master-addr", "10.77.0.1"])
    };
    // The agents that start first do not host the rendezvous.
    let mut jobs = [3, 2, 1].map(agent);
    for (job, rank) in jobs.iter_mut().zip([2, 1, 0]) {
        job.expect_line(&format!("{rank} of 3 in round 0 at 10.77.0.1"));
    }
    // An agent of another job cannot join.
    let options = ["--nnodes", "3", "--node-rank", "1", "--master-addr", "10.77.0.1", "--run-id", "other"];
    run(cluster.command(2, &options)).expect(1, &["this endpoint serves the job `none`, not `other`"]);
    cluster.stop();
    jobs.into_iter().for_each(|job| _ = job.finish().expect(0, &[]));
}

#[test]
fn node_0_whose_endpoint_is_localhost_is_reached_by_the_others() {
    let Some(cluster) = Cluster::new() else { return };
    let agent = |host: u32, rank: &str, endpoint: &str| {
        cluster.agent(host, &["--nnodes", "2", "--node-rank", rank, "--master-addr", endpoint])
    };
    let mut jobs = [agent(1, "0", "localhost"), agent(2, "1", "10.77.0.1")];
    for (job, line) in
        jobs.iter_mut().zip(["0 of 2 in round 0 at localhost", "1 of 2 in round 0 at 10.77.0.1"])
    {
        job.expect_line(line);
    }
    cluster.stop();
    let [first, second] = jobs.map(Job::finish);
    first.expect(0, &["where no other node could come: listening on 10.77.0.1, too"]);
    second.expect(0, &[]);
}

#[test]
fn the_end_of_the_coordinator_is_the_end_everywhere() {
    let Some(cluster) = Cluster::new() else { return };
    let options =
        ["--nnodes", "2:3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1", "--rdzv-conf", CONF];
    let mut jobs = [1, 2, 3].map(|host| cluster.agent(host, &options));
    assert_eq!(round_of(3, &mut jobs), 0);
    jobs[0].signal(Signal::KILL);
    let [first, second, third] = jobs.map(Job::finish);
    assert_eq!(first.signal, Some(Signal::KILL.as_raw()));
    let reason = "lost the coordinator at 10.77.0.1:29400";
    for (host, other) in [(2, second), (3, third)] {
        let from = format!("10.77.0.1:29400 from {}: Connection refused", address(host));
        other.expect(1, &[reason, &from]);
    }
}

#[test]
fn nodes_are_killed_are_cut_off_and_come_late() {
    let Some(cluster) = Cluster::new() else { return };
    let options =
        ["--nnodes", "2:3", "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1", "--rdzv-conf", CONF];
    let agent = |host| cluster.agent(host, &options);
    let mut jobs = vec![agent(1), agent(2), agent(3)];
    let first = round_of(3, &mut jobs);
    // A killed agent.
    let lost = jobs.pop().unwrap();
    lost.signal(Signal::KILL);
    assert_eq!(lost.finish().signal, Some(Signal::KILL.as_raw()));
    let second = round_of(2, &mut jobs);
    // A late agent.
    jobs.push(agent(3));
    let third = round_of(3, &mut jobs);
    // A host without network: the others continue, and the agent joins again by itself once it can.
    cluster.network.plug(3, false).unwrap();
    let fourth = round_of(2, &mut jobs[..2]);
    cluster.network.plug(3, true).unwrap();
    let fifth = round_of(3, &mut jobs);
    assert!(first < second && second < third && third < fourth && fourth < fifth);
    cluster.stop();
    let [first, _, third] = [0, 1, 2].map(|_| jobs.remove(0).finish());
    first.expect(0, &["lost node 2", "going on with 2 nodes", "has come"]);
    third.expect(0, &["lost the coordinator", "looking for it again for up to 20s"]);
}

#[test]
fn with_a_token_the_store_is_for_the_hosts_of_agents_alone() {
    let Some(cluster) = Cluster::new() else { return };
    let agent = |host: u32| {
        let rank = (host - 1).to_string();
        let mut command =
            cluster.command(host, &["--nnodes", "2", "--node-rank", &rank, "--master-addr", "10.77.0.1"]);
        command.env("ICE_RDZV_TOKEN", "correct horse battery staple");
        Job::start(command)
    };
    let mut jobs = [1, 2].map(agent);
    assert_eq!(round_of(2, &mut jobs), 0);
    // Validates and pings, like torch's clients, and counts the bytes of the answer.
    let client = "exec 3<> /dev/tcp/10.77.0.1/29500
        printf '\\0\\xce\\xf7\\x85\\x3c\\x0d\\x01\\0\\0\\0' >&3; head -c 4 <&3 2> /dev/null | wc -c";
    let answer = |host: u32| {
        let output = cluster.network.on(host).args(["bash", "-c", client]).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    assert_eq!([1, 2, 3].map(answer), ["4", "4", "0"]);
    cluster.stop();
    let [first, second] = jobs.map(Job::finish);
    first.expect(0, &["a client of the store was turned away"]);
    second.expect(0, &[]);
}

#[test]
fn with_etcd_any_node_may_go() {
    let Some(cluster) = Cluster::new() else { return };
    let Some(etcd) = Etcd::start_in(cluster.network.on(0), "10.77.0.254") else { return };
    let meeting = ["--rdzv-backend", "etcd", "--rdzv-endpoint", &etcd.endpoint, "--rdzv-conf", CONF];
    let options = [&meeting[..], &["--nnodes", "2:3"]].concat();
    let agent = |host| cluster.agent(host, &options);
    let mut jobs = vec![agent(1), agent(2), agent(3)];
    let first = round_of(3, &mut jobs);
    // Another job at the same etcd.
    let other = [&meeting[..], &["--nnodes", "1", "--run-id", "other"]].concat();
    let mut other = cluster.agent(2, &other);
    other.expect_line("0 of 1 in round 0");
    // Each of the nodes is lost once: the coordinator, whichever node it is on, and two others.
    let mut last = first;
    for host in 1..=3 {
        let lost = jobs.remove(0);
        lost.signal(Signal::KILL);
        assert_eq!(lost.finish().signal, Some(Signal::KILL.as_raw()));
        let without = round_of(2, &mut jobs);
        jobs.push(agent(host));
        let with = round_of(3, &mut jobs);
        assert!(last < without && without < with);
        last = with;
    }
    // A node without network, whether it has the coordinator or not, is left out, and joins again.
    cluster.network.plug(1, false).unwrap();
    let without = round_of(2, &mut jobs[1..]);
    cluster.network.plug(1, true).unwrap();
    let with = round_of(3, &mut jobs);
    assert!(last < without && without < with);
    cluster.stop();
    jobs.into_iter().chain([other]).for_each(|job| _ = job.finish().expect(0, &[]));
}

#[test]
fn a_coordinator_that_cannot_reach_etcd_is_replaced() {
    let Some(cluster) = Cluster::new() else { return };
    let etcd_host = "10.77.0.254";
    let Some(etcd) = Etcd::start_in(cluster.network.on(0), etcd_host) else { return };
    let meeting = ["--rdzv-backend", "etcd", "--rdzv-endpoint", &etcd.endpoint, "--rdzv-conf", CONF];
    let options = [&meeting[..], &["--nnodes", "2:3"]].concat();
    let mut jobs = [1, 2, 3].map(|host| cluster.agent(host, &options));
    let (first, store) = round_at(3, &mut jobs);
    // The coordinator's host loses etcd, but the other agents still reach the coordinator.
    let host = (1..=3).find(|host| address(*host) == store).unwrap();
    cluster.network.cut(host, etcd_host, true).unwrap();
    let mut jobs = Vec::from(jobs);
    // Makes that host's agent the first in the list.
    jobs.swap(0, host as usize - 1);
    let (without, another) = round_at(2, &mut jobs[1..]);
    assert!(first < without && another != store, "{without} at {another}");
    cluster.network.cut(host, etcd_host, false).unwrap();
    assert!(without < round_of(3, &mut jobs));
    cluster.stop();
    jobs.into_iter().for_each(|job| _ = job.finish().expect(0, &["looking for it again"]));
}
