//! IMDSv2 session tokens: stateless, good for one life of one container, good over a restart of the daemon.
//!
//! A token is 40 bytes in URL-safe base64, 56 characters, as EC2's are: the end of its life in boot time and an HMAC over
//! that, the boot and the life. Whoever holds the key can make tokens, nobody else can, and one container's token says
//! nothing in another or after a restart of its own.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::clock::Clock;
use crate::containers::{CgroupId, ContainerId};

/// Bounds of a token's life in seconds (EC2 user guide, "How IMDSv2 works").
pub const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;
/// Characters of a token.
pub const LENGTH: usize = 56;

const EXPIRY_BYTES: usize = 8;
const MAC_BYTES: usize = 32;

/// The secret that tokens are made with.
#[derive(Clone, PartialEq, Eq)]
pub struct TokenKey(pub [u8; 32]);

impl std::fmt::Debug for TokenKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TokenKey(***)")
    }
}

/// Issues and verifies tokens.
pub struct TokenAuthority {
    mac: Hmac<Sha256>,
    clock: Clock,
}

impl TokenAuthority {
    /// With `key`, for this boot of the machine.
    pub fn new(key: &TokenKey, boot_id: &str, clock: Clock) -> Self {
        let mut mac = keyed(key);
        // The key's own length is fixed, the boot id's is not: its length goes in front.
        mac.update(&(boot_id.len() as u64).to_be_bytes());
        mac.update(boot_id.as_bytes());
        Self { mac, clock }
    }

    /// A token for this life, good for `ttl` seconds. `ttl` is within [`TTL_SECONDS`].
    pub fn issue(&self, container: &ContainerId, life: CgroupId, ttl: u32) -> String {
        let expiry = self.clock.boot() + Duration::from_secs(u64::from(ttl));
        let expiry = u64::try_from(expiry.as_millis()).unwrap_or(u64::MAX).to_be_bytes();
        let mut bytes = [0; EXPIRY_BYTES + MAC_BYTES];
        bytes[..EXPIRY_BYTES].copy_from_slice(&expiry);
        bytes[EXPIRY_BYTES..].copy_from_slice(&self.seal(container, life, expiry).finalize().into_bytes());
        URL_SAFE.encode(bytes)
    }

    /// How long a token is still good, rounded up to seconds so that it never reads 0; `None`: it is not good, for
    /// whatever reason.
    pub fn verify(&self, container: &ContainerId, life: CgroupId, token: &[u8]) -> Option<u32> {
        // Nothing is decoded that cannot be ours.
        if token.len() != LENGTH {
            return None;
        }
        let mut bytes = [0; EXPIRY_BYTES + MAC_BYTES + 2];
        let length = URL_SAFE.decode_slice(token, &mut bytes).ok()?;
        let (expiry, mac) = bytes[..length].split_first_chunk::<EXPIRY_BYTES>()?;
        // Constant time.
        self.seal(container, life, *expiry).verify_slice(mac).ok()?;
        let left = Duration::from_millis(u64::from_be_bytes(*expiry)).checked_sub(self.clock.boot())?;
        let seconds = u32::try_from(left.as_millis().div_ceil(1000)).ok()?;
        (seconds > 0).then_some(seconds)
    }

    fn seal(&self, container: &ContainerId, life: CgroupId, expiry: [u8; EXPIRY_BYTES]) -> Hmac<Sha256> {
        let mut mac = self.mac.clone();
        mac.update(container.as_str().as_bytes());
        mac.update(&life.0.to_be_bytes());
        mac.update(&expiry);
        mac
    }
}

fn keyed(key: &TokenKey) -> Hmac<Sha256> {
    Hmac::new_from_slice(&key.0).expect("HMAC takes a key of any length")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    fn id(digit: char) -> ContainerId {
        ContainerId::parse(&digit.to_string().repeat(64)).unwrap()
    }

    fn authority(clock: &Clock) -> TokenAuthority {
        TokenAuthority::new(&TokenKey([7; 32]), "boot-1", clock.clone())
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_for_its_life_and_its_time() {
        let clock = Clock::scripted(UNIX_EPOCH);
        let tokens = authority(&clock);
        let token = tokens.issue(&id('a'), CgroupId(1), 10);
        assert_eq!(token.len(), LENGTH);
        assert!(token.ends_with("=="));
        assert_eq!(tokens.verify(&id('a'), CgroupId(1), token.as_bytes()), Some(10));
        assert_eq!(tokens.verify(&id('b'), CgroupId(1), token.as_bytes()), None);
        assert_eq!(tokens.verify(&id('a'), CgroupId(2), token.as_bytes()), None);
        tokio::time::advance(Duration::from_millis(9_500)).await;
        assert_eq!(tokens.verify(&id('a'), CgroupId(1), token.as_bytes()), Some(1));
        tokio::time::advance(Duration::from_millis(500)).await;
        assert_eq!(tokens.verify(&id('a'), CgroupId(1), token.as_bytes()), None);
    }

    #[tokio::test(start_paused = true)]
    async fn good_over_a_restart_of_the_daemon_not_of_the_machine_nor_with_another_key() {
        let clock = Clock::scripted(UNIX_EPOCH);
        let token = authority(&clock).issue(&id('a'), CgroupId(1), 21_600);
        assert!(
            authority(&clock)
                .verify(&id('a'), CgroupId(1), token.as_bytes())
                .is_some()
        );
        for (key, boot) in [([7; 32], "boot-2"), ([8; 32], "boot-1")] {
            let other = TokenAuthority::new(&TokenKey(key), boot, clock.clone());
            assert_eq!(other.verify(&id('a'), CgroupId(1), token.as_bytes()), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_jump_of_the_wall_clock_changes_nothing() {
        let clock = Clock::scripted(UNIX_EPOCH + Duration::from_secs(1_000_000));
        let token = authority(&clock).issue(&id('a'), CgroupId(1), 60);
        clock.jump(36_000_000);
        assert_eq!(
            authority(&clock).verify(&id('a'), CgroupId(1), token.as_bytes()),
            Some(60)
        );
    }

    proptest! {
        #[test]
        fn no_other_text_is_a_token(at in 0..LENGTH, byte in any::<u8>(), noise in proptest::collection::vec(any::<u8>(), 0..80)) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let clock = Clock::scripted(UNIX_EPOCH);
                let tokens = authority(&clock);
                let mut token = tokens.issue(&id('a'), CgroupId(1), 10).into_bytes();
                assert_eq!(tokens.verify(&id('a'), CgroupId(1), &noise), None);
                if token[at] != byte {
                    token[at] = byte;
                    assert_eq!(tokens.verify(&id('a'), CgroupId(1), &token), None);
                }
            });
        }
    }
}
