//! Bodies of the fuzz targets, one module each.
//!
//! The fuzzer calls them from `fuzz_targets/`; `tests/fuzz_corpus.rs` of the root package includes
//! this file and replays the committed corpus with a stable toolchain.

pub mod agent_protocol;
pub mod api;
pub mod config;
pub mod devices;
pub mod http;
mod input;
pub mod kernel_image;
pub mod list;
pub mod mmds;
pub mod pci;
pub mod snapshot;
pub mod virtio;

/// A target's body: takes any bytes, must not panic.
pub type Target = fn(&[u8]);

/// Every target by the name of its directory in `corpus/`.
pub const TARGETS: &[(&str, Target)] = &[
    ("agent_protocol", agent_protocol::run),
    ("api", api::run),
    ("config", config::run),
    ("devices", devices::run),
    ("http", http::run),
    ("kernel_image", kernel_image::run),
    ("list", list::run),
    ("mmds", mmds::run),
    ("pci", pci::run),
    ("snapshot", snapshot::run),
    ("virtio_balloon", virtio::kinds::balloon),
    ("virtio_block", virtio::kinds::block),
    ("virtio_console", virtio::kinds::console),
    ("virtio_entropy", virtio::kinds::entropy),
    ("virtio_fs", virtio::kinds::fs),
    ("virtio_mem", virtio::kinds::mem),
    ("virtio_net", virtio::kinds::net),
    ("virtio_pmem", virtio::kinds::pmem),
    ("virtio_rtc", virtio::kinds::rtc),
    ("virtio_vsock", virtio::kinds::vsock),
];
