//! Attach `network`: 169.254.169.254 is this container's own address on a network of the engine's, given by whoever started
//! it. Nothing of the host is looked at or changed, and no right is needed.

use std::io;
use std::net::{SocketAddr, TcpListener};

use super::{AppError, IMDS_ADDRESS, interception};
use crate::server::IMDS_PORT;

/// Listens at the address and the port that clients ask, which must both be to be had.
pub(super) fn listen() -> Result<(TcpListener, SocketAddr), AppError> {
    let at = SocketAddr::new(IMDS_ADDRESS.into(), IMDS_PORT);
    let bound = TcpListener::bind(at).and_then(|listener| {
        interception::make_ours(&listener)?;
        Ok((listener, at))
    });
    bound.map_err(|source| AppError::Network {
        hint: match source.kind() {
            io::ErrorKind::AddrNotAvailable => {
                "it is for a container that has this address on a network of its engine's, as in examples/unprivileged"
            }
            io::ErrorKind::PermissionDenied => {
                "sysctl net.ipv4.ip_unprivileged_port_start=0, which Docker sets in containers, or CAP_NET_BIND_SERVICE"
            }
            _ => "what else listens in this container?",
        },
        source,
    })
}
