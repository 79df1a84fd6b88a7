//! The document, what may be asked of it, and the tokens that its readers have.

use std::io;
use std::sync::Mutex;
use std::time::Instant;

use serde_json::{Map, Value};

use super::counters::Counters;
use super::tokens::Tokens;
use crate::lock;

/// How the guest is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Version 2: who reads needs a token.
    pub sessions: bool,
    /// Always the format of EC2's IMDS, whatever a request accepts.
    pub imds_compat: bool,
}

/// A document cannot be had so.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MmdsError {
    /// There is none that could be changed or given.
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    /// Too large.
    #[error(
        "The MMDS patch request doesn't fit. The document would have {size} bytes, and {limit} are \
         allowed (--mmds-size-limit)"
    )]
    TooLarge {
        /// In bytes, as compact JSON.
        size: usize,
        /// In bytes.
        limit: usize,
    },
}

/// What a path leads to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Text in the format asked for.
    Text(String),
    /// Nothing.
    Nothing,
    /// A value that the IMDS format has no form for.
    NoForm,
}

/// A metadata document with its readers' tokens.
#[derive(Debug)]
pub struct Mmds {
    data: Mutex<Data>,
    limit: usize,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Data {
    document: Option<Value>,
    service: Service,
    tokens: Tokens,
}

impl Mmds {
    /// No document yet; one may have `limit` bytes as compact JSON.
    pub fn new(limit: usize) -> Self {
        Self {
            data: Mutex::default(),
            limit,
            counters: Counters::default(),
        }
    }

    /// Sets how the guest is served.
    pub fn serve(&self, service: Service) {
        lock(&self.data).service = service;
    }

    /// What happened.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// The document; null where there is none.
    pub fn document(&self) -> Value {
        lock(&self.data).document.clone().unwrap_or_default()
    }

    /// Replaces the document.
    pub fn put(&self, document: Value) -> Result<(), MmdsError> {
        self.check(&document)?;
        lock(&self.data).document = Some(document);
        Ok(())
    }

    /// Changes the document by a merge patch (RFC 7396); on an error it stays as it is.
    pub fn patch(&self, patch: Value) -> Result<(), MmdsError> {
        let mut data = lock(&self.data);
        let mut document = data.document.clone().ok_or(MmdsError::NotInitialized)?;
        merge(&mut document, patch);
        self.check(&document)?;
        data.document = Some(document);
        Ok(())
    }

    fn check(&self, document: &Value) -> Result<(), MmdsError> {
        let (size, limit) = (document.to_string().len(), self.limit);
        match size > limit {
            true => Err(MmdsError::TooLarge { size, limit }),
            false => Ok(()),
        }
    }

    pub(super) fn service(&self) -> Service {
        lock(&self.data).service
    }

    pub(super) fn token(&self, seconds: u32) -> io::Result<String> {
        lock(&self.data).tokens.issue(seconds, Instant::now())
    }

    pub(super) fn is_valid(&self, token: &str) -> bool {
        lock(&self.data).tokens.is_valid(token, Instant::now())
    }

    /// What is at `path`, a JSON pointer (RFC 6901) that may end with a slash.
    pub(super) fn find(&self, path: &str, json: bool) -> Found {
        let data = lock(&self.data);
        let document = data.document.as_ref().unwrap_or(&Value::Null);
        let Some(value) = document.pointer(path.strip_suffix('/').unwrap_or(path)) else {
            return Found::Nothing;
        };
        match value {
            value if json && !data.service.imds_compat => Found::Text(value.to_string()),
            Value::Object(members) => Found::Text(listing(members)),
            Value::String(text) => Found::Text(text.clone()),
            _ => Found::NoForm,
        }
    }
}

/// Names of members, a line each; those of objects end with a slash.
fn listing(members: &Map<String, Value>) -> String {
    let names = members.iter().map(|(name, value)| match value {
        Value::Object(_) => format!("{name}/"),
        _ => name.clone(),
    });
    names.collect::<Vec<_>>().join("\n")
}

/// RFC 7396, section 2.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(Map::new());
    }
    let Value::Object(members) = target else {
        return;
    };
    for (name, value) in patch {
        if value.is_null() {
            members.remove(&name);
        } else {
            merge(members.entry(name).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The examples of RFC 7396, appendix A.
    #[test]
    fn patches_merge() {
        for (mut target, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (
                json!({"a":"b","b":"c"}),
                json!({"a":null}),
                json!({"b":"c"}),
            ),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (
                json!({"a":{"b":"c"}}),
                json!({"a":{"b":"d","c":null}}),
                json!({"a":{"b":"d"}}),
            ),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (
                json!({}),
                json!({"a":{"bb":{"ccc":null}}}),
                json!({"a":{"bb":{}}}),
            ),
        ] {
            merge(&mut target, patch);
            assert_eq!(target, result);
        }
    }

    #[test]
    fn the_document_is_bounded_and_stays_on_errors() {
        let mmds = Mmds::new(20);
        assert_eq!(mmds.document(), Value::Null);
        assert_eq!(mmds.patch(json!({})), Err(MmdsError::NotInitialized));
        let fits = json!({"a":"0123456789ab"});
        mmds.put(fits.clone()).unwrap();
        let (size, limit) = (26, 20);
        let error = MmdsError::TooLarge { size, limit };
        assert_eq!(mmds.patch(json!({"b":1})), Err(error));
        assert!(mmds.put(json!("0123456789012345678")).is_err());
        assert_eq!(mmds.document(), fits);
        mmds.patch(json!({"a":null,"b":1})).unwrap();
        assert_eq!(mmds.document(), json!({"b":1}));
    }

    #[test]
    fn paths_lead_to_values_in_either_format() {
        let mmds = Mmds::new(1000);
        assert_eq!(mmds.find("/", true), Found::Text("null".into()));
        assert_eq!(mmds.find("/", false), Found::NoForm);
        mmds.put(json!({"a":{"b":"c","d":{}},"n":1,"l":["x"],"e":"","s/t":"u"}))
            .unwrap();
        let text = |text: &str| Found::Text(text.into());
        for (path, json, imds) in [
            ("/a", text(r#"{"b":"c","d":{}}"#), text("b\nd/")),
            ("/a/", text(r#"{"b":"c","d":{}}"#), text("b\nd/")),
            ("/a/b", text("\"c\""), text("c")),
            ("/a/d", text("{}"), text("")),
            ("/e", text("\"\""), text("")),
            ("/n", text("1"), Found::NoForm),
            ("/l", text(r#"["x"]"#), Found::NoForm),
            ("/l/0", text("\"x\""), text("x")),
            ("/s~1t", text("\"u\""), text("u")),
            ("/x", Found::Nothing, Found::Nothing),
            ("/a/b/c", Found::Nothing, Found::Nothing),
            ("a", Found::Nothing, Found::Nothing),
        ] {
            assert_eq!(mmds.find(path, true), json, "{path}");
            assert_eq!(mmds.find(path, false), imds, "{path}");
        }
        mmds.serve(Service {
            imds_compat: true,
            ..Service::default()
        });
        assert_eq!(mmds.find("/a/b", true), text("c"));
    }
}
