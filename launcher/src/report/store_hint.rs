//! A hint for programs that expect rank 0 to serve a store. Under `TORCHELASTIC_USE_AGENT_STORE` no
//! rank serves one, like under torchrun. If a program chooses a port of its own, c10d tries that
//! port until its timeout, and reports only that no store answered.

use super::RankFailure;

/// Returns the hint if a rank failed because no store answered on a port other than the agents'
/// port.
pub(crate) fn store_hint(failure: &RankFailure, store_port: u16) -> Option<String> {
    let said = [failure.message.as_deref(), failure.callstack.as_deref()].into_iter().flatten();
    let mut lines = said.flat_map(str::lines).chain(failure.stderr.iter().map(String::as_str));
    let (host, port) = lines.find_map(|line| unanswered(line).filter(|(_, port)| *port != store_port))?;
    Some(format!(
        "hint: rank {} looked for a store at {host}:{port}, and no rank serves one, since \
         TORCHELASTIC_USE_AGENT_STORE is True: use MASTER_ADDR and MASTER_PORT, as init_method=\"env://\" does, \
         or start the job with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        failure.rank
    ))
}

/// Returns the address in c10d's `… trying to connect to (HOST, PORT)` or `… failed to connect to
/// [HOST]:PORT`.
fn unanswered(line: &str) -> Option<(&str, u16)> {
    const TIMED_OUT: &str = "while trying to connect to (";
    const REFUSED: &str = "has failed to connect to [";
    let after = |mark: &str| line.split_once(mark).map(|(_, rest)| rest);
    let (host, rest) = match after(TIMED_OUT) {
        Some(rest) => rest.split_once(", ")?,
        None => after(REFUSED)?.split_once("]:")?,
    };
    let digits = rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len());
    Some((host, rest[..digits].parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::ExitRecord;
    use ice_agent::Exit;

    #[test]
    fn store_that_no_rank_serves_is_hinted_at() {
        let failure = |line: &str| RankFailure {
            rank: 1,
            local_rank: 1,
            pid: None,
            exit: ExitRecord::from(&Exit::Code(1)),
            message: None,
            callstack: None,
            stderr: vec!["before".into(), line.into()],
            logs: None,
        };
        let timed_out = "torch.distributed.DistNetworkError: The client socket has timed out after 2000ms while trying to connect to (127.0.0.1, 4711).";
        let refused =
            "[c10d] The client socket has failed to connect to [::1]:4711 (errno: 111 - Connection refused).";
        let hint = store_hint(&failure(timed_out), 29500).unwrap();
        assert!(hint.contains("rank 1 looked for a store at 127.0.0.1:4711"), "{hint}");
        let hint = store_hint(&failure(refused), 29500).unwrap();
        assert!(hint.contains("::1:4711") && hint.contains("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), "{hint}");
        assert_eq!(store_hint(&failure(timed_out), 4711), None, "the agents' own store");
        for line in ["", "while trying to connect to (", "has failed to connect to [a]:x"] {
            assert_eq!(store_hint(&failure(line), 1), None, "{line}");
        }
    }
}
