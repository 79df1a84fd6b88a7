//! Memory sizes as people write them.

/// Text that is not a memory size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("'{text}' is not a size: write a number and a unit, such as 512M, 2GiB or 1T")]
pub struct SizeError {
    /// What was given.
    pub text: String,
}

/// Parses `4096`, `512M`, `2GiB` … to bytes. Units are powers of 1024; a number alone is bytes.
pub fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    parse(text, 0)
}

/// Parses `512M`, `2GiB`, `1g`, `1048576K` … to MiB. Units are powers of 1024; a number alone is
/// MiB. The result is a whole number of MiB.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let bytes = parse(text, 20)?;
    if bytes.is_multiple_of(1 << 20) {
        Ok(bytes >> 20)
    } else {
        Err(SizeError {
            text: text.to_string(),
        })
    }
}

/// Bytes of `text`, where a number alone counts in units of `1 << default_shift`.
fn parse(text: &str, default_shift: u32) -> Result<u64, SizeError> {
    let error = || SizeError {
        text: text.to_string(),
    };
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let number: u64 = digits.parse().map_err(|_| error())?;
    let bytes_shift = match unit.trim().to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" => 10,
        "" => default_shift,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(error()),
    };
    let bytes = u128::from(number) << bytes_shift;
    u64::try_from(bytes).map_err(|_| error())
}
