//! Which backend to use, found out by doing: a small guest is run on KVM under a deadline.
//!
//! `/dev/kvm` may be there, create machines, even run a few instructions, and still be a hundred times too slow for Linux
//! (hypervisors that emulate nested virtualization). So nothing but a measurement counts. It is done once per boot of
//! the host: the verdict is kept in memory and in a file that names the boot. `AMBERBOX_BACKEND=soft` or `kvm`
//! overrides; then nothing is probed, and a KVM that does not work says so when a machine is made.

mod guest;
mod kvm;

use std::ffi::{CStr, CString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::vcpu::BackendKind;

/// The environment variable that overrides the choice.
pub const OVERRIDE: &str = "AMBERBOX_BACKEND";
/// How long the probe is waited for in all: beyond its own limit, for a KVM that hangs.
const PATIENCE: Duration = Duration::from_millis(280);
const DEVICE: &CStr = c"/dev/kvm";
const CACHE: &str = "kvm-probe.json";
/// A cache file has no more bytes than this.
const MAX_CACHE: u64 = 4096;

/// Why KVM cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Useless {
    /// There is no /dev/kvm.
    Missing,
    /// It may not be opened.
    Forbidden,
    /// It is something else.
    NotKvm,
    /// It cannot create a machine.
    Refused,
    /// It does not run a plain guest as a CPU would.
    Wrong,
    /// It runs it too slowly.
    Slow,
    /// It did not come back in time.
    Hangs,
    /// The host is no x86-64.
    Host,
}

/// What the probe found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// KVM runs guests at speed.
    Usable {
        /// What an interrupt from ring 3, a change of address space and the return took.
        round_ns: u64,
    },
    /// It does not.
    Useless {
        /// The kind of reason.
        why: Useless,
        /// The reason in words.
        detail: String,
    },
}

impl Verdict {
    /// The verdict in words.
    pub fn describe(&self) -> String {
        match self {
            Verdict::Usable { round_ns } => {
                format!("KVM works ({round_ns} ns for an interrupt and its return)")
            }
            Verdict::Useless { detail, .. } => detail.clone(),
        }
    }
}

/// The backend chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The backend.
    pub backend: BackendKind,
    /// Why this one.
    pub reason: String,
    /// What the probe found, unless the choice was made without it.
    pub verdict: Option<Verdict>,
}

/// The override asks for what cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChoiceError {
    /// Not the name of a backend.
    #[error("{OVERRIDE} is '{0}'; use 'soft' or 'kvm'")]
    Unknown(String),
}

/// Chooses a backend. `home` is where the verdict is kept between processes. Takes up to 300 ms the first time after
/// a boot of the host, nothing later.
///
/// # Errors
/// `AMBERBOX_BACKEND` asks for what cannot be had.
pub fn choose(home: Option<&Path>) -> Result<Choice, ChoiceError> {
    let wish = std::env::var(OVERRIDE).ok();
    decide(wish.as_deref(), || verdict(home))
}

fn decide(wish: Option<&str>, verdict: impl FnOnce() -> Verdict) -> Result<Choice, ChoiceError> {
    match wish {
        None | Some("") => {
            let verdict = verdict();
            let (backend, name) = match &verdict {
                Verdict::Usable { .. } => (BackendKind::Kvm, "KVM"),
                Verdict::Useless { .. } => (BackendKind::Soft, "software CPU"),
            };
            let reason = format!("{name}: {}", verdict.describe());
            Ok(Choice { backend, reason, verdict: Some(verdict) })
        }
        Some("soft") => {
            let reason = format!("software CPU: {OVERRIDE}=soft");
            Ok(Choice { backend: BackendKind::Soft, reason, verdict: None })
        }
        Some("kvm") => {
            let reason = format!("KVM: {OVERRIDE}=kvm");
            Ok(Choice { backend: BackendKind::Kvm, reason, verdict: None })
        }
        Some(other) => Err(ChoiceError::Unknown(other.to_owned())),
    }
}

/// What is known of KVM: from this process, from the file, or from a probe now.
pub fn verdict(home: Option<&Path>) -> Verdict {
    static KNOWN: OnceLock<Verdict> = OnceLock::new();
    let known = KNOWN.get_or_init(|| {
        let cache = home.map(|home| home.join(CACHE));
        let boot = boot_id();
        if let (Some(path), Some(boot)) = (&cache, &boot)
            && let Some(verdict) = read_cache(path, boot)
        {
            return verdict;
        }
        let verdict = probe(DEVICE, &Trace::default());
        if let (Some(path), Some(boot)) = (&cache, boot) {
            // A cache only; without it the next process probes again.
            let _ = write_cache(path, boot, &verdict);
        }
        verdict
    });
    known.clone()
}

/// The steps that a probe has finished, with the time each took. Shared with the probe's thread, which may hang.
#[derive(Debug, Clone)]
struct Trace(Arc<Mutex<(Instant, Vec<Step>)>>);

impl Default for Trace {
    fn default() -> Self {
        Self(Arc::new(Mutex::new((Instant::now(), Vec::new()))))
    }
}

impl Trace {
    /// A step has come to its end.
    fn done(&self, name: &'static str) {
        let mut trace = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let took = trace.0.elapsed();
        trace.0 += took;
        trace.1.push(Step { name, took });
    }

    fn steps(&self) -> Vec<Step> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).1.clone()
    }
}

/// A step of the probe that came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// What was done.
    pub name: &'static str,
    /// How long it took.
    pub took: Duration,
}

/// A probe made now, with what it did.
#[derive(Debug, Clone)]
pub struct Diagnosis {
    /// What it found.
    pub verdict: Verdict,
    /// What a sandbox would use after such a verdict.
    pub choice: Result<Choice, ChoiceError>,
    /// The steps that it finished. It ended in the one after them.
    pub steps: Vec<Step>,
    /// How long it took in all.
    pub took: Duration,
}

/// Probes now, whatever is known. With `device`, that is looked at instead of /dev/kvm; without, the verdict replaces the one
/// that `home` keeps. Takes up to 300 ms.
pub fn diagnose(device: Option<&Path>, home: Option<&Path>) -> Diagnosis {
    let trace = Trace::default();
    let started = Instant::now();
    let named = device.map(|path| CString::new(path.as_os_str().as_bytes()));
    let verdict = match &named {
        None => probe(DEVICE, &trace),
        Some(Ok(path)) => probe(path, &trace),
        Some(Err(_)) => {
            Verdict::Useless { why: Useless::Missing, detail: "no path contains a zero byte".into() }
        }
    };
    let took = started.elapsed();
    if let (None, Some(home), Some(boot)) = (device, home, boot_id()) {
        let path = home.join(CACHE);
        // What an earlier probe found is void, whether or not this one's verdict is kept. Where none was kept, there may be no store.
        if std::fs::remove_file(&path).is_ok() {
            let _ = write_cache(&path, boot, &verdict);
        }
    }
    let wish = std::env::var(OVERRIDE).ok();
    let choice = decide(wish.as_deref(), || verdict.clone());
    Diagnosis { verdict, choice, steps: trace.steps(), took }
}

/// Probes in a thread of its own, which is left alone if it does not come back: a thread inside KVM_RUN does not keep
/// the process from ending.
fn probe(device: &CStr, trace: &Trace) -> Verdict {
    let hangs = |detail: String| Verdict::Useless { why: Useless::Hangs, detail };
    let (send, receive) = mpsc::sync_channel(1);
    let (device, trace) = (device.to_owned(), trace.clone());
    let thread = std::thread::Builder::new().name("amberbox-probe".into()).spawn(move || {
        // The receiver may be gone.
        let _ = send.send(kvm::probe(&device, &trace));
    });
    match thread {
        Err(e) => hangs(format!("KVM was not tried: no thread ({e})")),
        Ok(_) => receive.recv_timeout(PATIENCE).unwrap_or_else(|_| {
            hangs(format!("KVM did not finish a small guest within {} ms", PATIENCE.as_millis()))
        }),
    }
}

#[derive(Serialize, Deserialize)]
struct Cached {
    boot: String,
    verdict: Verdict,
}

fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned())
}

/// The verdict of this boot. One that a change of permissions or a loaded module may have made wrong is not kept.
fn read_cache(path: &Path, boot: &str) -> Option<Verdict> {
    let len = std::fs::metadata(path).ok()?.len();
    if len > MAX_CACHE {
        return None;
    }
    let cached: Cached = serde_json::from_slice(&std::fs::read(path).ok()?).ok()?;
    (cached.boot == boot).then_some(cached.verdict)
}

fn write_cache(path: &Path, boot: String, verdict: &Verdict) -> std::io::Result<()> {
    use std::io::Write;
    // These cost nothing to find out again.
    if let Verdict::Useless { why: Useless::Missing | Useless::Forbidden | Useless::NotKvm, .. } = verdict {
        return Ok(());
    }
    let dir = path.parent().ok_or(std::io::ErrorKind::NotFound)?;
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&serde_json::to_vec(&Cached { boot, verdict: verdict.clone() })?)?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slow() -> Verdict {
        Verdict::Useless { why: Useless::Slow, detail: "KVM is too slow".into() }
    }

    #[test]
    fn the_choice_says_why() {
        let choice = decide(None, slow).unwrap();
        assert_eq!(
            (choice.backend, choice.reason.as_str()),
            (BackendKind::Soft, "software CPU: KVM is too slow")
        );
        let usable = decide(Some(""), || Verdict::Usable { round_ns: 900 }).unwrap();
        assert_eq!(usable.backend, BackendKind::Kvm);
        assert!(usable.reason.starts_with("KVM: ") && usable.reason.contains("900 ns"));
        let forced = decide(Some("soft"), || panic!("probed in vain")).unwrap();
        assert_eq!(forced.verdict, None);
        let forced = decide(Some("kvm"), || panic!("probed in vain")).unwrap();
        assert_eq!((forced.backend, forced.verdict), (BackendKind::Kvm, None));
        assert_eq!(decide(Some("xen"), slow), Err(ChoiceError::Unknown("xen".into())));
    }

    #[test]
    fn a_verdict_is_kept_for_one_boot() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CACHE);
        write_cache(&path, "boot 1".into(), &slow()).unwrap();
        assert_eq!(read_cache(&path, "boot 1"), Some(slow()));
        assert_eq!(read_cache(&path, "boot 2"), None);
        std::fs::write(&path, b"{").unwrap();
        assert_eq!(read_cache(&path, "boot 1"), None);
        std::fs::write(&path, vec![b' '; 5000]).unwrap();
        assert_eq!(read_cache(&path, "boot 1"), None);
    }

    #[test]
    fn what_the_user_can_mend_is_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(CACHE);
        let forbidden = Verdict::Useless { why: Useless::Forbidden, detail: String::new() };
        write_cache(&path, "boot".into(), &forbidden).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_diagnosis_tells_how_far_the_probe_came() {
        let home = tempfile::tempdir().unwrap();
        let null = diagnose(Some(Path::new("/dev/null")), Some(home.path()));
        assert!(matches!(null.verdict, Verdict::Useless { why: Useless::NotKvm, .. }));
        assert_eq!(null.steps, []);
        // Another device says nothing about the one that sandboxes use.
        assert!(!home.path().join(CACHE).exists());
        let trace = Trace::default();
        trace.done("one");
        trace.done("two");
        assert_eq!(trace.steps().iter().map(|step| step.name).collect::<Vec<_>>(), ["one", "two"]);
    }

    #[test]
    fn a_diagnosis_replaces_what_was_known() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join(CACHE);
        let stale = Verdict::Usable { round_ns: 123_456_789 };
        write_cache(&path, boot_id().unwrap(), &stale).unwrap();
        let now = diagnose(None, Some(home.path()));
        assert_ne!(now.verdict, stale);
        let kept = read_cache(&path, &boot_id().unwrap());
        assert!(kept.is_none() || kept == Some(now.verdict));
        let empty = tempfile::tempdir().unwrap();
        diagnose(None, Some(empty.path()));
        assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
    }

    #[test]
    fn the_probe_comes_back_with_words() {
        assert!(!probe(DEVICE, &Trace::default()).describe().is_empty());
    }
}
