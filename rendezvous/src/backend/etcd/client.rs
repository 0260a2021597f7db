//! Calls to etcd, sent to any member that answers.
//!
//! A call may be executed more than once: if a connection is lost, the request may have arrived and
//! only the answer be lost. Callers make sure that a repeated call is harmless.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use http::HeaderValue;
use rustls::ClientConfig;
use tokio::time::timeout;

use super::EtcdConfig;
use super::endpoint::{self, Endpoint};
use super::fault::Fault;
use super::grpc::Connection;
use super::messages::{
    Answer, Authenticate, Get, GetResult, LeaseGrant, LeaseKeepAlive, LeaseRevoke, Request, Token, Txn,
    TxnResult,
};

/// State that all clones share.
struct Shared {
    endpoints: Vec<Endpoint>,
    tls: Option<Arc<ClientConfig>>,
    /// User name and password.
    user: Option<(String, String)>,
    /// Timeout of a call.
    answer: Duration,
    /// Index of the endpoint that the next call tries first.
    next: AtomicUsize,
}

/// A client of etcd. Each clone has a connection of its own.
pub(super) struct Client {
    shared: Arc<Shared>,
    /// The connection and the index of its endpoint; `None` while a call is in progress.
    connection: Option<(usize, Connection)>,
    /// Token of the authenticated user, sent with each call.
    token: Option<HeaderValue>,
}

impl Clone for Client {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), connection: None, token: self.token.clone() }
    }
}

impl Client {
    /// Creates a client, which connects on the first call.
    ///
    /// # Errors
    /// The invalid endpoint or certificate, and why it is invalid.
    pub(super) fn new(config: &EtcdConfig, answer: Duration) -> Result<Self, String> {
        let endpoints: Result<Vec<_>, _> = config.endpoints.iter().map(|url| Endpoint::parse(url)).collect();
        let (endpoints, next) = (endpoints?, AtomicUsize::new(0));
        let tls = endpoint::client_config(config)?;
        let shared = Arc::new(Shared { endpoints, tls, user: config.user.clone(), answer, next });
        Ok(Self { shared, connection: None, token: None })
    }

    pub(super) fn endpoints(&self) -> &[Endpoint] {
        &self.shared.endpoints
    }

    pub(super) async fn get(&mut self, key: &str) -> Result<GetResult, Fault> {
        self.call(&Get { key: key.into() }).await
    }

    pub(super) async fn txn(&mut self, txn: &Txn) -> Result<TxnResult, Fault> {
        self.call(txn).await
    }

    /// Creates a lease, and returns its number.
    pub(super) async fn lease_grant(&mut self, seconds: i64) -> Result<i64, Fault> {
        match self.call(&LeaseGrant { ttl: seconds }).await?.id {
            0 => Err(Fault::Foreign("it grants a lease without a number".into())),
            lease => Ok(lease),
        }
    }

    pub(super) async fn lease_revoke(&mut self, lease: i64) -> Result<(), Fault> {
        self.call(&LeaseRevoke { lease }).await
    }

    /// Renews a lease. Returns whether it still existed.
    pub(super) async fn lease_keep_alive(&mut self, lease: i64) -> Result<bool, Fault> {
        // The method is a stream of renewals; this call ends it after the first.
        match self.call(&LeaseKeepAlive { lease }).await {
            Ok(renewed) => Ok(renewed.ttl > 0),
            Err(fault) if fault.is_missing() => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    /// Tries one endpoint after the other, and returns the first answer.
    pub(super) async fn call<R: Request>(&mut self, request: &R) -> Result<R::Answer, Fault> {
        let message = request.write().finish();
        let limit = self.shared.answer;
        let late = || Fault::Unreachable(format!("no answer within {limit:?}"));
        let asked = timeout(limit, self.ask_all(R::METHOD, &message));
        read(&asked.await.unwrap_or_else(|_| Err(late()))?)
    }

    async fn ask_all(&mut self, method: &str, message: &[u8]) -> Result<Vec<u8>, Fault> {
        let shared = self.shared.clone();
        let count = shared.endpoints.len();
        let mut last: Option<Fault> = None;
        for _ in 0..count {
            let index = shared.next.load(Ordering::Relaxed) % count;
            // If this call is dropped while it waits for a silent endpoint, the next call starts
            // with another one.
            shared.next.store(index + 1, Ordering::Relaxed);
            let fault = match self.ask(index, method, message).await {
                Ok(answer) => {
                    shared.next.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(fault) if !fault.is_of_one_member() => {
                    shared.next.store(index, Ordering::Relaxed);
                    return Err(fault);
                }
                Err(fault) if count == 1 => fault,
                Err(fault) => fault.at(&shared.endpoints[index].url),
            };
            // Keeps a failure that a retry may fix, although another endpoint is wrong for good.
            last = Some(match last {
                Some(before) if fault.is_final() && !before.is_final() => before,
                _ => fault,
            });
        }
        Err(last.unwrap_or_else(|| Fault::Foreign("no endpoint was given".into())))
    }

    /// Sends a call to one endpoint, with a token if etcd requires one. Authenticates again if the
    /// token has expired.
    async fn ask(&mut self, index: usize, method: &str, message: &[u8]) -> Result<Vec<u8>, Fault> {
        let shared = self.shared.clone();
        let Some((name, password)) = &shared.user else {
            return self.send(index, method, None, message).await;
        };
        if let Some(token) = self.token.clone() {
            match self.send(index, method, Some(&token), message).await {
                Err(fault) if fault.is_old_token() => self.token = None,
                answer => return answer,
            }
        }
        let credentials = Authenticate { name, password }.write().finish();
        let Token(token) = read(&self.send(index, Authenticate::METHOD, None, &credentials).await?)?;
        let mut token = HeaderValue::from_maybe_shared(token)
            .map_err(|_| Fault::Foreign("its token cannot be sent back".into()))?;
        token.set_sensitive(true);
        self.token = Some(token.clone());
        self.send(index, method, Some(&token), message).await
    }

    async fn send(
        &mut self,
        index: usize,
        method: &str,
        token: Option<&HeaderValue>,
        message: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        if let Some((_, connection)) = self.connection.take().filter(|(kept, _)| *kept == index) {
            match self.send_over(index, connection, method, token, message).await {
                // etcd may have restarted since the last call, or an idle connection was closed.
                Err(Fault::Unreachable(_)) => {}
                answer => return answer,
            }
        }
        let shared = self.shared.clone();
        let connection =
            Connection::open(&shared.endpoints[index], shared.tls.as_ref(), shared.answer).await?;
        self.send_over(index, connection, method, token, message).await
    }

    /// Sends a call, and keeps the connection if etcd has answered.
    async fn send_over(
        &mut self,
        index: usize,
        mut connection: Connection,
        method: &str,
        token: Option<&HeaderValue>,
        message: &[u8],
    ) -> Result<Vec<u8>, Fault> {
        let answer = connection.call(method, token, message).await;
        if matches!(answer, Ok(_) | Err(Fault::Etcd { .. })) {
            self.connection = Some((index, connection));
        }
        answer
    }
}

impl Fault {
    fn at(self, url: &str) -> Self {
        match self {
            Self::Etcd { code, message } => Self::Etcd { code, message: format!("{url}: {message}") },
            Self::Unreachable(why) => Self::Unreachable(format!("{url}: {why}")),
            Self::Foreign(why) => Self::Foreign(format!("{url}: {why}")),
        }
    }
}

fn read<A: Answer>(message: &[u8]) -> Result<A, Fault> {
    A::read(message).map_err(|error| Fault::Foreign(format!("its answer cannot be read: {error}")))
}

#[cfg(test)]
mod tests;
