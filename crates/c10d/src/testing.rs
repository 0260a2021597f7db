//! A store server for tests that must not depend on the launcher's.

use crate::{Result, Store};

/// Hosts a store until it is dropped.
#[derive(Debug)]
pub struct TestStoreServer {
    _store: Store,
}

/// Hosts a store on a free port of loopback.
///
/// # Errors
/// `Network` if it cannot listen.
pub fn serve_store() -> Result<(TestStoreServer, u16)> {
    let (store, port) = Store::serve()?;
    Ok((TestStoreServer { _store: store }, port))
}
