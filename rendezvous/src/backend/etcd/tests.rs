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
        let folder = std::env::temp_dir().join(format!("ice-etcd-{}", std::process::id()));
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
        let options =
            ConnectOptions::new().with_connect_timeout(Patience::ANSWER).with_timeout(Patience::ANSWER);
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Ok(mut client) = Client::connect([&self.endpoint], Some(options.clone())).await
                && client.get("/", None).await.is_ok()
            {
                return client;
            }
            assert!(Instant::now() < deadline, "etcd does not start");
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn a_record_is_written_by_the_leader_and_never_over_a_later_one() {
    let Some(server) = Server::start() else { return };
    let mut client = server.client().await;
    let kept = client.lease_grant(60, None).await.unwrap().id();
    let revision = client.put("leader", "here", None).await.unwrap().header().unwrap().revision();
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
    client.delete("leader", None).await.unwrap();
    client.put("leader", "elsewhere", None).await.unwrap();
    assert!(!office.write(b"three", true).await.unwrap());
    assert_eq!(client.get("state", None).await.unwrap().kvs()[0].value(), b"two");
}
