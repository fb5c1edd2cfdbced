//! The CPU's thread, and how others stop it, look at it and end it.
//!
//! ```text
//!            hold / pause                      release / resume
//!   running ─────────────▶ parked (devices paused) ─────────────▶ running
//!      │ guest resets, fault, kill                │ kill
//!      └──────────────────▶ ended ◀───────────────┘
//! ```
//!
//! The thread owns the [`Guts`] while it runs and leaves them in their lock while it is parked, so whoever parked it
//! can look at the CPU and at memory in peace. In HLT the thread sleeps until a device or the next timer wants it: an
//! idle guest costs nothing. A panic while guest code runs ends this machine and nothing else.
//!
//! **Lock order:** `control` before `guts` before the devices' locks before the interrupt controllers'.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use tokio::sync::watch;

use super::bus::MachineBus;
use super::clock::Clock;
use super::devices::Devices;
use super::end::{EndKind, MachineEnd};
use super::irq::Irqchip;
use super::ram::Ram;
use super::vcpu::{Counters, Kicker, Vcpu, VcpuExit};
use crate::devices::serial::ConsoleLog;

/// What a machine is made of; gone when it has ended.
pub(super) struct Guts {
    pub(super) ram: Arc<Ram>,
    pub(super) vcpu: Box<dyn Vcpu>,
    pub(super) devices: Arc<Devices>,
    /// The CPU is in HLT.
    pub(super) halted: bool,
    /// MSRs that the guest asked for in vain.
    pub(super) unknown_msrs: Vec<(u32, Option<u64>)>,
}

#[derive(Debug, Default)]
struct Control {
    /// Nobody has started it yet, or its user paused it.
    paused: bool,
    /// Captures and the like that need it parked for a moment.
    holds: u32,
    kill: bool,
    /// The thread does not touch the guts.
    parked: bool,
    devices_paused: bool,
    ended: bool,
}

impl Control {
    fn may_run(&self) -> bool {
        !self.paused && self.holds == 0
    }
}

/// What the thread and the machine's handles share.
pub(super) struct Core {
    pub(super) irqchip: Arc<Irqchip>,
    pub(super) clock: Arc<Clock>,
    pub(super) console: ConsoleLog,
    guts: Mutex<Option<Guts>>,
    control: Mutex<Control>,
    changed: Condvar,
    /// Somebody changed `control`: the thread must look.
    request: AtomicBool,
    /// The guest pulled the reset line.
    reset: Arc<AtomicBool>,
    /// Why the machine cannot go on, if a device has found a reason.
    failure: Arc<OnceLock<String>>,
    kicker: Arc<dyn Kicker>,
    thread: OnceLock<Thread>,
    end: watch::Sender<Option<MachineEnd>>,
    /// Counters as of the last time the CPU was not running.
    counters: Mutex<Counters>,
    /// Times that the CPU woke up from HLT.
    wakeups: AtomicU64,
}

/// A machine whose CPU is parked for the length of this object's life.
pub(super) struct Held<'a> {
    core: &'a Core,
    guts: Option<MutexGuard<'a, Option<Guts>>>,
}

impl Held<'_> {
    /// The machine's parts; there, because it has not ended.
    pub(super) fn guts(&mut self) -> Option<&mut Guts> {
        self.guts.as_mut().and_then(|guts| guts.as_mut())
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.guts = None;
        let mut control = self.core.control();
        control.holds = control.holds.saturating_sub(1);
        self.core.update(control);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic with one of these locks held ends the machine (`serve`); what they protect is read for its remains only.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// Parks a new machine in a thread of its own. It runs once [`set_paused`](Self::set_paused) says so.
    pub(super) fn spawn(
        guts: Guts,
        irqchip: Arc<Irqchip>,
        clock: Arc<Clock>,
        console: ConsoleLog,
    ) -> std::io::Result<(Arc<Core>, JoinHandle<()>)> {
        let kicker = guts.vcpu.kicker();
        let ram = Arc::clone(&guts.ram);
        let disk = guts.devices.disk().clone();
        let control = Control { paused: true, parked: true, devices_paused: true, ..Control::default() };
        guts.devices.pause();
        let core = Arc::new(Core {
            irqchip,
            clock,
            console,
            guts: Mutex::new(Some(guts)),
            control: Mutex::new(control),
            changed: Condvar::new(),
            request: AtomicBool::new(false),
            reset: Arc::default(),
            failure: Arc::default(),
            kicker,
            thread: OnceLock::new(),
            end: watch::Sender::new(None),
            counters: Mutex::default(),
            wakeups: AtomicU64::new(0),
        });
        let own = Arc::clone(&core);
        let handle = thread::Builder::new().name("amberbox-cpu".into()).spawn(move || own.main())?;
        let _ = core.thread.set(handle.thread().clone());
        let (kicker, thread) = (Arc::clone(&core.kicker), handle.thread().clone());
        core.irqchip.set_notifier(Box::new(move || {
            kicker.interrupt();
            thread.unpark();
        }));
        let (kicker, failure) = (Arc::clone(&core.kicker), Arc::clone(&core.failure));
        disk.set_loss_listener(Box::new(move |reason| {
            let _ = failure.set(reason.to_owned());
            kicker.kick();
        }));
        let kicker = Arc::clone(&core.kicker);
        ram.set_code_listener(Box::new(move || kicker.code_written()));
        Ok((core, handle))
    }

    fn control(&self) -> MutexGuard<'_, Control> {
        lock(&self.control)
    }

    /// Tells the thread that `control` has changed, and readies the devices if it is to run.
    fn update(&self, mut control: MutexGuard<'_, Control>) {
        if control.may_run() && control.devices_paused && !control.ended {
            control.devices_paused = false;
            self.clock.thaw();
            if let Some(guts) = lock(&self.guts).as_ref() {
                guts.devices.resume();
            }
        }
        self.request.store(true, Ordering::Release);
        drop(control);
        self.changed.notify_all();
        self.kicker.kick();
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Waits until the thread is parked and pauses the devices; false if the machine has ended.
    fn park<'a>(&'a self, mut control: MutexGuard<'a, Control>) -> (MutexGuard<'a, Control>, bool) {
        while !control.parked && !control.ended {
            control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        if control.ended || control.kill {
            return (control, false);
        }
        if !control.devices_paused {
            if let Some(guts) = lock(&self.guts).as_ref() {
                guts.devices.pause();
            }
            control.devices_paused = true;
        }
        (control, true)
    }

    /// Parks the CPU for a moment; guest time goes on. `None` if the machine has ended.
    pub(super) fn hold(&self) -> Option<Held<'_>> {
        let mut control = self.control();
        control.holds += 1;
        self.update(control);
        let (control, alive) = self.park(self.control());
        drop(control);
        let guts = alive.then(|| lock(&self.guts));
        let mut held = Held { core: self, guts };
        held.guts().is_some().then_some(held)
    }

    /// Pauses the machine, its clock included, or lets it run. False if it has ended.
    pub(super) fn set_paused(&self, paused: bool) -> bool {
        let mut control = self.control();
        control.paused = paused;
        self.update(control);
        if !paused {
            return !self.control().ended;
        }
        let (control, alive) = self.park(self.control());
        // Somebody may have resumed it meanwhile.
        if alive && control.paused && control.parked {
            self.clock.freeze();
        }
        alive
    }

    /// Makes the machine end soon.
    pub(super) fn kill(&self) {
        let mut control = self.control();
        control.kill = true;
        self.update(control);
    }

    /// How the machine ended, once it has.
    pub(super) fn end(&self) -> watch::Receiver<Option<MachineEnd>> {
        self.end.subscribe()
    }

    /// Counters of a CPU that may be running: then as of its last stop, unless it can be asked.
    pub(super) fn counters(&self) -> (Counters, u64) {
        (lock(&self.counters).clone(), self.wakeups.load(Ordering::Relaxed))
    }

    fn main(&self) {
        let end = catch_unwind(AssertUnwindSafe(|| self.serve())).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
            let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
            (EndKind::Failed, text.unwrap_or_else(|| "Panic without a message".into()))
        });
        // Freeing the parts gives back memory, the disk's storage and the snapshot, whoever still holds a handle.
        let guts = lock(&self.guts).take();
        if let Some(guts) = &guts {
            guts.devices.shutdown();
            *lock(&self.counters) = guts.vcpu.counters();
        }
        drop(guts);
        let mut control = self.control();
        control.ended = true;
        control.parked = true;
        drop(control);
        self.changed.notify_all();
        self.end.send_replace(Some(MachineEnd::new(end.0, end.1, &self.console)));
    }

    /// Runs the CPU whenever it may; returns how the machine ended.
    fn serve(&self) -> (EndKind, String) {
        loop {
            let mut control = self.control();
            loop {
                if control.kill {
                    return (EndKind::Killed, String::new());
                }
                if control.may_run() {
                    break;
                }
                control.parked = true;
                self.changed.notify_all();
                control = self.changed.wait(control).unwrap_or_else(PoisonError::into_inner);
            }
            control.parked = false;
            self.request.store(false, Ordering::Release);
            drop(control);
            let mut guts = lock(&self.guts);
            let Some(guts) = guts.as_mut() else {
                return (EndKind::Failed, "The machine's parts are gone".into());
            };
            let end = self.run(guts);
            *lock(&self.counters) = guts.vcpu.counters();
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Runs until `request` is set or the machine ends.
    fn run(&self, guts: &mut Guts) -> Option<(EndKind, String)> {
        let mut bus = MachineBus {
            ram: Arc::clone(&guts.ram),
            irqchip: Arc::clone(&self.irqchip),
            clock: Arc::clone(&self.clock),
            devices: Arc::clone(&guts.devices),
            kicker: Arc::clone(&self.kicker),
            reset: Arc::clone(&self.reset),
            unknown_msrs: std::mem::take(&mut guts.unknown_msrs),
        };
        let mut end = None;
        while end.is_none() && !self.request.load(Ordering::Acquire) {
            if guts.halted && !self.sleep() {
                break;
            }
            guts.halted = false;
            end = match guts.vcpu.run(&mut bus) {
                VcpuExit::Halt => {
                    guts.halted = true;
                    None
                }
                VcpuExit::Kicked => None,
                VcpuExit::Dead => Some((EndKind::PowerOff, String::new())),
                VcpuExit::Shutdown(story) => Some((EndKind::Reset, story)),
                VcpuExit::Failed(reason) => Some((EndKind::Failed, reason)),
            };
            if self.reset.load(Ordering::Acquire) {
                end = Some((EndKind::Reset, "The guest reset itself".into()));
            }
            if let Some(reason) = self.failure.get() {
                end = Some((EndKind::Failed, reason.clone()));
            }
        }
        guts.unknown_msrs = bus.unknown_msrs;
        end
    }

    /// Sleeps in HLT until an interrupt is pending; false if somebody wants the thread first.
    fn sleep(&self) -> bool {
        loop {
            if self.request.load(Ordering::Acquire) {
                return false;
            }
            let now = self.clock.now();
            self.irqchip.expire(now);
            if self.irqchip.pending() {
                self.wakeups.fetch_add(1, Ordering::Relaxed);
                return true;
            }
            // Whoever changes what was just looked at unparks this thread afterwards: no wake-up is lost.
            match self.irqchip.deadline() {
                Some(deadline) => thread::park_timeout(Duration::from_nanos(deadline.saturating_sub(now))),
                None => thread::park(),
            }
        }
    }
}
