//! What a guest needs beside its kernel, decided from the configuration and packed.

use arch::kernel::KernelImage;

use super::busybox::{self, BusyboxError};
use super::initramfs::{Initramfs, InitramfsError, Progress};
use super::modules::{self, ModulesError, Resolved, Wanted};
use crate::config::{Guest, Root, Spec};
use crate::vm::BuildError;
use crate::vm::build::Initrd;

/// Modules for what the board has. None is required: a guest runs its command without them.
const MODULES: [Wanted<'static>; 3] = [
    // Panics are reported at once.
    Wanted {
        name: "pvpanic-mmio",
        required: false,
    },
    // The power button, and how the agent reads it.
    Wanted {
        name: "button",
        required: false,
    },
    Wanted {
        name: "evdev",
        required: false,
    },
];

/// What goes into a guest cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    /// No busybox for the default root.
    #[error(transparent)]
    Busybox(#[from] BusyboxError),
    /// A kernel module.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// Packing.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
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
        initrd.archive = archive(guest, kernel, spec.ram_size() / 2, step)?;
    }
    Ok(initrd)
}

fn archive(
    guest: &Guest,
    kernel: &KernelImage,
    limit: u64,
    step: impl Fn(String),
) -> Result<Vec<u8>, PrepareError> {
    let modules = resolve(guest, kernel)?.modules;
    let packing = |progress: Progress| {
        if progress.entries.is_multiple_of(256) {
            step(format!("packing the root: {} files", progress.entries));
        }
    };
    let builder = Initramfs::builder()
        .agent()
        .modules(&modules)
        .progress(&packing);
    let archive = match &guest.root {
        Root::Initrd => builder.build(limit),
        Root::Directory(directory) => builder.directory(directory).build(limit),
        Root::Busybox => {
            let nodes = busybox::root(&busybox::find()?)?;
            builder.nodes(&nodes).build(limit)
        }
    };
    Ok(archive?)
}

fn resolve(guest: &Guest, kernel: &KernelImage) -> Result<Resolved, PrepareError> {
    let release = kernel.version().unwrap_or_default();
    let directory = match &guest.modules_dir {
        Some(directory) if !directory.join("modules.dep").is_file() => {
            let directory = directory.clone();
            return Err(ModulesError::NoIndex { directory }.into());
        }
        Some(directory) => directory.clone(),
        None => modules::default_directory(&release),
    };
    if guest.modules_dir.is_none() && !directory.is_dir() {
        log::info!(
            "no modules in {}: the guest goes without",
            directory.display()
        );
        return Ok(Resolved::default());
    }
    let resolved = modules::resolve(&directory, &release, &MODULES)?;
    for name in &resolved.missing {
        log::info!("kernel {release} has no module {name}: the guest goes without");
    }
    Ok(resolved)
}
