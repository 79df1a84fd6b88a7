//! A virtual machine monitor on KVM.

pub mod guest;
