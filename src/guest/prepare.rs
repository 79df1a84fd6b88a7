//! What a guest needs beside its kernel, decided from the configuration and packed.

use std::io;
use std::path::{Path, PathBuf};

use arch::kernel::KernelImage;

use super::busybox::{self, BusyboxError};
use super::filesystem::{companions, module_for};
use super::initramfs::{Initramfs, InitramfsError, Progress};
use super::modules::{self, ModulesError, Resolved, Wanted};
use crate::config::{Config, Guest, Root, Share, Spec, Transport};
use crate::vm::BuildError;
use crate::vm::build::Initrd;

/// Modules for what every board has: panics are reported at once; the power button, and how the
/// agent reads it. None is required: a guest runs its command without them.
const COMFORT: [&str; 3] = ["pvpanic-mmio", "button", "evdev"];

/// What goes into a guest cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// No busybox for the default root.
    #[error(transparent)]
    Busybox(#[from] BusyboxError),
    /// A kernel module.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// A kernel module without which a shared directory cannot be the root.
    #[error(
        "this kernel cannot have a directory of the host as its root: copy that into guest memory \
         (--root-copy), or use another kernel"
    )]
    SharedRoot(#[source] ModulesError),
    /// Packing.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The image with the root.
    #[error("Cannot read the root image {}", path.display())]
    Root {
        /// As given.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// The user's initrd.
    #[error(transparent)]
    Initrd(#[from] BuildError),
}

/// Packs the initial RAM disk of `spec`; `step` is told of long steps.
pub fn prepare(
    spec: &Spec,
    kernel: &KernelImage,
    step: impl Fn(String),
) -> Result<Initrd, PrepareError> {
    let mut initrd = match spec.initrd() {
        Some(path) => Initrd::open(path)?,
        None => Initrd::default(),
    };
    if let Some(guest) = spec.guest() {
        // What the unpacked tree and the archive both take has to fit beside the kernel.
        initrd.archive = archive(spec.config(), guest, kernel, spec.ram_size() / 2, step)?;
    }
    Ok(initrd)
}

fn archive(
    config: &Config,
    guest: &Guest,
    kernel: &KernelImage,
    limit: u64,
    step: impl Fn(String),
) -> Result<Vec<u8>, PrepareError> {
    let modules = resolve(guest, kernel, &wanted(config)?);
    let modules = modules.map_err(|error| match error {
        ModulesError::Missing { .. } | ModulesError::NoDirectory { .. }
            if config.root_share().is_some() =>
        {
            PrepareError::SharedRoot(error)
        }
        error => error.into(),
    })?;
    let shares = share_list(&config.shares);
    let packing = |progress: Progress| {
        if progress.entries.is_multiple_of(256) {
            step(format!("packing the root: {} files", progress.entries));
        }
    };
    let builder = Initramfs::builder()
        .agent()
        .modules(&modules.modules)
        .shares(&shares)
        .progress(&packing);
    let archive = match &guest.root {
        Root::Initrd | Root::Drive | Root::Share => builder.build(limit),
        Root::Directory(directory) => builder.directory(directory).build(limit),
        Root::Busybox => {
            let nodes = busybox::root(&busybox::find()?)?;
            builder.nodes(&nodes).build(limit)
        }
    };
    Ok(archive?)
}

/// The modules for the devices of `config`, and for a root on one of them.
fn wanted(config: &Config) -> Result<Vec<Wanted<'static>>, PrepareError> {
    let transport = match config.machine_config.virtio_transport {
        Transport::Mmio => "virtio_mmio",
        Transport::Pci => "virtio_pci",
    };
    let console = !config.ports.is_empty() || config.console().is_hvc0();
    // The drivers of devices; nd_pmem makes a block device of what virtio_pmem finds.
    let drivers: [(bool, &[&str]); 9] = [
        (!config.drives.is_empty(), &["virtio_blk"]),
        (!config.network_interfaces.is_empty(), &["virtio_net"]),
        (config.entropy.is_some(), &["virtio-rng"]),
        (config.vsock.is_some(), &["vmw_vsock_virtio_transport"]),
        (config.memory_hotplug.is_some(), &["virtio_mem"]),
        (!config.pmem.is_empty(), &["virtio_pmem", "nd_pmem"]),
        (config.balloon.is_some(), &["virtio_balloon"]),
        (!config.shares.is_empty(), &["virtiofs"]),
        (console, &["virtio_console"]),
    ];
    let drivers = drivers.into_iter().filter(|(there, _)| *there);
    let mut required: Vec<&str> = drivers.flat_map(|(_, names)| names).copied().collect();
    if !required.is_empty() || config.rtc.is_some() {
        required.insert(0, transport);
    }
    if config.watchdog.is_some() {
        required.push("wdat_wdt");
    }
    if config.root_share().is_some_and(|share| share.is_read_only) {
        required.push("overlay");
    }
    if let Some(drive) = config.root_drive() {
        let path = &drive.path_on_host;
        let module = module_for(path).map_err(|source| PrepareError::Root {
            path: path.clone(),
            source,
        })?;
        required.extend(module);
        if drive.is_read_only {
            required.push("overlay");
        }
    }
    let wanted = |required| move |name| Wanted { name, required };
    // Stock kernels have a driver for clock devices from Linux 6.16 on.
    let clock = config.rtc.map(|_| "virtio_rtc");
    // So that a file system in persistent memory can be mounted.
    let files = config.pmem.iter();
    let pmem = files.filter_map(|pmem| module_for(&pmem.path_on_host).ok().flatten());
    // Without these two the agent's channel is a UART.
    let channel = [transport, "virtio_console"];
    let pmem: Vec<_> = pmem.collect();
    let systems = pmem.iter().chain(&required);
    let companions: Vec<_> = systems.flat_map(|name| companions(name)).copied().collect();
    // On a PCI bus disks and interfaces may come later.
    let later = match config.machine_config.virtio_transport {
        Transport::Mmio => [].iter(),
        Transport::Pci => ["virtio_blk", "virtio_net"].iter(),
    };
    let comfort = COMFORT.into_iter().chain(clock).chain(companions);
    let comfort = comfort.chain(pmem).chain(channel).chain(later.copied());
    let comfort = comfort.map(wanted(false));
    Ok(comfort
        .chain(required.into_iter().map(wanted(true)))
        .collect())
}

/// What the agent is told of `shares`: a line for each that it mounts, parents first.
fn share_list(shares: &[Share]) -> String {
    let place = |share: &Share| {
        share
            .mount_point
            .clone()
            .map(|place| (place, share.clone()))
    };
    let mut mounted: Vec<_> = shares.iter().filter_map(place).collect();
    mounted.sort_by(|(a, _), (b, _)| Path::new(a).cmp(Path::new(b)));
    let line = |(place, share): (String, Share)| {
        let mode = if share.is_read_only { "ro" } else { "rw" };
        format!("{} {mode} {place}\n", share.tag)
    };
    mounted.into_iter().map(line).collect()
}

fn resolve(
    guest: &Guest,
    kernel: &KernelImage,
    wanted: &[Wanted<'_>],
) -> Result<Resolved, ModulesError> {
    let release = kernel.version().unwrap_or_default();
    let directory = match &guest.modules_dir {
        Some(directory) if !directory.join("modules.dep").is_file() => {
            let directory = directory.clone();
            return Err(ModulesError::NoIndex { directory });
        }
        Some(directory) => directory.clone(),
        None => modules::default_directory(&release),
    };
    if guest.modules_dir.is_none() && !directory.join("modules.dep").is_file() {
        log::info!(
            "no modules in {}: the guest goes without",
            directory.display()
        );
        return Ok(Resolved::default());
    }
    let resolved = modules::resolve(&directory, &release, wanted)?;
    for name in &resolved.missing {
        log::info!("kernel {release} has no module {name}: the guest goes without");
    }
    Ok(resolved)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_are_mounted_before_what_is_below_them() {
        let share = |tag: &str, place: Option<&str>, is_read_only| Share {
            tag: tag.to_owned(),
            mount_point: place.map(str::to_owned),
            is_read_only,
            ..Share::default()
        };
        let shares = [
            share("c", Some("/a/b"), false),
            share("d", Some("/a-b"), true),
            share("b", Some("/a"), true),
            share("e", None, false),
            share("a", Some("/"), true),
        ];
        let list = "a ro /\nb ro /a\nc rw /a/b\nd ro /a-b\n";
        assert_eq!(share_list(&shares), list);
    }

    #[test]
    fn a_fat_disk_brings_its_character_sets() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let mut fat = vec![0; 0x36];
        fat.extend_from_slice(b"FAT16   ");
        std::fs::write(image.path(), fat).unwrap();
        let path = image.path().display();
        let pmem = format!(r#""pmem":[{{"id":"p","path_on_host":"{path}"}}]"#);
        let root = format!(
            r#""drives":[{{"drive_id":"r","path_on_host":"{path}","is_root_device":true}}]"#
        );
        for (device, required) in [(pmem, false), (root, true)] {
            let config = format!(r#"{{"boot-source":{{"kernel_image_path":"k"}},{device}}}"#);
            let config: Config = serde_json::from_str(&config).unwrap();
            let wanted = wanted(&config).unwrap();
            let is = |name: &str| wanted.iter().find(|wanted| wanted.name == name);
            assert_eq!(is("vfat").unwrap().required, required);
            assert!(!is("nls_ascii").unwrap().required && is("nls_cp437").is_some());
        }
    }
}
