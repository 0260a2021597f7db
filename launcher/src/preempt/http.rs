//! A notice by a web server: the metadata service of a cloud, or a server of the user.

use std::thread;
use std::time::Duration;

use ureq::Agent;
use ureq::http::Uri;

/// Interval of the requests. Clouds give notice 30 s (Google, Azure) to 2 minutes (AWS) ahead.
const INTERVAL: Duration = Duration::from_secs(3);
const TIMEOUT: Duration = Duration::from_secs(3);
/// Maximum number of bytes that are read of an answer.
const MOST: u64 = 64 << 10;
/// Lifetime of a token of AWS, in seconds.
const TOKEN_SECONDS: &str = "21600";

/// A request, and the answer that is a notice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Question {
    pub(super) url: String,
    header: Option<(&'static str, &'static str)>,
    /// Address from which a token is requested first, which AWS requires (IMDSv2).
    token: Option<String>,
    /// Text that an answer with status 200 must contain to be a notice. `None` if any such answer
    /// is a notice.
    body: Option<&'static str>,
}

/// Checks that requests can be sent to an http:// address.
fn check(address: &str) -> Result<(), String> {
    let uri: Uri = match address.parse() {
        Ok(uri) => uri,
        // The parser's error for a missing host is less specific.
        Err(_) if matches!(address.strip_prefix("http://"), Some(rest) if rest.is_empty() || rest.starts_with('/')) =>
        {
            return Err(format!("`{address}` has no host"));
        }
        Err(error) => return Err(format!("`{address}` is no address: {error}")),
    };
    let authority = uri.authority().filter(|authority| !authority.host().is_empty());
    let authority = authority.ok_or_else(|| format!("`{address}` has no host"))?;
    let after_host = authority.as_str().rsplit_once(authority.host()).map_or("", |(_, after)| after);
    match after_host.strip_prefix(':') {
        Some(port) if authority.port_u16().is_none() => {
            Err(format!("`{address}`: `{port}` is no port: expected a number from 0 to 65535"))
        }
        _ => Ok(()),
    }
}

impl Question {
    /// Returns the question for a cloud, `None` for another name. `base` replaces the address of
    /// the metadata server.
    pub(super) fn of_cloud(name: &str, base: Option<&str>) -> Result<Option<Self>, String> {
        let server = match name {
            "aws" | "azure" => "http://169.254.169.254",
            "gcp" => "http://metadata.google.internal",
            _ => return Ok(None),
        };
        let base = base.unwrap_or(server).trim_end_matches('/');
        if !base.starts_with("http://") {
            return Err(format!("`{base}` is no http:// address"));
        }
        check(base)?;
        let at = |path: &str| format!("{base}{path}");
        Ok(Some(match name {
            // 404 until there is a notice.
            "aws" => Self {
                url: at("/latest/meta-data/spot/instance-action"),
                header: None,
                token: Some(at("/latest/api/token")),
                body: None,
            },
            "gcp" => Self {
                url: at("/computeMetadata/v1/instance/preempted"),
                header: Some(("Metadata-Flavor", "Google")),
                token: None,
                body: Some("TRUE"),
            },
            _ => Self {
                url: at("/metadata/scheduledevents?api-version=2020-07-01"),
                header: Some(("Metadata", "true")),
                token: None,
                body: Some("\"Preempt\""),
            },
        }))
    }

    /// Returns the question for any address: status 200 is a notice.
    pub(super) fn of_address(url: &str) -> Result<Self, String> {
        check(url)?;
        Ok(Self { url: url.into(), header: None, token: None, body: None })
    }

    /// Asks until there is a notice, and returns its text. The first failed request leads to a
    /// warning.
    pub(super) fn wait(&self, warn: &dyn Fn(String)) -> String {
        let config = Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false);
        // A proxy knows nothing about this machine.
        let agent: Agent = config.proxy(None).max_redirects(0).build().into();
        let mut warned = false;
        loop {
            match self.ask(&agent) {
                Ok(Some(notice)) => return notice,
                Ok(None) => {}
                Err(error) => {
                    if !std::mem::replace(&mut warned, true) {
                        warn(format!("{} gives no answer, and is asked again: {error}", self.url));
                    }
                }
            }
            thread::sleep(INTERVAL);
        }
    }

    fn ask(&self, agent: &Agent) -> Result<Option<String>, ureq::Error> {
        let mut request = agent.get(&self.url);
        if let Some((name, value)) = self.header {
            request = request.header(name, value);
        }
        if let Some(token) = &self.token {
            let answer = agent.put(token).header("X-aws-ec2-metadata-token-ttl-seconds", TOKEN_SECONDS);
            let mut answer = answer.send_empty()?;
            let token = answer.body_mut().with_config().limit(MOST).read_to_string()?;
            request = request.header("X-aws-ec2-metadata-token", token.trim());
        }
        let mut answer = request.call()?;
        let status = answer.status().as_u16();
        if status != 200 {
            return match status {
                404 => Ok(None),
                status => Err(ureq::Error::StatusCode(status)),
            };
        }
        let body = answer.body_mut().with_config().limit(MOST).read_to_string()?;
        let is_notice = self.body.is_none_or(|wanted| body.contains(wanted));
        Ok(is_notice.then(|| format!("{} says so", self.url)))
    }
}
