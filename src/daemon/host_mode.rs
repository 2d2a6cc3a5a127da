//! A host that has a metadata service of its own, and keeps it: its processes go on with theirs, containers are served inside
//! their namespaces only, and what is not attached (yet) is rejected, whether a daemon runs or not.

use std::fmt;
use std::net::SocketAddr;

use tracing::warn;

use super::interception::{give_up, intercept, knows_ipv6};
use super::{IMDS_ADDRESS, IMDS_ADDRESS_IPV6};
use crate::clock::Clock;
use crate::config::{HostImds, Settings};
use crate::interception::cloud::{Cloud, and_rejecting_ports, services};
use crate::interception::reconcile::{Interception, clear};
use crate::interception::{HostError, Plan};

/// The host's own service is kept.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// Whose machine this is, if the firmware says so.
    cloud: Option<Cloud>,
    /// The configuration says so itself: whoever wrote it knows.
    pub(super) meant: bool,
}

impl Kept {
    /// Whether it is, by these settings, on this host.
    pub fn here(settings: &Settings) -> Option<Self> {
        let cloud = Cloud::find(&settings.dmi_dir);
        let meant = settings.host_imds == HostImds::Keep;
        let kept = meant || (settings.host_imds == HostImds::Auto && cloud.is_some());
        kept.then_some(Self { cloud, meant })
    }

    /// EC2's own service, if it is that: this daemon can ask it, as any process of the host.
    pub fn ec2(&self) -> Option<String> {
        let is_ec2 = self.cloud.is_some_and(|cloud| cloud.is_ec2());
        is_ec2.then(|| format!("http://{IMDS_ADDRESS}"))
    }

    /// What is there on the host without a daemon, and stays.
    pub fn plans(&self) -> Vec<Plan> {
        let families = if knows_ipv6() { &[true, false][..] } else { &[true] };
        families.iter().map(|ipv4| self.plan(*ipv4)).collect()
    }

    /// The same, of one family.
    pub(super) fn plan(&self, ipv4: bool) -> Plan {
        let (addresses, resolvers) = services(self.cloud, ipv4);
        and_rejecting_ports(Plan::rejecting(&addresses, &resolvers), self.cloud)
    }

    /// The same, with a listener for what comes in over bridges: that is intercepted.
    pub(super) fn between(&self, listener: SocketAddr) -> Plan {
        let (addresses, resolvers) = services(self.cloud, listener.is_ipv4());
        and_rejecting_ports(Plan::between(listener, &addresses, &resolvers), self.cloud)
    }

    /// What follows the first plan, once that is up: the rest, and away with whatever still takes the address from the host.
    /// `between`: whether the first one is [`Kept::between`].
    ///
    /// # Errors
    /// What the kernel refused. What rejects is left up.
    pub(super) async fn complete(
        &self,
        first: Interception,
        between: bool,
        clock: &Clock,
    ) -> Result<Vec<Interception>, HostError> {
        let mut up = vec![first];
        let rest = async {
            if knows_ipv6() {
                up.push(intercept(&self.plan(false), clock).await?);
            }
            let mut old = vec![
                Plan::ways_to(IMDS_ADDRESS.into()),
                Plan::ways_to(IMDS_ADDRESS_IPV6.into()),
            ];
            old.extend((!between).then(|| Plan::delivery(IMDS_ADDRESS.into())));
            for plan in old {
                for step in clear(&plan)? {
                    warn!(%step, "left by an earlier daemon; the host's own metadata service is to be reached again");
                }
            }
            Ok(())
        };
        let Err(error) = rest.await else { return Ok(up) };
        give_up(up);
        Err(error)
    }
}

/// Where the address is ours on a machine of a cloud all the same: `plan`, and containers are rejected wherever else its own service
/// is.
pub(super) fn in_its_place(settings: &Settings, plan: Plan) -> Plan {
    let Some(cloud) = Cloud::find(&settings.dmi_dir) else {
        return plan;
    };
    let (addresses, resolvers) = services(Some(cloud), plan.family().is_ip());
    and_rejecting_ports(plan.and_rejecting(&addresses, &resolvers), Some(cloud))
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.cloud {
            Some(cloud) => write!(f, "a machine of {cloud}"),
            None => write!(f, "[serve] host_imds = \"keep\""),
        }
    }
}
