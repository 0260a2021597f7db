use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

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

/// A real etcd, ended with the test.
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
    /// `None` where there is no etcd on this machine; with ICE_TEST_NODES that is an error.
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
        let mut client = Client::new(&config, Patience::ANSWER).unwrap();
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

/// Writes a key, and returns the revision that did.
async fn put(client: &mut Client, key: &str, value: &str) -> Result<i64, Fault> {
    let put = Put { key: key.into(), value: value.into(), lease: 0 };
    Ok(client.txn(&Txn { success: vec![put], ..Txn::default() }).await?.revision)
}

/// Deletes a key.
struct Delete(&'static str);

impl messages::Request for Delete {
    const METHOD: &'static str = "/etcdserverpb.KV/DeleteRange";
    type Answer = ();

    fn write(&self) -> protobuf::Writer {
        protobuf::Writer::default().bytes(1, self.0.as_bytes())
    }
}

#[tokio::test]
async fn a_record_is_written_by_the_leader_and_never_over_a_later_one() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let kept = client.lease_grant(60).await.unwrap();
    let revision = put(&mut client, "leader", "here").await.unwrap();
    let (leader, state, ttl) = ("leader".to_owned(), "state".to_owned(), Duration::from_secs(60));
    let mut office = Office {
        client: client.clone(),
        leader,
        state,
        revision,
        written: 0,
        lease: kept,
        kept,
        ttl,
        answer: Patience::ANSWER,
    };
    assert!(office.write(b"one", false).await.unwrap());
    // Its answer was lost, and it is written again.
    let first = std::mem::take(&mut office.written);
    assert!(office.write(b"one", false).await.unwrap());
    assert_eq!(office.written, first);
    assert!(office.write(b"two", false).await.unwrap());
    // The first attempt comes once more, late.
    let second = std::mem::take(&mut office.written);
    assert!(!office.write(b"one", false).await.unwrap());
    // Another has been elected.
    office.written = second;
    client.call(&Delete("leader")).await.unwrap();
    put(&mut client, "leader", "elsewhere").await.unwrap();
    assert!(!office.write(b"three", true).await.unwrap());
    assert_eq!(client.get("state").await.unwrap().first().unwrap().value, b"two");
}

#[tokio::test]
async fn a_leader_whose_answer_was_lost_finds_its_own_lease() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let lease = client.lease_grant(60).await.unwrap();
    let first = client.txn(&election("leader", "here", lease)).await.unwrap();
    assert!(first.succeeded);
    let again = client.txn(&election("leader", "here", lease)).await.unwrap();
    let kv = again.found(0).and_then(Found::first).unwrap();
    assert!(!again.succeeded);
    assert_eq!((kv.lease, kv.create_revision), (lease, first.revision));
}

#[tokio::test]
async fn a_lease_is_renewed_until_it_is_revoked() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let lease = client.lease_grant(60).await.unwrap();
    assert!(client.lease_keep_alive(lease).await.unwrap());
    // A key of the lease goes with it.
    assert!(client.txn(&election("leader", "here", lease)).await.unwrap().succeeded);
    client.lease_revoke(lease).await.unwrap();
    assert!(!client.lease_keep_alive(lease).await.unwrap());
    assert!(client.get("leader").await.unwrap().first().is_none());
    let gone = client.lease_revoke(lease).await.unwrap_err();
    assert!(matches!(&gone, Fault::Etcd { code: fault::NOT_FOUND, .. }), "{gone}");
    assert!(!gone.is_final());
}

#[tokio::test]
async fn a_value_of_the_greatest_size_is_written_and_read() {
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
