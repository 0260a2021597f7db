//! A rank's membership of a round: its rank there, and the process group.

use std::sync::Arc;

use ice_c10d::{ProcessGroup, Store};
use ice_proto::env::RankEnv;
use tch::Device;

use crate::store::{LinkGroup, LinkStore};
use crate::{Error, Link, group};

/// A rank's membership of a round.
pub(crate) struct Membership {
    pub(crate) env: RankEnv,
    pub(crate) group: Option<ProcessGroup>,
    pub(crate) store: Option<Store>,
}

impl Membership {
    /// Forms the group of a round with its other ranks.
    pub(crate) fn form(env: RankEnv, device: Device, link: &Link) -> Result<Self, Error> {
        let connections = link.begin_round(&env);
        if link.is_broken() {
            return Err(Error::RoundOver);
        }
        let formed = group::join(&env, device, link);
        connections.are_complete();
        let (group, store) = formed?;
        let held = Arc::new(LinkGroup(group.clone()));
        link.join_round(&LinkStore(store.clone()), held, &env).map_err(|source| Error::Link { source })?;
        Ok(Self { env, group: Some(group), store: Some(store) })
    }

    /// Joins the next round that can be formed; `None` if no further round will start.
    pub(crate) fn next(
        bind: impl Fn(&RankEnv) -> Result<Device, Error>,
        link: &Link,
    ) -> Result<Option<Self>, Error> {
        while let Some(next) = link.next_round() {
            let env = next.env;
            let device = bind(&env)?;
            match Self::form(env, device, link) {
                Ok(member) => return Ok(Some(member)),
                // Other ranks of the round were lost before it began.
                Err(error @ (Error::Collective { .. } | Error::RoundOver)) => {
                    link.report_lost_round(&error.to_string())
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::IntoRawFd;
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use ice_c10d::{GlooOptions, testing};
    use ice_proto::frame;
    use ice_proto::link::ToRank;

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn a_round_that_ends_while_gloo_waits_for_a_lost_rank_is_left() {
        let serve = || testing::serve_store().unwrap();
        let ((_here, port), (_elsewhere, other_port)) = (serve(), serve());
        let store = |port| Store::tcp("127.0.0.1", port, PATIENCE).unwrap().with_prefix("ice/round_0");
        let (near, far) = (store(port), store(other_port));
        // Of two ranks gloo lets the one with the greater address connect. This rank publishes its
        // address, and does not connect.
        let late = thread::spawn({
            let far = store(other_port);
            let hostname = Some("127.0.0.2".into());
            move || {
                ProcessGroup::gloo(&far, 1, 2, &GlooOptions { timeout: PATIENCE, interface: None, hostname })
            }
        });
        let (mut agent, rank) = UnixStream::pair().unwrap();
        let link = Link::open(rank.into_raw_fd(), Some(0), Some(0)).unwrap();
        let env = RankEnv {
            world_size: 2,
            master_addr: "127.0.0.1".into(),
            master_port: port,
            ..RankEnv::standalone()
        };
        let forming = thread::spawn({
            let link = link.clone();
            move || Membership::form(env, Device::Cpu, &link).map(|_| ())
        });
        let address = near.get("0/0").unwrap();
        near.set("0/1", &far.get("0/1").unwrap()).unwrap();
        // The store serves connections in turn, so it has answered the rank, too.
        (0..100).for_each(|_| _ = near.get("0/1").unwrap());
        let over = ToRank::RoundBroken { round: 0, reason: "rank 1 is gone".into() };
        agent.write_all(&frame::encode(&over).unwrap()).unwrap();
        let error = forming.join().unwrap().unwrap_err();
        assert!(matches!(error, Error::RoundOver), "{error}");
        // The abandoned thread ends with its wait.
        far.set("0/0", &address).unwrap();
        late.join().unwrap().unwrap();
        link.finish();
    }
}
