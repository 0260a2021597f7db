//! Agents that encrypt their traffic.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use crate::support::{Job, free_port, launch, run};

/// Forwards connections from one port to another in both directions, and keeps a copy of the bytes.
struct Wire {
    port: String,
    seen: Arc<Mutex<Vec<u8>>>,
}

impl Wire {
    fn to(target: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port().to_string();
        let (seen, target) = (Arc::<Mutex<Vec<u8>>>::default(), format!("127.0.0.1:{target}"));
        let copy = Arc::clone(&seen);
        thread::spawn(move || {
            for inward in listener.incoming().map_while(Result::ok) {
                // No process listens on the port yet. Agents connect again.
                let Ok(outward) = TcpStream::connect(&target) else { continue };
                let ends = [&inward, &outward].map(|stream| stream.try_clone().unwrap());
                for (from, to) in ends.into_iter().zip([outward, inward]) {
                    let seen = Arc::clone(&copy);
                    thread::spawn(move || pass(from, to, &seen));
                }
            }
        });
        Self { port, seen }
    }

    fn has_seen(&self, text: &str) -> bool {
        self.seen.lock().unwrap().windows(text.len()).any(|part| part == text.as_bytes())
    }

    fn first(&self) -> Option<u8> {
        self.seen.lock().unwrap().first().copied()
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, seen: &Mutex<Vec<u8>>) {
    let mut buffer = [0; 4096];
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        seen.lock().unwrap().extend_from_slice(&buffer[..read]);
        if to.write_all(&buffer[..read]).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}

#[test]
fn nothing_of_what_agents_say_can_be_read_on_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let secret = folder.path().join("secret");
    std::fs::write(&secret, "correct horse battery staple\n").unwrap();
    // The message of an agent about a failed rank is on the wire, too.
    let script = "
        [ $TORCHELASTIC_RESTART_COUNT = 1 ] || exit $((70 + RANK)); echo \"rank $RANK of $WORLD_SIZE\"";
    for tls in [true, false] {
        let port = free_port();
        let wire = Wire::to(&port);
        let agent = |rank: &str, port: &str| {
            let node = ["--devices", "cpu", "--nnodes", "2", "--node-rank", rank, "--master-port", port];
            let more = ["--run-id", "a-name-to-look-for", "--max-restarts", "1"];
            let file = ["--rdzv-token-file", secret.to_str().unwrap()];
            launch(&[&node[..], &more, &file, if tls { &["--rdzv-tls"] } else { &[] }].concat(), script)
        };
        let jobs = [agent("0", &port), agent("1", &wire.port)].map(Job::start);
        let lines = jobs.map(|job| job.finish().expect(0, &["restart 1 of 1"]).stdout.clone());
        assert_eq!(lines, [["rank 0 of 2"], ["rank 1 of 2"]]);
        assert_eq!(wire.first(), Some(if tls { 0x16 } else { b'I' }));
        for text in ["a-name-to-look-for", "exit code 7"] {
            assert_eq!(wire.has_seen(text), !tls, "`{text}`, TLS: {tls}");
        }
    }
}

#[test]
fn agents_that_do_not_agree_about_tls_say_what_to_do() {
    let agent = |rank: &str, port: &str, tls: Option<&str>| {
        let node = ["--devices", "cpu", "--nnodes", "2", "--node-rank", rank, "--master-port", port];
        let mut command = launch(&node, "[ -z \"$ICE_RDZV_TLS\" ] && echo rank $RANK");
        command.env("ICE_RDZV_TOKEN", "correct horse battery staple");
        tls.into_iter().for_each(|tls| _ = command.env("ICE_RDZV_TLS", tls));
        command
    };
    for (hosts, others, said, hosts_said) in [
        (Some("1"), Some("0"), "the endpoint asks for TLS: give this agent --rdzv-tls", "without --rdzv-tls"),
        (None, Some("1"), "give the agent that hosts it --rdzv-tls", "this endpoint has no TLS"),
    ] {
        let port = free_port();
        let host = Job::start(agent("0", &port, hosts));
        run(agent("1", &port, others)).expect(1, &[said]);
        assert_eq!(run(agent("1", &port, hosts)).expect(0, &[]).stdout, ["rank 1"]);
        host.finish().expect(0, &[hosts_said]);
    }
}
