//! The one map from what can go wrong to a status code and Firecracker's `fault_message`.

use serde_json::json;

use super::http::{HttpError, Method, Response};
use crate::control::{ActionError, chain};

/// A request that is not, or cannot be, an action.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Bytes that are no request.
    #[error("{0}\nAll previous unanswered requests will be dropped.")]
    NoRequest(HttpError),
    /// Nothing is at this path, or not with this method.
    #[error("Invalid request method and/or path: {} {path}.", method.name())]
    Unknown {
        /// As asked.
        method: Method,
        /// As asked.
        path: String,
    },
    /// A GET with a body.
    #[error("GET request cannot have a body.")]
    GetBody,
    /// A request that says nothing.
    #[error("Empty {} request.", match method { Method::Delete => "Delete", method => method.name() })]
    Empty {
        /// As asked.
        method: Method,
    },
    /// A path that ends where a name belongs.
    #[error("The ID cannot be empty.")]
    EmptyId,
    /// A name with other characters than names have.
    #[error("API Resource IDs can only contain alphanumeric characters and underscores.")]
    Id,
    /// A query that is not what it should be.
    #[error("{key} in the query is true or false, not '{value}'.")]
    Query {
        /// What it says something of.
        key: String,
        /// What it says.
        value: String,
    },
    /// Two names for one thing.
    #[error("The id from the path does not match the id from the body!")]
    IdMismatch,
    /// Two names for one network interface.
    #[error("The id from the path [{path}] does not match the id from the body [{body}]!")]
    InterfaceMismatch {
        /// In the path.
        path: String,
        /// In the body.
        body: String,
    },
    /// A body that is not what it should be.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
    /// The microVM refuses.
    #[error(transparent)]
    Action(#[from] ActionError),
}

/// What is at the bottom of an error, where that is another one.
fn root_cause(error: &dyn std::error::Error) -> Option<String> {
    let mut cause = error.source()?;
    while let Some(source) = cause.source() {
        cause = source;
    }
    Some(cause.to_string())
}

impl ApiError {
    /// A word for programs, which stays when the sentence changes. bulle's own.
    fn code(&self) -> &'static str {
        match self {
            Self::NoRequest(_) => "bad-request",
            Self::Unknown { .. } => "unknown-endpoint",
            Self::GetBody | Self::Empty { .. } | Self::Json(_) | Self::Query { .. } => "bad-body",
            Self::EmptyId | Self::Id | Self::IdMismatch | Self::InterfaceMismatch { .. } => {
                "bad-id"
            }
            Self::Action(error) => error.code(),
        }
    }

    /// As an answer.
    pub fn response(&self) -> Response {
        // In this order: some clients only look at the start.
        let text = json!(chain(self));
        let code = self.code();
        let status = match self {
            Self::Action(ActionError::MmdsLimit(_)) => 413,
            _ => 400,
        };
        let cause = root_cause(self).map(|cause| format!(r#","cause":{}"#, json!(cause)));
        let cause = cause.unwrap_or_default();
        // Firecracker's word for it.
        let error = match self {
            Self::NoRequest(_) => format!(r#""error":{text},"#),
            _ => String::new(),
        };
        Response::json(
            status,
            format!(r#"{{{error}"fault_message":{text},"code":"{code}"{cause}}}"#),
        )
    }
}
