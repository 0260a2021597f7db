use std::io;
use std::sync::Arc;

use ring::rand::SystemRandom;
use ring::signature::Ed25519KeyPair;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, ring as provider};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::version::TLS13;
use rustls::{
    AlertDescription, ClientConfig, ConnectionCommon, DigitallySignedStruct, ServerConfig, SignatureScheme,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, Join, ReadHalf, Take, WriteHalf};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::{Failure, MAX_UNAUTHENTICATED};
use crate::channel::{Channel, timed};

/// An error of TLS.
pub(crate) type Problem = rustls::Error;

/// RFC 9266, section 4.2.
const BINDING: &[u8] = b"EXPORTER-Channel-Binding";

/// Returns the error of TLS within an error of reading or writing.
pub(crate) fn problem(error: &io::Error) -> Option<Problem> {
    error.get_ref()?.downcast_ref::<rustls::Error>().cloned()
}

/// A stream whose input is limited until the peer is authenticated.
type Counted<S> = Join<Take<ReadHalf<S>>, WriteHalf<S>>;

/// The coordinator's end of a TLS connection.
pub(crate) struct Accepted<S>(server::TlsStream<Counted<S>>);

/// The acceptor of TLS connections, with the server's key.
#[derive(Clone)]
pub(crate) struct Acceptor(TlsAcceptor);

impl Acceptor {
    /// Creates a key.
    pub(crate) fn new() -> io::Result<Self> {
        let pkcs8 = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
            .map_err(|_| io::Error::other("no key for TLS could be made"))?;
        let key = provider::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(pkcs8.as_ref()))
            .map_err(io::Error::other)?;
        let public = key.public_key().ok_or_else(|| io::Error::other("a key without its public part"))?;
        let shown = CertifiedKey::new(vec![public.as_ref().to_vec().into()], key);
        let mut config = ServerConfig::builder_with_provider(Arc::new(provider::default_provider()))
            .with_protocol_versions(&[&TLS13])
            .map_err(io::Error::other)?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(shown))));
        // No resumption: an agent that reconnects authenticates again.
        config.send_tls13_tickets = 0;
        Ok(Self(TlsAcceptor::from(Arc::new(config))))
    }

    /// Performs the handshake of TLS. The peer is not authenticated by it.
    pub(crate) async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: S,
    ) -> Result<(Accepted<S>, Channel), Failure> {
        let (reader, writer) = tokio::io::split(stream);
        let counted = tokio::io::join(reader.take(MAX_UNAUTHENTICATED), writer);
        let stream = timed(self.0.accept(counted)).await?;
        let channel = binding(stream.get_ref().1)?;
        Ok((Accepted(stream), channel))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Accepted<S> {
    /// Returns the stream for the exchange of proofs.
    pub(crate) fn unauthenticated(&mut self) -> &mut (impl AsyncRead + AsyncWrite + Unpin + use<S>) {
        &mut self.0
    }

    /// Lifts the limit of the input, once the peer is authenticated.
    pub(crate) fn authenticated(mut self) -> server::TlsStream<impl AsyncRead + AsyncWrite + Unpin + use<S>> {
        self.0.get_mut().0.reader_mut().set_limit(u64::MAX);
        self.0
    }
}

/// Performs the agent's side of the TLS handshake. The peer is not authenticated by it.
pub(crate) async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
) -> Result<(client::TlsStream<S>, Channel), Failure> {
    let provider = Arc::new(provider::default_provider());
    let verifier = Arc::new(AnyKey(provider.signature_verification_algorithms));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&TLS13])
        .map_err(io::Error::other)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth();
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    // Required by the interface; neither sent (no SNI) nor verified.
    let name = ServerName::from(std::net::IpAddr::from([0, 0, 0, 0]));
    let connecting = TlsConnector::from(Arc::new(config)).connect(name, stream);
    let stream = timed(connecting).await.map_err(|error| match problem(&error) {
        Some(rustls::Error::AlertReceived(AlertDescription::HandshakeFailure)) => Failure::Refused,
        _ => Failure::Io(error),
    })?;
    let channel = binding(stream.get_ref().1)?;
    Ok((stream, channel))
}

fn binding<D>(connection: &ConnectionCommon<D>) -> io::Result<Channel> {
    let exported = connection.export_keying_material([0; 32], BINDING, Some(&[]));
    Ok(Channel::Tls(exported.map_err(io::Error::other)?))
}

/// Accepts any raw public key, and verifies that the peer has the private one.
#[derive(Debug)]
struct AnyKey(WebPkiSupportedAlgorithms);

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not offered".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let key = SubjectPublicKeyInfoDer::from(key.as_ref());
        rustls::crypto::verify_tls13_signature_with_raw_key(message, &key, signed, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, DuplexStream, copy_bidirectional, duplex};
    use tokio::time::Instant;

    use super::super::{HANDSHAKE, REFUSAL};
    use super::*;
    use crate::auth::{AuthError, Token, admit, greet};

    const ROOM: usize = 1 << 16;

    async fn agent(stream: DuplexStream, token: Option<Token>) -> Result<(), AuthError> {
        let (mut stream, channel) = connect(stream).await?;
        greet(&mut stream, token.as_ref(), &channel).await.map(drop)
    }

    async fn coordinator(stream: DuplexStream, token: Option<Token>) -> Result<(), AuthError> {
        let (mut accepted, channel) = Acceptor::new()?.accept(stream).await?;
        admit(accepted.unauthenticated(), token.as_ref(), &channel).await.map(drop)
    }

    /// Terminates the agent's TLS, opens another connection to the coordinator, and relays all
    /// bytes.
    async fn man_in_the_middle(agent: DuplexStream, coordinator: DuplexStream) {
        let (accepted, _) = Acceptor::new().unwrap().accept(agent).await.unwrap();
        let (mut inward, _) = connect(coordinator).await.unwrap();
        let _ = copy_bidirectional(&mut accepted.authenticated(), &mut inward).await;
    }

    #[tokio::test]
    async fn man_in_the_middle_fails_the_token_proof() {
        let token = || Some(Token::new("sixteen characters").unwrap());
        for token in [token(), None] {
            let ((ours, his), (hers, theirs)) = (duplex(ROOM), duplex(ROOM));
            let (greeted, admitted, ()) = tokio::join!(
                agent(ours, token.clone()),
                coordinator(theirs, token.clone()),
                man_in_the_middle(his, hers)
            );
            if token.is_some() {
                assert!(matches!(greeted, Err(AuthError::WrongTokenOverTls)), "{greeted:?}");
                assert!(matches!(admitted, Err(AuthError::WrongTokenOverTls)), "{admitted:?}");
            } else {
                // Without a token the attack succeeds.
                greeted.and(admitted).unwrap();
            }
        }
    }

    #[tokio::test]
    async fn both_ends_of_a_connection_have_the_same_binding_and_no_other_has() {
        let acceptor = Acceptor::new().unwrap();
        let mut bindings = Vec::new();
        for _ in 0..2 {
            let (ours, theirs) = duplex(ROOM);
            let (connected, accepted) = tokio::join!(connect(ours), acceptor.accept(theirs));
            let (ours, theirs) =
                (connected.unwrap().1, accepted.map_err(|error| format!("{error:?}")).unwrap().1);
            assert!(ours == theirs && !bindings.contains(&ours));
            bindings.push(ours);
        }
    }

    #[tokio::test]
    async fn authentication_needs_a_third_of_the_byte_limit() {
        let token = || Some(Token::new("sixteen characters").unwrap());
        let ((ours, mut outer), (mut inner, theirs)) = (duplex(ROOM), duplex(ROOM));
        let wire = async { copy_bidirectional(&mut outer, &mut inner).await.unwrap() };
        let ends = async { tokio::join!(agent(ours, token()), coordinator(theirs, token())) };
        let ((sent, _), (greeted, admitted)) = tokio::join!(wire, ends);
        greeted.and(admitted).unwrap();
        assert!(sent < MAX_UNAUTHENTICATED / 3, "{sent}");
    }

    #[tokio::test(start_paused = true)]
    async fn endless_handshake_is_cut_off() {
        let start = Instant::now();
        let (mut unauthenticated, theirs) = duplex(ROOM);
        // A ClientHello of 65,000 bytes, of which 8,000 arrive, in two records.
        let part = [
            &[HANDSHAKE, 3, 1, 0x0F, 0xA0, 1, 0, 0xFD, 0xE8][..],
            &[0; 3996],
            &[HANDSHAKE, 3, 1, 0x0F, 0xA0],
            &[0; 4000],
        ];
        unauthenticated.write_all(&part.concat()).await.unwrap();
        assert!(Acceptor::new().unwrap().accept(theirs).await.is_err());
        assert_eq!(start.elapsed(), std::time::Duration::ZERO, "it was waited for");
    }

    #[tokio::test(start_paused = true)]
    async fn incomplete_handshake_times_out() {
        let (mut unauthenticated, theirs) = duplex(ROOM);
        unauthenticated.write_all(&[HANDSHAKE, 3, 1, 0, 200, 1, 0, 0, 196, 3, 3]).await.unwrap();
        let refused = Acceptor::new().unwrap().accept(theirs).await.err().unwrap();
        assert!(
            matches!(&refused, Failure::Io(error) if error.kind() == io::ErrorKind::TimedOut),
            "{refused:?}"
        );
    }

    #[tokio::test]
    async fn peer_without_tls_is_named_in_the_error() {
        for (answer, expected) in [
            (&REFUSAL[..], "the endpoint has none"),
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", "no TLS with the endpoint"),
        ] {
            let (ours, mut theirs) = duplex(ROOM);
            theirs.write_all(answer).await.unwrap();
            let error = AuthError::from(connect(ours).await.err().unwrap()).to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
