//! Files: metadata operations, and contents as streams of chunks.

use std::collections::HashMap;
use std::sync::Arc;

use amber_proto::{EntryInfo, FileType, Read, Write};
use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::bytes::Bytes;
use super::call::{Call, promise};
use crate::sandbox::{self, awake};

/// A directory entry.
#[napi(object, object_from_js = false)]
pub struct JsEntry {
    /// Last component of the path.
    pub name: String,
    /// Absolute path.
    pub path: String,
    /// `file` or `dir`; absent for anything else.
    pub kind: Option<&'static str>,
    /// Size in bytes.
    pub size: f64,
    /// Permission bits.
    pub mode: u32,
    /// Such as `-rw-r--r--`.
    pub permissions: String,
    /// Owner.
    pub owner: String,
    /// Group.
    pub group: String,
    /// Milliseconds since the epoch.
    pub modified_ms: f64,
    /// Where a link leads.
    pub symlink_target: Option<String>,
    /// Extended attributes of E2B; absent if there are none.
    pub metadata: Option<HashMap<String, String>>,
}

impl From<EntryInfo> for JsEntry {
    fn from(entry: EntryInfo) -> Self {
        Self {
            name: entry.name,
            path: entry.path,
            kind: match entry.kind {
                FileType::File => Some("file"),
                FileType::Dir => Some("dir"),
                FileType::Unknown => None,
            },
            // Sizes beyond 2^53 do not occur in a guest.
            size: entry.size as f64,
            mode: entry.mode,
            permissions: entry.permissions,
            owner: entry.owner,
            group: entry.group,
            modified_ms: (entry.modified_ns as f64 / 1e6).floor(),
            symlink_target: entry.symlink_target,
            metadata: (!entry.metadata.is_empty()).then(|| entry.metadata.into_iter().collect()),
        }
    }
}

/// The content of a file on its way to JavaScript.
#[napi]
pub struct FileReader {
    inner: Arc<sandbox::FileReader>,
}

#[napi]
impl FileReader {
    /// The next piece; `null` at the end.
    #[napi]
    pub fn next<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, Option<Bytes>>> {
        let reader = Arc::clone(&self.inner);
        promise(env, async move { Ok(reader.next().await?.map(Bytes)) })
    }

    /// Ends the transfer.
    #[napi]
    pub fn close(&self) {
        self.inner.close();
    }
}

impl Drop for FileReader {
    fn drop(&mut self) {
        self.inner.close();
    }
}

/// The content of a file on its way to the guest.
#[napi]
pub struct FileWriter {
    inner: Arc<sandbox::FileWriter>,
}

#[napi]
impl FileWriter {
    /// Sends a piece; resolves when it is on its way, which is the back-pressure.
    #[napi]
    pub fn write<'env>(&self, env: &'env Env, data: &[u8]) -> napi::Result<PromiseRaw<'env, ()>> {
        let writer = Arc::clone(&self.inner);
        let data = data.to_vec();
        promise(env, async move { writer.send(&data).await })
    }

    /// Declares the file complete.
    #[napi]
    pub fn finish<'env>(&self, env: &'env Env) -> napi::Result<PromiseRaw<'env, JsEntry>> {
        let writer = Arc::clone(&self.inner);
        promise(env, async move { Ok(writer.finish().await?.into()) })
    }

    /// Gives the file up: what was there before stays.
    #[napi]
    pub fn abort(&self) {
        self.inner.abort();
    }
}

impl Drop for FileWriter {
    fn drop(&mut self) {
        self.inner.abort();
    }
}

/// What to read.
#[napi(object)]
pub struct JsRead {
    /// Path.
    pub path: String,
    /// User.
    pub user: Option<String>,
    /// First byte.
    pub offset: Option<f64>,
    /// Number of bytes; to the end if absent.
    pub length: Option<f64>,
}

/// Opens a file for reading.
#[napi]
pub fn open_file(
    env: &Env,
    id: String,
    spec: JsRead,
    call: Call,
) -> napi::Result<PromiseRaw<'_, FileReader>> {
    call.run(env, async move {
        // Whole numbers of bytes: JavaScript has checked them.
        let read = Read {
            path: spec.path,
            user: spec.user,
            offset: spec.offset.unwrap_or(0.0) as u64,
            length: spec.length.map(|length| length as u64),
        };
        Ok(FileReader { inner: Arc::new(awake(&id).await?.open_file(read).await?) })
    })
}

/// What to write.
#[napi(object)]
pub struct JsWrite {
    /// Path.
    pub path: String,
    /// User.
    pub user: Option<String>,
    /// Number of bytes, if it is known.
    pub length: Option<f64>,
    /// Extended attributes of E2B.
    pub metadata: Option<HashMap<String, String>>,
}

impl From<JsWrite> for Write {
    fn from(spec: JsWrite) -> Self {
        Self {
            path: spec.path,
            user: spec.user,
            // A whole number of bytes: JavaScript's lengths are.
            length: spec.length.filter(|length| *length >= 0.0).map(|length| length as u64),
            mode: None,
            metadata: spec.metadata.unwrap_or_default().into_iter().collect(),
        }
    }
}

/// Writes a whole file.
#[napi]
pub fn write_file<'env>(
    env: &'env Env,
    id: String,
    spec: JsWrite,
    data: &[u8],
    call: Call,
) -> napi::Result<PromiseRaw<'env, JsEntry>> {
    let data = data.to_vec();
    call.run(env, async move { Ok(awake(&id).await?.write_file(&spec.into(), &data).await?.into()) })
}

/// Opens a file for writing.
#[napi]
pub fn create_file(
    env: &Env,
    id: String,
    spec: JsWrite,
    call: Call,
) -> napi::Result<PromiseRaw<'_, FileWriter>> {
    call.run(env, async move {
        Ok(FileWriter { inner: Arc::new(awake(&id).await?.create_file(spec.into()).await?) })
    })
}

/// One directory entry.
#[napi]
pub fn stat(
    env: &Env,
    id: String,
    path: String,
    user: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsEntry>> {
    call.run(env, async move { Ok(awake(&id).await?.stat(&path, user.as_deref()).await?.into()) })
}

/// Whether a path exists.
#[napi]
pub fn exists(
    env: &Env,
    id: String,
    path: String,
    user: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move { awake(&id).await?.exists(&path, user.as_deref()).await })
}

/// The entries of a directory.
#[napi]
pub fn list_dir(
    env: &Env,
    id: String,
    path: String,
    depth: u32,
    user: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, Vec<JsEntry>>> {
    call.run(env, async move {
        let entries = awake(&id).await?.list_dir(&path, user.as_deref(), depth).await?;
        Ok(entries.into_iter().map(JsEntry::from).collect())
    })
}

/// Creates a directory. `false` if it exists.
#[napi]
pub fn make_dir(
    env: &Env,
    id: String,
    path: String,
    user: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, bool>> {
    call.run(env, async move { awake(&id).await?.make_dir(&path, user.as_deref()).await })
}

/// Renames a file or directory.
#[napi]
pub fn rename(
    env: &Env,
    id: String,
    from: String,
    to: String,
    user: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsEntry>> {
    call.run(env, async move { Ok(awake(&id).await?.rename(&from, &to, user.as_deref()).await?.into()) })
}

/// Removes a file or directory.
#[napi]
pub fn remove(
    env: &Env,
    id: String,
    path: String,
    user: Option<String>,
    call: Call,
) -> napi::Result<PromiseRaw<'_, ()>> {
    call.run(env, async move { awake(&id).await?.remove(&path, user.as_deref()).await })
}
