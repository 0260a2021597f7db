//! The job's token, and how the two ends of an agent's connection show that they know it.
//!
//! Both ends are authenticated, and no proof is of use on another connection. Without TLS, what follows is neither encrypted nor protected
//! against somebody who can change bytes on the way.
//!
//! A proof is HMAC-SHA-256 (RFC 2104), with the token as key, over
//!
//! ```text
//! "ice coordinator" or "ice agent", 0      who shows it
//! "plain" or "tls-exporter", 0             over what
//! 32 bytes                                 the agent's nonce
//! 32 bytes                                 the coordinator's nonce
//! 32 bytes, inside of TLS alone            the channel binding
//! ```
//!
//! The binding is `tls-exporter` of RFC 9266: keying material of this TLS connection, which both ends of it know and nobody else, for the
//! label `EXPORTER-Channel-Binding` and an empty context. Somebody who ends the agent's TLS and opens another one to the coordinator has
//! two connections with two bindings, and neither end accepts what the other one shows. So the keys of TLS need no certificate: the token
//! vouches for the connection. Both names are written out, so that a proof for one kind of connection is never one for another.

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

use crate::tls;

/// Fewest bytes of a token: 128 bits, where they are random.
const SHORTEST: usize = 16;
/// Time that the other end has for its part.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that a stranger may send before it has shown anything.
const MOST: usize = 1024;

const COORDINATOR: &[u8] = b"ice coordinator\0";
const AGENT: &[u8] = b"ice agent\0";
const PLAIN: &[u8] = b"plain\0";
const TLS: &[u8] = b"tls-exporter\0";

/// A secret that all agents of a job share, and how they show it.
#[derive(Clone)]
pub struct Token {
    secret: Vec<u8>,
    over_tls: bool,
}

/// What a connection is, and what tells it from all others.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Channel {
    /// Nothing does.
    Plain,
    /// The channel binding.
    #[cfg_attr(not(any(feature = "tls", test)), expect(dead_code, reason = "TLS alone has it"))]
    Tls([u8; 32]),
}

/// What a proof is about.
struct About<'a> {
    channel: &'a Channel,
    agents: &'a Nonce,
    coordinators: &'a Nonce,
}

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
        Ok(Self { secret: text.as_bytes().to_vec(), over_tls: false })
    }

    /// Returns the same token, which is shown inside of TLS alone. A build without the feature `tls` cannot show such a token.
    #[must_use]
    pub fn over_tls(self) -> Self {
        Self { over_tls: true, ..self }
    }

    pub(crate) fn is_over_tls(&self) -> bool {
        self.over_tls
    }

    fn mac(&self, role: &[u8], about: &About) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).ok()?;
        let (channel, binding) = match about.channel {
            Channel::Plain => (PLAIN, &[][..]),
            Channel::Tls(binding) => (TLS, &binding[..]),
        };
        [role, channel, about.agents, about.coordinators, binding].iter().for_each(|part| mac.update(part));
        Some(mac)
    }

    fn proof(&self, role: &[u8], about: &About) -> Option<Proof> {
        Some(self.mac(role, about)?.finalize().into_bytes().into())
    }

    /// In constant time.
    fn accepts(&self, role: &[u8], about: &About, proof: &Proof) -> bool {
        self.mac(role, about).is_some_and(|mac| mac.verify_slice(proof).is_ok())
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
    #[error(
        "the endpoint does not know this agent's token, or something between them opens TLS: all agents of a job need the same --rdzv-token-file, and a connection that nobody ends on its way"
    )]
    WrongTokenOverTls,
    #[error("the endpoint asks for TLS: give this agent --rdzv-tls")]
    TlsWanted,
    #[error(
        "the endpoint asks for a token and TLS: give this agent the job's with --rdzv-token-file, and --rdzv-tls"
    )]
    TokenAndTlsWanted,
    #[error(
        "this agent asks for TLS, and the endpoint has none: give the agent that hosts it --rdzv-tls, too"
    )]
    #[cfg_attr(not(feature = "tls"), expect(dead_code, reason = "TLS alone has it"))]
    NoTls,
    #[error("no TLS with the endpoint ({0}): is it an agent of this job, and of the same release?")]
    Tls(tls::Problem),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error(transparent)]
    Io(io::Error),
}

impl From<io::Error> for AuthError {
    /// What TLS finds wrong reaches us as an error of reading or writing, and trying again does not help.
    fn from(error: io::Error) -> Self {
        match tls::problem(&error) {
            Some(problem) => Self::Tls(problem),
            None => Self::Io(error),
        }
    }
}

impl AuthError {
    fn wrong_token(channel: &Channel) -> Self {
        match channel {
            Channel::Plain => Self::WrongToken,
            Channel::Tls(_) => Self::WrongTokenOverTls,
        }
    }
}

/// The agent's part.
pub(crate) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    token: Option<&Token>,
    channel: &Channel,
) -> Result<Decoder, AuthError> {
    let mut decoder = Decoder::new();
    let nonce = nonce()?;
    send(stream, &Greeting { nonce }).await?;
    let challenge: Challenge = match receive(stream, &mut decoder).await {
        Err(AuthError::Frame(FrameError::Magic(first))) if tls::is_refusal(&first) => {
            return Err(token.map_or(AuthError::TokenAndTlsWanted, |_| AuthError::TlsWanted));
        }
        challenge => challenge?,
    };
    let about = About { channel, agents: &nonce, coordinators: &challenge.nonce };
    let proof = match (token, challenge.proof) {
        (None, None) => None,
        (None, Some(_)) => return Err(AuthError::TokenWanted),
        (Some(_), None) => return Err(AuthError::NoToken),
        (Some(token), Some(proof)) if token.accepts(COORDINATOR, &about, &proof) => {
            token.proof(AGENT, &about)
        }
        (Some(_), Some(_)) => return Err(AuthError::wrong_token(channel)),
    };
    send(stream, &Answer { proof }).await?;
    Ok(decoder)
}

/// The coordinator's part. The decoder holds what the agent has sent beyond it.
pub(crate) async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    token: Option<&Token>,
    channel: &Channel,
) -> Result<Decoder, AuthError> {
    let mut decoder = Decoder::new();
    let greeting: Greeting = receive(stream, &mut decoder).await?;
    let nonce = nonce()?;
    let about = About { channel, agents: &greeting.nonce, coordinators: &nonce };
    let proof = token.and_then(|token| token.proof(COORDINATOR, &about));
    send(stream, &Challenge { nonce, proof }).await?;
    let answer: Answer = match receive(stream, &mut decoder).await {
        // An agent that sees that the tokens differ leaves.
        Err(AuthError::Io(error)) if token.is_some() && error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(AuthError::wrong_token(channel));
        }
        answer => answer?,
    };
    match (token, answer.proof) {
        (None, _) => Ok(decoder),
        (Some(token), Some(proof)) if token.accepts(AGENT, &about, &proof) => Ok(decoder),
        (Some(_), _) => Err(AuthError::wrong_token(channel)),
    }
}

fn nonce() -> io::Result<Nonce> {
    let mut nonce = [0; 32];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), message: &impl Serialize) -> Result<(), AuthError> {
    let frame = frame::encode(message)?;
    // TLS may hold back what was written.
    Ok(timed(async {
        stream.write_all(&frame).await?;
        stream.flush().await
    })
    .await?)
}

/// What the other end has no part in takes no longer either.
pub(crate) async fn timed<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
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

    /// What both ends say, given their tokens and what they hold their connection for.
    async fn meet_on(
        channels: [Channel; 2],
        agents: &str,
        coordinators: &str,
    ) -> (Result<(), String>, Result<(), String>) {
        let (mut agent, mut coordinator) = tokio::io::duplex(4096);
        let (agents, coordinators) = (token(agents), token(coordinators));
        let greeting = async move { greet(&mut agent, agents.as_ref(), &channels[0]).await.map(|_| ()) };
        let admission =
            async move { admit(&mut coordinator, coordinators.as_ref(), &channels[1]).await.map(|_| ()) };
        let (greeted, admitted) = tokio::join!(greeting, admission);
        (greeted.map_err(|error| error.to_string()), admitted.map_err(|error| error.to_string()))
    }

    async fn meet(agents: &str, coordinators: &str) -> (Result<(), String>, Result<(), String>) {
        meet_on([Channel::Plain; 2], agents, coordinators).await
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
    async fn one_token_on_two_connections_does_not_open() {
        let (here, there) = (Channel::Tls([1; 32]), Channel::Tls([2; 32]));
        assert_eq!(meet_on([here, here], "a", "a").await, (Ok(()), Ok(())));
        for channels in [[here, there], [here, Channel::Plain], [Channel::Plain, here]] {
            let (greeted, admitted) = meet_on(channels, "a", "a").await;
            assert!(greeted.unwrap_err().contains("does not know this agent's token"));
            assert!(admitted.is_err());
        }
    }

    /// One that trusts what it is told would still not be let in through somebody in between.
    #[tokio::test]
    async fn the_coordinator_looks_at_the_connection_too() {
        let token = token("a").unwrap();
        for (channel, is_let_in) in [(Channel::Tls([1; 32]), true), (Channel::Tls([2; 32]), false)] {
            let (mut agent, mut coordinator) = tokio::io::duplex(4096);
            let host = token.clone();
            let admission = tokio::spawn(async move {
                admit(&mut coordinator, Some(&host), &Channel::Tls([1; 32])).await.is_ok()
            });
            send(&mut agent, &Greeting { nonce: [7; 32] }).await.unwrap();
            let challenge: Challenge = receive(&mut agent, &mut Decoder::new()).await.unwrap();
            let about = About { channel: &channel, agents: &[7; 32], coordinators: &challenge.nonce };
            send(&mut agent, &Answer { proof: token.proof(AGENT, &about) }).await.unwrap();
            assert_eq!(admission.await.unwrap(), is_let_in);
        }
    }

    /// The layout that the head of this file describes, by another hand.
    #[test]
    fn what_a_proof_is_made_of() {
        let token = Token::new("sixteen characters").unwrap();
        let (agents, coordinators) = ([1; 32], [2; 32]);
        let proof = |channel: &Channel, role: &[u8]| {
            token.proof(role, &About { channel, agents: &agents, coordinators: &coordinators }).unwrap()
        };
        let by_hand = |text: &[u8]| {
            let mut mac = Hmac::<Sha256>::new_from_slice(b"sixteen characters").unwrap();
            mac.update(text);
            Proof::from(mac.finalize().into_bytes())
        };
        let nonces = [agents, coordinators].concat();
        let plain = [b"ice agent\0plain\0", &nonces[..]].concat();
        assert_eq!(proof(&Channel::Plain, AGENT), by_hand(&plain));
        let tls = [b"ice coordinator\0tls-exporter\0", &nonces[..], &[3; 32]].concat();
        assert_eq!(proof(&Channel::Tls([3; 32]), COORDINATOR), by_hand(&tls));
    }

    #[tokio::test]
    async fn a_proof_cannot_be_replayed_nor_reflected() {
        let token = token("a").unwrap();
        let (mut spy, mut coordinator) = tokio::io::duplex(4096);
        let host = token.clone();
        let admission =
            tokio::spawn(async move { admit(&mut coordinator, Some(&host), &Channel::Plain).await });
        let old: Nonce = [7; 32];
        send(&mut spy, &Greeting { nonce: old }).await.unwrap();
        let challenge: Challenge = receive(&mut spy, &mut Decoder::new()).await.unwrap();
        // The coordinator's own proof, and an agent's of another connection.
        let about = About { channel: &Channel::Plain, agents: &old, coordinators: &[9; 32] };
        assert!(token.proof(AGENT, &about).is_some_and(|proof| Some(proof) != challenge.proof));
        send(&mut spy, &Answer { proof: challenge.proof }).await.unwrap();
        assert!(matches!(admission.await.unwrap(), Err(AuthError::WrongToken)));
    }

    #[tokio::test]
    async fn a_stranger_is_not_listened_to_for_long() {
        let (mut stranger, mut coordinator) = tokio::io::duplex(1 << 16);
        let admission = tokio::spawn(async move { admit(&mut coordinator, None, &Channel::Plain).await });
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
