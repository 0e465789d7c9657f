//! The leases as they are now, folded from events.

use std::collections::BTreeMap;

use crate::lease::{Lease, LeaseAttrs, Subnet, Tenure};
use crate::store::LeaseEvent;

/// What changed for one subnet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// The lease before, if there was one.
    pub before: Option<Lease>,
    /// The lease now, if there is one.
    pub after: Option<Lease>,
}

impl Change {
    /// Whose lease it is; `None` for a change of nothing.
    pub fn subnet(&self) -> Option<Subnet> {
        self.after.as_ref().or(self.before.as_ref()).map(|lease| lease.subnet)
    }
}

/// What an event did to the view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Applied {
    /// Nothing that matters to anybody.
    Nothing,
    /// One subnet changed.
    One(Box<Change>),
    /// Anything may have changed.
    Everything,
}

/// Everybody's leases by subnet.
#[derive(Clone, Debug, Default)]
pub struct LeaseView {
    leases: BTreeMap<Subnet, (LeaseAttrs, Tenure)>,
}

impl LeaseView {
    /// Folds one event in.
    pub fn apply(&mut self, event: LeaseEvent) -> Applied {
        match event {
            LeaseEvent::Snapshot(snapshot) => {
                self.leases = snapshot
                    .leases
                    .into_iter()
                    .map(|lease| (lease.subnet, (lease.attrs, lease.tenure)))
                    .collect();
                Applied::Everything
            }
            LeaseEvent::Put(lease) => {
                let before = self.replace(lease.subnet, Some((lease.attrs.clone(), lease.tenure)));
                if before.as_ref() == Some(&lease) {
                    return Applied::Nothing;
                }
                Applied::One(Box::new(Change { before, after: Some(lease) }))
            }
            LeaseEvent::Unreadable(key) => match key.subnet.and_then(|subnet| self.replace(subnet, None)) {
                None => Applied::Nothing,
                before => Applied::One(Box::new(Change { before, after: None })),
            },
            LeaseEvent::Removed(subnet) => match self.replace(subnet, None) {
                None => Applied::Nothing,
                before => Applied::One(Box::new(Change { before, after: None })),
            },
            LeaseEvent::RemovedTogether(subnets) => {
                let mut gone = subnets.into_iter().filter_map(|subnet| self.replace(subnet, None));
                match (gone.next(), gone.count()) {
                    (None, _) => Applied::Nothing,
                    (before, 0) => Applied::One(Box::new(Change { before, after: None })),
                    _ => Applied::Everything,
                }
            }
            LeaseEvent::Resumed => Applied::Nothing,
        }
    }

    /// The lease on `subnet`.
    pub fn get(&self, subnet: &Subnet) -> Option<Lease> {
        self.leases.get(subnet).map(|(attrs, tenure)| lease(*subnet, attrs, *tenure))
    }

    /// Every lease but the one on `own`, in the order of subnets.
    pub fn peers(&self, own: Subnet) -> impl Iterator<Item = Lease> {
        self.leases
            .iter()
            .filter(move |(subnet, _)| **subnet != own)
            .map(|(subnet, (attrs, tenure))| lease(*subnet, attrs, *tenure))
    }

    /// The subnet of each of them.
    pub fn peer_subnets(&self, own: Subnet) -> impl Iterator<Item = Subnet> {
        self.leases.keys().copied().filter(move |subnet| *subnet != own)
    }

    /// How many leases there are beside the one on `own`.
    pub fn count_peers(&self, own: Subnet) -> usize {
        self.leases.len() - usize::from(self.leases.contains_key(&own))
    }

    fn replace(&mut self, subnet: Subnet, with: Option<(LeaseAttrs, Tenure)>) -> Option<Lease> {
        let before = match with {
            Some(lease) => self.leases.insert(subnet, lease),
            None => self.leases.remove(&subnet),
        };
        before.map(|(attrs, tenure)| Lease { subnet, attrs, tenure })
    }
}

fn lease(subnet: Subnet, attrs: &LeaseAttrs, tenure: Tenure) -> Lease {
    Lease { subnet, attrs: attrs.clone(), tenure }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Snapshot, Unreadable};

    fn lease_of(host: u8, ip: &str) -> Lease {
        Lease {
            subnet: Subnet::V4(format!("10.5.{host}.0/24").parse().unwrap()),
            attrs: LeaseAttrs::from_json(&format!(r#"{{"PublicIP":"{ip}"}}"#)).unwrap(),
            tenure: Tenure::Leased,
        }
    }

    fn snapshot(leases: &[Lease]) -> LeaseEvent {
        LeaseEvent::Snapshot(Snapshot { leases: leases.to_vec(), unreadable: vec![] })
    }

    #[test]
    fn a_snapshot_replaces_everything() {
        let mut view = LeaseView::default();
        view.apply(snapshot(&[lease_of(1, "192.168.0.1"), lease_of(2, "192.168.0.2")]));

        view.apply(snapshot(&[lease_of(2, "192.168.0.9")]));

        assert_eq!(view.get(&lease_of(1, "192.168.0.1").subnet), None);
        assert_eq!(view.get(&lease_of(2, "192.168.0.9").subnet), Some(lease_of(2, "192.168.0.9")));
    }

    #[test]
    fn a_put_of_what_is_known_changes_nothing() {
        let mut view = LeaseView::default();
        view.apply(LeaseEvent::Put(lease_of(1, "192.168.0.1")));

        assert_eq!(view.apply(LeaseEvent::Put(lease_of(1, "192.168.0.1"))), Applied::Nothing);
    }

    #[test]
    fn a_change_tells_what_was_and_what_is() {
        let mut view = LeaseView::default();
        view.apply(LeaseEvent::Put(lease_of(1, "192.168.0.1")));

        let applied = view.apply(LeaseEvent::Put(lease_of(1, "192.168.0.9")));

        let (before, after) = (Some(lease_of(1, "192.168.0.1")), Some(lease_of(1, "192.168.0.9")));
        assert_eq!(applied, Applied::One(Box::new(Change { before, after })));
    }

    #[test]
    fn an_unreadable_value_takes_only_its_own_lease_away() {
        let mut view = LeaseView::default();
        view.apply(snapshot(&[lease_of(1, "192.168.0.1"), lease_of(2, "192.168.0.2")]));

        view.apply(LeaseEvent::Unreadable(Unreadable {
            key: "/subnets/10.5.1.0-24".into(),
            subnet: Some(lease_of(1, "192.168.0.1").subnet),
            reason: "not JSON".into(),
        }));
        view.apply(LeaseEvent::Unreadable(Unreadable {
            key: "/subnets/junk".into(),
            subnet: None,
            reason: "not a subnet".into(),
        }));

        let own = lease_of(9, "192.168.0.9").subnet;
        assert_eq!(view.peers(own).collect::<Vec<_>>(), [lease_of(2, "192.168.0.2")]);
    }

    #[test]
    fn what_goes_together_is_one_change_if_only_one_was_there() {
        let mut view = LeaseView::default();
        view.apply(snapshot(&[
            lease_of(1, "192.168.0.1"),
            lease_of(2, "192.168.0.2"),
            lease_of(3, "192.168.0.3"),
        ]));
        let together = |hosts: [u8; 2]| {
            LeaseEvent::RemovedTogether(hosts.map(|host| lease_of(host, "192.168.0.1").subnet).to_vec())
        };

        assert!(matches!(view.apply(together([1, 9])), Applied::One(_)));
        assert_eq!(view.apply(together([1, 9])), Applied::Nothing);
        assert_eq!(view.apply(together([2, 3])), Applied::Everything);
    }

    #[test]
    fn removing_what_is_unknown_changes_nothing() {
        let mut view = LeaseView::default();

        assert_eq!(view.apply(LeaseEvent::Removed(lease_of(1, "192.168.0.1").subnet)), Applied::Nothing);
    }
}
