//! A guest learns that it goes on from an old state.

use std::time::Duration;

use crate::machine::Machine;

/// Linux finds the generation id where ACPI says; when it changes, and not before, Linux mixes it
/// into its random numbers.
#[test]
fn amd64_is_told_of_a_new_generation() {
    let script = "echo bound $(ls /sys/bus/acpi/drivers/vmgenid | grep -c :)
        echo clocks $(ls /sys/bus/acpi/devices | grep -c AMZNC10C)
        while :; do echo forks $(dmesg | grep -c 'due to virtual machine fork'); sleep 0.2; done";
    let machine = Machine::start(
        "amd64",
        &[],
        script,
        r#"{"machine-config":{"vcpu_count":2}}"#,
    );
    machine.wait("the guest runs", |m| m.value("forks").is_some());
    assert_eq!(machine.value("bound"), Some(1));
    assert_eq!(machine.value("clocks"), Some(1));
    assert_eq!(machine.value("forks"), Some(0));
    for generation in 1..3 {
        let vm = machine.vm();
        vm.pause(Duration::from_secs(10)).unwrap();
        vm.announce_generation([generation; 16]).unwrap();
        vm.start();
        let told = |m: &Machine| m.value("forks") == Some(generation.into());
        machine.wait("Linux took the id", told);
    }
}
