//! x86_64: memory layout, kernel loading, processor state, ACPI.

pub mod layout;
