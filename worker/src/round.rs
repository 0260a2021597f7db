//! The round that a rank is in: which rank it is there, and the process group.

use std::time::Duration;

use ice_c10d::{ProcessGroup, Store};
use ice_proto::env::RankEnv;
use ice_proto::link::Up;
use tch::Device;

use crate::{Error, Link, Stop, group};

/// After a collective failed, how long word of the end of the round may take: the agent of a rank that ended knows more of the cause than
/// those that waited for it.
const GRACE: Duration = Duration::from_secs(1);

/// What a rank is in a round.
pub(crate) struct Membership {
    pub(crate) env: RankEnv,
    pub(crate) group: Option<ProcessGroup>,
    pub(crate) store: Option<Store>,
}

impl Membership {
    /// Forms the group of a round with all its other ranks.
    pub(crate) fn form(env: RankEnv, device: Device, link: &Link) -> Result<Self, Error> {
        let connections = link.begin_round(&env);
        if link.is_broken() {
            return Err(Error::RoundOver);
        }
        let formed = group::join(&env, device);
        connections.are_complete();
        let (group, store) = formed?;
        link.join_round(&store, &group, &env).map_err(|source| Error::Link { source })?;
        Ok(Self { env, group: Some(group), store: Some(store) })
    }

    /// Takes part in the next round that comes about; `None` where none will.
    pub(crate) fn next(
        bind: impl Fn(&RankEnv) -> Result<Device, Error>,
        link: &Link,
    ) -> Result<Option<Self>, Error> {
        while let Some(env) = link.next_round() {
            let device = bind(&env)?;
            match Self::form(env, device, link) {
                Ok(member) => return Ok(Some(member)),
                // Others of its ranks are gone before it began.
                Err(error @ (Error::Collective { .. } | Error::RoundOver)) => {
                    settle(&error.to_string(), link)
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

/// Waits for word that the round is over; where nobody else knows, this rank says so.
pub(crate) fn settle(problem: &str, link: &Link) {
    if link.wait_for_stop(GRACE) != Some(Stop::Broken) {
        link.send(&Up::RoundLost { round: link.round(), reason: problem.into() });
        link.wait_for_the_end();
    }
}
