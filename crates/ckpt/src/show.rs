//! Prints checkpoints: lists of them, manifests, tensors and damage.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use ice_checkpoint::{
    BEST, CHECKPOINTS, Candidate, Catalog, Checkpoint, MANIFEST, Manifest, Section, candidates,
};
use serde_json::json;

/// Returns the checkpoints below a folder, the newest last. The folder holds checkpoints, or is a
/// run's, or holds the folders of runs.
fn below(dir: &Path) -> Vec<Candidate> {
    let mut holders = vec![dir.to_owned(), dir.join(CHECKPOINTS), dir.join(BEST)];
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        holders.extend([CHECKPOINTS, BEST].map(|name| entry.path().join(name)));
    }
    let mut found: Vec<_> = holders.iter().flat_map(|holder| candidates(holder)).collect();
    found.sort_by_key(|candidate| {
        let saved = candidate.manifest.as_ref().map(|manifest| manifest.saved_unix_ms);
        (saved.unwrap_or(0), candidate.path.clone())
    });
    found
}

fn bytes(manifest: &Manifest) -> u64 {
    manifest.files.values().map(|file| file.bytes).sum()
}

pub(crate) fn list(dir: &Path, json: bool) -> Result<bool> {
    let found = below(dir);
    if found.is_empty() {
        bail!("{}: no checkpoints there", dir.display());
    }
    if !json {
        println!("{:>9} {:>7} {:>6} {:>10}  {:<24} path", "step", "epoch", "ranks", "MB", "run");
    }
    for Candidate { path, manifest } in found {
        match (manifest, json) {
            (Ok(manifest), true) => {
                let line = json!({
                    "path": path, "run_id": manifest.run_id, "train_steps": manifest.counters.train_steps,
                    "train_epochs": manifest.counters.train_epochs, "world_size": manifest.world_size,
                    "saved_unix_ms": manifest.saved_unix_ms, "bytes": bytes(&manifest), "tags": manifest.tags,
                    "best": manifest.best, "measures": manifest.measures,
                });
                println!("{line}");
            }
            (Ok(manifest), false) => {
                let best = manifest.best.as_ref().map(|best| format!("  {} {}", best.measure, best.value));
                println!(
                    "{:>9} {:>7} {:>6} {:>10.1}  {:<24} {}{}",
                    manifest.counters.train_steps,
                    manifest.counters.train_epochs,
                    manifest.world_size,
                    bytes(&manifest) as f64 / 1e6,
                    manifest.run_id,
                    path.display(),
                    best.unwrap_or_default()
                );
            }
            (Err(error), true) => println!("{}", json!({ "path": path, "error": error.to_string() })),
            (Err(error), false) => println!("{:>9}  {error}", "damaged"),
        }
    }
    Ok(true)
}

pub(crate) fn inspect(path: &Path, keys: bool, json: bool) -> Result<bool> {
    let manifest = Manifest::read(path)?;
    let catalog = if keys { Some(Checkpoint::headers(path, &manifest)?) } else { None };
    if json {
        let mut all = serde_json::to_value(&manifest)?;
        if let Some(catalog) = &catalog {
            all["tensors"] = serde_json::to_value(catalog)?;
        }
        println!("{}", serde_json::to_string_pretty(&all)?);
        return Ok(true);
    }
    let counts = manifest.counters;
    println!("run         {}, {} ranks, seed {}", manifest.run_id, manifest.world_size, manifest.seed);
    println!("training    {} steps, {} epochs", counts.train_steps, counts.train_epochs);
    println!("evaluation  {} steps, {} epochs", counts.eval_steps, counts.eval_epochs);
    if let Some(tags) = &manifest.tags {
        println!("nodes       those tagged `{tags}` alone");
    }
    for (uid, value) in &manifest.measures {
        println!("measured    {uid} {value}");
    }
    if let Some(best) = &manifest.best {
        println!("kept for    {} {}", best.measure, best.value);
    }
    for (name, file) in &manifest.files {
        println!("file        {name}  {} bytes, crc32c {:08x}", file.bytes, file.crc32c);
    }
    if let Some(catalog) = catalog {
        print_keys(&catalog);
    }
    Ok(true)
}

fn print_keys(catalog: &Catalog) {
    for (section, name) in Section::ALL.into_iter().zip(["model", "optimizer"]) {
        for (key, saved) in catalog.section(section) {
            let pieces = if saved.extents.len() > 1 {
                format!(" in {} pieces", saved.extents.len())
            } else {
                String::new()
            };
            println!("{name:<11} {key}  {:?} {:?}{pieces}", saved.dtype, saved.shape);
        }
    }
}

pub(crate) fn verify(paths: &[PathBuf]) -> Result<bool> {
    let mut whole = true;
    for path in paths {
        if !path.join(MANIFEST).exists() && !path.is_dir() {
            bail!("{}: no such folder", path.display());
        }
        let damage = Checkpoint::damage(path);
        if damage.is_empty() {
            println!("{}: whole", path.display());
        }
        for error in &damage {
            println!("{}: DAMAGED: {error}", path.display());
        }
        whole &= damage.is_empty();
    }
    Ok(whole)
}
