//! A virtual machine that waits to become a clone: all that takes long is done, and there is nothing of
//! a guest in it.
//!
//! A [`Shell`] has KVM's objects, memory slots over a reservation of addresses, vCPU threads that are
//! parked, with their CPUID, and I/O threads. Of the snapshot that it is made for, it also has the memory
//! in place, copies of the pages that a new identity is written to, and the vCPUs' registers, all but clocks. [`Shell::adopt`] lays the memory of a snapshot over the
//! reservation, gives the vCPUs their state while it makes the devices, and has a machine: no slot is
//! registered, nothing is as long as the memory is. Owned by the thread that makes the machine.

use std::sync::Arc;

use arch::layout::{VMCLOCK_START, VMGENID_START};
use arch::memory::{GuestMemory, touch};
use arch::state::{ClockPolicy, Context, VcpuState};
use kvm_bindings::kvm_cpuid_entry2;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::build::{BuildError, random};
use super::frame::{Frame, Host};
use super::{ExitLatch, Vm, memory};
use crate::board::Wiring;
use crate::board::plan::Plan;
use crate::config::{Irqchip, MachineConfig, MemoryBacking};
use crate::io::IoThread;
use crate::snapshot::uffd::handler::{self, Connected};
use crate::snapshot::uffd::lazy::{self, Lazy};
use crate::snapshot::uffd::relay;
use crate::snapshot::uffd::watch::Watched;
use crate::snapshot::{MachineState, Paging, Snapshot, plugged, ram};
use crate::vcpu::{Given, Has, Reach, VcpuHandle};

/// A snapshot is not of a machine of the shell's shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the snapshot's machine has {saved} {what}, the prepared one {here}")]
pub struct ShapeError {
    what: &'static str,
    saved: u64,
    here: u64,
}

/// What of a machine is fixed before its state is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    vcpus: u16,
    dies: u16,
    threads_per_core: u16,
    mib: u64,
    irqchip: Irqchip,
}

impl Shape {
    /// That of `machine`.
    pub fn of(machine: &MachineConfig) -> Self {
        Self {
            vcpus: machine.vcpu_count,
            dies: machine.dies,
            threads_per_core: machine.threads_per_core,
            mib: machine.mem_size_mib,
            irqchip: machine.irqchip,
        }
    }

    fn check(&self, saved: &Self) -> Result<(), ShapeError> {
        let split = |shape: &Self| u64::from(shape.irqchip == Irqchip::Split);
        for (what, saved, here) in [
            ("vCPUs", saved.vcpus.into(), self.vcpus.into()),
            ("dies", saved.dies.into(), self.dies.into()),
            (
                "threads per core",
                saved.threads_per_core.into(),
                self.threads_per_core.into(),
            ),
            ("MiB of memory", saved.mib, self.mib),
            ("split interrupt controllers", split(saved), split(self)),
        ] {
            if saved != here {
                return Err(ShapeError { what, saved, here });
            }
        }
        Ok(())
    }
}

/// A machine that waits for its state.
pub struct Shell {
    frame: Frame,
    shape: Shape,
    context: Arc<Context>,
    vcpus: Vec<VcpuHandle>,
    exit: Arc<ExitLatch>,
    io: Vec<IoThread>,
    /// CPUID of the first vCPU, where they have theirs.
    cpuid: Option<Vec<kvm_cpuid_entry2>>,
    /// The snapshot whose memory is in place already.
    laid: Option<[u8; 16]>,
    /// What the vCPUs have of the state of that one.
    has: Has,
}

impl Shell {
    /// Prepares a machine of the shape of `snapshot`'s, whose devices have no memory of their own.
    /// The memory of one file is in place already: to lay another's over it takes a kernel longer the
    /// larger it is, where it keeps a list for each of a guest's pages.
    ///
    /// # Errors
    /// What KVM or the host refuses, and a snapshot whose processor the host does not have.
    pub fn new(host: Host, snapshot: &Snapshot) -> Result<Self, BuildError> {
        let machine = MachineConfig {
            // Replaced by the snapshot's.
            memory_backing: MemoryBacking::Anonymous,
            ..snapshot.config.machine_config.clone()
        };
        check(&host, snapshot)?;
        // Of a chain, small changes are copied, which a machine that waits has no use for, unless all of it is,
        // into reserved pages.
        let reserved = machine.huge_pages.reserved_mib().is_some();
        let simple =
            (reserved || snapshot.layers.len() == 1) && matches!(snapshot.paging, Paging::Mapped);
        let memory = match simple {
            true => ram::map(snapshot, &machine)?.0,
            false => memory::map(&machine)?,
        };
        let mut shell = Self::around(&machine, host, memory, &[], Some(snapshot))?;
        if simple {
            shell.laid = Some(snapshot.id);
            shell.prepare(&snapshot.machine)?;
        }
        if snapshot.machine.board.has_virtio() {
            shell.io.push(IoThread::start(0)?);
        }
        Ok(shell)
    }

    /// Whether a machine can wait for the like of `snapshot`: its slots are those of RAM.
    pub fn can_wait_for(snapshot: &Snapshot) -> bool {
        snapshot.config.pmem.is_empty() && snapshot.config.memory_hotplug.is_none()
    }

    /// Whether it can become the machine of `snapshot`, another than it was prepared for.
    pub fn takes(&self, snapshot: &Snapshot) -> bool {
        let machine = &snapshot.config.machine_config;
        // Reserved pages are filled when the machine is prepared.
        self.shape == Shape::of(machine)
            && machine.huge_pages.reserved_mib().is_none()
            && !self.reserved()
            && Self::can_wait_for(snapshot)
    }

    fn reserved(&self) -> bool {
        let mut regions = self.frame.memory.iter();
        regions.any(|region| region.is_hugetlbfs() == Some(true))
    }

    /// `same`: the snapshot whose CPUID the vCPUs are given.
    fn around(
        machine: &MachineConfig,
        host: Host,
        memory: GuestMemory,
        devices: &[Plan],
        same: Option<&Snapshot>,
    ) -> Result<Self, BuildError> {
        let context = host.context()?;
        let frame = Frame::new(machine, host, memory, devices)?;
        let exit = Arc::new(ExitLatch::new().map_err(BuildError::Event)?);
        let mut vcpus = Vec::with_capacity(machine.vcpu_count.into());
        let states = same.map_or(&[][..], |snapshot| &snapshot.machine.vcpus);
        for index in 0..machine.vcpu_count {
            let fd = frame.create_vcpu(index)?;
            if let Some(state) = states.get(usize::from(index)) {
                state.set_cpuid(&fd)?;
            }
            vcpus.push(frame.spawn((index, fd), Reach::default(), &exit)?);
        }
        Ok(Self {
            frame,
            shape: Shape::of(machine),
            context,
            vcpus,
            exit,
            io: Vec::new(),
            cpuid: states.first().map(|state| state.cpuid.clone()),
            laid: None,
            has: Has::Nothing,
        })
    }

    /// Gives the vCPUs what does not go with time, so that it is not to be done when they are needed.
    fn prepare(&mut self, machine: &Arc<MachineState>) -> Result<(), BuildError> {
        if !machine.vcpus.iter().all(VcpuState::can_wait) {
            return Ok(());
        }
        let vcpus = self.vcpus.iter();
        let answers: Vec<_> = vcpus
            .map(|vcpu| vcpu.prepare(machine, &self.context))
            .collect();
        for (index, answer) in answers.into_iter().enumerate() {
            let answer = answer.recv();
            answer.map_err(|_| BuildError::VcpuEnded { index })??;
        }
        // The host copies the pages now that the machine's new identity is going to be written to.
        for address in [VMGENID_START, VMCLOCK_START] {
            touch(&self.frame.memory, GuestAddress(address));
        }
        self.has = Has::Prepared;
        Ok(())
    }

    /// Becomes the machine of `snapshot`, parked, with the host's side of `wiring`. Its clocks do as
    /// `policy` says about the time since.
    ///
    /// # Errors
    /// A snapshot of another shape, and what the host refuses.
    pub fn adopt(
        mut self,
        snapshot: &Snapshot,
        policy: ClockPolicy,
        mut wiring: Wiring,
    ) -> Result<Vm, BuildError> {
        let machine = &snapshot.config.machine_config;
        self.shape.check(&Shape::of(machine))?;
        let state = &snapshot.machine.board;
        state.arrange(&mut wiring, machine.virtio_transport, machine.irqchip)?;
        if self.laid != Some(snapshot.id) {
            check(&self.frame.host, snapshot)?;
            ram::lay(&self.frame.memory, &snapshot.layers)?;
            if self.has == Has::Prepared {
                self.has = Has::Another;
            }
        }
        let mut vm = self.become_machine(snapshot, policy, wiring)?;
        vm.made_of = Some(snapshot.id);
        Ok(vm)
    }

    /// The rest of it, with the snapshot's memory in place.
    fn become_machine(
        mut self,
        snapshot: &Snapshot,
        policy: ClockPolicy,
        mut wiring: Wiring,
    ) -> Result<Vm, BuildError> {
        let machine = &snapshot.config.machine_config;
        let saved = &snapshot.machine;
        let shift = saved.vm.shift(policy);
        let given = Given {
            machine: saved.clone(),
            context: self.context.clone(),
            shift,
            same_cpuid: self.cpuid.as_ref() == saved.vcpus.first().map(|state| &state.cpuid),
            has: self.has,
        };
        // The vCPU threads do that while the devices are made here.
        let vcpus = self.vcpus.iter();
        let answers: Vec<_> = vcpus.map(|vcpu| vcpu.give(given.clone())).collect();
        wiring.io.append(&mut self.io);
        let (board, reach) = self.frame.board(machine, wiring, &saved.board)?;
        for (index, answer) in answers.into_iter().enumerate() {
            let answer = answer.recv();
            answer.map_err(|_| BuildError::VcpuEnded { index })??;
        }
        for vcpu in &self.vcpus {
            vcpu.reach(reach.clone());
        }
        let frame = self.frame;
        saved.vm.restore(&frame.vm, &shift)?;
        board.set_counter_offset(saved, &shift);
        let vm = frame.finish(board, self.vcpus, self.exit)?;
        let id = random().map_err(BuildError::Random)?;
        vm.announce_generation(id).map_err(BuildError::Generation)?;
        Ok(vm)
    }
}

/// Who brings memory that is not there yet.
enum Absent {
    Nobody,
    Lazy(Lazy),
    Handler(Connected),
}

fn check(host: &Host, snapshot: &Snapshot) -> Result<(), BuildError> {
    match snapshot.machine.vcpus.first() {
        Some(vcpu) => Ok(vcpu.check(host.cpuid()?)?),
        None => Ok(()),
    }
}

impl Vm {
    /// Makes the machine of `snapshot` with its vCPUs parked; also says where its RAM comes from. Its
    /// clocks do as `policy` says about the time since.
    ///
    /// # Errors
    /// What does not fit this host or `wiring`, before anything of the host is touched; and what the
    /// host refuses.
    pub fn restore(
        host: Host,
        snapshot: &Snapshot,
        policy: ClockPolicy,
        mut wiring: Wiring,
    ) -> Result<(Self, ram::Origin), BuildError> {
        let machine = &snapshot.config.machine_config;
        let state = &snapshot.machine.board;
        state.arrange(&mut wiring, machine.virtio_transport, machine.irqchip)?;
        check(&host, snapshot)?;
        let mut provider = Absent::Nobody;
        let (memory, origin) = match &snapshot.paging {
            Paging::Mapped => ram::map(snapshot, machine)?,
            Paging::Lazy(set) => {
                let (memory, lazy) = lazy::map(snapshot, machine, set.as_ref())?;
                provider = Absent::Lazy(lazy);
                (memory.clone(), ram::anywhere(&memory))
            }
            Paging::Handler { path, regions } => {
                let plugged = relay::Absent::of(&wiring.devices, state, regions)?;
                let (memory, connected) = handler::map(machine, path, &plugged)?;
                provider = Absent::Handler(connected);
                (memory.clone(), ram::anywhere(&memory))
            }
        };
        let shell = Shell::around(machine, host, memory, &wiring.devices, None)?;
        if !matches!(provider, Absent::Handler(_)) {
            // Not RAM, and it may take its time.
            for plugged in shell.frame.slots.plugged() {
                plugged::fill(snapshot, &plugged)?;
            }
        }
        // From here on RAM is touched.
        let watched = match provider {
            Absent::Nobody => None,
            Absent::Lazy(lazy) => Some(Watched::new(lazy, &shell.exit)?),
            Absent::Handler(connected) => Some(Watched::new(connected, &shell.exit)?),
        };
        let mut vm = shell.become_machine(snapshot, policy, wiring)?;
        vm.made_of = watched.is_none().then_some(snapshot.id);
        if let Some(watched) = &watched {
            watched.loaded();
        }
        vm.handler = watched;
        Ok((vm, origin))
    }
}
