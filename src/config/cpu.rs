//! What the guest's processors are to differ in from the host's: custom CPU templates in Firecracker's
//! language, with its words for what is wrong in one.

use std::fmt;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error, MapAccess, Visitor};
use serde::{Deserialize, Serialize, Serializer};

/// A CPU template, or the file that has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum CpuConfig {
    /// A JSON file, which is read where the configuration comes from.
    File(PathBuf),
    /// Itself.
    Template(CustomCpuTemplate),
}

impl<'de> Deserialize<'de> for CpuConfig {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Either;

        impl<'de> Visitor<'de> for Either {
            type Value = CpuConfig;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a CPU template or the path of its file")
            }

            fn visit_str<E: Error>(self, path: &str) -> Result<CpuConfig, E> {
                Ok(CpuConfig::File(path.into()))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<CpuConfig, A::Error> {
                let template = CustomCpuTemplate::deserialize(MapAccessDeserializer::new(map))?;
                Ok(CpuConfig::Template(template))
            }
        }

        deserializer.deserialize_any(Either)
    }
}

/// What is changed of the host's processor.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CustomCpuTemplate {
    /// Capabilities of KVM that the host must have, or need not have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kvm_capabilities: Vec<KvmCapability>,
    /// Changes of CPUID.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// Changes of MSRs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// A capability by its number in `linux/kvm.h`: `"56"` must be there, `"!56"` need not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvmCapability {
    /// Number.
    pub number: u32,
    /// Whether the host must have it.
    pub needed: bool,
}

impl Serialize for KvmCapability {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let not = if self.needed { "" } else { "!" };
        serializer.collect_str(&format_args!("{not}{}", self.number))
    }
}

impl<'de> Deserialize<'de> for KvmCapability {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = text.strip_prefix('!').unwrap_or(&text);
        match number.parse() {
            Ok(number) => Ok(Self {
                number,
                needed: !text.starts_with('!'),
            }),
            Err(error) => Err(D::Error::custom(format!(
                "Failed to parse string [{text}] as a kvm capability - can not convert to numeric: \
                 {error}"
            ))),
        }
    }
}

/// Changes of a CPUID leaf that the host's KVM supports.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    /// Leaf.
    #[serde(with = "number")]
    pub leaf: u32,
    /// Sub-leaf.
    #[serde(with = "number")]
    pub subleaf: u32,
    /// KVM's flags of the entry (`KVM_CPUID_FLAG_*`), in place of those there are.
    pub flags: u32,
    /// Registers that change.
    pub modifiers: Vec<CpuidRegisterModifier>,
}

/// Changes of a register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidRegisterModifier {
    /// Register.
    pub register: CpuidRegister,
    /// Bits that change.
    pub bitmap: Bitmap<32>,
}

/// What a CPUID leaf has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl<'de> Deserialize<'de> for CpuidRegister {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "eax" => Ok(Self::Eax),
            "ebx" => Ok(Self::Ebx),
            "ecx" => Ok(Self::Ecx),
            "edx" => Ok(Self::Edx),
            _ => Err(D::Error::custom(
                "Invalid CPUID register. Must be one of [eax, ebx, ecx, edx]",
            )),
        }
    }
}

/// Changes of a MSR that the host's KVM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    /// Its number.
    #[serde(with = "number")]
    pub addr: u32,
    /// Bits that change.
    pub bitmap: Bitmap<64>,
}

/// Bits of a register of `BITS` bits: a string of `0`, `1` and `x`, the highest first; what is `x` or
/// missing stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: usize> {
    /// The bits that are set or cleared.
    pub mask: u64,
    /// Their values; 0 where the mask is.
    pub value: u64,
}

impl<const BITS: usize> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digit = |bit: usize| match (self.mask >> bit & 1, self.value >> bit & 1) {
            (0, _) => 'x',
            (_, 0) => '0',
            _ => '1',
        };
        let digits: String = (0..BITS).rev().map(digit).collect();
        serializer.collect_str(&format_args!("0b{digits}"))
    }
}

impl<'de, const BITS: usize> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        let failed = |why: &str| {
            D::Error::custom(format!(
                "Failed to parse string [{text}] as a bitmap - {why}"
            ))
        };
        let digits = text.strip_prefix("0b").unwrap_or(&text);
        let mut bitmap = Self::default();
        let digits = digits.chars().rev().filter(|c| *c != '_');
        for (bit, digit) in digits.enumerate() {
            if bit >= BITS {
                return Err(failed("string is too long"));
            }
            match digit {
                'x' => {}
                '0' => bitmap.mask |= 1 << bit,
                '1' => {
                    bitmap.mask |= 1 << bit;
                    bitmap.value |= 1 << bit;
                }
                other => return Err(failed(&format!("unknown character: {other}"))),
            }
        }
        Ok(bitmap)
    }
}

/// Numbers as strings, hexadecimal or binary.
mod number {
    use super::*;

    pub fn serialize<S: Serializer>(number: &u32, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{number:#x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
        let text = String::deserialize(deserializer)?;
        let (digits, radix) = match (text.strip_prefix("0b"), text.strip_prefix("0x")) {
            (Some(digits), _) => (digits, 2),
            (_, Some(digits)) => (digits, 16),
            _ => {
                return Err(D::Error::custom(format!(
                    "No supported number system prefix found in value [{text}]. Make sure to prefix \
                     the number with '0x' for hexadecimal numbers or '0b' for binary numbers."
                )));
            }
        };
        u32::from_str_radix(digits, radix).map_err(|error| {
            D::Error::custom(format!(
                "Failed to parse string [{text}] as a number for CPU template - {error:?}"
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn template() -> Value {
        json!({
            "kvm_capabilities": ["121", "!56"],
            "cpuid_modifiers": [{
                "leaf": "0x80000001",
                "subleaf": "0b11",
                "flags": 1,
                "modifiers": [{ "register": "edx", "bitmap": "0bx0_1x" }],
            }],
            "msr_modifiers": [{ "addr": "0x10a", "bitmap": "1" }],
        })
    }

    #[test]
    fn what_firecracker_writes_is_read_and_written_again() {
        let read: CustomCpuTemplate = serde_json::from_value(template()).unwrap();
        let [added, removed] = read.kvm_capabilities[..] else {
            panic!("{read:?}")
        };
        assert_eq!((added.number, added.needed), (121, true));
        assert_eq!((removed.number, removed.needed), (56, false));
        let leaf = &read.cpuid_modifiers[0];
        assert_eq!((leaf.leaf, leaf.subleaf, leaf.flags), (0x8000_0001, 3, 1));
        let bitmap = leaf.modifiers[0].bitmap;
        assert_eq!((bitmap.mask, bitmap.value), (0b0110, 0b0010));
        let again = serde_json::to_value(&read).unwrap();
        assert_eq!(again["cpuid_modifiers"][0]["subleaf"], "0x3");
        let bitmap = format!("0b{}01x", "x".repeat(29));
        assert_eq!(
            again["cpuid_modifiers"][0]["modifiers"][0]["bitmap"],
            bitmap
        );
        assert_eq!(again["kvm_capabilities"], json!(["121", "!56"]));
        assert_eq!(
            serde_json::from_value::<CustomCpuTemplate>(again).unwrap(),
            read
        );
    }

    #[test]
    fn what_is_wrong_is_said_as_firecracker_says_it() {
        for (pointer, value, text) in [
            (
                "/cpuid_modifiers/0/leaf",
                "1",
                "No supported number system prefix found in value [1]",
            ),
            (
                "/cpuid_modifiers/0/subleaf",
                "0x1ffffffff",
                "Failed to parse string [0x1ffffffff] as a number for CPU template - ",
            ),
            (
                "/cpuid_modifiers/0/modifiers/0/register",
                "ekx",
                "Must be one of [eax, ebx, ecx, edx]",
            ),
            (
                "/msr_modifiers/0/bitmap",
                "0b012",
                "Failed to parse string [0b012] as a bitmap - unknown character: 2",
            ),
            (
                "/cpuid_modifiers/0/modifiers/0/bitmap",
                "0b1_00000000_00000000_00000000_00000000",
                "as a bitmap - string is too long",
            ),
            (
                "/kvm_capabilities/0",
                "!x",
                "Failed to parse string [!x] as a kvm capability",
            ),
        ] {
            let mut json = template();
            *json.pointer_mut(pointer).unwrap() = value.into();
            let error = serde_json::from_value::<CustomCpuTemplate>(json).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
        }
        let arm = json!({ "reg_modifiers": [] });
        let error = serde_json::from_value::<CustomCpuTemplate>(arm).unwrap_err();
        assert!(error.to_string().contains("unknown field `reg_modifiers`"));
    }

    #[test]
    fn a_path_stands_for_a_template() {
        let read = |json: Value| serde_json::from_value::<CpuConfig>(json);
        assert_eq!(
            read(json!("/t.json")).unwrap(),
            CpuConfig::File("/t.json".into())
        );
        assert_eq!(
            read(json!({})).unwrap(),
            CpuConfig::Template(CustomCpuTemplate::default())
        );
        assert!(
            read(json!({ "x": 1 }))
                .unwrap_err()
                .to_string()
                .contains("unknown field `x`")
        );
        assert!(
            read(json!(1))
                .unwrap_err()
                .to_string()
                .contains("the path of its file")
        );
    }
}
