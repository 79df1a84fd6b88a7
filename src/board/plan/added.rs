//! What is added to a machine that runs, one device at a time.

use super::addresses::Addresses;
use super::limits::Limiters;
use super::{Plan, PlanError, disk, net, pmem};
use crate::config::{Drive, NetworkInterface, Pmem, Spec};

/// A device that comes later.
#[derive(Clone, Copy, Debug)]
pub enum Added<'a> {
    /// A disk.
    Drive(&'a Drive),
    /// A network interface.
    Net(&'a NetworkInterface),
    /// Persistent memory.
    Pmem(&'a Pmem),
}

/// Opens what `added`, the last of its kind in `spec`, needs. Its memory is beside those ranges of
/// address and bytes that are `taken`.
///
/// # Errors
/// What cannot be opened, or has no room.
pub fn plan(
    spec: &Spec,
    added: Added<'_>,
    taken: impl Iterator<Item = (u64, u64)>,
) -> Result<Plan, PlanError> {
    let config = spec.config();
    let limiters = Limiters::new(config);
    match added {
        Added::Drive(drive) => {
            disk::tell_apart(&config.drives.iter().collect::<Vec<_>>())?;
            let limiter = limiters.get(drive.rate_limiter.as_ref());
            disk::plan(drive, spec.machine().vcpu_count, limiter)
        }
        Added::Net(interface) => {
            let index = config.network_interfaces.len().saturating_sub(1);
            let index = u8::try_from(index).unwrap_or(u8::MAX);
            Ok(net::plan(interface, index, &limiters, None)?)
        }
        Added::Pmem(added) => {
            let options = pmem::open(added)?;
            let mut addresses = Addresses::behind(spec.ram_size());
            for (address, size) in taken {
                addresses.reserve("", address, size)?;
            }
            let len = options.mapping.len();
            let address = match added.address {
                Some(address) => addresses.reserve(&added.id, address, len).map(|()| address),
                None => addresses.take(&added.id, len),
            }?;
            Ok(pmem::plan(added, options, address, &limiters))
        }
    }
}
