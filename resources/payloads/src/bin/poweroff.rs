//! Enters S5 through the ACPI sleep control register.
#![no_std]
#![no_main]

payloads::start32!("write8 0x600, 0x34", "1: cli", "hlt", "jmp 1b");
