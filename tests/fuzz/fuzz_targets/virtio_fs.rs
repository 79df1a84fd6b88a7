//! `cargo +nightly fuzz run virtio_fs --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::virtio::kinds::fs(data));
