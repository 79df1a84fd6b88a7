//! What of the host a loaded machine has otherwise than the saved one: devices are named by their
//! ids, never by what they had.

use std::path::PathBuf;

use crate::config::{Config, NetMode, Publish};

/// Resources of the host that take the place of saved ones.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Drives, by `drive_id`: their images.
    pub drives: Vec<(String, PathBuf)>,
    /// Persistent memory, by `id`: its files.
    pub pmem: Vec<(String, PathBuf)>,
    /// Shared directories, by `tag`.
    pub shares: Vec<(String, PathBuf)>,
    /// Network interfaces, by `iface_id`.
    pub networks: Vec<NetworkRebind>,
    /// The path of the socket device.
    pub vsock: Option<PathBuf>,
}

/// Another host's side of a network interface, or another address; what is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NetworkRebind {
    /// The interface.
    pub iface_id: String,
    /// A tap interface of the host.
    pub host_dev_name: Option<String>,
    /// An inherited file descriptor.
    pub fd: Option<u32>,
    /// The guest's Ethernet address, which its driver has only once it looks.
    pub guest_mac: Option<String>,
    /// Ports of the host, in mode `user`.
    pub publish: Option<Vec<Publish>>,
}

/// A device that the snapshot does not have.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RebindError {
    /// No such device.
    #[error("the snapshot has no {kind} '{id}': it has {}", list(present))]
    NoDevice {
        /// Which kind.
        kind: &'static str,
        /// As asked for.
        id: String,
        /// Those there are.
        present: Vec<String>,
    },
    /// No socket device.
    #[error("the snapshot has no vsock device: leave the path out")]
    NoVsock,
    /// Two host's sides for one interface.
    #[error("network interface '{id}' is given both host_dev_name and fd: give one of them")]
    TwoSides {
        /// The interface.
        id: String,
    },
}

fn list(names: &[String]) -> String {
    match names {
        [] => "none".to_owned(),
        names => names.join(", "),
    }
}

impl Overrides {
    /// Puts them into `config`; nothing is changed where one of them fits nothing.
    ///
    /// # Errors
    /// [`RebindError`] names the device.
    pub fn apply(&self, config: &mut Config) -> Result<(), RebindError> {
        let mut changed = config.clone();
        for (id, path) in &self.drives {
            let drives = changed.drives.iter_mut();
            let slots = drives.map(|d| (&d.drive_id, &mut d.path_on_host));
            *find("drive", id, slots)? = path.clone();
        }
        for (id, path) in &self.pmem {
            let slots = changed
                .pmem
                .iter_mut()
                .map(|p| (&p.id, &mut p.path_on_host));
            *find("pmem device", id, slots)? = path.clone();
        }
        for (id, path) in &self.shares {
            let slots = changed
                .shares
                .iter_mut()
                .map(|s| (&s.tag, &mut s.path_on_host));
            *find("share", id, slots)? = path.clone();
        }
        for rebind in &self.networks {
            rebind.apply(&mut changed)?;
        }
        if let Some(path) = &self.vsock {
            let vsock = changed.vsock.as_mut().ok_or(RebindError::NoVsock)?;
            vsock.uds_path = path.clone();
        }
        *config = changed;
        Ok(())
    }
}

impl NetworkRebind {
    fn apply(&self, config: &mut Config) -> Result<(), RebindError> {
        let interfaces = config.network_interfaces.iter_mut();
        let present: Vec<_> = interfaces
            .as_slice()
            .iter()
            .map(|i| i.iface_id.clone())
            .collect();
        let id = &self.iface_id;
        let mut interfaces = interfaces;
        let interface = interfaces.find(|interface| interface.iface_id == *id);
        let interface = interface.ok_or_else(|| RebindError::NoDevice {
            kind: "network interface",
            id: id.clone(),
            present,
        })?;
        match (&self.host_dev_name, self.fd) {
            (Some(_), Some(_)) => return Err(RebindError::TwoSides { id: id.clone() }),
            (Some(name), None) => {
                interface.mode = NetMode::Tap;
                (interface.host_dev_name, interface.fd) = (Some(name.clone()), None);
                interface.publish.clear();
            }
            (None, Some(fd)) => {
                interface.mode = NetMode::Fd;
                (interface.host_dev_name, interface.fd) = (None, Some(fd));
                interface.publish.clear();
            }
            (None, None) => {}
        }
        if self.guest_mac.is_some() {
            interface.guest_mac.clone_from(&self.guest_mac);
        }
        if let Some(publish) = &self.publish {
            interface.publish.clone_from(publish);
        }
        Ok(())
    }
}

fn find<'a, T>(
    kind: &'static str,
    id: &str,
    slots: impl Iterator<Item = (&'a String, &'a mut T)>,
) -> Result<&'a mut T, RebindError> {
    let mut present = Vec::new();
    for (name, slot) in slots {
        if name == id {
            return Ok(slot);
        }
        present.push(name.clone());
    }
    let id = id.to_owned();
    Err(RebindError::NoDevice { kind, id, present })
}
