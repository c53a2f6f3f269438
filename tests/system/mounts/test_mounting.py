"""`thinply mount`, `umount`, `attach`, `detach` and `mounts`: what is where, who may, and what stays after
each order of deaths."""

import os
import shutil
import signal
import subprocess
import time
import unittest
from pathlib import Path

from files import is_mounted, need_mounts
from mounting import Mounting

from support import THINPLY, MiB, missing, run, thinply, wait_for


def setUpModule():
    need_mounts("mkfs.xfs", "mkfs.btrfs", "sfdisk", "fuse2fs", "fusermount3")


class Mounts(Mounting):
    def test_a_container_is_mounted_and_unmounted_with_one_command_each(self):
        target = self.container()
        thinply("mount", target, self.dir)
        self.assertEqual((self.dir / "hello").read_text(), "world")
        (self.dir / "new").write_text("kept")
        (use,) = self.uses()
        self.assertEqual(use["target"], target)
        self.assertEqual(use["folders"], [str(self.dir)])
        self.assertEqual((use["user"], use["read_only"], use["waiting"]), (os.getuid(), False, 0))
        self.assertTrue(os.path.exists(f"/proc/{use['pid']}"))
        self.assertTrue(os.path.exists(use["device"]))
        options = run("findmnt", "-n", "-o", "OPTIONS", self.dir)
        self.assertIn("nosuid,nodev", options)
        thinply("umount", self.dir)
        self.nothing_stays()
        thinply("mount", "-o", "suid,dev,noatime", target, self.dir)
        options = run("findmnt", "-n", "-o", "OPTIONS", self.dir)
        self.assertNotIn("nosuid", options)
        self.assertNotIn("nodev", options)
        self.assertIn("noatime", options)
        self.assertEqual((self.dir / "new").read_text(), "kept")
        # The system's own does as well.
        run("umount", self.dir)
        self.nothing_stays()

    def test_disks_of_a_store_share_a_server_and_leave_it_one_by_one(self):
        other = self.top / "other"
        other.mkdir()
        one, two = self.container("one"), self.container("two")
        thinply("mount", one, self.dir)
        thinply("mount", two, other)
        first, second = self.uses()
        self.assertEqual(first["pid"], second["pid"])
        # Both have the UUID of their image's file system.
        (self.dir / "mine").write_text("one")
        self.assertFalse((other / "mine").exists())
        self.refused("mount", one, other, says=f"is mounted at {self.dir} already")
        self.refused("container", "rm", "one", says="in use")
        thinply("umount", self.dir)
        thinply("container", "rm", "one")
        self.assertEqual([use["target"] for use in self.uses()], [two])
        # What was written so far is in what is made of a mounted container, and nothing of it later.
        (other / "early").write_text("e" * 100000)
        thinply("container", "snapshot", "two", "then")
        thinply("container", "commit", "two", "made:1")
        (other / "late").write_text("l")
        thinply("umount", other)
        self.nothing_stays()
        for target in ("container/two@then", "image/made:1"):
            thinply("mount", target, other)
            self.assertEqual((other / "early").read_text(), "e" * 100000)
            self.assertFalse((other / "late").exists())
            thinply("umount", other)
        # What was committed of what this host made is no stranger's.
        thinply("container", "create", "--name", "three", "made:1")
        thinply("mount", "container/three", other)
        self.assertEqual((other / "early").read_text(), "e" * 100000)
        self.assertFalse((other / "late").exists())
        thinply("umount", other)
        thinply("container", "commit", "three", "made:2")
        thinply("mount", "image/made:2", other)
        self.assertEqual((other / "hello").read_text(), "world")
        with self.assertRaises(OSError):
            (other / "new").write_text("no")
        thinply("umount", other)
        self.nothing_stays()

    def test_what_this_host_did_not_make_takes_trust(self):
        raw = self.top / "raw"
        run("mkfs.ext4", "-q", raw, "32M")
        thinply("import", raw, self.top / "base.tply")
        thinply("create", "--parent", self.top / "base.tply", self.top / "layer.tply")
        thinply("image", "import", raw, "strange:1")
        thinply("volume", "create", "--size", "32M", "blank")
        refusal = "this host did not make its file system"
        self.refused("mount", self.top / "layer.tply", self.dir, says=refusal)
        self.refused("mount", "--read-only", "image/strange:1", self.dir, says=refusal)
        self.refused("mount", "volume/blank", self.dir, says="no file system that is known")
        thinply("container", "create", "--name", "strange", "strange:1")
        self.refused("mount", "container/strange", self.dir, says=refusal)
        thinply("container", "commit", "strange", "strange:2")
        self.refused("mount", "image/strange:2", self.dir, says=refusal)
        self.assertFalse(is_mounted(self.dir))
        for target in [self.top / "layer.tply", "container/strange", "image/strange:2"]:
            thinply("mount", "--trust", target, self.dir)
            self.assertTrue((self.dir / "lost+found").exists())
            thinply("umount", self.dir)
        # The name alone is no proof: another volume may have it.
        target = self.volume()
        thinply("volume", "rm", "data")
        thinply("volume", "create", "--size", "64M", "data")
        device = thinply("attach", target).strip()
        run("mkfs.ext4", "-q", device)
        thinply("detach", target)
        self.refused("mount", target, self.dir, says=refusal)
        thinply("gc")
        self.nothing_stays()

    def test_file_systems_and_partitions(self):
        layer = self.top / "disk.tply"
        thinply("create", "--size", "1G", layer)
        for make in (["mkfs.xfs", "-q", "-f"], ["mkfs.btrfs", "-q", "-f"], ["mkfs.ext4", "-q", "-F", "-b", "1024"]):
            device = thinply("attach", layer).strip()
            run(*make, device)
            thinply("detach", device)
            thinply("mount", "--trust", layer, self.dir)
            (self.dir / "x").write_text(make[0])
            thinply("umount", self.dir)
            thinply("mount", "--trust", "--read-only", layer, self.dir)
            self.assertEqual((self.dir / "x").read_text(), make[0])
            thinply("umount", self.dir)
            self.nothing_stays()
        for kind in ("dos", "gpt"):
            device = thinply("attach", layer).strip()
            script = f"label: {kind}\nstart=2048, size=100M\nsize=200M\n"
            subprocess.run(["sfdisk", "-q", "--wipe", "always", device], input=script, text=True, check=True,
                           capture_output=True)
            thinply("detach", device)
            part = thinply("attach", "--partition", 2, layer).strip()
            self.assertEqual(run("blockdev", "--getsize64", part).strip(), str(200 * MiB))
            run("mkfs.ext4", "-q", "-F", part)
            self.refused("mount", "--trust", "--partition", 2, layer, self.dir, says="is attached as /dev/loop")
            (use,) = self.uses()
            self.assertEqual((use["device"], use["partition"]), (part, 2))
            thinply("detach", layer)
            self.refused("mount", "--trust", layer, self.dir, says="but partitions: --partition 1, 2")
            thinply("mount", "--trust", "--partition", 2, layer, self.dir)
            (self.dir / "x").write_text(kind)
            thinply("umount", self.dir)
            self.refused("mount", "--trust", "--partition", 7, layer, self.dir, says="there are: 1, 2")
        self.nothing_stays()

    def test_fstab_and_mount_8(self):
        helper = Path("/sbin/mount.thinply")
        if helper.exists() or helper.is_symlink():
            missing("no other /sbin/mount.thinply")
        helper.symlink_to(THINPLY)
        self.addCleanup(helper.unlink)
        target = self.volume()
        options = f"root={os.environ['THINPLY_ROOT']},noatime,_netdev,x-systemd.automount"
        fstab = self.top / "fstab"
        fstab.write_text(f"{target} {self.dir} thinply {options} 0 0\n")
        run("mount", "-T", fstab, self.dir)
        self.assertIn("noatime", run("findmnt", "-n", "-o", "OPTIONS", self.dir))
        (self.dir / "x").write_text("y")
        run("umount", self.dir)
        run("mount", "-t", "thinply", "-r", "-o", options, target, self.dir)
        self.assertEqual((self.dir / "x").read_text(), "y")
        with self.assertRaises(OSError):
            (self.dir / "x").write_text("z")
        self.refused("umount", self.top, says="nothing of thinply is mounted there")
        thinply("umount", self.dir)
        # What is mounted gets other options.
        run("mount", "-T", fstab, self.dir)
        run("mount", "-T", fstab, "-o", "remount,ro", self.dir)
        with self.assertRaises(OSError):
            (self.dir / "x").write_text("z")
        run("mount", "-T", fstab, "-o", "remount,rw", self.dir)
        (self.dir / "x").write_text("z")
        run("umount", self.dir)
        self.nothing_stays()

    def test_what_cannot_be_says_why_and_leaves_nothing(self):
        target = self.container()
        for command, says in [
            (("mount", "web", self.dir), "disks of the store are called as in container/web"),
            (("mount", "container/none", self.dir), "no container"),
            (("mount", target, self.top / "nowhere"), "No such file"),
            (("mount", target, "/etc/passwd"), "Not a directory"),
            (("mount", self.top / "none.tply", self.dir), "No such file"),
            (("mount", "-o", "nonsense", target, self.dir), "nonsense"),
            (("umount", self.dir), "nothing of thinply is mounted there"),
            (("umount", "/"), "nothing of thinply is mounted there"),
            (("detach", target), "is not attached"),
            (("detach", "/dev/null"), "is not attached"),
            (("attach", "--partition", 1, target), "there are: none"),
        ]:
            self.refused(*command, says=says)
        self.nothing_stays()

    def test_a_link_does_not_lead_a_mount_astray(self):
        target = self.container()
        link = self.top / "link"
        link.symlink_to(self.dir)
        thinply("mount", target, link)
        self.assertTrue(is_mounted(self.dir))
        # What leads to a mount is no mount.
        other = self.top / "other"
        other.symlink_to("/proc")
        self.refused("umount", other, says="nothing of thinply is mounted there")
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_umount_takes_what_mount_took(self):
        target, link = self.volume(), self.top / "link"
        link.symlink_to("mnt")
        for name in (self.dir, link, f"{self.dir}/", target):
            thinply("mount", target, self.dir)
            thinply("umount", name)
            self.nothing_stays()
        thinply("mount", target, self.dir)
        (use,) = self.uses()
        thinply("umount", use["device"])
        self.nothing_stays()

    def test_a_disk_is_unmounted_from_all_folders(self):
        target, place = self.container(), self.top / "place"
        place.mkdir()
        thinply("mount", target, self.dir)
        run("mount", "--bind", self.dir, place)
        # One at a time by the folder.
        thinply("umount", place)
        self.assertTrue(is_mounted(self.dir))
        run("mount", "--bind", self.dir, place)
        thinply("umount", target)
        self.assertFalse(is_mounted(self.dir) or is_mounted(place))
        self.assertEqual(self.uses(), [])
        thinply("container", "rm", "web")
        self.nothing_stays()

    def test_what_lies_over_a_mount_is_left_alone(self):
        target, other = self.container(), self.volume()
        thinply("mount", target, self.dir)
        thinply("mount", other, self.dir)
        (self.dir / "precious").write_text("p" * 100000)
        for command in (("umount", target), ("umount", "--force", target)):
            self.refused(*command, says="another file system is mounted over it")
            self.assertEqual((self.dir / "precious").read_text(), "p" * 100000)
            (self.dir / "more").write_text("m")
        thinply("umount", self.dir)
        thinply("umount", "--force", self.dir)
        thinply("mount", other, self.dir)
        self.assertEqual((self.dir / "precious").read_text(), "p" * 100000)
        run("mount", "-t", "tmpfs", "over", self.dir)
        self.refused("umount", self.dir, says="something else is mounted over it")
        run("umount", self.dir)
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_a_refusal_stands_in_nobodys_way(self):
        thinply("volume", "create", "--size", "32M", "blank")
        for _ in range(8):
            self.refused("mount", "volume/blank", self.dir, says="no file system that is known")
            thinply("volume", "rm", "blank")
            thinply("volume", "create", "--size", "32M", "blank")
        target = self.volume()
        for _ in range(15):
            thinply("mount", target, self.dir)
            # Whose server may just be coming to its end.
            run("umount", self.dir)
        thinply("mount", target, self.dir)
        place = self.top / "place"
        place.mkdir()
        for command in (("mount", target, place), ("mount", "--read-only", target, place), ("attach", target),
                        ("attach", "--read-only", target)):
            began = time.monotonic()
            self.refused(*command, says=f"{target}: is mounted at {self.dir} already")
            self.assertLess(time.monotonic() - began, 1.5, "nobody is waited for")
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_a_mount_may_hide_its_own_store(self):
        target = self.volume()
        thinply("mount", target, self.top / "store")
        self.assertEqual([use["target"] for use in self.uses()], [target])
        thinply("umount", self.top / "store")
        self.nothing_stays()

    def test_rooms_of_servers_that_have_ended_are_cleared_away(self):
        layers = [self.top / f"{number}.tply" for number in range(4)]
        for layer in layers:
            thinply("create", "--size", "16M", layer)
            thinply("attach", layer)
        self.assertEqual(len(list(self.runs.iterdir())), 4)
        for layer in layers[1:]:
            thinply("detach", layer)
        self.nothing_runs_but(1)
        target = self.volume()
        thinply("mount", target, self.dir)
        self.assertEqual(len(list(self.runs.iterdir())), 2)
        self.assertEqual({use["target"] for use in self.uses()}, {str(layers[0]), target})
        thinply("detach", layers[0])
        thinply("umount", self.dir)
        self.nothing_stays()

    def nothing_runs_but(self, count):
        found = lambda: run("pgrep", "-f", "--", f"^[^ ]*thinply serve .*{self.runs}", status=None).split()
        wait_for(lambda: len(found()) <= 2 * count, "the end of servers")

    def test_state_of_somebody_else_is_not_used(self):
        target = self.volume()
        self.runs.mkdir(mode=0o755)
        self.refused("mount", target, self.dir, says="mode 0700")
        self.runs.chmod(0o700)
        os.chown(self.runs, 65534, 65534)
        self.refused("mount", target, self.dir, says="mode 0700")
        os.chown(self.runs, 0, 0)
        thinply("mount", target, self.dir)
        (room,) = self.runs.iterdir()
        for path in [self.runs, room, *room.rglob("*")]:
            if path.is_dir() and str(room / "files") not in str(path):
                self.assertEqual(path.stat().st_mode & 0o077, 0, path)
        # What it says decides nothing.
        for name in (room / "uses").iterdir():
            name.write_text("{" * 100000)
        (room / "pid").write_text("-1")
        (use,) = self.uses()
        self.assertEqual((use["user"], use["since"]), (None, None))
        thinply("umount", self.dir)

    def test_attached_devices_stay_until_they_are_detached(self):
        target = self.volume()
        device = thinply("attach", "--read-only", target).strip()
        self.assertEqual(run("blockdev", "--getro", device).strip(), "1")
        (use,) = self.uses()
        self.assertEqual((use["device"], use["folders"]), (device, []))
        thinply("detach", target)
        self.nothing_stays()
        device = thinply("attach", target).strip()
        run("mount", device, self.dir)
        self.refused("detach", target, says="is mounted at")
        # What is mounted is being written; what is mounted for reading is not.
        out = self.top / "out.tply"
        self.refused("import", device, out, says="is being written")
        thinply("import", "-U", device, out)
        run("umount", self.dir)
        out.unlink()
        run("mount", "-o", "ro", device, self.dir)
        thinply("import", device, out)
        run("umount", self.dir)
        thinply("detach", device)
        self.nothing_stays()


class Deaths(Mounting):
    def setUp(self):
        super().setUp()
        self.target = self.volume()
        thinply("mount", self.target, self.dir)
        (self.dir / "before").write_text("x" * 100000)
        os.sync()
        (self.use,) = self.uses()
        self.holder = self.use["pid"]
        self.server = int(run("pgrep", "-P", self.holder).split()[0])

    def comes_back(self):
        """It is mounted again, with all that was synced."""
        thinply("mount", self.target, self.dir)
        self.assertEqual((self.dir / "before").read_text(), "x" * 100000)
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_the_server_dies(self):
        for _ in range(3):
            os.kill(self.server, signal.SIGKILL)
            (self.dir / "during").write_text("y")
            os.sync()
            self.server = int(wait_for(lambda: run("pgrep", "-P", self.holder, status=None), "a server").split()[0])
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_the_holder_dies_then_the_file_system_goes(self):
        os.kill(self.holder, signal.SIGKILL)
        (self.dir / "during").write_text("y")
        thinply("umount", self.dir)
        self.nothing_stays()
        thinply("mount", self.target, self.dir)
        self.assertEqual((self.dir / "during").read_text(), "y")
        thinply("umount", self.dir)
        self.nothing_stays()

    def both_die(self):
        os.kill(self.holder, signal.SIGKILL)
        os.kill(self.server, signal.SIGKILL)

    def test_both_die_and_umount_says_what_may_be_lost(self):
        (self.dir / "late").write_text("l" * 100000)
        self.both_die()
        self.refused("umount", self.dir, says="what was written since it was synced last may be lost")
        # It is unmounted all the same, and nothing is left of its server.
        self.assertFalse(is_mounted(self.dir))
        self.nothing_stays()
        # Its journal is not written back, and what can only be read can't have that done.
        self.refused("mount", "--read-only", self.target, self.dir, says="its journal has to be replayed")
        self.comes_back()

    def test_both_die_and_each_mount_is_ended(self):
        place = self.top / "place"
        place.mkdir()
        run("mount", "--bind", self.dir, place)
        self.both_die()
        for folder in (place, self.dir):
            self.refused("umount", folder, says="may be lost")
            self.assertFalse(is_mounted(folder))
        self.nothing_stays()
        self.comes_back()

    def test_both_die_and_it_is_unmounted_by_force(self):
        self.both_die()
        self.refused("mount", self.target, self.top / "nowhere", says="No such file")
        thinply("umount", "--force", self.dir)
        self.assertFalse(is_mounted(self.dir))
        # The next mount clears away what is left of the server.
        self.comes_back()

    def test_both_die_and_the_system_unmounts(self):
        self.both_die()
        run("umount", "-l", self.dir)
        thinply("mount", self.target, self.dir)
        thinply("umount", self.dir)
        self.nothing_stays()

    def test_somebody_stands_in_it(self):
        inside = subprocess.Popen(["sleep", "1000"], cwd=self.dir)
        self.addCleanup(inside.kill)
        self.refused("umount", self.dir, says="--force unmounts it")
        began = time.monotonic()
        thinply("umount", "--force", self.dir)
        self.assertLess(time.monotonic() - began, 60)
        self.assertFalse(is_mounted(self.dir))
        # Its layer is free, whoever stands there still.
        thinply("resize", self.target, "128M")
        inside.kill()
        inside.wait()
        self.nothing_stays()
        # Its journal is replayed, and all that was synced is there.
        self.comes_back()

    def test_a_server_that_hangs_is_ended_by_force(self):
        self.stopped()
        (self.dir / "lost").write_text("l")
        done = subprocess.run([THINPLY, "umount", "--force", self.dir], capture_output=True, text=True, timeout=60)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertFalse(is_mounted(self.dir))
        self.comes_back()

    def stopped(self):
        """The server does not answer, nor does its holder start another one."""
        for pid in (self.holder, self.server):
            os.kill(pid, signal.SIGSTOP)
            self.addCleanup(run, "kill", "-KILL", pid, status=None)
        # A thread that reads one more request is waited for in the kernel by whoever made it.
        states = lambda pid: {
            (thread / "stat").read_text().rsplit(")", 1)[1].split()[0]
            for thread in Path(f"/proc/{pid}/task").iterdir()}
        wait_for(lambda: states(self.holder) == states(self.server) == {"T"}, "all threads to stop")

    def test_a_server_that_hangs_holds_nobody_up_for_ever(self):
        other, place = self.volume("other"), self.top / "place"
        place.mkdir()
        thinply("mount", self.container(), place)
        thinply("umount", place)
        self.stopped()
        for command in (("mount", other, place), ("attach", other), ("umount", self.dir),
                        ("container", "snapshot", "web", "then"), ("resize", self.target, "128M")):
            self.refused(*command, says="does not answer")
        self.assertEqual([use["target"] for use in self.uses()], [self.target])
        thinply("umount", "--force", self.dir)
        self.comes_back()

    def test_what_the_systems_umount_hangs_on_is_ended_by_its_name(self):
        self.stopped()
        (self.dir / "lost").write_text("l")
        hanging = subprocess.Popen(["umount", self.dir])
        wait_for(lambda: not is_mounted(self.dir), "the folder to be free")
        self.assertIsNone(hanging.poll())
        self.refused("umount", self.dir, says="nothing of thinply is mounted there")
        self.refused("umount", self.target, says="detach it")
        thinply("umount", "--force", self.target)
        hanging.wait(timeout=60)
        self.comes_back()

    def test_a_mount_that_another_namespace_keeps(self):
        keeping = subprocess.Popen(["unshare", "--mount", "sleep", "1000"])
        self.addCleanup(keeping.kill)
        wait_for(lambda: os.readlink(f"/proc/{keeping.pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt"), "a namespace")
        says = f"stays in use: process {keeping.pid} has it mounted in a namespace of its own"
        self.refused("umount", self.dir, says=says)
        self.assertFalse(is_mounted(self.dir))
        self.refused("detach", self.target, says=says)
        keeping.kill()
        keeping.wait()
        self.nothing_stays()
        self.comes_back()

    def test_whoever_mounts_dies_on_the_way(self):
        thinply("umount", self.dir)
        for wait in range(12):
            mounting = subprocess.Popen([THINPLY, "mount", self.target, self.dir])
            time.sleep(wait * 0.005)
            mounting.kill()
            mounting.wait()
            # Whatever of it had come to be.
            if any(use["folders"] for use in self.uses()):
                thinply("umount", self.dir)
            thinply("mount", self.target, self.dir)
            thinply("umount", self.dir)
        self.nothing_stays()

    def test_the_shell_that_mounted_ends(self):
        thinply("umount", self.dir)
        shell = subprocess.Popen(["sh", "-c", f"{THINPLY} mount {self.target} {self.dir}; kill -HUP 0; sleep 9"],
                                 start_new_session=True)
        shell.wait(timeout=60)
        (self.dir / "after").write_text("z")
        thinply("umount", self.dir)
        self.nothing_stays()


class Users(Mounting):
    def test_whoever_may_not_mount_hears_what_else_there_is(self):
        home = self.top / "home"
        home.mkdir()
        shutil.chown(home, 65534, 65534)
        self.top.chmod(0o755)
        environment = {**os.environ, "THINPLY_RUN": str(home / "run"), "THINPLY_ROOT": str(home / "store")}

        def as_user(*command, status=0):
            done = subprocess.run([THINPLY, *map(str, command)], env=environment, user=65534, group=65534,
                                  extra_groups=[], capture_output=True, text=True, timeout=60, cwd=home)
            self.assertEqual(done.returncode, status, done.stderr)
            return done.stdout + done.stderr

        as_user("volume", "create", "--size", "64M", "--fs", "ext4", "data")
        said = as_user("mount", "volume/data", home, status=2)
        self.assertIn("only root may mount", said)
        self.assertIn("--user", said)
        mode = os.stat("/dev/fuse").st_mode & 0o777
        os.chmod("/dev/fuse", 0o666)
        self.addCleanup(os.chmod, "/dev/fuse", mode)
        said = as_user("attach", "volume/data", status=2)
        self.assertIn("only root may use loop devices", said)
        wait_for(lambda: str(home) not in Path("/proc/self/mountinfo").read_text(), "the server's end")
        # Root takes no other user's word for who made it.
        environment_of_root = {**os.environ, "THINPLY_ROOT": str(home / "store")}
        done = subprocess.run([THINPLY, "mount", "volume/data", self.dir], env=environment_of_root,
                              capture_output=True, text=True, timeout=60)
        self.assertIn("did not make its file system", done.stderr)
        wait_for(lambda: not run("pgrep", "-f", "--", f"--fuse {self.runs}", status=None), "the server's end")
        folder = home / "mnt"
        folder.mkdir()
        shutil.chown(folder, 65534, 65534)
        as_user("mount", "--user", "volume/data", folder)
        listed = as_user("mounts")
        self.assertIn(str(folder), listed)
        write = ["sh", "-c", f"echo yes > {folder}/x && cat {folder}/x"]
        done = subprocess.run(write, user=65534, group=65534, extra_groups=[], capture_output=True, text=True)
        self.assertEqual(done.stdout, "yes\n", done.stderr)
        # Nobody else sees into it, not even root.
        with self.assertRaises(PermissionError):
            os.listdir(folder)
        as_user("umount", folder)
        self.assertEqual(as_user("mounts").strip().count("\n"), 0)


if __name__ == "__main__":
    unittest.main()
