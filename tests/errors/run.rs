//! A `bulle run` in an empty place of its own, checked for what it leaves, and input files made by
//! hand.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use super::common::{Input, Outcome, Running};

/// No error takes longer, on a busy machine either.
pub const SOON: Duration = Duration::from_secs(60);
/// Names a run among all processes, by its environment.
const MARK: &str = "BULLE_TEST_PLACE";
/// The places in which a program may leave files, by their variables.
const PLACES: [&str; 6] = [
    "HOME",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "XDG_RUNTIME_DIR",
    "XDG_STATE_HOME",
];
/// What each error text may say only once.
const REPEATS: usize = 12;

/// A `bulle run` in an empty place of its own.
pub struct Run {
    place: TempDir,
    under: Vec<OsString>,
    words: Vec<OsString>,
    command: Vec<OsString>,
}

/// Without a kernel yet.
pub fn bare() -> Run {
    Run {
        place: tempfile::tempdir().unwrap(),
        under: Vec::new(),
        words: vec![env!("CARGO_BIN_EXE_bulle").into(), "run".into()],
        command: Vec::new(),
    }
}

pub fn kernel(path: impl AsRef<OsStr>) -> Run {
    bare().args(["--kernel"]).args([path])
}

impl Run {
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        let words = args.into_iter().map(|arg| arg.as_ref().to_owned());
        self.words.extend(words);
        self
    }

    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(Into::into).collect();
        self
    }

    /// Runs it by `script`, in which `"$@"` stands for it.
    pub fn by_shell(mut self, script: &str) -> Self {
        let words = ["sh", "-c", script, "sh"];
        self.under.splice(0..0, words.map(OsString::from));
        self
    }

    /// As [`Self::by_shell`], where `script` may mount what it likes.
    pub fn in_namespace(self, script: &str) -> Self {
        let mut run = self.by_shell(script);
        let unshare: &[&str] = if is_root() {
            &["unshare", "--mount"]
        } else {
            &["unshare", "--map-root-user", "--mount"]
        };
        run.under.splice(0..0, unshare.iter().map(OsString::from));
        run
    }

    /// Runs it without the rights that let root read everything.
    pub fn without_rights(mut self) -> Self {
        if is_root() {
            let words = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--"];
            self.under.extend(words.map(OsString::from));
        }
        self
    }

    pub fn build(&self) -> Command {
        let words: Vec<_> = self.under.iter().chain(&self.words).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        if !self.command.is_empty() {
            command.arg("--").args(&self.command);
        }
        command
            .env(MARK, self.place.path())
            .current_dir(self.place.path());
        for place in PLACES {
            let path = self.place.path().join(place);
            fs::create_dir_all(&path).unwrap();
            command.env(place, path);
        }
        command
    }

    #[track_caller]
    pub fn outcome(self) -> Outcome {
        let outcome = Running::start(self.build(), Input::Null, SOON).finish();
        self.nothing_is_left();
        outcome
    }

    #[track_caller]
    pub fn nothing_is_left(&self) {
        let names = |path: &Path| -> Vec<_> {
            let entries = fs::read_dir(path).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect()
        };
        let mut found = names(self.place.path());
        found.retain(|name| !PLACES.iter().any(|place| name == place));
        for place in PLACES {
            found.extend(names(&self.place.path().join(place)));
        }
        // The kernel cache, where one belongs.
        if self
            .place
            .path()
            .join("XDG_CACHE_HOME/bulle/kernels")
            .is_dir()
        {
            found.retain(|name| name != "bulle");
        }
        assert!(found.is_empty(), "files are left: {found:?}");
        let mark = self.place.path().as_os_str().as_encoded_bytes();
        for process in fs::read_dir("/proc").unwrap().flatten() {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            let ours = environment.windows(mark.len()).any(|bytes| bytes == mark);
            assert!(!ours, "process {:?} is left", process.file_name());
        }
    }

    /// One line that names all of `words`; exit code 125.
    #[track_caller]
    pub fn refused(self, words: &[&str]) {
        let shown = format!("{:?}", self.words);
        let outcome = self.outcome();
        let line = outcome.stderr.trim_end_matches('\n');
        assert_eq!(outcome.code, 125, "{shown}: {outcome:#?}");
        assert_eq!(outcome.stdout, "", "{shown}");
        assert!(line.starts_with("bulle: "), "{shown}: {line}");
        assert_eq!(line.lines().count(), 1, "{shown}: {line}");
        assert!(!line.contains("panicked"), "{shown}: {line}");
        for word in words {
            assert!(line.contains(word), "{shown}: no {word:?} in: {line}");
        }
        for part in line.split(": ").filter(|part| part.len() > REPEATS) {
            assert_eq!(line.matches(part).count(), 1, "{shown}: said twice: {line}");
        }
    }
}

fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// A file with these bytes in a directory of its own below target/tmp, until the test runs again.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let test = std::thread::current().name().unwrap().to_owned();
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("errors")
        .join(test)
        .join(format!("{name}.d"));
    if directory.exists() {
        fs::remove_dir_all(&directory).unwrap();
    }
    fs::create_dir_all(&directory).unwrap();
    let path = directory.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// An ELF header of a program for `machine` with `segments` as (address, size in memory), each
/// with one byte in the file: HLT.
pub fn elf(class: u8, machine: u16, segments: &[(u64, u64)]) -> Vec<u8> {
    let (header, entry) = if class == 2 { (64u16, 56u16) } else { (52, 32) };
    let word = |value: u64| value.to_le_bytes()[..if class == 2 { 8 } else { 4 }].to_vec();
    let mut file = vec![0x7f, b'E', b'L', b'F', class, 1, 1];
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(machine.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for value in [segments[0].0, header.into(), 0] {
        file.extend(word(value));
    }
    file.extend([0; 4]);
    for value in [header, entry, segments.len() as u16, 0, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    let code = u64::from(header) + u64::from(entry) * segments.len() as u64;
    for &(address, size) in segments {
        file.extend(1u32.to_le_bytes());
        if class == 2 {
            file.extend(7u32.to_le_bytes());
        }
        for value in [code, address, address, 1, size] {
            file.extend(word(value));
        }
        if class == 1 {
            file.extend(7u32.to_le_bytes());
        }
        file.extend(word(4096));
    }
    file.push(0xf4);
    file
}

/// The bytes of a bzImage: Debian's, from /boot.
pub fn bzimage() -> Vec<u8> {
    let names = fs::read_dir("/boot")
        .unwrap()
        .flatten()
        .map(|entry| entry.path());
    let path = names
        .filter(|path| text(path).starts_with("/boot/vmlinuz-"))
        .min_by_key(|path| fs::metadata(path).map_or(u64::MAX, |meta| meta.len()));
    let path = path.expect("a kernel in /boot (Debian: apt-get install linux-image-amd64)");
    fs::read(path).unwrap()
}
