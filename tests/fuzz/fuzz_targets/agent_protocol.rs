//! `cargo +nightly fuzz run agent_protocol --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::agent_protocol::run(data));
