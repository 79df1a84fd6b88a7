//! virtio functions of PCI bus 0, by ECAM (section 4.1).

use crate::io;

/// Configuration space of bus 0.
pub const ECAM: u64 = 0xe000_0000;
const FUNCTION: u64 = 1 << 15;
const VENDOR: u16 = 0x1af4;
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;

/// A function with virtio's structures in a BAR.
#[derive(Clone, Copy)]
pub struct Function {
    /// Address of its configuration space.
    pub space: u64,
    /// Address of its BAR, and bytes of it.
    pub bar: u64,
    /// Bytes of the BAR.
    pub bar_len: u64,
    /// Address of the common configuration.
    pub common: u64,
    /// Address of the device's configuration.
    pub config: u64,
    /// Address of the ISR status.
    pub isr: u64,
    /// Offset of the MSI-X capability in configuration space; 0 for none.
    pub msix: u64,
    notify_base: u64,
    notify_step: u64,
}

/// All virtio functions of bus 0.
pub fn functions() -> impl Iterator<Item = Function> {
    (0..32).filter_map(in_slot)
}

/// The virtio function in `slot` of bus 0.
pub fn in_slot(slot: u64) -> Option<Function> {
    Function::at(ECAM + slot * FUNCTION)
}

impl Function {
    fn at(space: u64) -> Option<Self> {
        if io::read::<u16>(space) != VENDOR {
            return None;
        }
        let mut bars = [0; 6];
        for (bar, at) in bars.iter_mut().zip((space + 0x10..).step_by(4)) {
            *bar = u64::from(io::read::<u32>(at) & !0xf);
        }
        let mut function = Self {
            space,
            bar: 0,
            bar_len: 0,
            common: 0,
            config: 0,
            isr: 0,
            msix: 0,
            notify_base: 0,
            notify_step: 0,
        };
        let mut at = u64::from(io::read::<u8>(space + 0x34));
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let cap = space + at;
            let (id, kind): (u8, u8) = (io::read(cap), io::read(cap + 3));
            let bar = bars.get(usize::from(io::read::<u8>(cap + 4))).copied();
            let place = bar.unwrap_or(0) + u64::from(io::read::<u32>(cap + 8));
            match (id, kind) {
                (CAP_VENDOR, 1) => (function.common, function.bar) = (place, bar.unwrap_or(0)),
                (CAP_VENDOR, 2) => {
                    function.notify_base = place;
                    function.notify_step = io::read::<u32>(cap + 16).into();
                }
                (CAP_VENDOR, 3) => function.isr = place,
                (CAP_VENDOR, 4) => function.config = place,
                (CAP_MSIX, _) => function.msix = at,
                _ => {}
            }
            at = io::read::<u8>(cap + 1).into();
        }
        if function.common == 0 {
            return None;
        }
        function.measure();
        function.enable();
        Some(function)
    }

    /// Sizes the BAR that the structures are in, which has to be 0.
    fn measure(&mut self) {
        let bar = self.space + 0x10;
        let old: u32 = io::read(bar);
        io::write(bar, u32::MAX);
        let mask = io::read::<u32>(bar) & !0xf;
        io::write(bar, old);
        self.bar_len = u64::from(!mask) + 1;
    }

    /// Lets it answer memory accesses and access memory itself.
    pub fn enable(&self) {
        io::write(self.space + 4, 6u16);
    }

    /// Puts the BAR where it was found.
    pub fn restore_bar(&self) {
        io::write(self.space + 0x10, self.bar as u32);
        io::write(self.space + 0x14, (self.bar >> 32) as u32);
    }

    /// The virtio device ID.
    pub fn virtio_id(&self) -> u32 {
        u32::from(io::read::<u16>(self.space + 2)).saturating_sub(0x1040)
    }

    /// Where `queue` is kicked. Its notification offset is taken to be its index.
    pub fn notify(&self, queue: u16) -> u64 {
        self.notify_base + self.notify_step * u64::from(queue)
    }

    /// Address and entries of the MSI-X table.
    pub fn msix_table(&self) -> (u64, u64) {
        let cap = self.space + self.msix;
        let entries = u64::from(io::read::<u16>(cap + 2) & 0x7ff) + 1;
        (self.bar + u64::from(io::read::<u32>(cap + 4) & !7), entries)
    }
}
