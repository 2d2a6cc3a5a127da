//! `[metadata] base = "host"`: what EC2 says of this host is what containers see. Asked once at the start, and again and again;
//! what was known holds while it cannot be had.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::resolver::Resolver;
use crate::credentials::http;
use crate::credentials::instance_profile::HostMetadata;
use crate::instance::RuntimeFacts;
use crate::logging::{printable, with_causes};
use crate::metadata::crawl;

/// How often it is asked, and how soon again after a failure.
const RETRY_INTERVAL: (Duration, Duration) = (Duration::from_secs(3600), Duration::from_secs(15));
/// All answers together.
const ALL: Duration = Duration::from_secs(20);

/// Everything that may be seen.
pub(super) async fn gather(service: &str) -> Result<BTreeMap<String, String>, String> {
    let host = HostMetadata::at(service, http::client())?;
    let get = |path: String| {
        let host = host.clone();
        async move {
            let asked = host.get(&format!("/latest/{path}")).await;
            asked
                .map(|value| value.map(String::from))
                .map_err(|error| printable(&with_causes(&error), 300))
        }
    };
    let found = timeout(ALL, crawl::gather(get)).await;
    let found = found.map_err(|_| format!("not all of it within {} s", ALL.as_secs()))??;
    if found.is_empty() {
        return Err("nothing of what EC2 has".to_owned());
    }
    Ok(crawl::for_another(&found))
}

/// Learns of it once, if the settings want it.
pub(super) async fn learn(service: &str, resolver: &Resolver) -> Duration {
    if !resolver.settings.load().metadata_of_host {
        resolver.sees_of_host(BTreeMap::new(), None);
        return Duration::MAX;
    }
    let known = BTreeMap::clone(&resolver.facts.load().instance);
    let (seen, problem) = seen(service, known, gather(service).await);
    if let Some(problem) = &problem {
        warn!("{problem}");
    }
    let pause = if problem.is_none() {
        RETRY_INTERVAL.0
    } else {
        RETRY_INTERVAL.1
    };
    if resolver.sees_of_host(seen, problem) {
        info!("containers see what EC2 says of this host");
    }
    pause
}

/// What is seen of a host of which so much was `known`; and why there is nothing new, if so.
fn seen(
    service: &str,
    known: BTreeMap<String, String>,
    gathered: Result<BTreeMap<String, String>, String>,
) -> (BTreeMap<String, String>, Option<String>) {
    let why = match gathered {
        Ok(found) => return (found, None),
        Err(why) => why,
    };
    let instead = if known.is_empty() {
        "what is derived"
    } else {
        "what was known"
    };
    let problem =
        format!("[metadata] base = \"host\": {service} says nothing of this host ({why}); containers see {instead}");
    (known, Some(problem))
}

/// Learns of it again, after a while, and when the settings want something else, until the task is dropped.
pub(super) async fn keep(service: String, resolver: Arc<Resolver>, mut pause: Duration) {
    let mut changed = resolver.changed.subscribe();
    loop {
        let wanted = resolver.settings.load().metadata_of_host;
        let mut over = std::pin::pin!(sleep(pause));
        loop {
            tokio::select! {
                () = &mut over => break,
                // The sender is the resolver's, which is held here.
                _ = changed.changed() => if resolver.settings.load().metadata_of_host != wanted {
                    break;
                },
            }
        }
        pause = learn(&service, &resolver).await;
    }
}

impl Resolver {
    /// Takes in what EC2 says of this host, or why it says nothing; whether that is new.
    fn sees_of_host(&self, instance: BTreeMap<String, String>, problem: Option<String>) -> bool {
        self.of_host_problem.store(problem.map(Arc::new));
        let instance = Arc::new(instance);
        let before = self.facts.rcu(|facts| RuntimeFacts {
            instance: instance.clone(),
            ..RuntimeFacts::clone(facts)
        });
        let new = before.instance != instance;
        if new {
            self.changed.send_modify(|version| *version += 1);
        }
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_known_holds_while_nothing_is_said() {
        let values = |id: &str| BTreeMap::from([("meta-data/instance-id".to_owned(), id.to_owned())]);
        let failed = || Err("time-out".to_owned());
        assert_eq!(seen("S", BTreeMap::new(), Ok(values("i-1"))), (values("i-1"), None));
        assert_eq!(seen("S", values("i-1"), Ok(values("i-2"))), (values("i-2"), None));
        let (kept, problem) = seen("S", values("i-1"), failed());
        assert_eq!(kept, values("i-1"));
        let said = "[metadata] base = \"host\": S says nothing of this host (time-out); containers see what was known";
        assert_eq!(problem.as_deref(), Some(said));
        let (none, problem) = seen("S", BTreeMap::new(), failed());
        assert_eq!(none, BTreeMap::new());
        assert!(problem.is_some_and(|it| it.ends_with("containers see what is derived")));
    }

    #[tokio::test]
    async fn nobody_there_is_a_failure_and_no_empty_host() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let at = format!("http://{}", listener.local_addr().unwrap());
        drop(listener);
        assert!(gather(&at).await.is_err());
    }
}
