//! `key=value` lists of the command line, such as `path=disk.img,ro,rate.ops.size=1000`, as a
//! serde format: the same types serve them and the configuration file.
//!
//! A key without a value is `true`; dots lead into nested fields; `,,` is a comma in a value;
//! numbers may have a suffix (K, M, G, T: powers of 1024).

use serde::de::value::{MapDeserializer, StrDeserializer};
use serde::de::{DeserializeOwned, Error as _, IntoDeserializer, Visitor};
use serde::{Deserializer, forward_to_deserialize_any};

use super::size::parse_bytes;

/// Why a list is not what it should be.
pub type ListError = serde::de::value::Error;

/// Reads a list into a type.
///
/// # Errors
/// An unknown or missing key, or a value that does not fit, by name.
pub fn parse_list<T: DeserializeOwned>(text: &str) -> Result<T, ListError> {
    let mut root = Vec::new();
    for item in split(text) {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, Some(value.to_string())),
            None => (item.as_str(), None),
        };
        insert(&mut root, key, value)?;
    }
    T::deserialize(Node::Fields(root))
}

/// The items between single commas.
fn split(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        match (c, items.last_mut()) {
            (',', _) if rest.next_if_eq(&',').is_none() => items.push(String::new()),
            (c, Some(item)) => item.push(c),
            (_, None) => {}
        }
    }
    items
}

/// A value, or fields by name.
enum Node {
    /// `None`: only the key was given.
    Value(Option<String>),
    Fields(Vec<(String, Node)>),
}

fn insert(
    fields: &mut Vec<(String, Node)>,
    key: &str,
    value: Option<String>,
) -> Result<(), ListError> {
    let again = || ListError::custom(format_args!("'{key}' is given twice"));
    let Some((first, rest)) = key.split_once('.') else {
        if fields.iter().any(|(name, _)| name == key) {
            return Err(again());
        }
        fields.push((key.to_string(), Node::Value(value)));
        return Ok(());
    };
    let at = fields.iter().position(|(name, _)| name == first);
    let at = at.unwrap_or_else(|| {
        fields.push((first.to_string(), Node::Fields(Vec::new())));
        fields.len() - 1
    });
    match fields.get_mut(at) {
        Some((_, Node::Fields(nested))) => insert(nested, rest, value),
        _ => Err(again()),
    }
}

impl Node {
    fn text(&self) -> Result<&str, ListError> {
        match self {
            Self::Value(Some(text)) => Ok(text),
            Self::Value(None) => Err(ListError::custom("a key lacks its value: write KEY=VALUE")),
            Self::Fields(_) => Err(ListError::custom("a key has a dot that leads nowhere")),
        }
    }

    fn number<T: TryFrom<u64>>(&self) -> Result<T, ListError> {
        let text = self.text()?;
        let bytes = parse_bytes(text).map_err(ListError::custom)?;
        let large = || ListError::custom(format_args!("{text} is too large"));
        T::try_from(bytes).map_err(|_| large())
    }
}

impl IntoDeserializer<'_> for Node {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
            visitor.$visit(self.number()?)
        }
    )*};
}

impl<'de> Deserializer<'de> for Node {
    type Error = ListError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        match self {
            Self::Fields(fields) => visitor.visit_map(MapDeserializer::new(fields.into_iter())),
            value => visitor.visit_str(value.text()?),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        let value = match &self {
            Self::Value(None) => true,
            node => match node.text()? {
                "on" | "true" | "yes" => true,
                "off" | "false" | "no" => false,
                text => {
                    return Err(ListError::custom(format_args!(
                        "'{text}' is neither on nor off"
                    )));
                }
            },
        };
        visitor.visit_bool(value)
    }

    numbers!(deserialize_u8 visit_u8, deserialize_u16 visit_u16, deserialize_u32 visit_u32,
        deserialize_u64 visit_u64);

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ListError> {
        visitor.visit_some(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ListError> {
        let text: StrDeserializer<'_, ListError> = self.text()?.into_deserializer();
        text.deserialize_enum(name, variants, visitor)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i64 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct
        newtype_struct seq tuple tuple_struct map struct identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use crate::config::{CacheType, Drive, IoEngine, RateLimiter, TokenBucket};

    use super::*;

    #[test]
    fn a_drive_from_a_list() {
        let text = "path=/a,,b,ro,id=x,cache=none,engine=io_uring,queues=2,\
                    rate.bandwidth.size=1M,rate.bandwidth.refill_time=100,rate.ops.size=10,rate.group=slow";
        let bucket = |size, refill_time| {
            Some(TokenBucket {
                size,
                refill_time,
                one_time_burst: 0,
            })
        };
        let expected = Drive {
            is_read_only: true,
            cache_type: CacheType::None,
            io_engine: IoEngine::Async,
            num_queues: Some(2),
            rate_limiter: Some(RateLimiter {
                group: Some("slow".into()),
                bandwidth: bucket(1 << 20, 100),
                ops: bucket(10, 1000),
            }),
            ..Drive::new("x", "/a,b".into())
        };
        assert_eq!(parse_list::<Drive>(text).unwrap(), expected);
        // The long names of the configuration file do as well.
        let text = "path_on_host=/a,is_read_only=off,cache_type=Unsafe";
        let drive = parse_list::<Drive>(text).unwrap();
        assert!(!drive.is_read_only && drive.cache_type == CacheType::Unsafe);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, words) in [
            ("path=a,speed=9", "speed"),
            ("path=a,path=b", "'path' is given twice"),
            ("path=a,id", "lacks its value"),
            ("path=a,ro=maybe", "maybe"),
            ("path=a,cache=fast", "fast"),
            ("path=a,queues=70000", "70000 is too large"),
            ("path=a,queues=x", "'x'"),
            ("path=a,rate.ops.size=1,rate=2", "given twice"),
            ("path=a,id.x=1", "expected a string"),
            ("", "unknown field"),
        ] {
            let error = parse_list::<Drive>(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error} lacks {words}");
        }
    }

    proptest! {
        #[test]
        fn no_list_panics(text in "[a-z.=,0-9]{0,40}") {
            let _ = parse_list::<Drive>(&text);
        }
    }
}
