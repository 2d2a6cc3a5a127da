//! How a connection is closed: a client that has sent more than was read still gets its answer.
//!
//! Linux answers `close(2)` with a reset if input is unread, and the reset can overtake the answer or delete it at the client
//! (RFC 9112, 9.6).

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::time::timeout;

/// How long input is discarded.
const LINGER: Duration = Duration::from_secs(1);
/// How many bytes are discarded.
const LINGER_BYTES: u64 = 64 * 1024;

/// Sends the end of the stream. Then it discards input until the client closes, too, but no longer than [`LINGER`] and no more
/// than [`LINGER_BYTES`].
pub(super) async fn close<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) {
    let closing = async {
        stream.shutdown().await?;
        discard(stream.take(LINGER_BYTES)).await
    };
    // Whether the client is gone or does not close: the connection ends.
    let _ = timeout(LINGER, closing).await;
}

/// Discards input until its end.
///
/// # Errors
/// When the connection is broken.
pub(super) async fn discard<S: AsyncRead + Unpin>(mut stream: S) -> std::io::Result<()> {
    let mut bytes = [0; 2048];
    while stream.read(&mut bytes).await? > 0 {}
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;
    use tokio::time::Instant;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn ends_with_the_client() {
        let (ours, mut theirs) = duplex(1024);
        let closing = tokio::spawn(close(ours));
        theirs.write_all(&[1; 3000]).await.unwrap();
        let mut rest = Vec::new();
        assert_eq!(theirs.read_to_end(&mut rest).await.unwrap(), 0);
        assert!(!closing.is_finished());
        let started = Instant::now();
        drop(theirs);
        closing.await.unwrap();
        assert!(started.elapsed() < LINGER);
    }

    #[tokio::test(start_paused = true)]
    async fn ends_after_a_second_and_after_64_kib() {
        let started = Instant::now();
        let (ours, _theirs) = duplex(1024);
        close(ours).await;
        assert_eq!(started.elapsed(), LINGER);

        let started = Instant::now();
        let (ours, mut theirs) = duplex(128 * 1024);
        theirs.write_all(&[1; 100 * 1024]).await.unwrap();
        close(ours).await;
        assert!(started.elapsed() < LINGER);
    }
}
