//! The CPUs' threads, and how others stop them, look at them and end them.
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
//! A machine of several CPUs is the first one's thread as far as others are concerned: it starts threads for the rest
//! when it runs, and has waited for them when it parks.
//!
//! **Lock order:** `control` before `guts` before the devices' locks before the interrupt controllers'.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

use rustix::process::Pid;
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
    /// The boot processor.
    pub(super) vcpu: Box<dyn Vcpu>,
    /// The other CPUs.
    pub(super) others: Vec<Box<dyn Vcpu>>,
    pub(super) devices: Arc<Devices>,
    /// The CPU is in HLT.
    pub(super) halted: bool,
    /// MSRs that the guest asked for in vain.
    pub(super) unknown_msrs: Vec<(u32, Option<u64>)>,
}

impl Guts {
    fn kicker(&self) -> Arc<dyn Kicker> {
        if self.others.is_empty() {
            return self.vcpu.kicker();
        }
        let others = self.others.iter().map(|vcpu| vcpu.kicker());
        Arc::new(All(std::iter::once(self.vcpu.kicker()).chain(others).collect()))
    }

    /// What all CPUs have done.
    fn counters(&self) -> Counters {
        self.others.iter().fold(self.vcpu.counters(), |sum, vcpu| sum.plus(&vcpu.counters()))
    }
}

/// All CPUs of a machine.
struct All(Vec<Arc<dyn Kicker>>);

impl Kicker for All {
    fn kick(&self) {
        self.0.iter().for_each(|kicker| kicker.kick());
    }
    fn interrupt(&self) {
        self.0.iter().for_each(|kicker| kicker.interrupt());
    }
    fn code_written(&self) {
        self.0.iter().for_each(|kicker| kicker.code_written());
    }
}

type End = (EndKind, String);

/// The end that one CPU has come to, which is that of all.
struct Finish<'a> {
    end: OnceLock<End>,
    kicker: &'a dyn Kicker,
}

impl Finish<'_> {
    fn set(&self, end: End) {
        // The first one counts.
        let _ = self.end.set(end);
        self.kicker.kick();
    }

    /// Runs a CPU. A panic is the end of the machine.
    fn guard(&self, run: impl FnOnce() -> Option<End>) {
        if let Some(end) = catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|panic| Some(words_of(&*panic)))
        {
            self.set(end);
        }
    }
}

fn words_of(panic: &(dyn std::any::Any + Send)) -> End {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    (EndKind::Failed, text.unwrap_or_else(|| "Panic without a message".into()))
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
    /// The kernel's number of the CPU's thread while it lives.
    tid: OnceLock<Pid>,
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
        let kicker = guts.kicker();
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
            tid: OnceLock::new(),
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
        // Not as of afterwards: it may well come to its end at once.
        let alive = !control.ended;
        self.update(control);
        if !paused {
            return alive;
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

    /// Processor time that the CPU's thread has used.
    pub(super) fn cpu_time(&self) -> Duration {
        let Some(tid) = self.tid.get().filter(|_| !self.control().ended) else { return Duration::ZERO };
        // The first number is the time on a processor in nanoseconds.
        let stat = std::fs::read_to_string(format!("/proc/self/task/{tid}/schedstat")).unwrap_or_default();
        let ns = stat.split_ascii_whitespace().next().and_then(|ns| ns.parse().ok());
        Duration::from_nanos(ns.unwrap_or(0))
    }

    fn main(&self) {
        let _ = self.tid.set(rustix::thread::gettid());
        let end = catch_unwind(AssertUnwindSafe(|| self.serve())).unwrap_or_else(|panic| words_of(&*panic));
        // Freeing the parts gives back memory, the disk's storage and the snapshot, whoever still holds a handle.
        let guts = lock(&self.guts).take();
        if let Some(guts) = &guts {
            guts.devices.shutdown();
            *lock(&self.counters) = guts.counters();
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
    fn serve(&self) -> End {
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
            *lock(&self.counters) = guts.counters();
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Runs all CPUs until `request` is set or the machine ends.
    fn run(&self, guts: &mut Guts) -> Option<End> {
        let bus = || MachineBus {
            ram: Arc::clone(&guts.ram),
            irqchip: Arc::clone(&self.irqchip),
            clock: Arc::clone(&self.clock),
            devices: Arc::clone(&guts.devices),
            kicker: Arc::clone(&self.kicker),
            reset: Arc::clone(&self.reset),
            unknown_msrs: Vec::new(),
        };
        let finish = Finish { end: OnceLock::new(), kicker: &*self.kicker };
        let mut buses: Vec<MachineBus> = guts.others.iter().map(|_| bus()).collect();
        let mut first = MachineBus { unknown_msrs: guts.unknown_msrs.clone(), ..bus() };
        thread::scope(|scope| {
            for ((number, vcpu), bus) in (1..).zip(&mut guts.others).zip(&mut buses) {
                let thread = thread::Builder::new().name(format!("amberbox-cpu{number}"));
                let run = || finish.guard(|| self.run_cpu(&mut **vcpu, bus, &mut false, &finish));
                if let Err(error) = thread.spawn_scoped(scope, run) {
                    finish.set((EndKind::Failed, format!("Cannot start a thread for CPU {number}: {error}")));
                    break;
                }
            }
            finish.guard(|| self.run_cpu(&mut *guts.vcpu, &mut first, &mut guts.halted, &finish));
        });
        guts.unknown_msrs = first.unknown_msrs;
        finish.end.into_inner()
    }

    /// Runs one CPU until `request` is set or the machine ends.
    fn run_cpu(
        &self,
        vcpu: &mut dyn Vcpu,
        bus: &mut MachineBus,
        halted: &mut bool,
        finish: &Finish<'_>,
    ) -> Option<End> {
        while finish.end.get().is_none() && !self.request.load(Ordering::Acquire) {
            if *halted && !self.sleep() {
                break;
            }
            *halted = false;
            let end = match vcpu.run(bus) {
                VcpuExit::Halt => {
                    *halted = true;
                    None
                }
                VcpuExit::Kicked => None,
                VcpuExit::Dead => Some((EndKind::PowerOff, String::new())),
                VcpuExit::Shutdown(story) => Some((EndKind::Reset, story)),
                VcpuExit::Failed(reason) => Some((EndKind::Failed, reason)),
            };
            if let Some(reason) = self.failure.get() {
                return Some((EndKind::Failed, reason.clone()));
            }
            if self.reset.load(Ordering::Acquire) {
                return Some((EndKind::Reset, "The guest reset itself".into()));
            }
            if end.is_some() {
                return end;
            }
        }
        None
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
