//! A page fault handler as a client of bulle writes it, after Firecracker's protocol alone.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use serde::Deserialize;

#[derive(Clone, Debug, Deserialize)]
pub struct Mapping {
    pub base_host_virt_addr: u64,
    pub size: u64,
    pub offset: u64,
    pub page_size: u64,
    pub page_size_kib: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

nix::ioctl_readwrite!(copy, 0xaa, 0x03, Copy);

const PAGEFAULT: u8 = 0x12;
const REMOVE: u8 = 0x15;

/// What a handler does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Brings pages.
    Serve,
    /// Takes the message and goes.
    Leave,
    /// Takes the message, then reads faults and does not answer.
    Listen,
}

/// Whether it is to stop, faults, and pages that were removed.
type Counts = (Arc<AtomicBool>, Arc<AtomicUsize>, Arc<AtomicUsize>);

/// A handler that is at work, for one microVM.
pub struct Pager {
    stop: Arc<AtomicBool>,
    pub faults: Arc<AtomicUsize>,
    pub removed: Arc<AtomicUsize>,
    thread: Option<JoinHandle<Vec<Mapping>>>,
}

impl Pager {
    /// Listens at `socket` and has the content of `memory`.
    pub fn start(socket: &Path, memory: &Path, way: Way) -> Self {
        let listener = UnixListener::bind(socket).unwrap();
        let memory = File::open(memory).unwrap();
        let counts = Counts::default();
        let (stop, faults, removed) = counts.clone();
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().unwrap();
            let (mappings, uffd) = receive(&stream);
            if way != Way::Leave {
                serve(&uffd, &mappings, &memory, way == Way::Serve, &counts);
            }
            mappings
        });
        Self {
            stop,
            faults,
            removed,
            thread: Some(thread),
        }
    }

    /// Goes, with all descriptors, and says what it was told.
    pub fn end(mut self) -> Vec<Mapping> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap()
    }
}

fn receive(stream: &UnixStream) -> (Vec<Mapping>, File) {
    let mut text = [0; 4096];
    let mut space = nix::cmsg_space!([i32; 4]);
    let (len, fds) = {
        let mut iov = [IoSliceMut::new(&mut text)];
        let flags = MsgFlags::empty();
        let message = recvmsg::<()>(stream.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
        let fds: Vec<i32> = message
            .cmsgs()
            .unwrap()
            .flat_map(|control| match control {
                ControlMessageOwned::ScmRights(fds) => fds,
                other => panic!("{other:?}"),
            })
            .collect();
        (message.bytes, fds)
    };
    assert_eq!(fds.len(), 1);
    // SAFETY: it has just come.
    let uffd = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    (serde_json::from_slice(&text[..len]).unwrap(), uffd.into())
}

fn serve(
    uffd: &File,
    mappings: &[Mapping],
    memory: &File,
    answer: bool,
    (stop, faults, removed): &Counts,
) {
    let mut gone = BTreeSet::new();
    let mut waiting = Vec::new();
    while !stop.load(Ordering::SeqCst) {
        let mut fds = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
        poll(&mut fds, PollTimeout::from(10_u8)).unwrap();
        let mut message = [0; 32];
        while let Ok(32) = (&mut &*uffd).read(&mut message) {
            let word = |at: usize| u64::from_ne_bytes(message[at..at + 8].try_into().unwrap());
            match message[0] {
                PAGEFAULT => {
                    faults.fetch_add(1, Ordering::SeqCst);
                    waiting.push(word(16) & !0xfff);
                }
                REMOVE => {
                    let pages = (word(8)..word(16)).step_by(4096);
                    removed.fetch_add(pages.clone().count(), Ordering::SeqCst);
                    gone.extend(pages);
                }
                other => panic!("event {other:#x}"),
            }
        }
        if answer {
            // One that meets a removal is tried again.
            waiting.retain(|page| !bring(uffd, mappings, memory, *page, gone.contains(page)));
        }
    }
}

fn bring(uffd: &File, mappings: &[Mapping], memory: &File, page: u64, zero: bool) -> bool {
    let within =
        |m: &&Mapping| (m.base_host_virt_addr..m.base_host_virt_addr + m.size).contains(&page);
    let mapping = mappings.iter().find(within).unwrap();
    let start = page / mapping.page_size * mapping.page_size;
    let mut bytes = vec![0; mapping.page_size as usize];
    if !zero {
        let at = start - mapping.base_host_virt_addr + mapping.offset;
        memory.read_exact_at(&mut bytes, at).unwrap();
    }
    let mut arg = Copy {
        dst: start,
        src: bytes.as_ptr() as u64,
        len: mapping.page_size,
        mode: 0,
        copy: 0,
    };
    // SAFETY: as the kernel has the structure; the source is a buffer of that length.
    match unsafe { copy(uffd.as_raw_fd(), &raw mut arg) } {
        Ok(_) | Err(nix::errno::Errno::EEXIST | nix::errno::Errno::ESRCH) => true,
        Err(nix::errno::Errno::EAGAIN) => false,
        Err(errno) => panic!("{errno} at {page:#x}"),
    }
}
