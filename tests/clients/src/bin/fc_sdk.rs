//! The crate fc-sdk: configures, boots, reaches, pauses and stops a microVM in a jail, and in a control
//! group of version 2 if a further argument gives its limit of processes.

use std::error::Error;
use std::fs::{self, Permissions};
use std::num::NonZeroU64;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use clients::{Job, ask_by_vsock};
use fc_sdk::process::JailerProcessBuilder;
use fc_sdk::types::{
    BootSource, Drive, DriveCacheType, DriveIoEngine, MachineConfiguration, SerialDevice, Vsock,
};

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(round(&Job::read()?))
}

/// Makes the jail with what the microVM needs.
fn furnish(job: &Job) -> Result<PathBuf, Box<dyn Error>> {
    let root = job.dir.join("jails/firecracker/sdk/root");
    fs::create_dir_all(&root)?;
    let copy = |from: &Path, name: &str| {
        let to = root.join(name);
        fs::copy(from, &to)?;
        fs::set_permissions(to, Permissions::from_mode(0o666))
    };
    copy(&job.kernel, "kernel")?;
    copy(&job.initrd, "initrd")?;
    copy(&job.rootfs, "rootfs")?;
    Ok(root)
}

async fn round(job: &Job) -> Result<(), Box<dyn Error>> {
    let root = furnish(job)?;
    let socket = root.join("vsock").display().to_string();
    let jailer = job.firecracker.with_file_name("jailer");
    let mut builder = JailerProcessBuilder::new(jailer, &job.firecracker, "sdk", 30_001, 30_002)
        .chroot_base_dir(job.dir.join("jails"));
    if let Some(limit) = std::env::args().nth(6) {
        builder = builder
            .cgroup_version("2")
            .cgroup(format!("pids.max={limit}"));
    }
    let mut process = builder.spawn().await?;
    let pid = process.pid().ok_or("no process")?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
    println!("group {}", group.unwrap_or_default());
    let vm = process
        .vm_builder()
        .boot_source(BootSource {
            kernel_image_path: "/kernel".into(),
            boot_args: Some("console=ttyS0 reboot=k panic=1 pci=off".into()),
            initrd_path: Some("/initrd".into()),
        })
        .machine_config(MachineConfiguration {
            vcpu_count: NonZeroU64::MIN,
            mem_size_mib: 192,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: None,
        })
        .drive(Drive {
            drive_id: "rootfs".into(),
            path_on_host: Some("/rootfs".into()),
            is_root_device: true,
            is_read_only: Some(false),
            cache_type: DriveCacheType::Unsafe,
            io_engine: DriveIoEngine::Sync,
            partuuid: None,
            rate_limiter: None,
            socket: None,
        })
        .vsock(Vsock {
            guest_cid: 3,
            uds_path: "/vsock".into(),
            vsock_id: None,
        })
        .serial(SerialDevice {
            serial_out_path: Some("/console".into()),
        })
        .start()
        .await?;
    println!("version {}", vm.version().await?.firecracker_version);
    println!("first {}", ask_by_vsock(&socket, "one")?);
    vm.pause().await?;
    println!("state {}", vm.describe().await?.state);
    vm.resume().await?;
    println!("second {}", ask_by_vsock(&socket, "two")?);
    println!("drives {}", vm.config().await?.drives.len());
    vm.send_ctrl_alt_del().await?;
    let status = process.wait().await?.ok_or("no process")?;
    println!("stopped {status}");
    Ok(())
}
