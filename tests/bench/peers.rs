//! Who takes part, and with which command line: each at its leanest documented setting.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{common, path_from, sample};

/// A monitor and how it is started.
pub struct Contender {
    /// Its name.
    pub name: &'static str,
    binary: PathBuf,
    args: fn(&Path, &str) -> Vec<String>,
    /// What `args` gets, found by trying.
    variant: &'static str,
}

impl Contender {
    /// The command that runs a payload in it.
    pub fn command(&self, payload: &str) -> Command {
        let mut command = Command::new(&self.binary);
        command.args((self.args)(&common::payload(payload), self.variant));
        command
    }
}

fn words(text: &str) -> Vec<String> {
    text.split_ascii_whitespace().map(str::to_owned).collect()
}

fn bulle(payload: &Path, _: &str) -> Vec<String> {
    let payload = payload.display();
    words(&format!(
        "run --root none --cpus 1 --memory 128M --kernel {payload}"
    ))
}

fn firecracker(payload: &Path, _: &str) -> Vec<String> {
    let config = payload.with_extension("firecracker.json");
    let json = serde_json::json!({
        "boot-source": { "kernel_image_path": payload, "boot_args": "console=ttyS0" },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": 128 },
    });
    std::fs::write(&config, json.to_string()).expect("target/payloads is writable");
    let config = config.display();
    words(&format!(
        "--no-api --no-seccomp --log-path /dev/null --config-file {config}"
    ))
}

fn cloud_hypervisor(payload: &Path, _: &str) -> Vec<String> {
    let payload = payload.display();
    words(&format!(
        "--seccomp false --cpus boot=1 --memory size=128M --serial tty --console off --kernel {payload}"
    ))
}

fn qemu(payload: &Path, cpu: &str) -> Vec<String> {
    let payload = payload.display();
    words(&format!(
        "-M microvm,accel=kvm,pit=off,pic=off,rtc=off -cpu {cpu} -m 128 -smp 1 -nodefaults \
         -no-user-config -nographic -serial stdio -no-reboot -kernel {payload}"
    ))
}

/// Everyone who was named and runs the payload, bulle first. Says who is absent and why.
pub fn find() -> Vec<Contender> {
    let own = path_from("BULLE").unwrap_or_else(|| env!("CARGO_BIN_EXE_bulle").into());
    let bulle = Contender {
        name: "bulle",
        binary: own,
        args: bulle,
        variant: "",
    };
    assert!(
        sample(&bulle).is_some(),
        "bulle does not run the payload: {:?}",
        bulle.command("first_byte")
    );
    let mut found = vec![bulle];
    // Not every KVM has what `-cpu host` asks for.
    let cpus: &[&str] = &["host", "host,-arch-capabilities", "qemu64"];
    type Args = fn(&Path, &str) -> Vec<String>;
    let peers: [(&str, &str, Args, &[&str]); 3] = [
        ("firecracker", "FIRECRACKER", firecracker, &[""]),
        (
            "cloud-hypervisor",
            "CLOUD_HYPERVISOR",
            cloud_hypervisor,
            &[""],
        ),
        ("qemu microvm", "QEMU", qemu, cpus),
    ];
    for (name, variable, args, variants) in peers {
        let Some(binary) = path_from(variable) else {
            println!("absent: {name} ({variable} is not set)");
            continue;
        };
        assert!(
            binary.is_file(),
            "{variable}={}: no such file",
            binary.display()
        );
        let contenders = variants.iter().map(|variant| Contender {
            name,
            binary: binary.clone(),
            args,
            variant,
        });
        match contenders
            .into_iter()
            .find(|contender| sample(contender).is_some())
        {
            Some(contender) => found.push(contender),
            None => println!(
                "absent: {name} ({} does not run the payload)",
                binary.display()
            ),
        }
    }
    found
}
