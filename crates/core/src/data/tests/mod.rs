//! Feeds of several ranks at once, which a single process never has in production.

mod feed;
mod items;
mod lane;
mod stream;

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use tch::Device;

use super::Seat;

/// Far longer than any operation here takes: a test that exceeds it hangs.
const LONG: Duration = Duration::from_secs(30);

fn seat(rank: u64, world_size: u64) -> Seat {
    Seat { rank, world_size, device: Device::Cpu }
}

/// Fails if `f` hangs.
fn within_time<T: Send + 'static>(f: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, result) = mpsc::channel();
    let thread = thread::spawn(move || done.send(f()));
    let value = result.recv_timeout(LONG).expect("it ends, without a panic");
    thread.join().unwrap().unwrap();
    value
}
