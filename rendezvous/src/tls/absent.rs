//! A build without the feature `tls`: sessions cannot be opened, and their types have no values.

use std::convert::Infallible;
use std::io;

use crate::auth::{AuthError, Channel};

const ABSENT: &str = "this program was built without the feature `tls`";

/// A fault that TLS reports: there are none.
pub(crate) type Problem = Infallible;

/// Returns `None`: errors of a stream are never those of TLS.
pub(crate) fn problem(_: &io::Error) -> Option<Problem> {
    None
}

/// The coordinator's end of a connection.
pub(crate) struct Accepted<S>(S);

/// The coordinator's part; there is none.
#[derive(Clone)]
pub(crate) enum Acceptor {}

impl Acceptor {
    pub(crate) fn new() -> io::Result<Self> {
        Err(io::Error::other(ABSENT))
    }

    pub(crate) async fn accept<S>(&self, _: S) -> Result<(Accepted<S>, Channel), AuthError> {
        match *self {}
    }
}

impl<S> Accepted<S> {
    pub(crate) fn stranger(&mut self) -> &mut S {
        &mut self.0
    }

    pub(crate) fn known(self) -> S {
        self.0
    }
}

pub(crate) async fn connect<S>(_: S) -> Result<(S, Channel), AuthError> {
    Err(AuthError::Io(io::Error::other(ABSENT)))
}
