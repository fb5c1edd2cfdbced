//! What `amberbox doctor` asks: a probe made now, step by step.

use std::path::Path;

use napi::Env;
use napi::bindgen_prelude::PromiseRaw;
use napi_derive::napi;

use super::call::Call;
use crate::machine::probe::{self, Useless, Verdict};
use crate::sandbox::Error;

/// A step of the probe.
#[napi(object, object_from_js = false)]
pub struct JsProbeStep {
    /// What was done.
    pub name: &'static str,
    /// How long it took, in milliseconds.
    pub ms: f64,
}

/// What the probe of KVM did and found.
#[napi(object, object_from_js = false)]
pub struct JsDiagnosis {
    /// `usable`, or why KVM is not: `missing`, `forbidden`, `notkvm`, `refused`, `wrong`, `slow`, `hangs`, `host`.
    pub verdict: &'static str,
    /// The verdict in words.
    pub detail: String,
    /// What an interrupt from ring 3, a change of address space and the return took, where KVM is usable.
    pub round_ns: Option<f64>,
    /// The steps that were finished, in order; the probe ended in the next.
    pub steps: Vec<JsProbeStep>,
    /// How long all took, in milliseconds.
    pub ms: f64,
    /// `kvm` or `soft`; none if the environment asks for what does not exist.
    pub backend: Option<&'static str>,
    /// Why this backend, or why none.
    pub reason: String,
}

/// Probes KVM now, at `device` if it is given; otherwise at /dev/kvm, and the store in `home` keeps the verdict.
#[napi]
pub fn diagnose(
    env: &Env,
    device: Option<String>,
    home: String,
    call: Call,
) -> napi::Result<PromiseRaw<'_, JsDiagnosis>> {
    call.run(env, async move {
        let work = move || probe::diagnose(device.as_deref().map(Path::new), Some(Path::new(&home)));
        let found = tokio::task::spawn_blocking(work).await.map_err(Error::panicked)?;
        let (verdict, round_ns) = match &found.verdict {
            Verdict::Usable { round_ns } => ("usable", Some(*round_ns as f64)),
            Verdict::Useless { why, .. } => (name(*why), None),
        };
        let (backend, reason) = match found.choice {
            Ok(choice) => (Some(choice.backend.name()), choice.reason),
            Err(error) => (None, error.to_string()),
        };
        Ok(JsDiagnosis {
            verdict,
            detail: found.verdict.describe(),
            round_ns,
            steps: found
                .steps
                .iter()
                .map(|step| JsProbeStep { name: step.name, ms: step.took.as_secs_f64() * 1000.0 })
                .collect(),
            ms: found.took.as_secs_f64() * 1000.0,
            backend,
            reason,
        })
    })
}

fn name(why: Useless) -> &'static str {
    match why {
        Useless::Missing => "missing",
        Useless::Forbidden => "forbidden",
        Useless::NotKvm => "notkvm",
        Useless::Refused => "refused",
        Useless::Wrong => "wrong",
        Useless::Slow => "slow",
        Useless::Hangs => "hangs",
        Useless::Host => "host",
    }
}
