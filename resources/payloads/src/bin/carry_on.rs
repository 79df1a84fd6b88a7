//! Goes on with what only its memory and registers know: `nonce N` once, then `tick T VALUE` for
//! ever, or `ticks=N` times. Values follow from the nonce by a rule that tests know too. In between it
//! holds numbers in all kinds of registers, and goes through memory that it wrote before, `slices=N` of
//! it. With `disk=1` each tick also writes a request to the first disk and reads back that of the tick
//! before. `LOST what` and code 1 when something is not as it was.
#![no_std]
#![no_main]

use core::arch::asm;

use payloads::random::Random;
use payloads::smp::boot_avx;
use payloads::virtio::devices;
use payloads::virtio::disk::{Disk, ID, IN, OUT};
use payloads::{io, println, start::StartInfo, tsc};

payloads::start!(main);

/// Where the disk has its rings.
const RINGS: u64 = 0x100_0000;
/// Memory that is gone through, in slices, one each tick.
const MEMORY: u64 = 0x200_0000;
const SLICES: u64 = 16;
const SLICE: u64 = 0x4_0000;
/// Bytes of a disk request.
const LEN: u32 = 0x4000;
const SECTORS: u64 = LEN as u64 / 512;
/// How long registers are held, in turns of the loop.
const TURNS: u64 = 200_000;

/// What registers hold: eight doubles for the x87 stack, sixteen vectors and, with AVX, their upper halves,
/// eight integers.
#[repr(C, align(16))]
#[derive(PartialEq, Eq)]
struct Registers {
    x87: [u64; 8],
    xmm: [u64; 32],
    integers: [u64; 8],
    mxcsr: u32,
    upper: [u64; 32],
}

impl Registers {
    fn of(seed: u64, avx: bool) -> Self {
        let mut random = Random::new(seed);
        Self {
            // Between 1 and 2: loading and storing changes no bit.
            x87: core::array::from_fn(|_| 0x3ff << 52 | random.u64() >> 12),
            xmm: core::array::from_fn(|_| random.u64()),
            integers: core::array::from_fn(|_| random.u64()),
            // Rounding as it is never set otherwise.
            mxcsr: 0x1f80 | ((1 + seed as u32 % 3) << 13),
            upper: core::array::from_fn(|_| if avx { random.u64() } else { 0 }),
        }
    }

    /// Puts them into registers, spends `turns` there, and takes them out again.
    fn held(&self, turns: u64, avx: bool) -> Self {
        let mut after = Self {
            x87: [0; 8],
            xmm: [0; 32],
            integers: [0; 8],
            mxcsr: 0,
            upper: [0; 32],
        };
        let usual: u32 = 0x1f80;
        let (from, to) = (self as *const Self, &mut after as *mut Self);
        // SAFETY: reads one structure and writes the other, within their fields, as laid out by
        // `repr(C)`; every register used is declared.
        unsafe {
            asm!(
                "fninit",
                ".irp i, 0, 1, 2, 3, 4, 5, 6, 7",
                "fld qword ptr [rsi + 8 * \\i]",
                ".endr",
                ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                "movups xmm\\i, [rsi + 64 + 16 * \\i]",
                ".endr",
                "test rax, rax",
                "jz 3f",
                ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                "vinsertf128 ymm\\i, ymm\\i, [rsi + 392 + 16 * \\i], 1",
                ".endr",
                "3:",
                ".irp i, 8, 9, 10, 11, 12, 13, 14, 15",
                "mov r\\i, [rsi + 256 + 8 * \\i]",
                ".endr",
                "ldmxcsr [rsi + 384]",
                "2: pause",
                "dec rcx",
                "jnz 2b",
                "stmxcsr [rdi + 384]",
                "ldmxcsr [rdx]",
                ".irp i, 8, 9, 10, 11, 12, 13, 14, 15",
                "mov [rdi + 256 + 8 * \\i], r\\i",
                ".endr",
                ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                "movups [rdi + 64 + 16 * \\i], xmm\\i",
                ".endr",
                "test rax, rax",
                "jz 4f",
                ".irp i, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
                "vextractf128 [rdi + 392 + 16 * \\i], ymm\\i, 1",
                ".endr",
                "vzeroupper",
                "4:",
                ".irp i, 7, 6, 5, 4, 3, 2, 1, 0",
                "fstp qword ptr [rdi + 8 * \\i]",
                ".endr",
                in("rsi") from,
                in("rdi") to,
                in("rdx") &usual,
                inout("rax") u64::from(avx) => _,
                inout("rcx") turns => _,
                out("r12") _,
                out("r13") _,
                out("r14") _,
                out("r15") _,
                clobber_abi("sysv64"),
                options(nostack),
            );
        }
        after
    }
}

/// The rule: what comes after `value` in tick `tick`.
fn next(value: u64, tick: u64) -> u64 {
    value
        .wrapping_mul(0x2545_f491_4f6c_dd1d)
        .rotate_left(17)
        .wrapping_add(tick)
}

/// Memory in slices, each filled in one tick and looked at when all others were.
struct Slices {
    nonce: u64,
    /// How many there are, at most [`SLICES`].
    count: u64,
    /// Tick of the last filling.
    filled: [u64; SLICES as usize],
}

impl Slices {
    fn new(nonce: u64, count: u64) -> Self {
        let slices = Self {
            nonce,
            count: count.clamp(1, SLICES),
            filled: [0; SLICES as usize],
        };
        (0..slices.count).for_each(|slice| slices.fill(slice, 0));
        slices
    }

    fn words(&self, slice: u64, tick: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut random = Random::new(self.nonce ^ slice << 32 ^ tick);
        let base = MEMORY + slice * SLICE;
        (base..base + SLICE)
            .step_by(8)
            .map(move |at| (at, random.u64()))
    }

    fn fill(&self, slice: u64, tick: u64) {
        self.words(slice, tick)
            .for_each(|(at, word)| io::write(at, word));
    }

    /// Whether the next slice is as it was left; then it is filled anew.
    fn tick(&mut self, tick: u64) -> bool {
        let slice = tick % self.count;
        let Some(filled) = self.filled.get_mut(slice as usize) else {
            return false;
        };
        let before = core::mem::replace(filled, tick);
        let good = self
            .words(slice, before)
            .all(|(at, word)| io::read::<u64>(at) == word);
        self.fill(slice, tick);
        good
    }
}

/// Writes a request that follows from `value`, and reads back the one of the value before.
fn on_disk(disk: &mut Disk, tick: u64, before: u64, value: u64) -> bool {
    let places = disk.sectors() / SECTORS;
    let words = disk.data..disk.data + u64::from(LEN);
    let mut random = Random::new(value);
    words
        .clone()
        .step_by(8)
        .for_each(|at| io::write(at, random.u64()));
    if disk.request(OUT, tick % places * SECTORS, LEN) != Some(0) {
        return false;
    }
    if tick == 0 {
        return true;
    }
    let read = disk.request(IN, (tick - 1) % places * SECTORS, LEN);
    let mut random = Random::new(before);
    read == Some(0)
        && words
            .step_by(8)
            .all(|at| io::read::<u64>(at) == random.u64())
}

fn main(info: &StartInfo) -> u8 {
    let number = |key| info.option(key).and_then(|n| n.parse::<u64>().ok());
    let device = devices().find(|device| device.id == ID);
    let mut disk = device
        .filter(|_| number("disk").is_some())
        .and_then(|device| Disk::start(device, RINGS));
    let avx = boot_avx();
    let nonce = tsc::now();
    println!("nonce {nonce}");
    let mut slices = Slices::new(nonce, number("slices").unwrap_or(SLICES));
    let (mut before, mut value) = (0, nonce);
    for tick in 0..number("ticks").unwrap_or(u64::MAX) {
        let registers = Registers::of(value, avx);
        let good = registers.held(TURNS, avx) == registers;
        if !good {
            println!("LOST registers");
            return 1;
        }
        if !slices.tick(tick) {
            println!("LOST memory");
            return 1;
        }
        let disk = disk.as_mut();
        if !disk.is_none_or(|disk| on_disk(disk, tick, before, value)) {
            println!("LOST disk");
            return 1;
        }
        (before, value) = (value, next(value, tick));
        println!("tick {tick} {value}");
    }
    0
}
