//! Limits of both directions.

use super::*;
use crate::virtio::limiter::{BucketConfig, LimiterConfig};

fn limiter(bytes: u64, ms: u64) -> Option<Arc<Limiter>> {
    Some(Arc::new(Limiter::new(LimiterConfig {
        bandwidth: Some(BucketConfig {
            size: bytes,
            refill_time: ms,
            one_time_burst: 0,
        }),
        ops: None,
    })))
}

#[test]
fn receiving_is_limited_and_goes_on_by_itself() {
    let (mut options, mut socket) = on_socket();
    options.rx_limiter = limiter(1000, 100);
    let mut guest = Guest::new(options, None);
    guest.offer(10, 2048);
    let start = Instant::now();
    for _ in 0..4 {
        socket.write_all(&prefixed(&frame(1000))).unwrap();
    }
    while guest.vqs[0].used_index() < 4 {
        guest.rig.run(5);
    }
    // One at once, the others when those before are paid for.
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(190), "{took:?}");
    assert_eq!(guest.used().len(), 4);
}

#[test]
fn sending_is_limited_until_the_limit_is_lifted() {
    let (mut options, mut socket) = on_socket();
    options.tx_limiter = limiter(100, 3_600_000);
    let mut guest = Guest::new(options, None);
    for _ in 0..3 {
        guest.send(BLANK, &frame(200));
    }
    assert_eq!(guest.vqs[1].used_index(), 1);
    let count = |guest: &Guest, name| {
        let all = guest.handle.counters();
        all.into_iter().find(|(other, _)| *other == name).unwrap().1
    };
    // The first look at the queues is among them.
    assert_eq!(count(&guest, "tx_queue_event_count"), 4);
    assert_eq!(count(&guest, "tx_rate_limiter_throttled"), 3);
    let [_, limiter] = guest.handle.limiters();
    limiter.as_ref().unwrap().set(LimiterConfig::default());
    guest.handle.limits_changed().unwrap();
    guest.rig.run(5);
    assert_eq!(guest.vqs[1].used_index(), 3);
    for _ in 0..3 {
        expect(&mut socket, &frame(200));
    }
    assert_eq!(count(&guest, "tx_count"), 3);
    assert!(count(&guest, "no_tx_avail_buffer") >= 1);
}
