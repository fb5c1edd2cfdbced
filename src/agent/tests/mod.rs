//! The client against the real agent program, which runs as an ordinary process on a Unix socket. It is built by cargo on first use;
//! `AMBERBOX_TEST_AGENT` names another one.

mod files;
mod forward;
mod processes;
mod protocol;
mod recorded;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tempfile::TempDir;
use tokio::net::UnixStream;

use super::{Agent, AgentError, AsyncStream, Connect, Connecting, Event, Exec, Exit, Process};

/// The agent program of this workspace.
fn program() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        if let Some(path) = std::env::var_os("AMBERBOX_TEST_AGENT") {
            return path.into();
        }
        let status = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--quiet", "--package", "amber-agent", "--manifest-path"])
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml"))
            .status()
            .unwrap();
        assert!(status.success(), "The agent could not be built");
        // Test programs lie in target/PROFILE/deps.
        let deps = std::env::current_exe().unwrap();
        deps.parent().and_then(Path::parent).unwrap().join("amber-agent")
    })
}

/// A "guest": the agent with users of its own, in a directory of its own.
struct Guest {
    agent: Agent,
    child: Child,
    dir: TempDir,
}

struct Socket(PathBuf);

impl Connect for Socket {
    fn connect(&self, port: u32) -> Connecting {
        assert_eq!(port, amber_proto::PORT);
        let path = self.0.clone();
        Box::pin(async move { Ok(Box::new(UnixStream::connect(path).await?) as Box<dyn AsyncStream>) })
    }
}

impl Guest {
    async fn start() -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::set_permissions(root, fs::Permissions::from_mode(0o755)).unwrap();
        let (etc, home) = (root.join("etc"), root.join("home/user"));
        fs::create_dir_all(&etc).unwrap();
        fs::create_dir_all(&home).unwrap();
        // Without privileges there is only one user to be.
        let own = fs::metadata(&etc).unwrap();
        let (uid, gid) = if own.uid() == 0 { (1000, 1000) } else { (own.uid(), own.gid()) };
        chown(&home, Some(uid), Some(gid)).unwrap();
        let home = home.to_str().unwrap();
        let passwd =
            format!("root:x:0:0::{}/root:/bin/bash\nuser:x:{uid}:{gid}::{home}:/bin/bash\n", root.display());
        fs::write(etc.join("passwd"), passwd).unwrap();
        fs::write(etc.join("group"), format!("root:x:0:\nuser:x:{gid}:\n")).unwrap();
        let socket = root.join("agent.sock");
        let child = Command::new(program())
            .arg("--listen")
            .arg(format!("unix:{}", socket.display()))
            .arg("--etc")
            .arg(&etc)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while UnixStream::connect(&socket).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Guest { agent: Agent::new(Arc::new(Socket(socket))), child, dir }
    }

    fn home(&self) -> PathBuf {
        self.dir.path().join("home/user")
    }

    /// A path under the home directory, as text.
    fn path(&self, name: &str) -> String {
        self.home().join(name).to_str().unwrap().to_owned()
    }

    async fn socket(&self) -> UnixStream {
        UnixStream::connect(self.dir.path().join("agent.sock")).await.unwrap()
    }

    /// Runs a shell command to its end.
    async fn sh(&self, script: &str) -> Run {
        run(self.agent.exec(&shell(script)).await.unwrap()).await
    }

    /// Process ids of the agent's children; none when it has ended.
    fn children(&self) -> Vec<u32> {
        let id = self.child.id();
        let list = fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap_or_default();
        list.split_ascii_whitespace().map(|pid| pid.parse().unwrap()).collect()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let signal = |target: &str, name: &str| {
            let _ = Command::new("kill").args(["-s", name, "--", target]).stderr(Stdio::null()).status();
        };
        // Orphans come to the agent, so it has to go last, and must not reap in between.
        signal(&self.child.id().to_string(), "STOP");
        for pid in self.children() {
            // The group as well: its other members would only now become orphans.
            signal(&pid.to_string(), "KILL");
            signal(&format!("-{pid}"), "KILL");
        }
        // A test may have ended it already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a process wrote, and how it ended.
struct Run {
    out: Vec<u8>,
    err: Vec<u8>,
    exit: Exit,
}

impl Run {
    fn text(&self) -> &str {
        std::str::from_utf8(&self.out).unwrap()
    }
}

fn shell(script: &str) -> Exec {
    Exec { cmd: "/bin/sh".into(), args: vec!["-c".into(), script.into()], ..Exec::default() }
}

async fn run(mut process: Process) -> Run {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match process.next().await.unwrap().unwrap() {
            Event::Stdout(data) | Event::Pty(data) => out.extend(data),
            Event::Stderr(data) => err.extend(data),
            Event::End(exit) => {
                assert!(process.next().await.unwrap().is_none());
                return Run { out, err, exit };
            }
        }
    }
}

/// Reads events until the output contains `text`.
async fn read_until(process: &mut Process, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        match process.next().await.unwrap().unwrap() {
            Event::Stdout(data) | Event::Stderr(data) | Event::Pty(data) => {
                seen.push_str(&String::from_utf8_lossy(&data))
            }
            Event::End(exit) => panic!("Ended with {exit:?} before {text:?}, after {seen:?}"),
        }
    }
    seen
}
