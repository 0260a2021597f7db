use rustix::process::Signal;

use ice_testing::Random;

/// A fault of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A rank exits with this code.
    Exit(i32),
    /// A rank aborts.
    Abort,
    /// A rank is killed.
    KillRank,
    /// A child of a rank is killed, and the rank fails.
    KillGrandchild,
    /// The launcher is killed.
    KillLauncher,
    /// The launcher receives a signal that stops the job.
    Stop(Signal),
    /// The launcher receives such signals again and again, and the ranks ignore SIGTERM.
    StopHard,
    /// A rank is suspended, and then the launcher receives a signal that stops the job.
    SuspendRank,
    /// The launcher is suspended for a moment.
    SuspendLauncher,
    /// The terminal suspends the job for a moment.
    SuspendJob,
    /// A rank leaves 50 sleepers behind, half of them in sessions of their own, and fails.
    Sleepers,
    /// A rank fails, and the others ignore SIGTERM.
    Deaf,
    /// A rank closes its outputs and continues.
    CloseOutputs,
    /// The launcher's stdout and stderr are closed.
    NoConsole,
    /// The log files cannot grow.
    FullDisk,
    /// The disk of the log folder runs out of space or inodes at some moment, and a rank fails.
    FullLogs,
    /// The launcher is killed, and a rank has descendants of every kind.
    KillLauncherOfMany,
    /// The launcher receives a signal that stops the job, and the victim is a script that dies
    /// before its child has saved.
    Wrapped,
    /// A rank is frozen, and the launcher receives signals until it exits.
    Frozen,
}

/// Starts a process of each kind, which writes its id into `$UP/kinds`.
const EVERY_KIND: &str = "
    export KINDS=$UP/kinds
    sleep 600 & echo $! >> $KINDS
    (setsid sh -c 'echo $$ >> $KINDS; exec sleep 600' &)
    (setsid env -i KINDS=$KINDS /bin/sh -c 'echo $$ >> $KINDS; exec env -i /bin/sleep 600' &)
    setsid env -i KINDS=$KINDS /bin/sh -c 'echo $$ >> $KINDS
        for n in 1 2 3; do env -i /bin/sleep 600 & echo $! >> $KINDS; done; wait' &
    ";
/// Number of these processes.
pub(crate) const KINDS: usize = 7;

impl Fault {
    pub(crate) fn any(random: &mut Random) -> Self {
        use Fault::*;
        match random.below(24) {
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
            17 => FullDisk,
            18 | 19 => FullLogs,
            20 | 21 => KillLauncherOfMany,
            22 => Wrapped,
            _ => Frozen,
        }
    }

    /// Returns the victim's script after it has started. `go` waits at the pipe `GO`.
    pub(crate) fn victims_part(self) -> String {
        match self {
            Self::Exit(code) => format!("go; exit {code}"),
            Self::Abort => "go; kill -ABRT $$".into(),
            Self::KillRank | Self::KillLauncher | Self::Stop(_) | Self::SuspendRank => {
                "exec sleep 600".into()
            }
            Self::FullLogs => "go; exit 3".into(),
            Self::KillLauncherOfMany => format!("{EVERY_KIND} exec sleep 600"),
            Self::Wrapped => "
                sh -c 'trap \"sleep 0.1; echo saved > $UP/saved; exit 0\" TERM; echo up > $UP/program
                    while :; do sleep 600 & wait $!; done'; exit 1"
                .into(),
            Self::Frozen => "exec sleep 600".into(),
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

    /// Returns the script of the other ranks.
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

    /// Returns the launcher's exit code for a job that may restart or not. `None` if the launcher
    /// is killed.
    pub(crate) fn code(self, restarts: bool) -> Option<i32> {
        let failed = |code| Some(if restarts { 0 } else { code });
        match self {
            Self::Exit(code) => failed(code),
            Self::Abort => failed(134),
            Self::KillRank => failed(137),
            Self::KillGrandchild => failed(9),
            Self::Sleepers => failed(6),
            Self::Deaf => failed(5),
            Self::FullLogs => failed(3),
            Self::KillLauncher | Self::KillLauncherOfMany => None,
            Self::Stop(signal) => Some(128 + signal.as_raw()),
            Self::StopHard | Self::SuspendRank | Self::Wrapped | Self::Frozen => Some(143),
            _ => Some(0),
        }
    }

    /// Whether the job reaches its second attempt.
    pub(crate) fn restarts(self) -> bool {
        self.code(true) != self.code(false)
    }
}
