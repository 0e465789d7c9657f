# shellcheck shell=bash
# Hosts that are network namespaces, joined by a wire that is another one, with etcd on it:
#
#     NET-1 eth0 192.0.2.1 ──┐
#     NET-2 eth0 192.0.2.2 ──┼── bridge "wire" 192.0.2.254, etcd      (namespace NET-wire)
#     ...                    ┘
#
# Sourced by demo, lab and bench. The caller sets two names before anything else:
#
#     NET   prefix of the namespaces, nobody else's
#     RUN   directory for files, sockets and logs; short, a socket's path ends at 107 bytes
#
# Nothing is created outside those namespaces, that directory and the cgroup NET. Cleaning up
# therefore needs no records: what runs in our namespaces is ours, and goes by process id.

PATH=$PATH:/usr/sbin:/sbin
TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
ETCD=http://192.0.2.254:2379
ETCD_PREFIX=/coreos.com/network
HEALTH_PORT=8471

# The log that explains the step under way, shown by fail.
EXPLAINS=

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    if [ -n "$EXPLAINS" ] && [ -s "$EXPLAINS" ]; then
        printf -- '--- the end of %s\n' "${EXPLAINS#"$RUN"/}" >&2
        tail -n 25 "$EXPLAINS" >&2
    fi
    exit 1
}

need_root() {
    [ "$(id -u)" -eq 0 ] || fail "makes network namespaces, so it needs root: sudo env \"PATH=\$PATH\" $0 $*"
}

# Sets FLANNELD to a daemon that can be run. Without one given, builds ours.
find_daemon() {
    if [ -n "${FLANNELD-}" ]; then
        FLANNELD=$(command -v "$FLANNELD") || fail "FLANNELD: no such program"
        FLANNELD=$(realpath "$FLANNELD")
        return
    fi
    FLANNELD=${CARGO_TARGET_DIR:-$TOP/target}/release/flanneld
    if command -v cargo >/dev/null; then
        # Cargo decides whether what is there is still current.
        (cd "$TOP" && cargo build --release --package flanneld) || fail "the build did not succeed"
        [ -x "$FLANNELD" ] || fail "the build brought no $FLANNELD"
    else
        [ -x "$FLANNELD" ] || fail "no $FLANNELD, and no cargo to build it (see https://rustup.rs)"
    fi
}

# poll SECONDS COMMAND... : runs the command until it succeeds; false at the deadline.
poll() {
    local until=$((SECONDS + $1))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -le $until ] || return 1
        sleep 0.05
    done
}

# wait_for WHAT SECONDS PID COMMAND... : the same for what a process of ours is about to
# do, and there is no point in waiting for a dead one.
wait_for() {
    local what=$1 seconds=$2 pid=$3
    shift 3
    # shellcheck disable=SC2317  # Called by poll.
    either() { "$@" || ! kill -0 "$pid"; }
    poll "$seconds" either "$@" || fail "no $what after $seconds s"
    "$@" >/dev/null 2>&1 || fail "no $what: the process that should bring it has ended"
}

# --- hosts -------------------------------------------------------------------------------

# on HOST COMMAND... : runs it there; HOST is a number or "wire". This is "ip netns exec"
# without the private /sys, in which dockerd would miss the cgroups.
on() {
    local host=$1
    shift
    nsenter "--net=/run/netns/$NET-$host" -- "$@"
}

underlay() { echo "192.0.2.$1"; }

host_dir() { echo "$RUN/host$1"; }

# Sets STARTED. The process gets a session of its own: neither a Ctrl-C meant for the
# script nor the end of a terminal reaches it, and the shell does not report its death.
start() {
    local host=$1 log=$2
    shift 2
    EXPLAINS=$log
    setsid nsenter "--net=/run/netns/$NET-$host" -- "$@" </dev/null >>"$log" 2>&1 &
    STARTED=$!
    disown "$STARTED"
}

make_wire() {
    # The last use of a proxy was before: etcd's clients would ask it for 192.0.2.254.
    unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
    ip netns add "$NET-wire"
    ip -n "$NET-wire" link set lo up
    # A bridge whose MAC nobody has set takes the lowest of its ports, so each new host might
    # change it, and the others would go on sending etcd's packets to the old one.
    ip -n "$NET-wire" link add wire address 02:00:c0:00:02:fe type bridge
    ip -n "$NET-wire" address add 192.0.2.254/24 dev wire
    ip -n "$NET-wire" link set wire up
}

make_host() {
    local host=$1
    ip netns add "$NET-$host"
    ip -n "$NET-$host" link set lo up
    # Born inside both namespaces, so the names can be plain.
    ip link add eth0 netns "$NET-$host" type veth peer name "host$host" netns "$NET-wire"
    ip -n "$NET-wire" link set "host$host" master wire up
    ip -n "$NET-$host" address add "$(underlay "$host")/24" dev eth0
    ip -n "$NET-$host" link set eth0 up
    ip -n "$NET-$host" route add default via 192.0.2.254
    # A namespace starts with forwarding off, and so may the machine.
    on "$host" sh -c 'echo 1 >/proc/sys/net/ipv4/ip_forward'
    mkdir -p "$(host_dir "$host")"
}

# --- etcd --------------------------------------------------------------------------------

etcd_ctl() { on wire env ETCDCTL_API=3 etcdctl "--endpoints=$ETCD" "$@"; }

start_etcd() {
    # Nothing of it has to survive a power cut, so it need not wait for the disk.
    start wire "$RUN/etcd.log" etcd --data-dir "$RUN/etcd" --unsafe-no-fsync \
        --listen-client-urls "$ETCD" --advertise-client-urls "$ETCD" \
        --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380 \
        --initial-cluster default=http://127.0.0.1:2380
    wait_for "etcd" 20 "$STARTED" etcd_ctl endpoint health
}

# --- agents ------------------------------------------------------------------------------

# start_agent HOST [FLAG...] : without waiting for it.
start_agent() {
    local host=$1 directory
    directory=$(host_dir "$host")
    shift
    start "$host" "$directory/flanneld.log" env FLANNELD_STATE_DIR="$directory/state" "$FLANNELD" \
        --etcd-endpoints="$ETCD" --etcd-prefix="$ETCD_PREFIX" --iface=eth0 --ip-masq \
        --subnet-file="$directory/subnet.env" --healthz-ip=127.0.0.1 --healthz-port=$HEALTH_PORT "$@"
    echo "$STARTED" >"$directory/flanneld.pid"
}

agent_pid() { cat "$(host_dir "$1")/flanneld.pid"; }

# Process ids are used again; being in the host's namespace tells ours from a stranger.
agent_alive() { ip netns pids "$NET-$1" 2>/dev/null | grep -qx "$(agent_pid "$1")"; }

await_agent() {
    EXPLAINS=$(host_dir "$1")/flanneld.log
    wait_for "$(host_dir "$1")/subnet.env" 20 "$(agent_pid "$1")" test -s "$(host_dir "$1")/subnet.env"
}

# subnet_value HOST NAME : one value of the host's subnet.env.
subnet_value() { sed -n "s/^$2=//p" "$(host_dir "$1")/subnet.env" 2>/dev/null; }

# readiness HOST : what /readyz answers. Asked by the shell: a static busybox may crash in
# wget's name look-up, and curl is not on every machine.
readiness() {
    # shellcheck disable=SC2016  # Expanded by that shell.
    on "$1" timeout 3 bash -c '
        exec 3<>"/dev/tcp/127.0.0.1/$1" || exit
        printf "GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n" >&3
        sed "1,/^\r*$/d" <&3' bash $HEALTH_PORT 2>/dev/null | head -n 1 | grep . || echo "no answer"
}

# --- containers --------------------------------------------------------------------------

# start_docker HOST : with the options that follow from the host's subnet.env.
start_docker() {
    local host=$1 directory options
    directory=$(host_dir "$host")/docker
    mkdir -p "$directory"
    EXPLAINS=
    on "$host" "$TOP/scripts/mk-docker-opts.sh" -f "$(host_dir "$host")/subnet.env" -d "$directory/options" -c ||
        fail "mk-docker-opts.sh refused host $host"
    options=$(sed -n 's/^DOCKER_OPTS="\(.*\)"$/\1/p' "$directory/options")
    echo '{}' >"$directory/daemon.json"

    # A dockerd that shares nothing with the machine's own:
    #   -p --kill-child  its containers and helpers cannot outlive it, whatever ends it
    #   -m               mounts vanish with it; /run and /etc/docker, where it would leave
    #                    sockets and a key, are empty; no D-Bus means it cannot ask the
    #                    machine's firewalld or systemd for anything
    #   cgroupfs         so that the cgroup below NET is a plain directory on every machine
    # It starts a containerd of its own below --exec-root, as none is named.
    # shellcheck disable=SC2016,SC2086  # Expanded by that shell; the options are words.
    start "$host" "$directory/dockerd.log" \
        unshare -m -u -p -f --kill-child --mount-proc sh -c '
            hostname "$1" && shift
            mount -t tmpfs tmpfs /run
            [ ! -d /etc/docker ] || mount -t tmpfs tmpfs /etc/docker
            exec dockerd "$@"' sh "host$host" \
        --config-file "$directory/daemon.json" -H "unix://$directory/sock" --pidfile "$directory/pid" \
        --data-root "$directory/data" --exec-root "$directory/exec" --storage-driver vfs \
        --exec-opt native.cgroupdriver=cgroupfs --cgroup-parent "/$NET" $options
    echo "$STARTED" >"$directory/unshare.pid"
}

await_docker() {
    EXPLAINS=$(host_dir "$1")/docker/dockerd.log
    wait_for "answer from dockerd on host $1" 30 "$(cat "$(host_dir "$1")/docker/unshare.pid")" docker_on "$1" version
}

docker_on() {
    local host=$1
    shift
    docker -H "unix://$(host_dir "$host")/docker/sock" "$@"
}

children() { cat "/proc/$1/task/$1/children"; }

# import_image HOST : an image "busybox" out of this machine's static busybox, as there may
# be no registry to pull from.
import_image() {
    local root=$RUN/image
    if [ ! -d "$root" ]; then
        mkdir -p "$root/bin" "$root/etc" "$root/tmp"
        cp "$(command -v busybox)" "$root/bin/busybox"
        "$root/bin/busybox" --list | while read -r applet; do
            [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
        done
    fi
    tar -C "$root" -c . | docker_on "$1" import - busybox:latest >/dev/null
}

# start_container HOST NAME : one that does nothing and can be entered with docker exec.
# It is stopped with KILL: sleep, as process 1, would let dockerd wait ten seconds.
start_container() {
    docker_on "$1" run -d --name "$2" --hostname "$2" --stop-signal KILL busybox:latest sleep 1000000 >/dev/null
}

container_address() {
    docker_on "$1" inspect -f '{{.NetworkSettings.IPAddress}}' "$2"
}

# beside_container HOST NAME COMMAND... : a program of this machine in the container's
# network. That namespace has a name only among the mounts of its dockerd, the one child
# of the process we started.
beside_container() {
    local host=$1 name=$2 unshare dockerd network
    shift 2
    unshare=$(cat "$(host_dir "$host")/docker/unshare.pid")
    dockerd=$(children "$unshare")
    network=$(docker_on "$host" inspect -f '{{.NetworkSettings.SandboxKey}}' "$name")
    nsenter -t "${dockerd% }" -m -p -- nsenter "--net=$network" -- "$@"
}

# --- the end -----------------------------------------------------------------------------

namespaces() { find /run/netns -maxdepth 1 -name "$NET-*" -printf '%f\n' 2>/dev/null; }

processes() {
    local namespace
    for namespace in $(namespaces); do
        ip netns pids "$namespace" 2>/dev/null || true
    done
}

no_processes() { [ -z "$(processes)" ]; }

signal_all() {
    local pids
    mapfile -t pids < <(processes)
    [ ${#pids[@]} -eq 0 ] || kill "-$1" "${pids[@]}" 2>/dev/null || true
}

# Removes everything, as often as it is called. Never fails: it runs when all else has.
tear_down() {
    local file namespace pid
    [ -n "${NET-}" ] && [ -n "${RUN-}" ] || return 0
    # Nothing a dockerd would put in order is kept, so it and its containers just go. The
    # signal is for dockerd itself; the process above it then collects it and ends.
    for file in "$RUN"/host*/docker/unshare.pid; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        if processes | grep -qx "$pid"; then
            # shellcheck disable=SC2046  # One word or none.
            kill -KILL $(children "$pid") 2>/dev/null || true
        fi
    done
    signal_all TERM
    if ! poll 5 no_processes; then
        signal_all KILL
        poll 5 no_processes || true
    fi
    for namespace in $(namespaces); do
        ip netns del "$namespace" || true
    done
    find /sys/fs/cgroup -depth -type d \( -path "*/$NET/*" -o -name "$NET" \) -exec rmdir {} + 2>/dev/null || true
    rm -rf --one-file-system "$RUN" || true
}
