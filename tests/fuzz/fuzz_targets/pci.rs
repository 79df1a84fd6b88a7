//! `cargo +nightly fuzz run pci --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::pci::run(data));
