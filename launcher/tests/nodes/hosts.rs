//! Hosts on a network of their own: network namespaces on a bridge.

use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Hosts on a bridge. Dropping this value removes them and all of their processes.
pub(crate) struct Network {
    name: String,
    hosts: u32,
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..=self.hosts {
            let _ = ip(&format!("netns del {}", self.namespace(host)));
        }
    }
}

/// Runs `ip`. Returns its error message if it fails.
fn ip(arguments: &str) -> Result<(), String> {
    let output = Command::new("ip").args(arguments.split(' ')).output().map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(format!("ip {arguments}: {}", String::from_utf8_lossy(&output.stderr))),
    }
}

impl Network {
    /// Makes this number of hosts, 10.77.0.1 and so on, and 10.77.0.254 at the bridge. `None` if
    /// this user may not make networks, which is an error with ICE_TEST_NODES.
    pub(crate) fn of(hosts: u32) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let name = format!("ice{}-{}", std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let network = Self { name, hosts };
        match network.make() {
            Ok(()) => Some(network),
            Err(problem) => {
                assert!(std::env::var_os("ICE_TEST_NODES").is_none(), "no network can be made: {problem}");
                eprintln!("skipped: no network can be made: {problem}");
                None
            }
        }
    }

    fn make(&self) -> Result<(), String> {
        let bridge = self.namespace(0);
        ip(&format!("netns add {bridge}"))?;
        ip(&format!("-n {bridge} link add bridge type bridge"))?;
        ip(&format!("-n {bridge} addr add 10.77.0.254/24 dev bridge"))?;
        for link in ["lo", "bridge"] {
            ip(&format!("-n {bridge} link set {link} up"))?;
        }
        for host in 1..=self.hosts {
            let namespace = self.namespace(host);
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("link add eth0 netns {namespace} type veth peer name port{host} netns {bridge}"))?;
            ip(&format!("-n {bridge} link set port{host} master bridge"))?;
            ip(&format!("-n {namespace} addr add {}/24 dev eth0", address(host)))?;
            for link in ["lo", "eth0"] {
                ip(&format!("-n {namespace} link set {link} up"))?;
            }
            self.plug(host, true)?;
        }
        Ok(())
    }

    fn namespace(&self, host: u32) -> String {
        format!("{}-{host}", self.name)
    }

    /// Unplugs the cable of a host, or plugs it in again.
    pub(crate) fn plug(&self, host: u32, is_in: bool) -> Result<(), String> {
        let state = if is_in { "up" } else { "down" };
        ip(&format!("-n {} link set port{host} {state}", self.namespace(0)))
    }

    /// Blocks packets of a host to an address, or unblocks them.
    pub(crate) fn cut(&self, host: u32, to: &str, is_cut: bool) -> Result<(), String> {
        let change = if is_cut { "add" } else { "del" };
        ip(&format!("-n {} route {change} blackhole {to}/32", self.namespace(host)))
    }

    /// Returns a command that runs its arguments on a host; 0 is the bridge.
    pub(crate) fn on(&self, host: u32) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(host)]);
        command
    }
}

/// Returns the address of a host.
pub(crate) fn address(host: u32) -> String {
    format!("10.77.0.{host}")
}
