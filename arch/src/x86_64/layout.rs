//! The guest-physical memory map and the I/O port map of an x86_64 bulle machine.
//!
//! Addresses are guest-physical bytes. Everything below 1 MiB that bulle writes before boot is
//! listed here, so that two writers can never meet.

/// GDT for the boot processor (written for the Linux 64-bit entry).
pub const GDT_START: u64 = 0x500;
/// Empty IDT for the boot processor.
pub const IDT_START: u64 = 0x520;
/// PVH `hvm_start_info` structure.
pub const PVH_INFO_START: u64 = 0x6000;
/// PVH module list (one entry, the initrd).
pub const PVH_MODLIST_START: u64 = 0x6040;
/// PVH memory map table.
pub const PVH_MEMMAP_START: u64 = 0x6100;
/// Linux `boot_params`, the "zero page".
pub const ZERO_PAGE_START: u64 = 0x7000;
/// Initial stack pointer of the boot processor.
pub const BOOT_STACK_POINTER: u64 = 0x8ff0;
/// Page tables for the Linux 64-bit entry: PML4, one PDPT, then four page directories.
pub const PML4_START: u64 = 0x9000;
/// First page-directory-pointer table.
pub const PDPT_START: u64 = 0xa000;
/// Four page directories, 4 KiB each, mapping the first 4 GiB with 2 MiB pages.
pub const PD_START: u64 = 0xb000;
/// Linux `setup_data` list entries (the RNG seed).
pub const SETUP_DATA_START: u64 = 0x1_0000;
/// Kernel command line, NUL-terminated.
pub const CMDLINE_START: u64 = 0x2_0000;
/// Longest command line in bytes, the NUL included.
pub const CMDLINE_MAX_SIZE: usize = 0x1_0000;
/// Longest command line of an ELF kernel in bytes, the NUL included: Linux's `COMMAND_LINE_SIZE` on
/// x86 (arch/x86/include/asm/setup.h). Linux cuts a longer one without a word, and an ELF file has
/// no setup header to say its own limit.
pub const ELF_CMDLINE_MAX_SIZE: usize = 2048;
/// End of usable low memory; the extended BIOS data area would start here.
pub const EBDA_START: u64 = 0x9_fc00;
/// Virtual machine generation id, in a page of its own, which is reserved. Not where a multiple of
/// 2 KiB is, as Linux looks there for the signature of a ROM.
pub const VMGENID_START: u64 = 0xd_e010;
/// The vmclock page, likewise reserved.
pub const VMCLOCK_START: u64 = 0xd_f000;
/// Bytes of the vmclock page.
pub const VMCLOCK_SIZE: u64 = 0x1000;
/// ACPI RSDP, where an operating system without a hint looks for it.
pub const RSDP_START: u64 = 0xe_0000;
/// Every other ACPI table, up to 1 MiB.
pub const ACPI_TABLES_START: u64 = 0xe_0040;
/// End of the ACPI tables' room.
pub const ACPI_TABLES_END: u64 = HIMEM_START;
/// First byte above the legacy hole: kernels are loaded from here.
pub const HIMEM_START: u64 = 0x10_0000;

/// Guest RAM stops here and goes on at 4 GiB.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// End of the hole, where high RAM starts.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;
/// The boot timer, where Firecracker has it.
pub const BOOT_TIMER_START: u64 = MMIO_HOLE_START;
/// Size of its window.
pub const BOOT_TIMER_SIZE: u64 = 0x1000;
/// virtio-mmio windows, `VIRTIO_MMIO_SIZE` bytes each.
pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
/// Size of one virtio-mmio window.
pub const VIRTIO_MMIO_SIZE: u64 = 0x1000;
/// PCI configuration space of bus 0 (ECAM).
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// Bytes of one bus's configuration space.
pub const PCI_ECAM_SIZE: u64 = 0x10_0000;
/// Memory of PCI functions.
pub const PCI_MEMORY_START: u64 = 0xe800_0000;
/// End of the functions' memory.
pub const PCI_MEMORY_END: u64 = 0xf000_0000;
/// I/O APIC registers.
pub const IOAPIC_START: u64 = 0xfec0_0000;
/// Size of the I/O APIC window.
pub const IOAPIC_SIZE: u64 = 0x1000;
/// Local APIC registers.
pub const LAPIC_START: u64 = 0xfee0_0000;
/// Identity map page that KVM needs on Intel processors without unrestricted guest.
pub const IDENTITY_MAP_START: u64 = 0xfffb_c000;
/// Three pages of task state that KVM needs on Intel processors.
pub const TSS_START: u64 = 0xfffb_d000;

/// Lowest interrupt line for virtio-mmio devices.
pub const VIRTIO_IRQ_BASE: u32 = 5;
/// Lines that PCI functions without MSI-X share; virtio-mmio devices have them where there is no PCI.
pub const PCI_LINES: [u32; 4] = [16, 17, 18, 19];
/// Number of I/O APIC input pins.
pub const IOAPIC_PINS: u32 = 24;

/// COM1: the console.
pub const COM1_PORT: u16 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_IRQ: u32 = 4;
/// COM2: the agent.
pub const COM2_PORT: u16 = 0x2f8;
/// Interrupt line of COM2.
pub const COM2_IRQ: u32 = 3;
/// A 16550 has eight registers.
pub const SERIAL_PORT_SIZE: u16 = 8;
/// i8042 data port; the command and status port is four above.
pub const I8042_PORT: u16 = 0x60;
/// Ports the i8042 answers, from [`I8042_PORT`] on.
pub const I8042_PORT_SIZE: u16 = 5;
/// Interrupt line of the keyboard.
pub const I8042_IRQ: u32 = 1;
/// CMOS index port; the data port follows.
pub const RTC_PORT: u16 = 0x70;
/// Index and data.
pub const RTC_PORT_SIZE: u16 = 2;
/// Its register of the century.
pub const RTC_CENTURY: u8 = 0x32;
/// Interrupt line of the real-time clock.
pub const RTC_IRQ: u32 = 8;
/// Debug-exit port: a byte written here ends the VM with it as exit code.
pub const DEBUG_EXIT_PORT: u16 = 0xf4;
/// PCI configuration by ports: address, then data.
pub const PCI_CONFIG_PORT: u16 = 0xcf8;
/// Ports of the address and the data.
pub const PCI_CONFIG_PORT_SIZE: u16 = 8;
/// pvpanic, as in QEMU.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI power registers (see `devices::legacy::power`).
pub const POWER_PORT: u16 = 0x600;
/// Sleep control, sleep status, reset, event status.
pub const POWER_PORT_SIZE: u16 = 4;
/// Offset of the sleep control register: `SLP_EN` is bit 5, the sleep type bits 2 to 4.
pub const POWER_SLEEP_CONTROL: u16 = 0;
/// Offset of the sleep status register: `WAK_STS` is bit 7.
pub const POWER_SLEEP_STATUS: u16 = 1;
/// Offset of the reset register.
pub const POWER_RESET: u16 = 2;
/// Offset of the event status register, which the guest clears by reading it.
pub const POWER_EVENTS: u16 = 3;
/// What a guest writes to the reset register.
pub const POWER_RESET_VALUE: u8 = 1;
/// Sleep type of S5, power off: the guest writes `SLP_EN | type << 2`, which is 0x34.
pub const POWER_SLEEP_TYPE_S5: u8 = 5;
/// Event status: the power button was pressed.
pub const POWER_EVENT_BUTTON: u8 = 1 << 0;
/// Event status: the machine goes on from an old state, with another generation id.
pub const POWER_EVENT_GENERATION: u8 = 1 << 1;
/// Event status: PCI functions have come or are to go.
pub const POWER_EVENT_PCI: u8 = 1 << 2;
/// Registers of PCI hotplug (see `devices::pci::hotplug`), 32 bits each, a bit for each slot.
pub const PCI_HOTPLUG_PORT: u16 = 0x620;
/// Added, leaving, eject.
pub const PCI_HOTPLUG_PORT_SIZE: u16 = 12;
/// Watchdog registers (see `devices::legacy::watchdog`), 32 bits each.
pub const WATCHDOG_PORT: u16 = 0x610;
/// Control, countdown, feed, status.
pub const WATCHDOG_PORT_SIZE: u16 = 16;
/// Offset of the control register: bit 0 is set while the countdown runs.
pub const WATCHDOG_CONTROL: u16 = 0;
/// Offset of the countdown, in periods.
pub const WATCHDOG_COUNTDOWN: u16 = 4;
/// Offset of the register that feeds when written, and has what is left when read.
pub const WATCHDOG_FEED: u16 = 8;
/// Offset of the status register: bit 0 is set when the watchdog has expired, cleared by writing it.
pub const WATCHDOG_STATUS: u16 = 12;
/// Interrupt line of the generic event device.
pub const GED_IRQ: u32 = 9;
