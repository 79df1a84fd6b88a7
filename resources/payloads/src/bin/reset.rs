//! Writes the ACPI reset register.
#![no_std]
#![no_main]

payloads::start32!("write8 0x602, 1", "1: cli", "hlt", "jmp 1b");
