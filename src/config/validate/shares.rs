//! Shared directories: tags and mount points.

use crate::config::{Config, Share};

/// A share that no machine can have.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShareError {
    /// A tag that cannot be one.
    #[error(
        "tag '{}' of a share cannot be used: give 1 to {} letters, digits, '.', '-' and '_'",
        tag.escape_debug(), Share::MAX_TAG
    )]
    Tag {
        /// As given.
        tag: String,
    },
    /// Two shares of one tag.
    #[error("two shares have the tag '{tag}': give each its own")]
    Tags {
        /// The tag.
        tag: String,
    },
    /// A mount point that cannot be one.
    #[error(
        "share '{tag}' cannot be mounted on '{}': give an absolute path in the guest of at most {} \
         bytes, without '..' and control characters",
        path.escape_debug(), Share::MAX_MOUNT_POINT
    )]
    MountPoint {
        /// The share.
        tag: String,
        /// As given.
        path: String,
    },
    /// A mount point where the guest has something of its own.
    #[error("share '{tag}' cannot be mounted on '{path}': {place} is the guest's own")]
    Taken {
        /// The share.
        tag: String,
        /// As given.
        path: String,
        /// What is there.
        place: &'static str,
    },
    /// Two shares in one place.
    #[error(
        "shares '{first}' and '{second}' are both mounted on '{path}': give each its own place"
    )]
    MountPoints {
        /// One of them.
        first: String,
        /// The other.
        second: String,
        /// The place.
        path: String,
    },
    /// Nobody would mount it.
    #[error(
        "share '{tag}' is to be mounted on '{path}', but this guest has no agent to do it: run a \
         command, or leave out the mount point (on the command line: --share path=DIR,tag=NAME) \
         and mount it in the guest"
    )]
    NoAgent {
        /// The share.
        tag: String,
        /// Where.
        path: String,
    },
    /// The root is to be a share, and none is, or the other way round.
    #[error(
        "the guest's root and the share that is mounted on '/' go together: set both (on the \
         command line, --root DIR does), or neither"
    )]
    Root,
}

/// What the agent mounts itself, whatever the root is.
const OWN: [&str; 4] = ["/proc", "/sys", "/dev", "/.bulle"];

pub(super) fn validate(config: &Config) -> Result<(), ShareError> {
    let has_root = config.root_share().is_some();
    if has_root
        != config
            .guest
            .as_ref()
            .is_some_and(|guest| guest.root == crate::config::Root::Share)
    {
        return Err(ShareError::Root);
    }
    let shares = &config.shares;
    for (index, share) in shares.iter().enumerate() {
        let tag = || share.tag.clone();
        let allowed = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let length = share.tag.len();
        if length == 0 || length > Share::MAX_TAG || !share.tag.chars().all(allowed) {
            return Err(ShareError::Tag { tag: tag() });
        }
        let mut earlier = shares.iter().take(index);
        if earlier.any(|other| other.tag == share.tag) {
            return Err(ShareError::Tags { tag: tag() });
        }
        let Some(path) = &share.mount_point else {
            continue;
        };
        mount_point(share, path)?;
        let same = |other: &&Share| {
            let other = other.mount_point.as_deref();
            other.is_some_and(|other| parts(other).eq(parts(path)))
        };
        if let Some(other) = shares.iter().take(index).find(same) {
            let (first, second, path) = (other.tag.clone(), tag(), path.clone());
            return Err(ShareError::MountPoints {
                first,
                second,
                path,
            });
        }
        if config.guest.is_none() {
            let (tag, path) = (tag(), path.clone());
            return Err(ShareError::NoAgent { tag, path });
        }
    }
    Ok(())
}

fn mount_point(share: &Share, path: &str) -> Result<(), ShareError> {
    let (tag, owned) = (share.tag.clone(), path.to_owned());
    let possible = path.starts_with('/')
        && path.len() <= Share::MAX_MOUNT_POINT
        && !path.chars().any(char::is_control)
        && !parts(path).any(|part| part == "..");
    if !possible {
        return Err(ShareError::MountPoint { tag, path: owned });
    }
    let below = |place: &&&str| parts(path).next() == parts(place).next() && !share.is_root();
    match OWN.iter().find(below) {
        Some(place) => Err(ShareError::Taken {
            tag,
            path: owned,
            place,
        }),
        None => Ok(()),
    }
}

/// The names in a path.
fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !matches!(*part, "" | "."))
}

#[cfg(test)]
mod tests {
    use crate::config::{Config, Root};

    use super::*;

    fn config(shares: &[(&str, &str)]) -> Config {
        let text = r#"{"boot-source":{"kernel_image_path":"/k"},"guest":{}}"#;
        let mut config: Config = serde_json::from_str(text).unwrap();
        config.shares = shares
            .iter()
            .map(|(tag, path)| Share {
                tag: (*tag).to_owned(),
                mount_point: Some((*path).to_owned()).filter(|path| !path.is_empty()),
                ..Share::default()
            })
            .collect();
        config
    }

    #[test]
    fn shares_have_their_own_tags_and_places() {
        let good = [
            ("a", "/a"),
            ("b", "/a/b"),
            ("c", ""),
            ("d", "/tmp/x y"),
            ("e", "/device"),
        ];
        assert_eq!(validate(&config(&good)), Ok(()));
        let says = |shares: &[(&str, &str)], words: &str| {
            let text = validate(&config(shares)).unwrap_err().to_string();
            assert!(text.contains(words), "{text} lacks {words}");
        };
        says(&[("", "/a")], "tag ''");
        says(&[("a b", "/a")], "tag 'a b'");
        says(&[(&"a".repeat(37), "/a")], "1 to 36");
        says(&[("a", "/a"), ("a", "/b")], "two shares have the tag 'a'");
        says(
            &[("a", "/x/"), ("b", "/./x")],
            "'a' and 'b' are both mounted",
        );
        says(&[("a", "relative")], "absolute");
        says(&[("a", "/a/../b")], "'..'");
        says(&[("a", "/a\nb")], "control");
        says(&[("a", &format!("/{}", "x".repeat(255)))], "255");
        says(&[("a", "/dev/x")], "/dev is the guest's own");
        says(&[("a", "/proc")], "/proc is the guest's own");
        says(&[("a", "/")], "go together");
    }

    #[test]
    fn a_root_and_a_share_on_it_go_together() {
        let mut root = config(&[("a", "/")]);
        root.guest.as_mut().unwrap().root = Root::Share;
        assert_eq!(validate(&root), Ok(()));
        root.shares.clear();
        assert_eq!(validate(&root), Err(ShareError::Root));
    }

    #[test]
    fn without_an_agent_the_guest_mounts_by_itself() {
        let mut alone = config(&[("a", "")]);
        alone.guest = None;
        assert_eq!(validate(&alone), Ok(()));
        alone.shares[0].mount_point = Some("/a".into());
        let text = validate(&alone).unwrap_err().to_string();
        assert!(text.contains("no agent"), "{text}");
    }
}
