//! Faults with an empty interrupt table, so that the processor shuts down.
#![no_std]
#![no_main]

payloads::start32!(
    "println \"about to fault\"",
    "lidt none",
    "ud2",
    "none: .word 0",
    ".long 0",
);
