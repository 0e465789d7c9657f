//! Where flannel keeps things in etcd, and what a key and its value mean.

use flannel_core::key::{parse_subnet_key, subnet_key};
use flannel_core::lease::{Lease, LeaseAttrs, Subnet, Tenure};
use flannel_core::store::Unreadable;

use crate::kv::{Entry, Range};

/// No backend publishes a hundredth of that, and every host would have to keep it.
const LONGEST_VALUE: usize = 64 << 10;

/// So many bytes of a key are shown; one of ours has a prefix and less than 80.
const LONGEST_SHOWN: usize = 200;

/// The keys under one prefix.
#[derive(Clone, Debug)]
pub(crate) struct Layout {
    config: String,
    subnets: String,
    hosts: String,
}

impl Layout {
    /// The prefix is joined as Go's `path.Join` does it: `/a//b/` is `/a/b`.
    pub(crate) fn new(prefix: &str) -> Self {
        let prefix = cleaned(prefix);
        Self {
            config: format!("{prefix}config"),
            subnets: format!("{prefix}subnets/"),
            // Nothing of ours may begin with `subnets`, which Go flanneld lists without a slash.
            hosts: format!("{prefix}hosts/"),
        }
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
    fn leases_end(&self) -> String {
        // `0` follows `/` in ASCII.
        format!("{}0", self.subnets.trim_end_matches('/'))
    }

    /// What the keys of all records begin with.
    pub(crate) fn hosts(&self) -> &str {
        &self.hosts
    }

    /// The key of the record of the host that holds a subnet.
    pub(crate) fn record(&self, subnet: &Subnet) -> String {
        format!("{}{}", self.hosts, subnet_key(subnet))
    }

    /// The key of a question to that host.
    pub(crate) fn asks(&self, subnet: &Subnet) -> String {
        format!("{}/asks", self.record(subnet))
    }

    /// The record and the question.
    pub(crate) fn record_keys(&self, subnet: &Subnet) -> [Vec<u8>; 2] {
        [self.record(subnet).into(), self.asks(subnet).into()]
    }

    /// A range with both in it, and those of a few others.
    pub(crate) fn around_record(&self, subnet: &Subnet) -> Range {
        let record = self.record(subnet);
        // `0` follows `/` in ASCII.
        Range { end: Some(format!("{record}0").into()), from: record.into(), ..Range::default() }
    }

    /// The lease, and the record and the question if asked for.
    pub(crate) fn keys_of(&self, subnet: &Subnet, with_record: bool) -> Vec<Vec<u8>> {
        let mut keys = vec![self.lease(subnet).into()];
        if with_record {
            keys.extend(self.record_keys(subnet));
        }
        keys
    }

    /// The range of all leases.
    pub(crate) fn all_leases(&self) -> Range {
        Range { from: self.leases().into(), end: Some(self.leases_end().into()), ..Range::default() }
    }

    /// Reads the subnet out of a lease's key.
    pub(crate) fn subnet(&self, key: &[u8]) -> Option<Subnet> {
        parse_subnet_key(std::str::from_utf8(key).ok()?.strip_prefix(&self.subnets)?)
    }

    /// Reads a lease.
    pub(crate) fn decode(&self, entry: &Entry) -> Result<Lease, Unreadable> {
        let subnet = self.subnet(&entry.key);
        let unreadable = |reason: String| Unreadable { key: shown(&entry.key), subnet, reason };
        let Some(subnet) = subnet else { return Err(unreadable("its name is not a subnet".into())) };
        let attrs = attributes(&entry.value).map_err(unreadable)?;
        let tenure = if entry.lease == 0 { Tenure::Reserved } else { Tenure::Leased };
        Ok(Lease { subnet, attrs, tenure })
    }
}

/// Reads the value of a lease; the error is a phrase.
pub(crate) fn attributes(value: &[u8]) -> Result<LeaseAttrs, String> {
    if value.len() > LONGEST_VALUE {
        return Err(format!("its value has {} bytes: must be {LONGEST_VALUE} or fewer", value.len()));
    }
    let text = std::str::from_utf8(value).map_err(|_| "its value is not UTF-8".to_owned())?;
    LeaseAttrs::from_json(text).map_err(|error| error.to_string())
}

/// A key for people: anybody may have made it, of any bytes and up to a mebibyte of them.
fn shown(key: &[u8]) -> String {
    let text = String::from_utf8_lossy(key);
    let mut shown = String::new();
    for (place, letter) in text.char_indices() {
        if place >= LONGEST_SHOWN {
            shown += &format!("… ({} bytes)", key.len());
            break;
        }
        match letter {
            '\'' | '"' => shown.push(letter),
            _ => shown.extend(letter.escape_debug()),
        }
    }
    shown
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
    fn a_record_and_a_question_stand_beside_the_leases_and_not_among_them() {
        let layout = Layout::new("/net");
        let subnet = layout.subnet(b"/net/subnets/10.5.1.0-24").unwrap();
        let range = layout.around_record(&subnet);

        let keys = layout.record_keys(&subnet);

        assert_eq!(keys, ["/net/hosts/10.5.1.0-24", "/net/hosts/10.5.1.0-24/asks"].map(Vec::from));
        for key in keys {
            assert!(range.from <= key && key < range.end.clone().unwrap());
            assert!(!key.starts_with(b"/net/subnets"));
        }
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

    fn entry(key: &[u8], value: &[u8]) -> Entry {
        Entry { key: key.into(), value: value.into(), lease: 0, created: 1, modified: 1 }
    }

    #[test]
    fn a_value_of_more_than_64_kib_is_not_read() {
        let padded = |length: usize| {
            let value = r#"{"PublicIP":"192.168.0.1"}"#;
            format!("{value}{}", " ".repeat(length - value.len()))
        };
        let decode =
            |value: String| Layout::new("/net").decode(&entry(b"/net/subnets/10.5.1.0-24", value.as_bytes()));

        assert!(decode(padded(65536)).is_ok());
        let refused = decode(padded(65537)).unwrap_err();
        assert_eq!(refused.reason, "its value has 65537 bytes: must be 65536 or fewer");
        assert!(refused.subnet.is_some());
    }

    #[test]
    fn a_key_of_any_bytes_is_shown_on_one_line_and_not_without_end() {
        let key = |name: &[u8]| {
            let key = [b"/net/subnets/", name].concat();
            Layout::new("/net").decode(&entry(&key, b"")).unwrap_err().key
        };

        assert_eq!(key(b"plain \"x\""), "/net/subnets/plain \"x\"");
        assert_eq!(key(b"\x1b[2J\n\xff"), "/net/subnets/\\u{1b}[2J\\n\u{fffd}");
        assert_eq!(key("\u{202e}".as_bytes()), "/net/subnets/\\u{202e}");
        let long = key(&[b'x'; 100_000]);
        assert!(long.len() < 230 && long.ends_with("x… (100013 bytes)"), "{long}");
    }
}
