//! How the guest goes down: ctrl-alt-del, the ACPI power button, and the last system call.

use agent_protocol::Power;
use rustix::fd::OwnedFd;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::system::{RebootCommand, reboot};

use crate::sys;

/// Key code of the power button.
const KEY_POWER: usize = 116;
/// Input devices that are looked at: /dev/input/event0 and so on.
const MAX_DEVICES: u8 = 32;
/// Power buttons that are listened to.
pub const MAX_BUTTONS: usize = 4;
/// `struct input_event` on 64-bit machines.
const EVENT: usize = 24;

/// Has the kernel send SIGINT to init for ctrl-alt-del instead of restarting at once.
pub fn take_ctrl_alt_del() {
    let _ = reboot(RebootCommand::CadOff);
}

/// Ends the guest.
pub fn end(power: Power) -> ! {
    rustix::fs::sync();
    let _ = reboot(match power {
        // A halted guest would keep its memory and its host process for nothing.
        Power::Off | Power::Halt => RebootCommand::PowerOff,
        Power::Reboot => RebootCommand::Restart,
    });
    // Only if the kernel refuses: the end of init is a panic, which the host notices.
    sys::exit(125)
}

/// The power buttons of the machine.
pub struct Buttons([Option<OwnedFd>; MAX_BUTTONS]);

impl Buttons {
    /// No buttons.
    pub fn none() -> Self {
        Self([const { None }; MAX_BUTTONS])
    }

    /// Every input device that has the power key.
    pub fn open() -> Self {
        let mut buttons = Self::none();
        let mut free = buttons.0.iter_mut();
        for n in 0..MAX_DEVICES {
            let Some(device) = open_device(n) else {
                continue;
            };
            let Some(slot) = free.next() else { break };
            *slot = Some(device);
        }
        buttons
    }

    /// There is at least one.
    pub fn any(&self) -> bool {
        self.0.iter().any(Option::is_some)
    }

    /// The files to wait on.
    pub fn files(&self) -> &[Option<OwnedFd>; MAX_BUTTONS] {
        &self.0
    }

    /// Reads the events of one button: was it pressed? A device that is gone is let go.
    pub fn was_pressed(&mut self, index: usize) -> bool {
        let Some(slot) = self.0.get_mut(index) else {
            return false;
        };
        let Some(file) = slot else { return false };
        let mut events = [0; 16 * EVENT];
        match rustix::io::read(file, &mut events) {
            Ok(n) => {
                // After the time: type (EV_KEY), code, value (1 is pressed).
                let pressed = [1, 0, KEY_POWER as u8, 0, 1, 0, 0, 0];
                events[..n]
                    .chunks_exact(EVENT)
                    .any(|event| event[16..] == pressed)
            }
            Err(Errno::AGAIN | Errno::INTR) => false,
            Err(_) => {
                *slot = None;
                false
            }
        }
    }
}

fn open_device(n: u8) -> Option<OwnedFd> {
    use core::fmt::Write;
    let mut path = crate::text::Text::<32>::new();
    let _ = write!(path, "/dev/input/event{n}");
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = rustix::fs::open(path.as_str(), flags, Mode::empty()).ok()?;
    let keys = sys::input_keys(&file).ok()?;
    (keys[KEY_POWER / 8] & (1 << (KEY_POWER % 8)) != 0).then_some(file)
}
