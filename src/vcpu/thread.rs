//! A vCPU thread. A state is a function: `parked` ⇄ `running` → the thread's end.

use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use arch::state::{Context, StateError, VcpuState};

use super::exit::{Handled, complete, handle, tell_clock};
use super::flags::Flags;
use super::handle::{Command, Given, Has, Vcpu};
use super::kick::Registration;
use super::warm;
use crate::snapshot::MachineState;
use crate::vm::VmExit;

/// How long a vCPU that has got its state is awake for the command to run.
const SOON: Duration = Duration::from_micros(200);

/// Why a vCPU no longer runs.
enum Left {
    /// Told to; it may go on.
    Asked,
    /// The VM ended.
    Ended,
}

/// Waits for commands.
pub fn parked(mut vcpu: Vcpu, commands: &Receiver<Command>, flags: &Flags) {
    let _registration = Registration::new(&mut vcpu.fd);
    let mut soon = false;
    while let Some(command) = next(commands, soon) {
        // Those that are started with it get their own wake-ups.
        soon = vcpu.index == 0 && matches!(command, Command::Give(..));
        match command {
            Command::Run(reach) => {
                if let Some(reach) = reach {
                    vcpu.reach = reach;
                }
                match running(&mut vcpu, flags) {
                    Left::Asked => {}
                    Left::Ended => return,
                }
            }
            Command::Pause(reply) => {
                // Nobody waits any more where the answer came too late.
                flags.paused(|| reply.send(()).unwrap_or_default());
            }
            Command::Save(context, reply) => {
                let state = VcpuState::save(&vcpu.fd, vcpu.index, &context);
                let _ = reply.send(state);
            }
            Command::Prepare(machine, context, reply) => {
                let _ = reply.send(prepare(&mut vcpu, &machine, &context));
            }
            Command::Give(given, reply) => {
                let _ = reply.send(take(&vcpu, &given));
            }
            Command::Stop => return,
        }
    }
}

/// The next command; `None`: there come no more. One that comes `soon` is waited for awake: to sleep and be woken
/// takes longer than whoever sends it, unless the processor is needed otherwise.
fn next(commands: &Receiver<Command>, soon: bool) -> Option<Command> {
    let begin = Instant::now();
    while soon && begin.elapsed() < SOON {
        match commands.try_recv() {
            Ok(command) => return Some(command),
            Err(TryRecvError::Disconnected) => return None,
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    commands.recv().ok()
}

/// Takes what does not go with time of the vCPU's part of a saved machine.
fn prepare(vcpu: &mut Vcpu, machine: &MachineState, context: &Context) -> Result<(), StateError> {
    let state = machine.vcpus.get(usize::from(vcpu.index));
    let state = state.ok_or(StateError::NoVcpu { vcpu: vcpu.index })?;
    state.prepare(&vcpu.fd, context)?;
    // Without it, its first entry takes longer.
    if let Err(error) = warm::enter(vcpu) {
        log::debug!("vCPU {} is not entered beforehand: {error}", vcpu.index);
    }
    Ok(())
}

/// Takes the vCPU's part of a saved machine.
fn take(vcpu: &Vcpu, given: &Given) -> Result<(), StateError> {
    let state = given.machine.vcpus.get(usize::from(vcpu.index));
    let state = state.ok_or(StateError::NoVcpu { vcpu: vcpu.index })?;
    if !given.same_cpuid {
        state.set_cpuid(&vcpu.fd)?;
    }
    let (context, shift) = (&given.context, &given.shift);
    match given.has {
        Has::Nothing => state.restore_registers(&vcpu.fd, context, shift)?,
        Has::Another => state.reset_registers(&vcpu.fd, context, shift)?,
        Has::Prepared => state.start_clocks(&vcpu.fd, context, shift)?,
    }
    tell_clock(vcpu);
    Ok(())
}

/// Runs the guest until it ends or is asked to leave.
fn running(vcpu: &mut Vcpu, flags: &Flags) -> Left {
    let mut first = true;
    let end = flags.until_asked(|| {
        let handled = handle(vcpu);
        if std::mem::take(&mut first) {
            vcpu.counts.ran();
        }
        match handled {
            Handled::Continue | Handled::Interrupted => None,
            Handled::End(exit) => Some(exit),
        }
    });
    if let Some(exit) = end {
        return ended(vcpu, exit);
    }
    match flags.pausing().then(|| complete(vcpu)).flatten() {
        Some(exit) => ended(vcpu, exit),
        None => Left::Asked,
    }
}

fn ended(vcpu: &Vcpu, exit: VmExit) -> Left {
    vcpu.exit.set(exit);
    Left::Ended
}
