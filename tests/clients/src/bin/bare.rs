//! Both crates with a bare-metal guest that waits for Ctrl-Alt-Del: each configures, boots, asks, pauses, saves or
//! looks, and stops a microVM. It needs no Linux, so it takes a second on any host with KVM.

use std::error::Error;
use std::num::NonZeroU64;
use std::time::Duration;

use clients::{Job, until_gone, until_said};
use fc_sdk::process::FirecrackerProcessBuilder;
use fc_sdk::types;
use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::models::{BootSource, MachineConfiguration};

/// What the guest says when it listens.
const READY: &str = "listening";

fn main() -> Result<(), Box<dyn Error>> {
    let job = Job::read()?;
    firecracker_rs_sdk(&job)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(fc_sdk(&job))
}

fn firecracker_rs_sdk(job: &Job) -> Result<(), Box<dyn Error>> {
    let console = job.dir.join("console");
    let mut instance = FirecrackerOption::new(&job.firecracker)
        .api_sock(job.dir.join("api"))
        .id("bare")
        .stdin("/dev/null")
        .stdout(&console)
        .stderr(job.dir.join("errors"))
        .build()?;
    instance.start_vmm()?;
    instance.put_machine_configuration(&MachineConfiguration {
        cpu_template: None,
        smt: Some(false),
        mem_size_mib: 64,
        track_dirty_pages: None,
        vcpu_count: 2,
        huge_pages: None,
    })?;
    instance.put_guest_boot_source(&BootSource {
        boot_args: None,
        initrd_path: None,
        kernel_image_path: job.kernel.clone(),
    })?;
    instance.start()?;
    until_said(&console, READY)?;
    instance.pause()?;
    println!("paused {:?}", instance.describe_instance()?.state);
    instance.resume()?;
    println!("resumed {:?}", instance.describe_instance()?.state);
    instance.stop()?;
    until_gone(instance.firecracker_pid().ok_or("no process")?)?;
    println!("stopped");
    Ok(())
}

async fn fc_sdk(job: &Job) -> Result<(), Box<dyn Error>> {
    let console = job.dir.join("other");
    let socket = job.dir.join("other.socket");
    let mut process = FirecrackerProcessBuilder::new(&job.firecracker, socket)
        .id("other")
        .socket_timeout(Duration::from_secs(60))
        .spawn()
        .await?;
    let vm = process
        .vm_builder()
        .boot_source(types::BootSource {
            kernel_image_path: job.kernel.display().to_string(),
            boot_args: None,
            initrd_path: None,
        })
        .machine_config(types::MachineConfiguration {
            vcpu_count: NonZeroU64::MIN,
            mem_size_mib: 64,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: None,
        })
        .serial(types::SerialDevice {
            serial_out_path: Some(console.display().to_string()),
        })
        .start()
        .await?;
    until_said(&console, READY)?;
    vm.pause().await?;
    println!("other {}", vm.describe().await?.state);
    vm.resume().await?;
    vm.send_ctrl_alt_del().await?;
    let status = process.wait().await?.ok_or("no process")?;
    println!("ended {status}");
    Ok(())
}
