//! `cargo +nightly fuzz run devices --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::devices::run(data));
