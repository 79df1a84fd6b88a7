//! MSI-X (section 6.8.2): a table of messages, masks and pending bits.
//!
//! [`Msix::signal`] may be called from any thread. One private mutex, released before a message
//! is sent.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::ioapic::MsiSink;
use crate::lock;

/// Bytes of a table entry.
pub const ENTRY: u64 = 16;
/// Most vectors of a function.
pub const MAX_VECTORS: u16 = 2048;
/// Message control: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// Message control: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
/// Vector control: this vector is masked.
const MASKED: u32 = 1;

/// One vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixEntry {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Vector control.
    pub control: u32,
    /// A message waits to be unmasked.
    pub pending: bool,
}

impl Default for MsixEntry {
    fn default() -> Self {
        Self {
            address: 0,
            data: 0,
            control: MASKED,
            pending: false,
        }
    }
}

/// State of MSI-X; the default is the state after reset.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// Message control, the bits that can be written.
    pub control: u16,
    /// The table; empty for reset.
    pub entries: Vec<MsixEntry>,
}

/// MSI-X of one function.
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    vectors: u16,
    state: Mutex<MsixState>,
}

impl Msix {
    /// MSI-X with `vectors` (1 to [`MAX_VECTORS`]) that go to `sink`. A saved table of another
    /// size is cut or filled up.
    pub fn new(sink: Arc<dyn MsiSink>, vectors: u16, state: MsixState) -> Self {
        let msix = Self {
            sink,
            vectors: vectors.clamp(1, MAX_VECTORS),
            state: Mutex::default(),
        };
        msix.restore(state);
        msix
    }

    /// Has this state, as [`new`](Self::new) takes it; no message is sent.
    pub fn restore(&self, mut state: MsixState) {
        let vectors = self.vectors.into();
        state.entries.resize(vectors, MsixEntry::default());
        *lock(&self.state) = state;
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Whether interrupts are messages.
    pub fn enabled(&self) -> bool {
        lock(&self.state).control & ENABLE != 0
    }

    /// The state.
    pub fn save(&self) -> MsixState {
        lock(&self.state).clone()
    }

    /// Message control, as the guest writes it.
    pub fn set_control(&self, control: u16) {
        self.change(|state| state.control = control & (ENABLE | FUNCTION_MASK));
    }

    /// Sends the message of `vector`, or notes it where it is masked. A vector that is not there
    /// is no interrupt.
    pub fn signal(&self, vector: u16) {
        let mut state = lock(&self.state);
        if state.control & ENABLE == 0 {
            return;
        }
        let all_masked = state.control & FUNCTION_MASK != 0;
        let Some(entry) = state.entries.get_mut(usize::from(vector)) else {
            return;
        };
        if all_masked || entry.control & MASKED != 0 {
            entry.pending = true;
            return;
        }
        let (address, data) = (entry.address, entry.data);
        drop(state);
        self.sink.send(address, data);
    }

    /// What `vector` sends now: nothing while it is masked.
    pub(crate) fn message(&self, vector: u16) -> Option<(u64, u32)> {
        let state = lock(&self.state);
        let on = state.control & (ENABLE | FUNCTION_MASK) == ENABLE;
        let entry = state.entries.get(usize::from(vector)).filter(|_| on)?;
        (entry.control & MASKED == 0).then_some((entry.address, entry.data))
    }

    /// Where messages go.
    pub(crate) fn sink(&self) -> &dyn MsiSink {
        &*self.sink
    }

    /// Reads the table: 4 or 8 aligned bytes; anything else is zero.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = lock(&self.state);
        for_words(offset, data.len(), |at, range| {
            let entry = state.entries.get((at / ENTRY) as usize);
            let word = entry.map_or(0, |e| match at % ENTRY {
                0 => e.address as u32,
                4 => (e.address >> 32) as u32,
                8 => e.data,
                _ => e.control,
            });
            if let Some(to) = data.get_mut(range) {
                to.copy_from_slice(&word.to_le_bytes());
            }
        });
    }

    /// Writes the table: 4 or 8 aligned bytes; anything else is dropped.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        self.change(|state| {
            for_words(offset, data.len(), |at, range| {
                let entry = state.entries.get_mut((at / ENTRY) as usize);
                let word = data.get(range).and_then(|w| <[u8; 4]>::try_from(w).ok());
                let (Some(entry), Some(word)) = (entry, word) else {
                    return;
                };
                let word = u32::from_le_bytes(word);
                match at % ENTRY {
                    0 => entry.address = entry.address & !0xffff_ffff | u64::from(word & !3),
                    4 => entry.address = entry.address & 0xffff_ffff | u64::from(word) << 32,
                    8 => entry.data = word,
                    _ => entry.control = word & MASKED,
                }
            });
        });
    }

    /// Reads the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        for (i, byte) in data.iter_mut().enumerate() {
            let first = usize::try_from(offset).unwrap_or(usize::MAX);
            let first = first.saturating_add(i).saturating_mul(8);
            let bits = state.entries.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, e)| byte | u8::from(e.pending) << bit);
        }
    }

    /// Changes the state and sends what is no more masked by it.
    fn change(&self, change: impl FnOnce(&mut MsixState)) {
        let mut state = lock(&self.state);
        change(&mut state);
        if state.control & (ENABLE | FUNCTION_MASK) != ENABLE {
            return;
        }
        let mut due = Vec::new();
        for entry in &mut state.entries {
            if entry.control & MASKED == 0 && std::mem::take(&mut entry.pending) {
                due.push((entry.address, entry.data));
            }
        }
        drop(state);
        for (address, data) in due {
            self.sink.send(address, data);
        }
    }
}

/// Calls `f` with the offset and the place of each 32-bit word of an aligned access.
fn for_words(offset: u64, len: usize, mut f: impl FnMut(u64, std::ops::Range<usize>)) {
    if !matches!(len, 4 | 8) || !offset.is_multiple_of(len as u64) {
        return;
    }
    for at in (0..len).step_by(4) {
        f(offset + at as u64, at..at + 4);
    }
}
