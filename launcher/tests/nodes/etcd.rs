//! Jobs whose agents meet in a real etcd.

use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::process::Signal;

use crate::server::Etcd;
use crate::support::{Finished, Gate, Job, launch, run, wait_for_state, wait_for_text};

/// Returns the options of a job of `nnodes` nodes, whose silent agents are detected after three
/// seconds.
fn options<'a>(etcd: &'a Etcd, nnodes: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let meeting = ["--devices", "cpu", "--rdzv-backend", "etcd", "--rdzv-endpoint", &etcd.endpoint];
    let conf = ["--rdzv-conf", "keep_alive_interval=1,last_call_timeout=0.5,join_timeout=20"];
    [&meeting[..], &["--nnodes", nnodes], if more.contains(&"--rdzv-conf") { &[] } else { &conf }, more]
        .concat()
}

#[test]
fn nodes_meet_and_the_end_is_known() {
    let Some(etcd) = Etcd::start() else { return };
    let script = "echo \"rank $RANK of $WORLD_SIZE at $MASTER_ADDR\"";
    let options = options(&etcd, "3", &["--run-id", "first"]);
    let jobs = [(); 3].map(|()| Job::start(launch(&options, script)));
    let mut lines = Vec::new();
    for job in jobs {
        lines.extend(
            job.finish().expect(0, &["openssl rand", "--rdzv-token-file token --rdzv-tls"]).stdout.clone(),
        );
    }
    lines.sort();
    let address = lines[0].rsplit(' ').next().unwrap().to_owned();
    assert_eq!(lines, [0, 1, 2].map(|rank| format!("rank {rank} of 3 at {address}")));
    // An agent that comes late receives that the job is over.
    let late = run(launch(&options, script));
    assert!(late.expect(0, &[]).stdout.is_empty(), "{late:#?}");
    // Another job of the same etcd is independent.
    let other = [
        "--devices",
        "cpu",
        "--rdzv-backend",
        "etcd",
        "--rdzv-endpoint",
        &etcd.endpoint,
        "--run-id",
        "second",
    ];
    assert_eq!(run(launch(&other, script)).expect(0, &[]).stdout.len(), 1);
}

#[test]
fn the_job_goes_on_without_the_node_that_coordinated() {
    let Some(etcd) = Etcd::start() else { return };
    let options = options(&etcd, "2:3", &["--max-restarts", "1"]);
    let script = "echo \"$RANK of $WORLD_SIZE in round $ICE_ROUND at $MASTER_PORT\"; read -r go < $GATE";
    let mut gates = Vec::new();
    let mut another = || {
        let mut command = launch(&options, script);
        gates.push(Gate::new(&mut command));
        Job::start(command)
    };
    // The first agent becomes the coordinator.
    let mut first = another();
    etcd.wait_for_leader();
    let mut others = [another(), another()];
    let line = first.expect_line("");
    let port = line.rsplit(' ').next().unwrap();
    let ranks: Vec<String> = others.iter_mut().map(|job| job.expect_line("")).collect();
    assert!(ranks.iter().all(|line| line.ends_with(port)), "{ranks:?}");
    first.signal(Signal::KILL);
    assert_eq!(first.finish().signal, Some(Signal::KILL.as_raw()));
    let after: Vec<String> = others.iter_mut().map(|job| job.expect_line("")).collect();
    let of_two = |line: &String| line.contains("of 2 in round 1 at ") && !line.ends_with(port);
    assert!(after.iter().all(of_two), "{after:?}");
    // A third node joins. The lost node did not count as a failure.
    let mut late = another();
    late.expect_line("2 of 3 in round 2 at ");
    others.iter_mut().for_each(|job| assert!(job.expect_line("").contains("of 3 in round 2")));
    // The first node's gate is gone with its rank.
    gates[1..].iter().for_each(Gate::open);
    late.finish().expect(0, &[]);
    others.into_iter().for_each(|job| _ = job.finish().expect(0, &["looking for it again"]));
}

#[test]
fn a_failure_that_the_coordinator_does_not_live_to_hear_of_is_counted() {
    let Some(etcd) = Etcd::start() else { return };
    let events = tempfile::NamedTempFile::new().unwrap();
    let options = options(&etcd, "1:2", &["--max-restarts", "1"]);
    let script = "
        echo \"$RANK of $WORLD_SIZE, restart $TORCHELASTIC_RESTART_COUNT\"
        [ $TORCHELASTIC_RESTART_COUNT = 0 ] || exit 0; read -r go < $GATE; exit 3";
    let mut command = launch(&options, script);
    let _gate = Gate::new(&mut command);
    let mut first = Job::start(command);
    first.expect_line("0 of 1, restart 0");
    let mut command =
        launch(&[&options[..], &["--events", events.path().to_str().unwrap()]].concat(), script);
    let gate = Gate::new(&mut command);
    let mut second = Job::start(command);
    second.expect_line("1 of 2, restart 0");
    // A stopped coordinator receives no messages, and is killed before it could continue.
    first.signal(Signal::STOP);
    wait_for_state(&first.pid().to_string(), 'T');
    gate.open();
    wait_for_text(events.path(), "rank_ended");
    first.signal(Signal::KILL);
    assert_eq!(first.finish().signal, Some(Signal::KILL.as_raw()));
    second.expect_line("0 of 1, restart 1");
    second.finish().expect(0, &["rank 1 failed: exit code 3", "exit code 3; restart 1 of 1"]);
}

#[test]
fn a_coordinator_that_leaves_makes_way_at_once() {
    let Some(etcd) = Etcd::start() else { return };
    // With this interval, a silent agent would be detected only after a minute.
    let conf = "keep_alive_interval=20,last_call_timeout=0.2,join_timeout=25";
    let options = options(&etcd, "1:2", &["--rdzv-conf", conf]);
    let script = "echo \"$RANK of $WORLD_SIZE\"; read -r go < $GATE";
    let mut command = launch(&options, script);
    let gate = Gate::new(&mut command);
    let mut second = launch(&options, script);
    gate.lead("GATE", &mut second);
    let mut first = Job::start(command);
    first.expect_line("0 of 1");
    let mut second = Job::start(second);
    second.expect_line("1 of 2");
    first.signal(Signal::TERM);
    first.finish().expect(143, &[]);
    second.expect_line("0 of 1");
    gate.open();
    second.finish().expect(0, &["looking for it again"]);
}

#[test]
fn agents_speak_tls_wherever_the_coordinator_is() {
    let Some(etcd) = Etcd::start() else { return };
    let options = options(&etcd, "2", &["--max-restarts", "1"]);
    let script = "echo \"$RANK of $WORLD_SIZE in round $ICE_ROUND\"; read -r go < $GATE";
    let mut gates = Vec::new();
    let mut another = |tls: &str| {
        let mut command = launch(&options, script);
        command.env("ICE_RDZV_TOKEN", "correct horse battery staple").env("ICE_RDZV_TLS", tls);
        gates.push(Gate::new(&mut command));
        command
    };
    let mut first = Job::start(another("1"));
    etcd.wait_for_leader();
    let without = run(another("0"));
    without.expect(1, &["the endpoint asks for TLS: give this agent --rdzv-tls"]);
    assert!(!without.stderr.contains("openssl"), "{without:#?}");
    let mut second = Job::start(another("1"));
    for job in [&mut first, &mut second] {
        assert!(job.expect_line("").contains("of 2 in round 0"));
    }
    first.signal(Signal::KILL);
    first.finish();
    let mut third = Job::start(another("1"));
    for job in [&mut second, &mut third] {
        assert!(job.expect_line("").contains("of 2 in round 1"));
    }
    gates[2..].iter().for_each(Gate::open);
    for job in [second, third] {
        let finished = job.finish();
        assert!(!finished.expect(0, &[]).stderr.contains("openssl"), "{finished:#?}");
    }
}

#[test]
fn without_etcd_the_job_says_where_it_looked() {
    let Some(mut etcd) = Etcd::start() else { return };
    etcd.stop();
    let options = options(&etcd, "2", &["--rdzv-conf", "join_timeout=0.5"]);
    run(launch(&options, "true")).expect(1, &["etcd at http://127.0.0.1:", "does not answer"]);
}

#[test]
fn an_etcd_that_goes_away_ends_the_round_and_not_the_job() {
    let Some(etcd) = Etcd::start() else { return };
    // A suspended etcd holds its connections and does not answer.
    let events = tempfile::NamedTempFile::new().unwrap();
    let options = options(&etcd, "1", &["--events", events.path().to_str().unwrap()]);
    let mut command = launch(&options, "echo \"round $ICE_ROUND\"; read -r go < $GATE");
    let gate = Gate::new(&mut command);
    let mut job = Job::start(command);
    job.expect_line("round 0");
    etcd.signal(Signal::STOP);
    wait_for_text(events.path(), "lost the coordinator");
    etcd.signal(Signal::CONT);
    job.expect_line("round 1");
    gate.open();
    job.finish().expect(0, &[]);
}

#[test]
fn dead_members_and_a_missing_gateway_are_of_no_consequence() {
    let Some(mut dead) = Etcd::start() else { return };
    let Some(alive) = Etcd::with_options(&["--enable-grpc-gateway=false"]) else { return };
    dead.stop();
    let endpoints = format!("{},{}", dead.endpoint, alive.endpoint);
    let mut options = options(&alive, "2", &[]);
    let at = options.iter().position(|option| *option == alive.endpoint).unwrap();
    options[at] = &endpoints;
    let jobs = [(); 2].map(|()| Job::start(launch(&options, "echo started")));
    for job in jobs {
        assert_eq!(job.finish().expect(0, &[]).stdout, ["started"]);
    }
}

/// Runs a job of one node, with a run id of its own.
fn job(etcd: &Etcd, conf: &str) -> Finished {
    static NUMBER: AtomicUsize = AtomicUsize::new(0);
    let name = format!("job-{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    let options = options(etcd, "1", &["--rdzv-conf", conf, "--run-id", &name]);
    run(launch(&options, "echo started"))
}

/// Adds a user with all permissions, and makes etcd require a user from then on.
fn add_user(etcd: &Etcd, name: &str, identity: &[&str]) {
    let ask = |path: &str, body: &str| etcd.ask(path, body, identity);
    ask("/v3/auth/user/add", r#"{"name":"root","password":"secret"}"#);
    ask("/v3/auth/user/grant", r#"{"user":"root","role":"root"}"#);
    if name != "root" {
        ask("/v3/auth/user/add", &format!(r#"{{"name":"{name}","password":"unknown"}}"#));
        ask("/v3/auth/user/grant", &format!(r#"{{"user":"{name}","role":"root"}}"#));
    }
    ask("/v3/auth/enable", "{}");
}

#[test]
fn etcd_wants_a_password() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    std::fs::write(path("password"), "secret\n").unwrap();
    std::fs::write(path("wrong"), "guess\n").unwrap();
    let Some(etcd) = Etcd::start() else { return };
    let job = |conf: &str| job(&etcd, conf);
    let conf = |password: &str| format!("join_timeout=5,user=root,password_file={}", path(password));
    let refused = "authentication is not enabled: leave out user and password_file";
    job(&conf("password")).expect(1, &["etcd at http://127.0.0.1:", refused]);
    add_user(&etcd, "root", &[]);
    assert_eq!(job(&conf("password")).expect(0, &[]).stdout, ["started"]);
    job(&conf("wrong")).expect(1, &["etcd at http://127.0.0.1:", "authentication failed"]);
    job("join_timeout=5").expect(1, &["user name is empty", "give user and password_file with --rdzv-conf"]);
}

#[test]
fn etcd_wants_certificates_and_a_password() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    certificates(folder.path());
    let Some(etcd) = Etcd::with_tls(&path("ca.pem"), &path("server.pem"), &path("server.key")) else {
        return;
    };
    let text = |name: &str| path(name).display().to_string();
    let identity = ["--cacert", &text("ca.pem"), "--cert", &text("client.pem"), "--key", &text("client.key")]
        .map(str::to_owned);
    let identity: Vec<&str> = identity.iter().map(String::as_str).collect();
    std::fs::write(path("password"), "secret\n").unwrap();
    std::fs::write(path("wrong"), "guess\n").unwrap();
    let job = |conf: &str| job(&etcd, conf);
    let tls = format!("cacert={},cert={},key={}", text("ca.pem"), text("client.pem"), text("client.key"));
    assert_eq!(job(&tls).expect(0, &[]).stdout, ["started"]);
    add_user(&etcd, "client", &identity);
    let conf = |password: &str| format!("join_timeout=5,{tls},user=root,password_file={}", text(password));
    assert_eq!(job(&conf("password")).expect(0, &[]).stdout, ["started"]);
    job(&conf("wrong")).expect(1, &["etcd at https://127.0.0.1:", "authentication failed"]);
    // The name of the certificate is a user's name.
    assert_eq!(job(&tls).expect(0, &[]).stdout, ["started"]);
    // Certificates that are missing or wrong.
    let refused = |conf: &str, code: i32, why: &str| {
        job(&format!("join_timeout=5,{conf}")).expect(code, &[why]);
    };
    let ca = format!("cacert={}", text("ca.pem"));
    refused(&ca, 1, "it asks for another certificate of ours");
    refused(&format!("cacert={}", text("client.pem")), 1, "not signed by the authority of cacert");
    refused("protocol=https", 2, "https needs cacert");
    refused(&format!("cacert={}", text("ca.key")), 2, "cacert holds no certificate");
    let swapped = format!("{ca},cert={},key={}", text("client.pem"), text("server.key"));
    refused(&swapped, 2, "cert and key cannot be used");
    refused("protocol=http", 1, "if it has TLS, give protocol=https");
}

/// Makes an authority, and certificates for etcd and for the agents.
fn certificates(folder: &std::path::Path) {
    let script = "
        set -e
        openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=ca
        for name in server client; do
            openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout $name.key -out $name.csr -subj /CN=$name
            printf 'subjectAltName=IP:127.0.0.1\\nextendedKeyUsage=serverAuth,clientAuth\\n' > ext
            openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out $name.pem -days 2 -extfile ext
        done";
    let output = Command::new("sh").args(["-c", script]).current_dir(folder).output().unwrap();
    assert!(output.status.success(), "{output:?}");
}
