//! What of the host only one machine may have: clones need their own.

use std::collections::BTreeMap;
use std::path::Path;

use crate::config::{Config, PortTo};

/// Two machines would have one thing.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{kind} '{id}' of {} would be {what}: give each clone its own with {option}; %n in it \
     stands for the clone's number",
    list(machines)
)]
pub struct ExclusiveError {
    kind: &'static str,
    id: String,
    machines: [Machine; 2],
    what: String,
    option: &'static str,
}

/// Who has something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Machine {
    Parent,
    Clone(usize),
}

fn list([one, other]: &[Machine; 2]) -> String {
    let name = |machine: &Machine| match machine {
        Machine::Parent => "the parent".to_owned(),
        Machine::Clone(number) => format!("clone {number}"),
    };
    format!("{} and {}", name(one), name(other))
}

/// A thing that only one may have.
struct Thing<'a> {
    kind: &'static str,
    id: &'a str,
    what: String,
    option: &'static str,
}

/// Checks that neither the running `parent` nor any of `clones` has what another one has.
///
/// # Errors
/// The first such thing, by its device.
pub fn check(parent: Option<&Config>, clones: &[Config]) -> Result<(), ExclusiveError> {
    let parent = parent.map(|config| (Machine::Parent, config));
    let clones = (1..).map(Machine::Clone).zip(clones);
    let mut owners = BTreeMap::new();
    for (machine, config) in parent.into_iter().chain(clones) {
        for thing in things(config) {
            // What one machine has twice is not for this to say.
            if let Some(owner) = owners.insert(thing.what.clone(), machine)
                && owner != machine
            {
                return Err(ExclusiveError {
                    kind: thing.kind,
                    id: thing.id.to_owned(),
                    machines: [owner, machine],
                    what: thing.what,
                    option: thing.option,
                });
            }
        }
    }
    Ok(())
}

fn things(config: &Config) -> Vec<Thing<'_>> {
    let mut all = Vec::new();
    let mut add = |kind, id, what, option| {
        all.push(Thing {
            kind,
            id,
            what,
            option,
        });
    };
    for drive in config.drives.iter().filter(|drive| !drive.is_read_only) {
        let what = format!("the writable {}", real(&drive.path_on_host));
        add("drive", &drive.drive_id, what, "--drive ID=FILE");
    }
    for pmem in config.pmem.iter().filter(|pmem| !pmem.read_only) {
        let what = format!("the writable {}", real(&pmem.path_on_host));
        add("pmem device", &pmem.id, what, "--pmem ID=FILE");
    }
    for net in &config.network_interfaces {
        let id = &net.iface_id;
        // Of a pattern the kernel makes a new name for each.
        let tap = net.host_dev_name.as_ref();
        if let Some(tap) = tap.filter(|tap| !tap.contains("%d")) {
            let what = format!("the tap interface {tap}");
            add("network interface", id, what, "--tap ID=TAP");
        }
        if let Some(fd) = net.fd {
            let what = format!("file descriptor {fd}");
            add("network interface", id, what, "--tap ID=TAP");
        }
    }
    if let Some(vsock) = &config.vsock {
        let what = format!("the socket {}", real(&vsock.uds_path));
        add("the device", "vsock", what, "--vsock PATH");
    }
    for port in &config.ports {
        let (PortTo::Socket(path) | PortTo::File(path)) = &port.to;
        let what = format!("the port's {}", real(path));
        add(
            "console port",
            &port.name,
            what,
            "no port (clones cannot have one)",
        );
    }
    all
}

/// One name for one file, as far as it is there.
fn real(path: &Path) -> String {
    let real = path.canonicalize();
    real.unwrap_or_else(|_| path.to_owned())
        .display()
        .to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(drive: &str, rest: &str) -> Config {
        serde_json::from_str(&format!(
            r#"{{"boot-source":{{"kernel_image_path":"k"}},
                "drives":[{{"drive_id":"d","path_on_host":"{drive}"{rest}}}],
                "vsock":{{"uds_path":"{drive}.sock"}}}}"#
        ))
        .unwrap()
    }

    #[test]
    fn a_writable_disk_is_one_machine_s() {
        let (a, b) = (config("a", ""), config("b", ""));
        check(Some(&a), std::slice::from_ref(&b)).unwrap();
        check(None, &[a.clone(), b.clone()]).unwrap();
        let error = check(Some(&a), &[b.clone(), a.clone()]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("drive 'd' of the parent and clone 2"),
            "{error}"
        );
        assert!(error.contains("--drive ID=FILE"), "{error}");
        let error = check(None, &[a, b.clone(), b]).unwrap_err();
        assert!(error.to_string().contains("clone 2 and clone 3"), "{error}");
    }

    #[test]
    fn a_tap_interface_is_one_machine_s_unless_it_is_made_for_each() {
        let with = |tap: &str| -> Config {
            let net = r#"{"boot-source":{"kernel_image_path":"k"},"network-interfaces":[
                {"iface_id":"n","host_dev_name":"TAP"}]}"#;
            serde_json::from_str(&net.replace("TAP", tap)).unwrap()
        };
        let made = with("vm%d");
        check(Some(&made), &[made.clone(), made.clone()]).unwrap();
        let one = with("tap0");
        let error = check(Some(&one), std::slice::from_ref(&one)).unwrap_err();
        assert!(error.to_string().contains("--tap ID=TAP"), "{error}");
    }

    #[test]
    fn a_disk_that_is_read_only_is_shared_and_a_socket_is_not() {
        let a = config("a", r#","is_read_only":true"#);
        let error = check(None, &[a.clone(), a]).unwrap_err().to_string();
        assert!(
            error.contains("'vsock'") && error.contains("--vsock"),
            "{error}"
        );
    }
}
