//! Resource use of sandboxes, with history.
//!
//! Processor time is that of the virtual CPU's thread, which the host knows without asking the guest. Memory and disk only the guest
//! knows, and asking wakes it up: so it is asked when somebody wants to see the numbers, and otherwise only if it was busy since the last time.
//! An idle guest has not changed, and stays idle.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::{Error, Sandbox};
use crate::agent::Metrics;

/// Time between two samples.
const INTERVAL: Duration = Duration::from_secs(5);

/// Samples that are kept: those of an hour.
const KEPT: usize = 720;

/// Samples are not taken more often than this, however often they are asked for.
const SHORTEST: Duration = Duration::from_millis(500);

/// A guest that used more than this part of its processor since it was last asked is asked again.
const BUSY: f64 = 0.02;

/// Resource use at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// When.
    pub at: SystemTime,
    /// Part of the processors that was used since the sample before, in percent of one processor.
    pub cpu_used_pct: f64,
    /// Processors.
    pub cpu_count: u32,
    /// Memory in use without caches, bytes.
    pub mem_used: u64,
    /// Memory, bytes.
    pub mem_total: u64,
    /// Page cache, bytes.
    pub mem_cache: u64,
    /// Used part of the disk, bytes.
    pub disk_used: u64,
    /// Size of the disk, bytes.
    pub disk_total: u64,
}

/// The samples of one sandbox.
#[derive(Debug)]
pub(super) struct History {
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    samples: VecDeque<Sample>,
    /// Of the last sample: when it was taken, and the processor time then.
    last: (Instant, Duration),
    /// What the guest said last, when, and the processor time then.
    guest: Option<Metrics>,
    asked: (Instant, Duration),
}

impl History {
    /// The history of a sandbox that starts now, with this processor time used.
    pub(super) fn new(cpu: Duration) -> Self {
        let now = (Instant::now(), cpu);
        Self { inner: Mutex::new(Inner { samples: VecDeque::new(), last: now, guest: None, asked: now }) }
    }

    fn with<T>(&self, body: impl FnOnce(&mut Inner) -> T) -> T {
        body(&mut self.inner.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Part of one processor that was used between two moments.
fn used(from: (Instant, Duration), to: (Instant, Duration)) -> f64 {
    let wall = to.0.saturating_duration_since(from.0).as_secs_f64();
    if wall > 0.0 { to.1.saturating_sub(from.1).as_secs_f64() / wall } else { 0.0 }
}

impl Inner {
    /// Notes a sample, if enough time has passed and the guest has ever been asked.
    fn note(&mut self, now: (Instant, Duration), cpu_count: u32) {
        let Some(guest) = &self.guest else { return };
        if !self.samples.is_empty() && now.0.saturating_duration_since(self.last.0) < SHORTEST {
            return;
        }
        let sample = Sample {
            at: SystemTime::now(),
            cpu_used_pct: (used(self.last, now) * 100.0).min(100.0 * f64::from(cpu_count)),
            cpu_count,
            mem_used: guest.mem_used,
            mem_total: guest.mem_total,
            mem_cache: guest.mem_cache,
            disk_used: guest.disk_used,
            disk_total: guest.disk_total,
        };
        self.last = now;
        if self.samples.len() == KEPT {
            self.samples.pop_front();
        }
        self.samples.push_back(sample);
    }
}

impl Sandbox {
    /// Samples from now on until the sandbox ends.
    pub(super) fn sample(self: &Arc<Self>) {
        let sandbox: Weak<Sandbox> = Arc::downgrade(self);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                let Some(sandbox) = sandbox.upgrade().filter(|sandbox| sandbox.ended().is_none()) else {
                    return;
                };
                let now = sandbox.cpu_now();
                if sandbox.history.with(|history| used(history.asked, now) > BUSY) {
                    // A guest that does not answer has a history of its processor time all the same.
                    let _ = tokio::time::timeout(INTERVAL, sandbox.ask()).await;
                }
                let now = sandbox.cpu_now();
                sandbox.history.with(|history| history.note(now, sandbox.vm().facts().cpu_count));
            }
        });
    }

    fn cpu_now(&self) -> (Instant, Duration) {
        (Instant::now(), self.vm().cpu_time())
    }

    async fn ask(&self) -> Result<(), Error> {
        let metrics = self.agent_call(self.agent.metrics()).await?;
        let now = self.cpu_now();
        self.history.with(|history| {
            history.guest = Some(metrics);
            history.asked = now;
        });
        Ok(())
    }

    /// The samples between two moments, the present one included; oldest first. Moments are meant to the second, as E2B takes them.
    pub async fn metrics(
        &self,
        start: Option<SystemTime>,
        end: Option<SystemTime>,
    ) -> Result<Vec<Sample>, Error> {
        const SECOND: Duration = Duration::from_secs(1);
        let start = start.map(|start| start.checked_sub(SECOND).unwrap_or(SystemTime::UNIX_EPOCH));
        let end = end.map(|end| end.checked_add(SECOND).unwrap_or(end));
        if end.is_none_or(|end| end >= SystemTime::now()) {
            self.ask().await?;
            let now = self.cpu_now();
            self.history.with(|history| history.note(now, self.vm().facts().cpu_count));
        }
        let wanted = |sample: &&Sample| {
            start.is_none_or(|start| sample.at >= start) && end.is_none_or(|end| sample.at <= end)
        };
        Ok(self.history.with(|history| history.samples.iter().filter(wanted).copied().collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_need_time_between_them_and_are_bounded() {
        let begun = Instant::now();
        let at = |ms: u64, cpu: u64| (begun + Duration::from_millis(ms), Duration::from_millis(cpu));
        let history = History::new(Duration::ZERO);
        history.with(|inner| {
            inner.last = at(0, 0);
            inner.note(at(1000, 500), 1);
            assert!(inner.samples.is_empty(), "the guest has not said anything yet");
            inner.guest = Some(Metrics { mem_total: 7, ..Metrics::default() });
            inner.note(at(2000, 500), 1);
            inner.note(at(2100, 600), 1);
            assert_eq!(inner.samples.len(), 1);
            assert_eq!((inner.samples[0].cpu_used_pct, inner.samples[0].mem_total), (25.0, 7));
            // More than there is cannot be used; clocks of the host are read one after the other.
            inner.note(at(3000, 9000), 2);
            assert_eq!(inner.samples[1].cpu_used_pct, 200.0);
            for i in 0..1000 {
                inner.note(at(10_000 + i * 5000, 9000), 2);
            }
            assert_eq!(inner.samples.len(), KEPT);
        });
    }
}
