//! Mapping RAM above the 4 GiB that the boot code maps.

use core::cell::UnsafeCell;

const ENTRIES: usize = 512;
const POOL: usize = 8;
/// Present, writable, user, accessed.
const TABLE: u64 = 0x27;
/// The same, dirty, 2 MiB page.
const LARGE: u64 = 0xe7;

#[repr(C, align(4096))]
struct Pool(UnsafeCell<[[u64; ENTRIES]; POOL]>, UnsafeCell<usize>);

// SAFETY: payloads run Rust code on one processor only.
unsafe impl Sync for Pool {}

static TABLES: Pool = Pool(UnsafeCell::new([[0; ENTRIES]; POOL]), UnsafeCell::new(0));

unsafe extern "C" {
    static mut pml4: [u64; ENTRIES];
}

fn fresh() -> u64 {
    // SAFETY: one processor, no interrupts, and no other reference is alive.
    unsafe {
        let used = &mut *TABLES.1.get();
        assert!(*used < POOL, "too many distinct gigabytes touched");
        *used += 1;
        (&raw const (*TABLES.0.get())[*used - 1]) as u64
    }
}

/// Entry `index` of the table that `slot` points to, which is made where it is missing.
fn descend(slot: *mut u64, index: usize) -> *mut u64 {
    // SAFETY: `slot` is an entry of a live table; tables are mapped one to one.
    unsafe {
        if *slot == 0 {
            *slot = fresh() | TABLE;
        }
        ((*slot & !0xfff) as *mut u64).add(index)
    }
}

/// Maps the 2 MiB page around `addr` one to one, if it is not mapped yet.
pub fn map(addr: u64) {
    let index = |shift: u32| (addr >> shift) as usize % ENTRIES;
    // SAFETY: the boot code's top table, used by one processor only.
    let top = unsafe { (&raw mut pml4).cast::<u64>().add(index(39)) };
    let entry = descend(descend(top, index(30)), index(21));
    // SAFETY: an entry of a live table. Nothing was mapped there, so no stale translation exists.
    unsafe {
        if *entry == 0 {
            entry.write_volatile(addr & !0x1f_ffff | LARGE);
        }
    }
}
