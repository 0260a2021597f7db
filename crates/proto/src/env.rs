//! The environment contract: every variable that an agent sets for its ranks, each declared once, and its two ends.
//!
//! The names without `ICE_` are torchrun's and mean what they mean there, so that `init_method="env://"` and every
//! program written for torchrun finds what it expects.
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
    /// Host of the store that the ranks meet in.
    MASTER_ADDR,
    /// Port of the store that the ranks meet in.
    MASTER_PORT,
    /// How often the worker group was restarted after a failure.
    TORCHELASTIC_RESTART_COUNT,
    /// How often it may be.
    TORCHELASTIC_MAX_RESTARTS,
    /// Identifier of the job.
    TORCHELASTIC_RUN_ID,
    /// `True`: the agent serves the store, no rank may. `False`: rank 0 serves it.
    TORCHELASTIC_USE_AGENT_STORE,
    /// File that a failing rank writes its last words to.
    TORCHELASTIC_ERROR_FILE,
    /// Named pipe for requests of PyTorch's `FileTimerClient`, where the agent serves them.
    TORCHELASTIC_TIMER_FILE,
    /// File that a rank may touch to show that it gets something done.
    ICE_HEARTBEAT_FILE,
    /// Names of the signals that stop the job, separated by commas.
    TORCHELASTIC_SIGNALS_TO_HANDLE,
    /// Threads per rank of OpenMP.
    OMP_NUM_THREADS,
    /// Threads per rank of MKL, from which libtorch takes its number if it was built with MKL.
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
    /// `host:port` of the agents' store, which a program written with the runtime meets in even if
    /// rank 0 serves the store of `MASTER_ADDR` and `MASTER_PORT`.
    ICE_STORE,
    /// Set where the process is a spare: it is no rank yet, and waits for the agent to make it one.
    ICE_SPARE,
    /// `<MMDDHHmm>_<random>`: the same for all ranks and rounds of one job, part of its folders' names.
    ICE_RUN_STAMP,
}

/// The agents' own: the secret that they share. It is not passed on to ranks.
pub const ICE_RDZV_TOKEN: &str = "ICE_RDZV_TOKEN";
/// The agents' own: whether they speak inside of TLS alone. It is not passed on to ranks, as the secret that it takes is not.
pub const ICE_RDZV_TLS: &str = "ICE_RDZV_TLS";

/// What a rank learns from its environment.
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
    /// Device to bind; `None` under a launcher that does not say, such as torchrun.
    pub device: Option<RankDevice>,
    /// Backend of the job; `None` under a launcher that does not say.
    pub backend: Option<DistBackend>,
    /// Descriptor of the link; `None` under a launcher that has none.
    pub link_fd: Option<i32>,
    /// Number of the round; 0 under a launcher that does not say.
    pub round: u64,
    /// Part of the names of the job's folders; `None` under a launcher that does not say.
    pub run_stamp: Option<String>,
}

/// A variable of the contract that is missing or wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EnvError {
    /// The variable is not set, although others of the contract are.
    #[error(
        "{name} is not set, although RANK is: start the program through ice-launch, or set all of the contract"
    )]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// The variable has a value that it cannot have.
    #[error("{name}={value} cannot be understood: {problem}")]
    Invalid {
        /// Its name.
        name: &'static str,
        /// What it was set to.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl RankEnv {
    /// Reads the contract through `lookup`, or returns `None` where the process is not under a launcher (no `RANK`).
    ///
    /// # Errors
    /// [`EnvError`] names the variable.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Result<Option<Self>, EnvError> {
        if lookup(RANK).is_none() {
            return Ok(None);
        }
        let source = Source(&lookup);
        // A torchrun below ice-launch says `True`, and the variable is the outer job's then.
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
    /// What a spare knows before it becomes a rank: the job, its device where that is no GPU, and the link.
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
            ..Self::alone()
        })
    }

    /// A process on its own.
    pub fn alone() -> Self {
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
    fn torchrun_alone_is_enough() {
        let env = RankEnv::read(lookup(&[])).unwrap().unwrap();
        assert_eq!((env.rank, env.world_size, env.device, env.link_fd), (1, 2, None, None));
        assert_eq!(RankEnv::read(|_| None).unwrap(), None);
    }

    #[test]
    fn the_agents_store_is_preferred_to_one_that_a_rank_serves() {
        let by_rank = (TORCHELASTIC_USE_AGENT_STORE, "False");
        let env = RankEnv::read(lookup(&[by_rank, (ICE_STORE, "fd00::7:29400")])).unwrap().unwrap();
        assert_eq!((env.master_addr.as_str(), env.master_port), ("fd00::7", 29400));
        let env = RankEnv::read(lookup(&[(ICE_STORE, "fd00::7:29400")])).unwrap().unwrap();
        assert_eq!(env.master_port, 29500);
        let message = RankEnv::read(lookup(&[by_rank, (ICE_STORE, "node0")])).unwrap_err().to_string();
        assert!(message.contains("ICE_STORE=node0"), "{message}");
    }

    #[test]
    fn a_wrong_value_is_named() {
        let message = RankEnv::read(lookup(&[(MASTER_PORT, "99999")])).unwrap_err().to_string();
        assert!(message.contains("MASTER_PORT=99999"), "{message}");
        let message = RankEnv::read(lookup(&[(RANK, "2")])).unwrap_err().to_string();
        assert!(message.contains("WORLD_SIZE is 2"), "{message}");
        let message = RankEnv::read(lookup(&[(ICE_DEVICE, "tpu")])).unwrap_err().to_string();
        assert!(message.contains("`cuda:<index>`"), "{message}");
    }
}
