//! Agents and raw store clients against a real server on a free port.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::time::Duration;

use ice_proto::rendezvous::{Hello, KeepAlive, RestartPolicy, ToAgent, ToCoordinator};
use ice_rendezvous::{Error, RetryPolicy, Server, ServerConfig, Session, Token};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const LIMIT: Duration = Duration::from_secs(20);

fn config(port: u16, token: Option<Token>) -> ServerConfig {
    ServerConfig {
        addresses: vec![[127, 0, 0, 1].into()],
        port,
        run_id: "job".into(),
        join_timeout: LIMIT,
        last_call: LIMIT,
        keep_alive: KeepAlive::default(),
        token,
    }
}

async fn host() -> Server {
    Server::bind(config(0, None)).await.unwrap()
}

fn hello(node_rank: u32) -> Hello {
    Hello {
        run_id: "job".into(),
        node_rank: Some(node_rank),
        nnodes: (2, 2),
        local_world_size: 2,
        role: "default".into(),
        ranks_store: None,
        restarts: RestartPolicy { max_restarts: 0, window: None, backoff: Duration::ZERO, crash_loop: 0 },
        host: "here".into(),
        keep_alive: KeepAlive::default(),
        agent_id: node_rank.into(),
        run_stamp: None,
        last_node_rank: None,
        addresses: Vec::new(),
        pid: 1,
    }
}

#[tokio::test]
async fn agents_without_the_token_are_rejected() {
    let token = |text: &str| Token::new(&format!("{text}, which is long enough")).unwrap();
    let host = Server::bind(config(0, Some(token("a secret")))).await.unwrap();
    let connect = async |token: Option<Token>| {
        Session::connect(
            ("127.0.0.1", host.port()),
            None,
            hello(0),
            token.as_ref(),
            RetryPolicy::within(LIMIT),
        )
        .await
    };
    for (stranger, said) in [(None, "--rdzv-token-file"), (Some(token("a guess")), "does not know")] {
        let Err(error @ Error::Token { .. }) = connect(stranger).await else { panic!("let in") };
        assert!(error.to_string().contains(said), "{error}");
    }
    let mut first = connect(Some(token("a secret"))).await.unwrap();
    first.send(ToCoordinator::Join);
    let second = Session::connect(
        ("127.0.0.1", host.port()),
        None,
        hello(1),
        Some(&token("a secret")),
        RetryPolicy::within(LIMIT),
    )
    .await;
    let second = second.unwrap();
    second.send(ToCoordinator::Join);
    assert!(matches!(first.recv().await.unwrap(), ToAgent::RoundStarted(_)));
}

#[tokio::test]
async fn agents_and_endpoint_must_agree_about_tls() {
    let token = |text: &str| Token::new(&format!("{text}, which is long enough")).unwrap();
    let over_tls = |text: &str| token(text).over_tls();
    let (tls, plain, open) = (Some(over_tls("a secret")), Some(token("a secret")), None);
    for (endpoint, agent, said) in [
        (&tls, &plain, "the endpoint asks for TLS: give this agent --rdzv-tls"),
        (&tls, &open, "the job's with --rdzv-token-file, and --rdzv-tls"),
        (&tls, &Some(over_tls("a guess")), "the endpoint does not know this agent's token, or"),
        (&plain, &tls, "the endpoint has none: give the agent that hosts it --rdzv-tls"),
        (&open, &tls, "the endpoint has none: give the agent that hosts it --rdzv-tls"),
    ] {
        let host = Server::bind(config(0, endpoint.clone())).await.unwrap();
        let connecting = Session::connect(
            ("127.0.0.1", host.port()),
            None,
            hello(0),
            agent.as_ref(),
            RetryPolicy::within(Duration::from_secs(3600)),
        );
        let Err(error) = tokio::time::timeout(LIMIT, connecting).await.unwrap() else { panic!("let in") };
        assert!(matches!(error, Error::Token { .. }) && error.to_string().contains(said), "{error}");
    }
}

#[tokio::test]
async fn agents_agree_over_tls() {
    let token = Token::new("a secret, which is long enough").unwrap().over_tls();
    let host = Server::bind(config(0, Some(token.clone()))).await.unwrap();
    let mut sessions = Vec::new();
    for node_rank in 0..2 {
        let endpoint = ("127.0.0.1", host.port());
        let session =
            Session::connect(endpoint, None, hello(node_rank), Some(&token), RetryPolicy::within(LIMIT))
                .await;
        sessions.push(session.unwrap());
        sessions[node_rank as usize].send(ToCoordinator::Join);
    }
    for session in &mut sessions {
        assert!(matches!(session.recv().await.unwrap(), ToAgent::RoundStarted(_)));
        // Far more bytes than an unauthenticated peer may send.
        for _ in 0..10_000 {
            session.send(ToCoordinator::KeepAlive);
        }
        session.send(ToCoordinator::Finished { round: 0 });
    }
    for session in &mut sessions {
        assert!(matches!(session.recv().await.unwrap(), ToAgent::Closed { success: true, .. }));
    }
    // Clients of the store are served as without TLS.
    let mut rank = validated(&host).await;
    rank.write_all(&[13, 7, 0, 0, 0]).await.unwrap();
    assert_eq!(rank.read_u32_le().await.unwrap(), 7);
    // The last messages of the agents arrive, and their departure is noticed.
    for session in sessions {
        session.finish().await;
    }
    host.wait_idle().await;
}

#[tokio::test]
async fn peer_without_the_ice_protocol_is_not_retried() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let web_server = tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        // A second connection attempt would hang.
        stream
    });
    let connecting = Session::connect(
        ("127.0.0.1", port),
        None,
        hello(1),
        None,
        RetryPolicy::within(Duration::from_secs(3600)),
    );
    let Err(error) = tokio::time::timeout(LIMIT, connecting).await.unwrap() else { panic!("connected") };
    assert!(matches!(error, Error::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("does not speak the ice protocol"), "{error}");
    web_server.await.unwrap();
}

async fn agent(host: &Server, node_rank: u32) -> Session {
    let session = Session::connect(
        ("127.0.0.1", host.port()),
        None,
        hello(node_rank),
        None,
        RetryPolicy::within(LIMIT),
    )
    .await
    .unwrap();
    session.send(ToCoordinator::Join);
    session
}

async fn validated(host: &Server) -> TcpStream {
    let mut client = TcpStream::connect(("127.0.0.1", host.port())).await.unwrap();
    client.write_all(&[0, 0xCE, 0xF7, 0x85, 0x3C]).await.unwrap();
    client
}

fn key(command: u8, key: &[u8]) -> Vec<u8> {
    [&[command], &(key.len() as u64).to_le_bytes()[..], key].concat()
}

#[tokio::test]
async fn two_agents_agree_and_finish_together() {
    let host = host().await;
    let (mut first, mut second) = (agent(&host, 0).await, agent(&host, 1).await);
    for (session, you) in [(&mut first, 0), (&mut second, 1)] {
        let ToAgent::RoundStarted(round) = session.recv().await.unwrap() else { panic!("no round") };
        assert_eq!((round.assignment.group_rank, round.world_size), (you, 4));
        session.send(ToCoordinator::Finished { round: 0 });
    }
    for session in [&mut first, &mut second] {
        assert!(matches!(session.recv().await.unwrap(), ToAgent::Closed { success: true, .. }));
    }
}

#[tokio::test]
async fn lost_agent_closes_the_job_for_the_other() {
    let host = host().await;
    let (mut first, mut second) = (agent(&host, 0).await, agent(&host, 1).await);
    assert!(matches!(first.recv().await.unwrap(), ToAgent::RoundStarted(_)));
    assert!(matches!(second.recv().await.unwrap(), ToAgent::RoundStarted(_)));
    drop(second);
    assert!(matches!(first.recv().await.unwrap(), ToAgent::Closed { success: false, .. }));
}

#[tokio::test]
async fn store_client_waits_for_a_key_of_another() {
    let host = host().await;
    let (mut waiting, mut setting) = (validated(&host).await, validated(&host).await);
    let wait = [&[6][..], &1_u64.to_le_bytes(), &key(0, b"k")[1..]].concat();
    waiting.write_all(&wait).await.unwrap();
    setting.write_all(&[key(1, b"k"), 2_u64.to_le_bytes().into(), b"hi".into()].concat()).await.unwrap();
    assert_eq!(waiting.read_u8().await.unwrap(), 0);
    waiting.write_all(&key(3, b"k")).await.unwrap();
    let mut value = [0; 10];
    waiting.read_exact(&mut value).await.unwrap();
    assert_eq!(value, *b"\x02\0\0\0\0\0\0\0hi");
}

#[tokio::test]
async fn connections_of_unknown_protocols_are_closed_without_an_answer() {
    let host = host().await;
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0, 1, 2, 3, 4], &key(1, b"k"), b"ICE\x09................"]
    {
        let mut stranger = TcpStream::connect(("127.0.0.1", host.port())).await.unwrap();
        stranger.write_all(bytes).await.unwrap();
        let mut rest = Vec::new();
        // End of file or a reset, but no answer.
        let _ = stranger.read_to_end(&mut rest).await;
        assert!(rest.is_empty(), "{bytes:?}");
    }
}

#[tokio::test]
async fn garbage_after_the_first_byte_of_tls_gets_an_alert() {
    let token = Token::new("a secret, which is long enough").unwrap();
    for token in [None, Some(token.clone()), Some(token.over_tls())] {
        let host = Server::bind(config(0, token)).await.unwrap();
        for bytes in [&b"\x16 is no TLS, whatever follows it here"[..], &[0x16, 3, 1, 0, 4, 9, 0, 0, 0]] {
            let mut stranger = TcpStream::connect(("127.0.0.1", host.port())).await.unwrap();
            stranger.write_all(bytes).await.unwrap();
            let mut answer = Vec::new();
            stranger.read_to_end(&mut answer).await.unwrap();
            assert!(answer.len() == 7 && answer[0] == 0x15, "{answer:?}");
        }
    }
}

#[tokio::test]
async fn busy_port_is_named_in_the_error() {
    let host = host().await;
    let error = Server::bind(config(host.port(), None)).await.err().unwrap();
    assert!(matches!(error, Error::Bind { .. }));
    assert!(error.to_string().contains(&host.port().to_string()), "{error}");
}

#[tokio::test]
async fn silent_coordinator_is_retried() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let retry = RetryPolicy::within(LIMIT).answer_timeout(Duration::from_millis(50));
    let connecting = tokio::spawn(Session::connect(("127.0.0.1", port), None, hello(0), None, retry));
    let asked = async {
        let first = silent.accept().await.unwrap();
        (first, silent.accept().await.unwrap())
    };
    // The default timeout is longer.
    tokio::time::timeout(RetryPolicy::DEFAULT_ANSWER_TIMEOUT / 2, asked).await.unwrap();
    connecting.abort();
}
