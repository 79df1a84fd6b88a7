//! The container, the memory file and the order in which both are published.

use std::fs;
use std::os::unix::fs::FileExt;

use proptest::prelude::*;

use super::format::{FormatError, HEADER_LEN, Kind, Reader, SECTION_LEN, VERSION, Writer};
use super::image::{Image, ImageError, ImageWriter, MemoryMap, Region, Run};
use super::pages::PAGE;
use super::rebind::{NetworkRebind, Overrides, RebindError};
use crate::config::{Config, Drive};

const ID: [u8; 16] = *b"sixteen bytes id";
const A: Kind = Kind::mandatory("a", 1);
const LONG: Kind = Kind::optional("eightlet", 7);

fn file() -> Vec<u8> {
    let mut writer = Writer::new(ID);
    writer.section(A, b"content");
    writer.value(LONG, &(1_u32, "two".to_owned())).unwrap();
    writer.finish()
}

#[test]
fn what_was_written_is_read() {
    let bytes = file();
    let reader = Reader::new(&bytes).unwrap();
    assert_eq!(reader.id(), ID);
    assert_eq!(reader.get(A).unwrap(), b"content");
    let value: (u32, String) = reader.value(LONG).unwrap();
    assert_eq!(value, (1, "two".to_owned()));
    reader.only_knows(&[A]).unwrap();
    let error = reader.only_knows(&[LONG]).unwrap_err();
    assert!(matches!(&error, FormatError::Unknown { name, version: 1 } if name == "a"));
    let error = reader.value::<u32>(LONG).unwrap_err().to_string();
    assert!(
        error.contains("section 'eightlet' cannot be read"),
        "{error}"
    );
    let newer = Kind { version: 8, ..LONG };
    assert!(matches!(
        reader.get(newer),
        Err(FormatError::Missing { name: "eightlet" })
    ));
}

#[test]
fn every_damaged_byte_and_every_cut_is_noticed() {
    let good = file();
    for at in 0..good.len() {
        for flip in [1, 0x80] {
            let mut bad = good.clone();
            bad[at] ^= flip;
            assert!(Reader::new(&bad).is_err(), "byte {at} changed by {flip:#x}");
        }
    }
    for len in 0..good.len() {
        assert!(Reader::new(&good[..len]).is_err(), "cut to {len} bytes");
    }
    let mut longer = good.clone();
    longer.push(0);
    assert!(matches!(
        Reader::new(&longer),
        Err(FormatError::Length { .. })
    ));
}

#[test]
fn the_header_tells_versions_and_machines_apart() {
    let sealed = |at: usize, value: u16| {
        let mut bytes = file();
        bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
        let sum = crc32fast::hash(&bytes[..HEADER_LEN - 4]);
        bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&sum.to_le_bytes());
        Reader::new(&bytes).unwrap_err()
    };
    assert!(
        matches!(sealed(8, VERSION + 1), FormatError::Version { found } if found == VERSION + 1)
    );
    assert!(matches!(
        sealed(10, 183),
        FormatError::Machine { found: 183 }
    ));
    assert!(matches!(sealed(12, 16), FormatError::Pages { found: 16 }));
    assert!(matches!(
        Reader::new(b"PK\x03\x04"),
        Err(FormatError::Magic)
    ));
}

#[test]
fn a_section_that_is_there_twice_is_refused() {
    let mut writer = Writer::new(ID);
    writer.section(A, b"1");
    writer.section(A, b"2");
    let bytes = writer.finish();
    assert!(matches!(
        Reader::new(&bytes),
        Err(FormatError::Twice { .. })
    ));
}

proptest! {
    #[test]
    fn any_sections_come_back(payloads in proptest::collection::vec(any::<Vec<u8>>(), 0..8)) {
        const NAMES: [&str; 8] = ["0", "1", "2", "3", "4", "5", "6", "7"];
        let kind = |index: usize| Kind { name: NAMES[index], version: index as u16, mandatory: index.is_multiple_of(2) };
        let mut writer = Writer::new(ID);
        for (index, payload) in payloads.iter().enumerate() {
            writer.section(kind(index), payload);
        }
        let bytes = writer.finish();
        let reader = Reader::new(&bytes).unwrap();
        prop_assert_eq!(reader.sections().len(), payloads.len());
        for (index, payload) in payloads.iter().enumerate() {
            prop_assert_eq!(reader.get(kind(index)).unwrap(), &payload[..]);
        }
    }

    #[test]
    fn no_bytes_make_it_panic(mut bytes in any::<Vec<u8>>(), header in any::<bool>()) {
        if header && bytes.len() >= HEADER_LEN {
            // A header that is right, so that what follows is looked at.
            bytes[..HEADER_LEN].copy_from_slice(&file()[..HEADER_LEN]);
            let len = (bytes.len() as u64).to_le_bytes();
            bytes[24..32].copy_from_slice(&len);
            let sum = crc32fast::hash(&bytes[..HEADER_LEN - 4]);
            bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&sum.to_le_bytes());
        }
        let _ = Reader::new(&bytes);
    }

    #[test]
    fn no_state_makes_loading_panic(payload in any::<Vec<u8>>(), which in 0..4_usize) {
        let mut writer = Writer::new(ID);
        for (index, kind) in [super::CONFIG, super::MACHINE, super::MEMORY, super::GUEST].into_iter().enumerate() {
            writer.section(kind, if index == which { &payload } else { b"{}" });
        }
        prop_assert!(super::parse(&writer.finish()).is_err());
    }
}

#[test]
fn a_section_that_ends_behind_the_file_is_refused() {
    let mut bytes = file();
    let at = HEADER_LEN + 16;
    bytes[at..at + 8].copy_from_slice(&u64::MAX.to_le_bytes());
    let end = HEADER_LEN + SECTION_LEN - 4;
    let sum = crc32fast::hash(&bytes[HEADER_LEN..end]);
    bytes[end..end + 4].copy_from_slice(&sum.to_le_bytes());
    assert!(matches!(
        Reader::new(&bytes),
        Err(FormatError::Cut { index: 0 })
    ));
}

fn region(len: u64) -> Vec<Region> {
    vec![Region {
        address: 0,
        len,
        offset: 0,
    }]
}

/// A memory file with pages 1, 2 and 5 of 8.
fn image(dir: &std::path::Path, id: [u8; 16]) -> (std::path::PathBuf, MemoryMap) {
    let path = dir.join("memory");
    let file = fs::File::create(&path).unwrap();
    let mut writer = ImageWriter::new(&file, id);
    let mut data = vec![0; 8 * PAGE as usize];
    for page in [1, 2, 5] {
        data[page * PAGE as usize..][..PAGE as usize].fill(page as u8);
    }
    writer.write(0, &data, true).unwrap();
    let map = writer.finish(region(8 * PAGE), None).unwrap();
    (path, map)
}

#[test]
fn zeros_are_holes_and_damage_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let (path, map) = image(dir.path(), ID);
    map.check().unwrap();
    let runs: Vec<_> = map
        .runs
        .iter()
        .map(|run| (run.offset / PAGE, run.len / PAGE))
        .collect();
    assert_eq!(runs, [(1, 2), (5, 1)]);
    let opened = Image::open(&path, ID, &map).unwrap();
    opened.verify(&map).unwrap();
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 5 * PAGE + 3).unwrap();
    let error = opened.verify(&map).unwrap_err();
    assert!(matches!(error, ImageError::Damaged { offset, .. } if offset == 5 * PAGE));
    let error = Image::open(&path, ID, &map).unwrap_err();
    assert!(matches!(error, ImageError::Changed { .. }), "{error}");
    // A copy has another inode, and no time to compare.
    let copy = dir.path().join("copy");
    fs::copy(&path, &copy).unwrap();
    Image::open(&copy, ID, &map).unwrap();
    assert!(matches!(
        Image::open(&copy, [0; 16], &map),
        Err(ImageError::Other { .. })
    ));
    fs::OpenOptions::new()
        .write(true)
        .open(&copy)
        .unwrap()
        .set_len(PAGE)
        .unwrap();
    assert!(matches!(
        Image::open(&copy, ID, &map),
        Err(ImageError::Length { .. })
    ));
}

#[test]
fn a_map_that_contradicts_itself_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (_, good) = image(dir.path(), ID);
    let bad = |change: fn(&mut MemoryMap)| {
        let mut map = good.clone();
        change(&mut map);
        assert!(
            matches!(map.check(), Err(ImageError::Map { .. })),
            "{map:?}"
        );
    };
    bad(|map| map.regions[0].offset = PAGE);
    bad(|map| map.regions[0].len = 3);
    bad(|map| map.regions[0].len = 0);
    bad(|map| map.regions[0].address = u64::MAX - PAGE + 1);
    bad(|map| map.regions = vec![map.regions[0]; 65]);
    bad(|map| map.runs[0].offset = 1);
    bad(|map| map.runs[0].len = 0);
    bad(|map| map.runs[1].offset = PAGE);
    bad(|map| map.runs[1].offset = 8 * PAGE);
    bad(|map| map.runs[1].len = u64::MAX - PAGE + 1);
    bad(|map| {
        map.regions[0].len = u64::MAX - PAGE + 1;
        map.runs.push(Run {
            offset: 6 * PAGE,
            len: 4 << 20,
            crc: 0,
        });
    });
}

#[test]
fn the_memory_file_before_is_found_when_the_state_before_is() {
    let dir = tempfile::tempdir().unwrap();
    let (path, map) = image(dir.path(), ID);
    // As a crash leaves it between the two names.
    fs::hard_link(&path, super::image::previous(&path)).unwrap();
    fs::remove_file(&path).unwrap();
    let (path, newer) = image(dir.path(), [9; 16]);
    assert!(Image::open(&path, [9; 16], &newer).is_ok());
    let before = Image::open(&path, ID, &map).unwrap();
    assert!(before.path.ends_with(".memory.previous"));
    before.verify(&map).unwrap();
}

#[test]
fn only_devices_that_are_there_are_given_others() {
    let mut config = Config::new("/kernel".into());
    config.drives.push(Drive::new("root", "/a".into()));
    let drives = |id: &str| Overrides {
        drives: vec![(id.to_owned(), "/b".into())],
        ..Overrides::default()
    };
    let before = config.clone();
    let error = drives("data").apply(&mut config).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the snapshot has no drive 'data': it has root"
    );
    let both = Overrides {
        vsock: Some("/v".into()),
        ..drives("root")
    };
    assert_eq!(both.apply(&mut config), Err(RebindError::NoVsock));
    assert_eq!(config, before);
    drives("root").apply(&mut config).unwrap();
    assert_eq!(config.drives[0].path_on_host, std::path::Path::new("/b"));
    let net = Overrides {
        networks: vec![NetworkRebind::default()],
        ..Overrides::default()
    };
    assert!(matches!(
        net.apply(&mut config),
        Err(RebindError::NoDevice { .. })
    ));
    // An address without another host's side, and what it had before stays.
    let tap = serde_json::from_str(r#"{"iface_id":"n","host_dev_name":"tap0"}"#);
    config.network_interfaces = vec![tap.unwrap()];
    let mac = Some("02:00:00:00:00:07".to_owned());
    let net = Overrides {
        networks: vec![NetworkRebind {
            iface_id: "n".to_owned(),
            guest_mac: mac.clone(),
            ..NetworkRebind::default()
        }],
        ..Overrides::default()
    };
    net.apply(&mut config).unwrap();
    let interface = &config.network_interfaces[0];
    assert_eq!(interface.guest_mac, mac);
    assert_eq!(interface.host_dev_name.as_deref(), Some("tap0"));
}

#[test]
fn whoever_watches_hears_all_bytes_and_may_end_it() {
    let file = tempfile::tempfile().unwrap();
    let heard = std::cell::RefCell::new(Vec::new());
    let watch = |done, total| {
        heard.borrow_mut().push((done / PAGE, total / PAGE));
        done < 3 * PAGE
    };
    let mut writer = ImageWriter::new(&file, ID).watched(Some(&watch));
    writer.expect(4 * PAGE);
    let zeros = [0; PAGE as usize];
    let data = [[1; PAGE as usize], zeros].concat();
    writer.write(0, &data, true).unwrap();
    let error = writer.write(2 * PAGE, &zeros, true).unwrap_err();
    assert_eq!(error.to_string(), "it was cancelled");
    assert_eq!(heard.into_inner(), [(2, 4), (3, 4)]);
}
