//! A real etcd for a test, and a wire to it that can be cut.
//!
//! Each test has an etcd of its own, with free ports on loopback and its data
//! in a directory that goes with it. Its health and its counters are read from
//! a plaintext port beside the client port, so that the same code serves the
//! variants with TLS and with users.

use std::net::{Ipv4Addr, SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, Client, CompactionOptions, ConnectOptions, DeleteOptions,
    GetOptions, LeaseGrantOptions, Permission, PutOptions, StatusResponse, Txn, TxnOp,
};
use flannel_etcd::{Password, Settings};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::need;

/// The usual prefix.
pub const PREFIX: &str = "/coreos.com/network";

/// Root's password in an etcd with users.
pub const ROOT_PASSWORD: &str = "root-secret";

/// How the etcd is to be run.
#[derive(Clone, Debug, Default)]
pub struct Kind {
    tls: Option<Certificates>,
    ask_clients: bool,
    flags: Vec<String>,
}

impl Kind {
    /// Plaintext, no users.
    pub fn plain() -> Self {
        Self::default()
    }

    /// With this server certificate.
    pub fn tls(certificates: &Certificates) -> Self {
        Self { tls: Some(certificates.clone()), ..Self::default() }
    }

    /// Only for clients with a certificate of the same CA.
    pub fn asking_clients(mut self) -> Self {
        self.ask_clients = true;
        self
    }

    /// With one more flag.
    pub fn flag(mut self, flag: &str) -> Self {
        self.flags.push(flag.into());
        self
    }
}

/// A running etcd; it ends with this value.
#[derive(Debug)]
pub struct Etcd {
    kind: Kind,
    name: String,
    /// The members of its cluster, as `--initial-cluster` has them.
    members: String,
    data: TempDir,
    client: u16,
    peer: u16,
    metrics: u16,
    child: Option<Child>,
}

impl Etcd {
    /// Runs an etcd and waits until it serves; `None` if there is none to run.
    pub async fn start() -> Option<Self> {
        Self::start_as(Kind::plain()).await
    }

    /// The same, for another kind.
    ///
    /// # Panics
    /// It is installed and does not come up.
    pub async fn start_as(kind: Kind) -> Option<Self> {
        if !need("etcd") {
            return None;
        }
        // Between finding a free port and using it somebody else may be faster.
        for _ in 0..5 {
            let mut etcd = Self::member("default", &kind, free_ports());
            etcd.members = etcd.as_member();
            if etcd.run().await {
                return Some(etcd);
            }
        }
        panic!("etcd does not come up");
    }

    fn member(name: &str, kind: &Kind, [client, peer, metrics]: [u16; 3]) -> Self {
        let data = tempfile::tempdir().expect("a temporary directory can be made");
        let (kind, name, members) = (kind.clone(), name.into(), String::new());
        Self { kind, name, members, data, client, peer, metrics, child: None }
    }

    fn as_member(&self) -> String {
        format!("{}=http://127.0.0.1:{}", self.name, self.peer)
    }

    /// Starts it again on the same ports and data.
    ///
    /// # Panics
    /// It does not come up.
    pub async fn start_again(&mut self) {
        assert!(self.run().await, "etcd does not come up again");
    }

    /// Ends it as a power cut would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Loses all it has ever stored; it must not be running.
    ///
    /// # Panics
    /// The files cannot be removed.
    pub fn wipe(&mut self) {
        assert!(self.child.is_none(), "a running etcd cannot be wiped");
        std::fs::remove_dir_all(self.data.path().join("member")).expect("the data can be removed");
    }

    /// Writes all that it has into a file; `None` if there is no etcdctl.
    ///
    /// # Panics
    /// It cannot.
    pub fn back_up(&self) -> Option<PathBuf> {
        let file = self.data.path().join("backup");
        let _ = std::fs::remove_file(&file);
        let to = format!("--endpoints={}", self.endpoint());
        etcdctl(&[&to, "snapshot", "save", &file.display().to_string()])?;
        Some(file)
    }

    /// Puts back what it had then, as the same member of the same cluster; it must not be running.
    ///
    /// # Panics
    /// It cannot.
    pub fn restore(&mut self, backup: &Path) {
        self.wipe();
        let restored = self.data.path().join("restored");
        let words = [
            format!("--data-dir={}", restored.display()),
            format!("--name={}", self.name),
            format!("--initial-cluster={}", self.members),
            format!("--initial-advertise-peer-urls=http://127.0.0.1:{}", self.peer),
        ];
        let file = backup.display().to_string();
        let words: Vec<&str> =
            ["snapshot", "restore", &file].into_iter().chain(words.iter().map(String::as_str)).collect();
        etcdctl(&words).expect("etcdctl was there for the backup");
        std::fs::rename(restored.join("member"), self.data.path().join("member")).expect("a directory moves");
        std::fs::remove_dir_all(restored).expect("an empty directory goes");
    }

    /// Stops it where it stands: connections stay open and nothing answers.
    pub fn freeze(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// Where clients reach it.
    pub fn address(&self) -> SocketAddr {
        (Ipv4Addr::LOCALHOST, self.client).into()
    }

    /// The same as an URL.
    pub fn endpoint(&self) -> String {
        let scheme = if self.kind.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address())
    }

    /// What a store needs to reach it, without files and users.
    pub fn settings(&self) -> Settings {
        Settings { endpoints: vec![self.endpoint()], prefix: PREFIX.into(), ..Settings::default() }
    }

    /// A client that is not ours.
    ///
    /// # Panics
    /// It cannot connect.
    pub async fn raw(&self) -> Raw {
        Raw(Client::connect([self.endpoint()], None).await.expect("etcd can be reached"))
    }

    /// The same, as root.
    ///
    /// # Panics
    /// It cannot connect.
    pub async fn raw_as_root(&self) -> Raw {
        let options = ConnectOptions::new().with_user("root", ROOT_PASSWORD).with_auto_token_refresh(true);
        Raw(Client::connect([self.endpoint()], Some(options)).await.expect("etcd can be reached as root"))
    }

    /// Makes a user who may do what flannel asks for, and asks everybody for a user from now on.
    ///
    /// # Panics
    /// etcd refuses.
    pub async fn switch_users_on(&self, user: &str, password: &str) {
        let Raw(mut client) = self.raw().await;
        let leases =
            Permission::read_write(format!("{PREFIX}/subnets")).with_range_end(format!("{PREFIX}/subnett"));
        client.role_add("flannel").await.expect("a role is made");
        client.role_grant_permission("flannel", leases).await.expect("a permission is granted");
        let config = Permission::read(format!("{PREFIX}/config"));
        client.role_grant_permission("flannel", config).await.expect("a permission is granted");
        for (name, password, role) in [(user, password, "flannel"), ("root", ROOT_PASSWORD, "root")] {
            client.user_add(name, password, None).await.expect("a user is made");
            if role == "root" {
                client.role_add("root").await.expect("a role is made");
            }
            client.user_grant_role(name, role).await.expect("a role is granted");
        }
        client.auth_enable().await.expect("users are switched on");
    }

    /// Lets that user write records of hosts, too.
    ///
    /// # Panics
    /// etcd refuses.
    pub async fn allow_records(&self) {
        let Raw(mut root) = self.raw_as_root().await;
        let hosts = Permission::read_write(format!("{PREFIX}/hosts/")).with_prefix();
        root.role_grant_permission("flannel", hosts).await.expect("a permission is granted");
    }

    /// The settings with a user.
    pub fn settings_for(&self, user: &str, password: &str) -> Settings {
        Settings { username: Some(user.into()), password: Some(Password::new(password)), ..self.settings() }
    }

    /// How many requests it has been sent, of any kind.
    ///
    /// # Panics
    /// It does not say.
    pub async fn requests(&self) -> u64 {
        self.count("").await
    }

    /// How often somebody has shown it a password.
    ///
    /// # Panics
    /// It does not say.
    pub async fn authentications(&self) -> u64 {
        self.count("\"Authenticate\"").await
    }

    async fn count(&self, method: &str) -> u64 {
        let text = http_get(self.metrics, "/metrics").await.expect("etcd shows its counters");
        let count =
            |line: &str| line.rsplit(' ').next().and_then(|count| count.parse::<f64>().ok()).unwrap_or(0.0);
        let is_meant = |line: &&str| line.starts_with("grpc_server_started_total") && line.contains(method);
        text.lines().filter(is_meant).map(count).sum::<f64>() as u64
    }

    async fn run(&mut self) -> bool {
        let (endpoint, peer) = (self.endpoint(), format!("http://127.0.0.1:{}", self.peer));
        let mut command = Command::new("etcd");
        command
            .arg(format!("--data-dir={}", self.data.path().display()))
            .args([format!("--listen-client-urls={endpoint}"), format!("--advertise-client-urls={endpoint}")])
            .args([format!("--listen-peer-urls={peer}"), format!("--initial-advertise-peer-urls={peer}")])
            .arg(format!("--name={}", self.name))
            .arg(format!("--initial-cluster={}", self.members))
            .arg(format!("--listen-metrics-urls=http://127.0.0.1:{}", self.metrics))
            .args(["--heartbeat-interval=50", "--election-timeout=500", "--bcrypt-cost=4"])
            .args(&self.kind.flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(tls) = &self.kind.tls {
            command.arg(format!("--cert-file={}", tls.server_cert.display()));
            command.arg(format!("--key-file={}", tls.server_key.display()));
            // Naming a CA is asking for certificates, whatever --client-cert-auth says.
            if self.kind.ask_clients {
                command.arg(format!("--trusted-ca-file={}", tls.ca.display()));
            }
        }
        let mut child = command.spawn().expect("etcd can be run");
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            if child.try_wait().expect("a child can be waited for").is_some() {
                return false;
            }
            // Its health check is a read through raft, so "true" is a real answer.
            if http_get(self.metrics, "/health").await.is_some_and(|text| text.contains("\"true\"")) {
                self.child = Some(child);
                return true;
            }
            sleep(Duration::from_millis(20)).await;
        }
        let _ = child.kill();
        let _ = child.wait();
        false
    }

    fn signal(&self, signal: Signal) {
        if let Some(child) = &self.child {
            let pid = Pid::from_raw(child.id().try_into().expect("a pid is positive"));
            kill(pid, signal).expect("our own child can be signalled");
        }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Three etcds that are one cluster.
#[derive(Debug)]
pub struct Members(pub Vec<Etcd>);

impl Members {
    /// Runs them and waits until they serve; `None` if there is no etcd to run.
    ///
    /// # Panics
    /// It is installed and they do not come up.
    pub async fn start() -> Option<Self> {
        if !need("etcd") {
            return None;
        }
        for _ in 0..5 {
            let ports: [u16; 9] = free_ports();
            let mut members: Vec<Etcd> = ports
                .chunks_exact(3)
                .zip(["one", "two", "three"])
                .map(|(ports, name)| Etcd::member(name, &Kind::plain(), [ports[0], ports[1], ports[2]]))
                .collect();
            let names = members.iter().map(Etcd::as_member).collect::<Vec<_>>().join(",");
            members.iter_mut().for_each(|member| member.members = names.clone());
            // None of them serves before the second one is there.
            let mut starting = JoinSet::new();
            for (place, mut member) in members.into_iter().enumerate() {
                starting.spawn(async move { (place, member.run().await, member) });
            }
            let mut started = starting.join_all().await;
            started.sort_by_key(|(place, ..)| *place);
            if started.iter().all(|(_, is_up, _)| *is_up) {
                return Some(Self(started.into_iter().map(|(.., member)| member).collect()));
            }
        }
        panic!("three etcds do not come up");
    }

    /// All of them, beginning with that one.
    pub fn endpoints_from(&self, first: usize) -> Vec<String> {
        let count = self.0.len();
        (first..first + count).filter_map(|place| Some(self.0.get(place % count)?.endpoint())).collect()
    }

    /// Which one leads.
    ///
    /// # Panics
    /// None does, for long.
    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + Duration::from_secs(30);
        while Instant::now() < deadline {
            for (place, member) in self.0.iter().enumerate().filter(|(_, member)| member.child.is_some()) {
                let Ok(client) = Client::connect([member.endpoint()], None).await else { continue };
                let status = client.maintenance_client().status().await;
                let leads = |status: &StatusResponse| {
                    status.header().is_some_and(|header| header.member_id() == status.leader())
                };
                if status.as_ref().is_ok_and(leads) {
                    return place;
                }
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("nobody leads");
    }
}

/// etcd without any of our own code in between.
#[derive(Clone)]
pub struct Raw(pub Client);

/// A key as etcd has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// The value.
    pub value: String,
    /// The etcd lease, 0 for none.
    pub lease: i64,
    /// When it was last written.
    pub revision: i64,
}

// Whatever fails here fails the test.
#[allow(missing_docs, clippy::missing_panics_doc)]
impl Raw {
    pub async fn get(&self, key: &str) -> Option<Stored> {
        let answer = self.0.kv_client().get(key, None).await.expect("etcd reads");
        answer.kvs().first().map(|kv| Stored {
            value: kv.value_str().expect("a test's value is text").into(),
            lease: kv.lease(),
            revision: kv.mod_revision(),
        })
    }

    pub async fn keys(&self, prefix: &str) -> Vec<String> {
        let options = GetOptions::new().with_prefix().with_keys_only();
        let answer = self.0.kv_client().get(prefix, Some(options)).await.expect("etcd reads");
        answer.kvs().iter().map(|kv| kv.key_str().expect("a test's key is text").into()).collect()
    }

    pub async fn put(&self, key: &str, value: &str, lease: i64) -> i64 {
        let options = PutOptions::new().with_lease(lease);
        let answer = self.0.kv_client().put(key, value, Some(options)).await.expect("etcd writes");
        answer.header().expect("an answer has a header").revision()
    }

    /// All in one transaction, so at one revision.
    pub async fn put_together(&self, pairs: impl IntoIterator<Item = (String, String)>) -> i64 {
        let puts: Vec<TxnOp> = pairs.into_iter().map(|(key, value)| TxnOp::put(key, value, None)).collect();
        let answer = self.0.kv_client().txn(Txn::new().and_then(puts)).await.expect("etcd writes");
        answer.header().expect("an answer has a header").revision()
    }

    pub async fn delete(&self, key: &str) -> i64 {
        let answer = self.0.kv_client().delete(key, None).await.expect("etcd deletes");
        answer.header().expect("an answer has a header").revision()
    }

    /// All keys from `from` to before `end`, at one revision.
    pub async fn delete_range(&self, from: &str, end: &str) -> i64 {
        let options = DeleteOptions::new().with_range(end);
        let answer = self.0.kv_client().delete(from, Some(options)).await.expect("etcd deletes");
        answer.header().expect("an answer has a header").revision()
    }

    pub async fn grant(&self, ttl: i64) -> i64 {
        self.0.lease_client().grant(ttl, None).await.expect("etcd grants").id()
    }

    pub async fn grant_as(&self, lease: i64, ttl: i64) {
        let options = LeaseGrantOptions::new().with_id(lease);
        self.0.lease_client().grant(ttl, Some(options)).await.expect("etcd grants");
    }

    pub async fn revoke(&self, lease: i64) {
        self.0.lease_client().revoke(lease).await.expect("etcd revokes");
    }

    pub async fn granted_ttl(&self, lease: i64) -> i64 {
        self.0.lease_client().time_to_live(lease, None).await.expect("etcd tells").granted_ttl()
    }

    pub async fn leases(&self) -> Vec<i64> {
        let answer = self.0.lease_client().leases().await.expect("etcd lists its leases");
        answer.leases().iter().map(|lease| lease.id()).collect()
    }

    /// The cluster's id, and the revision it has come to.
    /// As root.
    pub async fn change_password(&self, user: &str, password: &str) {
        self.0.auth_client().user_change_password(user, password).await.expect("etcd changes a password");
    }

    pub async fn moment(&self) -> (u64, i64) {
        let answer = self.0.kv_client().get("/", None).await.expect("etcd reads");
        let header = answer.header().expect("an answer has a header");
        (header.cluster_id(), header.revision())
    }

    /// Gives all space back that is not needed, and lets etcd write again.
    pub async fn make_room(&self) {
        // Else it answers before anything is gone.
        let wait = CompactionOptions::new().with_physical();
        self.0.kv_client().compact(self.moment().await.1, Some(wait)).await.expect("etcd compacts");
        let mut maintenance = self.0.maintenance_client();
        maintenance.defragment().await.expect("etcd defragments");
        let member = self.0.kv_client().get("/", None).await.expect("etcd reads");
        let mut its = AlarmOptions::new();
        its.with_member(member.header().expect("an answer has a header").member_id());
        let disarmed = maintenance.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(its)).await;
        disarmed.expect("etcd disarms");
    }

    pub async fn compact(&self, revision: i64) {
        self.0.kv_client().compact(revision, None).await.expect("etcd compacts");
    }
}

/// A wire between a client and an etcd.
pub struct Wire {
    address: SocketAddr,
    state: watch::Sender<WireState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WireState {
    Whole,
    Cut,
    Silent,
}

impl Wire {
    /// Lays a wire to an etcd.
    ///
    /// # Panics
    /// There is no free port.
    pub async fn to(etcd: &Etcd) -> Self {
        let target = etcd.address();
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("there is a free port");
        let address = listener.local_addr().expect("a bound socket has an address");
        let (state, seen) = watch::channel(WireState::Whole);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(carry(near, target, seen.clone()));
            }
        });
        Self { address, state }
    }

    /// The near end.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Breaks every connection, now and from now on.
    pub fn cut(&self) {
        self.state.send_replace(WireState::Cut);
    }

    /// Keeps every connection open and carries nothing any more.
    pub fn silence(&self) {
        self.state.send_replace(WireState::Silent);
    }

    /// Carries again.
    pub fn mend(&self) {
        self.state.send_replace(WireState::Whole);
    }
}

async fn carry(mut near: TcpStream, target: SocketAddr, mut state: watch::Receiver<WireState>) {
    loop {
        let now = *state.borrow_and_update();
        match now {
            WireState::Cut => return,
            WireState::Silent => {
                if state.changed().await.is_err() {
                    return;
                }
            }
            WireState::Whole => break,
        }
    }
    let Ok(mut far) = TcpStream::connect(target).await else { return };
    let (mut near_read, mut near_write) = near.split();
    let (mut far_read, mut far_write) = far.split();
    let both = async {
        tokio::select! {
            _ = tokio::io::copy(&mut near_read, &mut far_write) => {}
            _ = tokio::io::copy(&mut far_read, &mut near_write) => {}
        }
    };
    tokio::select! {
        () = both => return,
        _ = state.changed() => {}
    }
    // A connection that has once been silent carries nothing again, as with a
    // firewall that has forgotten it.
    let _ = state.wait_for(|state| *state == WireState::Cut).await;
}

/// An endpoint that takes connections and never says a word.
///
/// # Panics
/// There is no free port.
pub async fn black_hole() -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("there is a free port");
    let address = listener.local_addr().expect("a bound socket has an address");
    tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((connection, _)) = listener.accept().await {
            taken.push(connection);
        }
    });
    format!("http://{address}")
}

/// An endpoint where nobody listens.
pub fn nobody() -> String {
    let [port] = free_ports();
    format!("http://127.0.0.1:{port}")
}

/// A CA, a server certificate for loopback and a client certificate.
#[derive(Clone, Debug)]
#[allow(missing_docs)]
pub struct Certificates {
    pub ca: PathBuf,
    pub server_cert: PathBuf,
    pub server_key: PathBuf,
    pub client_cert: PathBuf,
    pub client_key: PathBuf,
}

impl Certificates {
    /// Makes them in `directory`; `None` if there is no openssl.
    pub fn make(directory: &Path) -> Option<Self> {
        if !need("openssl") {
            return None;
        }
        let file = |name: &str| directory.join(name);
        let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
        let run = |arguments: Vec<String>| {
            let output = Command::new("openssl").args(&arguments).output().expect("openssl can be run");
            assert!(
                output.status.success(),
                "openssl {arguments:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        };
        let words = |text: &[&str]| text.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let path = |name: &str| file(name).display().to_string();

        let mut ca = words(&["req", "-x509", "-days", "2", "-subj", "/CN=test ca"]);
        ca.extend(words(&key));
        ca.extend(["-keyout".into(), path("ca.key"), "-out".into(), path("ca.pem")]);
        run(ca);
        for (name, usage) in [("server", "serverAuth,clientAuth"), ("client", "clientAuth")] {
            let subject = format!("/CN={name}");
            let mut request = words(&["req", "-subj", &subject]);
            request.extend(words(&key));
            let (key, csr, pem) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.pem"));
            request.extend(["-keyout".into(), path(&key), "-out".into(), path(&csr)]);
            run(request);
            let extensions = path(&format!("{name}.ext"));
            let text =
                format!("subjectAltName=IP:127.0.0.1\nextendedKeyUsage={usage}\nbasicConstraints=CA:FALSE\n");
            std::fs::write(&extensions, text).expect("a file can be written");
            let mut sign = words(&["x509", "-req", "-days", "2", "-CAcreateserial"]);
            sign.extend(["-in".into(), path(&csr), "-out".into(), path(&pem)]);
            sign.extend(["-CA".into(), path("ca.pem"), "-CAkey".into(), path("ca.key")]);
            sign.extend(["-extfile".into(), extensions]);
            run(sign);
        }
        Some(Self {
            ca: file("ca.pem"),
            server_cert: file("server.pem"),
            server_key: file("server.key"),
            client_cert: file("client.pem"),
            client_key: file("client.key"),
        })
    }
}

/// Runs etcdctl; `None` if there is none.
fn etcdctl(arguments: &[&str]) -> Option<()> {
    if !need("etcdctl") {
        return None;
    }
    let output = Command::new("etcdctl").env("ETCDCTL_API", "3").args(arguments).output();
    let output = output.expect("etcdctl can be run");
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "etcdctl {arguments:?}: {words}");
    Some(())
}

fn free_ports<const N: usize>() -> [u16; N] {
    // All at once, so that they differ.
    let listeners =
        [(); N].map(|()| StdListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("there is a free port"));
    listeners.map(|listener| listener.local_addr().expect("a bound socket has an address").port())
}

async fn http_get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.ok()?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes()).await.ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await.ok()?;
    Some(text)
}
