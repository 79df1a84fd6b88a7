//! `cargo +nightly fuzz run api --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::api::run(data));
