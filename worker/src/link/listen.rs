//! What the agent says, and what comes of it.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ice_c10d::signals;
use ice_proto::env::{RankEnv, TORCHELASTIC_ERROR_FILE};
use ice_proto::frame::Decoder;
use ice_proto::link::{Down, Request, Up};

use super::Inner;
use super::state::State;
use crate::agree;

/// How long a rank may take to find out by itself that its round is over.
const BROKEN_PATIENCE: Duration = Duration::from_secs(5);

impl Inner {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn heartbeat(&self) -> Up {
        Up::Heartbeat {
            step: self.step.load(Ordering::Relaxed),
            activity: self.activity.count(),
            doing: self.activity.doing(),
            applied_ms: self.applied_ms.load(Ordering::Relaxed),
        }
    }

    pub(super) fn listen(self: &Arc<Self>, mut stream: UnixStream) {
        let mut decoder = Decoder::new();
        let mut buffer = [0; 4096];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => decoder.feed(&buffer[..n]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            }
            loop {
                match decoder.next_message::<Down>() {
                    Ok(Some(Down::Ask(request))) => _ = self.requests.send(request),
                    Ok(Some(Down::RoundBroken { round, reason })) => {
                        tracing::debug!(round, reason, "the round is over");
                        self.broken(round);
                    }
                    Ok(Some(Down::Round { variables })) => self.given(&variables),
                    Ok(Some(Down::End { reason })) => {
                        tracing::debug!(reason, "the job is over");
                        let mut state = self.state();
                        state.ended = true;
                        let round = state.round.unwrap_or(0);
                        drop(state);
                        self.broken(round);
                    }
                    Ok(Some(Down::Terminate)) => signals::end_by_termination(),
                    Ok(None) => break,
                    Err(error) => {
                        tracing::error!(%error, "the link to the agent is unusable");
                        process::exit(1);
                    }
                }
            }
        }
        if !self.leaving.load(Ordering::SeqCst) {
            tracing::error!("the agent is gone: leaving");
            process::exit(1);
        }
        // A process that outlives its rank is its own again.
        signals::restore();
    }

    fn given(&self, variables: &BTreeMap<String, String>) {
        match RankEnv::read(|name| variables.get(name).cloned()) {
            Ok(Some(env)) => {
                let mut state = self.state();
                state.error_file = variables.get(TORCHELASTIC_ERROR_FILE).map(PathBuf::from);
                state.given = Some(env);
                drop(state);
                self.changed.notify_all();
            }
            wrong => {
                tracing::error!(?wrong, "the agent's next round cannot be understood");
                process::exit(1);
            }
        }
    }

    /// A round is over.
    fn broken(self: &Arc<Self>, round: u64) {
        let mut state = self.state();
        state.over = state.over.max(Some(round));
        let is_current = state.round.is_none_or(|current| current <= round);
        drop(state);
        self.changed.notify_all();
        if is_current {
            self.part(round);
        }
    }

    /// Ends what this rank waits for in a round that is over.
    fn part(self: &Arc<Self>, round: u64) {
        self.cut();
        let inner = Arc::clone(self);
        if let Err(error) = thread::Builder::new().name("ice-stop".into()).spawn(move || inner.enforce(round))
        {
            tracing::warn!(%error, "the agent will have to end this rank");
        }
    }

    /// Wakes those who wait for other ranks, or for the store.
    fn cut(&self) {
        let state = self.state();
        let (connections, group) = (state.connections.clone(), state.group.clone());
        let cuts = state.cuts.clone();
        drop(state);
        cuts.iter().for_each(|cut| cut());
        if let Some(connections) = connections {
            connections.cut();
        }
        if let Some(group) = group {
            group.abort();
        }
    }

    /// Ends a rank that waits for one that is gone and cannot be woken, and so would never learn of it; but not while it writes.
    fn enforce(&self, round: u64) {
        let unnoticed = |state: &mut State| {
            !state.noticed && (state.ended || state.round.is_none_or(|current| current <= round))
        };
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.state(), BROKEN_PATIENCE, unnoticed)
            .unwrap_or_else(PoisonError::into_inner);
        if !unnoticed(&mut state) {
            return;
        }
        drop(state);
        let state = self.changed.wait_while(self.state(), |state| state.holds > 0);
        drop(state.unwrap_or_else(PoisonError::into_inner));
        process::exit(1);
    }

    /// Tells all ranks what this one was asked for, once there is a round.
    pub(super) fn publish(&self, wanted: mpsc::Receiver<Request>) {
        for request in wanted {
            let none = |state: &mut State| state.store.is_none() && !state.ended;
            let state = self.changed.wait_while(self.state(), none).unwrap_or_else(PoisonError::into_inner);
            let store = state.store.clone();
            drop(state);
            // The work of this rank may hold the connection while it waits for something else.
            let told = store.map(|store| store.reconnect().and_then(|store| agree::publish(&store, request)));
            if let Some(Err(error)) = told {
                tracing::warn!(%error, ?request, "the other ranks could not be told");
            }
        }
    }
}
