//! The agent: process 1 of every Amberbox guest.
//!
//! It mounts the kernel's file systems, reaps every orphan, and carries out what the host asks for over vsock (`amber-proto`): processes,
//! terminals, files, identity. One thread runs an event loop; file contents and directory walks run on a few blocking threads, so that a slow
//! disk never delays a process's output. Nothing polls and no timer ticks: an idle agent uses no CPU.
//!
//! As process 1 it cannot be killed, not even by the kernel's out-of-memory killer, and it must not end: errors of an operation go to the
//! host, and everything that the guest's users control (files, directory depth, names, processes) is treated as hostile.
//!
//! `amber-agent --listen unix:PATH [--etc DIR]` runs it as an ordinary process for tests: no mounts, no clock, no host name, users and
//! identity files under DIR.

mod conn;
mod exec;
mod files;
mod forward;
mod freeze;
mod identify;
mod init;
mod listen;
mod metrics;
mod paths;
mod process;
mod pump;
mod reap;
mod server;
mod spawn;
mod state;
mod stream;
mod users;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use crate::listen::Address;

/// Stack of a blocking thread. No operation recurses.
const BLOCKING_STACK: usize = 256 << 10;

/// How the agent runs.
struct Options {
    address: Address,
    /// Where `passwd`, `group`, `hostname`, `hosts` and `machine-id` are.
    etc: PathBuf,
    /// Process 1 of a machine of its own: may set the clock, the host name and the random pool.
    system: bool,
}

fn main() -> ExitCode {
    let system = rustix::process::getpid().as_raw_nonzero().get() == 1;
    let options = match parse(std::env::args().skip(1), system) {
        Ok(options) => options,
        Err(message) => return fail(&message),
    };
    if system {
        init::prepare();
    } else {
        init::prepare_process();
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .thread_stack_size(BLOCKING_STACK)
        .build();
    let result = match runtime {
        Ok(runtime) => tokio::task::LocalSet::new().block_on(&runtime, server::run(options)),
        Err(error) => Err(error),
    };
    let message = match result {
        Ok(never) => match never {},
        Err(error) => format!("Agent cannot listen: {error}"),
    };
    if system {
        // Ending would panic the kernel and hide the reason; the host sees the console and its own timeout.
        init::say(&message);
        loop {
            std::thread::park();
        }
    }
    fail(&message)
}

/// Reads the command line. The kernel passes process 1 whatever it does not know itself, so there it is ignored.
fn parse(mut args: impl Iterator<Item = String>, system: bool) -> Result<Options, String> {
    let mut options = Options { address: Address::Vsock(amber_proto::PORT), etc: "/etc".into(), system };
    if system {
        return Ok(options);
    }
    let mut listen = None;
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("Option {arg} needs a value"))?;
        match arg.as_str() {
            "--listen" => listen = value.strip_prefix("unix:").map(PathBuf::from),
            "--etc" => options.etc = value.into(),
            _ => return Err(format!("Unknown option {arg}")),
        }
    }
    let path = listen.ok_or("Usage: amber-agent --listen unix:PATH [--etc DIR]")?;
    options.address = Address::Unix(path);
    Ok(options)
}

fn fail(message: &str) -> ExitCode {
    init::say(message);
    ExitCode::FAILURE
}
