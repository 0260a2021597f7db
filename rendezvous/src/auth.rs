//! Mutual authentication of the two ends of an agent's connection by the job's token.
//!
//! A proof is of no use on another connection. Without TLS, the messages that follow are neither
//! encrypted nor protected against an attacker who can change bytes in transit.
//!
//! A proof is HMAC-SHA-256 (RFC 2104), with the token as key, over
//!
//! ```text
//! "ice coordinator" or "ice agent", 0      end that proves
//! "plain" or "tls-exporter", 0             kind of connection
//! 32 bytes                                 the agent's nonce
//! 32 bytes                                 the coordinator's nonce
//! 32 bytes, inside TLS only                the channel binding
//! ```
//!
//! The binding is `tls-exporter` of RFC 9266: keying material that only the two ends of this TLS
//! connection know, for the label `EXPORTER-Channel-Binding` and an empty context. A man in the
//! middle, who terminates the agent's TLS and opens a second connection to the coordinator, has two
//! connections with two bindings, and neither end accepts the other's proof. So the TLS keys need
//! no certificate: the token vouches for the connection. Proofs name their kind of connection, so a
//! proof for one kind is invalid for the other.

use std::fmt;
use std::io;

use hmac::{Hmac, Mac};
use ice_proto::auth::{Answer, Challenge, Greeting, Nonce, Proof};
use ice_proto::frame::{self, Decoder, FrameError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use sha2::Sha256;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use crate::channel::{Channel, HANDSHAKE_TIMEOUT, timed};
use crate::tls;

/// Minimum length of a token in bytes: 128 bits if they are random.
const MIN_TOKEN_LEN: usize = 16;
/// Maximum of bytes that an unauthenticated peer may send.
const MAX_UNAUTHENTICATED: usize = 1024;

const COORDINATOR: &[u8] = b"ice coordinator\0";
const AGENT: &[u8] = b"ice agent\0";
const PLAIN: &[u8] = b"plain\0";
const TLS: &[u8] = b"tls-exporter\0";

/// The secret that all agents of a job share, and whether it is used inside TLS only.
#[derive(Clone)]
pub struct Token {
    secret: Vec<u8>,
    over_tls: bool,
}

/// The values that a proof covers.
struct Transcript<'a> {
    channel: &'a Channel,
    agents: &'a Nonce,
    coordinators: &'a Nonce,
}

impl Token {
    /// Creates a token from the text of a file or variable, trimmed.
    ///
    /// # Errors
    /// The token is too short; the text says how to make one.
    pub fn new(text: &str) -> Result<Self, String> {
        let text = text.trim();
        if text.len() < MIN_TOKEN_LEN {
            return Err(format!(
                "a token of {} characters is too easy to guess: make one with `openssl rand -hex 32`",
                text.len()
            ));
        }
        Ok(Self { secret: text.as_bytes().to_vec(), over_tls: false })
    }

    /// Returns the same token for use inside TLS only. A build without the feature `tls` cannot use
    /// such a token.
    #[must_use]
    pub fn over_tls(self) -> Self {
        Self { over_tls: true, ..self }
    }

    pub(crate) fn is_over_tls(&self) -> bool {
        self.over_tls
    }

    fn mac(&self, role: &[u8], transcript: &Transcript) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.secret).ok()?;
        let (channel, binding) = match transcript.channel {
            Channel::Plain => (PLAIN, &[][..]),
            Channel::Tls(binding) => (TLS, &binding[..]),
        };
        [role, channel, transcript.agents, transcript.coordinators, binding]
            .iter()
            .for_each(|part| mac.update(part));
        Some(mac)
    }

    fn proof(&self, role: &[u8], transcript: &Transcript) -> Option<Proof> {
        Some(self.mac(role, transcript)?.finalize().into_bytes().into())
    }

    /// Verifies a proof in constant time.
    fn accepts(&self, role: &[u8], transcript: &Transcript, proof: &Proof) -> bool {
        self.mac(role, transcript).is_some_and(|mac| mac.verify_slice(proof).is_ok())
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// A failure of the authentication.
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
    /// Extracts failures of TLS, which arrive as errors of reading or writing. Unlike other I/O
    /// errors they are not retried.
    fn from(error: io::Error) -> Self {
        match tls::problem(&error) {
            Some(problem) => Self::Tls(problem),
            None => Self::Io(error),
        }
    }
}

impl From<tls::Failure> for AuthError {
    fn from(failure: tls::Failure) -> Self {
        match failure {
            #[cfg(feature = "tls")]
            tls::Failure::Refused => Self::NoTls,
            tls::Failure::Io(error) => error.into(),
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

/// Performs the agent's side of the handshake. The decoder holds bytes that arrived after it.
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
    let transcript = Transcript { channel, agents: &nonce, coordinators: &challenge.nonce };
    let proof = match (token, challenge.proof) {
        (None, None) => None,
        (None, Some(_)) => return Err(AuthError::TokenWanted),
        (Some(_), None) => return Err(AuthError::NoToken),
        (Some(token), Some(proof)) if token.accepts(COORDINATOR, &transcript, &proof) => {
            token.proof(AGENT, &transcript)
        }
        (Some(_), Some(_)) => return Err(AuthError::wrong_token(channel)),
    };
    send(stream, &Answer { proof }).await?;
    Ok(decoder)
}

/// Performs the coordinator's side of the handshake. The decoder holds bytes that arrived after it.
pub(crate) async fn admit<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    token: Option<&Token>,
    channel: &Channel,
) -> Result<Decoder, AuthError> {
    let mut decoder = Decoder::new();
    let greeting: Greeting = receive(stream, &mut decoder).await?;
    let nonce = nonce()?;
    let transcript = Transcript { channel, agents: &greeting.nonce, coordinators: &nonce };
    let proof = token.and_then(|token| token.proof(COORDINATOR, &transcript));
    send(stream, &Challenge { nonce, proof }).await?;
    let answer: Answer = match receive(stream, &mut decoder).await {
        // An agent closes the connection if the coordinator's proof is wrong.
        Err(AuthError::Io(error)) if token.is_some() && error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(AuthError::wrong_token(channel));
        }
        answer => answer?,
    };
    match (token, answer.proof) {
        (None, _) => Ok(decoder),
        (Some(token), Some(proof)) if token.accepts(AGENT, &transcript, &proof) => Ok(decoder),
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
    // TLS may buffer written bytes.
    Ok(timed(async {
        stream.write_all(&frame).await?;
        stream.flush().await
    })
    .await?)
}

async fn receive<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
    decoder: &mut Decoder,
) -> Result<T, AuthError> {
    let mut buffer = [0; MAX_UNAUTHENTICATED];
    let mut left = MAX_UNAUTHENTICATED;
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
    timeout(HANDSHAKE_TIMEOUT, whole).await.map_err(io::Error::from)?
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(text: &str) -> Option<Token> {
        (!text.is_empty()).then(|| Token::new(&format!("{text} and sixteen characters")).unwrap())
    }

    /// Runs both sides with these tokens and channels. Returns the error of each side.
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
    async fn only_equal_tokens_authenticate() {
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
    async fn same_token_with_two_channel_bindings_is_rejected() {
        let (here, there) = (Channel::Tls([1; 32]), Channel::Tls([2; 32]));
        assert_eq!(meet_on([here, here], "a", "a").await, (Ok(()), Ok(())));
        for channels in [[here, there], [here, Channel::Plain], [Channel::Plain, here]] {
            let (greeted, admitted) = meet_on(channels, "a", "a").await;
            assert!(greeted.unwrap_err().contains("does not know this agent's token"));
            assert!(admitted.is_err());
        }
    }

    /// An agent that accepts any proof is still rejected behind a man in the middle.
    #[tokio::test]
    async fn coordinator_checks_the_channel_binding() {
        let token = token("a").unwrap();
        for (channel, is_let_in) in [(Channel::Tls([1; 32]), true), (Channel::Tls([2; 32]), false)] {
            let (mut agent, mut coordinator) = tokio::io::duplex(4096);
            let host = token.clone();
            let admission = tokio::spawn(async move {
                admit(&mut coordinator, Some(&host), &Channel::Tls([1; 32])).await.is_ok()
            });
            send(&mut agent, &Greeting { nonce: [7; 32] }).await.unwrap();
            let challenge: Challenge = receive(&mut agent, &mut Decoder::new()).await.unwrap();
            let transcript =
                Transcript { channel: &channel, agents: &[7; 32], coordinators: &challenge.nonce };
            send(&mut agent, &Answer { proof: token.proof(AGENT, &transcript) }).await.unwrap();
            assert_eq!(admission.await.unwrap(), is_let_in);
        }
    }

    /// Builds the layout of the module documentation by hand.
    #[test]
    fn proof_has_the_documented_layout() {
        let token = Token::new("sixteen characters").unwrap();
        let (agents, coordinators) = ([1; 32], [2; 32]);
        let proof = |channel: &Channel, role: &[u8]| {
            token.proof(role, &Transcript { channel, agents: &agents, coordinators: &coordinators }).unwrap()
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
    async fn proof_cannot_be_replayed_or_reflected() {
        let token = token("a").unwrap();
        let (mut spy, mut coordinator) = tokio::io::duplex(4096);
        let host = token.clone();
        let admission =
            tokio::spawn(async move { admit(&mut coordinator, Some(&host), &Channel::Plain).await });
        let old: Nonce = [7; 32];
        send(&mut spy, &Greeting { nonce: old }).await.unwrap();
        let challenge: Challenge = receive(&mut spy, &mut Decoder::new()).await.unwrap();
        // Neither the coordinator's own proof nor an agent's proof of another connection is
        // accepted.
        let transcript = Transcript { channel: &Channel::Plain, agents: &old, coordinators: &[9; 32] };
        assert!(token.proof(AGENT, &transcript).is_some_and(|proof| Some(proof) != challenge.proof));
        send(&mut spy, &Answer { proof: challenge.proof }).await.unwrap();
        assert!(matches!(admission.await.unwrap(), Err(AuthError::WrongToken)));
    }

    #[tokio::test]
    async fn oversized_unauthenticated_message_is_rejected() {
        let (mut stranger, mut coordinator) = tokio::io::duplex(1 << 16);
        let admission = tokio::spawn(async move { admit(&mut coordinator, None, &Channel::Plain).await });
        // A frame header that announces a long body.
        let mut frame = frame::encode(&Greeting { nonce: [0; 32] }).unwrap();
        frame[8..12].copy_from_slice(&(1_u32 << 19).to_le_bytes());
        frame.resize(1 << 15, 0);
        stranger.write_all(&frame).await.unwrap();
        assert!(admission.await.unwrap().is_err());
    }

    #[test]
    fn short_tokens_are_refused_and_no_token_is_printed() {
        assert!(Token::new(" secret \n").unwrap_err().contains("6 characters"));
        assert_eq!(format!("{:?}", token("a")), "Some(Token(…))");
    }
}
