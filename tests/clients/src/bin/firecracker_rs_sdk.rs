//! The crate firecracker-rs-sdk: configures, boots, reaches, pauses, saves and stops a microVM.

use std::error::Error;

use clients::{Job, ask_by_network, until_gone};
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::models::{
    BootSource, Drive, MachineConfiguration, NetworkInterface, SnapshotCreateParams, SnapshotType,
};

/// The guest's address behind the tap `vm0`.
const ADDRESS: &str = "10.9.0.2";

fn main() -> Result<(), Box<dyn Error>> {
    let job = Job::read()?;
    let mut instance = FirecrackerOption::new(&job.firecracker)
        .api_sock(job.dir.join("api"))
        .id("sdk")
        .stdin("/dev/null")
        .stdout(job.dir.join("console"))
        .stderr(job.dir.join("errors"))
        .build()?;
    instance.start_vmm()?;
    let version = instance.get_firecracker_version()?;
    println!("version {}", version.firecracker_version);
    instance.put_machine_configuration(&MachineConfiguration {
        cpu_template: None,
        smt: Some(true),
        mem_size_mib: 192,
        track_dirty_pages: None,
        vcpu_count: 1,
        huge_pages: None,
    })?;
    let network = format!("ip={ADDRESS}::10.9.0.1:255.255.255.0:sdk:eth0:on");
    instance.put_guest_boot_source(&BootSource {
        boot_args: Some(format!("console=ttyS0 reboot=k panic=1 pci=off {network}")),
        initrd_path: Some(job.initrd.clone()),
        kernel_image_path: job.kernel.clone(),
    })?;
    instance.put_guest_drive_by_id(&Drive {
        drive_id: "rootfs".into(),
        partuuid: None,
        is_root_device: true,
        cache_type: None,
        is_read_only: false,
        path_on_host: job.rootfs.clone(),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    })?;
    instance.put_guest_network_interface_by_id(&NetworkInterface {
        guest_mac: Some("06:00:AC:10:00:02".into()),
        host_dev_name: "vm0".into(),
        iface_id: "eth0".into(),
        rx_rate_limiter: None,
        tx_rate_limiter: None,
    })?;
    instance.start()?;
    println!("first {}", ask_by_network(ADDRESS, "one")?);
    instance.pause()?;
    println!("state {:?}", instance.describe_instance()?.state);
    instance.create_snapshot(&SnapshotCreateParams {
        mem_file_path: job.dir.join("memory"),
        snapshot_path: job.dir.join("state"),
        snapshot_type: Some(SnapshotType::Full),
        version: None,
    })?;
    instance.resume()?;
    println!("second {}", ask_by_network(ADDRESS, "two")?);
    let config = instance.get_export_vm_config()?;
    let interfaces = config.network_interfaces.map_or(0, |all| all.len());
    println!("interfaces {interfaces}");
    instance.stop()?;
    until_gone(instance.firecracker_pid().ok_or("no process")?)?;
    println!("stopped");
    Ok(())
}
