use std::io;

/// The reason why a rank cannot continue in its round.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The round is over: another rank is gone, or nodes join or leave.
    #[error("the round is over")]
    RoundOver,
    /// A thread could not be started.
    #[error("cannot start a thread of the link: {0}")]
    Thread(#[from] io::Error),
}
