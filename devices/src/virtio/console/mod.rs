//! Console device (section 5.3) with any number of ports: consoles and named byte streams.
//!
//! The device is owned by its I/O thread. Every port has a host end of its own, bounded buffers,
//! and at most one chain held back, so a slow reader holds up its own port and nothing else. The
//! VMM keeps a [`ConsoleHandle`] for sizes and for connecting ports.

mod control;
mod end;
mod pipe;
mod port;

#[cfg(test)]
pub(super) mod tests;

use std::collections::HashSet;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use self::control::{DEVICE_READY, Message, PORT_ADD, PORT_OPEN, PORT_READY, PORT_REMOVE, RESIZE};
pub use self::end::PortEnd;
pub use self::pipe::HostPort;
use self::port::Port;
pub use self::port::{PortOptions, PortState};
use super::device::{
    ConfigSpace, DeviceError, DeviceState, Source, Traits, VirtioDevice, read_config,
};
use super::io::{Io, read_at, write_at};
use super::poll::{Poller, Ready};
use crate::lock;

/// Most ports of a device.
pub const MAX_PORTS: usize = 32;
/// Longest name of a port, in bytes.
pub const MAX_NAME: usize = 128;
/// Size of the queues.
const QUEUE_SIZE: u16 = 128;

const F_SIZE: u32 = 0;
const F_MULTIPORT: u32 = 1;

const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;

/// Events; each port has a few of its own.
const PORT_EVENTS: u64 = 4;
const WAKE: u64 = u64::MAX;
const TIMER: u64 = u64::MAX - 1;

/// The order of the numbers in a RESIZE message. Text of the specification and drivers disagree,
/// and nothing tells a device which it talks to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SizeOrder {
    /// As Linux reads it up to 6.14.
    #[default]
    RowsFirst,
    /// As section 5.3.6.2 has it, and Linux 6.15.
    ColsFirst,
}

/// What a console device is made of.
#[derive(Debug, Default)]
pub struct ConsoleOptions {
    /// The ports, 1 to [`MAX_PORTS`]. The first is all that a driver without MULTIPORT sees.
    pub ports: Vec<PortOptions>,
    /// Columns and rows of the consoles; zeros if not known.
    pub size: (u16, u16),
    /// For the guest's driver.
    pub order: SizeOrder,
}

/// A console device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// A number of ports that cannot be.
    #[error("a console device of {ports} ports: want 1 to {MAX_PORTS}")]
    Ports {
        /// Wanted number.
        ports: usize,
    },
    /// A name that cannot be a file name in the guest, or that another port has.
    #[error(
        "port name {name:?}: want up to {MAX_NAME} printable ASCII characters without `/`, each name once"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// Not the ports that the saved driver knows.
    #[error(
        "the console device has the ports {now:?}, and had {saved:?} when the machine was saved"
    )]
    Saved {
        /// In the saved state.
        saved: Vec<String>,
        /// As configured.
        now: Vec<String>,
    },
    /// There is no such port.
    #[error("the console device has no port {port}")]
    NoPort {
        /// Its index.
        port: usize,
    },
    /// The host failed.
    #[error("cannot {what} for a console device")]
    Host {
        /// The operation.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What is saved of a console device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleState {
    /// The driver asked for the ports.
    pub ready: bool,
    /// The ports with their names; none for reset.
    pub ports: Vec<(String, PortState)>,
}

/// What the VMM wants of a port.
#[derive(Debug)]
enum Change {
    Connect(PortEnd),
    Remove,
}

/// What other threads see of the device.
#[derive(Debug)]
struct Shared {
    ports: u32,
    /// Columns, and rows in the upper half.
    size: AtomicU32,
    resized: AtomicBool,
    generation: AtomicU32,
    changes: Mutex<Vec<Option<Change>>>,
    lost: Vec<Arc<AtomicU64>>,
    wake: EventFd,
}

impl Shared {
    fn size(&self) -> (u16, u16) {
        let size = self.size.load(Ordering::SeqCst);
        (size as u16, (size >> 16) as u16)
    }

    fn wake(&self) -> Result<(), ConsoleError> {
        self.wake.write(1).map_err(host("wake the I/O thread"))
    }
}

impl ConfigSpace for Shared {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // cols, rows, max_nr_ports, emerg_wr (section 5.3.4).
        let size = self.size.load(Ordering::SeqCst).to_le_bytes();
        let space = [size, self.ports.to_le_bytes(), [0; 4]].concat();
        read_config(&space, offset, data);
    }

    fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }
}

/// The side of a console device that the VMM keeps.
#[derive(Clone, Debug)]
pub struct ConsoleHandle(Arc<Shared>);

impl ConsoleHandle {
    /// Tells the guest the size of its consoles.
    pub fn resize(&self, cols: u16, rows: u16) -> Result<(), ConsoleError> {
        let size = u32::from(cols) | u32::from(rows) << 16;
        if self.0.size.swap(size, Ordering::SeqCst) == size {
            return Ok(());
        }
        self.0.generation.fetch_add(1, Ordering::SeqCst);
        self.0.resized.store(true, Ordering::SeqCst);
        self.0.wake()
    }

    /// Gives a port another host end, and adds it again if it was removed. Bytes that wait
    /// for a reader of the old end that does not read are lost.
    pub fn connect(&self, port: usize, end: PortEnd) -> Result<(), ConsoleError> {
        self.change(port, Change::Connect(end))
    }

    /// Takes a port out of the guest; its host end is closed.
    pub fn remove(&self, port: usize) -> Result<(), ConsoleError> {
        self.change(port, Change::Remove)
    }

    /// Bytes of output dropped because the port's reader did not read in time.
    pub fn lost(&self, port: usize) -> u64 {
        let lost = self.0.lost.get(port);
        lost.map_or(0, |lost| lost.load(Ordering::Relaxed))
    }

    fn change(&self, port: usize, change: Change) -> Result<(), ConsoleError> {
        let mut changes = lock(&self.0.changes);
        let slot = changes.get_mut(port);
        *slot.ok_or(ConsoleError::NoPort { port })? = Some(change);
        drop(changes);
        self.0.wake()
    }
}

/// The console device.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    ports: Vec<Port>,
    /// The driver asked for the ports.
    ready: bool,
    order: SizeOrder,
    poller: Poller,
    timer: TimerFd,
}

fn host(what: &'static str) -> impl Fn(io::Error) -> ConsoleError {
    move |source| ConsoleError::Host { what, source }
}

fn host_error(what: &'static str) -> impl Fn(io::Error) -> DeviceError {
    move |source| DeviceError::Host { what, source }
}

/// Whether the ports are those of a saved device, if there is one.
fn check_saved(ports: &[PortOptions], saved: &[(String, PortState)]) -> Result<(), ConsoleError> {
    let now = ports.iter().map(|port| &port.name);
    if saved.is_empty() || now.clone().eq(saved.iter().map(|(name, _)| name)) {
        return Ok(());
    }
    let saved = saved.iter().take(MAX_PORTS);
    Err(ConsoleError::Saved {
        saved: saved.map(|(name, _)| name.clone()).collect(),
        now: now.cloned().collect(),
    })
}

fn check(ports: &[PortOptions]) -> Result<(), ConsoleError> {
    if !(1..=MAX_PORTS).contains(&ports.len()) {
        let ports = ports.len();
        return Err(ConsoleError::Ports { ports });
    }
    let mut names = HashSet::new();
    for PortOptions { name, .. } in ports {
        let printable = name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        let dots = matches!(name.as_str(), "." | "..");
        let new = name.is_empty() || names.insert(name);
        if !printable || dots || !new || name.len() > MAX_NAME {
            let name = name.clone();
            return Err(ConsoleError::Name { name });
        }
    }
    Ok(())
}

impl Console {
    /// Makes the device and its handle.
    pub fn new(
        options: ConsoleOptions,
        state: ConsoleState,
    ) -> Result<(Self, ConsoleHandle), ConsoleError> {
        check(&options.ports)?;
        check_saved(&options.ports, &state.ports)?;
        let (cols, rows) = options.size;
        let count = options.ports.len();
        let shared = Arc::new(Shared {
            ports: count as u32,
            size: AtomicU32::new(u32::from(cols) | u32::from(rows) << 16),
            // A saved driver may know another size.
            resized: AtomicBool::new(state.ports.iter().any(|(_, p)| p.ready)),
            generation: AtomicU32::new(0),
            changes: Mutex::new((0..count).map(|_| None).collect()),
            lost: (0..count).map(|_| Arc::default()).collect(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(host("create an eventfd"))?,
        });
        let poller = Poller::new().map_err(host("create an epoll instance"))?;
        let timer = TimerFd::new().map_err(io::Error::from);
        let timer = timer.map_err(host("create a timer"))?;
        let wait = host("wait for a port");
        poller.add(&shared.wake, WAKE).map_err(&wait)?;
        poller.add(&timer, TIMER).map_err(&wait)?;
        let mut states = state.ports.into_iter();
        let mut ports = Vec::new();
        for (index, (options, lost)) in options.ports.into_iter().zip(&shared.lost).enumerate() {
            let (_, state) = states.next().unwrap_or_default();
            let mut port = Port::new(options, Arc::clone(lost), state);
            connect(&poller, index, &port.end).map_err(&wait)?;
            port.tell_open();
            ports.push(port);
        }
        shared.wake()?;
        let handle = ConsoleHandle(Arc::clone(&shared));
        let console = Self {
            shared,
            ports,
            ready: state.ready,
            order: options.order,
            poller,
            timer,
        };
        Ok((console, handle))
    }

    /// Looks at all of a port, after whatever changed.
    fn serve(&mut self, index: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let multiport = io.has(F_MULTIPORT);
        if !multiport && index > 0 {
            return Ok(());
        }
        if let Some(port) = self.ports.get_mut(index) {
            let (rx, tx) = queues(index);
            port.transmit(tx, io)?;
            port.receive(rx, !multiport, io)?;
            port.tell_open();
        }
        Ok(())
    }

    /// Gives the driver the messages it has buffers for.
    fn send_messages(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        if !io.has(F_MULTIPORT) {
            return Ok(());
        }
        let size = self.shared.size();
        for (id, port) in (0..).zip(&mut self.ports) {
            while port.state.pending != 0 {
                let Some(chain) = io.pop(CONTROL_RX)? else {
                    return Ok(());
                };
                match port.next_message(id, size, self.order) {
                    // A buffer too small for the message has what fits.
                    Some(message) => {
                        let written = write_at(io.ram(), chain.writable(), 0, &message)?;
                        io.complete(chain, written as u32)?;
                    }
                    None => io.unpop(chain),
                }
            }
        }
        Ok(())
    }

    fn take_messages(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        while let Some(chain) = io.pop(CONTROL_TX)? {
            let mut bytes = [0; control::LEN];
            let count = read_at(io.ram(), chain.readable(), 0, &mut bytes)?;
            io.complete(chain, 0)?;
            if count == bytes.len() {
                self.take_message(Message::parse(bytes));
            }
        }
        Ok(())
    }

    fn take_message(&mut self, Message { id, event, value }: Message) {
        let size = self.shared.size();
        if event == DEVICE_READY {
            self.ready = value == 1;
            for port in self.ports.iter_mut().filter(|p| !p.state.removed) {
                if self.ready {
                    port.tell(PORT_ADD);
                }
            }
            return;
        }
        let port = self.ports.get_mut(id as usize);
        let Some(port) = port.filter(|p| !p.state.removed) else {
            return;
        };
        match event {
            PORT_READY if value == 1 => port.introduce(size),
            PORT_READY => port.state.ready = false,
            PORT_OPEN => port.state.open = value == 1,
            _ => {}
        }
    }

    /// Does what the VMM asked for.
    fn on_wake(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        // Readable, or another event took it.
        let _ = self.shared.wake.read();
        if self.shared.resized.swap(false, Ordering::SeqCst) {
            io.config_changed();
            for port in &mut self.ports {
                if port.console && port.state.ready {
                    port.tell(RESIZE);
                }
            }
        }
        let shared = Arc::clone(&self.shared);
        for (index, slot) in lock(&shared.changes).iter_mut().enumerate() {
            let Some(port) = self.ports.get_mut(index) else {
                continue;
            };
            match slot.take() {
                None => {}
                Some(Change::Connect(end)) => {
                    port.replace(end);
                    let added = connect(&self.poller, index, &port.end);
                    added.map_err(host_error("wait for a port"))?;
                    if std::mem::take(&mut port.state.removed) && self.ready {
                        port.tell(PORT_ADD);
                    }
                }
                Some(Change::Remove) => {
                    port.replace(PortEnd::closed());
                    let known = port.state.ready || port.state.pending >> PORT_ADD & 1 != 0;
                    port.release(io);
                    port.reset();
                    port.state.removed = true;
                    if known {
                        port.tell(PORT_REMOVE);
                    }
                }
            }
        }
        Ok(())
    }

    fn on_event(&mut self, event: Ready, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match event.token {
            WAKE => {
                self.on_wake(io)?;
                (0..self.ports.len()).try_for_each(|index| self.serve(index, io))
            }
            TIMER => (0..self.ports.len()).try_for_each(|index| self.serve(index, io)),
            token => {
                let index = (token / PORT_EVENTS) as usize;
                if let Some(port) = self.ports.get_mut(index) {
                    match token % PORT_EVENTS {
                        0 => port.end.input_ready(event.hung_up),
                        1 => port.output_ready(event.hung_up),
                        _ => port.end.clients_ready(),
                    }
                }
                self.serve(index, io)
            }
        }
    }

    /// Gives the driver its messages, and ports without a client the next one.
    fn settle(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        self.send_messages(io)?;
        let mut accepted = false;
        for (index, port) in (0..).zip(&mut self.ports) {
            if port.accept(&self.poller, PORT_EVENTS * index) {
                port.tell_open();
                accepted = true;
            }
        }
        if accepted {
            self.send_messages(io)?;
        }
        self.set_timer()
    }

    /// Sets the timer for the first port that gives up.
    fn set_timer(&mut self) -> Result<(), DeviceError> {
        let Some(at) = self.ports.iter().filter_map(Port::deadline).min() else {
            return Ok(());
        };
        // Zero would disarm it.
        let wait = at.saturating_duration_since(Instant::now());
        let set = self.timer.reset(wait.max(Duration::from_nanos(1)), None);
        set.map_err(|error| host_error("set a timer")(error.into()))
    }
}

/// Indexes of a port's receive and transmit queue (section 5.3.2).
fn queues(port: usize) -> (usize, usize) {
    match port {
        0 => (0, 1),
        port => (2 * port + 2, 2 * port + 3),
    }
}

fn connect(poller: &Poller, index: usize, end: &PortEnd) -> io::Result<()> {
    end.register(poller, PORT_EVENTS * index as u64)
}

impl VirtioDevice for Console {
    fn traits(&self) -> Traits {
        Traits {
            id: VIRTIO_ID_CONSOLE,
            features: 1 << F_SIZE | 1 << F_MULTIPORT,
            queues: vec![QUEUE_SIZE; 2 * self.ports.len() + 2],
            shm: Vec::new(),
            withheld: 0,
        }
    }

    fn config(&self) -> Arc<dyn ConfigSpace> {
        Arc::clone(&self.shared) as _
    }

    fn sources(&self) -> Vec<Source> {
        vec![Source::readable(0, self.poller.fd())]
    }

    fn on_queue(&mut self, queue: usize, io: &mut Io<'_>) -> Result<(), DeviceError> {
        match queue {
            CONTROL_RX => {}
            CONTROL_TX => {
                self.take_messages(io)?;
                for index in 0..self.ports.len() {
                    self.serve(index, io)?;
                }
            }
            0 | 1 => self.serve(0, io)?,
            queue => self.serve(queue / 2 - 1, io)?,
        }
        self.settle(io)
    }

    fn on_source(&mut self, _: u32, io: &mut Io<'_>) -> Result<(), DeviceError> {
        let ready = self.poller.take().map_err(host_error("look at ports"))?;
        for event in ready {
            self.on_event(event, io)?;
        }
        self.settle(io)
    }

    fn drain(&mut self, io: &mut Io<'_>) -> Result<(), DeviceError> {
        // The driver's last words, which nobody may have looked at yet.
        let multiport = io.has(F_MULTIPORT);
        let mut result = Ok(());
        for (index, port) in self.ports.iter_mut().enumerate() {
            if index == 0 || multiport {
                let sent = port.transmit(queues(index).1, io);
                result = result.and(sent);
            }
            port.release(io);
        }
        result
    }

    fn reset(&mut self) {
        self.ready = false;
        self.ports.iter_mut().for_each(Port::reset);
    }

    fn save(&self) -> DeviceState {
        DeviceState::Console(ConsoleState {
            ready: self.ready,
            ports: self
                .ports
                .iter()
                .map(|p| (p.name.clone(), p.state))
                .collect(),
        })
    }

    /// What the host's ends hold stays there.
    fn restore(&mut self, state: &DeviceState) -> bool {
        let reset = ConsoleState::default();
        let state = match state {
            DeviceState::Console(state) => state,
            DeviceState::Reset => &reset,
            _ => return false,
        };
        let names = self.ports.iter().map(|port| &port.name);
        if !state.ports.is_empty() && !names.eq(state.ports.iter().map(|(name, _)| name)) {
            return false;
        }
        self.ready = state.ready;
        let mut states = state.ports.iter();
        for port in &mut self.ports {
            port.state = states.next().map(|(_, state)| *state).unwrap_or_default();
            port.tell_open();
        }
        // The driver of that time may know another size.
        let ready = self.ports.iter().any(|port| port.state.ready);
        self.shared.resized.store(ready, Ordering::SeqCst);
        // A counter at its maximum wakes as well.
        let _ = self.shared.wake();
        true
    }
}
