//! Who comes: connections are strangers until they have shown what they are.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ice_proto::frame;
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

use super::agents::{self, Input, Speech};
use super::{Shared, clients, locked};
use crate::store::codec::{VALIDATE, VALIDATION_MAGIC};
use crate::tls;

/// How long a stranger has to show what it is.
const PATIENCE: Duration = Duration::from_secs(30);
/// Strangers at a time; beyond them the one that has been here for longest goes, once it has had the time that an honest one needs.
const STRANGERS: usize = 1024;
/// That time. All agents of a large job come at once, and are as many as there are nodes.
const GRACE: Duration = Duration::from_secs(2);
/// Strangers at a time, however new they are.
const MOST_STRANGERS: usize = 32 << 10;

/// Descriptors that are left to the rest of the process, where there are so many.
const RESERVED: u64 = 512;

/// How many connections there may be at a time.
fn room() -> usize {
    use nix::sys::resource::{Resource, getrlimit};
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((1024, 1024));
    usize::try_from(soft.saturating_sub(RESERVED).max(soft / 2)).unwrap_or(usize::MAX)
}

/// Connections that have not shown what they are, by arrival.
#[derive(Clone, Default)]
struct Strangers(Arc<Mutex<BTreeMap<u64, (Instant, AbortHandle)>>>);

impl Strangers {
    fn add(&self, id: u64, task: AbortHandle) {
        let mut strangers = locked(&self.0);
        // It may have been quick.
        if !task.is_finished() {
            strangers.insert(id, (Instant::now(), task));
        }
        let first =
            |strangers: &BTreeMap<_, (Instant, _)>| strangers.first_key_value().map(|(_, (since, _))| *since);
        while let Some(since) = first(&strangers) {
            let most = if since.elapsed() > GRACE { STRANGERS } else { MOST_STRANGERS };
            if strangers.len() <= most {
                break;
            }
            if let Some((_, (_, task))) = strangers.pop_first() {
                task.abort();
            }
        }
    }

    /// Ends the one that has been here for longest.
    fn send_away(&self) {
        if let Some((_, (_, task))) = locked(&self.0).pop_first() {
            task.abort();
        }
    }

    fn remove(&self, id: u64) {
        locked(&self.0).remove(&id);
    }
}

pub(super) struct Door {
    shared: Arc<Shared>,
    coordinator: mpsc::Sender<Input>,
    strangers: Strangers,
    next: AtomicU64,
    /// For each connection one.
    room: Arc<Semaphore>,
}

impl Door {
    pub(super) fn new(shared: Arc<Shared>, coordinator: mpsc::Sender<Input>) -> Self {
        let room = Arc::new(Semaphore::new(room().min(Semaphore::MAX_PERMITS)));
        Self { shared, coordinator, strangers: Strangers::default(), next: AtomicU64::new(0), room }
    }

    /// Lets in who comes, for ever.
    pub(super) async fn serve(self: Arc<Self>, listener: TcpListener) {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => self.open(stream, peer),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    // Out of descriptors: those that say nothing make room, others get the time to end.
                    self.strangers.send_away();
                    sleep(Duration::from_millis(10)).await;
                }
            }
        }
    }

    fn open(&self, mut stream: TcpStream, peer: SocketAddr) {
        let Ok(place) = Arc::clone(&self.room).try_acquire_owned() else {
            // The next one finds the room that this makes.
            self.strangers.send_away();
            return tracing::warn!(%peer, "there are too many connections: one was turned away");
        };
        let _ = stream.set_nodelay(true);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (shared, coordinator) = (Arc::clone(&self.shared), self.coordinator.clone());
        let strangers = self.strangers.clone();
        let task = tokio::spawn(async move {
            let _place = place;
            // Boxed, since they are large, and most connections are ranks'.
            let meeting = Box::pin(timeout(PATIENCE, meet(&mut stream, peer, &shared)));
            let result = match meeting.await {
                Err(_) => Err(io::ErrorKind::TimedOut.into()),
                Ok(Err(error)) => Err(error),
                Ok(Ok(Kind::Rank)) => {
                    strangers.remove(id);
                    let error = clients::Serve::new(shared, id, stream).await;
                    if clients::is_fault(&error) {
                        tracing::error!(%peer, %error, "the host ended a connection to the store");
                    }
                    Err(error)
                }
                Ok(Ok(Kind::Agent(speech))) => {
                    let known = || strangers.remove(id);
                    Box::pin(agents::serve(&shared, id, (stream, peer), speech, coordinator, known)).await
                }
            };
            strangers.remove(id);
            if let Err(error) = result {
                tracing::debug!(%peer, %error, "a connection was ended");
            }
        });
        self.strangers.add(id, task.abort_handle());
    }
}

enum Kind {
    Agent(Speech),
    /// It has validated.
    Rank,
}

/// Finds out what a stranger is.
async fn meet(stream: &mut TcpStream, peer: SocketAddr, shared: &Shared) -> io::Result<Kind> {
    let mut first = [0; 5];
    stream.peek(&mut first[..1]).await?;
    match first[0] {
        byte if byte == frame::MAGIC[0] => return Ok(Kind::Agent(Speech::Plain)),
        tls::HANDSHAKE => return Ok(Kind::Agent(Speech::Tls)),
        VALIDATE => stream.read_exact(&mut first).await?,
        _ => return Err(io::Error::other("neither an agent nor a rank")),
    };
    if first[1..] != VALIDATION_MAGIC.to_le_bytes() {
        return Err(io::Error::other("neither an agent nor a rank"));
    }
    if !shared.is_guest(peer.ip()) {
        tracing::warn!(%peer, "a client of the store was turned away: no agent with the token runs there");
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    Ok(Kind::Rank)
}

#[cfg(test)]
mod tests {
    use ice_proto::rendezvous::KeepAlive;
    use tokio::io::{AsyncRead, AsyncWriteExt};

    use super::*;
    use crate::auth::{Token, greet};

    /// A door for agents with a token and TLS, where it is, and what comes in.
    async fn door() -> (Arc<Door>, SocketAddr, mpsc::Receiver<Input>) {
        let shared = Shared::new(Some(token()), KeepAlive::default()).unwrap();
        let (coordinator, inputs) = mpsc::channel(16);
        let door = Arc::new(Door::new(Arc::new(shared), coordinator));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(Arc::clone(&door).serve(listener));
        (door, address, inputs)
    }

    fn token() -> Token {
        Token::new("sixteen characters").unwrap().over_tls()
    }

    fn strangers(door: &Door) -> usize {
        locked(&door.strangers.0).len()
    }

    #[tokio::test]
    async fn an_agent_is_a_stranger_until_it_has_shown_that_it_knows_the_token() {
        for (token, is_known) in [(Token::new("eighteen characters").unwrap(), false), (token(), true)] {
            let (door, address, mut inputs) = door().await;
            let stream = TcpStream::connect(address).await.unwrap();
            let (mut stream, channel) = tls::connect(stream).await.unwrap();
            assert_eq!(greet(&mut stream, Some(&token), &channel).await.is_ok(), is_known);
            if is_known {
                assert!(matches!(inputs.recv().await, Some(Input::Opened(..))));
            }
            assert_eq!(strangers(&door), usize::from(!is_known));
        }
    }

    #[tokio::test]
    async fn many_may_come_at_once_and_the_silent_ones_go_when_more_come() {
        tokio::time::pause();
        let strangers = Strangers::default();
        let come = |ids: std::ops::Range<u64>| {
            for id in ids {
                strangers.add(id, tokio::spawn(std::future::pending::<()>()).abort_handle());
            }
            locked(&strangers.0).len()
        };
        let (many, all) = (STRANGERS as u64 * 3, MOST_STRANGERS as u64 + 9);
        assert_eq!(come(0..many), many as usize);
        tokio::time::advance(GRACE * 2).await;
        // The old ones go, and what is left is the newest.
        assert_eq!(come(many..many + 1), STRANGERS);
        assert!(locked(&strangers.0).contains_key(&many) && !locked(&strangers.0).contains_key(&0));
        assert_eq!(come(many + 1..many + all), MOST_STRANGERS);
    }

    #[tokio::test]
    async fn who_goes_no_further_is_sent_away() {
        let (door, address, _inputs) = door().await;
        let half = TcpStream::connect(address).await.unwrap();
        half.try_write(&[tls::HANDSHAKE, 3, 1, 0, 200, 1]).unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let (whole, _) = tls::connect(stream).await.unwrap();
        assert_eq!(strangers(&door), 2);
        // From here on time passes as soon as nobody does anything.
        tokio::time::pause();
        for mut stream in [Box::new(half) as Box<dyn AsyncRead + Unpin>, Box::new(whole)] {
            let _ = timeout(PATIENCE, stream.read_to_end(&mut Vec::new())).await.expect("it is still there");
        }
        assert_eq!(strangers(&door), 0);
    }

    #[tokio::test]
    async fn one_that_asks_in_another_way_is_answered_and_sent_away() {
        let (door, address, _inputs) = door().await;
        let mut streams = Vec::new();
        for _ in 0..2 {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"ICE\x01").await.unwrap();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).await.unwrap();
            assert!(tls::is_refusal(answer.first_chunk().unwrap()), "{answer:?}");
            streams.push(stream);
        }
        // One does not stop talking, and one stays and is silent.
        while streams[0].write_all(&[0; 512]).await.is_ok() {
            tokio::task::yield_now().await;
        }
        assert_eq!(strangers(&door), 1);
        tokio::time::pause();
        sleep(PATIENCE).await;
        assert_eq!(strangers(&door), 0);
    }
}
