//! A real etcd, which ends with the test.

use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::{TempDir, tempdir};

use crate::support::free_port;

/// Time within which etcd starts, and a job has a coordinator.
const SOON: Duration = Duration::from_secs(60);

pub(crate) struct Etcd {
    child: Child,
    /// Address for clients.
    pub(crate) endpoint: String,
    scheme: &'static str,
    /// Folder of its data, deleted after etcd has ended.
    _folder: TempDir,
}

impl Drop for Etcd {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Etcd {
    /// Starts etcd. `None` if etcd is not installed, which is an error with ICE_TEST_NODES.
    pub(crate) fn start() -> Option<Self> {
        Self::with(Command::new("etcd"), "127.0.0.1", "http", &[])
    }

    /// Starts etcd with more options.
    pub(crate) fn with_options(options: &[&str]) -> Option<Self> {
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        Self::with(Command::new("etcd"), "127.0.0.1", "http", &options)
    }

    /// Starts etcd by another command, on an address of its network.
    pub(crate) fn start_in(mut command: Command, address: &str) -> Option<Self> {
        command.arg("etcd");
        Self::with(command, address, "http", &[])
    }

    pub(crate) fn with_tls(ca: &Path, certificate: &Path, key: &Path) -> Option<Self> {
        let path = |path: &Path| path.to_str().unwrap().to_owned();
        let options = [
            "--client-cert-auth".to_owned(),
            format!("--trusted-ca-file={}", path(ca)),
            format!("--cert-file={}", path(certificate)),
            format!("--key-file={}", path(key)),
        ];
        Self::with(Command::new("etcd"), "127.0.0.1", "https", &options)
    }

    fn with(mut command: Command, address: &str, scheme: &'static str, options: &[String]) -> Option<Self> {
        let folder = tempdir().unwrap();
        let endpoint = format!("{address}:{}", free_port());
        let peers = format!("http://127.0.0.1:{}", free_port());
        let clients = format!("{scheme}://{endpoint}");
        let child = command
            .arg("--data-dir")
            .arg(folder.path())
            .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
            .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
            .args(["--initial-cluster", &format!("default={peers}"), "--log-level", "error"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let Ok(child) = child else {
            assert!(
                std::env::var_os("ICE_TEST_NODES").is_none(),
                "there is no etcd: apt-get install etcd-server"
            );
            eprintln!("skipped: there is no etcd on this machine (apt-get install etcd-server)");
            return None;
        };
        let etcd = Self { child, endpoint, scheme, _folder: folder };
        let deadline = Instant::now() + SOON;
        // In another network etcd cannot be reached from here, but agents wait for it.
        while address == "127.0.0.1" && TcpStream::connect(&etcd.endpoint).is_err() {
            assert!(Instant::now() < deadline, "etcd does not start");
            std::thread::yield_now();
        }
        Some(etcd)
    }

    /// Sends a request to etcd's gateway with curl, and returns the answer.
    pub(crate) fn ask(&self, path: &str, body: &str, options: &[&str]) -> String {
        let url = format!("{}://{}{path}", self.scheme, self.endpoint);
        let output = Command::new("curl").args(["-fsS", "-d", body, &url]).args(options).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Waits until a job without a run id has a coordinator.
    pub(crate) fn wait_for_leader(&self) {
        let deadline = Instant::now() + SOON;
        // `/ice-launch/none/leader` in base 64.
        while !self.ask("/v3/kv/range", r#"{"key":"L2ljZS1sYXVuY2gvbm9uZS9sZWFkZXI="}"#, &[]).contains("kvs")
        {
            assert!(Instant::now() < deadline, "nobody leads");
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Ends etcd.
    pub(crate) fn stop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
