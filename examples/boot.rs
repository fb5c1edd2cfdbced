//! Boots a guest kernel and shows what happens: the tool for bringing a kernel, a CPU or a device up.
//!
//! ```text
//! cargo run --release --example boot -- --kernel vmlinux --rootfs rootfs.ext4 \
//!     [--init /bin/sh] [--params "quiet"] [--ram MiB] [--cpus N] [--cpu host] [--seconds N] [--symbols System.map] [--sample MS] \
//!     [--store DIR [--capture SECONDS,SECONDS]] [--backend soft|kvm]
//! cargo run --release --example boot -- --store DIR --restore SNAPSHOT [--seconds N] ...
//! ```
//! With `--exec COMMAND` the guest's first program should be the agent: the command is run through it, in bash.
//! With `--capture`, snapshots are taken into the store at these times.
//! The root file system is not changed: writes go to a copy-on-write overlay in memory. The console goes to standard
//! output, everything else to standard error. With `--sample`, the instruction pointer is sampled and
//! a profile by symbol is printed. Arguments for init follow `--` in its string: `--init "/bin/sh -- -c 'echo hi'"`.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use amber_layers::{NewSnapshot, Store};
use amber_proto::{Exec, Identify};
use amberbox::agent::{Agent, Event};
use amberbox::machine::vcpu::{Backend, BackendKind, CpuModel};
use amberbox::machine::{BootConfig, DiskStorage, Machine, RestoreConfig};

/// Command-line options.
struct Options {
    kernel: PathBuf,
    rootfs: PathBuf,
    init: String,
    params: String,
    ram: u64,
    cpus: u8,
    cpu: CpuModel,
    limit: Duration,
    symbols: Option<PathBuf>,
    sample: Option<Duration>,
    store: Option<PathBuf>,
    capture: Vec<Duration>,
    restore: Option<String>,
    exec: Option<String>,
    backend: &'static dyn Backend,
}

impl Options {
    fn parse() -> Result<Options, Box<dyn Error>> {
        let mut values = HashMap::new();
        let mut args = std::env::args().skip(1);
        while let Some(name) = args.next() {
            let name = name.strip_prefix("--").ok_or(format!("Unknown argument {name}"))?.to_owned();
            let value = args.next().ok_or(format!("--{name} needs a value"))?;
            values.insert(name, value);
        }
        let mut take = |name: &str| values.remove(name);
        let options = Options {
            kernel: take("kernel").unwrap_or_default().into(),
            rootfs: take("rootfs").unwrap_or_default().into(),
            init: take("init").unwrap_or_else(|| "/bin/sh".into()),
            params: take("params").unwrap_or_default(),
            ram: take("ram").map_or(Ok(512), |v| v.parse::<u64>())? << 20,
            cpus: take("cpus").map_or(Ok(1), |v| v.parse())?,
            cpu: match take("cpu").as_deref() {
                None => CpuModel::Baseline,
                Some("host") => CpuModel::Host,
                Some(other) => return Err(format!("Unknown CPU {other}").into()),
            },
            limit: Duration::from_secs(take("seconds").map_or(Ok(60), |v| v.parse())?),
            symbols: take("symbols").map(PathBuf::from),
            sample: take("sample").map(|v| v.parse().map(Duration::from_millis)).transpose()?,
            store: take("store").map(PathBuf::from),
            capture: take("capture")
                .iter()
                .flat_map(|list| list.split(','))
                .map(|s| s.parse().map(Duration::from_secs_f64))
                .collect::<Result<_, _>>()?,
            restore: take("restore"),
            exec: take("exec"),
            backend: match take("backend").as_deref() {
                None | Some("soft") => BackendKind::Soft.backend(),
                Some("kvm") => BackendKind::Kvm.backend(),
                Some(other) => return Err(format!("Unknown backend {other}").into()),
            },
        };
        match values.keys().next() {
            Some(name) => Err(format!("Unknown option --{name}").into()),
            None => Ok(options),
        }
    }
}

/// The kernel's symbols, sorted by address.
#[derive(Default)]
struct Symbols(Vec<(u64, String)>);

impl Symbols {
    fn load(path: &PathBuf) -> Result<Symbols, Box<dyn Error>> {
        let text = fs::read_to_string(path)?;
        let mut symbols: Vec<(u64, String)> = text
            .lines()
            .filter_map(|line| {
                let mut fields = line.split_whitespace();
                let address = u64::from_str_radix(fields.next()?, 16).ok()?;
                // Percpu offsets and absolute values are not code.
                let kind = fields.next()?;
                (matches!(kind, "T" | "t" | "W" | "w") && address >> 63 != 0)
                    .then(|| Some((address, fields.next()?.to_owned())))?
            })
            .collect();
        symbols.sort();
        Ok(Symbols(symbols))
    }

    /// Name and offset, or "user" below the kernel.
    fn name(&self, address: u64) -> (String, u64) {
        if address >> 63 == 0 {
            return ("(user)".into(), address);
        }
        let at = self.0.partition_point(|(start, _)| *start <= address);
        match at.checked_sub(1).map(|i| &self.0[i]) {
            Some((start, name)) => (name.clone(), address - start),
            None => (format!("{address:#x}"), 0),
        }
    }
}

/// Runs a command through the guest's agent.
fn exec(machine: &Machine, command: &str, started: Instant) -> Result<(), Box<dyn Error>> {
    let note = |text: String| {
        let at = started.elapsed().as_secs_f64() * 1e3;
        let d = machine.diagnostics();
        let (executed, (_, decoded)) = (d.cpu.instructions as f64 / 1e6, d.cpu.other[0]);
        writeln!(io::stderr(), "[{at:9.1} ms, {executed:7.2} M, {decoded:6} sequences] {text}")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let agent = Agent::new(Arc::new(machine.vsock()));
    runtime.block_on(async {
        while let Err(e) = agent.info().await {
            if machine.end().is_some() {
                return Err(e.into());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        note("agent answers".into())?;
        let entropy = vec![started.elapsed().subsec_nanos() as u8; 64];
        let identify = Identify { sandbox_id: "boot".into(), entropy, ..Identify::default() };
        agent.identify(&identify).await?;
        note("agent knows who it is".into())?;
        let args = vec!["-c".to_owned(), command.to_owned()];
        let exec = Exec { cmd: "/bin/bash".into(), args, ..Exec::default() };
        let mut process = agent.exec(&exec).await?;
        while let Some(event) = process.next().await? {
            match event {
                Event::Stdout(data) => note(format!("out: {}", String::from_utf8_lossy(&data).trim_end()))?,
                Event::Stderr(data) => note(format!("err: {}", String::from_utf8_lossy(&data).trim_end()))?,
                Event::End(exit) => note(format!("exit {exit:?}"))?,
                _ => {}
            }
        }
        Ok(())
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse()?;
    let symbols = options.symbols.as_ref().map(Symbols::load).transpose()?.unwrap_or_default();
    let store = options.store.as_ref().map(|dir| Store::open(dir).map(Arc::new)).transpose()?;
    let storage = DiskStorage::Memory;
    let started = Instant::now();
    let mut images = None;
    let machine = match (&options.restore, &store) {
        (Some(id), Some(store)) => {
            let meta = store.resolve(id)?.ok_or("No such snapshot")?;
            let snapshot = images.insert(store.open_snapshot(&meta.id)?);
            Machine::restore(snapshot, RestoreConfig { storage }, options.backend)?
        }
        _ => {
            let (kernel, rootfs) = (options.kernel, options.rootfs);
            let (init, parameters) = (options.init, options.params);
            let config = BootConfig {
                ram: options.ram,
                cpus: options.cpus,
                cpu: options.cpu,
                kernel,
                init,
                parameters,
                rootfs,
                storage,
            };
            Machine::boot(config, options.backend)?
        }
    };
    let mut err = io::stderr();
    writeln!(err, "[machine ready after {:.1} ms]", started.elapsed().as_secs_f64() * 1e3)?;
    machine.observe_console(Box::new(move |line| {
        let at = started.elapsed().as_secs_f64();
        let _ = writeln!(io::stdout().lock(), "{at:9.4} {line}");
    }));
    let d = machine.diagnostics();
    writeln!(err, "[guest time {} ns, next timer at {:?}]", d.guest_ns, d.next_timer_ns)?;
    machine.resume()?;

    if let Some(command) = options.exec {
        let machine = machine.clone();
        std::thread::spawn(move || {
            if let Err(e) = exec(&machine, &command, started) {
                let _ = writeln!(io::stderr(), "[exec: {e}]");
            }
        });
    }
    let mut profile: HashMap<String, u64> = HashMap::new();
    let mut captures = options.capture.into_iter().peekable();
    while machine.end().is_none() && started.elapsed() < options.limit {
        if let Some(store) = &store
            && captures.next_if(|at| started.elapsed() >= *at).is_some()
        {
            let c = machine.capture(store, NewSnapshot::default())?;
            let (id, bytes) = (&c.meta.id, c.meta.own_bytes);
            writeln!(err, "[snapshot {id}: paused {:.1?} of {:.1?}, {bytes} bytes]", c.pause, c.total)?;
            writeln!(err, "[memory {:?}, disk {:?}]", c.memory, c.disk)?;
        }
        std::thread::sleep(options.sample.unwrap_or(Duration::from_millis(20)));
        if options.sample.is_some() {
            let (name, _) = symbols.name(machine.diagnostics().rip);
            *profile.entry(name).or_default() += 1;
        }
    }
    let wall = started.elapsed();
    let d = machine.diagnostics();
    writeln!(err, "[stopped for a look within {:.1?}]", started.elapsed() - wall)?;
    if let Some(end) = machine.end() {
        writeln!(err, "\n[{end}]")?;
    } else {
        let (name, offset) = symbols.name(d.rip);
        writeln!(err, "\n[time limit; next instruction at {:#x} {name}+{offset:#x}]", d.rip)?;
    }
    let mips = d.cpu.instructions as f64 / wall.as_secs_f64() / 1e6;
    writeln!(err, "wall {:.3} s, {} instructions, {mips:.1} MIPS", wall.as_secs_f64(), d.cpu.instructions)?;
    writeln!(err, "interrupts {}, wake-ups {}, dirty pages {}", d.cpu.interrupts, d.wakeups, d.dirty_pages)?;
    writeln!(err, "guest time {} ns, next timer at {:?}", d.guest_ns, d.next_timer_ns)?;
    writeln!(err, "exceptions {:?}", d.cpu.exceptions)?;
    writeln!(err, "{:?}", d.cpu.other)?;
    for (mnemonic, count) in &d.cpu.unimplemented {
        writeln!(err, "unimplemented: {mnemonic} x {count}")?;
    }
    for (index, value) in &d.unknown_msrs {
        writeln!(err, "unknown MSR {index:#x} {value:x?}")?;
    }
    if let Some(snapshot) = &images {
        let decoded = (snapshot.memory().frames_decoded(), snapshot.disk().frames_decoded());
        writeln!(err, "frames decoded: memory {}, disk {}", decoded.0, decoded.1)?;
        let start = Instant::now();
        snapshot.memory().ensure(0, snapshot.memory().pages())?;
        let all = snapshot.memory().frames_decoded();
        writeln!(err, "the other {} frames of memory: {:.1?}", all - decoded.0, start.elapsed())?;
    }
    let mut profile: Vec<(String, u64)> = profile.into_iter().collect();
    profile.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    for (name, count) in profile.iter().take(30) {
        writeln!(err, "{count:6} {name}")?;
    }
    machine.kill();
    Ok(())
}
