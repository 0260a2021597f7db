//! Endpoints of etcd, and the configuration of TLS for them.

use std::sync::Arc;

use http::Uri;
use rustls::crypto::ring::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ClientConfig, RootCertStore};

use super::{EtcdConfig, EtcdTls};

/// The address of one member of etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::backend) struct Endpoint {
    /// The address as a URL: `http://host:port` or `https://host:port`.
    pub(super) url: String,
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) is_https: bool,
}

impl Endpoint {
    /// Reads `http://host:port` or `https://host:port`.
    ///
    /// # Errors
    /// Why the text is not such a URL.
    pub(in crate::backend) fn parse(url: &str) -> Result<Self, String> {
        // The text before an @ may be a password, so messages leave it out.
        let shown = url.rsplit_once('@').map_or(url, |(_, host)| host);
        let wrong =
            |why: &str| format!("`{shown}` {why}: give HOST:PORT, http://HOST:PORT or https://HOST:PORT");
        let uri: Uri = url.parse().map_err(|_| wrong("is not an address"))?;
        let is_https = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong("is neither http:// nor https://")),
        };
        let authority = uri.authority().ok_or_else(|| wrong("names no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("has a user in it, who belongs into user and password_file of --rdzv-conf"));
        }
        if uri.path() != "/" || uri.query().is_some() {
            return Err(wrong("has a path"));
        }
        let port = authority.port_u16().ok_or_else(|| wrong("names no port"))?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']').to_owned();
        if host.is_empty() {
            return Err(wrong("names no host"));
        }
        Ok(Self { url: url.trim_end_matches('/').to_owned(), host, port, is_https })
    }
}

/// Returns the configuration of TLS; `None` if no endpoint uses it.
///
/// # Errors
/// The missing or invalid certificate, and why it is invalid.
pub(in crate::backend) fn client_config(config: &EtcdConfig) -> Result<Option<Arc<ClientConfig>>, String> {
    if !config.endpoints.iter().any(|url| url.starts_with("https://")) {
        return Ok(None);
    }
    let EtcdTls { ca, identity } = config.tls.clone().unwrap_or_default();
    let ca = ca.ok_or("https needs cacert, a file with the authority of etcd's certificate")?;
    let mut roots = RootCertStore::empty();
    for certificate in certificates("cacert", &ca)? {
        roots.add(certificate).map_err(|error| format!("cacert cannot be used: {error}"))?;
    }
    let builder = ClientConfig::builder_with_provider(Arc::new(default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots);
    let Some((certificate, key)) = identity else {
        return Ok(Some(Arc::new(with_http2(builder.with_no_client_auth()))));
    };
    let key = PrivateKeyDer::from_pem_slice(&key)
        .map_err(|error| format!("key holds no private key in PEM: {error}"))?;
    let config = builder
        .with_client_auth_cert(certificates("cert", &certificate)?, key)
        .map_err(|error| format!("cert and key cannot be used: {error}"))?;
    Ok(Some(Arc::new(with_http2(config))))
}

fn with_http2(mut config: ClientConfig) -> ClientConfig {
    config.alpn_protocols = vec![b"h2".into()];
    config
}

fn certificates(name: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err(format!("{name} holds no certificate in PEM")),
        Ok(found) => Ok(found),
        Err(error) => Err(format!("{name} is not PEM: {error}")),
    }
}
