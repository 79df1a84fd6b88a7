//! `bulle run` with a compressed kernel made here: later starts take it from the cache.
//!
//! Needs KVM, so not part of a plain `cargo test`: `cargo test --test kernel_cache`.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests are not tests to clippy"
)]

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

const TEXT: u64 = 16 << 20;
const IMAGE_SIZE: usize = 8192;

/// A 64-bit ELF kernel that writes `letter` to COM1 and ends by a triple fault.
fn elf(letter: u8) -> Vec<u8> {
    // mov dx, 0x3f8; mov al, letter; out dx, al; ud2 (there is no IDT)
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, letter, 0xee, 0x0f, 0x0b];
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1u32.to_le_bytes());
    for word in [TEXT, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for half in [1u32, 7] {
        file.extend(half.to_le_bytes());
    }
    let size = code.len() as u64;
    for word in [120, TEXT, TEXT, size, size, 4096] {
        file.extend(word.to_le_bytes());
    }
    file.extend(code);
    file
}

/// A bzImage of that kernel (offsets: Documentation/arch/x86/boot.rst), always of the same size.
fn bzimage(letter: u8) -> Vec<u8> {
    let mut payload = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    payload.write_all(&elf(letter)).unwrap();
    let payload = payload.finish().unwrap();
    let mut image = vec![0; 1024];
    let mut set = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    set(0x1f1, &[1]);
    set(0x1fe, &0xaa55u16.to_le_bytes());
    set(0x200, &[0xeb, 0x6a]);
    set(0x202, b"HdrS");
    set(0x206, &0x020fu16.to_le_bytes());
    set(0x211, &[1]);
    set(0x22c, &0x7fff_ffffu32.to_le_bytes());
    set(0x230, &0x20_0000u32.to_le_bytes());
    set(0x236, &[1]);
    set(0x238, &2047u32.to_le_bytes());
    set(0x248, &0u32.to_le_bytes());
    set(0x24c, &(payload.len() as u32).to_le_bytes());
    set(0x258, &TEXT.to_le_bytes());
    set(0x260, &0x40_0000u32.to_le_bytes());
    image.extend(payload);
    image.resize(IMAGE_SIZE, 0);
    image
}

struct Ground {
    home: TempDir,
}

impl Ground {
    fn image(&self) -> PathBuf {
        self.home.path().join("bzImage")
    }

    fn entries(&self) -> Vec<PathBuf> {
        let directory = self.home.path().join(".cache/bulle/kernels");
        let files = fs::read_dir(directory).into_iter().flatten();
        files.map(|file| file.unwrap().path()).collect()
    }

    /// Starts the image; returns what the guest has written, and bulle's log.
    fn run(&self, options: &[&str]) -> (String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_bulle"))
            .args([
                "run",
                "--root",
                "none",
                "--console",
                "tty",
                "--log",
                "debug",
            ])
            .args(["--memory", "64M", "--timeout", "100s", "--kernel"])
            .arg(self.image())
            .args(options)
            .env_remove("XDG_CACHE_HOME")
            .env("HOME", self.home.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (text(&output.stdout), text(&output.stderr))
    }

    /// Starts an image that was written at `since`, and is not stored before it has rested.
    fn expect_new(&self, since: Instant, letter: &str, entries: usize) {
        let (out, log) = self.run(&[]);
        assert!(out == letter && log.contains("kernel unpacked"), "{log}");
        if self.entries().len() == entries {
            thread::sleep(REST + Duration::from_millis(200));
            self.expect(
                &["--no-kernel-cache"],
                letter,
                &["kernel unpacked"],
                entries,
            );
            let stored = ["kernel unpacked", "kernel put into the cache"];
            return self.expect(&[], letter, &stored, entries + 1);
        }
        assert_eq!(self.entries().len(), entries + 1, "{log}");
        assert!(since.elapsed() >= REST, "stored at once");
    }

    fn expect(&self, options: &[&str], letter: &str, logged: &[&str], entries: usize) {
        let (out, log) = self.run(options);
        assert_eq!(out, letter, "{log}");
        for words in logged {
            assert!(log.contains(words), "no \"{words}\" in\n{log}");
        }
        assert_eq!(self.entries().len(), entries, "{log}");
    }
}

/// So old an image is stored.
const REST: Duration = Duration::from_secs(2);

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn later_starts_use_the_cache_and_a_changed_image_does_not() {
    let ground = Ground {
        home: tempfile::tempdir().unwrap(),
    };
    let (unpacked, taken) = ("kernel unpacked", "kernel taken from the cache");
    let since = Instant::now();
    fs::write(ground.image(), bzimage(b'A')).unwrap();
    ground.expect_new(since, "A", 0);
    ground.expect(&[], "A", &[taken], 1);
    ground.expect(&["--no-kernel-cache"], "A", &[unpacked], 1);

    // The kernel's last byte but the trailer's 12 and `ud2`'s 2 is `out`; without it, no letter.
    let entry = ground.entries().remove(0);
    let out = fs::metadata(&entry).unwrap().len() as usize - 12 - 3;
    flip(&entry, out);
    ground.expect(
        &[],
        "A",
        &["is damaged", unpacked, "kernel put into the cache"],
        1,
    );
    ground.expect(&[], "A", &[taken], 1);

    // Same path, inode, size and modification time, but another kernel.
    let before = fs::metadata(ground.image()).unwrap();
    let since = Instant::now();
    fs::write(ground.image(), bzimage(b'B')).unwrap();
    let image = File::options().write(true).open(ground.image()).unwrap();
    image.set_modified(before.modified().unwrap()).unwrap();
    let after = fs::metadata(ground.image()).unwrap();
    assert_eq!(
        (before.len(), before.modified().unwrap()),
        (after.len(), after.modified().unwrap())
    );
    ground.expect_new(since, "B", 1);
    ground.expect(&[], "B", &[taken], 2);
}
