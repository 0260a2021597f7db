//! The C library's treatment of freed memory.
//!
//! In the book: `docs/design.md#three-layers`.
#![expect(unsafe_code, reason = "calls the C library")]

use std::ffi::c_int;

/// Sizes in bytes, in order of preference: smaller blocks come from the heap and return to it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGEST: [c_int; 2] = [1 << 30, 32 << 20];
/// Free memory in bytes that stays with the process at the end of the heap.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT: c_int = 1 << 30;

/// Lets the C library keep freed memory for the next step, which allocates tensors of the same
/// sizes. The kernel takes longer to provide and reclaim a page than a small network takes to
/// compute on it. Up to 1 GiB then stays with the process. Does nothing if the user has set the
/// library's variables, or on a C library other than glibc.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const TRIM_THRESHOLD: c_int = -1;
        const MMAP_THRESHOLD: c_int = -3;
        unsafe extern "C" {
            fn mallopt(parameter: c_int, value: c_int) -> c_int;
        }
        let variables =
            ["GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"];
        if variables.iter().any(|name| std::env::var_os(name).is_some()) {
            return;
        }
        // SAFETY: mallopt takes two numbers, rejects unknown ones, and may be called at any time.
        let set = |parameter, value| unsafe { mallopt(parameter, value) } != 0;
        // An older library accepts at most half of its smaller heaps' size.
        let _ = LARGEST.into_iter().any(|size| set(MMAP_THRESHOLD, size)) && set(TRIM_THRESHOLD, KEPT);
    }
}
