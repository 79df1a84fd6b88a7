//! A 16550A UART: vm-superio's model, made safe to share and never losing input.
//!
//! Registers run on vCPU threads, [`Serial::input`] on the thread that reads the host side. One
//! private mutex; `out` is written under it and may block, which holds the guest but never the
//! thread that gives input. `drained` is called after the mutex is released.
//!
//! Input is only taken while the guest listens: with the receive interrupt enabled, or polling
//! the line status. A driver that opens a port throws away what is in the receiver, so bytes
//! given earlier would be lost.

use std::convert::Infallible;
use std::io::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::SerialEvents;

use crate::bus::{BusDevice, Effect};
use crate::counters::{Counter, Values};
use crate::irq::Interrupt;
use crate::lock;

/// Ports a UART takes.
pub const LEN: u64 = 8;
/// Bytes the receiver holds.
pub const FIFO_SIZE: usize = 64;

const IER: u8 = 1;
const LCR: u8 = 3;
const MCR: u8 = 4;
const LSR: u8 = 5;
const IER_RECEIVED: u8 = 1 << 0;
const LCR_DLAB: u8 = 1 << 7;
const MCR_LOOP: u8 = 1 << 4;
/// So many reads of the line status in a row are a guest that waits for input by polling; a
/// transmitter is always ready here, so nobody polls for that.
const POLLING: u8 = 8;

/// A saved UART that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SerialError {
    /// More input than the receiver holds.
    #[error("saved UART has {len} bytes of input, the receiver holds {FIFO_SIZE}")]
    InputTooLong {
        /// Bytes in the saved state.
        len: usize,
    },
}

/// The registers as plain data; the default is the state after reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Input the guest has not read yet, at most [`FIFO_SIZE`] bytes.
    pub input: Vec<u8>,
}

impl Default for SerialState {
    fn default() -> Self {
        vm_superio::SerialState::default().into()
    }
}

impl From<vm_superio::SerialState> for SerialState {
    fn from(s: vm_superio::SerialState) -> Self {
        Self {
            divisor_low: s.baud_divisor_low,
            divisor_high: s.baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input: s.in_buffer,
        }
    }
}

impl From<SerialState> for vm_superio::SerialState {
    fn from(s: SerialState) -> Self {
        Self {
            baud_divisor_low: s.divisor_low,
            baud_divisor_high: s.divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.input,
        }
    }
}

/// The interrupt, which is not there while a saved UART is made: it was raised before.
#[derive(Clone, Default)]
struct Line(Arc<OnceLock<Arc<dyn Interrupt>>>);

impl vm_superio::Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        if let Some(interrupt) = self.0.get() {
            interrupt.signal();
        }
        Ok(())
    }
}

/// Counts bytes.
#[derive(Clone, Default)]
struct Counts(Arc<Counters>);

/// Bytes that the guest read and wrote, and those that `out` refused.
#[derive(Default)]
struct Counters {
    read: Counter,
    written: Counter,
    lost: Counter,
}

impl SerialEvents for Counts {
    fn buffer_read(&self) {
        self.0.read.one();
    }
    fn out_byte(&self) {
        self.0.written.one();
    }
    fn tx_lost_byte(&self) {
        self.0.lost.one();
    }
    fn in_buffer_empty(&self) {}
}

struct Inner {
    uart: vm_superio::Serial<Line, Counts, Box<dyn Write + Send>>,
    /// The host has input that was not taken.
    waiting: bool,
    /// Reads of the line status in a row, up to [`POLLING`].
    polls: u8,
}

impl Inner {
    // None of these three registers changes by being read.
    fn listening(&mut self) -> bool {
        let data_mode = self.uart.read(LCR) & LCR_DLAB == 0 && self.uart.read(MCR) & MCR_LOOP == 0;
        data_mode && (self.polls >= POLLING || self.uart.read(IER) & IER_RECEIVED != 0)
    }

    fn note_access(&mut self, status_read: bool) {
        self.polls = match status_read {
            true => self.polls.saturating_add(1).min(POLLING),
            // A polling reader fetches the data between two looks at the status.
            false if self.polls >= POLLING => POLLING,
            false => 0,
        };
    }

    /// Whether the host must be told now that there is room.
    fn take_drained(&mut self) -> bool {
        let drained = self.waiting && self.uart.fifo_capacity() == FIFO_SIZE && self.listening();
        self.waiting &= !drained;
        drained
    }
}

/// A 16550A UART of eight ports.
pub struct Serial {
    inner: Mutex<Inner>,
    /// Input was offered while a vCPU held the mutex.
    refused: AtomicBool,
    drained: Box<dyn Fn() + Send + Sync>,
    counts: Counts,
}

impl Serial {
    /// A UART that raises `interrupt` and sends the guest's output to `out`.
    ///
    /// `drained` is called, on a vCPU's thread, when [`Serial::input`] took less than it was given
    /// and the guest has since made room: give the rest then. It must not block.
    ///
    /// # Errors
    /// [`SerialError::InputTooLong`] if `state` holds more input than a UART can.
    pub fn new(
        interrupt: Arc<dyn Interrupt>,
        out: Box<dyn Write + Send>,
        drained: Box<dyn Fn() + Send + Sync>,
        state: SerialState,
    ) -> Result<Self, SerialError> {
        let counts = Counts::default();
        let len = state.input.len();
        let line = Line::default();
        let uart = vm_superio::Serial::from_state(&state.into(), line.clone(), counts.clone(), out)
            .map_err(|_| SerialError::InputTooLong { len })?;
        line.0.get_or_init(|| interrupt);
        let inner = Inner {
            uart,
            waiting: false,
            polls: 0,
        };
        Ok(Self {
            inner: Mutex::new(inner),
            refused: AtomicBool::new(false),
            drained,
            counts,
        })
    }

    /// Has these registers and this input, without an interrupt. What the host has of output stays.
    ///
    /// # Errors
    /// As [`new`](Self::new); nothing is changed.
    pub fn restore(&self, state: SerialState) -> Result<(), SerialError> {
        let len = state.input.len();
        if len > FIFO_SIZE {
            return Err(SerialError::InputTooLong { len });
        }
        let mut inner = lock(&self.inner);
        let interrupt = inner.uart.interrupt_evt().0.get().cloned();
        let out = std::mem::replace(inner.uart.writer_mut(), Box::new(std::io::sink()));
        let line = Line::default();
        let counts = self.counts.clone();
        let uart = vm_superio::Serial::from_state(&state.into(), line.clone(), counts, out);
        inner.uart = uart.map_err(|_| SerialError::InputTooLong { len })?;
        if let Some(interrupt) = interrupt {
            line.0.get_or_init(|| interrupt);
        }
        inner.polls = 0;
        Ok(())
    }

    /// The registers and the unread input as they are.
    pub fn save(&self) -> SerialState {
        lock(&self.inner).uart.state().into()
    }

    /// Queues input for the guest; returns how many of the `bytes` were taken, from the first on.
    /// The rest stays the caller's, to be given again when `drained` is called. Never blocks: while
    /// a vCPU is at the registers, perhaps held up by `out`, nothing is taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        // Set before the attempt, so that a vCPU that lets go meanwhile sees it.
        self.refused.store(true, Ordering::SeqCst);
        let mut inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return 0,
        };
        self.refused.store(false, Ordering::SeqCst);
        let taken = if inner.listening() {
            inner.uart.enqueue_raw_bytes(bytes).unwrap_or(0)
        } else {
            0
        };
        inner.waiting = taken < bytes.len();
        taken
    }

    /// Output bytes that `out` refused; the guest is never told.
    pub fn lost_output(&self) -> u64 {
        self.counts.0.lost.get()
    }

    /// Bytes since it was made.
    pub fn counters(&self) -> Values {
        let Counters {
            read,
            written,
            lost,
        } = &*self.counts.0;
        vec![
            ("read_count", read.get()),
            ("write_count", written.get()),
            ("missed_write_count", lost.get()),
            ("error_count", lost.get()),
        ]
    }

    fn access<R>(&self, access: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = lock(&self.inner);
        let result = access(&mut inner);
        let drained = inner.take_drained();
        drop(inner);
        if self.refused.swap(false, Ordering::SeqCst) || drained {
            (self.drained)();
        }
        result
    }
}

fn register(offset: u64) -> Option<u8> {
    u8::try_from(offset).ok().filter(|r| u64::from(*r) < LEN)
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|inner| {
            super::read_bytes(offset, data, |offset| match register(offset) {
                Some(register) => {
                    inner.note_access(register == LSR);
                    inner.uart.read(register)
                }
                None => 0xff,
            });
        });
    }

    fn write(&self, offset: u64, data: &[u8]) -> Effect {
        self.access(|inner| {
            super::write_bytes(offset, data, |offset, value| {
                if let Some(register) = register(offset) {
                    inner.note_access(false);
                    if register == IER {
                        // A driver takes over: no more polling.
                        inner.polls = 0;
                    }
                    // The only error is a byte that `out` refused, which `Counts` has counted.
                    let _ = inner.uart.write(register, value);
                }
                Effect::None
            })
        })
    }
}

#[cfg(test)]
#[path = "serial_tests.rs"]
mod tests;
