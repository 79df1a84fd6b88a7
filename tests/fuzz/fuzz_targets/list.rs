//! `cargo +nightly fuzz run list --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::list::run(data));
