use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ice_proto::frame::{self, Decoder};
use ice_proto::rendezvous::{Hello, KeepAlive, ToAgent, ToCoordinator};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::Error;
use crate::address;
use crate::auth::{self, AuthError, Token};
use crate::channel::Channel;
use crate::keepalive;
use crate::tls;

/// Pause between two attempts to connect.
const RETRY: Duration = Duration::from_millis(100);

/// How long connecting to the coordinator is retried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// Timeout of all attempts: the coordinator may not have started yet.
    limit: Duration,
    /// Timeout of each address, and of each answer of the coordinator.
    answer_timeout: Duration,
    until_refused: bool,
}

impl RetryPolicy {
    /// Default timeout of an address, and of an answer of the coordinator or of etcd.
    pub const DEFAULT_ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

    /// Retries until `limit`.
    pub fn within(limit: Duration) -> Self {
        Self { limit, answer_timeout: Self::DEFAULT_ANSWER_TIMEOUT, until_refused: false }
    }

    /// Retries until `limit` or until the host refuses the connection.
    pub fn until_refused(limit: Duration) -> Self {
        Self { until_refused: true, ..Self::within(limit) }
    }

    /// Sets the timeout of each address and of each answer.
    #[must_use]
    pub fn answer_timeout(self, answer_timeout: Duration) -> Self {
        Self { answer_timeout, ..self }
    }

    pub(super) fn is_final(self, error: &io::Error) -> bool {
        self.until_refused && error.kind() == io::ErrorKind::ConnectionRefused
    }
}

/// Halves of the connection, plain or inside TLS.
type Reader = Box<dyn AsyncRead + Send + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// An agent's connection to the coordinator.
pub struct Session {
    outgoing: mpsc::UnboundedSender<ToCoordinator>,
    incoming: mpsc::Receiver<Result<ToAgent, Error>>,
    endpoint: String,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Session {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Session {
    /// Connects and says hello. `from` is the source address; `None` leaves it to the system.
    /// Connecting is retried as `retry` says.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if no coordinator answers in time, [`Error::Protocol`] if the peer
    /// speaks another protocol, [`Error::Token`] if the tokens differ or only one side uses TLS.
    pub async fn connect(
        (host, port): (&str, u16),
        from: Option<IpAddr>,
        hello: Hello,
        token: Option<&Token>,
        retry: RetryPolicy,
    ) -> Result<Self, Error> {
        let endpoint = format!("{host}:{port}");
        let limit = retry.limit;
        let deadline = Instant::now() + limit;
        let (reader, writer, decoder) = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let late = || Err(AuthError::Io(io::ErrorKind::TimedOut.into()));
            match timeout(left, open((host, port), from, token, retry.answer_timeout))
                .await
                .unwrap_or_else(|_| late())
            {
                Ok(opened) => break opened,
                Err(AuthError::Io(source))
                    if retry.is_final(&source) || Instant::now() + RETRY >= deadline =>
                {
                    return Err(Error::Unreachable { endpoint, timeout: limit, source });
                }
                Err(AuthError::Io(_)) => sleep(RETRY).await,
                Err(AuthError::Frame(source)) => return Err(Error::Protocol { endpoint, source }),
                Err(error) => return Err(Error::Token { endpoint, problem: error.to_string() }),
            }
        };
        let keep_alive = hello.keep_alive;
        let (outgoing, to_send) = mpsc::unbounded_channel();
        let (received, incoming) = mpsc::channel(64);
        // Fails only after the writer has ended, which [`Session::recv`] reports.
        let _ = outgoing.send(ToCoordinator::Hello(hello));
        let tasks = [
            tokio::spawn(write(writer, to_send, keep_alive)),
            tokio::spawn(read(reader, decoder, received, endpoint.clone(), keep_alive)),
        ];
        Ok(Self { outgoing, incoming, endpoint, tasks })
    }

    /// Queues a message. [`Session::recv`] reports a lost connection.
    pub fn send(&self, message: ToCoordinator) {
        let _ = self.outgoing.send(message);
    }

    /// Waits until all queued messages are written, then closes the connection.
    pub async fn finish(mut self) {
        let (closed, _) = mpsc::unbounded_channel();
        self.outgoing = closed;
        let _ = timeout(Duration::from_secs(1), &mut self.tasks[0]).await;
    }

    /// Receives the next message. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Protocol`]; the session is unusable after either.
    pub async fn recv(&mut self) -> Result<ToAgent, Error> {
        self.incoming.recv().await.unwrap_or_else(|| Err(Error::Lost { endpoint: self.endpoint.clone() }))
    }
}

async fn write(
    mut writer: Writer,
    mut to_send: mpsc::UnboundedReceiver<ToCoordinator>,
    keep_alive: KeepAlive,
) {
    loop {
        let message = match timeout(keep_alive.interval, to_send.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(_) => ToCoordinator::KeepAlive,
        };
        match frame::encode(&message) {
            Ok(frame) if writer.write_all(&frame).await.is_ok() && writer.flush().await.is_ok() => {}
            Ok(_) => return,
            Err(error) => tracing::error!(%error, "a message to the coordinator was not sent"),
        }
    }
    let _ = writer.shutdown().await;
}

async fn open(
    (host, port): (&str, u16),
    from: Option<IpAddr>,
    token: Option<&Token>,
    answer_timeout: Duration,
) -> Result<(Reader, Writer, Decoder), AuthError> {
    let stream = address::connect(host, port, from, answer_timeout).await?;
    stream.set_nodelay(true)?;
    timeout(answer_timeout, greet(stream, token)).await.map_err(io::Error::from)?
}

async fn greet(mut stream: TcpStream, token: Option<&Token>) -> Result<(Reader, Writer, Decoder), AuthError> {
    if token.is_some_and(Token::is_over_tls) {
        let (mut stream, channel) = tls::connect(stream).await?;
        let decoder = auth::greet(&mut stream, token, &channel).await?;
        let (reader, writer) = tokio::io::split(stream);
        return Ok((Box::new(reader), Box::new(writer), decoder));
    }
    let decoder = auth::greet(&mut stream, token, &Channel::Plain).await?;
    let (reader, writer) = stream.into_split();
    Ok((Box::new(reader), Box::new(writer), decoder))
}

async fn read(
    mut reader: Reader,
    mut decoder: Decoder,
    received: mpsc::Sender<Result<ToAgent, Error>>,
    endpoint: String,
    keep_alive: KeepAlive,
) {
    let mut buffer = vec![0; 4096];
    loop {
        loop {
            let message = match decoder.next_message() {
                Ok(Some(ToAgent::KeepAlive)) => continue,
                Ok(Some(message)) => Ok(message),
                Ok(None) => break,
                Err(source) => Err(Error::Protocol { endpoint: endpoint.clone(), source }),
            };
            let last = message.is_err();
            if received.send(message).await.is_err() || last {
                return;
            }
        }
        match keepalive::read(keep_alive, &mut reader, &mut buffer).await {
            Ok(read @ 1..) => decoder.feed(&buffer[..read]),
            _ => break,
        }
    }
    let _ = received.send(Err(Error::Lost { endpoint })).await;
}
