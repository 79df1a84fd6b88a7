//! Control groups of a jail: versions 1 (a hierarchy for each controller) and 2 (one for all).

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// Version of control groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupVersion {
    /// A hierarchy for each controller, or some of them.
    #[default]
    V1,
    /// The unified hierarchy.
    V2,
}

impl FromStr for CgroupVersion {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "1" => Ok(Self::V1),
            "2" => Ok(Self::V2),
            _ => Err("give 1 or 2"),
        }
    }
}

/// A file of a control group and what is written to it: `cpuset.cpus=0-3`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    file: String,
    value: String,
}

impl Setting {
    /// What comes before the first dot.
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

impl FromStr for Setting {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let setting = text.split_once('=').map(|(file, value)| Self {
            file: file.to_owned(),
            value: value.to_owned(),
        });
        let fits = |setting: &Self| {
            let word = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
            let named = setting.file.contains('.') && !setting.file.starts_with('.');
            named && setting.file.chars().all(word) && !setting.value.is_empty()
        };
        setting
            .filter(fits)
            .ok_or("write CONTROLLER.FILE=VALUE, such as cpuset.cpus=0-3")
    }
}

/// Control groups cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// No hierarchy.
    #[error(
        "the host has no control groups of version {version} with controller '{controller}': see \
         /proc/mounts, and choose --cgroup-version 1 or 2 accordingly"
    )]
    Absent {
        /// As wanted.
        version: u8,
        /// As wanted.
        controller: String,
    },
    /// A path that leads elsewhere.
    #[error("--parent-cgroup {} has to be a path below a hierarchy, without '.' and '..'", path.display())]
    Parent {
        /// As given.
        path: PathBuf,
    },
    /// A file of a control group.
    #[error("cannot {what} {}", path.display())]
    File {
        /// The operation.
        what: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where the host has control groups.
#[derive(Debug, Default)]
pub(super) struct Hierarchies {
    /// Mount points of version 1 with their controllers.
    v1: Vec<(PathBuf, Vec<String>)>,
    v2: Option<PathBuf>,
}

impl Hierarchies {
    /// Those of this host.
    pub(super) fn of_host() -> Result<Self, CgroupError> {
        let path = Path::new("/proc/mounts");
        let mounts = fs::read_to_string(path).map_err(error("read", path))?;
        Ok(Self::parse(&mounts))
    }

    /// From lines of /proc/mounts.
    fn parse(mounts: &str) -> Self {
        let mut all = Self::default();
        for line in mounts.lines() {
            let mut fields = line.split(' ').skip(1);
            let (Some(point), Some(kind), Some(options)) =
                (fields.next(), fields.next(), fields.next())
            else {
                continue;
            };
            match kind {
                "cgroup" => {
                    let controllers = options.split(',').map(str::to_owned).collect();
                    all.v1.push((point.into(), controllers));
                }
                "cgroup2" => all.v2 = all.v2.or(Some(point.into())),
                _ => {}
            }
        }
        all
    }

    fn v1(&self, controller: &str) -> Option<&Path> {
        let has = |controllers: &[String]| controllers.iter().any(|other| other == controller);
        let found = self.v1.iter().find(|(_, controllers)| has(controllers));
        found.map(|(point, _)| point.as_path())
    }
}

fn error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CgroupError {
    let path = path.to_owned();
    move |source| CgroupError::File { what, path, source }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    fs::write(path, text).map_err(error("write", path))
}

/// Makes the control group `parent`/`id` where a setting needs it, writes the settings, and moves this
/// process there. In version 2, without a setting, the process moves to `parent` if that was given.
pub(super) fn apply(
    hierarchies: &Hierarchies,
    version: CgroupVersion,
    (parent, parent_given, id): (&Path, bool, &str),
    settings: &[Setting],
) -> Result<(), CgroupError> {
    let normal = |part: Component<'_>| matches!(part, Component::Normal(_));
    let plain = parent.components().all(normal) && !parent.as_os_str().is_empty();
    if !plain || parent.as_os_str().to_string_lossy().contains("/./") {
        return Err(CgroupError::Parent {
            path: parent.to_owned(),
        });
    }
    let absent = |version, controller: &str| CgroupError::Absent {
        version,
        controller: controller.to_owned(),
    };
    let own = parent.join(id);
    let pid = std::process::id().to_string();
    match version {
        CgroupVersion::V1 => {
            let mut joined: Vec<PathBuf> = Vec::new();
            for setting in settings {
                let controller = setting.controller();
                let top = hierarchies.v1(controller);
                let top = top.ok_or_else(|| absent(1, controller))?;
                make_v1(top, &own, controller == "cpuset")?;
                write(&top.join(&own).join(&setting.file), &setting.value)?;
                joined.push(top.join(&own));
            }
            joined.dedup();
            joined
                .iter()
                .try_for_each(|dir| write(&dir.join("tasks"), &pid))
        }
        CgroupVersion::V2 if settings.is_empty() && !parent_given => Ok(()),
        CgroupVersion::V2 => {
            let top = hierarchies.v2.as_deref();
            let top =
                top.ok_or_else(|| absent(2, settings.first().map_or("", Setting::controller)))?;
            let dir = top.join(if settings.is_empty() { parent } else { &own });
            for setting in settings {
                let controller = setting.controller();
                let path = top.join("cgroup.controllers");
                let has = fs::read_to_string(&path).map_err(error("read", &path))?;
                if !has.split_ascii_whitespace().any(|one| one == controller) {
                    return Err(absent(2, controller));
                }
                make_v2(top, &own, controller)?;
                write(&dir.join(&setting.file), &setting.value)?;
            }
            write(&dir.join("cgroup.procs"), &pid)
        }
    }
}

/// Makes each step of `own`. A new group for processors starts out empty, so that no process could be
/// in it: it gets what its parent has.
fn make_v1(top: &Path, own: &Path, inherit: bool) -> Result<(), CgroupError> {
    let mut dir = top.to_owned();
    for name in own {
        let parent = dir.clone();
        dir.push(name);
        make_dir(&dir)?;
        for file in ["cpuset.cpus", "cpuset.mems"].iter().filter(|_| inherit) {
            let (from, to) = (parent.join(file), dir.join(file));
            let has = fs::read_to_string(&to).map_err(error("read", &to))?;
            if has.trim().is_empty() {
                let value = fs::read_to_string(&from).map_err(error("read", &from))?;
                write(&to, value.trim())?;
            }
        }
    }
    Ok(())
}

/// Makes each step of `own`, to which its parent leads `controller`.
fn make_v2(top: &Path, own: &Path, controller: &str) -> Result<(), CgroupError> {
    let mut dir = top.to_owned();
    for name in own {
        write(
            &dir.join("cgroup.subtree_control"),
            &format!("+{controller}"),
        )?;
        dir.push(name);
        make_dir(&dir)?;
    }
    Ok(())
}

fn make_dir(dir: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(dir) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(error("make the control group", dir)(source))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn setting(text: &str) -> Setting {
        text.parse().unwrap()
    }

    #[test]
    fn settings_name_a_file_of_a_controller() {
        let one = setting("cpuset.cpus=0-3");
        assert_eq!(one.controller(), "cpuset");
        assert_eq!(setting("memory.swap.max=1").controller(), "memory");
        for text in [
            "",
            "cpu",
            "cpu=1",
            "cpu.weight=",
            ".x=1",
            "a/../b.c=1",
            "=1",
        ] {
            assert!(text.parse::<Setting>().is_err(), "{text}");
        }
    }

    #[test]
    fn hierarchies_of_a_host() {
        let text = "tmpfs /sys/fs/cgroup tmpfs rw 0 0\n\
            cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,nosuid,cpu,cpuacct 0 0\n\
            cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\nnone\n";
        let all = Hierarchies::parse(text);
        let path = Some(Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!((all.v1("cpu"), all.v1("cpuacct")), (path, path));
        assert_eq!(all.v1("memory"), None);
        assert_eq!(all.v2.as_deref(), Some(Path::new("/sys/fs/cgroup/unified")));
    }

    #[test]
    fn a_group_below_its_parents_in_the_unified_hierarchy() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path();
        fs::write(top.join("cgroup.controllers"), "cpu memory\n").unwrap();
        let hierarchies = Hierarchies {
            v2: Some(top.to_owned()),
            ..Hierarchies::default()
        };
        let parent = Path::new("all/vms");
        let go = |settings: &[Setting]| {
            apply(
                &hierarchies,
                CgroupVersion::V2,
                (parent, true, "id"),
                settings,
            )
        };
        go(&[setting("memory.max=1G")]).unwrap();
        let read = |path: &str| fs::read_to_string(top.join(path)).unwrap();
        assert_eq!(read("all/vms/id/memory.max"), "1G");
        assert_eq!(read("all/vms/cgroup.subtree_control"), "+memory");
        assert_eq!(read("cgroup.subtree_control"), "+memory");
        assert_eq!(
            read("all/vms/id/cgroup.procs"),
            std::process::id().to_string()
        );
        go(&[]).unwrap();
        assert_eq!(read("all/vms/cgroup.procs"), std::process::id().to_string());
        let error = go(&[setting("io.max=1")]).unwrap_err();
        assert!(
            error.to_string().contains("version 2 with controller 'io'"),
            "{error}"
        );
        for path in ["..", "a/../b", "/a", ""] {
            let path = Path::new(path);
            let result = apply(&hierarchies, CgroupVersion::V2, (path, true, "id"), &[]);
            assert!(
                matches!(result, Err(CgroupError::Parent { .. })),
                "{path:?}"
            );
        }
    }

    #[test]
    fn a_group_for_processors_starts_with_those_of_its_parent() {
        let top = tempfile::tempdir().unwrap();
        let top = top.path();
        for (dir, cpus) in [("", "0-1\n"), ("vms", "\n"), ("vms/id", "\n")] {
            fs::create_dir_all(top.join(dir)).unwrap();
            for file in ["cpuset.cpus", "cpuset.mems"] {
                fs::write(top.join(dir).join(file), cpus).unwrap();
            }
        }
        let hierarchies = Hierarchies {
            v1: vec![(top.to_owned(), vec!["cpuset".into()])],
            v2: None,
        };
        let own = (Path::new("vms"), false, "id");
        apply(
            &hierarchies,
            CgroupVersion::V1,
            own,
            &[setting("cpuset.cpus=1")],
        )
        .unwrap();
        let read = |path: &str| fs::read_to_string(top.join(path)).unwrap();
        assert_eq!(read("vms/cpuset.cpus"), "0-1");
        assert_eq!(
            (read("vms/id/cpuset.cpus"), read("vms/id/cpuset.mems")),
            ("1".into(), "0-1".into())
        );
        assert_eq!(read("vms/id/tasks"), std::process::id().to_string());
    }
}
