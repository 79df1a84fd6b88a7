//! Limits that several devices share: stated once, or by each in the same way.

use crate::config::RateLimiter;

/// A group of limits that cannot be.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LimitsError {
    /// A group without a name.
    #[error("the rate limiter of '{device}' has a group without a name: write group=NAME")]
    Unnamed {
        /// The device.
        device: String,
    },
    /// A group that states no limits.
    #[error(
        "'{device}' is in the rate limiter group '{group}', for which no device states limits: \
         give one of them bandwidth or ops"
    )]
    Unstated {
        /// The group.
        group: String,
        /// A device in it.
        device: String,
    },
    /// A group with two sets of limits.
    #[error(
        "'{first}' and '{second}' state different limits for the rate limiter group '{group}': \
         state them once, and name only the group elsewhere"
    )]
    Differ {
        /// The group.
        group: String,
        /// A device that states limits.
        first: String,
        /// Another that states others.
        second: String,
    },
}

pub(super) fn validate<'a>(
    limiters: impl Iterator<Item = (&'a str, &'a RateLimiter)>,
) -> Result<(), LimitsError> {
    let limiters: Vec<_> = limiters.collect();
    for (device, limiter) in &limiters {
        let Some(group) = &limiter.group else {
            continue;
        };
        if group.is_empty() {
            let device = device.to_string();
            return Err(LimitsError::Unnamed { device });
        }
        let members = limiters.iter().filter(|(_, l)| l.group == limiter.group);
        let mut stated = members.filter(|(_, l)| l.states_limits());
        match stated.next() {
            None => {
                return Err(LimitsError::Unstated {
                    group: group.clone(),
                    device: device.to_string(),
                });
            }
            Some((first, limits)) => {
                if let Some((second, _)) = stated.find(|(_, other)| other != limits) {
                    return Err(LimitsError::Differ {
                        group: group.clone(),
                        first: first.to_string(),
                        second: second.to_string(),
                    });
                }
            }
        }
    }
    Ok(())
}
