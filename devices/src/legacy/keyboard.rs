//! The AT keyboard behind the i8042: its commands, and the one key press the host makes.
//!
//! Scan code set 2 only, which is what every driver falls back to. Owned by the controller and
//! under its lock; both queues are bounded.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

const ACK: u8 = 0xfa;
const RESEND: u8 = 0xfe;
const SELF_TEST_PASSED: u8 = 0xaa;
const MAX_REPLIES: usize = 8;
const MAX_SCANCODES: usize = 16;

const CTRL_ALT_DEL_SET1: &[u8] = &[0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d];
const CTRL_ALT_DEL_SET2: &[u8] = &[
    0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14,
];

/// The keyboard as plain data; the default is the state after power-on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyboardState {
    /// Whether keys are reported.
    pub scanning: bool,
    /// The lights: bit 0 scroll lock, 1 num lock, 2 caps lock.
    pub leds: u8,
    /// A command that waits for its data byte.
    pub pending: Option<u8>,
    /// Replies to commands, which go before keys.
    pub replies: VecDeque<u8>,
    /// Scan codes not yet read.
    pub scancodes: VecDeque<u8>,
}

impl Default for KeyboardState {
    fn default() -> Self {
        Self {
            scanning: true,
            leds: 0,
            pending: None,
            replies: VecDeque::new(),
            scancodes: VecDeque::new(),
        }
    }
}

pub(super) struct Keyboard(KeyboardState);

impl Keyboard {
    pub(super) fn new(mut state: KeyboardState) -> Self {
        state.replies.truncate(MAX_REPLIES);
        state.scancodes.truncate(MAX_SCANCODES);
        Self(state)
    }

    pub(super) fn save(&self) -> KeyboardState {
        self.0.clone()
    }

    /// The next byte for the controller.
    pub(super) fn next(&mut self) -> Option<u8> {
        let scancode = || self.0.scancodes.pop_front();
        self.0.replies.pop_front().or_else(scancode)
    }

    fn reply(&mut self, bytes: &[u8]) {
        if self.0.replies.len() + bytes.len() <= MAX_REPLIES {
            self.0.replies.extend(bytes);
        }
    }

    fn defaults(&mut self) {
        self.0 = KeyboardState {
            replies: std::mem::take(&mut self.0.replies),
            ..KeyboardState::default()
        };
    }

    /// Takes a byte from the host. `translated`: the controller translates to set 1, also replies.
    pub(super) fn command(&mut self, value: u8, translated: bool) {
        if let Some(command) = self.0.pending.take()
            && value < 0xed
        {
            return self.argument(command, value, translated);
        }
        match value {
            // Lights, scan code set, repeat rate: a data byte follows.
            0xed | 0xf0 | 0xf3 => {
                self.0.pending = Some(value);
                self.reply(&[ACK]);
            }
            0xee => self.reply(&[0xee]),
            0xf2 => self.reply(&[ACK, 0xab, if translated { 0x41 } else { 0x83 }]),
            0xf4 => {
                self.0.scanning = true;
                self.reply(&[ACK]);
            }
            0xf5 => {
                self.defaults();
                self.0.scanning = false;
                self.reply(&[ACK]);
            }
            0xf6 => {
                self.defaults();
                self.reply(&[ACK]);
            }
            0xff => {
                self.0 = KeyboardState::default();
                self.reply(&[ACK, SELF_TEST_PASSED]);
            }
            _ => self.reply(&[RESEND]),
        }
    }

    fn argument(&mut self, command: u8, value: u8, translated: bool) {
        match (command, value) {
            (0xed, _) => {
                self.0.leds = value & 7;
                self.reply(&[ACK]);
            }
            (0xf0, 0) => self.reply(&[ACK, if translated { 0x41 } else { 2 }]),
            (0xf0, 2) | (0xf3, _) => self.reply(&[ACK]),
            _ => self.reply(&[RESEND]),
        }
    }

    /// Types Ctrl-Alt-Del; false if keys are off or earlier ones are unread.
    pub(super) fn ctrl_alt_del(&mut self, translated: bool) -> bool {
        let keys = if translated {
            CTRL_ALT_DEL_SET1
        } else {
            CTRL_ALT_DEL_SET2
        };
        let typed = self.0.scanning && self.0.scancodes.len() + keys.len() <= MAX_SCANCODES;
        if typed {
            self.0.scancodes.extend(keys);
        }
        typed
    }
}
