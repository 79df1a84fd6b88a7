//! `cargo +nightly fuzz run mmds --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::mmds::run(data));
