//! `snapshot`: state files that somebody else wrote.

use std::path::Path;

use bulle::snapshot::check;
use bulle::snapshot::format::{Kind, Reader, Writer};

/// A whole one.
const GOOD: &[u8] = include_bytes!("../../../resources/golden/v1/state");
const SECTIONS: [Kind; 5] = [
    Kind::mandatory("config", 1),
    Kind::mandatory("machine", 1),
    Kind::mandatory("memory", 1),
    Kind::mandatory("guest", 1),
    Kind::optional("origin", 1),
];

/// The first byte says whether the rest is a file, or a section of one that is whole otherwise, or
/// bytes that are changed in such a section: two for the place, one for the value.
pub fn run(data: &[u8]) {
    let Some((first, rest)) = data.split_first() else {
        return;
    };
    let name = Path::new("state");
    let Some(place) = usize::from(*first).checked_sub(1) else {
        let _ = check(rest, name);
        return;
    };
    let reader = Reader::new(GOOD).expect("the committed file is whole");
    let mut writer = Writer::new(reader.id());
    for (index, kind) in SECTIONS.into_iter().enumerate() {
        let mut payload = reader.find(kind).unwrap_or_default().to_vec();
        if index == place % SECTIONS.len() {
            match place / SECTIONS.len() % 2 {
                0 => payload = rest.to_vec(),
                _ => change(&mut payload, rest),
            }
        }
        writer.section(kind, &payload);
    }
    let _ = check(&writer.finish(), name);
}

fn change(payload: &mut [u8], changes: &[u8]) {
    for change in changes.chunks_exact(3) {
        let [low, high, value] = [change[0], change[1], change[2]];
        let at = usize::from(u16::from_le_bytes([low, high]));
        let len = payload.len().max(1);
        if let Some(byte) = payload.get_mut(at % len) {
            *byte = value;
        }
    }
}
