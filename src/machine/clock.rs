//! Guest time: nanoseconds since the guest booted, not counting the time it was frozen; the TSC; kvm-clock.
//!
//! Guest time is the host's monotonic clock plus an offset that only changes while no CPU runs. So a guest that is frozen,
//! saved and restored on another day finds its monotonic clock where it was; its wall clock is set by the agent, which
//! knows that it is a copy. Under the software CPU the TSC counts the nanoseconds of guest time, and the kvm-clock page
//! (Linux: Documentation/virt/kvm/x86/msr.rst) says so. A backend that has a clock of its own ([`HostChips`]) is given guest
//! time whenever the machine starts to run, and asked for it afterwards; it has TSC and kvm-clock to itself.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::platform::{MSR_KVM_SYSTEM_TIME, MSR_KVM_WALL_CLOCK, MSR_TSC, MemoryMap, TSC_HZ};
use super::vcpu::{Counter, HostChips};

/// The process's own zero of monotonic time.
static EPOCH: LazyLock<Instant> = LazyLock::new(Instant::now);
const RUNNING: u64 = u64::MAX;
/// Guest time is bounded so that sums of it cannot overflow: 146 years.
const MAX_TIME: u64 = 1 << 62;
const SYSTEM_TIME_ENABLE: u64 = 1;
/// `struct pvclock_vcpu_time_info`.
const SYSTEM_TIME_SIZE: u64 = 32;
/// `struct pvclock_wall_clock`.
const WALL_CLOCK_SIZE: u64 = 12;
const FLAG_TSC_STABLE: u8 = 1;
const NANOS: u64 = 1_000_000_000;

fn monotonic() -> i64 {
    // 292 years of uptime.
    EPOCH.elapsed().as_nanos() as i64
}

/// Saved clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockState {
    /// Guest time.
    pub guest_ns: u64,
    /// The TSC at that time.
    pub tsc: u64,
    /// Its rate.
    pub tsc_hz: u64,
    /// kvm-clock's system-time MSR.
    pub system_time: u64,
    /// The host's wall clock at that time, in nanoseconds since 1970: how old the snapshot is.
    pub wall_ns: u64,
}

/// Saved clock that no machine can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Saved state of the clock is invalid: {0}")]
pub struct ClockStateError(&'static str);

/// The clock of one machine.
pub struct Clock {
    /// Guest time minus host time.
    offset: AtomicI64,
    /// Guest time while frozen, else [`RUNNING`].
    frozen: AtomicU64,
    /// TSC minus guest time, wrapping.
    tsc_offset: AtomicU64,
    system_time: AtomicU64,
    map: MemoryMap,
    /// The backend's own clock, if it has one. It belongs to the CPUs.
    host: Option<Weak<dyn HostChips>>,
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Clock")
            .field("now", &self.now())
            .field("hosted", &self.host.is_some())
            .finish_non_exhaustive()
    }
}

/// Bytes that a write to one of the clock's MSRs puts into guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClockPage {
    /// Guest-physical address.
    pub address: u64,
    /// Content.
    pub bytes: Vec<u8>,
}

impl Clock {
    /// A frozen clock at guest time 0.
    pub fn new(map: MemoryMap) -> Clock {
        Clock {
            offset: AtomicI64::new(0),
            frozen: AtomicU64::new(0),
            tsc_offset: AtomicU64::new(0),
            system_time: AtomicU64::new(0),
            map,
            host: None,
        }
    }

    /// A frozen clock at the guest time of `state`.
    ///
    /// # Errors
    /// No machine can have this state.
    pub fn restore(map: MemoryMap, state: &ClockState) -> Result<Clock, ClockStateError> {
        if state.guest_ns > MAX_TIME {
            return Err(ClockStateError("guest time is out of range"));
        }
        let enabled = state.system_time & SYSTEM_TIME_ENABLE != 0;
        if enabled && !fits(map, state.system_time & !SYSTEM_TIME_ENABLE, SYSTEM_TIME_SIZE) {
            return Err(ClockStateError("the system time page is not in RAM"));
        }
        let clock = Clock::new(map);
        clock.frozen.store(state.guest_ns, Ordering::Release);
        // The TSC's value goes on, whatever its rate was: the kvm-clock page is written anew.
        clock.tsc_offset.store(state.tsc.wrapping_sub(state.guest_ns), Ordering::Release);
        clock.system_time.store(state.system_time, Ordering::Release);
        Ok(clock)
    }

    /// Hands the clock over to the backend, which keeps it from now on. It is frozen.
    ///
    /// # Errors
    /// The backend refuses it.
    pub fn hosted(mut self, host: &Arc<dyn HostChips>) -> Result<Clock, String> {
        host.set_counter(self.tsc(), self.system_time.load(Ordering::Acquire))?;
        self.host = Some(Arc::downgrade(host));
        Ok(self)
    }

    /// The state to save. With a clock of the backend's own, no CPU runs.
    ///
    /// # Errors
    /// The backend cannot tell.
    pub fn state(&self) -> Result<ClockState, String> {
        let guest_ns = self.now();
        let counter = match &self.host {
            Some(host) => host.upgrade().ok_or("The machine has ended")?.counter()?,
            None => Counter {
                tsc: guest_ns.wrapping_add(self.tsc_offset.load(Ordering::Acquire)),
                tsc_hz: TSC_HZ,
                system_time: self.system_time.load(Ordering::Acquire),
            },
        };
        let Counter { tsc, tsc_hz, system_time } = counter;
        Ok(ClockState { guest_ns, tsc, tsc_hz, system_time, wall_ns: wall_clock() })
    }

    /// Guest time.
    #[inline]
    pub fn now(&self) -> u64 {
        let frozen = self.frozen.load(Ordering::Acquire);
        if frozen != RUNNING {
            return frozen;
        }
        // A host that does not answer has no machine any more; the estimate is good enough to say so.
        let host = self.host.as_ref().and_then(|host| host.upgrade()?.guest_time().ok());
        host.unwrap_or_else(|| monotonic().wrapping_add(self.offset.load(Ordering::Relaxed)) as u64)
    }

    /// The time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        self.now().wrapping_add(self.tsc_offset.load(Ordering::Relaxed))
    }

    /// Stops guest time. No CPU runs.
    pub fn freeze(&self) {
        self.frozen.store(self.now(), Ordering::Release);
    }

    /// Lets guest time go on from where it was frozen. No CPU runs yet.
    pub fn thaw(&self) {
        let frozen = self.frozen.load(Ordering::Acquire);
        if frozen != RUNNING {
            if let Some(host) = self.host.as_ref().and_then(Weak::upgrade) {
                // A host that refuses will refuse to run the CPU too, and that is reported.
                let _ = host.set_guest_time(frozen);
            }
            self.offset.store((frozen as i64).wrapping_sub(monotonic()), Ordering::Release);
            self.frozen.store(RUNNING, Ordering::Release);
        }
    }

    /// Reads one of the clock's MSRs, or `None` if it is not one of them.
    pub fn rdmsr(&self, index: u32) -> Option<u64> {
        match index {
            MSR_TSC => Some(self.tsc()),
            MSR_KVM_SYSTEM_TIME => Some(self.system_time.load(Ordering::Acquire)),
            // Write-only in effect: the guest asks for the wall clock by writing.
            MSR_KVM_WALL_CLOCK => Some(0),
            _ => None,
        }
    }

    /// Writes one of the clock's MSRs. Returns whether the value is acceptable, and what it puts into guest memory; or
    /// `None` if it is not one of them.
    pub fn wrmsr(&self, index: u32, value: u64) -> Option<Result<Option<ClockPage>, ClockStateError>> {
        match index {
            MSR_TSC => {
                self.tsc_offset.store(value.wrapping_sub(self.now()), Ordering::Release);
                Some(Ok(self.system_time_page()))
            }
            MSR_KVM_SYSTEM_TIME => {
                let enabled = value & SYSTEM_TIME_ENABLE != 0;
                if enabled && !fits(self.map, value & !SYSTEM_TIME_ENABLE, SYSTEM_TIME_SIZE) {
                    return Some(Err(ClockStateError("the system time page is not in RAM")));
                }
                self.system_time.store(value, Ordering::Release);
                Some(Ok(self.system_time_page()))
            }
            MSR_KVM_WALL_CLOCK => {
                if !fits(self.map, value, WALL_CLOCK_SIZE) {
                    return Some(Err(ClockStateError("the wall clock is not in RAM")));
                }
                Some(Ok(Some(ClockPage { address: value, bytes: self.wall_clock_record() })))
            }
            _ => None,
        }
    }

    /// The system-time record, if the guest has asked for one: TSC to guest time. The version is even, which says that
    /// it is complete: no CPU runs while it is written.
    pub fn system_time_page(&self) -> Option<ClockPage> {
        let msr = self.system_time.load(Ordering::Acquire);
        if msr & SYSTEM_TIME_ENABLE == 0 {
            return None;
        }
        let now = self.now();
        let tsc = now.wrapping_add(self.tsc_offset.load(Ordering::Acquire));
        let mut bytes = Vec::with_capacity(SYSTEM_TIME_SIZE as usize);
        bytes.extend(2u32.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(tsc.to_le_bytes());
        bytes.extend(now.to_le_bytes());
        // ns = ((tsc - tsc_timestamp) << shift) * mul >> 32, one to one.
        bytes.extend((1u32 << 31).to_le_bytes());
        bytes.extend([1, FLAG_TSC_STABLE, 0, 0]);
        Some(ClockPage { address: msr & !SYSTEM_TIME_ENABLE, bytes })
    }

    /// The wall clock at guest time 0.
    fn wall_clock_record(&self) -> Vec<u8> {
        let boot = wall_clock().saturating_sub(self.now());
        let mut bytes = Vec::with_capacity(WALL_CLOCK_SIZE as usize);
        bytes.extend(2u32.to_le_bytes());
        bytes.extend(((boot / NANOS) as u32).to_le_bytes());
        bytes.extend(((boot % NANOS) as u32).to_le_bytes());
        bytes
    }
}

/// The host's wall clock in nanoseconds since 1970.
fn wall_clock() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// Whether a record lies within one page of RAM, aligned.
fn fits(map: MemoryMap, address: u64, size: u64) -> bool {
    let last = address.checked_add(size - 1);
    address.is_multiple_of(4)
        && last.is_some_and(|last| map.page_of(address).is_some() && map.page_of(last).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::platform::PAGE_SIZE;

    fn map() -> MemoryMap {
        MemoryMap::with_pages(16)
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn frozen_time_stands_and_goes_on_from_there() {
        let clock = Clock::new(map());
        assert_eq!(clock.now(), 0);
        clock.thaw();
        let before = clock.now();
        while clock.now() == before {}
        clock.freeze();
        let frozen = clock.now();
        assert!(frozen > before);
        assert_eq!(clock.now(), frozen);
        clock.thaw();
        clock.thaw();
        assert!(clock.now() >= frozen);
    }

    #[test]
    fn restored_time_never_runs_backwards() {
        let clock = Clock::new(map());
        clock.thaw();
        clock.wrmsr(MSR_TSC, 1 << 40).unwrap().unwrap();
        clock.wrmsr(MSR_KVM_SYSTEM_TIME, 0x1001).unwrap().unwrap();
        clock.freeze();
        let state = clock.state().unwrap();
        let copy = Clock::restore(map(), &state).unwrap();
        assert_eq!(copy.state().unwrap().guest_ns, state.guest_ns);
        let page = copy.system_time_page().unwrap();
        assert_eq!(page.address, 0x1000);
        assert_eq!((u64_at(&page.bytes, 8), u64_at(&page.bytes, 16)), (state.tsc, state.guest_ns));
        copy.thaw();
        assert!(copy.now() >= state.guest_ns && copy.tsc() >= state.tsc);
    }

    #[test]
    fn the_page_converts_tsc_to_guest_time() {
        let clock = Clock::new(map());
        clock.thaw();
        clock.wrmsr(MSR_TSC, 12345).unwrap().unwrap();
        let page = clock.wrmsr(MSR_KVM_SYSTEM_TIME, 0x2001).unwrap().unwrap().unwrap();
        assert_eq!(page.bytes.len() as u64, SYSTEM_TIME_SIZE);
        clock.freeze();
        let delta = clock.tsc() - u64_at(&page.bytes, 8);
        let mul = u64::from(u32::from_le_bytes(page.bytes[24..28].try_into().unwrap()));
        let ns = (((u128::from(delta) << page.bytes[28]) * u128::from(mul)) >> 32) as u64;
        assert_eq!(u64_at(&page.bytes, 16) + ns, clock.now());
    }

    #[test]
    fn the_wall_clock_is_that_of_guest_time_zero() {
        let clock = Clock::new(map());
        let page = clock.wrmsr(MSR_KVM_WALL_CLOCK, 0x3000).unwrap().unwrap().unwrap();
        let seconds = u32::from_le_bytes(page.bytes[4..8].try_into().unwrap());
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(now - u64::from(seconds) <= 1);
    }

    #[test]
    fn addresses_outside_ram_are_refused() {
        let clock = Clock::new(map());
        for address in [16 * PAGE_SIZE, 16 * PAGE_SIZE - 16, u64::MAX - 2, 2] {
            assert!(clock.wrmsr(MSR_KVM_SYSTEM_TIME, address | 1).unwrap().is_err(), "{address:#x}");
        }
        assert!(clock.wrmsr(MSR_KVM_WALL_CLOCK, 16 * PAGE_SIZE - 4).unwrap().is_err());
        assert_eq!(clock.wrmsr(MSR_KVM_SYSTEM_TIME, 0).unwrap(), Ok(None));
        assert!(clock.wrmsr(0x11, 0).is_none());
        let mut state = clock.state().unwrap();
        state.system_time = 1 << 40 | 1;
        assert!(Clock::restore(map(), &state).is_err());
        state = ClockState { guest_ns: u64::MAX, ..clock.state().unwrap() };
        assert!(Clock::restore(map(), &state).is_err());
    }
}
