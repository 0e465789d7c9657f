//! Where flannel keeps things in etcd, and what a key and its value mean.

use etcd_client::KeyValue;
use flannel_core::key::{parse_subnet_key, subnet_key};
use flannel_core::lease::{Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::store::Unreadable;

/// The keys under one prefix.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    config: String,
    subnets: String,
}

impl Layout {
    /// The prefix is joined as Go's `path.Join` does it: `/a//b/` is `/a/b`.
    pub(crate) fn new(prefix: &str) -> Self {
        let prefix = cleaned(prefix);
        Self { config: format!("{prefix}config"), subnets: format!("{prefix}subnets/") }
    }

    /// The key of the network config.
    pub(crate) fn config(&self) -> &str {
        &self.config
    }

    /// The key of one lease.
    pub(crate) fn lease(&self, subnet: &Subnet) -> String {
        format!("{}{}", self.subnets, subnet_key(subnet))
    }

    /// What the keys of all leases begin with. Flannel lists without the slash
    /// at the end and so meets foreign keys such as `subnets-old`.
    pub(crate) fn leases(&self) -> &str {
        &self.subnets
    }

    /// The first key behind all leases.
    pub(crate) fn leases_end(&self) -> String {
        // `0` follows `/` in ASCII.
        format!("{}0", self.subnets.trim_end_matches('/'))
    }

    /// Reads the subnet out of a lease's key.
    pub(crate) fn subnet(&self, key: &[u8]) -> Option<Subnet> {
        parse_subnet_key(std::str::from_utf8(key).ok()?.strip_prefix(&self.subnets)?)
    }

    /// Reads a lease.
    pub(crate) fn decode(&self, kv: &KeyValue) -> Result<Lease, Unreadable> {
        let subnet = self.subnet(kv.key());
        let unreadable = |reason: String| Unreadable {
            key: String::from_utf8_lossy(kv.key()).into_owned(),
            subnet,
            reason,
        };
        let Some(subnet) = subnet else { return Err(unreadable("its name is not a subnet".into())) };
        let attrs = attributes(kv.value()).map_err(unreadable)?;
        let tenure = if kv.lease() == 0 { Tenure::Reserved } else { Tenure::Leased };
        Ok(Lease { subnet, attrs, tenure })
    }
}

/// Reads the value of a lease; the error is a phrase.
pub(crate) fn attributes(value: &[u8]) -> Result<LeaseAttrs, String> {
    let text = std::str::from_utf8(value).map_err(|_| "its value is not UTF-8".to_owned())?;
    LeaseAttrs::from_json(text).map_err(|error| error.to_string())
}

/// The prefix without its detours, ready to be followed by a name.
fn cleaned(prefix: &str) -> String {
    let rooted = prefix.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in prefix.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    let path: String = parts.iter().map(|part| format!("{part}/")).collect();
    if rooted { format!("/{path}") } else { path }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_prefix_gives_flannels_keys() {
        let layout = Layout::new("/coreos.com/network");

        assert_eq!(layout.config(), "/coreos.com/network/config");
        assert_eq!(layout.leases(), "/coreos.com/network/subnets/");
        assert_eq!(layout.leases_end(), "/coreos.com/network/subnets0");
    }

    #[test]
    fn a_prefix_is_joined_as_go_joins_paths() {
        for (prefix, config) in [
            ("/a//b/", "/a/b/config"),
            ("a", "a/config"),
            ("", "config"),
            ("/", "/config"),
            ("/a/./b", "/a/b/config"),
            ("/a/../b", "/b/config"),
            ("/../a", "/a/config"),
            ("../a", "../a/config"),
            ("a/..", "config"),
        ] {
            assert_eq!(Layout::new(prefix).config(), config, "{prefix}");
        }
    }

    #[test]
    fn the_key_of_a_lease_reads_and_writes_back() {
        let layout = Layout::new("/net");
        let subnet = layout.subnet(b"/net/subnets/10.5.1.0-24").unwrap();

        assert_eq!(layout.lease(&subnet), "/net/subnets/10.5.1.0-24");
    }

    #[test]
    fn a_key_from_elsewhere_is_no_lease() {
        for key in ["/net/subnets", "/net/subnets/", "/net/subnets/junk", "/other/subnets/10.5.1.0-24"] {
            assert_eq!(Layout::new("/net").subnet(key.as_bytes()), None, "{key}");
        }
    }
}
