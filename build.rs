//! Builds the guest agent, which bulle carries in itself, by a nested cargo.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const AGENT: &str = "resources/guest/agent";
/// What the agent is made of, below `resources/guest`.
const SOURCES: [&str; 6] = [
    "agent/src",
    "agent/build.rs",
    "agent/Cargo.toml",
    "agent/Cargo.lock",
    "protocol/src",
    "protocol/Cargo.toml",
];
const MAX_SIZE: u64 = 1 << 20;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for source in SOURCES {
        println!("cargo::rerun-if-changed=resources/guest/{source}");
    }
    if let Err(error) = embed_agent() {
        error
            .to_string()
            .lines()
            .for_each(|line| println!("cargo::error={line}"));
    }
}

fn embed_agent() -> Result<(), Box<dyn Error>> {
    let binary = build_agent(Path::new(&env::var("OUT_DIR")?))?;
    let size = std::fs::metadata(&binary)?.len();
    if size > MAX_SIZE {
        return Err(format!("the guest agent has {size} bytes, more than {MAX_SIZE}").into());
    }
    println!("cargo::rustc-env=BULLE_AGENT={}", binary.display());
    Ok(())
}

fn build_agent(out: &Path) -> Result<PathBuf, Box<dyn Error>> {
    // The agent uses no libc, so the host's target serves every target of its architecture.
    let (host, target) = (env::var("HOST")?, env::var("TARGET")?);
    let target = if host.split('-').next() == target.split('-').next() {
        host
    } else {
        target
    };
    let directory = out.join("agent");
    let mut cargo = Command::new(env::var("CARGO")?);
    cargo
        .args([
            "build",
            "--release",
            "--locked",
            "--target",
            &target,
            "--manifest-path",
        ])
        .arg(
            Path::new(&env::var("CARGO_MANIFEST_DIR")?)
                .join(AGENT)
                .join("Cargo.toml"),
        )
        .arg("--target-dir")
        .arg(&directory);
    // Flags and wrappers meant for the outer build (coverage, clippy, sanitizers) need a libc.
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        let ours = [
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "CLIPPY_ARGS",
        ];
        let kinds = [
            "CARGO_ENCODED_",
            "CARGO_BUILD_",
            "CARGO_PROFILE_",
            "CARGO_CFG_",
        ];
        if ours.contains(&&*name) || kinds.iter().any(|kind| name.starts_with(kind)) {
            cargo.env_remove(&*name);
        }
    }
    let status = cargo
        .status()
        .map_err(|e| format!("cannot run {cargo:?}: {e}"))?;
    if !status.success() {
        return Err(format!(
            "the guest agent ({AGENT}) does not build: {status}; the reason is in the output of:\n\
             cargo build --release --manifest-path {AGENT}/Cargo.toml"
        )
        .into());
    }
    Ok(directory.join(target).join("release/agent"))
}
