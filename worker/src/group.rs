//! The process group of a round.

use std::env;
use std::net::UdpSocket;
use std::time::Duration;

use ice_c10d::{GlooOptions, ProcessGroup, Store};
use ice_proto::backend::DistBackend;
use ice_proto::env::RankEnv;
use tch::Device;

use crate::{Error, Link};

/// Timeout of the store. It listens before any rank starts, so only a broken network takes longer.
const STORE_TIMEOUT: Duration = Duration::from_secs(60);
/// Timeout of a collective: PyTorch's default for gloo.
const COLLECTIVE_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Joins the process group of a round. Returns the group and the store of the round.
pub(crate) fn join(env: &RankEnv, device: Device, link: &Link) -> Result<(ProcessGroup, Store), Error> {
    let (rank, world_size) = (env.rank as usize, env.world_size as usize);
    let (host, port) = (env.master_addr.clone(), env.master_port);
    let place = format!("at {host}:{port} as rank {rank} of {world_size}");
    let fail = |doing: &str| {
        let doing = format!("{doing} {place}");
        move |source| Error::Collective { doing, source }
    };
    let no_store = fail("cannot reach the store");
    let reach = move || Store::tcp(&host, port, STORE_TIMEOUT).map_err(no_store);
    let store = link.within_round(reach)?.with_prefix(&format!("ice/round_{}", env.round));
    let default = if device.is_cuda() { DistBackend::Nccl } else { DistBackend::Gloo };
    let group = match (env.backend.unwrap_or(default), device) {
        // NCCL connects in the first collective, and makes the GPU current in this thread.
        (DistBackend::Nccl, Device::Cuda(index)) => {
            ProcessGroup::nccl(&store, rank, world_size, index, COLLECTIVE_TIMEOUT)
                .map_err(fail("cannot form the nccl group over the store"))
        }
        (DistBackend::Nccl, _) => Err(Error::Device {
            device: "cpu".into(),
            problem: "the nccl backend needs CUDA devices: use --dist-backend gloo or --devices cuda".into(),
        }),
        (DistBackend::Gloo, _) => {
            let options = GlooOptions {
                timeout: COLLECTIVE_TIMEOUT,
                interface: env::var("GLOO_SOCKET_IFNAME").ok(),
                hostname: local_address(&env.master_addr, env.master_port),
            };
            let no_group = fail("cannot form the gloo group over the store");
            let store = store.clone();
            link.within_round(move || {
                ProcessGroup::gloo(&store, rank, world_size, &options).map_err(no_group)
            })
        }
    }?;
    Ok((group, store))
}

/// Returns the source address of connections to the store, at which other ranks can reach this
/// host. The host's own name often resolves to loopback, which they cannot reach.
pub(crate) fn local_address(master_addr: &str, master_port: u16) -> Option<String> {
    let any = if master_addr.contains(':') { "[::]:0" } else { "0.0.0.0:0" };
    let probe = UdpSocket::bind(any).ok()?;
    probe.connect((master_addr, master_port)).ok()?;
    Some(probe.local_addr().ok()?.ip().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_to_loopback_starts_at_loopback() {
        assert_eq!(local_address("127.0.0.1", 29500).as_deref(), Some("127.0.0.1"));
    }
}
