//! A vCPU that waits for the host does not pause, which is said in time; the machine goes on.

use std::io::{self, Write};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use arch::kernel::KernelImage;
use bulle::vm::Vm;
use bulle::vm::build::Initrd;

use crate::common;
use crate::machine::{Output, config, host, wiring};

/// A console whose reader takes nothing until it is told to.
struct Shut {
    open: Receiver<()>,
    reached: Sender<()>,
}

impl Write for Shut {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Fails once nobody is there who could open it, or who waits for the first byte.
        let _ = self.reached.send(());
        let _ = self.open.recv();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_vcpu_that_waits_for_its_console_s_reader_is_named_and_pauses_later() {
    let (open, shut) = channel();
    let (reached, writes) = channel();
    let machine = r#"{ "machine-config": { "mem_size_mib": 64 } }"#;
    let config = config(&common::payload("console_flood"), machine);
    let spec = config.validate().unwrap();
    let mut wiring = wiring(&spec, &Output::default());
    wiring.console.out = Box::new(Shut {
        open: shut,
        reached,
    });
    let kernel = KernelImage::open(&spec.config().boot_source.kernel_image_path).unwrap();
    let vm = Vm::build(&spec, host(&spec), &kernel, Initrd::default(), wiring).unwrap();
    vm.start();
    writes.recv().unwrap();
    let begin = Instant::now();
    let error = vm.pause(Duration::from_millis(50)).unwrap_err();
    assert!(begin.elapsed() < Duration::from_secs(10));
    let text = error.to_string();
    assert!(text.contains("vCPU 0 does not pause within 50ms"), "{text}");
    assert!(text.contains("reader of the console"), "{text}");
    // As the API does: all go on, and a later pause finds the vCPU in the guest.
    vm.start();
    drop(open);
    vm.pause(Duration::from_secs(60)).unwrap();
}
