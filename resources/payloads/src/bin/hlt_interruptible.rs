//! Says so, then halts with interrupts enabled, though none comes.
#![no_std]
#![no_main]

payloads::start32!(
    "write8 0x21, 0xff", // mask the interrupt controller's lines, where there is one
    "write8 0xa1, 0xff",
    "println \"halted\"",
    "1: sti",
    "hlt",
    "jmp 1b",
);
