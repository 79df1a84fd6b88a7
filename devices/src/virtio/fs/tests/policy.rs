//! Extended attributes, caches and owners are as the options say.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use fuse_abi::os::{
    FATTR_UID, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, fuse_getxattr_in, fuse_getxattr_out,
    fuse_mkdir_in, fuse_opcode as op, fuse_open_in, fuse_open_out, fuse_setattr_in,
};
use zerocopy::IntoBytes;

use super::super::{CachePolicy, Ownership};
use super::ops::{attr, create};
use super::{Guest, ROOT, get, name, put};

#[test]
fn extended_attributes_of_users_are_offered() {
    let mut guest = Guest::writable();
    let (node, _) = create(&mut guest, "a", libc::O_RDWR, 0o600).unwrap();
    let set = |guest: &mut Guest, name: &[u8], value: &[u8]| {
        let sizes = [value.len() as u32, 0];
        guest.call(op::FUSE_SETXATTR, node, &[sizes.as_bytes(), name, value])
    };
    let ask = |guest: &mut Guest, opcode, size, name: &[u8]| {
        let arg = fuse_getxattr_in { size, padding: 0 };
        guest.call(opcode, node, &[arg.as_bytes(), name])
    };
    match set(&mut guest, b"user.color\0", b"blue") {
        // Not all filesystems have them.
        Err(libc::EOPNOTSUPP) => return,
        result => result.unwrap(),
    };
    let value = ask(&mut guest, op::FUSE_GETXATTR, 100, b"user.color\0");
    assert_eq!(value.unwrap(), b"blue");
    let size = ask(&mut guest, op::FUSE_GETXATTR, 0, b"user.color\0").unwrap();
    assert_eq!(get::<fuse_getxattr_out>(&size).size, 4);
    let short = ask(&mut guest, op::FUSE_GETXATTR, 2, b"user.color\0");
    assert_eq!(short, Err(libc::ERANGE));
    let none = ask(&mut guest, op::FUSE_GETXATTR, 9, b"user.none\0");
    assert_eq!(none, Err(libc::ENODATA));
    for hidden in [
        "trusted.overlay.opaque",
        "system.posix_acl_access",
        "security.selinux",
    ] {
        let hidden = name(hidden);
        assert_eq!(set(&mut guest, &hidden, b"x"), Err(libc::EOPNOTSUPP));
        let value = ask(&mut guest, op::FUSE_GETXATTR, 9, &hidden);
        assert_eq!(value, Err(libc::EOPNOTSUPP));
        let removed = guest.call(op::FUSE_REMOVEXATTR, node, &[&hidden]);
        assert_eq!(removed, Err(libc::EOPNOTSUPP));
    }
    let path = guest.path("a");
    let flags = rustix::fs::XattrFlags::empty();
    let trusted = rustix::fs::setxattr(&path, "trusted.mine", b"x", flags);
    let list = ask(&mut guest, op::FUSE_LISTXATTR, 100, b"").unwrap();
    assert_eq!(list, b"user.color\0", "{trusted:?}");
    guest
        .call(op::FUSE_REMOVEXATTR, node, &[b"user.color\0"])
        .unwrap();
    let size = ask(&mut guest, op::FUSE_LISTXATTR, 0, b"").unwrap();
    assert_eq!(get::<fuse_getxattr_out>(&size).size, 0);
    // A value that is said to be longer than the request.
    let long = [1000_u32, 0];
    let set = guest.call(op::FUSE_SETXATTR, node, &[long.as_bytes(), b"user.a\0x"]);
    assert_eq!(set, Err(libc::EINVAL));
    let mut without = Guest::new(|options| options.xattr = false);
    let arg = fuse_getxattr_in::default();
    let value = without.call(op::FUSE_GETXATTR, ROOT, &[arg.as_bytes(), b"user.a\0"]);
    assert_eq!(value, Err(libc::ENOSYS));
}

#[test]
fn caches_are_as_the_policy_says() {
    for (cache, seconds, flags) in [
        (CachePolicy::None, 0, FOPEN_DIRECT_IO),
        (CachePolicy::Auto, 1, 0),
        (CachePolicy::Always, 86400, FOPEN_KEEP_CACHE),
    ] {
        let mut guest = Guest::new(|options| options.cache = cache);
        put(guest.dir.path(), "file", "x");
        let entry = guest.look_up(ROOT, "file").unwrap();
        assert_eq!((entry.entry_valid, entry.attr_valid), (seconds, seconds));
        let open = fuse_open_in::default();
        let answer = guest
            .call(op::FUSE_OPEN, entry.nodeid, &[open.as_bytes()])
            .unwrap();
        let known = FOPEN_DIRECT_IO | FOPEN_KEEP_CACHE;
        assert_eq!(get::<fuse_open_out>(&answer).open_flags & known, flags);
        match guest.look_up(ROOT, "none") {
            Ok(entry) => assert_eq!((entry.nodeid, cache), (0, CachePolicy::Always)),
            Err(errno) => {
                assert_eq!(errno, libc::ENOENT);
                assert_ne!(cache, CachePolicy::Always);
            }
        }
    }
    let mut guest = Guest::new(|options| {
        options.read_only = false;
        options.writeback = true;
        options.timeout = Some(std::time::Duration::from_millis(2500));
    });
    put(guest.dir.path(), "file", "x");
    let entry = guest.look_up(ROOT, "file").unwrap();
    assert_eq!(
        (entry.entry_valid, entry.entry_valid_nsec),
        (2, 500_000_000)
    );
    // Pages are filled by reading, also of files that are only written.
    let fh = guest
        .open(entry.nodeid, libc::O_WRONLY | libc::O_APPEND)
        .unwrap();
    assert_eq!(guest.read(fh, 0, 9).unwrap(), b"x");
    guest.write(fh, 0, b"y").unwrap();
    assert_eq!(std::fs::read(guest.path("file")).unwrap(), b"y");
}

#[test]
fn files_belong_to_whom_the_ownership_says() {
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        let mut guest = Guest::writable();
        std::fs::set_permissions(guest.dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
        guest.ids = (1234, 2345);
        let (node, _) = create(&mut guest, "theirs", libc::O_RDWR, 0o600).unwrap();
        let shown = attr(&mut guest, node, None).unwrap();
        assert_eq!((shown.uid, shown.gid), (1234, 2345));
        // A directory of a group that is not their first one.
        std::os::unix::fs::chown(guest.dir.path(), Some(0), Some(77)).unwrap();
        std::fs::set_permissions(guest.dir.path(), PermissionsExt::from_mode(0o770)).unwrap();
        let mkdir = fuse_mkdir_in {
            mode: 0o700,
            umask: 0,
        };
        let made = guest.call(op::FUSE_MKDIR, ROOT, &[mkdir.as_bytes(), b"no\0"]);
        assert_eq!(made, Err(libc::EACCES));
        let body = [
            mkdir.as_bytes(),
            b"yes\0\0\0\0\0",
            [16_u32, 32, 1, 77].as_bytes(),
        ]
        .concat();
        let len = super::IN_HEADER + body.len();
        let mut request = super::header(len, op::FUSE_MKDIR as u32, 1, ROOT, guest.ids);
        request[36] = 2;
        request.extend_from_slice(&body);
        let answer = guest.raw(&request, 256);
        assert_eq!(get::<fuse_abi::os::fuse_out_header>(&answer).error, 0);
        let made = std::fs::metadata(guest.path("yes")).unwrap();
        assert_eq!((made.uid(), made.gid()), (1234, 2345));
        // This thread is root again, in its own groups.
        guest.ids = (0, 0);
        let (node, _) = create(&mut guest, "mine", libc::O_RDWR, 0o600).unwrap();
        assert_eq!(attr(&mut guest, node, None).unwrap().uid, 0);
        assert!(
            !rustix::process::getgroups()
                .unwrap()
                .contains(&rustix::fs::Gid::from_raw(77))
        );
    }
    for ownership in [Ownership::Squash, Ownership::Host] {
        let mut guest = Guest::new(|options| {
            options.read_only = false;
            options.ownership = ownership;
        });
        guest.ids = (1234, 2345);
        let (node, _) = create(&mut guest, "file", libc::O_RDWR, 0o600).unwrap();
        let made = std::fs::metadata(guest.path("file")).unwrap();
        let me = rustix::process::geteuid().as_raw();
        assert_eq!(made.uid(), me);
        let shown = attr(&mut guest, node, None).unwrap().uid;
        assert_eq!(
            shown,
            if ownership == Ownership::Squash {
                0
            } else {
                me
            }
        );
        let owner = fuse_setattr_in {
            valid: FATTR_UID,
            uid: shown,
            ..Default::default()
        };
        guest
            .call(op::FUSE_SETATTR, node, &[owner.as_bytes()])
            .unwrap();
        let after = std::fs::metadata(guest.path("file")).unwrap();
        assert_eq!(after.uid(), me);
    }
}
