//! The house rules that a compiler or clippy does not check; docs/architecture.md says why they are.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

const FILE_LINES: usize = 600;
const FUNCTION_LINES: usize = 80;
/// A function whose documentation has a line that starts so is a table, and may be longer.
const TABLE: &str = "Table:";
const TOP_LEVEL: [&str; 18] = [
    ".ci",
    ".gitignore",
    "CHANGELOG.md",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "Makefile",
    "README.md",
    "arch",
    "build.rs",
    "clippy.toml",
    "deny.toml",
    "devices",
    "docs",
    "resources",
    "rustfmt.toml",
    "src",
];
const TOP_LEVEL_TESTS: &str = "tests";
const THREADS: &str = "src/sandbox/thread.rs";
const ARCHITECTURE: &str = "arch/src/lib.rs";
/// This file names what it forbids.
const THIS: &str = "tests/style.rs";

/// Whether everything in the file is a test.
fn is_test_file(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/") || path.ends_with("/tests.rs")
}

/// What is wrong with one Rust file.
fn rust_problems(path: &str, text: &str) -> Vec<String> {
    let file = match syn::parse_file(text) {
        Ok(file) => file,
        Err(error) => return vec![format!("{path}: {error}")],
    };
    let mut problems = Vec::new();
    let lines = text.lines().count();
    if lines > FILE_LINES {
        problems.push(format!("{path}: {lines} lines, {FILE_LINES} allowed"));
    }
    let threads = path == THREADS || is_test_file(path);
    let mut walk = Walk {
        path,
        threads,
        problems: &mut problems,
    };
    walk.visit_file(&file);
    let words = text.contains("target_arch") && path != ARCHITECTURE && path != THIS;
    if words {
        problems.push(format!(
            "{path}: cfg(target_arch) belongs in {ARCHITECTURE} alone"
        ));
    }
    problems
}

struct Walk<'a> {
    path: &'a str,
    /// Threads may be created here.
    threads: bool,
    problems: &'a mut Vec<String>,
}

/// Whether the item is only compiled for tests.
fn is_test(attrs: &[syn::Attribute]) -> bool {
    attrs.iter().any(|attr| {
        let cfg_test = || {
            attr.parse_args::<syn::Path>()
                .is_ok_and(|path| path.is_ident("test"))
        };
        attr.path().is_ident("test") || attr.path().is_ident("cfg") && cfg_test()
    })
}

fn is_table(attrs: &[syn::Attribute]) -> bool {
    attrs.iter().any(|attr| match &attr.meta {
        syn::Meta::NameValue(doc) if doc.path.is_ident("doc") => match &doc.value {
            syn::Expr::Lit(syn::ExprLit {
                lit: syn::Lit::Str(text),
                ..
            }) => text.value().trim_start().starts_with(TABLE),
            _ => false,
        },
        _ => false,
    })
}

impl Walk<'_> {
    fn function(&mut self, attrs: &[syn::Attribute], name: &syn::Ident, body: &syn::Block) {
        let from = name.span().start().line;
        let lines = body.span().end().line + 1 - from;
        if lines > FUNCTION_LINES && !is_table(attrs) {
            let path = self.path;
            let text =
                format!("{path}:{from}: fn {name} has {lines} lines, {FUNCTION_LINES} allowed");
            self.problems.push(text);
        }
    }

    fn thread(&mut self, line: usize) {
        if !self.threads {
            let text = format!(
                "{}:{line}: threads are created in {THREADS} alone",
                self.path
            );
            self.problems.push(text);
        }
    }

    /// Runs `visit` with threads allowed where `attrs` say that it is a test.
    fn item(&mut self, attrs: &[syn::Attribute], visit: impl FnOnce(&mut Self)) {
        let before = self.threads;
        self.threads |= is_test(attrs);
        visit(self);
        self.threads = before;
    }
}

impl<'ast> Visit<'ast> for Walk<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        self.item(&item.attrs, |walk| visit::visit_item_mod(walk, item));
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.function(&item.attrs, &item.sig.ident, &item.block);
        self.item(&item.attrs, |walk| visit::visit_item_fn(walk, item));
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.function(&item.attrs, &item.sig.ident, &item.block);
        self.item(&item.attrs, |walk| visit::visit_impl_item_fn(walk, item));
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        let own = names.iter().any(|name| name == "sandbox");
        let creates = |pair: &[String]| pair[0] == "thread" && creates_threads(&pair[1]);
        if !own && names.windows(2).any(creates) {
            self.thread(path.span().start().line);
        }
        visit::visit_path(self, path);
    }

    fn visit_use_path(&mut self, item: &'ast syn::UsePath) {
        // `sandbox::thread` is where threads come from; using it is what is wanted.
        if item.ident == "sandbox" {
            return;
        }
        if item.ident == "thread" && use_names(&item.tree).iter().any(|n| creates_threads(n)) {
            self.thread(item.span().start().line);
        }
        visit::visit_use_path(self, item);
    }
}

fn creates_threads(name: &str) -> bool {
    ["spawn", "Builder", "scope"].contains(&name)
}

fn use_names(tree: &syn::UseTree) -> Vec<String> {
    match tree {
        syn::UseTree::Name(name) => vec![name.ident.to_string()],
        syn::UseTree::Rename(rename) => vec![rename.ident.to_string()],
        syn::UseTree::Path(path) => vec![path.ident.to_string()],
        syn::UseTree::Group(group) => group.items.iter().flat_map(use_names).collect(),
        syn::UseTree::Glob(_) => vec!["spawn".to_owned()],
    }
}

/// What is wrong with any text file.
fn text_problems(path: &str, text: &str) -> Vec<String> {
    let markers = ["TODO", "FIXME", "XXX"];
    let bad = |line: &str| {
        let mut words = line.split(|c: char| !c.is_ascii_alphanumeric());
        path != THIS && words.any(|word| markers.contains(&word))
    };
    let lines = text.lines().enumerate().filter(|(_, line)| bad(line));
    lines
        .map(|(at, line)| format!("{path}:{}: unfinished: {line}", at + 1))
        .collect()
}

/// The names in the `[…dependencies]` tables of a Cargo.toml.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let (mut names, mut inside) = (BTreeSet::new(), false);
    for line in manifest.lines().map(str::trim) {
        if let Some(header) = line.strip_prefix('[') {
            let header = header.trim_end_matches(']');
            inside = header.ends_with("dependencies");
            if let Some((_, name)) = header.split_once("dependencies.") {
                names.insert(name.trim_matches('"').to_owned());
            }
        } else if inside && !line.starts_with('#') {
            let name = line.split(['=', '.', ' ']).next().unwrap_or("");
            names.insert(name.trim_matches('"').to_owned());
        }
    }
    names.remove("");
    names
}

/// What a library crate depends on although it must not know it.
fn dependency_problems(
    path: &str,
    manifest: &str,
    forbidden: impl Fn(&str) -> bool,
) -> Vec<String> {
    let bad = dependencies(manifest)
        .into_iter()
        .filter(|name| forbidden(name));
    bad.map(|name| format!("{path}: must not depend on {name}"))
        .collect()
}

/// All files of the tree as (path, text), build output left out.
fn files() -> Vec<(String, String)> {
    fn walk(root: &Path, dir: &Path, files: &mut Vec<(String, String)>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if path.is_symlink()
                || [".git", "target", "corpus", "artifacts"].contains(&name.as_str())
            {
                continue;
            }
            if path.is_dir() {
                walk(root, &path, files);
            } else if let Ok(text) = fs::read_to_string(&path) {
                let relative = path
                    .strip_prefix(root)
                    .unwrap()
                    .to_string_lossy()
                    .into_owned();
                files.push((relative, text));
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files_found = Vec::new();
    walk(root, root, &mut files_found);
    assert!(files_found.len() > 20, "the tree was not found");
    files_found
}

#[track_caller]
fn assert_none(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

#[test]
fn rust_files_keep_the_rules() {
    let files = files()
        .into_iter()
        .filter(|(path, _)| path.ends_with(".rs"));
    assert_none(
        files
            .flat_map(|(path, text)| rust_problems(&path, &text))
            .collect(),
    );
}

#[test]
fn nothing_is_left_unfinished() {
    let skipped = |path: &str| path.ends_with("Cargo.lock") || path.starts_with("LICENSE");
    let files = files().into_iter().filter(|(path, _)| !skipped(path));
    assert_none(
        files
            .flat_map(|(path, text)| text_problems(&path, &text))
            .collect(),
    );
}

#[test]
fn libraries_depend_on_what_they_may() {
    let read =
        |path: &str| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(path)).unwrap();
    let devices = "devices/Cargo.toml";
    let arch = "arch/Cargo.toml";
    let mut problems = dependency_problems(devices, &read(devices), |name| {
        name.starts_with("kvm") || ["arch", "bulle"].contains(&name)
    });
    problems.extend(dependency_problems(arch, &read(arch), |n| {
        ["devices", "bulle"].contains(&n)
    }));
    assert_none(problems);
}

#[test]
fn the_top_level_is_as_agreed() {
    let names = fs::read_dir(env!("CARGO_MANIFEST_DIR")).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    let found: BTreeSet<String> = names
        .filter(|n| ![".git", "target"].contains(&n.as_str()))
        .collect();
    let agreed = TOP_LEVEL
        .iter()
        .chain([&TOP_LEVEL_TESTS])
        .map(|n| (*n).to_owned())
        .collect();
    assert_eq!(found, agreed);
}

mod the_checks {
    use super::*;

    #[test]
    fn find_long_files_and_functions() {
        let long = "\n".repeat(FILE_LINES + 1);
        assert_eq!(rust_problems("src/a.rs", &long).len(), 1);
        assert_eq!(rust_problems("src/a.rs", &"\n".repeat(FILE_LINES)).len(), 0);
        let body = |lines: usize| format!("fn f() {{\n{}}}\n", "g();\n".repeat(lines - 2));
        assert_eq!(rust_problems("src/a.rs", &body(FUNCTION_LINES)).len(), 0);
        assert_eq!(
            rust_problems("src/a.rs", &body(FUNCTION_LINES + 1)).len(),
            1
        );
        let method = format!("impl S {{\n{}}}", body(FUNCTION_LINES + 1));
        assert_eq!(rust_problems("src/a.rs", &method).len(), 1);
        let table = format!(
            "/// Registers.\n/// Table: one line each.\n{}",
            body(FUNCTION_LINES + 9)
        );
        assert_eq!(rust_problems("src/a.rs", &table).len(), 0);
        let data = format!("const T: [u8; 99] = [\n{}];", "1,\n".repeat(99));
        assert_eq!(rust_problems("src/a.rs", &data).len(), 0);
    }

    #[test]
    fn find_threads() {
        for bad in [
            "fn f() { std::thread::spawn(g); }",
            "fn f() { thread::Builder::new(); }",
            "use std::thread::Builder;",
            "use std::{io, thread::{sleep, spawn as start}};",
            "#[cfg(not(test))] fn f() { thread::scope(g); }",
        ] {
            assert_eq!(rust_problems("src/vm/a.rs", bad).len(), 1, "{bad}");
            assert_eq!(rust_problems(THREADS, bad).len(), 0, "{bad}");
            assert_eq!(rust_problems("src/vm/tests.rs", bad).len(), 0, "{bad}");
        }
        for good in [
            "fn f() { thread::sleep(d); }",
            "use std::thread::JoinHandle;",
            "use crate::sandbox::thread::spawn;",
            "fn f() { sandbox::thread::spawn(g); }",
            "#[cfg(test)] mod tests { fn f() { std::thread::spawn(g); } }",
            "#[test] fn f() { std::thread::spawn(g); }",
        ] {
            assert_eq!(rust_problems("src/vm/a.rs", good).len(), 0, "{good}");
        }
        let after = "#[cfg(test)] mod tests {} fn f() { std::thread::spawn(g); }";
        assert_eq!(rust_problems("src/vm/a.rs", after).len(), 1);
    }

    #[test]
    fn find_architectures_and_broken_files() {
        let text = "#[cfg(target_arch = \"x86_64\")] mod x86_64;";
        assert_eq!(rust_problems("src/lib.rs", text).len(), 1);
        assert_eq!(rust_problems(ARCHITECTURE, text).len(), 0);
        assert_eq!(rust_problems("src/lib.rs", "fn f( {").len(), 1);
    }

    #[test]
    fn find_what_is_unfinished() {
        assert_eq!(
            text_problems("a.md", "fine\n// TODO: more\n#FIXME\n").len(),
            2
        );
        assert_eq!(text_problems("a.md", "mastodon TODOS").len(), 0);
    }

    #[test]
    fn find_dependencies() {
        let manifest = "[package]\nname = \"kvm\"\n[dependencies]\nlog.workspace = true\n# kvm-x\n\
            [dev-dependencies]\nkvm-ioctls = \"1\"\n[target.'cfg(unix)'.dependencies.arch]\npath = \"x\"\n";
        let found = dependencies(manifest);
        assert_eq!(
            found.iter().collect::<Vec<_>>(),
            ["arch", "kvm-ioctls", "log"]
        );
        let problems = dependency_problems("Cargo.toml", manifest, |name| name.starts_with("kvm"));
        assert_eq!(problems.len(), 1);
    }
}
