//! The cache with images that are any file: what it keeps, and what it refuses.

use std::os::unix::fs::{PermissionsExt, chown};
use std::thread;

use tempfile::TempDir;

use super::*;

const PAYLOAD: &[u8] = b"\x7fELF and the rest of a kernel";

/// An image and a cache.
struct Ground {
    home: TempDir,
    image: File,
}

impl Ground {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("image"), b"packed").unwrap();
        let image = File::open(home.path().join("image")).unwrap();
        prepare(&Place::Home(home.path().into())).unwrap();
        Self { home, image }
    }

    fn directory(&self) -> PathBuf {
        self.home.path().join(".cache/bulle/kernels")
    }

    fn prepare(&self) -> Result<PathBuf, CacheError> {
        prepare(&Place::Home(self.home.path().into()))
    }

    /// The image's slot, as if the image had not changed for a while.
    fn slot(&self) -> Slot<'_> {
        let slot = Slot::new(self.directory(), &self.image).unwrap();
        Slot {
            rested: true,
            ..slot
        }
    }

    fn files(&self) -> Vec<String> {
        let names = fs::read_dir(self.directory()).unwrap();
        let mut names: Vec<_> = names
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn payload(entry: Cached) -> Vec<u8> {
    Unpacked::Cached(entry).to_vec()
}

/// What a start gets, and whether it had to unpack.
fn start(slot: &Slot) -> (Vec<u8>, bool) {
    let mut unpacked = false;
    let unpack = || {
        unpacked = true;
        Ok(Some(PAYLOAD.to_vec()))
    };
    let bytes = unpack_with(Some(slot), unpack).unwrap().unwrap().to_vec();
    (bytes, unpacked)
}

#[test]
fn directories_follow_the_environment() {
    let path = |text: &str| Some(PathBuf::from(text));
    let base = |text| path(text).map(Place::Base);
    for (xdg, home, root, expected) in [
        (path("/x"), path("/h"), false, base("/x")),
        (path("x"), path("/h"), true, path("/h").map(Place::Home)),
        (path(""), path(""), true, base("/var/cache")),
        (None, None, false, None),
        (None, path("h"), false, None),
    ] {
        assert_eq!(place(xdg, home, root), expected);
    }
}

#[test]
fn nothing_is_made_outside_a_directory_of_the_user() {
    let ground = tempfile::tempdir().unwrap();
    let base = ground.path().join("base");
    for place in [Place::Base(base.clone()), Place::Home(base.clone())] {
        assert!(matches!(prepare(&place), Err(CacheError::Io { .. })));
        assert!(!base.exists());
    }
    fs::create_dir(&base).unwrap();
    let made = prepare(&Place::Base(base.clone())).unwrap();
    assert_eq!(made, base.join("bulle/kernels"));
    assert!(made.is_dir());
    if geteuid().is_root() {
        fs::remove_dir_all(base.join("bulle")).unwrap();
        chown(&base, Some(65534), None).unwrap();
        for place in [Place::Base(base.clone()), Place::Home(base.clone())] {
            assert!(matches!(prepare(&place), Err(CacheError::NotOurs(_))));
        }
        assert_eq!(fs::read_dir(&base).unwrap().count(), 0);
    }
}

#[test]
fn only_the_first_start_unpacks() {
    let ground = Ground::new();
    assert_eq!(start(&ground.slot()), (PAYLOAD.to_vec(), true));
    assert_eq!(start(&ground.slot()), (PAYLOAD.to_vec(), false));
    assert_eq!(ground.files(), [ground.slot().name]);
    let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
    assert_eq!(mode(&ground.directory()), 0o700);
    assert_eq!(mode(&ground.slot().path()), 0o600);
}

#[test]
fn what_needs_no_unpacking_is_not_stored() {
    let ground = Ground::new();
    assert!(
        unpack_with(Some(&ground.slot()), || Ok(None))
            .unwrap()
            .is_none()
    );
    assert!(ground.files().is_empty());
}

#[test]
fn damage_means_unpacking_again() {
    let ground = Ground::new();
    let path = ground.slot().path();
    start(&ground.slot());
    let good = fs::read(&path).unwrap();
    let mut bad: Vec<Vec<u8>> = (0..good.len())
        .map(|length| good[..length].to_vec())
        .collect();
    for index in 0..good.len() {
        let mut flipped = good.clone();
        flipped[index] ^= 0x10;
        bad.push(flipped);
    }
    bad.push([&good[..], b"x"].concat());
    bad.push(vec![0; good.len()]);
    for bytes in bad {
        fs::write(&path, bytes).unwrap();
        assert!(matches!(ground.slot().load(), Err(CacheError::Damaged(_))));
        assert!(!path.exists());
        assert_eq!(start(&ground.slot()), (PAYLOAD.to_vec(), true));
        assert_eq!(fs::read(&path).unwrap(), good);
    }
}

#[test]
fn an_entry_under_another_name_is_damaged() {
    let ground = Ground::new();
    ground.slot().store(PAYLOAD).unwrap();
    let other = Slot {
        name: "other.vmlinux".into(),
        ..ground.slot()
    };
    fs::rename(ground.slot().path(), other.path()).unwrap();
    assert!(matches!(other.load(), Err(CacheError::Damaged(_))));
}

#[test]
fn a_changed_image_has_another_name() {
    let ground = Ground::new();
    let before = ground.slot();
    let times = ground.image.metadata().unwrap().modified().unwrap();
    // Same path, inode, size and modification time.
    thread::sleep(Duration::from_millis(30));
    fs::write(ground.home.path().join("image"), b"PACKED").unwrap();
    ground.image.set_modified(times).unwrap();
    assert_ne!(before.name, ground.slot().name);
    // What was unpacked while the image changed may be anything.
    assert!(matches!(before.store(PAYLOAD), Err(CacheError::Unrested)));
    assert!(ground.files().is_empty());
}

#[test]
fn a_new_image_is_not_stored_before_it_has_rested() {
    let since = Instant::now();
    let ground = Ground::new();
    let slot = || Slot::new(ground.directory(), &ground.image).unwrap();
    let at_once = slot().store(PAYLOAD);
    assert!(matches!(at_once, Err(CacheError::Unrested)) || since.elapsed() >= REST);
    thread::sleep(REST + Duration::from_millis(100));
    slot().store(PAYLOAD).unwrap();
    assert_eq!(payload(slot().load().unwrap().unwrap()), PAYLOAD);
}

#[test]
fn what_others_can_write_is_not_used() {
    let ground = Ground::new();
    ground.slot().store(PAYLOAD).unwrap();
    let mode = |path: &Path, mode| {
        fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    for bad in [0o620, 0o602] {
        mode(&ground.slot().path(), bad);
        assert!(matches!(ground.slot().load(), Err(CacheError::NotOurs(_))));
    }
    for bad in [0o770, 0o707] {
        mode(&ground.directory(), bad);
        assert!(matches!(ground.prepare(), Err(CacheError::NotOurs(_))));
    }
    mode(&ground.directory(), 0o755);
    ground.prepare().unwrap();

    let foreign = if geteuid().is_root() {
        chown(ground.directory(), Some(65534), None).unwrap();
        Place::Home(ground.home.path().into())
    } else {
        Place::Base(PathBuf::from("/"))
    };
    assert!(matches!(prepare(&foreign), Err(CacheError::NotOurs(_))));
}

#[test]
fn links_are_not_followed() {
    let ground = Ground::new();
    ground.slot().store(PAYLOAD).unwrap();
    let aside = ground.home.path().join("aside");
    fs::rename(ground.slot().path(), &aside).unwrap();
    std::os::unix::fs::symlink(&aside, ground.slot().path()).unwrap();
    assert!(matches!(ground.slot().load(), Err(CacheError::Io { .. })));
}

#[test]
fn a_cache_that_fails_costs_nothing_but_time() {
    let ground = Ground::new();
    fs::remove_dir(ground.directory()).unwrap();
    assert_eq!(start(&ground.slot()), (PAYLOAD.to_vec(), true));
    fs::write(ground.directory(), b"a file").unwrap();
    assert_eq!(start(&ground.slot()), (PAYLOAD.to_vec(), true));
    assert!(matches!(ground.prepare(), Err(CacheError::Io { .. })));
}

#[test]
fn the_least_recently_used_go_first() {
    let ground = Ground::new();
    let now = SystemTime::now();
    let old = |name: &str, age: u64, size: u64| {
        let file = File::create(ground.directory().join(name)).unwrap();
        file.set_len(size).unwrap();
        file.set_modified(now - Duration::from_secs(age)).unwrap();
    };
    let slot = ground.slot();
    slot.store(PAYLOAD).unwrap();
    let entry = File::open(slot.path()).unwrap();
    entry
        .set_modified(now - Duration::from_secs(10_000))
        .unwrap();
    for age in 1..=9 {
        old(&format!("{age}"), age * 100, 1);
    }
    // Used, so the youngest.
    slot.load().unwrap().unwrap();
    evict(&ground.directory()).unwrap();
    assert_eq!(
        ground.files(),
        [&slot.name[..], "1", "2", "3", "4", "5", "6", "7"].sorted()
    );

    old("2", 200, MAX_BYTES / 2);
    old("3", 300, MAX_BYTES / 2);
    evict(&ground.directory()).unwrap();
    assert_eq!(ground.files(), [&slot.name[..], "1", "2"].sorted());
}

trait Sorted {
    fn sorted(self) -> Self;
}

impl<const N: usize> Sorted for [&str; N] {
    fn sorted(mut self) -> Self {
        self.sort_unstable();
        self
    }
}

#[test]
fn concurrent_starts_see_whole_entries() {
    let ground = Ground::new();
    // Large enough that a write takes several system calls' time.
    let big: Vec<u8> = (0..3_000_000u32).map(|n| (n / 3) as u8).collect();
    thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                for _ in 0..10 {
                    let slot = ground.slot();
                    if let Some(entry) = slot.load().unwrap() {
                        assert!(payload(entry) == big);
                    }
                    slot.store(&big).unwrap();
                }
            });
        }
    });
    assert_eq!(ground.files(), [ground.slot().name]);
}
