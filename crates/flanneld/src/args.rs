//! The command line and the environment: what was written, and what is meant.
//!
//! The names, defaults and spelling are Go flanneld's: one dash or two,
//! `-flag=value` or `-flag value`, booleans `-flag` or `-flag=false`, numbers
//! also as `0x10`. `FLANNELD_<FLAG>` gives a flag that the command line does
//! not. Unlike Go, which stops at the first mistake and exits 0, every mistake
//! in either place is told at once.
//!
//! ```text
//!   words ──go::split──▶ --flag=value … ─┐
//!                                        ├─ clap, one at a time ─▶ Args ─▶ Settings
//!   FLANNELD_* ──▶ --flag=value … ───────┘        (errors are gathered)
//! ```

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgAction, CommandFactory, FromArgMatches, Parser};
use flannel_core::plan::RouteMode;
use flannel_core::underlay::{Pattern, Selection};

mod go;

const ETCD: &str = "etcd";
const INTERFACE: &str = "Interface between the hosts";
const LEASE: &str = "Lease and file";
const RULES: &str = "Traffic rules";
const HEALTH: &str = "Health and kernel";
const LOG: &str = "Logging";
const LATER: &str = "Known from flanneld, refused because the part does not exist yet";

/// Every flag, as written.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "flanneld",
    version,
    about = "Leases a subnet for this host and keeps its kernel in step with the cluster.",
    long_about = None,
    after_help = "A flag may be written with one dash or two, and a boolean as -flag or -flag=false.\n\
                  Each can be given as a variable too: FLANNELD_ and its name in capitals, with _ for -;\n\
                  the command line wins. --help and --version print and do nothing else.",
    args_override_self = true,
    disable_help_flag = true,
    disable_version_flag = true,
    next_line_help = true,
    max_term_width = 100
)]
struct Args {
    /// etcd servers, separated by commas
    #[arg(long, value_name = "URLS", help_heading = ETCD, default_value = "http://127.0.0.1:4001,http://127.0.0.1:2379")]
    etcd_endpoints: String,
    /// Prefix of all keys: the config is at PREFIX/config, leases under PREFIX/subnets
    #[arg(long, value_name = "PREFIX", help_heading = ETCD, default_value = "/coreos.com/network")]
    etcd_prefix: String,
    /// Key of our certificate for etcd, PEM
    #[arg(long, value_name = "FILE", help_heading = ETCD, default_value = "")]
    etcd_keyfile: String,
    /// Our certificate for etcd, PEM
    #[arg(long, value_name = "FILE", help_heading = ETCD, default_value = "")]
    etcd_certfile: String,
    /// Certificates that etcd's is checked against, PEM; the system's if left out
    #[arg(long, value_name = "FILE", help_heading = ETCD, default_value = "")]
    etcd_cafile: String,
    /// User at etcd
    #[arg(long, value_name = "NAME", help_heading = ETCD, default_value = "")]
    etcd_username: String,
    /// The user's password; better given as FLANNELD_ETCD_PASSWORD, which `ps` does not show
    #[arg(long, value_name = "PASSWORD", help_heading = ETCD, default_value = "", value_parser = go::secret)]
    etcd_password: Secret,

    /// File that holds the password, read anew with each connection (not in flanneld)
    #[arg(long, value_name = "FILE", help_heading = ETCD, default_value = "")]
    etcd_password_file: String,

    /// Interface by name or address; may be repeated, the first that fits is used
    #[arg(long, value_name = "NAME|IP", help_heading = INTERFACE, action = ArgAction::Append)]
    iface: Vec<String>,
    /// Interface by a regular expression on its addresses, then its name; may be repeated
    #[arg(long, value_name = "REGEX", help_heading = INTERFACE, action = ArgAction::Append)]
    iface_regex: Vec<String>,
    /// Interface that the kernel would reach this address by
    #[arg(long, value_name = "IP", help_heading = INTERFACE, default_value = "")]
    iface_can_reach: String,
    /// IPv4 address that other hosts reach this one by, if it is not the interface's
    #[arg(long, value_name = "IP", help_heading = INTERFACE, default_value = "")]
    public_ip: String,

    /// File to write the subnet to, for dockerd
    #[arg(long, value_name = "FILE", help_heading = LEASE, default_value = "/run/flannel/subnet.env")]
    subnet_file: PathBuf,
    /// Directory for what outlives a reboot: which host this is, and what a start without etcd goes by; empty for
    /// none (not in flanneld)
    #[arg(long, value_name = "DIR", help_heading = LEASE, default_value = "/var/lib/flannel-rs")]
    state_dir: String,
    /// Latest moment to renew the lease, in minutes before it ends (1 to 1439)
    #[arg(long, value_name = "MINUTES", help_heading = LEASE, default_value = "60", value_parser = go::integer)]
    subnet_lease_renew_margin: i64,

    /// Masquerade traffic that leaves the network
    #[arg(long, value_name = "BOOL", help_heading = RULES, default_value = "false", value_parser = go::boolean)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    ip_masq: bool,
    /// Masquerade without picking ports at random
    #[arg(long, value_name = "BOOL", help_heading = RULES, default_value = "false", value_parser = go::boolean)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    ip_masq_fully_random_disable: bool,
    /// Accept forwarded traffic from and to the network
    #[arg(long, value_name = "BOOL", help_heading = RULES, default_value = "true", value_parser = go::boolean)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    iptables_forward_rules: bool,
    /// Drop what is for our subnet while no bridge is there to take it, instead of sending it back to the network
    #[arg(long, value_name = "BOOL", help_heading = RULES, default_value = "false", value_parser = go::boolean)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    ip_blackhole_route: bool,
    /// Seconds between checks of the rules (1 to 86400); where they are in nf_tables, changes are seen at once
    #[arg(long, value_name = "SECONDS", help_heading = RULES, default_value = "5", value_parser = go::integer)]
    iptables_resync: i64,

    /// Address of the health server
    #[arg(long, value_name = "IP", help_heading = HEALTH, default_value = "0.0.0.0")]
    healthz_ip: String,
    /// Port of the health server, /healthz and /readyz; 0 for none
    #[arg(long, value_name = "PORT", help_heading = HEALTH, default_value = "0", value_parser = go::integer)]
    #[arg(allow_negative_numbers = true)]
    healthz_port: i64,
    /// Seconds between full comparisons of the kernel with the cluster (1 to 86400; not in flanneld)
    #[arg(long, value_name = "SECONDS", help_heading = HEALTH, default_value = "60", value_parser = go::integer)]
    audit_interval: i64,
    /// Seconds to hold peers that vanish from etcd at once, more than three and more than a quarter, before it is asked
    /// again and believed (0 to 86400; 0 believes at once; not in flanneld)
    #[arg(long, value_name = "SECONDS", help_heading = HEALTH, default_value = "60", value_parser = go::integer)]
    removal_grace: i64,
    /// Routes to the peers: plain, through nexthop objects, or auto, that is nexthop for thousands of peers and
    /// plain otherwise (not in flanneld)
    #[arg(long, value_name = "auto|plain|nexthop", help_heading = HEALTH, default_value = "auto")]
    route_mode: String,

    /// 0 for a day's history, 1 to 4 for each step, above for the wire
    #[arg(long = "v", value_name = "LEVEL", help_heading = LOG, default_value = "0", value_parser = go::integer)]
    verbosity: i64,
    /// Verbosity per Go source file: accepted, without effect
    #[arg(long, value_name = "LIST", help_heading = LOG, default_value = "")]
    vmodule: String,
    /// Stack trace at a line of Go: accepted, without effect
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE", help_heading = LOG, default_value = "")]
    log_backtrace_at: String,

    /// IPv6 address that other hosts reach this one by
    #[arg(long, value_name = "IP", help_heading = LATER, default_value = "")]
    public_ipv6: String,
    /// Use the Kubernetes API instead of etcd
    #[arg(long, value_name = "BOOL", help_heading = LATER, default_value = "false", value_parser = go::boolean)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    kube_subnet_mgr: bool,
    /// URL of the Kubernetes API
    #[arg(long, value_name = "URL", help_heading = LATER, default_value = "")]
    kube_api_url: String,
    /// Prefix of node annotations
    #[arg(long, value_name = "PREFIX", help_heading = LATER, default_value = "flannel.alpha.coreos.com")]
    kube_annotation_prefix: String,
    /// Path of a kubeconfig
    #[arg(long, value_name = "FILE", help_heading = LATER, default_value = "")]
    kubeconfig_file: String,
    /// Path of the network config in Kubernetes
    #[arg(long, value_name = "FILE", help_heading = LATER, default_value = "/etc/kube-flannel/net-conf.json")]
    net_config_path: String,
    /// Whether to clear the node's NetworkUnavailable condition
    #[arg(long, value_name = "BOOL", help_heading = LATER, default_value = "true", value_parser = go::boolean)]
    #[arg(num_args = 0..=1, require_equals = true, default_missing_value = "true", action = ArgAction::Set)]
    set_node_network_unavailable: bool,
}

/// A text that is never shown.
#[derive(Clone, Default)]
pub struct Secret(String);

impl Secret {
    /// The text itself, for the one who needs it.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"***\"")
    }
}

/// Where a password is.
#[derive(Debug)]
pub enum PasswordFrom {
    /// `--etcd-password`.
    Flag(Secret),
    /// `--etcd-password-file`.
    File(PathBuf),
}

/// What is meant.
#[derive(Debug)]
pub struct Settings {
    /// `--etcd-endpoints`, split at commas.
    pub etcd_endpoints: Vec<String>,
    /// `--etcd-prefix`.
    pub etcd_prefix: String,
    /// `--etcd-keyfile`.
    pub etcd_key: Option<PathBuf>,
    /// `--etcd-certfile`.
    pub etcd_cert: Option<PathBuf>,
    /// `--etcd-cafile`.
    pub etcd_ca: Option<PathBuf>,
    /// `--etcd-username`, and where its password is.
    pub etcd_user: Option<(String, PasswordFrom)>,
    /// `--iface`, `--iface-regex`, `--iface-can-reach`, `--public-ip`.
    pub selection: Selection,
    /// `--subnet-file`.
    pub subnet_file: PathBuf,
    /// `--state-dir`.
    pub state_dir: Option<PathBuf>,
    /// `--subnet-lease-renew-margin`.
    pub renew_margin: Duration,
    /// `--ip-masq`.
    pub masquerade: bool,
    /// Not `--ip-masq-fully-random-disable`.
    pub random_fully: bool,
    /// `--iptables-forward-rules`.
    pub forward: bool,
    /// `--ip-blackhole-route`.
    pub blackhole: bool,
    /// `--iptables-resync`.
    pub rules_interval: Duration,
    /// `--healthz-ip` and `--healthz-port`.
    pub health: Option<SocketAddr>,
    /// `--audit-interval`.
    pub audit_interval: Duration,
    /// `--removal-grace`.
    pub removal_grace: Duration,
    /// `--route-mode`.
    pub route_mode: RouteMode,
    /// `--v`.
    pub verbosity: i64,
    /// Flags that were given and do nothing here.
    pub without_effect: Vec<&'static str>,
}

/// What the command line comes to.
#[derive(Debug)]
pub enum Request {
    /// Run.
    Run(Box<Settings>),
    /// Print this on stdout and be done.
    Print(String),
}

/// Every mistake in the command line and the environment, one line each.
#[derive(Debug, PartialEq, Eq)]
pub struct Mistakes(pub Vec<String>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in &self.0 {
            writeln!(f, "flanneld: {line}")?;
        }
        f.write_str("flanneld: nothing was started; --help lists the flags")
    }
}

impl Request {
    /// Reads the words after the program's name, and the environment through `variable`.
    ///
    /// # Errors
    /// All mistakes together.
    pub fn read(
        words: impl IntoIterator<Item = OsString>,
        variable: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self, Mistakes> {
        let mut command = command();
        let (written, mut mistakes) = go::split(&command, words);
        if written.iter().any(|flag| matches!(&*flag.name, "h" | "help")) {
            return Ok(Self::Print(command.render_help().to_string()));
        }
        let is_version = |flag: &&go::Flag| flag.name == "version";
        if let Some(flag) = written.iter().rev().find(is_version) {
            match flag.value.as_deref().map_or(Ok(true), go::boolean) {
                Ok(true) => return Ok(Self::Print(command.render_version())),
                Ok(false) => {}
                Err(allowed) => mistakes.push(format!("--version: {allowed}")),
            }
        }

        let mut words = vec![OsString::from("flanneld")];
        let mut given = Vec::new();
        for flag in written.into_iter().filter(|flag| flag.name != "version") {
            given.push(flag.name.clone());
            take(&flag, &format!("--{}", flag.name), &mut words, &mut mistakes);
        }
        for name in flags(&command).filter(|name| !given.contains(name)) {
            let variable_name = variable_of(&name);
            let Some(value) = variable(&variable_name).filter(|value| !value.is_empty()) else { continue };
            match value.into_string() {
                Ok(value) => {
                    take(&go::Flag { name, value: Some(value) }, &variable_name, &mut words, &mut mistakes);
                }
                Err(_) => mistakes.push(format!("{variable_name} is not UTF-8 text")),
            }
        }
        let matches = command.try_get_matches_from(words);
        let args = match matches.and_then(|matches| Args::from_arg_matches(&matches)) {
            Ok(args) => args,
            Err(error) => {
                mistakes.push(first_line(&error));
                return Err(Mistakes(mistakes));
            }
        };
        // What the environment gave is named as it stands there.
        let label = |flag: &str| match given.iter().any(|name| name == flag)
            || variable(&variable_of(flag)).is_none()
        {
            true => format!("--{flag}"),
            false => variable_of(flag),
        };
        let settings = args.meant(&label, &mut mistakes);
        if mistakes.is_empty() { Ok(Self::Run(Box::new(settings))) } else { Err(Mistakes(mistakes)) }
    }

    /// Every flag and the variable that stands for it, with its default: for
    /// the test of `config/flanneld.env`.
    pub fn variables() -> Vec<(String, String)> {
        let command = command();
        let arguments = command.get_arguments();
        let variables = arguments.filter_map(|argument| {
            let defaults = argument.get_default_values();
            let default = defaults.first().map(|value| value.to_string_lossy().into_owned());
            Some((variable_of(argument.get_long()?), default.unwrap_or_default()))
        });
        variables.collect()
    }
}

/// The flags as clap knows them; an empty default goes without saying.
fn command() -> clap::Command {
    let mut command = Args::command().mut_args(|argument| {
        let says_nothing = argument.get_default_values().iter().all(|default| default.is_empty());
        argument.hide_default_value(says_nothing)
    });
    command.build();
    command
}

/// Tries one flag alone, so that its mistake does not hide the next one's.
fn take(flag: &go::Flag, origin: &str, words: &mut Vec<OsString>, mistakes: &mut Vec<String>) {
    let word = match &flag.value {
        Some(value) => format!("--{}={value}", flag.name),
        None => format!("--{}", flag.name),
    };
    let alone = Args::command().try_get_matches_from(["flanneld", &word]);
    match alone {
        Ok(_) => words.push(word.into()),
        // A password is never repeated, not even a mistaken one.
        Err(_) if flag.name == "etcd-password" => mistakes.push(format!("{origin} cannot be read")),
        Err(error) => {
            let allowed =
                std::error::Error::source(&error).map_or_else(|| first_line(&error), ToString::to_string);
            let found = flag.value.as_deref().unwrap_or_default();
            mistakes.push(format!("{origin} is {found:?}: {allowed}"));
        }
    }
}

fn first_line(error: &clap::Error) -> String {
    let text = error.to_string();
    text.lines().next().unwrap_or_default().trim_start_matches("error: ").into()
}

fn flags(command: &clap::Command) -> impl Iterator<Item = String> {
    command.get_arguments().filter_map(|argument| argument.get_long().map(String::from))
}

/// The environment variable of a flag.
fn variable_of(flag: &str) -> String {
    format!("FLANNELD_{}", flag.to_uppercase().replace('-', "_"))
}

impl Args {
    fn meant(self, label: &dyn Fn(&str) -> String, mistakes: &mut Vec<String>) -> Settings {
        self.refuse_what_is_missing(label, mistakes);
        let mut wrong = |flag: &str, found: &dyn fmt::Display, allowed: &str| {
            mistakes.push(format!("{} is {found}: must be {allowed}", label(flag)));
        };

        let path = |text: String| Some(PathBuf::from(text)).filter(|path| !path.as_os_str().is_empty());
        let (key, cert) = (path(self.etcd_keyfile), path(self.etcd_certfile));
        if key.is_some() != cert.is_some() {
            let (given, missing) = if key.is_some() {
                ("etcd-keyfile", "--etcd-certfile")
            } else {
                ("etcd-certfile", "--etcd-keyfile")
            };
            wrong(given, &"given alone", &format!("together with {missing}"));
        }
        let password_file = path(self.etcd_password_file);
        let password = match (self.etcd_password.reveal().is_empty(), password_file) {
            (true, None) => None,
            (false, None) => Some(("etcd-password", PasswordFrom::Flag(self.etcd_password))),
            (true, Some(file)) => Some(("etcd-password-file", PasswordFrom::File(file))),
            (false, Some(file)) => {
                wrong("etcd-password-file", &"given beside --etcd-password", "one of the two");
                Some(("etcd-password-file", PasswordFrom::File(file)))
            }
        };
        let user = match (self.etcd_username.is_empty(), password) {
            (true, None) => None,
            (false, Some((_, password))) => Some((self.etcd_username, password)),
            (false, None) => {
                wrong(
                    "etcd-username",
                    &"given alone",
                    "together with --etcd-password or --etcd-password-file",
                );
                None
            }
            (true, Some((flag, _))) => {
                wrong(flag, &"given alone", "together with --etcd-username");
                None
            }
        };
        let endpoints: Vec<String> = self.etcd_endpoints.split(',').map(|url| url.trim().into()).collect();

        let bad_endpoints =
            endpoints.iter().filter_map(|endpoint| flannel_etcd::check_endpoint(endpoint).err());
        let bad_endpoints: Vec<String> = bad_endpoints.map(|error| error.to_string()).collect();
        let public_ip = optional::<Ipv4Addr>("public-ip", &self.public_ip, "an IPv4 address", &mut wrong);
        if let Some(ip) = public_ip.filter(|ip| ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast())
        {
            wrong("public-ip", &ip, "the address of one host");
        }
        if self.etcd_prefix.trim_matches('/').is_empty() {
            wrong("etcd-prefix", &format!("{:?}", self.etcd_prefix), "a path like /coreos.com/network");
        }
        let can_reach =
            optional::<IpAddr>("iface-can-reach", &self.iface_can_reach, "an IP address", &mut wrong);
        let mut patterns = Vec::new();
        for text in self.iface_regex {
            match regex::Regex::new(&text) {
                Ok(regex) => patterns
                    .push(Pattern { text, matches: Arc::new(move |candidate| regex.is_match(candidate)) }),
                Err(error) => {
                    let reason = error.to_string();
                    let reason = reason.lines().last().unwrap_or_default().trim_start_matches("error: ");
                    wrong("iface-regex", &format!("{text:?}"), &format!("a regular expression ({reason})"));
                }
            }
        }

        if !(1..=1439).contains(&self.subnet_lease_renew_margin) {
            wrong(
                "subnet-lease-renew-margin",
                &self.subnet_lease_renew_margin,
                "from 1 to 1439 minutes, for a lease lasts 1440",
            );
        }
        for (flag, seconds) in
            [("iptables-resync", self.iptables_resync), ("audit-interval", self.audit_interval)]
        {
            if !(1..=86_400).contains(&seconds) {
                wrong(flag, &seconds, "from 1 to 86400 seconds, a day");
            }
        }
        if !(0..=86_400).contains(&self.removal_grace) {
            wrong("removal-grace", &self.removal_grace, "from 0 to 86400 seconds, a day");
        }
        let route_mode = match &*self.route_mode.to_ascii_lowercase() {
            "auto" => RouteMode::Auto,
            "plain" => RouteMode::Plain,
            "nexthop" => RouteMode::Nexthop,
            _ => {
                wrong("route-mode", &format!("{:?}", self.route_mode), "auto, plain or nexthop");
                RouteMode::Auto
            }
        };
        if self.verbosity < 0 {
            wrong("v", &self.verbosity, "0 or more");
        }
        let health = match (u16::try_from(self.healthz_port), self.healthz_ip.parse::<IpAddr>()) {
            (_, Err(_)) => {
                wrong("healthz-ip", &format!("{:?}", self.healthz_ip), "an IP address");
                None
            }
            _ if self.healthz_port <= 0 => None,
            (Err(_), _) => {
                wrong("healthz-port", &self.healthz_port, "from 0 to 65535");
                None
            }
            (Ok(port), Ok(ip)) => Some(SocketAddr::new(ip, port)),
        };

        mistakes.extend(bad_endpoints);
        let mut without_effect = Vec::new();
        for (flag, value) in [("--vmodule", &self.vmodule), ("--log_backtrace_at", &self.log_backtrace_at)] {
            if !value.is_empty() {
                without_effect.push(flag);
            }
        }
        let seconds = |seconds: i64| Duration::from_secs(u64::try_from(seconds).unwrap_or(1));
        Settings {
            etcd_endpoints: endpoints,
            etcd_prefix: self.etcd_prefix,
            etcd_key: key,
            etcd_cert: cert,
            etcd_ca: path(self.etcd_cafile),
            etcd_user: user,
            selection: Selection { interfaces: self.iface, patterns, can_reach, public_ip },
            state_dir: path(self.state_dir),
            subnet_file: self.subnet_file,
            renew_margin: 60 * seconds(self.subnet_lease_renew_margin),
            masquerade: self.ip_masq,
            random_fully: !self.ip_masq_fully_random_disable,
            forward: self.iptables_forward_rules,
            blackhole: self.ip_blackhole_route,
            rules_interval: seconds(self.iptables_resync),
            health,
            audit_interval: seconds(self.audit_interval),
            removal_grace: seconds(self.removal_grace),
            route_mode,
            verbosity: self.verbosity,
            without_effect,
        }
    }

    /// What Go flanneld can do and we cannot yet is refused by name: silence would be a broken promise.
    fn refuse_what_is_missing(&self, label: &dyn Fn(&str) -> String, mistakes: &mut Vec<String>) {
        if !self.public_ipv6.is_empty() && self.public_ipv6.parse::<Ipv6Addr>().is_err() {
            let label = label("public-ipv6");
            mistakes.push(format!("{label} is {:?}: must be an IPv6 address", self.public_ipv6));
        }
        let kubernetes = "the Kubernetes subnet manager is not there yet; leave it out and use etcd";
        for (flag, asked, what) in [
            ("public-ipv6", !self.public_ipv6.is_empty(), "IPv6 is not there yet; leave it out"),
            ("kube-subnet-mgr", self.kube_subnet_mgr, kubernetes),
            ("kube-api-url", !self.kube_api_url.is_empty(), kubernetes),
            ("kubeconfig-file", !self.kubeconfig_file.is_empty(), kubernetes),
            ("kube-annotation-prefix", self.kube_annotation_prefix != "flannel.alpha.coreos.com", kubernetes),
            ("net-config-path", self.net_config_path != "/etc/kube-flannel/net-conf.json", kubernetes),
            ("set-node-network-unavailable", !self.set_node_network_unavailable, kubernetes),
        ] {
            if asked {
                mistakes.push(format!("{}: {what}", label(flag)));
            }
        }
    }
}

/// A flag that may be empty.
fn optional<T: std::str::FromStr>(
    flag: &str,
    text: &str,
    allowed: &str,
    wrong: &mut impl FnMut(&str, &dyn fmt::Display, &str),
) -> Option<T> {
    if text.is_empty() {
        return None;
    }
    let parsed = text.parse().ok();
    if parsed.is_none() {
        wrong(flag, &format!("{text:?}"), allowed);
    }
    parsed
}

#[cfg(test)]
mod tests;
