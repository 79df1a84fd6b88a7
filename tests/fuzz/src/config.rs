//! `config`: a configuration file given by a user, read, checked and used for what needs no file.

use arch::cmdline;
use arch::memory::{MAX_RAM, MIN_RAM, ram_regions};
use arch::topology::Topology;
use bulle::board::kernel_words;
use bulle::config::{Config, parse_size};

/// Reads `data` as JSON; what is valid has to be printable and usable.
pub fn run(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = parse_size(text);
    }
    let Ok(config) = serde_json::from_slice::<Config>(data) else {
        return;
    };
    let printed = serde_json::to_string(&config).expect("a configuration can be printed");
    let again: Config = serde_json::from_str(&printed).expect("what was printed can be read");
    assert_eq!(again, config);
    let Ok(spec) = config.validate() else { return };
    assert!((MIN_RAM..=MAX_RAM).contains(&spec.ram_size()));
    let total: u64 = ram_regions(spec.ram_size())
        .iter()
        .map(|region| region.1 as u64)
        .sum();
    assert_eq!(total, spec.ram_size());
    let machine = spec.machine();
    let cores = machine.vcpu_count / machine.dies / machine.threads_per_core;
    let topology = Topology::new(
        machine.vcpu_count,
        machine.threads_per_core,
        cores,
        machine.dies,
        1,
    );
    if let Ok(topology) = topology {
        assert_eq!(topology.vcpus(), machine.vcpu_count);
    }
    let words = spec
        .config()
        .boot_source
        .boot_args
        .as_deref()
        .unwrap_or_default();
    let _ = cmdline::build(&kernel_words(spec.config()), words, 2047);
}
