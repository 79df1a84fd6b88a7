//! The options of `bulle run` that add virtio devices.

use std::path::{Path, PathBuf};

use clap::Args;
use serde::de::DeserializeOwned;

use super::share::parse_share;
use crate::config::{
    Balloon, Config, Drive, ListError, MemoryHotplug, MmdsConfig, NetMode, NetworkInterface, Pmem,
    Port, Publish, Rtc, Share, Transport, Vsock, Watchdog, parse_list, parse_net,
};

/// Arguments that add devices to a machine.
#[derive(Debug, Args)]
pub struct DeviceArgs {
    /// Disk (repeatable): path=FILE[,ro][,id=NAME][,cache=writeback|unsafe|none]
    /// [,engine=io_uring|sync][,queues=N][,rate.bandwidth.size=BYTES][,rate.ops.size=N]
    /// [,rate.group=NAME: limits shared by all devices that name it]; or
    /// socket=PATH[,id=NAME][,queues=N][,cache=unsafe], of a vhost-user backend that has the disk
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Drive>)]
    disk: Vec<Drive>,
    /// Directory of the host in the guest (repeatable): HOST:GUEST[:ro][,cache=none|auto|always]
    /// [,writeback][,ownership=guest|squash|host][,tag=NAME], the first option behind a colon;
    /// path=DIR,tag=NAME leaves the mounting to the guest
    #[arg(long, value_name = "HOST:GUEST[:ro]", value_parser = parse_share)]
    share: Vec<Share>,
    /// Network interface (repeatable): user (through passt, without privileges), tap=NAME (an
    /// interface of the host, or a pattern as bulle%d for a new one) or fd=N (inherited); then
    /// [,mac=ADDRESS][,mtu=BYTES][,queues=N: tap][,vhost=on: the host's kernel moves a tap's frames]
    /// [,id=NAME][,rx_rate.bandwidth.size=BYTES][,tx_rate.ops.size=N]. none: no interface, nor those of --config [default: none]
    #[arg(long, value_name = "NETWORK", value_parser = parse_net)]
    net: Vec<MaybeNetwork>,
    /// Lead a port of the host into the guest (repeatable; implies --net user):
    /// [ADDRESS:]HOST-PORT:GUEST-PORT[/udp], IPv6 as [::1]:8080:80 [default address: 127.0.0.1, not
    /// seen by other machines]
    #[arg(long, value_name = "PORTS")]
    publish: Vec<Publish>,
    /// Let the guest find what this JSON file says at http://169.254.169.254/, on each interface
    #[arg(long, value_name = "FILE")]
    metadata: Option<PathBuf>,
    /// Add a virtio entropy device
    #[arg(long)]
    entropy: bool,
    /// Sockets between guest and host: path=SOCKET[,cid=N]. Host programs connect to SOCKET and
    /// say CONNECT PORT; the guest's connections to port P of the host go to SOCKET_P
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Vsock>)]
    vsock: Option<Vsock>,
    /// Add a virtio clock device: [leap=unknown|step|smeared|noon-linear|utc-sls: what the host's
    /// clock does around leap seconds]
    #[arg(long, value_name = "LIST", num_args = 0..=1, require_equals = true,
        default_missing_value = "", value_parser = parse_maybe_empty::<Rtc>)]
    rtc: Option<Rtc>,
    /// Add a watchdog timer: [timeout=TIME: longest between two feedings, 10m][,min=TIME: shortest]
    /// [,action=exit|reset|poweroff|nmi|log when it is not fed]
    #[arg(long, value_name = "LIST", num_args = 0..=1, require_equals = true,
        default_missing_value = "", value_parser = parse_maybe_empty::<Watchdog>)]
    watchdog: Option<Watchdog>,
    /// Persistent memory, a file mapped into the guest (repeatable): path=FILE[,ro][,id=NAME]
    #[arg(long, value_name = "LIST", value_parser = parse_list::<Pmem>)]
    pmem: Vec<Pmem>,
    /// Memory that can be plugged at run time: total=SIZE[,requested=SIZE][,block=SIZE][,slot=SIZE];
    /// the guest plugs what is requested
    #[arg(long, value_name = "LIST", value_parser = parse_list::<MemoryHotplug>)]
    hotplug_memory: Option<MemoryHotplug>,
    /// Memory balloon: [size=SIZE][,deflate_on_oom][,reporting][,hinting][,stats=SECONDS]
    /// [default, if given alone: reporting,deflate_on_oom]
    #[arg(
        long,
        value_name = "LIST",
        num_args = 0..=1,
        default_missing_value = "reporting,deflate_on_oom",
        value_parser = parse_list::<Balloon>
    )]
    balloon: Option<Balloon>,
    /// Named port of the virtio console, /dev/virtio-ports/NAME in the guest (repeatable):
    /// NAME=socket:PATH for the clients of a Unix socket, NAME=file:PATH to append to a file
    #[arg(long, value_name = "NAME=TO", value_parser = Port::parse)]
    port: Vec<Port>,
    /// Virtio devices on a PCI bus with MSI-X instead of MMIO windows
    #[arg(long)]
    pci: bool,
}

/// What `--net` gives; `None` is no network. clap would take an `Option` for an optional argument.
pub type MaybeNetwork = Option<NetworkInterface>;

/// Reads a list of an option that needs none.
fn parse_maybe_empty<T: DeserializeOwned + Default>(text: &str) -> Result<T, ListError> {
    match text {
        "" => Ok(T::default()),
        text => parse_list(text),
    }
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
        for share in &self.share {
            let mut share = share.clone();
            if share.tag.is_empty() {
                share.tag = format!("share{}", config.shares.len());
            }
            config.shares.push(share);
        }
        self.networks(config);
        if self.entropy {
            config.entropy.get_or_insert_default();
        }
        config.ports.extend(self.port.iter().cloned());
        if self.vsock.is_some() {
            config.vsock.clone_from(&self.vsock);
        }
        if self.rtc.is_some() {
            config.rtc = self.rtc;
        }
        if self.watchdog.is_some() {
            config.watchdog = self.watchdog;
        }
        for pmem in &self.pmem {
            let mut pmem = pmem.clone();
            if pmem.id.is_empty() {
                pmem.id = format!("pmem{}", config.pmem.len());
            }
            config.pmem.push(pmem);
        }
        config.memory_hotplug = self.hotplug_memory.or(config.memory_hotplug);
        config.balloon = self.balloon.or(config.balloon);
        if self.pci {
            config.machine_config.virtio_transport = Transport::Pci;
        }
    }

    /// Whether `--net none` comes with what asks for a network.
    pub fn contradicts_itself(&self) -> bool {
        let none = self.net.iter().any(Option::is_none);
        none && (self.net.iter().any(Option::is_some) || !self.publish.is_empty())
    }

    /// The file with the guest's metadata.
    pub fn metadata(&self) -> Option<&Path> {
        self.metadata.as_deref()
    }

    fn networks(&self, config: &mut Config) {
        let interfaces = &mut config.network_interfaces;
        if self.net.iter().any(Option::is_none) {
            interfaces.clear();
        }
        interfaces.extend(self.net.iter().flatten().cloned());
        if !self.publish.is_empty() {
            let user = interfaces.iter().position(|i| i.mode == NetMode::User);
            let user = user.unwrap_or_else(|| {
                interfaces.push(NetworkInterface {
                    mode: NetMode::User,
                    ..NetworkInterface::default()
                });
                interfaces.len() - 1
            });
            if let Some(interface) = interfaces.get_mut(user) {
                interface.publish.extend(self.publish.iter().copied());
            }
        }
        for (index, interface) in interfaces.iter_mut().enumerate() {
            if interface.iface_id.is_empty() {
                interface.iface_id = format!("net{index}");
            }
        }
        if self.metadata.is_some() && config.mmds_config.is_none() {
            let all = interfaces.iter().map(|one| one.iface_id.clone());
            config.mmds_config = Some(MmdsConfig::on(all.collect()));
        }
    }
}
