//! Bytes that become a Node.js `Buffer` of its own.

use std::ptr;

use napi::bindgen_prelude::ToNapiValue;
use napi::{check_status, sys};

/// Bytes on their way to JavaScript.
pub struct Bytes(pub Vec<u8>);

impl ToNapiValue for Bytes {
    unsafe fn to_napi_value(env: sys::napi_env, value: Self) -> napi::Result<sys::napi_value> {
        let mut buffer = ptr::null_mut();
        // SAFETY: the caller vouches for `env`; the source is a live slice of the given length, which napi copies before it returns.
        let status = unsafe {
            sys::napi_create_buffer_copy(
                env,
                value.0.len() as _,
                value.0.as_ptr().cast(),
                ptr::null_mut(),
                &raw mut buffer,
            )
        };
        check_status!(status, "Cannot create a Buffer")?;
        Ok(buffer)
    }
}
