//! The tables of docs/scale.md.

use std::fmt::Write as _;
use std::time::Duration;

use crate::Options;
use crate::play::{Outcome, play};
use crate::training;
use crate::world::RANKS_PER_NODE;

/// Memory of the coordinator's process in KiB per agent, with and without TLS, and per client of
/// the store, as measured by `measure`.
const AGENT_KIB: f64 = 9.1;
const AGENT_TLS_KIB: f64 = 20.6;
const CLIENT_KIB: f64 = 1.0;
/// CPU time of the coordinator's thread, in microseconds, for a client of the store that connects
/// and receives one answer.
pub(crate) const CLIENT_US: f64 = 50.0;

/// Speed-up of the set-up of communicators in the last table, as reported for NCCLX.
const FASTER: f64 = 11.0;

/// Outcomes for a number of ranks.
pub(crate) struct Size {
    pub(crate) ranks: u32,
    fixed: Outcome,
    pub(crate) elastic: Outcome,
    tls: Outcome,
}

/// Returns the tables, each with the name of its marks.
pub(crate) fn tables(options: &Options) -> Vec<(&'static str, String)> {
    let sizes: Vec<Size> = options.ranks.iter().map(|ranks| size(options, *ranks)).collect();
    let (_, large) = sizes.split_at(sizes.len().saturating_sub(2));
    vec![
        ("inputs", inputs(options)),
        ("forming", forming(&sizes)),
        ("quiet", quiet(&sizes)),
        ("losses", losses(&sizes)),
        ("recovery", training::recovery(&sizes)),
        ("goodput", training::goodput(options.seed, &sizes)),
        ("faster", training::faster(options.seed, large, FASTER)),
    ]
}

fn size(options: &Options, ranks: u32) -> Size {
    let outcome = |elastic, tls| {
        let outcome = play(options.config(options.seed, ranks, elastic, tls));
        outcome.unwrap_or_else(|| panic!("{ranks} ranks form no round"))
    };
    Size { ranks, fixed: outcome(false, false), elastic: outcome(true, false), tls: outcome(false, true) }
}

fn inputs(options: &Options) -> String {
    let list = |times: &[f64]| times.iter().map(f64::to_string).collect::<Vec<_>>().join(", ");
    format!(
        "Seed {}; latency {} µs with jitter {}; link {} Gbit/s; CPU of the coordinator in µs (let in, take, send): {}; over TLS: {}.\n",
        options.seed,
        options.latency_us,
        options.jitter,
        options.gbit_per_s,
        list(&options.cpu_us),
        list(&options.cpu_tls_us)
    )
}

fn forming(sizes: &[Size]) -> String {
    let heads = "ranks | nodes | messages in, out | kB in, out | plain | with TLS | longest wait, with TLS | dropped, given up";
    table(heads, sizes, |size| {
        let Outcome { formed, incoming, outgoing, forming, .. } = &size.fixed;
        let tls = &size.tls;
        format!(
            "{} | {} | {}, {} | {:.1}, {:.1} | {} | {} | {}, {} | {}, {}",
            size.ranks,
            size.ranks.div_ceil(RANKS_PER_NODE),
            incoming.0,
            outgoing.0,
            incoming.1 as f64 / 1e3,
            outgoing.1 as f64 / 1e3,
            time(*formed),
            time(tls.formed),
            time(forming.longest_wait),
            time(tls.forming.longest_wait),
            forming.dropped + tls.forming.dropped,
            forming.given_up + tls.forming.given_up,
        )
    })
}

fn quiet(sizes: &[Size]) -> String {
    let heads = "ranks | keep-alives per s | CPU | longest wait | agents: MiB, with TLS | store: connections | MiB | CPU to connect them";
    table(heads, sizes, |size| {
        let nodes = f64::from(size.ranks.div_ceil(RANKS_PER_NODE));
        let clients = f64::from(size.ranks);
        format!(
            "{} | {:.0} | {:.2} % | {} | {:.1}, {:.1} | {} | {:.1} | {}",
            size.ranks,
            size.fixed.quiet_rate,
            size.fixed.quiet_share * 100.0,
            time(size.fixed.quiet_wait),
            nodes * AGENT_KIB / 1024.0,
            nodes * AGENT_TLS_KIB / 1024.0,
            size.ranks,
            clients * CLIENT_KIB / 1024.0,
            time(Duration::from_secs_f64(clients * CLIENT_US / 1e6)),
        )
    })
}

fn losses(sizes: &[Size]) -> String {
    let heads = "ranks | a rank dies: all know | next round | a node is silent: noticed | all know after | next round, elastic | next round, fixed";
    table(heads, sizes, |size| {
        let Size { ranks, fixed, elastic, .. } = size;
        format!(
            "{ranks} | {} | {} | {} | {} | {} | {}",
            time(fixed.rank_known),
            time(fixed.rank_next),
            time(elastic.node_noticed),
            time(elastic.node_known),
            time(elastic.node_next),
            time(fixed.node_next)
        )
    })
}

/// Returns a table of Markdown with a line for each row.
pub(crate) fn table<T>(heads: &str, rows: &[T], row: impl Fn(&T) -> String) -> String {
    let columns = heads.split('|').count();
    let mut text = format!("| {heads} |\n|{}\n", "--:|".repeat(columns));
    for line in rows {
        let _ = writeln!(text, "| {} |", row(line));
    }
    text
}

/// Formats a time with about three digits.
pub(crate) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        1.0.. => format!("{seconds:.1} s"),
        0.01.. => format!("{:.0} ms", seconds * 1e3),
        _ => format!("{:.1} ms", seconds * 1e3),
    }
}

/// Puts each table between its marks in a text. `None` if a mark is missing.
pub(crate) fn put(text: &str, tables: &[(&str, String)]) -> Option<String> {
    tables.iter().try_fold(text.to_owned(), |text, (name, table)| {
        let (begin, end) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
        let (before, rest) = text.split_once(&begin)?;
        let (_, after) = rest.split_once(&end)?;
        Some(format!("{before}{begin}{table}{end}{after}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_go_between_their_marks_and_nothing_else_changes() {
        let text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n";
        let new = put(text, &[("x", "new\n".into())]).unwrap();
        assert_eq!(new, "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n");
        assert_eq!(put(&new, &[("y", String::new())]), None);
    }
}
