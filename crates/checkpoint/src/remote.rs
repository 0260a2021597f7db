//! Checkpoints in object stores: uploaded from disk, downloaded to disk.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use futures_util::TryStreamExt;
use object_store::path::Path as Key;
use object_store::{ObjectStore, WriteMultipart};
use tokio::runtime::{Builder, Runtime};
use url::Url;

use crate::{Checkpoint, Error, MANIFEST, Manifest, Result, Staging};

/// Size of an upload's part, in bytes. S3 accepts no smaller parts except the last.
const PART: usize = 8 << 20;
/// Number of parts in flight.
const AT_ONCE: usize = 4;

/// A folder of checkpoints in an object store. The manifest is uploaded last: a checkpoint exists
/// once its manifest does.
pub struct Remote {
    address: String,
    store: Arc<dyn ObjectStore>,
    folder: Key,
    runtime: Runtime,
}

impl Remote {
    /// Opens the folder at an address: `s3://bucket/folder`, `gs://…`, `az://…`, `file:///folder`.
    /// Credentials come from the environment variables of the store's own tools.
    ///
    /// # Errors
    /// [`Error::Remote`] if the address is invalid, or the program was built without this kind of
    /// store.
    pub fn open(address: &str) -> Result<Self> {
        let fail = |problem: String| Error::Remote { address: address.into(), problem };
        let url = Url::parse(address).map_err(|error| fail(error.to_string()))?;
        let variables = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
        let (store, folder) =
            object_store::parse_url_opts(&url, variables).map_err(|error| fail(error.to_string()))?;
        Self::new(address, store.into(), folder)
    }

    /// Opens a folder of a store. `address` names it in messages.
    ///
    /// # Errors
    /// [`Error::Remote`] if the runtime cannot be created.
    pub fn new(address: &str, store: Arc<dyn ObjectStore>, folder: Key) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime =
            runtime.map_err(|error| Error::Remote { address: address.into(), problem: error.to_string() })?;
        Ok(Self { address: address.into(), store, folder, runtime })
    }

    /// Uploads a checkpoint, its manifest last.
    ///
    /// # Errors
    /// [`Error::Remote`] if an object cannot be uploaded.
    pub fn upload(&self, checkpoint: &Path) -> Result<()> {
        let manifest = Manifest::read(checkpoint)?;
        // Checkpoints of several runs of a program have the same names, so the number of the run is
        // added.
        let name = crate::folder_of_run(checkpoint, manifest.run);
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.runtime.block_on(async {
            // The manifest of a replaced checkpoint is deleted first: the old manifest must not
            // make the unfinished upload look complete.
            let last = self.key(&name, MANIFEST);
            match self.store.delete(&last).await {
                Ok(()) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(self.fail(&last, error)),
            }
            for file in manifest.files.keys().map(String::as_str).chain([MANIFEST]) {
                self.send(&checkpoint.join(file), &self.key(&name, file)).await?;
            }
            Ok(())
        })
    }

    async fn send(&self, file: &Path, key: &Key) -> Result<()> {
        let mut reader = File::open(file).map_err(Error::io(file))?;
        let upload = self.store.put_multipart(key).await.map_err(|error| self.fail(key, error))?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART);
        let mut buffer = vec![0; PART];
        loop {
            let read = reader.read(&mut buffer).map_err(Error::io(file))?;
            if read == 0 {
                break;
            }
            upload.wait_for_capacity(AT_ONCE).await.map_err(|error| self.fail(key, error))?;
            upload.write(&buffer[..read]);
        }
        upload.finish().await.map(|_| ()).map_err(|error| self.fail(key, error))
    }

    /// Returns the checkpoints in the folder, the oldest first. A checkpoint without a manifest is
    /// still being uploaded, and is ignored.
    ///
    /// # Errors
    /// [`Error::Remote`] if the folder cannot be listed. A damaged manifest is reported and
    /// skipped.
    pub fn list(&self) -> Result<Vec<(String, Manifest)>> {
        self.runtime.block_on(async {
            let folder = &self.folder;
            let found = self.store.list_with_delimiter(Some(folder)).await;
            let found = found.map_err(|error| self.fail(folder, error))?;
            let mut checkpoints = Vec::new();
            for prefix in found.common_prefixes {
                let Some(name) = prefix.filename().map(str::to_owned) else { continue };
                let key = self.key(&name, MANIFEST);
                let bytes = match self.store.get(&key).await {
                    Ok(object) => object.bytes().await,
                    Err(object_store::Error::NotFound { .. }) => continue,
                    Err(error) => Err(error),
                };
                match Manifest::parse(&bytes.map_err(|error| self.fail(&key, error))?) {
                    Ok(manifest) => checkpoints.push((name, manifest)),
                    Err(problem) => tracing::warn!("skipping {}/{key}: {problem}", self.address),
                }
            }
            checkpoints.sort_by_key(|(name, manifest)| {
                (manifest.saved_unix_ms, manifest.counters.train_steps, name.clone())
            });
            Ok(checkpoints)
        })
    }

    /// Downloads a checkpoint into a folder and verifies it. An intact local copy is not downloaded
    /// again.
    ///
    /// # Errors
    /// [`Error::Remote`] if an object cannot be downloaded, [`Error::Checkpoint`] if it is damaged.
    pub fn download(&self, name: &str, manifest: &Manifest, into: &Path) -> Result<Checkpoint> {
        let folder = into.join(name);
        if let Ok(there) = Checkpoint::open(&folder)
            && there.manifest().files == manifest.files
            && there.manifest().saved_unix_ms == manifest.saved_unix_ms
        {
            return Ok(there);
        }
        let staging = Staging::begin(&folder, "download")?;
        let fetch = async {
            for (file, info) in &manifest.files {
                let key = self.key(name, file);
                let path = staging.path(file)?;
                let object = self.store.get(&key).await.map_err(|error| self.fail(&key, error))?;
                let mut out = File::create(&path).map_err(Error::io(&path))?;
                let mut parts = object.into_stream();
                while let Some(part) = parts.try_next().await.map_err(|error| self.fail(&key, error))? {
                    out.write_all(&part).map_err(Error::io(&path))?;
                }
                out.sync_all().map_err(Error::io(&path))?;
                crate::verify_file(&path, info)?;
            }
            Ok(())
        };
        let outcome = self.runtime.block_on(fetch).and_then(|()| staging.clone().commit(manifest));
        if let Err(error) = outcome {
            staging.abandon();
            return Err(error);
        }
        Checkpoint::open(&folder)
    }

    /// Downloads the newest valid checkpoint of a whole graph. Damaged checkpoints are reported and
    /// skipped.
    ///
    /// # Errors
    /// [`Error::Remote`] if the store fails.
    pub fn newest(&self, into: &Path) -> Result<Option<Checkpoint>> {
        fs::create_dir_all(into).map_err(Error::io(into))?;
        for (name, manifest) in self.list()?.into_iter().rev().filter(|(_, manifest)| manifest.tags.is_none())
        {
            match self.download(&name, &manifest, into) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error @ Error::Checkpoint { .. }) => {
                    tracing::warn!("skipping {}/{name}: {error}", self.address)
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    fn key(&self, checkpoint: &str, file: &str) -> Key {
        self.folder.child(checkpoint).child(file)
    }

    fn fail(&self, key: &Key, error: impl ToString) -> Error {
        Error::Remote { address: format!("{} ({key})", self.address), problem: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use object_store::PutPayload;
    use object_store::memory::InMemory;

    use super::*;
    use crate::{Counts, Entry, Layout, MODEL, ResumeFrom};

    fn save(folder: &Path, step: u64) {
        let entry =
            Entry { key: "w".into(), dtype: safetensors::Dtype::U8, shape: vec![20_000_000], part: None };
        let layout = Layout::new(&[entry]).unwrap();
        let staging = Staging::begin(folder, "test").unwrap();
        let data = vec![step as u8; layout.data_len()];
        let info = staging.write(MODEL, &[layout.header(), &data]).unwrap();
        let mut manifest =
            Manifest::new("job", 1, 0, Counts { train_steps: step, ..Counts::default() }, ().into());
        manifest.saved_unix_ms = step;
        manifest.files = BTreeMap::from([(MODEL.to_owned(), info)]);
        staging.commit(&manifest).unwrap();
    }

    #[test]
    fn the_newest_whole_checkpoint_comes_back() {
        let out = tempfile::tempdir().unwrap();
        let store = Arc::new(InMemory::new());
        let remote = Remote::new("memory://", Arc::clone(&store) as _, "runs/a".into()).unwrap();
        assert!(remote.newest(&out.path().join("empty")).unwrap().is_none());
        for step in 1..=4 {
            let folder = out.path().join(format!("E0S{step}"));
            save(&folder, step);
            remote.upload(&folder).unwrap();
        }
        let damage = |name: &str, file: &str, bytes: Option<&'static [u8]>| {
            let key = Key::from(format!("runs/a/{name}/{file}"));
            remote.runtime.block_on(async {
                match bytes {
                    Some(bytes) => drop(store.put(&key, PutPayload::from_static(bytes)).await.unwrap()),
                    None => store.delete(&key).await.unwrap(),
                }
            });
        };
        let newest = |into: &str| {
            let found = remote.newest(&out.path().join(into)).unwrap().unwrap();
            assert_eq!(found.tensor(crate::Section::Model, "w").unwrap().len(), 20_000_000);
            found.manifest().counters.train_steps
        };
        assert_eq!(newest("a"), 4);
        assert_eq!(newest("a"), 4, "again, from the disk");
        // An interrupted upload.
        damage("E0S4", MANIFEST, None);
        assert_eq!(newest("b"), 3);
        damage("E0S3", MODEL, Some(b"something else"));
        assert_eq!(newest("c"), 2);
        damage("E0S2", MANIFEST, Some(b"{}"));
        assert_eq!(newest("d"), 1);
    }

    #[test]
    fn a_folder_is_a_store_too() {
        let out = tempfile::tempdir().unwrap();
        let depot = out.path().join("depot");
        fs::create_dir(&depot).unwrap();
        let address = format!("file://{}", depot.display());
        save(&out.path().join("E0S7"), 7);
        crate::upload(&out.path().join("E0S7"), &address).unwrap();
        let from = ResumeFrom::Path(address.into());
        let found = Checkpoint::find(&from, &out.path().join("out"), "job").unwrap();
        assert_eq!(found.manifest().counters.train_steps, 7);
        assert!(found.path().starts_with(out.path().join("out/downloads")));
        let message = Remote::open("nothing://x").err().unwrap().to_string();
        assert!(message.contains("nothing://x"), "{message}");
    }
}
