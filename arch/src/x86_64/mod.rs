//! x86_64: memory layout, kernel loading, processor state, ACPI.

pub mod layout;

pub mod boot;
pub mod cmdline;
pub mod kernel;
pub mod memory;
