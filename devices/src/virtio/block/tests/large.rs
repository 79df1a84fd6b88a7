//! Requests that name one buffer many times, and so move more than there is RAM.

use super::*;

const MIB: u32 = 1 << 20;
/// One MiB of RAM, all of it.
const ALL: u64 = RAM[1];

/// Tables of descriptors, one for each slot.
const TABLES: u64 = 0x4_0000;

/// A read in `slot`, of as many MiB as there are `data`, through an indirect table.
fn add(bench: &mut Bench, slot: u64, sector: u64, data: &[(u64, u32, bool)]) -> u16 {
    let header = HEADER + 32 * slot;
    bench.header(header, VIRTIO_BLK_T_IN, sector);
    let mut bufs = vec![(header, 16, false)];
    bufs.extend_from_slice(data);
    bufs.push((header + 16, 1, true));
    bench.vqs[0].add_indirect(TABLES + 0x1000 * slot, &bufs)
}

fn bench(engine: EngineKind) -> Bench {
    let bench = Bench::simple(engine);
    let file = fs::File::options().write(true).open(&bench.path).unwrap();
    file.set_len(1 << 30).unwrap();
    bench.handle.resize().unwrap();
    bench.rig.run(10);
    bench
}

#[test]
fn a_request_has_a_largest_size() {
    for engine in ENGINES {
        let mut bench = bench(engine);
        let most = vec![(ALL, MIB, true); 64];
        let more = [&most[..], &[(ALL, 512, true)]].concat();
        for (data, status, len) in [
            (most, VIRTIO_BLK_S_OK, 64 * MIB + 1),
            (more, VIRTIO_BLK_S_IOERR, 0),
        ] {
            let head = add(&mut bench, 0, 0, &data);
            assert_eq!(bench.wait(1)[&head.into()], len);
            assert_eq!(u32::from(bench.status(0)), status);
        }
    }
}

#[test]
fn a_turn_has_an_end_and_the_rest_follows() {
    for engine in ENGINES {
        let mut bench = bench(engine);
        let data = vec![(ALL, MIB, true); 40];
        // 200 MiB: several turns.
        let slots = 5;
        for slot in 0..slots {
            add(&mut bench, slot, slot * 80 * 1024, &data);
        }
        let used = bench.wait(slots as usize);
        assert!(used.values().all(|len| *len == 40 * MIB + 1), "{used:?}");
        assert!((0..slots).all(|slot| bench.status(slot) == 0));
    }
}
