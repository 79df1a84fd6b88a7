//! `cargo +nightly fuzz run virtio_block --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::virtio::kinds::block(data));
