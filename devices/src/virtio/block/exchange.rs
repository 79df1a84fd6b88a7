//! Another image in the place of the present one, while the guest runs or before it does.
//!
//! The VMM leaves the new image where the device finds it, says so, and only then changes the size. The
//! device looks at the size first and then for a new image: a size that it goes by is never that of an
//! image which it has not got yet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::uring::Ring;
use super::{Block, BlockError, BlockHandle, Disk, Engine, host_error};
use crate::lock;
use crate::virtio::device::DeviceError;
use crate::virtio::io::Io;

/// The image that a device is to have.
#[derive(Debug)]
pub(super) struct Present {
    disk: Mutex<Arc<Disk>>,
    /// The device has not got it yet.
    is_new: AtomicBool,
}

impl Present {
    pub fn new(disk: Arc<Disk>) -> Self {
        Self {
            disk: Mutex::new(disk),
            is_new: AtomicBool::new(false),
        }
    }

    pub fn disk(&self) -> Arc<Disk> {
        lock(&self.disk).clone()
    }
}

impl BlockHandle {
    /// Has the device use another image from the next request on; those under way are finished on the
    /// present one. Returns the size in sectors, of which the driver is told.
    ///
    /// # Errors
    /// An image that cannot take the present one's place: the driver knows block size and whether it
    /// may write. The host.
    pub fn exchange(&self, disk: Disk) -> Result<u64, BlockError> {
        let exchanged = self.put(disk);
        if exchanged.is_err() {
            self.counters.update_fails.one();
        }
        exchanged
    }

    fn put(&self, disk: Disk) -> Result<u64, BlockError> {
        let present = self.present.disk();
        let path = disk.path().to_path_buf();
        if disk.read_only() != present.read_only()
            || disk.logical_block_size() != present.logical_block_size()
        {
            return Err(BlockError::Unlike { path });
        }
        let host = |what| move |source| BlockError::Host { what, source };
        let sectors = disk.sectors().map_err(host("find the size of the disk"))?;
        *lock(&self.present.disk) = Arc::new(disk);
        self.present.is_new.store(true, Ordering::SeqCst);
        if self.space.resize(sectors) {
            self.counters.updates.one();
        }
        self.wake.write(1).map_err(host("wake the I/O thread"))?;
        Ok(sectors)
    }
}

impl Block {
    /// Takes a new image, if there is one: says whether. What is under way is finished first; what waits
    /// for its tokens was checked against the old size, and comes again.
    pub(super) fn take_image(&mut self, io: &mut Io<'_>) -> Result<bool, DeviceError> {
        if !self.present.is_new.swap(false, Ordering::SeqCst) {
            return Ok(false);
        }
        let disk = self.present.disk();
        for queue in 0..self.held.len() {
            self.collect(queue, io, Ring::drain)?;
            self.let_go(queue, io);
            if let Engine::Uring(rings) = &mut self.engine
                && let Some(ring) = rings.get_mut(queue)
            {
                let exchanged = ring.exchange(Arc::clone(&disk));
                exchanged.map_err(|error| host_error("give io_uring another file", error))?;
            }
        }
        log::info!(
            "disk {:?} takes the place of {:?}",
            disk.path(),
            self.disk.path()
        );
        self.disk = disk;
        Ok(true)
    }

    /// Puts a request back that waits for its tokens.
    pub(super) fn let_go(&mut self, queue: usize, io: &mut Io<'_>) {
        if let Some(held) = self.held.get_mut(queue).and_then(Option::take) {
            // It will come again, and be charged then.
            if let Some(limiter) = self.limiter.get() {
                limiter.refund(held.request.bytes());
            }
            io.unpop(held.chain);
        }
    }
}
