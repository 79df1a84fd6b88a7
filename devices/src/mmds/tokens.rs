//! Session tokens: random, kept in a table of bounded size, in no snapshot and so of one VM only.

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::time::{Duration, Instant};

use crate::random::fill;

/// Seconds that a token may be asked to live.
pub(super) const LIFETIMES: std::ops::RangeInclusive<u32> = 1..=21_600;
/// Most tokens; with one more, that which has least time left goes.
pub(super) const MAX_TOKENS: usize = 4096;
/// Random bytes of a token.
const LEN: usize = 24;

/// Tokens, each with its end.
#[derive(Debug, Default)]
pub(super) struct Tokens(HashMap<String, Instant>);

impl Tokens {
    /// A new token that lives for `seconds`.
    pub fn issue(&mut self, seconds: u32, now: Instant) -> io::Result<String> {
        let mut bytes = [0; LEN];
        fill(&mut bytes)?;
        let mut token = String::with_capacity(2 * LEN);
        for byte in bytes {
            // Writing to a string cannot fail.
            let _ = write!(token, "{byte:02x}");
        }
        if self.0.len() >= MAX_TOKENS {
            self.0.retain(|_, end| *end > now);
        }
        if self.0.len() >= MAX_TOKENS {
            let first = self.0.iter().min_by_key(|(_, end)| **end);
            if let Some(token) = first.map(|(token, _)| token.clone()) {
                self.0.remove(&token);
            }
        }
        let end = now + Duration::from_secs(seconds.into());
        self.0.insert(token.clone(), end);
        Ok(token)
    }

    /// Whether it was issued and still lives.
    pub fn is_valid(&self, token: &str, now: Instant) -> bool {
        self.0.get(token).is_some_and(|end| *end > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_lives_as_long_as_asked_and_in_one_table() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let token = tokens.issue(2, now).unwrap();
        assert!(token.len() == 2 * LEN && token != tokens.issue(2, now).unwrap());
        assert!(tokens.is_valid(&token, now + Duration::from_millis(1999)));
        assert!(!tokens.is_valid(&token, now + Duration::from_secs(2)));
        assert!(!tokens.is_valid("", now));
        assert!(!Tokens::default().is_valid(&token, now));
    }

    #[test]
    fn the_table_is_bounded() {
        let (mut tokens, now) = (Tokens::default(), Instant::now());
        let short = tokens.issue(1, now).unwrap();
        let long = tokens.issue(21_600, now).unwrap();
        for _ in 0..MAX_TOKENS {
            tokens.issue(60, now).unwrap();
        }
        assert_eq!(tokens.0.len(), MAX_TOKENS);
        assert!(tokens.is_valid(&long, now) && !tokens.is_valid(&short, now));
        let later = now + Duration::from_secs(61);
        tokens.issue(60, later).unwrap();
        assert_eq!(tokens.0.len(), 2, "what has ended goes first");
    }
}
