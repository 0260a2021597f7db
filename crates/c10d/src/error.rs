use std::ffi::{CStr, c_char};

use crate::ffi;

/// Kind of a failure, for code that reacts to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A connection was refused, reset or closed: a peer or the host of the store is lost.
    Network,
    /// The store answered with an error.
    Store,
    /// The other side did not respond in time.
    Timeout,
    /// The communication library failed in some other way.
    Backend,
    /// libtorch itself failed.
    Torch,
    /// CUDA was requested, but there is no GPU.
    NoGpu,
    /// This build lacks the requested part.
    Unavailable,
    /// The arguments cannot work, independent of the network.
    InvalidArgument,
    /// Any other failure.
    Other,
}

/// A failure of c10d or of libtorch. Displays as a lower-case fragment with libtorch's message,
/// without its C++ backtrace.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidArgument, message)
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

/// Runs one call of the shim, and converts its kind and message into a result.
pub(crate) fn check(call: impl FnOnce(*mut *mut c_char) -> i32) -> Result<()> {
    let mut message = std::ptr::null_mut();
    let kind = match call(&mut message) {
        0 => return Ok(()),
        1 => ErrorKind::Network,
        2 => ErrorKind::Store,
        3 => ErrorKind::Timeout,
        4 => ErrorKind::Backend,
        5 => ErrorKind::Torch,
        6 => ErrorKind::NoGpu,
        7 => ErrorKind::Unavailable,
        8 => ErrorKind::InvalidArgument,
        _ => ErrorKind::Other,
    };
    Err(Error { kind, message: ffi::take_string(message).map_or_else(|| "no message".into(), |m| tidy(&m)) })
}

/// Returns the first paragraph of a C++ message, which a stack trace follows. The first letter
/// becomes lower-case, unless it starts a name.
fn tidy(message: &str) -> String {
    let end = ["\nException raised from", "\nC++ CapturedTraceback"]
        .iter()
        .filter_map(|mark| message.find(mark))
        .min();
    let message = message[..end.unwrap_or(message.len())].trim();
    let mut letters = message.chars();
    match (letters.next(), letters.next()) {
        (Some(first), Some(second))
            if first.is_ascii_uppercase() && !is_name(message) && !second.is_uppercase() =>
        {
            format!("{}{}", first.to_ascii_lowercase(), &message[1..])
        }
        _ => message.to_owned(),
    }
}

fn is_name(message: &str) -> bool {
    let word = message.split_whitespace().next().unwrap_or_default();
    word.chars().skip(1).any(|letter| letter.is_uppercase() || letter == ':')
}

/// Copies a message borrowed from the shim.
pub(crate) fn lossy(message: &CStr) -> String {
    message.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::tidy;

    #[test]
    fn messages_become_fragments_without_a_backtrace() {
        assert_eq!(tidy("Operation timed out!\nException raised from x at y:1"), "operation timed out!");
        assert_eq!(tidy("ProcessGroupGloo::allreduce: no"), "ProcessGroupGloo::allreduce: no");
        assert_eq!(tidy("CUDA error"), "CUDA error");
    }
}
