//! Check of the views that the members of one round receive.

use std::collections::BTreeMap;

use ice_proto::rendezvous::{NodeAssignment, Round};

/// Checks that the views of all members, in any order, make one round: RV-1 and RV-2.
///
/// # Errors
/// The violated invariant and its values.
pub fn check_round<'a>(round_check: impl IntoIterator<Item = &'a Round>) -> Result<(), String> {
    let common = |round: &Round| Round { assignment: NodeAssignment::default(), ..round.clone() };
    let mut agreed: Option<Round> = None;
    let mut assignments: BTreeMap<u32, &NodeAssignment> = BTreeMap::new();
    for view in round_check {
        match &agreed {
            None => agreed = Some(common(view)),
            Some(agreed) if common(view) == *agreed => {}
            Some(agreed) => return Err(format!("RV-2: {view:?} is not of {agreed:?}")),
        }
        if assignments.insert(view.assignment.group_rank, &view.assignment).is_some() {
            return Err(format!("RV-1: two nodes have the rank {}", view.assignment.group_rank));
        }
    }
    let Some(Round { nodes, world_size, .. }) = agreed else { return Ok(()) };
    let mut next_rank = 0;
    for (group_rank, part) in (0..).zip(assignments.values()) {
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
    if (assignments.len(), next_rank) != (nodes as usize, world_size) {
        let notified = assignments.len();
        return Err(format!(
            "RV-1: {notified} nodes with {next_rank} ranks were told of {nodes} with {world_size}"
        ));
    }
    Ok(())
}
