//! Feeds of several ranks at once, which a single process never has in production.

mod batch_loader;
mod items;
mod stream;
mod worker_pool;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tch::Device;

use super::RankSlot;

/// Far longer than any operation here takes: a test that exceeds it hangs.
const LONG: Duration = Duration::from_secs(30);

fn seat(rank: u64, world_size: u64) -> RankSlot {
    RankSlot { rank, world_size, device: Device::Cpu }
}

/// Fails if `f` hangs.
fn within_time<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let thread = thread::spawn(move || done.send(f()));
    let value = result.recv_timeout(LONG).expect("it ends, without a panic");
    thread.join().unwrap().unwrap();
    value
}
