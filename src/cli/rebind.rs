//! What a microVM has otherwise than the one that it is made of: resources of the host, and addresses.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use devices::virtio::net::random_mac;

use crate::config::parse_mac;
use crate::control::{
    DriveOverride, NetworkOverride, PmemOverride, ShareOverride, SnapshotLoad, VsockOverride,
};

/// Stands for the number of a clone, from 1 on.
const NUMBER: &str = "%n";

/// Resources of the host in place of those there were, by the ids of devices.
#[derive(Clone, Debug, Args)]
pub struct RebindArgs {
    /// Leave it paused
    #[arg(long)]
    paused: bool,
    /// The guest's clocks go on where they stopped, instead of jumping to now
    #[arg(long)]
    frozen_clock: bool,
    /// Another image for a drive
    #[arg(long, value_name = "ID=FILE", value_parser = pair)]
    drive: Vec<(String, PathBuf)>,
    /// Another file for persistent memory
    #[arg(long, value_name = "ID=FILE", value_parser = pair)]
    pmem: Vec<(String, PathBuf)>,
    /// Another directory for a share
    #[arg(long, value_name = "TAG=DIR", value_parser = pair)]
    share: Vec<(String, PathBuf)>,
    /// Another tap interface for a network interface
    #[arg(long, value_name = "ID=TAP", value_parser = pair)]
    tap: Vec<(String, PathBuf)>,
    /// Another Ethernet address for a network interface, or 'random' for one that nobody has; a
    /// guest without bulle's agent is to take it itself
    #[arg(long, value_name = "ID=ADDRESS", value_parser = mac)]
    mac: Vec<(String, Address)>,
    /// Another path for the sockets of the vsock device
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
}

impl RebindArgs {
    /// Adds them to `load`.
    pub fn apply(&self, load: &mut SnapshotLoad) -> Result<()> {
        load.resume_vm = !self.paused;
        load.clock_realtime = !self.frozen_clock;
        let drives = self.drive.iter().cloned();
        load.drive_overrides = drives
            .map(|(drive_id, path_on_host)| DriveOverride {
                drive_id,
                path_on_host,
            })
            .collect();
        let pmem = self.pmem.iter().cloned();
        load.pmem_overrides = pmem
            .map(|(id, path_on_host)| PmemOverride { id, path_on_host })
            .collect();
        let shares = self.share.iter().cloned();
        load.share_overrides = shares
            .map(|(tag, path_on_host)| ShareOverride { tag, path_on_host })
            .collect();
        for (iface_id, tap) in self.tap.iter().cloned() {
            let Some(tap) = tap.to_str() else {
                bail!("the tap interface's name {} is no text", tap.display());
            };
            load.network_overrides.push(NetworkOverride {
                iface_id,
                host_dev_name: Some(tap.to_owned()),
                ..NetworkOverride::default()
            });
        }
        for (iface_id, address) in self.mac.iter().cloned() {
            load.network_overrides.push(NetworkOverride {
                iface_id,
                guest_mac: Some(address.text()?),
                ..NetworkOverride::default()
            });
        }
        let vsock = self.vsock.clone();
        load.vsock_override = vsock.map(|uds_path| VsockOverride { uds_path });
        Ok(())
    }

    /// Those of clone `number`: what has `%n` in it has the number there.
    pub fn of_clone(&self, number: usize) -> Self {
        let path = |path: &PathBuf| match path.to_str() {
            Some(text) => PathBuf::from(text.replace(NUMBER, &number.to_string())),
            None => path.clone(),
        };
        let pairs = |pairs: &[(String, PathBuf)]| {
            let pairs = pairs.iter();
            pairs.map(|(id, to)| (id.clone(), path(to))).collect()
        };
        Self {
            drive: pairs(&self.drive),
            pmem: pairs(&self.pmem),
            share: pairs(&self.share),
            tap: pairs(&self.tap),
            mac: self.mac.clone(),
            vsock: self.vsock.as_ref().map(path),
            ..*self
        }
    }
}

/// An Ethernet address.
#[derive(Clone, Debug)]
enum Address {
    This(String),
    Random,
}

impl Address {
    fn text(self) -> Result<String> {
        match self {
            Self::This(text) => Ok(text),
            Self::Random => {
                let mac = random_mac().context("Cannot get random numbers for an address")?;
                Ok(mac.map(|byte| format!("{byte:02x}")).join(":"))
            }
        }
    }
}

fn mac(text: &str) -> Result<(String, Address), String> {
    let (id, address) = text.split_once('=').unwrap_or_default();
    let address = match address {
        "random" => Some(Address::Random),
        text => parse_mac(text).map(|_| Address::This(text.to_owned())),
    };
    match address {
        Some(address) if !id.is_empty() => Ok((id.to_owned(), address)),
        _ => Err(format!(
            "'{text}' is not of the form ID=ADDRESS: such as net0=02:00:00:00:00:01, or net0=random"
        )),
    }
}

fn pair(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((id, path)) if !id.is_empty() && !path.is_empty() => Ok((id.to_owned(), path.into())),
        _ => Err(format!("'{text}' is not of the form ID=PATH")),
    }
}
