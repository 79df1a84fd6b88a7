//! Reports a panic through pvpanic, then halts.
#![no_std]
#![no_main]

payloads::start32!("write8 0x505, 1", "1: cli", "hlt", "jmp 1b");
