//! `cargo +nightly fuzz run virtio_net --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::virtio::kinds::net(data));
