//! Opening /dev/kvm, with a diagnosis when that fails.

use std::fs;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use kvm_ioctls::{Kvm, VmFd};
use nix::errno::Errno;

/// Where KVM lives.
pub const KVM_PATH: &str = "/dev/kvm";

/// Why /dev/kvm cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmOpenError {
    /// No such device, and the processor shows no virtualisation.
    #[error(
        "{KVM_PATH} does not exist and the processor shows neither VT-x (vmx) nor AMD-V (svm): \
         switch virtualisation on in the firmware set-up, or, inside a virtual machine, let its \
         host pass nested virtualisation through"
    )]
    NoVirtualisation,
    /// No such device, though the processor could.
    #[error(
        "{KVM_PATH} does not exist although the processor has {feature}: load the module with \
         'modprobe {module}', or pass the device into this container"
    )]
    NoModule {
        /// VT-x or AMD-V.
        feature: &'static str,
        /// The kernel module to load.
        module: &'static str,
    },
    /// Not a character device.
    #[error("{KVM_PATH} is not a device node: remove it and load the kvm module")]
    NotDevice,
    /// No permission.
    #[error(
        "No permission to open {KVM_PATH} (owner {uid}:{gid}, mode {mode:04o}): add yourself to \
         the device's group, usually with 'sudo usermod -aG kvm $USER' and a new login"
    )]
    Permission {
        /// Owner of the node.
        uid: u32,
        /// Group of the node.
        gid: u32,
        /// Permission bits.
        mode: u32,
    },
    /// The device is there, but KVM will not work.
    #[error(
        "{KVM_PATH} exists but the kernel offers no virtualisation behind it: it is off in the \
         firmware set-up, in use by another hypervisor, or its module did not load (see dmesg)"
    )]
    Unavailable(#[source] io::Error),
    /// Anything else.
    #[error("Cannot open {KVM_PATH}")]
    Open(#[source] io::Error),
}

/// KVM, and a virtual machine without anything, opened before it is known what for: a part of what a start takes that
/// depends on nothing, with what KVM tells once.
pub struct Ahead {
    pub(super) kvm: Kvm,
    pub(super) vm: VmFd,
}

impl Ahead {
    /// Opens them. What fails now does again when it is needed, and is looked into and told then.
    pub fn open() -> Option<Self> {
        let kvm = Kvm::new().ok()?;
        let vm = kvm.create_vm().ok()?;
        arch::xstate::permit_guests();
        arch::cpuid::supported(&kvm).ok()?;
        arch::msr::indices(&kvm).ok()?;
        Some(Self { kvm, vm })
    }
}

/// Opens /dev/kvm.
pub fn open_kvm() -> Result<Kvm, KvmOpenError> {
    let path = Path::new(KVM_PATH);
    match Kvm::open_with_cloexec(true) {
        // SAFETY: the descriptor was opened just now and nobody else owns it.
        Ok(fd) => Ok(unsafe { Kvm::from_raw_fd(fd) }),
        Err(error) => Err(diagnose(path, Errno::from_raw(error.errno()))),
    }
}

fn diagnose(path: &Path, errno: Errno) -> KvmOpenError {
    let source = io::Error::from(errno);
    match errno {
        Errno::ENOENT => missing(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        Errno::EACCES | Errno::EPERM => match fs::metadata(path) {
            Ok(meta) => KvmOpenError::Permission {
                uid: meta.uid(),
                gid: meta.gid(),
                mode: meta.mode() & 0o7777,
            },
            Err(_) => KvmOpenError::Open(source),
        },
        Errno::ENODEV | Errno::ENXIO | Errno::EOPNOTSUPP => KvmOpenError::Unavailable(source),
        _ if is_no_device(path) => KvmOpenError::NotDevice,
        _ => KvmOpenError::Open(source),
    }
}

fn is_no_device(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| !meta.file_type().is_char_device())
}

fn missing(cpuinfo: &str) -> KvmOpenError {
    let has = |flag: &str| cpuinfo.split_whitespace().any(|word| word == flag);
    if has("vmx") {
        KvmOpenError::NoModule {
            feature: "VT-x",
            module: "kvm_intel",
        }
    } else if has("svm") {
        KvmOpenError::NoModule {
            feature: "AMD-V",
            module: "kvm_amd",
        }
    } else {
        KvmOpenError::NoVirtualisation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_told_apart_by_the_processor() {
        assert!(matches!(
            missing("flags : fpu vmx"),
            KvmOpenError::NoModule {
                module: "kvm_intel",
                ..
            }
        ));
        assert!(matches!(
            missing("flags : svm fpu"),
            KvmOpenError::NoModule {
                module: "kvm_amd",
                ..
            }
        ));
        assert!(matches!(
            missing("flags : fpu svm_lock"),
            KvmOpenError::NoVirtualisation
        ));
    }

    #[test]
    fn each_errno_has_its_message() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = |errno| diagnose(file.path(), errno).to_string();
        assert!(text(Errno::EACCES).contains("usermod -aG kvm"));
        assert!(text(Errno::EACCES).contains("0600"));
        assert!(text(Errno::ENODEV).contains("firmware"));
        assert!(text(Errno::EINVAL).contains("not a device node"));
    }
}
