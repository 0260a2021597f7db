//! The requests and answers of etcd that agents use. Field numbers are those of its `rpc.proto` and
//! `kv.proto`, which have not changed since etcd 3.0.

use super::protobuf::{Fields, Malformed, Writer};

/// A request and its method.
pub(super) trait Request {
    /// Path of the method.
    const METHOD: &'static str;
    type Answer: Answer;

    fn write(&self) -> Writer;
}

/// An answer of etcd. Missing fields have their default.
pub(super) trait Answer: Default {
    fn read(bytes: &[u8]) -> Result<Self, Malformed>;
}

/// An answer whose fields are ignored.
impl Answer for () {
    fn read(_: &[u8]) -> Result<Self, Malformed> {
        Ok(())
    }
}

#[derive(Debug)]
pub(super) struct Authenticate<'a> {
    pub(super) name: &'a str,
    pub(super) password: &'a str,
}

impl Request for Authenticate<'_> {
    const METHOD: &'static str = "/etcdserverpb.Auth/Authenticate";
    type Answer = Token;

    fn write(&self) -> Writer {
        Writer::default().bytes(1, self.name.as_bytes()).bytes(2, self.password.as_bytes())
    }
}

#[derive(Debug, Default)]
pub(super) struct Token(pub(super) Vec<u8>);

impl Answer for Token {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut token = Self::default();
        for field in Fields(bytes) {
            if let (2, value) = field? {
                token.0 = value.bytes()?.into();
            }
        }
        Ok(token)
    }
}

/// Reads one key.
#[derive(Debug, Clone)]
pub(super) struct Get {
    pub(super) key: String,
}

impl Request for Get {
    const METHOD: &'static str = "/etcdserverpb.KV/Range";
    type Answer = GetResult;

    fn write(&self) -> Writer {
        Writer::default().bytes(1, self.key.as_bytes())
    }
}

#[derive(Debug, Default)]
pub(super) struct GetResult {
    first: Option<KeyValue>,
}

impl GetResult {
    /// Returns the key; `None` if etcd does not have it.
    pub(super) fn first(&self) -> Option<&KeyValue> {
        self.first.as_ref()
    }
}

impl Answer for GetResult {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut found = Self::default();
        for field in Fields(bytes) {
            if let (2, value) = field?
                && found.first.is_none()
            {
                found.first = Some(KeyValue::read(value.bytes()?)?);
            }
        }
        Ok(found)
    }
}

#[derive(Debug, Default)]
pub(super) struct KeyValue {
    pub(super) create_revision: i64,
    pub(super) mod_revision: i64,
    pub(super) lease: i64,
    pub(super) value: Vec<u8>,
}

impl KeyValue {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut kv = Self::default();
        for field in Fields(bytes) {
            match field? {
                (2, value) => kv.create_revision = value.int()?,
                (3, value) => kv.mod_revision = value.int()?,
                (5, value) => kv.value = value.bytes()?.into(),
                (6, value) => kv.lease = value.int()?,
                _ => {}
            }
        }
        Ok(kv)
    }
}

/// A write of a key within a transaction.
#[derive(Debug, Clone)]
pub(super) struct Put {
    pub(super) key: String,
    pub(super) value: Vec<u8>,
    /// Lease of the key; 0 for none.
    pub(super) lease: i64,
}

impl Put {
    fn write(&self) -> Writer {
        Writer::default().bytes(1, self.key.as_bytes()).bytes(2, &self.value).int(3, self.lease)
    }
}

/// A comparison: a key was created or last written by this revision. A missing key has revision 0.
#[derive(Debug, Clone)]
pub(super) enum Compare {
    Created { key: String, by: i64 },
    Written { key: String, by: i64 },
}

impl Compare {
    fn write(&self) -> Writer {
        // The value of `CompareTarget`, and the field number within the union.
        let (target, key, field, revision) = match self {
            Self::Created { key, by } => (1, key, 5, by),
            Self::Written { key, by } => (2, key, 6, by),
        };
        Writer::default().int(2, target).bytes(3, key.as_bytes()).int(field, *revision)
    }
}

/// A transaction: writes keys if all comparisons hold, and reads keys otherwise.
#[derive(Debug, Clone, Default)]
pub(super) struct Txn {
    pub(super) compare: Vec<Compare>,
    pub(super) success: Vec<Put>,
    pub(super) failure: Vec<Get>,
}

impl Request for Txn {
    const METHOD: &'static str = "/etcdserverpb.KV/Txn";
    type Answer = TxnResult;

    fn write(&self) -> Writer {
        let puts = self.success.iter().map(|put| Writer::default().message(2, put.write()));
        let gets = self.failure.iter().map(|get| Writer::default().message(1, get.write()));
        Writer::default()
            .messages(1, self.compare.iter().map(Compare::write))
            .messages(2, puts)
            .messages(3, gets)
    }
}

#[derive(Debug, Default)]
pub(super) struct TxnResult {
    pub(super) revision: i64,
    pub(super) succeeded: bool,
    responses: Vec<Option<GetResult>>,
}

impl TxnResult {
    /// Returns the result of the operation at `index`; `None` if that did not read a key.
    pub(super) fn found(&self, index: usize) -> Option<&GetResult> {
        self.responses.get(index)?.as_ref()
    }
}

impl Answer for TxnResult {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut done = Self::default();
        for field in Fields(bytes) {
            match field? {
                (1, value) => done.revision = revision(value.bytes()?)?,
                (2, value) => done.succeeded = value.int()? != 0,
                (3, value) => {
                    let mut found = None;
                    for field in Fields(value.bytes()?) {
                        if let (1, value) = field? {
                            found = Some(GetResult::read(value.bytes()?)?);
                        }
                    }
                    done.responses.push(found);
                }
                _ => {}
            }
        }
        Ok(done)
    }
}

/// Reads the revision of a `ResponseHeader`.
fn revision(header: &[u8]) -> Result<i64, Malformed> {
    let mut revision = 0;
    for field in Fields(header) {
        if let (3, value) = field? {
            revision = value.int()?;
        }
    }
    Ok(revision)
}

#[derive(Debug)]
pub(super) struct LeaseGrant {
    /// Length in seconds.
    pub(super) ttl: i64,
}

impl Request for LeaseGrant {
    const METHOD: &'static str = "/etcdserverpb.Lease/LeaseGrant";
    type Answer = Lease;

    fn write(&self) -> Writer {
        Writer::default().int(1, self.ttl)
    }
}

#[derive(Debug)]
pub(super) struct LeaseKeepAlive {
    pub(super) lease: i64,
}

impl Request for LeaseKeepAlive {
    const METHOD: &'static str = "/etcdserverpb.Lease/LeaseKeepAlive";
    type Answer = Lease;

    fn write(&self) -> Writer {
        Writer::default().int(1, self.lease)
    }
}

/// A granted or renewed lease.
#[derive(Debug, Default)]
pub(super) struct Lease {
    pub(super) id: i64,
    /// Length in seconds; 0 if the lease to be renewed had expired.
    pub(super) ttl: i64,
}

impl Answer for Lease {
    fn read(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut lease = Self::default();
        for field in Fields(bytes) {
            match field? {
                (2, value) => lease.id = value.int()?,
                (3, value) => lease.ttl = value.int()?,
                _ => {}
            }
        }
        Ok(lease)
    }
}

#[derive(Debug)]
pub(super) struct LeaseRevoke {
    pub(super) lease: i64,
}

impl Request for LeaseRevoke {
    const METHOD: &'static str = "/etcdserverpb.Lease/LeaseRevoke";
    type Answer = ();

    fn write(&self) -> Writer {
        Writer::default().int(1, self.lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparison_with_revision_zero_is_encoded() {
        let txn = Txn { compare: vec![Compare::Created { key: "a".into(), by: 0 }], ..Txn::default() };
        assert_eq!(txn.write().finish(), [10, 7, 16, 1, 26, 1, b'a', 40, 0]);
    }

    #[test]
    fn answers_without_defaults_or_with_unknown_fields_are_read() {
        assert!(GetResult::read(&[]).unwrap().first().is_none());
        let unknown = || Writer::default().int(15, 1).bytes(14, b"more");
        let kv = unknown().int(2, 3).int(3, 5).bytes(5, b"value").int(6, -9);
        let found = || unknown().message(2, unknown()).message(2, Writer::default());
        let first = GetResult::read(&found().message(2, Writer::default()).finish()).unwrap();
        assert_eq!(first.first().unwrap().value, b"");
        let kv = GetResult::read(&unknown().message(2, kv).finish()).unwrap();
        let kv = kv.first().unwrap();
        assert_eq!((kv.create_revision, kv.mod_revision, &*kv.value, kv.lease), (3, 5, &b"value"[..], -9));
        let header = unknown().int(3, 7);
        let responses = [Writer::default().message(2, unknown()), Writer::default().message(1, found())];
        let done = TxnResult::read(&unknown().message(1, header).messages(3, responses).finish()).unwrap();
        assert_eq!((done.revision, done.succeeded), (7, false));
        assert!(done.found(0).is_none() && done.found(1).is_some() && done.found(2).is_none());
    }

    #[test]
    fn answers_of_another_kind_are_errors() {
        assert!(GetResult::read(&Writer::default().int(2, 1).finish()).is_err());
        assert!(GetResult::read(&Writer::default().bytes(2, &[0xFF]).finish()).is_err());
        assert!(TxnResult::read(&Writer::default().bytes(2, b"true").finish()).is_err());
        assert!(Lease::read(&Writer::default().bytes(3, b"1").finish()).is_err());
        assert!(Token::read(&Writer::default().int(2, 1).finish()).is_err());
    }
}
