//! `--share`: a directory of the host in the guest, written as others write bind mounts.

use crate::config::{Share, parse_list};

/// `HOST:GUEST`, with options behind another colon, or a list of keys and values.
pub fn parse_share(text: &str) -> Result<Share, String> {
    let list = |list: &str| parse_list::<Share>(list).map_err(|error| error.to_string());
    if ["path=", "tag="].iter().any(|key| text.starts_with(key)) {
        return list(text);
    }
    let usage = || "write HOST:GUEST, HOST:GUEST:ro or path=DIR,tag=NAME".to_owned();
    let (host, rest) = text.split_once(':').ok_or_else(usage)?;
    let (guest, options) = rest.split_once(':').unwrap_or((rest, "rw"));
    if host.is_empty() || guest.is_empty() {
        return Err(usage());
    }
    let value = |text: &str| text.replace(',', ",,");
    let places = format!("path={},mount={}", value(host), value(guest));
    match options.strip_prefix("rw,").unwrap_or(options) {
        "rw" => list(&places),
        options => list(&format!("{places},{options}")),
    }
}

#[cfg(test)]
mod tests {
    use crate::config::ShareCache;

    use super::*;

    #[test]
    fn shares_are_written_as_bind_mounts() {
        let share = |path: &str, mount: &str| Share {
            path_on_host: path.into(),
            mount_point: Some(mount.to_owned()),
            ..Share::default()
        };
        assert_eq!(parse_share("a,b:/x"), Ok(share("a,b", "/x")));
        assert_eq!(parse_share("/a:/x:rw"), Ok(share("/a", "/x")));
        let read_only = Share {
            is_read_only: true,
            ..share("/a", "/x")
        };
        assert_eq!(parse_share("/a:/x:ro"), Ok(read_only.clone()));
        let cached = Share {
            cache_type: ShareCache::Always,
            ..read_only
        };
        assert_eq!(parse_share("/a:/x:ro,cache=always"), Ok(cached));
        let unmounted = Share {
            tag: "t".to_owned(),
            mount_point: None,
            ..share("/a:b", "")
        };
        assert_eq!(parse_share("path=/a:b,tag=t"), Ok(unmounted));
        for (bad, words) in [
            ("/a", "HOST:GUEST"),
            (":/x", "HOST:GUEST"),
            ("/a:", "HOST:GUEST"),
            ("/a:/x:readonly", "unknown field `readonly`"),
            ("/a:/x:cache=fast", "fast"),
        ] {
            let error = parse_share(bad).unwrap_err();
            assert!(error.contains(words), "{bad}: {error} lacks {words}");
        }
    }
}
