//! Messages between the launcher, its template, and the ranks forked from that.
//!
//! - To the template: one byte with a descriptor, the rank's end of its gate.
//! - From the template: texts that end with NUL: `importing NAME`, `ready`, `failed WHY`,
//!   `misfit NAME WHY`, `forked PID`, `refused WHY`.
//! - To a rank, over its gate and once: a length, and texts that are separated by NUL, with the
//!   descriptors of its streams and of its link.
//! - From a rank, once: `ready` or `refused WHY`.

use std::ffi::{OsStr, OsString};
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// How long the template may take to fork, and a rank to receive its message.
const PATIENCE: Duration = Duration::from_secs(5);
/// Descriptors of a rank: three streams and the link.
const DESCRIPTORS: usize = 4;

/// Answer of the template.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Importing(String),
    Ready,
    Failed(String),
    /// This module cannot be shared, and ranks can import it by themselves.
    Misfit(String, String),
    Forked(u32),
    Refused(String),
}

impl Answer {
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(text);
        let (word, rest) = text.split_once(' ').unwrap_or((&text, ""));
        match word {
            "importing" => Some(Self::Importing(rest.into())),
            "ready" => Some(Self::Ready),
            "failed" => Some(Self::Failed(rest.into())),
            "misfit" => rest.split_once(' ').map(|(name, why)| Self::Misfit(name.into(), why.into())),
            "forked" => rest.parse().ok().map(Self::Forked),
            "refused" => Some(Self::Refused(rest.into())),
            _ => None,
        }
    }
}

/// Takes the next whole text out of what was received.
pub(super) fn take(received: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = received.iter().position(|byte| *byte == 0)?;
    let mut text: Vec<u8> = received.drain(..=end).collect();
    text.pop();
    Some(text)
}

/// Makes both directions of a socket end with an error rather than wait for long.
pub(super) fn bound(socket: &UnixStream) -> io::Result<()> {
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))
}

/// Asks the template for a rank that waits at this gate.
pub(super) fn ask_to_fork(control: &mut UnixStream, gate: BorrowedFd<'_>) -> io::Result<Answer> {
    send(control, b"f", &[gate])?;
    answer(control)
}

/// Receives one answer.
fn answer(control: &mut UnixStream) -> io::Result<Answer> {
    let (mut received, mut buffer) = (Vec::new(), [0; 512]);
    loop {
        let read = again(|| control.read(&mut buffer))?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        received.extend_from_slice(&buffer[..read]);
        if let Some(text) = take(&mut received) {
            return Answer::parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into());
        }
    }
}

/// Identity and streams that a forked process takes on.
pub(super) struct Message<'a> {
    /// The launcher's process.
    pub(super) launcher: u32,
    /// Its stdin, stdout and stderr; `None` for one that is closed.
    pub(super) streams: [Option<BorrowedFd<'a>>; 3],
    pub(super) link: BorrowedFd<'a>,
    /// Name of the process; `None` for the interpreter's.
    pub(super) name: Option<&'a OsStr>,
    /// The script or the module, and its arguments.
    pub(super) words: &'a [OsString],
    pub(super) variables: &'a [(&'static str, String)],
}

impl Message<'_> {
    /// Sends it, and with it lets the process begin, unless the process refuses.
    pub(super) fn send(&self, gate: &mut UnixStream) -> io::Result<Answer> {
        let open = (0..3).filter(|at| self.streams[*at].is_some());
        let mut fields = vec![
            self.launcher.to_string().into_bytes(),
            open.map(|at| at.to_string()).collect::<String>().into_bytes(),
            self.name.unwrap_or_default().as_bytes().to_vec(),
            self.words.len().to_string().into_bytes(),
        ];
        fields.extend(self.words.iter().map(|word| word.as_bytes().to_vec()));
        fields.push(self.variables.len().to_string().into_bytes());
        fields.extend(self.variables.iter().map(|(name, value)| format!("{name}={value}").into_bytes()));
        let text = fields.join(&0);
        let length = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        let descriptors: Vec<_> = self.streams.into_iter().flatten().chain([self.link]).collect();
        send(gate, &length.to_le_bytes(), &descriptors)?;
        gate.write_all(&text)?;
        answer(gate)
    }
}

/// Repeats a call that a signal has interrupted, as the end of any child does.
fn again<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Sends a few bytes with descriptors.
fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    match again(|| Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?))? {
        sent if sent == bytes.len() => Ok(()),
        _ => Err(io::ErrorKind::WriteZero.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_in_any_pieces() {
        let mut received = b"importing torch\0ready".to_vec();
        let next = |received: &mut Vec<u8>| take(received).and_then(|text| Answer::parse(&text));
        assert_eq!(next(&mut received), Some(Answer::Importing("torch".into())));
        assert_eq!(next(&mut received), None);
        received.extend_from_slice(b"\0forked 7\0refused no memory\0nonsense\0");
        assert_eq!(next(&mut received), Some(Answer::Ready));
        assert_eq!(next(&mut received), Some(Answer::Forked(7)));
        assert_eq!(next(&mut received), Some(Answer::Refused("no memory".into())));
        assert_eq!(next(&mut received), None);
    }
}
