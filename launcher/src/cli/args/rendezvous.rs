//! torchrun's options for the rendezvous.

use clap::Args;

use super::{EtcdArgs, LaunchArgs};
use crate::cli::UsageError;

/// torchrun's port for `--rdzv-backend c10d`.
const C10D_PORT: u16 = 29400;

// A comment that clap can read would become the help text of each program that flattens these
// options.
#[doc = concat!("torchrun's ways to say where the nodes meet. Programs that launch themselves take them, too.")]
#[derive(Args, Debug, Clone, Default, PartialEq)]
pub struct RdzvArgs {
    /// How nodes meet: static, c10d or etcd
    ///
    /// static: node 0 by its --node-rank; c10d: the agent that the endpoint's address belongs to;
    /// etcd [default: static]
    #[arg(
        long,
        alias = "rdzv_backend",
        value_name = "NAME",
        env = "PET_RDZV_BACKEND",
        hide_env = true,
        help_heading = "Nodes"
    )]
    pub rdzv_backend: Option<String>,
    /// Address where nodes meet, for c10d and etcd
    ///
    /// --master-addr and --master-port in one: HOST:PORT; with etcd its members, separated by
    /// commas
    #[arg(
        long,
        alias = "rdzv_endpoint",
        value_name = "HOST:PORT",
        env = "PET_RDZV_ENDPOINT",
        hide_env = true,
        help_heading = "Nodes"
    )]
    pub rdzv_endpoint: Option<String>,
    /// --run-id
    #[arg(
        long,
        alias = "rdzv_id",
        value_name = "ID",
        env = "PET_RDZV_ID",
        hide_env = true,
        help_heading = "Nodes",
        hide_short_help = true
    )]
    pub rdzv_id: Option<String>,
    /// join_timeout, last_call_timeout, close_timeout, keep_alive_interval (seconds),
    /// keep_alive_max_attempt, is_host; etcd: see the docs
    #[arg(
        long,
        alias = "rdzv_conf",
        value_name = "KEY=VALUE,…",
        env = "PET_RDZV_CONF",
        hide_env = true,
        help_heading = "Nodes",
        hide_short_help = true
    )]
    pub rdzv_conf: Option<String>,
    /// Address, host name or interface of this node that agents listen on and connect from
    #[arg(
        long,
        alias = "local_addr",
        value_name = "HOST",
        env = "PET_LOCAL_ADDR",
        hide_env = true,
        help_heading = "Nodes",
        hide_short_help = true
    )]
    pub local_addr: Option<String>,
}

impl RdzvArgs {
    /// Translates torchrun's options into those of the launcher. `notes` gets a line for each part
    /// that works differently from torchrun. `lookup` reads the environment: an option has
    /// precedence over the variable of another option.
    pub(crate) fn translate(
        &self,
        args: &mut LaunchArgs,
        notes: &mut Vec<String>,
        lookup: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), UsageError> {
        self.run_id(args, lookup)?;
        let of_backend = self.backend(args)?;
        if args.rendezvous.etcd.is_none() {
            self.endpoint(args, of_backend, lookup)?;
        }
        if let Some(host) = &args.master_addr {
            args.master_addr =
                Some(host_name(host).map_err(|problem| UsageError::new("--master-addr", problem))?);
        }
        args.rendezvous.local_addr = self.local_addr.as_deref().map(without_brackets).map(Into::into);
        let conf = self.rdzv_conf.as_deref().unwrap_or_default();
        args.rendezvous.apply(conf, &mut args.node_rank, notes)
    }

    fn run_id(
        &self,
        args: &mut LaunchArgs,
        lookup: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), UsageError> {
        let Some(id) = &self.rdzv_id else { return Ok(()) };
        let given = args.run_id.get_or_insert_with(|| id.clone());
        if given != id && lookup("PET_RDZV_ID").as_ref() != Some(id) {
            let problem = format!("`{id}`, and --run-id is `{given}`: they are the same thing, give one");
            return Err(UsageError::new("--rdzv-id", problem));
        }
        Ok(())
    }

    /// Returns the backend's default port, for an endpoint without a port.
    fn backend(&self, args: &mut LaunchArgs) -> Result<Option<u16>, UsageError> {
        match self.rdzv_backend.as_deref() {
            None | Some("static") => Ok(None),
            Some("c10d") => {
                args.rendezvous.elect = true;
                Ok(Some(C10D_PORT))
            }
            Some("etcd") => {
                let endpoints = self.rdzv_endpoint.as_deref().unwrap_or_default();
                args.rendezvous.etcd = Some(EtcdArgs::new(endpoints)?);
                Ok(None)
            }
            Some("etcd-v2") => {
                let problem =
                    "`etcd-v2`: etcd has no such interface any more: use etcd, which is version 3's";
                Err(UsageError::new("--rdzv-backend", problem.into()))
            }
            Some(other) => {
                let problem = format!("`{other}` is not supported: expected static, c10d or etcd");
                Err(UsageError::new("--rdzv-backend", problem))
            }
        }
    }

    fn endpoint(
        &self,
        args: &mut LaunchArgs,
        of_backend: Option<u16>,
        lookup: &dyn Fn(&str) -> Option<String>,
    ) -> Result<(), UsageError> {
        let Some(endpoint) = self.rdzv_endpoint.as_deref() else { return Ok(()) };
        let wrong = |problem: String| UsageError::new("--rdzv-endpoint", format!("`{endpoint}`: {problem}"));
        let (host, port) =
            split_endpoint(endpoint).ok_or_else(|| wrong("expected HOST or HOST:PORT".into()))?;
        let host = host_name(host).map_err(wrong)?;
        let from_variable = |name: &str, value: &str| lookup(name).is_some_and(|set| set == value);
        let weak = from_variable("PET_RDZV_ENDPOINT", endpoint);
        let mut others = Vec::new();
        if let Some(other) = args.master_addr.as_deref()
            && without_brackets(other) != host
        {
            others.push(("--master-addr", other.to_owned(), from_variable("PET_MASTER_ADDR", other)));
        }
        if let (Some(other), Some(port)) = (args.master_port, port)
            && other != port
        {
            let other = other.to_string();
            let variable = from_variable("PET_MASTER_PORT", &other);
            others.push(("--master-port", other, variable));
        }
        if let Some((option, other, _)) = others.iter().find(|(_, _, variable)| *variable == weak) {
            return Err(wrong(format!("contradicts {option} {other}: give one of the two")));
        }
        // Here either `--rdzv-endpoint` comes from a variable and the others are options, or the
        // other way round. Options win.
        if others.is_empty() || !weak {
            args.master_addr = Some(host);
            args.master_port = port.or(of_backend).or(args.master_port);
        }
        Ok(())
    }
}

/// Checks a host name and removes the brackets of an IPv6 address.
fn host_name(text: &str) -> Result<String, String> {
    let host = without_brackets(text);
    let is_part = |letter: char| letter.is_alphanumeric() || "._:-%".contains(letter);
    if host.is_empty() || !host.chars().all(is_part) {
        return Err(format!("`{host}` is neither a host name nor an address"));
    }
    Ok(host.to_owned())
}

fn without_brackets(text: &str) -> &str {
    text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text)
}

/// Splits `host`, `host:port`, `[v6]:port` or a bare v6 address.
fn split_endpoint(endpoint: &str) -> Option<(&str, Option<u16>)> {
    let number = |port: &str| super::values::port(port).ok();
    if let Some(rest) = endpoint.strip_prefix('[') {
        let (host, rest) = rest.split_once(']')?;
        return match rest.strip_prefix(':') {
            Some(port) => Some((host, Some(number(port)?))),
            None => rest.is_empty().then_some((host, None)),
        };
    }
    match endpoint.split_once(':') {
        Some((_, rest)) if rest.contains(':') => Some((endpoint, None)),
        Some((host, port)) if !host.is_empty() => Some((host, Some(number(port)?))),
        Some(_) => None,
        None => (!endpoint.is_empty()).then_some((endpoint, None)),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use clap::Parser;

    use super::*;
    use crate::cli::Cli;
    use crate::cli::args::RendezvousArgs;

    fn translated(args: &[&str], variables: &[(&str, &str)]) -> Result<(LaunchArgs, Vec<String>), String> {
        let cli = Cli::try_parse_from(["ice-launch"].iter().chain(args).chain(&["prog"])).unwrap();
        let (mut launch, mut notes) = (cli.launch, Vec::new());
        let lookup =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let rdzv = launch.rdzv.clone();
        rdzv.translate(&mut launch, &mut notes, &lookup).map_err(|error| error.to_string())?;
        Ok((launch, notes))
    }

    #[test]
    fn endpoints_of_all_forms() {
        for (text, expected) in [
            ("node7", Some(("node7", None))),
            ("node7:29400", Some(("node7", Some(29400)))),
            ("[::1]:80", Some(("::1", Some(80)))),
            ("[::1]", Some(("::1", None))),
            ("fe80::1:2", Some(("fe80::1:2", None))),
            ("node7:x", None),
            ("node7:65536", None),
            ("node7:", None),
            (":80", None),
            ("[::1", None),
            ("[::1]80", None),
            ("", None),
        ] {
            assert_eq!(split_endpoint(text), expected, "{text}");
        }
    }

    #[test]
    fn torchruns_words_are_ours() {
        let (args, notes) = translated(
            &[
                "--nnodes=2",
                "--rdzv_backend=c10d",
                "--rdzv_endpoint=node0:1234",
                "--rdzv_id=77",
                "--rdzv_conf=join_timeout=20,is_host=true,last_call_timeout=3",
            ],
            &[],
        )
        .unwrap();
        assert_eq!(notes, [""; 0]);
        assert_eq!((args.master_addr.as_deref(), args.master_port), (Some("node0"), Some(1234)));
        assert_eq!(args.run_id.as_deref(), Some("77"));
        let conf = RendezvousArgs {
            elect: true,
            is_host: Some(true),
            join_timeout: Some(Duration::from_secs(20)),
            last_call: Some(Duration::from_secs(3)),
            ..RendezvousArgs::default()
        };
        assert_eq!(args.rendezvous, conf);
        let (args, _) = translated(&["--master-addr=[::1]", "--local-addr=[::1]"], &[]).unwrap();
        assert_eq!(args.master_addr.as_deref(), Some("::1"));
        assert_eq!(args.rendezvous.local_addr.as_deref(), Some("::1"));
    }

    #[test]
    fn endpoint_and_master_address_must_not_contradict_each_other() {
        let met = |args: &[&str], variables: &[(&str, &str)]| {
            translated(args, variables).map(|(args, _)| (args.master_addr.unwrap(), args.master_port))
        };
        let both = ["--rdzv-endpoint=a:1", "--master-addr=b"];
        let error = met(&both, &[]).unwrap_err();
        assert!(error.contains("`a:1`: contradicts --master-addr b"), "{error}");
        let error = met(&["--rdzv-endpoint=a:1", "--master-port=2"], &[]).unwrap_err();
        assert!(error.contains("contradicts --master-port 2"), "{error}");
        let same = ["--rdzv-endpoint=[::1]:1", "--master-addr=[::1]", "--master-port=1"];
        assert_eq!(met(&same, &[]), Ok(("::1".into(), Some(1))));
        // An operator sets one of the two for all pods, and a user gives the other one.
        assert_eq!(met(&both, &[("PET_MASTER_ADDR", "b")]), Ok(("a".into(), Some(1))));
        assert_eq!(met(&both, &[("PET_RDZV_ENDPOINT", "a:1")]), Ok(("b".into(), None)));
        assert!(met(&both, &[("PET_RDZV_ENDPOINT", "a:1"), ("PET_MASTER_ADDR", "b")]).is_err());
    }

    #[test]
    fn run_id_beats_torchruns_variable_for_it() {
        let ids = ["--rdzv-id=theirs", "--run-id=mine"];
        let (args, _) = translated(&ids, &[("PET_RDZV_ID", "theirs")]).unwrap();
        assert_eq!(args.run_id.as_deref(), Some("mine"));
    }

    #[test]
    fn mistakes_name_both_sides() {
        for (args, parts) in [
            (&["--rdzv-id=a", "--run-id=b"][..], &["`a`", "`b`"][..]),
            (&["--rdzv-backend=zeus"], &["`zeus`", "c10d"]),
            (&["--rdzv-endpoint=h:x"], &["`h:x`"]),
            (&["--rdzv-endpoint="], &["--rdzv-endpoint", "HOST:PORT"]),
            (&["--rdzv-endpoint=a b:1"], &["--rdzv-endpoint", "`a b`"]),
            (&["--master-addr="], &["--master-addr", "host name"]),
            (&["--rdzv-conf=join_timeout=soon"], &["join_timeout=soon", "seconds"]),
        ] {
            let error = translated(args, &[]).unwrap_err();
            assert!(parts.iter().all(|part| error.contains(part)), "{args:?}: {error}");
        }
    }
}
