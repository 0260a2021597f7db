//! A connection to one member of etcd: calls of gRPC over HTTP/2, plain or inside TLS.
//!
//! <https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md>

use std::io::{self, Cursor};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use h2::RecvStream;
use h2::client::{Builder, SendRequest};
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;

use super::endpoint::Endpoint;
use super::fault::Fault;
use crate::{address, server};

/// Maximum length of an answer in bytes. etcd's default limit of a request is 1.5 MiB, and an
/// answer has at most two values.
pub(super) const MAX_ANSWER: usize = 8 << 20;
/// Maximum length of an answer's headers in bytes.
const MAX_HEADERS: u32 = 64 << 10;
/// Flow control window of streams and of the connection, in bytes.
const WINDOW: u32 = 1 << 20;
/// Length of the flag and the length in front of each message.
const PREFIX: usize = 5;

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

pub(super) struct Connection {
    requests: SendRequest<Cursor<Vec<u8>>>,
    /// Task that reads from and writes to the connection.
    driver: JoinHandle<()>,
    diagnostics: Diagnostics,
    /// The endpoint as a URL.
    url: String,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    pub(super) async fn open(
        endpoint: &Endpoint,
        tls: Option<&Arc<ClientConfig>>,
        answer: Duration,
    ) -> Result<Self, Fault> {
        let stream = address::connect(&endpoint.host, endpoint.port, None, answer).await?;
        stream.set_nodelay(true)?;
        let stream: Box<dyn Stream> = match tls.filter(|_| endpoint.is_https) {
            None => Box::new(stream),
            Some(config) => {
                let name = ServerName::try_from(endpoint.host.clone())
                    .map_err(|_| Fault::Foreign(format!("TLS knows no host `{}`", endpoint.host)))?;
                Box::new(TlsConnector::from(config.clone()).connect(name, stream).await?)
            }
        };
        let diagnostics = Diagnostics::default();
        let stream = ObservedStream { stream, diagnostics: diagnostics.clone() };
        let handshake = Builder::new()
            .enable_push(false)
            .initial_window_size(WINDOW)
            .initial_connection_window_size(WINDOW)
            .max_header_list_size(MAX_HEADERS)
            .handshake(stream);
        let (requests, connection) = handshake.await.map_err(|error| diagnostics.fault(error))?;
        let driver = tokio::spawn(async move {
            // Calls on this connection fail with the same error.
            let _ = connection.await;
        });
        Ok(Self { requests, driver, diagnostics, url: endpoint.url.clone() })
    }

    /// Calls a method with a message, and returns the first message of the answer. The connection
    /// is unusable after an error other than etcd's own.
    pub(super) async fn call(
        &mut self,
        method: &str,
        token: Option<&HeaderValue>,
        message: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        let diagnostics = self.diagnostics.clone();
        let fault = |error: h2::Error| diagnostics.fault(error);
        let length = u32::try_from(message.len())
            .map_err(|_| Fault::Foreign("a message of 4 GiB cannot be sent".into()))?;
        let mut body = Vec::with_capacity(PREFIX + message.len());
        body.push(0);
        body.extend_from_slice(&length.to_be_bytes());
        body.extend_from_slice(message);
        let mut request = Request::post(format!("{}{method}", self.url))
            .header(header::CONTENT_TYPE, "application/grpc")
            .header(header::TE, "trailers");
        if let Some(token) = token {
            request = request.header("token", token);
        }
        let request = request.body(()).map_err(|error| Fault::Foreign(error.to_string()))?;
        let mut requests = self.requests.clone().ready().await.map_err(fault)?;
        let (response, mut outgoing) = requests.send_request(request, false).map_err(fault)?;
        outgoing.send_data(Cursor::new(body), true).map_err(fault)?;
        let (head, body) = response.await.map_err(fault)?.into_parts();
        let is_grpc = head
            .headers
            .get(header::CONTENT_TYPE)
            .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
        if head.status != StatusCode::OK || !is_grpc {
            return Err(not_grpc(head.status, body).await);
        }
        // An error without a message may have headers only.
        if let Some(status) = status(&head.headers) {
            return Err(status.err().unwrap_or_else(no_message));
        }
        self.receive(body).await
    }

    async fn receive(&self, mut body: RecvStream) -> Result<Vec<u8>, Fault> {
        let mut received = Vec::new();
        while let Some(piece) = body.data().await {
            let piece = piece.map_err(|error| self.diagnostics.fault(error))?;
            if received.len() + piece.len() > MAX_ANSWER {
                return Err(too_long());
            }
            received.extend_from_slice(&piece);
            // Rejects an announced length over the limit before its bytes arrive.
            if let Some((prefix, _)) = received.split_first_chunk::<PREFIX>()
                && length(prefix)? > MAX_ANSWER - PREFIX
            {
                return Err(too_long());
            }
            let _ = body.flow_control().release_capacity(piece.len());
        }
        let trailers = body.trailers().await.map_err(|error| self.diagnostics.fault(error))?;
        status(&trailers.unwrap_or_default())
            .unwrap_or_else(|| Err(Fault::Unreachable("its answer ended without a status".into())))?;
        let (prefix, rest) = received.split_first_chunk::<PREFIX>().ok_or_else(no_message)?;
        match rest.get(..length(prefix)?) {
            Some(message) => Ok(message.into()),
            None => Err(Fault::Foreign("its answer is shorter than it says".into())),
        }
    }
}

/// Reads the length of a message from its prefix.
fn length(prefix: &[u8; PREFIX]) -> Result<usize, Fault> {
    let [flag, length @ ..] = *prefix;
    match flag {
        0 => Ok(u32::from_be_bytes(length) as usize),
        _ => Err(Fault::Foreign("its answer is compressed, or not one of gRPC".into())),
    }
}

/// Returns the outcome of a call; `None` if these headers have no status.
fn status(fields: &HeaderMap) -> Option<Result<(), Fault>> {
    let code = fields.get("grpc-status")?;
    let code = code.to_str().ok().and_then(|code| code.parse().ok());
    let message = fields.get("grpc-message").map(|message| shown(&decoded(message.as_bytes())));
    let message = message.unwrap_or_default();
    Some(match code {
        Some(0) => Ok(()),
        Some(code) => Err(Fault::Etcd { code, message }),
        None => Err(Fault::Foreign("the status of its answer is not a number".into())),
    })
}

/// Decodes percent-encoding. A `%` without two hexadecimal digits stays.
fn decoded(text: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    let escaped = |text: &[u8]| match *text {
        [b'%', high, low, ..] => u8::try_from(digit(high)? * 16 + digit(low)?).ok(),
        _ => None,
    };
    let (mut rest, mut decoded) = (text, Vec::with_capacity(text.len()));
    while let Some(&first) = rest.first() {
        let (byte, length) = escaped(rest).map_or((first, 1), |byte| (byte, 3));
        decoded.push(byte);
        rest = &rest[length..];
    }
    decoded
}

/// Classifies the answer of a server that does not speak gRPC.
async fn not_grpc(status: StatusCode, mut body: RecvStream) -> Fault {
    // Only the first piece of the body is read, for the message.
    let said = match body.data().await {
        Some(Ok(piece)) => quoted(&piece),
        _ => String::new(),
    };
    let said = format!("HTTP {status}{said}");
    match status {
        StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_MANY_REQUESTS => Fault::Unreachable(said),
        _ if status.is_server_error() => Fault::Unreachable(said),
        _ => Fault::Foreign(format!("{said}: it does not answer as etcd's gRPC")),
    }
}

fn no_message() -> Fault {
    Fault::Foreign("its answer holds no message".into())
}

fn too_long() -> Fault {
    Fault::Foreign(format!("its answer is longer than {} MiB", MAX_ANSWER >> 20))
}

/// Returns the beginning of foreign text in one line, without control characters.
fn shown(text: &[u8]) -> String {
    const LENGTH: usize = 200;
    let text = String::from_utf8_lossy(&text[..text.len().min(4 * LENGTH)]);
    let text: String = text.split_whitespace().collect::<Vec<_>>().join(" ");
    text.chars().filter(|c| !c.is_control()).take(LENGTH).collect()
}

fn quoted(text: &[u8]) -> String {
    let text = shown(text);
    if text.is_empty() { text } else { format!(": `{text}`") }
}

/// Observations below HTTP/2, which errors of h2 do not contain. Shared by the stream and the
/// connection.
#[derive(Clone, Default)]
struct Diagnostics(Arc<Mutex<Observed>>);

#[derive(Default)]
struct Observed {
    /// The first bytes received.
    first: Option<Vec<u8>>,
    fault: Option<Fault>,
}

impl Diagnostics {
    fn fault(&self, error: h2::Error) -> Fault {
        let mut observed = server::locked(&self.0);
        if let Some(fault) = observed.fault.take() {
            return fault;
        }
        match observed.first.as_deref() {
            None | Some([]) => {
                let why = "it closed the connection without an answer; if it has TLS, give protocol=https \
                           and cacert with --rdzv-conf";
                return Fault::Unreachable(why.into());
            }
            Some(first) if first.starts_with(b"HTTP/") => {
                let line = first.split(|byte| *byte == b'\n').next().unwrap_or_default();
                return Fault::Foreign(format!("it speaks HTTP/1 and not etcd's gRPC{}", quoted(line)));
            }
            // An alert of TLS.
            Some([0x15, 3, ..]) => {
                let why = "it speaks TLS alone: give protocol=https and cacert with --rdzv-conf";
                return Fault::Foreign(why.into());
            }
            _ => {}
        }
        if error.is_library() {
            return Fault::Foreign(format!("it does not speak HTTP/2, as etcd's gRPC does ({error})"));
        }
        Fault::Unreachable(error.to_string())
    }
}

/// A stream that records its first bytes and its first error.
struct ObservedStream {
    stream: Box<dyn Stream>,
    diagnostics: Diagnostics,
}

impl ObservedStream {
    fn see<T>(&self, outcome: io::Result<T>) -> io::Result<T> {
        outcome.map_err(|error| {
            let kind = error.kind();
            let fault = Fault::from(error);
            let again = io::Error::new(kind, fault.to_string());
            server::locked(&self.diagnostics.0).fault.get_or_insert(fault);
            again
        })
    }
}

impl AsyncRead for ObservedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let outcome = ready!(Pin::new(&mut self.stream).poll_read(context, buffer));
        let mut observed = server::locked(&self.diagnostics.0);
        if observed.first.is_none() {
            let come = &buffer.filled()[before..];
            observed.first = Some(come[..come.len().min(100)].into());
        }
        drop(observed);
        Poll::Ready(self.see(outcome))
    }
}

impl AsyncWrite for ObservedStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_errors_are_decoded_and_harmless() {
        for (message, expected) in [
            ("etcdserver: no leader", "etcdserver: no leader"),
            ("50%25 of %E2%82%AC%0A", "50% of €"),
            ("%%41%4", "%A%4"),
            ("%1B[2J%00", "[2J"),
        ] {
            assert_eq!(shown(&decoded(message.as_bytes())), expected);
        }
        let mut fields = HeaderMap::new();
        assert!(status(&fields).is_none());
        for (code, expected) in [
            ("0", Ok(())),
            ("14", Err(Fault::Etcd { code: 14, message: String::new() })),
            ("none", Err(Fault::Foreign("the status of its answer is not a number".into()))),
        ] {
            fields.insert("grpc-status", HeaderValue::from_static(code));
            assert_eq!(status(&fields), Some(expected));
        }
    }
}
