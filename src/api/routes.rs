//! Every endpoint, each with what it leads to. `resources/api/openapi.yaml` describes the same ones.

use serde::Deserialize;

use super::error::ApiError;
use super::http::Method::{self, Delete, Get, Patch, Put};
use super::router::Input;
use crate::config::{Drive, MmdsConfig, MmdsVersion, NetworkInterface, Pmem, Vsock};
use crate::control::{
    Action, DriveUpdate, HintingStart, NetworkUpdate, PluggedKind, PmemUpdate, SnapshotLoad, Unplug,
};

/// An endpoint.
pub struct Route {
    /// Method.
    pub method: Method,
    /// Path; a segment in braces stands for a name.
    pub path: &'static str,
    /// What a request there asks for.
    pub action: fn(&mut Input<'_>) -> Result<Action, ApiError>,
}

const fn route(
    method: Method,
    path: &'static str,
    action: fn(&mut Input<'_>) -> Result<Action, ApiError>,
) -> Route {
    Route {
        method,
        path,
        action,
    }
}

/// Where Prometheus asks.
pub const METRICS: &str = "/metrics";

/// All endpoints.
pub const ROUTES: &[Route] = &[
    route(Get, "/", |_| Ok(Action::DescribeInstance)),
    route(Get, "/version", |_| Ok(Action::Version)),
    route(Get, "/vm/config", |_| Ok(Action::GetConfig)),
    route(Get, "/vm/statistics", |_| Ok(Action::GetStatistics)),
    route(Put, "/exec", |input| Ok(Action::Exec(input.parse()?))),
    route(Get, "/console", |_| Ok(Action::ReadConsole)),
    route(Get, "/console/log", |_| Ok(Action::GetLog)),
    route(Get, "/events", |_| Ok(Action::Listen)),
    route(Get, METRICS, |_| Ok(Action::GetMetrics)),
    route(Patch, "/vm", vm),
    route(Put, "/actions", actions),
    route(Put, "/boot-source", |input| {
        Ok(Action::PutBootSource(input.parse()?))
    }),
    route(Get, "/machine-config", |_| Ok(Action::GetMachine)),
    route(Put, "/machine-config", |input| {
        Ok(Action::PutMachine(input.machine()?))
    }),
    route(Patch, "/machine-config", |input| {
        Ok(Action::PatchMachine(input.machine_update()?))
    }),
    route(Put, "/cpu-config", |input| {
        Ok(Action::PutCpu(Box::new(input.parse()?)))
    }),
    route(Put, "/drives/{drive_id}", |input| {
        Ok(Action::PutDrive(input.named(|d: &Drive| &d.drive_id)?))
    }),
    route(Patch, "/drives/{drive_id}", |input| {
        Ok(Action::PatchDrive(
            input.named(|d: &DriveUpdate| &d.drive_id)?,
        ))
    }),
    route(Delete, "/drives/{drive_id}", |input| {
        unplug(input, PluggedKind::Drive)
    }),
    route(Put, "/pmem/{id}", |input| {
        Ok(Action::PutPmem(input.named(|p: &Pmem| &p.id)?))
    }),
    route(Patch, "/pmem/{id}", |input| {
        Ok(Action::PatchPmem(input.named(|p: &PmemUpdate| &p.id)?))
    }),
    route(Delete, "/pmem/{id}", |input| {
        unplug(input, PluggedKind::Pmem)
    }),
    route(Put, "/network-interfaces/{iface_id}", |input| {
        let net = input.interface(|n: &NetworkInterface| &n.iface_id)?;
        Ok(Action::PutNetwork(Box::new(net)))
    }),
    route(Patch, "/network-interfaces/{iface_id}", |input| {
        Ok(Action::PatchNetwork(
            input.interface(|n: &NetworkUpdate| &n.iface_id)?,
        ))
    }),
    route(Delete, "/network-interfaces/{iface_id}", |input| {
        unplug(input, PluggedKind::Net)
    }),
    route(Put, "/entropy", |input| {
        Ok(Action::PutEntropy(input.parse()?))
    }),
    route(Put, "/vsock", |input| {
        let vsock: Vsock = input.parse()?;
        input.deprecated |= vsock.vsock_id.is_some();
        Ok(Action::PutVsock(vsock))
    }),
    route(Put, "/serial", |input| {
        Ok(Action::PutSerial(input.parse()?))
    }),
    route(Put, "/balloon", |input| {
        Ok(Action::PutBalloon(input.parse()?))
    }),
    route(Get, "/balloon", |_| Ok(Action::GetBalloon)),
    route(Patch, "/balloon", |input| {
        Ok(Action::PatchBalloon(input.parse()?))
    }),
    route(Get, "/balloon/statistics", |_| {
        Ok(Action::GetBalloonStatistics)
    }),
    route(Patch, "/balloon/statistics", |input| {
        Ok(Action::PatchBalloonStatistics(input.parse()?))
    }),
    route(Patch, "/balloon/hinting/start", |input| {
        let start = input.parse_if_any::<HintingStart>()?;
        Ok(Action::StartHinting(start.unwrap_or_default()))
    }),
    route(Get, "/balloon/hinting/status", |_| Ok(Action::GetHinting)),
    route(Patch, "/balloon/hinting/stop", |_| Ok(Action::StopHinting)),
    route(Put, "/hotplug/memory", |input| {
        Ok(Action::PutMemoryHotplug(input.parse()?))
    }),
    route(Get, "/hotplug/memory", |_| Ok(Action::GetMemoryHotplug)),
    route(Patch, "/hotplug/memory", |input| {
        Ok(Action::PatchMemoryHotplug(input.parse()?))
    }),
    route(Put, "/mmds/config", |input| {
        let config: MmdsConfig = input.parse()?;
        input.deprecated |= config.version == MmdsVersion::V1;
        Ok(Action::PutMmdsConfig(config))
    }),
    route(Put, "/mmds", |input| Ok(Action::PutMmds(input.parse()?))),
    route(Patch, "/mmds", |input| {
        Ok(Action::PatchMmds(input.parse()?))
    }),
    route(Get, "/mmds", |_| Ok(Action::GetMmds)),
    route(Put, "/logger", |input| {
        Ok(Action::PutLogger(input.parse()?))
    }),
    route(Put, "/metrics", |input| {
        Ok(Action::PutMetrics(input.parse()?))
    }),
    route(Put, "/snapshot/create", |input| {
        Ok(Action::CreateSnapshot(input.parse()?))
    }),
    route(Delete, "/snapshot/create", |_| Ok(Action::CancelSnapshot)),
    route(Put, "/snapshot/load", |input| {
        let load: SnapshotLoad = input.parse()?;
        input.deprecated |= load.mem_file_path.is_some() || load.enable_diff_snapshots;
        Ok(Action::LoadSnapshot(load))
    }),
    route(Put, "/snapshot/working-set", |_| {
        Ok(Action::RecordWorkingSet)
    }),
    route(Put, "/fork", |input| Ok(Action::Fork(input.parse()?))),
];

/// Body of `PUT /actions`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ActionBody {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
    Shutdown,
}

fn actions(input: &mut Input<'_>) -> Result<Action, ApiError> {
    Ok(match input.parse::<ActionBody>()?.action_type {
        ActionType::InstanceStart => Action::InstanceStart,
        ActionType::FlushMetrics => Action::FlushMetrics,
        ActionType::SendCtrlAltDel => Action::SendCtrlAltDel,
        ActionType::Shutdown => Action::Shutdown,
    })
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

fn vm(input: &mut Input<'_>) -> Result<Action, ApiError> {
    Ok(match input.parse::<VmBody>()?.state {
        VmState::Paused => Action::Pause,
        VmState::Resumed => Action::Resume,
    })
}

fn unplug(input: &mut Input<'_>, kind: PluggedKind) -> Result<Action, ApiError> {
    let id = input.name()?.to_owned();
    let force = input.is_set("force")?;
    Ok(Action::Unplug(Unplug { kind, id, force }))
}
