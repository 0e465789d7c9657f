//! What a host remembers of the cluster.

use flannel_core::memory::Memory;

use super::shown;

/// A state file: as it stands, and as if whoever wrote it had made its checksum right.
///
/// # Panics
/// A memory that is written otherwise than it was read; one that is believed
/// with a byte of it changed.
pub fn state(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    read(text, data.len());
    let body = text.split_once('\n').map_or(text, |(_, body)| body);
    read(&format!("flannel-rs-state 1 {:016x}\n{body}", fnv(body)), data.len());
}

fn read(text: &str, dice: usize) {
    let memory = match text.parse::<Memory>() {
        Ok(memory) => memory,
        Err(error) => return shown(&error.to_string(), 400),
    };
    for now in [0, memory.written, u64::MAX] {
        drop(memory.left(now));
    }
    // The data of a lease may change as it does when it is written and read as such, see `lease`.
    let again = |memory: &Memory| memory.to_string().parse::<Memory>().expect("what was written is read");
    let settled = again(&again(&again(&memory)));
    assert_eq!(again(&settled), settled);
    assert_eq!(again(&settled).to_string(), settled.to_string());
    let written = memory.to_string();
    for text in [text, &written] {
        for place in [0, dice % text.len(), dice * 7 % text.len(), dice * 31 % text.len(), text.len() - 1] {
            let mut bytes = text.to_owned().into_bytes();
            bytes[place] ^= 1 << (dice % 7);
            if let Ok(changed) = String::from_utf8(bytes) {
                assert!(
                    changed.parse::<Memory>().is_err(),
                    "believed with byte {place} changed: {changed:?}"
                );
            }
        }
        let cut = text.get(..text.len() - 1).map(str::parse::<Memory>);
        assert!(cut.is_none_or(|read| read.is_err()), "believed without its last byte");
    }
}

/// The checksum once more, by the paper.
fn fnv(text: &str) -> u64 {
    let mut sum: u64 = 14_695_981_039_346_656_037;
    for byte in text.bytes() {
        sum ^= u64::from(byte);
        sum = sum.wrapping_mul(1_099_511_628_211);
    }
    sum
}
