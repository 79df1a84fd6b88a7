//! Limiters: one for each device that has limits, or for each group of devices that share them.

use std::collections::BTreeMap;
use std::sync::Arc;

use devices::virtio::limiter::{BucketConfig, Limiter, LimiterConfig};

use crate::config::{Config, RateLimiter, TokenBucket};

/// The limiters of all groups.
pub(super) struct Limiters(BTreeMap<String, Arc<Limiter>>);

impl Limiters {
    /// Makes those of the groups in `config`, where each group states its limits.
    pub fn new(config: &Config) -> Self {
        let stated = config.rate_limiters().filter(|(_, l)| l.states_limits());
        let groups = stated.filter_map(|(_, limits)| Some((limits.group.clone()?, make(limits))));
        Self(groups.collect())
    }

    /// The limiter of a device: its group's, or its own.
    pub fn get(&self, limits: Option<&RateLimiter>) -> Option<Arc<Limiter>> {
        let limits = limits?;
        let group = limits.group.as_ref().and_then(|name| self.0.get(name));
        Some(group.map_or_else(|| make(limits), Arc::clone))
    }
}

fn make(config: &RateLimiter) -> Arc<Limiter> {
    Arc::new(Limiter::new(limits(config)))
}

/// What `limits` says, as a limiter takes it.
pub fn limits(limits: &RateLimiter) -> LimiterConfig {
    let bucket = |bucket: TokenBucket| BucketConfig {
        size: bucket.size,
        refill_time: bucket.refill_time,
        one_time_burst: bucket.one_time_burst,
    };
    LimiterConfig {
        bandwidth: limits.bandwidth.map(bucket),
        ops: limits.ops.map(bucket),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Drive, parse_list};

    #[test]
    fn a_group_has_one_limiter_and_others_their_own() {
        let config = Config {
            drives: [
                "rate.group=g",
                "rate.group=g,rate.ops.size=1",
                "rate.ops.size=1",
                "ro",
            ]
            .map(|list| parse_list::<Drive>(&format!("path=/d,{list}")).unwrap())
            .to_vec(),
            ..serde_json::from_str(r#"{"boot-source":{"kernel_image_path":"/k"}}"#).unwrap()
        };
        let limiters = Limiters::new(&config);
        let of = |n: usize| limiters.get(config.drives[n].rate_limiter.as_ref());
        let (first, second) = (of(0).unwrap(), of(1).unwrap());
        assert!(Arc::ptr_eq(&first, &second));
        assert!(!Arc::ptr_eq(&second, &of(2).unwrap()));
        assert!(of(3).is_none());
        // And one device's operations are the other's.
        let now = std::time::Instant::now();
        assert_eq!(first.charge(now, 1), None);
        assert!(second.charge(now, 1).is_some());
    }
}
