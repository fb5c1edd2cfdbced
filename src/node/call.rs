//! How a call from JavaScript becomes a task: its request timeout, its cancellation by token, and the promise.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{LazyLock, Mutex, Once, PoisonError};
use std::time::Duration;

use napi::Env;
use napi::bindgen_prelude::{PromiseRaw, ToNapiValue};
use napi_derive::napi;
use tokio::sync::watch;

use super::to_js;
use crate::sandbox::{Error, runtime};

/// Calls that can be cancelled. A token lives from `newToken` to `endToken`, which JavaScript pairs in a `finally`.
static TOKENS: LazyLock<Mutex<HashMap<u32, watch::Sender<bool>>>> = LazyLock::new(Mutex::default);
static NEXT_TOKEN: AtomicU32 = AtomicU32::new(1);

/// Makes panics silent: each is reported as the error of the operation that it ended. The hook is that of this library's own copy of the
/// standard library; without it, panics would write to the host program's standard error. Not at load time, which test programs share.
static PANICS: Once = Once::new();

/// The last argument of every asynchronous function.
#[napi(object)]
pub struct Call {
    /// From `newToken`; 0 if the call cannot be cancelled.
    pub token: u32,
    /// Limit in milliseconds; 0 for none.
    pub timeout_ms: f64,
}

/// A token for a call that `cancel` may end.
#[napi]
pub fn new_token() -> u32 {
    let token = NEXT_TOKEN.fetch_add(1, Ordering::Relaxed).max(1);
    tokens(|tokens| tokens.insert(token, watch::Sender::new(false)));
    token
}

/// Ends the call that was given the token.
#[napi]
pub fn cancel(token: u32) {
    tokens(|tokens| {
        if let Some(cancelled) = tokens.get(&token) {
            cancelled.send_replace(true);
        }
    });
}

/// Forgets a token.
#[napi]
pub fn end_token(token: u32) {
    tokens(|tokens| tokens.remove(&token));
}

fn tokens<T>(change: impl FnOnce(&mut HashMap<u32, watch::Sender<bool>>) -> T) -> T {
    change(&mut TOKENS.lock().unwrap_or_else(PoisonError::into_inner))
}

/// A duration from a number of milliseconds of JavaScript; negative numbers and NaN count as none.
pub(super) fn duration(ms: f64) -> Duration {
    // Ten thousand years: what is beyond is "never", and arithmetic with clocks stays safe.
    const LONGEST_MS: f64 = 3.2e14;
    if ms > 0.0 { Duration::from_secs_f64(ms.min(LONGEST_MS) / 1000.0) } else { Duration::ZERO }
}

/// A number of milliseconds as the agent takes it.
pub(super) fn whole_ms(ms: f64) -> u64 {
    u64::try_from(duration(ms).as_millis()).unwrap_or(u64::MAX)
}

impl Call {
    /// Runs `task` and gives the promise of its result.
    pub(super) fn run<'env, T, F>(self, env: &'env Env, task: F) -> napi::Result<PromiseRaw<'env, T>>
    where
        T: ToNapiValue + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let cancelled = tokens(|tokens| tokens.get(&self.token).map(watch::Sender::subscribe));
        let limit = duration(self.timeout_ms);
        promise(env, async move {
            tokio::select! {
                result = task => result,
                () = wait_cancelled(cancelled) => Err(Error::Cancelled),
                () = wait_limit(limit) => Err(Error::RequestTimeout(u32::try_from(limit.as_millis()).unwrap_or(u32::MAX))),
            }
        })
    }
}

/// Runs `task` on the runtime of the sandboxes and gives the promise of its result. A panic in it becomes an error.
pub(super) fn promise<'env, T, F>(env: &'env Env, task: F) -> napi::Result<PromiseRaw<'env, T>>
where
    T: ToNapiValue + Send + 'static,
    F: Future<Output = Result<T, Error>> + Send + 'static,
{
    PANICS.call_once(|| std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}"))));
    let running = runtime().map_err(|error| to_js(&error))?.spawn(task);
    env.spawn_future(async move {
        match running.await {
            Ok(result) => result.map_err(|error| to_js(&error)),
            Err(error) => Err(to_js(&Error::panicked(error))),
        }
    })
}

/// Never resolves for a call without token.
async fn wait_cancelled(cancelled: Option<watch::Receiver<bool>>) {
    if let Some(mut cancelled) = cancelled
        && cancelled.wait_for(|yes| *yes).await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Never resolves for a call without limit.
async fn wait_limit(limit: Duration) {
    if limit.is_zero() {
        return std::future::pending().await;
    }
    tokio::time::sleep(limit).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_durations_are_safe() {
        assert_eq!(duration(f64::NAN), Duration::ZERO);
        assert_eq!(duration(-1.0), Duration::ZERO);
        assert_eq!(duration(1500.0), Duration::from_millis(1500));
        assert_eq!(duration(f64::INFINITY), duration(f64::MAX));
    }
}
