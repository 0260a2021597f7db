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
use crate::alive;
use crate::auth::{self, AuthError, Channel, Token};
use crate::tls;

/// Pause between two attempts to connect.
const RETRY: Duration = Duration::from_millis(100);

/// How long a coordinator that does not answer is tried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Patience {
    /// In all, since it may not have started.
    limit: Duration,
    /// One address, and the coordinator that was reached there.
    answer: Duration,
    until_refused: bool,
}

impl Patience {
    /// How long an address, a coordinator or etcd is waited for unless the user says otherwise.
    pub const ANSWER: Duration = Duration::from_secs(5);

    /// So long in all.
    pub fn wait(limit: Duration) -> Self {
        Self { limit, answer: Self::ANSWER, until_refused: false }
    }

    /// The same, unless its host says that it is not there.
    pub fn until_refused(limit: Duration) -> Self {
        Self { until_refused: true, ..Self::wait(limit) }
    }

    /// With so long for each address, and for the coordinator that was reached there.
    #[must_use]
    pub fn answer(self, answer: Duration) -> Self {
        Self { answer, ..self }
    }

    pub(super) fn is_over(self, error: &io::Error) -> bool {
        self.until_refused && error.kind() == io::ErrorKind::ConnectionRefused
    }
}

/// Plain or inside of TLS.
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
    /// Connects and says hello, from one of this host's addresses where that is given; tries again as long as the patience
    /// lasts.
    ///
    /// # Errors
    /// [`Error::Unreachable`] where nobody answers in time, [`Error::Protocol`] where something else does, [`Error::Token`] where
    /// the tokens differ, or one of the two wants TLS and the other has none.
    pub async fn connect(
        (host, port): (&str, u16),
        from: Option<IpAddr>,
        hello: Hello,
        token: Option<&Token>,
        patience: Patience,
    ) -> Result<Self, Error> {
        let endpoint = format!("{host}:{port}");
        let limit = patience.limit;
        let deadline = Instant::now() + limit;
        let (reader, writer, decoder) = loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let late = || Err(AuthError::Io(io::ErrorKind::TimedOut.into()));
            match timeout(left, open((host, port), from, token, patience.answer))
                .await
                .unwrap_or_else(|_| late())
            {
                Ok(opened) => break opened,
                Err(AuthError::Io(source))
                    if patience.is_over(&source) || Instant::now() + RETRY >= deadline =>
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
        // A send to a session that is lost is reported by its receiver.
        let _ = outgoing.send(ToCoordinator::Hello(hello));
        let tasks = [
            tokio::spawn(write(writer, to_send, keep_alive)),
            tokio::spawn(read(reader, decoder, received, endpoint.clone(), keep_alive)),
        ];
        Ok(Self { outgoing, incoming, endpoint, tasks })
    }

    /// Sends a message. A lost connection shows in [`Session::recv`].
    pub fn send(&self, message: ToCoordinator) {
        let _ = self.outgoing.send(message);
    }

    /// Waits until what was sent is on its way, then ends the connection.
    pub async fn finish(mut self) {
        let (closed, _) = mpsc::unbounded_channel();
        self.outgoing = closed;
        let _ = timeout(Duration::from_secs(1), &mut self.tasks[0]).await;
    }

    /// The next message. Cancel-safe.
    ///
    /// # Errors
    /// [`Error::Lost`] or [`Error::Protocol`]; the session is of no use after one.
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
    answer: Duration,
) -> Result<(Reader, Writer, Decoder), AuthError> {
    let stream = address::connect(host, port, from, answer).await?;
    stream.set_nodelay(true)?;
    timeout(answer, greet(stream, token)).await.map_err(io::Error::from)?
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
        match alive::read(keep_alive, &mut reader, &mut buffer).await {
            Ok(read @ 1..) => decoder.feed(&buffer[..read]),
            _ => break,
        }
    }
    let _ = received.send(Err(Error::Lost { endpoint })).await;
}
