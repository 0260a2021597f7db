//! The agent's end of a rank's link.

use ice_proto::frame::Decoder;
use ice_proto::link::FromRank;
use tokio::io::AsyncReadExt;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;

use super::{ProcessId, RankEvent};

/// Forwards the messages of a rank as events. The link stays open until the rank closes it or this
/// task is aborted. A rank whose link is closed leaves, since its agent is gone.
pub(super) async fn listen(
    process: ProcessId,
    mut stream: OwnedReadHalf,
    events: mpsc::UnboundedSender<RankEvent>,
) {
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        decoder.feed(&buffer[..read]);
        loop {
            match decoder.next_message::<FromRank>() {
                Ok(Some(message)) => {
                    if events.send(RankEvent::Said(process, message)).is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(process, %error, "what the rank says cannot be understood: not listening any more");
                    // The link stays open: the rank would take its end for the end of the agent.
                    return std::future::pending().await;
                }
            }
        }
    }
}
