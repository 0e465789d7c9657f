//! What is on its way to the kernel and to etcd, as far as a name needs it.

/// What a message to the kernel changes; `None` if it only asks, or is no such message.
pub(super) fn netlink(mut bytes: &[u8]) -> Option<String> {
    const VERBS: [&str; 4] = ["NEW", "DEL", "GET", "SET"];
    const OBJECTS: [(u16, &str); 5] =
        [(16, "LINK"), (20, "ADDR"), (24, "ROUTE"), (28, "NEIGH"), (104, "NEXTHOP")];
    let mut counts: Vec<(String, usize)> = vec![];
    while bytes.len() >= 16 {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let kind = u16::from_ne_bytes([bytes[4], bytes[5]]);
        if !(16..=bytes.len()).contains(&length) {
            return None;
        }
        let object = OBJECTS.iter().find(|(base, _)| *base == kind & !3);
        let name = object.map(|(_, object)| match (*object, bytes.get(16)) {
            ("NEIGH", Some(7)) => "FDB",
            (object, _) => object,
        });
        let verb = VERBS[usize::from(kind & 3)];
        if let Some(name) = name.filter(|_| verb != "GET") {
            let name = format!("{verb}{name}");
            match counts.last_mut().filter(|(last, _)| *last == name) {
                Some((_, count)) => *count += 1,
                None => counts.push((name, 1)),
            }
        }
        bytes = &bytes[length.next_multiple_of(4).min(bytes.len())..];
    }
    let counts: Vec<String> = counts.iter().map(|(name, count)| format!("{count} {name}")).collect();
    (!counts.is_empty()).then(|| format!("netlink {}", counts.join(" ")))
}

/// The frames of HTTP/2 (RFC 9113, section 4.1) that begin in some bytes.
pub(super) struct Frames<'a>(pub(super) &'a [u8]);

pub(super) struct Frame<'a> {
    kind: u8,
    pub(super) stream: u32,
    payload: &'a [u8],
}

impl Frame<'_> {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;

    /// Whether it carries something.
    pub(super) fn has_data(&self) -> bool {
        self.kind == Self::DATA && !self.payload.is_empty()
    }

    /// The method that it calls, if it begins a request: of `:path`, which stands there as a literal (RFC 7541,
    /// section 6.2), the last part.
    pub(super) fn method(&self) -> Option<String> {
        let block = if self.kind == Self::HEADERS { self.payload } else { return None };
        let is_path = |at: &usize| {
            matches!(block.get(*at), Some(0x04 | 0x44))
                && block.get(at + 1).is_some_and(|length| *length > 0x80)
        };
        let mut paths = (0..block.len()).filter(is_path).filter_map(|at| {
            let length = usize::from(block[at + 1] & 0x7f);
            let path = letters(block.get(at + 2..at + 2 + length)?);
            path.strip_prefix("/etcdserverpb.")?.rsplit('/').next().map(String::from)
        });
        paths.next()
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Frame<'a>;

    fn next(&mut self) -> Option<Frame<'a>> {
        let (header, rest) = self.0.split_first_chunk::<9>()?;
        let [long, length @ .., kind, _, a, b, c, d] = *header;
        let length = usize::from(long) << 16 | usize::from(u16::from_be_bytes(length));
        let payload = &rest[..length.min(rest.len())];
        self.0 = &rest[payload.len()..];
        Some(Frame { kind, stream: u32::from_be_bytes([a, b, c, d]) & i32::MAX as u32, payload })
    }
}

/// Reads Huffman codes (RFC 7541, appendix B) of up to eight bits; that is all a method's name has.
fn letters(bytes: &[u8]) -> String {
    // The codes of one length follow each other.
    const CODES: [(u32, u32, &str); 4] = [
        (5, 0x00, "012aceiost"),
        (6, 0x14, " %-./3456789=A_bdfghlmnpru"),
        (7, 0x5c, ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
        (8, 0xf8, "&*,;XZ"),
    ];
    let mut bits = bytes.iter().flat_map(|byte| (0..8).rev().map(move |bit| u32::from(byte >> bit & 1)));
    let mut text = String::new();
    let (mut code, mut length) = (0, 0);
    while let Some(bit) = bits.next().filter(|_| length < 8) {
        (code, length) = (code << 1 | bit, length + 1);
        let row = CODES.iter().find(|(bits, first, _)| *bits == length && code >= *first);
        let letter = row.and_then(|(_, first, letters)| letters.chars().nth((code - first) as usize));
        if let Some(letter) = letter {
            text.push(letter);
            (code, length) = (0, 0);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_to_the_kernel_is_named_by_what_it_changes() {
        let message = |kind: u16, family: u8| {
            let mut bytes = vec![20, 0, 0, 0];
            bytes.extend(kind.to_ne_bytes());
            bytes.extend([0; 10]);
            bytes.extend([family, 0, 0, 0]);
            bytes
        };
        let batch = [message(28, 2), message(28, 7), message(28, 7), message(24, 2)].concat();

        assert_eq!(netlink(&batch).as_deref(), Some("netlink 1 NEWNEIGH 2 NEWFDB 1 NEWROUTE"));
        assert_eq!(netlink(&message(105, 0)).as_deref(), Some("netlink 1 DELNEXTHOP"));
        assert_eq!(netlink(&message(26, 2)), None, "a question");
        assert_eq!(netlink(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), None);
    }

    #[test]
    fn a_request_to_etcd_is_named_by_its_method() {
        let path = b"\x83\x86\x02\x04\x95\x60\xa9$\x88-\x9d\xcbeq\xaf\x9c\xa3AX\xceQ\xa0\xb8\xac\x1dI\xc1";
        let mut bytes = vec![0, 0, path.len() as u8, 1, 4, 0, 0, 0, 5];
        bytes.extend(path);

        let frame = Frames(&bytes).next().unwrap();

        assert_eq!((frame.method().as_deref(), frame.stream), (Some("LeaseGrant"), 5));
    }
}
