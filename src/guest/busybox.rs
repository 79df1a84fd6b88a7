//! The default root of a guest: the host's static busybox and the few files that programs expect.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::initramfs::{Content, Node};

/// Where Debian's busybox-static puts it; then PATH is searched.
const USUAL: &str = "/bin/busybox";

const DIRECTORIES: [(&str, u32); 20] = [
    ("bin", 0o755),
    ("dev", 0o755),
    ("etc", 0o755),
    ("home", 0o755),
    ("lib", 0o755),
    ("mnt", 0o755),
    ("proc", 0o555),
    ("root", 0o700),
    ("run", 0o755),
    ("sbin", 0o755),
    ("sys", 0o555),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/lib", 0o755),
    ("usr/sbin", 0o755),
    ("usr/share", 0o755),
    ("var", 0o755),
    ("var/log", 0o755),
    ("var/tmp", 0o1777),
];

const FILES: [(&str, &str); 6] = [
    (
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    ),
    ("etc/group", "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n"),
    (
        "etc/hosts",
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    ),
    ("etc/hostname", "bulle\n"),
    ("etc/profile", "export PS1='\\w # '\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
];

/// Why there is no default root.
#[derive(Debug, thiserror::Error)]
pub enum BusyboxError {
    /// No busybox on the host.
    #[error(
        "the default root needs a static busybox, and neither {USUAL} nor PATH has one; install it \
         (on Debian: apt-get install busybox-static) or name a root directory with --root"
    )]
    Absent,
    /// One that needs libraries.
    #[error(
        "{path} is not a statically linked executable, so it does not run in the default root; \
         install a static one (on Debian: apt-get install busybox-static) or name a root directory \
         with --root"
    )]
    NotStatic {
        /// The busybox found.
        path: PathBuf,
    },
    /// It cannot be read or run.
    #[error("cannot use {path} for the default root")]
    Unusable {
        /// The busybox found.
        path: PathBuf,
        /// The reason.
        #[source]
        source: io::Error,
    },
}

/// Finds the host's busybox and checks that it is static.
///
/// # Errors
/// When there is none, or none that runs in an otherwise empty root.
pub fn find() -> Result<PathBuf, BusyboxError> {
    let search = std::env::var_os("PATH").unwrap_or_default();
    let in_path = std::env::split_paths(&search).map(|directory| directory.join("busybox"));
    let mut dynamic = None;
    for path in std::iter::once(PathBuf::from(USUAL))
        .chain(in_path)
        .filter(|path| path.is_file())
    {
        match is_static(&path) {
            Ok(true) => return Ok(path),
            Ok(false) => dynamic = dynamic.or(Some(path)),
            Err(source) => return Err(BusyboxError::Unusable { path, source }),
        }
    }
    Err(
        dynamic.map_or(BusyboxError::Absent, |path| BusyboxError::NotStatic {
            path,
        }),
    )
}

/// The default root, made of `busybox`: directories, files, and a link for each applet where
/// busybox wants it.
///
/// # Errors
/// When busybox cannot be run to list its applets.
pub fn root(busybox: &Path) -> Result<Vec<Node>, BusyboxError> {
    let unusable = |source| BusyboxError::Unusable {
        path: busybox.to_owned(),
        source,
    };
    let output = Command::new(busybox)
        .arg("--list-full")
        .output()
        .map_err(unusable)?;
    if !output.status.success() {
        let source = io::Error::other(format!("busybox --list-full: {}", output.status));
        return Err(unusable(source));
    }
    let mut nodes = Vec::with_capacity(512);
    for (path, mode) in DIRECTORIES {
        nodes.push(Node::new(path, mode, Content::Directory));
    }
    for (path, text) in FILES {
        nodes.push(Node::new(
            path,
            0o644,
            Content::Bytes(text.as_bytes().into()),
        ));
    }
    nodes.push(Node::new(
        "bin/busybox",
        0o755,
        Content::HostFile(busybox.to_owned()),
    ));
    for applet in String::from_utf8_lossy(&output.stdout).lines() {
        // "usr/bin/awk"; busybox itself is the file above.
        if applet != "bin/busybox" && applet.contains('/') {
            nodes.push(Node::new(
                applet,
                0o777,
                Content::Symlink("/bin/busybox".into()),
            ));
        }
    }
    Ok(nodes)
}

/// An ELF executable without an interpreter (PT_INTERP), 64-bit little-endian.
fn is_static(path: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let mut file = File::open(path)?;
    let mut header = [0; 64];
    if file.read_exact(&mut header).is_err() || !header.starts_with(b"\x7fELF\x02\x01") {
        return Ok(false);
    }
    let short = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
    let mut offset = [0; 8];
    offset.copy_from_slice(&header[32..40]);
    let (size, count) = (short(54), short(56));
    // Each program header starts with its type.
    let mut table = vec![0; usize::from(size) * usize::from(count)];
    file.seek(SeekFrom::Start(u64::from_le_bytes(offset)))?;
    if size < 4 || file.read_exact(&mut table).is_err() {
        return Ok(false);
    }
    let mut types = table
        .chunks_exact(usize::from(size))
        .map(|entry| u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]));
    Ok(!types.any(|kind| kind == PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_static_executable_is_told_from_others() {
        let directory = tempfile::tempdir().unwrap();
        let agent = directory.path().join("agent");
        std::fs::write(&agent, crate::guest::AGENT).unwrap();
        assert!(is_static(&agent).unwrap());
        assert!(!is_static(&std::env::current_exe().unwrap()).unwrap());
        for garbage in [
            &b"#!/bin/sh\n"[..],
            &crate::guest::AGENT[..70],
            b"\x7fELF\x02\x01",
            b"",
        ] {
            std::fs::write(&agent, garbage).unwrap();
            assert!(!is_static(&agent).unwrap());
        }
    }

    #[test]
    fn errors_name_the_package() {
        let error = BusyboxError::Absent.to_string();
        assert!(error.contains("busybox-static") && error.contains("--root"));
        let error = BusyboxError::NotStatic {
            path: "/x/busybox".into(),
        }
        .to_string();
        assert!(error.contains("busybox-static") && error.contains("/x/busybox"));
    }

    #[test]
    fn the_root_has_a_link_for_each_applet() {
        let directory = tempfile::tempdir().unwrap();
        let fake = directory.path().join("busybox");
        std::fs::write(
            &fake,
            "#!/bin/sh\nprintf 'bin/busybox\\nbin/sh\\nusr/bin/awk\\n'\n",
        )
        .unwrap();
        std::os::unix::fs::chown(&fake, None, None).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&fake, mode).unwrap();
        let nodes = root(&fake).unwrap();
        let links: Vec<_> = nodes
            .iter()
            .filter(|n| matches!(n.content, Content::Symlink(_)))
            .collect();
        assert_eq!(
            links.iter().map(|n| &n.path[..]).collect::<Vec<_>>(),
            ["bin/sh", "usr/bin/awk"]
        );
        assert!(nodes.iter().any(|n| n.path == "etc/passwd"));
        let absent = root(&directory.path().join("none"));
        assert!(matches!(absent, Err(BusyboxError::Unusable { .. })));
    }
}
