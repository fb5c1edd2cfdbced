//! Adopting templates: a template that was built or installed elsewhere becomes part of this store.
//!
//! A template directory is itself a store with one snapshot. Its layers are linked where possible, else cloned or copied;
//! its manifest is taken over byte for byte, so content, build and hashes stay the same.

use std::path::Path;
use std::sync::Arc;

use crate::error::StoreError;
use crate::ids::SnapshotId;
use crate::meta::ListFilter;
use crate::publish::Publication;
use crate::store::Store;

impl Store {
    /// Takes over the one snapshot of another store. Nothing happens when its content is here already. If one
    /// of its names exists here, that snapshot gets the new content under its old id.
    pub fn adopt(&self, template_dir: &Path) -> Result<SnapshotId, StoreError> {
        let template = Arc::new(Store::open_read_only(template_dir)?);
        let all = template.list(&ListFilter::default())?;
        let [meta] = all.as_slice() else {
            // A damaged one is not listed: let it say what is wrong.
            for (id, tag) in template.manifests()? {
                template.open_tagged(&id, &tag)?;
            }
            return Err(StoreError::NotATemplate { path: template_dir.to_owned(), found: all.len() });
        };
        let here = self.list(&ListFilter::default())?;
        if let Some(same) = here.iter().find(|m| m.build == meta.build) {
            return Ok(same.id.clone());
        }
        let snapshot = template.open_tagged(&meta.id, &meta.tag)?;
        let path = template.manifest_path(&meta.id, &meta.tag);
        let manifest = std::fs::read(&path).map_err(|e| StoreError::read(&path, e))?;
        let mut inherited = Vec::new();
        for layer in snapshot.memory().layers() {
            inherited.push(Arc::clone(layer));
        }
        self.publish(Publication {
            area: self.work_area()?,
            own: None,
            inherited,
            manifest,
            names: meta.names.clone(),
            wanted_id: Some(meta.id.clone()),
            tag: meta.tag.clone(),
        })
    }
}
