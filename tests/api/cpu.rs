//! CPU templates, the user's and bulle's: taken, applied at the start, refused in Firecracker's words.

use std::arch::x86_64::__cpuid;

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
    vm.put("/cpu-config", template()).done();
    vm.patch("/machine-config", json!({ "cpu_template": "T2S" }))
        .done();
    // A new machine without a word about it has the same one.
    vm.put(
        "/machine-config",
        json!({ "vcpu_count": 1, "mem_size_mib": 64 }),
    )
    .done();
    let config = vm.get("/vm/config").value();
    assert_eq!(config["cpu-config"], Value::Null);
    assert_eq!(config["machine-config"]["cpu_template"], "T2S");
    assert_eq!(vm.get("/machine-config").value()["cpu_template"], "T2S");
    vm.put("/cpu-config", json!({})).done();
    let config = vm.get("/vm/config").value();
    assert_eq!(config["machine-config"]["cpu_template"], Value::Null);
}

/// What a start with each template says on this host, or what the guest has then in EAX of leaf 1.
fn expected(template: &str) -> Result<&'static str, &'static str> {
    let (vendor, model) = (__cpuid(0).ebx, __cpuid(1).eax & 0x0fff_0fff);
    let intel = vendor == u32::from_le_bytes(*b"Genu");
    let (same_vendor, models): (_, &[u32]) = match template {
        "C3" | "T2" => (intel, &[0x5_0654, 0x5_0657, 0x6_06a6]),
        "T2S" => (intel, &[0x5_0654, 0x5_0657]),
        "T2CL" => (intel, &[0x5_0657, 0x6_06a6]),
        _ => (vendor == u32::from_le_bytes(*b"Auth"), &[0xa0_0f11]),
    };
    match (same_vendor, models.contains(&model), template) {
        (false, ..) => Err("CPU vendor mismatched between actual CPU and CPU template."),
        (_, false, _) => Err("The current CPU model is not permitted to apply the CPU template."),
        (.., "C3") => Ok("leaf 1 0x000306e4"),
        _ => Ok("leaf 1 0x000306f2"),
    }
}

#[test]
fn a_static_template_is_for_some_processors_and_makes_another_of_them() {
    for template in ["C3", "T2", "T2S", "T2CL", "T2A"] {
        let mut vm = Served::payload("cpuid");
        vm.patch("/machine-config", json!({ "cpu_template": template }))
            .done();
        match expected(template) {
            Ok(leaf) => _ = vm.start().wait_for(leaf),
            Err(why) => {
                vm.action("InstanceStart").refused(&[
                    "Failed to get CPU template: ",
                    why,
                    template,
                ]);
                vm.patch("/machine-config", json!({ "cpu_template": "None" }))
                    .done();
                vm.start().wait_for("leaf 1 ");
            }
        }
    }
}

#[test]
fn a_static_template_stays_with_a_saved_machine() {
    let mut vm = Served::payload("serial_echo");
    let named = ["T2", "T2A"]
        .into_iter()
        .find(|name| expected(name).is_ok());
    let update = json!({ "cpu_template": named, "vcpu_count": 1 });
    vm.patch("/machine-config", update).done();
    let mut vm = vm.start().wait_for("ready");
    assert_eq!(
        vm.get("/machine-config").value()["cpu_template"],
        json!(named)
    );
    vm.patch("/vm", json!({ "state": "Paused" })).done();
    let at = |name: &str| vm.dir.path().join(name);
    let (state, memory) = (at("state"), at("memory"));
    let files = json!({ "snapshot_path": state, "mem_file_path": memory });
    vm.put("/snapshot/create", files).done();
    let mut loaded = Served::new();
    let files = json!({ "snapshot_path": state, "mem_file_path": memory, "resume_vm": true });
    loaded.put("/snapshot/load", files).done();
    let config = loaded.get("/vm/config").value();
    assert_eq!(config["machine-config"]["cpu_template"], json!(named));
    loaded.types("x");
    loaded.wait_for("x");
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
