//! Numbers with a unit: plain in the configuration file, as people write them on the command line.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserializer;
use serde::de::{Error, Visitor};

use crate::config::parse_size;

/// MiB: a number, or text such as `512M` in which a number alone is MiB too.
pub(super) fn mib<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let parse = |text: &str| parse_size(text).map_err(|error| error.to_string());
    number(deserializer, "a size in MiB", parse)
}

/// Seconds: a number, or text such as `2s`.
pub(super) fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u16, D::Error> {
    let parse = |text: &str| {
        let digits = text.strip_suffix('s').unwrap_or(text);
        let wrong = |_| format!("'{text}' is not a number of seconds: write 0s to 65535s");
        digits.parse().map_err(wrong)
    };
    number(deserializer, "seconds, 0 to 65535", parse)
}

fn number<'de, D, T, F>(deserializer: D, what: &'static str, parse: F) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64>,
    F: Fn(&str) -> Result<T, String>,
{
    deserializer.deserialize_any(Number(what, parse, PhantomData))
}

struct Number<T, F>(&'static str, F, PhantomData<T>);

impl<T, F> Visitor<'_> for Number<T, F>
where
    T: TryFrom<u64>,
    F: Fn(&str) -> Result<T, String>,
{
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        let large = |_| E::custom(format_args!("{number} is too large: want {}", self.0));
        T::try_from(number).map_err(large)
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
        (self.1)(text).map_err(E::custom)
    }
}
