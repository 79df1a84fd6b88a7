//! What the rest of bulle holds of a vCPU.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arch::memory::GuestMemory;
use devices::bus::Bus;
use devices::ioapic::IoApic;
use kvm_ioctls::VcpuFd;

use super::{kick, thread};
use crate::sandbox::thread::{Role, ThreadError, spawn};
use crate::vm::ExitLatch;
use crate::vm::slots::{DeviceSlots, Seen};

/// How long a vCPU thread may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two kicks of a thread that has not ended yet.
const RETRY: Duration = Duration::from_micros(20);

/// All that a vCPU thread works with.
pub struct Vcpu {
    /// Index from 0; 0 is the boot processor.
    pub index: u16,
    /// The KVM vCPU.
    pub fd: VcpuFd,
    /// I/O ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Told of ends of interrupts where the I/O APIC is bulle's.
    pub ioapic: Option<Arc<IoApic>>,
    /// For reports only.
    pub memory: GuestMemory,
    /// Memory of devices.
    pub slots: DeviceSlots,
    /// What this vCPU knows of them.
    pub seen: Seen,
    /// Where the end of the VM is announced.
    pub exit: Arc<ExitLatch>,
}

/// What a vCPU thread is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Leave the parked state.
    Run,
    /// End the thread.
    Stop,
}

/// A running or parked vCPU thread. Dropping it stops and joins the thread.
pub struct VcpuHandle {
    commands: Sender<Command>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Starts the thread of `vcpu`, parked.
    pub fn spawn(vcpu: Vcpu) -> Result<Self, ThreadError> {
        kick::install_handler();
        let (commands, receiver) = channel();
        let stop = Arc::new(AtomicBool::new(false));
        let flag = stop.clone();
        let role = Role::Vcpu(vcpu.index);
        let thread = spawn(role, move || thread::parked(vcpu, &receiver, &flag))?;
        Ok(Self {
            commands,
            stop,
            thread: Some(thread),
        })
    }

    /// Sends a command. A thread that has ended does not listen, which is no error.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            log::debug!("a vCPU that has ended was told {command:?}");
        }
    }

    /// Asks the thread to end and gets it out of KVM_RUN; does not wait.
    pub fn request_stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.send(Command::Stop);
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }
}

impl Drop for VcpuHandle {
    /// Stops the thread and joins it. One that the kernel does not let out of KVM_RUN is left
    /// behind after [`PATIENCE`]: it holds its own share of guest memory.
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else {
            return;
        };
        let begin = Instant::now();
        self.stop.store(true, Ordering::SeqCst);
        self.send(Command::Stop);
        while !thread.is_finished() {
            if begin.elapsed() > PATIENCE {
                log::error!("a vCPU thread does not leave KVM_RUN: it is left behind");
                return;
            }
            kick::kick(&thread);
            std::thread::sleep(RETRY);
        }
        if thread.join().is_err() {
            log::error!("a vCPU thread panicked");
        }
    }
}
