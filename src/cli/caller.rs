//! What a command in the guest takes over from who starts it, where it has the same files.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

/// Variables that say where things are and how to write. Those that begin with `LC_` go with them.
const ESSENTIALS: [&str; 7] = ["PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "TZ"];
/// Directories that the guest has of its own, whatever the root.
const OWN: [&str; 4] = ["proc", "sys", "dev", "run"];

/// The caller's working directory as the guest sees it with `root` as its root. `None` where it is
/// not below that, or hidden by a directory of the guest's own.
pub fn cwd(root: &Path) -> Option<String> {
    inside(&env::current_dir().ok()?, &fs::canonicalize(root).ok()?)
}

fn inside(here: &Path, root: &Path) -> Option<String> {
    let rest = here.strip_prefix(root).ok()?;
    let hidden = OWN.iter().any(|own| rest.starts_with(own));
    let path = Path::new("/").join(rest);
    path.to_str().filter(|_| !hidden).map(str::to_owned)
}

/// The caller's environment as far as it is about the files of this machine: `KEY=VALUE` each,
/// and nothing with another root than `/`.
pub fn environment(root: &Path) -> Vec<String> {
    match fs::canonicalize(root) {
        Ok(root) if root == Path::new("/") => essentials(env::vars_os()),
        _ => Vec::new(),
    }
}

fn essentials(all: impl Iterator<Item = (OsString, OsString)>) -> Vec<String> {
    let text = all.filter_map(|(name, value)| {
        let (name, value) = (name.into_string().ok()?, value.into_string().ok()?);
        let wanted = ESSENTIALS.contains(&name.as_str()) || name.starts_with("LC_");
        wanted.then(|| format!("{name}={value}"))
    });
    text.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_working_directory_is_seen_from_the_root() {
        let inside = |here: &str, root: &str| inside(Path::new(here), Path::new(root));
        assert_eq!(inside("/home/me/src", "/").as_deref(), Some("/home/me/src"));
        assert_eq!(
            inside("/srv/tree/etc", "/srv/tree").as_deref(),
            Some("/etc")
        );
        assert_eq!(inside("/srv/tree", "/srv/tree").as_deref(), Some("/"));
        assert_eq!(inside("/srv/trees", "/srv/tree"), None);
        assert_eq!(inside("/run/user/1000", "/"), None);
        assert_eq!(inside("/running", "/").as_deref(), Some("/running"));
    }

    #[test]
    fn no_secrets_are_taken_over() {
        let all = [
            ("PATH", "/bin"),
            ("TOKEN", "x"),
            ("LC_ALL", "C"),
            ("PATHS", "y"),
        ];
        let all = all.map(|(name, value)| (name.into(), value.into()));
        assert_eq!(essentials(all.into_iter()), ["PATH=/bin", "LC_ALL=C"]);
    }
}
