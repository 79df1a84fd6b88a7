//! The `Ctrl-A` escapes on a terminal, as in QEMU.

/// Text of `Ctrl-A h`.
pub const HELP: &str = "\n\
    Ctrl-A x   end the virtual machine\n\
    Ctrl-A p   press its power button\n\
    Ctrl-A d   send Ctrl-Alt-Del\n\
    Ctrl-A a   send Ctrl-A itself\n\
    Ctrl-A h   this help\n";

const CTRL_A: u8 = 0x01;

/// What a person asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// End the VM.
    End,
    /// Press the power button.
    PowerButton,
    /// Send Ctrl-Alt-Del.
    CtrlAltDel,
    /// Print the help.
    Help,
}

/// Finds escapes in terminal input, across reads.
#[derive(Debug, Default)]
pub struct Escapes {
    pending: bool,
}

impl Escapes {
    /// Splits `input` into what the guest gets (appended to `output`) and requests.
    pub fn filter(&mut self, input: &[u8], output: &mut Vec<u8>) -> Vec<Request> {
        let mut requests = Vec::new();
        for &byte in input {
            if !std::mem::take(&mut self.pending) {
                match byte {
                    CTRL_A => self.pending = true,
                    _ => output.push(byte),
                }
                continue;
            }
            match byte {
                b'x' => requests.push(Request::End),
                b'p' => requests.push(Request::PowerButton),
                b'd' => requests.push(Request::CtrlAltDel),
                b'h' | b'?' => requests.push(Request::Help),
                b'a' | CTRL_A => output.push(CTRL_A),
                _ => {}
            }
        }
        requests
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(parts: &[&[u8]]) -> (Vec<u8>, Vec<Request>) {
        let mut escapes = Escapes::default();
        let mut output = Vec::new();
        let requests = parts
            .iter()
            .flat_map(|part| escapes.filter(part, &mut output))
            .collect();
        (output, requests)
    }

    #[test]
    fn escapes_are_found_across_reads() {
        assert_eq!(
            filter(&[b"ls\x01", b"x"]),
            (b"ls".to_vec(), vec![Request::End])
        );
        assert_eq!(
            filter(&[b"\x01\x01b\x01a"]),
            (b"\x01b\x01".to_vec(), vec![])
        );
        assert_eq!(filter(&[b"\x01z\x01h\x01p\x01d"]).1.len(), 3);
        assert_eq!(filter(&[b"x"]), (b"x".to_vec(), vec![]));
    }
}
