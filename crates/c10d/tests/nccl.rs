//! Loading NCCL: the kind of error if it cannot be loaded, and success on a machine with a GPU and
//! a build for it.

use ice_c10d::testing::serve_store;
use ice_c10d::{ErrorKind, ProcessGroup, Store, nccl};

const BUILT: bool = !env!("ICE_NCCL_BUILT").is_empty();

#[test]
fn cuda_is_refused_with_a_reason_where_it_is_missing() {
    let (_server, port) = serve_store().unwrap();
    let timeout = std::time::Duration::from_secs(10);
    let store = Store::tcp("127.0.0.1", port, timeout).unwrap();
    let gpu = std::path::Path::new("/dev/nvidia0").exists();
    let expected = match (BUILT, gpu) {
        (false, _) => Err(ErrorKind::Unavailable),
        (true, false) => Err(ErrorKind::NoGpu),
        (true, true) => Ok(()),
    };
    assert_eq!(nccl::load().map_err(|error| error.kind()), expected);
    let group = ProcessGroup::nccl(&store, 0, 1, 0, timeout).map(drop);
    if let Err(error) = &group {
        let remedy = if BUILT { "nvidia-smi" } else { "scripts/setup --cuda" };
        assert!(error.to_string().contains(remedy), "{error}");
    }
    assert_eq!(group.map_err(|error| error.kind()), expected);
    let error = ProcessGroup::nccl(&store, 1, 1, 0, timeout).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
}
