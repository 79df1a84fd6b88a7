//! x86_64: memory layout, kernel loading, processor state, ACPI.

pub mod layout;

pub mod boot;
pub mod cmdline;
pub mod kernel;
pub mod memory;

pub mod acpi;
pub mod capabilities;
pub mod cpu_template;
pub mod cpuid;
pub mod interrupts;
pub mod msr;
pub mod report;
pub mod state;
pub mod static_template;
pub mod topology;
pub mod tsc;
pub mod vcpu;
pub mod vm;
pub mod vmclock;
pub mod vmgenid;
pub mod xstate;
