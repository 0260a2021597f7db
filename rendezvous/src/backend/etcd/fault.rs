//! Failures of calls to etcd, and whether another attempt can help.

use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage};

/// A failed call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// etcd answered with an error; `code` is gRPC's.
    #[error("{message}{}", remedy(*code, message))]
    Etcd { code: u32, message: String },
    /// No answer came, or only a part of one.
    #[error("{0}")]
    Unreachable(String),
    /// The peer is not etcd, or the two ends do not agree on TLS.
    #[error("{0}")]
    Foreign(String),
}

/// The status codes of gRPC that matter here.
const INVALID_ARGUMENT: u32 = 3;
const DEADLINE_EXCEEDED: u32 = 4;
const NOT_FOUND: u32 = 5;
const PERMISSION_DENIED: u32 = 7;
const FAILED_PRECONDITION: u32 = 9;
const UNIMPLEMENTED: u32 = 12;
const UNAVAILABLE: u32 = 14;
const UNAUTHENTICATED: u32 = 16;

impl Fault {
    /// Returns whether another attempt cannot help: a wrong password, certificate or address.
    pub(super) fn is_final(&self) -> bool {
        match self {
            Self::Etcd { code, .. } => {
                const FINAL: [u32; 5] = [
                    INVALID_ARGUMENT,
                    PERMISSION_DENIED,
                    FAILED_PRECONDITION,
                    UNIMPLEMENTED,
                    UNAUTHENTICATED,
                ];
                FINAL.contains(code)
            }
            Self::Unreachable(_) => false,
            Self::Foreign(_) => true,
        }
    }

    /// Returns whether etcd has no lease of this number.
    pub(super) fn is_missing(&self) -> bool {
        matches!(self, Self::Etcd { code: NOT_FOUND, .. })
    }

    /// Returns whether another member may answer: this one has no leader, or is not etcd.
    pub(super) fn is_of_one_member(&self) -> bool {
        match self {
            Self::Etcd { code, .. } => [DEADLINE_EXCEEDED, UNIMPLEMENTED, UNAVAILABLE].contains(code),
            Self::Unreachable(_) | Self::Foreign(_) => true,
        }
    }

    /// Returns whether a new token may help: tokens expire, and changes of users or roles
    /// invalidate them.
    pub(super) fn is_old_token(&self) -> bool {
        match self {
            Self::Etcd { code: UNAUTHENTICATED, .. } => true,
            Self::Etcd { message, .. } => message.contains("revision") && message.ends_with("is old"),
            Self::Unreachable(_) | Self::Foreign(_) => false,
        }
    }
}

/// Returns the remedy for an error of etcd; empty if none is known.
fn remedy(code: u32, message: &str) -> &'static str {
    match code {
        INVALID_ARGUMENT if message.contains("user name is empty") => {
            ": it asks for a user: give user and password_file with --rdzv-conf, or a certificate of a user"
        }
        FAILED_PRECONDITION if message.contains("authentication is not enabled") => {
            ": leave out user and password_file"
        }
        UNIMPLEMENTED => ": it speaks gRPC, and is not etcd 3",
        _ => "",
    }
}

impl From<io::Error> for Fault {
    fn from(error: io::Error) -> Self {
        let Some(tls) = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) else {
            return Self::Unreachable(error.to_string());
        };
        let why = match tls {
            rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
                "it does not speak TLS: give protocol=http with --rdzv-conf".into()
            }
            rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
                "its certificate is not signed by the authority of cacert: give etcd's own with --rdzv-conf"
                    .into()
            }
            rustls::Error::AlertReceived(
                AlertDescription::CertificateRequired
                | AlertDescription::BadCertificate
                | AlertDescription::UnknownCA
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown,
            ) => {
                format!("it asks for another certificate of ours ({tls}): give cert and key with --rdzv-conf")
            }
            other => format!("TLS: {other}"),
        };
        Self::Foreign(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_etcd_are_classified_by_remedy() {
        let etcd = |code, message: &str| Fault::Etcd { code, message: message.into() };
        let kinds = |fault: Fault| (fault.is_final(), fault.is_of_one_member(), fault.is_old_token());
        for (fault, expected) in [
            (etcd(3, "etcdserver: authentication failed"), (true, false, false)),
            (etcd(16, "etcdserver: invalid auth token"), (true, false, true)),
            (etcd(3, "etcdserver: revision of auth store is old"), (true, false, true)),
            (etcd(2, "auth: revision in header is old"), (false, false, true)),
            (etcd(7, "etcdserver: permission denied"), (true, false, false)),
            (etcd(14, "etcdserver: no leader"), (false, true, false)),
            (etcd(8, "etcdserver: mvcc: database space exceeded"), (false, false, false)),
            (etcd(12, "unknown service etcdserverpb.KV"), (true, true, false)),
            (Fault::Unreachable("refused".into()), (false, true, false)),
            (Fault::Foreign("HTML".into()), (true, true, false)),
        ] {
            assert_eq!(kinds(fault.clone()), expected, "{fault}");
        }
    }
}
