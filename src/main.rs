//! The `bulle` command.

fn main() {}
