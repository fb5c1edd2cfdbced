//! Resource use of the guest, read from `/proc` when asked.

use std::fs;

use amber_proto::{ErrorCode, Metrics};
use rustix::time::ClockId;

use crate::conn::{Result, failure};
use crate::identify::nanoseconds;

/// Nanoseconds per tick of `/proc/stat`; user space always sees 100 ticks a second.
const TICK: u64 = 10_000_000;

pub(crate) fn metrics() -> Result<Metrics> {
    let disk = rustix::fs::statvfs("/")
        .map_err(|error| failure(ErrorCode::Internal, format!("File system cannot be read: {error}")))?;
    let memory = parse_meminfo(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
    let cpu = parse_stat(&fs::read_to_string("/proc/stat").unwrap_or_default());
    Ok(Metrics {
        wall_clock_ns: nanoseconds(rustix::time::clock_gettime(ClockId::Realtime)),
        cpu_count: cpu.count,
        cpu_busy_ns: cpu.busy.saturating_mul(TICK),
        cpu_total_ns: cpu.total.saturating_mul(TICK),
        mem_total: memory.total,
        mem_used: memory.total.saturating_sub(memory.free).saturating_sub(memory.cache),
        mem_cache: memory.cache,
        disk_total: disk.f_blocks.saturating_mul(disk.f_frsize),
        disk_used: disk.f_blocks.saturating_sub(disk.f_bfree).saturating_mul(disk.f_frsize),
    })
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Memory {
    total: u64,
    free: u64,
    cache: u64,
}

/// Bytes from `/proc/meminfo`. The cache is what the kernel can drop: buffers, page cache and reclaimable slabs.
fn parse_meminfo(text: &str) -> Memory {
    let mut memory = Memory::default();
    for line in text.lines() {
        let Some((name, rest)) = line.split_once(':') else { continue };
        let value =
            rest.split_ascii_whitespace().next().and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
                * 1024;
        match name {
            "MemTotal" => memory.total = value,
            "MemFree" => memory.free = value,
            "Buffers" | "Cached" | "SReclaimable" => memory.cache += value,
            _ => {}
        }
    }
    memory
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Cpu {
    count: u32,
    busy: u64,
    total: u64,
}

/// Ticks from `/proc/stat`: user nice system idle iowait irq softirq steal; guest time is part of user time.
fn parse_stat(text: &str) -> Cpu {
    let mut cpu = Cpu::default();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace();
        match fields.next() {
            Some("cpu") => {
                for (index, ticks) in fields.take(8).filter_map(|field| field.parse::<u64>().ok()).enumerate()
                {
                    cpu.total += ticks;
                    cpu.busy += if matches!(index, 3 | 4) { 0 } else { ticks };
                }
            }
            Some(name) if name.starts_with("cpu") => cpu.count += 1,
            _ => break,
        }
    }
    cpu
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses() {
        let memory = parse_meminfo(
            "MemTotal:  100 kB\nMemFree: 40 kB\nMemAvailable: 70 kB\nBuffers: 1 kB\nCached: 20 kB\nSReclaimable: 2 kB\n",
        );
        assert_eq!(memory, Memory { total: 102_400, free: 40_960, cache: 23 * 1024 });
        let cpu = parse_stat("cpu  1 2 3 100 50 4 5 6 7 8\ncpu0 1 2 3 4\ncpu1 1 2 3 4\nintr 5\ncpu2 9\n");
        assert_eq!(cpu, Cpu { count: 2, busy: 21, total: 171 });
        assert_eq!(parse_stat(""), Cpu::default());
    }

    #[test]
    fn reads_the_machine() {
        let metrics = metrics().unwrap();
        assert!(metrics.mem_total > metrics.mem_used && metrics.mem_used > 0);
        assert!(
            metrics.disk_total >= metrics.disk_used
                && metrics.cpu_count > 0
                && metrics.cpu_total_ns >= metrics.cpu_busy_ns
        );
    }
}
