//! From settings to clients: endpoints, TLS files, user.
//!
//! Everything that can be wrong with a setting is found here, before the first
//! byte is sent, and named by its flag. The rules are flannel's where they make
//! sense: the first endpoint's scheme decides for all, and `http://` means
//! plaintext even when certificates are given. Three modes of TLS exist: a CA
//! file, a CA file with a client certificate, and the system's roots.

use std::fmt;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Certificate, Client, ConnectOptions, Error as EtcdError, Identity, KvClient, LeaseClient, TlsOptions,
    WatchClient,
};
use flannel_core::lease::HostIdentity;
use thiserror::Error;
use tracing::warn;

use crate::call::{ATTEMPT, Trouble};
use crate::kv::Refusal;

/// How to reach etcd, as the operator says it.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// `--etcd-endpoints`, already split at the commas.
    pub endpoints: Vec<String>,
    /// `--etcd-prefix`.
    pub prefix: String,
    /// `--etcd-cafile`; without it the system's roots are trusted.
    pub ca_file: Option<PathBuf>,
    /// `--etcd-certfile`, together with the key or not at all.
    pub cert_file: Option<PathBuf>,
    /// `--etcd-keyfile`, together with the certificate or not at all.
    pub key_file: Option<PathBuf>,
    /// `--etcd-username`; used only together with a password.
    pub username: Option<String>,
    /// `--etcd-password`.
    pub password: Option<Password>,
    /// `--etcd-password-file`, read anew for each authentication; instead of a password.
    pub password_file: Option<PathBuf>,
    /// Who we are, by which other hosts with our address are told from us; `None` as with flannel, which does not ask.
    pub host: Option<HostIdentity>,
}

/// A password that does not show itself.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Password(String);

impl Password {
    /// Takes a password in.
    pub fn new(password: impl Into<String>) -> Self {
        Self(password.into())
    }
}

impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"***\"")
    }
}

/// A setting that cannot work. Trying again helps only once it is corrected.
#[derive(Debug, Error)]
pub enum SettingsError {
    /// There is no endpoint at all.
    #[error("--etcd-endpoints is empty: must name at least one endpoint, as in http://127.0.0.1:2379")]
    NoEndpoints,
    /// An endpoint is not an address.
    #[error("--etcd-endpoints {found:?}: must be {allowed}")]
    Endpoint {
        /// The endpoint; kept out when it might hold a password.
        found: String,
        /// What may stand there.
        allowed: &'static str,
    },
    /// Of a certificate and its key only one is given.
    #[error("{given} without {missing}: give both or neither")]
    Lone {
        /// The flag that is given.
        given: &'static str,
        /// The flag that is not.
        missing: &'static str,
    },
    /// Of two ways to say one thing both are given.
    #[error("{one} and {other}: give one of them")]
    Both {
        /// One flag.
        one: &'static str,
        /// The other.
        other: &'static str,
    },
    /// A file cannot be read.
    #[error("{flag} {}", path.display())]
    File {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it cannot be read.
        #[source]
        source: io::Error,
    },
    /// A file does not hold what its flag asks for.
    #[error("{flag} {}: {reason}", path.display())]
    Content {
        /// The flag that names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with its content.
        reason: String,
    },
    /// The certificate and the key do not work together, or the system has no roots.
    #[error("{flags}: {reason}")]
    Tls {
        /// The flags, with their files.
        flags: String,
        /// What is wrong.
        reason: String,
    },
}

const CA: &str = "--etcd-cafile";
const CERT: &str = "--etcd-certfile";
const KEY: &str = "--etcd-keyfile";
const PASSWORD: &str = "--etcd-password";
const PASSWORD_FILE: &str = "--etcd-password-file";

/// An idle connection is not pinged: etcd takes pings without a stream for an
/// attack and hangs up. A watch is a stream, so a watched connection is pinged.
/// More often than every 5 s is an attack, too (`--grpc-keepalive-min-time`); as
/// the time is counted from the last answer, no jitter brings two closer together.
const PING_EVERY: Duration = Duration::from_secs(6);

/// Time for TCP to send a lost ping three times more, after 0.2, 0.6 and 1.4 s.
const PING_ANSWER: Duration = Duration::from_secs(2);

/// How long after its last sign of life a watched connection is known to be dead.
pub(crate) const SILENCE: Duration = PING_EVERY.saturating_add(PING_ANSWER);

/// A range of 25,000 leases is over tonic's 4 MiB; etcd itself has no limit on answers.
const ANSWER_LIMIT: usize = 64 << 20;

/// Makes clients, one endpoint at a time.
pub(crate) struct Dial {
    endpoints: Vec<String>,
    tls: Option<TlsFiles>,
    user: Option<(String, Secret)>,
}

/// Where the password is.
#[derive(Clone)]
enum Secret {
    Given(Password),
    File(PathBuf),
}

impl Secret {
    /// The one that is given, if one is.
    fn of(settings: &Settings) -> Result<Option<Self>, SettingsError> {
        let password = settings.password.clone().filter(|password| !password.0.is_empty());
        let file = settings.password_file.clone().filter(|path| !path.as_os_str().is_empty());
        match (password, file) {
            (Some(_), Some(_)) => Err(SettingsError::Both { one: PASSWORD, other: PASSWORD_FILE }),
            (Some(password), None) => Ok(Some(Self::Given(password))),
            (None, Some(file)) => Ok(Some(Self::File(file))),
            (None, None) => Ok(None),
        }
    }

    fn read(&self) -> Result<Password, SettingsError> {
        let path = match self {
            Self::Given(password) => return Ok(password.clone()),
            Self::File(path) => path,
        };
        let flag = PASSWORD_FILE;
        let text = std::fs::read_to_string(path).map_err(|source| SettingsError::File {
            flag,
            path: path.clone(),
            source,
        })?;
        let text = without_line_break(&text);
        if text.is_empty() {
            let reason = "holds no password".into();
            return Err(SettingsError::Content { flag, path: path.clone(), reason });
        }
        Ok(Password::new(text))
    }
}

/// An editor ends a file with a line break, which is hardly meant.
fn without_line_break(text: &str) -> &str {
    let cut = text.strip_suffix('\n');
    cut.map_or(text, |text| text.strip_suffix('\r').unwrap_or(text))
}

/// The clients of one endpoint; they share one connection.
#[derive(Clone)]
pub(crate) struct Clients {
    pub(crate) kv: KvClient,
    pub(crate) lease: LeaseClient,
    pub(crate) watch: WatchClient,
    /// Another one for each authentication.
    pub(crate) token: Arc<()>,
}

impl Dial {
    /// Checks every setting; opens no connection.
    pub(crate) async fn new(settings: &Settings) -> Result<Self, SettingsError> {
        let files = TlsFiles::of(settings)?;
        let first = settings.endpoints.first().ok_or(SettingsError::NoEndpoints)?;
        let tls = match first.split_once("://") {
            Some(("https", _)) => Some(files),
            Some(("http", _)) if files.any() => {
                warn!(endpoint = %shown(first), "certificates are given but the first endpoint is http: talking plaintext");
                None
            }
            _ => Some(files).filter(TlsFiles::any),
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let endpoints = settings
            .endpoints
            .iter()
            .map(|endpoint| authority(endpoint).map(|authority| format!("{scheme}://{authority}")))
            .collect::<Result<_, _>>()?;
        if let Some(tls) = &tls {
            tls.check().await?;
        }
        let filled = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
        let secret = Secret::of(settings)?;
        if let Some(secret) = &secret {
            secret.read()?;
        }
        let user = match (filled(&settings.username), secret) {
            (Some(user), Some(secret)) => Some((user, secret)),
            (None, None) => None,
            _ => {
                warn!("only one of --etcd-username and --etcd-password is given: connecting without a user");
                None
            }
        };
        Ok(Self { endpoints, tls, user })
    }

    pub(crate) fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    pub(crate) fn has_user(&self) -> bool {
        self.user.is_some()
    }

    /// What an operator should look at when an attempt ends in `words`.
    ///
    /// In TLS 1.3 a server asks for a certificate when the client already
    /// believes to be connected: depending on the moment its "no" arrives as an
    /// alert or as a connection that ends.
    pub(crate) fn hint(&self, words: &str) -> &'static str {
        const ENDS: [&str; 5] = ["BadCertificate", "CertificateRequired", "closed", "reset", "roken pipe"];
        let has = |said: &str| words.contains(said);
        let is_unknown = has("UnknownIssuer") || has("BadSignature");
        match &self.tls {
            None if has("roken pipe") => " (if that stays: is it https that is spoken there?)",
            None => "",
            Some(_) if has("handshake eof") => " (if that stays: is it http that is spoken there?)",
            Some(TlsFiles { ca: Some(_), .. }) if is_unknown => {
                " (its certificate is not of the CA in --etcd-cafile)"
            }
            Some(_) if is_unknown => " (none of the system's CAs knows it: --etcd-cafile)",
            Some(_) if has("NotValidForName") => " (--etcd-endpoints has to name it as its certificate does)",
            Some(TlsFiles { identity: None, .. }) if ENDS.iter().any(|end| has(end)) => {
                " (it may ask for a certificate: --etcd-certfile and --etcd-keyfile)"
            }
            Some(_) if has("BadCertificate") => " (it does not take the certificate in --etcd-certfile)",
            Some(_) => "",
        }
    }

    /// Makes the clients of one endpoint. The files are read each time, so that
    /// a renewed certificate or password is taken up with the next connection.
    ///
    /// etcd-client could fetch a new token by itself, but only with the password
    /// that it was made with, and as often as it is called.
    pub(crate) async fn connect(&self, endpoint: &str) -> Result<Clients, Trouble> {
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_keep_alive(PING_EVERY, PING_ANSWER)
            .with_keep_alive_while_idle(false)
            .with_connect_timeout(ATTEMPT);
        if let Some(tls) = &self.tls {
            options = options.with_tls(tls.load().map_err(unusable)?);
        }
        let client = match &self.user {
            None => Client::connect([endpoint], Some(options)).await,
            Some((user, secret)) => {
                let Password(password) = secret.read().map_err(unusable)?;
                match Client::connect([endpoint], Some(options.clone().with_user(user, password))).await {
                    // As with flannel, a user is no fault as long as etcd does not ask for one.
                    Err(error) if auth_is_off(&error) => Client::connect([endpoint], Some(options)).await,
                    answer => answer,
                }
            }
        };
        let client = client.map_err(Trouble::of)?;
        Ok(Clients {
            kv: client.kv_client().max_decoding_message_size(ANSWER_LIMIT),
            lease: client.lease_client(),
            watch: client.watch_client().max_decoding_message_size(ANSWER_LIMIT),
            token: Arc::default(),
        })
    }
}

/// Whether an endpoint is one that can be used, for whoever gathers mistakes.
///
/// # Errors
/// It is no address, or holds a user.
pub fn check_endpoint(endpoint: &str) -> Result<(), SettingsError> {
    authority(endpoint).map(drop)
}

/// The host and port of an endpoint, its scheme checked and cut off.
fn authority(endpoint: &str) -> Result<&str, SettingsError> {
    let bad = |allowed| SettingsError::Endpoint { found: shown(endpoint), allowed };
    let rest = match endpoint.split_once("://") {
        None => endpoint,
        Some(("http" | "https", rest)) => rest,
        Some(_) => return Err(bad("http://host:port, https://host:port or host:port")),
    };
    if rest.contains('@') {
        return Err(bad("without a user; --etcd-username and --etcd-password are for that"));
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    let allowed = "host:port, with http:// or https:// in front or nothing, and nothing behind";
    let (host, port) = rest.rsplit_once(':').ok_or_else(|| bad(allowed))?;
    let host_is_good = match host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        Some(v6) => v6.parse::<Ipv6Addr>().is_ok(),
        None => {
            !host.is_empty()
                && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte))
        }
    };
    let port_is_good =
        port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok_and(|port| port > 0);
    if host_is_good && port_is_good { Ok(rest) } else { Err(bad(allowed)) }
}

/// An endpoint as it may be shown: what stands before an `@` may be a password.
fn shown(endpoint: &str) -> String {
    match endpoint.rsplit_once('@') {
        Some((_, host)) => format!("***@{host}"),
        None => endpoint.into(),
    }
}

fn auth_is_off(error: &EtcdError) -> bool {
    matches!(error, EtcdError::GRpcStatus(status)
        if status.code() as i32 == Refusal::FAILED_PRECONDITION && status.message().contains("authentication is not enabled"))
}

#[derive(Clone, Default)]
struct TlsFiles {
    ca: Option<PathBuf>,
    identity: Option<(PathBuf, PathBuf)>,
}

impl TlsFiles {
    fn of(settings: &Settings) -> Result<Self, SettingsError> {
        let filled = |path: &Option<PathBuf>| path.clone().filter(|path| !path.as_os_str().is_empty());
        let identity = match (filled(&settings.cert_file), filled(&settings.key_file)) {
            (Some(cert), Some(key)) => Some((cert, key)),
            (None, None) => None,
            (Some(_), None) => return Err(SettingsError::Lone { given: CERT, missing: KEY }),
            (None, Some(_)) => return Err(SettingsError::Lone { given: KEY, missing: CERT }),
        };
        Ok(Self { ca: filled(&settings.ca_file), identity })
    }

    fn any(&self) -> bool {
        self.ca.is_some() || self.identity.is_some()
    }

    fn load(&self) -> Result<TlsOptions, SettingsError> {
        let mut tls = TlsOptions::new();
        tls = match &self.ca {
            Some(ca) => tls.ca_certificate(Certificate::from_pem(pem(CA, ca, "CERTIFICATE-----")?)),
            None => tls.with_native_roots(),
        };
        if let Some((cert, key)) = &self.identity {
            let cert = pem(CERT, cert, "CERTIFICATE-----")?;
            tls = tls.identity(Identity::from_pem(cert, pem(KEY, key, "PRIVATE KEY-----")?));
        }
        Ok(tls)
    }

    /// Tells what is wrong with the files by building a TLS client from them
    /// that is never used: first without the client certificate, then with it.
    async fn check(&self) -> Result<(), SettingsError> {
        let without = Self { ca: self.ca.clone(), identity: None };
        if let Err(reason) = without.build().await? {
            return Err(match &self.ca {
                Some(ca) => SettingsError::Content { flag: CA, path: ca.clone(), reason },
                None => SettingsError::Tls { flags: format!("no {CA} is given"), reason },
            });
        }
        match (&self.identity, self.build().await?) {
            (Some((cert, key)), Err(reason)) => {
                let flags = format!("{CERT} {} with {KEY} {}", cert.display(), key.display());
                Err(SettingsError::Tls { flags, reason })
            }
            _ => Ok(()),
        }
    }

    async fn build(&self) -> Result<Result<(), String>, SettingsError> {
        let options = ConnectOptions::new().with_tls(self.load()?);
        let built = Client::connect(["https://localhost:1"], Some(options)).await;
        Ok(built.map(drop).map_err(|error| Trouble::of(error).to_string()))
    }
}

fn pem(flag: &'static str, path: &Path, marker: &str) -> Result<String, SettingsError> {
    let text = std::fs::read(path)
        .map_err(|source| SettingsError::File { flag, path: path.into(), source })
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())?;
    if !text.contains(marker) {
        let reason = format!("holds no PEM block of {}", marker.trim_end_matches('-').to_lowercase());
        return Err(SettingsError::Content { flag, path: path.into(), reason });
    }
    Ok(text)
}

/// A file that was good and is not any more, as while it is replaced.
fn unusable(error: SettingsError) -> Trouble {
    Trouble::away(with_cause(&error))
}

fn with_cause(error: &SettingsError) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(endpoints: &[&str]) -> Settings {
        let endpoints = endpoints.iter().map(|endpoint| endpoint.to_string()).collect();
        Settings { endpoints, prefix: "/coreos.com/network".into(), ..Settings::default() }
    }

    async fn dialled(settings: Settings) -> Vec<String> {
        Dial::new(&settings).await.unwrap_or_else(|error| panic!("{error}")).endpoints
    }

    async fn refusal(settings: Settings) -> String {
        let error = Dial::new(&settings).await.err().expect("the settings are refused");
        with_cause(&error)
    }

    #[tokio::test]
    async fn the_scheme_of_the_first_endpoint_decides_for_all() {
        let found = dialled(settings(&["http://a:1", "https://b:2", "c:3", "[::1]:4/"])).await;

        assert_eq!(found, ["http://a:1", "http://b:2", "http://c:3", "http://[::1]:4"]);
    }

    #[tokio::test]
    async fn an_endpoint_without_a_scheme_is_plaintext_when_no_file_is_given() {
        assert_eq!(dialled(settings(&["a:1"])).await, ["http://a:1"]);
    }

    #[tokio::test]
    async fn an_endpoint_that_is_no_address_is_named() {
        for bad in
            ["", "a", "a:0", "a:70000", "a:+1", "http://a:1/path", "http://a:1?x", "::1:2379", "a b:1", ":1"]
        {
            let refusal = refusal(settings(&["http://good:1", bad])).await;

            assert!(
                refusal.starts_with(&format!("--etcd-endpoints {bad:?}: must be host:port")),
                "{refusal}"
            );
        }
    }

    #[tokio::test]
    async fn another_scheme_is_refused_with_those_that_are_allowed() {
        assert_eq!(
            refusal(settings(&["unix:///run/etcd"])).await,
            "--etcd-endpoints \"unix:///run/etcd\": must be http://host:port, https://host:port or host:port"
        );
    }

    #[tokio::test]
    async fn a_password_in_an_endpoint_is_refused_and_not_shown() {
        let refusal = refusal(settings(&["http://root:hunter2@a:1"])).await;

        assert!(refusal.contains("--etcd-password") && !refusal.contains("hunter2"), "{refusal}");
    }

    #[tokio::test]
    async fn no_endpoint_is_refused() {
        assert!(refusal(settings(&[])).await.starts_with("--etcd-endpoints is empty"));
    }

    #[tokio::test]
    async fn a_certificate_without_a_key_is_refused_and_so_is_a_key_without_a_certificate() {
        let lone_cert = Settings { cert_file: Some("cert.pem".into()), ..settings(&["https://a:1"]) };
        let lone_key = Settings { key_file: Some("key.pem".into()), ..settings(&["https://a:1"]) };

        assert_eq!(refusal(lone_cert).await, "--etcd-certfile without --etcd-keyfile: give both or neither");
        assert_eq!(refusal(lone_key).await, "--etcd-keyfile without --etcd-certfile: give both or neither");
    }

    #[tokio::test]
    async fn a_file_that_is_not_there_is_named_with_its_flag() {
        let refusal = refusal(Settings { ca_file: Some("/not/there".into()), ..settings(&["a:1"]) }).await;

        assert!(refusal.starts_with("--etcd-cafile /not/there: No such file"), "{refusal}");
    }

    #[tokio::test]
    async fn a_file_that_holds_no_certificate_is_named_with_its_flag() {
        let refusal = refusal(Settings { ca_file: Some("/dev/null".into()), ..settings(&["a:1"]) }).await;

        assert_eq!(refusal, "--etcd-cafile /dev/null: holds no PEM block of certificate");
    }

    fn with_password_file(path: &Path) -> Settings {
        Settings { username: Some("flannel".into()), password_file: Some(path.into()), ..settings(&["a:1"]) }
    }

    #[tokio::test]
    async fn a_password_file_that_is_not_there_or_empty_is_named_with_its_flag() {
        let missing = refusal(with_password_file(Path::new("/not/there"))).await;
        let empty = refusal(with_password_file(Path::new("/dev/null"))).await;

        assert!(missing.starts_with("--etcd-password-file /not/there: No such file"), "{missing}");
        assert_eq!(empty, "--etcd-password-file /dev/null: holds no password");
    }

    #[tokio::test]
    async fn a_password_and_a_password_file_are_one_too_many() {
        let password = Some(Password::new("hunter2"));
        let both = Settings { password, ..with_password_file(Path::new("/dev/null")) };

        assert_eq!(refusal(both).await, "--etcd-password and --etcd-password-file: give one of them");
    }

    #[test]
    fn a_password_file_is_read_to_its_last_line_break() {
        for (text, password) in
            [("a b", "a b"), ("ab\n", "ab"), ("ab\r\n", "ab"), ("a\n\n", "a\n"), (" a ", " a "), ("\n", "")]
        {
            assert_eq!(without_line_break(text), password, "{text:?}");
        }
    }

    #[test]
    fn a_password_does_not_show_itself() {
        let settings = Settings { password: Some(Password::new("hunter2")), ..settings(&[]) };

        assert_eq!(format!("{:?}", settings.password), "Some(\"***\")");
        assert!(!format!("{settings:#?}").contains("hunter2"));
    }
}
