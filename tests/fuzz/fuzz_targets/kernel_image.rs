//! `cargo +nightly fuzz run kernel_image --features libfuzzer`
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::kernel_image::run(data));
