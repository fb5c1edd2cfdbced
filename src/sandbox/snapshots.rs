//! Snapshots: taken from running sandboxes, listed, deleted.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use amber_layers::{Kind, ListFilter, NewSnapshot, Parent, SnapshotMeta, Store};
use tokio::sync::{OwnedMutexGuard, oneshot};

use super::listing::{Page, page};
use super::registry::registry;
use super::{Ended, Error, Sandbox, blocking, stores};
use crate::machine::Content;

/// A snapshot, as users see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id.
    pub id: String,
    /// Its names, without tags.
    pub names: Vec<String>,
    /// Its tag.
    pub tag: String,
    /// When it was published, in milliseconds since 1970.
    pub created_ms: u64,
    /// Bytes on disk of all that it needs, shared with others or not.
    pub size: u64,
    /// Bytes on disk that it added.
    pub own_size: u64,
    /// The snapshot or template that its sandbox was created from.
    pub parent: Option<String>,
    /// The sandbox it was taken from.
    pub source: Option<String>,
    /// That sandbox's metadata, as a JSON object.
    pub metadata: String,
}

impl From<&SnapshotMeta> for SnapshotInfo {
    fn from(meta: &SnapshotMeta) -> Self {
        Self {
            id: meta.id.to_string(),
            names: meta.names.clone(),
            tag: meta.tag.clone(),
            created_ms: meta.created_ms(),
            size: meta.total_bytes,
            own_size: meta.own_bytes,
            parent: meta.parent.as_ref().map(|parent| parent.id.to_string()),
            source: meta.source.clone(),
            metadata: meta.metadata.clone(),
        }
    }
}

/// Filter and page of [`list_snapshots`].
#[derive(Debug, Clone, Default)]
pub struct SnapshotQuery {
    /// Directory of the store.
    pub home: PathBuf,
    /// Only those taken from this sandbox.
    pub sandbox_id: Option<String>,
    /// Only the one with this name, `name:tag` or id.
    pub name: Option<String>,
    /// Items per page.
    pub limit: usize,
    /// Where to go on.
    pub next_token: Option<String>,
}

/// `name`, `name:tag` or `team/name:tag` as users write them; upper case is lowered, as E2B does.
fn split_name(text: &str) -> Result<(String, Option<String>), Error> {
    let lower = text.trim().to_lowercase();
    let (name, tag) = match lower.rsplit_once(':') {
        Some((name, tag)) => (name.to_owned(), Some(tag.to_owned())),
        None => (lower, None),
    };
    let fine = |part: &str, extra: &[u8]| {
        !part.is_empty()
            && part.bytes().all(|b| {
                b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b) || extra.contains(&b)
            })
    };
    if !fine(&name, b"/") || !tag.as_deref().is_none_or(|tag| fine(tag, b".")) {
        return Err(Error::InvalidArgument(format!(
            "Invalid snapshot name '{text}': use letters, digits, '-' and '_', and after a ':' a tag"
        )));
    }
    Ok((name, tag))
}

/// How long the guest's processes may take to stand still for a snapshot. Later it is taken as it is.
const FREEZE_LIMIT: Duration = Duration::from_secs(5);

/// How long they and writing the guest's files back may take for a snapshot of the disk alone, which needs both.
const DISK_LIMIT: Duration = Duration::from_secs(20);

/// Freezes a sandbox into a snapshot: all of it, or its disk alone. The sandbox goes on running. Several at once take turns; a kill
/// waits for the one that is being made, and the others fail.
pub async fn create_snapshot(
    sandbox: &Arc<Sandbox>,
    name: Option<&str>,
    content: Content,
) -> Result<SnapshotInfo, Error> {
    let (names, tag) = match name {
        Some(name) => {
            let (name, tag) = split_name(name)?;
            // Whoever asks for a template by its name must not get somebody's sandbox.
            if sandbox.store().resolve(&name)?.is_some_and(|meta| meta.kind == Kind::Template) {
                return Err(Error::InvalidArgument(format!(
                    "'{name}' is the name of a template: use another"
                )));
            }
            (vec![name], tag)
        }
        None => (Vec::new(), None),
    };
    let exclusive = sandbox.exclusive().await?;
    let snapshot = NewSnapshot {
        kind: Kind::Snapshot,
        names,
        tag,
        source: Some(sandbox.id().to_owned()),
        parent: parent_of(sandbox),
        metadata: serde_json::to_string(&sandbox.profile().metadata).unwrap_or_else(|_| "{}".to_owned()),
        ..NewSnapshot::default()
    };
    Ok(SnapshotInfo::from(&capture(sandbox, snapshot, content, exclusive).await?))
}

/// What the sandbox was created from, unless that was deleted.
fn parent_of(sandbox: &Sandbox) -> Option<Parent> {
    let found = sandbox.store().resolve(&sandbox.profile().template);
    found.ok().flatten().map(|meta| meta.as_parent())
}

/// Publishes a snapshot of a sandbox in which all processes stand still, so that in a copy none of them runs before it has
/// been identified. In the sandbox itself they go on as soon as the content is fixed.
pub(super) async fn capture(
    sandbox: &Arc<Sandbox>,
    snapshot: NewSnapshot,
    content: Content,
    exclusive: OwnedMutexGuard<()>,
) -> Result<SnapshotMeta, Error> {
    let owner = Arc::clone(sandbox);
    // A task of its own: a caller that gives up leaves neither a frozen guest nor half a snapshot behind.
    let whole = tokio::spawn(async move {
        stand_still(&owner, content).await?;
        let (captured, fixed) = oneshot::channel();
        let thaw = {
            let owner = Arc::clone(&owner);
            async move {
                // Dropped without a word if the capture failed before.
                let _ = fixed.await;
                go_on(&owner).await;
            }
        };
        let taken = {
            let owner = Arc::clone(&owner);
            blocking(move || {
                let captured = Box::new(move || _ = captured.send(()));
                owner.vm().capture(owner.store(), snapshot, content, captured)
            })
        };
        let (taken, ()) = tokio::join!(taken, thaw);
        drop(exclusive);
        match (taken, owner.ended()) {
            (Ok(meta), _) => Ok(meta),
            // A machine that stopped meanwhile is the cause, whatever the capture made of it.
            (Err(_), Some(ended @ Ended::Crashed { .. })) => Err(Error::from(&ended)),
            (Err(error), _) => Err(error),
        }
    });
    whole.await.map_err(Error::panicked)?
}

/// Makes the guest's processes stand still, and for a snapshot of the disk alone writes its files back: without that such a snapshot is
/// not made. With memory, a guest in which it fails is captured all the same: its copies are told who they are a few milliseconds after
/// they begin to run.
pub(super) async fn stand_still(sandbox: &Sandbox, content: Content) -> Result<(), Error> {
    let still = sandbox.agent_call(sandbox.agent.freeze());
    if content == Content::Full {
        match tokio::time::timeout(FREEZE_LIMIT, still).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(sandbox = sandbox.id(), %error, "Processes run on during a snapshot");
            }
            Err(_) => tracing::warn!(sandbox = sandbox.id(), "Processes did not stop for a snapshot in time"),
        }
        return Ok(());
    }
    let written = async {
        still.await?;
        sandbox.agent_call(sandbox.agent.sync()).await
    };
    let written = tokio::time::timeout(DISK_LIMIT, written).await.unwrap_or_else(|_| {
        let seconds = DISK_LIMIT.as_secs();
        Err(Error::Agent(format!("The guest did not write its files back within {seconds} s")))
    });
    if written.is_err() {
        go_on(sandbox).await;
    }
    written
}

/// Undoes [`stand_still`].
pub(super) async fn go_on(sandbox: &Sandbox) {
    // An agent that cannot be reached thaws by itself after half a minute.
    match tokio::time::timeout(FREEZE_LIMIT, sandbox.agent_call(sandbox.agent.thaw())).await {
        Ok(Err(error)) if sandbox.ended().is_none() => {
            tracing::warn!(sandbox = sandbox.id(), %error, "Processes may stand still for a while");
        }
        _ => {}
    }
}

/// Lists snapshots, newest first.
pub async fn list_snapshots(query: SnapshotQuery) -> Result<Page<SnapshotInfo>, Error> {
    blocking(move || {
        let store = stores::open(&query.home)?;
        let filter = ListFilter {
            kind: Some(Kind::Snapshot),
            source: query.sandbox_id,
            name: query.name.map(|name| name.to_lowercase()),
        };
        let mut found = store.list(&filter)?;
        found.sort_by_cached_key(|meta| std::cmp::Reverse(sort_key(meta)));
        let after = query.next_token.as_deref().map(parse_token).transpose()?;
        let rest = found.iter().filter(|meta| after.as_ref().is_none_or(|after| sort_key(meta) < *after));
        let cut = page(rest, query.limit, |meta| {
            let (created, id, tag) = sort_key(meta);
            format!("{created}:{id}:{tag}")
        });
        Ok(Page {
            items: cut.items.into_iter().map(SnapshotInfo::from).collect(),
            next_token: cut.next_token,
        })
    })
    .await
}

/// Publication time, id and tag: a total order that paging can resume in.
fn sort_key(meta: &SnapshotMeta) -> (u64, String, String) {
    (meta.created_ns, meta.id.to_string(), meta.tag.clone())
}

fn parse_token(token: &str) -> Result<(u64, String, String), Error> {
    let mut parts = token.splitn(3, ':');
    let key = (|| Some((parts.next()?.parse().ok()?, parts.next()?.to_owned(), parts.next()?.to_owned())))();
    key.ok_or_else(|| Error::InvalidArgument("Invalid nextToken: pass what a paginator gave".to_owned()))
}

/// Deletes a snapshot. `false` if it does not exist; refused while running sandboxes came from it, unless by `force`: they run on.
pub async fn delete_snapshot(home: PathBuf, name: String, force: bool) -> Result<bool, Error> {
    blocking(move || {
        let store: Arc<Store> = stores::open(&home)?;
        let Some(meta) = store.resolve(&name.to_lowercase())? else { return Ok(false) };
        match meta.kind {
            Kind::Snapshot => {}
            Kind::Template => {
                return Err(Error::SnapshotInUse { id: name, users: "it is the base template".to_owned() });
            }
            // A paused sandbox is killed, not deleted.
            Kind::Sandbox => return Ok(false),
        }
        if force {
            return Ok(store.delete_forced(&meta.id)?);
        }
        let users = registry().users_of(&home, &meta.id);
        if !users.is_empty() {
            return Err(Error::SnapshotInUse {
                id: meta.id.to_string(),
                users: format!(
                    "running sandboxes were created from it: {}. Kill them first, or delete it with {{ force: true }}",
                    users.join(", ")
                ),
            });
        }
        stores::cool(&meta.id);
        Ok(store.delete(&meta.id)?)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_lowered_and_checked() {
        assert_eq!(split_name("My-Snap").unwrap(), ("my-snap".to_owned(), None));
        assert_eq!(split_name("team/n:V1.2").unwrap(), ("team/n".to_owned(), Some("v1.2".to_owned())));
        for bad in ["", ":", "a b", "a:", ":t", "a.b", "ä", "a:b/c"] {
            assert!(matches!(split_name(bad), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
    }

    #[test]
    fn tokens_round_trip() {
        assert_eq!(parse_token("12:abc:default").unwrap(), (12, "abc".to_owned(), "default".to_owned()));
        for bad in ["", "1", "1:a", "x:a:b"] {
            assert!(parse_token(bad).is_err(), "{bad:?}");
        }
    }
}
