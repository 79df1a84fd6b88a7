//! Says so, then halts with interrupts disabled.
#![no_std]
#![no_main]

payloads::start32!("println \"halted\"", "1: cli", "hlt", "jmp 1b");
