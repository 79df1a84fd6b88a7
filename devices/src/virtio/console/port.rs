//! One port: its queues' data and how far its driver is.
//!
//! A chain that the host does not take at once is held back, one per port, so that only its writer
//! waits. Linux's hvc waits for its output on the CPU, so a console's reader that stands still for
//! too long loses what comes until it reads again.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::end::{Got, PortEnd};
use crate::virtio::device::DeviceError;
use crate::virtio::io::{Chain, Io, total};
use crate::virtio::poll::Poller;

/// What a port is.
#[derive(Debug)]
pub struct PortOptions {
    /// Name the guest finds the port by; empty for none.
    pub name: String,
    /// The guest makes it a console (hvc).
    pub console: bool,
    /// The host's side.
    pub end: PortEnd,
    /// Bytes of output that wait for file descriptors before the guest has to.
    pub buffer: usize,
    /// How long a full buffer may make the guest wait before its output is dropped; `None` for as
    /// long as it takes.
    pub patience: Option<Duration>,
}

impl PortOptions {
    /// A console: a buffer of 256 KiB, and a second's patience.
    pub fn console(end: PortEnd) -> Self {
        Self {
            name: String::new(),
            console: true,
            end,
            buffer: 256 << 10,
            patience: Some(Duration::from_secs(1)),
        }
    }

    /// A named port: a buffer of 64 KiB, and endless patience.
    pub fn named(name: &str, end: PortEnd) -> Self {
        Self {
            name: name.to_owned(),
            console: false,
            end,
            buffer: 64 << 10,
            patience: None,
        }
    }
}

/// What is saved of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The VMM took the port away.
    pub removed: bool,
    /// The driver has the port.
    pub ready: bool,
    /// A program of the guest has it open.
    pub open: bool,
    /// The driver was told that the host has it open.
    pub host_open: bool,
    /// Control messages that the driver has to get, one bit each.
    pub pending: u8,
    /// Bytes of the next chain of output that the host has already.
    pub sent: u64,
}

/// A port of the device.
#[derive(Debug)]
pub(super) struct Port {
    pub name: String,
    pub console: bool,
    pub end: PortEnd,
    pub state: PortState,
    buffer: usize,
    patience: Option<Duration>,
    held: Option<Chain>,
    /// Since when the held chain makes no progress.
    since: Option<Instant>,
    lost: Arc<AtomicU64>,
}

impl Port {
    pub fn new(options: PortOptions, lost: Arc<AtomicU64>, state: PortState) -> Self {
        Self {
            name: options.name,
            console: options.console,
            end: options.end,
            buffer: options.buffer,
            patience: options.patience,
            state,
            held: None,
            since: None,
            lost,
        }
    }

    /// The driver forgets the device.
    pub fn reset(&mut self) {
        self.state = PortState {
            removed: self.state.removed,
            ..PortState::default()
        };
        self.held = None;
        self.since = None;
    }

    /// Moves bytes from the guest's queue to the host.
    pub fn transmit(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        loop {
            let chain = match self.held.take() {
                Some(chain) => chain,
                None => match io.pop(queue)? {
                    Some(chain) => chain,
                    None => return Ok(()),
                },
            };
            let len = total(chain.readable());
            let sent = self.state.sent.min(len);
            let count = self
                .end
                .push(io.ram(), chain.readable(), sent, self.buffer)?;
            let left = len - sent - count.min(len - sent);
            if count > 0 {
                self.since = None;
            }
            if left > 0 && !self.gives_up() {
                self.state.sent = len - left;
                self.held = Some(chain);
                return Ok(());
            }
            self.lost.fetch_add(left, Ordering::Relaxed);
            self.state.sent = 0;
            io.complete(chain, 0)?;
        }
    }

    /// Whether the reader stood still for too long.
    fn gives_up(&mut self) -> bool {
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        self.patience
            .is_some_and(|patience| now.saturating_duration_since(since) >= patience)
    }

    /// When the held chain is given up.
    pub fn deadline(&self) -> Option<Instant> {
        self.held.as_ref()?;
        self.since?.checked_add(self.patience?)
    }

    /// Moves bytes from the host to the guest's buffers. `open` for a driver that knows no
    /// ports, which has this one open always.
    pub fn receive(
        &mut self,
        queue: usize,
        open: bool,
        io: &mut Io<'_>,
    ) -> Result<(), DeviceError> {
        while self.state.open || open {
            let Some(chain) = io.pop(queue)? else {
                return Ok(());
            };
            if total(chain.writable()) == 0 {
                io.complete(chain, 0)?;
                continue;
            }
            match self.end.fill(io.ram(), chain.writable())? {
                Got::Bytes(count) => io.complete(chain, count)?,
                Got::Wait | Got::End => {
                    io.unpop(chain);
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Accepts the next client, once the driver knows that the last is gone; says whether it did.
    pub fn accept(&mut self, poller: &Poller, token: u64) -> bool {
        let told = !self.state.ready || !self.state.host_open;
        told && self.end.accept(poller, token)
    }

    /// Another host end, and no wait for the old one.
    pub fn replace(&mut self, end: PortEnd) {
        let left = self.end.abandon();
        self.lost.fetch_add(left, Ordering::Relaxed);
        self.end = end;
        self.since = None;
    }

    /// The output's event came.
    pub fn output_ready(&mut self, hung_up: bool) {
        if self.end.output_ready(hung_up) {
            self.since = None;
        }
    }

    /// Gives the queue its chain back; what the host has of it is remembered.
    pub fn release(&mut self, io: &mut Io<'_>) {
        if let Some(chain) = self.held.take() {
            io.unpop(chain);
        }
        self.since = None;
    }
}
