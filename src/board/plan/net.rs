//! Network interfaces: taps opened, file descriptors taken, passt started.

use std::io;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use devices::mmds::{Mmds, Service, Stack};
use devices::virtio::net::{
    Detour, Keeper, NetBackend, NetOptions, Tap, TapError, Vhost, VhostError,
};
use devices::virtio::registry::DeviceConfig;

use super::Plan;
use super::limits::Limiters;
use super::passt::{PasstError, PasstKeeper, Recipe};
use crate::config::{Config, MmdsVersion, NetMode, NetworkInterface, USER_MTU};

/// The host's side of a network interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// A tap interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The host's kernel in place of bulle.
    #[error("network interface '{id}'")]
    Vhost {
        /// The interface.
        id: String,
        /// Why.
        #[source]
        source: VhostError,
    },
    /// The same for what is no tap.
    #[error(
        "network interface '{id}': file descriptor {fd} is a socket, for which there is no vhost=on: \
         leave it out"
    )]
    VhostSocket {
        /// The interface.
        id: String,
        /// As given.
        fd: u32,
    },
    /// User-mode networking.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// A file descriptor that was not given to bulle.
    #[error(
        "file descriptor {fd} of network interface '{id}' is not open, is used twice or is not \
         inherited: have bulle's parent open it, 3 or above, without close-on-exec"
    )]
    Descriptor {
        /// The interface.
        id: String,
        /// As given.
        fd: u32,
    },
    /// The host failed.
    #[error("cannot {what} for network interface '{id}'")]
    Host {
        /// The operation.
        what: &'static str,
        /// The interface.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The metadata service on `interface`, if it is to have it.
pub(super) fn metadata(
    config: &Config,
    interface: &NetworkInterface,
    mmds: &Arc<Mmds>,
) -> Option<Box<dyn Detour>> {
    let service = config.mmds_config.as_ref()?;
    if !service.network_interfaces.contains(&interface.iface_id) {
        return None;
    }
    mmds.serve(Service {
        sessions: service.version == MmdsVersion::V2,
        imds_compat: service.imds_compat,
    });
    Some(Box::new(Stack::new(mmds.clone(), service.ipv4_address)))
}

/// Opens the host's side of `interface`, which is number `index`.
pub(super) fn plan(
    interface: &NetworkInterface,
    index: u8,
    limiters: &Limiters,
    detour: Option<Box<dyn Detour>>,
) -> Result<Plan, NetError> {
    let id = interface.iface_id.clone();
    let host = |what| {
        let id = id.clone();
        move |source| NetError::Host { what, id, source }
    };
    let mut mtu = interface.mtu;
    let mut keeper = None;
    let (backend, mac) = match (interface.user_network(index), interface.mode) {
        (Some(network), _) => {
            let mtu = *mtu.get_or_insert(USER_MTU);
            let mac = network.mac;
            let recipe = Recipe {
                id: id.clone(),
                network,
                mtu,
                publish: interface.publish.clone(),
            };
            let passt = recipe.start()?;
            let backend = NetBackend::stream_with_complaints(passt.socket, passt.complaints);
            keeper = Some(Box::new(PasstKeeper::new(recipe, passt.child)) as Box<dyn Keeper>);
            (backend.map_err(host("use a socket"))?, Some(mac))
        }
        (None, NetMode::Fd) => {
            let fd = interface.fd.unwrap_or_default();
            let taken = inherited(fd);
            let taken = taken.ok_or_else(|| NetError::Descriptor { id: id.clone(), fd })?;
            let backend = match is_socket(&taken) {
                true if interface.vhost => return Err(NetError::VhostSocket { id, fd }),
                true => NetBackend::stream(taken).map_err(host("use a socket"))?,
                false => NetBackend::Tap(Tap::from_fd(taken)?),
            };
            (backend, interface.mac())
        }
        (None, _) => {
            let name = interface.host_dev_name.as_deref().unwrap_or_default();
            let tap = Tap::open(name, interface.queues.unwrap_or(1))?;
            (NetBackend::Tap(tap), interface.mac())
        }
    };
    let vhost = interface.vhost.then(Vhost::new).transpose();
    let vhost = vhost.map_err(|source| NetError::Vhost {
        id: id.clone(),
        source,
    })?;
    Ok(Plan {
        id,
        config: DeviceConfig::Net(NetOptions {
            backend,
            mac,
            mtu,
            rx_limiter: limiters.get(interface.rx_rate_limiter.as_ref()),
            tx_limiter: limiters.get(interface.tx_rate_limiter.as_ref()),
            detour,
            vhost,
            keeper,
        }),
    })
}

/// Takes a file descriptor that bulle was started with. bulle's own close on exec, and so does this
/// one from here on; all but the events of event-manager's loops, which have no file type.
fn inherited(fd: u32) -> Option<OwnedFd> {
    let fd = i32::try_from(fd).ok().filter(|fd| *fd > 2)?;
    // SAFETY: the call takes a number and writes to the structure.
    let mode = unsafe {
        let mut stat = std::mem::zeroed();
        (libc::fstat(fd, &raw mut stat) == 0).then_some(stat.st_mode)
    };
    mode.filter(|mode| mode & libc::S_IFMT != 0)?;
    // SAFETY: these commands take a number and touch no memory.
    let inherited = unsafe {
        libc::fcntl(fd, libc::F_GETFD) == 0 && libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) == 0
    };
    // SAFETY: it is open, and nothing in bulle owns it: of what has a file type, all that bulle opens
    // closes on exec.
    inherited.then(|| unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether it is a stream socket.
fn is_socket(fd: &impl AsFd) -> bool {
    use nix::sys::socket::{SockType, getsockopt, sockopt};
    getsockopt(&fd.as_fd(), sockopt::SockType).is_ok_and(|kind| kind == SockType::Stream)
}
