//! What the views of one round must have in common.

use std::collections::BTreeMap;

use ice_proto::rendezvous::{Member, Round};

/// Whether the views that the members of a round were told, in any order, make one round: RV-1 and RV-2.
///
/// # Errors
/// The invariant that does not hold, and how.
pub fn check_views<'a>(views: impl IntoIterator<Item = &'a Round>) -> Result<(), String> {
    let common = |round: &Round| Round { you: Member::default(), ..round.clone() };
    let mut agreed: Option<Round> = None;
    let mut parts: BTreeMap<u32, &Member> = BTreeMap::new();
    for view in views {
        match &agreed {
            None => agreed = Some(common(view)),
            Some(agreed) if common(view) == *agreed => {}
            Some(agreed) => return Err(format!("RV-2: {view:?} is not of {agreed:?}")),
        }
        if parts.insert(view.you.group_rank, &view.you).is_some() {
            return Err(format!("RV-1: two nodes have the rank {}", view.you.group_rank));
        }
    }
    let Some(Round { nodes, world_size, .. }) = agreed else { return Ok(()) };
    let mut next_rank = 0;
    for (group_rank, part) in (0..).zip(parts.values()) {
        if (part.group_rank, part.first_rank) != (group_rank, next_rank) {
            return Err(format!("RV-1: {part:?} where node {group_rank} begins with rank {next_rank}"));
        }
        next_rank += part.local_world_size;
        if !(part.local_world_size..=world_size).contains(&part.ranks_on_host) {
            return Err(format!("RV-1: {part:?} of {world_size} ranks"));
        }
        let last_of_role = part.first_role_rank.checked_add(part.local_world_size);
        if last_of_role.is_none_or(|last| last > part.role_world_size) || part.role_world_size > world_size {
            return Err(format!("RV-1: {part:?} has more ranks of its role than there are"));
        }
    }
    if (parts.len(), next_rank) != (nodes as usize, world_size) {
        let told = parts.len();
        return Err(format!(
            "RV-1: {told} nodes with {next_rank} ranks were told of {nodes} with {world_size}"
        ));
    }
    Ok(())
}
