//! Ranks as threads of one process, joined by a real gloo group over loopback.
#![expect(clippy::unwrap_used, reason = "a failing rank fails the test")]

use std::thread;
use std::time::Duration;

use ice_c10d::testing::serve_store;
use ice_c10d::{GlooOptions, ProcessGroup, Store};

pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);

/// Runs `rank` on every rank of a new group, and returns the ranks' results by rank.
pub(crate) fn ranks<T: Send>(world_size: usize, rank: impl Fn(&ProcessGroup) -> T + Sync) -> Vec<T> {
    let (_server, port) = serve_store().unwrap();
    let rank = &rank;
    let options =
        GlooOptions { timeout: TIMEOUT, hostname: Some("127.0.0.1".into()), ..GlooOptions::default() };
    let options = &options;
    thread::scope(|scope| {
        let join = move |r| {
            let store = Store::tcp("127.0.0.1", port, TIMEOUT).unwrap().with_prefix("test");
            rank(&ProcessGroup::gloo(&store, r, world_size, options).unwrap())
        };
        let threads: Vec<_> = (0..world_size).map(|r| scope.spawn(move || join(r))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
