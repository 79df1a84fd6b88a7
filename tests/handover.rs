//! The hand-over between a vCPU's thread and who holds it, in every order that there is: src/vcpu/flags.rs as it is, gone
//! through by loom, with a model around it of the thread's commands, of KVM_RUN and of the kick.
//!
//! What is lost, a pause that is not answered or a run that is not begun, is a deadlock here; the repeated kicks of
//! `Pausing::wait` are left out. Templates have nothing of the kind: their counts are those of std's `Arc`.
#![allow(clippy::unwrap_used)]

#[path = "../src/vcpu/flags.rs"]
mod flags;

mod sync {
    pub use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
}

use flags::Flags;
use loom::sync::mpsc::{Receiver, Sender, channel};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

enum Command {
    Run,
    Pause(Sender<()>),
    Stop,
}

/// A guest that never leaves by itself.
#[derive(Default)]
struct Guest {
    /// `immediate_exit`, and how often the guest was entered.
    state: Mutex<(bool, u32)>,
    changed: Condvar,
}

impl Guest {
    /// KVM_RUN.
    fn enter(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        while !state.0 {
            state = self.changed.wait(state).unwrap();
        }
        state.0 = false;
    }

    /// The signal and its handler.
    fn kick(&self) {
        self.state.lock().unwrap().0 = true;
        self.changed.notify_all();
    }

    fn entered(&self) -> u32 {
        self.state.lock().unwrap().1
    }

    fn wait_for_more_than(&self, entered: u32) {
        let mut state = self.state.lock().unwrap();
        while state.1 <= entered {
            state = self.changed.wait(state).unwrap();
        }
    }
}

#[derive(Clone)]
struct Handle {
    flags: Arc<Flags>,
    guest: Arc<Guest>,
    commands: Sender<Command>,
}

impl Handle {
    fn new() -> (Self, thread::JoinHandle<()>) {
        let (commands, receiver) = channel();
        let (flags, guest): (Arc<Flags>, Arc<Guest>) = Default::default();
        let handle = Self {
            flags: flags.clone(),
            guest: guest.clone(),
            commands,
        };
        let vcpu = thread::spawn(move || vcpu(&receiver, &flags, &guest));
        (handle, vcpu)
    }

    /// Has it run, and sees that it does.
    fn run(&self) {
        let entered = self.guest.entered();
        self.commands.send(Command::Run).unwrap();
        self.guest.wait_for_more_than(entered);
    }

    fn pause(&self) {
        let (reply, parked) = channel();
        let tell = || self.commands.send(Command::Pause(reply)).unwrap();
        self.flags.ask_to_pause(tell, || self.guest.kick());
        parked.recv().unwrap();
    }

    fn stop(&self) {
        let tell = || self.commands.send(Command::Stop).unwrap();
        self.flags.ask_to_stop(tell, || self.guest.kick());
    }
}

/// As src/vcpu/thread.rs has it.
fn vcpu(commands: &Receiver<Command>, flags: &Flags, guest: &Guest) {
    loop {
        match commands.recv().unwrap() {
            Command::Run => {
                let end: Option<()> = flags.until_asked(|| {
                    guest.enter();
                    None
                });
                assert_eq!(end, None);
            }
            Command::Pause(reply) => flags.paused(|| reply.send(()).unwrap()),
            Command::Stop => return,
        }
    }
}

fn model(body: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(body);
}

#[test]
fn a_vcpu_parks_goes_on_and_ends_whenever_it_is_told() {
    model(|| {
        let (handle, vcpu) = Handle::new();
        handle.run();
        handle.pause();
        assert!(!handle.flags.pausing());
        let parked = handle.guest.entered();
        handle.run();
        assert!(handle.guest.entered() > parked);
        handle.stop();
        vcpu.join().unwrap();
    });
}

#[test]
fn two_that_pause_at_once_both_hear_of_it() {
    model(|| {
        let (handle, vcpu) = Handle::new();
        handle.commands.send(Command::Run).unwrap();
        let other = handle.clone();
        let pausing = thread::spawn(move || other.pause());
        handle.pause();
        pausing.join().unwrap();
        let parked = handle.guest.entered();
        handle.run();
        assert!(handle.guest.entered() > parked);
        handle.stop();
        vcpu.join().unwrap();
    });
}
