//! The types of a build without the feature `tls`: they have no values, and connecting fails.

use std::convert::Infallible;
use std::io;

use super::Failure;
use crate::channel::Channel;

const ABSENT: &str = "this program was built without the feature `tls`";

/// An error of TLS; none exists in this build.
pub(crate) type Problem = Infallible;

/// Returns `None`: no error of a stream is one of TLS.
pub(crate) fn problem(_: &io::Error) -> Option<Problem> {
    None
}

/// The coordinator's end of a TLS connection.
pub(crate) struct Accepted<S>(S);

/// The acceptor of TLS connections; none can be created.
#[derive(Clone)]
pub(crate) enum Acceptor {}

impl Acceptor {
    pub(crate) fn new() -> io::Result<Self> {
        Err(io::Error::other(ABSENT))
    }

    pub(crate) async fn accept<S>(&self, _: S) -> Result<(Accepted<S>, Channel), Failure> {
        match *self {}
    }
}

impl<S> Accepted<S> {
    pub(crate) fn unauthenticated(&mut self) -> &mut S {
        &mut self.0
    }

    pub(crate) fn authenticated(self) -> S {
        self.0
    }
}

pub(crate) async fn connect<S>(_: S) -> Result<(S, Channel), Failure> {
    Err(Failure::Io(io::Error::other(ABSENT)))
}
