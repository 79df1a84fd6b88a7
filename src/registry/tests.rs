use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use tempfile::TempDir;

use super::*;

fn about(created_ms: u64) -> About {
    About {
        pid: std::process::id() as i32,
        created_ms,
        arguments: vec!["bulle".into(), "run".into()],
        command: vec!["true".into()],
        kernel: Some("/boot/vmlinuz".into()),
        vcpu_count: Some(1),
        mem_size_mib: Some(512),
    }
}

fn base() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn claim(base: &Path, name: &str) -> Result<Claim, RegistryError> {
    let place = Place {
        base: base.join("bulle"),
        name: (!name.is_empty()).then(|| name.to_owned()),
    };
    Claim::new(&place, &about(1))
}

fn names(base: &Path) -> Vec<String> {
    let entries = list(&base.join("bulle")).unwrap();
    entries.into_iter().map(|entry| entry.name).collect()
}

#[test]
fn an_entry_lives_as_long_as_its_claim() {
    let base = base();
    assert!(names(base.path()).is_empty());
    let one = claim(base.path(), "one").unwrap();
    let other = claim(base.path(), "").unwrap();
    assert_eq!(other.name().len(), 8);
    assert_eq!(names(base.path()).len(), 2);
    let _listener = one.listen().unwrap();
    let entry = find(&base.path().join("bulle"), "one").unwrap();
    assert_eq!(entry.about, about(1));
    assert!(entry.is_alive() && UnixStream::connect(entry.socket()).is_ok());
    for path in ["bulle", "bulle/one"] {
        let mode = fs::metadata(base.path().join(path))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700, "{path}");
    }
    drop(one);
    assert!(!entry.is_alive());
    drop(other);
    assert!(names(base.path()).is_empty());
    assert_eq!(fs::read_dir(base.path().join("bulle")).unwrap().count(), 0);
}

#[test]
fn a_name_is_one_living_microvm_s() {
    let base = base();
    let first = claim(base.path(), "a").unwrap();
    let error = claim(base.path(), "a").unwrap_err();
    assert!(error.to_string().contains("'a' runs already"), "{error}");
    drop(first);
    claim(base.path(), "a").unwrap();
}

#[test]
fn stale_entries_are_removed_by_whoever_sees_them() {
    let base = base();
    let dir = base.path().join("bulle/dead");
    let stale = || {
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join(STATE), serde_json::to_vec(&about(1)).unwrap()).unwrap();
        fs::write(dir.join(SOCKET), "").unwrap();
    };
    stale();
    assert!(names(base.path()).is_empty());
    assert!(!dir.exists());
    stale();
    let again = claim(base.path(), "dead").unwrap();
    again.listen().unwrap();
    assert_eq!(names(base.path()), ["dead"]);
}

#[test]
fn an_entry_that_is_being_removed_is_nobody_s() {
    let base = base();
    let held = claim(base.path(), "held").unwrap();
    let dir = base.path().join("bulle");
    fs::rename(dir.join("held"), dir.join(".aside")).unwrap();
    assert!(names(base.path()).is_empty() && dir.join(".aside").exists());
    // Its process was killed amid that.
    drop(held);
    assert!(names(base.path()).is_empty() && !dir.join(".aside").exists());
}

#[test]
fn what_is_no_entry_is_left_alone() {
    let base = base();
    let _one = claim(base.path(), "one").unwrap();
    fs::create_dir(base.path().join("bulle/empty")).unwrap();
    fs::write(base.path().join("bulle/file"), "").unwrap();
    assert_eq!(names(base.path()), ["one"]);
    assert!(base.path().join("bulle/empty").exists());
}

#[test]
fn names_are_found_by_their_beginning() {
    let base = base();
    let _all = ["web", "web-2", "database"].map(|name| claim(base.path(), name).unwrap());
    let found = |name: &str| find(&base.path().join("bulle"), name).map(|entry| entry.name);
    assert_eq!(found("web").unwrap(), "web");
    assert_eq!(found("web-").unwrap(), "web-2");
    assert_eq!(found("d").unwrap(), "database");
    let text = |name: &str| found(name).unwrap_err().to_string();
    assert!(
        text("we").contains("several names, web, web-2"),
        "{}",
        text("we")
    );
    assert!(text("databsae").contains("there is database"));
    assert!(text("zzz").contains("`bulle ps`"));
    assert!(text("").contains("`bulle ps`"));
}
