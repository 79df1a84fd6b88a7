//! A vhost-user backend for tests: a disk in memory, served by a thread. It can be told to break the
//! protocol. It panics where the test, or the device, is wrong.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::lock;

/// Requests of the protocol, by their numbers.
pub mod request {
    #![allow(missing_docs)]
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
}
use request::*;

/// What a backend does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not answer this request, nor any later one.
    Mute(u32),
    /// It hangs up at this request.
    Close(u32),
    /// It answers this one with the number of another.
    Wrong(u32),
    /// It refuses this one.
    Refuse(u32),
    /// Its configuration space has so many bytes.
    Config(u32),
}

/// What a backend has.
#[derive(Clone, Copy, Debug)]
pub struct PeerOptions {
    /// Features of virtio, with bit 30 for the protocol's own.
    pub features: u64,
    /// Features of the protocol.
    pub protocol: u64,
    /// The most queues.
    pub queues: u64,
}

impl Default for PeerOptions {
    /// All that the device makes use of, and two queues.
    fn default() -> Self {
        Self {
            // SEG_MAX, BLK_SIZE, FLUSH, MQ; INDIRECT_DESC, EVENT_IDX, the protocol's; VERSION_1.
            features: 1 << 2 | 1 << 6 | 1 << 9 | 1 << 12 | 7 << 28 | 1 << 32,
            // MQ, REPLY_ACK, CONFIG.
            protocol: 1 << 0 | 1 << 3 | 1 << 9,
            queues: 2,
        }
    }
}

#[derive(Debug)]
struct Shared {
    options: PeerOptions,
    disk: Mutex<Vec<u8>>,
    fault: Mutex<Option<Fault>>,
    seen: Mutex<Vec<u32>>,
    flushes: AtomicU32,
    end: EventFd,
}

/// A backend that runs. Dropping it ends it as if it were killed.
#[derive(Debug)]
pub struct Peer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Peer {
    /// Listens at `path`, with a disk of `sectors`.
    pub fn start(path: &Path, sectors: usize, options: PeerOptions) -> Self {
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path).unwrap();
        let shared = Arc::new(Shared {
            options,
            disk: Mutex::new(vec![0; 512 * sectors]),
            fault: Mutex::default(),
            seen: Mutex::default(),
            flushes: AtomicU32::new(0),
            end: EventFd::new(0).unwrap(),
        });
        let serving = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            while serving.wait(listener.as_raw_fd(), &[]).is_some() {
                let stream = listener.accept().unwrap().0;
                Session::new(&serving, stream).run();
            }
        });
        Self {
            shared,
            thread: Some(thread),
        }
    }

    /// What it does wrong from now on.
    pub fn set_fault(&self, fault: Option<Fault>) {
        *lock(&self.shared.fault) = fault;
    }

    /// Another size of the disk.
    pub fn resize(&self, sectors: usize) {
        lock(&self.shared.disk).resize(512 * sectors, 0);
    }

    /// What is in the disk at `offset`.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        lock(&self.shared.disk)[offset..offset + len].to_vec()
    }

    /// Flushes that came.
    pub fn flushes(&self) -> u32 {
        self.shared.flushes.load(Ordering::SeqCst)
    }

    /// How often `request` came.
    pub fn count(&self, request: u32) -> usize {
        let seen = lock(&self.shared.seen);
        seen.iter().filter(|seen| **seen == request).count()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.shared.end.write(1);
        let thread = self.thread.take().map(JoinHandle::join);
        if let Some(Err(panic)) = thread
            && !std::thread::panicking()
        {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Shared {
    /// Waits for `fd` or one of `others`: the index of the first that is readable, from `fd` as 0 on;
    /// none at the end.
    fn wait(&self, fd: i32, others: &[i32]) -> Option<usize> {
        let all = [self.end.as_raw_fd(), fd]
            .into_iter()
            .chain(others.iter().copied());
        let mut polled: Vec<_> = all
            .map(|fd| libc::pollfd {
                fd,
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        // SAFETY: the pointer and the length describe `polled`.
        unsafe { libc::poll(polled.as_mut_ptr(), polled.len() as u64, -1) };
        let first = polled
            .iter()
            .position(|polled| polled.revents != 0)
            .unwrap();
        first.checked_sub(1)
    }
}

#[derive(Default)]
struct Ring {
    size: u16,
    /// Descriptors, used, available: addresses of the other process.
    addresses: [u64; 3],
    base: u16,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    enabled: bool,
    queue: Option<Queue>,
}

/// One connection.
struct Session<'a> {
    shared: &'a Shared,
    stream: UnixStream,
    features: u64,
    /// Guest address, length and the other process's address of each piece.
    pieces: Vec<[u64; 3]>,
    ram: GuestMemoryMmap<()>,
    rings: Vec<Ring>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn event(files: Vec<File>) -> EventFd {
    // SAFETY: the descriptor was received and is owned by nobody else.
    unsafe {
        EventFd::from_raw_fd(
            files
                .into_iter()
                .next()
                .expect("no descriptor")
                .into_raw_fd(),
        )
    }
}

impl<'a> Session<'a> {
    fn new(shared: &'a Shared, stream: UnixStream) -> Self {
        let rings = (0..shared.options.queues).map(|_| Ring::default());
        Self {
            shared,
            stream,
            features: 0,
            pieces: Vec::new(),
            ram: GuestMemoryMmap::new(),
            rings: rings.collect(),
        }
    }

    fn run(mut self) {
        loop {
            let kicks = self.rings.iter().enumerate();
            let kicks =
                kicks.filter_map(|(index, ring)| Some((index, ring.kick.as_ref()?.as_raw_fd())));
            let (queues, fds): (Vec<_>, Vec<_>) = kicks.unzip();
            match self.shared.wait(self.stream.as_raw_fd(), &fds) {
                None => return,
                Some(0) => match self.message() {
                    Some(()) => {}
                    None => return,
                },
                Some(kicked) => {
                    let queue = queues[kicked - 1];
                    let _ = self.rings[queue].kick.as_ref().unwrap().read();
                    self.serve(queue);
                }
            }
        }
    }

    /// Takes one request: none at the end.
    fn message(&mut self) -> Option<()> {
        let mut header = [0; 12];
        let mut fds = [0; 8];
        let mut iovec = [libc::iovec {
            iov_base: header.as_mut_ptr().cast(),
            iov_len: header.len(),
        }];
        // SAFETY: the vector describes `header`.
        let received = unsafe { self.stream.recv_with_fds(&mut iovec, &mut fds) };
        let (bytes, count) = received.ok()?;
        if bytes < header.len() {
            return None;
        }
        // SAFETY: these descriptors were received just now.
        let files = fds[..count]
            .iter()
            .map(|fd| unsafe { File::from_raw_fd(*fd) });
        let files: Vec<_> = files.collect();
        let [request, flags, size] = [0, 4, 8].map(|at| word(&header, at));
        let mut body = vec![0; size as usize];
        std::io::Read::read_exact(&mut self.stream, &mut body).ok()?;
        lock(&self.shared.seen).push(request);
        let fault = *lock(&self.shared.fault);
        match fault {
            Some(Fault::Close(at)) if at == request => return None,
            Some(Fault::Mute(at)) if at == request => {
                // Until the other side gives up.
                while self.shared.wait(self.stream.as_raw_fd(), &[]).is_some() {
                    if self.message().is_none() {
                        break;
                    }
                }
                return None;
            }
            _ => {}
        }
        let answer = self.handle(request, &body, files);
        let refused = fault == Some(Fault::Refuse(request));
        let answer = match (answer, flags & 8 != 0) {
            (Some(answer), _) if !refused => answer,
            (None, true) => u64::from(refused).to_le_bytes().to_vec(),
            (None, false) => return Some(()),
            // An empty configuration space is a refusal.
            (Some(_), _) => vec![0; 12],
        };
        let wrong = fault == Some(Fault::Wrong(request));
        self.answer(request + u32::from(wrong), &answer)
    }

    fn answer(&mut self, request: u32, body: &[u8]) -> Option<()> {
        let header = [request, 1 | 4, body.len() as u32];
        let mut all: Vec<u8> = header.into_iter().flat_map(u32::to_le_bytes).collect();
        all.extend(body);
        match self.stream.write_all(&all) {
            Ok(()) => Some(()),
            Err(error) => {
                assert!(matches!(
                    error.kind(),
                    ErrorKind::BrokenPipe | ErrorKind::ConnectionReset
                ));
                None
            }
        }
    }

    /// Carries out a request: the answer that it has by itself.
    fn handle(&mut self, request: u32, body: &[u8], files: Vec<File>) -> Option<Vec<u8>> {
        let options = self.shared.options;
        let number = |number: u64| Some(number.to_le_bytes().to_vec());
        match request {
            GET_FEATURES => return number(options.features),
            GET_PROTOCOL_FEATURES => return number(options.protocol),
            GET_QUEUE_NUM => return number(options.queues),
            SET_OWNER => {}
            SET_FEATURES => {
                self.features = long(body, 0);
                assert_eq!(self.features & !options.features, 0, "features nobody has");
            }
            SET_PROTOCOL_FEATURES => assert_eq!(long(body, 0) & !options.protocol, 0),
            SET_MEM_TABLE => self.map(body, files),
            SET_VRING_NUM => self.ring(body).size = word(body, 4) as u16,
            SET_VRING_ADDR => self.ring(body).addresses = [8, 16, 24].map(|at| long(body, at)),
            SET_VRING_BASE => self.ring(body).base = word(body, 4) as u16,
            SET_VRING_KICK => self.ring(body).kick = Some(event(files)),
            SET_VRING_CALL => self.ring(body).call = Some(event(files)),
            SET_VRING_ENABLE => {
                self.ring(body).enabled = word(body, 4) != 0;
                let index = word(body, 0) as usize;
                self.begin(index);
            }
            GET_VRING_BASE => {
                let ring = self.ring(body);
                let next = ring
                    .queue
                    .take()
                    .map_or(ring.base, |queue| queue.next_avail());
                (ring.kick, ring.call) = (None, None);
                return Some(
                    [word(body, 0), next.into()]
                        .into_iter()
                        .flat_map(u32::to_le_bytes)
                        .collect(),
                );
            }
            GET_CONFIG => return Some(self.config(body)),
            other => panic!("request {other} is not known"),
        }
        None
    }

    fn ring(&mut self, body: &[u8]) -> &mut Ring {
        // Kicks and calls have flags from bit 8 on.
        &mut self.rings[word(body, 0) as usize & 0xff]
    }

    fn config(&self, body: &[u8]) -> Vec<u8> {
        let size = match *lock(&self.shared.fault) {
            Some(Fault::Config(size)) => size,
            _ => word(body, 4),
        };
        let mut answer: Vec<u8> = [0, size, 1]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let mut space = vec![0; size as usize];
        let sectors = lock(&self.shared.disk).len() as u64 / 512;
        let fields = [
            (0, sectors.to_le_bytes().to_vec()),
            (12, 126_u32.to_le_bytes().to_vec()),
            (20, 512_u32.to_le_bytes().to_vec()),
        ];
        for (at, value) in fields {
            if let Some(to) = space.get_mut(at..at + value.len()) {
                to.copy_from_slice(&value);
            }
        }
        answer.extend(space);
        answer
    }

    fn map(&mut self, body: &[u8], files: Vec<File>) {
        let count = word(body, 0) as usize;
        assert_eq!(count, files.len());
        let pieces =
            (0..count).map(|index| [0, 8, 16, 24].map(|at| long(body, 8 + 32 * index + at)));
        let pieces: Vec<_> = pieces.collect();
        let ranges = pieces
            .iter()
            .zip(files)
            .map(|([guest, size, _, offset], file)| {
                let file = Some(FileOffset::new(file, *offset));
                (GuestAddress(*guest), *size as usize, file)
            });
        self.ram = GuestMemoryMmap::from_ranges_with_files(ranges.collect::<Vec<_>>()).unwrap();
        self.pieces = pieces
            .iter()
            .map(|[guest, size, user, _]| [*guest, *size, *user])
            .collect();
    }

    fn guest(&self, user: u64) -> u64 {
        let mut pieces = self.pieces.iter();
        let inside = |piece: &&[u64; 3]| (piece[2]..piece[2] + piece[1]).contains(&user);
        let [guest, _, base] = pieces.find(inside).expect("a ring outside of RAM");
        guest + (user - base)
    }

    /// A queue that is enabled: sets it up where it is not.
    fn begin(&mut self, index: usize) {
        let event_idx = self.features >> 29 & 1 != 0;
        let ring = &self.rings[index];
        if !ring.enabled || ring.queue.is_some() {
            return;
        }
        let [desc, used, avail] = ring.addresses.map(|address| self.guest(address));
        let mut queue = Queue::new(256).unwrap();
        queue.set_size(ring.size);
        let half = |of: u64| (Some(of as u32), Some((of >> 32) as u32));
        let ((low, high), (avail_low, avail_high), (used_low, used_high)) =
            (half(desc), half(avail), half(used));
        queue.set_desc_table_address(low, high);
        queue.set_avail_ring_address(avail_low, avail_high);
        queue.set_used_ring_address(used_low, used_high);
        queue.set_next_avail(ring.base);
        let at = queue.used_idx(&self.ram, Ordering::Acquire).unwrap();
        queue.set_next_used(at.0);
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        self.rings[index].queue = Some(queue);
    }

    /// Carries out what is in a queue.
    fn serve(&mut self, index: usize) {
        let ram = self.ram.clone();
        let ring = &mut self.rings[index];
        let (true, Some(queue)) = (ring.enabled, &mut ring.queue) else {
            return;
        };
        loop {
            queue.disable_notification(&ram).unwrap();
            while let Some(chain) = queue.pop_descriptor_chain(&ram) {
                let head = chain.head_index();
                let buffers = chain.map(|d| (d.addr(), d.len(), d.is_write_only()));
                let len = self.shared.request(&ram, &buffers.collect::<Vec<_>>());
                queue.add_used(&ram, head, len).unwrap();
            }
            if !queue.enable_notification(&ram).unwrap() {
                break;
            }
        }
        if queue.needs_notification(&ram).unwrap() {
            ring.call.as_ref().unwrap().write(1).unwrap();
        }
    }
}

impl Shared {
    /// Carries a request out: the bytes that it wrote.
    fn request(&self, ram: &impl GuestMemory, buffers: &[(GuestAddress, u32, bool)]) -> u32 {
        let [header, data @ .., status] = buffers else {
            panic!("no request");
        };
        let kind: u32 = ram.read_obj(header.0).unwrap();
        let sector: u64 = ram.read_obj(GuestAddress(header.0.0 + 8)).unwrap();
        let mut disk = lock(&self.disk);
        let mut at = usize::try_from(sector).unwrap().saturating_mul(512);
        let mut written = 1;
        let mut ok = kind == 4;
        // Some drivers' flushes have a buffer, which is nobody's.
        for (address, len, _) in data.iter().filter(|_| kind != 4) {
            let end = at.saturating_add(*len as usize);
            let Some(part) = disk.get_mut(at..end) else {
                ok = false;
                break;
            };
            ok = true;
            match kind {
                0 => {
                    ram.write_slice(part, *address).unwrap();
                    written += len;
                }
                1 => ram.read_slice(part, *address).unwrap(),
                _ => ok = false,
            }
            at = end;
        }
        if kind == 4 {
            self.flushes.fetch_add(1, Ordering::SeqCst);
        }
        ram.write_obj(u8::from(!ok), status.0).unwrap();
        written
    }
}
