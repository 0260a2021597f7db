use std::fs;
use std::time::Duration;

use ice_rendezvous::{Backend, EtcdConfig, EtcdTls};

use crate::cli::{UsageError, value_parsers};

/// etcd's port for clients.
const ETCD_PORT: u16 = 2379;
/// Prefix of the launcher's keys in etcd.
const ETCD_PREFIX: &str = "/ice-launch";

/// Settings of the rendezvous other than the endpoint: `--rdzv-conf` and options that belong to it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct RendezvousArgs {
    /// Whether the agent that the endpoint's address belongs to hosts the rendezvous.
    pub(crate) elect: bool,
    /// Whether this agent hosts the rendezvous, if `--rdzv-conf is_host` is given.
    pub(crate) is_host: Option<bool>,
    /// Time that nodes may take to join.
    pub(crate) join_timeout: Option<Duration>,
    /// Time that the coordinator waits for more nodes once there are enough (last call).
    pub(crate) last_call: Option<Duration>,
    /// Time within which an address, a coordinator or etcd has to answer.
    pub(crate) answer: Option<Duration>,
    /// Time that the host waits for the other agents after the end of the job.
    pub(crate) close_timeout: Option<Duration>,
    pub(crate) keep_alive_interval: Option<Duration>,
    pub(crate) keep_alive_attempts: Option<u32>,
    /// Address or interface of this node.
    pub(crate) local_addr: Option<String>,
    /// Settings of etcd, if the agents meet there.
    pub(crate) etcd: Option<EtcdArgs>,
}

/// Addresses of etcd and the credentials for it. The keys include those of torchrun's etcd backend.
#[derive(Clone, Default, PartialEq, Eq)]
pub(crate) struct EtcdArgs {
    members: Vec<String>,
    https: bool,
    prefix: Option<String>,
    ca: Option<Vec<u8>>,
    certificate: Option<Vec<u8>>,
    key: Option<Vec<u8>>,
    user: Option<String>,
    password: Option<String>,
}

impl std::fmt::Debug for EtcdArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "EtcdArgs({})", self.members.join(","))
    }
}

impl RendezvousArgs {
    /// Applies `--rdzv-conf`. `notes` gets a line for each key without an effect.
    pub(super) fn apply(
        &mut self,
        conf: &str,
        node_rank: &mut Option<u32>,
        notes: &mut Vec<String>,
    ) -> Result<(), UsageError> {
        // Quotes that no shell has removed, for example in a scheduler's file.
        let conf = unquoted(conf);
        for pair in conf.split(',').map(str::trim).filter(|_| !conf.is_empty()) {
            let wrong = |problem: &str| UsageError::new("--rdzv-conf", format!("`{pair}`: {problem}"));
            let (key, value) = pair.split_once('=').ok_or_else(|| wrong("expected KEY=VALUE"))?;
            let (key, value) = (key.trim(), unquoted(value));
            if key.is_empty() || value.is_empty() {
                return Err(wrong("expected KEY=VALUE"));
            }
            let seconds = || {
                let seconds: f64 = value.parse().map_err(|_| wrong("expected seconds"))?;
                value_parsers::seconds(seconds).map(Some).map_err(|problem| wrong(&problem))
            };
            let more_than_zero = || match seconds()? {
                Some(Duration::ZERO) => Err(wrong("must be more than 0")),
                time => Ok(time),
            };
            match key {
                "join_timeout" | "timeout" => self.join_timeout = more_than_zero()?,
                "last_call_timeout" => self.last_call = seconds()?,
                "close_timeout" => self.close_timeout = seconds()?,
                "read_timeout" => self.answer = more_than_zero()?,
                "keep_alive_interval" => self.keep_alive_interval = more_than_zero()?,
                "keep_alive_max_attempt" => match value.parse() {
                    Ok(attempts @ 1..) => self.keep_alive_attempts = Some(attempts),
                    _ => return Err(wrong("expected a number from 1")),
                },
                "is_host" => match value.to_ascii_lowercase().as_str() {
                    "1" | "true" | "t" | "yes" | "y" => self.is_host = Some(true),
                    "0" | "false" | "f" | "no" | "n" => self.is_host = Some(false),
                    _ => return Err(wrong("expected true or false")),
                },
                // Time that torchrun's agents wait before they write their common state again.
                "cas_backoff_max_seconds" => {
                    seconds()?;
                    notes.push(
                        "--rdzv-conf cas_backoff_max_seconds has no effect: one coordinator writes the state"
                            .into(),
                    );
                }
                // The node rank of a static rendezvous. A test of torchrun passes the rank like
                // this.
                "rank" => *node_rank = Some(value.parse().map_err(|_| wrong("expected a node rank"))?),
                key => {
                    let taken = match &mut self.etcd {
                        Some(etcd) => etcd.apply(key, value).map_err(|problem| wrong(&problem))?,
                        None => false,
                    };
                    if !taken {
                        notes.push(format!("--rdzv-conf {key} has no effect: there is nothing to set so"));
                    }
                }
            }
        }
        Ok(())
    }
}

/// Removes a pair of quotes around a text.
fn unquoted(text: &str) -> &str {
    let text = text.trim();
    let without = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    without('"').or_else(|| without('\'')).map_or(text, str::trim)
}

impl EtcdArgs {
    pub(super) fn new(endpoints: &str) -> Result<Self, UsageError> {
        let members: Vec<String> = endpoints.split(',').map(|part| part.trim().to_owned()).collect();
        if members.iter().any(String::is_empty) {
            let problem = match endpoints.trim() {
                "" => "missing: with --rdzv-backend etcd give its members, as HOST:PORT,HOST:PORT".into(),
                _ => format!("`{endpoints}` has an empty part: expected HOST:PORT,HOST:PORT"),
            };
            return Err(UsageError::new("--rdzv-endpoint", problem));
        }
        Ok(Self { members, ..Self::default() })
    }

    /// Applies a key of etcd. Returns whether there is such a key.
    fn apply(&mut self, key: &str, value: &str) -> Result<bool, String> {
        let file = || fs::read(value).map(Some).map_err(|error| format!("cannot read it: {error}"));
        match key {
            "protocol" => match value {
                "http" => self.https = false,
                "https" => self.https = true,
                _ => return Err("expected http or https".into()),
            },
            "etcd_prefix" => self.prefix = Some(value.to_owned()),
            // Two backends of torchrun use different names for the same file.
            "cacert" | "ca_cert" => self.ca = file()?,
            "cert" | "ssl_cert" => self.certificate = file()?,
            "key" | "ssl_cert_key" => self.key = file()?,
            "user" => self.user = Some(value.to_owned()),
            "password_file" => {
                let text = fs::read_to_string(value).map_err(|error| format!("cannot read it: {error}"))?;
                self.password = Some(text.trim_end_matches(['\r', '\n']).to_owned());
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Returns the place where the agents meet, with checked settings.
    pub(crate) fn place(&self, port: u16) -> Result<Backend, UsageError> {
        let wrong = |problem: &str| Err(UsageError::new("--rdzv-conf", problem.into()));
        let https = self.https || self.ca.is_some() || self.certificate.is_some();
        let identity = match (&self.certificate, &self.key) {
            (Some(certificate), Some(key)) => Some((certificate.clone(), key.clone())),
            (None, None) => None,
            _ => return wrong("cert and key belong together: give both"),
        };
        let user = match (&self.user, &self.password) {
            (Some(user), Some(password)) => Some((user.clone(), password.clone())),
            (None, None) => None,
            _ => return wrong("user and password_file belong together: give both"),
        };
        let member = |member: &String| {
            let (scheme, address) =
                member.split_once("://").unwrap_or((if https { "https" } else { "http" }, member.as_str()));
            let address = address.trim_end_matches('/');
            let has_port = address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
            let port = if has_port { String::new() } else { format!(":{ETCD_PORT}") };
            format!("{scheme}://{address}{port}")
        };
        Ok(Backend::Etcd(EtcdConfig {
            endpoints: self.members.iter().map(member).collect(),
            prefix: self.prefix.clone().unwrap_or_else(|| ETCD_PREFIX.into()),
            user,
            tls: https.then(|| EtcdTls { ca: self.ca.clone(), identity }),
            port,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn etcd(endpoints: &str, conf: &str) -> Result<EtcdConfig, String> {
        let (text, mut notes) = (|error: UsageError| error.to_string(), Vec::new());
        let etcd = Some(EtcdArgs::new(endpoints).map_err(text)?);
        let mut args = RendezvousArgs { etcd, ..RendezvousArgs::default() };
        args.apply(conf, &mut None, &mut notes).map_err(text)?;
        assert_eq!(notes, [""; 0]);
        match args.etcd.map(|etcd| etcd.place(7)) {
            Some(Ok(Backend::Etcd(config))) => Ok(config),
            Some(Err(error)) => Err(error.to_string()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn etcd_is_described_as_torchrun_does() {
        let config = etcd("a, b:99", "etcd_prefix=/jobs").unwrap();
        assert_eq!(config.endpoints, ["http://a:2379", "http://b:99"]);
        assert_eq!(etcd("https://a:1/,http://b/", "").unwrap().endpoints, ["https://a:1", "http://b:2379"]);
        assert!((config.prefix.as_str(), config.port) == ("/jobs", 7) && config.tls.is_none());
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| {
            let path = folder.path().join(name);
            fs::write(&path, format!("{name}\n")).unwrap();
            path.display().to_string()
        };
        let conf = format!(
            "protocol=https,cacert={},cert={},key={},user=me,password_file={}",
            path("ca"),
            path("cert"),
            path("key"),
            path("secret")
        );
        let config = etcd("a", &conf).unwrap();
        assert_eq!(config.endpoints, ["https://a:2379"]);
        assert_eq!(config.user, Some(("me".into(), "secret".into())));
        let tls = config.tls.clone().unwrap();
        assert_eq!((tls.ca, tls.identity), (Some(b"ca\n".into()), Some((b"cert\n".into(), b"key\n".into()))));
        assert!(!format!("{config:?}").contains("secret"));
    }

    fn applied(conf: &str) -> Result<(RendezvousArgs, Vec<String>), String> {
        let (mut args, mut notes) = (RendezvousArgs::default(), Vec::new());
        args.apply(conf, &mut None, &mut notes).map_err(|error| error.to_string())?;
        Ok((args, notes))
    }

    #[test]
    fn quotes_are_left_out_and_the_last_of_two_values_counts() {
        let seconds = |conf| applied(conf).map(|(args, _)| args.join_timeout);
        let nine = Ok(Some(Duration::from_secs(9)));
        for conf in
            ["join_timeout=9", "'join_timeout=9'", "\" join_timeout='9' \"", "timeout=1,join_timeout=9"]
        {
            assert_eq!(seconds(conf), nine, "{conf}");
        }
        assert_eq!(seconds(""), Ok(None));
    }

    #[test]
    fn parts_that_cannot_mean_anything_are_errors() {
        for (conf, named) in [
            ("join_timeout=9,,is_host=1", "``: expected KEY=VALUE"),
            ("join_timeout=9,", "``: expected KEY=VALUE"),
            ("=9", "`=9`"),
            ("is_host=", "`is_host=`"),
            ("join_timeout=0", "more than 0"),
            ("join_timeout=inf", "`join_timeout=inf`"),
            ("close_timeout=nan", "`close_timeout=nan`"),
            ("cas_backoff_max_seconds=-1", "cas_backoff_max_seconds=-1"),
        ] {
            let error = applied(conf).unwrap_err();
            assert!(error.contains(named), "{conf}: {error}");
        }
        let (_, notes) = applied("cas_backoff_max_seconds=0.5,store_type=file").unwrap();
        assert!(notes[0].contains("cas_backoff_max_seconds") && notes[1].contains("store_type"), "{notes:?}");
        assert!(etcd("a,,b", "").unwrap_err().contains("empty part"));
    }

    #[test]
    fn halves_and_missing_files_are_named() {
        for (endpoints, conf, named) in [
            ("", "", "--rdzv-endpoint"),
            ("a", "cert=/dev/null", "cert and key"),
            ("a", "user=me", "user and password_file"),
            ("a", "cacert=/no/such/file", "/no/such/file"),
            ("a", "protocol=ftp", "http or https"),
        ] {
            let error = etcd(endpoints, conf).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
