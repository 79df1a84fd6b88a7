use proptest::prelude::*;

use super::*;

fn detect(text: &str) -> Option<PanicMark> {
    PanicDetector::new().feed(text.as_bytes())
}

#[test]
fn panics_in_all_forms_of_printk() {
    for prefix in [
        "",
        "<0>",
        "[   12.345678] ",
        "[12345.345678] ",
        "<0>[   12.345678] ",
        "[    0.000000][    T1] ",
        "[    0.000000] [    T1] ",
        "[    1.234567][   C12] ",
        "login: \r\n[    1.234567] ",
    ] {
        let text = format!("{prefix}Kernel panic - not syncing: sysrq");
        assert_eq!(detect(&text), Some(PanicMark::Begin), "{prefix:?}");
        let text = format!("{prefix}---[ end Kernel panic - not syncing: sysrq ]---");
        assert_eq!(detect(&text), Some(PanicMark::End), "{prefix:?}");
    }
}

#[test]
fn what_is_no_panic() {
    for text in [
        "echo Kernel panic - not syncing",
        "grep: Kernel panic - not syncing: x\n",
        "[abc] Kernel panic - not syncing",
        "[   1.0] x Kernel panic - not syncing",
        "[   1.0 Kernel panic - not syncing",
        "Kernel panic - not sync\ning",
        "kernel panic - not syncing",
        "",
    ] {
        assert_eq!(detect(text), None, "{text:?}");
    }
}

#[test]
fn each_mark_is_reported_once() {
    let mut detector = PanicDetector::new();
    assert_eq!(detector.feed(b"[ 1.0] Kernel panic - not sy"), None);
    assert_eq!(detector.feed(b"ncing"), Some(PanicMark::Begin));
    assert_eq!(
        detector.feed(b": VFS: \x07Unable\r\n[ 1.1] Call Trace\r\n"),
        None
    );
    assert_eq!(detector.feed(b"Kernel panic - not syncing: second\n"), None);
    assert_eq!(
        detector.feed(b"[ 1.2] ---[ end Kernel panic - not syncing: VFS ]---\n"),
        Some(PanicMark::End)
    );
    assert_eq!(detector.feed(b"more"), None);
}

#[test]
fn a_line_without_end_is_bounded() {
    let mut detector = PanicDetector::new();
    for _ in 0..100 {
        detector.feed(&[b'x'; 1000]);
    }
    assert_eq!(detector.line.len(), MAX_LINE);
    detector.feed(b"\nKernel panic - not syncing");
    detector.feed(&[b'x'; 100_000]);
    assert_eq!(detector.line.len(), MAX_LINE);
}

#[test]
fn the_last_lines_without_control_characters() {
    let mut last = LastLines::new(1000);
    assert_eq!(last.lines(9), [] as [String; 0]);
    last.push(b"one\r\n\x1b[1;31mtwo\x1b[0m\x07\n\n\ta\x1bcb\xff\x00\nfour");
    assert_eq!(last.lines(9), ["one", "two", " ab\u{fffd}", "four"]);
    assert_eq!(last.lines(2), [" ab\u{fffd}", "four"]);
    assert_eq!(last.lines(0), [] as [String; 0]);
}

#[test]
fn a_first_line_that_is_cut_is_left_out() {
    let mut last = LastLines::new(8);
    last.push(b"abc\ndef\n");
    assert_eq!(last.lines(9), ["abc", "def"]);
    last.push(b"g");
    assert_eq!(last.lines(9), ["def", "g"]);
    last.push(b"0123456789");
    assert_eq!(last.lines(9), ["23456789"]);
}

proptest! {
    #[test]
    fn pieces_do_not_matter(
        noise in prop::collection::vec(any::<u8>(), 0..200),
        cut in 0usize..300,
    ) {
        let mut text = noise;
        text.extend(b"\n[    1.0] Kernel panic - not syncing: x\n");
        let cut = cut.min(text.len());
        let (first, second) = text.split_at(cut);
        let mut whole = PanicDetector::new();
        let mut parts = PanicDetector::new();
        prop_assert!(whole.feed(&text).is_some());
        prop_assert!(parts.feed(first).max(parts.feed(second)).is_some());

        let mut whole = LastLines::new(64);
        let mut parts = LastLines::new(64);
        whole.push(&text);
        parts.push(first);
        parts.push(second);
        prop_assert_eq!(whole.ring.len(), text.len().min(64));
        prop_assert!(whole.lines(9).iter().all(|l| !l.contains(char::is_control)));
        prop_assert_eq!(whole.lines(9), parts.lines(9));
    }
}

#[test]
fn a_reader_goes_on_where_it_was_and_learns_what_it_missed() {
    let mut lines = LastLines::new(8);
    assert_eq!(lines.since(0), (Vec::new(), 0));
    lines.push(b"abcdef");
    assert_eq!(lines.since(0), (b"abcdef".to_vec(), 0));
    assert_eq!(lines.since(4), (b"ef".to_vec(), 0));
    lines.push(b"ghijk");
    assert_eq!(lines.since(6), (b"ghijk".to_vec(), 0));
    assert_eq!(lines.since(0), (b"defghijk".to_vec(), 3));
    assert_eq!(lines.since(11), (Vec::new(), 0));
    lines.push(&[b'x'; 100]);
    assert_eq!(lines.since(11), (vec![b'x'; 8], 92));
}
