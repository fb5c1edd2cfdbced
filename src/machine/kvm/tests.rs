//! Whole machines in KVM, with guests of a few instructions. They run where the probe finds a KVM that works, or
//! `AMBERBOX_BACKEND=kvm` says that it does, and say that they are skipped elsewhere.

use std::sync::Arc;

use super::Kvm;
use crate::machine::probe::{self, Verdict};
use crate::machine::soft::Soft;
use crate::machine::tests::{
    COUNT, POWER_OFF, RESET, Rig, TRIPLE_FAULT, counter, end_of, restore_on, ticker, wait,
};
use crate::machine::vcpu::{Backend, BackendError, CpuModel};
use crate::machine::{BootConfig, EndKind, Machine, MachineError, SnapshotError};

/// The backend, where it works.
pub(in crate::machine) fn usable() -> Option<&'static dyn Backend> {
    let forced = std::env::var(probe::OVERRIDE).is_ok_and(|wish| wish == "kvm");
    if forced || matches!(probe::verdict(None), Verdict::Usable { .. }) {
        return Some(&Kvm);
    }
    eprintln!("skipped: no KVM that works here ({})", probe::verdict(None).describe());
    None
}

fn rig() -> Option<Rig> {
    usable().map(Rig::on)
}

#[test]
fn guests_end_as_on_the_software_cpu() {
    let Some(rig) = rig() else { return };
    let reset = end_of(&rig.run(&RESET));
    assert_eq!((reset.kind, reset.console.as_str()), (EndKind::Reset, "A"));
    let fault = end_of(&rig.run(&TRIPLE_FAULT));
    assert_eq!(fault.kind, EndKind::Reset);
    assert!(fault.detail.contains("Triple fault"), "{}", fault.detail);
}

#[test]
fn a_spinning_guest_stops_when_told_and_goes_on() {
    let Some(rig) = rig() else { return };
    let machine = rig.run(&COUNT);
    let mut last = 0;
    for _ in 0..3 {
        wait("counting", || {
            machine.pause().unwrap();
            let first = counter(&rig.snapshot(&machine).1);
            assert_eq!(counter(&rig.snapshot(&machine).1), first, "it stands still");
            machine.resume().unwrap();
            std::mem::replace(&mut last, first) < first
        });
    }
    machine.kill();
    assert_eq!(end_of(&machine).kind, EndKind::Killed);
}

#[test]
fn a_halted_guest_can_be_killed() {
    let Some(rig) = rig() else { return };
    let machine = rig.run(&POWER_OFF);
    machine.kill();
    assert!(machine.end().is_some());
}

#[test]
fn a_guest_that_lives_on_its_timer_moves_between_backends() {
    let Some(rig) = rig() else { return };
    let mut machine = rig.run(&ticker());
    let mut last = 0;
    for backend in [&Soft as &dyn Backend, &Kvm, &Soft, &Kvm, &Kvm] {
        let mut latest = None;
        wait("ticks", || {
            latest = latest_of(&rig, &machine, last + 20);
            latest.is_some()
        });
        let latest = latest.unwrap();
        last = counter(&latest);
        machine.kill();
        machine = restore_on(backend, &latest).unwrap();
        assert_eq!(machine.backend(), backend.kind());
        machine.resume().unwrap();
    }
    wait("ticks at last", || latest_of(&rig, &machine, last + 20).is_some());
}

/// A snapshot, if the guest has counted so far.
fn latest_of(rig: &Rig, machine: &Machine, least: u64) -> Option<Arc<amber_layers::Snapshot>> {
    let snapshot = rig.snapshot(machine).1;
    (counter(&snapshot) >= least).then_some(snapshot)
}

#[test]
fn several_cpus_are_saved_and_the_software_cpu_refuses_them() {
    let Some(rig) = rig() else { return };
    let config = BootConfig { cpus: 3, ..rig.config(&COUNT) };
    let machine = Machine::boot(config, &Kvm).unwrap();
    machine.resume().unwrap();
    let snapshot = rig.snapshot(&machine).1;
    let refused = restore_on(&Soft, &snapshot).unwrap_err();
    assert!(matches!(refused, MachineError::Snapshot(SnapshotError::Backend(_))), "{refused}");
    let copy = restore_on(&Kvm, &snapshot).unwrap();
    assert_eq!(copy.cpus(), 3);
    copy.resume().unwrap();
    let counted = counter(&snapshot);
    wait("counting", || counter(&rig.snapshot(&copy).1) > counted);
}

#[test]
fn a_snapshot_of_the_hosts_cpu_stays_with_kvm() {
    let Some(rig) = rig() else { return };
    let config = BootConfig { cpu: CpuModel::Host, ..rig.config(&COUNT) };
    let machine = Machine::boot(config, &Kvm).unwrap();
    machine.resume().unwrap();
    let snapshot = rig.snapshot(&machine).1;
    let refused = restore_on(&Soft, &snapshot).unwrap_err();
    let why = MachineError::Snapshot(SnapshotError::Backend(BackendError::HostCpu));
    assert_eq!(refused.to_string(), why.to_string());
    let copy = restore_on(&Kvm, &snapshot).unwrap();
    copy.resume().unwrap();
    let counted = counter(&snapshot);
    wait("counting", || counter(&rig.snapshot(&copy).1) > counted);
}
