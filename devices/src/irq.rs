//! Interrupt output of a device.

/// One interrupt line of one device. The root crate implements it.
pub trait Interrupt: Send + Sync {
    /// Raises an edge on the line. Never blocks and never fails towards the device: a delivery
    /// error is the machine's, which counts and logs it.
    fn signal(&self);
}

/// An interrupt line for tests.
#[cfg(any(test, feature = "test-util"))]
pub mod mock {
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Counts edges.
    #[derive(Default)]
    pub struct Counter(AtomicUsize);

    impl Counter {
        /// Edges since the last call.
        pub fn take(&self) -> usize {
            self.0.swap(0, Ordering::SeqCst)
        }
    }

    impl super::Interrupt for Counter {
        fn signal(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
}
