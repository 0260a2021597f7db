//! The environment contract between agent and rank: every variable that an agent sets for its
//! ranks, declared once, with its writer and its reader.
//!
//! Names without `ICE_` have torchrun's meaning, so `init_method="env://"` and programs written for
//! torchrun work unchanged.
//!
//! In the book: `docs/torchrun.md#variables-of-a-worker`.

use std::str::FromStr;

use crate::backend::{DistBackend, RankDevice};

macro_rules! variables {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        $($(#[doc = $doc])+ pub const $name: &str = stringify!($name);)+
        /// Every variable of the contract with its description.
        pub const ALL: &[(&str, &str)] = &[$((stringify!($name), concat!($($doc),+)),)+];
    };
}

variables! {
    /// Rank of the process within its node, from 0.
    LOCAL_RANK,
    /// Rank of the process within the job, from 0.
    RANK,
    /// Rank of the node (its agent) within the job, from 0.
    GROUP_RANK,
    /// Rank of the process among those of its role.
    ROLE_RANK,
    /// Name of the role.
    ROLE_NAME,
    /// Processes on this node.
    LOCAL_WORLD_SIZE,
    /// Processes in the job.
    WORLD_SIZE,
    /// Nodes (agents) in the job.
    GROUP_WORLD_SIZE,
    /// Processes of this role in the job.
    ROLE_WORLD_SIZE,
    /// Host of the ranks' store.
    MASTER_ADDR,
    /// Port of the ranks' store.
    MASTER_PORT,
    /// Number of restarts of the worker group so far.
    TORCHELASTIC_RESTART_COUNT,
    /// Maximum number of restarts.
    TORCHELASTIC_MAX_RESTARTS,
    /// Identifier of the job.
    TORCHELASTIC_RUN_ID,
    /// `True` if the agent serves the ranks' store, `False` if rank 0 does.
    TORCHELASTIC_USE_AGENT_STORE,
    /// Error file of a failing rank.
    TORCHELASTIC_ERROR_FILE,
    /// Named pipe for requests of PyTorch's `FileTimerClient`, if the agent serves them.
    TORCHELASTIC_TIMER_FILE,
    /// File that a rank may touch as a sign of progress.
    ICE_HEARTBEAT_FILE,
    /// Names of the signals that stop the job, separated by commas.
    TORCHELASTIC_SIGNALS_TO_HANDLE,
    /// Threads per rank of OpenMP.
    OMP_NUM_THREADS,
    /// Threads per rank of MKL, whose number libtorch uses if it was built with MKL.
    MKL_NUM_THREADS,
    /// Makes c10d's NCCL watchdog end a process whose collective failed.
    TORCH_NCCL_ASYNC_ERROR_HANDLING,
    /// File descriptor of the link to the agent.
    ICE_LINK_FD,
    /// Device that the rank binds: `cpu` or `cuda:<index>`.
    ICE_DEVICE,
    /// Collective backend of the job: `gloo` or `nccl`.
    ICE_DIST_BACKEND,
    /// Number of the round that the rank was started in, from 0.
    ICE_ROUND,
    /// `host:port` of the agents' store, which programs of the runtime use even if rank 0 serves
    /// the store at `MASTER_ADDR` and `MASTER_PORT`.
    ICE_STORE,
    /// Set if the process is a spare, which waits for the agent to assign it a rank.
    ICE_SPARE,
    /// `<MMDDHHmm>_<random>`: equal for all ranks and rounds of one job, and part of its folders'
    /// names.
    ICE_RUN_STAMP,
}

/// Token of the agents. Not passed on to ranks.
pub const ICE_RDZV_TOKEN: &str = "ICE_RDZV_TOKEN";
/// Whether agents use TLS only. Not passed on to ranks, like the token that it requires.
pub const ICE_RDZV_TLS: &str = "ICE_RDZV_TLS";

/// Values that a rank reads from its environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RankEnv {
    /// Rank within the node.
    pub local_rank: u32,
    /// Rank within the job.
    pub rank: u32,
    /// Rank of the node.
    pub group_rank: u32,
    /// Ranks on this node.
    pub local_world_size: u32,
    /// Ranks in the job.
    pub world_size: u32,
    /// Nodes in the job.
    pub group_world_size: u32,
    /// Name of the role.
    pub role: String,
    /// Host of the store.
    pub master_addr: String,
    /// Port of the store.
    pub master_port: u16,
    /// Restarts so far.
    pub restart_count: u32,
    /// Identifier of the job.
    pub run_id: String,
    /// Device to bind; `None` if the launcher does not set one, such as torchrun.
    pub device: Option<RankDevice>,
    /// Backend of the job; `None` if the launcher does not set one.
    pub backend: Option<DistBackend>,
    /// Descriptor of the link; `None` if the launcher has none.
    pub link_fd: Option<i32>,
    /// Number of the round; 0 if the launcher does not set it.
    pub round: u64,
    /// Part of the names of the job's folders; `None` if the launcher does not set it.
    pub run_stamp: Option<String>,
}

/// A missing or invalid variable of the contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// The variable is not set although `RANK` is.
    #[error(
        "{name} is not set, although RANK is: start the program through ice-launch, or set all of the contract"
    )]
    Missing {
        /// Name of the variable.
        name: &'static str,
    },
    /// The variable has an invalid value.
    #[error("{name}={value} cannot be understood: {problem}")]
    Invalid {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
        /// Why the value is invalid.
        problem: String,
    },
}

impl RankEnv {
    /// Reads the contract through `lookup`. Returns `None` if the process has no launcher (no
    /// `RANK`).
    ///
    /// # Errors
    /// [`EnvError`] names the variable.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, EnvError> {
        if lookup(RANK).is_none() {
            return Ok(None);
        }
        let source = Source(&lookup);
        // A torchrun that runs below ice-launch sets `True`; then ICE_STORE is the variable of the
        // outer job.
        let by_rank = lookup(TORCHELASTIC_USE_AGENT_STORE).is_some_and(|value| value == "False");
        let of_agents = if by_rank { source.optional::<StoreAddress>(ICE_STORE)? } else { None };
        let (master_addr, master_port) = match of_agents {
            Some(StoreAddress(host, port)) => (host, port),
            None => (source.required(MASTER_ADDR)?, source.required(MASTER_PORT)?),
        };
        let rank_env = Self {
            local_rank: source.required(LOCAL_RANK)?,
            rank: source.required(RANK)?,
            group_rank: source.or(GROUP_RANK, 0)?,
            local_world_size: source.required(LOCAL_WORLD_SIZE)?,
            world_size: source.required(WORLD_SIZE)?,
            group_world_size: source.or(GROUP_WORLD_SIZE, 1)?,
            role: source.or(ROLE_NAME, "default".into())?,
            master_addr,
            master_port,
            restart_count: source.or(TORCHELASTIC_RESTART_COUNT, 0)?,
            run_id: source.or(TORCHELASTIC_RUN_ID, "none".into())?,
            device: source.optional(ICE_DEVICE)?,
            backend: source.optional(ICE_DIST_BACKEND)?,
            link_fd: source.optional(ICE_LINK_FD)?,
            round: source.or(ICE_ROUND, 0)?,
            run_stamp: source.optional(ICE_RUN_STAMP)?,
        };
        if rank_env.rank >= rank_env.world_size {
            return Err(EnvError::Invalid {
                name: RANK,
                value: rank_env.rank.to_string(),
                problem: format!(
                    "ranks go from 0 to WORLD_SIZE-1, and WORLD_SIZE is {}",
                    rank_env.world_size
                ),
            });
        }
        Ok(Some(rank_env))
    }
}

impl RankEnv {
    /// Reads the variables of a spare: the job, its device unless that is a GPU, and the link.
    ///
    /// # Errors
    /// [`EnvError`] names the variable.
    pub fn read_spare(lookup: impl Fn(&str) -> Option<String>) -> Result<Self, EnvError> {
        let source = Source(&lookup);
        Ok(Self {
            run_id: source.or(TORCHELASTIC_RUN_ID, "none".into())?,
            role: source.or(ROLE_NAME, "default".into())?,
            device: source.optional(ICE_DEVICE)?,
            backend: source.optional(ICE_DIST_BACKEND)?,
            link_fd: Some(source.required(ICE_LINK_FD)?),
            run_stamp: source.optional(ICE_RUN_STAMP)?,
            ..Self::standalone()
        })
    }

    /// Returns the values of a process without a launcher.
    pub fn standalone() -> Self {
        Self {
            local_rank: 0,
            rank: 0,
            group_rank: 0,
            local_world_size: 1,
            world_size: 1,
            group_world_size: 1,
            role: "default".into(),
            master_addr: String::new(),
            master_port: 0,
            restart_count: 0,
            run_id: "none".into(),
            device: None,
            backend: None,
            link_fd: None,
            round: 0,
            run_stamp: None,
        }
    }
}

/// `host:port`; the host may be an IPv6 address without brackets.
struct StoreAddress(String, u16);

impl FromStr for StoreAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let address = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        let (host, port) = address.ok_or("expected HOST:PORT")?;
        Ok(Self(host.to_owned(), port))
    }
}

struct Source<'a, F>(&'a F);

impl<F: Fn(&str) -> Option<String>> Source<'_, F> {
    fn optional<T: FromStr<Err: std::fmt::Display>>(
        &self,
        name: &'static str,
    ) -> Result<Option<T>, EnvError> {
        let Some(value) = (self.0)(name) else { return Ok(None) };
        match value.parse() {
            Ok(parsed) => Ok(Some(parsed)),
            Err(error) => Err(EnvError::Invalid { name, value, problem: error.to_string() }),
        }
    }

    fn required<T: FromStr<Err: std::fmt::Display>>(&self, name: &'static str) -> Result<T, EnvError> {
        self.optional(name)?.ok_or(EnvError::Missing { name })
    }

    fn or<T: FromStr<Err: std::fmt::Display>>(&self, name: &'static str, default: T) -> Result<T, EnvError> {
        Ok(self.optional(name)?.unwrap_or(default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup(extra: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        let base = [
            (RANK, "1"),
            (LOCAL_RANK, "1"),
            (LOCAL_WORLD_SIZE, "2"),
            (WORLD_SIZE, "2"),
            (MASTER_ADDR, "127.0.0.1"),
            (MASTER_PORT, "29500"),
        ];
        let set: Vec<(String, String)> =
            base.iter().chain(extra).map(|(name, value)| ((*name).into(), (*value).into())).collect();
        move |name| set.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.clone())
    }

    #[test]
    fn variables_of_torchrun_alone_suffice() {
        let env = RankEnv::read(lookup(&[])).unwrap().unwrap();
        assert_eq!((env.rank, env.world_size, env.device, env.link_fd), (1, 2, None, None));
        assert_eq!(RankEnv::read(|_| None).unwrap(), None);
    }

    #[test]
    fn agents_store_is_preferred_to_the_store_of_rank_0() {
        let by_rank = (TORCHELASTIC_USE_AGENT_STORE, "False");
        let env = RankEnv::read(lookup(&[by_rank, (ICE_STORE, "fd00::7:29400")])).unwrap().unwrap();
        assert_eq!((env.master_addr.as_str(), env.master_port), ("fd00::7", 29400));
        let env = RankEnv::read(lookup(&[(ICE_STORE, "fd00::7:29400")])).unwrap().unwrap();
        assert_eq!(env.master_port, 29500);
        let message = RankEnv::read(lookup(&[by_rank, (ICE_STORE, "node0")])).unwrap_err().to_string();
        assert!(message.contains("ICE_STORE=node0"), "{message}");
    }

    #[test]
    fn invalid_value_is_named_in_the_error() {
        let message = RankEnv::read(lookup(&[(MASTER_PORT, "99999")])).unwrap_err().to_string();
        assert!(message.contains("MASTER_PORT=99999"), "{message}");
        let message = RankEnv::read(lookup(&[(RANK, "2")])).unwrap_err().to_string();
        assert!(message.contains("WORLD_SIZE is 2"), "{message}");
        let message = RankEnv::read(lookup(&[(ICE_DEVICE, "tpu")])).unwrap_err().to_string();
        assert!(message.contains("`cuda:<index>`"), "{message}");
    }
}
