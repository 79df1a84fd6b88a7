//! `cargo +nightly fuzz run snapshot --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::snapshot::run(data));
