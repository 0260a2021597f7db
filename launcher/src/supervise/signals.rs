//! The signals that the agent receives.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use nix::sys::signal::Signal;
use tokio::signal::unix::{self, SignalKind};

use super::proc::ignores;

/// Meaning of a signal to the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Caught {
    /// Stop the job.
    Stop(i32),
    /// The job will have to stop soon.
    Notice(Signal),
    /// Pass the signal on to the ranks.
    Forward(i32),
    /// The terminal suspends the job (Ctrl-Z).
    Suspend,
}

pub(crate) struct Signals(Vec<(Caught, unix::Signal)>);

impl Signals {
    /// Listens for signals: those in `stop` stop the job, those in `notice` give notice of its end.
    /// SIGHUP, SIGINT and SIGQUIT stay ignored if they were ignored when the agent started, like
    /// SIGHUP under nohup.
    pub(crate) fn new(stop: &[Signal], notice: &[Signal]) -> io::Result<Self> {
        let ignorable = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT];
        let stop: Vec<Signal> = stop
            .iter()
            .copied()
            .filter(|signal| !notice.contains(signal))
            .filter(|signal| !(ignorable.contains(signal) && ignores(*signal as i32)))
            .collect();
        let forward = [Signal::SIGUSR1, Signal::SIGUSR2]
            .into_iter()
            .filter(|signal| !stop.contains(signal) && !notice.contains(signal));
        let meanings = stop
            .iter()
            .map(|signal| (*signal, Caught::Stop(*signal as i32)))
            .chain(notice.iter().map(|signal| (*signal, Caught::Notice(*signal))))
            .chain(forward.map(|signal| (signal, Caught::Forward(signal as i32))))
            .chain([(Signal::SIGTSTP, Caught::Suspend)]);
        let listen = |(signal, meaning)| Ok((meaning, unix::signal(SignalKind::from_raw(signal as i32))?));
        Ok(Self(meanings.map(listen).collect::<io::Result<_>>()?))
    }

    /// Waits for the next signal. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Caught {
        poll_fn(|context| {
            let caught = self.0.iter_mut().find_map(|(meaning, signal)| {
                matches!(signal.poll_recv(context), Poll::Ready(Some(()))).then_some(*meaning)
            });
            caught.map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// Waits for the next signal that stops the job or gives notice.
    pub(crate) async fn stop(&mut self) -> Caught {
        loop {
            let caught = self.next().await;
            if matches!(caught, Caught::Stop(_) | Caught::Notice(_)) {
                return caught;
            }
        }
    }
}
