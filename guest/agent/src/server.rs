//! Accepts connections and hands each operation to the part that carries it out.

use std::convert::Infallible;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use amber_proto as proto;
use amber_proto::{ErrorCode, Kind, Request, VERSION, decode_head};

use crate::conn::{Conn, Failure, Result, args, failure};
use crate::listen::Listener;
use crate::state::{Settings, State};
use crate::{Options, exec, files, forward, freeze, identify, init, metrics, process, reap, watch};

/// Pause after the system ran out of descriptors or memory for a connection.
const RETRY: Duration = Duration::from_millis(20);

/// The operations of this version, in the order of the protocol's table.
pub(crate) const OPERATIONS: &[&str] = &[
    proto::GetInfo::OP,
    proto::Identify::OP,
    proto::Exec::OP,
    proto::Connect::OP,
    proto::ListProcesses::OP,
    proto::Signal::OP,
    proto::SendStdin::OP,
    proto::CloseStdin::OP,
    proto::PtyResize::OP,
    proto::Stat::OP,
    proto::List::OP,
    proto::Read::OP,
    proto::Write::OP,
    proto::MakeDir::OP,
    proto::Rename::OP,
    proto::Remove::OP,
    proto::Forward::OP,
    proto::Watch::OP,
    proto::GetMetrics::OP,
    proto::Sync::OP,
    proto::Freeze::OP,
    proto::Thaw::OP,
    proto::Shutdown::OP,
];

/// Serves for ever.
pub(crate) async fn run(options: Options) -> io::Result<Infallible> {
    let listener = Listener::bind(&options.address)?;
    let signals = reap::signals()?;
    let null: OwnedFd = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?.into();
    let settings = Settings {
        etc: options.etc,
        system: options.system,
        sandbox_id: None,
        default_user: "user".to_owned(),
        default_workdir: None,
        envs: Default::default(),
    };
    let freezer = freeze::Freezer::new(options.system);
    let state = State::new(settings, null, freezer);
    tokio::task::spawn_local(reap::run(state.clone(), signals));
    init::say("ready");
    loop {
        match listener.accept().await {
            Ok(fd) => match Conn::new(fd) {
                Ok(conn) => drop(tokio::task::spawn_local(serve(state.clone(), conn))),
                Err(error) => init::say(&format!("Connection was dropped: {error}")),
            },
            Err(error) => {
                init::say(&format!("Connection could not be accepted: {error}"));
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// One connection, one operation.
async fn serve(state: Rc<State>, mut conn: Conn) {
    let Ok((_, payload)) = conn.frame(&[Kind::REQUEST]).await else { return };
    let mut conn = Some(conn);
    let outcome = match decode_head(&payload) {
        Ok(head) => dispatch(&state, &mut conn, &head.op, &payload).await,
        Err(error) => Err(failure(ErrorCode::InvalidArgument, error.to_string())),
    };
    if let (Err(Failure::Remote(error)), Some(conn)) = (outcome, conn) {
        conn.refuse(&error).await;
    }
}

/// Carries an operation out. Operations that stream take the connection out of its place; where it is still there after an error, the
/// host is told.
async fn dispatch(state: &Rc<State>, slot: &mut Option<Conn>, op: &str, payload: &[u8]) -> Result<()> {
    /// Answers with the reply that an expression gives.
    macro_rules! reply {
        ($request:ty, $result:expr) => {{
            let reply: <$request as Request>::Reply = $result?;
            conn(slot)?.reply::<$request>(&reply).await
        }};
    }
    match op {
        proto::GetInfo::OP => reply!(proto::GetInfo, Result::Ok(identify::info(state))),
        proto::Identify::OP => {
            reply!(proto::Identify, args(payload).map(|request| identify::identify(state, request)))
        }
        proto::Freeze::OP => reply!(proto::Freeze, freeze::freeze(state).await),
        proto::Thaw::OP => reply!(proto::Thaw, freeze::thaw(state)),
        proto::Exec::OP => exec::run(state, slot, args(payload)?).await,
        proto::Connect::OP => process::connect(state, slot, &args::<proto::Connect>(payload)?).await,
        proto::ListProcesses::OP => process::list(state, conn(slot)?).await,
        proto::Signal::OP => reply!(proto::Signal, process::signal(state, &args(payload)?)),
        proto::SendStdin::OP => {
            reply!(proto::SendStdin, process::send_stdin(state, conn(slot)?, &args(payload)?).await)
        }
        proto::CloseStdin::OP => {
            reply!(proto::CloseStdin, process::close_stdin(state, &args(payload)?).await)
        }
        proto::PtyResize::OP => reply!(proto::PtyResize, process::resize(state, &args(payload)?)),
        proto::Forward::OP => forward::run(state, slot, args(payload)?).await,
        proto::GetMetrics::OP => reply!(proto::GetMetrics, metrics::metrics()),
        proto::Stat::OP => files::blocking::<proto::Stat>(state, slot, args(payload)?, files::stat).await,
        proto::List::OP => files::blocking::<proto::List>(state, slot, args(payload)?, files::list).await,
        proto::Read::OP => files::blocking::<proto::Read>(state, slot, args(payload)?, files::read).await,
        proto::Write::OP => files::blocking::<proto::Write>(state, slot, args(payload)?, files::write).await,
        proto::MakeDir::OP => {
            files::blocking::<proto::MakeDir>(state, slot, args(payload)?, files::make_dir).await
        }
        proto::Rename::OP => {
            files::blocking::<proto::Rename>(state, slot, args(payload)?, files::rename).await
        }
        proto::Remove::OP => {
            files::blocking::<proto::Remove>(state, slot, args(payload)?, files::remove).await
        }
        proto::Watch::OP => watch::run(state, slot, args(payload)?).await,
        proto::Sync::OP => files::blocking::<proto::Sync>(state, slot, args(payload)?, files::sync).await,
        proto::Shutdown::OP => {
            files::blocking::<proto::Shutdown>(state, slot, args(payload)?, files::shutdown).await
        }
        _ => {
            let message = format!(
                "Agent {} (protocol {VERSION}) does not know operation '{op}'",
                env!("CARGO_PKG_VERSION")
            );
            Err(failure(ErrorCode::Unsupported, message))
        }
    }
}

/// The connection, while no operation has taken it.
fn conn(slot: &mut Option<Conn>) -> Result<&mut Conn> {
    slot.as_mut().ok_or(Failure::Gone)
}
