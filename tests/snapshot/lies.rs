//! State files that are whole by their checksums and lie: each value in turn is another one. A lie is
//! refused in words, or makes a guest that ends of its own fault; the process never does.

use std::fs;
use std::path::Path;
use std::time::Duration;

use ciborium::Value;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::saved::{Files, machine, save, try_load};
use crate::served::Served;
use crate::state_file;

/// Lies told of each section.
const LIES: usize = 300;
/// Exit codes of a process that ended by its own fault: a panic, SIGILL, SIGABRT, SIGBUS, SIGSEGV.
const FAULTS: [i32; 5] = [101, 132, 134, 135, 139];

/// A guest with a device of each kind, whose files are in `dir`.
fn saved(dir: &Path) -> Files {
    fs::write(dir.join("disk"), vec![1; 4 << 20]).unwrap();
    fs::write(dir.join("pmem"), vec![1; 2 << 20]).unwrap();
    let mut vm = machine("carry_on", "disk=1", json!({ "vcpu_count": 1 }));
    let mut put = |path: &str, body| vm.put(path, body).done();
    let disk = dir.join("disk");
    put(
        "/drives/d",
        json!({ "drive_id": "d", "path_on_host": disk }),
    );
    put(
        "/pmem/p",
        json!({ "id": "p", "path_on_host": dir.join("pmem") }),
    );
    put(
        "/vsock",
        json!({ "guest_cid": 5, "uds_path": dir.join("vsock") }),
    );
    put("/entropy", json!({}));
    put(
        "/balloon",
        json!({ "amount_mib": 1, "deflate_on_oom": true }),
    );
    put("/hotplug/memory", json!({ "total_size_mib": 128 }));
    let mut vm = vm.start().wait_for("tick");
    let files = Files::named(dir, "true");
    save(&mut vm, &files);
    files
}

/// The nodes of a value that can be other ones, each by the way to it.
fn nodes(value: &Value, way: &mut Vec<usize>, all: &mut Vec<Vec<usize>>) {
    let mut below = |index: usize, value: &Value| {
        way.push(index);
        nodes(value, way, all);
        way.pop();
    };
    match value {
        Value::Array(list) => (0..)
            .zip(list)
            .for_each(|(index, value)| below(index, value)),
        Value::Map(map) => (0..)
            .zip(map)
            .for_each(|(index, (_, value))| below(index, value)),
        _ => {}
    }
    all.push(way.clone());
}

fn at<'a>(value: &'a mut Value, way: &[usize]) -> &'a mut Value {
    way.iter().fold(value, |value, index| match value {
        Value::Array(list) => &mut list[*index],
        Value::Map(map) => &mut map[*index].1,
        _ => unreachable!("only lists and maps have something below them"),
    })
}

/// Another value in place of `value`.
fn lie(value: &mut Value, which: usize) {
    match value {
        Value::Integer(number) => {
            let lies = [u64::MAX, 0, 1, 0xffff, 1 << 31, 0x1000, 1 << 63];
            *number = lies[which % lies.len()].into();
        }
        Value::Bool(truth) => *truth = !*truth,
        Value::Text(text) => match which % 2 {
            0 => text.clear(),
            _ => *text = "x".repeat(5000),
        },
        Value::Bytes(bytes) => match which % 4 {
            0 => bytes.fill(0xff),
            1 => bytes.truncate(bytes.len() / 2),
            2 => bytes.extend_from_within(..),
            _ => bytes.iter_mut().step_by(7).for_each(|byte| *byte ^= 0x5a),
        },
        Value::Array(list) => match which % 2 {
            0 => drop(list.pop()),
            _ => list.extend(list.clone()),
        },
        Value::Map(map) => match which % 2 {
            0 => drop(map.pop()),
            _ => map.iter_mut().for_each(|(_, value)| *value = Value::Null),
        },
        other => *other = Value::Integer(1.into()),
    }
}

/// Lies told, and how many of them were believed.
#[derive(Debug, Default)]
struct Told {
    lies: usize,
    believed: usize,
}

/// Has a process load `bytes`. It goes on when it does not believe them, and another is there when it did.
fn tell(loader: Served, files: &Files, bytes: &[u8], what: &str, told: &mut Told) -> Served {
    fs::write(&files.state, bytes).unwrap();
    let mut loader = loader;
    told.lies += 1;
    let answer = loader.put("/snapshot/load", files.load());
    if answer.status == 400 {
        assert!(answer.body.contains("fault_message"), "{what}: {answer:#?}");
        return loader;
    }
    assert_eq!(answer.status, 204, "{what}: {answer:#?}");
    told.believed += 1;
    std::thread::sleep(Duration::from_millis(20));
    let Served { running, .. } = loader;
    let outcome = running.signal(Signal::SIGINT).finish();
    assert!(
        !FAULTS.contains(&outcome.code) && !outcome.stderr.contains("panicked"),
        "{what}: {outcome:#?}"
    );
    Served::new()
}

#[test]
fn whatever_a_section_says_the_process_lives() {
    let dir = tempfile::tempdir().unwrap();
    let truth = saved(dir.path());
    let good = fs::read(&truth.state).unwrap();
    let files = Files {
        state: dir.path().join("lie"),
        ..truth.clone()
    };
    let mut told = Told::default();
    let mut loader = Served::new();
    for section in ["machine", "memory", "guest"] {
        let value = state_file::section(&good, section);
        let mut ways = Vec::new();
        nodes(&value, &mut Vec::new(), &mut ways);
        for (index, way) in (0..LIES / 3).zip(ways.iter().cycle()) {
            let mut lying = value.clone();
            lie(at(&mut lying, way), index / ways.len() + index);
            let what = format!("{section} {way:?}");
            let bytes = state_file::with(&good, section, &lying);
            loader = tell(loader, &files, &bytes, &what, &mut told);
        }
    }
    println!("{told:?}");
    assert!(told.lies >= LIES && told.believed < told.lies, "{told:?}");
    drop(loader);
    let (loaded, answer) = try_load(&truth, json!({}));
    answer.done();
    loaded.wait_for("tick");
}
