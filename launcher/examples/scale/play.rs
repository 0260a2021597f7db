//! The scenario that is played on a cluster: it forms a round, runs, loses a rank, and then a node.

use std::time::Duration;

use ice_rendezvous::coordinator::check_round;

use crate::network::uniform;
use crate::world::{Config, Trouble, World};
use ice_testing::Random;

const LIMIT: Duration = Duration::from_secs(600);
/// Time without events, in which keep-alives are counted.
const QUIET: Duration = Duration::from_secs(30);
/// Time from the detection of a loss until a job of a fixed size gets another node.
const RETURNS_AFTER: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Outcome {
    /// Time from the start of all agents until all have received the first round.
    pub(crate) formed: Duration,
    /// Messages and bytes until then, into the coordinator and out of it.
    pub(crate) incoming: (u64, u64),
    pub(crate) outgoing: (u64, u64),
    pub(crate) forming: Trouble,
    /// Messages per second, both ways, while there are no events.
    pub(crate) quiet_rate: f64,
    /// Share of that time in which the coordinator's thread computes.
    pub(crate) quiet_share: f64,
    /// Longest time that an input waited for the thread in that time.
    pub(crate) quiet_wait: Duration,
    /// Time from the death of a rank until all agents know, and until all have started the next
    /// round.
    pub(crate) rank_known: Duration,
    pub(crate) rank_next: Duration,
    /// Time from a node's silence until the coordinator notices, and from then until all agents
    /// know.
    pub(crate) node_noticed: Duration,
    pub(crate) node_known: Duration,
    /// Time until the next round runs: from the detection of the loss in an elastic job, from the
    /// start of another agent in a job of a fixed size.
    pub(crate) node_next: Duration,
}

/// Plays the scenario. `None` if a round does not form within the limit.
pub(crate) fn play(config: Config) -> Option<Outcome> {
    let mut world = World::new(config);
    let next = |world: &mut World, round| {
        let began = world.now;
        world.run(LIMIT, |world| world.all_started(round)).then(|| world.now - began)
    };
    let formed = next(&mut world, 0)?;
    let views: Option<Vec<_>> = world.views().collect();
    check_round(views?).ok()?;
    let incoming = (world.incoming.messages, world.incoming.bytes);
    let outgoing = (world.outgoing.messages, world.outgoing.bytes);
    let forming = std::mem::take(&mut world.trouble);

    let before = (world.incoming.messages + world.outgoing.messages, world.busy);
    world.run(QUIET, |_| false);
    let messages = world.incoming.messages + world.outgoing.messages - before.0;
    let quiet_rate = messages as f64 / QUIET.as_secs_f64();
    let quiet_share = (world.busy - before.1).as_secs_f64() / QUIET.as_secs_f64();
    let quiet_wait = world.trouble.longest_wait;

    // The losses come at a random phase of the keep-alives' interval.
    let mut phase = Random::new(config.seed ^ 1);
    world.run(Duration::from_secs(5).mul_f64(uniform(&mut phase)), |_| false);
    let died = world.now;
    world.kill_rank(config.nodes as usize / 2, 3);
    let rank_next = next(&mut world, 1)?;
    let rank_known = world.all_know() - died;

    world.run(QUIET + Duration::from_secs(5).mul_f64(uniform(&mut phase)), |_| false);
    let (silent, node) = (world.now, config.nodes as usize / 3);
    world.silence(node);
    world.run(LIMIT, |world| world.lost.is_some());
    let lost = world.lost?;
    if !config.elastic {
        world.run(RETURNS_AFTER, |_| false);
    }
    let node_known = world.all_know();
    if !config.elastic {
        world.replace(node);
    }
    let node_next = next(&mut world, 2)?;
    let node_known = world.all_know().max(node_known) - lost;
    let node_noticed = lost - silent;
    Some(Outcome {
        formed,
        incoming,
        outgoing,
        forming,
        quiet_rate,
        quiet_share,
        quiet_wait,
        rank_known,
        rank_next,
        node_noticed,
        node_known,
        node_next,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Options;

    fn config(seed: u64, ranks: u32, elastic: bool) -> Config {
        Options::default().config(seed, ranks, elastic, false)
    }

    #[test]
    fn a_seed_says_all() {
        let again = || play(config(7, 128, true)).unwrap();
        assert_eq!(again(), again());
        assert_ne!(again().formed, play(config(8, 128, true)).unwrap().formed);
        // If all nodes join, an elastic job does not differ from one of a fixed size.
        assert_eq!(again().formed, play(config(7, 128, false)).unwrap().formed);
    }

    #[test]
    fn each_of_1024_ranks_is_there_once() {
        let mut world = World::new(config(1, 1024, false));
        assert!(world.run(LIMIT, |world| world.all_started(0)));
        let views: Vec<_> = world.views().map(Option::unwrap).collect();
        check_round(views.iter().copied()).unwrap();
        let mut ranks: Vec<u32> = views
            .iter()
            .flat_map(|view| {
                view.assignment.first_rank..view.assignment.first_rank + view.assignment.local_world_size
            })
            .collect();
        ranks.sort_unstable();
        assert_eq!(ranks, (0..1024).collect::<Vec<_>>());
    }

    #[test]
    fn silence_is_noticed_within_the_keep_alive_and_not_before() {
        for (seed, elastic) in (0..20).zip([true, false].into_iter().cycle()) {
            let outcome = play(config(seed, 128, elastic)).unwrap();
            let noticed = outcome.node_noticed.as_secs_f64();
            assert!((9.9..15.1).contains(&noticed), "seed {seed}: {noticed} s");
            assert!(outcome.rank_known < Duration::from_millis(100), "seed {seed}: {outcome:?}");
            assert!(outcome.rank_known < outcome.rank_next, "seed {seed}: {outcome:?}");
        }
    }

    #[test]
    fn a_slow_coordinator_takes_longer_and_forms_a_round_all_the_same() {
        let mut slow = config(3, 1024, false);
        slow.costs.connect = Duration::from_millis(60);
        let outcome = play(slow).unwrap();
        // 128 agents at 60 ms each: some wait longer than 5 s, and connect again.
        assert!(outcome.formed > Duration::from_secs(7) && outcome.forming.given_up > 0, "{outcome:?}");
    }
}
