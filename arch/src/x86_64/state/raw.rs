//! KVM's structures as byte strings, just as `linux/kvm.h` lays them out: one string for a structure
//! (the module itself), one for a list of them ([`list`]). A string of another size is an error.

use serde::de::{Deserializer, Error};
use serde::ser::Serializer;
use serde_bytes::{ByteBuf, Bytes};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Longest list in bytes, which is far more than KVM takes of anything.
const MAX_LIST: usize = 64 << 10;

pub(super) fn serialize<T, S>(value: &T, serializer: S) -> Result<S::Ok, S::Error>
where
    T: IntoBytes + Immutable,
    S: Serializer,
{
    serializer.serialize_bytes(value.as_bytes())
}

pub(super) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromBytes,
    D: Deserializer<'de>,
{
    let bytes: ByteBuf = serde::Deserialize::deserialize(deserializer)?;
    read(&bytes)
}

fn read<T: FromBytes, E: Error>(bytes: &[u8]) -> Result<T, E> {
    T::read_from_bytes(bytes).map_err(|_| {
        let name = std::any::type_name::<T>();
        let name = name.rsplit("::").next().unwrap_or(name);
        let wanted = size_of::<T>();
        E::custom(format!(
            "{} bytes are no {name}, which has {wanted}",
            bytes.len()
        ))
    })
}

pub(super) mod list {
    use super::*;

    pub(in super::super) fn serialize<T, S>(values: &[T], serializer: S) -> Result<S::Ok, S::Error>
    where
        T: IntoBytes + Immutable,
        S: Serializer,
    {
        serde::Serialize::serialize(Bytes::new(values.as_bytes()), serializer)
    }

    pub(in super::super) fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: FromBytes,
        D: Deserializer<'de>,
    {
        let bytes: ByteBuf = serde::Deserialize::deserialize(deserializer)?;
        if bytes.len() > MAX_LIST {
            return Err(D::Error::custom(format!(
                "a list of {} bytes, {MAX_LIST} allowed",
                bytes.len()
            )));
        }
        bytes.chunks(size_of::<T>().max(1)).map(read).collect()
    }
}
