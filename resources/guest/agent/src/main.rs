//! The agent: init of a guest started by bulle.
//!
//! As process 1 it prepares the system ([`setup`]), then runs one command for the host over a byte
//! stream ([`session`]), and at the end takes the guest down ([`power`]). It has one thread, no heap
//! and no libc. Started as `agent --channel TTY` by an ordinary process it runs the command on the
//! system that is there and exits instead of powering off: that is how it is tested.

#![no_std]
#![no_main]
// A sentence about what went wrong travels by value: there is no heap to box it in.
#![allow(clippy::result_large_err)]

mod command;
mod exec;
mod job;
mod link;
mod net;
mod power;
mod root;
mod rt;
mod session;
mod setup;
mod shares;
mod sys;
mod text;

use core::ffi::CStr;
use core::fmt::Write;

use text::Text;

/// Runs the agent.
///
/// Called once by the entry code with the arguments of the process.
fn main(args: &mut dyn Iterator<Item = &'static CStr>) -> ! {
    if rustix::process::getpid().is_init() {
        init()
    }
    let mut args = args.skip(1);
    match (args.next(), args.next(), args.next()) {
        (Some(option), Some(tty), None) if option == c"--channel" => on_a_running_system(tty),
        _ => {
            sys::complain(format_args!(
                "this is the init of a bulle guest; outside one: agent --channel TTY"
            ));
            sys::exit(125)
        }
    }
}

/// The whole life of the guest's userspace.
fn init() -> ! {
    let mut notes = setup::Notes::new();
    setup::open_standard_files();
    setup::mount_first(&mut notes);
    setup::open_standard_files();
    setup::load_modules(&mut notes);
    let mut list = [0; setup::MAX_LIST];
    let list = setup::read_file(shares::LIST, &mut list);
    let entered = root::enter(list);
    setup::mount_rest(shares::root(list).is_some(), &mut notes);
    let trouble = entered.and_then(|()| shares::mount_all(list)).err();
    setup::set_host_name(&mut notes);
    setup::bring_up_loopback(&mut notes);
    net::configure(&mut notes);
    power::take_ctrl_alt_del();
    let end = match open_channel(&mut notes) {
        Some(link) => session::Session::new(link, power::Buttons::open(), true)
            .without_root(trouble)
            .run(notes.as_bytes()),
        None => {
            sys::complain(format_args!("no channel to the host; powering off"));
            agent_protocol::Power::Off
        }
    };
    power::end(end)
}

/// Opens the first channel of those that the host offers which this kernel has.
fn open_channel(notes: &mut setup::Notes) -> Option<link::Link> {
    for channel in setup::channels().as_str().split(',') {
        let opened = match channel.strip_prefix("port:") {
            Some(name) => match setup::virtio_port(name.as_bytes()) {
                Some(path) => link::Link::open_port(path.as_str()),
                // No driver, which is what the next channel is for.
                None => continue,
            },
            None => {
                let mut path = Text::<64>::new();
                let _ = write!(path, "/dev/{channel}");
                link::Link::open(path.as_str())
            }
        };
        match opened {
            Ok(link) => return Some(link),
            Err(errno) => {
                let errno = errno.raw_os_error();
                setup::note(
                    notes,
                    format_args!("cannot open {channel} to the host: error {errno}"),
                );
            }
        }
    }
    None
}

/// The part of the agent that runs a command, for tests on the host.
fn on_a_running_system(tty: &CStr) -> ! {
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    let path = tty.to_str().unwrap_or_default();
    match link::Link::open(path) {
        Ok(link) => {
            session::Session::new(link, power::Buttons::none(), false).run(b"");
            sys::exit(0)
        }
        Err(errno) => {
            sys::complain(format_args!(
                "cannot open {path}: error {}",
                errno.raw_os_error()
            ));
            sys::exit(125)
        }
    }
}
