//! Paths of the host in a configuration that somebody in another directory uses.

use std::io;
use std::path::{PathBuf, absolute};

use super::{Config, Console, PortTo};

impl Config {
    /// Has every file, directory and socket of a device named from the root on, as seen from the current
    /// directory: they are the same then wherever the machine is made again.
    ///
    /// # Errors
    /// Of the host, without a current directory.
    pub fn make_paths_absolute(&mut self) -> io::Result<()> {
        let drives = self.drives.iter_mut();
        let drives = drives.map(|drive| drive.socket.as_mut().unwrap_or(&mut drive.path_on_host));
        let pmem = self.pmem.iter_mut().map(|pmem| &mut pmem.path_on_host);
        let shares = self.shares.iter_mut().map(|share| &mut share.path_on_host);
        let vsock = self.vsock.iter_mut().map(|vsock| &mut vsock.uds_path);
        let ports = self.ports.iter_mut().map(|port| match &mut port.to {
            PortTo::Socket(path) | PortTo::File(path) => path,
        });
        let console = self.console.iter_mut().filter_map(|console| match console {
            Console::File(path) | Console::Hvc0File(path) => Some(path),
            Console::Tty | Console::Off | Console::Hvc0 => None,
        });
        let devices = drives.chain(pmem).chain(shares).chain(vsock);
        devices.chain(ports).chain(console).try_for_each(whole)
    }
}

fn whole(path: &mut PathBuf) -> io::Result<()> {
    // One that is missing is refused elsewhere, by name.
    if !path.as_os_str().is_empty() {
        *path = absolute(&path)?;
    }
    Ok(())
}
