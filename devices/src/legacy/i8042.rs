//! The i8042 keyboard controller, with a keyboard and no mouse.
//!
//! It answers what Linux's `i8042` and `atkbd` ask (controller commands and the keyboard's own),
//! at once, so that neither driver waits. The mouse port is answered as absent. Registers run on
//! vCPU threads, [`I8042::ctrl_alt_del`] on the vmm thread; one private mutex, released before the
//! interrupt is raised. All queues are bounded: what does not fit is dropped, as by the hardware.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use super::keyboard::{Keyboard, KeyboardState};
use crate::bus::{BusDevice, Effect, ExitReason};
use crate::counters::{Counter, Values};
use crate::irq::Interrupt;
use crate::lock;

/// First port of the controller.
pub const PORT: u64 = 0x60;
/// Ports to claim: data at offset 0, status and command at offset 4, the rest reads as ones.
pub const LEN: u64 = 5;

const DATA: u64 = 0;
/// System control port B of a PC, among the controller's ports. It has the reasons of non-maskable
/// interrupts (none), and the output of timer 2, which is high: some guests wait for that.
const SYSTEM_CONTROL_B: u64 = 1;
const TIMER_2_OUTPUT: u8 = 1 << 5;
const COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_AUX_DATA: u8 = 1 << 5;

const MODE_KEYBOARD_INTERRUPT: u8 = 1 << 0;
const MODE_SYSTEM: u8 = 1 << 2;
const MODE_KEYBOARD_OFF: u8 = 1 << 4;
const MODE_AUX_OFF: u8 = 1 << 5;
const MODE_TRANSLATE: u8 = 1 << 6;

const OUTPUT_PORT_NO_RESET: u8 = 1 << 0;
const OUTPUT_PORT_A20: u8 = 1 << 1;

/// Controller replies that wait for the guest. Below Linux's 16, at which it gives the controller
/// up as broken.
const MAX_REPLIES: usize = 8;

/// Sources of a byte in the output buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// The byte.
    pub byte: u8,
    /// Whether it is marked as coming from the mouse port.
    pub aux: bool,
}

/// The controller and its keyboard as plain data; the default is the state after reset: translation
/// on, keyboard interface and interrupt off until a driver turns them on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// The command byte.
    pub mode: u8,
    /// The output port: bit 0 "not reset", bit 1 the A20 gate, which has no effect.
    pub output_port: u8,
    /// A controller command that waits for its data byte.
    pub pending: Option<u8>,
    /// Whether the last write was to the command register.
    pub last_was_command: bool,
    /// The output buffer while full.
    pub output: Option<Output>,
    /// What the data register holds while the output buffer is empty.
    pub last_byte: u8,
    /// Replies of the controller not yet in the output buffer.
    pub replies: VecDeque<Output>,
    /// The keyboard.
    pub keyboard: KeyboardState,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            mode: MODE_SYSTEM | MODE_KEYBOARD_OFF | MODE_AUX_OFF | MODE_TRANSLATE,
            output_port: OUTPUT_PORT_NO_RESET | OUTPUT_PORT_A20,
            pending: None,
            last_was_command: false,
            output: None,
            last_byte: 0,
            replies: VecDeque::new(),
            keyboard: KeyboardState::default(),
        }
    }
}

/// The registers and the keyboard; `raise` collects whether the interrupt is due.
struct Controller {
    mode: u8,
    output_port: u8,
    pending: Option<u8>,
    last_was_command: bool,
    output: Option<Output>,
    last_byte: u8,
    replies: VecDeque<Output>,
    keyboard: Keyboard,
    raise: bool,
}

impl Controller {
    fn new(mut state: I8042State) -> Self {
        state.replies.truncate(MAX_REPLIES);
        Self {
            mode: state.mode | MODE_AUX_OFF,
            output_port: state.output_port,
            pending: state.pending,
            last_was_command: state.last_was_command,
            output: state.output,
            last_byte: state.last_byte,
            replies: state.replies,
            keyboard: Keyboard::new(state.keyboard),
            raise: false,
        }
    }

    fn save(&self) -> I8042State {
        I8042State {
            mode: self.mode,
            output_port: self.output_port,
            pending: self.pending,
            last_was_command: self.last_was_command,
            output: self.output,
            last_byte: self.last_byte,
            replies: self.replies.clone(),
            keyboard: self.keyboard.save(),
        }
    }

    fn translates(&self) -> bool {
        self.mode & MODE_TRANSLATE != 0
    }

    fn status(&self) -> u8 {
        let output = match self.output {
            Some(Output { aux: true, .. }) => STATUS_OUTPUT_FULL | STATUS_AUX_DATA,
            Some(_) => STATUS_OUTPUT_FULL,
            None => 0,
        };
        let command = if self.last_was_command {
            STATUS_COMMAND
        } else {
            0
        };
        STATUS_UNLOCKED | (self.mode & MODE_SYSTEM & STATUS_SYSTEM) | command | output
    }

    fn reply(&mut self, byte: u8) {
        self.queue(Output { byte, aux: false });
    }

    fn queue(&mut self, output: Output) {
        if self.replies.len() < MAX_REPLIES {
            self.replies.push_back(output);
        }
    }

    /// Moves the next byte into the empty output buffer; an edge for each byte of the keyboard.
    fn fill_output(&mut self) {
        if self.output.is_some() {
            return;
        }
        self.output = self.replies.pop_front().or_else(|| {
            let on = self.mode & MODE_KEYBOARD_OFF == 0;
            let byte = on.then(|| self.keyboard.next())??;
            Some(Output { byte, aux: false })
        });
        self.raise |= self.interrupt_level();
    }

    fn interrupt_level(&self) -> bool {
        let from_keyboard = matches!(self.output, Some(Output { aux: false, .. }));
        from_keyboard && self.mode & MODE_KEYBOARD_INTERRUPT != 0
    }

    fn read_data(&mut self) -> u8 {
        if let Some(output) = self.output.take() {
            self.last_byte = output.byte;
            self.fill_output();
        }
        self.last_byte
    }

    fn set_mode(&mut self, mode: u8) {
        let before = self.interrupt_level();
        self.mode = mode | MODE_AUX_OFF;
        self.raise |= !before && self.interrupt_level();
    }

    fn set_output_port(&mut self, value: u8) -> Effect {
        self.output_port = value | OUTPUT_PORT_NO_RESET;
        if value & OUTPUT_PORT_NO_RESET == 0 {
            return Effect::Exit(ExitReason::Reset);
        }
        Effect::None
    }

    fn write_command(&mut self, command: u8) -> Effect {
        self.last_was_command = true;
        self.pending = None;
        match command {
            0x20 => self.reply(self.mode),
            // Commands with a data byte: mode, output port, loopbacks, mouse.
            0x60 | 0xd1..=0xd4 => self.pending = Some(command),
            // Mouse port off, on: it is not there and stays off.
            0xa7 | 0xa8 => {}
            // Mouse port test: the clock line is stuck.
            0xa9 => self.reply(0x01),
            0xaa => {
                self.mode |= MODE_SYSTEM;
                self.reply(0x55);
            }
            0xab => self.reply(0x00),
            0xad => self.set_mode(self.mode | MODE_KEYBOARD_OFF),
            0xae => self.set_mode(self.mode & !MODE_KEYBOARD_OFF),
            // Input port: not locked.
            0xc0 => self.reply(0x80),
            0xd0 => self.reply(self.output_port),
            0xdd => self.output_port &= !OUTPUT_PORT_A20,
            0xdf => self.output_port |= OUTPUT_PORT_A20,
            0xe0 => self.reply(0x00),
            // Pulse of the output lines whose bit is 0; bit 0 is the reset line.
            0xf0..=0xff if command & 1 == 0 => return Effect::Exit(ExitReason::Reset),
            _ => {}
        }
        Effect::None
    }

    fn write_data(&mut self, value: u8) -> Effect {
        self.last_was_command = false;
        match self.pending.take() {
            Some(0x60) => self.set_mode(value),
            Some(0xd1) => return self.set_output_port(value),
            Some(0xd2) => self.reply(value),
            // Mouse loopback and mouse: the byte does not come back, nobody is there.
            Some(0xd3 | 0xd4) => self.queue(Output {
                byte: 0xfe,
                aux: true,
            }),
            _ => {
                // To talk to the keyboard turns its interface on.
                self.set_mode(self.mode & !MODE_KEYBOARD_OFF);
                self.keyboard.command(value, self.translates());
            }
        }
        Effect::None
    }
}

/// Bytes read and written, those at registers that are none, and resets.
#[derive(Default)]
struct Counters {
    read: Counter,
    missed_read: Counter,
    written: Counter,
    missed_write: Counter,
    resets: Counter,
}

/// The keyboard controller.
pub struct I8042 {
    interrupt: Arc<dyn Interrupt>,
    counters: Counters,
    controller: Mutex<Controller>,
}

impl I8042 {
    /// A controller whose keyboard has the interrupt `interrupt` (IRQ 1).
    ///
    /// Queues longer in `state` than the hardware's are cut.
    pub fn new(interrupt: Arc<dyn Interrupt>, state: I8042State) -> Self {
        Self {
            interrupt,
            counters: Counters::default(),
            controller: Mutex::new(Controller::new(state)),
        }
    }

    /// Has this state, as [`new`](Self::new) takes it, without an interrupt.
    pub fn restore(&self, state: I8042State) {
        *lock(&self.controller) = Controller::new(state);
    }

    /// Accesses since it was made.
    pub fn counters(&self) -> Values {
        let counters = &self.counters;
        let all = [
            ("read_count", &counters.read),
            ("missed_read_count", &counters.missed_read),
            ("write_count", &counters.written),
            ("missed_write_count", &counters.missed_write),
            ("reset_count", &counters.resets),
        ];
        all.map(|(name, counter)| (name, counter.get())).into()
    }

    /// Controller and keyboard as they are.
    pub fn save(&self) -> I8042State {
        lock(&self.controller).save()
    }

    /// Types Ctrl-Alt-Del, press and release. False if no driver listens to the keyboard or it
    /// has not read earlier keys; nothing is typed then.
    pub fn ctrl_alt_del(&self) -> bool {
        self.access(|controller| {
            let listening = controller.mode & (MODE_KEYBOARD_OFF | MODE_KEYBOARD_INTERRUPT)
                == MODE_KEYBOARD_INTERRUPT;
            let translates = controller.translates();
            let typed = listening && controller.keyboard.ctrl_alt_del(translates);
            controller.fill_output();
            typed
        })
    }

    fn access<R>(&self, access: impl FnOnce(&mut Controller) -> R) -> R {
        let mut controller = lock(&self.controller);
        let result = access(&mut controller);
        let raise = std::mem::take(&mut controller.raise);
        drop(controller);
        if raise {
            self.interrupt.signal();
        }
        result
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|controller| {
            super::read_bytes(offset, data, |register| {
                let (counter, byte) = match register {
                    DATA => (&self.counters.read, controller.read_data()),
                    SYSTEM_CONTROL_B => (&self.counters.read, TIMER_2_OUTPUT),
                    COMMAND => (&self.counters.read, controller.status()),
                    _ => (&self.counters.missed_read, 0xff),
                };
                counter.one();
                byte
            });
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        self.access(|controller| {
            super::write_bytes(offset, data, |register, value| {
                let (counter, effect) = match register {
                    DATA => (&self.counters.written, controller.write_data(value)),
                    COMMAND => (&self.counters.written, controller.write_command(value)),
                    _ => (&self.counters.missed_write, Effect::None),
                };
                counter.one();
                if effect == Effect::Exit(ExitReason::Reset) {
                    self.counters.resets.one();
                }
                controller.fill_output();
                effect
            })
        })
    }
}

#[cfg(test)]
#[path = "i8042_tests.rs"]
mod tests;
