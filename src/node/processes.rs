//! Processes and terminals: started or connected to, then pulled event by event.

use std::collections::HashMap;
use std::sync::Arc;

use amber_proto::{Exec, PtySize};
use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::bytes::Bytes;
use super::call::{Call, promise, whole_ms};
use crate::agent::Event;
use crate::sandbox::{self, awake};

/// Size of a terminal.
#[napi(object)]
pub struct JsPtySize {
    /// Columns.
    pub cols: u32,
    /// Rows.
    pub rows: u32,
}

impl From<JsPtySize> for PtySize {
    fn from(size: JsPtySize) -> Self {
        let clamp = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
        Self { cols: clamp(size.cols), rows: clamp(size.rows) }
    }
}

/// What to start.
#[napi(object)]
pub struct JsExec {
    /// Program.
    pub cmd: String,
    /// Arguments.
    pub args: Vec<String>,
    /// Environment.
    pub envs: HashMap<String, String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// User.
    pub user: Option<String>,
    /// Whether standard input stays open.
    pub stdin: bool,
    /// Run on a terminal of this size.
    pub pty: Option<JsPtySize>,
    /// Limit in milliseconds; 0 for none.
    pub timeout_ms: f64,
}

/// One event: output with `data`, or the end.
#[napi(object, object_from_js = false)]
pub struct JsEvent {
    /// `stdout`, `stderr`, `pty` or `end`.
    pub kind: &'static str,
    /// Output.
    pub data: Option<Bytes>,
    /// Exit code, -1 after a signal.
    pub exit_code: Option<i32>,
    /// `exit status N` or `signal: NAME`.
    pub error: Option<String>,
}

impl From<Event> for JsEvent {
    fn from(event: Event) -> Self {
        let output = |kind, data| Self { kind, data: Some(Bytes(data)), exit_code: None, error: None };
        match event {
            Event::Stdout(data) => output("stdout", data),
            Event::Stderr(data) => output("stderr", data),
            Event::Pty(data) => output("pty", data),
            Event::End(exit) => {
                Self { kind: "end", data: None, exit_code: Some(exit.exit_code), error: exit.error }
            }
        }
    }
}

/// A started process, or one that is listened to.
#[napi]
pub struct Process {
    inner: Arc<sandbox::Process>,
}

#[napi]
impl Process {
    /// Process id in the guest.
    #[napi(getter)]
    pub fn pid(&self) -> u32 {
        self.inner.pid()
    }

    /// The next events; `null` after the end. Waiting for them keeps Node alive.
    #[napi]
    pub fn next<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, Option<Vec<JsEvent>>>> {
        let process = Arc::clone(&self.inner);
        promise(env, async move {
            Ok(process.next().await?.map(|events| events.into_iter().map(JsEvent::from).collect()))
        })
    }

    /// Stops listening; the process goes on.
    #[napi]
    pub fn disconnect(&self) {
        self.inner.disconnect();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.inner.disconnect();
    }
}

/// Starts a process.
#[napi]
pub fn start_process(
    env: &Env,
    id: String,
    spec: JsExec,
    call: Call,
) -> napi::Result<PromiseRaw<'_, Process>> {
    call.run(env, async move {
        let exec = Exec {
            cmd: spec.cmd,
            args: spec.args,
            envs: spec.envs.into_iter().collect(),
            cwd: spec.cwd,
            user: spec.user,
            stdin: spec.stdin,
            pty: spec.pty.map(PtySize::from),
            tag: None,
            timeout_ms: Some(whole_ms(spec.timeout_ms)).filter(|ms| *ms > 0),
        };
        Ok(Process { inner: Arc::new(awake(&id).await?.start_process(exec).await?) })
    })
}

/// Listens to a process.
#[napi]
pub fn connect_process(
    env: &Env,
    id: String,
    pid: u32,
    timeout_ms: f64,
    call: Call,
) -> napi::Result<PromiseRaw<'_, Process>> {
    call.run(env, async move {
        let process = awake(&id).await?.connect_process(pid, whole_ms(timeout_ms)).await?;
        Ok(Process { inner: Arc::new(process) })
    })
}

/// A process that runs.
#[napi(object)]
pub struct JsProcessInfo {
    /// Process id.
    pub pid: u32,
    /// Tag.
    pub tag: Option<String>,
    /// Program.
    pub cmd: String,
    /// Arguments.
    pub args: Vec<String>,
    /// Environment it was started with.
    pub envs: HashMap<String, String>,
    /// Working directory it was started with.
    pub cwd: Option<String>,
}

/// The processes that were started through the API and still run.
#[napi]
pub fn list_processes(env: &Env, id: String, call: Call) -> napi::Result<PromiseRaw<'_, Vec<JsProcessInfo>>> {
    call.run(env, async move {
        let processes = awake(&id).await?.processes().await?;
        Ok(processes
            .into_iter()
            .map(|process| JsProcessInfo {
                pid: process.pid,
                tag: process.tag,
                cmd: process.cmd,
                args: process.args,
                envs: process.envs.into_iter().collect(),
                cwd: process.cwd,
            })
            .collect())
    })
}

/// Sends a signal. `false` if there is no such process.
#[napi]
pub fn signal_process(
    env: &Env,
    id: String,
    pid: u32,
    signal: i32,
    call: Call,
) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move { awake(&id).await?.signal(pid, signal).await })
}

/// Writes to the standard input or terminal of a process.
#[napi]
pub fn send_stdin<'env>(
    env: &'env Env,
    id: String,
    pid: u32,
    data: &[u8],
    call: Call,
) -> napi::Result<PromiseRaw<'env, ()>> {
    let data = data.to_vec();
    call.run(env, async move { awake(&id).await?.send_stdin(pid, &data).await })
}

/// Closes the standard input of a process.
#[napi]
pub fn close_stdin(env: &Env, id: String, pid: u32, call: Call) -> napi::Result<PromiseRaw<'_, ()>> {
    call.run(env, async move { awake(&id).await?.close_stdin(pid).await })
}

/// Sets the size of a terminal.
#[napi]
pub fn resize_pty(
    env: &Env,
    id: String,
    pid: u32,
    cols: u32,
    rows: u32,
    call: Call,
) -> napi::Result<PromiseRaw<'_, ()>> {
    let size = PtySize::from(JsPtySize { cols, rows });
    call.run(env, async move { awake(&id).await?.resize_pty(pid, size).await })
}
