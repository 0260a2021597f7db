//! Messages from the agent, and the end of a round.
//!
//! Two threads meet here. The link's thread receives the end of a round, sets `State::over`, wakes
//! all waits on `changed`, and aborts the waits that a condition variable does not reach:
//! connections of gloo and of the store, and NCCL's group. The rank's own thread then sees
//! [`State::stop`] and sets `noticed`. If it does not within [`ABORT_TIMEOUT`], a third thread ends
//! the process, unless that is left to the agent.

use std::collections::BTreeMap;
use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use ice_proto::env::{RankEnv, TORCHELASTIC_ERROR_FILE};
use ice_proto::frame::Decoder;
use ice_proto::link::{BoundaryRequest, FromRank, ToRank};

use super::Inner;
use super::state::{NextRound, State};
use crate::process::signals;

/// Time in which a rank must notice that its round is over.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

impl Inner {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn heartbeat(&self) -> FromRank {
        FromRank::Heartbeat {
            step: self.step.load(Ordering::Relaxed),
            activity: self.activity.count(),
            doing: self.activity.doing(),
            applied_ms: self.applied_us.load(Ordering::Relaxed) / 1000,
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
                match decoder.next_message::<ToRank>() {
                    Ok(Some(ToRank::Ask(request))) => _ = self.requests.send(request),
                    Ok(Some(ToRank::RoundBroken { round, reason })) => {
                        tracing::debug!(round, reason, "the round is over");
                        self.round_over(round);
                    }
                    Ok(Some(ToRank::Round { variables })) => self.set_next_round(variables),
                    Ok(Some(ToRank::End { reason })) => {
                        tracing::debug!(reason, "the job is over");
                        let mut state = self.state();
                        state.ended = true;
                        let round = state.round.unwrap_or(0);
                        drop(state);
                        self.round_over(round);
                    }
                    Ok(Some(ToRank::Terminate)) => signals::end_by_termination(),
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
        // The signals of a process that continues after its rank has left are its own again.
        signals::restore();
    }

    fn set_next_round(&self, variables: BTreeMap<String, String>) {
        match RankEnv::read(|name| variables.get(name).cloned()) {
            Ok(Some(env)) => {
                let mut state = self.state();
                state.error_file = variables.get(TORCHELASTIC_ERROR_FILE).map(PathBuf::from);
                state.next_round = Some(NextRound { env, variables });
                drop(state);
                self.changed.notify_all();
            }
            wrong => {
                tracing::error!(?wrong, "the agent's next round cannot be understood");
                process::exit(1);
            }
        }
    }

    /// Notes the end of a round, and aborts the waits of this rank if it is in that round.
    fn round_over(self: &Arc<Self>, round: u64) {
        let mut state = self.state();
        state.over = state.over.max(Some(round));
        let is_current = state.round.is_none_or(|current| current <= round);
        drop(state);
        self.changed.notify_all();
        if is_current {
            self.abort_round(round);
        }
    }

    /// Aborts the waits of a round that is over, and starts the timeout.
    fn abort_round(self: &Arc<Self>, round: u64) {
        self.abort_waits();
        if self.state().agent_ends_stuck {
            return;
        }
        let inner = Arc::clone(self);
        if let Err(error) =
            thread::Builder::new().name("ice-stop".into()).spawn(move || inner.exit_if_stuck(round))
        {
            tracing::warn!(%error, "the agent will have to end this rank");
        }
    }

    /// Aborts waits for other ranks and for the store. The handles are cloned first: aborting may
    /// block, and must not hold the lock.
    fn abort_waits(&self) {
        let state = self.state();
        let (connections, group) = (state.connections.clone(), state.group.clone());
        let cancel_hooks = state.cancel_hooks.clone();
        drop(state);
        cancel_hooks.iter().for_each(|cancel| cancel());
        if let Some(connections) = connections {
            connections.cut();
        }
        if let Some(group) = group {
            group.abort();
        }
    }

    /// Ends the process if its rank does not notice the end of the round: it waits in a call that
    /// cannot be aborted. Guarded writes are finished first.
    fn exit_if_stuck(&self, round: u64) {
        let unnoticed = |state: &mut State| {
            !state.noticed && (state.ended || state.round.is_none_or(|current| current <= round))
        };
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.state(), ABORT_TIMEOUT, unnoticed)
            .unwrap_or_else(PoisonError::into_inner);
        if !unnoticed(&mut state) {
            return;
        }
        drop(state);
        let state = self.changed.wait_while(self.state(), |state| state.exit_guards > 0);
        drop(state.unwrap_or_else(PoisonError::into_inner));
        process::exit(1);
    }

    /// Publishes the agent's requests to all ranks, once there is a round.
    pub(super) fn publish(&self, wanted: mpsc::Receiver<BoundaryRequest>) {
        for request in wanted {
            let none = |state: &mut State| state.store.is_none() && !state.ended;
            let state = self.changed.wait_while(self.state(), none).unwrap_or_else(PoisonError::into_inner);
            let store = state.store.clone();
            drop(state);
            if let Some(Err(error)) = store.map(|store| store.publish(request)) {
                tracing::warn!(%error, ?request, "the other ranks could not be told");
            }
        }
    }
}
