//! A running `bulle api`.
#![allow(dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command};
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::client::{Answer, Client};
use crate::common::{self, Input, Outcome, Running};

/// How long anything may take, also beside other labs.
const PATIENCE: Duration = Duration::from_secs(290);

/// A microVM with an API, killed when dropped.
pub struct Served {
    pub running: Running,
    pub dir: TempDir,
    pub client: Client,
    stdin: ChildStdin,
}

impl Served {
    /// `bulle api` with more arguments.
    pub fn with(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("api");
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulle"));
        command.args(["api", "--api-sock"]).arg(&socket);
        command.args(arguments);
        let mut running = Running::start(command, Input::Open, PATIENCE);
        let stdin = running.take_stdin();
        let client = Client::connect(&socket);
        Self {
            running,
            dir,
            client,
            stdin,
        }
    }

    /// `bulle api`.
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// With a payload as its kernel.
    pub fn payload(name: &str) -> Self {
        let mut served = Self::new();
        served
            .put("/boot-source", boot(&common::payload(name)))
            .done();
        served
    }

    /// The socket.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("api")
    }

    /// A file of the test's.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    #[track_caller]
    pub fn get(&mut self, path: &str) -> Answer {
        self.client.ask("GET", path, "")
    }

    #[track_caller]
    pub fn put(&mut self, path: &str, body: Value) -> Answer {
        self.client.ask("PUT", path, &body.to_string())
    }

    #[track_caller]
    pub fn patch(&mut self, path: &str, body: Value) -> Answer {
        self.client.ask("PATCH", path, &body.to_string())
    }

    /// Sends a signal.
    pub fn signal(mut self, signal: Signal) -> Self {
        self.running = self.running.signal(signal);
        self
    }

    /// `PUT /actions`.
    #[track_caller]
    pub fn action(&mut self, name: &str) -> Answer {
        self.put("/actions", json!({ "action_type": name }))
    }

    /// Starts the microVM.
    #[track_caller]
    pub fn start(mut self) -> Self {
        self.action("InstanceStart").done();
        self
    }

    /// `Not started`, `Running` or `Paused`.
    #[track_caller]
    pub fn state(&mut self) -> String {
        self.get("/").value()["state"].as_str().unwrap().to_owned()
    }

    /// Types into the guest's console.
    pub fn types(&mut self, text: &str) {
        self.stdin.write_all(text.as_bytes()).unwrap();
    }

    /// Waits until the guest has written `text`.
    pub fn wait_for(mut self, text: &str) -> Self {
        self.running = self.running.wait_for(text);
        self
    }

    /// Waits for its end, at which no socket may be left.
    pub fn finish(self) -> Outcome {
        let outcome = self.running.finish();
        assert!(!self.dir.path().join("api").exists(), "{outcome:#?}");
        outcome
    }
}

/// A boot-source.
pub fn boot(kernel: &Path) -> Value {
    json!({ "kernel_image_path": kernel })
}
