//! A server with limited memory. One test, since the limit is that of the process.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use ice_proto::rendezvous::KeepAlive;
use ice_rendezvous::store::client::Client;
use ice_rendezvous::store::codec::{Request, encode};
use ice_rendezvous::{Server, ServerConfig};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(60);
/// Memory that the process may take in addition to its initial size.
const ROOM: u64 = 200 << 20;

/// Connects a validated client that reads nothing by itself.
async fn raw(host: &Server) -> TcpStream {
    let mut stream = TcpStream::connect(("127.0.0.1", host.port())).await.unwrap();
    send(&mut stream, &Request::Validate).await;
    stream
}

async fn send(stream: &mut TcpStream, request: &Request<'_>) {
    let mut bytes = Vec::new();
    encode(request, &mut bytes);
    stream.write_all(&bytes).await.unwrap();
}

fn virtual_size() -> u64 {
    let pages: u64 =
        std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    pages * 4096
}

#[tokio::test]
async fn requests_for_more_memory_than_there_is_end_their_connections_alone() {
    let config = ServerConfig {
        addresses: vec![[127, 0, 0, 1].into()],
        port: 0,
        run_id: "job".into(),
        join_timeout: LIMIT,
        last_call: LIMIT,
        keep_alive: KeepAlive::default(),
        token: None,
    };
    let host = Server::bind(config).await.unwrap();
    let mut rank = Client::connect(format!("127.0.0.1:{}", host.port()), LIMIT).await.unwrap();
    let value = vec![7; 8 << 20];
    rank.set("k", &value).await.unwrap();
    // Built before memory is short, since the limit applies to this test as well.
    let mut fill = Vec::new();
    encode(&Request::Set(&[0], &value), &mut fill);
    let (_, hard) = getrlimit(Resource::RLIMIT_AS).unwrap();
    setrlimit(Resource::RLIMIT_AS, virtual_size() + ROOM, hard).unwrap();

    // Requests of some bytes for 2.5 GB each, of clients that do not read.
    let mut silent = Vec::new();
    for _ in 0..4 {
        let mut stream = raw(&host).await;
        send(&mut stream, &Request::MultiGet(vec![b"/k"; 300])).await;
        // The first bytes show that the server handles the request.
        stream.read_exact(&mut [0; 9]).await.unwrap();
        silent.push(stream);
    }
    assert_eq!(rank.add("n", 1).await.unwrap(), 1);

    // Values until there is no memory for another.
    let mut filler = raw(&host).await;
    for number in 0..100 {
        // The key, after the command and its length.
        fill[9] = number;
        // The server closes the connection before all of them are read.
        let _ = filler.write_all(&fill).await;
    }
    let mut rest = Vec::new();
    let _ = filler.read_to_end(&mut rest).await;
    assert_eq!(rest, b"");
    // The others are served as before.
    assert_eq!(rank.add("n", 1).await.unwrap(), 2);
    drop(silent);
    assert!(rank.delete("k").await.unwrap());
}
