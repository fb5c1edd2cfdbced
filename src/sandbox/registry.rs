//! The sandboxes of this process. One registry per process, not per JavaScript realm: every module registry, context and worker thread
//! that loads the addon sees the same sandboxes, as E2B's users expect of an account.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::{Ended, Error, Sandbox};

/// How many ended sandboxes are remembered, so that later calls fail with the reason instead of "not found".
const REMEMBERED: usize = 4096;

static REGISTRY: LazyLock<Registry> = LazyLock::new(Registry::default);

/// The registry of this process.
pub fn registry() -> &'static Registry {
    &REGISTRY
}

/// Live sandboxes, and the recent dead.
#[derive(Debug, Default)]
pub struct Registry {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    live: HashMap<String, Arc<Sandbox>>,
    ended: HashMap<String, Ended>,
    order: VecDeque<String>,
}

/// Filter and page of [`Registry::list`]; all conditions must hold.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Store whose sandboxes are listed.
    pub home: PathBuf,
    /// Pairs that the metadata must all contain.
    pub metadata: BTreeMap<String, String>,
    /// Whether running sandboxes are wanted.
    pub running: bool,
    /// Started then or later.
    pub started_after: Option<SystemTime>,
    /// Created from this template or snapshot, by id or name.
    pub template: Option<String>,
    /// Oldest first instead of newest first.
    pub ascending: bool,
    /// Items per page.
    pub limit: usize,
    /// Where to go on.
    pub next_token: Option<String>,
}

/// One page of a listing.
#[derive(Debug, Clone)]
pub struct Page<T> {
    /// The items.
    pub items: Vec<T>,
    /// Where the next page starts; `None` if this is the last.
    pub next_token: Option<String>,
}

impl Registry {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        // Every change is one insertion or removal: a panic elsewhere cannot have left the maps half changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a sandbox known.
    pub(super) fn insert(&self, sandbox: &Arc<Sandbox>) {
        self.inner().live.insert(sandbox.id().to_owned(), Arc::clone(sandbox));
    }

    /// Takes a sandbox that has ended out of the live ones.
    pub(super) fn retire(&self, id: &str, reason: Ended) {
        let mut inner = self.inner();
        if inner.live.remove(id).is_none() {
            return;
        }
        inner.ended.insert(id.to_owned(), reason);
        inner.order.push_back(id.to_owned());
        if inner.order.len() > REMEMBERED
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.ended.remove(&oldest);
        }
    }

    /// A sandbox, for operations inside it: one that has ended fails with the reason.
    pub fn find(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        let inner = self.inner();
        match (inner.live.get(id), inner.ended.get(id)) {
            (Some(sandbox), _) => Ok(Arc::clone(sandbox)),
            (None, Some(reason)) => Err(Error::from(reason)),
            (None, None) => Err(Error::no_sandbox(id)),
        }
    }

    /// A sandbox, for operations on it: one that was killed does not exist any more, one that crashed says so.
    pub fn find_live(&self, id: &str) -> Result<Arc<Sandbox>, Error> {
        match self.find(id) {
            Err(Error::SandboxKilled(_)) => Err(Error::no_sandbox(id)),
            other => other,
        }
    }

    /// Every live sandbox of a store that was created from `template`.
    pub(super) fn users_of(&self, home: &PathBuf, template: &amber_layers::SnapshotId) -> Vec<String> {
        let mut users: Vec<String> = self
            .inner()
            .live
            .values()
            .filter(|sandbox| sandbox.home() == home && sandbox.template() == template)
            .map(|sandbox| sandbox.id().to_owned())
            .collect();
        users.sort_unstable();
        users
    }

    /// The sandboxes that match, by start time.
    pub fn list(&self, query: &ListQuery) -> Result<Page<Arc<Sandbox>>, Error> {
        let mut found: Vec<Arc<Sandbox>> =
            self.inner().live.values().filter(|sandbox| matches(sandbox, query)).cloned().collect();
        found.sort_by_cached_key(|sandbox| sort_key(sandbox));
        if !query.ascending {
            found.reverse();
        }
        let after = query.next_token.as_deref().map(parse_token).transpose()?;
        let rest = found.into_iter().filter(|sandbox| match &after {
            Some(after) if query.ascending => sort_key(sandbox) > *after,
            Some(after) => sort_key(sandbox) < *after,
            None => true,
        });
        Ok(page(rest, query.limit, |sandbox| {
            let (started, id) = sort_key(sandbox);
            format!("{started}-{id}")
        }))
    }
}

/// Start time in microseconds, then the id: a total order that paging can resume in.
fn sort_key(sandbox: &Sandbox) -> (u128, String) {
    let started = sandbox.started_at().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (started.as_micros(), sandbox.id().to_owned())
}

fn parse_token(token: &str) -> Result<(u128, String), Error> {
    token
        .split_once('-')
        .and_then(|(started, id)| Some((started.parse().ok()?, id.to_owned())))
        .ok_or_else(|| Error::InvalidArgument("Invalid nextToken: pass what a paginator gave".to_owned()))
}

/// Cuts a page; `token` names an item so that the next page can start after it.
pub(super) fn page<T>(items: impl Iterator<Item = T>, limit: usize, token: impl Fn(&T) -> String) -> Page<T> {
    let mut items = items.fuse();
    let taken: Vec<T> = items.by_ref().take(limit.max(1)).collect();
    let next_token = items.next().and_then(|_| taken.last().map(token));
    Page { items: taken, next_token }
}

fn matches(sandbox: &Sandbox, query: &ListQuery) -> bool {
    query.running
        && *sandbox.home() == query.home
        && query.metadata.iter().all(|(key, value)| sandbox.metadata().get(key) == Some(value))
        && query.started_after.is_none_or(|after| sandbox.started_at() >= after)
        && query.template.as_deref().is_none_or(|wanted| {
            let name = wanted.strip_suffix(":default").unwrap_or(wanted);
            sandbox.template().as_str() == wanted || sandbox.template_name() == Some(name)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_end_without_a_token() {
        let cut = |range: std::ops::Range<u32>, limit| page(range, limit, |item| item.to_string());
        assert_eq!(cut(0..3, 2).next_token.as_deref(), Some("1"));
        assert_eq!(cut(0..2, 2).next_token, None);
        assert_eq!(cut(0..0, 2).items, Vec::<u32>::new());
        assert_eq!(cut(0..0, 2).next_token, None);
    }

    #[test]
    fn strange_tokens_are_refused() {
        for bad in ["", "x", "1", "-i", "x-i"] {
            assert!(matches!(parse_token(bad), Err(Error::InvalidArgument(_))), "{bad:?}");
        }
        assert_eq!(parse_token("12-iabc").unwrap(), (12, "iabc".to_owned()));
    }
}
