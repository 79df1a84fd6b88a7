//! What the service counts, under the names that Firecracker's metrics have.

use crate::counters::Counter;

/// What happened since the start.
#[derive(Debug, Default)]
pub struct Counters {
    /// Frames for the service.
    pub(super) rx_accepted: Counter,
    /// Packets among them that are not followed: no TCP of this network, or fragments.
    pub(super) rx_accepted_unusual: Counter,
    /// Frames that are none.
    pub(super) rx_bad_eth: Counter,
    /// TCP segments taken.
    pub(super) rx_count: Counter,
    /// Requests with a token that is not valid.
    pub(super) rx_invalid_token: Counter,
    /// Requests without token.
    pub(super) rx_no_token: Counter,
    /// Bytes of frames to the guest.
    pub(super) tx_bytes: Counter,
    /// Frames to the guest.
    pub(super) tx_frames: Counter,
    /// Connections that began.
    pub(super) connections_created: Counter,
    /// Connections that ended.
    pub(super) connections_destroyed: Counter,
}

impl Counters {
    /// Names and values. A frame is sent as a whole, so `tx_count` is `tx_frames`.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let all = [
            ("rx_accepted", &self.rx_accepted),
            ("rx_accepted_unusual", &self.rx_accepted_unusual),
            ("rx_bad_eth", &self.rx_bad_eth),
            ("rx_count", &self.rx_count),
            ("rx_invalid_token", &self.rx_invalid_token),
            ("rx_no_token", &self.rx_no_token),
            ("tx_bytes", &self.tx_bytes),
            ("tx_count", &self.tx_frames),
            ("tx_frames", &self.tx_frames),
            ("connections_created", &self.connections_created),
            ("connections_destroyed", &self.connections_destroyed),
        ];
        all.into_iter().map(|(name, counter)| (name, counter.get()))
    }
}
