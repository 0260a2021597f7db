//! What the C library does with memory that was freed.
//!
//! In the book: `docs/design.md#three-layers`.
#![expect(unsafe_code, reason = "calls the C library")]

use std::ffi::c_int;

/// Blocks below this size come from the heap and go back to it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGEST: [c_int; 2] = [1 << 30, 32 << 20];
/// So much free memory at the end of the heap stays with the process.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const KEPT: c_int = 1 << 30;

/// Lets the C library keep memory that was freed, for the step that follows: it makes tensors of the same sizes, and the system takes
/// longer to give a page, and to take it back, than a small network takes to compute on it. Up to 1 GiB stays with the process that
/// would go back to the system. Does nothing where the user has set the library's variables, and with another one than glibc.
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
        // SAFETY: mallopt takes two numbers, refuses those that it does not know, and may be called at any time.
        let set = |parameter, value| unsafe { mallopt(parameter, value) } != 0;
        // An older library takes no more than half of its smaller heaps.
        let _ = LARGEST.into_iter().any(|size| set(MMAP_THRESHOLD, size)) && set(TRIM_THRESHOLD, KEPT);
    }
}
