//! Pulses the reset line of the keyboard controller.
#![no_std]
#![no_main]

payloads::start32!("write8 0x64, 0xfe", "1: cli", "hlt", "jmp 1b");
