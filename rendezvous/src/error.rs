use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use ice_proto::frame::FrameError;

/// Why the nodes cannot agree.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The endpoint's name has no address.
    #[error("cannot resolve {host}: {source}: check --master-addr or --rdzv-endpoint")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// The port is taken, or the address is not of this host.
    #[error("cannot listen on {address}: {source}: choose another --master-port, or end what holds it")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The thread that serves the endpoint could not be started.
    #[error("cannot serve the endpoint: {0}")]
    Host(io::Error),
    /// Nobody answers at the endpoint.
    #[error(
        "no coordinator at {endpoint} within {timeout:?} ({source}): is the agent of node 0 running, and can this host reach it?"
    )]
    Unreachable {
        /// Host and port.
        endpoint: String,
        /// How long it was tried.
        timeout: Duration,
        /// The last failure.
        source: io::Error,
    },
    /// What answers at the endpoint is no coordinator of this release.
    #[error("the peer at {endpoint} cannot be understood: {source}")]
    Protocol {
        /// Host and port.
        endpoint: String,
        /// What is wrong with its bytes.
        source: FrameError,
    },
    /// The endpoint and this agent do not trust each other.
    #[error("{endpoint}: {problem}")]
    Token {
        /// Host and port.
        endpoint: String,
        /// Why, and what to do.
        problem: String,
    },
    /// etcd does not answer.
    #[error("etcd at {endpoints} does not answer ({problem}): does it run, and can this host reach it?")]
    Etcd {
        /// Its members.
        endpoints: String,
        /// The last failure.
        problem: String,
    },
    /// Trying again cannot help.
    #[error("{problem}")]
    Refused {
        /// Who refuses, and why.
        problem: String,
    },
    /// The connection to the coordinator ended.
    #[error("lost the coordinator at {endpoint}: the agent of node 0 is gone or cannot be reached")]
    Lost {
        /// Host and port.
        endpoint: String,
    },
}
