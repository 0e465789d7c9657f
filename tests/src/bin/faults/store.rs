//! A client of etcd that is not ours and asks until it gets an answer.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions, Compare, CompareOp, ConnectOptions,
    DeleteOptions, Error, GetOptions, KeyValue, Permission, ResponseHeader, Txn, TxnOp,
};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use crate::peers::{Lease, PREFIX};
use crate::record::{Lines, PeerRecord, Written, now};

/// An attempt at one endpoint.
const ATTEMPT: Duration = Duration::from_secs(2);

/// All attempts together.
const PATIENCE: Duration = Duration::from_secs(90);

pub(crate) struct Store {
    runtime: Runtime,
    endpoints: Vec<String>,
    at: usize,
    client: Option<Client>,
    /// Name and password, once etcd asks for them.
    pub(crate) user: Option<(String, String)>,
    writes: Lines,
}

/// A member's own word.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemberStatus {
    pub(crate) leads: bool,
}

impl Store {
    /// Must be made on a thread that is in the namespace of the wire.
    pub(crate) fn new(endpoints: Vec<String>, writes: Lines) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime can be built");
        Self { runtime, endpoints, at: 0, client: None, user: None, writes }
    }

    /// Asks one endpoint after the other until one answers; `None` if none does in time.
    pub(crate) fn ask<T>(
        &mut self,
        patience: Duration,
        question: impl AsyncFn(&mut Client) -> Result<T, Error>,
    ) -> Option<T> {
        self.ask_or(patience, question).ok()
    }

    /// The same, with the last refusal.
    pub(crate) fn ask_or<T>(
        &mut self,
        patience: Duration,
        question: impl AsyncFn(&mut Client) -> Result<T, Error>,
    ) -> Result<T, String> {
        let start = Instant::now();
        loop {
            let refusal = match self.attempt(&question) {
                Ok(answer) => return Ok(answer),
                Err(refusal) => refusal,
            };
            self.client = None;
            self.at = (self.at + 1) % self.endpoints.len();
            if start.elapsed() > patience {
                return Err(refusal);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn attempt<T>(&mut self, question: &impl AsyncFn(&mut Client) -> Result<T, Error>) -> Result<T, String> {
        let endpoint = &self.endpoints[self.at];
        let (client, user) = (&mut self.client, &self.user);
        self.runtime.block_on(async {
            let work = async {
                let client = match client {
                    Some(client) => client,
                    None => client.insert(connect(endpoint, user.as_ref()).await?),
                };
                question(client).await
            };
            match timeout(ATTEMPT, work).await {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(error)) => Err(error.to_string()),
                Err(_) => Err("no answer".into()),
            }
        })
    }

    fn must<T>(&mut self, question: impl AsyncFn(&mut Client) -> Result<T, Error>) -> T {
        self.ask_or(PATIENCE, question).unwrap_or_else(|error| panic!("etcd does not answer: {error}"))
    }

    /// Waits until a majority answers.
    pub(crate) fn answers(&mut self) {
        self.must(async |client| client.get("x", None).await);
    }

    /// The revision of the write.
    pub(crate) fn put(&mut self, key: &str, value: impl Into<Vec<u8>>) -> i64 {
        let value = value.into();
        self.must(async |client| write(client, key, TxnOp::put(key, value.clone(), None)).await)
    }

    pub(crate) fn revoke(&mut self, lease: i64) {
        // A second attempt finds it gone.
        let gone = |error: &Error| error.to_string().contains("not found");
        self.must(async |client| match client.lease_revoke(lease).await {
            Err(error) if gone(&error) => Ok(()),
            answer => answer.map(drop),
        });
    }

    /// The revision of the removal.
    pub(crate) fn delete(&mut self, key: &str) -> i64 {
        self.must(async |client| write(client, key, TxnOp::delete(key, None)).await)
    }

    /// How many keys went.
    pub(crate) fn delete_prefix(&mut self, prefix: &str) -> i64 {
        let options = DeleteOptions::new().with_prefix();
        self.must(async |client| client.delete(prefix, Some(options.clone())).await).deleted()
    }

    pub(crate) fn get(&mut self, key: &str) -> Option<(String, i64)> {
        let answer = self.must(async |client| client.get(key, None).await);
        answer.kvs().first().map(|kv| (String::from_utf8_lossy(kv.value()).into_owned(), kv.lease()))
    }

    /// Values by key.
    pub(crate) fn list(&mut self, prefix: &str) -> BTreeMap<String, String> {
        self.try_list(prefix, PATIENCE).expect("etcd answers")
    }

    pub(crate) fn try_list(&mut self, prefix: &str, patience: Duration) -> Option<BTreeMap<String, String>> {
        let options = GetOptions::new().with_prefix();
        let answer = self.ask(patience, async |client| client.get(prefix, Some(options.clone())).await)?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Some(answer.kvs().iter().map(|kv| (text(kv.key()), text(kv.value()))).collect())
    }

    pub(crate) fn revision(&mut self) -> i64 {
        let answer = self.must(async |client| client.get("x", None).await);
        answer.header().map_or(0, etcd_client::ResponseHeader::revision)
    }

    pub(crate) fn compact(&mut self, revision: i64) {
        let options = CompactionOptions::new().with_physical();
        self.must(async |client| match client.compact(revision, Some(options.clone())).await {
            Err(error) if error.to_string().contains("compacted") => Ok(()),
            answer => answer.map(drop),
        });
    }

    /// Gives back what a member's file has grown by, until it has so many bytes at most.
    /// A member compacts when it comes to it, and only then is there something to give back.
    pub(crate) fn defragment(&mut self, index: usize, most: i64) {
        let (endpoint, user) = (self.endpoints[index].clone(), self.user.clone());
        let start = Instant::now();
        loop {
            let work = async {
                let mut client = connect(&endpoint, user.as_ref()).await?;
                client.defragment().await?;
                Ok::<_, Error>(client.status().await?.db_size())
            };
            let size = self.runtime.block_on(work);
            let size = size.unwrap_or_else(|error| panic!("{endpoint} is not defragmented: {error}"));
            if size <= most {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{endpoint} still has {size} bytes");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends every alarm, those too that a write which was under way has raised meanwhile.
    pub(crate) fn disarm(&mut self) {
        self.must(async |client| {
            loop {
                let raised = client.alarm(AlarmAction::Get, AlarmType::None, None).await?;
                if raised.alarms().is_empty() {
                    return Ok(());
                }
                for alarm in raised.alarms() {
                    let mut of = AlarmOptions::new();
                    of.with_member(alarm.member_id());
                    client.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of)).await?;
                }
            }
        });
    }

    /// Makes users with the rights that agents need, the first of them root, and asks everybody for one from now on.
    pub(crate) fn switch_users_on(&mut self, users: &[(&str, &str)]) {
        self.must(async |client| {
            for role in ["root", "flannel"] {
                client.role_add(role).await?;
            }
            for what in ["subnets", "hosts"] {
                let (from, to) = (format!("{PREFIX}/{what}/"), format!("{PREFIX}/{what}0"));
                let all = Permission::read_write(from).with_range_end(to);
                client.role_grant_permission("flannel", all).await?;
            }
            client.role_grant_permission("flannel", Permission::read(format!("{PREFIX}/config"))).await?;
            for (name, password) in users {
                client.user_add(*name, *password, None).await?;
                client.user_grant_role(*name, if *name == "root" { "root" } else { "flannel" }).await?;
            }
            client.auth_enable().await
        });
        // From now on with a name.
        self.client = None;
    }

    pub(crate) fn change_password(&mut self, name: &str, password: &str) {
        self.must(async |client| client.user_change_password(name, password).await);
    }

    /// Puts a peer, and writes down when.
    pub(crate) fn put_peer(&mut self, peer: &Lease) {
        let sent = now();
        self.put(&peer.key(), peer.value());
        let record = PeerRecord { mac: peer.mac.clone(), address: peer.address.clone() };
        let write = Written { sent, acked: now(), peer: Some(record), subnet: peer.subnet.clone() };
        self.writes.write(&write);
    }

    /// Removes a peer, and writes down when.
    pub(crate) fn remove_peer(&mut self, peer: &Lease) {
        let sent = now();
        self.delete(&peer.key());
        self.writes.write(&Written { sent, acked: now(), peer: None, subnet: peer.subnet.clone() });
    }

    /// What a member says of itself; `None` if it does not.
    pub(crate) fn status(&self, index: usize) -> Option<MemberStatus> {
        let (endpoint, user) = (&self.endpoints[index], self.user.as_ref());
        self.runtime.block_on(async {
            let work = async {
                let mut client = connect(endpoint, user).await?;
                client.status().await
            };
            let answer = timeout(Duration::from_millis(500), work).await.ok()?.ok()?;
            let own = answer.header()?.member_id();
            Some(MemberStatus { leads: answer.leader() == own && own != 0 })
        })
    }

    /// The member that leads, once there is one.
    pub(crate) fn leader(&self) -> usize {
        let start = Instant::now();
        loop {
            let leads = |index: &usize| self.status(*index).is_some_and(|status| status.leads);
            if let Some(index) = (0..self.endpoints.len()).find(leads) {
                return index;
            }
            assert!(start.elapsed() < PATIENCE, "no member leads");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Writes a key, over nothing but what stands there. A request that went unanswered may still reach etcd, out of the
/// kernel's buffer, once packets no longer vanish: it must not undo what was written since. That a read comes first
/// keeps all but a few writes out of such a buffer.
async fn write(client: &mut Client, key: &str, write: TxnOp) -> Result<i64, Error> {
    loop {
        let found = client.get(key, None).await?;
        let modified = found.kvs().first().map_or(0, KeyValue::mod_revision);
        let unchanged = Compare::mod_revision(key, CompareOp::Equal, modified);
        let answer = client.txn(Txn::new().when([unchanged]).and_then([write.clone()])).await?;
        if answer.succeeded() {
            return Ok(answer.header().map_or(0, ResponseHeader::revision));
        }
    }
}

pub(crate) async fn connect(endpoint: &str, user: Option<&(String, String)>) -> Result<Client, Error> {
    let mut options = ConnectOptions::new()
        .with_connect_timeout(ATTEMPT)
        .with_keep_alive(ATTEMPT, ATTEMPT)
        .with_require_leader(true);
    let without = options.clone();
    let Some((name, password)) = user else { return Client::connect([endpoint], Some(options)).await };
    options = options.with_user(name, password).with_auto_token_refresh(true);
    match Client::connect([endpoint], Some(options)).await {
        Err(error) if error.to_string().contains("authentication is not enabled") => {
            Client::connect([endpoint], Some(without)).await
        }
        answer => answer,
    }
}
