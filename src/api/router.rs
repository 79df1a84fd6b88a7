//! From a request to an action, and from its reply to a response.
//!
//! Segments of a path beyond those that matter are ignored, as Firecracker does, and so is a slash at
//! its end.

use serde::Deserialize;
use serde::de::{DeserializeOwned, Error};
use serde_json::json;

use super::error::ApiError;
use super::http::{Method, Request, Response};
use crate::config::{Drive, Entropy, MachineUpdate};
use crate::control::{Action, Reply};

/// Body of `PUT /actions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    InstanceStart,
    SendCtrlAltDel,
}

/// Body of `PATCH /vm`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct VmBody {
    state: VmState,
}

#[derive(Deserialize)]
enum VmState {
    Paused,
    Resumed,
}

/// The action that `request` asks for.
pub fn route(request: &Request) -> Result<Action, ApiError> {
    let mut segments = request.path.trim_matches('/').split('/');
    let (first, second) = (segments.next().unwrap_or_default(), segments.next());
    let body = Body::of(request)?;
    let method = request.method;
    Ok(match (method, first) {
        (Method::Get, "") => Action::DescribeInstance,
        (Method::Get, "version") => Action::Version,
        (Method::Get, "machine-config") => Action::GetMachine,
        (Method::Get, "vm") if second == Some("config") => Action::GetConfig,
        (Method::Put, "actions") => match body.parse::<ActionBody>()?.action_type {
            ActionType::InstanceStart => Action::InstanceStart,
            ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
        },
        (Method::Put, "boot-source") => Action::PutBootSource(body.parse()?),
        (Method::Put, "machine-config") => Action::PutMachine(body.machine()?),
        (Method::Patch, "machine-config") => Action::PatchMachine(body.machine_update()?),
        (Method::Put, "drives") => {
            let drive: Drive = body.parse()?;
            check_id(second, &drive.drive_id)?;
            Action::PutDrive(drive)
        }
        (Method::Put, "entropy") => Action::PutEntropy(body.parse::<Entropy>()?),
        (Method::Patch, "vm") => match body.parse::<VmBody>()?.state {
            VmState::Paused => Action::Pause,
            VmState::Resumed => Action::Resume,
        },
        _ => {
            let path = first.to_owned();
            return Err(ApiError::Unknown { method, path });
        }
    })
}

/// A body where there should be one.
struct Body<'a> {
    bytes: &'a [u8],
    method: Method,
}

impl<'a> Body<'a> {
    fn of(request: &'a Request) -> Result<Self, ApiError> {
        if request.method == Method::Get && !request.body.is_empty() {
            return Err(ApiError::GetBody);
        }
        Ok(Self {
            bytes: &request.body,
            method: request.method,
        })
    }

    fn parse<T: DeserializeOwned>(&self) -> Result<T, ApiError> {
        if self.bytes.is_empty() {
            let method = self.method;
            return Err(ApiError::Empty { method });
        }
        Ok(serde_json::from_slice(self.bytes)?)
    }

    fn machine(&self) -> Result<MachineUpdate, ApiError> {
        let machine: MachineUpdate = self.parse()?;
        for (field, missing) in [
            ("vcpu_count", machine.vcpu_count.is_none()),
            ("mem_size_mib", machine.mem_size_mib.is_none()),
        ] {
            if missing {
                return Err(serde_json::Error::missing_field(field).into());
            }
        }
        Ok(machine)
    }

    fn machine_update(&self) -> Result<MachineUpdate, ApiError> {
        let update: MachineUpdate = self.parse()?;
        if update == MachineUpdate::default() {
            let method = self.method;
            return Err(ApiError::Empty { method });
        }
        Ok(update)
    }
}

/// The name in the path is one, and the one in the body.
fn check_id(path: Option<&str>, body: &str) -> Result<(), ApiError> {
    let id = path.filter(|id| !id.is_empty()).ok_or(ApiError::EmptyId)?;
    if !id.chars().all(|c| c.is_alphanumeric() || c == '_') {
        return Err(ApiError::Id);
    }
    if id != body {
        return Err(ApiError::IdMismatch);
    }
    Ok(())
}

/// The response to an action that went well.
pub fn respond(reply: &Reply) -> Result<Response, ApiError> {
    let body = match reply {
        Reply::Done => return Ok(Response::empty()),
        Reply::Instance(instance) => serde_json::to_string(instance)?,
        Reply::Version(version) => json!({ "firecracker_version": version }).to_string(),
        Reply::Machine(machine) => serde_json::to_string(machine)?,
        Reply::Config(config) => serde_json::to_string(config)?,
    };
    Ok(Response::json(200, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(method: Method, path: &str, body: &str) -> Result<Action, ApiError> {
        route(&Request {
            method,
            path: path.to_owned(),
            body: body.as_bytes().to_vec(),
            keep_alive: true,
        })
    }

    #[test]
    fn every_endpoint_leads_to_its_action() {
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
            (
                Method::Put,
                "/entropy",
                "{}",
                Action::PutEntropy(Entropy {}),
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
                 `x`, there are no fields at line 1 column 4.",
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
