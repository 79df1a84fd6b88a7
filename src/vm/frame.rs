//! A virtual machine before it has devices and vCPUs, and the host it is made on.
//!
//! `create_vm → memory slots → irqchip → PIT`, in the order that is fast (see `vm::build`). Booting and
//! restoring both begin here.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arch::capabilities::Capabilities;
use arch::memory::GuestMemory;
use arch::state::{Context, HostCpuid, StateError};
use arch::topology::{Topology, TopologyError};
use arch::vm::IrqchipMode;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vm_memory::GuestMemoryBackend;

use super::build::BuildError;
use super::host::{Ahead, KVM_PATH, open_kvm};
use super::irq::Irqchip;
use super::slots::{DeviceSlots, Seen};
use super::{ExitLatch, Vm, cpu, limits, memory};
use crate::board::attach::Machine;
use crate::board::plan::Plan;
use crate::board::{Board, BoardState, Wiring};
use crate::config::{self, MachineConfig, Spec};
use crate::vcpu::{Reach, Vcpu, VcpuHandle};

/// KVM as opened and checked, shared by all clones.
#[derive(Clone)]
pub struct Host {
    pub(super) kvm: Arc<Kvm>,
    pub(super) capabilities: Capabilities,
    pub(super) topology: Topology,
    /// Asked when it is needed first.
    context: Arc<OnceLock<Arc<Context>>>,
    /// Likewise.
    cpuid: Arc<OnceLock<HostCpuid>>,
    /// A virtual machine that nobody has taken yet.
    spare: Arc<Mutex<Option<VmFd>>>,
}

impl Host {
    /// Opens KVM and checks it against `spec`, whose virtio devices need so many open `files`.
    pub fn open(spec: &Spec, files: u64) -> Result<Self, BuildError> {
        Self::open_on(spec, files, None)
    }

    /// Likewise, with what was opened ahead.
    pub fn open_on(spec: &Spec, files: u64, ahead: Option<Ahead>) -> Result<Self, BuildError> {
        let machine = spec.machine();
        limits::allow_open_files(machine, files)?;
        let (kvm, spare) = match ahead {
            Some(Ahead { kvm, vm }) => (kvm, Some(vm)),
            None => (open_kvm()?, None),
        };
        log::debug!("{KVM_PATH} is open");
        arch::xstate::permit_guests();
        let capabilities = arch::capabilities::check_with(&kvm, &cpu::capabilities(spec.config()))?;
        let topology = topology(machine)?;
        limits::check(machine, &capabilities)?;
        Ok(Self {
            kvm: Arc::new(kvm),
            capabilities,
            topology,
            context: Arc::default(),
            cpuid: Arc::default(),
            spare: Arc::new(Mutex::new(spare)),
        })
    }

    /// A virtual machine without anything.
    fn create_vm(&self) -> Result<VmFd, BuildError> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let vm = spare.take().map_or_else(|| self.kvm.create_vm(), Ok);
        vm.map_err(BuildError::CreateVm)
    }

    /// What giving vCPUs their state needs to know, asked once for all clones. Not for taking it, which
    /// leaves out what a vCPU refuses to tell: another guest's might not.
    pub(super) fn context(&self) -> Result<Arc<Context>, StateError> {
        if let Some(context) = self.context.get() {
            return Ok(context.clone());
        }
        let context = Arc::new(Context::new(&self.kvm, &self.capabilities)?);
        Ok(self.context.get_or_init(|| context).clone())
    }

    /// What this host's KVM can give to vCPUs, asked once for all clones.
    pub(super) fn cpuid(&self) -> Result<&HostCpuid, StateError> {
        if let Some(cpuid) = self.cpuid.get() {
            return Ok(cpuid);
        }
        let cpuid = HostCpuid::new(self.kvm.clone())?;
        Ok(self.cpuid.get_or_init(|| cpuid))
    }
}

fn topology(machine: &MachineConfig) -> Result<Topology, TopologyError> {
    let cores = machine.vcpu_count / machine.dies / machine.threads_per_core;
    Topology::new(
        machine.vcpu_count,
        machine.threads_per_core,
        cores,
        machine.dies,
        1,
    )
}

fn mode(irqchip: config::Irqchip) -> IrqchipMode {
    match irqchip {
        config::Irqchip::Split => IrqchipMode::Split,
        config::Irqchip::Kernel => IrqchipMode::Kernel,
    }
}

/// A virtual machine before it has devices and vCPUs.
pub(super) struct Frame {
    pub(super) host: Host,
    pub(super) mode: IrqchipMode,
    pub(super) vm: Arc<VmFd>,
    pub(super) memory: GuestMemory,
    pub(super) slots: DeviceSlots,
}

impl Frame {
    /// Makes it around `memory`, with the memory of `devices` beside it.
    pub(super) fn new(
        machine: &MachineConfig,
        host: Host,
        memory: GuestMemory,
        devices: &[Plan],
    ) -> Result<Self, BuildError> {
        let mode = mode(machine.irqchip);
        let vm = Arc::new(host.create_vm()?);
        log::debug!("virtual machine created");
        arch::vm::before_memory(&vm)?;
        memory::register(&vm, &memory)?;
        let slots = DeviceSlots::of(devices);
        slots.register(&vm, memory.num_regions() as u32)?;
        arch::vm::create_irqchip(&vm, mode, &host.capabilities)?;
        if mode == IrqchipMode::Kernel {
            arch::vm::create_pit(&vm)?;
        }
        log::debug!("memory and interrupt controller in place");
        Ok(Self {
            host,
            mode,
            vm,
            memory,
            slots,
        })
    }

    /// Makes the devices of `wiring`, which `state` has [arranged](BoardState::arrange), from that, and
    /// what a vCPU reaches of them.
    pub(super) fn board(
        &self,
        machine: &MachineConfig,
        wiring: Wiring,
        state: &BoardState,
    ) -> Result<(Board, Reach), BuildError> {
        let irqchip = Irqchip::new(machine.irqchip, &self.vm, state.ioapic());
        let parts = Machine {
            vm: &self.vm,
            irqchip: &irqchip,
            memory: &self.memory,
        };
        let board = Board::new(&parts, machine.virtio_transport, wiring, state)?;
        let reach = Reach {
            pio: board.pio.clone(),
            mmio: board.mmio.clone(),
            ioapic: irqchip.ioapic().cloned(),
        };
        Ok((board, reach))
    }

    /// Makes a vCPU.
    pub(super) fn create_vcpu(&self, index: u16) -> Result<VcpuFd, BuildError> {
        let id = self.host.topology.apic_id(index).into();
        let vcpu = self.vm.create_vcpu(id);
        vcpu.map_err(|source| BuildError::CreateVcpu { index, source })
    }

    /// Starts the thread of a vCPU, parked.
    pub(super) fn spawn(
        &self,
        (index, fd): (u16, VcpuFd),
        reach: Reach,
        exit: &Arc<ExitLatch>,
    ) -> Result<VcpuHandle, BuildError> {
        Ok(VcpuHandle::spawn(Vcpu {
            index,
            fd,
            reach,
            memory: self.memory.clone(),
            slots: self.slots.clone(),
            seen: Seen::default(),
            exit: exit.clone(),
            counts: Arc::default(),
        })?)
    }

    /// The machine, with its vCPUs and devices.
    pub(super) fn finish(
        self,
        board: Board,
        vcpus: Vec<VcpuHandle>,
        exit: Arc<ExitLatch>,
    ) -> Result<Vm, BuildError> {
        board.devices.connect(&self.vm).map_err(BuildError::Irqfd)?;
        log::debug!("{} vCPUs ready", vcpus.len());
        Ok(Vm {
            vcpus,
            board,
            exit,
            host: self.host,
            mode: self.mode,
            fd: self.vm,
            memory: self.memory,
            slots: self.slots,
            made_of: None,
            rebased: AtomicBool::new(false),
            running: AtomicBool::new(false),
            handler: None,
        })
    }
}
