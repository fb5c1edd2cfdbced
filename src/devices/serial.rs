//! The serial console: a 16550 UART and the log of what the guest printed.
//!
//! `vm-superio` models the registers. The interrupt line is a level computed here from the pending and
//! enabled conditions after every access, which also holds when the driver masks and unmasks interrupts.
//! Output goes to a [`ConsoleLog`], a bounded tail that survives the machine, for diagnostics.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::fmt;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState as Registers};
use vm_superio::{Serial as Uart, Trigger};

use super::{IrqLine, RestoreError};

/// How much of the console's output is kept.
const LOG_CAPACITY: usize = 64 * 1024;
/// A longer line is delivered to observers in pieces.
const MAX_LINE: usize = 4096;
/// Capacity of the receive FIFO, as `vm-superio` defines it.
const FIFO_SIZE: usize = 64;

/// Interrupt conditions: bits of IER, and the same in `vm-superio`'s identification register.
const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMIT_EMPTY: u8 = 1 << 1;
const IIR_TRANSMIT_EMPTY: u8 = 1 << 1;
const IIR_RECEIVED: u8 = 1 << 2;

/// Called with each line of console output, without its line end, on the vCPU thread.
pub type LineObserver = Box<dyn FnMut(&str) + Send>;

#[derive(Default)]
struct Log {
    tail: VecDeque<u8>,
    line: Vec<u8>,
    observers: Vec<LineObserver>,
}

/// The last part of what the guest wrote to its console. Cheap to clone; all clones are the same log.
#[derive(Clone, Default)]
pub struct ConsoleLog(Arc<Mutex<Log>>);

impl ConsoleLog {
    /// An empty log.
    pub fn new() -> Self {
        Self::default()
    }

    /// The output that is still kept, at most 64 KiB, as text.
    pub fn tail(&self) -> String {
        let mut log = self.lock();
        String::from_utf8_lossy(log.tail.make_contiguous()).into_owned()
    }

    /// Calls `observer` for every line from now on. It must return soon and must not use this log.
    pub fn observe(&self, observer: impl FnMut(&str) + Send + 'static) {
        self.lock().observers.push(Box::new(observer));
    }

    fn lock(&self) -> MutexGuard<'_, Log> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for ConsoleLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConsoleLog").field("len", &self.lock().tail.len()).finish()
    }
}

impl Write for ConsoleLog {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        let mut log = self.lock();
        let Log { tail, line, observers } = &mut *log;
        for &byte in buf {
            if tail.len() == LOG_CAPACITY {
                tail.pop_front();
            }
            tail.push_back(byte);
            if byte != b'\n' && byte != b'\r' {
                line.push(byte);
            }
            if byte == b'\n' || line.len() == MAX_LINE {
                if !observers.is_empty() {
                    let text = String::from_utf8_lossy(line);
                    observers.iter_mut().for_each(|observer| observer(&text));
                }
                line.clear();
            }
        }
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The UART's own edge; unused, see the module's text.
struct NoTrigger;

impl Trigger for NoTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        Ok(())
    }
}

/// Saved registers of the UART.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
}

/// A 16550 at eight consecutive I/O ports.
pub struct Serial {
    uart: Mutex<Uart<NoTrigger, NoEvents, ConsoleLog>>,
    irq: Arc<dyn IrqLine>,
}

impl Serial {
    /// A UART as after power-on, writing to `log`.
    pub fn new(log: ConsoleLog, irq: Arc<dyn IrqLine>) -> Self {
        Serial { uart: Mutex::new(Uart::new(NoTrigger, log)), irq }
    }

    /// A UART that goes on where `state` was saved.
    pub fn restore(
        log: ConsoleLog,
        irq: Arc<dyn IrqLine>,
        state: &SerialState,
    ) -> Result<Self, RestoreError> {
        let invalid = |reason| RestoreError::Invalid { device: "serial", reason };
        if state.in_buffer.len() > FIFO_SIZE {
            return Err(invalid("more input than the FIFO holds"));
        }
        let registers = Registers {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer.clone(),
        };
        let uart = Uart::from_state(&registers, NoTrigger, NoEvents, log)
            .map_err(|_| invalid("registers are inconsistent"))?;
        let serial = Serial { uart: Mutex::new(uart), irq };
        serial.update_irq(&serial.lock());
        Ok(serial)
    }

    /// The registers to save.
    pub fn state(&self) -> SerialState {
        let state = self.lock().state();
        SerialState {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
        }
    }

    /// The guest reads the port at `offset` (0..8) from the base.
    pub fn read(&self, offset: u8) -> u8 {
        let mut uart = self.lock();
        let value = uart.read(offset);
        self.update_irq(&uart);
        value
    }

    /// The guest writes the port at `offset` (0..8) from the base.
    pub fn write(&self, offset: u8, value: u8) {
        let mut uart = self.lock();
        // Neither the log nor the trigger can fail.
        let _ = uart.write(offset, value);
        self.update_irq(&uart);
    }

    fn lock(&self) -> MutexGuard<'_, Uart<NoTrigger, NoEvents, ConsoleLog>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn update_irq(&self, uart: &Uart<NoTrigger, NoEvents, ConsoleLog>) {
        let state = uart.state();
        let pending = |cause, enable| {
            state.interrupt_identification & cause != 0 && state.interrupt_enable & enable != 0
        };
        self.irq.set_level(
            pending(IIR_RECEIVED, IER_RECEIVED) || pending(IIR_TRANSMIT_EMPTY, IER_TRANSMIT_EMPTY),
        );
    }
}

impl fmt::Debug for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serial").field("state", &self.state()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::devices::testing::{TestIrq, state_round_trips};

    const DATA: u8 = 0;
    const IER: u8 = 1;
    const IIR: u8 = 2;
    const LCR: u8 = 3;
    const MCR: u8 = 4;
    const LSR: u8 = 5;

    fn serial() -> (Serial, ConsoleLog, Arc<TestIrq>) {
        let (log, irq) = (ConsoleLog::new(), Arc::new(TestIrq::default()));
        (Serial::new(log.clone(), irq.clone()), log, irq)
    }

    fn print(serial: &Serial, text: &str) {
        text.bytes().for_each(|byte| serial.write(DATA, byte));
    }

    #[test]
    fn output_becomes_lines() {
        let (serial, log, _) = serial();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&lines);
        log.observe(move |line| seen.lock().unwrap().push(line.to_owned()));
        print(&serial, "booting\r\nlogin: ");
        assert_eq!(*lines.lock().unwrap(), ["booting"]);
        print(&serial, "x\n");
        assert_eq!(*lines.lock().unwrap(), ["booting", "login: x"]);
        assert_eq!(log.tail(), "booting\r\nlogin: x\n");
    }

    #[test]
    fn the_log_is_bounded() {
        let (serial, log, _) = serial();
        let count = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&count);
        log.observe(move |line| {
            counted.fetch_add(line.len(), Ordering::SeqCst);
        });
        print(&serial, &"a".repeat(LOG_CAPACITY));
        print(&serial, "the end");
        let tail = log.tail();
        assert_eq!(tail.len(), LOG_CAPACITY);
        assert!(tail.ends_with("the end"));
        assert_eq!(count.load(Ordering::SeqCst), LOG_CAPACITY, "long lines come in pieces");
        serial.write(DATA, 0xff);
        assert!(log.tail().ends_with('\u{fffd}'));
    }

    #[test]
    fn the_line_follows_pending_and_enabled() {
        let (serial, _, irq) = serial();
        serial.write(DATA, b'x');
        assert!(!irq.is_high(), "not enabled");
        assert_eq!(serial.read(LSR) & 0x60, 0x60);
        serial.write(IER, IER_TRANSMIT_EMPTY);
        assert!(irq.is_high());
        serial.write(IER, 0);
        assert!(!irq.is_high(), "masked, still pending");
        serial.write(IER, IER_TRANSMIT_EMPTY);
        assert!(irq.is_high());
        assert_eq!(irq.rises(), 2);
        assert_eq!(serial.read(IIR) & 0x0f, 2);
        assert!(!irq.is_high());
        serial.write(DATA, b'x');
        assert!(irq.is_high(), "the register is empty again");
    }

    #[test]
    fn looks_like_a_16550() {
        let (serial, _, _) = serial();
        assert_eq!(serial.read(IIR) & 0xc0, 0xc0);
        serial.write(7, 0x5a);
        assert_eq!(serial.read(7), 0x5a);
        serial.write(LCR, 0x83);
        serial.write(DATA, 1);
        assert_eq!(serial.read(DATA), 1);
        serial.write(LCR, 3);
        serial.write(MCR, 0x10);
        serial.write(DATA, b'l');
        assert_eq!(serial.read(LSR) & 1, 1);
        assert_eq!(serial.read(DATA), b'l');
        for offset in 0..=u8::MAX {
            serial.read(offset);
            serial.write(offset, 0xff);
        }
    }

    #[test]
    fn too_much_input_is_refused() {
        let (serial, log, irq) = serial();
        let mut state = serial.state();
        state.in_buffer = vec![0; FIFO_SIZE];
        assert!(Serial::restore(log.clone(), irq.clone(), &state).is_ok());
        state.in_buffer.push(0);
        assert!(Serial::restore(log, irq, &state).is_err());
    }

    state_round_trips! {
        state,
        device: serial().0,
        mutate: |serial: &mut Serial| {
            serial.write(IER, 0x0f);
            serial.write(MCR, 0x10);
            serial.write(DATA, b'x');
        },
        save: |serial: &Serial| serial.state(),
        restore: |_: &Serial, state: &SerialState| {
            let irq = Arc::new(TestIrq::default());
            let restored = Serial::restore(ConsoleLog::new(), irq.clone(), state).unwrap();
            assert_eq!(irq.is_high(), state.interrupt_identification & 6 != 0);
            restored
        },
    }
}
