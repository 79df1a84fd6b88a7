//! A template over a socket, and whatever else may come there.

use std::io::Write;
use std::path::Path;

use super::*;
use crate::snapshot::read_parts;

/// The machine of the golden files, with memory of nothing.
fn snapshot() -> Snapshot {
    let state = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/golden/v1/state");
    let parts = read_parts(Path::new(state)).unwrap();
    let file = memory_file(c"test").unwrap();
    let map = MemoryMap {
        base: None,
        ..parts.memory.clone()
    };
    file.set_len(map.len()).unwrap();
    let layers = vec![Arc::new(Layer::in_memory(file, map))];
    Snapshot::new(Path::new(state), parts, layers, Paging::Mapped)
}

fn sent(fds: &[RawFd], bytes: &[u8]) -> Result<Snapshot, TemplateError> {
    let (here, there) = UnixStream::pair().unwrap();
    socket::send(&here, bytes, fds).unwrap();
    drop(here);
    receive(&there)
}

fn head(files: u32) -> Vec<u8> {
    [&MAGIC[..], &VERSION.to_le_bytes(), &files.to_le_bytes()].concat()
}

#[test]
fn what_is_sent_is_received() {
    let template = Template::new(snapshot()).unwrap();
    let (here, there) = UnixStream::pair().unwrap();
    // Twice over one connection, and they do not run into each other.
    template.send(&here).unwrap();
    template.send(&here).unwrap();
    for _ in 0..2 {
        let received = receive(&there).unwrap();
        assert_eq!(received.id, template.id);
        assert_eq!(received.config, template.config);
        assert_eq!(received.machine, template.machine);
        assert_eq!(received.layers.len(), 1);
        assert_eq!(received.layers[0].map, template.layers[0].map);
        assert!(received.as_base().unwrap().is_none(), "it has no files");
    }
}

#[test]
fn what_is_no_template_is_refused() {
    let template = Template::new(snapshot()).unwrap();
    let state = template.state.as_raw_fd();
    let memory = template.layers[0].image.file.as_raw_fd();
    let short = memory_file(c"short").unwrap();
    let noise = memory_file(c"noise").unwrap();
    (&noise).write_all(&[0x5a; 4096]).unwrap();
    let huge = memory_file(c"huge").unwrap();
    huge.set_len(MAX_FILE + 1).unwrap();
    assert!(sent(&[state, memory], &head(2)).is_ok());
    let mut other = head(2);
    other[8] = 9;
    let cases: [(&[RawFd], Vec<u8>); 9] = [
        (&[state, memory], head(3)),
        (&[state], head(1)),
        (&[], head(0)),
        (&[state, memory, memory], head(3)),
        (&[state, short.as_raw_fd()], head(2)),
        (&[noise.as_raw_fd(), memory], head(2)),
        (&[huge.as_raw_fd(), memory], head(2)),
        (&[state, memory], other),
        (&[state, memory], head(2)[..HEAD - 1].to_vec()),
    ];
    for (number, (fds, bytes)) in cases.iter().enumerate() {
        assert!(sent(fds, bytes).is_err(), "case {number}");
    }
}

#[test]
fn no_damaged_state_is_taken() {
    let template = Template::new(snapshot()).unwrap();
    let mut bytes = vec![0; template.state.metadata().unwrap().len() as usize];
    template.state.read_exact_at(&mut bytes, 0).unwrap();
    let memory = || vec![template.layers[0].image.file.try_clone().unwrap()];
    decode(&bytes, memory()).unwrap();
    for at in (0..bytes.len()).step_by(97) {
        let mut bad = bytes.clone();
        bad[at] ^= 1;
        assert!(decode(&bad, memory()).is_err(), "byte {at}");
        assert!(decode(&bytes[..at], memory()).is_err(), "cut to {at}");
    }
}
