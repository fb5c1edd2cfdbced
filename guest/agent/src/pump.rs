//! Carries a process's output to the connections that want it.
//!
//! One task per process reads its pipes and writes frames; nothing is queued in between, so a host that reads slowly holds the process back
//! through the pipe, and memory stays at one buffer whatever the process writes. Without an audience the output is read and discarded,
//! so that the process goes on.
//!
//! # When a process is over
//!
//! The exit is sent when the process has ended *and* its output has. The output ends when every copy of the pipe is closed; but a
//! background child (`server &`) may hold a copy for ever. So after the process has ended, output is still delivered until the pipes are
//! closed, or have been quiet for [`QUIET`], or [`LINGER`] has passed, whichever comes first. (E2B's daemon waits for the close, and such
//! a command hangs until its timeout.) What the background child writes later is discarded. What was in the pipes when the process ended is
//! always delivered, however slowly the host reads.

use std::future::{Future as _, poll_fn};
use std::pin::pin;
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::Duration;

use amber_proto::{HEADER_LEN, Kind, encode_cbor, header};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::conn::Conn;
use crate::process::{Ending, Process};
use crate::state::State;
use crate::stream::Stream;

/// Largest piece of output: what a pipe holds, and the header of its frame.
pub(crate) const BUFFER: usize = (64 << 10) + HEADER_LEN;

/// How long the pipes of an ended process must be silent.
const QUIET: Duration = Duration::from_millis(100);

/// How long an ended process's pipes are read at most.
const LINGER: Duration = Duration::from_secs(2);

/// Pieces below this size that follow one another within [`BURST`] are gathered.
const SMALL: usize = 4 << 10;

/// See [`SMALL`].
const BURST: Duration = Duration::from_millis(2);

/// An output of a process: a pipe or a terminal.
pub(crate) struct Output {
    kind: Kind,
    stream: Rc<Stream>,
    /// Bytes that were in the pipe when the process ended and have not been read yet.
    owed: usize,
}

impl Output {
    pub(crate) fn new(kind: Kind, stream: Rc<Stream>) -> Self {
        Self { kind, stream, owed: 0 }
    }
}

/// What happened to a process.
enum Happening {
    /// The output of this index has a piece of this length, which is in the scratch buffer after room for the header.
    Piece(usize, usize),
    /// An output is at its end, or broken.
    Closed(usize),
    /// The process has ended.
    Ended(Ending),
    /// A connection wants the output from now on.
    Attach(Conn),
    /// A connection of the audience is gone.
    Left(usize),
}

/// Carries output until the process is over, tells the audience, and then discards what background children still write.
pub(crate) async fn run(
    state: &State,
    process: Rc<Process>,
    mut outputs: Vec<Output>,
    mut attached: mpsc::UnboundedReceiver<Conn>,
    mut audience: Vec<Conn>,
) {
    let mut ending = None;
    let mut deadline = Instant::now();
    let mut turn = 0;
    let mut last = None;
    {
        let mut subscription = process.ending.subscribe();
        let mut ended =
            pin!(async move { subscription.wait_for(Option::is_some).await.ok().and_then(|ending| *ending) });
        while ending.is_none() || !outputs.is_empty() {
            let next = poll_fn(|cx| {
                if ending.is_none()
                    && let Poll::Ready(Some(how)) = ended.as_mut().poll(cx)
                {
                    return Poll::Ready(Happening::Ended(how));
                }
                poll_outputs(cx, state, &outputs, &mut turn, &mut attached, &audience)
            });
            let happening = if ending.is_some() && outputs.iter().all(|output| output.owed == 0) {
                if Instant::now() >= deadline {
                    break;
                }
                let quiet = deadline.min(Instant::now() + QUIET);
                tokio::select! {
                    biased;
                    happening = next => happening,
                    () = sleep_until(quiet) => break,
                }
            } else {
                next.await
            };
            match happening {
                Happening::Piece(index, length) => {
                    outputs[index].owed = outputs[index].owed.saturating_sub(length);
                    deliver(state, outputs[index].kind, length, &mut audience).await;
                    gather(length, &mut last);
                }
                Happening::Closed(index) => drop(outputs.remove(index)),
                Happening::Ended(how) => {
                    ending = Some(how);
                    deadline = Instant::now() + LINGER;
                    for output in &mut outputs {
                        let waiting = rustix::io::ioctl_fionread(&*output.stream).unwrap_or(0);
                        output.owed = usize::try_from(waiting).unwrap_or(0);
                    }
                }
                Happening::Attach(conn) => audience.push(conn),
                Happening::Left(index) => drop(audience.swap_remove(index)),
            }
        }
    }
    if let Some(ending) = ending {
        let frame = encode_cbor(Kind::EXIT, &process.exit(ending)).unwrap_or_default();
        attached.close();
        while let Some(conn) = attached.recv().await {
            audience.push(conn);
        }
        for conn in audience {
            // Whoever is gone needs no exit.
            let _ = conn.send(&frame).await;
        }
    }
    while !outputs.is_empty() {
        let happening = poll_fn(|cx| poll_outputs(cx, state, &outputs, &mut turn, &mut attached, &[])).await;
        if let Happening::Closed(index) = happening {
            outputs.remove(index);
        }
    }
}

fn poll_outputs(
    cx: &mut Context<'_>,
    state: &State,
    outputs: &[Output],
    turn: &mut usize,
    attached: &mut mpsc::UnboundedReceiver<Conn>,
    audience: &[Conn],
) -> Poll<Happening> {
    if let Poll::Ready(Some(conn)) = attached.poll_recv(cx) {
        return Poll::Ready(Happening::Attach(conn));
    }
    // Outputs take turns, so that a busy one does not silence the other.
    *turn = turn.wrapping_add(1);
    for step in 0..outputs.len() {
        let index = turn.wrapping_add(step) % outputs.len();
        let mut scratch = state.scratch.borrow_mut();
        match outputs[index].stream.poll_read(cx, &mut scratch[HEADER_LEN..]) {
            Poll::Ready(Ok(length)) if length > 0 => return Poll::Ready(Happening::Piece(index, length)),
            Poll::Ready(_) => return Poll::Ready(Happening::Closed(index)),
            Poll::Pending => {}
        }
    }
    for (index, conn) in audience.iter().enumerate() {
        if conn.poll_closed(cx).is_ready() {
            return Poll::Ready(Happening::Left(index));
        }
    }
    Poll::Pending
}

/// Lets a process that writes many small pieces run on before the next one is read. On one processor, each piece would otherwise cost two
/// context switches and a packet; this way the pipe gathers what is written until the process blocks or its time slice ends. The
/// first piece after a pause is never held back.
fn gather(length: usize, last: &mut Option<Instant>) {
    if length < SMALL && last.is_some_and(|last| last.elapsed() < BURST) {
        rustix::thread::sched_yield();
    }
    *last = Some(Instant::now());
}

/// Sends a piece that is in the scratch buffer to everybody.
async fn deliver(state: &State, kind: Kind, length: usize, audience: &mut Vec<Conn>) {
    if audience.is_empty() {
        return;
    }
    let mut rest = Vec::new();
    {
        let mut scratch = state.scratch.borrow_mut();
        let frame = &mut scratch[..HEADER_LEN + length];
        frame[..HEADER_LEN].copy_from_slice(&header(kind, length));
        // In the usual case the transport takes the frame at once, and nothing is copied or allocated.
        audience.retain(|conn| match conn.try_send(frame) {
            Ok(count) => {
                rest.push(if count < frame.len() { frame[count..].to_vec() } else { Vec::new() });
                true
            }
            Err(_) => false,
        });
    }
    let mut gone = Vec::new();
    for (conn, rest) in audience.iter().zip(&rest) {
        gone.push(!rest.is_empty() && conn.send(rest).await.is_err());
    }
    let mut gone = gone.into_iter();
    audience.retain(|_| !gone.next().unwrap_or(false));
}
