//! A bus of one's own, and firewalld on it: the real one, or somebody who talks like it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::lab::{Process, until};
use crate::need;

/// A bus of the system as Debian has it, with firewalld's own words on who may do what.
const CONFIG: &str = r#"<busconfig>
  <listen>unix:path={path}</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <includedir>/usr/share/dbus-1/system.d</includedir>
  <includedir>/etc/dbus-1/system.d</includedir>
</busconfig>
"#;

/// Takes firewalld's name, is silent until it is told to `stand`, and then answers and
/// says `Reloaded` for each line. It is run by the Python that firewalld is run by.
const TALKER: &str = r"
import sys, dbus, dbus.bus, dbus.lowlevel
from dbus.mainloop.glib import DBusGMainLoop
from gi.repository import GLib
name, path = 'org.fedoraproject.FirewallD1', '/org/fedoraproject/FirewallD1'
bus = dbus.bus.BusConnection(sys.argv[1], mainloop=DBusGMainLoop())
bus.request_name(name)
print('begun', flush=True)
sys.stdin.readline()
loop = GLib.MainLoop()
def told(*_):
    if not sys.stdin.readline():
        loop.quit()
        return False
    bus.send_message(dbus.lowlevel.SignalMessage(path, name, 'Reloaded'))
    bus.flush()
    return True
GLib.io_add_watch(sys.stdin, GLib.IO_IN | GLib.IO_HUP, told)
loop.run()
";

/// Runs firewalld with iptables-legacy wherever it would run iptables.
const LEGACY: &str = r#"
    for program in iptables ip6tables ebtables; do
        for part in "" -restore -save; do
            file=$(readlink -f "/usr/sbin/$program$part") && [ -e "$file" ] || continue
            case $file in *nft*) mount --bind /usr/sbin/xtables-legacy-multi "$file";; esac
        done
    done
    exec "$@""#;

/// A bus of the system, for whoever is told its address.
pub struct Bus {
    directory: TempDir,
    daemon: Option<Process>,
}

impl Bus {
    /// What tells the programs of a host where it is.
    pub const VARIABLE: &str = "DBUS_SYSTEM_BUS_ADDRESS";

    /// Whether this machine has what it takes, firewalld included.
    pub fn possible() -> bool {
        ["dbus-daemon", "dbus-send", "firewalld", "firewall-cmd"].into_iter().all(need)
    }

    /// One that nobody has started yet.
    ///
    /// # Panics
    /// There is no room for its files.
    pub fn new() -> Self {
        let bus = Self { directory: tempfile::tempdir().expect("a directory can be made"), daemon: None };
        let config = CONFIG.replace("{path}", &bus.path("socket").display().to_string());
        fs::write(bus.path("config"), config).expect("a file can be written");
        Command::new("chmod").arg("755").arg(bus.directory.path()).status().expect("chmod can be run");
        bus
    }

    /// One that runs.
    ///
    /// # Panics
    /// It does not.
    pub fn started() -> Self {
        let mut bus = Self::new();
        bus.start();
        bus
    }

    /// Starts it, for the first time or again.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(&mut self) {
        let mut command = Command::new("dbus-daemon");
        command.arg(format!("--config-file={}", self.path("config").display()));
        command.args(["--nofork", "--nopidfile", "--nosyslog"]);
        self.daemon = Some(Process::start(command, self.path("log")));
        until("the bus is there", || std::os::unix::net::UnixStream::connect(self.path("socket")).is_ok());
    }

    /// Takes it away.
    pub fn stop(&mut self) {
        self.daemon = None;
        // What it leaves behind so as not to be taken for it.
        drop(fs::remove_file(self.path("socket")));
    }

    /// What [`Bus::VARIABLE`] says on a host with this bus.
    pub fn address(&self) -> String {
        format!("unix:path={}", self.path("socket").display())
    }

    /// Has somebody who is not firewalld say that it has reloaded, to all and to each of the first on the bus.
    ///
    /// # Panics
    /// It cannot be said.
    pub fn lie(&self) {
        let each = (0..10).map(|number| Some(format!("--dest=:1.{number}")));
        for to in each.chain([None]) {
            let mut command = Command::new("dbus-send");
            command.arg(format!("--bus={}", self.address())).args(to).arg("--type=signal");
            command.args(["/org/fedoraproject/FirewallD1", "org.fedoraproject.FirewallD1.Reloaded"]);
            assert!(command.status().expect("dbus-send can be run").success());
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Default for Bus {
    fn default() -> Self {
        Self::new()
    }
}

/// Somebody who has firewalld's name.
pub struct Talker(Child);

impl Talker {
    /// One that has begun, and does not answer yet.
    ///
    /// # Panics
    /// It cannot be run.
    pub fn begin(bus: &Bus) -> Self {
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", TALKER, &bus.address()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("firewalld's python can be run");
        let mut begun = [0; 6];
        let stdout = child.stdout.as_mut().expect("it was asked for");
        std::io::Read::read_exact(stdout, &mut begun).expect("it takes the name");
        Self(child)
    }

    /// One whose rules stand.
    pub fn standing(bus: &Bus) -> Self {
        let mut talker = Self::begin(bus);
        talker.stand();
        talker
    }

    /// Has it answer from now on.
    pub fn stand(&mut self) {
        self.tell();
    }

    /// Has it say that it has reloaded.
    pub fn reload(&mut self) {
        self.tell();
    }

    fn tell(&mut self) {
        let stdin = self.0.stdin.as_mut().expect("it was asked for");
        stdin.write_all(b"\n").expect("it listens");
    }
}

impl Drop for Talker {
    fn drop(&mut self) {
        // It may have ended with its bus.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What firewalld makes its rules with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// nftables, in a table of its own.
    Nftables,
    /// iptables, with its rules in nf_tables.
    IptablesNft,
    /// iptables, with tables of its own.
    IptablesLegacy,
}

/// A firewalld with nothing but its defaults, in the network namespace of the calling thread.
pub struct Firewalld {
    process: Process,
    bus: Bus,
}

impl Firewalld {
    /// Starts it; its rules stand.
    ///
    /// # Panics
    /// They do not.
    pub fn start(backend: Backend) -> Self {
        let bus = Bus::started();
        let name = if backend == Backend::Nftables { "nftables" } else { "iptables" };
        fs::create_dir(bus.path("etc")).expect("a directory can be made");
        let config = format!("FirewallBackend={name}\nDefaultZone=public\n");
        fs::write(bus.path("etc/firewalld.conf"), config).expect("a file can be written");
        let mut command = Command::new("unshare");
        command.args([
            "-m",
            "sh",
            "-c",
            if backend == Backend::IptablesLegacy { LEGACY } else { r#"exec "$@""# },
        ]);
        command.args(["sh", "firewalld", "--nofork", "--nopid", "--log-target", "console"]);
        command.arg("--system-config").arg(bus.path("etc"));
        command.env(Bus::VARIABLE, bus.address());
        let process = Process::start(command, bus.path("firewalld"));
        let firewalld = Self { process, bus };
        until("firewalld runs", || {
            firewalld.command(&["--state"]).output().is_ok_and(|told| told.status.success())
        });
        firewalld
    }

    /// Where it is heard.
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// A `firewall-cmd` to it.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("firewall-cmd");
        command.args(words).env(Bus::VARIABLE, self.bus.address());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        command
    }

    /// Has it do something.
    ///
    /// # Panics
    /// It does not.
    pub fn run(&self, words: &[&str]) {
        let status = self.command(words).status().expect("firewall-cmd can be run");
        assert!(status.success(), "firewall-cmd {words:?}: {status}\n{}", self.log());
    }

    /// What it has said.
    pub fn log(&self) -> String {
        self.process.log()
    }

    /// Stops it as `systemctl stop` does.
    pub fn stop(&mut self) {
        self.process.signal(Signal::SIGTERM);
        self.process.ended();
    }
}
