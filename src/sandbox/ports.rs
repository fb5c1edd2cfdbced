//! Ports of sandboxes on the host. Each forwarded port is a listener of its own; each connection to it becomes one to the agent, which
//! connects to the port in the guest and relays bytes. So whatever speaks TCP goes through, and a closed port answers like one: with a reset.
//!
//! A listener belongs to the sandbox, not to its machine: it stays over a pause, so that an address that was given away stays good, and is
//! closed when the sandbox ends. Connections belong to the machine, and are cut when it stops.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::AbortHandle;

use super::profile::Profile;
use super::registry::registry;
use super::{Error, Sandbox, awake, runtime};

/// Buffer of one direction of a connection.
const BUFFER: usize = 32 << 10;

/// Pause after the process ran out of descriptors.
const RETRY: Duration = Duration::from_millis(50);

/// The head of an HTTP request may not be longer.
const MAX_HEAD: usize = 64 << 10;

/// How long it may take to arrive.
const HEAD_LIMIT: Duration = Duration::from_secs(60);

/// The header that requests to private ports must have.
const TOKEN_HEADER: &str = "e2b-traffic-access-token";

/// Stands for the port in a mask of `Host`.
const PORT: &str = "${PORT}";

/// One forwarded port.
#[derive(Debug)]
struct Listening {
    port: u16,
    bind: IpAddr,
    at: SocketAddr,
    task: AbortHandle,
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

type Ports = HashMap<String, Vec<Listening>>;
static PORTS: LazyLock<Mutex<Ports>> = LazyLock::new(Mutex::default);

fn ports() -> MutexGuard<'static, Ports> {
    PORTS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The address on the host, at the interface `bind`, that leads to a port of a sandbox of this process; the same each time.
pub fn forward(id: &str, port: u16, bind: IpAddr) -> Result<SocketAddr, Error> {
    let mut ports = ports();
    if let Some(known) =
        ports.get(id).and_then(|all| all.iter().find(|one| one.port == port && one.bind == bind))
    {
        return Ok(known.at);
    }
    // Looked at with the lock held: one that ends from here on closes what is about to be opened.
    match registry().find(id) {
        Ok(_) | Err(Error::SandboxPaused) => {}
        Err(Error::SandboxKilled(_)) => return Err(Error::no_sandbox(id)),
        Err(error) => return Err(error),
    }
    let failed = |error: io::Error| {
        Error::Machine(format!("Cannot listen at {bind} for port {port} of the sandbox: {error}"))
    };
    let listener = std::net::TcpListener::bind((bind, 0)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    let at = listener.local_addr().map_err(failed)?;
    let _runtime = runtime()?.enter();
    let listener = TcpListener::from_std(listener).map_err(failed)?;
    let task = tokio::spawn(accept(listener, id.to_owned(), port)).abort_handle();
    ports.entry(id.to_owned()).or_default().push(Listening { port, bind, at, task });
    Ok(at)
}

/// Closes all ports of a sandbox that has ended.
pub(super) fn close(id: &str) {
    ports().remove(id);
}

async fn accept(listener: TcpListener, id: String, port: u16) {
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                let id = id.clone();
                tokio::spawn(async move {
                    if serve(&id, port, client).await.is_err() {
                        // The client has been reset, or is gone.
                    }
                });
            }
            Err(error) => {
                tracing::warn!(sandbox = id, port, "A connection could not be accepted: {error}");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// What a connection ends with, if not properly: the client sees a reset.
struct Cut;

async fn serve(id: &str, port: u16, mut client: TcpStream) -> Result<(), Cut> {
    let relayed = relay(id, port, &mut client).await;
    if relayed.is_err() {
        // Closing now sends a reset instead of the end of a stream that was not at its end.
        let _ = client.set_zero_linger();
    }
    relayed
}

async fn relay(id: &str, port: u16, client: &mut TcpStream) -> Result<(), Cut> {
    let sandbox = awake(id).await.map_err(|_| Cut)?;
    client.set_nodelay(true).map_err(|_| Cut)?;
    let mut head = Vec::new();
    let Profile { traffic_token: token, mask_request_host: mask, .. } = sandbox.profile();
    if token.is_some() || mask.is_some() {
        head =
            tokio::time::timeout(HEAD_LIMIT, read_head(client)).await.map_err(|_| Cut)?.map_err(|_| Cut)?;
        if token.is_some_and(|token| !shows_token(&head, &token)) {
            return refuse(id, client).await.map_err(|_| Cut);
        }
        head = rewritten(&head, mask.map(|mask| mask.replace(PORT, &port.to_string())).as_deref());
    }
    let (mut guest, early) = connect(&sandbox, port).await?;
    guest.write_all(&head).await.map_err(|_| Cut)?;
    client.write_all(&early).await.map_err(|_| Cut)?;
    tokio::select! {
        copied = copy_bidirectional_with_sizes(client, &mut guest, BUFFER, BUFFER) => {
            copied.map(drop).map_err(|_| Cut)
        }
        _ = sandbox.end() => Err(Cut),
    }
}

type Guest = (Box<dyn crate::agent::AsyncStream>, Vec<u8>);

async fn connect(sandbox: &Arc<Sandbox>, port: u16) -> Result<Guest, Cut> {
    sandbox.agent_call(sandbox.agent.forward(port)).await.map_err(|error| {
        if !matches!(error, Error::NotFound(_)) {
            tracing::warn!(sandbox = sandbox.id(), port, "A connection could not be forwarded: {error}");
        }
        Cut
    })
}

/// Reads until the end of an HTTP request's head, or until it is too long or ends early.
async fn read_head(client: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut head = Vec::with_capacity(1024);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() >= MAX_HEAD || client.read_buf(&mut head).await? == 0 {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(head)
}

/// The name of a header line.
fn name_of(line: &[u8]) -> Option<&[u8]> {
    line.iter().position(|byte| *byte == b':').map(|colon| &line[..colon])
}

fn is(name: Option<&[u8]>, wanted: &str) -> bool {
    name.is_some_and(|name| name.eq_ignore_ascii_case(wanted.as_bytes()))
}

/// The lines of a request's head with their ends, up to the empty one, and what follows that.
fn lines_of(request: &[u8]) -> (Vec<&[u8]>, &[u8]) {
    let mut lines = Vec::new();
    let mut rest = request;
    while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
        let (line, later) = rest.split_at(end + 1);
        if line.trim_ascii().is_empty() {
            break;
        }
        lines.push(line);
        rest = later;
    }
    (lines, rest)
}

/// The request as the server gets it: with another `Host`, if one is wanted; and as the last of its connection unless it
/// changes the protocol, because only the first request of a connection is looked at (RFC 9112, section 9.6).
fn rewritten(request: &[u8], host: Option<&str>) -> Vec<u8> {
    let (lines, rest) = lines_of(request);
    let upgrade = lines.iter().any(|line| is(name_of(line), "upgrade"));
    let mut out = Vec::with_capacity(request.len() + 64);
    for (i, line) in lines.iter().enumerate() {
        let name = if i == 0 { None } else { name_of(line) };
        if (host.is_some() && is(name, "host"))
            || (!upgrade && (is(name, "connection") || is(name, "keep-alive")))
        {
            continue;
        }
        out.extend_from_slice(line);
        if i == 0 {
            if let Some(host) = host {
                out.extend_from_slice(format!("Host: {host}\r\n").as_bytes());
            }
            if !upgrade {
                out.extend_from_slice(b"Connection: close\r\n");
            }
        }
    }
    out.extend_from_slice(rest);
    out
}

/// Whether a request has the token.
fn shows_token(head: &[u8], token: &str) -> bool {
    for line in lines_of(head).0.into_iter().skip(1) {
        let name = name_of(line);
        if is(name, TOKEN_HEADER) {
            let value = line[TOKEN_HEADER.len() + 1..].trim_ascii();
            // Takes the same time wherever they differ.
            let differences = value.iter().zip(token.as_bytes()).fold(0, |sum, (a, b)| sum | (a ^ b));
            return value.len() == token.len() && differences == 0;
        }
    }
    false
}

async fn refuse(id: &str, client: &mut TcpStream) -> io::Result<()> {
    let body = serde_json::json!({
        "sandboxId": id,
        "message": format!("The sandbox's ports are private: send the header '{TOKEN_HEADER}'"),
        "code": 403,
    })
    .to_string();
    let answer = format!(
        "HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    );
    client.write_all(answer.as_bytes()).await?;
    client.shutdown().await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_a_header_of_the_first_request() {
        let with = |headers: &str| format!("GET / HTTP/1.1\r\n{headers}\r\n\r\n").into_bytes();
        for good in ["e2b-traffic-access-token: abc", "Host: x\r\nE2B-Traffic-Access-Token:abc \r\nA: b"] {
            assert!(shows_token(&with(good), "abc"), "{good}");
        }
        for bad in [
            "",
            "Host: x",
            "e2b-traffic-access-token: abd",
            "e2b-traffic-access-token: ab",
            "e2b-traffic-access-token: abcd",
            "e2b-traffic-access-token:",
            "x-e2b-traffic-access-token: abc",
        ] {
            assert!(!shows_token(&with(bad), "abc"), "{bad}");
        }
        // Not in the request line, and not in the body.
        assert!(!shows_token(b"e2b-traffic-access-token: abc\r\n\r\n", "abc"));
        assert!(!shows_token(b"GET / HTTP/1.1\r\n\r\ne2b-traffic-access-token: abc\r\n\r\n", "abc"));
    }

    #[test]
    fn requests_that_are_looked_at_are_the_last_of_their_connection() {
        let rewritten = |request: &str, host| String::from_utf8(rewritten(request.as_bytes(), host)).unwrap();
        assert_eq!(
            rewritten(
                "POST /a:b HTTP/1.1\r\nhost: x\r\nConnection: keep-alive\r\nA: b\r\n\r\nHost: body\r\n",
                None
            ),
            "POST /a:b HTTP/1.1\r\nConnection: close\r\nhost: x\r\nA: b\r\n\r\nHost: body\r\n"
        );
        assert_eq!(
            rewritten("GET / HTTP/1.1\r\nA: b\r\nhost: x\r\n\r\n", Some("localhost:80")),
            "GET / HTTP/1.1\r\nHost: localhost:80\r\nConnection: close\r\nA: b\r\n\r\n"
        );
        // One that changes the protocol keeps its connection.
        let upgrade = "GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        assert_eq!(rewritten(upgrade, None), upgrade);
        assert_eq!(rewritten(upgrade, Some("y")), upgrade.replace("Host: x", "Host: y"));
    }
}
