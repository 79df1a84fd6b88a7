//! From a request to an action, and from its reply to a response.
//!
//! Segments of a path beyond those that matter are ignored, as Firecracker does, and so is a slash at
//! its end.

use serde::de::{DeserializeOwned, Error};
use serde_json::{Value, json};

use super::error::ApiError;
use super::http::{Method, Request, Response};
use super::routes::{METRICS, ROUTES, Route};
use crate::config::MachineUpdate;
use crate::control::{Action, Reply};

/// Content type of plain text.
const TEXT: &str = "text/plain; charset=utf-8";

/// Where in [`ROUTES`] the endpoint is that `request` is for.
pub fn find(request: &Request) -> Result<usize, ApiError> {
    let path: Vec<_> = segments(&request.path).collect();
    let method = request.method;
    let all = ROUTES.iter().enumerate();
    let matching = all.filter(|(_, route)| route.method == method && matches(route, &path));
    // The longest: `/balloon/statistics` is not `/balloon`.
    let longest = matching.max_by_key(|(_, route)| route.path.len());
    longest.map(|(index, _)| index).ok_or_else(|| {
        let path = path.first().unwrap_or(&"").to_string();
        ApiError::Unknown { method, path }
    })
}

/// What a request asks for.
#[derive(Debug)]
pub struct Routed {
    /// The action.
    pub action: Action,
    /// The client used something that will go.
    pub deprecated: bool,
}

/// The action that `request` asks for at the endpoint with index `route`.
pub fn read(route: usize, request: &Request) -> Result<Routed, ApiError> {
    let method = request.method;
    if method == Method::Get && !request.body.is_empty() {
        return Err(ApiError::GetBody);
    }
    let mut input = Input {
        name: segments(&request.path).nth(1).unwrap_or_default(),
        query: &request.query,
        body: &request.body,
        method,
        deprecated: false,
    };
    let action = match ROUTES.get(route) {
        Some(route) => (route.action)(&mut input)?,
        None => {
            let path = request.path.clone();
            return Err(ApiError::Unknown { method, path });
        }
    };
    let deprecated = input.deprecated;
    Ok(Routed { action, deprecated })
}

/// Whether the endpoint with index `route` is the one of Prometheus.
pub fn is_metrics(route: usize) -> bool {
    let route = ROUTES.get(route);
    route.is_some_and(|route| route.method == Method::Get && route.path == METRICS)
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.trim_matches('/').split('/').filter(|s| !s.is_empty())
}

/// Whether a path begins with that of `route`. A name may be missing, which is another error.
fn matches(route: &Route, path: &[&str]) -> bool {
    let is_root = segments(route.path).next().is_none();
    let mut wanted = segments(route.path).enumerate();
    is_root == path.is_empty()
        && wanted.all(|(at, wanted)| wanted.starts_with('{') || path.get(at) == Some(&wanted))
}

/// What an endpoint is given.
pub struct Input<'a> {
    name: &'a str,
    query: &'a str,
    body: &'a [u8],
    method: Method,
    /// See [`Routed::deprecated`].
    pub deprecated: bool,
}

impl Input<'_> {
    /// The name in the path.
    pub fn name(&self) -> Result<&str, ApiError> {
        if self.name.is_empty() {
            return Err(ApiError::EmptyId);
        }
        if !self.name.chars().all(|c| c.is_alphanumeric() || c == '_') {
            return Err(ApiError::Id);
        }
        Ok(self.name)
    }

    /// Whether the query says that `name` is `true`. Others are ignored, as Firecracker does.
    pub fn is_set(&self, name: &str) -> Result<bool, ApiError> {
        let mut pairs = self
            .query
            .split('&')
            .map(|pair| pair.split_once('=').unwrap_or((pair, "true")));
        match pairs.find(|(key, _)| *key == name) {
            None | Some((_, "false")) => Ok(false),
            Some((_, "true")) => Ok(true),
            Some((key, value)) => Err(ApiError::Query {
                key: key.to_owned(),
                value: value.to_owned(),
            }),
        }
    }

    /// A body that there has to be.
    pub fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        let method = self.method;
        self.parse_if_any()?.ok_or(ApiError::Empty { method })
    }

    /// A body that there may be.
    pub fn parse_if_any<T: DeserializeOwned>(&self) -> Result<Option<T>, ApiError> {
        match self.body {
            [] => Ok(None),
            body => Ok(Some(serde_json::from_slice(body)?)),
        }
    }

    /// A body with the same name as the path.
    pub fn named<T: DeserializeOwned>(&self, name: fn(&T) -> &String) -> Result<T, ApiError> {
        self.named_or(name, |_, _| ApiError::IdMismatch)
    }

    /// The same of a network interface, of which Firecracker says both names where they differ.
    pub fn interface<T: DeserializeOwned>(&self, name: fn(&T) -> &String) -> Result<T, ApiError> {
        self.named_or(name, |path, body| ApiError::InterfaceMismatch {
            path: path.to_owned(),
            body: body.to_owned(),
        })
    }

    fn named_or<T: DeserializeOwned>(
        &self,
        name: fn(&T) -> &String,
        mismatch: fn(&str, &str) -> ApiError,
    ) -> Result<T, ApiError> {
        let path = self.name()?;
        let body = self.parse()?;
        match name(&body) == path {
            true => Ok(body),
            false => Err(mismatch(path, name(&body))),
        }
    }

    /// A whole machine.
    pub fn machine(&mut self) -> Result<MachineUpdate, ApiError> {
        let machine: MachineUpdate = self.parse()?;
        for (field, missing) in [
            ("vcpu_count", machine.vcpu_count.is_none()),
            ("mem_size_mib", machine.mem_size_mib.is_none()),
        ] {
            if missing {
                return Err(serde_json::Error::missing_field(field).into());
            }
        }
        self.deprecated |= machine.cpu_template.is_some();
        Ok(machine)
    }

    /// Something of a machine.
    pub fn machine_update(&mut self) -> Result<MachineUpdate, ApiError> {
        let update: MachineUpdate = self.parse()?;
        if update == MachineUpdate::default() {
            let method = self.method;
            return Err(ApiError::Empty { method });
        }
        self.deprecated |= update.cpu_template.is_some();
        Ok(update)
    }
}

/// The response to an action that went well.
pub fn respond(reply: &Reply) -> Result<Response, ApiError> {
    let body = match reply {
        Reply::Done => return Ok(Response::empty()),
        Reply::Instance(instance) => serde_json::to_string(instance)?,
        Reply::Version(version) => json!({ "firecracker_version": version }).to_string(),
        Reply::Machine(machine) => serde_json::to_string(machine)?,
        Reply::Config(config) => serde_json::to_string(config)?,
        Reply::Balloon(balloon) => serde_json::to_string(balloon)?,
        Reply::Statistics(statistics) => serde_json::to_string(statistics)?,
        Reply::Hinting(status) => serde_json::to_string(status)?,
        Reply::Metadata(Value::Null) => "{}".to_owned(),
        Reply::Metadata(document) => document.to_string(),
        Reply::MemoryHotplug(status) => serde_json::to_string(status)?,
        Reply::Text(text) => return Ok(Response::text(TEXT, text.clone())),
        Reply::Stream(stream) => return Ok(Response::stream(stream.content_type)),
        Reply::Vm(statistics) => serde_json::to_string(statistics)?,
    };
    Ok(Response::json(200, body))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Drive, Entropy};
    use crate::control::{HintingStart, PluggedKind, Unplug};

    fn request(method: Method, path: &str, body: &str) -> Result<Action, ApiError> {
        let request = Request {
            method,
            path: path.split('?').next().unwrap_or_default().to_owned(),
            query: path.split_once('?').unwrap_or_default().1.to_owned(),
            body: body.as_bytes().to_vec(),
            keep_alive: true,
        };
        Ok(read(find(&request)?, &request)?.action)
    }

    #[test]
    fn every_endpoint_leads_to_its_action() {
        let unplug = |id: &str, force| {
            Action::Unplug(Unplug {
                kind: PluggedKind::Drive,
                id: id.to_owned(),
                force,
            })
        };
        let start = r#"{"action_type":"InstanceStart"}"#;
        let paused = r#"{"state":"Paused"}"#;
        for (method, path, body, expected) in [
            (Method::Get, "/", "", Action::DescribeInstance),
            (Method::Get, "/version/", "", Action::Version),
            (Method::Get, "/version/anything", "", Action::Version),
            (Method::Get, "/vm/config", "", Action::GetConfig),
            (Method::Get, "/machine-config", "", Action::GetMachine),
            (Method::Put, "/actions", start, Action::InstanceStart),
            (Method::Patch, "/vm", paused, Action::Pause),
            (Method::Patch, "/vm/anything", paused, Action::Pause),
            (Method::Get, "/balloon", "", Action::GetBalloon),
            (
                Method::Get,
                "/balloon/statistics",
                "",
                Action::GetBalloonStatistics,
            ),
            (Method::Get, "/hotplug/memory", "", Action::GetMemoryHotplug),
            (
                Method::Patch,
                "/balloon/hinting/start",
                "",
                Action::StartHinting(HintingStart::default()),
            ),
            (
                Method::Patch,
                "/balloon/hinting/start",
                r#"{"acknowledge_on_stop":false,"more":1}"#,
                Action::StartHinting(HintingStart {
                    acknowledge_on_stop: false,
                }),
            ),
            (
                Method::Patch,
                "/balloon/hinting/stop",
                "{}",
                Action::StopHinting,
            ),
            (Method::Delete, "/drives/a", "", unplug("a", false)),
            (
                Method::Delete,
                "/drives/a?force=true",
                "",
                unplug("a", true),
            ),
            (Method::Delete, "/drives/a?x=1&force", "", unplug("a", true)),
            (
                Method::Delete,
                "/drives/a?force=false",
                "",
                unplug("a", false),
            ),
            (
                Method::Put,
                "/entropy",
                "{}",
                Action::PutEntropy(Entropy::default()),
            ),
        ] {
            assert_eq!(request(method, path, body).unwrap(), expected, "{path}");
        }
        let drive = r#"{"drive_id":"a_1","path_on_host":"/d","is_root_device":false}"#;
        let action = request(Method::Put, "/drives/a_1", drive).unwrap();
        assert_eq!(action, Action::PutDrive(Drive::new("a_1", "/d".into())));
    }

    #[test]
    fn what_clients_match_on() {
        let drive = r#"{"drive_id":"a","path_on_host":"/d"}"#;
        for (method, path, body, text) in [
            (
                Method::Get,
                "/nothing",
                "",
                "Invalid request method and/or path: GET nothing.",
            ),
            (
                Method::Delete,
                "/vm",
                "",
                "Invalid request method and/or path: DELETE vm.",
            ),
            (
                Method::Get,
                "/hotplug",
                "",
                "Invalid request method and/or path: GET hotplug.",
            ),
            (Method::Delete, "/drives", "", "The ID cannot be empty."),
            (
                Method::Delete,
                "/drives/a?force=1",
                "",
                "force in the query is true or false, not '1'.",
            ),
            (Method::Get, "/", "{}", "GET request cannot have a body."),
            (Method::Put, "/actions", "", "Empty PUT request."),
            (
                Method::Patch,
                "/machine-config",
                "{}",
                "Empty PATCH request.",
            ),
            (Method::Put, "/drives", drive, "The ID cannot be empty."),
            (
                Method::Put,
                "/drives/a-b",
                drive,
                "API Resource IDs can only contain alphanumeric characters and underscores.",
            ),
            (
                Method::Put,
                "/drives/b",
                drive,
                "The id from the path does not match the id from the body!",
            ),
            (
                Method::Put,
                "/entropy",
                r#"{"x":1}"#,
                "An error occurred when deserializing the json body of a request: unknown field \
                 `x`, expected `rate_limiter` at line 1 column 4.",
            ),
        ] {
            let response = request(method, path, body).unwrap_err().response();
            let value: serde_json::Value = serde_json::from_str(&response.body.unwrap()).unwrap();
            assert_eq!(
                (response.status, &value["fault_message"]),
                (400, &json!(text))
            );
        }
    }
}
