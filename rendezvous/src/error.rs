use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ice_proto::frame::FrameError;

/// A failure of the rendezvous.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint's name does not resolve.
    #[error("cannot resolve {host}: {source}: check --master-addr or --rdzv-endpoint")]
    Resolve {
        /// Name of the host.
        host: String,
        /// Error of the resolver.
        source: io::Error,
    },
    /// The port is taken, or the address belongs to another host.
    #[error("cannot listen on {address}: {source}: choose another --master-port, or end what holds it")]
    Bind {
        /// Address and port.
        address: SocketAddr,
        /// Error of the system.
        source: io::Error,
    },
    /// The thread that serves the endpoint did not start.
    #[error("cannot serve the endpoint: {0}")]
    Serve(io::Error),
    /// No coordinator answers at the endpoint.
    #[error(
        "no coordinator at {endpoint} within {timeout:?} ({source}): is the agent of node 0 running, and can this host reach it?"
    )]
    Unreachable {
        /// Host and port.
        endpoint: String,
        /// Time that was spent on attempts.
        timeout: Duration,
        /// Error of the last attempt.
        source: io::Error,
    },
    /// The peer at the endpoint is not a coordinator of this release.
    #[error("the peer at {endpoint} cannot be understood: {source}")]
    Protocol {
        /// Host and port.
        endpoint: String,
        /// Error of the decoder.
        source: FrameError,
    },
    /// Authentication failed at one of the two ends.
    #[error("{endpoint}: {problem}")]
    Token {
        /// Host and port.
        endpoint: String,
        /// Cause and remedy.
        problem: String,
    },
    /// etcd does not answer.
    #[error("etcd at {endpoints} does not answer ({problem}): does it run, and can this host reach it?")]
    Etcd {
        /// URLs of its members.
        endpoints: String,
        /// Error of the last attempt.
        problem: String,
    },
    /// A failure that another attempt cannot fix.
    #[error("{problem}")]
    Refused {
        /// The peer that refuses, and its reason.
        problem: String,
    },
    /// The connection to the coordinator ended.
    #[error("lost the coordinator at {endpoint}: the agent of node 0 is gone or cannot be reached")]
    Lost {
        /// Host and port.
        endpoint: String,
    },
}
