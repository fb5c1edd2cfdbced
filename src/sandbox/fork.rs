//! Fork: one capture of a running sandbox, and any number of copies of it.

use std::sync::Arc;
use std::time::Duration;

use amber_layers::{Kind, NewSnapshot};
use tokio::task::JoinSet;

use super::create::{self, Origin};
use super::profile::Profile;
use super::registry::registry;
use super::snapshots::capture;
use super::stores::Places;
use super::{Error, Sandbox, blocking, id, paused};
use crate::machine::Content;

/// Copies that one call may make.
const MAX_COPIES: usize = 100;

/// One copy, or why it could not be made.
pub type Copy = Result<Arc<Sandbox>, Error>;

/// Makes `count` copies of a sandbox of this process, which runs on. They keep its metadata, environment and rules; ids, tokens and
/// lives are their own. Dropping the future leaves no copies behind.
pub async fn fork(id: &str, places: Places, count: usize, life: Duration) -> Result<Vec<Copy>, Error> {
    if !(1..=MAX_COPIES).contains(&count) {
        return Err(Error::InvalidArgument(format!("count must be 1 to {MAX_COPIES}")));
    }
    let sandbox = match registry().find_live(id) {
        Ok(sandbox) => sandbox,
        Err(error @ Error::SandboxCrashed { .. }) => return Err(error),
        Err(_) => {
            let paused = paused::is_paused(id.to_owned(), places).await?;
            return Err(if paused { paused_conflict(id) } else { Error::no_sandbox(id) });
        }
    };
    let snapshot = NewSnapshot {
        kind: Kind::Sandbox,
        source: Some(id.to_owned()),
        metadata: "{}".to_owned(),
        ..NewSnapshot::default()
    };
    let exclusive = sandbox.exclusive().await?;
    let meta = capture(&sandbox, snapshot, Content::Full, exclusive).await?;
    let store = Arc::clone(sandbox.store());
    let (snapshot, claim) = blocking(move || {
        // Nobody else ever sees it, and it goes with the last copy.
        let snapshot = store.open_tagged(&meta.id, &meta.tag)?;
        let claim = store.claim(&meta.id)?.map(Arc::new);
        Ok((snapshot, claim))
    })
    .await?;
    let source = sandbox.profile();
    let mut copies = JoinSet::new();
    for _ in 0..count {
        let origin = Origin {
            store: Arc::clone(sandbox.store()),
            places: sandbox.places().clone(),
            snapshot: Arc::clone(&snapshot),
            claim: claim.clone(),
        };
        let profile = Profile {
            traffic_token: source.traffic_token.as_ref().map(|_| id::hex_token(32)).transpose()?,
            ..source.clone()
        };
        copies.spawn(create::copy(origin, profile, life));
    }
    let mut made = Unclaimed(Vec::with_capacity(count));
    while let Some(copy) = copies.join_next().await {
        made.0.push(copy.map_err(Error::panicked).flatten());
    }
    Ok(std::mem::take(&mut made.0))
}

/// The sandbox has to be resumed first.
pub(super) fn paused_conflict(id: &str) -> Error {
    Error::Conflict(format!("Sandbox '{id}' is paused: connect to it first"))
}

/// Copies that nobody has been given yet: dropped, they are killed.
struct Unclaimed(Vec<Copy>);

impl Drop for Unclaimed {
    fn drop(&mut self) {
        for sandbox in self.0.drain(..).flatten() {
            if let Ok(runtime) = tokio::runtime::Handle::try_current() {
                runtime.spawn(async move { sandbox.kill().await });
            }
        }
    }
}
