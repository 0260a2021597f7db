//! The network between the agents and the coordinator, and the cost of a message.

use std::time::Duration;

use ice_testing::Random;

/// Bytes of the headers of Ethernet, IPv6 and TCP around a frame.
const HEADERS: usize = 92;

/// CPU time of the coordinator's thread, system calls included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Costs {
    /// Time to accept a connection and to check its greeting.
    pub(crate) connect: Duration,
    /// Time to read and handle a message.
    pub(crate) receive: Duration,
    /// Time to encode and write a message.
    pub(crate) send: Duration,
}

/// A network, described by one number per property.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    /// Median latency of one way.
    pub(crate) latency: Duration,
    /// Standard deviation of the latency's logarithm.
    pub(crate) jitter: f64,
    /// Bytes per second of the coordinator's link, in each direction.
    pub(crate) bandwidth: f64,
}

impl Network {
    /// Returns a random latency of one way.
    pub(crate) fn one_way(&self, random: &mut Random) -> Duration {
        self.latency.mul_f64((self.jitter * normal(random)).exp())
    }
}

/// One direction of the coordinator's link, which transmits one frame after another.
#[derive(Debug, Default)]
pub(crate) struct Link {
    free: Duration,
    pub(crate) messages: u64,
    /// Bytes of frames, without headers.
    pub(crate) bytes: u64,
}

impl Link {
    /// Returns the time at which a frame that is ready now has been transmitted.
    pub(crate) fn pass(&mut self, now: Duration, frame: usize, bandwidth: f64) -> Duration {
        self.messages += 1;
        self.bytes += frame as u64;
        self.free = self.free.max(now) + Duration::from_secs_f64((frame + HEADERS) as f64 / bandwidth);
        self.free
    }
}

/// Returns a uniform random number, greater than 0 and at most 1.
pub(crate) fn uniform(random: &mut Random) -> f64 {
    ((random.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
}

/// Returns a normally distributed random number (Box and Muller, 1958).
fn normal(random: &mut Random) -> f64 {
    let radius = (-2.0 * uniform(random).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(random)).cos()
}
