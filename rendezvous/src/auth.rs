//! The job's token, and how the two ends of an agent's connection show that they know it.
//!
//! Both ends are authenticated, and no proof is of use on another connection. What follows is neither encrypted nor protected against
//! somebody who can change bytes on the way.

use std::fmt;
use std::io;
use std::time::Duration;

use hmac::{Hmac, Mac};
use ice_proto::auth::{Answer, Challenge, Greeting, Nonce, Proof};
use ice_proto::frame::{self, Decoder, FrameError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

/// Fewest bytes of a token: 128 bits, where they are random.
const SHORTEST: usize = 16;
/// Time that the other end has for its part.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that a stranger may send before it has shown anything.
const MOST: usize = 1024;

const COORDINATOR: &[u8] = b"ice coordinator";
const AGENT: &[u8] = b"ice agent";

/// A secret that all agents of a job share.
#[derive(Clone)]
pub struct Token(Vec<u8>);

impl Token {
    /// A token from the text of a file or variable; space around it does not count.
    ///
    /// # Errors
    /// What is wrong with it, and what to do.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() < SHORTEST {
            return Err(format!(
                "a token of {} characters is too easy to guess: make one with `openssl rand -hex 32`",
                text.len()
            ));
        }
        Ok(Self(text.as_bytes().to_vec()))
    }

    fn mac(&self, role: &[u8], agents: &Nonce, coordinators: &Nonce) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).ok()?;
        [role, agents, coordinators].iter().for_each(|part| mac.update(part));
        Some(mac)
    }

    fn proof(&self, role: &[u8], agents: &Nonce, coordinators: &Nonce) -> Option<Proof> {
        Some(self.mac(role, agents, coordinators)?.finalize().into_bytes().into())
    }

    /// In constant time.
    fn accepts(&self, role: &[u8], agents: &Nonce, coordinators: &Nonce, proof: &Proof) -> bool {
        self.mac(role, agents, coordinators).is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Why the two ends do not trust each other.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AuthError {
    #[error(
        "the endpoint asks for a token, and this agent has none: give it the job's with --rdzv-token-file"
    )]
    TokenWanted,
    #[error("this agent has a token, and the endpoint has none: give the agent that hosts it the same one")]
    NoToken,
    #[error(
        "the endpoint does not know this agent's token: all agents of a job need the same --rdzv-token-file"
    )]
    WrongToken,
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The agent's part.
pub(crate) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    token: Option<&Token>,
) -> Result<Decoder, AuthError> {
    let mut decoder = Decoder::new();
    let nonce = nonce()?;
    send(stream, &Greeting { nonce }).await?;
    let challenge: Challenge = receive(stream, &mut decoder).await?;
    let proof = match (token, challenge.proof) {
        (None, None) => None,
        (None, Some(_)) => return Err(AuthError::TokenWanted),
        (Some(_), None) => return Err(AuthError::NoToken),
        (Some(token), Some(proof)) if token.accepts(COORDINATOR, &nonce, &challenge.nonce, &proof) => {
            token.proof(AGENT, &nonce, &challenge.nonce)
        }
        (Some(_), Some(_)) => return Err(AuthError::WrongToken),
    };
    send(stream, &Answer { proof }).await?;
    Ok(decoder)
}

/// The coordinator's part. The decoder holds what the agent has sent beyond it.
pub(crate) async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    token: Option<&Token>,
) -> Result<Decoder, AuthError> {
    let mut decoder = Decoder::new();
    let greeting: Greeting = receive(stream, &mut decoder).await?;
    let nonce = nonce()?;
    let proof = token.and_then(|token| token.proof(COORDINATOR, &greeting.nonce, &nonce));
    send(stream, &Challenge { nonce, proof }).await?;
    let answer: Answer = match receive(stream, &mut decoder).await {
        // An agent that sees that the tokens differ leaves.
        Err(AuthError::Io(error)) if token.is_some() && error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(AuthError::WrongToken);
        }
        answer => answer?,
    };
    match (token, answer.proof) {
        (None, _) => Ok(decoder),
        (Some(token), Some(proof)) if token.accepts(AGENT, &greeting.nonce, &nonce, &proof) => Ok(decoder),
        (Some(_), _) => Err(AuthError::WrongToken),
    }
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> Result<(), AuthError> {
    let frame = frame::encode(message)?;
    Ok(timed(stream.write_all(&frame)).await?)
}

async fn timed<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(PATIENCE, work).await?
}

async fn receive<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    decoder: &mut Decoder,
) -> Result<T, AuthError> {
    let mut buffer = [0; MOST];
    let mut left = MOST;
    let whole = async {
        loop {
            if let Some(message) = decoder.next_message()? {
                return Ok(message);
            }
            let read = stream.read(&mut buffer[..left]).await?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            left -= read;
            decoder.feed(&buffer[..read]);
        }
    };
    timeout(PATIENCE, whole).await.map_err(io::Error::from)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Option<Token> {
        (!text.is_empty()).then(|| Token::new(&format!("{text} and sixteen characters")).unwrap())
    }

    /// What both ends say, given their tokens.
    async fn meet(agents: &str, coordinators: &str) -> (Result<(), String>, Result<(), String>) {
        let (mut agent, mut coordinator) = tokio::io::duplex(4096);
        let (agents, coordinators) = (token(agents), token(coordinators));
        let greeting = async move { greet(&mut agent, agents.as_ref()).await.map(|_| ()) };
        let admission = async move { admit(&mut coordinator, coordinators.as_ref()).await.map(|_| ()) };
        let (greeted, admitted) = tokio::join!(greeting, admission);
        (greeted.map_err(|error| error.to_string()), admitted.map_err(|error| error.to_string()))
    }

    #[tokio::test]
    async fn one_token_opens_and_another_does_not() {
        assert_eq!(meet("", "").await, (Ok(()), Ok(())));
        assert_eq!(meet("a", "a").await, (Ok(()), Ok(())));
        for (agents, coordinators, said) in
            [("", "a", "--rdzv-token-file"), ("a", "", "the endpoint has none"), ("a", "b", "does not know")]
        {
            let (greeted, admitted) = meet(agents, coordinators).await;
            assert!(greeted.unwrap_err().contains(said), "{agents} {coordinators}");
            assert!(admitted.is_err());
        }
    }

    #[tokio::test]
    async fn a_proof_cannot_be_replayed_nor_reflected() {
        let token = token("a").unwrap();
        let (mut spy, mut coordinator) = tokio::io::duplex(4096);
        let host = token.clone();
        let admission = tokio::spawn(async move { admit(&mut coordinator, Some(&host)).await });
        let old: Nonce = [7; 32];
        send(&mut spy, &Greeting { nonce: old }).await.unwrap();
        let challenge: Challenge = receive(&mut spy, &mut Decoder::new()).await.unwrap();
        // The coordinator's own proof, and an agent's of another connection.
        assert!(token.proof(AGENT, &old, &[9; 32]).is_some_and(|proof| Some(proof) != challenge.proof));
        send(&mut spy, &Answer { proof: challenge.proof }).await.unwrap();
        assert!(matches!(admission.await.unwrap(), Err(AuthError::WrongToken)));
    }

    #[tokio::test]
    async fn a_stranger_is_not_listened_to_for_long() {
        let (mut stranger, mut coordinator) = tokio::io::duplex(1 << 16);
        let admission = tokio::spawn(async move { admit(&mut coordinator, None).await });
        // A frame that claims to be long.
        let mut frame = frame::encode(&Greeting { nonce: [0; 32] }).unwrap();
        frame[8..12].copy_from_slice(&(1_u32 << 19).to_le_bytes());
        frame.resize(1 << 15, 0);
        stranger.write_all(&frame).await.unwrap();
        assert!(admission.await.unwrap().is_err());
    }

    #[test]
    fn short_tokens_are_refused_and_none_is_shown() {
        assert!(Token::new(" secret \n").unwrap_err().contains("6 characters"));
        assert_eq!(format!("{:?}", token("a")), "Some(Token(…))");
    }
}
