//! Building a virtual machine, in the order that is fast.
//!
//! `create_vm → memory slots → irqchip → PIT → vCPUs → irqfd/ioeventfd`: a memory slot registered
//! after the interrupt controller waits for an SRCU grace period, about 7 ms each on current
//! kernels, against less than 0.2 ms before it. The benchmark shows it (`make bench`). All of it runs
//! on one thread: a second one meanwhile was measured to cost more, in TLB shootdowns and locks, than
//! the overlap gains.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Instant;

use arch::acpi::{AcpiError, AcpiFacts};
use arch::boot::{self, BootError, BootParameters, EntryState};
use arch::capabilities::HostError;
use arch::cmdline::{self, CmdlineError};
use arch::kernel::{KernelEntry, KernelError, KernelImage, LoadOptions, LoadedKernel};
use arch::memory::GuestMemory;
use arch::state::StateError;
use arch::static_template::StaticTemplateError;
use arch::topology::TopologyError;
use arch::vcpu::{Boot, TemplateError, VcpuError, VcpuTemplate};
use arch::vm::VmError;
use arch::{vmclock, vmgenid};
use vm_memory::{Bytes, GuestAddress};

use super::frame::{Frame, Host};
use super::host::KvmOpenError;
use super::limits::LimitError;
use super::memory::{self, MemoryError};
use super::shell::ShapeError;
use super::{ExitLatch, Vm, cpu, kernel_cache};
use crate::board::{self, BoardError, BoardState, Wiring};
use crate::config::{self, Spec};
use crate::io::IoError;
use crate::sandbox::thread::ThreadError;
use crate::snapshot::ram::MapError;
use crate::snapshot::uffd::handler::HandlerError;

/// A virtual machine could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// /dev/kvm cannot be used.
    #[error(transparent)]
    Open(#[from] KvmOpenError),
    /// KVM lacks something.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something of the host is not enough.
    #[error(transparent)]
    Limit(#[from] LimitError),
    /// Topology.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// KVM_CREATE_VM failed.
    #[error("KVM cannot create a virtual machine")]
    CreateVm(#[source] kvm_ioctls::Error),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// VM-wide set-up.
    #[error(transparent)]
    Setup(#[from] VmError),
    /// Devices.
    #[error(transparent)]
    Board(#[from] BoardError),
    /// The kernel cannot be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The command line cannot be used.
    #[error(transparent)]
    Cmdline(#[from] CmdlineError),
    /// The boot protocol's structures do not fit.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The initial RAM disk cannot be read.
    #[error("Cannot use the initial RAM disk {}: name a file that this user can read", path.display())]
    Initrd {
        /// The user's file.
        path: std::path::PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// A directory, a pipe or a device, of which no length is known.
    #[error("The initial RAM disk {} is not a regular file: name one, or leave out --initrd", path.display())]
    InitrdKind {
        /// The user's file.
        path: std::path::PathBuf,
    },
    /// No byte in it.
    #[error("The initial RAM disk {} is empty: name another, or leave out --initrd", path.display())]
    InitrdEmpty {
        /// The user's file.
        path: std::path::PathBuf,
    },
    /// The initial RAM disk cannot be copied into the guest.
    #[error("Cannot copy the initial RAM disk into guest memory")]
    CopyInitrd(#[source] vm_memory::GuestMemoryError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// Generation id and vmclock page.
    #[error("Cannot write the generation id into guest memory")]
    Generation(#[source] vm_memory::GuestMemoryError),
    /// A CPU template for another processor.
    #[error(transparent)]
    StaticTemplate(#[from] StaticTemplateError),
    /// Processor features.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// KVM_CREATE_VCPU failed.
    #[error("KVM cannot create vCPU {index}")]
    CreateVcpu {
        /// Its index.
        index: u16,
        /// What went wrong.
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM_IRQFD failed.
    #[error("KVM cannot connect the interrupt of a virtio device")]
    Irqfd(#[source] kvm_ioctls::Error),
    /// KVM_GET_TSC_KHZ failed.
    #[error("KVM does not tell the frequency of the time-stamp counter")]
    TscFrequency(#[source] kvm_ioctls::Error),
    /// vCPU set-up.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A saved state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Memory of a snapshot.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Memory that a page fault handler brings.
    #[error(transparent)]
    Handler(#[from] HandlerError),
    /// Devices of a saved state.
    #[error(transparent)]
    BoardState(#[from] board::StateError),
    /// A machine of another shape.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// A vCPU thread that is gone.
    #[error("vCPU {index} has ended before it had its state")]
    VcpuEnded {
        /// Its index.
        index: usize,
    },
    /// I/O threads.
    #[error(transparent)]
    Io(#[from] IoError),
    /// Threads.
    #[error(transparent)]
    Thread(#[from] ThreadError),
    /// No random numbers.
    #[error("Cannot get random numbers for the guest")]
    Random(#[source] io::Error),
    /// No descriptor left.
    #[error("Cannot create an event descriptor")]
    Event(#[source] io::Error),
}

/// An initial RAM disk: the user's file, bulle's archive, or the one followed by the other.
#[derive(Debug, Default)]
pub struct Initrd {
    /// The user's, with its length in bytes.
    pub file: Option<(std::path::PathBuf, File, u64)>,
    /// bulle's.
    pub archive: Vec<u8>,
}

impl Initrd {
    /// Opens the user's file.
    pub fn open(path: &std::path::Path) -> Result<Self, BuildError> {
        let error = |source| BuildError::Initrd {
            path: path.to_owned(),
            source,
        };
        // Looked at before it is opened, because opening a pipe would wait for its writer.
        let meta = std::fs::metadata(path).map_err(error)?;
        let path = path.to_path_buf();
        if !meta.is_file() {
            return Err(BuildError::InitrdKind { path });
        }
        if meta.len() == 0 {
            return Err(BuildError::InitrdEmpty { path });
        }
        let file = File::open(&path).map_err(error)?;
        Ok(Self {
            file: Some((path, file, meta.len())),
            archive: Vec::new(),
        })
    }

    /// Bytes of the user's part, padded so that another archive can follow.
    fn file_len(&self) -> u64 {
        self.file
            .as_ref()
            .map_or(0, |(_, _, len)| len.next_multiple_of(4))
    }

    fn len(&self) -> u64 {
        self.file_len() + self.archive.len() as u64
    }

    fn copy(mut self, memory: &GuestMemory, address: GuestAddress) -> Result<(), BuildError> {
        let after = GuestAddress(address.0 + self.file_len());
        if let Some((_, file, len)) = &mut self.file {
            memory
                .read_exact_volatile_from(address, file, *len as usize)
                .map_err(BuildError::CopyInitrd)?;
        }
        memory
            .write_slice(&self.archive, after)
            .map_err(BuildError::CopyInitrd)
    }
}

impl Vm {
    /// Builds the machine that `spec` describes, with `kernel` and `initrd` in its memory and its
    /// vCPUs parked.
    pub fn build(
        spec: &Spec,
        host: Host,
        kernel: &KernelImage,
        initrd: Initrd,
        wiring: Wiring,
    ) -> Result<Self, BuildError> {
        let machine = spec.machine();
        let cpu = cpu::template(spec.config())?;
        let memory = memory::map(machine)?;
        let frame = Frame::new(machine, host, memory, &wiring.devices)?;
        let (board, reach) = frame.board(machine, wiring, &BoardState::default())?;
        let facts = board.acpi_facts(&frame.host.topology, frame.mode);
        let entry = load(spec, &facts, kernel, initrd, &frame.memory)?;
        log::debug!("devices in place, guest memory filled");
        let Host {
            kvm,
            capabilities,
            topology,
            ..
        } = &frame.host;
        let mut template = VcpuTemplate::new(kvm, topology, capabilities, None, &cpu.cpuid)?;
        log::debug!("processor features known");
        let boot = Boot {
            enter: &|sregs: &mut _| boot::apply(&entry, sregs),
            irqchip: frame.mode,
        };
        let exit = Arc::new(ExitLatch::new().map_err(BuildError::Event)?);
        let mut vcpus = Vec::with_capacity(machine.vcpu_count.into());
        for index in 0..machine.vcpu_count {
            let fd = frame.create_vcpu(index)?;
            if index == 0 && capabilities.get_tsc_khz {
                let khz = fd.get_tsc_khz().map_err(BuildError::TscFrequency)?;
                template.cpuid.set_tsc_khz(khz);
            }
            if index == 0 {
                let changed = template.msrs.change(kvm, &fd, &cpu.msrs);
                changed.map_err(TemplateError::Msr)?;
            }
            let boot = (index == 0).then_some(&boot);
            arch::vcpu::configure(&fd, index, &template, boot)?;
            if index == 0
                && let Some(offset) = arch::tsc::offset(&fd)
            {
                board.devices.set_counter_offset(offset);
            }
            vcpus.push(frame.spawn((index, fd), reach.clone(), &exit)?);
        }
        frame.finish(board, vcpus, exit)
    }
}

/// Fills guest memory: kernel, initial RAM disk, ACPI tables, boot parameters.
fn load(
    spec: &Spec,
    facts: &AcpiFacts,
    kernel: &KernelImage,
    initrd: Initrd,
    memory: &GuestMemory,
) -> Result<EntryState, BuildError> {
    let config = spec.config();
    let user_words = config.boot_source.boot_args.as_deref().unwrap_or_default();
    let kaslr_seed = u64::from_ne_bytes(random().map_err(BuildError::Random)?);
    let kaslr = !user_words
        .split_ascii_whitespace()
        .any(|word| word == "nokaslr");
    let options = LoadOptions {
        entry: match config.boot_source.kernel_entry {
            config::KernelEntry::Auto => KernelEntry::Auto,
            config::KernelEntry::Pvh => KernelEntry::Pvh,
            config::KernelEntry::Linux64 => KernelEntry::Linux64,
            config::KernelEntry::Bzimage => KernelEntry::Bzimage,
        },
        kaslr_seed: kaslr.then_some(kaslr_seed),
        initrd_size: initrd.len(),
    };
    let loaded = load_kernel(spec, kernel, memory, &options)?;
    let line = cmdline::build(&board::kernel_words(config), user_words, loaded.cmdline_max)?;
    let ram_size = spec.ram_size();
    let initrd_range = match initrd.len() {
        0 => None,
        len => {
            let address = boot::initrd_address(&loaded, ram_size, len)?;
            initrd.copy(memory, address)?;
            Some((address, len))
        }
    };
    let rsdp = arch::acpi::write_tables(memory, facts)?;
    let id = random().map_err(BuildError::Random)?;
    vmgenid::write(memory, id).map_err(BuildError::Generation)?;
    vmclock::write(memory).map_err(BuildError::Generation)?;
    let parameters = BootParameters {
        kernel: &loaded,
        cmdline: &line,
        initrd: initrd_range,
        rsdp,
        ram_size,
        rng_seed: random().map_err(BuildError::Random)?,
    };
    Ok(boot::configure(memory, &parameters)?)
}

fn load_kernel(
    spec: &Spec,
    kernel: &KernelImage,
    memory: &GuestMemory,
    options: &LoadOptions,
) -> Result<LoadedKernel, KernelError> {
    let cache = spec.config().boot_source.kernel_cache;
    let unpacked = kernel_cache::unpack(kernel, options.entry, spec.ram_size(), cache)?;
    let started = Instant::now();
    let loaded = kernel.load_unpacked(unpacked.as_deref(), memory, options)?;
    log::debug!("kernel loaded in {:.1?}", started.elapsed());
    Ok(loaded)
}

/// Random bytes from the host, at most 256.
pub fn random<const N: usize>() -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    // SAFETY: the pointer and the length describe `bytes`. Requests of up to 256 bytes are never
    // cut short.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), N, 0) };
    if got == N as isize {
        Ok(bytes)
    } else {
        Err(io::Error::last_os_error())
    }
}
