//! State files with another content, which are whole by their checksums.
#![allow(dead_code)]

use bulle::snapshot::format::{Kind, Reader, Writer};
use ciborium::Value;

/// The sections, in the order of the file.
const SECTIONS: [&str; 5] = ["config", "machine", "memory", "guest", "origin"];

fn kind(name: &'static str) -> Kind {
    match name {
        "origin" => Kind::optional(name, 1),
        _ => Kind::mandatory(name, 1),
    }
}

/// What is in a section.
pub fn section(state: &[u8], name: &'static str) -> Value {
    Reader::new(state).unwrap().value(kind(name)).unwrap()
}

/// The file with another content of one section.
pub fn with(state: &[u8], name: &'static str, content: &Value) -> Vec<u8> {
    let reader = Reader::new(state).unwrap();
    let mut writer = Writer::new(reader.id());
    for other in SECTIONS {
        match other == name {
            true => writer.value(kind(name), content).unwrap(),
            false => writer.section(kind(other), reader.get(kind(other)).unwrap()),
        }
    }
    writer.finish()
}

/// What is at a way of names below `value`.
pub fn field<'a>(value: &'a mut Value, way: &[&str]) -> &'a mut Value {
    way.iter().fold(value, |value, name| {
        let map = value.as_map_mut().unwrap();
        let found = map.iter_mut().find(|(key, _)| key.as_text() == Some(name));
        &mut found.unwrap().1
    })
}
