//! What a sandbox is beyond its machine: what it was created with, and what a pause has to keep of it.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use amber_layers::SnapshotId;
use serde::{Deserialize, Serialize};

use super::Error;
use super::vm::Facts;

/// What happens when a sandbox's time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnTimeout {
    /// It is killed.
    #[default]
    Kill,
    /// It is paused: with its memory, or with its disk alone.
    Pause {
        /// Whether memory is kept.
        keep_memory: bool,
    },
}

/// What happens to a sandbox without being asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Lifecycle {
    /// At the end of its time.
    pub on_timeout: OnTimeout,
    /// Whether a request to it while it is paused resumes it.
    pub auto_resume: bool,
}

/// All that a sandbox keeps over a pause but its content. Stored as JSON with a paused sandbox; absent fields take their default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Profile {
    /// Id of the template or snapshot it was created from.
    pub template: String,
    /// Name of it.
    pub template_name: Option<String>,
    /// Free key-value pairs.
    pub metadata: BTreeMap<String, String>,
    /// Environment of every command.
    pub envs: BTreeMap<String, String>,
    /// Secret that tells its requests from those of its copies; different even in copies of one snapshot.
    pub access_token: String,
    /// What HTTP requests to its ports must show, if not everybody may send them.
    pub traffic_token: Option<String>,
    /// What servers in it see as the `Host` of HTTP requests to its ports, `${PORT}` standing for the port.
    pub mask_request_host: Option<String>,
    /// What happens to it by itself.
    pub lifecycle: Lifecycle,
    /// Rules of its network, as JSON text; for its user to see.
    pub network: Option<String>,
    /// Whether it was allowed to reach the internet, if anything was said.
    pub allow_internet_access: Option<bool>,
    /// Time of its creation in microseconds since 1970.
    pub started_us: u64,
    /// Length of its life in milliseconds, as it was given last.
    pub life_ms: u64,
    /// Processors of its machine.
    pub cpu_count: u32,
    /// Memory of its machine in MiB.
    pub memory_mb: u32,
}

impl Profile {
    /// When it was created.
    pub fn started_at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_micros(self.started_us)
    }

    /// The id of what it was created from.
    pub(super) fn template_id(&self) -> Result<SnapshotId, Error> {
        Ok(SnapshotId::parse(&self.template)?)
    }

    pub(super) fn to_json(&self) -> Result<String, Error> {
        serde_json::to_string(self).map_err(|error| Error::Internal(error.to_string()))
    }

    /// A damaged one is an error: nothing is known about such a sandbox.
    pub(super) fn from_json(text: &str) -> Result<Self, Error> {
        serde_json::from_str(text).map_err(|error| {
            Error::SnapshotCorrupt(format!("The description of the paused sandbox is damaged: {error}"))
        })
    }
}

/// Microseconds since 1970.
pub(super) fn micros(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// Whether a sandbox is live or frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its machine runs in this process.
    Running,
    /// It is in the store.
    Paused,
}

/// What is known about a sandbox.
#[derive(Debug, Clone)]
pub struct SandboxInfo {
    /// Its id.
    pub id: String,
    /// What it was created with.
    pub profile: Profile,
    /// When its life will end; for a paused one, when it was paused.
    pub end_at: SystemTime,
    /// Live or frozen.
    pub state: State,
    /// What its machine says; for a paused one, what is known of it.
    pub facts: Facts,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_survive_json_and_older_ones_load() {
        let profile = Profile {
            template: "base".into(),
            metadata: BTreeMap::from([("k".into(), "v".into())]),
            lifecycle: Lifecycle { on_timeout: OnTimeout::Pause { keep_memory: false }, auto_resume: true },
            started_us: 1_700_000_000_000_001,
            ..Profile::default()
        };
        assert_eq!(Profile::from_json(&profile.to_json().unwrap()).unwrap(), profile);
        assert_eq!(micros(profile.started_at()), profile.started_us);
        let older = Profile::from_json(r#"{"template":"base","later":[1]}"#).unwrap();
        assert_eq!(older, Profile { template: "base".into(), ..Profile::default() });
        assert!(matches!(Profile::from_json("{"), Err(Error::SnapshotCorrupt(_))));
    }
}
