//! Whether the daemon's own way works: from a process of this host to the address, by the rules to the listener, and back.
//! Asks nobody else, AWS least of all.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpSocket;
use tokio::time::timeout;

use crate::clock::rfc3339_seconds;
use crate::containers::index::{EngineState, Failing};
use crate::server::{IMDS_PORT, Service};

/// The longest that it takes; an answer takes half a second at most.
const PATIENCE: Duration = Duration::from_secs(2);

/// Asks the daemon itself at `address`. Without one there is nothing on the host to ask: it serves inside containers, and what
/// answers on the host is somebody else.
///
/// # Errors
/// What does not work.
pub async fn probe(service: &Arc<Service>, address: Option<IpAddr>) -> Result<(), String> {
    match &*service.index.engine() {
        EngineState::Away(why) => return Err(format!("the engine is away: {why}")),
        EngineState::Synchronising => {
            let failing = service.index.failing();
            let looked_up = || "the containers of this host are still being looked up".to_owned();
            return Err(failing.map_or_else(looked_up, |it| {
                format!("the container engine fails: {}", self::failing(&it))
            }));
        }
        EngineState::Synchronised => {}
    }
    let Some(address) = address else { return Ok(()) };
    let asked = timeout(PATIENCE, ask(service, address)).await;
    match asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
        Ok(true) => Ok(()),
        Ok(false) => Err(format!("{address} is answered by somebody else on this host")),
        Err(error) => Err(format!("{address} does not answer on this host: {error}")),
    }
}

/// A call to the engine that fails: since when, and with which error.
pub(super) fn failing(failing: &Failing) -> String {
    let others = match failing.others {
        0 => String::new(),
        others => format!(" (and {others} other calls)"),
    };
    format!(
        "{} fails since {}{others}: {}",
        failing.call,
        rfc3339_seconds(failing.since),
        failing.error
    )
}

/// Whether it was this daemon that answered.
async fn ask(service: &Arc<Service>, address: IpAddr) -> io::Result<bool> {
    let socket = match address {
        IpAddr::V4(_) => TcpSocket::new_v4()?,
        IpAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // From the address itself: were it not on this host, nothing would leave.
    socket.bind(SocketAddr::new(address, 0))?;
    let probe = service.expect_probe(socket.local_addr()?);
    let mut stream = socket.connect(SocketAddr::new(address, IMDS_PORT)).await?;
    let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut start = [0; 5];
    stream.read_exact(&mut start).await?;
    Ok(&start == b"HTTP/" && probe.arrived())
}
