//! Replays the committed fuzz corpus: what a fuzzer once found must never come back.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::path::{Path, PathBuf};

fn entries(directory: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
}

#[test]
fn corpus_does_not_panic() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus");
    let mut names = Vec::new();
    for directory in entries(&corpus) {
        let name = directory
            .file_name()
            .unwrap()
            .to_string_lossy()
            .into_owned();
        let target = targets::TARGETS.iter().find(|target| target.0 == name);
        let (_, run) = target.unwrap_or_else(|| panic!("corpus of an unknown target: {name}"));
        let files = entries(&directory);
        assert!(!files.is_empty(), "the corpus of {name} is empty");
        for file in files {
            println!("{}", file.display());
            run(&fs::read(&file).unwrap());
        }
        names.push(name);
    }
    for (name, _) in targets::TARGETS {
        assert!(
            names.iter().any(|other| other == name),
            "{name} has no corpus"
        );
    }
}
