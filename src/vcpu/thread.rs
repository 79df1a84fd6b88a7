//! A vCPU thread. A state is a function: `parked` ⇄ `running` → the thread's end.

use std::sync::mpsc::Receiver;

use arch::state::{StateError, VcpuState};

use super::exit::{Handled, complete, handle, tell_clock};
use super::handle::{Command, Flags, Given, Vcpu};
use super::kick::Registration;
use crate::vm::VmExit;

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
    while let Ok(command) = commands.recv() {
        match command {
            Command::Run => match running(&mut vcpu, flags) {
                Left::Asked => {}
                Left::Ended => return,
            },
            Command::Pause(reply) => {
                flags.paused();
                // Nobody waits any more where the answer came too late.
                let _ = reply.send(());
            }
            Command::Save(context, reply) => {
                let state = VcpuState::save(&vcpu.fd, vcpu.index, &context);
                let _ = reply.send(state);
            }
            Command::Give(given, reply) => {
                let _ = reply.send(take(&vcpu, &given));
            }
            Command::Reach(reach) => vcpu.reach = reach,
            Command::Stop => return,
        }
    }
}

/// Takes the vCPU's part of a saved machine.
fn take(vcpu: &Vcpu, given: &Given) -> Result<(), StateError> {
    let state = given.machine.vcpus.get(usize::from(vcpu.index));
    let state = state.ok_or(StateError::NoVcpu { vcpu: vcpu.index })?;
    if !given.same_cpuid {
        state.set_cpuid(&vcpu.fd)?;
    }
    let (context, shift) = (&given.context, &given.shift);
    match given.ran {
        true => state.reset_registers(&vcpu.fd, context, shift)?,
        false => state.restore_registers(&vcpu.fd, context, shift)?,
    }
    tell_clock(vcpu);
    Ok(())
}

/// Runs the guest until it ends or is asked to leave.
fn running(vcpu: &mut Vcpu, flags: &Flags) -> Left {
    while !flags.leave() {
        match handle(vcpu) {
            Handled::Continue | Handled::Interrupted => {}
            Handled::End(exit) => return ended(vcpu, exit),
        }
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
