//! Keeps a random number in its memory only. For each byte that comes on COM1: `n` writes the
//! number's eight bytes, `d` writes to 64 pages and answers with a byte, `c` changes the number and
//! answers with a byte, a line's end ends it.
#![no_std]
#![no_main]

use core::ptr;

use payloads::{console::COM1, io, println, start::StartInfo, tsc};

payloads::start!(main);

const IER: u16 = COM1 + 1;
const LSR: u16 = COM1 + 5;
const PAGE: usize = 4096;
const PAGES: usize = 64;

#[repr(C, align(4096))]
struct Pages([u8; PAGE * PAGES]);

static mut TOUCHED: Pages = Pages([0; PAGE * PAGES]);

fn main(_: &StartInfo) -> u8 {
    let mut nonce = tsc::now() | 1;
    for _ in 0..8 {
        nonce ^= nonce << 13;
        nonce ^= nonce >> 7;
        nonce ^= nonce << 17;
    }
    // Says that input is read; without an interrupt controller's line it interrupts nobody.
    io::out8(IER, 1);
    println!("nonce {nonce:016x}");
    loop {
        while io::in8(LSR) & 1 == 0 {
            core::hint::spin_loop();
        }
        match io::in8(COM1) {
            b'n' => nonce
                .to_be_bytes()
                .iter()
                .for_each(|byte| io::out8(COM1, *byte)),
            b'd' => {
                let first = (&raw mut TOUCHED).cast::<u8>();
                for page in 0..PAGES {
                    // SAFETY: within the static, which only this processor touches.
                    unsafe { ptr::write_volatile(first.add(page * PAGE), nonce as u8) };
                }
                io::out8(COM1, b'.');
            }
            b'c' => {
                nonce = nonce.rotate_left(7) ^ 1;
                io::out8(COM1, b'.');
            }
            _ => return 0,
        }
    }
}
