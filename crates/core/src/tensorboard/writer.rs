use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};

use super::messages::Event;
use super::records::frame;

const PREFIX: &str = "events.out.tfevents.";

/// A thread that writes to a file, so that no step waits for the disk. Whenever its queue is empty,
/// it flushes to the operating system. If the process is killed, only the events since the last
/// flush are lost.
pub(super) struct Writer {
    events: Option<Sender<Event>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    /// Creates a file in the folder, with a name that sorts after those of existing files.
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        fs::create_dir_all(folder)?;
        let newest = fs::read_dir(folder)?
            .filter_map(|entry| started(&entry.ok()?.file_name().to_string_lossy()))
            .max();
        let now = super::seconds() as u64;
        // Readers sort files by name, and a restart may take less than a second.
        let time = newest.map_or(now, |newest| now.max(newest + 1));
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let host = super::clean(host.trim()).replace('/', "_");
        let path = folder.join(format!("{PREFIX}{time:010}.{host}.{}.0", std::process::id()));
        let file = File::create_new(&path)?;
        let (events, written) = channel();
        let write = move || {
            if let Err(error) = write_all(&written, BufWriter::new(file)) {
                tracing::warn!("{}: {error}: no more TensorBoard events are written", path.display());
            }
        };
        let thread = thread::Builder::new().name("ice-board".into()).spawn(write)?;
        Ok(Self { events: Some(events), thread: Some(thread) })
    }

    pub(super) fn write(&self, event: Event) {
        if let Some(events) = &self.events {
            // If the thread is gone, it has already reported why.
            let _ = events.send(event);
        }
    }
}

impl Drop for Writer {
    /// Waits until everything is written.
    fn drop(&mut self) {
        self.events = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Returns the start time in the name of an event file.
fn started(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.split('.').next()?.parse().ok()
}

fn write_all(events: &Receiver<Event>, mut file: impl Write) -> io::Result<()> {
    loop {
        let event = match events.try_recv() {
            Ok(event) => event,
            Err(TryRecvError::Disconnected) => break,
            Err(TryRecvError::Empty) => {
                file.flush()?;
                let Ok(event) = events.recv() else { break };
                event
            }
        };
        // One write per record, so that a killed process most likely leaves only whole records.
        file.write_all(&frame(&event.encoded()))?;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::super::messages::Content;
    use super::*;

    #[test]
    fn each_file_comes_after_those_that_are_there() {
        let folder = tempfile::tempdir().unwrap();
        for _ in 0..3 {
            Writer::open(folder.path()).unwrap();
        }
        let mut names: Vec<_> =
            fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let times: Vec<_> = names.iter().map(|name| started(&name.to_string_lossy()).unwrap()).collect();
        assert!(times.len() == 3 && times[0] < times[1] && times[1] < times[2], "{times:?}");
    }

    #[test]
    fn a_disk_that_fails_ends_the_thread_and_holds_nobody_up() {
        struct Full;
        impl Write for Full {
            fn write(&mut self, _: &[u8]) -> io::Result<usize> {
                Err(io::ErrorKind::StorageFull.into())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let (sender, receiver) = channel();
        sender.send(Event { wall_time: 0.0, step: 0, content: Content::Version }).unwrap();
        assert_eq!(write_all(&receiver, Full).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
