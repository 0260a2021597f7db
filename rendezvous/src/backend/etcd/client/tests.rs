//! Calls to servers that violate etcd's protocol, to members that fail and return, and with tokens
//! that expire.

use std::future::pending;
use std::io::Cursor;
use std::sync::Mutex;

use http::{HeaderMap, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};

use super::super::protobuf::{Fields, Writer};
use super::*;
use crate::backend::EtcdTls;

/// The parts of a request that tests compare.
#[derive(Debug, Clone, PartialEq)]
struct Heard {
    method: String,
    token: Option<String>,
    message: Vec<u8>,
    /// Index of its connection, and of the request on it.
    at: (usize, usize),
}

/// Reaction of a server to a request.
enum Reaction {
    /// Answers a message.
    Message(Writer),
    /// Answers with these bytes as the body of HTTP.
    Body(Vec<u8>),
    /// Answers an error, in trailers or in headers only.
    Error(u32, &'static str, bool),
    /// Answers like another web server.
    Page(u16, &'static str, &'static str),
    /// Sends pieces as long as they are read.
    Endless(Vec<u8>),
    /// Answers a message, and never ends the answer.
    Unfinished(Writer),
    /// Closes the connection.
    Close,
    Silence,
}

/// A server, stopped on drop.
struct Server {
    url: String,
    heard: Arc<Mutex<Vec<Heard>>>,
    news: Arc<Notify>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(react: impl Fn(&Heard) -> Reaction + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (heard, news, react) = (Arc::<Log>::default(), Arc::new(Notify::new()), Arc::new(react));
        let (log, bell) = (heard.clone(), news.clone());
        let task = tokio::spawn(async move {
            let mut served = JoinSet::new();
            for number in 0.. {
                let (stream, _) = listener.accept().await.unwrap();
                let (log, bell, react) = (log.clone(), bell.clone(), react.clone());
                served.spawn(async move { serve(stream, number, &log, &bell, &*react).await });
            }
        });
        Self { url, heard, news, task }
    }

    /// Starts a server that sends these bytes whatever it reads, and then closes the connection.
    async fn with_bytes(bytes: &'static [u8]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let task = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                // The client sends first, and unread input would reset the connection.
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(bytes).await;
                let _ = stream.shutdown().await;
                while stream.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {}
            }
        });
        Self { url, heard: Arc::default(), news: Arc::default(), task }
    }

    fn heard(&self) -> Vec<Heard> {
        self.heard.lock().unwrap().clone()
    }
}

type Log = Mutex<Vec<Heard>>;

async fn serve(
    stream: TcpStream,
    connection: usize,
    log: &Log,
    news: &Notify,
    react: &(dyn Fn(&Heard) -> Reaction + Send + Sync),
) -> Option<()> {
    let mut server = h2::server::handshake(stream).await.ok()?;
    let mut answers = JoinSet::new();
    for number in 0.. {
        let (mut request, mut respond) = server.accept().await?.ok()?;
        let token = request.headers().get("token").map(|token| token.to_str().unwrap().to_owned());
        let method = request.uri().path().to_owned();
        let mut body = Vec::new();
        // The connection must be driven while the body is sent.
        loop {
            tokio::select! {
                piece = request.body_mut().data() => match piece {
                    Some(piece) => body.extend_from_slice(&piece.ok()?),
                    None => break,
                },
                _ = std::future::poll_fn(|context| server.poll_closed(context)) => return None,
            }
        }
        let heard = Heard { method, token, message: body.split_off(5), at: (connection, number) };
        let reaction = react(&heard);
        log.lock().unwrap().push(heard);
        news.notify_one();
        let head = || Response::builder().status(200).header("content-type", "application/grpc");
        let ended = |code: u32, message: &'static str| {
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", code.into());
            trailers.insert("grpc-message", HeaderValue::from_static(message));
            trailers
        };
        let mut send = |body: Vec<u8>, trailers: Option<HeaderMap>| {
            let mut stream = respond.send_response(head().body(()).unwrap(), false).unwrap();
            stream.send_data(Cursor::new(body).into_inner().into(), false).unwrap();
            if let Some(trailers) = trailers {
                stream.send_trailers(trailers).unwrap();
            }
            stream
        };
        match reaction {
            Reaction::Message(message) => drop(send(framed(message), Some(ended(0, "")))),
            Reaction::Body(body) => drop(send(body, Some(ended(0, "")))),
            Reaction::Error(code, message, false) => drop(send(Vec::new(), Some(ended(code, message)))),
            Reaction::Error(code, message, true) => {
                let mut response = head().body(()).unwrap();
                response.headers_mut().extend(ended(code, message));
                respond.send_response(response, true).unwrap();
            }
            Reaction::Page(status, kind, page) => {
                let response = Response::builder()
                    .status(StatusCode::from_u16(status).unwrap())
                    .header("content-type", kind);
                let mut stream = respond.send_response(response.body(()).unwrap(), false).unwrap();
                stream.send_data(page.as_bytes().into(), true).unwrap();
            }
            Reaction::Endless(begin) => {
                let mut stream = send(begin, None);
                answers.spawn(async move {
                    loop {
                        stream.reserve_capacity(4096);
                        let capacity = std::future::poll_fn(|context| stream.poll_capacity(context)).await;
                        let Some(Ok(capacity)) = capacity else { return };
                        if stream.send_data(vec![0; capacity].into(), false).is_err() {
                            return;
                        }
                    }
                });
            }
            Reaction::Unfinished(message) => {
                let stream = send(framed(message), None);
                answers.spawn(async move {
                    pending::<()>().await;
                    drop(stream);
                });
            }
            Reaction::Close => return None,
            Reaction::Silence => {
                answers.spawn(async move {
                    pending::<()>().await;
                    drop(respond);
                });
            }
        }
    }
    None
}

fn framed(message: Writer) -> Vec<u8> {
    let message = message.finish();
    [&[0][..], &u32::try_from(message.len()).unwrap().to_be_bytes(), &message].concat()
}

fn config(urls: &[&str]) -> EtcdConfig {
    EtcdConfig {
        endpoints: urls.iter().map(ToString::to_string).collect(),
        prefix: String::new(),
        user: None,
        tls: None,
        port: 0,
    }
}

fn client(urls: &[&str]) -> Client {
    Client::new(&config(urls), Duration::from_secs(60)).unwrap()
}

/// Returns an answer with a value.
fn held() -> Writer {
    let kv = Writer::default().bytes(1, b"a").int(3, 5).bytes(5, b"value");
    Writer::default().message(1, Writer::default().int(3, 7)).message(2, kv)
}

#[track_caller]
fn is_held(found: Result<GetResult, Fault>) {
    let found = found.unwrap_or_else(|fault| panic!("{fault}"));
    let kv = found.first().unwrap();
    assert_eq!((&*kv.value, kv.mod_revision), (&b"value"[..], 5));
}

#[tokio::test]
async fn connection_is_reused_until_it_ends() {
    let server = Server::start(|heard| match heard.at {
        (0, 2) => Reaction::Close,
        _ => Reaction::Message(held()),
    })
    .await;
    let mut client = client(&[&server.url]);
    for _ in 0..3 {
        is_held(client.get("a").await);
    }
    let heard = server.heard();
    assert_eq!(heard.iter().map(|heard| heard.at).collect::<Vec<_>>(), [(0, 0), (0, 1), (0, 2), (1, 0)]);
    assert_eq!((&*heard[3].method, &*heard[3].message), ("/etcdserverpb.KV/Range", &b"\x0a\x01a"[..]));
}

#[tokio::test]
async fn answers_without_end_are_cut_off() {
    let begun = |length: u32| [&[0][..], &length.to_be_bytes()].concat();
    for (begin, expected) in [
        (begun(u32::MAX), "longer than 8 MiB"),
        // Bytes after the message, or messages after the first.
        (begun(0), "longer than 8 MiB"),
        (vec![1, 0, 0, 0, 0], "compressed"),
    ] {
        let server = Server::start(move |_| Reaction::Endless(begin.clone())).await;
        let fault = client(&[&server.url]).get("a").await.unwrap_err();
        assert!(fault.is_final() && fault.to_string().contains(expected), "{fault}");
    }
    // A message that is announced as too long is rejected before it arrives.
    let server = Server::start(move |heard| match heard.at.1 {
        0 => Reaction::Unfinished(Writer::default().bytes(1, &vec![0; super::super::grpc::MAX_ANSWER])),
        _ => Reaction::Silence,
    })
    .await;
    let fault = client(&[&server.url]).get("a").await.unwrap_err();
    assert!(fault.to_string().contains("longer than 8 MiB"), "{fault}");
}

#[tokio::test]
async fn peer_other_than_etcd_is_named_in_the_error() {
    const HTML: &str = "<html>\n<body>Log  in\u{1b}[2J</body></html>";
    const KIND: &str = "text/html";
    type Make = fn() -> Reaction;
    let cases: [(Make, bool, &str); 12] = [
        (
            || Reaction::Page(200, KIND, HTML),
            true,
            "HTTP 200 OK: `<html> <body>Log in[2J</body></html>`: it does",
        ),
        (|| Reaction::Page(200, KIND, ""), true, "HTTP 200 OK: it does not answer as etcd's gRPC"),
        (|| Reaction::Page(403, KIND, HTML), true, "HTTP 403 Forbidden: `<html>"),
        (|| Reaction::Page(404, "text/plain", "404 page not found\n"), true, "HTTP 404 Not Found: `404 page"),
        (|| Reaction::Page(307, "text/plain", ""), true, "HTTP 307 Temporary Redirect"),
        (|| Reaction::Page(502, KIND, HTML), false, "HTTP 502 Bad Gateway: `<html>"),
        (|| Reaction::Page(429, KIND, ""), false, "HTTP 429 Too Many Requests"),
        (|| Reaction::Body(vec![0, 0, 0, 0, 1, 0xFF]), true, "its answer cannot be read"),
        (|| Reaction::Body(vec![0, 0, 0, 0, 2, 0x08]), true, "shorter than it says"),
        (|| Reaction::Body(vec![0, 0]), true, "its answer holds no message"),
        (|| Reaction::Error(0, "", true), true, "its answer holds no message"),
        (|| Reaction::Error(12, "unknown service etcdserverpb.KV", true), true, "and is not etcd 3"),
    ];
    for (make, is_final, expected) in cases {
        let server = Server::start(move |_| make()).await;
        let fault = client(&[&server.url]).get("a").await.unwrap_err();
        assert!(fault.to_string().contains(expected), "{fault}");
        assert_eq!(fault.is_final(), is_final, "{fault}");
    }
    for (bytes, is_final, expected) in [
        (
            &b"HTTP/1.1 400 Bad Request\r\n\r\n<html>"[..],
            true,
            "HTTP/1 and not etcd's gRPC: `HTTP/1.1 400 Bad",
        ),
        (b"\x15\x03\x01\x00\x02\x02\x46", true, "it speaks TLS alone: give protocol=https"),
        (b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n", true, "it does not speak HTTP/2"),
        (b"", false, "it closed the connection without an answer; if it has TLS"),
    ] {
        let server = Server::with_bytes(bytes).await;
        let fault = client(&[&server.url]).get("a").await.unwrap_err();
        assert!(fault.to_string().contains(expected), "{fault}");
        assert_eq!(fault.is_final(), is_final, "{fault}");
    }
}

#[tokio::test]
async fn errors_of_etcd_are_told_in_its_words() {
    let server = Server::start(|heard| match heard.method.rsplit('/').next().unwrap() {
        "Range" => Reaction::Error(14, "etcdserver: no%20leader", false),
        "Txn" => Reaction::Error(8, "etcdserver: mvcc: database space exceeded", true),
        "LeaseKeepAlive" => match Fields(&heard.message).next() {
            Some(Ok((1, value))) if value.int() == Ok(1) => {
                Reaction::Error(5, "etcdserver: requested lease not found", true)
            }
            // An expired lease has no time left.
            _ => Reaction::Message(Writer::default().int(2, 2)),
        },
        _ => Reaction::Message(Writer::default()),
    })
    .await;
    let mut client = client(&[&server.url]);
    let etcd = |code, message: &str| Fault::Etcd { code, message: message.into() };
    assert_eq!(client.get("a").await.unwrap_err(), etcd(14, "etcdserver: no leader"));
    let full = etcd(8, "etcdserver: mvcc: database space exceeded");
    assert_eq!(client.txn(&Txn::default()).await.unwrap_err(), full);
    for lease in [1, 2] {
        assert!(!client.lease_keep_alive(lease).await.unwrap());
    }
    let fault = client.lease_grant(5).await.unwrap_err().to_string();
    assert!(fault.contains("a lease without a number"), "{fault}");
    // Errors of etcd itself keep the connection.
    assert!(server.heard().iter().all(|heard| heard.at.0 == 0));
}

#[tokio::test]
async fn first_member_that_answers_is_used_from_then_on() {
    let refused = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let lonely = Server::start(|_| Reaction::Error(14, "etcdserver: no leader", true)).await;
    let proxy = Server::start(|_| Reaction::Page(404, "text/html", "nothing here")).await;
    let whole = Server::start(|_| Reaction::Message(held())).await;
    let mut several = client(&[&refused, &lonely.url, &proxy.url, &whole.url]);
    for _ in 0..2 {
        is_held(several.get("a").await);
    }
    let counts = [&lonely, &proxy, &whole].map(|server| server.heard().len());
    assert_eq!(counts, [1, 1, 2]);
    // A failure that a retry may fix wins over a wrong endpoint.
    for order in [[&refused, &proxy.url], [&proxy.url, &refused]] {
        let fault = client(&order.map(String::as_str)).get("a").await.unwrap_err();
        assert!(!fault.is_final() && fault.to_string().starts_with(&refused), "{fault}");
    }
}

#[tokio::test]
async fn silent_member_is_skipped_for_the_next() {
    let silent = Server::start(|_| Reaction::Silence).await;
    let whole = Server::start(|_| Reaction::Message(held())).await;
    let mut first = client(&[&silent.url, &whole.url]);
    let mut other = first.clone();
    // The caller's own timeout ends the call.
    tokio::select! {
        found = first.get("a") => panic!("{found:?}"),
        () = silent.news.notified() => {}
    }
    is_held(first.get("a").await);
    // The chosen member is shared by all clones.
    is_held(other.get("a").await);
    assert_eq!((silent.heard().len(), whole.heard().len()), (1, 2));
    let limit = Duration::from_millis(1);
    let fault = Client::new(&config(&[&silent.url]), limit).unwrap().get("a").await.unwrap_err();
    assert_eq!(fault, Fault::Unreachable("no answer within 1ms".into()));
}

#[tokio::test]
async fn expired_token_is_replaced() {
    let issued = AtomicUsize::new(0);
    let server = Server::start(move |heard| {
        if heard.method.ends_with("Authenticate") {
            let number = issued.fetch_add(1, Ordering::Relaxed) + 1;
            return Reaction::Message(Writer::default().bytes(2, format!("token.{number}").as_bytes()));
        }
        match (heard.token.as_deref(), heard.at.1) {
            (Some("token.1"), ..4) | (Some("token.3"), _) => Reaction::Message(held()),
            // Users and roles have changed.
            (Some("token.2"), _) => Reaction::Error(3, "etcdserver: revision of auth store is old", true),
            _ => Reaction::Error(16, "etcdserver: invalid auth token", true),
        }
    })
    .await;
    let mut config = config(&[&server.url]);
    config.user = Some(("me".into(), "secret".into()));
    let mut client = Client::new(&config, Duration::from_secs(60)).unwrap();
    for _ in 0..3 {
        is_held(client.get("a").await);
    }
    // If the second token fails too the call fails, and the next call tries again.
    let fault = client.get("a").await.unwrap_err();
    assert!(fault.to_string().contains("revision of auth store is old"), "{fault}");
    is_held(client.get("a").await);
    let heard = server.heard();
    assert_eq!(heard[0].message, b"\x0a\x02me\x12\x06secret");
    assert_eq!(heard.iter().filter(|heard| heard.method.ends_with("Authenticate")).count(), 3);
    assert!(heard.iter().all(|heard| heard.at.0 == 0), "one connection");
}

#[tokio::test]
async fn token_that_is_not_a_header_value_is_an_error() {
    let server = Server::start(|_| Reaction::Message(Writer::default().bytes(2, b"a\r\nb"))).await;
    let mut config = config(&[&server.url]);
    config.user = Some(("me".into(), "secret".into()));
    let mut client = Client::new(&config, Duration::from_secs(60)).unwrap();
    let fault = client.get("a").await.unwrap_err();
    assert!(fault.is_final() && fault.to_string().contains("token cannot be sent"), "{fault}");
}

#[test]
fn endpoints_are_checked() {
    let endpoint = |url: &str| Endpoint::parse(url).map(|endpoint| (endpoint.host, endpoint.port));
    assert_eq!(endpoint("http://10.0.0.1:2379"), Ok(("10.0.0.1".into(), 2379)));
    assert_eq!(endpoint("https://[fd00::1]:2379/"), Ok(("fd00::1".into(), 2379)));
    for (url, why) in [
        ("http://me:secret@a:1", "has a user in it"),
        ("http://a:1/etcd", "has a path"),
        ("ftp://a:1", "is neither http:// nor https://"),
        ("http://a", "names no port"),
        ("http://:1", "`http://:1` "),
        ("http://a b:1", "is not an address"),
    ] {
        let error = config(&["http://b:1", url]).check_endpoints().unwrap_err();
        assert!(error.contains(why) && error.contains("give HOST:PORT"), "{error}");
        assert!(!error.contains("secret"), "{error}");
    }
}

#[test]
fn certificates_are_checked() {
    let check = |tls: EtcdTls| {
        let config = EtcdConfig { tls: Some(tls), ..config(&["https://a:1"]) };
        config.check_tls().unwrap_err()
    };
    let pem = |kind: &str| format!("-----BEGIN {kind}-----\nAAAA\n-----END {kind}-----\n").into_bytes();
    assert!(check(EtcdTls::default()).contains("https needs cacert"));
    assert!(config(&["https://a:1"]).check_tls().unwrap_err().contains("https needs cacert"));
    assert_eq!(config(&["http://a:1"]).check_tls(), Ok(()));
    for (ca, why) in [
        (b"nothing".to_vec(), "cacert holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\n!".to_vec(), "cacert is not PEM"),
        (pem("CERTIFICATE"), "cacert cannot be used"),
    ] {
        let error = check(EtcdTls { ca: Some(ca), identity: None });
        assert!(error.contains(why), "{error}");
    }
}
