//! What is done to a host beside the cluster: its device, its entries, its address.

use std::net::Ipv4Addr;
use std::thread;
use std::time::{Duration, Instant};

use rand::RngExt;

use crate::kernel::{DEVICE, held};
use crate::peers::{key_of, leases};
use crate::record::{Mark, Records, now};
use crate::scenario::Shown;
use crate::world::{Form, PATIENCE, Shape, World, attempt, delete_object, plant};

const SECOND: Duration = Duration::from_secs(1);

/// E-14.
pub(crate) fn device_abused(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 40, ..Shape::default() });
    let mut shown = Shown::default();
    let host = world.host(0).clone();
    let mac = host.run(&["cat", "/sys/class/net/flannel.1/address"]);
    for round in 0..form.of(1, 20) {
        for abuse in [
            "ip link del flannel.1",
            "ip link set flannel.1 down",
            "ip link set flannel.1 name other1",
            "ip addr flush dev flannel.1",
            "ip link set flannel.1 mtu 1300",
            "ip link set flannel.1 address 0e:00:00:00:00:99",
        ] {
            // Who sets these a fourth time has them published: that is how a fight ends.
            if round >= 3 && (abuse.contains(" mtu ") || abuse.contains(" address ")) {
                continue;
            }
            let since = now();
            attempt(&host, abuse);
            // Not the moment before it is noticed.
            thread::sleep(Duration::from_millis(20));
            let start = Instant::now();
            let found = world.converges(PATIENCE).map(|_| start.elapsed());
            let restored = world.comes(SECOND * 5, |_| {
                attempt(&host, "ip link show flannel.1")
                    && host.run(&["cat", "/sys/class/net/flannel.1/address"]) == mac
                    && host.run(&["cat", "/sys/class/net/flannel.1/mtu"]).trim() == "1450"
            });
            let time = found.map(|time| time.max(start.elapsed()));
            shown.within(&mut world, abuse, Duration::from_millis(1500), time);
            world.claim(restored.is_some(), || format!("after {abuse}: another MAC or MTU"));
            attempt(&host, "ip link del other1");
            world.mark(&Mark::Meddled { host: 1, since, until: now() });
            world.excuse(0, since, now(), abuse);
            // A fight begins where somebody does not stop.
            thread::sleep(SECOND * 2);
        }
    }
    shown.end(world)
}

/// E-15.
pub(crate) fn entries_deleted(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape { peers: 40, ..Shape::default() });
    let mut shown = Shown::default();
    let host = world.host(0).clone();
    let mut random = rand::rng();
    for number in 0..form.of(5, 100) {
        let since = now();
        // Look-alikes, which stay.
        attempt(&host, &format!("ip route add 10.5.251.{number}/32 via 192.168.77.9 proto static"));
        for object in held(&host) {
            if random.random_bool(0.3) {
                delete_object(&host, &object);
            }
        }
        let start = Instant::now();
        let found = world.converges(PATIENCE).map(|_| start.elapsed());
        // At once, or within the second that whoever does it again and again is answered in.
        shown.within(&mut world, "a third of the entries deleted", SECOND * 3 / 2, found);
        world.mark(&Mark::Meddled { host: 1, since, until: now() });
        world.excuse(0, since, now(), "its entries were deleted");
        thread::sleep(SECOND * 2);
    }
    // So many in so short a time may have been taken for a fight.
    let calm = world.comes(PATIENCE, |world| world.is_ready(0));
    world.claim(calm.is_some(), || "not ready a minute after the last".into());
    let there = host.run(&["ip", "route", "show", "proto", "static"]).matches("10.5.251.").count();
    let rounds = form.of(5, 100);
    world.claim(there == rounds, || format!("I3: {there} of {rounds} foreign routes are left"));
    shown.end(world)
}

/// E-21.
pub(crate) fn address_moved(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape::default());
    let mut shown = Shown::default();
    let host = world.host(0).clone();
    let key = key_of(&format!("{}.0/24", world.agents[0].subnet));
    world.mark(&Mark::Given { key: key.clone(), t: now() });
    for number in 0..form.of(2, 20) {
        let since = now();
        world.fault("the address between the hosts changed", [0]);
        let new = move_address(&mut world, 0, 101 + number);
        let start = Instant::now();
        let followed = |world: &mut World| {
            world.store.get(&key).is_some_and(|(value, _)| value.contains(&new.to_string()))
        };
        let found = world.comes(PATIENCE, followed);
        let found = found.ok_or_else(|| "the lease says the old address".to_owned());
        let found = found.and_then(|_| world.converges(PATIENCE)).map(|_| start.elapsed());
        shown.within(&mut world, "another address", SECOND * 3, found);
        world.excuse(0, since, now(), "its address changed");
        world.mark(&Mark::Meddled { host: 1, since, until: now() });
        thread::sleep(SECOND * 2);
    }
    let since = now();
    for _ in 0..form.of(5, 60) {
        attempt(&host, "ip link set eth0 down");
        thread::sleep(Duration::from_millis(500));
        attempt(&host, "ip link set eth0 up");
        attempt(&host, "ip route replace default via 192.168.77.254");
        thread::sleep(Duration::from_millis(500));
    }
    plant(&host);
    let start = Instant::now();
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    shown.within(&mut world, "a link that flaps", SECOND * 3, found);
    // The bridge of the wire learns the way again.
    thread::sleep(SECOND);
    world.excuse(0, since, now(), "its link flapped");
    world.mark(&Mark::Meddled { host: 1, since, until: now() });
    let devices = host.run(&["ip", "-d", "link", "show", DEVICE]);
    let address = world.host(0).address;
    world.claim(devices.contains(&format!("local {address} ")), || {
        format!("the device is elsewhere: {devices}")
    });
    let count = world.store.list(&leases()).len();
    world.claim(count == 13, || format!("{count} leases, 13 before"));
    shown.end(world)
}

/// Gives a host another address between the hosts, as DHCP would.
pub(crate) fn move_address(world: &mut World, index: usize, last: u8) -> Ipv4Addr {
    let host = world.host(index).clone();
    let (old, new) = (host.address, Ipv4Addr::new(192, 168, 77, last));
    if old != new {
        attempt(&host, &format!("ip addr del {old}/24 dev eth0"));
        attempt(&host, &format!("ip addr add {new}/24 dev eth0"));
        attempt(&host, "ip route replace default via 192.168.77.254");
        // The kernel itself has taken what went by the address.
        plant(&host);
        world.agents[index].host.address = new;
    }
    new
}
