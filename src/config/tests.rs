use proptest::prelude::*;

use super::*;

fn minimal() -> Config {
    serde_json::from_str(r#"{"boot-source":{"kernel_image_path":"/k"}}"#).unwrap()
}

#[test]
fn sizes() {
    for (text, mib) in [
        ("512", 512),
        ("512M", 512),
        ("2GiB", 2048),
        ("1g", 1024),
        ("1T", 1 << 20),
        ("65536K", 64),
    ] {
        assert_eq!(parse_size(text), Ok(mib), "{text}");
    }
    for text in [
        "",
        "M",
        "-1",
        "1.5G",
        "12Q",
        "1000K",
        "99999999999999999999",
        "1 000M",
    ] {
        assert!(parse_size(text).is_err(), "{text}");
    }
    assert_eq!(
        parse_size("18446744073709551615T").unwrap_err().text,
        "18446744073709551615T"
    );
}

#[test]
fn defaults_are_valid_and_round_trip() {
    let config = minimal();
    assert_eq!(config.machine_config, MachineConfig::default());
    assert_eq!(config.console(), Console::Tty);
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Config>(&text).unwrap(), config);
    config.validate().unwrap();
}

#[test]
fn unknown_fields_are_refused_by_name() {
    let text = r#"{"boot-source":{"kernel_image_path":"/k","initrd":"x"}}"#;
    let error = serde_json::from_str::<Config>(text)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("`initrd`") && error.contains("initrd_path"),
        "{error}"
    );
}

#[test]
fn limits_are_named() {
    let check = |change: &dyn Fn(&mut Config), words: &[&str]| {
        let mut config = minimal();
        change(&mut config);
        let error = config.validate().unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{error} lacks {word}");
        }
    };
    check(
        &|c| c.machine_config.vcpu_count = 0,
        &["0 vCPUs", "1 to 254"],
    );
    check(&|c| c.machine_config.vcpu_count = 255, &["255 vCPUs"]);
    check(
        &|c| c.machine_config.mem_size_mib = 31,
        &["31 MiB", "32M to 1T"],
    );
    check(
        &|c| c.machine_config.mem_size_mib = MAX_MEMORY_MIB + 1,
        &["1048577 MiB"],
    );
    check(
        &|c| c.machine_config.threads_per_core = 2,
        &["1 vCPUs", "2 threads"],
    );
    check(&|c| c.machine_config.dies = 0, &["0 dies"]);
    check(
        &|c| {
            c.machine_config.mem_size_mib = 33;
            c.machine_config.huge_pages = HugePages::Huge2M;
        },
        &["33 MiB", "2 MiB pages"],
    );
    check(&|c| c.timeout_ms = Some(0), &["timeout of 0"]);
    let guest = |guest: Guest| move |c: &mut Config| c.guest = Some(guest.clone());
    check(
        &guest(Guest {
            env: vec!["=x".into()],
            ..Guest::default()
        }),
        &["'=x'", "KEY=VALUE"],
    );
    check(
        &guest(Guest {
            env: vec!["x".into()],
            ..Guest::default()
        }),
        &["'x'"],
    );
    check(
        &guest(Guest {
            cwd: Some("tmp".into()),
            ..Guest::default()
        }),
        &["'tmp'"],
    );
    check(
        &guest(Guest {
            command: vec!["a\0b".into()],
            ..Guest::default()
        }),
        &["NUL", "command"],
    );
    check(
        &guest(Guest {
            root: Root::Initrd,
            ..Guest::default()
        }),
        &["--initrd"],
    );
}

proptest! {
    #[test]
    fn size_never_panics(text in ".{0,24}") {
        let _ = parse_size(&text);
    }
}
