//! Custom CPU templates: taken, applied at the start, refused in Firecracker's words.

use serde_json::{Value, json};

use crate::common;
use crate::served::{Served, boot};

const AFTER: &str = "The requested operation is not supported after starting the microVM.";

/// Leaf 1's stepping, and the page attributes, which no guest of these tests looks at.
fn template() -> Value {
    json!({
        "kvm_capabilities": ["3", "!9999"],
        "cpuid_modifiers": [{
            "leaf": "0x1",
            "subleaf": "0x0",
            "flags": 0,
            "modifiers": [{ "register": "eax", "bitmap": "0bx001" }],
        }],
        "msr_modifiers": [{ "addr": "0x277", "bitmap": "0b110" }],
    })
}

#[test]
fn a_template_is_taken_and_the_guest_runs() {
    let mut vm = Served::payload("serial_echo");
    vm.put("/cpu-config", json!({})).done();
    vm.put("/cpu-config", template()).done();
    let shown = &vm.get("/vm/config").value()["cpu-config"];
    assert_eq!(shown["kvm_capabilities"], json!(["3", "!9999"]));
    assert_eq!(shown["cpuid_modifiers"][0]["leaf"], "0x1");
    let machine = vm.get("/machine-config").value();
    assert_eq!(machine["cpu_template"], Value::Null);
    let mut vm = vm.start().wait_for("ready");
    vm.put("/cpu-config", json!({})).refused(&[AFTER]);
}

#[test]
fn of_two_kinds_of_template_the_later_counts() {
    let mut vm = Served::new();
    vm.put("/cpu-config", template()).done();
    vm.patch("/machine-config", json!({ "vcpu_count": 2 }))
        .done();
    assert!(vm.get("/vm/config").value()["cpu-config"].is_object());
    vm.patch("/machine-config", json!({ "cpu_template": "None" }))
        .done();
    assert_eq!(vm.get("/vm/config").value()["cpu-config"], Value::Null);
}

#[test]
fn what_no_host_can_do_is_refused() {
    let mut vm = Served::payload("serial_echo");
    let leaf = |leaf: &str, bitmap: &str| {
        json!({ "cpuid_modifiers": [{
            "leaf": leaf, "subleaf": "0x0", "flags": 0,
            "modifiers": [{ "register": "eax", "bitmap": bitmap }],
        }] })
    };
    let body = "An error occurred when deserializing the json body of a request: ";
    for (template, why) in [
        (
            leaf("1", "0b1"),
            "No supported number system prefix found in value [1]",
        ),
        (
            leaf("0x1", "0b2"),
            "Failed to parse string [0b2] as a bitmap - unknown character: 2",
        ),
        (json!({ "kvm_capabilities": ["x"] }), "as a kvm capability"),
        (
            json!({ "reg_modifiers": [] }),
            "unknown field `reg_modifiers`",
        ),
    ] {
        vm.put("/cpu-config", template).refused(&[body, why]);
    }
    for (template, why) in [
        (
            leaf("0x12345678", "0b1"),
            "Template changes a CPUID entry not supported by KVM: Leaf: 12345678, Subleaf: 0",
        ),
        (
            json!({ "msr_modifiers": [{ "addr": "0xdead", "bitmap": "0b1" }] }),
            "Template changes an MSR entry not supported by KVM: Register Address: dead",
        ),
        (json!({ "kvm_capabilities": ["99999"] }), "capability 99999"),
    ] {
        vm.put("/cpu-config", template).done();
        vm.action("InstanceStart").refused(&[why]);
    }
    // A start that fails may be tried again.
    vm.put("/cpu-config", json!({})).done();
    vm.start().wait_for("ready");
}

#[test]
fn a_configuration_file_has_a_template_or_names_its_file() {
    let vm = Served::new();
    let path = vm.file("template", template().to_string().as_bytes());
    let bad = vm.file("bad", br#"{"x":1}"#);
    let config = |cpu: Value| json!({ "boot-source": boot(&common::payload("serial_echo")), "drives": [], "cpu-config": cpu });
    for (name, cpu) in [
        ("inline", template()),
        ("named", json!(path)),
        ("none", Value::Null),
    ] {
        let file = vm.file(name, config(cpu).to_string().as_bytes());
        let mut other = Served::with(&["--config-file", file.to_str().unwrap()]).wait_for("ready");
        let shown = other.get("/vm/config").value()["cpu-config"].take();
        assert_eq!(shown.is_object(), name != "none", "{name}");
    }
    let file = vm.file("config", config(json!(bad)).to_string().as_bytes());
    let outcome = common::Bulle::run().arg("--config").arg(file).outcome();
    let outcome = outcome.exits(125).complains("The CPU template");
    outcome.complains("unknown field `x`");
}
