//! Placeholder root, replaced by its first module.
