//! The default kernel: the newest that this user can read under /boot.

use std::cmp::Ordering;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

const BOOT: &str = "/boot";
const PREFIX: &str = "vmlinuz-";

/// No kernel could be chosen.
#[derive(Debug, thiserror::Error)]
pub enum DefaultKernelError {
    /// None there.
    #[error(
        "No kernel under {}: name one with --kernel FILE, or install one \
         (Debian: apt-get install linux-image-amd64)", dir.display()
    )]
    None {
        /// Where was looked.
        dir: PathBuf,
    },
    /// Some there, none readable.
    #[error(
        "No kernel under {} is readable by this user (the newest is {}): \
         name a readable copy with --kernel FILE", dir.display(), newest.display()
    )]
    Unreadable {
        /// Where was looked.
        dir: PathBuf,
        /// The newest of those found.
        newest: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
}

/// The newest readable `/boot/vmlinuz-*`.
pub fn default_kernel() -> Result<PathBuf, DefaultKernelError> {
    newest_in(Path::new(BOOT))
}

fn newest_in(dir: &Path) -> Result<PathBuf, DefaultKernelError> {
    let mut releases: Vec<String> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| name.strip_prefix(PREFIX).map(str::to_string))
        .collect();
    releases.sort_by(|a, b| compare(b, a));
    let path = |release: &String| dir.join(format!("{PREFIX}{release}"));
    let mut refusal = None;
    for release in &releases {
        match File::open(path(release)) {
            Ok(_) => return Ok(path(release)),
            Err(source) => drop(refusal.get_or_insert((path(release), source))),
        }
    }
    let dir = dir.to_path_buf();
    Err(match refusal {
        Some((newest, source)) => DefaultKernelError::Unreadable {
            dir,
            newest,
            source,
        },
        None => DefaultKernelError::None { dir },
    })
}

/// Orders releases: numbers as numbers, a release before the same with a flavour added.
fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (pieces(a), pieces(b));
    loop {
        match (a.next(), b.next()) {
            (None, None) => return Ordering::Equal,
            // `6.1.0-amd64` is preferred to `6.1.0-cloud-amd64`, and `6.1` to `6.1-rc1`.
            (Some(Piece::Word(_)), None) => return Ordering::Less,
            (None, Some(Piece::Word(_))) => return Ordering::Greater,
            (x, y) if x == y => {}
            (Some(Piece::Word(x)), Some(Piece::Word(y))) => return y.cmp(x),
            (x, y) => return x.cmp(&y),
        }
    }
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Piece<'a> {
    Word(&'a str),
    Number(u64),
}

fn pieces(text: &str) -> impl Iterator<Item = Piece<'_>> {
    text.split(['.', '-', '_', '+', '~'])
        .map(|word| word.parse().map_or(Piece::Word(word), Piece::Number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_is_greater() {
        let ordered = [
            "5.10.0-9-amd64",
            "5.10.0-10-amd64",
            "6.1.0-rc1",
            "6.1.0",
            "6.1.0-9-amd64",
            "6.1.0-56-cloud-amd64",
            "6.1.0-56-amd64",
            "6.12.3",
        ];
        for pair in ordered.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
            assert_eq!(compare(pair[1], pair[0]), Ordering::Greater, "{pair:?}");
        }
    }

    #[test]
    fn an_empty_directory_says_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let error = newest_in(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("--kernel") && error.contains("linux-image-amd64"),
            "{error}"
        );
        fs::write(dir.path().join("vmlinuz-6.1.0"), b"").unwrap();
        assert!(newest_in(dir.path()).unwrap().ends_with("vmlinuz-6.1.0"));
    }
}
