//! Network devices as messages.

use std::net::IpAddr;

use flannel_core::state::{Link, LinkKind, LinkName, MacAddr, Vxlan};
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags, LinkInfo, LinkMessage, VxlanDf,
};

use super::socket::{Kernel, NetlinkError, Request, decode_part};

/// A device as the kernel describes it; other devices by index.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SeenLink {
    pub(crate) index: u32,
    pub(crate) name: LinkName,
    pub(crate) mtu: u32,
    pub(crate) up: bool,
    /// Zeros for a device that has no Ethernet address.
    pub(crate) mac: MacAddr,
    pub(crate) kind: SeenKind,
}

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SeenKind {
    /// The lower device stands beside as an index.
    Vxlan(Vxlan, Option<u32>),
    Other(Box<str>),
}

impl SeenLink {
    /// The device in core's words; `lower` is the name of its lower device.
    pub(crate) fn into_link(self, lower: Option<LinkName>) -> Link {
        let kind = match self.kind {
            SeenKind::Vxlan(vxlan, _) => LinkKind::Vxlan(Vxlan { lower, ..vxlan }),
            SeenKind::Other(words) => LinkKind::Other(words),
        };
        Link { kind, mac: self.mac, mtu: self.mtu, up: self.up }
    }

    /// The index of its lower device.
    pub(crate) fn lower(&self) -> Option<u32> {
        match &self.kind {
            SeenKind::Vxlan(_, lower) => *lower,
            SeenKind::Other(_) => None,
        }
    }
}

/// Looks a device up by its name; `None` if there is none.
pub(crate) fn by_name(kernel: &mut Kernel, name: LinkName) -> Result<Option<SeenLink>, NetlinkError> {
    find(kernel, asking(vec![LinkAttribute::IfName(name.to_string())]))
}

/// All devices, in the order of their indexes.
pub(crate) fn all(kernel: &mut Kernel) -> Result<Vec<SeenLink>, NetlinkError> {
    list(kernel, asking(vec![]))
}

/// The device that already holds this network identifier on this port.
pub(crate) fn twin(kernel: &mut Kernel, wanted: &Vxlan) -> Result<Option<SeenLink>, NetlinkError> {
    let only_vxlan = LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan)]);
    Ok(list(kernel, asking(vec![only_vxlan]))?.into_iter().find(|seen| match &seen.kind {
        SeenKind::Vxlan(vxlan, _) => (vxlan.vni, vxlan.port) == (wanted.vni, wanted.port),
        SeenKind::Other(_) => false,
    }))
}

/// Makes a device, switched off.
pub(crate) fn add(name: LinkName, link: &Link, vxlan: &Vxlan, lower: Option<u32>) -> Request {
    let mut data = vec![InfoVxlan::Id(vxlan.vni)];
    data.extend(lower.map(InfoVxlan::Link));
    data.extend(vxlan.local.map(source));
    data.extend([
        InfoVxlan::Ttl(0),
        InfoVxlan::Tos(0),
        InfoVxlan::Learning(vxlan.learning),
        InfoVxlan::Proxy(false),
        InfoVxlan::Rsc(false),
        InfoVxlan::L2Miss(false),
        InfoVxlan::L3Miss(false),
        InfoVxlan::UDPZeroCsumTX(false),
        InfoVxlan::UDPZeroCsumRX(false),
        InfoVxlan::Port(vxlan.port),
    ]);
    if vxlan.gbp {
        data.push(InfoVxlan::Gbp);
    }
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_string()),
        LinkAttribute::Mtu(link.mtu),
        LinkAttribute::TxQueueLen(0),
        LinkAttribute::Address(link.mac.0.to_vec()),
        vxlan_info(data),
    ];
    Request { flags: NLM_F_CREATE | NLM_F_EXCL, message: RouteNetlinkMessage::NewLink(message).into() }
}

/// Where a device sends from.
fn source(local: IpAddr) -> InfoVxlan {
    match local {
        IpAddr::V4(address) => InfoVxlan::Local(address),
        IpAddr::V6(address) => InfoVxlan::Local6(address),
    }
}

/// Gives a standing device another name.
pub(crate) fn rename(index: u32, name: LinkName) -> Request {
    to_standing(index, vec![LinkAttribute::IfName(name.to_string())])
}

/// Switches a device on or off.
pub(crate) fn set_up(index: u32, up: bool) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    Request { flags: 0, message: RouteNetlinkMessage::NewLink(message).into() }
}

/// Brings a device to what it should be, naming only what differs.
///
/// What is particular to VXLAN goes in a message of its own: beside it the
/// kernel takes no MTU (`vxlan_nl2conf` in `drivers/net/vxlan/vxlan_core.c`).
pub(crate) fn change(is: &SeenLink, should: &Link, lower: Option<u32>) -> Vec<Request> {
    let mut requests = vec![];
    if let (SeenKind::Vxlan(is_vxlan, is_lower), LinkKind::Vxlan(vxlan)) = (&is.kind, &should.kind) {
        let mut data = vec![];
        if *is_lower != lower {
            data.extend(lower.map(InfoVxlan::Link));
        }
        if is_vxlan.local != vxlan.local {
            data.extend(vxlan.local.map(source));
        }
        if is_vxlan.learning != vxlan.learning {
            data.push(InfoVxlan::Learning(vxlan.learning));
        }
        if !data.is_empty() {
            requests.push(to_standing(is.index, vec![vxlan_info(data)]));
        }
    }
    let mut attributes = vec![];
    if is.mac != should.mac {
        attributes.push(LinkAttribute::Address(should.mac.0.to_vec()));
    }
    if is.mtu != should.mtu {
        attributes.push(LinkAttribute::Mtu(should.mtu));
    }
    if !attributes.is_empty() {
        requests.push(to_standing(is.index, attributes));
    }
    if is.up != should.up {
        requests.push(set_up(is.index, should.up));
    }
    requests
}

fn to_standing(index: u32, attributes: Vec<LinkAttribute>) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = attributes;
    Request { flags: 0, message: RouteNetlinkMessage::NewLink(message).into() }
}

/// Deletes a device.
pub(crate) fn remove(index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    Request { flags: 0, message: RouteNetlinkMessage::DelLink(message).into() }
}

fn vxlan_info(data: Vec<InfoVxlan>) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))])
}

fn asking(mut attributes: Vec<LinkAttribute>) -> LinkMessage {
    attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
    let mut message = LinkMessage::default();
    message.attributes = attributes;
    message
}

fn find(kernel: &mut Kernel, message: LinkMessage) -> Result<Option<SeenLink>, NetlinkError> {
    match kernel.get(RouteNetlinkMessage::GetLink(message))? {
        Ok(RouteNetlinkMessage::NewLink(message)) => Ok(decode(&message)),
        Ok(_) => Err(NetlinkError::Garbled("no link where one was asked for".into())),
        Err(refusal) if refusal.errno == Errno::ENODEV => Ok(None),
        Err(refusal) => Err(NetlinkError::Refused(refusal)),
    }
}

fn list(kernel: &mut Kernel, message: LinkMessage) -> Result<Vec<SeenLink>, NetlinkError> {
    let mut links = kernel.dump(RouteNetlinkMessage::GetLink(message), read)?;
    links.sort_by_key(|link| link.index);
    Ok(links)
}

/// Reads a device that the kernel tells of.
pub(crate) fn read(kind: u16, payload: &[u8]) -> Option<SeenLink> {
    match decode_part(kind, payload)? {
        RouteNetlinkMessage::NewLink(message) | RouteNetlinkMessage::DelLink(message) => decode(&message),
        _ => None,
    }
}

/// A device; `None` if it has no name that an operator could write.
fn decode(message: &LinkMessage) -> Option<SeenLink> {
    let mut name = None;
    let mut link = SeenLink {
        index: message.header.index,
        name: "lo".parse().ok()?,
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        mac: MacAddr([0; 6]),
        kind: SeenKind::Other("device without a kind".into()),
    };
    let mut elsewhere = false;
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name = text.parse().ok(),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Address(bytes) => {
                link.mac = MacAddr(bytes.as_slice().try_into().unwrap_or_default());
            }
            LinkAttribute::LinkInfo(info) => link.kind = decode_kind(info),
            LinkAttribute::LinkNetNsId(_) => elsewhere = true,
            _ => {}
        }
    }
    if elsewhere && matches!(link.kind, SeenKind::Vxlan(..)) {
        link.kind = SeenKind::Other("vxlan with its socket in another namespace".into());
    }
    link.name = name?;
    Some(link)
}

fn decode_kind(info: &[LinkInfo]) -> SeenKind {
    let mut kind = None;
    let mut data = None;
    for part in info {
        match part {
            LinkInfo::Kind(name) => kind = Some(name),
            LinkInfo::Data(InfoData::Vxlan(attributes)) => data = Some(attributes),
            _ => {}
        }
    }
    match (kind, data) {
        (_, Some(attributes)) => decode_vxlan(attributes),
        (Some(kind), None) => SeenKind::Other(kind.to_string().into()),
        (None, None) => SeenKind::Other("device without a kind".into()),
    }
}

fn decode_vxlan(attributes: &[InfoVxlan]) -> SeenKind {
    let mut vxlan = Vxlan { vni: 0, port: 0, local: None, lower: None, learning: false, gbp: false };
    let mut lower = None;
    for attribute in attributes {
        match attribute {
            InfoVxlan::Id(vni) => vxlan.vni = *vni,
            InfoVxlan::Port(port) => vxlan.port = *port,
            InfoVxlan::Local(address) => vxlan.local = Some(IpAddr::V4(*address)),
            InfoVxlan::Local6(address) => vxlan.local = Some(IpAddr::V6(*address)),
            InfoVxlan::Link(index) if *index != 0 => lower = Some(*index),
            InfoVxlan::Learning(learning) => vxlan.learning = *learning,
            InfoVxlan::Gbp => vxlan.gbp = true,
            other => {
                if let Some(words) = never_ours(other) {
                    return SeenKind::Other(format!("vxlan with {words}").into());
                }
            }
        }
    }
    SeenKind::Vxlan(vxlan, lower)
}

/// What a device of flannel's never has, in words.
fn never_ours(attribute: &InfoVxlan) -> Option<String> {
    Some(match attribute {
        InfoVxlan::Group(group) => format!("a default remote {group}"),
        InfoVxlan::Group6(group) => format!("a default remote {group}"),
        InfoVxlan::Ttl(ttl) if *ttl != 0 => format!("ttl {ttl}"),
        InfoVxlan::TtlInherit(1..) => "ttl inherit".into(),
        InfoVxlan::Tos(tos) if *tos != 0 => format!("tos {tos}"),
        InfoVxlan::Df(df) if *df != VxlanDf::Unset => format!("df {df}"),
        InfoVxlan::Label(label) if *label != 0 => format!("flow label {label}"),
        InfoVxlan::Limit(limit) if *limit != 0 => format!("at most {limit} entries"),
        InfoVxlan::Proxy(true) => "proxy".into(),
        InfoVxlan::Rsc(true) => "rsc".into(),
        InfoVxlan::L2Miss(true) => "l2miss".into(),
        InfoVxlan::L3Miss(true) => "l3miss".into(),
        InfoVxlan::CollectMetadata(true) => "external control".into(),
        InfoVxlan::UDPZeroCsumTX(true) | InfoVxlan::UDPZeroCsumRX(true) => "zero UDP checksums".into(),
        InfoVxlan::RemCsumTX(true) | InfoVxlan::RemCsumRX(true) => "remote checksums".into(),
        InfoVxlan::Gpe => "gpe".into(),
        InfoVxlan::Vnifilter(true) => "a vni filter".into(),
        _ => return None,
    })
}
