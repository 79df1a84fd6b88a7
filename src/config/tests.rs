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

#[test]
fn drives_are_told_apart() {
    let check = |drives: &[Drive], root: Root, words: &str| {
        let mut config = minimal();
        config.drives = drives.to_vec();
        config.guest = Some(Guest {
            root,
            ..Guest::default()
        });
        let error = config.validate().unwrap_err().to_string();
        assert!(error.contains(words), "{error} lacks {words}");
    };
    let drive = |id: &str| Drive::new(id, "/d".into());
    let root = |id: &str| Drive {
        is_root_device: true,
        ..drive(id)
    };
    check(&[drive("a b")], Root::Busybox, "'a b'");
    check(&[drive("")], Root::Busybox, "''");
    let long = "a-name-of-twenty-byte";
    let other = format!("{}x", &long[..20]);
    check(
        &[drive(long), drive("b"), drive(&other)],
        Root::Busybox,
        &other,
    );
    check(&[root("a"), root("b")], Root::Drive, "'a' and 'b' are both");
    check(&[drive("a")], Root::Drive, "--root IMAGE");
    check(&[root("a")], Root::Busybox, "--root IMAGE");
    let queues = Drive {
        num_queues: Some(257),
        ..drive("a")
    };
    check(&[queues], Root::Busybox, "257 queues");
}

#[test]
fn limits_of_a_group_are_stated_once() {
    let check = |limits: &[&str], words: &[&str]| {
        let mut config = minimal();
        config.drives = (limits.iter().enumerate())
            .map(|(n, list)| parse_list(&format!("path=/d,id=disk{n},{list}")).unwrap())
            .collect();
        match (config.validate(), words) {
            (Ok(_), []) => {}
            (Err(error), [_, ..]) => {
                let error = error.to_string();
                let missing = words.iter().find(|word| !error.contains(**word));
                assert_eq!(missing, None, "{error}");
            }
            (result, words) => panic!("{limits:?}: {result:?}, not {words:?}"),
        }
    };
    let (stated, again) = (
        "rate.group=g,rate.ops.size=9",
        "rate.ops.size=9,rate.group=g",
    );
    check(&[stated, "rate.group=g", again], &[]);
    check(&["rate.group=g", stated, "rate.ops.size=8"], &[]);
    check(&["rate.group=g", "rate.group=h"], &["'disk0'", "group 'g'"]);
    let other = "rate.group=g,rate.ops.size=8";
    check(
        &["rate.group=g", stated, other],
        &["'disk1' and 'disk2'", "different limits", "'g'"],
    );
    check(&["rate.group=,rate.ops.size=8"], &["'disk0'", "group=NAME"]);
}

#[test]
fn drives_as_firecracker_writes_them() {
    let text = r#"{"boot-source":{"kernel_image_path":"/k"},"drives":[{"drive_id":"rootfs",
        "path_on_host":"/r","is_root_device":true,"is_read_only":false,"cache_type":"Unsafe",
        "io_engine":"Sync","rate_limiter":{"bandwidth":{"size":1000,"one_time_burst":0,
        "refill_time":100}}}],"entropy":{}}"#;
    let config: Config = serde_json::from_str(text).unwrap();
    let drive = config.root_drive().unwrap();
    assert_eq!(
        (drive.cache_type, drive.io_engine),
        (CacheType::Unsafe, IoEngine::Sync)
    );
    config.validate().unwrap();
}

#[test]
fn a_watchdog_has_times_as_people_write_them() {
    let seconds = std::time::Duration::from_secs;
    let dog: Watchdog = parse_list("timeout=1m 30s,action=nmi").unwrap();
    assert_eq!(
        (dog.timeout, dog.action),
        (seconds(90), WatchdogAction::Nmi)
    );
    let text = serde_json::to_string(&dog).unwrap();
    assert!(text.contains("\"1m 30s\""), "{text}");
    assert_eq!(serde_json::from_str::<Watchdog>(&text).unwrap(), dog);
    let dog: Watchdog = serde_json::from_str("{}").unwrap();
    assert_eq!(dog, Watchdog::default());
}

proptest! {
    #[test]
    fn size_never_panics(text in ".{0,24}") {
        let _ = parse_size(&text);
    }
}

#[test]
fn a_balloon_from_both_worlds() {
    let expected = Balloon {
        amount_mib: 512,
        deflate_on_oom: true,
        stats_polling_interval_s: 2,
        free_page_reporting: true,
        free_page_hinting: false,
    };
    let list = "size=512M,deflate_on_oom,stats=2s,reporting";
    assert_eq!(parse_list::<Balloon>(list).unwrap(), expected);
    let list = "amount_mib=512,deflate_on_oom=on,stats_polling_interval_s=2,free_page_reporting";
    assert_eq!(parse_list::<Balloon>(list).unwrap(), expected);
    let json = r#"{"amount_mib":512,"deflate_on_oom":true,"stats_polling_interval_s":2,
        "free_page_reporting":true}"#;
    assert_eq!(serde_json::from_str::<Balloon>(json).unwrap(), expected);
    for (list, words) in [
        ("size=1K", "1K"),
        ("stats=70000s", "70000s"),
        ("stats=1m", "'1m'"),
        ("size", "lacks its value"),
        ("inflate", "unknown field `inflate`"),
    ] {
        let error = parse_list::<Balloon>(list).unwrap_err().to_string();
        assert!(error.contains(words), "{list}: {error}");
    }
    let json = r#"{"stats_polling_interval_s":65536}"#;
    let error = serde_json::from_str::<Balloon>(json).unwrap_err();
    assert!(error.to_string().contains("65536 is too large"), "{error}");
    let config = Config {
        balloon: Some(expected),
        ..minimal()
    };
    let error = config.validate().unwrap_err().to_string();
    assert!(error.contains("512 MiB leaves nothing"), "{error}");
}

#[test]
fn pmem_and_plugged_memory_from_both_worlds() {
    let expected = Pmem {
        id: "a".to_string(),
        path_on_host: "/f".into(),
        root_device: false,
        read_only: true,
        rate_limiter: None,
        address: None,
    };
    assert_eq!(parse_list::<Pmem>("path=/f,ro,id=a").unwrap(), expected);
    let json = r#"{"id":"a","path_on_host":"/f","read_only":true}"#;
    assert_eq!(serde_json::from_str::<Pmem>(json).unwrap(), expected);
    let expected = MemoryHotplug {
        total_size_mib: 1024,
        block_size_mib: 4,
        slot_size_mib: 128,
        requested_size_mib: 512,
    };
    let list = "total=1G,requested=512M,block=4M";
    assert_eq!(parse_list::<MemoryHotplug>(list).unwrap(), expected);
    let json = r#"{"total_size_mib":1024,"requested_size_mib":512,"block_size_mib":4}"#;
    assert_eq!(
        serde_json::from_str::<MemoryHotplug>(json).unwrap(),
        expected
    );
    let config = Config {
        memory_hotplug: Some(expected),
        ..minimal()
    };
    let text = serde_json::to_string(&config).unwrap();
    assert!(text.contains(r#""memory-hotplug":{"#), "{text}");
    config.validate().unwrap();
}
