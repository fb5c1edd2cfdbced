//! Amberbox: Linux sandboxes inside a Node.js process.

pub mod agent;
pub mod devices;
pub mod machine;
pub mod node;
pub mod sandbox;
