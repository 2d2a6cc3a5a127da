//! Credentials without AWS: well-formed, the same for the same session at the same time, marked as fake in the key.

use std::hash::{Hash as _, Hasher};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use sha2::{Digest, Sha256};

use super::broker::{CredentialProvider, Provided, ProviderError};
use super::{Credentials, Secret, Session};
use crate::clock::Clock;

/// What every fake access key starts with: `ASIA` as temporary keys do, then what it is.
pub const KEY_PREFIX: &str = "ASIAFAKE";
/// The account of roles that are given by name when nothing else is known.
pub const ACCOUNT: &str = "000000000000";

/// Makes fakes.
#[derive(Clone, Debug)]
pub struct Offline {
    clock: Clock,
}

impl Offline {
    /// A provider on `clock`.
    pub fn new(clock: Clock) -> Self {
        Self { clock }
    }

    fn make(&self, session: &Session) -> Credentials {
        let updated = self.clock.wall();
        // STS says whole seconds.
        let updated = updated - Duration::from_nanos(u64::from(subsecond_nanos(updated)));
        let expiration = updated + session.duration();
        let digest = |part: &str| {
            let mut hash = Fingerprint(Sha256::new());
            (session, updated, part).hash(&mut hash);
            hash.0.finalize()
        };
        // Access keys are 20 characters of base32.
        let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let tail: String = digest("key")
            .iter()
            .take(12)
            .map(|b| char::from(letters[usize::from(b % 32)]))
            .collect();
        let mut secret = STANDARD.encode(digest("secret"));
        // Secret keys are 40 characters.
        secret.truncate(35);
        let token = format!(
            "FAKE-offline-credentials-of-imds-router//{}",
            STANDARD.encode(digest("token"))
        );
        Credentials {
            access_key_id: format!("{KEY_PREFIX}{tail}"),
            secret_access_key: Secret::new(format!("FAKE/{secret}")),
            token: Secret::new(token),
            updated,
            expiration,
            fake: true,
        }
    }
}

/// Everything that is hashed, the secret parts of a session among it, in one digest.
struct Fingerprint(Sha256);

impl Hasher for Fingerprint {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        let digest = self.0.clone().finalize();
        digest
            .iter()
            .take(8)
            .fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
}

fn subsecond_nanos(time: std::time::SystemTime) -> u32 {
    time.duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.subsec_nanos())
}

impl CredentialProvider for Offline {
    fn credentials(&self, session: &Session) -> Provided {
        let credentials = self.make(session);
        Box::pin(async move { Ok::<_, ProviderError>(credentials) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::credentials::{RoleArn, RoleSession};
    use std::time::UNIX_EPOCH;

    fn session(name: &str) -> Session {
        let role = RoleArn::parse(&format!("arn:aws:iam::000000000000:role/{name}")).unwrap();
        Session::Role(RoleSession::new(role, "s1", Duration::from_secs(3600), "us-east-1"))
    }

    #[tokio::test(start_paused = true)]
    async fn fakes_have_the_form_of_real_ones_and_say_what_they_are() {
        let wall = UNIX_EPOCH + Duration::from_millis(1_767_607_872_999);
        let offline = Offline::new(Clock::scripted(wall));
        let made = offline.credentials(&session("a")).await.unwrap();
        assert_eq!(made.access_key_id.len(), 20);
        assert!(made.access_key_id.starts_with("ASIAFAKE"));
        assert_eq!(made.secret_access_key.reveal().len(), 40);
        assert!(made.token.reveal().starts_with("FAKE"));
        assert!(made.fake);
        assert_eq!(made.expiration, UNIX_EPOCH + Duration::from_secs(1_767_607_872 + 3600));
        assert_eq!(made, offline.credentials(&session("a")).await.unwrap());
        assert_ne!(
            made.access_key_id,
            offline.credentials(&session("b")).await.unwrap().access_key_id
        );
    }
}
