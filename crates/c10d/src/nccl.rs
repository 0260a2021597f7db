//! The CUDA half: a separate shared object, loaded only if CUDA is requested.
//!
//! It has no collectives of its own: an NCCL group is a [`ProcessGroup`](crate::ProcessGroup) like
//! any other.
//!
//! In the book: the assignment of GPUs (`docs/placement.md#gpus`).
#![expect(unsafe_code, reason = "opens a shared object and calls its functions")]

use std::env;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_void};
use std::mem::transmute;
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;

use crate::error::{check, lossy};
use crate::ffi::{GroupNccl, Handle, IceGroup, NcclDeviceCount};
use crate::{Error, ErrorKind, Result, Store};

/// Path at which the build left the shared object. Empty if the CUDA headers were missing.
const BUILT: &str = env!("ICE_NCCL_BUILT");
const RTLD_NOW: c_int = 2;
const RTLD_GLOBAL: c_int = 0x100;

unsafe extern "C" {
    fn dlopen(path: *const c_char, flags: c_int) -> *mut c_void;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
    fn setenv(name: *const c_char, value: *const c_char, overwrite: c_int) -> c_int;
}

struct Library {
    device_count: NcclDeviceCount,
    group: GroupNccl,
}

/// Loads the CUDA half of libtorch into this process. Must be called before tch is asked about
/// CUDA, including by `Cuda::is_available()`: libtorch decides at the first such call whether it
/// has CUDA. Later calls do nothing. `ICE_NCCL_LIBRARY` names another file.
///
/// # Errors
/// `Unavailable` in a build without the CUDA half or if it cannot be opened; `NoGpu` if this
/// process sees no GPU.
pub fn load() -> Result<()> {
    library().map(drop)
}

/// Keeps c10d's watchdog from terminating this process when a collective fails. The caller instead
/// aborts the group and continues. Must be called before this process has other threads, and before
/// the first group is created.
///
/// It also prevents a sleep of the watchdog: four times `TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC`, by
/// default a minute, before its thread can be joined. An abort of the group has to wait for that
/// join. The time is meant for dumps of the flight recorder. For such dumps, set
/// `TORCH_NCCL_DUMP_ON_TIMEOUT` and `TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC`, which this function does
/// not overwrite.
pub fn keep_process_after_errors() {
    for (name, value, overwrite) in [
        (c"TORCH_NCCL_ASYNC_ERROR_HANDLING", c"0", 1),
        (c"TORCH_NCCL_DUMP_ON_TIMEOUT", c"0", 0),
        (c"TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", c"0", 0),
    ] {
        // SAFETY: both strings end in a zero, and the caller ensures that no other thread reads the
        // environment yet.
        unsafe { setenv(name.as_ptr(), value.as_ptr(), overwrite) };
    }
}

pub(crate) fn group(
    store: &Store,
    rank: i32,
    size: i32,
    device: i32,
    timeout_ms: i64,
) -> Result<Handle<IceGroup>> {
    let library = library()?;
    Handle::make(|out, message| {
        // SAFETY: the function has the signature in the shim's header, the store is alive, and the
        // out-pointers are valid.
        unsafe { (library.group)(store.pointer(), rank, size, device, timeout_ms, out, message) }
    })
}

fn library() -> Result<&'static Library> {
    static LIBRARY: OnceLock<Result<Library>> = OnceLock::new();
    let library = LIBRARY.get_or_init(open).as_ref().map_err(Clone::clone)?;
    let mut count = 0;
    // SAFETY: the function has the signature in the shim's header, and the out-pointers are valid.
    check(|message| unsafe { (library.device_count)(&mut count, message) })?;
    match count {
        0 => Err(Error::new(
            ErrorKind::NoGpu,
            "this process sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES",
        )),
        _ => Ok(library),
    }
}

fn open() -> Result<Library> {
    let named = env::var_os("ICE_NCCL_LIBRARY").filter(|value| !value.is_empty());
    let path = named.as_deref().unwrap_or(OsStr::new(BUILT));
    if path.is_empty() {
        return Err(Error::new(
            ErrorKind::Unavailable,
            "this build has no NCCL: run scripts/setup --cuda, then build again",
        ));
    }
    let c_path =
        CString::new(path.as_bytes()).map_err(|_| Error::invalid("ICE_NCCL_LIBRARY contains a zero byte"))?;
    // SAFETY: the path ends in a zero, and the initializers that run are those of libtorch and
    // CUDA.
    let library = unsafe { dlopen(c_path.as_ptr(), RTLD_NOW | RTLD_GLOBAL) };
    if library.is_null() {
        let problem = last_error();
        return Err(unavailable(path, &problem));
    }
    let device_count = symbol(library, c"ice_nccl_device_count", path)?;
    let group = symbol(library, c"ice_group_nccl", path)?;
    // SAFETY: the symbols are functions of the shim's header with these signatures, and the library
    // is never closed.
    unsafe {
        Ok(Library {
            device_count: transmute::<*mut c_void, NcclDeviceCount>(device_count),
            group: transmute::<*mut c_void, GroupNccl>(group),
        })
    }
}

fn symbol(library: *mut c_void, name: &CStr, path: &OsStr) -> Result<*mut c_void> {
    // SAFETY: the library is open and the name ends in a zero.
    let symbol = unsafe { dlsym(library, name.as_ptr()) };
    match symbol.is_null() {
        true => Err(unavailable(path, &last_error())),
        false => Ok(symbol),
    }
}

fn last_error() -> String {
    // SAFETY: dlerror returns null or a string that is valid until this thread's next call.
    let error = unsafe { dlerror() };
    if error.is_null() {
        return "no reason given".into();
    }
    // SAFETY: as above.
    lossy(unsafe { CStr::from_ptr(error) })
}

fn unavailable(path: &OsStr, problem: &str) -> Error {
    let message = format!(
        "cannot open the NCCL half {}: {problem}: run scripts/setup --cuda, then build again",
        path.display()
    );
    Error::new(ErrorKind::Unavailable, message)
}
