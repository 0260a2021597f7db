//! Measures a real host's cost of agents, over loopback. The host runs in its own process, whose
//! CPU time and memory are read.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use ice_proto::frame;
use ice_proto::rendezvous::{Hello, KeepAlive, RestartPolicy, ToAgent, ToCoordinator};
use ice_rendezvous::coordinator::{Action, Coordinator, Event, Settings};
use ice_rendezvous::store::codec::{Request, encode};
use ice_rendezvous::{RetryPolicy, Server, ServerConfig, Session, Token};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::sleep;

const LIMIT: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_secs(1);

fn keep_alive() -> KeepAlive {
    KeepAlive { interval: INTERVAL, attempts: 60 }
}

fn token(tls: bool) -> Option<Token> {
    let token = Token::new("for the measurement").unwrap();
    Some(if tls { token.over_tls() } else { token })
}

/// Runs a host until the input ends.
pub(crate) async fn serve(tls: bool) {
    raise_open_files();
    let config = ServerConfig {
        addresses: vec![[127, 0, 0, 1].into()],
        port: 0,
        run_id: "measure".into(),
        join_timeout: LIMIT,
        last_call: LIMIT,
        keep_alive: keep_alive(),
        token: token(tls),
    };
    let server = Server::bind(config).await.unwrap();
    println!("{}", server.port());
    let _ = std::io::stdin().read(&mut [0]);
}

/// A process that runs a host.
struct ServerProcess {
    child: Child,
    input: Option<ChildStdin>,
    port: u16,
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        self.input = None;
        let _ = self.child.wait();
    }
}

impl ServerProcess {
    fn start(tls: bool) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("serve").args(tls.then_some("--tls")).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let input = child.stdin.take();
        Self { child, input, port: line.trim().parse().unwrap() }
    }

    /// Returns the CPU time of its threads in microseconds, see
    /// Documentation/scheduler/sched-stats.rst of Linux.
    fn cpu(&self) -> f64 {
        let threads = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let of = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("schedstat")).unwrap();
        let nanoseconds = |text: String| text.split(' ').next().unwrap().parse::<f64>().unwrap();
        threads.map(|thread| nanoseconds(of(thread.unwrap()))).sum::<f64>() / 1e3
    }

    fn kib(&self) -> f64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

fn raise_open_files() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

fn hello(many: u32, number: u32) -> Hello {
    Hello {
        run_id: "measure".into(),
        node_rank: None,
        nnodes: (many, many),
        local_world_size: 8,
        role: "default".into(),
        ranks_store: None,
        restarts: RestartPolicy { max_restarts: 100, window: None, backoff: Duration::ZERO, crash_loop: 0 },
        keep_alive: keep_alive(),
        agent_id: number.into(),
        run_stamp: None,
        last_node_rank: None,
        addresses: Vec::new(),
        host: format!("node{number}.cluster.example"),
        pid: number,
    }
}

/// Prints the cost of each operation.
pub(crate) async fn measure(many: u32) {
    raise_open_files();
    machine(many);
    for tls in [false, true] {
        agents(many, tls).await;
    }
    store(many).await;
}

/// Measures the state machine and the encoding, without a network.
fn machine(many: u32) {
    let settings = Settings {
        run_id: "measure".into(),
        join_timeout: LIMIT,
        last_call: LIMIT,
        run_stamp: "01010000_measure".into(),
    };
    let (mut coordinator, mut messages, start) = (Coordinator::new(settings), 0, Instant::now());
    for number in 0..many {
        for message in [ToCoordinator::Hello(hello(many, number)), ToCoordinator::Join] {
            messages += 1;
            for action in coordinator.handle(Duration::ZERO, Event::Message(number.into(), message)) {
                if let Action::Send(_, message) = action {
                    messages += u32::from(!frame::encode(&message).unwrap().is_empty());
                }
            }
        }
    }
    let each = start.elapsed().as_secs_f64() * 1e6 / f64::from(messages);
    println!("the machine alone, {many} agents that form a round: {each:.2} µs per message");
}

async fn agents(many: u32, tls: bool) {
    let server = ServerProcess::start(tls);
    let (port, each) = (server.port, f64::from(many));
    let (cpu, kib) = (server.cpu(), server.kib());
    let start = Instant::now();
    let connect = |number| async move {
        let (token, retry) = (token(tls), RetryPolicy::within(LIMIT).answer_timeout(LIMIT));
        let session = Session::connect(("127.0.0.1", port), None, hello(many, number), token.as_ref(), retry);
        session.await.unwrap()
    };
    let tasks: Vec<_> = (0..many).map(|number| tokio::spawn(connect(number))).collect();
    let mut sessions = Vec::new();
    for task in tasks {
        sessions.push(task.await.unwrap());
    }
    let came = start.elapsed();
    sleep(INTERVAL / 4).await;
    let connected = server.cpu() - cpu;
    let (cpu, start) = (server.cpu(), Instant::now());
    sessions.iter().for_each(|session| session.send(ToCoordinator::Join));
    for session in &mut sessions {
        while !matches!(session.recv().await.unwrap(), ToAgent::RoundStarted(_)) {}
    }
    let formed = came + start.elapsed();
    let joined = server.cpu() - cpu;
    let cpu = server.cpu();
    let uptime = Duration::from_secs(60);
    let failed = ToCoordinator::Failed { round: 0, reason: "a rank died".into(), uptime, fatal_reason: None };
    sessions[0].send(failed);
    for session in &mut sessions {
        while !matches!(session.recv().await.unwrap(), ToAgent::RoundBroken { .. }) {}
    }
    let broken = server.cpu() - cpu;
    sleep(INTERVAL * 2).await;
    let cpu = server.cpu();
    sleep(INTERVAL * 5).await;
    let alive = (server.cpu() - cpu) / 5.0;
    println!(
        "{} agents{}: µs to connect and say hello {:.1}, to join and be told {:.1}, to be told {:.1}, keep-alive both ways {:.1}; {:.1} KiB; formed in {:.2} s",
        many,
        if tls { " over TLS" } else { "" },
        connected / each,
        joined / each,
        broken / each,
        alive / each,
        (server.kib() - kib) / each,
        formed.as_secs_f64()
    );
}

async fn store(many: u32) {
    let server = ServerProcess::start(false);
    let (token, retry) = (token(false), RetryPolicy::within(LIMIT));
    // The store accepts clients from an address only after an agent with the token has connected
    // from there.
    let known = Session::connect(("127.0.0.1", server.port), None, hello(many, 0), token.as_ref(), retry);
    let _known = known.await.unwrap();
    let (cpu, kib) = (server.cpu(), server.kib());
    let mut clients = Vec::new();
    for _ in 0..many {
        let mut stream = TcpStream::connect(("127.0.0.1", server.port)).await.unwrap();
        let mut bytes = Vec::new();
        [Request::Validate, Request::Ping(7)].iter().for_each(|request| encode(request, &mut bytes));
        stream.write_all(&bytes).await.unwrap();
        stream.read_exact(&mut [0; 4]).await.unwrap();
        clients.push(stream);
    }
    let each = f64::from(many);
    println!(
        "{many} clients of the store: µs to connect and be answered once {:.1}; {:.1} KiB",
        (server.cpu() - cpu) / each,
        (server.kib() - kib) / each
    );
    let _ = std::io::stdout().flush();
}
