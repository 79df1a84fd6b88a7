//! The options of `bulle run` that add virtio devices.

use clap::Args;

use crate::config::{Config, Drive, Entropy, Transport, Vsock, parse_list};

/// Arguments that add devices to a machine.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Disk (repeatable): path=FILE[,ro][,id=NAME][,cache=writeback|unsafe|none]
    /// [,engine=io_uring|sync][,queues=N][,rate.bandwidth.size=BYTES][,rate.ops.size=N]
    /// [,rate.group=NAME: limits shared by all devices that name it]
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Drive>)]
    disk: Vec<Drive>,
    /// Add a virtio entropy device
    #[arg(long)]
    entropy: bool,
    /// Sockets between guest and host: path=SOCKET[,cid=N]. Host programs connect to SOCKET and
    /// say CONNECT PORT; the guest's connections to port P of the host go to SOCKET_P
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Vsock>)]
    vsock: Option<Vsock>,
    /// Virtio devices on a PCI bus with MSI-X instead of MMIO windows
    #[arg(long)]
    pci: bool,
}

impl DeviceArgs {
    /// Adds the devices to `config`, behind those that it has.
    pub fn apply(&self, config: &mut Config) {
        for drive in &self.disk {
            let mut drive = drive.clone();
            if drive.drive_id.is_empty() {
                drive.drive_id = format!("disk{}", config.drives.len());
            }
            config.drives.push(drive);
        }
        if self.entropy {
            config.entropy = Some(Entropy {});
        }
        if self.vsock.is_some() {
            config.vsock.clone_from(&self.vsock);
        }
        if self.pci {
            config.machine_config.virtio_transport = Transport::Pci;
        }
    }
}
