use std::fs::File;

use super::super::super::driver::ram;
use super::super::tests::temporary_disk;
use super::*;
use crate::virtio::GuestRam;
use crate::virtio::io::Chain;

fn flush(ram: &Arc<GuestRam>, head: u16) -> Task {
    let chain = Chain::without_buffers(head);
    Task::control(chain, Op::Flush, Arc::clone(ram))
}

/// Has `to` name what `from` names.
fn rename(from: RawFd, to: RawFd) {
    // SAFETY: takes no pointers; both belong to the test.
    assert_eq!(unsafe { libc::dup2(from, to) }, to);
}

#[test]
fn a_task_that_the_kernel_did_not_get_is_not_waited_for() {
    let disk = Arc::new(temporary_disk(1 << 20, false));
    let ram = Arc::new(ram());
    let mut ring = Ring::new(disk, 2).unwrap();
    // SAFETY: takes no pointers.
    let kept = unsafe { libc::dup(ring.fd()) };
    assert!(kept >= 0);
    let other = File::open("/dev/null").unwrap();
    rename(other.as_raw_fd(), ring.fd());
    for head in 0..2 {
        ring.push(flush(&ram, head)).unwrap();
    }
    // There is no room any more, and the kernel cannot be entered.
    assert!(ring.push(flush(&ram, 2)).is_err());
    assert_eq!(ring.in_flight(), 2);
    assert!(ring.turn().is_err());
    assert!(ring.drain().is_err());
    assert!(matches!(
        ring.finished()[..],
        [(_, Status::IoError, Some(_))]
    ));
    rename(kept, ring.fd());
    ring.drain().unwrap();
    assert_eq!((ring.in_flight(), ring.bytes()), (0, 0));
    let ended = ring.finished().iter().map(|(_, status, _)| *status);
    let ended: Vec<_> = ended.collect();
    assert_eq!(ended, [Status::IoError, Status::Ok, Status::Ok]);
    // SAFETY: made above, and nothing else has it.
    assert_eq!(unsafe { libc::close(kept) }, 0);
}

#[test]
fn a_refused_ring_is_an_error_unless_there_is_another_way() {
    let disk = Arc::new(temporary_disk(1 << 20, false));
    // No ring has no entries.
    let mut rings = Rings::new(1, 0, true);
    assert!(matches!(rings.make(0, &disk), Ok(None)));
    assert!(rings.get_mut(0).is_none());
    assert!(Rings::new(1, 0, false).make(0, &disk).is_err());
    let mut rings = Rings::new(1, 2, false);
    assert!(matches!(rings.make(1, &disk), Ok(None)));
    assert!(matches!(rings.make(0, &disk), Ok(Some(_))));
    assert!(matches!(rings.make(0, &disk), Ok(None)));
    rings.remove(0);
    assert!(rings.get(0).is_none());
}

#[test]
fn slow_writes_into_the_page_cache_are_left_to_the_kernel() {
    let ram = Arc::new(ram());
    let write = |sync| {
        let (chain, op) = (Chain::without_buffers(0), Op::Write { sync });
        Task::transfer(chain, op, (0, 0), Arc::clone(&ram), Instant::now()).unwrap()
    };
    let disk = Arc::new(temporary_disk(1 << 20, false));
    let mut ring = Ring::new(disk, 4).unwrap();
    ring.push(write(false)).unwrap();
    assert_eq!((ring.in_flight(), ring.finished().len()), (0, 1));
    // One that has to be on the disk is never waited for.
    ring.push(write(true)).unwrap();
    assert_eq!((ring.in_flight(), ring.finished().len()), (1, 1));
    // It was quick, or only had to wait for a processor. Whatever the host's disk did before.
    ring.resting = None;
    ring.waits = Some(waits());
    ring.took(Duration::from_millis(20));
    ring.waits = Some(-1);
    ring.took(QUICK);
    assert!(ring.resting.is_none());
    ring.took(Duration::from_millis(20));
    ring.push(write(false)).unwrap();
    assert_eq!((ring.in_flight(), ring.finished().len()), (2, 1));
    // Twenty milliseconds a hundred times over are not for ever.
    ring.resting = Some(Instant::now());
    ring.push(write(false)).unwrap();
    assert_eq!((ring.in_flight(), ring.finished().len()), (2, 2));
    ring.drain().unwrap();
    assert_eq!(ring.finished().len(), 4);
}
