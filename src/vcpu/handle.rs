//! What the rest of bulle holds of a vCPU.

use std::os::unix::thread::JoinHandleExt;
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, SendError, Sender, SyncSender, channel, sync_channel,
};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use arch::memory::GuestMemory;
use arch::state::{ClockShift, Context, StateError, VcpuState};
use devices::bus::Bus;
use devices::ioapic::IoApic;
use kvm_ioctls::VcpuFd;
use nix::time::{ClockId, clock_gettime};

use super::exit::ExitCounts;
use super::flags::Flags;
use super::{kick, thread};
use crate::sandbox::thread::{Role, ThreadError, spawn};
use crate::snapshot::MachineState;
use crate::vm::ExitLatch;
use crate::vm::slots::{DeviceSlots, Seen};

/// How long a vCPU thread may take to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time between two kicks of a thread that has not ended yet.
const RETRY: Duration = Duration::from_micros(20);
/// Time between two kicks of a thread that is to pause.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// The devices that a vCPU's exits reach.
#[derive(Clone, Default)]
pub struct Reach {
    /// I/O ports.
    pub pio: Arc<Bus>,
    /// Memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// Told of ends of interrupts where the I/O APIC is bulle's.
    pub ioapic: Option<Arc<IoApic>>,
}

impl std::fmt::Debug for Reach {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reach").finish_non_exhaustive()
    }
}

/// A saved state on its way to a vCPU.
#[derive(Clone, Debug)]
pub struct Given {
    /// The machine, which has a state for each vCPU.
    pub machine: Arc<MachineState>,
    /// What the host is like.
    pub context: Arc<Context>,
    /// How far its clocks are from where they were.
    pub shift: ClockShift,
    /// Whether the vCPU has the state's CPUID already.
    pub same_cpuid: bool,
    /// What of it the vCPU has.
    pub has: Has,
}

/// What a vCPU has of a state that it is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Has {
    /// Nothing, and it is new.
    Nothing,
    /// Another one: it has run, or was prepared for that.
    Another,
    /// All that does not go with time ([`VcpuHandle::prepare`]).
    Prepared,
}

/// All that a vCPU thread works with.
pub struct Vcpu {
    /// Index from 0; 0 is the boot processor.
    pub index: u16,
    /// The KVM vCPU.
    pub fd: VcpuFd,
    /// What its exits reach.
    pub reach: Reach,
    /// For reports only.
    pub memory: GuestMemory,
    /// Memory of devices.
    pub slots: DeviceSlots,
    /// What this vCPU knows of them.
    pub seen: Seen,
    /// Where the end of the VM is announced.
    pub exit: Arc<ExitLatch>,
    /// Its exits so far.
    pub counts: Arc<ExitCounts>,
}

/// Processor time of a thread that is not joined.
fn thread_cpu_time(thread: libc::pthread_t) -> Duration {
    let mut clock = 0;
    // SAFETY: the thread is not joined, so its id is valid; the clock's id is written to a local.
    let result = unsafe { libc::pthread_getcpuclockid(thread, &mut clock) };
    let time = (result == 0).then(|| clock_gettime(ClockId::from_raw(clock)));
    time.and_then(Result::ok)
        .map_or(Duration::ZERO, Duration::from)
}

/// What a vCPU thread is told.
#[derive(Debug)]
pub enum Command {
    /// Leave the parked state; reach these devices from now on.
    Run(Option<Reach>),
    /// Say when parked.
    Pause(SyncSender<()>),
    /// Say how the vCPU is.
    Save(Arc<Context>, SyncSender<Result<VcpuState, StateError>>),
    /// Take what does not go with time of a saved state.
    Prepare(
        Arc<MachineState>,
        Arc<Context>,
        SyncSender<Result<(), StateError>>,
    ),
    /// Take a saved state.
    Give(Box<Given>, SyncSender<Result<(), StateError>>),
    /// End the thread.
    Stop,
}

/// A vCPU that is on its way to be parked.
#[must_use]
pub struct Pausing<'a> {
    vcpu: &'a VcpuHandle,
    parked: Receiver<()>,
}

impl Pausing<'_> {
    /// Waits until the vCPU is parked, but not beyond `deadline`; says whether it is. One that has
    /// ended counts as parked.
    pub fn wait(self, deadline: Instant) -> bool {
        loop {
            match self.parked.recv_timeout(RETRY_PAUSE) {
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) if Instant::now() > deadline => return false,
                Err(RecvTimeoutError::Timeout) => self.vcpu.kick(),
            }
        }
    }
}

/// A running or parked vCPU thread. Dropping it stops and joins the thread.
pub struct VcpuHandle {
    commands: Sender<Command>,
    flags: Arc<Flags>,
    counts: Arc<ExitCounts>,
    /// Devices that the thread gets to know of when it runs next.
    reach: Mutex<Option<Reach>>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Starts the thread of `vcpu`, parked.
    pub fn spawn(vcpu: Vcpu) -> Result<Self, ThreadError> {
        kick::install_handler();
        let (commands, receiver) = channel();
        let flags = Arc::new(Flags::default());
        let shared = flags.clone();
        let counts = vcpu.counts.clone();
        let role = Role::Vcpu(vcpu.index);
        let thread = spawn(role, move || thread::parked(vcpu, &receiver, &shared))?;
        Ok(Self {
            commands,
            flags,
            counts,
            reach: Mutex::default(),
            thread: Some(thread),
        })
    }

    /// Its exits so far.
    pub fn counts(&self) -> &ExitCounts {
        &self.counts
    }

    /// Processor time of its thread, guest and host; none where it has ended.
    pub fn cpu_time(&self) -> Duration {
        let thread = self.thread.as_ref().filter(|thread| !thread.is_finished());
        let thread = thread.map(JoinHandleExt::as_pthread_t);
        thread.map_or(Duration::ZERO, thread_cpu_time)
    }

    /// Lets the vCPU run.
    pub fn run(&self) {
        let reach = self.reach.lock();
        let reach = reach.unwrap_or_else(PoisonError::into_inner).take();
        self.send(Command::Run(reach));
    }

    /// Sends a command. A thread that has ended does not listen, which is no error.
    fn send(&self, command: Command) {
        if let Err(SendError(command)) = self.commands.send(command) {
            log::debug!("a vCPU that has ended was told {command:?}");
        }
    }

    /// Asks the vCPU to leave the guest and park; the answer waits for that.
    pub fn request_pause(&self) -> Pausing<'_> {
        let (reply, parked) = sync_channel(1);
        let tell = || self.send(Command::Pause(reply));
        self.flags.ask_to_pause(tell, || self.kick());
        Pausing { vcpu: self, parked }
    }

    /// The state of the vCPU, which is parked; `None`: it has ended.
    pub fn save(&self, context: &Arc<Context>) -> Option<Result<VcpuState, StateError>> {
        let (reply, state) = sync_channel(1);
        self.send(Command::Save(context.clone(), reply));
        state.recv().ok()
    }

    /// Gives the vCPU, which is parked and new, what does not go with time of its state of `machine`, whose
    /// memory is in place, and has KVM do what it does before the first instruction.
    pub fn prepare(
        &self,
        machine: &Arc<MachineState>,
        context: &Arc<Context>,
    ) -> Receiver<Result<(), StateError>> {
        let (reply, answer) = sync_channel(1);
        self.send(Command::Prepare(machine.clone(), context.clone(), reply));
        answer
    }

    /// Gives the vCPU, which is parked, its state of `given`; the answer says whether it has it.
    pub fn give(&self, given: Given) -> Receiver<Result<(), StateError>> {
        let (reply, answer) = sync_channel(1);
        self.send(Command::Give(Box::new(given), reply));
        answer
    }

    /// Has the vCPU, which is parked, reach these devices when it runs. It is not woken for that.
    pub fn reach(&self, reach: Reach) {
        let kept = self.reach.lock();
        *kept.unwrap_or_else(PoisonError::into_inner) = Some(reach);
    }

    /// Asks the thread to end and gets it out of KVM_RUN; does not wait.
    pub fn request_stop(&self) {
        let tell = || self.send(Command::Stop);
        self.flags.ask_to_stop(tell, || self.kick());
    }

    fn kick(&self) {
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
        self.flags.ask_to_stop(|| self.send(Command::Stop), || {});
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
