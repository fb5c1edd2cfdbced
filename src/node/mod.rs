//! The Node.js side: the only place that names napi. Functions are thin: they copy their arguments, start a task on the runtime of
//! [`crate::sandbox`] and give a promise back. Nothing blocks the JavaScript thread, and nothing but a promise that is waited for keeps
//! Node alive. Errors travel as `ERR_X: text` and become classes in `lib/errors.js`.
//!
//! Buffers are copied in both directions: hosts like Electron forbid external ArrayBuffers, and a copy of a chunk costs less than the
//! bookkeeping of sharing it with a garbage collector.

pub mod bytes;
pub mod call;
pub mod doctor;
pub mod files;
pub mod processes;
pub mod sandboxes;
pub mod snapshots;
pub mod store;
pub mod watches;

use napi_derive::{module_init, napi};

use crate::sandbox::Error;

/// Once per process, before the first environment uses the addon.
#[module_init]
fn init() {
    // Threads of sandboxes outlive the environment (a worker thread, say) that happened to load the addon first.
    napi::bindgen_prelude::retain_current_module_for_unload_safety();
}

/// Version of the addon, to be compared with that of the package.
#[napi]
pub fn version() -> &'static str {
    env!("CARGO_PKG_VERSION")
}

/// Every error code that can occur, for the test that compares them with the classes.
#[napi]
pub fn error_codes() -> Vec<&'static str> {
    Error::CODES.to_vec()
}

/// The error as napi carries it.
fn to_js(error: &Error) -> napi::Error {
    napi::Error::from_reason(error.to_wire())
}
