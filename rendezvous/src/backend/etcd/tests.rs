use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;

#[test]
fn addresses_are_split_and_leases_are_whole_seconds() {
    assert_eq!(split("10.0.0.1:29400"), Some(("10.0.0.1".into(), 29400)));
    assert_eq!(split("[fd00::1]:29400"), Some(("fd00::1".into(), 29400)));
    assert_eq!(split("node0"), None);
    let keep_alive = |millis, attempts| KeepAlive { interval: Duration::from_millis(millis), attempts };
    assert_eq!(lease_seconds(keep_alive(5000, 3)), 15);
    assert_eq!(lease_seconds(keep_alive(100, 3)), 2);
}

/// A real etcd, killed on drop.
struct Server {
    child: Child,
    folder: PathBuf,
    endpoint: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Server {
    /// Starts etcd. Returns `None` without etcd on this machine, which is an error with
    /// ICE_TEST_NODES.
    fn start() -> Option<Self> {
        let ports = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
        let [clients, peers] =
            ports.map(|listener| format!("http://127.0.0.1:{}", listener.local_addr().unwrap().port()));
        let port = clients.rsplit(':').next().unwrap();
        let folder = std::env::temp_dir().join(format!("ice-etcd-{}-{port}", std::process::id()));
        let child = Command::new("etcd")
            .arg("--data-dir")
            .arg(&folder)
            .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
            .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
            .args(["--initial-cluster", &format!("default={peers}"), "--log-level", "error"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        if child.is_err() {
            assert!(
                std::env::var_os("ICE_TEST_NODES").is_none(),
                "there is no etcd: apt-get install etcd-server"
            );
            eprintln!("skipped: there is no etcd on this machine (apt-get install etcd-server)");
        }
        Some(Self { child: child.ok()?, folder, endpoint: clients })
    }

    async fn client(&self) -> Client {
        let config = EtcdConfig {
            endpoints: vec![self.endpoint.clone()],
            prefix: String::new(),
            user: None,
            tls: None,
            port: 0,
        };
        let mut client = Client::new(&config, RetryPolicy::DEFAULT_ANSWER_TIMEOUT).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if client.get("/").await.is_ok() {
                return client;
            }
            assert!(Instant::now() < deadline, "etcd does not start");
            tokio::task::yield_now().await;
        }
    }
}

/// Writes a key. Returns the revision.
async fn put(client: &mut Client, key: &str, value: &str) -> Result<i64, Fault> {
    let put = Put { key: key.into(), value: value.into(), lease: 0 };
    Ok(client.txn(&Txn { success: vec![put], ..Txn::default() }).await?.revision)
}

/// A request that deletes a key.
struct Delete(&'static str);

impl messages::Request for Delete {
    const METHOD: &'static str = "/etcdserverpb.KV/DeleteRange";
    type Answer = ();

    fn write(&self) -> protobuf::Writer {
        protobuf::Writer::default().bytes(1, self.0.as_bytes())
    }
}

#[tokio::test]
async fn record_is_written_only_by_the_leader_and_never_over_a_later_one() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let record_lease = client.lease_grant(60).await.unwrap();
    let revision = put(&mut client, "leader", "here").await.unwrap();
    let (leader, state, ttl) = ("leader".to_owned(), "state".to_owned(), Duration::from_secs(60));
    let mut keeper = LeaseKeeper {
        client: client.clone(),
        leader,
        state,
        revision,
        written: 0,
        lease: record_lease,
        record_lease,
        ttl,
        answer_timeout: RetryPolicy::DEFAULT_ANSWER_TIMEOUT,
    };
    assert!(keeper.write(b"one", false).await.unwrap());
    // The answer is lost, and the record is written again.
    let first = std::mem::take(&mut keeper.written);
    assert!(keeper.write(b"one", false).await.unwrap());
    assert_eq!(keeper.written, first);
    assert!(keeper.write(b"two", false).await.unwrap());
    // The first attempt arrives once more, late.
    let second = std::mem::take(&mut keeper.written);
    assert!(!keeper.write(b"one", false).await.unwrap());
    // Another leader has been elected.
    keeper.written = second;
    client.call(&Delete("leader")).await.unwrap();
    put(&mut client, "leader", "elsewhere").await.unwrap();
    assert!(!keeper.write(b"three", true).await.unwrap());
    assert_eq!(client.get("state").await.unwrap().first().unwrap().value, b"two");
}

#[tokio::test]
async fn leader_whose_answer_was_lost_finds_its_own_lease() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let lease = client.lease_grant(60).await.unwrap();
    let first = client.txn(&election("leader", "here", lease)).await.unwrap();
    assert!(first.succeeded);
    let again = client.txn(&election("leader", "here", lease)).await.unwrap();
    let kv = again.found(0).and_then(GetResult::first).unwrap();
    assert!(!again.succeeded);
    assert_eq!((kv.lease, kv.create_revision), (lease, first.revision));
}

#[tokio::test]
async fn lease_is_renewed_until_it_is_revoked() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let lease = client.lease_grant(60).await.unwrap();
    assert!(client.lease_keep_alive(lease).await.unwrap());
    // A key of the lease is deleted with it.
    assert!(client.txn(&election("leader", "here", lease)).await.unwrap().succeeded);
    client.lease_revoke(lease).await.unwrap();
    assert!(!client.lease_keep_alive(lease).await.unwrap());
    assert!(client.get("leader").await.unwrap().first().is_none());
    let gone = client.lease_revoke(lease).await.unwrap_err();
    assert!(gone.is_missing(), "{gone}");
    assert!(!gone.is_final());
}

#[tokio::test]
async fn value_of_the_greatest_size_is_written_and_read() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    // etcd takes requests of 1.5 MiB.
    let value = "x".repeat((3 << 19) - 512);
    put(&mut client, "state", &value).await.unwrap();
    assert!(client.get("state").await.unwrap().first().unwrap().value == value.as_bytes());
    let more = "x".repeat(3 << 19);
    let refused = put(&mut client, "state", &more).await.unwrap_err();
    assert!(refused.to_string().contains("request is too large"), "{refused}");
}

/// Forwards one connection after the other to etcd. The connection that first carries `silenced`
/// from the client transfers nothing from then on.
async fn silencing_proxy(to: String, silenced: &'static [u8]) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let to = to.strip_prefix("http://").unwrap().to_owned();
    let armed = Arc::new(AtomicBool::new(true));
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let (to, armed) = (to.clone(), armed.clone());
            tokio::spawn(async move {
                let etcd = tokio::net::TcpStream::connect(to).await.unwrap();
                let ((mut requests, mut to_client), (mut answers, mut to_etcd)) =
                    (client.into_split(), etcd.into_split());
                let answering =
                    tokio::spawn(async move { tokio::io::copy(&mut answers, &mut to_client).await });
                let mut bytes = vec![0; 1 << 16];
                while let Ok(len @ 1..) = requests.read(&mut bytes).await {
                    let found = bytes[..len].windows(silenced.len()).any(|part| part == silenced);
                    if found && armed.swap(false, Ordering::Relaxed) {
                        std::future::pending::<()>().await;
                    }
                    to_etcd.write_all(&bytes[..len]).await.unwrap();
                }
                answering.abort();
            });
        }
    });
    address
}

/// Looks for a coordinator through a proxy that does not answer the request for the record of an
/// earlier leader, which follows the election. The lease of a leader key is longer than agents wait
/// for a coordinator.
async fn connect_past_a_silence(
    server: &Server,
    join_timeout: Duration,
) -> Result<(Session, (String, u16), Option<Leadership>), Error> {
    let endpoint = silencing_proxy(server.endpoint.clone(), b"/job/state").await;
    let config =
        EtcdConfig { endpoints: vec![endpoint], prefix: String::new(), user: None, tls: None, port: 0 };
    let mut common = crate::backend::tests::config();
    common.join_timeout = join_timeout;
    common.answer_timeout = Duration::from_secs(2);
    common.keep_alive = KeepAlive { interval: Duration::from_secs(60), attempts: 3 };
    let hello = crate::backend::tests::hello(&common);
    Etcd::new(&config, &common).unwrap().connect(&hello).await
}

#[tokio::test]
async fn campaign_that_fails_after_its_election_leaves_no_leader_key() {
    let Some(server) = Server::start() else { return };
    server.client().await;
    let connected = connect_past_a_silence(&server, Duration::from_secs(50)).await;
    let (session, _, leadership) = connected.unwrap();
    drop(session);
    leadership.unwrap().resign().await;
}

#[tokio::test]
async fn agent_that_gives_up_leaves_no_leader_key() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    assert!(connect_past_a_silence(&server, Duration::from_millis(1)).await.is_err());
    assert!(client.get("/job/leader").await.unwrap().first().is_none());
}
