//! A vCPU thread. A state is a function: `parked` → `running` → the thread's end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;

use super::exit::{Handled, handle};
use super::handle::{Command, Vcpu};
use super::kick::Registration;

/// Waits for a command.
pub fn parked(mut vcpu: Vcpu, commands: &Receiver<Command>, stop: &AtomicBool) {
    let _registration = Registration::new(&mut vcpu.fd);
    if let Ok(Command::Run) = commands.recv() {
        running(&mut vcpu, stop);
    }
}

/// Runs the guest until it ends or `stop` is set.
fn running(vcpu: &mut Vcpu, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        match handle(vcpu) {
            Handled::Continue => {}
            Handled::End(exit) => {
                vcpu.exit.set(exit);
                return;
            }
        }
    }
}
