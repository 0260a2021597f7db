//! Copies parameters between checkpoints and single safetensors files, the form that PyTorch users
//! have them in.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ice_checkpoint::{Checkpoint, Counts, Entry, Header, Layout, MODEL, Manifest, Section, Staging};
use serde_json::Value as Json;

pub(crate) fn export(checkpoint: &Path, file: &Path, optimizer: bool, node: Option<&str>) -> Result<bool> {
    let checkpoint = Checkpoint::open(checkpoint)?;
    let prefix = node.map(|node| format!("{node}."));
    let mut entries = Vec::new();
    let mut sources = Vec::new();
    for section in Section::ALL.into_iter().take(if optimizer { 2 } else { 1 }) {
        for (key, saved) in checkpoint.catalog().section(section) {
            let short = match &prefix {
                None => Some(key.as_str()),
                Some(prefix) => key.strip_prefix(prefix.as_str()),
            };
            let Some(short) = short else { continue };
            entries.push(Entry {
                key: short.into(),
                dtype: saved.dtype,
                shape: saved.shape.clone(),
                part: None,
            });
            sources.push((section, key));
        }
    }
    if entries.is_empty() {
        let of = node.map(|node| format!(" of node `{node}`")).unwrap_or_default();
        bail!("{}: has no tensors{of}; `ice-ckpt inspect --keys` lists them", checkpoint.path().display());
    }
    let layout = Layout::new(&entries).map_err(anyhow::Error::msg)?;
    let context = || file.display().to_string();
    let mut out = BufWriter::new(File::create_new(file).with_context(context)?);
    let mut write = || {
        out.write_all(layout.header()).with_context(context)?;
        for placed in layout.placed() {
            let (section, key) = sources[placed.index];
            out.write_all(&checkpoint.tensor(section, key)?).with_context(context)?;
        }
        out.flush().and_then(|()| out.get_ref().sync_all()).with_context(context)
    };
    write().inspect_err(|_| {
        // Half a file would look like a whole one.
        let _ = fs::remove_file(file);
    })?;
    println!("{}: {} tensors, {} bytes", file.display(), entries.len(), layout.data_len());
    Ok(true)
}

pub(crate) fn import(file: &Path, checkpoint: &Path, node: Option<&str>) -> Result<bool> {
    if checkpoint.exists() {
        bail!("{}: is there already", checkpoint.display());
    }
    let context = || file.display().to_string();
    let source = File::open(file).with_context(context)?;
    let len = source.metadata().with_context(context)?.len();
    let mut reader = BufReader::new(&source);
    let header = Header::read(reader.by_ref(), len).map_err(anyhow::Error::msg).with_context(context)?;
    let prefix = node.map(|node| format!("{node}.")).unwrap_or_default();
    let entries: Vec<_> = header
        .tensors
        .iter()
        .map(|stored| Entry {
            key: format!("{prefix}{}", stored.entry.key),
            part: None,
            ..stored.entry.clone()
        })
        .collect();
    let layout = Layout::new(&entries).map_err(anyhow::Error::msg).with_context(context)?;
    let mut data = vec![0; layout.data_len()];
    for placed in layout.placed() {
        let to = &mut data[placed.offset..placed.offset + placed.len];
        source
            .read_exact_at(to, header.data_start + header.tensors[placed.index].offset)
            .with_context(context)?;
    }
    let staging = Staging::begin(checkpoint, &format!("import{}", std::process::id()))?;
    let write = || {
        let info = staging.write(MODEL, &[layout.header(), &data])?;
        let mut manifest = Manifest::new("imported", 1, 0, Counts::default(), Json::Null);
        // No run can resume from a checkpoint with tags. This one has neither tasks nor positions.
        manifest.tags = Some(node.unwrap_or("imported").into());
        manifest.files = BTreeMap::from([(MODEL.to_owned(), info)]);
        staging.clone().commit(&manifest)
    };
    write().inspect_err(|_| staging.clone().abandon())?;
    println!("{}: {} tensors, {} bytes", checkpoint.display(), entries.len(), layout.data_len());
    Ok(true)
}
