//! An etcd that fails: members killed, frozen, unreachable, away.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use flannel_tests::lab::Process;
use flannel_tests::need;
use nix::sys::signal::Signal;

use crate::kernel::{Heard, Object, heard};
use crate::members::Data;
use crate::peers::{key_of, leases};
use crate::record::{Records, Sample, Time, Told, Written, now, read};
use crate::scenario::Shown;
use crate::world::{CANARY, Form, PATIENCE, Shape, USER, World, agent_knows};

const SECOND: Duration = Duration::from_secs(1);

/// E-1.
pub(crate) fn leader_killed(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape::default());
    let mut shown = Shown::default();
    let (rounds, round) = (form.of(3, 30), Duration::from_secs(20));
    // Fifty changes a minute.
    let pace = Duration::from_millis(1200);
    let mut number = 0;
    for _ in 0..rounds {
        let start = Instant::now();
        let leader = world.store.leader();
        world.members.kill(leader, Data::Kept);
        while start.elapsed() < round {
            let due = Instant::now() + pace;
            churn(&mut world, number);
            number += 1;
            if !world.members.is_up(leader) && start.elapsed() > SECOND * 6 {
                world.members.start(leader);
            }
            thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    let end = world.converges(PATIENCE);
    shown.within(&mut world, "after the last leader", SECOND * 10, end);
    slowest_change(&mut world, &mut shown, SECOND * 10);
    shown.note(format!("{rounds} leaders killed, {number} changes"));
    shown.end(world)
}

/// A join, a change or a leave; twenty peers by and by.
pub(crate) fn churn(world: &mut World, turn: u32) {
    let number = 120 + (turn % 20) as u8;
    match turn / 20 % 3 {
        0 | 1 => world.join(number),
        _ => world.leave(number),
    }
}

/// How long after its write was answered each change was in each kernel, at most.
pub(crate) fn slowest_change(world: &mut World, shown: &mut Shown, limit: Duration) {
    // The kernels' words are written down a moment after they are said.
    thread::sleep(Duration::from_millis(300));
    let writes: Vec<Written> = read(&world.records.path("writes.jsonl"));
    let mut slowest: (f64, String) = (0.0, String::new());
    for index in 0..world.agents.len() {
        let told: Vec<Told> = read(&world.records.kernel(index + 1));
        let heard: Vec<(Time, Heard)> =
            told.iter().filter_map(|told| Some((told.t, heard(&told.line)?))).collect();
        for (at, write) in writes.iter().enumerate() {
            let next = writes[at + 1..].iter().find(|next| next.subnet == write.subnet);
            let is_it = |heard: &Heard| match (heard, &write.peer) {
                (Heard::Came(Object::Entry { mac, .. }), Some(peer)) => *mac == peer.mac,
                (Heard::Went(Object::Route { subnet, .. }), None) => *subnet == write.subnet,
                _ => false,
            };
            let seen = heard.iter().find(|(t, heard)| *t >= write.sent && is_it(heard)).map(|(t, _)| *t);
            match (seen, next) {
                (Some(seen), _) if seen - write.acked > slowest.0 => {
                    slowest = (seen - write.acked, format!("{} on host {}", write.subnet, index + 1));
                }
                (Some(_), _) => {}
                // Something else was written before it could be seen, or before the agent began.
                (None, Some(next)) if next.sent - write.acked < limit.as_secs_f64() => {}
                (None, _) if heard.first().is_none_or(|(first, _)| *first > write.acked) => {}
                (None, _) if write.peer.as_ref().is_some_and(|peer| was_there(world, index, &peer.mac)) => {}
                (None, _) => world.claim(false, || {
                    format!("the change of {} never came to host {}", write.subnet, index + 1)
                }),
            }
        }
    }
    let time = Duration::from_secs_f64(slowest.0);
    shown.took(time);
    world.claim(time <= limit, || {
        format!("the change of {} took {time:.1?}, {limit:?} are allowed", slowest.1)
    });
}

/// Whether the entry was there before anybody listened.
fn was_there(world: &World, index: usize, mac: &str) -> bool {
    crate::kernel::held(world.host(index)).iter().any(|object| object.contains(mac))
}

/// E-2.
pub(crate) fn black_hole(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape::default());
    let mut shown = Shown::default();
    for turn in 0..form.of(1, 6) {
        let Some(member) = talks_to(&world, 0) else {
            world.claim(false, || "the agent has no connection to etcd".into());
            break;
        };
        let (since, before) = (now(), cpu(&world));
        world.members.hole(member);
        world.say(&format!("packets to and from member {member} vanish"));
        // The store asks another one.
        world.join(150 + turn);
        let moved = world.converges(SECOND * 40);
        shown.within(&mut world, "moved to another endpoint", SECOND * 15, moved);
        thread::sleep(form.of(SECOND * 5, SECOND * 30));
        let used = (cpu(&world) - before) as f64 / (now() - since) / 10.0 / world.agents.len() as f64;
        world.claim(used < 5.0, || format!("{used:.1} % of a processor"));
        shown.note(format!("{used:.1} % of a processor each"));
        world.members.mend(member);
        world.leave(150 + turn);
        let back = world.converges(SECOND * 20);
        shown.within(&mut world, "after it was mended", SECOND * 15, back);
    }
    shown.end(world)
}

/// The member that an agent is connected to.
pub(crate) fn talks_to(world: &World, index: usize) -> Option<usize> {
    let shown = world.host(index).run(&["ss", "-Htn", "state", "established", "dport", "=", ":2379"]);
    (0..world.members.count())
        .find(|&member| shown.contains(&format!("{}:2379", world.members.host(member).address)))
}

/// Milliseconds of processor time of all agents.
fn cpu(world: &World) -> u64 {
    let last =
        |index: usize| read::<Sample>(&world.records.agent(index + 1)).last().map_or(0, |sample| sample.cpu);
    (0..world.agents.len()).map(last).sum()
}

/// E-4.
pub(crate) fn all_away(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape::default());
    let mut shown = Shown::default();
    let away = form.of(SECOND * 40, SECOND * 1800);
    world.fault("all members are away", 0..world.agents.len());
    world.members.kill_all(Data::Kept);
    thread::sleep(away);
    world.members.start_all();
    world.store.answers();
    let start = Instant::now();
    world.join(150);
    let back = world.converges(PATIENCE).map(|_| start.elapsed());
    shown.within(&mut world, "after etcd's return", SECOND * 5, back);
    shown.note(format!("away for {away:?}"));
    shown.end(world)
}

/// In bytes; etcd itself needs a part of it.
const QUOTA: i64 = 4 << 20;

/// E-6, out of space.
pub(crate) fn out_of_space(records: Records, _: Form) -> Shown {
    let member_flags = vec![format!("--quota-backend-bytes={QUOTA}")];
    let mut world = World::healthy(records, Shape { member_flags, ..Shape::default() });
    let mut shown = Shown::default();
    let mut written = 0;
    loop {
        let (key, value) = (format!("/junk/{written}"), vec![b'x'; 200_000]);
        let put =
            world.store.ask_or(SECOND, async |client| client.put(key.as_str(), value.clone(), None).await);
        match put {
            Ok(_) => written += 1,
            Err(words) if words.contains("space") => break,
            Err(words) => panic!("etcd does not fill: {words}"),
        }
        assert!(written < 200, "etcd takes more than its quota");
    }
    let since = now();
    let key = key_of(&format!("{}.0/24", world.agents[0].subnet));
    world.fault("etcd has no space, and its key is gone", [0]);
    let gone = world.store.delete(&key);
    let names = |world: &mut World| world.log(0).contains("space") || world.page(0).1.contains("space");
    let named = world.comes(SECOND * 15, names);
    world.claim(named.is_some(), || "the agent does not say that etcd is out of space".into());
    // A renewal needs no space: the other hosts keep their leases.
    thread::sleep(SECOND * 3);
    let kept = world.store.list(&leases()).len();
    world.claim(kept == 12, || format!("{kept} leases, 12 should be left"));
    world.recorded(gone);
    make_room(&mut world);
    let start = Instant::now();
    let back = world.comes(PATIENCE, |world| world.store.get(&key).is_some()).map(|_| start.elapsed());
    shown.within(&mut world, "its key after space was made", SECOND * 10, back.ok_or_else(|| "never".into()));
    let found = world.converges(PATIENCE);
    world.claim(found.is_ok(), || format!("after space was made: {found:?}"));
    world.excuse(0, since, now(), "its key was gone");
    shown.note(format!("{written} values of 200 kB filled it"));
    shown.end(world)
}

/// What an operator does about the alarm.
fn make_room(world: &mut World) {
    world.store.delete_prefix("/junk/");
    let revision = world.store.revision();
    world.store.compact(revision);
    let start = Instant::now();
    loop {
        for index in 0..world.members.count() {
            world.store.defragment(index, QUOTA / 4);
        }
        world.store.disarm();
        // A write that was under way may have raised the alarm again.
        match world.store.ask_or(SECOND, async |client| client.put("/room", "made", None).await) {
            Ok(_) => return,
            Err(words) => assert!(start.elapsed() < PATIENCE, "there is no room in etcd: {words}"),
        }
    }
}

/// E-6, a slow disk.
pub(crate) fn slow_disk(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape::default());
    let mut shown = Shown::default();
    if !need("strace") {
        shown.note("left out: strace is not installed");
        return shown.end(world);
    }
    let leader = world.store.leader();
    let pid = world.members.pid(leader).expect("it runs");
    let mut command = Command::new("strace");
    command.args([
        "-f",
        "-q",
        "-e",
        "trace=fsync,fdatasync",
        "-e",
        "inject=fsync,fdatasync:delay_enter=2000000",
    ]);
    command.args(["-o", "/dev/null", "-p", &pid.to_string()]);
    let strace = Process::start(command, world.records.path("strace.log"));
    thread::sleep(SECOND);
    let start = Instant::now();
    let mut changes = 0;
    let mut slowest = Duration::ZERO;
    while start.elapsed() < form.of(SECOND * 20, SECOND * 300) {
        let put = Instant::now();
        churn(&mut world, changes);
        slowest = slowest.max(put.elapsed());
        changes += 1;
        thread::sleep(SECOND);
    }
    // It lets go of the member as it ends.
    strace.signal(Signal::SIGTERM);
    thread::sleep(SECOND);
    drop(strace);
    let found = world.converges(PATIENCE);
    shown.within(&mut world, "after the disk was slow", SECOND * 10, found);
    slowest_change(&mut world, &mut shown, SECOND * 10);
    shown.note(format!("{changes} changes, the slowest write took etcd {:.1} s", slowest.as_secs_f64()));
    shown.end(world)
}

/// E-6, a minority that lags behind.
pub(crate) fn stale_member(records: Records, form: Form) -> Shown {
    let mut world = World::healthy(records, Shape::default());
    let mut shown = Shown::default();
    let member = talks_to(&world, 0).unwrap_or(0);
    world.members.signal(member, Signal::SIGSTOP);
    let frozen = Instant::now();
    for turn in 0..20 {
        churn(&mut world, turn);
    }
    let found = world.converges(SECOND * 40).map(|_| frozen.elapsed());
    shown.within(&mut world, "while a member stands still", SECOND * 15, found);
    thread::sleep(form.of(SECOND * 20, SECOND * 120).saturating_sub(frozen.elapsed()));
    // Whoever comes now and asks that member alone may not get what is taken.
    world.kill_agent(2);
    let since = now();
    let key = key_of(&format!("{}.0/24", world.agents[2].subnet));
    world.store.delete(&key);
    world.members.signal(member, Signal::SIGCONT);
    world.agents[2].flags.push(format!("--etcd-endpoints={}", world.members.endpoint(member)));
    world.start_agent(2);
    let start = Instant::now();
    let back = world.comes(PATIENCE, |world| world.store.get(&key).is_some());
    world.claim(back.is_some(), || "its key never came back".into());
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    world.blind(2, since);
    world.excuse(2, since, now(), "its agent was killed and its key deleted");
    shown.within(&mut world, "after it went on", SECOND * 10, found);
    shown.note("clocks of members that differ are for the simulation: a time namespace moves no wall clock");
    shown.end(world)
}

/// E-7.
pub(crate) fn credentials(records: Records, form: Form) -> Shown {
    const ROOT: &str = "root-secret";
    let member_flags = vec!["--auth-token-ttl=5".into()];
    let mut world = World::new(records, Shape { member_flags, ..Shape::default() });
    let mut shown = Shown::default();
    if !agent_knows("--etcd-password-file") {
        shown.note("left out: the agent has no --etcd-password-file");
        return shown.end(world);
    }
    let file = world.lab.path("password");
    let say = |password: &str| fs::write(&file, password).expect("a file can be written");
    say(CANARY);
    for agent in &mut world.agents {
        agent.flags.push(format!("--etcd-password-file={}", file.display()));
    }
    world.store.user = Some(("root".into(), ROOT.into()));
    world.start_store();
    world.start_agents();
    let steady = |world: &mut World, shown: &mut Shown, what: &str, rounds: u32| {
        for turn in 0..rounds {
            churn(world, turn);
            thread::sleep(SECOND);
        }
        let found = world.converges(SECOND * 30);
        shown.within(world, what, SECOND * 10, found);
    };
    world.store.switch_users_on(&[("root", ROOT), (USER, CANARY)]);
    world.say("users are asked for");
    steady(&mut world, &mut shown, "users switched on", 3);
    // Beyond the life of a token, several times.
    steady(&mut world, &mut shown, "tokens ran out", form.of(13, 600));
    let other = format!("{CANARY}-2");
    world.store.change_password(USER, &other);
    world.say("another password");
    steady(&mut world, &mut shown, "before the file says so", 4);
    say(&other);
    // Each member forgets the connections it had.
    for index in 0..world.members.count() {
        world.members.kill(index, Data::Kept);
        world.members.start(index);
        world.store.answers();
        steady(&mut world, &mut shown, "another member, with the other password", 3);
    }
    // A wrong one is said clearly, and asked with slowly.
    let words = |world: &World, index: usize| world.log(index).matches("password").count();
    let before: Vec<usize> = (0..world.agents.len()).map(|index| words(&world, index)).collect();
    say("wrong");
    world.fault("a wrong password", 0..world.agents.len());
    for index in 0..world.members.count() {
        world.members.kill(index, Data::Kept);
        world.members.start(index);
        world.store.answers();
    }
    let says = |world: &mut World| {
        let told =
            |index: usize| words(world, index) > before[index] || world.page(index).1.contains("password");
        (0..world.agents.len()).all(told)
    };
    let said = world.comes(SECOND * 10, says);
    world.claim(said.is_some(), || "not every agent says that its password is wrong".into());
    // Once all are where they only wait, three agents have one try in five seconds each.
    thread::sleep(SECOND * 5);
    let (tries, time) = (world.members.count_of("Authenticate"), form.of(SECOND * 10, SECOND * 60));
    thread::sleep(time);
    let tries = world.members.count_of("Authenticate") - tries;
    let most = world.agents.len() as u64 * (time.as_secs() / 5 + 1);
    world.claim(tries <= most, || {
        format!("{tries} tries with a wrong password in {time:?}, {most} are allowed")
    });
    shown.note(format!("{tries} tries of all with a wrong password in {time:?}"));
    say(&other);
    world.join(150);
    let start = Instant::now();
    let found = world.converges(PATIENCE).map(|_| start.elapsed());
    shown.within(&mut world, "the right password again", SECOND * 10, found);
    shown.end(world)
}
