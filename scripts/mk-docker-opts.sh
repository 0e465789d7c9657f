#!/bin/sh
# Turns the environment file that flanneld writes into options for dockerd.
# Switches and output are those scripts written for flannel expect.
# (The options are gathered by their prefix, which shellcheck cannot see.)
# shellcheck disable=SC2034,SC2154
set -eu

subnet_file=/run/flannel/subnet.env
output=/run/docker_opts.env
key=DOCKER_OPTS
individual=no
combined=no
ip_masq=yes
engine=ask
daemon_json=/etc/docker/daemon.json
# The mark by which the agent's traffic rules point out packets of the network.
mark=0x1000/0x1000

usage() {
    cat >&2 <<USAGE
Usage: $0 [-f FILE] [-d FILE] [-i] [-c] [-m] [-k KEY] [-e VERSION] [-j FILE]

Writes dockerd options that match a flannel subnet.

  -f FILE  what flanneld wrote (default: $subnet_file)
  -d FILE  where the options go (default: $output)
  -i       only one variable per option, DOCKER_OPT_BIP and so on
  -c       only one variable with all options
  -k KEY   name of that one variable (default: $key)
  -m       leave --ip-masq out
  -e VERSION  which dockerd they are for (default: the one that is installed)
  -j FILE  what dockerd is told already (default: $daemon_json)
USAGE
    exit 1
}

refuse() {
    echo "$0: $1" >&2
    exit 1
}

while getopts f:d:k:e:j:icmh option; do
    case $option in
    f) subnet_file=$OPTARG ;;
    d) output=$OPTARG ;;
    k) key=$OPTARG ;;
    i) individual=yes ;;
    c) combined=yes ;;
    m) ip_masq=no ;;
    e) engine=$OPTARG ;;
    j) daemon_json=$OPTARG ;;
    *) usage ;;
    esac
done
if [ $individual = no ] && [ $combined = no ]; then
    individual=yes
    combined=yes
fi

# The key becomes a shell variable and a line of a file that others source.
case $key in
'' | [0-9]* | *[!A-Za-z0-9_]*) refuse "-k $key: not a variable name" ;;
esac

# Without a slash, "." would look along PATH and not in this directory.
case $subnet_file in
*/*) ;;
*) subnet_file=./$subnet_file ;;
esac
if [ -f "$subnet_file" ]; then
    # shellcheck source=/dev/null
    . "$subnet_file"
fi

if [ -n "${FLANNEL_SUBNET-}" ]; then
    DOCKER_OPT_BIP=--bip=$FLANNEL_SUBNET
fi
if [ -n "${FLANNEL_MTU-}" ]; then
    DOCKER_OPT_MTU=--mtu=$FLANNEL_MTU
fi
# One of the two masquerades, never both: docker does it when flannel does not.
if [ $ip_masq = yes ]; then
    case ${FLANNEL_IPMASQ-} in
    true) DOCKER_OPT_IPMASQ=--ip-masq=false ;;
    false) DOCKER_OPT_IPMASQ=--ip-masq=true ;;
    '') ;;
    *) refuse "$subnet_file: FLANNEL_IPMASQ is $FLANNEL_IPMASQ, must be true or false" ;;
    esac
fi

# since MAJOR MINOR: whether the engine is that one or a later one. Without an engine, and
# with one whose version is no number, what was always right has to do.
since() {
    [ "$major" -gt "$1" ] || { [ "$major" -eq "$1" ] && [ "$minor" -ge "$2" ]; }
}

# told NAME: whether daemon.json has that option. A flag beside it would keep dockerd from starting.
told() {
    grep -qs "\"$1\"" "$daemon_json"
}

if [ "$engine" = ask ]; then
    engine=$(dockerd --version 2>/dev/null | sed -n 's/^Docker version \([^ ,]*\).*/\1/p' || true)
fi
major=${engine%%.*}
minor=${engine#*.}
minor=${minor%%[!0-9]*}
case $major in '' | *[!0-9]*) major=0 ;; esac
: "${minor:=0}"

# Engines drop what other hosts send to a container unless told otherwise: the first option
# takes a rule of the raw table away, the second has the others let our packets through.
if [ -n "${FLANNEL_SUBNET-}" ]; then
    if since 28 2 && ! told allow-direct-routing; then
        DOCKER_OPT_DIRECT_ROUTING=--allow-direct-routing
    fi
    if since 29 0 && ! told bridge-accept-fwmark; then
        DOCKER_OPT_FWMARK=--bridge-accept-fwmark=$mark
    fi
fi

# Every DOCKER_OPT_ variable counts, so the caller can add one (DOCKER_OPT_DNS=--dns=...).
names=$(set | sed -n 's/^\(DOCKER_OPT_[A-Za-z0-9_]*\)=.*/\1/p' | LC_ALL=C sort)
lines=
options=
for name in $names; do
    eval "value=\$$name"
    lines="$lines$name=\"$value\"
"
    options="$options $value"
done

# What the key holds already, in our environment or in the file read above, goes first.
eval "before=\${$key-}"
[ -z "$before" ] || options="$before $options"

{
    [ $individual = no ] || printf '%s' "$lines"
    [ $combined = no ] || printf '%s="%s"\n' "$key" "$options"
} >"$output"

# A bridge in a subnet that is reached through a gateway would break both. The options
# stay written: whoever looks into this finds them.
if [ -n "${FLANNEL_SUBNET-}" ]; then
    address=${FLANNEL_SUBNET%/*}
    network=${address%.*}.$((${address##*.} - 1))/${FLANNEL_SUBNET#*/}
    route=$(ip -4 route show exact "$network" 2>/dev/null | grep ' via ' || true)
    [ -z "$route" ] || refuse "$network is already routed through a gateway: $route"
fi
