//! bulle's own part of the kernel command line.

use std::net::IpAddr;

use super::plan::{Families, families};
use crate::config::{Config, Console, Transport, UserNetwork};

/// Words for the board, then for the agent. The user's are appended after these and so override
/// them where Linux takes the last.
pub fn kernel_words(config: &Config) -> String {
    let mut words = vec![
        // COM1; the kernel's messages, never the command's output.
        "console=ttyS0",
    ];
    if config.console().is_hvc0() {
        // The last is /dev/console. What came before it is there gets printed on it as well.
        words.push("console=hvc0");
    }
    words.extend([
        // Through the ACPI reset register: Linux expects EFI's on hardware-reduced ACPI.
        "reboot=acpi",
        // A panic resets at once, so that it never waits for a time limit.
        "panic=-1",
        // A keyboard and no mouse: spares the probes for the rest.
        "i8042.noaux",
        "i8042.nomux",
        "i8042.dumbkbd",
    ]);
    if config.machine_config.virtio_transport != Transport::Pci {
        // No PCI bus to probe.
        words.push("pci=off");
    }
    if config.memory_hotplug.is_some() {
        // Plugged memory is used at once, and so that most of it can be unplugged again.
        words.extend([
            "memhp_default_state=online",
            "memory_hotplug.online_policy=auto-movable",
        ]);
    }
    let root = config.root_drive();
    let root = match (root, &config.guest) {
        (Some(drive), Some(_)) => Some(format!("bulle.root={}", drive.serial())),
        (Some(drive), None) => {
            let mode = if drive.is_read_only { "ro" } else { "rw" };
            Some(match &drive.partuuid {
                Some(uuid) => format!("root=PARTUUID={uuid} {mode}"),
                // The root drive is the first on the bus.
                None => format!("root=/dev/vda {mode}"),
            })
        }
        (None, _) => {
            let mut pmems = config.pmem.iter();
            let index = pmems.position(|pmem| pmem.root_device);
            let pmem = index.and_then(|index| Some((index, config.pmem.get(index)?)));
            pmem.map(|(index, pmem)| {
                let mode = if pmem.read_only { "ro" } else { "rw" };
                format!("root=/dev/pmem{index} {mode}")
            })
        }
    };
    words.extend(root.as_deref());
    let networks = config.user_networks();
    let networks: Vec<_> = networks
        .map(|network| network_word(&network, families()))
        .collect();
    if config.guest.is_some() {
        words.extend(networks.iter().map(String::as_str));
        words.extend(["rdinit=/.bulle/init", "bulle.agent=port:bulle.agent,ttyS1"]);
        if config.console() == Console::Off {
            // Each byte costs an exit; a panic raises the level by itself.
            words.push("quiet");
        }
    }
    words.join(" ")
}

/// What the agent gets to know of a network.
fn network_word(network: &UserNetwork, Families { ipv4, ipv6 }: Families) -> String {
    let mac = network.mac.map(|byte| format!("{byte:02x}")).join(":");
    let (address, prefix) = (network.address, network.prefix);
    let gateway = network.gateway;
    let dns: IpAddr = match ipv4 {
        true => network.dns.into(),
        false => network.dns_ipv6().into(),
    };
    let mut word = format!("bulle.net={mac},{address}/{prefix},{gateway},{dns}");
    if ipv6 {
        let [address, gateway] = network.ipv6;
        word += &format!(",{address},{gateway}");
    }
    word
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_gets_its_port_and_a_quiet_console() {
        let text = r#"{"boot-source":{"kernel_image_path":"/k"},"guest":{}}"#;
        let mut config: Config = serde_json::from_str(text).unwrap();
        assert!(kernel_words(&config).ends_with("bulle.agent=port:bulle.agent,ttyS1 quiet"));
        config.console = Some(Console::Tty);
        assert!(kernel_words(&config).ends_with("bulle.agent=port:bulle.agent,ttyS1"));
        config.guest = None;
        assert!(!kernel_words(&config).contains("bulle"));
        config.console = Some(Console::Hvc0);
        assert!(kernel_words(&config).starts_with("console=ttyS0 console=hvc0 "));
    }

    #[test]
    fn the_agent_is_told_of_user_mode_networks() {
        let text = r#"{"boot-source":{"kernel_image_path":"/k"},"guest":{},"network-interfaces":[
            {"iface_id":"t","host_dev_name":"t"},{"iface_id":"u","mode":"user"}]}"#;
        let mut config: Config = serde_json::from_str(text).unwrap();
        let words = kernel_words(&config);
        let word = " bulle.net=02:62:75:6c:6c:03,10.0.3.15/24,10.0.3.2,10.0.3.3";
        assert!(words.contains(word), "{words}");
        assert_eq!(words.matches("bulle.net").count(), 1);
        let network = config.user_networks().next().unwrap();
        let word = |ipv4, ipv6| network_word(&network, Families { ipv4, ipv6 });
        let (four, both) = (word(true, false), word(true, true));
        let six = ",fd62:756c:6c65:3::15,fd62:756c:6c65:3::2";
        assert_eq!(both, four + six);
        let resolver = format!(",fd62:756c:6c65:3::3{six}");
        assert!(word(false, true).ends_with(&resolver));
        config.guest = None;
        assert!(!kernel_words(&config).contains("bulle.net"));
    }

    #[test]
    fn pmem_is_the_root_of_a_guest_on_its_own_and_plugged_memory_goes_online() {
        let text = r#"{"boot-source":{"kernel_image_path":"/k"},
            "pmem":[{"id":"a","path_on_host":"/a"},
                    {"id":"b","path_on_host":"/b","root_device":true,"read_only":true}],
            "memory-hotplug":{"total_size_mib":128}}"#;
        let config: Config = serde_json::from_str(text).unwrap();
        let words = kernel_words(&config);
        assert!(words.ends_with(" root=/dev/pmem1 ro"), "{words}");
        assert!(words.contains(" memhp_default_state=online "), "{words}");
    }

    #[test]
    fn the_root_drive_is_named_to_the_agent_or_to_the_kernel() {
        let text = r#"{"boot-source":{"kernel_image_path":"/k"},"guest":{"root":"drive"},
            "drives":[{"drive_id":"a","path_on_host":"/a"},
                      {"drive_id":"r","path_on_host":"/r","is_root_device":true}]}"#;
        let mut config: Config = serde_json::from_str(text).unwrap();
        assert!(kernel_words(&config).contains(" bulle.root=r "));
        config.guest = None;
        assert!(kernel_words(&config).ends_with(" root=/dev/vda rw"));
        config.drives[1].is_read_only = true;
        assert!(kernel_words(&config).ends_with(" root=/dev/vda ro"));
        config.drives[1].partuuid = Some("0eaa91a0-01".into());
        assert!(kernel_words(&config).ends_with(" root=PARTUUID=0eaa91a0-01 ro"));
    }
}
