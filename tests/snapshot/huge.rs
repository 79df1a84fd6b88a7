//! Memory that is loaded in reserved huge pages.

use std::fs;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};

use crate::pager::{Pager, Way};
use crate::saved::{Files, save, saved_with_changes, try_load};

/// The host's pool of 2 MiB pages, as it was before once this is dropped.
pub struct Pool(String);

const PATH: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// The pool is all tests': one at a time may change it.
pub fn alone() -> MutexGuard<'static, ()> {
    static POOL: Mutex<()> = Mutex::new(());
    POOL.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Pool {
    pub fn of(pages: &str) -> Self {
        let before = fs::read_to_string(PATH).unwrap();
        fs::write(PATH, pages).unwrap();
        let now = fs::read_to_string(PATH).unwrap();
        assert_eq!(now.trim(), pages, "no room for reserved pages");
        Self(before)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let _ = fs::write(PATH, &self.0);
    }
}

#[test]
fn files_and_handlers_fill_huge_pages() {
    let dir = tempfile::tempdir().unwrap();
    let [files, changes, again] = ["a", "b", "c"].map(|name| Files::named(dir.path(), name));
    let mut story = saved_with_changes(&files, &changes);
    let huge = json!({ "huge_pages": "2M" });
    let _alone = alone();
    let pool = Pool::of("0");
    let (_, answer) = try_load(&changes, huge.clone());
    answer.refused(&[
        "Load snapshot error",
        "pages of 2 MiB",
        "reserve 32 of them",
    ]);
    let more = Pool::of("32");
    // From a chain of files.
    let (mut vm, answer) = try_load(&changes, huge.clone());
    answer.done();
    assert_eq!(vm.get("/machine-config").value()["huge_pages"], "2M");
    story.follow(&mut vm, 20);
    save(&mut vm, &again);
    story.hear_out(vm);
    // From a handler, in the pages that the snapshot's machine had.
    let socket = dir.path().join("socket");
    let pager = Pager::start(&socket, &again.memory, Way::Serve);
    let backend: Value = json!({ "backend_type": "Uffd", "backend_path": socket });
    let (mut vm, answer) = try_load(&again, json!({ "mem_backend": backend }));
    answer.done();
    story.follow(&mut vm, 20);
    story.check();
    drop(vm);
    let mappings = pager.end();
    assert!(mappings.iter().all(|mapping| mapping.page_size == 2 << 20));
    drop(more);
    drop(pool);
}
