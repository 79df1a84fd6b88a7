//! Prints a line and ends with exit code 7.
#![no_std]
#![no_main]

payloads::start32!("println \"hello from the guest\"", "write8 0xf4, 7", "hlt");
