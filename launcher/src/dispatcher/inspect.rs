use std::path::PathBuf;

use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::RankEvent;
use crate::supervise::{Stacks, write_stacks};
use ice_agent::Hang;

/// Number of debuggers that run at the same time.
const AT_ONCE: usize = 4;

const IN_DESTRUCTOR: &str = "waits in the destructor of a gloo group, which a DistributedDataParallel object \
    has outlived: delete that object before destroy_process_group()";

/// Writes the stacks of all ranks, given as rank, process and file, and sends an event once they
/// are written.
pub(super) async fn inspect(
    round: u64,
    hang: Hang,
    ranks: Vec<(u32, u32, Option<PathBuf>)>,
    events: mpsc::UnboundedSender<RankEvent>,
) {
    let mut work = JoinSet::new();
    let mut found = Vec::new();
    for (rank, pid, path) in ranks {
        if work.len() >= AT_ONCE {
            found.extend(work.join_next().await);
        }
        work.spawn(async move {
            match write_stacks(pid, path.as_deref()).await {
                Ok(Stacks { kinds, ends_group: false }) => kinds,
                Ok(Stacks { kinds, ends_group: true }) => format!("{kinds}; rank {rank} {IN_DESTRUCTOR}"),
                Err(error) => format!("none of rank {rank}: {error}"),
            }
        });
    }
    found.extend(work.join_all().await.into_iter().map(Ok));
    let mut found: Vec<String> = found.into_iter().flatten().collect();
    found.sort();
    found.dedup();
    let _ = events.send(RankEvent::Inspected(round, hang, found.join("; ")));
}
