//! Connections of strangers to the endpoint while a job forms and trains.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, getrlimit, setrlimit};
use tempfile::tempdir;

use crate::forms::{Run, assert_same_bits};
use crate::support::{SOON, TRAINING, free_port, wait_until};

/// Number of simultaneous connections, half of them while the job forms and half while it trains.
const STRANGERS: usize = 10_000;

/// First bytes of strangers, and the byte that they then repeat.
const SAID: [(&[u8], u8); 6] = [
    (b"", b'I'),
    (b"ICE\x01\x01\0\0\0\xff\xff\x0f\0", 0),
    (b"GET / HTTP/1.1\r\n", b'x'),
    (b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03", 7),
    // Requests to the store: a value that never ends, and a wait for many keys.
    (b"\0\xce\xf7\x85\x3c\x01\x01\0\0\0\0\0\0\0k\0\0\x80\0\0\0\0\0", b'v'),
    (b"\0\xce\xf7\x85\x3c\x06\0\0\x02\0\0\0\0\0\x01\0\0\0\0\0\0\0a", 0),
];

fn strangers(count: usize, port: u16) -> Vec<(TcpStream, u8)> {
    let mut strangers = Vec::new();
    for (words, then) in SAID.iter().cycle().take(count) {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).expect("the endpoint listens");
        // The server may already have closed the connection.
        let _ = stream.write_all(words);
        strangers.push((stream, *then));
    }
    strangers
}

#[test]
fn a_job_does_not_notice_ten_thousand_strangers() {
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).unwrap();
    let folder = tempdir().unwrap();
    let run = |name: &str| Run::new(&folder.path().join(name)).steps(150);
    let job = |run: &Run, port: u16, node: &str| {
        let port = port.to_string();
        let options = ["--devices", "cpu", "--nnodes", "2", "--node-rank", node, "--master-port", &port];
        run.under_ice_launch(&[&options[..], &["--run-id", "digits"]].concat()).start()
    };
    let undisturbed = run("undisturbed");
    let port = free_port();
    let jobs = ["0", "1"].map(|node| job(&undisturbed, port, node));
    jobs.into_iter().for_each(|job| _ = job.finish(TRAINING).expect_code(0));

    let disturbed = run("disturbed");
    let port = free_port();
    let first = job(&disturbed, port, "0");
    wait_until(SOON, "an endpoint", || TcpStream::connect(("127.0.0.1", port)).is_ok());
    let mut there = strangers(STRANGERS / 2, port);
    let second = job(&disturbed, port, "1");
    let over = AtomicBool::new(false);
    let (first, second) = thread::scope(|scope| {
        scope.spawn(|| {
            there.extend(strangers(STRANGERS / 2, port));
            while !over.load(Ordering::Relaxed) {
                for some in there.chunks_mut(500) {
                    some.iter_mut().for_each(|(stream, byte)| _ = stream.write_all(&[*byte]));
                    // Slowly, like attackers that hold connections open.
                    thread::sleep(Duration::from_millis(5));
                }
            }
        });
        let outcomes = (first.finish(TRAINING), second.finish(TRAINING));
        over.store(true, Ordering::Relaxed);
        outcomes
    });
    for outcome in [first, second] {
        outcome.expect_code(0);
        for kind in ["connections to the store", "connections of agents"] {
            let ended = format!("{kind} ended to make room");
            assert!(!outcome.stderr.contains(&ended), "{}", outcome.transcript());
        }
    }
    assert_same_bits(&undisturbed, &disturbed);
}
