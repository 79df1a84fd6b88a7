//! The document that `--metadata` names.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use devices::mmds::Mmds;

/// Most bytes of the file, spaces included.
const MAX_FILE: u64 = 16 << 20;

/// The metadata service's document, read from `path` if there is one; it may have `limit` bytes.
pub fn read(path: Option<&Path>, limit: usize) -> Result<Arc<Mmds>> {
    let mmds = Arc::new(Mmds::new(limit));
    if let Some(path) = path {
        let file = path.display();
        let mut text = String::new();
        let length = File::open(path)
            .and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text))
            .with_context(|| format!("Cannot read the metadata {file}"))?;
        if length as u64 > MAX_FILE {
            bail!("The metadata {file} have more than {MAX_FILE} bytes: give less");
        }
        let document = serde_json::from_str(&text)
            .with_context(|| format!("The metadata {file} are not JSON"))?;
        let put = mmds.put(document);
        put.with_context(|| format!("Cannot serve the metadata {file}"))?;
    }
    Ok(mmds)
}
