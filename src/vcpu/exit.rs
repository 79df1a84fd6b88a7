//! One KVM exit: answered by a device, turned into an effect, or the end of the VM.
//!
//! Every exit reason has an outcome. Accesses that no device claims read as all ones; the first
//! few are logged.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use arch::report::VcpuReport;
use devices::bus::{Bus, Effect};
use kvm_bindings::{KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN};
use kvm_ioctls::{VcpuExit, VcpuFd};
use nix::errno::Errno;

use super::failure::{Failure, FailureCause};
use super::handle::Vcpu;
use super::spent::Spent;
use crate::telemetry::Limited;
use crate::vm::VmExit;
use devices::bus::ExitReason;

static UNCLAIMED: Limited = Limited::new(8);
static CRASH_LOADED: Limited = Limited::new(1);

/// Exits of one vCPU since its start, by reason. Only its thread writes them.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct ExitCounts {
    /// Reads of ports.
    pub io_in: AtomicU64,
    /// Writes to ports.
    pub io_out: AtomicU64,
    /// Reads of devices' memory.
    pub mmio_read: AtomicU64,
    /// Writes to it.
    pub mmio_write: AtomicU64,
    /// Ends of interrupts that bulle's I/O APIC is told.
    pub ioapic_eoi: AtomicU64,
    /// Returns without anything to answer: kicks, signals, windows for interrupts.
    pub interrupted: AtomicU64,
    /// Exits that ended the machine because it could not go on.
    pub failures: AtomicU64,
    /// Times that the guest's clock was not told of a pause: it does not use it.
    pub clock_failures: AtomicU64,
    /// When the first one since it was told to run was answered.
    first: Mutex<Option<Instant>>,
    /// How long the first four took, in their order.
    pub spent: [Spent; 4],
}

/// Places in [`ExitCounts::spent`].
const IO_IN: usize = 0;
const IO_OUT: usize = 1;
const MMIO_READ: usize = 2;
const MMIO_WRITE: usize = 3;

impl ExitCounts {
    /// When the first exit since the vCPU was last told to run was answered; before that, of the time before.
    pub fn first(&self) -> Option<Instant> {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// That was now.
    pub fn ran(&self) {
        *self.first.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// What went wrong, by the names of Firecracker's metrics.
    pub fn failures(&self) -> [(&'static str, u64); 2] {
        [
            ("failures", &self.failures),
            ("kvmclock_ctrl_fails", &self.clock_failures),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }
}

/// Counts one.
fn count(counter: &AtomicU64) {
    // One writer needs no locked instruction.
    let next = counter.load(Ordering::Relaxed).wrapping_add(1);
    counter.store(next, Ordering::Relaxed);
}

/// What to do after an exit.
pub enum Handled {
    /// Enter the guest again.
    Continue,
    /// A kick: nothing of the guest waits to be answered.
    Interrupted,
    /// The VM ends.
    End(VmExit),
}

/// Enters the guest once and answers its exit.
pub fn handle(vcpu: &mut Vcpu) -> Handled {
    let (pio, mmio) = (&vcpu.reach.pio, &vcpu.reach.mmio);
    let cause = match vcpu.fd.run() {
        Ok(VcpuExit::IoIn(port, data)) => {
            let begin = Instant::now();
            count(&vcpu.counts.io_in);
            let data: *mut [u8] = data;
            let size = io_size(&mut vcpu.fd);
            // SAFETY: the slice lies in the run area that `vcpu.fd` keeps mapped; the borrow that
            // produced it ended, nothing else touches the area between two KVM_RUNs.
            let data = unsafe { &mut *data };
            for item in data.chunks_mut(size) {
                claimed(pio.read(port.into(), item), "read of port", port.into());
            }
            vcpu.counts.spent[IO_IN].note(begin);
            return Handled::Continue;
        }
        Ok(VcpuExit::IoOut(port, data)) => {
            let begin = Instant::now();
            count(&vcpu.counts.io_out);
            let data: *const [u8] = data;
            let size = io_size(&mut vcpu.fd);
            // SAFETY: as above.
            let data = unsafe { &*data };
            let handled = write_all(pio, port.into(), data, size, "write to port");
            vcpu.counts.spent[IO_OUT].note(begin);
            return handled;
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            let begin = Instant::now();
            count(&vcpu.counts.mmio_read);
            claimed(mmio.read(address, data), "read of address", address);
            vcpu.counts.spent[MMIO_READ].note(begin);
            return Handled::Continue;
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            let begin = Instant::now();
            count(&vcpu.counts.mmio_write);
            let handled = write_all(mmio, address, data, data.len(), "write to address");
            vcpu.counts.spent[MMIO_WRITE].note(begin);
            return handled;
        }
        Ok(VcpuExit::IoapicEoi(vector)) => {
            count(&vcpu.counts.ioapic_eoi);
            if let Some(ioapic) = &vcpu.reach.ioapic {
                ioapic.end_of_interrupt(vector);
            }
            return Handled::Continue;
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => return after_interruption(vcpu),
        Ok(VcpuExit::SystemEvent(kind, _)) => match kind {
            KVM_SYSTEM_EVENT_SHUTDOWN => return Handled::End(VmExit::Guest(ExitReason::PowerOff)),
            KVM_SYSTEM_EVENT_RESET => return Handled::End(VmExit::Guest(ExitReason::Reset)),
            KVM_SYSTEM_EVENT_CRASH => return Handled::End(VmExit::Guest(ExitReason::Panicked)),
            kind => FailureCause::SystemEvent { kind },
        },
        Ok(VcpuExit::Shutdown) => FailureCause::TripleFault,
        Ok(VcpuExit::FailEntry(reason, cpu)) => FailureCause::EntryFailed { reason, cpu },
        Ok(VcpuExit::InternalError) => internal_error(&mut vcpu.fd),
        Ok(VcpuExit::MemoryFault { flags, gpa, size }) => {
            if vcpu.slots.repair(&mut vcpu.seen) {
                return Handled::Continue;
            }
            FailureCause::MemoryFault { flags, gpa, size }
        }
        Ok(other) => FailureCause::Unhandled {
            exit: format!("{other:?}"),
        },
        Err(error) => match Errno::from_raw(error.errno()) {
            Errno::EINTR | Errno::EAGAIN => return after_interruption(vcpu),
            // KVM before Linux 6.8 does not say where.
            Errno::EFAULT if vcpu.slots.repair(&mut vcpu.seen) => return Handled::Continue,
            Errno::EFAULT => FailureCause::Unreachable,
            _ => FailureCause::RunFailed(error),
        },
    };
    count(&vcpu.counts.failures);
    Handled::End(VmExit::Failed(Box::new(failure(vcpu, cause))))
}

/// Finishes the access that the guest left for, which KVM does on the next entry, without running
/// the guest; and tells its clock. The access may have more parts, each an exit of its own. The end of the VM, if one of them is that.
pub fn complete(vcpu: &mut Vcpu) -> Option<VmExit> {
    loop {
        vcpu.fd.set_kvm_immediate_exit(1);
        match handle(vcpu) {
            Handled::Continue => {}
            Handled::Interrupted => break,
            Handled::End(exit) => return Some(exit),
        }
    }
    tell_clock(vcpu);
    None
}

/// Tells the guest's clock that it stood still, so that no watchdog of the guest barks.
pub fn tell_clock(vcpu: &Vcpu) {
    // Fails for guests that do not use the clock.
    if vcpu.fd.kvmclock_ctrl().is_err() {
        count(&vcpu.counts.clock_failures);
    }
}

/// A kick: KVM must not return at once the next time.
fn after_interruption(vcpu: &mut Vcpu) -> Handled {
    count(&vcpu.counts.interrupted);
    vcpu.fd.set_kvm_immediate_exit(0);
    Handled::Interrupted
}

fn write_all(bus: &Bus, address: u64, data: &[u8], size: usize, what: &str) -> Handled {
    for item in data.chunks(size.max(1)) {
        match bus.write(address, item) {
            Some(Effect::None) => {}
            Some(Effect::Exit(reason)) => return Handled::End(VmExit::Guest(reason)),
            Some(Effect::CrashLoaded) => {
                if CRASH_LOADED.allow() {
                    log::warn!("the guest kernel crashed and started its crash kernel");
                }
            }
            None => claimed(false, what, address),
        }
    }
    Handled::Continue
}

fn claimed(claimed: bool, what: &str, address: u64) {
    if !claimed && UNCLAIMED.allow() {
        log::debug!("{what} {address:#x} met no device");
    }
}

/// Bytes of one element of a port access; a string instruction moves several.
fn io_size(fd: &mut VcpuFd) -> usize {
    // SAFETY: the exit reason was KVM_EXIT_IO, so `io` is the live field of the union.
    let io = unsafe { fd.get_kvm_run().__bindgen_anon_1.io };
    usize::from(io.size).clamp(1, 8)
}

fn internal_error(fd: &mut VcpuFd) -> FailureCause {
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so `internal` is the live field.
    let internal = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal };
    let count = (internal.ndata as usize).min(internal.data.len());
    let data = internal.data.iter().take(count).copied().collect();
    FailureCause::Internal {
        suberror: internal.suberror,
        data,
    }
}

fn failure(vcpu: &Vcpu, cause: FailureCause) -> Failure {
    let state = VcpuReport::collect(&vcpu.fd).map(|report| {
        let code = report.instruction_bytes(&vcpu.memory);
        (report, code)
    });
    Failure {
        vcpu: vcpu.index,
        cause,
        state,
    }
}
