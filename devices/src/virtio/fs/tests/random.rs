//! Requests of random bytes.

use fuse_abi::os::fuse_opcode as op;
use proptest::prelude::*;

use super::{Guest, IN_HEADER, OUT_HEADER, ROOT, header, put};

#[derive(Clone, Debug)]
struct Request {
    opcode: u32,
    node: u64,
    words: Vec<u64>,
    tail: Vec<u8>,
    len: Option<usize>,
    room: usize,
}

fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0..8_u64,
        2 => 0..0x2_0000_u64,
        2 => (0..8_u64, 0..8_u64).prop_map(|(a, b)| a << 32 | b),
        1 => any::<u64>(),
        1 => Just(u64::MAX),
        1 => Just(i64::MAX as u64),
    ]
}

fn tail() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[ab]\0([ab]\0)?".prop_map(String::into_bytes),
        1 => "(\\.|\\.\\.|a/b|user\\.a|)\0[a-z]{0,4}\0".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..300),
        1 => Just(Vec::new()),
    ]
}

fn request() -> impl Strategy<Value = Request> {
    let opcode = prop_oneof![16 => 0..54_u32, 1 => any::<u32>()];
    let len = prop::option::weighted(0.1, prop_oneof![0..100_usize, any::<usize>()]);
    let room = prop_oneof![0..64_usize, Just(4096), 0..70_000_usize];
    let words = prop::collection::vec(word(), 0..12);
    (opcode, word(), words, tail(), len, room).prop_map(|(opcode, node, words, tail, len, room)| {
        Request {
            opcode,
            node,
            words,
            tail,
            len,
            room,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn random_requests_are_survived(
        requests in prop::collection::vec(request(), 1..120),
        read_only in any::<bool>(),
    ) {
        let outside = tempfile::tempdir().unwrap();
        let share = tempfile::tempdir_in(outside.path()).unwrap();
        put(share.path(), "a", "content");
        std::fs::create_dir(share.path().join("b")).unwrap();
        put(&share.path().join("b"), "a", "x");
        let mut guest = Guest::silent(share, |options| {
            options.read_only = read_only;
            options.max_fds = Some(16);
            options.max_nodes = 16;
        }, &Default::default());
        guest.init();
        for request in &requests {
            let mut body: Vec<u8> = request.words.iter().flat_map(|w| w.to_le_bytes()).collect();
            body.extend_from_slice(&request.tail);
            let len = request.len.unwrap_or(IN_HEADER + body.len());
            // A file that grows to the host's limit takes its time, and room on its disk.
            let heavy = [op::FUSE_FALLOCATE as u32, op::FUSE_SYNCFS as u32];
            if heavy.contains(&request.opcode) {
                continue;
            }
            let mut bytes = header(len, request.opcode, 7, request.node, (0, 0));
            bytes.extend_from_slice(&body);
            let answer = guest.raw(&bytes, request.room);
            prop_assert!(answer.is_empty() || answer.len() >= OUT_HEADER);
            let (nodes, fds) = guest.fs.server.nodes.counts();
            prop_assert!(nodes < 16 && fds + guest.fs.server.handles.len() <= 16);
            prop_assert_eq!(guest.fs.server.nodes.handles, guest.fs.server.handles.len());
        }
        // It is only the share that changed, and only if it may be.
        let around: Vec<_> = std::fs::read_dir(outside.path()).unwrap().collect();
        prop_assert_eq!(around.len(), 1);
        if read_only {
            let content = std::fs::read(guest.path("a")).unwrap();
            prop_assert_eq!(content, b"content");
            prop_assert_eq!(std::fs::read_dir(guest.dir.path()).unwrap().count(), 2);
        }
        guest.init();
        guest.call(op::FUSE_GETATTR, ROOT, &[&[0; 16]]).unwrap();
    }
}
