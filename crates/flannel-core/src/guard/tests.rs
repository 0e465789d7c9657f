use super::*;
use crate::lease::Tenure;
use crate::store::Unreadable;

const GRACE: Duration = Duration::from_secs(60);
const SECOND: Duration = Duration::from_secs(1);

/// The lease of a host on the subnet of that number; our own is number 1.
fn lease(number: u8, host: u8) -> Lease {
    let value = format!(
        r#"{{"PublicIP":"192.168.0.{host}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"0e:00:00:00:00:{host:02x}"}}}}"#
    );
    Lease { subnet: subnet(number), attrs: LeaseAttrs::from_json(&value).unwrap(), tenure: Tenure::Leased }
}

fn subnet(number: u8) -> Subnet {
    Subnet::V4(format!("10.5.{number}.0/24").parse().unwrap())
}

fn list(numbers: impl IntoIterator<Item = u8>) -> Snapshot {
    let leases = numbers.into_iter().map(|number| lease(number, number)).collect();
    Snapshot { leases, unreadable: vec![] }
}

/// A guard before the view of a host, with the clock in hand.
struct Host {
    guard: Guard,
    view: LeaseView,
    now: Instant,
}

impl Host {
    /// Our own lease, number 1, and those up to that number.
    fn with(last: u8) -> Self {
        let mut view = LeaseView::default();
        // Not by way of the guard: a view may come from anywhere.
        view.apply(LeaseEvent::Snapshot(list(1..=last)));
        // The tests need some instant to count from.
        #[allow(clippy::disallowed_methods)]
        let now = Instant::now();
        Self { guard: Guard::new(GRACE), view, now }
    }

    /// How many peers are held because of it.
    fn hear(&mut self, event: LeaseEvent) -> usize {
        let admitted = self.guard.admit(event, &self.view, subnet(1), self.now);
        admitted.events.into_iter().for_each(|event| drop(self.view.apply(event)));
        admitted.held
    }

    fn snapshot(&mut self, numbers: impl IntoIterator<Item = u8>) -> usize {
        self.hear(LeaseEvent::Snapshot(list(numbers)))
    }

    fn removed(&mut self, numbers: impl IntoIterator<Item = u8>) -> usize {
        self.hear(LeaseEvent::RemovedTogether(numbers.into_iter().map(subnet).collect()))
    }

    /// Time passes, and the store is asked.
    fn confirm(&mut self, after: Duration, numbers: impl IntoIterator<Item = u8>) {
        self.now += after;
        let event = self.guard.confirm(&list(numbers), self.now);
        event.into_iter().for_each(|event| drop(self.view.apply(event)));
    }

    fn peers(&self) -> Vec<u8> {
        let third = |subnet: Subnet| subnet.v4().unwrap().network().octets()[2];
        self.view.peer_subnets(subnet(1)).map(third).collect()
    }

    fn has_own(&self) -> bool {
        self.view.get(&subnet(1)).is_some()
    }
}

#[test]
fn many_that_vanish_at_once_are_held() {
    let mut by_snapshot = Host::with(6);
    let mut by_event = Host::with(6);

    assert_eq!(by_snapshot.snapshot([1, 2]), 4);
    assert_eq!(by_event.removed([3, 4, 5, 6]), 4);

    for host in [by_snapshot, by_event] {
        assert_eq!(host.peers(), [2, 3, 4, 5, 6]);
        assert_eq!(host.guard.count(), 4);
        assert_eq!(host.guard.due(), Some(host.now + GRACE));
    }
}

#[test]
fn three_or_a_quarter_are_believed_at_once() {
    let mut three = Host::with(5);
    let mut quarter = Host::with(17);

    assert_eq!(three.snapshot([1, 2]), 0);
    assert_eq!(quarter.removed([2, 3, 4, 5]), 0);

    assert_eq!(three.peers(), [2]);
    assert_eq!(quarter.peers().len(), 12);
    assert_eq!((three.guard.due(), quarter.guard.due()), (None, None));
}

#[test]
fn one_more_than_a_quarter_is_held() {
    let mut host = Host::with(16);

    assert_eq!(host.removed([2, 3, 4, 5]), 4);
}

#[test]
fn our_own_lease_is_never_held_and_never_counted() {
    let mut by_snapshot = Host::with(6);
    let mut by_event = Host::with(6);

    assert_eq!(by_snapshot.snapshot([]), 5);
    assert_eq!(by_event.removed(1..=6), 5);
    for host in [&by_snapshot, &by_event] {
        assert!(!host.has_own());
        assert_eq!(host.peers().len(), 5);
    }

    // Three peers and ourselves are no four peers.
    assert_eq!(Host::with(4).removed(1..=4), 0);
}

#[test]
fn what_became_unreadable_in_a_snapshot_has_vanished() {
    let mut host = Host::with(6);
    let junk =
        |number| Unreadable { key: String::new(), subnet: Some(subnet(number)), reason: "junk".into() };
    let unreadable = (2..=6).map(junk).collect();

    let held = host.hear(LeaseEvent::Snapshot(Snapshot { unreadable, ..list([1]) }));

    assert_eq!((held, host.peers().len()), (5, 5));
}

#[test]
fn what_is_reported_one_by_one_is_believed_at_once() {
    let mut host = Host::with(9);

    for number in 2..6 {
        host.hear(LeaseEvent::Removed(subnet(number)));
    }
    for number in 6..10 {
        let key = Unreadable { key: String::new(), subnet: Some(subnet(number)), reason: "junk".into() };
        host.hear(LeaseEvent::Unreadable(key));
    }

    assert!(host.peers().is_empty());
}

#[test]
fn a_put_ends_the_hold_on_its_subnet() {
    let mut host = Host::with(6);
    host.removed(2..=6);

    assert_eq!(host.hear(LeaseEvent::Put(lease(2, 2))), 0);
    host.hear(LeaseEvent::Put(lease(3, 30)));

    assert_eq!(host.guard.count(), 3);
    assert_eq!(host.view.get(&subnet(3)), Some(lease(3, 30)));
    host.confirm(GRACE, [2, 3]);
    assert_eq!(host.peers(), [2, 3]);
}

#[test]
fn a_removal_or_junk_under_a_held_key_is_believed() {
    let mut host = Host::with(6);
    host.removed(2..=6);

    host.hear(LeaseEvent::Removed(subnet(2)));
    let key = Unreadable { key: String::new(), subnet: Some(subnet(3)), reason: "junk".into() };
    host.hear(LeaseEvent::Unreadable(key));

    assert_eq!((host.peers(), host.guard.count()), (vec![4, 5, 6], 3));
}

#[test]
fn a_host_that_shows_up_on_another_subnet_is_not_held_on_the_former_one() {
    let mut by_put = Host::with(6);
    by_put.removed(2..=6);
    let mut by_snapshot = Host::with(6);
    by_snapshot.removed(2..=6);
    // One is known by its address and its MAC, the other by its MAC alone.
    let mut renumbered = lease(30, 3);
    renumbered.attrs.public_ip = Some([192, 168, 0, 99].into());
    let moved = || [lease(20, 2), renumbered.clone()];

    for lease in moved() {
        by_put.hear(LeaseEvent::Put(lease));
    }
    by_snapshot.hear(LeaseEvent::Snapshot(Snapshot { leases: moved().into(), unreadable: vec![] }));

    for host in [by_put, by_snapshot] {
        assert_eq!((host.peers(), host.guard.count()), (vec![4, 5, 6, 20, 30], 3));
    }
}

#[test]
fn hosts_that_all_have_another_subnet_now_have_not_vanished() {
    let mut host = Host::with(6);
    let leases = (2..=6).map(|number| lease(number + 100, number)).chain([lease(1, 1)]).collect();

    let held = host.hear(LeaseEvent::Snapshot(Snapshot { leases, unreadable: vec![] }));

    assert_eq!((held, host.peers()), (0, vec![102, 103, 104, 105, 106]));
}

#[test]
fn a_snapshot_that_lists_them_again_ends_the_hold() {
    let mut host = Host::with(6);
    host.snapshot([1]);

    host.snapshot(1..=6);

    assert_eq!((host.guard.count(), host.guard.due()), (0, None));
    assert_eq!(host.peers().len(), 5);
}

#[test]
fn further_snapshots_without_them_prove_nothing() {
    let mut host = Host::with(6);
    host.snapshot([1]);
    let due = host.guard.due();

    for _ in 0..100 {
        host.now += SECOND;
        assert_eq!(host.snapshot([1]), 0);
    }

    assert_eq!((host.peers().len(), host.guard.due()), (5, due));
}

#[test]
fn what_a_list_after_the_grace_does_not_have_is_gone_and_the_rest_is_held_on() {
    let mut host = Host::with(6);
    host.snapshot([1]);

    host.confirm(GRACE, [1, 2, 3]);

    assert_eq!(host.peers(), [2, 3]);
    assert_eq!(host.guard.due(), Some(host.now + GRACE));
    host.confirm(GRACE, [1, 2]);
    assert_eq!(host.peers(), [2]);
}

#[test]
fn a_list_before_the_grace_is_over_proves_nothing() {
    let mut host = Host::with(6);
    host.snapshot([1]);

    host.confirm(GRACE - SECOND, [1]);

    assert_eq!(host.peers().len(), 5);
}

#[test]
fn those_that_vanish_later_have_a_grace_of_their_own_and_wait_for_no_more_than_two() {
    let mut host = Host::with(40);
    host.removed(2..=20);
    let began = host.now;
    for number in 21..=40 {
        host.now += 2 * SECOND;
        // Alone it would be believed, but not on top of all these.
        assert_eq!(host.removed([number, 99]), 1, "{number}");
    }
    assert_eq!(host.guard.due(), Some(began + GRACE));

    host.confirm(GRACE - 40 * SECOND, []);
    assert_eq!(host.peers(), Vec::from_iter(21..=40));

    host.confirm(GRACE, []);
    assert_eq!((host.peers(), host.guard.due()), (vec![], None));
}

#[test]
fn an_answer_to_an_earlier_question_proves_nothing_for_a_later_hold() {
    let mut host = Host::with(6);
    host.snapshot([1]);
    let asked = host.now + GRACE;
    host.now = asked + SECOND;
    host.snapshot(1..=6);
    host.snapshot([1]);

    assert_eq!(host.guard.confirm(&list([1]), asked), None);

    assert_eq!(host.peers().len(), 5);
}

#[test]
fn without_a_grace_all_is_believed_at_once() {
    let mut host = Host::with(6);
    host.guard = Guard::new(Duration::ZERO);

    assert_eq!(host.snapshot([1]), 0);

    assert!(host.peers().is_empty());
}

#[test]
fn what_is_held_and_becomes_ours_is_no_longer_held() {
    let mut host = Host::with(6);
    host.removed(2..=6);

    host.guard.release(subnet(2));

    host.confirm(GRACE, []);
    assert_eq!(host.peers(), [2]);
}

#[test]
fn nothing_is_remembered_of_a_hold_that_is_over() {
    let mut host = Host::with(6);
    host.removed(2..=6);

    for number in 2..=6 {
        host.hear(LeaseEvent::Put(lease(number, number)));
    }

    assert!(host.guard.held.is_empty() && host.guard.hosts.is_empty() && host.guard.due().is_none());
}
