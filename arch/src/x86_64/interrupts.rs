//! The local APIC as firmware leaves it: which interrupts its two local pins take.
//!
//! Only the boot processor's is written. INIT, which starts every other processor, resets its local
//! APIC, so a value written before would never be seen.

use kvm_bindings::kvm_lapic_state;

use crate::vm::IrqchipMode;

/// Local vector table entry of pin LINT0, by offset in the register page.
const LVT_LINT0: usize = 0x350;
/// Local vector table entry of pin LINT1.
const LVT_LINT1: usize = 0x360;
/// Initial count of the timer.
const TIMER_COUNT: usize = 0x380;
/// The entry is masked.
const MASKED: u32 = 1 << 16;
/// Delivery mode NMI.
const NMI: u32 = 4 << 8;
/// Delivery mode ExtINT: the vector comes from the PIC.
const EXT_INT: u32 = 7 << 8;
/// Delivery mode and mask, all that firmware sets.
const FIELDS: u32 = MASKED | 7 << 8;

/// Set up the local pins: LINT1 is NMI; LINT0 is the PIC's output where there is a PIC (the virtual
/// wire mode in which PCs boot), and masked in split mode, where there is none: Linux leaves a
/// masked LINT0 masked and would else wait for a PIC's interrupt while it checks its timer.
/// True when something changed and the state has to be written back.
#[must_use]
pub fn set_local_pins(lapic: &mut kvm_lapic_state, mode: IrqchipMode) -> bool {
    let lint0 = match mode {
        IrqchipMode::Kernel => EXT_INT,
        IrqchipMode::Split => MASKED,
    };
    let before = (read(lapic, LVT_LINT0), read(lapic, LVT_LINT1));
    let after = (before.0 & !FIELDS | lint0, before.1 & !FIELDS | NMI);
    write(lapic, LVT_LINT0, after.0);
    write(lapic, LVT_LINT1, after.1);
    before != after
}

/// What the timer counts down from; 0: it does not count, though it may wait for a TSC deadline.
#[must_use]
pub fn timer_count(lapic: &kvm_lapic_state) -> u32 {
    read(lapic, TIMER_COUNT)
}

fn read(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    // KVM declares the page as signed chars, hence the casts.
    u32::from_le_bytes(std::array::from_fn(|i| {
        lapic.regs.get(offset + i).map_or(0, |b| *b as u8)
    }))
}

fn write(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (register, byte) in lapic.regs.iter_mut().skip(offset).zip(value.to_le_bytes()) {
        *register = byte as i8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The boot processor's local APIC after reset, as KVM reports it.
    fn reset() -> kvm_lapic_state {
        let mut lapic = kvm_lapic_state::default();
        write(&mut lapic, LVT_LINT0, 0x700);
        write(&mut lapic, LVT_LINT1, 0x1_0000);
        lapic
    }

    #[test]
    fn pins_with_a_pic() {
        let mut lapic = reset();
        assert!(set_local_pins(&mut lapic, IrqchipMode::Kernel));
        assert_eq!(
            (read(&lapic, LVT_LINT0), read(&lapic, LVT_LINT1)),
            (0x700, 0x400)
        );
        assert!(!set_local_pins(&mut lapic, IrqchipMode::Kernel));
    }

    #[test]
    fn pins_without_a_pic() {
        let mut lapic = reset();
        assert!(set_local_pins(&mut lapic, IrqchipMode::Split));
        assert_eq!(
            (read(&lapic, LVT_LINT0), read(&lapic, LVT_LINT1)),
            (0x1_0000, 0x400)
        );
    }

    #[test]
    fn neighbours_and_vectors_are_kept() {
        let mut lapic = reset();
        write(&mut lapic, LVT_LINT0 - 16, 0xffff_ffff);
        write(&mut lapic, LVT_LINT1 + 16, 0xffff_ffff);
        write(&mut lapic, LVT_LINT0, 0x1_0031);
        assert!(set_local_pins(&mut lapic, IrqchipMode::Kernel));
        assert_eq!(read(&lapic, LVT_LINT0), 0x731);
        assert_eq!(read(&lapic, LVT_LINT0 - 16), u32::MAX);
        assert_eq!(read(&lapic, LVT_LINT1 + 16), u32::MAX);
    }
}
