//! Says so, then spins with interrupts disabled: a guest that never leaves by itself.
#![no_std]
#![no_main]

payloads::start32!("println \"spinning\"", "cli", "1: jmp 1b");
