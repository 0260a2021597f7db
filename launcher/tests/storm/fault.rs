use rustix::process::Signal;

use crate::random::Random;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A rank ends with this code.
    Exit(i32),
    /// A rank aborts.
    Abort,
    /// A rank is killed.
    KillRank,
    /// What a rank has started is killed, and the rank fails.
    KillGrandchild,
    /// The launcher is killed.
    KillLauncher,
    /// The launcher is told to stop.
    Stop(Signal),
    /// The launcher is told to stop again and again, and the ranks do not listen.
    StopHard,
    /// A rank is suspended, and then the launcher told to stop.
    SuspendRank,
    /// The launcher is suspended for a moment.
    SuspendLauncher,
    /// The terminal suspends the job for a moment.
    SuspendJob,
    /// A rank leaves 50 sleepers behind, half of them in sessions of their own, and fails.
    Sleepers,
    /// A rank fails, and the others do not listen.
    Deaf,
    /// A rank closes its outputs and goes on.
    CloseOutputs,
    /// The launcher has no console.
    NoConsole,
    /// The log files cannot grow.
    FullDisk,
}

impl Fault {
    pub(crate) fn any(random: &mut Random) -> Self {
        use Fault::*;
        match random.below(18) {
            0..3 => Exit(random.pick(&[1, 3, 7, 64, 255])),
            3 => Abort,
            4 | 5 => KillRank,
            6 => KillGrandchild,
            7 => KillLauncher,
            8 => Stop(random.pick(&[Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT])),
            9 => StopHard,
            10 => SuspendRank,
            11 => SuspendLauncher,
            12 => SuspendJob,
            13 => Sleepers,
            14 => Deaf,
            15 => CloseOutputs,
            16 => NoConsole,
            _ => FullDisk,
        }
    }

    /// What the victim does once it is up. `GO` is the pipe that it waits at.
    pub(crate) fn victims_part(self) -> String {
        match self {
            Self::Exit(code) => format!("go; exit {code}"),
            Self::Abort => "go; kill -ABRT $$".into(),
            Self::KillRank | Self::KillLauncher | Self::Stop(_) | Self::SuspendRank => {
                "exec sleep 600".into()
            }
            Self::KillGrandchild => "sleep 600 & echo $! > $UP/grandchild; wait $!; exit 9".into(),
            Self::StopHard => "trap '' TERM; while :; do sleep 600; done".into(),
            Self::Sleepers => "
                n=0; while [ $n -lt 25 ]; do n=$((n + 1)); sleep 600 & setsid sleep 600 & done; go; exit 6"
                .into(),
            Self::Deaf => "go; exit 5".into(),
            Self::CloseOutputs => "exec >&- 2>&-; go; exit 0".into(),
            Self::SuspendLauncher | Self::SuspendJob | Self::NoConsole | Self::FullDisk => {
                "go; exit 0".into()
            }
        }
    }

    /// What the other ranks do.
    pub(crate) fn others_part(self) -> &'static str {
        match self {
            Self::Deaf | Self::StopHard => "trap '' TERM; while :; do sleep 600; done",
            _ if self.ends_well() => "go; exit 0",
            _ => "exec sleep 600",
        }
    }

    pub(crate) fn ends_well(self) -> bool {
        use Fault::*;
        matches!(self, SuspendLauncher | SuspendJob | CloseOutputs | NoConsole | FullDisk)
    }

    /// The launcher's exit code, where it has one, for a job that may restart or not.
    pub(crate) fn code(self, restarts: bool) -> Option<i32> {
        let failed = |code| Some(if restarts { 0 } else { code });
        match self {
            Self::Exit(code) => failed(code),
            Self::Abort => failed(134),
            Self::KillRank => failed(137),
            Self::KillGrandchild => failed(9),
            Self::Sleepers => failed(6),
            Self::Deaf => failed(5),
            Self::KillLauncher => None,
            Self::Stop(signal) => Some(128 + signal.as_raw()),
            Self::StopHard | Self::SuspendRank => Some(143),
            _ => Some(0),
        }
    }

    /// Whether the job gets as far as its second attempt.
    pub(crate) fn restarts(self) -> bool {
        self.code(true) != self.code(false)
    }
}
