use std::io::Write;

use super::*;

fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    write(
        "modules.dep",
        b"kernel/misc/pvpanic.ko:\n\
          kernel/misc/pvpanic-mmio.ko.gz: kernel/misc/pvpanic.ko\n\
          kernel/net/top.ko.xz: kernel/net/middle.ko.zst kernel/net/base.ko\n\
          kernel/net/middle.ko.zst: kernel/net/base.ko\n\
          kernel/net/base.ko:\n\
          kernel/loop/a.ko: kernel/loop/b.ko\n\
          kernel/loop/b.ko: kernel/loop/a.ko\n\
          kernel/gone.ko:\n",
    );
    write(
        "modules.builtin",
        b"kernel/drivers/tty/serial/8250/8250_base.ko\n",
    );
    write(
        "modules.alias",
        b"# comment\nalias acpi*:PNP0C0C:* pvpanic\nalias fs-top top\nalias loop-alias a\n",
    );
    write(
        "modules.softdep",
        b"softdep middle pre: pvpanic-mmio absent post: loop-alias\n",
    );
    write("kernel/misc/pvpanic.ko", b"PVPANIC");
    write("kernel/net/base.ko", b"BASE");
    write("kernel/loop/a.ko", b"A");
    write("kernel/loop/b.ko", b"B");
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(b"MMIO").unwrap();
    write("kernel/misc/pvpanic-mmio.ko.gz", &gz.finish().unwrap());
    let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
    xz.write_all(b"TOP").unwrap();
    write("kernel/net/top.ko.xz", &xz.finish().unwrap());
    write(
        "kernel/net/middle.ko.zst",
        &zstd::encode_all(&b"MIDDLE"[..], 1).unwrap(),
    );
    directory
}

fn want(name: &str) -> Wanted<'_> {
    Wanted {
        name,
        required: true,
    }
}

fn names(resolved: &Resolved) -> Vec<&str> {
    resolved.modules.iter().map(|m| m.name.as_str()).collect()
}

#[test]
fn dependencies_come_first_and_once_and_are_decompressed() {
    let directory = directory();
    let wanted = [want("pvpanic_mmio"), want("pvpanic-mmio"), want("top")];
    let resolved = resolve(directory.path(), "6.1", &wanted).unwrap();
    assert_eq!(
        names(&resolved),
        ["pvpanic", "pvpanic_mmio", "base", "middle", "b", "a", "top"]
    );
    let data: Vec<&[u8]> = resolved.modules.iter().map(|m| &m.data[..]).collect();
    let expected: [&[u8]; 7] = [b"PVPANIC", b"MMIO", b"BASE", b"MIDDLE", b"B", b"A", b"TOP"];
    assert_eq!(data, expected);
}

#[test]
fn aliases_builtins_and_optional_modules() {
    let directory = directory();
    let optional = Wanted {
        name: "nothing",
        required: false,
    };
    let wanted = [want("acpi:PNP0C0C:"), want("8250-base"), optional];
    let resolved = resolve(directory.path(), "6.1", &wanted).unwrap();
    assert_eq!(names(&resolved), ["pvpanic"]);
    assert_eq!(resolved.builtin, ["8250-base"]);
    assert_eq!(resolved.missing, ["nothing"]);
}

#[test]
fn errors_name_the_module_and_the_place() {
    let directory = directory();
    let error = resolve(directory.path(), "6.1", &[want("nothing")]).unwrap_err();
    assert!(error.to_string().contains("nothing"), "{error}");
    assert!(
        error
            .to_string()
            .contains(directory.path().to_str().unwrap()),
        "{error}"
    );
    let error = resolve(Path::new("/none/6.1"), "6.1", &[want("evdev")]).unwrap_err();
    assert!(error.to_string().contains("linux-image-6.1"), "{error}");
    let error = resolve(directory.path(), "6.1", &[want("gone")]).unwrap_err();
    assert!(matches!(error, ModulesError::Read { .. }), "{error}");
    let error = resolve(directory.path(), "6.1", &[want("b")]);
    assert_eq!(
        names(&error.unwrap()),
        ["a", "b"],
        "a loop of dependencies ends"
    );
    fs::write(directory.path().join("kernel/net/top.ko.xz"), b"not xz").unwrap();
    assert!(resolve(directory.path(), "6.1", &[want("top")]).is_err());
}

#[test]
fn garbage_indexes_do_no_harm() {
    let directory = tempfile::tempdir().unwrap();
    let garbage = b":::\n\xff\xfe: :\n.ko:\nalias\nalias x\nsoftdep\nsoftdep a post:\n/:\n";
    for name in ["dep", "alias", "softdep", "builtin"] {
        fs::write(directory.path().join(format!("modules.{name}")), garbage).unwrap();
    }
    let optional = Wanted {
        name: "evdev",
        required: false,
    };
    let resolved = resolve(directory.path(), "6.1", &[optional]).unwrap();
    assert_eq!(resolved.missing, ["evdev"]);
}
