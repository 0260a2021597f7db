//! The configuration of the rendezvous.

use std::time::Duration;

use ice_proto::rendezvous::KeepAlive;
use ice_rendezvous::{Backend, Endpoint, RendezvousConfig, RetryPolicy, ServedBy, Token, address};

use super::{LaunchArgs, UsageError};

/// torchrun's default port.
const DEFAULT_PORT: u16 = 29500;
/// Time that nodes wait for each other; torchrun's default.
const JOIN_TIMEOUT: Duration = Duration::from_secs(600);
/// Time of the last call; torchrun's default.
const LAST_CALL: Duration = Duration::from_secs(30);
/// Time that the host waits for the other agents after the end of the job.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// torchrun's variable that lets rank 0 serve the ranks' store instead of the agent.
pub(super) const UNSHARED_STORE: &str = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE";

/// Whether torchrun would use another rendezvous than its static one, in which node 0 has
/// `--master-addr` and `--master-port`. That is also the case for a single node without a port.
pub(super) fn is_dynamic(args: &LaunchArgs, nnodes: u32) -> bool {
    let found = args.rendezvous.elect || args.rendezvous.etcd.is_some();
    found || (nnodes == 1 && args.master_port.is_none())
}

/// Returns the place where the agents meet: an endpoint or etcd.
pub(super) fn place(args: &LaunchArgs, nnodes: u32) -> Result<Backend, UsageError> {
    if let Some(etcd) = &args.rendezvous.etcd {
        let place = etcd.place(args.master_port.unwrap_or(0))?;
        if matches!(place, Backend::Etcd(_)) && !ice_rendezvous::HAS_ETCD {
            return Err(UsageError::new("--rdzv-backend", lacks("etcd")));
        }
        if let Backend::Etcd(config) = &place {
            config.check_endpoints().map_err(|problem| UsageError::new("--rdzv-endpoint", problem))?;
            config.check_tls().map_err(|problem| UsageError::new("--rdzv-conf", problem))?;
        }
        return Ok(place);
    }
    Ok(Backend::Endpoint(Endpoint {
        host: args.master_addr.clone().unwrap_or_else(|| "127.0.0.1".into()),
        port: args.master_port.unwrap_or(if nnodes > 1 { DEFAULT_PORT } else { 0 }),
        served_by: served_by(args, nnodes)?,
    }))
}

pub(super) fn config(args: &LaunchArgs, run_id: &str, nnodes: u32) -> Result<RendezvousConfig, UsageError> {
    let local = args.rendezvous.local_addr.as_deref().map(address::parse_local).transpose();
    let mut keep_alive = KeepAlive::default();
    keep_alive.interval = args.rendezvous.keep_alive_interval.unwrap_or(keep_alive.interval);
    keep_alive.attempts = args.rendezvous.keep_alive_attempts.unwrap_or(keep_alive.attempts);
    Ok(RendezvousConfig {
        run_id: run_id.to_owned(),
        multi_node: nnodes > 1,
        local: local.map_err(|problem| UsageError::new("--local-addr", problem))?,
        join_timeout: args.rendezvous.join_timeout.unwrap_or(JOIN_TIMEOUT),
        last_call: args.rendezvous.last_call.unwrap_or(LAST_CALL),
        answer_timeout: args.rendezvous.answer.unwrap_or(RetryPolicy::DEFAULT_ANSWER_TIMEOUT),
        keep_alive,
        token: token(args)?,
    })
}

fn served_by(args: &LaunchArgs, nnodes: u32) -> Result<ServedBy, UsageError> {
    if let Some(rank) = args.node_rank.filter(|rank| *rank >= nnodes) {
        let problem = format!("{rank} with --nnodes {nnodes}: node ranks go from 0 to {}", nnodes - 1);
        return Err(UsageError::new("--node-rank", problem));
    }
    Ok(match (args.rendezvous.is_host, args.node_rank) {
        (Some(true), _) => ServedBy::This,
        (Some(false), _) => ServedBy::Other,
        (None, _) if nnodes == 1 => ServedBy::This,
        (None, None) if args.rendezvous.elect => ServedBy::Elect,
        (None, Some(0)) => ServedBy::This,
        (None, Some(_)) => ServedBy::Other,
        (None, None) => {
            let problem = format!(
                "missing, and --nnodes is {nnodes}: give each node its own, from 0 to {}, or use --rdzv-backend c10d",
                nnodes - 1
            );
            return Err(UsageError::new("--node-rank", problem));
        }
    })
}

/// Returns the message that this build lacks a feature.
fn lacks(feature: &str) -> String {
    format!(
        "this program was built without `{feature}`: name that feature where Cargo.toml names ice, or build ice-launch with it"
    )
}

fn token(args: &LaunchArgs) -> Result<Option<Token>, UsageError> {
    if args.rdzv_tls && !ice_rendezvous::HAS_TLS {
        return Err(UsageError::new("--rdzv-tls", lacks("tls")));
    }
    match (secret(args)?, args.rdzv_tls) {
        (token, false) => Ok(token),
        (Some(token), true) => Ok(Some(token.over_tls())),
        (None, true) => Err(UsageError::new(
            "--rdzv-tls",
            "needs a token, since that is how agents know who is at the other end: make one with `openssl rand -hex 32 > token`, and give it to all agents with --rdzv-token-file token".into(),
        )),
    }
}

fn secret(args: &LaunchArgs) -> Result<Option<Token>, UsageError> {
    const VARIABLE: &str = ice_proto::env::ICE_RDZV_TOKEN;
    if let Some(path) = &args.rdzv_token_file {
        let wrong = |problem: String| {
            UsageError::new("--rdzv-token-file", format!("`{}`: {problem}", path.display()))
        };
        let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
        return Token::new(&text).map(Some).map_err(wrong);
    }
    match std::env::var(VARIABLE) {
        Ok(text) => Token::new(&text).map(Some).map_err(|problem| UsageError::new(VARIABLE, problem)),
        Err(_) => Ok(None),
    }
}
