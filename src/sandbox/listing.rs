//! Listing sandboxes: those that run in this process and those that are paused in the store, in one order.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::time::SystemTime;

use super::profile::{SandboxInfo, micros};
use super::registry::registry;
use super::{Error, blocking, paused};

/// Filter and page of [`list`]; all conditions must hold.
#[derive(Debug, Clone, Default)]
pub struct ListQuery {
    /// Store whose sandboxes are listed.
    pub home: PathBuf,
    /// Pairs that the metadata must all contain.
    pub metadata: BTreeMap<String, String>,
    /// Whether running sandboxes are wanted.
    pub running: bool,
    /// Whether paused ones are wanted.
    pub paused: bool,
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

/// The sandboxes that match, by start time.
pub async fn list(query: ListQuery) -> Result<Page<SandboxInfo>, Error> {
    let after = query.next_token.as_deref().map(parse_token).transpose()?;
    let mut found: Vec<SandboxInfo> = Vec::new();
    if query.paused {
        let home = query.home.clone();
        found = blocking(move || paused::list(&home)).await?;
    }
    // Looked at second: one that is resumed in between is found twice, not never.
    let live: Vec<SandboxInfo> =
        registry().live_in(&query.home).iter().map(|sandbox| sandbox.info()).collect();
    let running: HashSet<&str> = live.iter().map(|info| info.id.as_str()).collect();
    found.retain(|info| !running.contains(info.id.as_str()));
    if query.running {
        found.extend(live);
    }
    found.retain(|info| matches(info, &query));
    found.sort_by_cached_key(sort_key);
    if !query.ascending {
        found.reverse();
    }
    let rest = found.into_iter().filter(|info| match &after {
        Some(after) if query.ascending => sort_key(info) > *after,
        Some(after) => sort_key(info) < *after,
        None => true,
    });
    Ok(page(rest, query.limit, |info| {
        let (started, id) = sort_key(info);
        format!("{started}-{id}")
    }))
}

/// Start time in microseconds, then the id: a total order that paging can resume in.
fn sort_key(info: &SandboxInfo) -> (u64, String) {
    (info.profile.started_us, info.id.clone())
}

fn parse_token(token: &str) -> Result<(u64, String), Error> {
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

fn matches(info: &SandboxInfo, query: &ListQuery) -> bool {
    let profile = &info.profile;
    query.metadata.iter().all(|(key, value)| profile.metadata.get(key) == Some(value))
        // Callers have times in milliseconds, and mean the sandbox whose start they were shown.
        && query.started_after.is_none_or(|after| profile.started_us / 1000 >= micros(after) / 1000)
        && query.template.as_deref().is_none_or(|wanted| {
            let name = wanted.strip_suffix(":default").unwrap_or(wanted);
            profile.template == name || profile.template_name.as_deref() == Some(name)
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
