//! A guest that sends raw FUSE requests, and what it must get.

mod confinement;
mod device;
mod kernel;
mod limits;
mod ops;
mod policy;
mod random;
mod state;

use std::ffi::CString;
use std::path::Path;

use fuse_abi::os::{
    fuse_entry_out, fuse_init_in, fuse_opcode as op, fuse_open_in, fuse_open_out, fuse_out_header,
    fuse_read_in, fuse_release_in, fuse_write_in, fuse_write_out,
};
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::message::{IN_HEADER, OUT_HEADER};
use super::{Fs, FsOptions, FsState};
use crate::virtio::GuestRam;
use crate::virtio::driver::{RAM, RAM_LEN, reused_ram};
use crate::virtio::io::Segment;

pub const ROOT: u64 = 1;
/// Where requests are put, and where answers are expected.
const REQUEST: u64 = 0x1000;
const REPLY: u64 = RAM[1];

/// A share of a temporary directory, and its guest.
pub struct Guest {
    pub dir: TempDir,
    pub fs: Fs,
    pub ram: GuestRam,
    pub unique: u64,
    pub ids: (u32, u32),
}

pub fn segment(addr: u64, len: usize) -> Segment {
    Segment {
        addr: GuestAddress(addr),
        len: len as u32,
    }
}

/// A request's header.
pub fn header(len: usize, opcode: u32, unique: u64, node: u64, ids: (u32, u32)) -> Vec<u8> {
    let words = [
        len as u32,
        opcode,
        unique as u32,
        (unique >> 32) as u32,
        node as u32,
        (node >> 32) as u32,
        ids.0,
        ids.1,
        1,
        0,
    ];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn name(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

/// A structure of the answer.
pub fn get<T: FromBytes + KnownLayout + Immutable>(answer: &[u8]) -> T {
    T::read_from_prefix(answer).unwrap().0
}

impl Guest {
    pub fn new(change: impl FnOnce(&mut FsOptions)) -> Self {
        let mut guest = Self::silent(tempfile::tempdir().unwrap(), change, &FsState::default());
        guest.init();
        guest
    }

    pub fn writable() -> Self {
        Self::new(|options| options.read_only = false)
    }

    /// Without a session.
    pub fn silent(dir: TempDir, change: impl FnOnce(&mut FsOptions), state: &FsState) -> Self {
        let mut options = FsOptions::new("share", dir.path());
        options.max_fds = Some(64);
        change(&mut options);
        Self {
            fs: Fs::new(options, state).unwrap(),
            dir,
            ram: reused_ram(),
            unique: 1 << 40,
            ids: (0, 0),
        }
    }

    pub fn init(&mut self) {
        let init = fuse_init_in {
            major: 7,
            minor: 38,
            flags: u32::MAX,
            flags2: u32::MAX,
            ..Default::default()
        };
        self.call(op::FUSE_INIT, 0, &[init.as_bytes()]).unwrap();
    }

    pub fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// Sends a request as it is; the bytes that were answered.
    pub fn raw(&mut self, request: &[u8], room: usize) -> Vec<u8> {
        self.ram
            .write_slice(request, GuestAddress(REQUEST))
            .unwrap();
        let noise = vec![0xa5; room];
        self.ram.write_slice(&noise, GuestAddress(REPLY)).unwrap();
        // In odd pieces, as a driver may have it.
        let cut = request.len().min(IN_HEADER + 3);
        let readable = [
            segment(REQUEST, cut),
            segment(REQUEST + cut as u64, request.len() - cut),
        ];
        let cut = room.min(OUT_HEADER + 5);
        let writable = [segment(REPLY, cut), segment(REPLY + cut as u64, room - cut)];
        let len = self.fs.serve(&self.ram, &readable, &writable).unwrap();
        let mut answer = vec![0; room];
        self.ram
            .read_slice(&mut answer, GuestAddress(REPLY))
            .unwrap();
        let rest = answer.split_off(len as usize);
        if len > 0 {
            assert!(
                rest.iter().all(|byte| *byte == 0xa5),
                "more was written than said"
            );
        }
        answer
    }

    pub fn call_in(
        &mut self,
        opcode: op,
        node: u64,
        parts: &[&[u8]],
        room: usize,
    ) -> Result<Vec<u8>, i32> {
        let body = parts.concat();
        self.unique += 1;
        let len = IN_HEADER + body.len();
        let mut request = header(len, opcode as u32, self.unique, node, self.ids);
        request.extend_from_slice(&body);
        let mut answer = self.raw(&request, OUT_HEADER + room);
        if answer.is_empty() {
            return Ok(answer);
        }
        let head: fuse_out_header = get(&answer);
        assert_eq!(head.len as usize, answer.len());
        assert_eq!(head.unique, self.unique);
        let answer = answer.split_off(OUT_HEADER);
        match head.error {
            0 => Ok(answer),
            error => {
                assert!(answer.is_empty() && (-4095..0).contains(&error));
                Err(-error)
            }
        }
    }

    pub fn call(&mut self, opcode: op, node: u64, parts: &[&[u8]]) -> Result<Vec<u8>, i32> {
        self.call_in(opcode, node, parts, 4096)
    }

    pub fn look_up(&mut self, parent: u64, file: &str) -> Result<fuse_entry_out, i32> {
        let answer = self.call(op::FUSE_LOOKUP, parent, &[&name(file)])?;
        Ok(get(&answer))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let open = fuse_open_in {
            flags: flags as u32,
            open_flags: 0,
        };
        let answer = self.call(op::FUSE_OPEN, node, &[open.as_bytes()])?;
        Ok(get::<fuse_open_out>(&answer).fh)
    }

    pub fn open_dir(&mut self, node: u64) -> Result<u64, i32> {
        let answer = self.call(op::FUSE_OPENDIR, node, &[&[0; 8]])?;
        Ok(get::<fuse_open_out>(&answer).fh)
    }

    pub fn read(&mut self, fh: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let read = fuse_read_in {
            fh,
            offset,
            size,
            ..Default::default()
        };
        let room = (RAM_LEN as usize - OUT_HEADER).min(size as usize);
        self.call_in(op::FUSE_READ, ROOT, &[read.as_bytes()], room)
    }

    pub fn write(&mut self, fh: u64, offset: u64, data: &[u8]) -> Result<u32, i32> {
        let write = fuse_write_in {
            fh,
            offset,
            size: data.len() as u32,
            ..Default::default()
        };
        let answer = self.call(op::FUSE_WRITE, ROOT, &[write.as_bytes(), data])?;
        Ok(get::<fuse_write_out>(&answer).size)
    }

    pub fn release(&mut self, fh: u64, dir: bool) -> Result<Vec<u8>, i32> {
        let release = fuse_release_in {
            fh,
            ..Default::default()
        };
        let opcode = if dir {
            op::FUSE_RELEASEDIR
        } else {
            op::FUSE_RELEASE
        };
        self.call(opcode, ROOT, &[release.as_bytes()])
    }

    pub fn forget(&mut self, node: u64, count: u64) {
        let answer = self.call_in(op::FUSE_FORGET, node, &[count.as_bytes()], 0);
        assert_eq!(answer, Ok(Vec::new()));
    }
}

/// Makes a file with content in a directory of the host.
pub fn put(dir: &Path, file: &str, content: &str) {
    std::fs::write(dir.join(file), content).unwrap();
}
