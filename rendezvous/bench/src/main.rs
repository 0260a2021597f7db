//! Server and load generator of `scripts/bench-rendezvous`, for this crate's server and torch's.
//!
//! ```text
//! bench serve                         serves on a free port of loopback, which it prints; ends at
//!                                     end of input
//! bench adds PORT PID SECONDS         pipelined adds over 8 connections: adds per second of a core
//!                                     of process PID
//! bench latency PORT CONNECTIONS RATE SECONDS
//!                                     adds at this rate, over one connection after another: p50
//!                                     and p99 in microseconds
//! bench idle PORT PID CONNECTIONS     memory of process PID per validated connection, in KiB
//! bench join AGENTS [tls]             seconds until all agents are in one round
//! bench simulate [MIN:]AGENTS [ranks] the same without a network: seconds, and MB that would be
//!                                     sent; with `ranks` each node requests its rank
//! bench requests COUNT                decodes and handles requests of the store without a network;
//!                                     for scripts/check-instructions
//! bench answers PORT CONNECTIONS      seconds until all of them had an answer, one after another
//! bench waiters PORT CONNECTIONS      seconds from a set until all of them, which wait for its key,
//!                                     were woken
//! ```

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use ice_proto::frame;
use ice_proto::rendezvous::{Hello, KeepAlive, RestartPolicy, ToAgent, ToCoordinator};
use ice_rendezvous::coordinator::{Action, Coordinator, Event, Settings};
use ice_rendezvous::store::codec::{Request, decode, encode};
use ice_rendezvous::store::state::{Replies, Store};
use ice_rendezvous::{RetryPolicy, Server, ServerConfig, Session, Token};

const LIMIT: Duration = Duration::from_secs(60);
/// Pipelined requests per connection.
const PIPELINED: usize = 512;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    raise_open_files();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u64>().unwrap();
    match arguments[..] {
        ["serve"] => {
            let host = host(None).await;
            println!("{}", host.port());
            let _ = std::io::stdin().read(&mut [0]);
        }
        ["adds", port, pid, seconds] => adds(number(port) as u16, pid, Duration::from_secs(number(seconds))),
        ["latency", port, connections, rate, seconds] => {
            let time = Duration::from_secs(number(seconds));
            latency(number(port) as u16, number(connections) as usize, number(rate), time);
        }
        ["idle", port, pid, connections] => idle(number(port) as u16, pid, number(connections) as usize),
        ["join", agents] => join(number(agents) as u32, None).await,
        ["join", agents, "tls"] => {
            join(number(agents) as u32, Some(Token::new("for the benchmark").unwrap().over_tls())).await;
        }
        ["simulate", nnodes] => simulate(nnodes, false),
        ["simulate", nnodes, "ranks"] => simulate(nnodes, true),
        ["requests", count] => requests(number(count)),
        ["answers", port, connections] => answers(number(port) as u16, number(connections)),
        ["waiters", port, connections] => waiters(number(port) as u16, number(connections)),
        _ => panic!("see the head of the file"),
    }
}

fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

async fn host(token: Option<Token>) -> Server {
    let config = ServerConfig {
        addresses: vec![[127, 0, 0, 1].into()],
        port: 0,
        run_id: "bench".into(),
        join_timeout: LIMIT,
        last_call: LIMIT,
        keep_alive: KeepAlive::default(),
        token,
    };
    Server::bind(config).await.unwrap()
}

fn hello(nnodes: (u32, u32), number: u32) -> Hello {
    Hello {
        run_id: "bench".into(),
        node_rank: None,
        nnodes,
        local_world_size: 8,
        role: "default".into(),
        ranks_store: None,
        restarts: RestartPolicy { max_restarts: 3, window: None, backoff: Duration::ZERO, crash_loop: 0 },
        keep_alive: KeepAlive::default(),
        agent_id: number.into(),
        run_stamp: None,
        last_node_rank: None,
        addresses: Vec::new(),
        host: format!("node{number}.cluster.example"),
        pid: number,
    }
}

fn validated(port: u16) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_nodelay(true).unwrap();
    send(&mut stream, &[Request::Validate]);
    stream
}

/// Connects a client that has received an answer.
fn served(port: u16) -> TcpStream {
    let mut stream = validated(port);
    send(&mut stream, &[Request::Ping(7)]);
    stream.read_exact(&mut [0; 4]).unwrap();
    stream
}

fn send(stream: &mut TcpStream, requests: &[Request<'_>]) {
    let mut bytes = Vec::new();
    requests.iter().for_each(|request| encode(request, &mut bytes));
    stream.write_all(&bytes).unwrap();
}

/// Returns the CPU seconds of all threads of a process.
fn cpu_seconds(pid: &str) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    // In ticks of 10 ms, see proc(5).
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn rss_kib(pid: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn adds(port: u16, pid: &str, time: Duration) {
    let before = cpu_seconds(pid);
    let end = Instant::now() + time;
    let connection = |number: usize| {
        let mut stream = validated(port);
        let key = format!("/bench{number}");
        let request = vec![Request::Add(key.as_bytes(), 1); PIPELINED / 2];
        let mut answers = vec![0; 8 * request.len()];
        let mut done = 0_u64;
        send(&mut stream, &request);
        while Instant::now() < end {
            // One half is sent while the other half is answered.
            send(&mut stream, &request);
            stream.read_exact(&mut answers).unwrap();
            done += request.len() as u64;
        }
        stream.read_exact(&mut answers).unwrap();
        done + request.len() as u64
    };
    let done: u64 = thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|number| scope.spawn(move || connection(number))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).sum()
    });
    println!("{:.0}", done as f64 / (cpu_seconds(pid) - before));
}

/// Each add is due at a fixed time, and its latency counts from there, whether or not earlier adds
/// were answered. So a stalled server is charged for the requests due meanwhile, and the speed of
/// the clients does not matter.
fn latency(port: u16, connections: usize, rate: u64, time: Duration) {
    let mut streams: Vec<TcpStream> = (0..connections).map(|_| served(port)).collect();
    let requests: Vec<Vec<u8>> = (0..connections)
        .map(|number| {
            let mut bytes = Vec::new();
            encode(&Request::Add(format!("/bench{number}").as_bytes(), 1), &mut bytes);
            bytes
        })
        .collect();
    streams.iter().for_each(|stream| stream.set_nonblocking(true).unwrap());
    let total = rate * time.as_secs();
    let due = |number: u64| Duration::from_nanos(number * 1_000_000_000 / rate);
    let place = |number: u64| number as usize % connections;
    let (mut sent, mut waiting) = (0, Vec::<u64>::new());
    let mut latencies = Vec::with_capacity(total as usize);
    let start = Instant::now();
    while latencies.len() < total as usize {
        // A connection has one request at a time.
        let is_free = waiting.first().is_none_or(|oldest| sent - oldest < connections as u64);
        if sent < total && is_free && start.elapsed() >= due(sent) {
            let at = place(sent);
            streams[at].write_all(&requests[at]).unwrap();
            waiting.push(sent);
            sent += 1;
        }
        waiting.retain(|number| match streams[place(*number)].read(&mut [0; 8]) {
            Ok(8) => {
                latencies.push(start.elapsed() - due(*number));
                false
            }
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => true,
            other => panic!("{other:?}"),
        });
    }
    latencies.sort_unstable();
    let at = |share: f64| latencies[(share * (latencies.len() - 1) as f64) as usize].as_secs_f64() * 1e6;
    println!("{:.1} {:.1}", at(0.5), at(0.99));
}

fn idle(port: u16, pid: &str, connections: usize) {
    let before = rss_kib(pid);
    let all: Vec<TcpStream> = (0..connections).map(|_| served(port)).collect();
    println!("{:.3}", (rss_kib(pid) - before) / all.len() as f64);
}

fn answers(port: u16, connections: u64) {
    let start = Instant::now();
    (0..connections).for_each(|_| drop(served(port)));
    println!("{:.4}", start.elapsed().as_secs_f64());
}

fn waiters(port: u16, connections: u64) {
    let key = format!("/waiters{}", std::process::id());
    let waiting = |_| {
        let mut stream = validated(port);
        send(&mut stream, &[Request::Wait(vec![key.as_bytes()]), Request::Ping(7)]);
        // The answer to the ping: the wait has begun.
        stream.read_exact(&mut [0; 4]).unwrap();
        stream
    };
    let mut all: Vec<TcpStream> = (0..connections).map(waiting).collect();
    let mut setter = served(port);
    let start = Instant::now();
    send(&mut setter, &[Request::Set(key.as_bytes(), b"1")]);
    all.iter_mut().for_each(|stream| stream.read_exact(&mut [0]).unwrap());
    println!("{:.4}", start.elapsed().as_secs_f64());
}

async fn join(agents: u32, token: Option<Token>) {
    let host = host(token.clone()).await;
    let start = Instant::now();
    let tasks: Vec<_> = (0..agents)
        .map(|number| {
            let (port, hello, token) = (host.port(), hello((agents, agents), number), token.clone());
            tokio::spawn(async move {
                let retry = RetryPolicy::within(LIMIT);
                let mut session =
                    Session::connect(("127.0.0.1", port), None, hello, token.as_ref(), retry).await.unwrap();
                session.send(ToCoordinator::Join);
                assert!(matches!(session.recv().await.unwrap(), ToAgent::RoundStarted(_)));
                session
            })
        })
        .collect();
    let mut sessions = Vec::new();
    for task in tasks {
        sessions.push(task.await.unwrap());
    }
    println!("{:.4}", start.elapsed().as_secs_f64());
}

fn simulate(nnodes: &str, ranks: bool) {
    let (fewest, agents) = nnodes.split_once(':').unwrap_or((nnodes, nnodes));
    let nnodes @ (_, agents) = (fewest.parse().unwrap(), agents.parse::<u32>().unwrap());
    let settings =
        Settings { run_id: "bench".into(), join_timeout: LIMIT, last_call: LIMIT, run_stamp: "stamp".into() };
    let mut coordinator = Coordinator::new(settings);
    let start = Instant::now();
    let (mut started, mut bytes) = (0, 0);
    for number in 0..agents {
        let hello = Hello { node_rank: ranks.then_some(number), ..hello(nnodes, number) };
        for message in [ToCoordinator::Hello(hello), ToCoordinator::Join] {
            for action in coordinator.handle(Duration::ZERO, Event::Message(number.into(), message)) {
                if let Action::Send(_, message) = action {
                    bytes += frame::encode(&message).unwrap().len();
                    started += u32::from(matches!(message, ToAgent::RoundStarted(_)));
                }
            }
        }
    }
    assert_eq!(started, agents);
    println!("{:.4} {:.1}", start.elapsed().as_secs_f64(), bytes as f64 / 1e6);
}

/// Repeats the requests of ranks that form a group.
fn requests(count: u64) {
    let mut store = Store::new(1 << 30);
    let mut replies = Replies::default();
    let keys: Vec<String> =
        (0..64).map(|number| format!("/worker/attempt_0/default_pg/0//cpu//rank{number}")).collect();
    for (number, key) in (0..count).zip(keys.iter().cycle()) {
        let key = key.as_bytes();
        let request = match number % 4 {
            0 => Request::Set(key, &[7; 100]),
            1 => Request::Wait(vec![key]),
            2 => Request::Get(key),
            _ => Request::Add(b"/count", 1),
        };
        let mut bytes = Vec::new();
        encode(&request, &mut bytes);
        let (request, _) = decode(&bytes).unwrap().unwrap();
        store.handle(number % 8, request, &mut replies).unwrap();
        replies.own.clear();
        replies.woken.clear();
    }
}
