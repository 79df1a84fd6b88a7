//! The share as a device: its configuration space, its queues, and a snapshot.

use fuse_abi::os::{fuse_init_in, fuse_init_out, fuse_opcode as op, fuse_out_header};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use super::super::{Fs, FsOptions};
use super::{IN_HEADER, OUT_HEADER, ROOT, get, header, name, put};
use crate::virtio::device::DeviceState;
use crate::virtio::driver::{Rig, TRANSPORTS, Vq};
use crate::virtio::registry::{DeviceConfig, build};

const REQUEST: u64 = 0x8_0000;
const REPLY: u64 = 0x9_0000;

fn call(rig: &Rig, vq: &mut Vq, opcode: op, body: &[u8]) -> (fuse_out_header, Vec<u8>) {
    let mut request = header(IN_HEADER + body.len(), opcode as u32, 9, ROOT, (0, 0));
    request.extend_from_slice(body);
    rig.ram
        .write_slice(&request, GuestAddress(REQUEST))
        .unwrap();
    let head = vq.add(&[
        (REQUEST, 40, false),
        (REQUEST + 40, body.len() as u32, false),
        (REPLY, 16, true),
        (REPLY + 16, 240, true),
    ]);
    rig.kick(vq);
    rig.run(0);
    let len = vq.used()[&u32::from(head)];
    let mut answer = vec![0; len as usize];
    rig.ram
        .read_slice(&mut answer, GuestAddress(REPLY))
        .unwrap();
    let rest = answer.split_off(OUT_HEADER);
    (get(&answer), rest)
}

#[test]
fn a_driver_mounts_and_goes_on_after_a_restore() {
    for transport in TRANSPORTS {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "file", "content");
        let mut options = FsOptions::new("a tag", dir.path());
        options.queues = 2;
        let fs = Fs::new(options.clone(), &Default::default()).unwrap();
        let rig = Rig::new(transport, Box::new(fs));
        let mut space = [0xff; 48];
        rig.port.read_config(0, &mut space[..44]);
        let mut expected = [0; 36];
        expected[..5].copy_from_slice(b"a tag");
        assert_eq!(space[..36], expected);
        assert_eq!(space[36..40], [2, 0, 0, 0]);
        let mut vqs = rig.start(None);
        assert_eq!(vqs.len(), 3);
        let init = fuse_init_in {
            major: 7,
            minor: 38,
            ..Default::default()
        };
        let (head, answer) = call(&rig, &mut vqs[1], op::FUSE_INIT, init.as_bytes());
        assert_eq!((head.error, head.unique, head.len), (0, 9, 80));
        assert_eq!(get::<fuse_init_out>(&answer).major, 7);
        for vq in &mut vqs {
            let (head, _) = call(&rig, vq, op::FUSE_LOOKUP, &name("file"));
            assert_eq!((head.error, head.len), (0, 16 + 128));
        }
        rig.core.pause();
        let state = rig.core.save();
        assert_ne!(state.device, DeviceState::Reset);
        let device = build(DeviceConfig::Fs(options), &state.device).unwrap().0;
        let again = Rig::with(transport, device, rig.ram.clone(), state);
        again.core.resume();
        let (head, _) = call(&again, &mut vqs[2], op::FUSE_LOOKUP, &name("none"));
        assert_eq!(head.error, -libc::ENOENT, "the session goes on");
    }
}
