//! How a machine ended.

use std::fmt;

use crate::devices::serial::ConsoleLog;

/// Lines of the console that an end carries.
const CONSOLE_LINES: usize = 20;
const PANIC: &str = "Kernel panic - not syncing: ";

/// The kind of end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EndKind {
    /// Its owner ended it.
    Killed,
    /// The guest kernel panicked.
    Panic,
    /// The guest reset itself, or its CPU had no way on (triple fault).
    Reset,
    /// The guest powered off.
    PowerOff,
    /// The machine itself failed; no fault of the guest.
    Failed,
}

/// How and why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineEnd {
    /// The kind of end.
    pub kind: EndKind,
    /// The cause, where there is more to say.
    pub detail: String,
    /// The last lines of the guest's console.
    pub console: String,
}

impl MachineEnd {
    pub(super) fn new(kind: EndKind, detail: String, console: &ConsoleLog) -> MachineEnd {
        let tail = console.tail();
        // With `panic=-1` a panicking kernel resets at once; what it said tells the two apart.
        let panic = tail.rfind(PANIC).map(|at| tail[at + PANIC.len()..].lines().next().unwrap_or(""));
        let (kind, detail) = match (kind, panic) {
            (EndKind::Reset, Some(panic)) => (EndKind::Panic, panic.trim_end().to_owned()),
            _ => (kind, detail),
        };
        let lines: Vec<&str> = tail.lines().collect();
        let console = lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n");
        MachineEnd { kind, detail, console }
    }
}

impl fmt::Display for MachineEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = match self.kind {
            EndKind::Killed => "The sandbox was killed",
            EndKind::Panic => "The guest kernel panicked",
            EndKind::Reset => "The guest reset itself",
            EndKind::PowerOff => "The guest powered off",
            EndKind::Failed => "The virtual machine failed",
        };
        f.write_str(what)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_reset_after_a_panic_is_a_panic() {
        let mut console = ConsoleLog::new();
        for i in 0..40 {
            writeln!(console, "line {i}\r").unwrap();
        }
        writeln!(console, "[    1.0] Kernel panic - not syncing: Attempted to kill init!\r\nRebooting\r")
            .unwrap();
        let end = MachineEnd::new(EndKind::Reset, "triple fault".into(), &console);
        assert_eq!(end.kind, EndKind::Panic);
        assert_eq!(end.to_string(), "The guest kernel panicked: Attempted to kill init!");
        assert_eq!(end.console.lines().count(), CONSOLE_LINES);
        assert!(end.console.ends_with("Rebooting"));
    }

    #[test]
    fn other_ends_keep_their_kind_and_cause() {
        let console = ConsoleLog::new();
        let end = MachineEnd::new(EndKind::Reset, "#PF, then #DF".into(), &console);
        assert_eq!(end.to_string(), "The guest reset itself: #PF, then #DF");
        assert_eq!(
            MachineEnd::new(EndKind::Killed, String::new(), &console).to_string(),
            "The sandbox was killed"
        );
    }
}
