//! What lies between the agents and the coordinator, and what a message costs there.

use std::time::Duration;

use crate::random::Random;

/// Bytes of the headers of Ethernet, IPv6 and TCP around a frame.
const HEADERS: usize = 92;

/// What the coordinator's thread computes for what it does, with its system calls.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Costs {
    /// To accept a connection and to find out who it is.
    pub(crate) connect: Duration,
    /// To read a message and to handle it.
    pub(crate) receive: Duration,
    /// To encode a message and to write it.
    pub(crate) send: Duration,
}

/// The network, with one number each.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    /// Median time of one way.
    pub(crate) latency: Duration,
    /// Standard deviation of its logarithm.
    pub(crate) jitter: f64,
    /// Bytes per second of the coordinator's link, in each direction.
    pub(crate) bandwidth: f64,
}

impl Network {
    /// The time of one way.
    pub(crate) fn one_way(&self, random: &mut Random) -> Duration {
        self.latency.mul_f64((self.jitter * normal(random)).exp())
    }
}

/// One direction of the coordinator's link: bytes go one after another.
#[derive(Debug, Default)]
pub(crate) struct Link {
    free: Duration,
    pub(crate) messages: u64,
    /// Of frames, without headers.
    pub(crate) bytes: u64,
}

impl Link {
    /// When a frame that is ready now is through.
    pub(crate) fn pass(&mut self, now: Duration, frame: usize, bandwidth: f64) -> Duration {
        self.messages += 1;
        self.bytes += frame as u64;
        self.free = self.free.max(now) + Duration::from_secs_f64((frame + HEADERS) as f64 / bandwidth);
        self.free
    }
}

/// From 0, which it is not, up to 1.
pub(crate) fn uniform(random: &mut Random) -> f64 {
    ((random.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

/// Normally distributed: Box and Muller, 1958.
fn normal(random: &mut Random) -> f64 {
    let radius = (-2.0 * uniform(random).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(random)).cos()
}
