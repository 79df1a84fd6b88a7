//! The crate fc-sdk: configures, boots, reaches, pauses and stops a microVM.

use std::error::Error;
use std::num::NonZeroU64;

use clients::{Job, ask_by_vsock};
use fc_sdk::process::FirecrackerProcessBuilder;
use fc_sdk::types::{
    BootSource, Drive, DriveCacheType, DriveIoEngine, MachineConfiguration, SerialDevice, Vsock,
};

fn main() -> Result<(), Box<dyn Error>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(round(&Job::read()?))
}

async fn round(job: &Job) -> Result<(), Box<dyn Error>> {
    let socket = job.file("vsock");
    let mut process = FirecrackerProcessBuilder::new(&job.firecracker, job.file("api"))
        .id("sdk")
        .spawn()
        .await?;
    let vm = process
        .vm_builder()
        .boot_source(BootSource {
            kernel_image_path: job.kernel.display().to_string(),
            boot_args: Some("console=ttyS0 reboot=k panic=1 pci=off".into()),
            initrd_path: Some(job.initrd.display().to_string()),
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
            path_on_host: Some(job.rootfs.display().to_string()),
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
            uds_path: socket.clone(),
            vsock_id: None,
        })
        .serial(SerialDevice {
            serial_out_path: Some(job.file("console")),
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
