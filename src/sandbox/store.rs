//! The store as its owner sees it: checked, collected, measured; and snapshots that leave and enter it as files.

use std::collections::HashSet;
use std::path::PathBuf;

use amber_layers::{Collected, Kind, LayerId, Usage};

use super::stores::{self, with_causes};
use super::{Error, SnapshotInfo, blocking};

/// Damage in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreProblem {
    /// The snapshots that are affected, as `id:tag`.
    pub snapshots: Vec<String>,
    /// What is wrong and where.
    pub message: String,
}

/// What [`verify_store`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// Snapshots checked.
    pub snapshots: u64,
    /// Layers checked.
    pub layers: u64,
    /// Frames checked.
    pub frames: u64,
    /// What is wrong.
    pub problems: Vec<StoreProblem>,
}

/// A snapshot that was written to a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The snapshot.
    pub snapshot: SnapshotInfo,
    /// Length of the file in bytes.
    pub bytes: u64,
    /// Layers in the file.
    pub layers: usize,
    /// Layers that were left out.
    pub left_out: usize,
}

/// Reads and checks all of the store: manifests, state, and every frame.
///
/// # Errors
/// The store cannot be read. Damage is no error here: it is in the report.
pub async fn verify_store(home: PathBuf) -> Result<StoreReport, Error> {
    blocking(move || {
        let found = stores::open(&home)?.verify()?;
        let problems = found.problems.into_iter().map(|problem| StoreProblem {
            snapshots: problem.snapshots.iter().map(|(id, tag)| format!("{id}:{tag}")).collect(),
            message: with_causes(&problem.error),
        });
        Ok(StoreReport {
            snapshots: found.snapshots,
            layers: found.layers,
            frames: found.frames,
            problems: problems.collect(),
        })
    })
    .await
}

/// Removes what no snapshot needs, and what killed processes left behind.
///
/// # Errors
/// The store cannot be written.
pub async fn collect_store(home: PathBuf) -> Result<Collected, Error> {
    blocking(move || Ok(stores::open(&home)?.gc()?)).await
}

/// How much disk the store and each snapshot use.
///
/// # Errors
/// The store cannot be read.
pub async fn store_usage(home: PathBuf) -> Result<Usage, Error> {
    blocking(move || Ok(stores::open(&home)?.du()?)).await
}

/// The layers that the store has, by their ids: what an export for it may leave out.
///
/// # Errors
/// The store cannot be read.
pub async fn store_layers(home: PathBuf) -> Result<Vec<String>, Error> {
    blocking(move || Ok(stores::open(&home)?.layers()?.iter().map(LayerId::to_string).collect())).await
}

/// Writes a snapshot, by id or name, to a new file. Layers in `without` are left out, for a reader that has them.
///
/// # Errors
/// There is no such snapshot, an id in `without` is none, or the file exists or cannot be written.
pub async fn export_snapshot(
    home: PathBuf,
    name: String,
    to: PathBuf,
    without: Vec<String>,
) -> Result<ExportInfo, Error> {
    blocking(move || {
        let layer = |id: &String| {
            LayerId::parse(id)
                .ok_or_else(|| Error::InvalidArgument(format!("'{id}' is not the id of a layer")))
        };
        let without = without.iter().map(layer).collect::<Result<HashSet<_>, _>>()?;
        let store = stores::open(&home)?;
        let meta = store.resolve(&name.to_lowercase())?;
        let meta = meta.filter(|meta| meta.kind == Kind::Snapshot).ok_or(Error::UnknownTemplate(name))?;
        let done = store.export(&meta.id, &meta.tag, &to, &without)?;
        Ok(ExportInfo {
            snapshot: SnapshotInfo::from(&done.meta),
            bytes: done.bytes,
            layers: done.layers,
            left_out: done.left_out,
        })
    })
    .await
}

/// Takes over a snapshot from a file that [`export_snapshot`] wrote.
///
/// # Errors
/// The file is damaged, of a newer version, or leaves out a layer that is not here; then nothing has changed.
pub async fn import_snapshot(home: PathBuf, from: PathBuf) -> Result<SnapshotInfo, Error> {
    blocking(move || Ok(SnapshotInfo::from(&stores::open(&home)?.import(&from)?))).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_not_there_or_no_layer_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let export = |without: &[&str]| {
            let without = without.iter().map(|id| (*id).to_owned()).collect();
            export_snapshot(dir.path().into(), "none".into(), dir.path().join("file"), without)
        };
        assert!(matches!(export(&["x"]).await, Err(Error::InvalidArgument(_))));
        assert!(matches!(export(&[]).await, Err(Error::UnknownTemplate(_))));
        assert!(import_snapshot(dir.path().into(), dir.path().join("file")).await.is_err());
        let junk = dir.path().join("tmp/junk");
        std::fs::write(&junk, "junk").unwrap();
        assert!(matches!(import_snapshot(dir.path().into(), junk).await, Err(Error::SnapshotCorrupt(_))));
        assert_eq!(verify_store(dir.path().into()).await.unwrap(), StoreReport::default());
        assert_eq!(store_usage(dir.path().into()).await.unwrap(), Usage::default());
        assert_eq!(collect_store(dir.path().into()).await.unwrap(), Collected::default());
        assert!(store_layers(dir.path().into()).await.unwrap().is_empty());
    }
}
