//! The declarations of `cpp/shim.h`, and owned handles for its pointers.
#![expect(unsafe_code, reason = "declares and calls the C++ shim")]

use std::ffi::{CStr, c_char, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::time::Duration;

use tch::Tensor;

use crate::error::{check, lossy};
use crate::{Error, Result};

macro_rules! opaque {
    ($($name:ident frees with $free:ident;)*) => {$(
        #[derive(Debug)]
        #[repr(C)]
        pub(crate) struct $name {
            _private: [u8; 0],
        }

        impl Freed for $name {
            // SAFETY: the caller upholds the contract of the trait.
            unsafe fn free(pointer: *mut Self) {
                // SAFETY: the caller owns the pointer, and the shim swallows exceptions of
                // destructors.
                unsafe { $free(pointer) }
            }
        }
    )*};
}

/// A C++ object with a function that destroys it.
pub(crate) trait Freed {
    /// # Safety
    /// The pointer came from the shim, is owned, and is not used again.
    unsafe fn free(pointer: *mut Self);
}

opaque! {
    IceStore frees with ice_store_free;
    IceGroup frees with ice_group_free;
    IceWork frees with ice_work_free;
    IceReducer frees with ice_reducer_free;
    IceScript frees with ice_script_free;
}

/// An owned C++ object.
#[derive(Debug)]
pub(crate) struct Handle<T: Freed>(NonNull<T>);

// SAFETY: no object of the shim is tied to the thread that created it; c10d itself moves them
// between threads.
unsafe impl<T: Freed> Send for Handle<T> {}
// SAFETY: a shared handle only gives access to the pointer; callers lock if c10d permits one thread
// at a time.
unsafe impl<T: Freed> Sync for Handle<T> {}

impl<T: Freed> Handle<T> {
    /// Calls a function of the shim that creates an object.
    pub(crate) fn make(call: impl FnOnce(*mut *mut T, *mut *mut c_char) -> i32) -> Result<Self> {
        let mut pointer = std::ptr::null_mut();
        check(|message| call(&mut pointer, message))?;
        let missing = || Error::new(crate::ErrorKind::Other, "the shim returned no object");
        NonNull::new(pointer).map(Self).ok_or_else(missing)
    }

    pub(crate) fn pointer(&self) -> *const T {
        self.0.as_ptr()
    }

    /// Returns the pointer for functions that change the object. `&mut self` ensures that only one
    /// runs at a time.
    pub(crate) fn pointer_mut(&mut self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T: Freed> Drop for Handle<T> {
    fn drop(&mut self) {
        // SAFETY: the handle owns the pointer, and drop runs once.
        unsafe { T::free(self.0.as_ptr()) }
    }
}

/// A borrowed string.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IceStr<'a> {
    data: *const c_char,
    size: usize,
    text: PhantomData<&'a str>,
}

impl<'a> IceStr<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Self { data: text.as_ptr().cast(), size: text.len(), text: PhantomData }
    }

    /// Creates a string with null data for `None`.
    pub(crate) fn optional(text: Option<&'a str>) -> Self {
        text.map_or(Self { data: std::ptr::null(), size: 0, text: PhantomData }, Self::new)
    }
}

/// A borrowed list of tensors.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct IceTensors<'a> {
    data: *const *mut c_void,
    size: usize,
    tensors: PhantomData<&'a Tensor>,
}

/// The `at::Tensor*` of each tensor, which may be passed to the shim during `'a`.
pub(crate) struct Pointers<'a>(Vec<*mut c_void>, PhantomData<&'a Tensor>);

impl<'a> Pointers<'a> {
    pub(crate) fn of(tensors: impl IntoIterator<Item = &'a Tensor>) -> Self {
        Self(tensors.into_iter().map(pointer).collect(), PhantomData)
    }

    pub(crate) fn list(&self) -> IceTensors<'_> {
        IceTensors { data: self.0.as_ptr(), size: self.0.len(), tensors: PhantomData }
    }
}

/// Returns the `at::Tensor*` that tch holds.
pub(crate) fn pointer(tensor: &Tensor) -> *mut c_void {
    tensor.as_ptr().cast::<c_void>().cast_mut()
}

/// Converts a duration to milliseconds for the shim: at least 1, since 0 means "no timeout" to
/// c10d.
pub(crate) fn milliseconds(duration: Duration) -> i64 {
    // c10d adds timeouts to the clock's nanoseconds. A century is far from an overflow.
    const CENTURY: i64 = 100 * 365 * 24 * 3600 * 1000;
    i64::try_from(duration.as_millis()).unwrap_or(CENTURY).clamp(1, CENTURY)
}

/// Takes ownership of a message of the shim.
pub(crate) fn take_string(message: *mut c_char) -> Option<String> {
    if message.is_null() {
        return None;
    }
    // SAFETY: the shim sets messages to strings of strdup, ended by a zero.
    let text = lossy(unsafe { CStr::from_ptr(message) });
    // SAFETY: as above; the message is not used afterwards.
    unsafe { ice_string_free(message) };
    Some(text)
}

/// Takes ownership of a value of the shim.
pub(crate) fn take_bytes(data: *mut u8, size: usize) -> Vec<u8> {
    if data.is_null() {
        return Vec::new();
    }
    // SAFETY: ice_store_get allocates at least `size` bytes and fills them.
    let bytes = unsafe { std::slice::from_raw_parts(data, size) }.to_vec();
    // SAFETY: the shim allocated it with malloc; it is not used afterwards.
    unsafe { ice_bytes_free(data) };
    bytes
}

#[repr(C)]
pub(crate) struct IceAdam {
    pub(crate) lr: f64,
    pub(crate) beta1: f64,
    pub(crate) beta2: f64,
    pub(crate) weight_decay: f64,
    pub(crate) eps: f64,
    pub(crate) amsgrad: bool,
    pub(crate) decoupled: bool,
    pub(crate) maximize: bool,
}

#[repr(C)]
pub(crate) struct IceSgd {
    pub(crate) lr: f64,
    pub(crate) momentum: f64,
    pub(crate) dampening: f64,
    pub(crate) weight_decay: f64,
    pub(crate) nesterov: bool,
    pub(crate) maximize: bool,
    pub(crate) is_first_step: bool,
}

#[repr(C)]
pub(crate) struct IceRmsprop {
    pub(crate) lr: f64,
    pub(crate) alpha: f64,
    pub(crate) eps: f64,
    pub(crate) weight_decay: f64,
    pub(crate) momentum: f64,
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct IceAutocast {
    pub(crate) cuda: bool,
    pub(crate) enabled: bool,
    pub(crate) dtype: i8,
}

#[repr(C)]
pub(crate) struct IceReducerOptions {
    pub(crate) bucket_cap_bytes: usize,
    pub(crate) first_bucket_bytes: usize,
    pub(crate) find_unused_parameters: bool,
    pub(crate) gradient_as_bucket_view: bool,
    pub(crate) static_graph: bool,
}

type Message = *mut *mut c_char;
type Tensors<'a> = IceTensors<'a>;

/// Signature of `ice_nccl_device_count` in the NCCL half.
pub(crate) type NcclDeviceCount = unsafe extern "C" fn(*mut i32, Message) -> i32;
/// Signature of `ice_group_nccl` in the NCCL half.
pub(crate) type GroupNccl =
    unsafe extern "C" fn(*const IceStore, i32, i32, i32, i64, *mut *mut IceGroup, Message) -> i32;

#[rustfmt::skip]
unsafe extern "C" {
    fn ice_string_free(message: *mut c_char);
    fn ice_bytes_free(data: *mut u8);

    pub(crate) fn ice_store_tcp(host: IceStr<'_>, port: u16, timeout_ms: i64, out: *mut *mut IceStore, message: Message) -> i32;
    pub(crate) fn ice_store_serve(out: *mut *mut IceStore, port: *mut u16, message: Message) -> i32;
    pub(crate) fn ice_store_prefix(store: *const IceStore, prefix: IceStr<'_>, out: *mut *mut IceStore, message: Message) -> i32;
    pub(crate) fn ice_store_reconnect(store: *const IceStore, out: *mut *mut IceStore, message: Message) -> i32;
    pub(crate) fn ice_store_set(store: *const IceStore, key: IceStr<'_>, value: *const u8, size: usize, message: Message) -> i32;
    pub(crate) fn ice_store_compare_set(store: *const IceStore, key: IceStr<'_>, expected: IceStr<'_>, desired: IceStr<'_>, value: *mut *mut u8, size: *mut usize, message: Message) -> i32;
    pub(crate) fn ice_store_get(store: *const IceStore, key: IceStr<'_>, value: *mut *mut u8, size: *mut usize, message: Message) -> i32;
    pub(crate) fn ice_store_add(store: *const IceStore, key: IceStr<'_>, amount: i64, sum: *mut i64, message: Message) -> i32;
    pub(crate) fn ice_store_check(store: *const IceStore, keys: *const IceStr<'_>, count: usize, all: *mut bool, message: Message) -> i32;
    pub(crate) fn ice_store_wait(store: *const IceStore, keys: *const IceStr<'_>, count: usize, timeout_ms: i64, message: Message) -> i32;
    pub(crate) fn ice_store_delete(store: *const IceStore, key: IceStr<'_>, deleted: *mut bool, message: Message) -> i32;
    fn ice_store_free(store: *mut IceStore);

    pub(crate) fn ice_group_gloo(store: *const IceStore, rank: i32, size: i32, timeout_ms: i64, interface: IceStr<'_>, hostname: IceStr<'_>, out: *mut *mut IceGroup, message: Message) -> i32;
    pub(crate) fn ice_group_all_reduce(group: *const IceGroup, tensor: *mut c_void, op: u8, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_broadcast(group: *const IceGroup, tensor: *mut c_void, root: i64, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_all_gather(group: *const IceGroup, outputs: Tensors<'_>, input: *mut c_void, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_reduce_scatter(group: *const IceGroup, output: *mut c_void, inputs: Tensors<'_>, op: u8, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_send(group: *const IceGroup, tensor: *mut c_void, to: i32, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_receive(group: *const IceGroup, tensor: *mut c_void, from: i32, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_barrier(group: *const IceGroup, out: *mut *mut IceWork, message: Message) -> i32;
    pub(crate) fn ice_group_abort(group: *const IceGroup, message: Message) -> i32;
    fn ice_group_free(group: *mut IceGroup);

    pub(crate) fn ice_work_wait(work: *const IceWork, timeout_ms: i64, message: Message) -> i32;
    pub(crate) fn ice_work_is_completed(work: *const IceWork) -> bool;
    fn ice_work_free(work: *mut IceWork);

    pub(crate) fn ice_reducer_new(parameters: Tensors<'_>, names: *const IceStr<'_>, group: *const IceGroup, options: IceReducerOptions, out: *mut *mut IceReducer, message: Message) -> i32;
    pub(crate) fn ice_reducer_prepare_forward(reducer: *const IceReducer, message: Message) -> i32;
    pub(crate) fn ice_reducer_regroup(reducer: *const IceReducer, regrouped: *mut bool, message: Message) -> i32;
    pub(crate) fn ice_reducer_order(reducer: *const IceReducer, places: *mut i64, count: usize, message: Message) -> i32;
    pub(crate) fn ice_reducer_prepare_backward(reducer: *mut IceReducer, outputs: Tensors<'_>, message: Message) -> i32;
    fn ice_reducer_free(reducer: *mut IceReducer);
    pub(crate) fn ice_batch_norm(group: *const IceGroup, x: *mut c_void, weight: *mut c_void, bias: *mut c_void, mean: *mut c_void, var: *mut c_void, count: f64, eps: f64, out: *mut *mut c_void, message: Message) -> i32;
    pub(crate) fn ice_run_backward(tensor: *mut c_void, message: Message) -> i32;

    pub(crate) fn ice_fused_adam(parameters: Tensors<'_>, gradients: Tensors<'_>, exp_avgs: Tensors<'_>, exp_avg_sqs: Tensors<'_>, max_exp_avg_sqs: Tensors<'_>, steps: Tensors<'_>, options: IceAdam, message: Message) -> i32;
    pub(crate) fn ice_fused_sgd(parameters: Tensors<'_>, gradients: Tensors<'_>, momentum_buffers: Tensors<'_>, options: IceSgd, message: Message) -> i32;
    pub(crate) fn ice_foreach_rmsprop(parameters: Tensors<'_>, gradients: Tensors<'_>, square_avgs: Tensors<'_>, grad_avgs: Tensors<'_>, momentum_buffers: Tensors<'_>, options: IceRmsprop, message: Message) -> i32;
    pub(crate) fn ice_clear_gradients(parameters: Tensors<'_>, message: Message) -> i32;
    pub(crate) fn ice_scale(list: Tensors<'_>, factor: f64, message: Message) -> i32;
    pub(crate) fn ice_clip_norm(list: Tensors<'_>, max_norm: f64, norm: *mut c_void, message: Message) -> i32;

    pub(crate) fn ice_script_load(path: IceStr<'_>, cuda_device: i32, out: *mut *mut IceScript, message: Message) -> i32;
    pub(crate) fn ice_script_tensor(script: *const IceScript, buffer: bool, index: usize, name: *mut *mut c_char, tensor: *mut *mut c_void, message: Message) -> i32;
    pub(crate) fn ice_script_has_fixed_mode(script: *const IceScript, fixed: *mut bool, message: Message) -> i32;
    pub(crate) fn ice_script_forward(script: *mut IceScript, inputs: Tensors<'_>, train: bool, count: *mut usize, message: Message) -> i32;
    pub(crate) fn ice_script_output(script: *mut IceScript, index: usize, tensor: *mut *mut c_void, message: Message) -> i32;
    fn ice_script_free(script: *mut IceScript);

    pub(crate) fn ice_autocast_begin(cuda: bool, dtype: i8, before: *mut IceAutocast, message: Message) -> i32;
    pub(crate) fn ice_autocast_end(before: IceAutocast);
    pub(crate) fn ice_amp_unscale(gradients: Tensors<'_>, found_inf: *mut c_void, inverse_scale: *mut c_void, message: Message) -> i32;
    pub(crate) fn ice_amp_update_scale(scale: *mut c_void, growth_tracker: *mut c_void, found_inf: *mut c_void, growth_factor: f64, backoff_factor: f64, growth_interval: i64, message: Message) -> i32;
}
