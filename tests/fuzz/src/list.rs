//! `list`: a `key=value` list of the command line; what it means is valid or refused.

use bulle::config::{
    Balloon, Config, Drive, MemoryHotplug, Pmem, Port, RateLimiter, Rtc, Share, Vsock, Watchdog,
    parse_list, parse_net,
};

/// What a configuration needs besides.
const LEAST: &str = r#"{"boot-source":{"kernel_image_path":"k"}}"#;

/// Reads `data` as every type that is read from lists.
pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let least = || serde_json::from_str::<Config>(LEAST).expect("a configuration");
    let check = |fill: &dyn Fn(&mut Config) -> bool| {
        let mut config = least();
        if fill(&mut config) {
            let printed = serde_json::to_string(&config).expect("it can be printed");
            let again: Config = serde_json::from_str(&printed).expect("it can be read again");
            assert_eq!(again, config);
            let _ = config.validate();
        }
    };
    let _ = parse_list::<RateLimiter>(text);
    check(&|config| {
        config.drives.extend(parse_list::<Drive>(text));
        !config.drives.is_empty()
    });
    check(&|config| {
        config.pmem.extend(parse_list::<Pmem>(text));
        !config.pmem.is_empty()
    });
    check(&|config| {
        config.shares.extend(parse_list::<Share>(text));
        !config.shares.is_empty()
    });
    check(&|config| {
        let network = parse_net(text).ok().flatten();
        config.network_interfaces.extend(network);
        !config.network_interfaces.is_empty()
    });
    check(&|config| {
        config.ports.extend(Port::parse(text));
        !config.ports.is_empty()
    });
    check(&|config| {
        config.vsock = parse_list::<Vsock>(text).ok();
        config.vsock.is_some()
    });
    check(&|config| {
        config.rtc = parse_list::<Rtc>(text).ok();
        config.rtc.is_some()
    });
    check(&|config| {
        config.watchdog = parse_list::<Watchdog>(text).ok();
        config.watchdog.is_some()
    });
    check(&|config| {
        config.balloon = parse_list::<Balloon>(text).ok();
        config.balloon.is_some()
    });
    check(&|config| {
        config.memory_hotplug = parse_list::<MemoryHotplug>(text).ok();
        config.memory_hotplug.is_some()
    });
}
